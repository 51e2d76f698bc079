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
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import Message

from frontdesk.background import Alarm
from frontdesk.errors import DeadlineExceeded, Draining, Overloaded, Refused
from frontdesk.rpc.requests import request_from
from frontdesk.rpc.status import Trailers, internal, status_of

if TYPE_CHECKING:
    from frontdesk.metrics import WorkerMetrics
    from frontdesk.tracing import Tracing

DEADLINE_SECONDS = 10.0
"""The limit of a unary call whose caller gives none, or a longer one."""

ANONYMOUS = "anonymous"

_log = structlog.get_logger("frontdesk.call")


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

    def __init__(
        self,
        *,
        max_in_flight: int,
        mutual_tls: bool,
        metrics: "WorkerMetrics | None" = None,
        tracing: "Tracing | None" = None,
    ) -> None:
        self._mutual_tls = mutual_tls
        self._max_in_flight = max_in_flight
        self._metrics = metrics
        self._tracing = tracing
        self.in_flight = 0
        """How many unary calls are worked on."""
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
            full_name = f"{service}/{name}"
            account = _Account(full_name, method.response_streaming, self._metrics, self._tracing)
            around = (lambda _, behaviour: behaviour) if self._tracing is None else self._tracing.around
            if method.response_streaming:
                streamed = self._streaming(account, method.unary_stream, method.request_deserializer.__self__)
                wrapped[name] = grpc.unary_stream_rpc_method_handler(around(full_name, streamed))
            else:
                answered = self._unary(account, method.unary_unary, method.request_deserializer.__self__)
                wrapped[name] = grpc.unary_unary_rpc_method_handler(around(full_name, answered))
        self.handlers.append(grpc.method_handlers_generic_handler(service, wrapped))

    def _unary(
        self,
        account: "_Account",
        behaviour: Callable[[Any, Call], Awaitable[Message]],
        kind: type[Message],
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]:
        async def answer(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            started = time.perf_counter()
            caller = ANONYMOUS
            self.in_flight += 1
            try:
                if self.in_flight > self._max_in_flight:
                    raise Overloaded
                if self.draining:
                    raise Draining
                caller = self._caller(context)
                request = request_from(raw, kind)
                remaining = context.time_remaining()
                with Alarm(DEADLINE_SECONDS if remaining is None else min(remaining, DEADLINE_SECONDS)):
                    response = await behaviour(request, Call(context, caller))
                account.close("OK", started, caller)
                return response.SerializeToString()
            except (asyncio.CancelledError, GeneratorExit):
                account.close("CANCELLED", started, caller)
                raise
            except BaseException as error:
                await context.abort(*_refusal(error, account, started, caller))
                raise
            finally:
                self.in_flight -= 1
                # The error that `abort` raises knows this frame, and the context that error: a circle, which would keep
                # what the call has touched until a garbage collection, which stops everyone.
                del context

        return answer

    def _streaming(
        self, account: "_Account", behaviour: Callable[[Any, Call], Awaitable[None]], kind: type[Message]
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]:
        async def stream(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            started = time.perf_counter()
            caller = ANONYMOUS
            try:
                if self.draining:
                    raise Draining
                caller = self._caller(context)
                await behaviour(request_from(raw, kind), Call(context, caller))
                account.close("OK", started, caller, end="DRAINING" if self.draining else "COMPLETED")
            except (asyncio.CancelledError, GeneratorExit):
                account.close("CANCELLED", started, caller)
                raise
            except BaseException as error:
                await context.abort(*_refusal(error, account, started, caller))
                raise
            finally:
                # As above.
                del context

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


class _Account:
    """What is written down of each call of a method when it has ended: a line of the log, numbers, its span."""

    __slots__ = ("_metrics", "_tracing", "method")

    def __init__(self, method: str, streams: bool, metrics: "WorkerMetrics | None", tracing: "Tracing | None") -> None:
        self.method = f"/{method}"
        self._metrics = None if metrics is None else metrics.method(method, streams=streams)
        self._tracing = tracing

    def close(self, code: str, started: float, caller: str, *, end: str = "", **more: str) -> None:
        """`end` is why a stream ended, where that is neither its code nor `reason`, for which it was refused."""
        seconds = time.perf_counter() - started
        if self._metrics is not None:
            reason = more.get("reason", "")
            self._metrics.ended(code, seconds, reason, end or reason or code)
        if self._tracing is not None:
            more["trace_id"] = self._tracing.ended(code, more.get("reason", ""))
        _log.info("call", method=self.method, code=code, ms=round(seconds * 1000, 3), caller=caller, **more)


def _refusal(
    error: BaseException, account: _Account, started: float, caller: str
) -> tuple[grpc.StatusCode, str, Trailers]:
    """Write down how a call failed, and say what it is answered."""
    # Its frames hold the call's context, which will hold the error.
    trace, error.__traceback__ = error.__traceback__, None
    if isinstance(error, TimeoutError):
        error = DeadlineExceeded()
    if isinstance(error, Refused):
        answer = status_of(error)
        account.close(answer[0].name, started, caller, reason=error.reason)
        return answer
    error_id = uuid.uuid4().hex[:16]
    account.close("INTERNAL", started, caller, error_id=error_id)
    _log.error(
        "internal_error",
        error_id=error_id,
        method=account.method,
        error=type(error).__name__,
        # Where, not what: the text of an exception may quote the row.
        sqlstate=getattr(error, "sqlstate", None),
        constraint=getattr(getattr(error, "diag", None), "constraint_name", None),
        where=[f"{frame.name} {frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(trace)],
    )
    return internal(error_id)
