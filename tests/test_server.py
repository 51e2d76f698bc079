"""The server as a server: health, reflection, credentials, drain, several workers, kill -9."""

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import queue_pb2
from frontdesk.client import CHANNEL_OPTIONS
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, outcome, reason_of, refusal, tomorrow
from tests.hostile.wire import RawConnection, framed, serving
from tests.servers import Service
from tests.streams import many_people
from tests.waiting import SOON, until

_Health = health_pb2.HealthCheckResponse
SERVICES = [
    f"clinic.frontdesk.v1.{noun}Service" for noun in ("Appointment", "Clinic", "Doctor", "Patient", "Queue", "Slot")
]


async def test_health_of_every_service(front: Front) -> None:
    """Health answers for the server and for each service."""
    stub = health_pb2_grpc.HealthStub(front.channel)
    for service in ("", *SERVICES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    error = await refusal(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() == grpc.StatusCode.NOT_FOUND


async def test_health_follows_the_database(front: Front) -> None:
    """While the database refuses connections, health is NOT_SERVING; afterwards it is SERVING again."""
    stub = health_pb2_grpc.HealthStub(front.channel)
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    name = psycopg.conninfo.conninfo_to_dict(front.conninfo)["dbname"]
    with psycopg.connect(front.conninfo, dbname="postgres", autocommit=True) as admin:
        admin.execute(f"alter database {name} allow_connections false".encode())
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await refusal(front.queue("0190a0b0-1111-7222-8333-444455556666"))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
        admin.execute(f"alter database {name} allow_connections true".encode())
    async with asyncio.timeout(5):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await outcome(front.clinic()) == "OK"
    watch.cancel()


async def test_streams_without_end_do_not_hold_the_stop(conninfo: str, settings: Settings) -> None:
    """When the drain begins, the streams of health and reflection end with OK, because only their clients would end
    them.

    A health watch gets NOT_SERVING first; a watch of an unknown service gets nothing more.
    """
    async with serving(settings, conninfo, drain_seconds=600) as (worker, front):
        health = health_pb2_grpc.HealthStub(front.channel)
        names = ("", *SERVICES, "nobody")
        watches = {name: health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names}
        for name, watch in watches.items():
            unknown = name == "nobody"
            assert (await watch.read()).status == (_Health.SERVICE_UNKNOWN if unknown else _Health.SERVING)
        asked: list[Any] = [
            front.channel.stream_stream(f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo")()
            for version in ("v1", "v1alpha")
        ]
        for stream in asked:
            await stream.write(b"\x3a\x00")  # list_services
            assert b"QueueService" in await stream.read()
        async with asyncio.timeout(SOON):
            await worker.stop()
            for name, watch in watches.items():
                if name != "nobody":
                    assert (await watch.read()).status == _Health.NOT_SERVING
                assert await watch.read() is grpc.aio.EOF
                assert await watch.code() is grpc.StatusCode.OK
            for stream in asked:
                assert await stream.read() is grpc.aio.EOF
                assert await stream.code() is grpc.StatusCode.OK


async def test_a_watcher_of_health_that_does_not_read(conninfo: str, settings: Settings) -> None:
    """A stream that is not read does not delay the others, and the server stops at the end of its drain time."""
    async with (
        serving(settings, conninfo, drain_seconds=0.5) as (worker, front),
        RawConnection(front.port, reads=False, window=0) as wire,
    ):
        health = health_pb2_grpc.HealthStub(front.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == _Health.SERVING
        await until(lambda: wire.acknowledged > 0)
        stream = await wire.open("/grpc.health.v1.Health/Watch")
        await wire.send(stream, framed(b""), end=True)
        await until(lambda: stream in wire.begun)
        async with asyncio.timeout(SOON):
            await worker.stop()
            assert (await watch.read()).status == _Health.NOT_SERVING
            assert await watch.read() is grpc.aio.EOF


def _nothing() -> Any:
    from clinic.frontdesk.v1 import clinic_pb2

    return clinic_pb2.ListClinicsRequest()


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "192.168.1.1:1", "clinic.example:1"])
def test_beyond_loopback(listen: str) -> None:
    """Beyond loopback calls need credentials, and these need TLS, of the service or of a proxy beside it."""
    with pytest.raises(SettingsError, match="FRONTDESK_TLS_CERT"):
        Settings.load(listen=listen)
    with pytest.raises(SettingsError, match="FRONTDESK_ACCESS=open"):
        Settings.load(listen=listen, access="open", plaintext="on")
    assert Settings.load(listen=listen, plaintext="on").access_mode == "required"
    for local in ("127.0.0.1:1", "[::1]:1", "localhost:1", "127.8.9.10:1"):
        assert Settings.load(listen=local).address.loopback
        assert Settings.load(listen=local).access_mode == "open"
        assert Settings.load(listen=local, access="required").access_mode == "required"


async def test_drain(conninfo: str, settings: Settings) -> None:
    """A stopping server lets running calls end, refuses new ones, and tells its watchers to reconnect elsewhere."""
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        front = Front(channel, conninfo, port)
        doctor = await front.doctor()
        (patient,) = await front.people(1)
        watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
        await watch.read()
        async with await psycopg.AsyncConnection.connect(conninfo) as other:
            # The doctor-day is locked, so the booking waits.
            await other.execute("select lock_all(array[doctor_day_name(%s, clinic_today(%s))])", (doctor.id, doctor.id))
            booking = asyncio.create_task(front.book(patient.id, doctor.id))
            await until(lambda: bool(front.sql("select 1 from pg_locks where locktype = 'advisory' and not granted")))
            stopping = asyncio.create_task(worker.stop())
            closing = await watch.read()
            assert closing.closing.reason == queue_pb2.StreamClosing.REASON_DRAINING
            assert await watch.read() is grpc.aio.EOF
            assert await watch.code() == grpc.StatusCode.OK
        assert (await booking).appointment.number == 1
        await stopping
        error = await refusal(front.book(patient.id, doctor.id))
        assert error.code() == grpc.StatusCode.UNAVAILABLE


@pytest.fixture
def service(conninfo: str, tmp_path: Path) -> Iterator[Service]:
    with Service(tmp_path / "log", conninfo, workers=2) as running:
        yield running
        running.stop()


async def two_fronts(service: Service, conninfo: str) -> list[Front]:
    """Clients of both workers. The kernel spreads connections, so clients are opened until both workers have one."""
    fronts: dict[int, Front] = {}
    for _ in range(64):
        channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{service.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        )
        await channel.channel_ready()
        inodes = _connections_of(service)
        for pid, count in inodes.items():
            if count and pid not in fronts:
                fronts[pid] = Front(channel, conninfo, service.port)
                break
        else:
            await channel.close()
        if len(fronts) == 2:
            return list(fronts.values())
    raise AssertionError("one worker got every connection")


def _connections_of(service: Service) -> Counter[int]:
    """The number of clients per worker."""
    clients = {
        line.split()[9]
        for table in ("tcp", "tcp6")
        for line in Path("/proc/net", table).read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{service.port:04X}") and line.split()[3] == "01"
    }
    found: Counter[int] = Counter()
    for pid in service.workers():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = os.readlink(descriptor)
                found[pid] += target.startswith("socket:[") and target[8:-1] in clients
    return found


async def test_two_workers_one_history(service: Service, conninfo: str) -> None:
    """Watchers of two workers see the same revisions in the same order, whichever worker made the change."""
    fronts = await two_fronts(service, conninfo)
    doctor = await fronts[0].doctor(max_patients_per_day=100)
    request = queue_pb2.WatchQueueRequest(doctor_id=doctor.id)
    watches: list[Any] = [front.queues.WatchQueue(request) for front in fronts]
    for watch in watches:
        assert (await watch.read()).revision == 1
    people = await fronts[0].people(20)
    answers = await asyncio.gather(
        *(fronts[index % 2].book(person.id, doctor.id) for index, person in enumerate(people))
    )
    last = max(answer.revision for answer in answers)
    assert last == 21

    async def seen(watch: Any) -> list[tuple[int, str]]:
        changes: list[tuple[int, str]] = []
        known = 1
        while known < last:
            message = await watch.read()
            assert message.previous_revision == known
            known = message.revision
            changes += [(change.revision, change.appointment_id) for change in message.update.changes]
        return changes

    async with asyncio.timeout(10):
        first, second = await asyncio.gather(*map(seen, watches))
    assert first == second == sorted((answer.revision, answer.appointment.id) for answer in answers)
    for front in fronts:
        await front.channel.close()


async def test_stopped_workers_fail_no_call(service: Service, conninfo: str) -> None:
    """While workers stop under load, as in an upgrade, callers that retry by the service config see no error."""
    target = f"127.0.0.1:{service.port}"
    booked: list[int] = []
    async with grpc.aio.insecure_channel(target) as channel:
        front = Front(channel, conninfo, service.port)
        doctor = await front.doctor(max_patients_per_day=1000)
        people = await many_people(front, 600)
    waiting = iter(people)

    async def some(channel: grpc.aio.Channel) -> None:
        front = Front(channel, conninfo, service.port)
        for patient_id in waiting:
            answer = await front.book(patient_id, doctor.id, tomorrow(), idempotency_key=patient_id)
            booked.append(answer.appointment.number)

    async def stop() -> None:
        for threshold in (100, 300):
            await until(lambda threshold=threshold: len(booked) >= threshold)  # type: ignore[misc]
            stopped = service.workers()[0]
            os.kill(stopped, signal.SIGTERM)
            # Its successor serves before it ends.
            await until(lambda stopped=stopped: stopped not in service.workers())  # type: ignore[misc]
            await until(lambda: len(service.workers()) == 2)

    async with asyncio.timeout(60), contextlib.AsyncExitStack() as stack:
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target, options=options)) for _ in range(4)
        ]
        await asyncio.gather(stop(), *(some(channel) for channel in channels for _ in range(8)))
    assert sorted(booked) == list(range(1, 601))


