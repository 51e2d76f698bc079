"""Load clients, each in its own process: unary calls, watchers, and a front desk that changes the watched queues."""

import asyncio
import gc
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from google.type.date_pb2 import Date
from grpc_status.rpc_status import from_call

from clinic.frontdesk.v1 import appointment_pb2, appointment_pb2_grpc, queue_pb2, queue_pb2_grpc
from frontdesk.client.channel import aio_channel

STREAMS_PER_CHANNEL = 100
"""Streams that the service allows on one connection by default."""


def channel(port: int) -> grpc.aio.Channel:
    """A new connection."""
    return aio_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])


def reason_of(error: grpc.RpcError) -> str:
    """The reason of a refusal, or its status code if it has no reason."""
    status = from_call(error)
    info = error_details_pb2.ErrorInfo()
    for detail in status.details if status else ():
        if detail.Unpack(info):
            return str(info.reason)
    return str(error.code().name)


@dataclass
class Loaded:
    """The result of a load."""

    seconds: float
    latencies: list[float]
    refused: dict[str, int] = field(default_factory=dict)
    last: bytes = b""
    """The last response."""


def unary_client(pipe: Connection) -> None:
    """Serve commands `(port, method, requests, in flight, connections, rate, credentials)`: answer when ready, start at
    the next message.

    `credentials` are values of the header `authorization`, which the calls use in turns; none send none.

    With a rate, send that many requests a second, each at its time, however many are in flight. A latency counts from
    then.
    """
    uvloop.run(_unary_client(pipe))


async def _unary_client(pipe: Connection) -> None:
    channels: dict[int, list[grpc.aio.Channel]] = {}
    while True:
        port, method, requests, in_flight, connections, rate, credentials = await asyncio.to_thread(pipe.recv)
        ways = channels.setdefault(port, [])
        while len(ways) < connections:
            ways.append(channel(port))
            await ways[-1].channel_ready()
        calls: list[Any] = [way.unary_unary(method) for way in ways[:connections]]
        # Exclude what exists now from later collections. Each would take 40 ms, which would count as the service's
        # time.
        gc.collect()
        gc.freeze()
        pipe.send("ready")
        await asyncio.to_thread(pipe.recv)
        pipe.send(await _load(calls, requests, in_flight, rate, credentials))


async def _load(
    calls: Sequence[Any], requests: Sequence[bytes], in_flight: int, rate: float, credentials: Sequence[str]
) -> Loaded:
    left = iter(requests)
    headers = itertools.cycle([(("authorization", f"Bearer {one}"),) for one in credentials] or [None])
    loaded = Loaded(0.0, [])
    refused: Counter[str] = Counter()

    async def make(call: Any, request: bytes, since: float) -> None:
        try:
            loaded.last = await call(request, metadata=next(headers))
        except grpc.aio.AioRpcError as error:
            refused[reason_of(error)] += 1
        loaded.latencies.append(time.perf_counter() - since)

    async def work(call: Any) -> None:
        for request in left:
            await make(call, request, time.perf_counter())

    started = time.perf_counter()
    if rate:
        async with asyncio.TaskGroup() as group:
            for n, request in enumerate(left):
                due = started + n / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(make(calls[n % len(calls)], request, due))
    else:
        await asyncio.gather(*(work(calls[n % len(calls)]) for n in range(in_flight)))
    loaded.seconds = time.perf_counter() - started
    loaded.refused = dict(refused)
    return loaded


@dataclass
class Watched:
    """The messages that the watchers got since the last `begin`."""

    messages: int
    lags: list[float]
    """Seconds from a change to its receipt, one for each change and watcher."""
    ended: int
    """Streams that ended; 0 unless something is wrong."""


def watch_client(pipe: Connection) -> None:
    """Serve the commands `("open", port, doctor-days, streams per connection, heartbeat)`, `("begin",)`, `("report",)`.

    The last two of `open` are optional.
    """
    uvloop.run(_Watchers().run(pipe))


