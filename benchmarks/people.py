"""Clinics, doctors, patients and appointments in bulk, with ids that a load client can compute."""

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import psycopg

CLINIC, DOCTOR, PATIENT, SLOT, TO_MOVE, TO_CHECK_IN, PAST, HOLD = range(1, 9)

CLINICS = 78

MAKE_ID = """
create function bench_id(p_kind integer, p_n bigint) returns uuid language sql immutable as $$
    select (lpad(to_hex(p_kind), 8, '0') || '-0000-7000-8000-' || lpad(to_hex(p_n), 12, '0'))::uuid
$$
"""


def make_id(kind: int, n: int) -> str:
    """The id of the n-th row (from 0) of a kind; `bench_id` in SQL."""
    return f"{kind:08x}-0000-7000-8000-{n:012x}"


def phone(n: int) -> str:
    """The phone of the n-th patient."""
    return f"+55279{n:08d}"


def noon_zone() -> str:
    """A zone in which it is about noon now, so that no run crosses the clinics' midnight."""
    ahead = 12 - datetime.now(UTC).hour
    return f"Etc/GMT{-ahead:+d}" if ahead else "Etc/GMT"


def today(zone: str) -> date:
    """The civil date in this zone."""
    return datetime.now(ZoneInfo(zone)).date()


def found(connection: psycopg.Connection, zone: str, doctors: int, patients: int, *, clinics: int = CLINICS) -> None:
    """Create the clinics in `zone`, `doctors` doctors with a daily maximum of 1,000, and `patients` patients."""
    connection.execute(MAKE_ID)
    connection.execute(
        "insert into clinic (id, name, time_zone)"
        " select bench_id(%s, i), 'Clinic ' || i, %s from generate_series(0, %s) i",
        (CLINIC, zone, clinics - 1),
    )
    connection.execute(
        "insert into doctor (id, code, display_name, specialty, specialty_key, clinic_id, max_patients_per_day)"
        " select bench_id(%s, i), 'B-' || i, 'Doctor ' || i, 'specialty ' || i %% 20, 'specialty ' || i %% 20,"
        " bench_id(%s, i %% %s), 1000"
        " from generate_series(0, %s) i",
        (DOCTOR, CLINIC, clinics, doctors - 1),
    )
    connection.execute(
        "insert into patient (id, given_name, name_key, phone)"
        " select bench_id(%s, i), 'Patient ' || i, 'patient ' || i, '+55279' || lpad(i::text, 8, '0')"
        " from generate_series(0, %s) i",
        (PATIENT, patients - 1),
    )


def history(connection: psycopg.Connection, rows: int, doctors: int, patients: int, before: date) -> None:
    """Insert `rows` completed visits, ten per doctor-day, on the days before `before`, so that indexes have a usual
    depth.
    """
    connection.execute(
        "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state, ticket, queue_state,"
        " check_in_time)"
        " select bench_id(%(patient)s, i %% %(patients)s), bench_id(%(doctor)s, i / 10 %% %(doctors)s),"
        " bench_id(%(clinic)s, (i / 10 %% %(doctors)s) %% %(clinics)s),"
        " %(before)s::date - 1 - (i / 10 / %(doctors)s)::integer, i %% 10 + 1, 'COMPLETED', i %% 10 + 1, 'DONE',"
        " now()"
        " from generate_series(0, %(last)s::bigint) i",
        {
            "patient": PATIENT, "patients": patients, "doctor": DOCTOR, "doctors": doctors, "clinic": CLINIC,
            "clinics": CLINICS, "before": before, "last": rows - 1,
        },
    )  # fmt: skip


def booked(
    connection: psycopg.Connection, kind: int, rows: int, doctors: int, on: date, *, checked_in: bool = False
) -> None:
    """Insert `rows` appointments of a kind on one day, shared out among the doctors, and the counters of the
    doctor-days.

    The n-th appointment is the n-th patient's.
    """
    line = "'CHECKED_IN', i / %(doctors)s + 1, 'WAITING', now()"
    connection.execute(
        (
            "insert into appointment (id, patient_id, doctor_id, clinic_id, date, number, state, ticket, queue_state,"
            " check_in_time)"
            " select bench_id(%(kind)s, i), bench_id(%(patient)s, i), bench_id(%(doctor)s, i %% %(doctors)s),"
            " bench_id(%(clinic)s, i %% %(doctors)s %% %(clinics)s), %(on)s, i / %(doctors)s + 1, "
            + (line if checked_in else "'BOOKED', null, null, null")
            + " from generate_series(0, %(last)s::bigint) i"
        ).encode(),
        {
            "kind": kind, "patient": PATIENT, "doctor": DOCTOR, "doctors": doctors, "clinic": CLINIC,
            "clinics": CLINICS, "on": on, "last": rows - 1,
        },
    )  # fmt: skip
    connection.execute(
        "insert into doctor_day (doctor_id, date, revision, last_ticket, update_time)"
        " select doctor_id, date, 1 + count(*) * %s, count(ticket), now() from appointment where date = %s"
        " group by doctor_id, date",
        (2 if checked_in else 1, on),
    )
    # The latest event of each doctor-day; it proves that a watcher's next change follows.
    connection.execute(
        "insert into log (id, time, actor, method, type, doctor_id, date, revision)"
        " select log_id(update_time), update_time, 'anonymous', 'UpdateAppointment', 'appointment.updated', doctor_id,"
        " date, revision from doctor_day where date = %s",
        (on,),
    )


def slots(connection: psycopg.Connection, rows: int, doctors: int, on: date, zone: str) -> None:
    """Insert `rows` slots of twenty minutes with one place each, from 08:00 of one day, shared out among the doctors.

    A doctor has at most 48 of them.
    """
    connection.execute(
        "insert into slot (id, doctor_id, clinic_id, date, start_time, end_time)"
        " select bench_id(%(slot)s, i), bench_id(%(doctor)s, i %% %(doctors)s),"
        " bench_id(%(clinic)s, i %% %(doctors)s %% %(clinics)s), %(on)s,"
        " (%(on)s + time '08:00') at time zone %(zone)s + i / %(doctors)s * interval '20 minutes',"
        " (%(on)s + time '08:20') at time zone %(zone)s + i / %(doctors)s * interval '20 minutes'"
        " from generate_series(0, %(last)s::bigint) i",
        {
            "slot": SLOT, "doctor": DOCTOR, "doctors": doctors, "clinic": CLINIC, "clinics": CLINICS, "on": on,
            "zone": zone, "last": rows - 1,
        },
    )  # fmt: skip


def holds(connection: psycopg.Connection, rows: int, doctors: int, on: date) -> None:
    """Insert `rows` holds of places on one day, shared out among the doctors, that outlast a run."""
    connection.execute(
        "insert into hold (id, doctor_id, clinic_id, date, patient_id, expire_time, create_time)"
        " select bench_id(%(hold)s, i), bench_id(%(doctor)s, i %% %(doctors)s),"
        " bench_id(%(clinic)s, i %% %(doctors)s %% %(clinics)s), %(on)s, bench_id(%(patient)s, i),"
        " now() + interval '1 day', now() from generate_series(0, %(last)s::bigint) i",
        {
            "hold": HOLD, "doctor": DOCTOR, "doctors": doctors, "clinic": CLINIC, "clinics": CLINICS, "on": on,
            "patient": PATIENT, "last": rows - 1,
        },
    )  # fmt: skip


def settle(conninfo: str) -> None:
    """Vacuum, analyze and write dirty pages now, so that this does not happen during a measurement."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("vacuum analyze")
        connection.execute("checkpoint")
