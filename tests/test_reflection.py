"""Reflection: grpcurl, buf curl and others read the protos from the server."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2

from tests.clinic import Front

V1, V1ALPHA = "grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"
CONTRACT = Path(__file__).parent.parent / "protos" / "clinic" / "frontdesk" / "v1"
BUF = Path(sys.executable).with_name("buf")


@pytest.fixture(params=[V1, V1ALPHA])
async def reflection(front: Front, request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """An open stream of reflection."""
    call: Any = front.channel.stream_stream(
        f"/{request.param}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )()
    yield call
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK


async def ask(reflection: Any, **question: Any) -> Any:
    """The answer to one question."""
    request = reflection_pb2.ServerReflectionRequest(**question)
    await reflection.write(request)
    answer = await reflection.read()
    assert answer.original_request == request
    return answer


def files(answer: Any) -> DescriptorPool:
    """A pool with the files of the answer, which must include those that they import."""
    found = map(FileDescriptorProto.FromString, answer.file_descriptor_response.file_descriptor_proto)
    waiting = {file.name: file for file in found}
    pool = DescriptorPool()
    while waiting:
        name = next(name for name, file in waiting.items() if not waiting.keys() & set(file.dependency))
        pool.Add(waiting.pop(name))
    return pool


async def test_services(reflection: Any) -> None:
    """Every service is listed, including reflection's own two, and each is in the file that the server names."""
    answer = await ask(reflection, list_services="")
    services = {service.name for service in answer.list_services_response.service}
    protos = "".join(proto.read_text() for proto in CONTRACT.glob("*.proto"))
    ours = {f"clinic.frontdesk.v1.{name}" for name in re.findall(r"^service (\w+)", protos, re.MULTILINE)}
    assert services == ours | {V1, V1ALPHA, "grpc.health.v1.Health"}
    for service in services:
        assert files(await ask(reflection, file_containing_symbol=service)).FindServiceByName(service).methods


async def test_every_file(reflection: Any) -> None:
    """Every file of the contract, its imports and the error details can be read by file name."""
    names = [f"clinic/frontdesk/v1/{proto.name}" for proto in CONTRACT.glob("*.proto")]
    assert "clinic/frontdesk/v1/error_reason.proto" in names
    for name in (*names, "buf/validate/validate.proto", "google/type/date.proto", "google/rpc/error_details.proto"):
        assert files(await ask(reflection, file_by_filename=name)).FindFileByName(name).name == name
    assert (await ask(reflection, file_by_filename="clinic/frontdesk/v1/nobody.proto")).error_response.error_code == 5


@pytest.mark.parametrize(
    ("symbol", "file"),
    {
        "clinic.frontdesk.v1.QueueService": "queue",
        "clinic.frontdesk.v1.QueueService.CheckIn": "queue",
        "clinic.frontdesk.v1.QueueService.WatchQueue": "queue",
        "clinic.frontdesk.v1.Queue": "queue",
        "clinic.frontdesk.v1.Queue.entries": "queue",
        "clinic.frontdesk.v1.QueueChange.Kind": "queue",
        "clinic.frontdesk.v1.QueueChange.KIND_BOOKED": "queue",
        "clinic.frontdesk.v1.WatchQueueResponse.update": "queue",
        "clinic.frontdesk.v1.ERROR_REASON_DAY_FULL": "error_reason",
        "clinic.frontdesk.v1.text": "rules",
        "grpc.health.v1.Health.Check": "",
        f"{V1}.ServerReflectionInfo": "",
        "google.rpc.ErrorInfo": "",
    }.items(),
)
async def test_symbols(reflection: Any, symbol: str, file: str) -> None:
    """A service, a method, a message, a field, an enum, an enum value and an extension can all be found."""
    answer = await ask(reflection, file_containing_symbol=symbol)
    pool = files(answer)
    if file:
        assert pool.FindFileByName(f"clinic/frontdesk/v1/{file}.proto")


@pytest.mark.parametrize(
    "symbol",
    [
        *("", ".", "clinic", "clinic.frontdesk.v1", "clinic.frontdesk.v1.Nobody", "clinic.frontdesk.v1.Queue.nobody"),
        *("clinic.frontdesk.v1.QueueService.Nobody", "clinic.frontdesk.v1.QueueService.CheckIn.appointment_id"),
        *("clinic.frontdesk.v1.QueueService/CheckIn", "clinic.frontdesk.v1.QueueService."),
    ],
)
async def test_unknown_symbols(reflection: Any, symbol: str) -> None:
    """An unknown name is not found, and the stream continues."""
    assert (await ask(reflection, file_containing_symbol=symbol)).error_response.error_code == 5
    assert (await ask(reflection, list_services="")).list_services_response.service


async def test_extensions(reflection: Any) -> None:
    """The extensions of options can be found by number."""
    options = "google.protobuf.FieldOptions"
    answer = await ask(reflection, all_extension_numbers_of_type=options)
    assert 1159 in answer.all_extension_numbers_response.extension_number
    question = reflection_pb2.ExtensionRequest(containing_type=options, extension_number=1159)
    pool = files(await ask(reflection, file_containing_extension=question))
    assert pool.FindExtensionByName("buf.validate.field").number == 1159


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_curl(front: Front, protocol: str) -> None:
    """`buf curl` lists the methods and calls one, with either version of reflection."""
    clinic = await front.clinic()
    url = f"http://127.0.0.1:{front.port}"
    using = ["curl", "--http2-prior-knowledge", "--protocol", "grpc", "--reflect-protocol", protocol]

    async def buf(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            BUF, *using, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, error = await process.communicate()
        assert process.returncode == 0, error.decode()
        return out.decode()

    assert "clinic.frontdesk.v1.QueueService/WatchQueue" in await buf("--list-methods", url)
    request = json.dumps({"clinic_id": clinic.id})
    answer = await buf(f"{url}/clinic.frontdesk.v1.ClinicService/GetClinic", "-d", request)
    assert json.loads(answer)["clinic"]["id"] == clinic.id
