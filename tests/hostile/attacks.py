"""Attacks on the service, each at its own rate. `tests.hostile.beside` measures their effect on other clients.

Run as `python -m tests.hostile.attacks NAME`, with the attacker's knowledge as JSON on the first line of standard
input. The attacker prints "ready", waits for a second line, attacks, and prints its results as JSON.
"""

import asyncio
import gzip
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import grpc
from google.type.date_pb2 import Date
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from clinic.frontdesk.v1 import (
    appointment_pb2,
    clinic_pb2,
    doctor_pb2,
    patient_pb2,
    queue_pb2,
    slot_pb2,
)
from tests.clinic import Front, day, soon, today
from tests.hostile.methods import path_of, slot_at
from tests.hostile.wire import OWN_CONNECTION, RawConnection, frame, framed

NICE = 10
"""The niceness of attackers. They share the machine with the service, so they get only the CPU that the service
leaves.
"""


@dataclass(frozen=True)
class Target:
    """The attacker's knowledge of the service."""

    port: int
    doctor_id: str
    """A doctor for the attacker's bookings."""
    patient_ids: list[str]
    clinic_id: str
    watched: list[str]
    """The doctors of the legitimate load."""
    seconds: float


Act = Callable[[], Awaitable[str]]
"""Makes one hostile request and returns its outcome."""


@dataclass(frozen=True)
class Attack:
    """One kind of attack."""

    what: str
    rate: float
    """Requests per second."""
    most: int
    """The maximum number of requests in flight."""
    prepare: Callable[[Target], Any]
    """An asynchronous context manager around the attack; it yields the act."""


ATTACKS: dict[str, Attack] = {}


def attack(what: str, *, rate: float, most: int = 50) -> Callable[[Callable[[Target], AsyncIterator[Act]]], None]:
    """Add an attack to the table, under the name of its function."""

    def enter(prepare: Callable[[Target], AsyncIterator[Act]]) -> None:
        name = prepare.__name__.replace("_", "-")
        ATTACKS[name] = Attack(what, rate, most, asynccontextmanager(prepare))

    return enter


@asynccontextmanager
async def desks(target: Target, count: int = 4) -> AsyncIterator[Callable[[], Front]]:
    """Ordinary clients, each with its own connection, in turn."""
    async with AsyncExitStack() as stack:
        made = []
        for _ in range(count):
            options = [OWN_CONNECTION, ("grpc.enable_retries", 0)]
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{target.port}", options=options)
            made.append(Front(await stack.enter_async_context(channel), "", target.port))
        turn = itertools.cycle(made)
        yield lambda: next(turn)


