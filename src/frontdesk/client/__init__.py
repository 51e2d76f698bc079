"""Clients of the service: `FrontdeskClient` for asyncio, `SyncFrontdeskClient` for everybody else.

    async with FrontdeskClient("127.0.0.1:50051", caller="kiosk") as desk:
        answer = await desk.appointments.BookAppointment(request)
        async for queue in desk.watch_queue(doctor_id):
            ...

Both offer the generated stubs of every service (`clinics`, `patients`, `doctors`, `slots`, `appointments`, `queues`)
and add what every careful caller would write: a deadline, the caller's name, gRPC's retries (`SERVICE_CONFIG`), an
idempotency key where the request has none, so that no retry acts twice, refusals as `FrontdeskError`, and a watch that
heals itself.
"""

import asyncio
import datetime
import random
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from importlib.resources import files
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar, cast

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import queue_pb2
from clinic.frontdesk.v1.appointment_pb2_grpc import AppointmentServiceStub
from clinic.frontdesk.v1.clinic_pb2_grpc import ClinicServiceStub
from clinic.frontdesk.v1.doctor_pb2_grpc import DoctorServiceStub
from clinic.frontdesk.v1.patient_pb2_grpc import PatientServiceStub
from clinic.frontdesk.v1.queue_pb2_grpc import QueueServiceStub
from clinic.frontdesk.v1.slot_pb2_grpc import SlotServiceStub

SERVICE_CONFIG = files("frontdesk.client").joinpath("service_config.json").read_text()
"""gRPC's retries, as JSON that a client of any language takes: of what is UNAVAILABLE, ABORTED, or CANCELLED by the
server.

gRPC's core cancels what it has received and not yet handed over when its server stops. What the caller cancels itself
has ended, and is not retried.

A mutation is safe with it only under an idempotency key. Five attempts are the most that gRPC makes; they are spread
over some four seconds, in which a worker that died is there again. WatchQueue is left out: a resume token is worth more
than a retry.
"""

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", SERVICE_CONFIG),
    # The server allows a ping every 10 s, with calls or without: a connection that died is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # gRPC's own default waits up to two minutes before it tries a server that came back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

DEFAULT_TIMEOUT = 10.0
"""Seconds that a unary call may take, its retries included."""

HEARTBEAT_SECONDS = (5.0, 60.0)
"""The range of heartbeat intervals; a watch that asks for less or more gets the nearest."""

_SILENT_INTERVALS = 3.0
"""A stream without a message for more heartbeat intervals than these is dead."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_LONGEST_PUSHBACK = 60.0
_FINAL = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}

R = TypeVar("R")


class FieldViolation(NamedTuple):
    """One field of a request that cannot be used."""

    field: str
    """The path, like `patient.phone`; empty where the message as a whole is wrong."""
    description: str


class FrontdeskError(Exception):
    """A call was refused or did not reach the service. `__cause__` is gRPC's own error."""

    def __init__(
        self,
        code: grpc.StatusCode,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        message: str = "",
        field_violations: Iterable[FieldViolation] = (),
        retry_after: float | None = None,
    ) -> None:
        field_violations = tuple(field_violations)
        super().__init__(code, reason, metadata, message, field_violations, retry_after)
        self.code = code
        self.reason = reason
        """A name of ErrorReason without its prefix, like `DAY_FULL`; empty where the service did not answer."""
        self.metadata: dict[str, str] = dict(metadata or {})
        """What the reason is about: ids, dates and states."""
        self.message = message
        self.field_violations: tuple[FieldViolation, ...] = field_violations
        """What is wrong with the request, for `INVALID_FIELD`."""
        self.retry_after = retry_after
        """Seconds after which another attempt may succeed, where the service said so."""

    def __str__(self) -> str:
        return f"{self.code.name}{' ' if self.reason else ''}{self.reason}: {self.message}"

    @property
    def error_id(self) -> str:
        """Finds an `INTERNAL` error in the service's log; empty for all others."""
        return self.metadata.get("error_id", "")

    @classmethod
    def of(cls, error: grpc.RpcError) -> Self:
        """Read the details that the service attached to gRPC's error."""
        # gRPC's errors are calls; their base class has no method of either.
        call: Any = error
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        for kind in (info, bad, retry):
            _unpack(call.trailing_metadata() or (), kind)
        return cls(
            call.code(),
            info.reason,
            dict(info.metadata),
            call.details() or "",
            tuple(FieldViolation(one.field, one.description) for one in bad.field_violations),
            _seconds(retry.retry_delay) if retry.HasField("retry_delay") else None,
        )


