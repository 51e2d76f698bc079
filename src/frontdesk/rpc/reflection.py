"""grpc.reflection, v1 and v1alpha: clients ask the server for its protos."""

import asyncio
import pkgutil
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any

import grpc
from google.protobuf import text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

import clinic.frontdesk.v1

SERVICES = ("grpc.reflection.v1.ServerReflection", reflection.SERVICE_NAME)


class Reflection:
    """Answers with the library's v1alpha servicer: v1 is the same on the wire under another name."""

    def __init__(self, services: Iterable[str]) -> None:
        """`services` are the names that a client can list, beside those of reflection itself."""
        self._pool = _pool()
        self._library = reflection.aio.ReflectionServicer((*services, *SERVICES), pool=self._pool)
        self._streams: set[asyncio.Task[Any] | None] = set()
        self._draining = False
        handler = grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        self.handlers = tuple(
            grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}) for service in SERVICES
        )

    def drain(self) -> None:
        """End every stream."""
        self._draining = True
        for stream in self._streams:
            assert stream is not None
            stream.cancel()

    async def _serve(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        stream = asyncio.current_task()
        self._streams.add(stream)
        try:
            if not self._draining:
                async for request in requests:
                    async for answer in self._library.ServerReflectionInfo(self._one(request), context):
                        answer.original_request.CopyFrom(request)
                        await context.write(answer)
        except asyncio.CancelledError:
            if not self._draining:
                raise
        finally:
            self._streams.discard(stream)

    async def _one(self, request: Any) -> AsyncIterator[Any]:
        """The request, or for a method that of its service: protobuf's pool does not find methods."""
        service, _, method = request.file_containing_symbol.rpartition(".")
        with suppress(KeyError):
            if method in self._pool.FindServiceByName(service).methods_by_name:
                request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=service)
        yield request


def _pool() -> DescriptorPool:
    """All files of the contract, of errors' details, of health and of reflection, with all that they import."""
    modules = pkgutil.iter_modules(clinic.frontdesk.v1.__path__, "clinic.frontdesk.v1.")
    contract = [import_module(module.name) for module in modules if module.name.endswith("_pb2")]
    pool = DescriptorPool()
    for module in (*contract, error_details_pb2, status_pb2, health_pb2, reflection_pb2):
        _add(pool, module.DESCRIPTOR)
    # Python's packages have v1alpha alone; v1 differs from it in this word.
    v1 = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(v1)
    v1 = text_format.Parse(str(v1).replace("v1alpha", "v1"), FileDescriptorProto())
    v1.name = "grpc/reflection/v1/reflection.proto"
    v1.options.ClearField("deprecated")
    pool.Add(v1)
    return pool


def _add(pool: DescriptorPool, file: FileDescriptor) -> None:
    for imported in file.dependencies:
        _add(pool, imported)
    pool.AddSerializedFile(file.serialized_pb)
