"""Cases 47 to 50: many watchers, and their misfortunes."""

import asyncio
import base64
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, queue_pb2, waitlist_pb2
from frontdesk.live.hints import Hints
from frontdesk.rpc import stream as streams
from frontdesk.settings import Settings
from tests.clinic import Front, day, outcome, reason_of, refusal, today, tomorrow, without_estimates
from tests.history.world import Served
from tests.hostile.methods import METHODS, MUTATIONS, call, manners, path_of, request_class, waiting
from tests.hostile.test_domain import cancelling, to_day
from tests.hostile.wire import RawConnection, another_client, framed, serving
from tests.waiting import SOON, until

Change = tuple[int, int, str]


def watching(doctor_id: str, token: str = "", **fields: Any) -> queue_pb2.WatchQueueRequest:
    """A request to watch this doctor's queue of today, after the token."""
    return queue_pb2.WatchQueueRequest(doctor_id=doctor_id, date=day(today()), resume_token=token, **fields)


def watch(front: Front, request: queue_pb2.WatchQueueRequest) -> Any:
    """Open the stream."""
    return front.queues.WatchQueue(request)


@dataclass
class Replay:
    """The messages of a watcher, and the history that it built from them."""

    revision: int = 0
    token: str = ""
    changes: list[Change] = field(default_factory=list)
    queue: queue_pb2.Queue | None = None
    closing: queue_pb2.StreamClosing | None = None
    updates: int = 0

    def take(self, message: queue_pb2.WatchQueueResponse) -> None:
        """Take one message, which must continue from the last one."""
        if message.HasField("closing"):
            self.closing = message.closing
            return
        self.token = message.resume_token
        if message.HasField("heartbeat"):
            assert message.revision == message.previous_revision == self.revision
            return
        self.updates += 1
        update = message.update
        assert update.queue.revision == message.revision
        if message.previous_revision == 0:
            assert not update.changes
            self.changes.clear()
        else:
            assert message.previous_revision == self.revision
            revisions = [change.revision for change in update.changes]
            assert revisions == list(range(self.revision + 1, message.revision + 1))
            self.changes += [(c.revision, c.kind, c.appointment_id) for c in update.changes]
        self.revision, self.queue = message.revision, without_estimates(update.queue)


def history(front: Front, doctor_id: str) -> list[Change]:
    """Today's changes, from the database."""
    kinds = queue_pb2.QueueChange.Kind
    return [
        (revision, kinds.Value(f"KIND_{kind}"), appointment)
        for revision, kind, appointment in front.sql(
            "select revision, change_kind(type), coalesce(appointment_id::text, '') from log"
            " where doctor_id = %s and date = %s and revision > 0 order by revision", doctor_id, today(),
        )
    ]  # fmt: skip


async def follow(front: Front, doctor_id: str, replay: Replay, last: Callable[[], int]) -> None:
    """Watch until the last revision has arrived."""
    stream = watch(front, watching(doctor_id, replay.token))
    try:
        while not last() or replay.revision < last():
            message = await stream.read()
            assert message is not grpc.aio.EOF
            replay.take(message)
    finally:
        stream.cancel()


async def restless(
    front: Front, doctor_id: str, replay: Replay, last: Callable[[], int], chance: random.Random
) -> None:
    """Like `follow`, but the watcher leaves now and then and resumes with its token."""
    while not last() or replay.revision < last():
        try:
            async with asyncio.timeout(chance.uniform(0.1, 2)):
                await follow(front, doctor_id, replay, last)
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE or manners(error):
                raise


