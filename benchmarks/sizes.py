"""Measure how a call's cost grows with the data: the same calls in databases with few and with many appointments."""

import random
import secrets
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from typing import Any

import psycopg
from google.protobuf.message import Message
from google.type.date_pb2 import Date

from benchmarks import bulk, people
from benchmarks.bulk import SLOT_DOCTORS, Past
from benchmarks.calls import Kind, Spent, percentiles, spend
from benchmarks.load import unary_client
from benchmarks.people import CLINIC, DOCTOR, PAST, PATIENT, make_id
from benchmarks.stage import Child, ServerProcess, Stage
from clinic.frontdesk.v1 import appointment_pb2, patient_pb2, queue_pb2, schedule_pb2
from frontdesk.db.paging import KEY, MAKE_KEY, NO_INSTANT, PageTokens
from frontdesk.rpc.convert import page_owners

IN_FLIGHT = 16
PAGE = 20
WAITING = 10
"""Waiting patients in every queue that is read."""
KEPT_FROM = 1_000_000
"""A smaller database is loaded anew for every run, because bookings of earlier runs would soon be most of it."""
_DESKS = 50
"""Doctors whose patients check in: the same number in every database, so that their queues grow alike."""

_APPOINTMENTS = "/clinic.frontdesk.v1.AppointmentService/"


@dataclass
class Cost:
    """The cost of one kind of call in one database."""

    name: str
    is_list: bool
    rows: int
    """Appointments in the database."""
    calls: int
    server_us: float
    """CPU of the server process per call, in the middle half of the rounds."""
    postgres_us: float
    """CPU of PostgreSQL's processes that serve connections per call, in the same rounds."""
    background_us: float
    """CPU of PostgreSQL's other processes per call, in all rounds: much of the work of a change comes later."""
    ratio: float
    """The first two together, as a multiple of those in the smallest database."""
    pages_read: float
    """Pages of 8 KiB per call that were not in PostgreSQL's own buffers."""
    written_kib: float
    """KiB per call: the write-ahead log, and evicted pages."""
    p50_ms: float
    p99_ms: float
    refused: dict[str, int]