class _Watchers:
    def __init__(self) -> None:
        self._received: list[tuple[float, int]] = []
        # All watchers of a doctor-day get the same bytes. Parse them once, after the run.
        self._numbers: dict[bytes, int] = {}
        self._ended = 0
        self._began = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._channels: list[grpc.aio.Channel] = []
        self._room = 0

    async def run(self, pipe: Connection) -> None:
        while True:
            command, *args = await asyncio.to_thread(pipe.recv)
            pipe.send(await getattr(self, command)(*args))

    async def open(
        self, port: int, days: Sequence[tuple[str, date]], streams: int = STREAMS_PER_CHANNEL, heartbeat: int = 60
    ) -> None:
        """Open one more watcher for each doctor-day, with `streams` per connection and this heartbeat interval in
        seconds.
        """
        self._streams, self._heartbeat = streams, Duration(seconds=heartbeat)
        for start in range(0, len(days), 50):
            await asyncio.gather(*(self._start(port, *day) for day in days[start : start + 50]))

    async def begin(self) -> None:
        """Forget all messages so far. Exclude what exists now from later collections, which would count as lag."""
        gc.collect()
        gc.freeze()
        self._received, self._numbers, self._began = [], {}, time.time()

    async def report(self) -> Watched:
        """The messages since `begin`."""
        received, numbers = self._received, self._numbers
        stamps: list[list[float]] = []
        for raw in numbers:
            message = queue_pb2.WatchQueueResponse.FromString(raw)
            times = (change.change_time.ToNanoseconds() / 1e9 for change in message.update.changes)
            stamps.append([stamp for stamp in times if stamp >= self._began])
        lags = [at - stamp for at, number in received for stamp in stamps[number]]
        return Watched(len(received), lags, self._ended)

    async def _start(self, port: int, doctor: str, day: date) -> None:
        if self._room == 0:
            self._channels.append(channel(port))
            self._room = self._streams
        self._room -= 1
        request = queue_pb2.WatchQueueRequest(
            doctor_id=doctor,
            date=Date(year=day.year, month=day.month, day=day.day),
            heartbeat_interval=self._heartbeat,
        )
        watch: Any = self._channels[-1].unary_stream("/clinic.frontdesk.v1.QueueService/WatchQueue")
        call = watch(request.SerializeToString())
        if await call.read() is grpc.aio.EOF:
            raise RuntimeError("a stream ended at once")
        task = asyncio.create_task(self._watch(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self, call: Any) -> None:
        try:
            while (raw := await call.read()) is not grpc.aio.EOF:
                self._received.append((time.time(), self._numbers.setdefault(raw, len(self._numbers))))
        except grpc.aio.AioRpcError:
            pass
        finally:
            self._ended += 1


@dataclass
class Worked:
    """The work of a front desk."""

    calls: int
    latencies: list[float]
    refused: dict[str, int]


def desk_client(pipe: Connection) -> None:
    """Serve the command `(port, doctors, day, patients, changes per second, seconds)`."""
    uvloop.run(_desk_client(pipe))


async def _desk_client(pipe: Connection) -> None:
    while True:
        port, doctors, day, patients, rate, seconds = await asyncio.to_thread(pipe.recv)
        async with channel(port) as way:
            await way.channel_ready()
            worked = Worked(0, [], {})
            share = len(patients) // len(doctors)
            pause = len(doctors) / rate
            await asyncio.gather(
                *(
                    _desk(way, worked, doctor, day, patients[n * share :][:share], n / rate, pause, seconds)
                    for n, doctor in enumerate(doctors)
                )
            )
        pipe.send(worked)


async def _desk(
    way: grpc.aio.Channel, worked: Worked, doctor: str, day: date, patients: Sequence[str],
    begin: float, pause: float, seconds: float,
) -> None:  # fmt: skip
    """One doctor's desk: book a patient, check in, call the next in the queue, start and complete; one step each
    `pause`.
    """
    visits = appointment_pb2_grpc.AppointmentServiceStub(way)
    line = queue_pb2_grpc.QueueServiceStub(way)
    target = appointment_pb2.DoctorDay(doctor_id=doctor, date=Date(year=day.year, month=day.month, day=day.day))
    clock = asyncio.get_running_loop().time
    due = clock() + begin
    end = clock() + seconds

    async def step(call: Any) -> Any:
        nonlocal due
        await asyncio.sleep(max(0.0, due - clock()))
        due += pause
        started = clock()
        answer = await call()
        worked.latencies.append(clock() - started)
        worked.calls += 1
        return answer

    for patient in patients:
        if due >= end:
            return
        book = appointment_pb2.BookAppointmentRequest(patient_id=patient, doctor_day=target)
        try:
            booked = (await step(lambda book=book: visits.BookAppointment(book))).appointment.id
            check_in = queue_pb2.CheckInRequest(appointment_id=booked)
            await step(lambda check_in=check_in: line.CheckIn(check_in))
            call_next = queue_pb2.CallNextRequest(doctor_id=doctor, date=target.date, room="1")
            called = (await step(lambda call_next=call_next: line.CallNext(call_next))).entry.appointment_id
            start = appointment_pb2.StartAppointmentRequest(appointment_id=called)
            await step(lambda start=start: visits.StartAppointment(start))
            complete = appointment_pb2.CompleteAppointmentRequest(appointment_id=called)
            await step(lambda complete=complete: visits.CompleteAppointment(complete))
        except grpc.aio.AioRpcError as error:
            reason = reason_of(error)
            worked.refused[reason] = worked.refused.get(reason, 0) + 1
