"""Measure the log as events: from a change to its readers, many readers, and a reader of a long log beside bookings."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

import grpc
import psycopg
import uvloop
from google.type.date_pb2 import Date

from benchmarks import people
from benchmarks.calls import Kind, percentiles, spend
from benchmarks.load import STREAMS_PER_CHANNEL, channel, unary_client
from benchmarks.people import CLINIC, DOCTOR, PATIENT, make_id
from benchmarks.stage import Child, Meter, ServerProcess, Stage
from clinic.frontdesk.v1 import appointment_pb2, event_pb2

_DOCTORS = 400
_PATIENTS = 20_000
_WRITERS = 4
_SERVICE = "/clinic.frontdesk.v1.EventService/"

# As `record_change` writes them.
_WRITE = """
insert into log (id, time, actor, method, type, resource, clinic_id, doctor_id, patient_id, appointment_id, date,
                 revision, data, queue_state, ticket, call_count, priority, check_in_time)
select log_id(t), t, 'users/' || bench_id(99, i %% 50), 'CheckIn', 'queue.checked_in',
       'appointments/' || bench_id(98, i), bench_id(%(clinic)s, i %% %(clinics)s),
       bench_id(%(doctor)s, i %% %(doctors)s), bench_id(%(patient)s, i %% 20000), bench_id(98, i),
       date '2026-01-01' + %(part)s, i / %(doctors)s + 2,
       jsonb_build_object('state', 'CHECKED_IN', 'number', i %% 10), 'WAITING', 3, 0, 'NORMAL', t