async def test_killed_workers_lose_nothing(service: Service, conninfo: str) -> None:
    """While workers are killed under load, no acknowledged booking is lost, and no key acts twice."""
    target = f"127.0.0.1:{service.port}"
    acknowledged: dict[str, str] = {}
    async with grpc.aio.insecure_channel(target) as channel:
        front = Front(channel, conninfo, service.port)
        doctors = [await front.doctor(max_patients_per_day=1000) for _ in range(3)]
        people = await front.people(240)

    async def book(index: int, channel: grpc.aio.Channel) -> None:
        front = Front(channel, conninfo, service.port)
        key = f"key-{index}"
        while True:
            try:
                answer = await front.book(people[index].id, doctors[index % 3].id, idempotency_key=key)
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                    raise
                await asyncio.sleep(0.05)
                continue
            acknowledged[key] = answer.appointment.id
            return

    async def some(start: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]
        async with grpc.aio.insecure_channel(target, options=options) as channel:
            for index in range(start, len(people), 12):
                await book(index, channel)

    async def kill() -> None:
        for threshold in (60, 140):
            await until(lambda threshold=threshold: len(acknowledged) >= threshold)  # type: ignore[misc]
            os.kill(service.workers()[0], signal.SIGKILL)

    async with asyncio.timeout(60):
        await asyncio.gather(kill(), *(some(start) for start in range(12)))
    stored = dict(front.sql("select key, result_id::text from idempotency where method = 'BookAppointment'"))
    assert stored == acknowledged
    assert front.sql("select count(*), count(distinct patient_id) from appointment") == [(240, 240)]
    numbers = front.sql("select doctor_id::text, array_agg(number order by number) from appointment group by 1")
    assert all(taken == list(range(1, 81)) for _, taken in numbers)
    revisions = front.sql(
        "select doctor_id::text, array_agg(revision order by revision) from log where revision > 0 group by 1"
    )
    assert all(made == list(range(2, 82)) for _, made in revisions)