async def said(call: Awaitable[Any]) -> str:
    """The status of a call."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return str(error.code().name)
    return "OK"


class Wires:
    """Raw connections. A new one opens when the server has closed the old one, or after `streams` streams."""

    def __init__(self, target: Target, stack: AsyncExitStack, *, streams: int = 1000, **options: Any) -> None:
        self._target = target
        self._stack = stack
        self._streams = streams
        self._options = options
        self._wire: RawConnection | None = None
        self._used = 0
        self._lock = asyncio.Lock()

    async def get(self) -> RawConnection:
        """A connection that can take one more stream."""
        async with self._lock:
            wire = self._wire
            if wire is None or wire.closed or wire.gone is not None or self._used >= self._streams:
                if wire is not None and self._streams > 100:
                    await wire.__aexit__(None, None, None)
                self._used = 0
                self._wire = wire = RawConnection(self._target.port, **self._options)
                await wire.__aenter__()
                self._stack.push_async_exit(wire)
            self._used += 1
            return wire


@cache
def bad_slots() -> bytes:
    """A request with the maximum number of slots, each of which breaks every rule."""
    bad = slot_pb2.Slot(id="x", doctor_id="x", block_reason="\x01", capacity=-1)
    return slot_pb2.BatchCreateSlotsRequest(slots=[bad] * 500).SerializeToString()


@attack("burns CPU only: the cost of sharing the machine", rate=100)
async def control(target: Target) -> AsyncIterator[Act]:
    async def act() -> str:
        ends = time.thread_time() + 0.006
        while time.thread_time() < ends:
            pass
        return "burnt"

    yield act


@attack("headers of calls that never send a message", rate=500)
async def headers_only(target: Target) -> AsyncIterator[Act]:
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack, streams=90)

        async def act() -> str:
            await (await wires.get()).open(path_of("GetClinic"))
            return "held"

        yield act


@attack("calls that are reset at once", rate=1000)
async def rapid_reset(target: Target) -> AsyncIterator[Act]:
    request = framed(doctor_pb2.GetDoctorRequest(doctor_id=target.doctor_id))
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack)

        async def act() -> str:
            wire = await wires.get()
            stream = await wire.open(path_of("GetDoctor"))
            await wire.send(stream, request, end=True)
            if stream not in wire.ended:
                await wire.abandon(stream)
            return "reset"

        yield act


@attack("pings, on a new connection after each GOAWAY", rate=1000)
async def ping_flood(target: Target) -> AsyncIterator[Act]:
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack, streams=10**9)

        async def act() -> str:
            await (await wires.get()).ping()
            return "sent"

        yield act


@attack("changes of HTTP/2 settings", rate=1000)
async def settings_flood(target: Target) -> AsyncIterator[Act]:
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack, streams=10**9)

        async def act() -> str:
            await (await wires.get()).settle()
            return "sent"

        yield act


@attack("frames that ask for nothing, hundreds at a time", rate=200)
async def idle_frames(target: Target) -> AsyncIterator[Act]:
    kinds = itertools.cycle(
        (frame(8, 0, b"\0\0\0\1"), frame(2, 9, b"\0\0\0\0\1"), frame(3, 1, b"\0\0\0\x08"), frame(85, 0, b"x" * 50))
    )
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack, streams=10**9)

        async def act() -> str:
            wire = await wires.get()
            await wire.write(next(kinds) * 100)
            return "sent"

        yield act


@attack("15 KiB and 17 KiB of metadata, in turn", rate=200)
async def giant_metadata(target: Target) -> AsyncIterator[Act]:
    sizes = itertools.cycle((15, 17))
    request = clinic_pb2.GetClinicRequest(clinic_id=target.clinic_id)
    async with desks(target) as desk:
        yield lambda: said(desk().clinics.GetClinic(request, metadata=[("x", "a" * 1024 * next(sizes))]))


@attack("messages over the limit", rate=20)
async def oversized(target: Target) -> AsyncIterator[Act]:
    request = clinic_pb2.GetClinicRequest(clinic_id="x" * (1024 * 1024))
    async with desks(target) as desk:
        yield lambda: said(desk().clinics.GetClinic(request))


@attack("a megabyte of one list", rate=20)
async def long_lists(target: Target) -> AsyncIterator[Act]:
    unknown: Any = 99
    states = appointment_pb2.ListAppointmentsRequest(states=[unknown] * 900_000)
    allergies = patient_pb2.RegisterPatientRequest(patient=patient_pb2.Patient(allergies=[""] * 400_000))
    slots = slot_pb2.BatchCreateSlotsRequest(slots=[slot_pb2.Slot()] * 500_000)
    turn = itertools.cycle(range(3))
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            match next(turn):
                case 0:
                    return said(desk().patients.RegisterPatient(allergies))
                case 1:
                    return said(desk().appointments.ListAppointments(states))
                case _:
                    return said(desk().slots.BatchCreateSlots(slots))

        yield act


@attack("gzip bombs of 50 MB", rate=20)
async def gzip_bombs(target: Target) -> AsyncIterator[Act]:
    bomb = framed(gzip.compress(b"\0" * 50_000_000), compressed=True)
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack)

        async def act() -> str:
            wire = await wires.get()
            stream = await wire.open(path_of("GetClinic"), ("grpc-encoding", "gzip"))
            await wire.send(stream, bomb, end=True)
            return f"status {await wire.status(stream)}"

        yield act


@attack("bytes that are not protobuf", rate=500)
async def malformed(target: Target) -> AsyncIterator[Act]:
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            call: Any = desk().channel.unary_unary(path_of("BookAppointment"))
            return said(call(b"\xff" * 64))

        yield act


@attack("500 slots that break every rule", rate=30)
async def rule_breaking(target: Target) -> AsyncIterator[Act]:
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            call: Any = desk().channel.unary_unary(path_of("BatchCreateSlots"))
            return said(call(bad_slots()))

        yield act


@attack("methods that do not exist", rate=500)
async def unknown_methods(target: Target) -> AsyncIterator[Act]:
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            call: Any = desk().channel.unary_unary("/clinic.frontdesk.v1.ClinicService/Nothing")
            return said(call(b""))

        yield act


@attack("connections, each held until the end", rate=100)
async def many_connections(target: Target) -> AsyncIterator[Act]:
    async with AsyncExitStack() as stack:

        async def act() -> str:
            await stack.enter_async_context(RawConnection(target.port))
            return "held"

        yield act


@attack("connections that do not speak HTTP/2", rate=200)
async def no_http2(target: Target) -> AsyncIterator[Act]:
    async def act() -> str:
        _, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return "sent"

    yield act


@attack("watchers of the load's doctors who never read", rate=100)
async def slow_readers(target: Target) -> AsyncIterator[Act]:
    requests = [framed(queue_pb2.WatchQueueRequest(doctor_id=doctor)) for doctor in target.watched]
    async with AsyncExitStack() as stack:
        wires = Wires(target, stack, streams=90, reads=False)

        async def act() -> str:
            wire = await wires.get()
            await wire.send(await wire.open(path_of("WatchQueue")), random.choice(requests), end=True)
            return "held"

        yield act


@attack("watch streams that are opened and abandoned", rate=300)
async def watch_flood(target: Target) -> AsyncIterator[Act]:
    async with desks(target) as desk:

        async def act() -> str:
            request = queue_pb2.WatchQueueRequest(doctor_id=random.choice(target.watched))
            stream: Any = desk().queues.WatchQueue(request)
            try:
                return await said(stream.read())
            finally:
                stream.cancel()

        yield act


@attack("dry runs and bookings on one doctor-day", rate=300)
async def one_doctor_day(target: Target) -> AsyncIterator[Act]:
    place = appointment_pb2.DoctorDay(doctor_id=target.doctor_id, date=day(today()))
    turn = itertools.count()
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            n = next(turn)
            patient = target.patient_ids[n % len(target.patient_ids)]
            request = appointment_pb2.BookAppointmentRequest(
                patient_id=patient, doctor_day=place, validate_only=n % 4 > 0
            )
            return said(desk().appointments.BookAppointment(request))

        yield act


@attack("the longest pages of the widest lists", rate=100)
async def expensive_lists(target: Target) -> AsyncIterator[Act]:
    now = day(today())
    month = {"from_date": now, "to_date": Date(year=now.year + 1, month=1, day=1)}
    turn = itertools.cycle(range(4))
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            front = desk()
            match next(turn):
                case 0:
                    wide = appointment_pb2.ListAppointmentsRequest(doctor_id=target.watched[0], page_size=100, **month)
                    return said(front.appointments.ListAppointments(wide))
                case 1:
                    return said(
                        front.patients.ListPatients(patient_pb2.ListPatientsRequest(name_prefix="P", page_size=100))
                    )
                case 2:
                    return said(front.slots.ListSlots(slot_pb2.ListSlotsRequest(available_only=True, page_size=100)))
            return said(front.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest(page_size=100)))

        yield act


@attack("one key, with one request and with different ones", rate=300)
async def key_reuse(target: Target) -> AsyncIterator[Act]:
    turn = itertools.count()
    async with desks(target) as desk:

        def act() -> Awaitable[str]:
            n = next(turn)
            slot = slot_at(target.doctor_id, soon(2), 30 + n % 3)
            return said(
                desk().slots.CreateSlot(slot_pb2.CreateSlotRequest(slot=slot, idempotency_key=f"storm-{n // 100}"))
            )

        yield act


@attack("the descriptors, file after file", rate=200)
async def reflection(target: Target) -> AsyncIterator[Act]:
    async with desks(target) as desk:

        async def act() -> str:
            stub = reflection_pb2_grpc.ServerReflectionStub(desk().channel)
            asked = [
                reflection_pb2.ServerReflectionRequest(file_containing_symbol="clinic.frontdesk.v1.AppointmentService")
            ] * 5
            stream: Any = stub.ServerReflectionInfo(iter(asked))
            try:
                async for _ in stream:
                    pass
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return "OK"

        yield act


async def run(name: str, target: Target) -> dict[str, Any]:
    """Attack. Return the number of requests, their outcomes, and the seconds of CPU."""
    chosen = ATTACKS[name]
    outcomes: Counter[str] = Counter()
    running: set[asyncio.Task[None]] = set()

    async def once(act: Act) -> None:
        try:
            outcomes[await act()] += 1
        except (OSError, TimeoutError) as error:
            outcomes[type(error).__name__] += 1

    async with chosen.prepare(target) as act:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        began, used = time.monotonic(), _cpu()
        for n in itertools.count():
            due = n / chosen.rate
            if due > target.seconds or time.monotonic() - began > target.seconds:
                break
            if (early := began + due - time.monotonic()) > 0:
                await asyncio.sleep(early)
            if len(running) < chosen.most:
                task = asyncio.create_task(once(act))
                running.add(task)
                task.add_done_callback(running.discard)
        cpu = _cpu() - used
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return {"outcomes": outcomes, "cpu": cpu}


def _cpu() -> float:
    used = os.times()
    return used.user + used.system


def main() -> None:
    """Run one attacker."""
    os.nice(NICE)
    target = Target(**json.loads(sys.stdin.readline()))
    print(json.dumps(asyncio.run(run(sys.argv[1], target))), flush=True)


def knowing(target: Target) -> str:
    """The first line of an attacker's standard input."""
    return json.dumps(asdict(target)) + "\n"


if __name__ == "__main__":
    main()