@asynccontextmanager
async def clients(front: Front, count: int) -> AsyncIterator[Sequence[Front]]:
    """Clients, each with its own connection."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(another_client(front)) for _ in range(count)]


async def a_busy_day(front: Front, doctor_id: str, patients: Sequence[Any]) -> int:
    """Make bookings, check-ins and calls; return the revision after the last one."""

    async def visit(patient_id: str, n: int) -> None:
        booked = (await front.book(patient_id, doctor_id)).appointment.id
        if n % 5 == 4:
            await front.appointments.CancelAppointment(cancelling(booked))
            return
        await front.check_in(booked)
        called = (await front.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor_id))).entry.appointment_id
        if n % 2:
            await front.appointments.StartAppointment(appointment_pb2.StartAppointmentRequest(appointment_id=called))
        else:
            await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=called))

    for start in range(0, len(patients), 3):
        part = patients[start : start + 3]
        await asyncio.gather(*(visit(p.id, start + n) for n, p in enumerate(part)))
    return (await front.queue(doctor_id)).revision


def cut_listeners(front: Front) -> None:
    """End the connections over which the servers receive hints."""
    front.sql(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and application_name = 'frontdesk listen'"
    )


async def test_every_replay_equals_the_database(
    conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five hundred watchers of two servers learn of every change, though they come and go and hints are lost."""

    async def silent(hints: Hints) -> None:
        await asyncio.Event().wait()

    chance = random.Random(47)
    async with AsyncExitStack() as stack:
        _, front = await stack.enter_async_context(serving(settings, conninfo))
        monkeypatch.setattr(Hints, "_send", silent)
        _, other = await stack.enter_async_context(serving(settings, conninfo))
        monkeypatch.undo()
        doctor, patients = await front.doctor(max_patients_per_day=100), await front.people(24)
        ends: list[int] = []

        def last() -> int:
            return ends[0] if ends else 0

        desks = [
            *await stack.enter_async_context(clients(front, 3)),
            *await stack.enter_async_context(clients(other, 3)),
        ]
        replays = [Replay() for _ in range(500)]
        async with asyncio.timeout(90), asyncio.TaskGroup() as group:
            for n, replay in enumerate(replays):
                desk = desks[n // 4 % 6]
                if n % 4 < 2:
                    group.create_task(restless(desk, doctor.id, replay, last, chance))
                else:
                    group.create_task(follow(desk, doctor.id, replay, last))
            for n in range(0, 24, 8):
                await a_busy_day(front if n % 16 else other, doctor.id, patients[n : n + 8])
                cut_listeners(front)
            # Announce the last revision first, so that no watcher waits for a message after it.
            ends.append((await front.queue(doctor.id)).revision + 1)
            said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), is_present=True)
            assert (await front.doctors.SetDoctorAvailability(said)).revision == last()
        told, line = history(front, doctor.id), await front.standing(doctor.id)
    assert len(told) == last() - 1
    for replay in replays:
        assert replay.changes == [change for change in told if change[0] > last() - len(replay.changes)]
        assert replay.queue == line


@pytest.mark.parametrize("worker", ["own", "other"])
async def test_two_servers_tell_the_same(conninfo: str, settings: Settings, worker: str) -> None:
    """Watchers of two servers see the same revisions in the same order, within a second of the answer."""
    async with serving(settings, conninfo) as (_, front), serving(settings, conninfo) as (_, other):
        doctor, patients = await front.doctor(max_patients_per_day=100), await front.people(12)
        seen: list[Replay] = [Replay(), Replay()]
        streams = [watch(desk, watching(doctor.id)) for desk in (front, other)]
        for stream, replay in zip(streams, seen, strict=True):
            replay.take(await stream.read())
        last = await a_busy_day(front if worker == "own" else other, doctor.id, patients)
        for stream, replay in zip(streams, seen, strict=True):
            async with asyncio.timeout(1):
                while replay.revision < last:
                    replay.take(await stream.read())
            stream.cancel()
        assert seen[0].changes == seen[1].changes == history(front, doctor.id)
        assert seen[0].queue == seen[1].queue == await front.standing(doctor.id)


async def test_a_reader_that_does_not_read(front: Front) -> None:
    """A watcher that stops reading gets the newest state later, not all states between; others notice nothing."""
    doctor = await front.doctor(max_patients_per_day=200)
    name = "N" * 190
    for start in range(0, 120, 40):
        await asyncio.gather(*(front.arrive(doctor.id, given_name=f"{name} {start + n}") for n in range(40)))
    narrow = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    async with another_client(front, *narrow) as sleeper, another_client(front) as awake:
        slow, fast = Replay(), Replay()
        stream = watch(sleeper, watching(doctor.id))
        slow.take(await stream.read())
        running = asyncio.create_task(follow(awake, doctor.id, fast, lambda: 481))
        for _ in range(120):
            called = (await front.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor.id))).entry.appointment_id
            again = queue_pb2.CallAgainRequest(appointment_id=called)
            assert (await front.queues.CallAgain(again)).revision
        await asyncio.wait_for(running, SOON)
        async with asyncio.timeout(SOON):
            while slow.revision < 481:
                slow.take(await stream.read())
        stream.cancel()
        # 240 changes of about 25 KB each: it got those that gRPC had already taken, and then the newest.
        assert slow.updates < 60
        assert slow.changes == history(front, doctor.id)[-240:]
        assert slow.queue == fast.queue


