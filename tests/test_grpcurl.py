"""grpcurl, as the README and `frontdesk serve` say to call it: it knows nothing but what reflection tells."""

import asyncio
import json
import platform
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clinic.frontdesk.v1 import queue_pb2
from tests.clinic import Front, today

README = Path(__file__).parents[1] / "README.md"
PROTOS = README.parent / "protos"
GRPCURL = Path(sys.executable).parent / "grpcurl"
API = "clinic.frontdesk.v1"

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the package's grpcurl is for Linux on x86-64",
)


@asynccontextmanager
async def running(*arguments: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """grpcurl with these arguments."""
    process = await asyncio.create_subprocess_exec(
        GRPCURL, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def grpcurl(*arguments: str | Path) -> tuple[int | None, str]:
    """The exit status, and what it prints."""
    async with running(*arguments) as process, asyncio.timeout(60):
        out, err = await process.communicate()
    return process.returncode, (out or err).decode()


async def call(front: Front, method: str, request: dict[str, Any]) -> dict[str, Any]:
    """Call a method; its answer."""
    address = f"127.0.0.1:{front.port}"
    status, said = await grpcurl("-plaintext", "-d", json.dumps(request), address, f"{API}.{method}")
    assert status == 0, said
    answer: dict[str, Any] = json.loads(said)
    return answer


async def refused(front: Front, method: str, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Call a method; the code of the refusal, and its details by their types."""
    address = f"127.0.0.1:{front.port}"
    status, said = await grpcurl("-plaintext", "-d", json.dumps(request), address, f"{API}.{method}")
    assert status != 0, said
    code = re.search(r"^  Code: (\w+)$", said, re.MULTILINE)
    assert code is not None, said
    details = [json.loads(detail) for detail in re.findall(r"^  \d\)\t(.*)$", said, re.MULTILINE)]
    return code[1], {detail.pop("@type").rpartition(".")[2]: detail for detail in details}


async def test_the_readmes_command(front: Front) -> None:
    """The grpcurl command that the README prints lists the doctors."""
    [printed] = re.findall(r"^(?:\S*/)?grpcurl (.* 127\.0\.0\.1:50051 .*)$", README.read_text(), re.MULTILINE)
    doctor = await front.doctor(code="DR-SILVA")
    status, said = await grpcurl(*shlex.split(printed.replace(":50051", f":{front.port}")))
    assert status == 0, said
    assert [one["id"] for one in json.loads(said)["doctors"]] == [doctor.id]


async def test_list(front: Front) -> None:
    """`list` names every service, and the methods of one."""
    address = f"127.0.0.1:{front.port}"
    status, said = await grpcurl("-plaintext", address, "list")
    assert status == 0, said
    ours = {f"{API}.{name}" for path in PROTOS.glob("clinic/**/*.proto") for name in services(path)}
    assert ours <= set(said.split())
    assert "grpc.health.v1.Health" in said.split()
    _, said = await grpcurl("-plaintext", address, "list", f"{API}.QueueService")
    methods = queue_pb2.DESCRIPTOR.services_by_name["QueueService"].methods_by_name
    assert said.split() == sorted(f"{API}.QueueService.{name}" for name in methods)


def services(path: Path) -> list[str]:
    """The services of a proto."""
    return re.findall(r"^service (\w+)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("symbol", "said"),
    [
        ("QueueService", "rpc WatchQueue ( .clinic.frontdesk.v1.WatchQueueRequest )"),
        ("QueueService.CallNext", "rpc CallNext ( .clinic.frontdesk.v1.CallNextRequest )"),
        ("CallNextRequest", "[clinic.frontdesk.v1.line]:true"),
        ("QueueEntry.State", "STATE_IN_CONSULTATION = 3;"),
        ("ErrorReason", "ERROR_REASON_DAY_FULL = "),
    ],
)
async def test_describe(front: Front, symbol: str, said: str) -> None:
    """`describe` shows services, methods, messages with their rules, and the reasons of refusals."""
    status, printed = await grpcurl("-plaintext", f"127.0.0.1:{front.port}", "describe", f"{API}.{symbol}")
    assert status == 0, printed
    assert said in printed


async def test_the_readmes_day(front: Front) -> None:
    """Register, register again, book, check in, and be refused: what the README shows, with grpcurl."""
    doctor = await front.doctor()
    ana = {"given_name": "Ana", "family_name": "Lima", "phone": "(11) 98765-4321"}
    patient = (await call(front, "PatientService/RegisterPatient", {"patient": ana, "default_country": "BR"}))[
        "patient"
    ]
    assert patient["phone"] == "+5511987654321"
    ana = {"given_name": "ANA", "family_name": "lima", "phone": "+55 11 98765-4321"}
    again = await call(front, "PatientService/RegisterPatient", {"patient": ana})
    assert (again["patient"]["id"], again["already_registered"]) == (patient["id"], True)
    day = {"year": today().year, "month": today().month, "day": today().day}
    booking = {
        "patient_id": patient["id"],
        "reason": "cough",
        "idempotency_key": "web-7f3a",
        "doctor_day": {"doctor_id": doctor.id, "date": day},
    }
    booked = await call(front, "AppointmentService/BookAppointment", booking)
    assert booked["appointment"]["state"] == "STATE_BOOKED"
    assert (await call(front, "AppointmentService/BookAppointment", booking))["replayed"] is True
    arrival = {"appointment_id": booked["appointment"]["id"]}
    assert (await call(front, "QueueService/CheckIn", arrival))["entry"]["ticket"] == 1
    code, details = await refused(front, "QueueService/CheckIn", arrival)
    assert code == "AlreadyExists"
    assert (details["ErrorInfo"]["reason"], details["ErrorInfo"]["domain"]) == (
        "ALREADY_CHECKED_IN",
        "frontdesk.clinic",
    )
    assert "ResourceInfo" in details


async def test_field_violations(front: Front) -> None:
    """The wrong fields of a request are readable."""
    code, details = await refused(front, "DoctorService/GetDoctor", {"doctor_id": "x"})
    assert code == "InvalidArgument"
    assert [violation["field"] for violation in details["BadRequest"]["field_violations"]] == ["doctor_id"]


async def test_watch(front: Front) -> None:
    """WatchQueue prints the whole queue, then the queue after each change."""
    doctor = await front.doctor()
    request = json.dumps({"doctor_id": doctor.id})
    address = f"127.0.0.1:{front.port}"
    async with (
        running("-plaintext", "-d", request, address, f"{API}.QueueService/WatchQueue") as process,
        asyncio.timeout(60),
    ):
        first = await message(process)
        assert first["update"]["queue"]["doctor_id"] == doctor.id
        revision = int(first["revision"])
        arrived = await front.arrive(doctor.id, given_name="Łukasz")
        entries: list[dict[str, Any]] = []
        while revision < arrived.revision:
            update = await message(process)
            assert int(update["previous_revision"]) == revision
            revision, entries = int(update["revision"]), update["update"]["queue"].get("entries", [])
    assert [(entry["ticket"], entry["patient_name"]) for entry in entries] == [(1, "Łukasz")]


async def message(process: asyncio.subprocess.Process) -> dict[str, Any]:
    """The next message of a stream."""
    assert process.stdout is not None
    text = ""
    while not text.endswith("\n}\n"):
        line = await process.stdout.readline()
        assert line, text
        text += line.decode()
    read: dict[str, Any] = json.loads(text)
    return read


async def test_without_reflection(front: Front) -> None:
    """grpcurl reads the protos too, where a server has no reflection."""
    request = json.dumps({"doctor_id": (await front.doctor()).id})
    proto = ("-import-path", PROTOS, "-proto", f"{API.replace('.', '/')}/queue.proto")
    address = f"127.0.0.1:{front.port}"
    status, said = await grpcurl("-plaintext", *proto, "-d", request, address, f"{API}.QueueService/GetQueue")
    assert status == 0, said
    assert json.loads(said)["queue"]["revision"] == "1"
