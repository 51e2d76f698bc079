"""Cases 41 to 46: the service while its database is unavailable; and no internal text in any answer."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import psycopg
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, queue_pb2
from frontdesk.db.migrate import migrate
from frontdesk.settings import Settings
from tests.clinic import Front, day, details, outcome, reason_of, refusal, today, tomorrow
from tests.hostile.methods import METHODS, VALID, call, manners, noon, world
from tests.hostile.test_domain import sound
from tests.hostile.test_wire import waiting
from tests.hostile.wire import database_of, serving
from tests.servers import Cluster, directories
from tests.waiting import SOON, until, until_true

BACK_WITHIN = 5.0


@pytest.fixture
def admin(postgres: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """An administrator's connection, opened in advance, on another database."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        yield connection


def cut(admin: psycopg.Connection[tuple[object, ...]], front: Front, but: int = 0) -> None:
    """End every connection to the test's database, except that of process `but`."""
    admin.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s and pid <> %s",
        (database_of(front), but),
    )


async def back(front: Front) -> float:
    """Measure the seconds until bookings succeed again."""
    began = time.monotonic()

    async def works() -> bool:
        return await outcome(front.clinic()) == "OK"

    await until_true(works)
    return time.monotonic() - began


async def unavailable(front: Front) -> grpc.aio.AioRpcError:
    """The refusal of a mutation that the database cannot make."""
    error = await refusal(front.clinic())
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert "RetryInfo" in details(error)
    assert not manners(error)
    return error


async def test_cut_connections(front: Front, admin: psycopg.Connection[tuple[object, ...]]) -> None:
    """While connections are cut repeatedly, calls are at worst UNAVAILABLE; acknowledged changes are there, once."""
    doctor = await front.doctor(max_patients_per_day=1000)
    patients = await front.people(100)
    outcomes: Counter[str] = Counter()

    async def book(patient_id: str) -> None:
        async with asyncio.timeout(SOON):
            while (answer := await outcome(front.book(patient_id, doctor.id, idempotency_key=patient_id))) != "OK":
                outcomes[answer] += 1
                await asyncio.sleep(0.01)

    bookings = [asyncio.create_task(book(p.id)) for p in patients]
    with psycopg.connect(admin.info.dsn, dbname=database_of(front), autocommit=True) as look:
        mine = look.info.backend_pid
        for count in range(0, 100, 20):
            await until(lambda n=count: look.execute("select from appointment").rowcount >= n)  # type: ignore[misc]
            cut(admin, front, but=mine)
    await asyncio.gather(*bookings)
    assert outcomes.keys() <= {"DATABASE_UNAVAILABLE"}
    assert front.sql("select count(*), count(distinct number) from appointment") == [(100, 100)]
    sound(front)
    cut(admin, front)
    assert await back(front) < BACK_WITHIN


