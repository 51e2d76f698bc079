"""Hand-made HTTP/2 for traffic that no gRPC client sends; servers with other settings; and a link that can be cut."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType

import grpc
import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
from google.protobuf.message import Message
from psycopg.conninfo import conninfo_to_dict

from frontdesk.process.background import BackgroundWork
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front
from tests.waiting import SOON, until

_GOAWAY = 7

OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)


@asynccontextmanager
async def serving(settings: Settings, conninfo: str, **changed: object) -> AsyncIterator[tuple[Worker, Front]]:
    """One more worker with some settings changed, and a client of it; with background="on" its background work too."""
    settings = settings.model_copy(update=changed)
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    try:
        async with AsyncExitStack() as stack:
            if settings.background == "on":
                await stack.enter_async_context(working(settings, conninfo))
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[OWN_CONNECTION])
            )
            yield worker, Front(channel, conninfo, port)
    finally:
        await worker.stop(drain=False)


@asynccontextmanager
async def working(settings: Settings, conninfo: str, **changed: object) -> AsyncIterator[BackgroundWork]:
    """The background work of one more process."""
    work = BackgroundWork(settings.model_copy(update=changed), conninfo)
    await work.start()
    try:
        yield work
    finally:
        await work.stop()


@asynccontextmanager
async def another_client(front: Front, *options: tuple[str, int]) -> AsyncIterator[Front]:
    """A client with its own connection."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}", options=[OWN_CONNECTION, *options]) as channel:
        yield Front(channel, front.conninfo, front.port)


def database_of(front: Front) -> str:
    """The name of the test's database."""
    return str(conninfo_to_dict(front.conninfo)["dbname"])


def framed(message: bytes | Message, *, compressed: bool = False, length: int | None = None) -> bytes:
    """A gRPC message with its prefix, which may state a false length."""
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2 without flags."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, 0, stream) + payload


class RawConnection:
    """A client's HTTP/2 connection that can send anything.

    One that does not read takes the 64 KiB that the windows of HTTP/2 allow, or `window` bytes of each stream, and
    never opens them further.
    """

    def __init__(self, port: int, *, reads: bool = True, window: int | None = None) -> None:
        self._port = port
        self._reads = reads
        self._window = window
        self._rest = b""
        self._unread: list[tuple[int, int]] = []
        self._http = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        )
        self.begun: dict[int, dict[str, str]] = {}
        """The headers, and trailers if they have come, of each stream that the server has answered."""
        self.ended: dict[int, dict[str, str]] = {}
        """The same of each stream that has ended."""
        self.reset: dict[int, int] = {}
        self.gone: int | None = None
        """The error code of GOAWAY."""
        self.closed = False
        self.settled = False
        self.pongs = 0
        self.acknowledged = 0
        """The number of changed settings that the server has acknowledged."""

    async def __aenter__(self) -> "RawConnection":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._http.initiate_connection()
        if self._window is not None:
            self._http.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: self._window})
        await self.flush()
        self._task = asyncio.create_task(self._read())
        await until(lambda: self.settled or self.closed)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        self._writer.close()
        await asyncio.gather(self._task, self._writer.wait_closed(), return_exceptions=True)

    async def flush(self) -> None:
        """Send the waiting bytes."""
        try:
            self._writer.write(self._http.data_to_send())
            await self._writer.drain()
        except OSError:
            self.closed = True

    async def _read(self) -> None:
        try:
            while data := await self._reader.read(65536):
                self._rest += data
                self._receive()
                await self.flush()
        except (OSError, h2.exceptions.ProtocolError):
            pass
        self.closed = True

    def _receive(self) -> None:
        while len(self._rest) >= 9 and len(self._rest) >= (end := 9 + int.from_bytes(self._rest[:3])):
            frame, self._rest = self._rest[:end], self._rest[end:]
            if frame[3] == _GOAWAY:
                # h2 takes GOAWAY for the end, but streams that have started may continue.
                self.gone = int.from_bytes(frame[13:17])
                continue
            for event in self._http.receive_data(frame):
                self._take(event)

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RemoteSettingsChanged():
                self.settled = True
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                found = self.begun.setdefault(event.stream_id, {})
                found |= {_text(name): _text(value) for name, value in event.headers}
            case h2.events.DataReceived():
                if self._reads:
                    self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                else:
                    self._unread.append((event.flow_controlled_length, event.stream_id))
            case h2.events.StreamEnded():
                self.ended[event.stream_id] = self.begun.get(event.stream_id, {})
            case h2.events.StreamReset():
                self.reset[event.stream_id] = int(event.error_code)
            case h2.events.PingAckReceived():
                self.pongs += 1
            case h2.events.SettingsAcknowledged():
                self.acknowledged += 1
            case _:
                pass

    async def open(self, path: str, *more: tuple[str, str]) -> int:
        """Send the headers of a call; return its stream."""
        stream = self._http.get_next_available_stream_id()
        headers = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"),
                   ("te", "trailers"), ("content-type", "application/grpc"), *more]  # fmt: skip
        self._http.send_headers(stream, headers)
        await self.flush()
        return stream

    async def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send a part of a message, within the limits of flow control."""
        while data:
            room = min(self._http.local_flow_control_window(stream), self._http.max_outbound_frame_size)
            if self.closed or stream in self.reset or stream in self.ended:
                return
            if room:
                self._http.send_data(stream, data[:room])
                data = data[room:]
            await self.flush()
            if not room:
                await asyncio.sleep(0.005)
        if end:
            self._http.end_stream(stream)
            await self.flush()

    async def abandon(self, stream: int) -> None:
        """Reset a stream."""
        self._http.reset_stream(stream, 8)
        await self.flush()

    async def ping(self) -> None:
        """Send a ping."""
        self._http.ping(b"12345678")
        await self.flush()

    async def read(self) -> None:
        """Read from now on, including the bytes that have already arrived."""
        self._reads = True
        for length, stream in self._unread:
            self._http.acknowledge_received_data(length, stream)
        self._unread.clear()
        await self.flush()

    async def write(self, data: bytes) -> None:
        """Send bytes, which may not be valid HTTP/2."""
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            self.closed = True

    async def settle(self) -> None:
        """Change a setting, which the server must acknowledge."""
        self._http.update_settings({h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: 10_000 + self.acknowledged % 2})
        await self.flush()

    async def status(self, stream: int, seconds: float = SOON) -> str | None:
        """The grpc-status of a stream when it ends; None if it was reset or the connection was closed."""
        await until(lambda: stream in self.ended or stream in self.reset or self.closed, seconds)
        return self.ended.get(stream, {}).get("grpc-status")


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


class Line:
    """A link to a server, whose answers can be held back, and which can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self.muted = False
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Line":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def channel(self) -> grpc.aio.Channel:
        """A client that connects through the link."""
        return grpc.aio.insecure_channel(f"127.0.0.1:{self.port}", options=[OWN_CONNECTION])

    def cut(self) -> None:
        """End every connection."""
        for writer in self._writers:
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, onward]
        for source, sink, answers in ((reader, onward, False), (onward_reader, writer, True)):
            task = asyncio.create_task(self._carry(source, sink, answers))
            self._tasks.add(task)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool) -> None:
        try:
            while data := await source.read(65536):
                if not (answers and self.muted):
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()