async def a_long_line(front: Front, patients: int) -> str:
    """A doctor whose queue today takes about 400 bytes per patient."""
    doctor = await front.doctor(max_patients_per_day=200)
    for start in range(0, patients, 20):
        await asyncio.gather(*(front.arrive(doctor.id, given_name=f"{'N' * 190} {start + n}") for n in range(20)))
    return str(doctor.id)


async def test_a_watcher_too_slow(conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watcher who leaves a message unread too long loses its stream, and its place is free before it reads again."""
    monkeypatch.setattr(streams, "WRITE_SECONDS", 0.5)
    async with (
        serving(settings, conninfo, max_watchers=1) as (_, front),
        RawConnection(front.port, reads=False) as wire,
        another_client(front) as other,
    ):
        doctor = await a_long_line(front, 40)
        stream = await wire.open(path_of("WatchQueue"))
        await wire.send(stream, framed(watching(doctor)), end=True)
        said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor, date=day(today()), is_present=True)
        async with asyncio.timeout(SOON):
            while (found := await outcome(first_of(other, watching(doctor)))) != "OK":
                assert found == "TOO_MANY_WATCHERS"
                await front.doctors.SetDoctorAvailability(said)
        assert stream not in wire.ended
        await wire.read()
        assert await wire.status(stream) == "8"
        assert b"WATCHER_TOO_SLOW" in base64.b64decode(wire.ended[stream]["grpc-status-details-bin"] + "==")


async def test_a_stream_that_has_come_of_age(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends at a random age, with its closing message and OK; its token continues where it ended."""
    monkeypatch.setattr(streams, "MAX_AGE_SECONDS", (0.3, 1.5))
    doctor = await front.doctor()
    replays = [Replay() for _ in range(20)]
    loop = asyncio.get_running_loop()
    began, ages = loop.time(), []

    async def to_the_end(replay: Replay) -> None:
        stream = watch(front, watching(doctor.id))
        while (message := await stream.read()) is not grpc.aio.EOF:
            assert replay.closing is None
            replay.take(message)
        assert await stream.code() is grpc.StatusCode.OK
        ages.append(loop.time() - began)

    async with asyncio.timeout(SOON), asyncio.TaskGroup() as group:
        for replay in replays:
            group.create_task(to_the_end(replay))
        arrived = await front.arrive(doctor.id)
    assert {r.closing.reason for r in replays if r.closing} == {queue_pb2.StreamClosing.REASON_MAX_AGE}
    assert all(r.closing for r in replays)
    # Streams that started together end at different times.
    assert len({round(age, 1) for age in ages}) > 3
    monkeypatch.undo()
    for replay in replays:
        if replay.revision < arrived.revision:
            replay.take(await first_of(front, watching(doctor.id, replay.token)))
        assert replay.revision == arrived.revision


@pytest.fixture
def served(conninfo: str, tmp_path: Path) -> Iterator[Served]:
    """`frontdesk serve` with two workers."""
    running = Served(conninfo, tmp_path)
    yield running
    running.end()
    assert running.process.returncode == 0


def memory(served: Served) -> int:
    """The private memory of the workers, in bytes."""
    fields = [
        line.split()
        for pid in served.workers()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        if line.startswith("Private_")
    ]
    return sum(int(field[1]) for field in fields) * 1024


async def test_readers_that_never_read_take_a_bounded_memory(served: Served, conninfo: str) -> None:
    """The server's memory for a stream that is not read does not grow with the changes that the stream misses."""
    streams, changes = 360, 200
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel, AsyncExitStack() as stack:
        front = Front(channel, conninfo, served.port)
        doctor = await a_long_line(front, 40)
        size = len((await front.queue(doctor)).SerializeToString())
        said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor, date=day(today()), is_present=True)
        before = memory(served)
        for _ in range(streams // 90):
            wire = await stack.enter_async_context(RawConnection(served.port, reads=False))
            for _ in range(90):
                await wire.send(await wire.open(path_of("WatchQueue")), framed(watching(doctor)), end=True)
        for _ in range(5):
            await front.doctors.SetDoctorAvailability(said)
        replay = Replay()
        revision = (await front.queue(doctor)).revision
        await follow(front, doctor, replay, lambda: revision)
        blocked = memory(served)
        for _ in range(changes):
            revision = (await front.doctors.SetDoctorAvailability(said)).revision
        await follow(front, doctor, replay, lambda: revision)
        after = memory(served)
    assert (after - blocked) / streams < 2 * size < changes * size / 20
    assert (after - before) / streams < 8 * size


async def test_idle_streams_take_little_memory(served: Served, conninfo: str) -> None:
    """A watcher of a quiet queue takes less than 64 KiB of the server's memory."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        front = Front(channel, conninfo, served.port)
        doctor = await front.doctor()
        await first_of(front, watching(doctor.id))
        before = memory(served)
        async with clients(front, 8) as desks:
            streams = [watch(desks[n % 8], watching(doctor.id)) for n in range(800)]
            for stream in streams:
                await stream.read()
            after = memory(served)
        assert (after - before) / len(streams) < 64 * 1024


async def test_sigterm_tells_everyone(served: Served, conninfo: str) -> None:
    """When `frontdesk serve` is stopped, each of 500 watchers gets its closing message and OK; the exit status is 0."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        front = Front(channel, conninfo, served.port)
        doctor = await front.doctor()
        async with clients(front, 8) as desks:
            streams = [watch(desks[n % 8], watching(doctor.id)) for n in range(500)]
            replays = [Replay() for _ in streams]
            for stream, replay in zip(streams, replays, strict=True):
                replay.take(await stream.read())
            served.process.terminate()
            async with asyncio.timeout(Settings().drain_seconds):
                for stream, replay in zip(streams, replays, strict=True):
                    replay.take(await stream.read())
                    assert await stream.read() is grpc.aio.EOF
                    assert await stream.code() is grpc.StatusCode.OK
            assert {r.closing.reason for r in replays if r.closing} == {queue_pb2.StreamClosing.REASON_DRAINING}
            assert all(r.closing for r in replays)
            assert await asyncio.to_thread(served.process.wait, 30) == 0


async def test_a_stop_tells_everyone(conninfo: str, settings: Settings) -> None:
    """When a server stops, each of 500 watchers gets its closing message and OK in time."""
    async with serving(settings, conninfo) as (worker, front):
        doctor = await front.doctor()
        async with clients(front, 6) as desks:
            streams = [watch(desks[n % 6], watching(doctor.id)) for n in range(500)]
            replays = [Replay() for _ in streams]
            for stream, replay in zip(streams, replays, strict=True):
                replay.take(await stream.read())
            async with asyncio.timeout(settings.drain_seconds):
                await worker.stop()
            for stream, replay in zip(streams, replays, strict=True):
                replay.take(await stream.read())
                assert await stream.read() is grpc.aio.EOF
                assert await stream.code() is grpc.StatusCode.OK
            assert {r.closing.reason for r in replays if r.closing} == {queue_pb2.StreamClosing.REASON_DRAINING}
            delays = [r.closing.reconnect_delay.ToMilliseconds() for r in replays if r.closing]
            assert len(delays) == 500
            assert max(delays) - min(delays) > 1000


async def test_calls_in_flight_end_before_a_stop(conninfo: str, settings: Settings) -> None:
    """Calls that arrive before the server stops are answered; later calls go to another server."""
    nobody = clinic_pb2.GetClinicRequest(clinic_id="0192f5d1-7a5c-7b6e-8f00-0123456789ab")
    async with serving(settings, conninfo) as (worker, front):
        doctor, patient = await front.doctor(), await front.patient()
        async with await psycopg.AsyncConnection.connect(conninfo) as other:
            await other.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, today()))
            booking = asyncio.create_task(outcome(front.book(patient.id, doctor.id)))
            locks = "select from pg_locks where locktype = 'advisory' and not granted"
            with psycopg.connect(conninfo, autocommit=True) as look:
                await until(lambda: look.execute(locks).rowcount == 1)
            stopping = asyncio.create_task(worker.stop())
            codes: set[grpc.StatusCode] = set()
            while grpc.StatusCode.UNAVAILABLE not in codes:
                # A call that is on its way at this moment may be cut off or left unanswered. That is gRPC's doing, not
                # ours.
                error = await refusal(front.clinics.GetClinic(nobody, timeout=1))
                codes.add(error.code())
            await other.rollback()
        assert await booking == "OK"
        await stopping


