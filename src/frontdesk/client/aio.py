"""The client for asyncio."""

import asyncio
import datetime
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Any, Self, cast

import grpc
from google.protobuf.message import Message

from clinic.frontdesk.v1 import event_pb2, queue_pb2
from clinic.frontdesk.v1.auth_pb2_grpc import AuthServiceStub
from frontdesk.client.channel import aio_channel
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


class FrontdeskClient(Stubs[grpc.aio.Channel]):
    """The service, for asyncio. Create it inside the running loop; close it, or use it as a context manager.

    `target` is HOST:PORT or another gRPC target, or a channel of your own, which stays yours to close and to configure
    (`CHANNEL_OPTIONS`). Without `credentials` the connection is in plain text. `server_name` is the name that the
    server's certificate must have, by default the host of `target`. `caller` is the name under which this program is
    logged (1 to 64 printable ASCII characters, else ValueError); calls without credentials have their idempotency keys
    under it. `api_key` or `login` are the credentials of every call, except of one whose own metadata has some; a login
    is refreshed in time. `timeout` is in seconds, for each unary call that is given none; None leaves it to the server
    (10 s an attempt).

    Unary calls raise FrontdeskError. The stubs' own WatchQueue is gRPC's; use `watch_queue` instead.
    """

    def __init__(
        self,
        target: str | grpc.aio.Channel,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str | None = None,
        caller: str | None = None,
        api_key: str | None = None,
        login: Login | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
    ) -> None:
        defaults = CallDefaults(caller, timeout, api_key, login)
        self._owned: grpc.aio.Channel | None = None
        self._closed = asyncio.Event()
        if isinstance(target, str):
            target = self._owned = aio_channel(target, credentials, server_name=server_name)
        self._renewal = None if login is None else _Renewal(login, _Channel(target, defaults.without_login()))
        super().__init__(cast(grpc.aio.Channel, _Channel(target, defaults, self._renewal)))

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
        heartbeat: float = DEFAULT_HEARTBEAT_SECONDS,
        view: queue_pb2.QueueView.ValueType = queue_pb2.QUEUE_VIEW_STAFF,
        on_connection: OnConnection | None = None,
        on_estimates: OnEstimates | None = None,
    ) -> AsyncGenerator[queue_pb2.Queue, None]:
        """Yield the queue now and after every change: `watch_updates` without the changes."""
        watch = self.watch_updates(
            doctor_id, date, heartbeat=heartbeat, view=view, on_connection=on_connection, on_estimates=on_estimates
        )
        async with aclosing(watch) as updates:
            async for update in updates:
                yield update.queue

    async def watch_updates(
        self,
        doctor_id: str,
        date: datetime.date | None = None,
        *,
        heartbeat: float = DEFAULT_HEARTBEAT_SECONDS,
        view: queue_pb2.QueueView.ValueType = queue_pb2.QUEUE_VIEW_STAFF,
        resume_token: str = "",
        on_connection: OnConnection | None = None,
        on_estimates: OnEstimates | None = None,
    ) -> AsyncGenerator[Update, None]:
        """Yield the queue and its changes, for as long as you ask.

        After any interruption the watch goes on from where it was, and yields nothing if nothing happened. A reader
        that is slower than the clinic gets fewer updates, with more changes each. `date` is the clinic's; default: the
        clinic's today, which stays the watched date after midnight. `heartbeat` is the seconds of silence after which
        the service shows that it is alive (5 to 60, others are clamped); after three of them without a message the
        stream is opened anew. `view` is how much is shown; `resume_token` goes on from an earlier Update of that view.

        `on_connection` is called when a stream begins and ends, `on_estimates` with each heartbeat: it has the
        present estimates of a queue that stands still.

        Raises FrontdeskError if another stream would end in the same way: at once for NOT_FOUND, INVALID_ARGUMENT,
        UNIMPLEMENTED, UNAUTHENTICATED and PERMISSION_DENIED, after ten streams in a row without a message (some 20 s)
        for every other error that waiting does not mend, such as a message that is too large to receive. A service that
        is UNAVAILABLE or silent is waited for without limit; after 5, 10, 20 … such attempts the logger
        `frontdesk.client` gets a warning.

        Ends when the client is closed. To leave a loop early use `contextlib.aclosing`, which ends the stream at once.
        """
        login = None if self._renewal is None else self._renewal.login
        watch = Watch(doctor_id, date, heartbeat, view, resume_token, on_connection, on_estimates, login)
        async with aclosing(self._follow(watch, lambda request: self.queues.WatchQueue(request))) as updates:
            async for update in updates:
                yield update

    async def watch_events(
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
    ) -> AsyncGenerator[event_pb2.Event, None]:
        """Yield every event with this filter: from now on, after `cursor`, or from the oldest that is kept.

        After any interruption it goes on from where it was: no event is left out, none comes twice. Keep the `cursor`
        of the last event that you have done with, to go on from there another time. `types` are as in `Event.type`.

        Raises FrontdeskError as `watch_updates` does, and for CURSOR_LOST and CURSOR_TOO_OLD.
        """
        request = event_pb2.WatchEventsRequest(
            types=types, clinic_id=clinic_id, doctor_id=doctor_id, patient_id=patient_id, cursor=cursor,
            from_start=from_start, batch_size=EVENTS_AT_ONCE,
        )  # fmt: skip
        login = None if self._renewal is None else self._renewal.login
        watch = EventWatch(request, heartbeat, on_connection, login)
        async with aclosing(self._follow(watch, lambda request: self.events.WatchEvents(request))) as events:
            async for event in events:
                yield event

    async def _follow(self, watch: Following[Item], begin: Callable[[Any], Any]) -> AsyncGenerator[Item, None]:
        while not self._closed.is_set():
            call: Any = None
            error: Exception | None = None
            try:
                while True:
                    try:
                        if call is None:
                            if self._renewal is not None:
                                await self._renewal.in_time()
                            call = begin(watch.request())
                        async with asyncio.timeout(watch.longest_silence):
                            message = await call.read()
                        if message is grpc.aio.EOF:
                            break
                        found = watch.take(message)
                    except (grpc.RpcError, FrontdeskError, TimeoutError, RevisionGap) as ended:
                        error = ended
                        break
                    for item in found:
                        yield item
            except asyncio.CancelledError:
                task = asyncio.current_task()
                # Closing the channel looks like this too.
                if self._closed.is_set() and task is not None and not task.cancelling():
                    return
                raise
            finally:
                if call is not None:
                    call.cancel()
            if self._closed.is_set():
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(watch.pause(error)):
                    await self._closed.wait()