def _unpack(trailers: Iterable[tuple[str, str | bytes]], detail: Message) -> None:
    """Fill `detail` in, if there is one of its type."""
    for name, value in trailers:
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            # Where it does not decode, something between us and the service wrote it.
            with suppress(DecodeError):
                for packed in status_pb2.Status.FromString(value).details:
                    packed.Unpack(detail)


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


@dataclass(frozen=True, slots=True)
class Update:
    """What a watch has to tell: the whole queue, and how it came to be so."""

    queue: queue_pb2.Queue
    """The line at its revision."""
    changes: tuple[queue_pb2.QueueChange, ...]
    """Every change after `previous_revision` up to the queue's revision, none missing; none on a fresh start."""
    previous_revision: int
    """The revision of the update before this one; 0 on a fresh start."""
    resume_token: str
    """Lets another watch of the same queue go on after this update."""

    @property
    def fresh(self) -> bool:
        """Whether this begins anew: what happened before it is not told. True of the first update of a watch.

        Later only where the service could not go on: after a restore of its database, or too long an interruption.
        """
        return self.previous_revision == 0


OnConnection = Callable[[bool], None]
"""Told True when a stream lives, and False when it has ended and another will be opened."""


class _Missed(Exception):
    """The service went on from another revision than the one that we know."""


class _Watch:
    """What a watcher knows, and when it tries again. Pure: both clients do the talking."""

    def __init__(
        self,
        doctor_id: str,
        date: datetime.date | None,
        heartbeat: float,
        resume_token: str,
        on_connection: OnConnection | None,
    ) -> None:
        self._request = queue_pb2.WatchQueueRequest(doctor_id=doctor_id)
        if date is not None:
            self._request.date.CopyFrom(Date(year=date.year, month=date.month, day=date.day))
        heartbeat = min(max(heartbeat, HEARTBEAT_SECONDS[0]), HEARTBEAT_SECONDS[1])
        self._request.heartbeat_interval.FromMilliseconds(round(heartbeat * 1000))
        self.patience = _SILENT_INTERVALS * heartbeat
        """Seconds of silence after which the stream is dead."""
        self._token = resume_token
        self._revision: int | None = None
        self._pushback: float | None = None
        self._most = 0.0
        self._began = 0.0
        self._lives = False
        self._on_connection = on_connection or (lambda lives: None)

    def request(self) -> queue_pb2.WatchQueueRequest:
        """Opens the next stream."""
        self._began = time.monotonic()
        request = queue_pb2.WatchQueueRequest()
        request.CopyFrom(self._request)
        request.resume_token = self._token
        return request

    def take(self, message: queue_pb2.WatchQueueResponse) -> Update | None:
        """Learn from a message; what it means to the watcher, if anything. Raises _Missed."""
        update = None
        if message.HasField("closing"):
            self._pushback = min(_seconds(message.closing.reconnect_delay), _LONGEST_PUSHBACK)
        elif message.HasField("update"):
            previous = message.previous_revision
            told = [change.revision for change in message.update.changes]
            if previous and (
                self._revision not in (None, previous) or told != [*range(previous + 1, message.revision + 1)]
            ):
                raise _Missed
            changes = tuple(message.update.changes)
            update = Update(message.update.queue, changes, previous, message.resume_token)
        elif self._revision not in (None, message.revision):
            raise _Missed
        self._revision = message.revision
        self._token = message.resume_token or self._token
        if not self._lives:
            self._lives = True
            self._on_connection(True)
        return update

    def pause(self, error: Exception | None) -> float:
        """Seconds to wait after a stream that ended in `error`, or in none. Raises FrontdeskError where it is final."""
        if self._lives:
            self._lives = False
            self._on_connection(False)
        if isinstance(error, _Missed):
            # Never seen of our own server; what is missing cannot be had, so the watcher is told of a fresh start.
            self._token, self._revision = "", None
        if self._pushback is not None:
            seconds, self._pushback, self._most = self._pushback, None, 0.0
            return seconds
        pushback = 0.0
        if isinstance(error, grpc.RpcError):
            failure = FrontdeskError.of(error)
            if failure.code in _FINAL:
                if failure.code is not grpc.StatusCode.INVALID_ARGUMENT or self._revision is None:
                    raise failure from error
                # It was accepted before, so what is wrong is the token, which another release may have made.
                self._token, self._revision = "", None
            pushback = failure.retry_after or 0.0
        if time.monotonic() - self._began > self._most:
            # It lasted longer than we waited for it: no reason to wait longer than at first.
            self._most = 0.0
        self._most = min(max(2 * self._most, _FIRST_PAUSE), _LONGEST_PAUSE)
        return max(random.uniform(self._most / 2, self._most), pushback)


