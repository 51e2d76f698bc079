"""The steps around every call: admit, decode, validate, keep the deadline, answer refusals, write one line.

One function a call and no gRPC interceptors. It decodes the bytes itself, because gRPC would answer a malformed message
as UNKNOWN, and an exception with its text. It admits a call once its message is there, because calls that never send
one must not take the place of those that do.
"""

import asyncio
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Protocol

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from frontdesk.core.caller import ANONYMOUS, Caller, Identity
from frontdesk.core.notes import Notes
from frontdesk.db.paging import SharedPageTokens
from frontdesk.errors import (
    DatabaseUnavailable,
    DeadlineExceeded,
    Draining,
    LoginThrottled,
    Overloaded,
    RateLimited,
    Refused,
)
from frontdesk.rpc.about import about
from frontdesk.rpc.access import Access, Policy
from frontdesk.rpc.origin import Origins
from frontdesk.rpc.requests import request_from
from frontdesk.rpc.status import Trailers, internal, status_of
from frontdesk.tasks import Timeout

DEADLINE_SECONDS = 10.0
"""The limit of a unary call whose caller gives no limit, or a longer one."""

_HOLD_SECONDS = 0.25
"""How long a caller who floods waits for a refusal."""
_MOST_HELD = 2_000

_NO_ACCESS = {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED}

_log = structlog.get_logger("frontdesk.call")


class Servicer(Protocol):
    """Has the methods of one service. Each is named as in its proto, and takes the request and a `Call`."""

    @property
    def service(self) -> ServiceDescriptor: ...


class MethodMetrics(Protocol):
    """Counts the calls of one method."""

    def ended(self, code: str, seconds: float, reason: str, end: str) -> None: ...


class Metrics(Protocol):
    """Counts the calls of a worker."""

    def method(self, name: str, *, streams: bool) -> MethodMetrics: ...


class Tracing(Protocol):
    """Makes a span for each call."""

    def around(self, method: str, behaviour: Callable[[bytes, Any], Awaitable[Any]]) -> Any: ...

    def ended(self, code: str, reason: str) -> str: ...

    def trace_id(self) -> str: ...


Again = Callable[[grpc.aio.ServicerContext[Any, Any], Identity], Awaitable[tuple[Identity, Caller] | None]]


class Call:
    """The call, as a servicer sees it beside the request."""

    __slots__ = ("_again", "_context", "_notes", "_origins", "caller", "identity", "method", "page_tokens", "trace_id")

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        identity: Identity,
        caller: Caller,
        method: str,
        notes: Notes,
        page_tokens: SharedPageTokens,
        origins: Origins,
        trace_id: str,
        again: Again | None,
    ) -> None:
        """`again` judges the caller of a stream again."""
        self._context = context
        self._notes = notes
        self._origins = origins
        self.page_tokens = page_tokens
        """Of the tokens of pages."""
        self.identity = identity
        self.caller = caller
        self._again = again
        self.method = method
        """The RPC's name, without its service."""
        self.trace_id = trace_id
        """Of the trace that the call belongs to; empty without traces."""

    @property
    def address(self) -> str:
        """Where the call comes from, as `Origins` tells it."""
        return self._origins.of(self._context)

    def saw(self, patient_ids: Sequence[str], **about: Any) -> None:
        """Note that the call reads records of these patients, one for each id; `about` are columns of the log."""
        self._notes.read(self.caller.identity, self.method, patient_ids, about, self.address, self.trace_id)

    async def judged_anew(self) -> bool:
        """Whether the caller had to be judged again, because something about the credentials has changed.

        If so, what the caller may reach may be something else now. Raises as a new call would.
        """
        assert self._again is not None
        try:
            found = await self._again(self._context, self.identity)
        except DatabaseUnavailable:
            # Until it is back a stream tells nothing new.
            return False
        if found is None:
            return False
        self.identity, self.caller = found
        return True

    async def write(self, message: bytes) -> None:
        """Send one serialised message of a stream. Raises CancelledError if the caller has gone."""
        try:
            await self._context.write(message)
        except grpc.aio.InternalError:
            # The connection ended during the write; gRPC is about to cancel the handler as well.
            raise asyncio.CancelledError from None