from (select i, clock_timestamp() as t from generate_series(%(first)s::bigint, %(last)s::bigint) i) i
"""


def _values(part: int, first: int, last: int) -> dict[str, Any]:
    return {
        "clinic": CLINIC, "clinics": people.CLINICS, "doctor": DOCTOR, "doctors": _DOCTORS, "patient": PATIENT,
        "part": part, "first": first, "last": last,
    }  # fmt: skip


@dataclass
class Read:
    """What a reader of a long log got."""

    events: int
    seconds: float
    messages: int


@dataclass
class Followed:
    """What the readers of what happens now got since the last `begin`."""

    messages: int
    lags: list[float]
    wrong: int
    """Readers that did not get the same events in the same order; 0 unless something is wrong."""


def event_client(pipe: Connection) -> None:
    """Serve the commands `("pages", port, size, events)`, `("stream", port, batch size, events)`, `("follow", port,
    readers)`, `("begin",)` and `("report",)`.
    """
    uvloop.run(_Readers().run(pipe))


class _Readers:
    def __init__(self) -> None:
        self._channels: list[grpc.aio.Channel] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers: dict[bytes, int] = {}
        self._received: list[list[tuple[float, int]]] = []

    async def run(self, pipe: Connection) -> None:
        while True:
            command, *args = await asyncio.to_thread(pipe.recv)
            pipe.send(await getattr(self, command)(*args))

    async def pages(self, port: int, size: int, most: int) -> Read:
        """Read the log from its beginning, page by page."""
        async with channel(port) as way:
            method: Any = way.unary_unary(_SERVICE + "ListEvents")
            request = event_pb2.ListEventsRequest(page_size=size)
            began, events, messages = time.perf_counter(), 0, 0
            while events < most:
                answer = event_pb2.ListEventsResponse.FromString(await method(request.SerializeToString()))
                events += len(answer.events)
                messages += 1
                if not answer.events:
                    break
                request.cursor = answer.cursor
            return Read(events, time.perf_counter() - began, messages)

    async def stream(self, port: int, batch: int, most: int) -> Read:
        """Read the log from its beginning as a stream."""
        async with channel(port) as way:
            method: Any = way.unary_stream(_SERVICE + "WatchEvents")
            call = method(event_pb2.WatchEventsRequest(from_start=True, batch_size=batch).SerializeToString())
            began, events, messages = time.perf_counter(), 0, 0
            while events < most:
                message = event_pb2.WatchEventsResponse.FromString(await call.read())
                events += len(message.batch.events) or message.HasField("event")
                messages += 1
            seconds = time.perf_counter() - began
            call.cancel()
            return Read(events, seconds, messages)

    async def follow(self, port: int, readers: int) -> None:
        """Open so many more streams of everything that happens."""
        for _ in range(readers):
            if len(self._received) % STREAMS_PER_CHANNEL == 0:
                self._channels.append(channel(port))
            method: Any = self._channels[-1].unary_stream(_SERVICE + "WatchEvents")
            call = method(event_pb2.WatchEventsRequest().SerializeToString())
            await call.read()
            received: list[tuple[float, int]] = []
            self._received.append(received)
            self._tasks.append(asyncio.create_task(self._follow(call, received)))

    async def _follow(self, call: Any, received: list[tuple[float, int]]) -> None:
        while True:
            raw = await call.read()
            received.append((time.time(), self._numbers.setdefault(raw, len(self._numbers))))

    async def begin(self) -> None:
        """Forget what has come so far."""
        gc.collect()
        gc.freeze()
        self._numbers.clear()
        for received in self._received:
            received.clear()

    async def report(self) -> Followed:
        """What has come since `begin`."""
        stamps = [
            event_pb2.WatchEventsResponse.FromString(raw).event.time.ToNanoseconds() / 1e9 for raw in self._numbers
        ]
        orders = [[number for _, number in received if stamps[number]] for received in self._received]
        return Followed(
            sum(map(len, self._received)),
            [at - stamps[number] for received in self._received for at, number in received if stamps[number]],
            sum(order != orders[0] for order in orders),
        )


class _Writers:
    """Writes changes at an even rate, each in its own transaction."""

    def __init__(self, conninfo: str, part: int, rate: float) -> None:
        self._conninfo = conninfo
        self._part = part
        self._pause = _WRITERS / rate
        self.written = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._write, args=(n,)) for n in range(_WRITERS)]

    def __enter__(self) -> "_Writers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _write(self, number: int) -> None:
        with psycopg.connect(self._conninfo, autocommit=True) as connection:
            # A commit that waits for the disk is the disk's time, and the same for all.
            due = time.perf_counter()
            while not self._stop.is_set():
                due += self._pause
                time.sleep(max(0.0, due - time.perf_counter()))
                number += _WRITERS
                connection.execute(_WRITE, _values(self._part, number, number))
                self.written += 1


def measure(
    stage: Stage, *, events: int, seconds: float, readers: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Follow the log by one reader and by many; then read `events` from the oldest on, alone and beside bookings."""
    conninfo = stage.database("events")
    zone = people.noon_zone()
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, _DOCTORS, _PATIENTS)
    people.settle(conninfo)
    followed = []
    for part, (many, rate) in enumerate(((1, 1_000.0), (readers, 20.0)), 1):
        progress(f"{many} readers, {rate:.0f} changes a second")
        with stage.serve(conninfo) as server:
            followed.append(_follow(stage, server, conninfo, part, many, rate, seconds))
    progress(f"a log of {events:,} events")
    _fill(conninfo, events)
    with stage.serve(conninfo) as server, Child(event_client) as client:
        read = [
            _read(stage, server, client, name, events, command)
            for name, command in (
                ("ListEvents, pages of 1,000", ("pages", server.port, 1_000)),
                ("ListEvents, pages of 100", ("pages", server.port, 100)),
                ("WatchEvents", ("stream", server.port, 1)),
                ("WatchEvents, batches of 500", ("stream", server.port, 500)),
            )
        ]
        progress("bookings beside a reader")
        beside = _beside(stage, server, people.today(zone), rounds, events)
    progress("bookings with and without background work")
    background = _background(stage, conninfo, people.today(zone), rounds)
    return {
        "events": events, "followed": followed, "read": read, "beside": beside, "background": background,
    }  # fmt: skip


def _fill(conninfo: str, events: int) -> None:
    with psycopg.connect(conninfo, autocommit=True) as connection:
        step = 100_000
        for first in range(0, events, step):
            connection.execute(_WRITE, _values(0, first, min(first + step, events) - 1))
            connection.execute("select seal_log()")
    people.settle(conninfo)