class _Manners:
    """What either client adds to every call."""

    def __init__(self, caller: str | None, timeout: float | None) -> None:
        if caller is not None and not (0 < len(caller) <= 64 and caller.isascii() and caller.isprintable()):
            raise ValueError("caller is not 1 to 64 printable ASCII characters")
        self._caller = () if caller is None else (("frontdesk-caller", caller),)
        self._timeout = timeout

    def request(self, request: Message) -> Message:
        """The request, with an idempotency key if it can have one."""
        if "idempotency_key" not in request.DESCRIPTOR.fields_by_name or cast(Any, request).idempotency_key:
            return request
        # A copy: were the key put into the caller's own message, using that again would be no new intention.
        keyed: Any = type(request)()
        keyed.CopyFrom(request)
        keyed.idempotency_key = uuid.uuid4().hex
        return cast(Message, keyed)

    def options(self, given: dict[str, Any], *, unary: bool) -> dict[str, Any]:
        """The options of a call."""
        if unary and given.get("timeout") is None:
            given["timeout"] = self._timeout
        given["metadata"] = (*self._caller, *(given.get("metadata") or ()))
        return given


class FrontdeskClient:
    """The service, for asyncio. Make it inside the running loop; close it, or use it as a context manager.

    `target` is HOST:PORT or another gRPC target, or a channel of your own, which stays yours to close and to configure
    (`CHANNEL_OPTIONS`). Without `credentials` the connection is in plain text. `caller` is the name under which this
    program is logged and its idempotency keys are kept (1 to 64 printable ASCII characters, else ValueError).
    `timeout` is in seconds, for each unary call that is given none; None leaves it to the server (10 s an attempt).

    Unary calls raise FrontdeskError. The stubs' own WatchQueue is gRPC's; `watch_queue` is what you want.
    """

    def __init__(
        self,
        target: str | grpc.aio.Channel,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        caller: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        manners = _Manners(caller, timeout)
        self._owned: grpc.aio.Channel | None = None
        self._closed = asyncio.Event()
        if isinstance(target, str):
            if credentials is None:
                target = grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
            else:
                target = grpc.aio.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
            self._owned = target
        channel = cast(grpc.aio.Channel, _AsyncChannel(target, manners))
        self.clinics = ClinicServiceStub(channel)
        self.patients = PatientServiceStub(channel)
        self.doctors = DoctorServiceStub(channel)
        self.slots = SlotServiceStub(channel)
        self.appointments = AppointmentServiceStub(channel)
        self.queues = QueueServiceStub(channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channel, unless it is yours; running calls are cancelled."""
        self._closed.set()
        if self._owned is not None:
            await self._owned.close()

    async def watch_queue(
        self,
        doctor_id: str,
        date: datetime.date | None = None,
        *,
        heartbeat: float = 15.0,
        on_connection: OnConnection | None = None,
    ) -> AsyncGenerator[queue_pb2.Queue, None]:
        """Yield the queue now and after every change: `watch_updates` without the changes."""
        watch = self.watch_updates(doctor_id, date, heartbeat=heartbeat, on_connection=on_connection)
        async with aclosing(watch) as updates:
            async for update in updates:
                yield update.queue

    async def watch_updates(
        self,
        doctor_id: str,
        date: datetime.date | None = None,
        *,
        heartbeat: float = 15.0,
        resume_token: str = "",
        on_connection: OnConnection | None = None,
    ) -> AsyncGenerator[Update, None]:
        """Yield the queue and what has changed, for as long as you ask.

        Whatever interrupts the stream, it goes on from where it was, and yields nothing where nothing happened. A
        reader that is slower than the clinic gets fewer updates, with more changes each. `date` is that of the clinic;
        default: its today, which stays the watched one after midnight. `heartbeat` is the seconds of silence after
        which the service says that it lives (5 to 60, others are clamped); three of them without a word, and the
        stream is opened anew. `resume_token` goes on from an earlier Update.

        Raises FrontdeskError where another stream would end alike: NOT_FOUND, INVALID_ARGUMENT, UNIMPLEMENTED,
        UNAUTHENTICATED, PERMISSION_DENIED. Ends when the client is closed. Leave a loop early through
        `contextlib.aclosing`, which ends the stream at once.
        """
        watch = _Watch(doctor_id, date, heartbeat, resume_token, on_connection)
        while not self._closed.is_set():
            call = self.queues.WatchQueue(watch.request())
            error: Exception | None = None
            try:
                while True:
                    try:
                        async with asyncio.timeout(watch.patience):
                            message = await call.read()
                        if not isinstance(message, queue_pb2.WatchQueueResponse):
                            break
                        update = watch.take(message)
                    except (grpc.RpcError, TimeoutError, _Missed) as ended:
                        error = ended
                        break
                    if update is not None:
                        yield update
            except asyncio.CancelledError:
                task = asyncio.current_task()
                # Closing the channel looks like this too.
                if self._closed.is_set() and task is not None and not task.cancelling():
                    return
                raise
            finally:
                call.cancel()
            if self._closed.is_set():
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(watch.pause(error)):
                    await self._closed.wait()


class SyncFrontdeskClient:
    """The service, for synchronous callers; threads may share it. As `FrontdeskClient` in everything else.

    A call's `future` raises gRPC's own errors; `FrontdeskError.of` reads them.
    """

    def __init__(
        self,
        target: str | grpc.Channel,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        caller: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        manners = _Manners(caller, timeout)
        self._owned: grpc.Channel | None = None
        self._closed = threading.Event()
        if isinstance(target, str):
            if credentials is None:
                target = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
            else:
                target = grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
            self._owned = target
        channel = cast(grpc.Channel, _SyncChannel(target, manners))
        self.clinics = ClinicServiceStub(channel)
        self.patients = PatientServiceStub(channel)
        self.doctors = DoctorServiceStub(channel)
        self.slots = SlotServiceStub(channel)
        self.appointments = AppointmentServiceStub(channel)
        self.queues = QueueServiceStub(channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel, unless it is yours; running calls are cancelled."""
        self._closed.set()
        if self._owned is not None:
            self._owned.close()

    def watch_queue(
        self,
        doctor_id: str,
        date: datetime.date | None = None,
        *,
        heartbeat: float = 15.0,
        on_connection: OnConnection | None = None,
    ) -> Generator[queue_pb2.Queue, None, None]:
        """Yield the queue now and after every change: `watch_updates` without the changes."""
        watch = self.watch_updates(doctor_id, date, heartbeat=heartbeat, on_connection=on_connection)
        with closing(watch) as updates:
            for update in updates:
                yield update.queue

    def watch_updates(
        self,
        doctor_id: str,
        date: datetime.date | None = None,
        *,
        heartbeat: float = 15.0,
        resume_token: str = "",
        on_connection: OnConnection | None = None,
    ) -> Generator[Update, None, None]:
        """Yield the queue and what has changed; see `FrontdeskClient.watch_updates`.

        Ends the stream when the generator is closed. Another thread ends the wait for news by closing the client.
        """
        watch = _Watch(doctor_id, date, heartbeat, resume_token, on_connection)
        while not self._closed.is_set():
            call = self.queues.WatchQueue(watch.request())
            error: Exception | None = None
            silence = _Silence(watch.patience, call.cancel)
            try:
                while True:
                    try:
                        with silence:
                            message = next(call, None)
                        if message is None:
                            break
                        update = watch.take(message)
                    except (grpc.RpcError, _Missed) as ended:
                        error = ended
                        break
                    if update is not None:
                        yield update
            finally:
                call.cancel()
                silence.end()
            if self._closed.is_set():
                return
            self._closed.wait(watch.pause(error))


class _Silence:
    """Cancels a stream that says nothing while somebody waits for it; synchronous reads have no time limit."""

    def __init__(self, patience: float, cancel: Callable[[], object]) -> None:
        self._patience = patience
        self._cancel = cancel
        self._since: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="frontdesk-watch", daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._since = None

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        wait = self._patience
        while not self._ended.wait(wait):
            since = self._since
            wait = self._patience if since is None else since + self._patience - time.monotonic()
            if wait <= 0:
                self._cancel()
                return


class _AsyncChannel:
    """Hands the generated stubs calls with manners."""

    def __init__(self, channel: grpc.aio.Channel, manners: _Manners) -> None:
        self._channel: Any = channel
        self._manners = manners

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., "_AsyncCall"]:
        method = self._channel.unary_unary(*args, **kwargs)

        def call(request: Message, **options: Any) -> _AsyncCall:
            return _AsyncCall(method(self._manners.request(request), **self._manners.options(options, unary=True)))

        return call

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        method = self._channel.unary_stream(*args, **kwargs)
        return lambda request, **options: method(request, **self._manners.options(options, unary=False))


class _AsyncCall(Awaitable[Any]):
    """gRPC's call, with our error."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.RpcError as error:
            raise FrontdeskError.of(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)


class _SyncChannel:
    """Hands the generated stubs calls with manners."""

    def __init__(self, channel: grpc.Channel, manners: _Manners) -> None:
        self._channel: Any = channel
        self._manners = manners

    def unary_unary(self, *args: Any, **kwargs: Any) -> "_SyncMethod":
        return _SyncMethod(self._channel.unary_unary(*args, **kwargs), self._manners)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        method = self._channel.unary_stream(*args, **kwargs)
        return lambda request, **options: method(request, **self._manners.options(options, unary=False))


class _SyncMethod:
    """gRPC's method, with manners and our error."""

    def __init__(self, method: Any, manners: _Manners) -> None:
        self._method = method
        self._manners = manners

    def __call__(self, request: Message, **options: Any) -> Any:
        return self._raising(self._method, request, options)

    def with_call(self, request: Message, **options: Any) -> Any:
        return self._raising(self._method.with_call, request, options)

    def future(self, request: Message, **options: Any) -> Any:
        return self._method.future(self._manners.request(request), **self._manners.options(options, unary=True))

    def _raising(self, method: Callable[..., R], request: Message, options: dict[str, Any]) -> R:
        try:
            return method(self._manners.request(request), **self._manners.options(options, unary=True))
        except grpc.RpcError as error:
            raise FrontdeskError.of(error) from error
