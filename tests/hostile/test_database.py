"""Cases 41 to 46: the service while its database is unavailable; and no internal text in any answer."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, patient_pb2, queue_pb2
from frontdesk.db.migrate import migrate
from frontdesk.settings import Settings
from tests.clinic import Front, day, details, outcome, reason_of, refusal, today, tomorrow
from tests.hostile.methods import METHODS, VALID, call, manners, noon, world
from tests.hostile.test_domain import sound
from tests.hostile.test_wire import waiting
from tests.hostile.wire import database_of, serving
from tests.servers import Cluster, Service, directories
from tests.test_metrics import text
from tests.waiting import SOON, until, until_true

BACK_WITHIN = 5.0
CANARY = "Zzyzx-canary"


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
    outcomes = await asyncio.gather(*(outcome(call(front, name, VALID[name](here))) for name in METHODS))
    assert Counter(outcomes) == {"DATABASE_UNAVAILABLE": len(METHODS)}

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
    without_a_check(front, 1001)
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


async def test_no_canary_gets_out(
    front: Front, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A patient's name in the data, or in the text of an exception, is in no status and no log."""
    caplog.set_level(logging.DEBUG)
    doctor = await front.doctor()
    person = patient_pb2.Patient(given_name=CANARY, phone="+5511987654329", email=f"{CANARY}@example.org",
                                 allergies=[CANARY])  # fmt: skip
    patient = await front.patient(given_name=CANARY, phone="+5511987654329")
    booked = await front.book(patient.id, doctor.id, reason=CANARY, notes=CANARY)
    failing(front, 1000, "P0001", CANARY)
    errors = [await refusal(front.book((await front.patient()).id, doctor.id))]
    front.sql(
        "create function spill() returns trigger language plpgsql as $$ begin"
        f" raise exception 'row % {CANARY}', new using detail = '{CANARY}', hint = '{CANARY}'; end $$"
    )
    for table in ("patient", "clinic", "doctor", "slot", "log"):
        front.sql(f"create trigger spill before insert or update on {table} for each row execute function spill()")
    # PostgreSQL's own text, from a check constraint that quotes the row.
    front.sql("alter table appointment add constraint no_notes check (notes = '') not valid")
    here = appointment_pb2.Appointment(id=booked.appointment.id, notes=CANARY)
    errors += [
        await refusal(front.clinic()),
        await refusal(front.patient(given_name=f"{CANARY} 2")),
        await refusal(
            front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=patient_with(patient, person)))
        ),
        await refusal(front.check_in(booked.appointment.id)),
        await refusal(front.appointments.UpdateAppointment(appointment_pb2.UpdateAppointmentRequest(appointment=here))),
        await refusal(
            front.appointments.CancelAppointment(
                appointment_pb2.CancelAppointmentRequest(appointment_id=booked.appointment.id, cancel_reason=CANARY)
            )
        ),
    ]
    for error in errors:
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert not manners(error, CANARY, "987654329")
    # A change that was refused or cut off writes nothing more.
    assert await outcome(front.book(patient.id, doctor.id, reason=CANARY)) == "DUPLICATE_BOOKING"
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    await watch.read()
    watch.cancel()
    call_ = front.patients.GetPatient(patient_pb2.GetPatientRequest(patient_id=patient.id))
    call_.cancel()
    with suppress(asyncio.CancelledError):
        await call_
    await front.patients.ListPatients(patient_pb2.ListPatientsRequest(name_prefix=CANARY))
    out, err = capfd.readouterr()
    logged = out + err + caplog.text
    assert logged.count("internal_error") >= len(errors)
    for error in errors:
        assert details(error)["ErrorInfo"].metadata["error_id"] in logged
    for secret in (CANARY, CANARY.lower(), "987654329"):
        assert secret not in logged


async def test_no_canary_is_measured(conninfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patient's name is in no metric and no log line of a real service; a caller's own name is in no metric."""
    monkeypatch.setenv("FRONTDESK_METRICS_LISTEN", "127.0.0.1:0")
    service = Service(tmp_path / "log", conninfo, workers=2)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            front = Front(channel, conninfo, service.port)
            doctor = await front.doctor()
            patient = await front.patient(given_name=CANARY, email=f"{CANARY}@example.org", allergies=[CANARY])
            assert await outcome(front.book(patient.id, doctor.id, reason=CANARY)) == "OK"
            assert await outcome(front.book(patient.id, doctor.id, reason=CANARY)) == "DUPLICATE_BOOKING"
            assert await outcome(front.queue(CANARY)) == "INVALID_FIELD"
            failing(front, 1000, "P0001", CANARY)
            other = await front.patient()
            assert await outcome(front.book(other.id, doctor.id, reason=CANARY)) == "INTERNAL"
            unknown: Any = channel.unary_unary(f"/{CANARY}/{CANARY}")
            await refusal(unknown(b"", timeout=SOON))
            await front.clinics.ListClinics(
                clinic_pb2.ListClinicsRequest(), metadata=[("frontdesk-caller", "kiosk-of-nobody")]
            )
            page = await asyncio.to_thread(text, service)
            assert "frontdesk_" in page
            assert "kiosk-of-nobody" not in page
            for said in (page, service.log.read_text()):
                assert CANARY not in said
    finally:
        await asyncio.to_thread(service.stop)


def patient_with(old: patient_pb2.Patient, new: patient_pb2.Patient) -> patient_pb2.Patient:
    """The changes to make to this patient."""
    changed = patient_pb2.Patient()
    changed.CopyFrom(new)
    changed.id = old.id
    return changed


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