class Pipeline:
    """Wraps the methods of servicers."""

    def __init__(
        self,
        *,
        max_in_flight: int,
        access: Access,
        notes: Notes,
        page_tokens: SharedPageTokens,
        origins: Origins,
        metrics: Metrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._access = access
        self._notes = notes
        self._page_tokens = page_tokens
        self._origins = origins
        self._max_in_flight = max_in_flight
        self._metrics = metrics
        self._tracing = tracing
        self._held = 0
        self.in_flight = 0
        """Unary calls in progress."""
        self.draining = False
        self.handlers: list[grpc.GenericRpcHandler] = []
        self.services: list[str] = []

    def add(self, servicer: Servicer) -> None:
        """Serve the methods of one service."""
        service = servicer.service.full_name
        wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in servicer.service.methods:
            account = _Account(f"{service}/{method.name}", method.server_streaming, self._metrics, self._tracing)
            policy = Policy(method)
            behaviour = getattr(servicer, method.name)
            kind = GetMessageClass(method.input_type)
            if method.server_streaming:
                handler: Any = grpc.unary_stream_rpc_method_handler
                wrapper: Any = self._streaming(account, policy, behaviour, kind)
            else:
                handler = grpc.unary_unary_rpc_method_handler
                wrapper = self._unary(account, policy, behaviour, kind)
            if self._tracing is not None:
                wrapper = self._tracing.around(f"{service}/{method.name}", wrapper)
            wrapped[method.name] = handler(wrapper)
        self.services.append(service)
        self.handlers.append(grpc.method_handlers_generic_handler(service, wrapped))

    def _unary(
        self,
        account: "_Account",
        policy: Policy,
        behaviour: Callable[[Any, Call], Awaitable[Message]],
        kind: type[Message],
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]:
        async def answer(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            started = time.perf_counter()
            identity, caller = ANONYMOUS, None
            self.in_flight += 1
            try:
                if self.in_flight > self._max_in_flight:
                    raise Overloaded
                if self.draining:
                    raise Draining
                remaining = context.time_remaining()
                with Timeout(DEADLINE_SECONDS if remaining is None else min(remaining, DEADLINE_SECONDS)):
                    identity = await self._access.identify(context, policy)
                    self._access.admit(identity, policy)
                    request = request_from(raw, kind)
                    caller = self._access.caller(identity, policy, request)
                    response = await behaviour(request, self._call(context, identity, caller, account))
                account.close("OK", started, identity)
                return response.SerializeToString()
            except (asyncio.CancelledError, GeneratorExit):
                account.close("CANCELLED", started, identity)
                raise
            except BaseException as error:
                answer = self._refusal(error, account, started, identity, caller, self._origins.of(context), raw, kind)
                if isinstance(error, RateLimited) and error.flood:
                    await self._hold(1)
                await context.abort(*answer)
                raise
            finally:
                self.in_flight -= 1
                # The error that `abort` raises refers to this frame, this frame to the context, and the context to the
                # error. That circle would keep the call's objects until a garbage collection, which stops everybody.
                del context

        return answer

    def _streaming(
        self,
        account: "_Account",
        policy: Policy,
        behaviour: Callable[[Any, Call], Awaitable[None]],
        kind: type[Message],
    ) -> Callable[[bytes, grpc.aio.ServicerContext[Any, Any]], Awaitable[None]]:
        async def stream(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            started = time.perf_counter()
            identity, caller = ANONYMOUS, None
            try:
                if self.draining:
                    raise Draining
                with Timeout(DEADLINE_SECONDS):
                    identity = await self._access.identify(context, policy)
                self._access.admit(identity, policy)
                request = request_from(raw, kind)
                caller = self._access.caller(identity, policy, request)
                again = partial(self._access.again, policy=policy, request=request)
                await behaviour(request, self._call(context, identity, caller, account, again))
                account.close("OK", started, identity, end="DRAINING" if self.draining else "COMPLETED")
            except (asyncio.CancelledError, GeneratorExit):
                account.close("CANCELLED", started, identity)
                raise
            except BaseException as error:
                answer = self._refusal(error, account, started, identity, caller, self._origins.of(context), raw, kind)
                if isinstance(error, RateLimited) and error.flood:
                    await self._hold(0)
                await context.abort(*answer)
                raise
            finally:
                # As above.
                del context

        return stream

    async def _hold(self, counted: int) -> None:
        """Let a caller who floods wait for the refusal: most send so many calls at a time, and the next one then.

        Of `in_flight` the call is `counted`, and takes no place from others while it is held.
        """
        if self._held >= _MOST_HELD:
            return
        self._held += 1
        self.in_flight -= counted
        try:
            await asyncio.sleep(_HOLD_SECONDS)
        finally:
            self._held -= 1
            self.in_flight += counted

    def _refusal(
        self,
        error: BaseException,
        account: "_Account",
        started: float,
        identity: Identity,
        caller: Caller | None,
        address: str,
        raw: bytes,
        kind: type[Message],
    ) -> tuple[grpc.StatusCode, str, Trailers]:
        """Record that a call failed; its status, text and trailers. `raw` is the request, a message of `kind`."""
        # The traceback refers to the call's context, which will refer to the error: a circle, as above.
        trace, error.__traceback__ = error.__traceback__, None
        if isinstance(error, TimeoutError):
            error = DeadlineExceeded()
        if isinstance(error, Refused):
            answer = status_of(error)
            account.close(answer[0].name, started, identity, reason=error.reason)
            if _is_no_access(error, answer[0], caller):
                self._notes.refused(identity.name, account.name, error.reason, address, about(raw, kind, error))
            return answer
        error_id = uuid.uuid4().hex[:16]
        account.close("INTERNAL", started, identity, error_id=error_id)
        _log.error(
            "internal_error",
            error_id=error_id,
            method=account.method,
            error=type(error).__name__,
            # The place and not the text: the text of an exception may quote a row.
            sqlstate=getattr(error, "sqlstate", None),
            constraint=getattr(getattr(error, "diag", None), "constraint_name", None),
            where=[f"{frame.name} {frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(trace)],
        )
        return internal(error_id)

    def _call(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        identity: Identity,
        caller: Caller,
        account: "_Account",
        again: Again | None = None,
    ) -> Call:
        trace_id = "" if self._tracing is None else self._tracing.trace_id()
        return Call(
            context, identity, caller, account.name, self._notes, self._page_tokens, self._origins, trace_id, again
        )


def _is_no_access(error: Refused, code: grpc.StatusCode, caller: Caller | None) -> bool:
    """Whether it refuses access, and not what is asked for."""
    if isinstance(error, RateLimited):
        return error.of_refusals
    return (
        code in _NO_ACCESS
        or isinstance(error, LoginThrottled)
        or (code is grpc.StatusCode.NOT_FOUND and _sees_own_only(caller))
    )


def _sees_own_only(caller: Caller | None) -> bool:
    """Whether somebody else's things are to the caller as if they did not exist."""
    return caller is not None and not caller.everywhere


class _Account:
    """Records each ended call of a method: a line of the log, its metrics, the end of its span."""

    __slots__ = ("_metrics", "_tracing", "method", "name")

    def __init__(self, method: str, streams: bool, metrics: Metrics | None, tracing: Tracing | None) -> None:
        self.method = f"/{method}"
        self.name = method.rpartition("/")[2]
        self._metrics = None if metrics is None else metrics.method(method, streams=streams)
        self._tracing = tracing

    def close(self, code: str, started: float, identity: Identity, *, end: str = "", **more: str) -> None:
        """`end` is why a stream ended, if that is neither its code nor the `reason` of a refusal."""
        seconds = time.perf_counter() - started
        if self._metrics is not None:
            reason = more.get("reason", "")
            self._metrics.ended(code, seconds, reason, end or reason or code)
        if self._tracing is not None:
            more["trace_id"] = self._tracing.ended(code, more.get("reason", ""))
        _log.info("call", method=self.method, code=code, ms=round(seconds * 1000, 3), caller=identity.name, **more)