def _follow(
    stage: Stage, server: ServerProcess, conninfo: str, part: int, readers: int, rate: float, seconds: float
) -> dict[str, Any]:
    with Child(event_client) as client:
        client.ask("follow", server.port, readers)
        with _Writers(conninfo, part, rate) as writers:
            time.sleep(1.0)
            client.ask("begin")
            before = writers.written
            meter = Meter(stage, server, [client])
            time.sleep(seconds)
            spent, postgres, (own,) = meter.read()
            written = writers.written - before
        time.sleep(1.0)
        report: Followed = client.ask("report")
    p50, p99 = percentiles(report.lags, 50, 99)
    return {
        "readers": readers, "changes_per_second": written / seconds, "messages": report.messages, "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3, "worst_ms": max(report.lags, default=0.0) * 1e3, "server_cores": spent / seconds,
        "postgres_cores": postgres / seconds, "client_cores": own / seconds, "wrong": report.wrong,
    }  # fmt: skip


def _read(
    stage: Stage, server: ServerProcess, client: Child, name: str, events: int, command: tuple[Any, ...]
) -> dict[str, Any]:
    meter = Meter(stage, server, [client])
    read: Read = client.ask(*command, events)
    spent, postgres, (own,) = meter.read()
    return {
        "name": name, **asdict(read), "per_second": read.events / read.seconds,
        "server_us": spent / read.events * 1e6, "postgres_us": postgres / read.events * 1e6,
        "client_us": own / read.events * 1e6,
    }  # fmt: skip


def _booking(name: str, server: ServerProcess, day: date, later: int) -> Kind:
    """Bookings of a year of their own, in which no patient meets a doctor-day again."""

    def book(n: int) -> appointment_pb2.BookAppointmentRequest:
        on = Date(year=day.year + 1 + later, month=1 + n // _PATIENTS, day=1 + n // _DOCTORS % 28)
        return appointment_pb2.BookAppointmentRequest(
            patient_id=make_id(PATIENT, n % _PATIENTS),
            doctor_day=appointment_pb2.DoctorDay(doctor_id=make_id(DOCTOR, n % _DOCTORS), date=on),
        )

    return Kind(name, server, server.port, "/clinic.frontdesk.v1.AppointmentService/BookAppointment", book)


def _beside(stage: Stage, server: ServerProcess, day: date, rounds: int, events: int) -> dict[str, Any]:
    """Bookings at an even rate, alone and beside a reader from the oldest on, in turns."""
    kind = _booking("BookAppointment", server, day, 0)
    waits: dict[str, list[float]] = {"alone": [], "beside pages": [], "beside a stream": []}
    refused = 0
    rates: dict[str, list[float]] = {"beside pages": [], "beside a stream": []}
    with Child(unary_client) as client, Child(event_client) as reader:
        spend(stage, [client], kind, 200, 8)
        for _ in range(rounds):
            for name, latencies in waits.items():
                if name != "alone":
                    command = ("pages", server.port, 1_000) if name == "beside pages" else ("stream", server.port, 1)
                    reader.pipe.send((*command, events))
                spent = spend(stage, [client], kind, 400, 1, rate=100.0)
                latencies += spent.latencies
                refused += sum(spent.refused.values())
                if name != "alone":
                    read: Read = reader.receive()
                    rates[name].append(read.events / read.seconds)
    return {
        "p50_and_p99_ms": {name: [ms * 1e3 for ms in percentiles(found, 50, 99)] for name, found in waits.items()},
        "per_second": rates,
        "refused": refused,
    }


def _background(stage: Stage, conninfo: str, day: date, rounds: int) -> dict[str, Any]:
    """The CPU of a booking, of service and PostgreSQL, with background work and without, in turns."""
    us: dict[str, list[float]] = {"on": [], "off": []}
    refused = 0
    for number in range(rounds):
        for name in us:
            with stage.serve(conninfo, background=name) as server, Child(unary_client) as client:
                kind = _booking(name, server, day, 1 + 2 * number + (name == "on"))
                spend(stage, [client], kind, 200, 8)
                spent = spend(stage, [client], kind, 1_500, 8)
                us[name].append((spent.server + spent.postgres) / spent.calls * 1e6)
                refused += sum(spent.refused.values())
    return {"cpu_us": us, "refused": refused}