async def test_everyone_comes_back_at_once(conninfo: str, settings: Settings) -> None:
    """Two thousand watchers who open their streams at the same moment are all served, and see the next change."""
    async with serving(settings, conninfo) as (_, front):
        doctor = await front.doctor()
        arrived = await front.arrive(doctor.id)
        async with clients(front, 21) as desks:
            streams = [watch(desks[n % 21], watching(doctor.id)) for n in range(2000)]
            async with asyncio.timeout(SOON):
                firsts = await asyncio.gather(*(stream.read() for stream in streams))
            assert {first.revision for first in firsts} == {arrived.revision}
            called = await front.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor.id))
            async with asyncio.timeout(SOON):
                seconds = await asyncio.gather(*(stream.read() for stream in streams))
            assert {second.revision for second in seconds} == {called.revision}
            for stream in streams:
                stream.cancel()


async def test_a_watcher_of_nobody_disturbs_nobody(front: Front) -> None:
    """A watcher of an unknown doctor is refused, while a watcher of another doctor is served."""
    doctor = await front.doctor()
    nobody = watching("0192f5d1-7a5c-7b6e-8f00-0123456789ab")

    async def begin(request: queue_pb2.WatchQueueRequest) -> str:
        stream = watch(front, request)
        found = await outcome(stream.read())
        stream.cancel()
        return found

    for _ in range(5):
        outcomes = await asyncio.gather(*(begin(r) for _ in range(10) for r in (watching(doctor.id), nobody)))
        assert outcomes == ["OK", "DOCTOR_NOT_FOUND"] * 10


