"""The client for synchronous callers."""

import datetime
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message

from clinic.frontdesk.v1 import event_pb2, queue_pb2
from clinic.frontdesk.v1.auth_pb2_grpc import AuthServiceStub
from frontdesk.client.channel import sync_channel
from frontdesk.client.defaults import DEFAULT_TIMEOUT, CallDefaults
from frontdesk.client.errors import FrontdeskError
from frontdesk.client.login import Login
from frontdesk.client.stubs import Stubs
from frontdesk.client.watch import (
    DEFAULT_HEARTBEAT_SECONDS,
    EVENTS_AT_ONCE,
    EventWatch,
    Following,
    Item,
    OnConnection,
    OnEstimates,
    RevisionGap,
    Update,
    Watch,
)

R = TypeVar("R")


class SyncFrontdeskClient(Stubs[grpc.Channel]):
    """The service, for synchronous callers; threads may share it. Like `FrontdeskClient` in everything else.

    A call's `future` raises gRPC's own errors; `FrontdeskError.of` reads them.
    """

    def __init__(
        self,
        target: str | grpc.Channel,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
        caller: str | None = None,
        api_key: str | None = None,
        login: Login | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        defaults = CallDefaults(caller, timeout, api_key, login)
        self._owned: grpc.Channel | None = None
        self._closed = threading.Event()
        if isinstance(target, str):
            target = self._owned = sync_channel(target, credentials, server_name=server_name)
        self._renewal = None if login is None else _Renewal(login, _Channel(target, defaults.without_login()))
        super().__init__(cast(grpc.Channel, _Channel(target, defaults, self._renewal)))

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
        heartbeat: float = DEFAULT_HEARTBEAT_SECONDS,
        view: queue_pb2.QueueView.ValueType = queue_pb2.QUEUE_VIEW_STAFF,
        on_connection: OnConnection | None = None,
        on_estimates: OnEstimates | None = None,
    ) -> Generator[queue_pb2.Queue, None, None]:
        """Yield the queue now and after every change: `watch_updates` without the changes."""
        watch = self.watch_updates(
            doctor_id, date, heartbeat=heartbeat, view=view, on_connection=on_connection, on_estimates=on_estimates
        )
        with closing(watch) as updates:
            for update in updates:
                yield update.queue

    def watch_updates(
        self,
        doctor_id: str,
        date: datetime.date | None = None,
        *,
        heartbeat: float = DEFAULT_HEARTBEAT_SECONDS,
        view: queue_pb2.QueueView.ValueType = queue_pb2.QUEUE_VIEW_STAFF,
        resume_token: str = "",
        on_connection: OnConnection | None = None,
        on_estimates: OnEstimates | None = None,
    ) -> Generator[Update, None, None]:
        """Yield the queue and its changes; see `FrontdeskClient.watch_updates`.

        Closing the generator ends the stream. Another thread ends the wait for the next update by closing the client.
        """
        login = None if self._renewal is None else self._renewal.login
        watch = Watch(doctor_id, date, heartbeat, view, resume_token, on_connection, on_estimates, login)
        with closing(self._follow(watch, lambda request: self.queues.WatchQueue(request))) as updates:
            yield from updates

    def watch_events(
        self,
        *,
        types: Sequence[str] = (),
        clinic_id: str = "",
        doctor_id: str = "",
        patient_id: str = "",
        cursor: str = "",
        from_start: bool = False,
        heartbeat: float = DEFAULT_HEARTBEAT_SECONDS,
        on_connection: OnConnection | None = None,
    ) -> Generator[event_pb2.Event, None, None]:
        """Yield every event with this filter; see `FrontdeskClient.watch_events`. It ends as `watch_updates` does."""
        request = event_pb2.WatchEventsRequest(
            types=types, clinic_id=clinic_id, doctor_id=doctor_id, patient_id=patient_id, cursor=cursor,
            from_start=from_start, batch_size=EVENTS_AT_ONCE,
        )  # fmt: skip
        login = None if self._renewal is None else self._renewal.login
        watch = EventWatch(request, heartbeat, on_connection, login)
        with closing(self._follow(watch, lambda request: self.events.WatchEvents(request))) as events:
            yield from events

    def _follow(self, watch: Following[Item], begin: Callable[[Any], Any]) -> Generator[Item, None, None]:
        while not self._closed.is_set():
            error: Exception | None = None
            try:
                if self._renewal is not None:
                    self._renewal.in_time()
            except FrontdeskError as failure:
                self._closed.wait(watch.pause(failure))
                continue
            call = begin(watch.request())
            silence = _SilenceTimeout(watch.longest_silence, call.cancel)
            try:
                while True:
                    try:
                        with silence:
                            message = next(call, None)
                        if message is None:
                            break
                        found = watch.take(message)
                    except (grpc.RpcError, RevisionGap) as ended:
                        error = ended
                        break
                    yield from found
            finally:
                call.cancel()
                silence.end()
            if self._closed.is_set():
                return
            self._closed.wait(watch.pause(error))