class _Renewal:
    """Renews a login, once for all calls that wait for it."""

    def __init__(self, login: Login, channel: "_Channel") -> None:
        self.login = login
        self._auth: Any = AuthServiceStub(cast(grpc.aio.Channel, channel))
        self._lock = asyncio.Lock()

    async def in_time(self) -> None:
        """Renew the access token if it is due. Raises FrontdeskError."""
        if not self.login.due:
            return
        async with self._lock:
            if not self.login.due:
                return
            steps = self.login.renewal()
            with suppress(StopIteration):
                method, request = next(steps)
                while True:
                    try:
                        answer = await getattr(self._auth, method)(request)
                    except FrontdeskError as error:
                        method, request = steps.throw(error)
                    else:
                        method, request = steps.send(answer)


class _Channel:
    """A channel whose calls have the defaults."""

    def __init__(self, channel: grpc.aio.Channel, defaults: CallDefaults, renewal: _Renewal | None = None) -> None:
        self._channel: Any = channel
        self._defaults = defaults
        self._renewal = renewal

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., "_Call"]:
        method = self._channel.unary_unary(*args, **kwargs)

        def call(request: Message, **options: Any) -> _Call:
            request = self._defaults.request(request)
            return _Call(lambda: method(request, **self._defaults.options({**options}, unary=True)), self._renewal)

        return call

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        method = self._channel.unary_stream(*args, **kwargs)
        return lambda request, **options: method(request, **self._defaults.options(options, unary=False))


class _Call(Awaitable[Any]):
    """gRPC's call, with our error. It begins when it is awaited if its login has to be renewed first, else at once."""

    def __init__(self, begin: Callable[[], Any], renewal: _Renewal | None) -> None:
        self._begin = begin
        self._renewal = renewal
        self._call: Any = begin() if renewal is None or not renewal.login.due else None

    def __await__(self) -> Generator[Any, None, Any]:
        if self._renewal is not None:
            return (yield from self._renewing(self._renewal).__await__())
        try:
            return (yield from self._call.__await__())
        except grpc.RpcError as error:
            raise FrontdeskError.of(error) from error

    async def _renewing(self, renewal: _Renewal) -> Any:
        again = self._call is not None
        while True:
            if self._call is None:
                await renewal.in_time()
                self._call = self._begin()
            try:
                return await self._call
            except grpc.RpcError as error:
                failure = FrontdeskError.of(error)
                if failure.reason != "CREDENTIALS_EXPIRED" or not again:
                    raise failure from error
            # The user's rights have changed, or this clock is wrong.
            renewal.login.expire()
            self._call, again = None, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)
