"""What happens around every call: decode, validate, admit, keep the deadline, answer refusals, write one line.

One function a call and no gRPC interceptors: the bytes are decoded here, because gRPC would answer a malformed message
as UNKNOWN and an exception with its text; and a call is admitted once its message is there, because calls that never
send one must not take the place of those that do.
"""

import asyncio
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
import protovalidate
import structlog
from google.protobuf.message import DecodeError, Message

from frontdesk.background import Alarm
from frontdesk.errors import DeadlineExceeded, Draining, InvalidField, Overloaded, Refused
from frontdesk.rpc.status import MOST_VIOLATIONS, Trailers, internal, status_of

DEADLINE_SECONDS = 10.0
"""The limit of a unary call whose caller gives none, or a longer one."""

ANONYMOUS = "anonymous"

_log = structlog.get_logger("frontdesk.call")
_validator = protovalidate.Validator()


class Call:
    """What a servicer is told of the call beside the request."""

    __slots__ = ("_context", "caller")

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], caller: str) -> None:
        self._context = context
        self.caller = caller

    async def write(self, message: bytes) -> None:
        """Send one serialised message of a stream. Raises CancelledError where the caller has gone."""
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:
            # What gRPC calls a write that was under way when the connection ended; the handler's own end follows.
            raise asyncio.CancelledError from None


class Pipeline:
    """Wraps the methods of generated servicers; `add_…Servicer_to_server` takes it for the server."""

    def __init__(self, *, max_in_flight: int, mutual_tls: bool) -> None:
        self._mutual_tls = mutual_tls
        self._max_in_flight = max_in_flight
        self._in_flight = 0
        self.draining = False
        self.handlers: list[grpc.GenericRpcHandler] = []
        self.services: list[str] = []

    # The two methods through which generated code hands over its handlers.

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Everything comes by name through `add_registered_method_handlers`."""

    def add_registered_method_handlers(self, service: str, methods: Mapping[str, Any]) -> None:
        """Wrap the methods of one service."""
        self.services.append(service)
        wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for name, method in methods.items():
            full_name = f"/{service}/{name}"
            if method.response_streaming:
                streamed = self._streaming(full_name, method.unary_stream, method.request_deserializer)
                wrapped[name] = grpc.unary_stream_rpc_method_handler(streamed)
            else:
                answered = self._unary(full_name, method.unary_unary, method.request_deserializer)
                wrapped[name] = grpc.unary_unary_rpc_method_handler(answered)
        self.handlers.append(grpc.method_handlers_generic_handler(service, wrapped))

    def _unary(
        self, method: str, behaviour: Callable[[Any, Call], Awaitable[Message]], decode: Callable[[bytes], Message]
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]:
        async def answer(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            started = time.perf_counter()
            caller = ANONYMOUS
            self._in_flight += 1
            try:
                if self._in_flight > self._max_in_flight:
                    raise Overloaded
                if self.draining:
                    raise Draining
                caller = self._caller(context)
                request = _decoded(raw, decode)
                remaining = context.time_remaining()
                with Alarm(DEADLINE_SECONDS if remaining is None else min(remaining, DEADLINE_SECONDS)):
                    response = await behaviour(request, Call(context, caller))
                line(method, "OK", started, caller)
                return response.SerializeToString()
            except BaseException as error:
                await context.abort(*_ended(error, method, started, caller))
                raise
            finally:
                self._in_flight -= 1

        return answer

    def _streaming(
        self, method: str, behaviour: Callable[[Any, Call], Awaitable[None]], decode: Callable[[bytes], Message]
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]:
        async def stream(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            started = time.perf_counter()
            caller = ANONYMOUS
            try:
                if self.draining:
                    raise Draining
                caller = self._caller(context)
                await behaviour(_decoded(raw, decode), Call(context, caller))
                line(method, "OK", started, caller)
            except BaseException as error:
                await context.abort(*_ended(error, method, started, caller))
                raise

        return stream

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """Who calls: the name in the client's certificate, else the name that it gives itself, else nobody.

        The second is for the log and the scope of idempotency keys, among services that trust one another.
        """
        if self._mutual_tls:
            return "cert:" + next(iter(context.peer_identities() or ()), b"").decode(errors="replace")[:200]
        for key, value in context.invocation_metadata() or ():
            if key == "frontdesk-caller" and isinstance(value, str):
                return "name:" + value[:64]
        return ANONYMOUS


def line(method: str, code: str, started: float, caller: str, **more: str) -> None:
    """The log's one line of a call."""
    _log.info(
        "call", method=method, code=code, ms=round((time.perf_counter() - started) * 1000, 3), caller=caller, **more
    )


def _ended(error: BaseException, method: str, started: float, caller: str) -> tuple[grpc.StatusCode, str, Trailers]:
    """Log how a call failed, and say what it is answered. Re-raises what is no answer: the caller has gone."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        line(method, "CANCELLED", started, caller)
        raise error
    if isinstance(error, TimeoutError):
        error = DeadlineExceeded()
    if isinstance(error, Refused):
        answer = status_of(error)
        line(method, answer[0].name, started, caller, reason=error.reason)
        return answer
    error_id = uuid.uuid4().hex[:16]
    line(method, "INTERNAL", started, caller, error_id=error_id)
    _log.error(
        "internal_error",
        error_id=error_id,
        method=method,
        error=type(error).__name__,
        # Where, not what: the text of an exception may quote the row.
        sqlstate=getattr(error, "sqlstate", None),
        constraint=getattr(getattr(error, "diag", None), "constraint_name", None),
        where=[f"{frame.name} {frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)],
    )
    return internal(error_id)


def _decoded(raw: bytes, decode: Callable[[bytes], Message]) -> Message:
    try:
        request = decode(raw)
    except DecodeError:
        raise InvalidField(("", "the message is no valid protobuf of its type")) from None
    violations = _validator.collect_violations(request)
    if violations:
        raise InvalidField(*(_violation(violation.proto) for violation in violations[:MOST_VIOLATIONS]))
    return request


def _violation(found: Any) -> tuple[str, str]:
    path = ""
    for element in found.field.elements if found.field else ():
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None and element.subscript.field == "index":
            path += f"[{element.subscript.value}]"
    return path, found.message or found.rule_id