def measure(
    stage: Stage, *, sizes: Sequence[int], calls: int, rounds: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Make every kind of call in a database of each size. They take turns, so a noisy moment affects all of them."""
    warmup = max(100, calls // 2)
    found: dict[str, dict[int, list[Spent]]] = {}
    with ExitStack() as stack:
        client = stack.enter_context(Child(unary_client))
        kinds: dict[int, list[Kind]] = {}
        for rows in sizes:
            conninfo, day = opened(stage, rows, progress)
            server = stack.enter_context(stage.serve(conninfo))
            progress(f"choose calls for {rows:,} appointments")
            with psycopg.connect(conninfo, autocommit=True) as connection:
                kinds[rows] = _kinds(Past(rows), server, connection, day, warmup + rounds * calls)
            progress(f"settle {rows:,} appointments")
            people.settle(conninfo)
        for rows in sizes:
            stage.read_files(_name(rows))
            for kind in kinds[rows]:
                progress(f"warm up: {kind.name}, {rows:,} appointments")
                spend(stage, [client], kind, warmup, IN_FLIGHT)
        for turn in range(rounds):
            # In random order: a call pays for evicting the pages that the call before it changed.
            for n in random.sample(range(len(kinds[sizes[0]])), len(kinds[sizes[0]])):
                for rows in random.sample(list(sizes), len(sizes)):
                    kind = kinds[rows][n]
                    progress(f"{kind.name}, {rows:,} appointments, {turn + 1} of {rounds}")
                    of = found.setdefault(kind.name, {}).setdefault(rows, [])
                    of.append(spend(stage, [client], kind, calls, IN_FLIGHT))
    return {
        "sizes": list(sizes),
        "settings": stage.settings("shared_buffers", "max_wal_size", "checkpoint_timeout", "wal_compression"),
        "bytes": {rows: stage.size(_name(rows)) for rows in sizes},
        "costs": [
            asdict(_cost(kind.name, rows, found[kind.name][rows], found[kind.name][sizes[0]]))
            for kind in kinds[sizes[0]]
            for rows in sizes
        ],
    }


def opened(stage: Stage, rows: int, progress: Callable[[str], None]) -> tuple[str, date]:
    """The conninfo of a database with `rows` appointments, and its clinics' today.

    It is loaded now, or by an earlier run, whose bookings are deleted.
    """
    zone = people.noon_zone()
    day = people.today(zone)

    def fill(conninfo: str) -> None:
        progress(f"load {rows:,} appointments")
        bulk.load(conninfo, rows, zone, day)

    conninfo = stage.kept(_name(rows), fill, again=rows < KEPT_FROM)
    progress(f"tidy {rows:,} appointments")
    with psycopg.connect(conninfo, autocommit=True) as connection:
        bulk.forget(connection)
        connection.execute("update clinic set time_zone = %s where time_zone <> %s", (zone, zone))
    return conninfo, day


def bookings(connection: psycopg.Connection, past: Past, day: date, count: int) -> Sequence[Message]:
    """Requests for `count` places on partly booked, coming doctor-days, in random order."""
    days = _coming(connection, day)
    chosen = [(doctor, on) for doctor in range(past.doctors) if doctor % SLOT_DOCTORS for on in days]
    random.shuffle(chosen)
    patients = free_patients(connection, count)
    return [
        appointment_pb2.BookAppointmentRequest(
            patient_id=patient, idempotency_key=str(uuid.uuid4()),
            doctor_day=appointment_pb2.DoctorDay(doctor_id=make_id(DOCTOR, doctor), date=wire(on)),
        )
        for patient, (doctor, on) in zip(patients, _over_and_over(chosen, count), strict=True)
    ]  # fmt: skip


def free_patients(connection: psycopg.Connection, count: int) -> list[str]:
    """Ids of `count` patients without a live appointment."""
    rows = connection.execute(
        "select id::text from patient p where not exists (select from appointment a where a.patient_id = p.id"
        " and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION')) order by random() limit %s",
        (count,),
    ).fetchall()
    return _enough([patient for (patient,) in rows], count)


def wire(day: date) -> Date:
    """The date as a message."""
    return Date(year=day.year, month=day.month, day=day.day)


def _name(rows: int) -> str:
    return f"scale_{rows}"


def _enough(found: list[str], count: int) -> list[str]:
    if len(found) < count:
        raise SystemExit("the kept data is used up or too old: give another --data directory")
    return found


def _over_and_over(items: Sequence[Any], count: int) -> list[Any]:
    return [items[n % len(items)] for n in range(count)]


def _coming(connection: psycopg.Connection, day: date) -> list[date]:
    # From the day after tomorrow, because the data may have been loaded for another zone.
    rows = connection.execute("select distinct date from slot where date > %s order by date", (day + timedelta(1),))
    days = [on for (on,) in rows]
    _enough([str(on) for on in days], 3)
    return days


def _kinds(past: Past, server: ServerProcess, connection: psycopg.Connection, day: date, count: int) -> list[Kind]:
    _lines(connection, past, day)
    slots = connection.execute(
        "select id::text from slot s where date > %s and not exists (select from appointment a where a.slot_id = s.id"
        " and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')) order by random() limit %s",
        (day + timedelta(1), count),
    ).fetchall()
    by_slot: list[Message] = [
        appointment_pb2.BookAppointmentRequest(patient_id=patient, slot_id=slot, idempotency_key=str(uuid.uuid4()))
        for patient, slot in zip(
            free_patients(connection, count), _enough([slot for (slot,) in slots], count), strict=True
        )
    ]
    by_day = bookings(connection, past, day, count)
    check_ins: list[Message] = [
        queue_pb2.CheckInRequest(appointment_id=appointment, idempotency_key=str(uuid.uuid4()))
        for appointment in _to_check_in(connection, past, day, count)
    ]
    connection.execute(MAKE_KEY, (secrets.token_bytes(32),))
    seal = PageTokens(*(connection.execute(KEY).fetchone() or (b"",)))
    desks = set(_desks(past))
    others = [doctor for doctor in range(past.doctors) if doctor not in desks]
    pick = random.Random(past.rows).randrange

    def of_past() -> tuple[int, date, str]:
        """A random past appointment: its doctor, its date and its id."""
        n = pick(past.past)
        a_day = past.past // past.days
        return n % past.doctors, first + timedelta(n // a_day), make_id(PAST, n)

    oldest = connection.execute("select date from appointment where id = %s", (make_id(PAST, 0),)).fetchone()
    first: date = (oldest or [day])[0]

    def queue(n: int) -> Message:
        return queue_pb2.GetQueueRequest(doctor_id=make_id(DOCTOR, others[pick(len(others))]), date=wire(day))

    def appointment(n: int) -> Message:
        return appointment_pb2.GetAppointmentRequest(appointment_id=of_past()[2])

    def phone(n: int) -> Message:
        return patient_pb2.ListPatientsRequest(phone=people.phone(pick(past.patients)))

    def doctor_day(n: int) -> Message:
        doctor, on, _ = of_past()
        return appointment_pb2.ListAppointmentsRequest(
            doctor_id=make_id(DOCTOR, doctor), from_date=wire(on), to_date=wire(on), page_size=PAGE
        )

    def waiting_room(n: int) -> Message:
        return appointment_pb2.ListAppointmentsRequest(
            doctor_id=make_id(DOCTOR, others[pick(len(others))]), from_date=wire(day), to_date=wire(day),
            states=[appointment_pb2.Appointment.STATE_CHECKED_IN], page_size=PAGE,
        )  # fmt: skip

    def patient(n: int) -> Message:
        return appointment_pb2.ListAppointmentsRequest(patient_id=make_id(PATIENT, pick(past.known)), page_size=PAGE)

    def clinic(n: int) -> appointment_pb2.ListAppointmentsRequest:
        return appointment_pb2.ListAppointmentsRequest(clinic_id=make_id(CLINIC, pick(past.clinics)), page_size=PAGE)

    def clinic_middle(n: int) -> Message:
        request = clinic(n)
        _, on, after = of_past()
        request.page_token = seal.token((on.isoformat(), NO_INSTANT, after), *page_owners(request, "anonymous"))
        return request

    with_slots = [doctor for (doctor,) in connection.execute("select distinct doctor_id::text from slot").fetchall()]

    def schedule(n: int) -> Message:
        return schedule_pb2.GetDoctorScheduleRequest(
            doctor_id=with_slots[pick(len(with_slots))], from_date=wire(day), to_date=wire(day + timedelta(6))
        )

    def kind(name: str, method: str, request: Callable[[int], Message]) -> Kind:
        return Kind(name, server, server.port, method, request)

    queues, listing = "/clinic.frontdesk.v1.QueueService/", _APPOINTMENTS + "ListAppointments"
    return [
        kind("BookAppointment by doctor-day", _APPOINTMENTS + "BookAppointment", by_day.__getitem__),
        kind("BookAppointment by slot", _APPOINTMENTS + "BookAppointment", by_slot.__getitem__),
        kind("CheckIn", queues + "CheckIn", check_ins.__getitem__),
        kind(f"GetQueue, {WAITING} waiting", queues + "GetQueue", queue),
        kind("GetAppointment", _APPOINTMENTS + "GetAppointment", appointment),
        kind("ListPatients by phone", "/clinic.frontdesk.v1.PatientService/ListPatients", phone),
        kind("ListAppointments of a doctor-day", listing, doctor_day),
        kind("ListAppointments of a doctor-day, checked in", listing, waiting_room),
        kind("ListAppointments of a patient", listing, patient),
        kind("ListAppointments of a clinic", listing, clinic),
        kind("ListAppointments of a clinic, from the middle", listing, clinic_middle),
        kind("GetDoctorSchedule of a week", "/clinic.frontdesk.v1.ScheduleService/GetDoctorSchedule", schedule),
    ]


def _desks(past: Past) -> list[int]:
    return [n * past.doctors // _DESKS for n in range(_DESKS)]


def _lines(connection: psycopg.Connection, past: Past, day: date) -> None:
    """Let patients wait today in the queue of every doctor who is not at one of the desks."""
    values = {
        "doctor": DOCTOR, "patient": PATIENT, "known": past.known, "day": day, "waiting": WAITING,
        "doctors": [doctor for doctor in range(past.doctors) if doctor not in set(_desks(past))],
    }  # fmt: skip
    connection.execute(
        "insert into doctor_day as d (doctor_id, date, revision, last_ticket, update_time)"
        " select bench_id(%(doctor)s, n), %(day)s, 1 + 2 * %(waiting)s, %(waiting)s, now()"
        " from unnest(%(doctors)s::integer[]) n"
        " on conflict (doctor_id, date) do update set revision = d.revision + 1, last_ticket = %(waiting)s",
        values,
    )
    connection.execute(
        "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state, ticket, queue_state,"
        " check_in_time, version)"
        " select bench_id(%(patient)s, (n::bigint * %(waiting)s + place) * 7919 %% %(known)s), d.id, d.clinic_id,"
        " %(day)s, 100 + place, 'CHECKED_IN', place, 'WAITING', now(), 2"
        " from generate_series(1, %(waiting)s::integer) place, unnest(%(doctors)s::integer[]) n"
        " join doctor d on d.id = bench_id(%(doctor)s, n) order by place, n",
        values,
    )


def _to_check_in(connection: psycopg.Connection, past: Past, day: date, count: int) -> list[str]:
    """Insert `count` booked appointments today at the desks; their ids in random order."""
    rows = connection.execute(
        "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state)"
        " select patient, d.id, d.clinic_id, %(day)s, n / cardinality(%(desks)s) + 1 + coalesce("
        "  (select max(number) from appointment b where b.doctor_id = d.id and b.date = %(day)s), 0), 'BOOKED'"
        " from unnest(%(patients)s::uuid[]) with ordinality as a (patient, n)"
        " join doctor d on d.id = (%(desks)s::uuid[])[n %% cardinality(%(desks)s) + 1]"
        " returning id::text",
        {"day": day, "desks": [make_id(DOCTOR, n) for n in _desks(past)], "patients": free_patients(connection, count)},
    ).fetchall()
    found = [appointment for (appointment,) in rows]
    random.shuffle(found)
    return found


def _cost(name: str, rows: int, of: Sequence[Spent], smallest: Sequence[Spent]) -> Cost:
    middle, few = _middle(of), _middle(smallest)
    total = Spent()
    for spent in of:
        total.add(spent)
    p50, p99 = percentiles(total.latencies, 50, 99)
    return Cost(
        name, name.startswith("ListAppointments"), rows, total.calls, middle.server / middle.calls * 1e6,
        (middle.postgres - middle.background) / middle.calls * 1e6, total.background / total.calls * 1e6,
        _a_call(middle) / _a_call(few), total.read / 8192 / total.calls, total.written / 1024 / total.calls, p50 * 1e3,
        p99 * 1e3, dict(total.refused),
    )  # fmt: skip


def _middle(rounds: Sequence[Spent]) -> Spent:
    """The middle half of the rounds together, without those that other load disturbed."""
    ordered = sorted(rounds, key=_a_call)
    away = len(ordered) // 4
    total = Spent()
    for spent in ordered[away : len(ordered) - away]:
        total.add(spent)
    return total


def _a_call(spent: Spent) -> float:
    return (spent.server + spent.postgres - spent.background) / spent.calls
