"""Bulk loading of a service that has long been in use: many appointments, with the rows that come with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date

import psycopg

from benchmarks import people
from benchmarks.people import CLINIC, DOCTOR, PAST, PATIENT, SLOT, TO_MOVE, make_id

FUTURE_DAYS = 20
"""The number of coming days that are partly booked."""
SLOTS_A_DAY = 24
"""Slots per coming day of a doctor who works with slots. A past day keeps only the ten that were booked."""
SLOT_DOCTORS = 4
"""One doctor in this many works with slots."""
_A_DAY = 10
"""Appointments per past day of a doctor."""
_EVENT_DAYS, _KEY_DAYS = 90, 7
"""Days for which the service keeps events and keys by default."""


@dataclass(frozen=True)
class Past:
    """The proportions of a database with `rows` appointments."""

    rows: int

    @property
    def doctors(self) -> int:
        """One doctor per 5,000 appointments, at least 100."""
        return max(100, self.rows // 5_000)

    @property
    def clinics(self) -> int:
        """Ten doctors per clinic."""
        return self.doctors // 10

    @property
    def known(self) -> int:
        """The number of patients that have appointments, five each."""
        return self.rows // 5

    @property
    def patients(self) -> int:
        """The number of all patients: at least a few thousand, so that enough of them are free for a booking."""
        return max(self.known, 20_000)

    @property
    def booked_a_day(self) -> int:
        """Appointments per doctor on each of the coming days."""
        return min(5, self.rows // self.doctors * 2 // 5 // FUTURE_DAYS)

    @property
    def days(self) -> int:
        """The number of past days, with ten appointments per doctor."""
        return (self.rows // self.doctors - self.booked_a_day * FUTURE_DAYS) // _A_DAY

    @property
    def past(self) -> int:
        """The number of past appointments."""
        return self.doctors * self.days * _A_DAY


def load(conninfo: str, rows: int, zone: str, day: date) -> None:
    """Fill a new database with `rows` appointments before and after `day`, but none on `day` itself.

    Of the past visits, seven in ten were completed and two were no-shows; the others were cancelled or left. Ids ascend
    with time.
    """
    past = Past(rows)
    values = {
        "clinic": CLINIC, "doctor": DOCTOR, "patient": PATIENT, "slot": SLOT, "past": PAST, "booked": TO_MOVE,
        "clinics": past.clinics, "doctors": past.doctors, "known": past.known, "days": past.days, "day": day,
        "zone": zone, "a_day": _A_DAY, "last": past.past - 1, "future": FUTURE_DAYS, "ahead": past.booked_a_day,
        "first_slot": past.past, "slots": SLOTS_A_DAY, "every": SLOT_DOCTORS, "event_days": _EVENT_DAYS,
        "key_days": _KEY_DAYS,
    }  # fmt: skip
    # Pass values as literals: as parameters, their types would depend on their size.
    with psycopg.connect(conninfo, autocommit=True, cursor_factory=psycopg.ClientCursor) as connection:
        for setting in ("synchronous_commit = off", "maintenance_work_mem = '1GB'", "work_mem = '256MB'", "jit = off"):
            connection.execute(f"set {setting}".encode())
        with without_indexes(connection, "patient"):
            people.found(connection, zone, past.doctors, past.patients, clinics=past.clinics)
        with without_indexes(connection, "appointment"):
            connection.execute(_PAST.encode(), values)
            if past.booked_a_day:
                connection.execute(_BOOKED.encode(), values)
        with without_indexes(connection, "slot"):
            connection.execute(_PAST_SLOTS.encode(), values)
            connection.execute(_SLOTS.encode(), values)
        with without_indexes(connection, "doctor_day"):
            connection.execute(_DOCTOR_DAYS.encode(), values)
        with without_indexes(connection, "log"):
            connection.execute(_EVENTS.encode(), values)
        with without_indexes(connection, "idempotency"):
            connection.execute(_KEYS.encode(), values)
    people.settle(conninfo)


def forget(connection: psycopg.Connection) -> None:
    """Delete the appointments that were made after loading, and the rows that came with them."""
    # Ids of loaded rows begin with their kind, all other ids with a time.
    for table, column in (("log", "appointment_id"), ("idempotency", "result_id"), ("appointment", "id")):
        connection.execute(f"delete from {table} where {column} > %s".encode(), (make_id(PAST + 1, 0),))


@contextmanager
def without_indexes(connection: psycopg.Connection, table: str) -> Iterator[None]:
    """Create a table's indexes and constraints after its rows, which is faster. A primary key on `id` stays.

    Ids come in order, so keeping that index up to date costs little.
    """
    constraints = connection.execute(
        "select conname, pg_get_constraintdef(oid) from pg_constraint"
        " where conrelid = %(table)s::regclass and contype in ('p', 'u', 'x')"
        " and pg_get_constraintdef(oid) <> 'PRIMARY KEY (id)'",
        {"table": table},
    ).fetchall()
    indexes = connection.execute(
        "select i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) from pg_index i"
        " where i.indrelid = %(table)s::regclass"
        " and not exists (select from pg_constraint c where c.conindid = i.indexrelid)",
        {"table": table},
    ).fetchall()
    for name, _ in constraints:
        connection.execute(f"alter table {table} drop constraint {name}".encode())
    for name, _ in indexes:
        connection.execute(f"drop index {name}".encode())
    yield
    for name, definition in constraints:
        connection.execute(f"alter table {table} add constraint {name} {definition}".encode())
    for _, definition in indexes:
        connection.execute(definition.encode())


# The i-th appointment, day by day: within a day first the first one of every doctor, then the second one of every
# doctor.
_PAST = """
insert into appointment (id, patient_id, doctor_id, clinic_id, date, number, slot_id, start_time, end_time, state,
                         reason, check_in_time, call_time, start_visit_time, complete_time, cancel_time, no_show_time,
                         leave_time, ticket, queue_state, room, call_count, version, create_time,
                         update_time)