class _SilenceTimeout:
    """Cancels a stream that is silent while somebody waits for it; synchronous reads have no time limit."""

    def __init__(self, seconds: float, cancel: Callable[[], object]) -> None:
        self._seconds = seconds
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
        wait = self._seconds
        while not self._ended.wait(wait):
            since = self._since
            wait = self._seconds if since is None else since + self._seconds - time.monotonic()
            if wait <= 0:
                self._cancel()
                return


class _Renewal:
    """Renews a login, once for all threads that wait for it."""

    def __init__(self, login: Login, channel: "_Channel") -> None:
        self.login = login
        self._auth: Any = AuthServiceStub(cast(grpc.Channel, channel))
        self._lock = threading.Lock()

    def in_time(self) -> None:
        """Renew the access token if it is due. Raises FrontdeskError."""
        if not self.login.due:
            return
        with self._lock:
            if not self.login.due:
                return
            steps = self.login.renewal()
            with suppress(StopIteration):
                method, request = next(steps)
                while True:
                    try:
                        answer = getattr(self._auth, method)(request)
                    except FrontdeskError as error:
                        method, request = steps.throw(error)
                    else:
                        method, request = steps.send(answer)


class _Channel:
    """A channel whose calls have the defaults."""

    def __init__(self, channel: grpc.Channel, defaults: CallDefaults, renewal: _Renewal | None = None) -> None:
        self._channel: Any = channel
        self._defaults = defaults
        self._renewal = renewal

    def unary_unary(self, *args: Any, **kwargs: Any) -> "_Method":
        return _Method(self._channel.unary_unary(*args, **kwargs), self._defaults, self._renewal)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        method = self._channel.unary_stream(*args, **kwargs)
        return lambda request, **options: method(request, **self._defaults.options(options, unary=False))


class _Method:
    """gRPC's method, with the defaults and our error."""

    def __init__(self, method: Any, defaults: CallDefaults, renewal: _Renewal | None) -> None:
        self._method = method
        self._defaults = defaults
        self._renewal = renewal

    def __call__(self, request: Message, **options: Any) -> Any:
        return self._raising(self._method, request, options)

    def with_call(self, request: Message, **options: Any) -> Any:
        return self._raising(self._method.with_call, request, options)

    def future(self, request: Message, **options: Any) -> Any:
        if self._renewal is not None:
            self._renewal.in_time()
        return self._method.future(self._defaults.request(request), **self._defaults.options(options, unary=True))

    def _raising(self, method: Callable[..., R], request: Message, options: dict[str, Any]) -> R:
        request = self._defaults.request(request)
        again = self._renewal is not None
        while True:
            if self._renewal is not None:
                self._renewal.in_time()
            try:
                return method(request, **self._defaults.options({**options}, unary=True))
            except grpc.RpcError as error:
                failure = FrontdeskError.of(error)
                if self._renewal is None or not again or failure.reason != "CREDENTIALS_EXPIRED":
                    raise failure from error
            # The user's rights have changed, or this clock is wrong.
            self._renewal.login.expire()
            again = False