async def test_a_database_that_is_away(front: Front, admin: psycopg.Connection[tuple[object, ...]]) -> None:
    """Without the database, every method is UNAVAILABLE and health is NOT_SERVING. Service returns within 5 s of it."""
    here = await world(front)
    health = health_pb2_grpc.HealthStub(front.channel)

    async def serves() -> bool:
        answer = await health.Check(health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    assert await serves()
    admin.execute(f"alter database {database_of(front)} allow_connections false")
    cut(admin, front)
    # Without a channel there is nothing to ask the database about what is sent.
    methods = METHODS.keys() - {"SendConfirmation", "RequestPasswordReset"}
    outcomes = await asyncio.gather(*(outcome(call(front, name, VALID[name](here))) for name in methods))
    assert Counter(outcomes) == {"DATABASE_UNAVAILABLE": len(methods)}

    async def does_not_serve() -> bool:
        return not await serves()

    await until_true(does_not_serve)
    admin.execute(f"alter database {database_of(front)} allow_connections true")
    assert await back(front) < BACK_WITHIN
    await until_true(serves, BACK_WITHIN)


async def test_a_real_restart(settings: Settings) -> None:
    """While PostgreSQL restarts under bookings, no acknowledged booking is lost, and none is made twice."""
    with directories() as make, Cluster(make("own")) as postgres:
        await asyncio.to_thread(postgres.start)
        await asyncio.to_thread(migrate, postgres.conninfo)
        async with serving(settings, postgres.conninfo) as (_, front):
            doctor = await front.doctor(max_patients_per_day=1000)
            patients = await front.people(120)
            acknowledged: dict[str, str] = {}
            refused: Counter[str] = Counter()

            async def book(n: int) -> None:
                key = f"key-{n}"
                while True:
                    try:
                        answer = await front.book(patients[n].id, doctor.id, idempotency_key=key)
                    except grpc.aio.AioRpcError as error:
                        refused[reason_of(error)] += 1
                        await asyncio.sleep(0.01)
                        continue
                    acknowledged[key] = answer.appointment.id
                    return

            async def some(start: int) -> None:
                for n in range(start, len(patients), 8):
                    await book(n)

            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for n in range(8):
                    group.create_task(some(n))
                await until(lambda: len(acknowledged) >= 40, 30)
                await asyncio.to_thread(postgres.stop)
                await until(lambda: bool(refused))
                await asyncio.to_thread(postgres.start)
                assert await back(front) < BACK_WITHIN
            assert refused.keys() <= {"DATABASE_UNAVAILABLE"}
            assert len(acknowledged) == len(patients)
            assert dict(front.sql("select key, result_id::text from idempotency")) == acknowledged
            assert front.sql("select count(*), count(distinct patient_id) from appointment") == [(120, 120)]
            sound(front)


async def test_a_read_only_primary(front: Front, admin: psycopg.Connection[tuple[object, ...]]) -> None:
    """If the primary is read-only, changes are UNAVAILABLE and reads work. Once writable, it is used again."""
    here = await world(front)
    admin.execute(f"alter database {database_of(front)} set default_transaction_read_only = on")
    cut(admin, front)
    with suppress(grpc.aio.AioRpcError):
        await front.clinic()
    await until_reads(front)
    await unavailable(front)
    for name in ("BookAppointment", "CancelAppointment", "CallNext", "BlockSlots", "UpdateClinic"):
        assert await outcome(call(front, name, VALID[name](here))) in ("DATABASE_UNAVAILABLE", "QUEUE_EMPTY",
                                                                       "DUPLICATE_BOOKING"), name  # fmt: skip
    assert await outcome(call(front, "CancelAppointment", VALID["CancelAppointment"](here))) == "DATABASE_UNAVAILABLE"
    assert await outcome(call(front, "GetQueue", VALID["GetQueue"](here))) == "OK"
    admin.execute(f"alter database {database_of(front)} reset default_transaction_read_only")
    assert await back(front) < BACK_WITHIN


async def until_reads(front: Front) -> None:
    """Wait until the pool has connections again."""

    async def reads() -> bool:
        return await outcome(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest())) == "OK"

    await until_true(reads)


async def test_too_many_connections(front: Front, postgres: str, admin: psycopg.Connection[tuple[object, ...]]) -> None:
    """If others hold all connections of the server, the service is UNAVAILABLE, and recovers when they close."""
    admin.execute(f"alter database {database_of(front)} allow_connections false")
    cut(admin, front)
    others: list[psycopg.Connection[tuple[object, ...]]] = []
    try:
        with suppress(psycopg.OperationalError):
            while len(others) < 1000:
                others.append(psycopg.connect(postgres))
        assert len(others) < 1000
        admin.execute(f"alter database {database_of(front)} allow_connections true")
        await unavailable(front)
    finally:
        for other in others:
            other.close()
    assert await back(front) < BACK_WITHIN


async def test_an_empty_pool(conninfo: str, settings: Settings) -> None:
    """A call that gets no connection is refused before its deadline; one is free when the first call has ended."""
    async with serving(settings, conninfo, pool_size=1) as (_, front):
        doctor, patient = await front.doctor(), await front.patient()
        async with await psycopg.AsyncConnection.connect(conninfo) as other:
            await other.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, tomorrow()))
            stuck = asyncio.create_task(outcome(front.book(patient.id, doctor.id, tomorrow())))
            await until(lambda: waiting(front) == 1)
            errors = await asyncio.gather(*(unavailable(front) for _ in range(20)))
            assert len(errors) == 20
            await other.rollback()
        assert await stuck == "OK"
        assert await outcome(front.clinic()) == "OK"


def failing(front: Front, times: int, code: str, message: str = "as a test wants it") -> None:
    """Make the next `times` bookings fail in the database with this error."""
    front.sql("create sequence failures")
    front.sql(
        "create function fail() returns trigger language plpgsql as $$ begin"
        f" if nextval('failures') <= {times} then raise exception '{message}' using errcode = '{code}'; end if;"
        " return new; end $$"
    )
    front.sql("create trigger fail before insert on appointment for each row execute function fail()")