# Resume tokens


async def first_of(front: Front, request: queue_pb2.WatchQueueRequest) -> Any:
    """The stream's first message."""
    stream = watch(front, request)
    message = await stream.read()
    stream.cancel()
    return message


async def test_resume_where_nothing_has_happened(front: Front) -> None:
    """A token at the present revision is answered with a heartbeat, and the stream continues from there."""
    doctor = await front.doctor()
    for _ in range(2):
        first = await first_of(front, watching(doctor.id))
        stream = watch(front, watching(doctor.id, first.resume_token))
        again = await stream.read()
        assert again.HasField("heartbeat")
        assert (again.revision, again.previous_revision) == (first.revision, first.revision)
        arrived = await front.arrive(doctor.id)
        replay = Replay(revision=first.revision)
        while replay.revision < arrived.revision:
            replay.take(await stream.read())
        stream.cancel()
        assert len(replay.changes) == 2


async def test_resume_after_changes(front: Front) -> None:
    """A token at an earlier revision is answered with one update that lists the changes since."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    first = await first_of(front, watching(doctor.id))
    arrived = await front.arrive(doctor.id)
    again = await first_of(front, watching(doctor.id, first.resume_token))
    assert (again.previous_revision, again.revision) == (first.revision, arrived.revision)
    assert [c.kind for c in again.update.changes] == [queue_pb2.QueueChange.KIND_BOOKED,
                                                      queue_pb2.QueueChange.KIND_CHECKED_IN]  # fmt: skip
    assert again.update.changes[1].entry == again.update.queue.entries[1]
    # The token contains the date too.
    bare = queue_pb2.WatchQueueRequest(doctor_id=doctor.id, resume_token=first.resume_token)
    assert (await first_of(front, bare)).update == again.update


def decoded(token: str) -> list[Any]:
    """The parts of a token."""
    found: list[Any] = json.loads(base64.urlsafe_b64decode(token))
    return found


def encoded(parts: Any) -> str:
    """A token with these parts."""
    return base64.urlsafe_b64encode(json.dumps(parts, separators=(",", ":")).encode()).decode()


@pytest.mark.parametrize("kind", ["future", "restored", "pruned", "long ago", "negative", "huge"])
async def test_resume_from_another_history(front: Front, kind: str) -> None:
    """A token that is too old, from the future, or from before a restore leads to a fresh start, never to an error."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    first = await first_of(front, watching(doctor.id))
    token = first.resume_token
    parts = decoded(token)
    if kind == "future":
        parts[2] += 1000
    elif kind == "restored":
        for table in ("log set time = time", "doctor_day set update_time = update_time"):
            front.sql(f"update {table} - interval '1 second'")
    elif kind == "pruned":
        await front.arrive(doctor.id)
        front.sql("delete from log where revision between 1 and 4")
    elif kind == "long ago":
        parts[3] -= 10**15
    elif kind == "negative":
        parts[2] = -5
    else:
        parts[2], parts[3] = 10**30, -(10**30)
    token = encoded(parts)
    again = await first_of(front, watching(doctor.id, token))
    assert again.previous_revision == 0
    assert not again.update.changes
    assert without_estimates(again.update.queue) == await front.standing(doctor.id)