select bench_id(%(past)s, i), bench_id(%(patient)s, i * 7919 %% %(known)s), bench_id(%(doctor)s, d),
       bench_id(%(clinic)s, d %% %(clinics)s), date, place, case when slots then bench_id(%(slot)s, i) end,
       case when slots then at end, case when slots then at + interval '20 minutes' end, state,
       case when dice %% 3 = 0 then 'follow-up visit' else '' end,
       case when line is not null then at - interval '10 minutes' end,
       case when line is not null then at end,
       case when state = 'COMPLETED' then at + interval '2 minutes' end,
       case when state = 'COMPLETED' then at + interval '15 minutes' end,
       case when state = 'CANCELLED' then at - interval '2 days' end,
       case when state = 'NO_SHOW' then at + interval '1 hour' end,
       case when state = 'LEFT' then at + interval '1 hour' end,
       case when line is not null then place end, line,
       case when line is not null then (d %% 9 + 1)::text else '' end, (line is not null)::integer,
       case when line is not null then 5 else 2 end, at - interval '9 days', at + interval '15 minutes'
from generate_series(0, %(last)s::bigint) i,
     lateral (select i %% %(doctors)s as d, (i / %(doctors)s %% %(a_day)s + 1)::integer as place,
                     i * 2654435761 %% 1000 as dice,
                     %(day)s::date - %(days)s + (i / (%(doctors)s * %(a_day)s))::integer as date) a,
     lateral (select d %% %(every)s = 0 as slots,
                     (date + time '08:00') at time zone %(zone)s + (place - 1) * interval '20 minutes' as at,
                     case when dice < 200 then 'NO_SHOW' when dice < 270 then 'CANCELLED' when dice < 280 then 'LEFT'
                          else 'COMPLETED' end as state) b,
     lateral (select case state when 'LEFT' then 'LEFT' when 'COMPLETED' then 'DONE' end as line) c
"""

# The patients take turns, so that none has two appointments at the same time.
_BOOKED = """
insert into appointment (id, patient_id, doctor_id, clinic_id, date, number, slot_id, start_time, end_time, state,
                         cancel_time, create_time, update_time)
select bench_id(%(booked)s, i), bench_id(%(patient)s, i * 7919 %% %(known)s), bench_id(%(doctor)s, d),
       bench_id(%(clinic)s, d %% %(clinics)s), date, place, case when slots then slot end,
       case when slots then at end, case when slots then at + interval '20 minutes' end,
       case when dice < 70 then 'CANCELLED' else 'BOOKED' end, case when dice < 70 then now() end,
       now() - interval '3 days', now() - interval '3 days'