@pytest.mark.parametrize("code", ["40001", "40P01"])
@pytest.mark.parametrize("times", [1, 3])
async def test_conflicts_are_retried(front: Front, code: str, times: int) -> None:
    """If the database aborts a booking because of a conflict, it is retried, and made once."""
    doctor, patient = await front.doctor(), await front.patient()
    failing(front, times, code)
    answer = await front.book(patient.id, doctor.id)
    assert (answer.revision, answer.appointment.number) == (2, 1)
    sound(front)


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_conflicts_without_end(front: Front, code: str) -> None:
    """A conflict that persists is ABORTED, with advice to retry, and nothing has changed."""
    doctor, patient = await front.doctor(), await front.patient()
    failing(front, 1000, code)
    error = await refusal(front.book(patient.id, doctor.id))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ABORTED, "CONFLICT")
    assert "RetryInfo" in details(error)
    assert not manners(error)
    assert (await front.queue(doctor.id)).revision == 1


async def test_a_real_deadlock(front: Front) -> None:
    """A booking in a deadlock with an administrator's statement gives way, and is made after that statement."""
    doctor, patients = await front.doctor(), await front.people(2)
    await front.book(patients[0].id, doctor.id)
    async with await psycopg.AsyncConnection.connect(front.conninfo) as other:
        # The booking is the one that detects the deadlock and gives way.
        await other.execute("set deadlock_timeout = '30s'")
        await other.execute("select from doctor_day where doctor_id = %s for update", (doctor.id,))
        booking = asyncio.create_task(front.book(patients[1].id, doctor.id))
        await until(lambda: waiting(front) == 1)
        await other.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, today()))
        await other.commit()
    assert (await booking).revision == 3
    sound(front)


def without_a_check(front: Front, number: int) -> None:
    """A bug: the function that looks for a place always finds this one."""
    ((source,),) = front.sql("select pg_get_functiondef('find_place'::regproc)")
    body = (
        f"begin outcome := 'OK'; number := {number}; select d.clinic_id into clinic_id from doctor d"
        " where d.id = p_doctor; select s.start_time, s.end_time into start_time, end_time from slot s"
        " where s.id = p_slot; end"
    )
    front.sql(source[: source.index("$function$")] + f"$function$ {body} $function$")


async def test_backstops(front: Front) -> None:
    """If the check of places were wrong, the database would refuse to sell a place twice, and the log would say so."""
    doctor, patients = await front.doctor(), await front.people(3)
    slots = [await front.slot((await front.doctor()).id, noon(2)) for _ in range(2)]
    without_a_check(front, 1)
    await front.book(patients[0].id, doctor.id)

    def in_slot(n: int) -> appointment_pb2.BookAppointmentRequest:
        return appointment_pb2.BookAppointmentRequest(patient_id=patients[2].id, slot_id=slots[n].id)

    await front.appointments.BookAppointment(in_slot(0))
    with structlog.testing.capture_logs() as log:
        errors = [
            await refusal(front.book(patients[1].id, doctor.id)),  # the number is taken
            await refusal(front.book(patients[0].id, doctor.id)),  # and so is the patient's day
            await refusal(front.appointments.BookAppointment(in_slot(1))),  # the patient is elsewhere then
        ]
    without_a_check(front, 0)
    errors.append(await refusal(front.book(patients[1].id, doctor.id)))
    for error in errors:
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert not manners(error)
    ids = [details(error)["ErrorInfo"].metadata["error_id"] for error in errors]
    assert all(ids)
    assert len(set(ids)) == len(ids)
    logged = {entry["error_id"] for entry in log if entry["log_level"] == "error"}
    assert set(ids[:3]) == logged
    assert front.sql("select count(*) from appointment") == [(2,)]
    sound(front)


async def test_a_restart_loses_nothing(front: Front, admin: psycopg.Connection[tuple[object, ...]]) -> None:
    """If a watcher's server loses the database and finds it, the watcher sees every change, or is told to reconnect."""
    doctor = await front.doctor()
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id, date=day(today())))
    first = await watch.read()
    cut(admin, front)
    assert await back(front) < BACK_WITHIN
    arrived = await front.arrive(doctor.id)
    token, seen = first.resume_token, first.revision
    async with asyncio.timeout(SOON):
        while seen < arrived.revision:
            try:
                message = await watch.read()
                assert message is not grpc.aio.EOF
                assert message.previous_revision == seen
                token, seen = message.resume_token, message.revision
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                again = queue_pb2.WatchQueueRequest(doctor_id=doctor.id, resume_token=token)
                watch = front.queues.WatchQueue(again)
    assert seen == arrived.revision