MALFORMED: dict[str, Callable[[list[Any]], Any]] = {
    "no list": lambda p: {"a": 1},
    "too short": lambda p: p[:3],
    "too long": lambda p: [*p, 1],
    "no id": lambda p: ["x", *p[1:]],
    "an id in braces": lambda p: [f"{{{p[0]}}}", *p[1:]],
    "an upper-case id": lambda p: [p[0].upper(), *p[1:]],
    "no date": lambda p: [p[0], "2026-02-30", *p[2:]],
    "a week": lambda p: [p[0], "2026-W01-1", *p[2:]],
    "text for a number": lambda p: [*p[:2], "x", p[3]],
    "digits as text": lambda p: [*p[:2], str(p[2]), p[3]],
    "a fraction": lambda p: [*p[:2], p[2] + 0.5, p[3]],
    "infinity": lambda p: [*p[:2], float("inf"), p[3]],
    "not a number": lambda p: [*p[:3], float("nan")],
    "null": lambda p: [*p[:2], None, p[3]],
    "a truth": lambda p: [*p[:2], True, p[3]],
    "deep": lambda p: json.loads("[" * 300 + "]" * 300),
}


async def test_malformed_tokens(front: Front) -> None:
    """A token that this server cannot have made is refused."""
    doctor = await front.doctor()
    token = (await first_of(front, watching(doctor.id))).resume_token
    for kind, spoil in MALFORMED.items():
        error = await refusal(first_of(front, watching(doctor.id, encoded(spoil(decoded(token))))))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), kind
        assert not manners(error), kind


async def test_tokens_that_are_no_tokens(front: Front) -> None:
    """Noise, a token that was cut short, and a token with extra text are refused."""
    doctor = await front.doctor()
    token = (await first_of(front, watching(doctor.id))).resume_token
    for bad in (
        "x",
        "=",
        "a" * 1024,
        token[:-1],
        token[:-4],
        token + "AAAA",
        token + "=",
        " " + token,
        "bnVsbA==",
        "W1tb",
    ):
        assert await outcome(watch(front, watching(doctor.id, bad)).read()) == "INVALID_FIELD", bad


async def test_tokens_of_another_doctor_day(front: Front) -> None:
    """A token of another doctor or date is refused."""
    doctor, other = await front.doctor(), await front.doctor()
    token = (await first_of(front, watching(doctor.id))).resume_token
    assert await outcome(watch(front, watching(other.id, token)).read()) == "INVALID_FIELD"
    request = queue_pb2.WatchQueueRequest(doctor_id=doctor.id, date=day(tomorrow()), resume_token=token)
    assert await outcome(watch(front, request).read()) == "INVALID_FIELD"