from generate_series(0, %(doctors)s::bigint * %(future)s * %(ahead)s - 1) i,
     lateral (select i %% %(doctors)s as d, (i / %(doctors)s %% %(ahead)s + 1)::integer as place,
                     i * 2654435761 %% 1000 as dice, (i / (%(doctors)s * %(ahead)s))::integer as later) a,
     lateral (select d %% %(every)s = 0 as slots, %(day)s::date + 1 + later as date,
                     bench_id(%(slot)s, %(first_slot)s::bigint
                              + (later::bigint * %(doctors)s + d) * %(slots)s + place - 1) as slot) b,
     lateral (select (date + time '08:00') at time zone %(zone)s + (place - 1) * interval '20 minutes' as at) c
"""

_PAST_SLOTS = """
insert into slot (id, doctor_id, clinic_id, date, start_time, end_time)
select slot_id, doctor_id, clinic_id, date, start_time, end_time from appointment
where slot_id is not null and date <= %(day)s
"""

_SLOTS = """
insert into slot (id, doctor_id, clinic_id, date, start_time, end_time)
select bench_id(%(slot)s, %(first_slot)s::bigint + (later::bigint * %(doctors)s + d) * %(slots)s + place),
       bench_id(%(doctor)s, d), bench_id(%(clinic)s, d %% %(clinics)s), %(day)s::date + 1 + later, at,
       at + interval '20 minutes'
from generate_series(0, %(future)s - 1) later, generate_series(0, %(doctors)s - 1, %(every)s) d,
     generate_series(0, %(slots)s - 1) place,
     lateral (select (%(day)s::date + 1 + later + time '08:00') at time zone %(zone)s
                     + place * interval '20 minutes' as at) a
"""

_DOCTOR_DAYS = """
insert into doctor_day (doctor_id, date, revision, last_ticket, update_time)
select bench_id(%(doctor)s, d), %(day)s::date + later,
       5 * case when later < 0 then %(a_day)s else %(ahead)s end + 1, case when later < 0 then %(a_day)s else 0 end,
       now()
from generate_series(-%(days)s, %(future)s) later, generate_series(0, %(doctors)s - 1) d
where later <> 0 and (later < 0 or %(ahead)s > 0)
"""

# Five changes of a completed visit, two of another past one, one of a booked one. So the revisions have gaps.
_EVENTS = """
insert into log (id, time, actor, method, type, resource, clinic_id, doctor_id, patient_id, appointment_id, date,
                 revision, data, queue_state, ticket, room, call_count, check_in_time, call_time, start_visit_time)
select log_id(case when kind = 'BOOKED' then create_time else update_time end),
       case when kind = 'BOOKED' then create_time else update_time end, 'anonymous', 'BookAppointment',
       case when kind in ('BOOKED', 'CANCELLED', 'NO_SHOW') then 'appointment.' else 'queue.' end || lower(kind),
       'appointments/' || id, clinic_id, doctor_id, patient_id, id, date, (number - 1) * 5 + k + 1,
       jsonb_build_object('state', state, 'number', number),
       case when kind = 'BOOKED' then null when kind = 'CHECKED_IN' then 'WAITING' when kind = 'CALLED' then 'CALLED'
            when kind = 'STARTED' then 'IN_CONSULTATION' else queue_state end,
       case when kind <> 'BOOKED' then ticket end, case when kind <> 'BOOKED' then room end,
       case when kind <> 'BOOKED' then call_count end, case when kind <> 'BOOKED' then check_in_time end,
       case when kind <> 'BOOKED' then call_time end, case when kind <> 'BOOKED' then start_visit_time end
from appointment,
     unnest(case when state = 'COMPLETED' then array['BOOKED', 'CHECKED_IN', 'CALLED', 'STARTED', 'COMPLETED']
                 when state = 'BOOKED' then array['BOOKED']
                 else array['BOOKED', state] end) with ordinality as e (kind, k)
where date >= %(day)s::date - %(event_days)s
order by date, number
"""

# The keys of the last days' calls, in the form in which the client makes them.
_KEYS = """
insert into idempotency (caller, method, key, fingerprint, result_id, snapshot, revision, create_time)
select 'desk', method, gen_random_uuid(), sha256(a.id::text::bytea), a.id,
       to_jsonb(a) - '{id,patient_id,reason,notes,cancel_reason,create_time}'::text[], k, a.update_time
from appointment a,
     unnest(case when state = 'COMPLETED'
                 then array['BookAppointment', 'CheckIn', 'CallNext', 'StartAppointment', 'CompleteAppointment']
                 else array['BookAppointment'] end) with ordinality as m (method, k)
where date >= %(day)s::date - %(key_days)s
"""
