"""Measure how the time of a list grows with the data: the same pages from few and from many rows."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import sqlalchemy as sa
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.type.date_pb2 import Date

from benchmarks import people
from benchmarks.bulk import without_indexes
from benchmarks.load import Loaded, unary_client
from benchmarks.people import CLINIC, CLINICS, DOCTOR, PATIENT, SLOT, make_id
from benchmarks.stage import Child, Stage
from clinic.frontdesk.v1 import appointment_pb2, patient_pb2, schedule_pb2, slot_pb2
from frontdesk.core import appointment as appointments
from frontdesk.core import patient as patients
from frontdesk.core import schedule as schedules
from frontdesk.core import slot as slots
from frontdesk.db.database import compiled
from frontdesk.db.schema import VISIT_STATES, appointment, patient

DOCTORS = 300
DAYS = 1_000
"""The appointments lie on this many calendar days, back from today."""
PAGE = 20
CALLS = 40
_RARE = 15
"""Patients in consultation now, for any number of appointments."""
_GIVEN_NAMES, _FAMILY_NAMES = 2_000, 20_000
"""Different names. The n-th is about n times as rare as the first."""
_SLOT_DAYS = 10
_SLOTS_A_DAY = 8


_ANSWERS: dict[str, Any] = {
    "ListAppointments": appointment_pb2.ListAppointmentsResponse,
    "ListPatients": patient_pb2.ListPatientsResponse,
    "GetDoctorSchedule": schedule_pb2.GetDoctorScheduleResponse,
    "ListSlots": slot_pb2.ListSlotsResponse,
}


@dataclass
class Shape:
    """A list: its request, and the statement that it runs with its parameters."""

    name: str
    method: str
    request: Message
    statement: Callable[[], str]
    params: dict[str, Any]
    deep: bool = False
    """Measure a page from the middle of the list, not the first one."""


def measure(stage: Stage, *, few: int, many: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure every list in a database of each size."""
    zone = people.noon_zone()
    day = people.today(zone)
    found: dict[int, dict[str, Any]] = {}
    loading: dict[int, float] = {}
    for rows in (few, many):
        progress(f"load {rows:,} appointments")
        started = time.perf_counter()
        name = f"lists_{rows}"
        conninfo = stage.database(name)
        with psycopg.connect(conninfo) as connection:
            _load(connection, rows, day, zone)
        people.settle(conninfo)
        loading[rows] = time.perf_counter() - started
        found[rows] = {}
        with (
            stage.serve(conninfo) as server,
            Child(unary_client) as client,
            psycopg.connect(conninfo, autocommit=True) as connection,
        ):
            for shape in (*_shapes(day), *_searches(connection)):
                progress(f"{shape.name}, {rows:,} appointments")
                found[rows][shape.name] = _time(client, server.port, connection, shape)
        stage.drop(name)
    return {
        "few": few,
        "many": many,
        "page": PAGE,
        "load_seconds": loading,
        "shapes": [
            {
                "name": name,
                "few": found[few][name],
                "many": found[many][name],
                "ratio": _ratio(found[many][name]["ms"], found[few][name]["ms"]),
            }
            for name in found[few]
        ],
    }


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _load(connection: psycopg.Connection, rows: int, day: date, zone: str) -> None:
    connection.execute("set synchronous_commit = off")
    connection.execute("set maintenance_work_mem = '256MB'")
    patients = max(1_000, rows // 5)
    people.found(connection, zone, DOCTORS, patients)
    connection.execute("update doctor set max_patients_per_day = 10")
    connection.execute(_MAKE_NAME)
    _load_named(connection, rows)
    with without_indexes(connection, "appointment"):
        # A doctor's n-th appointment is on the (n mod DAYS)-th day back; 20 % no-shows, 7 % cancelled, 0.1 % left.
        connection.execute(
            """
            insert into appointment (patient_id, doctor_id, clinic_id, date, number, state, ticket, queue_state,
                                     check_in_time)
            select bench_id(%(patient)s, i * 7919 %% %(patients)s), bench_id(%(doctor)s, d),
                   bench_id(%(clinic)s, d %% %(clinics)s), %(day)s::date - 1 - spread, n / %(days)s + 1, state,
                   case when line is not null then n / %(days)s + 1 end, line,
                   case when line is not null then now() end
            from generate_series(0, %(last)s::bigint) i,
                 lateral (select i %% %(doctors)s as d, i / %(doctors)s as n, i * 2654435761 %% 1000 as dice) a,
                 lateral (select (n * 617 %% %(days)s)::integer as spread,
                                 case when dice < 200 then 'NO_SHOW' when dice < 270 then 'CANCELLED'
                                      when dice < 271 then 'LEFT' else 'COMPLETED' end as state) b,
                 lateral (select case state when 'LEFT' then 'LEFT' when 'COMPLETED' then 'DONE' end as line) c
            """,
            {
                "patient": PATIENT, "patients": patients, "doctor": DOCTOR, "doctors": DOCTORS, "clinic": CLINIC,
                "clinics": CLINICS, "day": day, "days": DAYS, "last": rows - 1,
            },
        )  # fmt: skip
        connection.execute(
            "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state, ticket, queue_state,"
            " check_in_time)"
            " select bench_id(%s, i), bench_id(%s, i), bench_id(%s, i %% %s), %s, 1, 'IN_CONSULTATION', 1,"
            " 'IN_CONSULTATION', now() from generate_series(0, %s) i",
            (PATIENT, DOCTOR, CLINIC, CLINICS, day, _RARE - 1),
        )
    # Slots on the coming days, of which the first half of each day is booked; and past slots, a tenth as many as
    # appointments.
    connection.execute(
        """
        insert into slot (id, doctor_id, clinic_id, date, start_time, end_time)
        select bench_id(%(slot)s, i), bench_id(%(doctor)s, d), bench_id(%(clinic)s, d %% %(clinics)s), day,
               (day + time '08:00') at time zone %(zone)s + place * interval '20 minutes',
               (day + time '08:20') at time zone %(zone)s + place * interval '20 minutes'
        from generate_series(0, %(last)s::bigint) i,
             lateral (select i %% %(doctors)s as d, i / %(doctors)s %% %(a_day)s as place,
                             %(day)s::date + %(ahead)s - (i / %(doctors)s / %(a_day)s)::integer as day) a
        """,
        {
            "slot": SLOT, "doctor": DOCTOR, "doctors": DOCTORS, "clinic": CLINIC, "clinics": CLINICS, "zone": zone,
            "a_day": _SLOTS_A_DAY, "day": day, "ahead": _SLOT_DAYS,
            "last": DOCTORS * _SLOTS_A_DAY * _SLOT_DAYS + rows // 10 - 1,
        },
    )  # fmt: skip
    connection.execute(
        """
        insert into appointment (patient_id, doctor_id, clinic_id, date, number, state, slot_id, start_time, end_time)
        select bench_id(%s, row_number() over (order by start_time, doctor_id) %% %s), doctor_id, clinic_id, date,
               place, 'BOOKED', id, start_time, end_time
        from (select s.*, row_number() over (partition by doctor_id, date order by start_time) as place
              from slot s where date > %s) later
        where place <= %s
        """,
        (PATIENT, patients, day, _SLOTS_A_DAY // 2),
    )


def _load_named(connection: psycopg.Connection, rows: int) -> None:
    """As many patients as appointments, with names of which some are frequent and most are rare."""
    with without_indexes(connection, "patient"), without_indexes(connection, "patient_word"):
        connection.execute(
            """
            insert into patient (given_name, family_name, given_key, family_key, name_key, phone, insurance_keys)
            select given, family, given, family, given || ' ' || family, '+55119' || lpad(i::text, 8, '0'),
                   array['LK' || lpad(i::text, 9, '0') || 'V']
            from generate_series(1, %(rows)s::bigint) i,
                 lateral (select bench_name('g', power(%(given)s::integer, random() + i * 0)) as given,
                                 bench_name('f', power(%(family)s::integer, random() + i * 0)) as family) a
            """,
            {"rows": rows, "given": _GIVEN_NAMES, "family": _FAMILY_NAMES},
        )
        connection.execute(
            "insert into patient_word (word, patient_id) select w, p.id from patient p, name_words(p.name_key) w"
        )


_MAKE_NAME = """
create function bench_name(p_kind text, p_n double precision) returns text language sql immutable as $$
    select translate(left(md5(p_kind || floor(p_n)), 7), '0123456789', 'ghijklmnop')
$$
"""


def _wire(day: date) -> Date:
    return Date(year=day.year, month=day.month, day=day.day)


def _shapes(day: date) -> Iterator[Shape]:
    patient, doctor, clinic = make_id(PATIENT, 77), make_id(DOCTOR, 7), make_id(CLINIC, 7)
    no_show, rare = appointment_pb2.Appointment.STATE_NO_SHOW, appointment_pb2.Appointment.STATE_IN_CONSULTATION
    month = (day - timedelta(days=30), day)

    def listing(
        name: str, *, states: Sequence[int] = (), dates: tuple[date, date] | None = None, descending: bool = False,
        deep: bool = False, **of: Any,
    ) -> Shape:  # fmt: skip
        request = appointment_pb2.ListAppointmentsRequest(
            page_size=PAGE, states=[appointment_pb2.Appointment.State.ValueType(state) for state in states], **of
        )
        if descending:
            request.order = appointment_pb2.ListAppointmentsRequest.ORDER_DATE_DESC
        params: dict[str, Any] = {**of, "size": PAGE + 1}
        if dates is not None:
            request.from_date.CopyFrom(_wire(dates[0]))
            request.to_date.CopyFrom(_wire(dates[1]))
            params |= {"from_date": dates[0], "to_date": dates[1]}
        if deep:
            params |= {"after_date": None, "after_id": None}
        named = tuple(appointment_pb2.Appointment.State.Name(s).removeprefix("STATE_") for s in request.states)
        given = frozenset(params) - {"size"}
        method = "/clinic.frontdesk.v1.AppointmentService/ListAppointments"
        return Shape(
            name, method, request, lambda: appointments._list_statement(given, named or VISIT_STATES, descending),
            params, deep,
        )  # fmt: skip

    yield listing("by patient", patient_id=patient)
    yield listing("by doctor", doctor_id=doctor)
    yield listing("by doctor, descending", doctor_id=doctor, descending=True)
    yield listing("by clinic", clinic_id=clinic)
    yield listing("by clinic, descending", clinic_id=clinic, descending=True)
    yield listing("by clinic, NO_SHOW", clinic_id=clinic, states=[no_show])
    yield listing("by clinic, from the middle", clinic_id=clinic, deep=True)
    yield listing("31 days", dates=month)
    yield listing("31 days, descending", dates=month, descending=True)
    yield listing("31 days, a rare state", dates=month, states=[rare])
    yield listing("31 days, from the middle", dates=month, deep=True)

    def free(name: str, **of: Any) -> Shape:
        request = slot_pb2.ListSlotsRequest(page_size=PAGE, available_only=True)
        for field, value in of.items():
            if isinstance(value, datetime):
                stamp = Timestamp()
                stamp.FromDatetime(value)
                getattr(request, field).CopyFrom(stamp)
            else:
                setattr(request, field, value)
        method = "/clinic.frontdesk.v1.SlotService/ListSlots"
        return Shape(
            name, method, request, lambda: slots._list_statement(frozenset(of), True), {**of, "size": PAGE + 1}
        )

    yield free("free slots of a doctor", doctor_id=doctor)
    yield free("free slots of a clinic", clinic_id=clinic)
    yield free("free slots of a specialty", specialty="specialty 7")
    yield free("free slots")
    yield free("free slots of three days", start_time_from=datetime.now(UTC), start_time_to=datetime.now(UTC)
               + timedelta(days=3))  # fmt: skip

    dates = {"from": day, "to": day + timedelta(days=30)}
    days = schedule_pb2.GetDoctorScheduleRequest(
        doctor_id=doctor, from_date=_wire(dates["from"]), to_date=_wire(dates["to"])
    )
    method = "/clinic.frontdesk.v1.ScheduleService/GetDoctorSchedule"
    yield Shape("31 days of a doctor", method, days, lambda: schedules._days, {"doctor": doctor, **dates})


def _searches(connection: psycopg.Connection) -> Iterator[Shape]:
    """Searches for people. Every answer but those for one person is a full page."""
    common = "select bench_name('g', 1), bench_name('f', 1), bench_name('g', 2), bench_name('f', %s)"
    row = connection.execute(common, (_FAMILY_NAMES // 8,)).fetchone()
    assert row is not None
    given, family, other, rare = row
    method = "/clinic.frontdesk.v1.PatientService/ListPatients"

    def named(name: str, *words: str) -> Shape:
        request = patient_pb2.ListPatientsRequest(name_prefix=", ".join(words), page_size=PAGE)
        params = {"words": sorted(words), "after_word": None, "after_id": None, "size": PAGE + 1}
        return Shape(name, method, request, lambda: patients._searched, params)

    yield named("patients by a letter", given[0])
    yield named("patients by a frequent name", family)
    yield named("patients by two frequent names", family, given)
    yield named("patients by two frequent names that nobody has", given, other)
    yield named("patients by a rare and a frequent name", rare, given)
    insured = patient_pb2.ListPatientsRequest(insurance=patient_pb2.Insurance(country="LK", number="000 007 777 v"))
    size = sa.bindparam("size", type_=sa.Integer)
    statement = sa.select(patient).where(patients._OF_NUMBER).order_by(patient.c.id).limit(size)
    params = {"insurance": ["LK000007777V"], "size": PAGE + 1}
    yield Shape("a patient by insured number", method, insured, lambda: compiled(statement), params)


def _time(client: Child, port: int, connection: psycopg.Connection, shape: Shape) -> dict[str, Any]:
    """The median milliseconds per call through the service, and PostgreSQL's own time and plan."""

    def load(request: Any, calls: int) -> Loaded:
        client.ask(port, shape.method, [request.SerializeToString()] * calls, 1, 1, 0.0)
        done: Loaded = client.ask("go")
        return done

    request: Any = type(shape.request)()
    request.CopyFrom(shape.request)
    params = dict(shape.params)
    if shape.deep:
        request.page_token, last = _middle(connection, request, load)
        params |= {"after_date": date(last.date.year, last.date.month, last.date.day), "after_id": last.id}
    # PostgreSQL settles on a plan after five runs on a connection; after these calls, both connections of the pool have
    # one.
    load(request, 14)
    done = load(request, CALLS)
    if done.refused:
        return {"ms": None, "rows": 0, "execution_ms": None, "plan": "", "refused": done.refused}
    answer = _ANSWERS[shape.method.rpartition("/")[2]].FromString(done.last)
    rows = len(getattr(answer, answer.DESCRIPTOR.fields[0].name))
    explained = connection.execute(f"explain (analyze, buffers, format json) {shape.statement()}".encode(), params)
    plan: dict[str, Any] = (explained.fetchone() or [[{}]])[0][0]
    return {
        "ms": statistics.median(done.latencies) * 1e3,
        "rows": rows,
        "execution_ms": plan["Execution Time"],
        "plan": _nodes(plan["Plan"]),
        "refused": {},
    }


def _middle(connection: psycopg.Connection, request: Any, load: Callable[[Any, int], Loaded]) -> tuple[str, Any]:
    """The page token after which the second half of the list begins, and the row before it, found by reading pages."""
    of = appointment.c
    count = sa.select(sa.func.count()).select_from(appointment)
    if request.clinic_id:
        count = count.where(of.clinic_id == sa.bindparam("clinic_id"))
    if request.HasField("from_date"):
        count = count.where(of.date.between(sa.bindparam("first"), sa.bindparam("last")))
    dates = [date(day.year, day.month, day.day) for day in (request.from_date, request.to_date) if day.year]
    values = {"clinic_id": request.clinic_id, **dict(zip(("first", "last"), dates, strict=False))}
    rows = (connection.execute(compiled(count).encode(), values).fetchone() or [0])[0]
    page: Any = type(request)()
    page.CopyFrom(request)
    page.page_size = min(100, max(1, rows // 2))
    for _ in range(max(1, rows // 2 // page.page_size)):
        answer = appointment_pb2.ListAppointmentsResponse.FromString(load(page, 1).last)
        page.page_token = answer.next_page_token
    return page.page_token, answer.appointments[-1]


def _nodes(plan: dict[str, Any], depth: int = 4) -> str:
    """The top nodes of a plan, outermost first, each with its index or table and its number of rows."""
    name = str(plan["Node Type"])
    place = plan.get("Index Name") or plan.get("Relation Name")
    removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Join Filter", 0)
    text = name + (f" {place}" if place else "") + f" {plan['Actual Rows']:.0f}x{plan['Actual Loops']:.0f}"
    if removed:
        text += f" (passed over {removed:.0f})"
    children = [child for child in plan.get("Plans", ()) if child.get("Parent Relationship") not in {"InitPlan"}]
    if depth and children:
        inner = _nodes(children[0], depth - 1)
        same = len(children) - 1
        text += f" < {inner}" + (f" and {same} more" if same else "")
    return text