async def test_odd_heartbeats(front: Front) -> None:
    """A heartbeat interval outside 5 to 60 s counts as the nearest limit, however odd it is."""
    for seconds in (0, -1, 4, 10**9, 315_576_000_000, -(2**63), 2**63 - 1):
        doctor = await front.doctor()
        request = watching(doctor.id)
        request.heartbeat_interval.seconds = seconds
        request.heartbeat_interval.nanos = -(2**31)
        stream = watch(front, request)
        assert (await stream.read()).revision == 1
        arrived = await front.arrive(doctor.id)
        async with asyncio.timeout(4):
            while (message := await stream.read()).revision < arrived.revision:
                pass
        assert message.HasField("update")
        stream.cancel()


async def test_every_answer_names_its_revision(front: Front) -> None:
    """Every change of a doctor-day answers the revision that its watchers see, with its kind and its appointment."""
    doctor = await front.doctor(max_patients_per_day=50)
    streams = {on: watch(front, queue_pb2.WatchQueueRequest(doctor_id=doctor.id, date=day(on)))
               for on in (today(), tomorrow())}  # fmt: skip
    replays = {on: Replay() for on in streams}
    for on, stream in streams.items():
        replays[on].take(await stream.read())
    told: dict[Any, list[Change]] = {on: [] for on in streams}
    kinds = queue_pb2.QueueChange
    used = set()

    async def verb(name: str, kind: int, appointment: str, **fields: Any) -> None:
        used.add(name)
        request = request_class(name)(appointment_id=appointment, **fields)
        told[today()].append(((await call(front, name, request)).revision, kind, appointment))

    async def book() -> str:
        booked = await front.book((await front.patient()).id, doctor.id)
        told[today()].append((booked.revision, kinds.KIND_BOOKED, booked.appointment.id))
        return booked.appointment.id

    async def call_next() -> None:
        answer = await front.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor.id))
        told[today()].append((answer.revision, kinds.KIND_CALLED, answer.entry.appointment_id))

    a, b, c, d, e = [await book() for _ in range(5)]
    await verb("CheckIn", kinds.KIND_CHECKED_IN, a)
    await call_next()
    await verb("CallAgain", kinds.KIND_CALLED_AGAIN, a)
    await verb("SetPriority", kinds.KIND_PRIORITY_SET, a, priority=queue_pb2.PRIORITY_URGENT)
    await verb("MarkMissed", kinds.KIND_MISSED, a)
    await verb("ReturnToLine", kinds.KIND_RETURNED, a)
    await verb("ParkPatient", kinds.KIND_PARKED, a)
    await verb("ReturnToLine", kinds.KIND_RETURNED, a)
    await verb("StartAppointment", kinds.KIND_STARTED, a)
    await verb("CompleteAppointment", kinds.KIND_COMPLETED, a)
    await verb("CheckIn", kinds.KIND_CHECKED_IN, b)
    await verb("LeaveQueue", kinds.KIND_LEFT, b)
    await verb("CancelAppointment", kinds.KIND_CANCELLED, c)
    await verb("UndoTransition", kinds.KIND_UNDONE, c, etag=(await front.appointment(c)).etag)
    came = await front.queues.AddWalkIn(
        queue_pb2.AddWalkInRequest(doctor_id=doctor.id, patient_id=(await front.patient()).id)
    )
    walked = came.appointment.id
    told[today()] += [
        (came.revision - 1, kinds.KIND_BOOKED, walked),
        (came.revision, kinds.KIND_CHECKED_IN, walked),
    ]
    colleague = await front.doctor(clinic_id=doctor.clinic_id)
    handed = await front.queues.TransferPatient(
        queue_pb2.TransferPatientRequest(appointment_id=walked, to_doctor_id=colleague.id)
    )
    told[today()].append((handed.vacated_revision, kinds.KIND_TRANSFERRED_OUT, walked))
    await verb("MarkNoShow", kinds.KIND_NO_SHOW, d)
    changed = appointment_pb2.UpdateAppointmentRequest(appointment=appointment_pb2.Appointment(id=e, reason="cough"))
    told[today()].append(((await front.appointments.UpdateAppointment(changed)).revision, kinds.KIND_UPDATED, e))
    moved = await front.appointments.RescheduleAppointment(to_day(e, doctor.id, tomorrow()))
    told[today()].append((moved.vacated_revision, kinds.KIND_MOVED_OUT, e))
    told[tomorrow()].append((moved.revision, kinds.KIND_MOVED_IN, e))
    said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), is_present=True)
    told[tomorrow()].append((
        (await front.doctors.SetDoctorAvailability(said)).revision, kinds.KIND_AVAILABILITY, ""))  # fmt: skip
    entry = await waiting(front, (await front.patient()).id, doctor.id, tomorrow())
    taken = await front.waitlist.AcceptOffer(waitlist_pb2.AcceptOfferRequest(entry_id=entry))
    told[tomorrow()].append((taken.revision, kinds.KIND_BOOKED, taken.appointment.id))
    used |= {"AddWalkIn", "TransferPatient", "AcceptOffer"}
    used |= {"BookAppointment", "CallNext", "UpdateAppointment", "RescheduleAppointment", "SetDoctorAvailability"}
    assert used == {name for name in MUTATIONS if "revision" in METHODS[name].output_type.fields_by_name}
    for on, stream in streams.items():
        async with asyncio.timeout(SOON):
            while replays[on].revision < told[on][-1][0]:
                replays[on].take(await stream.read())
        stream.cancel()
        assert replays[on].changes == told[on]


async def test_a_burst_longer_than_what_is_kept(front: Front) -> None:
    """A watcher who returns after more changes than the server keeps in memory still gets every one of them."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    first = await first_of(front, watching(doctor.id))
    said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), is_present=True)
    await asyncio.gather(*(front.doctors.SetDoctorAvailability(said) for _ in range(600)))
    replay = Replay(revision=first.revision)
    replay.take(await first_of(front, watching(doctor.id, first.resume_token)))
    assert Counter(kind for _, kind, _ in replay.changes) == {queue_pb2.QueueChange.KIND_AVAILABILITY: 600}


def a_long_history(front: Front, doctor_id: str, changes: int) -> int:
    """Repeat the changes of today in the database until there are so many more; the revision after the last."""
    (old,) = front.sql("select count(*) from log where revision > 0 and doctor_id = %s", doctor_id)[0]
    front.sql(
        "insert into log select (jsonb_populate_record(e, jsonb_build_object('revision', e.revision + n * %s,"
        " 'id', new_id(), 'time', e.time + n * interval '1 minute'))).*"
        " from log e, generate_series(1, %s) n"
        " where e.revision > 0 and e.doctor_id = %s and e.revision + n * %s <= %s",
        old, changes // old + 1, doctor_id, old, old + 1 + changes,
    )  # fmt: skip
    front.sql(
        "update doctor_day d set (revision, update_time) = (e.revision, e.time) from log e"
        " where (e.doctor_id, e.date) = (d.doctor_id, d.date) and d.doctor_id = %s and e.revision = %s",
        doctor_id, old + 1 + changes,
    )  # fmt: skip
    return int(old + 1 + changes)


@pytest.mark.parametrize("patients", [0, 40], ids=["short changes", "long changes"])
@pytest.mark.parametrize("changes", [700, 2_000, 6_000, 30_000, 100_000])
async def test_changes_that_one_message_holds(front: Front, changes: int, patients: int) -> None:
    """However many changes a watcher has missed, no message has more than 1 MiB.

    A resumed stream and one that was open are told all of them if that fits; else they start afresh.
    """
    if patients:
        doctor_id = await a_long_line(front, patients)
    else:
        doctor_id = (await front.doctor()).id
        said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor_id, date=day(today()), is_present=True)
        await front.doctors.SetDoctorAvailability(said)
    before = await first_of(front, watching(doctor_id))
    stream = watch(front, watching(doctor_id))
    assert (await stream.read()).revision == before.revision
    last = a_long_history(front, doctor_id, changes)
    resumed = await asyncio.gather(*(first_of(front, watching(doctor_id, before.resume_token)) for _ in range(5)))
    message = before
    while message.revision < last:
        message = await stream.read()
    stream.cancel()
    # About 420 bytes each, and 25.
    fits = changes < (2_500 if patients else 40_000)
    for told in (message, *resumed):
        assert len(told.SerializeToString()) <= 1 << 20
        assert without_estimates(told.update.queue) == (await front.standing(doctor_id))
        assert told.previous_revision == (before.revision if fits else 0)
        revisions = [change.revision for change in told.update.changes]
        assert revisions == (list(range(before.revision + 1, last + 1)) if fits else [])
