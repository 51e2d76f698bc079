"""The queue of a doctor-day: at a revision, and what changed since another."""

import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta
from typing import Any

from frontdesk.core.appointment import Appointment, Appointments
from frontdesk.core.caller import Caller, Sight
from frontdesk.core.decision import iso
from frontdesk.core.estimate import RECENT_VISITS, Estimate, Pace, Visit, estimates
from frontdesk.db.batch import Batcher
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database
from frontdesk.errors import AppointmentNotFound, ClinicNotYours, DoctorNotFound, RoleRequired

STAFF, BOARD, OWN = "STAFF", "BOARD", "OWN"
"""The views of a queue."""

_IDLE = timedelta(hours=1)
"""After so long without a consultation nothing is known of when there will be one."""
_MOST_PACES = 10_000
_MOST_KEPT = 1_000


@dataclass(frozen=True, slots=True)
class QueueEntry:
    """One patient in the queue."""

    ticket: int
    position: int
    """1 = next; 0 where the patient is not waiting. Derived from the order of the queue, never stored."""
    appointment_id: str
    patient_id: str
    patient_name: str
    state: str
    room: str
    call_count: int
    check_in_time: datetime
    call_time: datetime | None
    start_time: datetime | None
    priority: str
    """UNSPECIFIED if the view does not show it."""
    slot_start: datetime | None = None
    slot_end: datetime | None = None
    returned: bool = False
    """Whether the patient came back after a missed call, and so waits at the end of the priority."""
    estimate: Estimate | None = None


@dataclass(frozen=True, slots=True)
class Queue:
    """The whole queue of a doctor-day at one revision."""

    doctor_id: str
    date: date
    revision: int
    change_micros: int
    """When the revision was made, in microseconds since 1970; tells it from its namesake in a restored database."""
    entries: tuple[QueueEntry, ...]
    expected_count: int
    patient_ids: frozenset[str]
    """Who has an appointment of the day that is not cancelled, if that was asked for."""
    read_time: datetime
    """When it was read, by the database's clock; `read_at` by ours."""
    read_at: float
    active_time: datetime | None
    """When a consultation began or ended last."""
    pace: Pace | None
    """None if there was no reason to estimate when it was read."""
    next_estimate: Estimate | None = None


def estimated(queue: Queue, now: datetime) -> Queue:
    """The queue with the estimates of this moment; without, if nobody is in consultation and none was for an hour."""
    under_way = [entry for entry in queue.entries if entry.state in ("CALLED", "IN_CONSULTATION")]
    idle = all(entry.state == "CALLED" for entry in under_way) and (
        queue.active_time is None or queue.active_time < now - _IDLE
    )
    if idle or queue.pace is None:
        return queue
    waiting = [entry for entry in queue.entries if entry.state == "WAITING"]
    visits = [_visit(entry) for entry in under_way]
    found = estimates(now, visits, [_visit(entry) for entry in waiting], queue.pace)
    # A newcomer goes before those of his priority who came back after a missed call.
    ahead = [_visit(entry) for entry in waiting if not (entry.returned and entry.priority == "NORMAL")]
    following = found[-1] if len(ahead) == len(waiting) else estimates(now, visits, ahead, queue.pace)[-1]
    by_ticket = {entry.ticket: estimate for entry, estimate in zip(waiting, found, strict=False)}
    entries = tuple(
        replace(entry, estimate=by_ticket[entry.ticket]) if entry.ticket in by_ticket else entry
        for entry in queue.entries
    )
    return replace(queue, entries=entries, next_estimate=following)


def estimated_now(queue: Queue) -> Queue:
    """The same, of now, however long ago the queue was read."""
    return estimated(queue, queue.read_time + timedelta(seconds=time.monotonic() - queue.read_at))


def _visit(entry: QueueEntry) -> Visit:
    planned = None
    if entry.slot_start is not None and entry.slot_end is not None:
        planned = (entry.slot_end - entry.slot_start).total_seconds()
    return Visit(planned, began=entry.start_time, not_before=entry.slot_start)


class Paces:
    """The paces of doctors, each as long as no other consultation of the day has been completed."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, tuple[datetime | None, Pace]] = OrderedDict()

    def known(self, doctor_id: str) -> dict[str, Any]:
        """What a request of `_ASKED` says, so that a pace that is known is not read again."""
        kept = self._kept.get(doctor_id)
        return {"paced": kept is not None, "ended": None if kept is None else iso(kept[0])}

    def take(
        self, doctor_id: str, ended: datetime | None, recent: Sequence[float] | None, planned: float | None
    ) -> Pace | None:
        """The pace that a request has found; None if it found no reason to estimate."""
        if planned is None:
            return None
        if recent is None:
            kept = self._kept.get(doctor_id)
            if kept is None or kept[1].planned == planned:
                return None if kept is None else kept[1]
            recent = kept[1].recent
        pace = Pace(tuple(recent), planned)
        self._kept[doctor_id] = (ended, pace)
        self._kept.move_to_end(doctor_id)
        if len(self._kept) > _MOST_PACES:
            self._kept.popitem(last=False)
        return pace


@dataclass(frozen=True, slots=True)
class QueueChange:
    """One revision of a doctor-day."""

    revision: int
    change_micros: int
    kind: str
    appointment_id: str
    entry: QueueEntry | None
    """As this change left it; None if the queue was not touched."""


@dataclass(frozen=True, slots=True)
class View:
    """How much of a queue somebody sees."""

    name: str
    patient_id: str = ""
    """Whose entry the view OWN shows whole."""

    def queue(self, queue: Queue) -> Queue:
        """The queue as the view shows it."""
        if self.name == STAFF:
            return queue
        return replace(queue, entries=tuple(map(self._entry, queue.entries)))

    def changes(self, changes: Sequence[QueueChange]) -> Sequence[QueueChange]:
        """The changes as the view shows them."""
        return changes if self.name == STAFF else [*map(self._change, changes)]

    def _change(self, change: QueueChange) -> QueueChange:
        entry = None if change.entry is None else self._entry(change.entry)
        return replace(change, appointment_id="" if entry is None else entry.appointment_id, entry=entry)

    def _entry(self, entry: QueueEntry) -> QueueEntry:
        if self.name == OWN and entry.patient_id == self.patient_id:
            return entry
        return replace(entry, appointment_id="", patient_id="", patient_name="", call_count=0, priority="UNSPECIFIED")


@dataclass(frozen=True, slots=True)
class Admission:
    """A watcher's doctor-day, and what he sees of it."""

    date: date
    view: View


# The doctor-days that somebody asks for, and what each of them may see.
_ASKED = """
from rows from (json_to_recordset(%s::json)
                as (doctor uuid, date date, patients boolean, restricted boolean, sight sight, paced boolean,
                    ended timestamptz, known_date date, known_revision bigint, known_micros bigint))
     with ordinality as k (doctor, date, patients, restricted, sight, paced, ended, known_date, known_revision,
                           known_micros, n)
join lateral (select * from doctor x where x.id = k.doctor offset 0) d on true
cross join lateral (
    select coalesce(k.date, (select (moment() at time zone c.time_zone)::date from clinic c where c.id = d.clinic_id))
           as date offset 0) day
cross join lateral (
    select case when (k.sight).patient is not null then current_patient((k.sight).patient) end as own offset 0) self
cross join lateral (
    select not k.restricted or d.clinic_id = any ((k.sight).clinics) or d.id = (k.sight).doctor
           or self.own is not null and exists (
               select from appointment x
               where x.doctor_id = d.id and x.date = day.date and x.patient_id = self.own and x.state <> 'CANCELLED')
           as see offset 0) may"""

# `may` says whether the caller may see the queue of the day; `own` is the present record of the caller's patient. Of a
# queue that the caller's worker has read at this very revision, nothing is read again (`same`).
#
# One statement, so one snapshot: the entries are those of the revision. The day is fenced off (offset 0), so that it is
# computed once, and what is looked up by it uses both columns of an index. No condition on `state`: nearly all who are
# checked in are so today, which the planner does not know: it would read the whole service's by appointment_date_idx.
_queues = f"""
select k.n, d.id, d.clinic_id, may.see, self.own, same.known, day.date, dd.revision, dd.micros, expected.count,
       expected.patients,
       moment(), expected.active_time, expected.ended, pace.recent, pace.planned,
       a.ticket, a.id, a.patient_id, concat_ws(' ', p.given_name, nullif(p.family_name, '')), a.queue_state, a.room,
       a.call_count, a.check_in_time, a.call_time, a.start_visit_time, a.priority,
       a.start_time, a.end_time, a.returned_revision > 0
{_ASKED}
cross join lateral (
    select coalesce(max(x.revision), 1) as revision,
           coalesce((extract(epoch from max(x.update_time)) * 1000000)::bigint, 0) as micros
    from doctor_day x where x.doctor_id = d.id and x.date = day.date offset 0) dd
cross join lateral (
    select coalesce((dd.revision, dd.micros, day.date) = (k.known_revision, k.known_micros, k.known_date), false)
           as known offset 0) same
cross join lateral (
    select count(*) filter (where b.state = 'BOOKED') as count,
           array_agg(b.patient_id) filter (where k.patients and b.state <> 'CANCELLED') as patients,
           bool_or(b.state = 'IN_CONSULTATION')
               or max(greatest(b.start_visit_time, b.complete_time)) > moment() - interval '{_IDLE}' as active,
           max(greatest(b.start_visit_time, b.complete_time)) as active_time, max(b.complete_time) as ended
    from appointment b where may.see and not same.known and b.doctor_id = d.id and b.date = day.date) expected
left join lateral (
    select extract(epoch from c.visit_length)::float8 as planned,
           case when not same.known and (not k.paced or expected.ended is distinct from k.ended)
                then recent_visits(d.id, day.date, {RECENT_VISITS}) end as recent
    from clinic c where c.id = d.clinic_id and (expected.active or same.known) offset 0) pace on true
left join lateral (
    select x.*, case x.queue_state when 'WAITING' then place_in_queue(x) end as place from appointment x
    where may.see and not same.known and x.doctor_id = d.id and x.date = day.date and x.ticket is not null
      and x.queue_state in ('WAITING', 'CALLED', 'IN_CONSULTATION', 'PARKED', 'MISSED') offset 0) a on true
left join lateral (select * from patient x where x.id = a.patient_id offset 0) p on true
order by k.n, array_position(array['WAITING', 'CALLED', 'IN_CONSULTATION', 'PARKED', 'MISSED'], a.queue_state),
         a.place, a.ticket
"""

_admission = f"""
select d.clinic_id, may.see, self.own, day.date
{_ASKED}
"""

_changes = """
select e.doctor_id, e.date, e.revision, (extract(epoch from e.time) * 1000000)::bigint, change_kind(e.type),
       coalesce(e.appointment_id::text, ''),
       e.ticket, a.patient_id, concat_ws(' ', p.given_name, nullif(p.family_name, '')), e.queue_state, e.room,
       e.call_count, e.check_in_time, e.call_time, e.start_visit_time, e.priority
from unnest(%(doctors)s::uuid[], %(dates)s::date[], %(firsts)s::bigint[], %(lasts)s::bigint[])
     as k (doctor_id, date, first, last)
cross join lateral (
    select * from log x
    where x.doctor_id = k.doctor_id and x.date = k.date and x.revision between k.first and k.last and x.revision > 0
      and (x.date >= (moment() - make_interval(secs => %(keep)s))::date
           or x.time >= moment() - make_interval(secs => %(keep)s)) offset 0) e
left join lateral (
    select * from appointment x where x.id = e.appointment_id and e.ticket is not null offset 0) a on true
left join lateral (select * from patient x where x.id = a.patient_id offset 0) p on true
order by e.doctor_id, e.date, e.revision
"""

_revisions = """
select k.doctor_id, k.date, coalesce(dd.revision, 1),
       coalesce((extract(epoch from dd.update_time) * 1000000)::bigint, 0)
from unnest(%s::uuid[], %s::date[]) as k (doctor_id, date)
left join doctor_day dd on dd.doctor_id = k.doctor_id and dd.date = k.date
"""


async def read_queues(db: Database, paces: Paces, days: Sequence[tuple[str, date]]) -> list[Queue]:
    """The queues now, whole, in this order, without those whose doctor does not exist."""
    asked = json.dumps([_asked(doctor, on, None, paces, patients=True) for doctor, on in days])
    rows = await db.rows(_queues, (asked,), _columns)
    return [_queue(found, paces) for found in _by_request(rows, len(days)) if found]


def _asked(
    doctor_id: str,
    on: date | None,
    sight: Sight | None,
    paces: Paces,
    *,
    patients: bool = False,
    known: Queue | None = None,
) -> dict[str, Any]:
    """A request of `_ASKED`. `patients`: tell who has an appointment of the day. `known` is not read again."""
    same = {} if known is None else {
        "known_date": iso(known.date), "known_revision": known.revision, "known_micros": known.change_micros
    }  # fmt: skip
    return {
        "doctor": doctor_id,
        "date": iso(on),
        "patients": patients,
        "restricted": sight is not None,
        "sight": None if sight is None else sight.as_json(),
        **paces.known(doctor_id),
        **same,
    }


def _columns(*columns: Any) -> Any:
    return columns


def _by_request(rows: Sequence[Any], requests: int) -> list[list[Any]]:
    """The rows of each request, by the number that leads them; none if the doctor does not exist."""
    found: list[list[Any]] = [[] for _ in range(requests)]
    for number, *columns in rows:
        found[number - 1].append(columns)
    return found


def _queue(rows: Sequence[Any], paces: Paces, known: Queue | None = None) -> Queue:
    """The queue of one doctor-day out of its rows: one for each entry, or one without an entry; `known` if it is."""
    doctor, _, _, _, same, day, revision, micros, expected, patients, now, active_time, ended, recent, planned, *_ = (
        rows[0]
    )
    if same:
        assert known is not None
        # Nobody has begun a consultation since; how long one usually lasts may have been set anew.
        pace = known.pace
        if pace is not None and pace.planned != planned:
            pace = replace(pace, planned=planned)
        return replace(known, read_time=now, read_at=time.monotonic(), pace=pace)
    entries = []
    for place, row in enumerate(rows, start=1):
        ticket, appointment, patient, name, state, *rest = row[15:]
        if ticket is not None:
            entries.append(
                QueueEntry(ticket, place if state == "WAITING" else 0, appointment, patient, name, state, *rest)
            )
    return Queue(
        doctor, day, revision, micros, tuple(entries), expected, frozenset(patients or ()), now, time.monotonic(),
        active_time, paces.take(doctor, ended, recent, planned),
    )  # fmt: skip


async def read_changes_of(
    db: Database, spans: Sequence[tuple[str, date, int, int]], keep_seconds: float
) -> dict[tuple[str, date], list[QueueChange]]:
    """The revisions from the third to the fourth, both included, of each doctor-day, in order.

    Without changes older than `keep_seconds` on days as long ago.
    """
    doctors, dates, firsts, lasts = (list(column) for column in zip(*spans, strict=True))
    found: dict[tuple[str, date], list[QueueChange]] = {}
    for key, change in await db.rows(
        _changes, {"doctors": doctors, "dates": dates, "firsts": firsts, "lasts": lasts, "keep": keep_seconds},
        lambda doctor, day, *columns: ((doctor, day), _change(*columns)),
    ):  # fmt: skip
        found.setdefault(key, []).append(change)
    return found


async def read_changes(
    db: Database, doctor_id: str, on: date, first: int, last: int, keep_seconds: float
) -> Sequence[QueueChange]:
    """The revisions from `first` to `last`, both included, in order; without old ones, as above."""
    return (await read_changes_of(db, [(doctor_id, on, first, last)], keep_seconds)).get((doctor_id, on), [])


async def read_revisions(db: Database, days: Sequence[tuple[str, date]]) -> dict[tuple[str, date], tuple[int, int]]:
    """The present revision of each doctor-day, and when it was made, in microseconds since 1970."""
    found = await db.rows(
        _revisions,
        ([doctor for doctor, _ in days], [day for _, day in days]),
        lambda doctor, day, revision, micros: ((doctor, day), (revision, micros)),
    )
    return dict(found)


def as_of(changes: Sequence[QueueChange], queue: Queue) -> list[QueueChange]:
    """The changes, with the position and the patient that each entry has in `queue`.

    A change that was read before the patient's name was corrected looks like one that was read after it.
    """
    now = {entry.appointment_id: entry for entry in queue.entries}
    return [_as_of(change, now.get(change.appointment_id)) for change in changes]


def _as_of(change: QueueChange, now: QueueEntry | None) -> QueueChange:
    entry = change.entry
    if entry is None or now is None:
        return change
    position = now.position if entry.state == "WAITING" else 0
    entry = replace(entry, position=position, patient_id=now.patient_id, patient_name=now.patient_name)
    return replace(change, entry=entry)


def entry_of(a: Appointment) -> QueueEntry:
    """The queue entry of an appointment that a change of the queue has left."""
    assert a.ticket is not None
    assert a.queue_state is not None
    assert a.check_in_time is not None
    return QueueEntry(
        a.ticket, a.position, a.id, a.patient_id, a.patient_name, a.queue_state, a.room, a.call_count, a.check_in_time,
        a.call_time, a.start_visit_time, a.priority,
    )  # fmt: skip


def _change(
    revision: int, micros: int, kind: str, appointment: str, ticket: int | None, patient: str, name: str, *rest: Any
) -> QueueChange:
    entry = None if ticket is None else QueueEntry(ticket, 0, appointment, patient, name, *rest)
    return QueueChange(revision, micros, kind, appointment, entry)


def _seen(caller: Caller, view: str, method: str, clinic_id: str, may_see: bool, own: str | None) -> View:
    """The view, if the statement has found that the caller may see it; else raises the refusal."""
    if may_see:
        return View(view, own or "")
    if view == OWN:
        raise AppointmentNotFound
    if caller.everywhere:
        raise ClinicNotYours(clinic_id)
    raise RoleRequired(details={"method": method})


class Queues:
    """Read a queue, and change it."""

    def __init__(self, db: Database, appointments: Appointments, paces: Paces) -> None:
        self._db = db
        self._paces = paces
        self._appointments = appointments
        self._kept: OrderedDict[tuple[str, date | None], Queue] = OrderedDict()
        """Queues as they were read last, by what was asked for. The database says whether one is still the present."""
        self._reading: Batcher[list[Any]] = Batcher(db, _queues, _columns, _by_request)

    async def get(self, caller: Caller, doctor_id: str, on: date | None, view: str) -> Queue:
        """The queue now, as the view shows it; `on` defaults to the clinic's today.

        Raises DoctorNotFound, and the refusals of `admit`.
        """
        known = self._kept.get((doctor_id, on))
        rows = await self._reading.ask(_asked(doctor_id, on, caller.sight, self._paces, known=known))
        if not rows:
            raise DoctorNotFound(doctor_id)
        seen = _seen(caller, view, "GetQueue", *rows[0][1:4])
        queue = self._kept[doctor_id, on] = _queue(rows, self._paces, known)
        self._kept.move_to_end((doctor_id, on))
        if len(self._kept) > _MOST_KEPT:
            self._kept.popitem(last=False)
        return seen.queue(estimated(queue, queue.read_time))

    async def admit(self, caller: Caller, doctor_id: str, on: date | None, view: str) -> Admission:
        """What the caller may watch; `on` defaults to the clinic's today.

        Raises ClinicNotYours, RoleRequired, for the view OWN AppointmentNotFound, and DoctorNotFound if it had to look.
        """
        if caller.sight is None and on is not None:
            return Admission(on, View(view))
        found = await self._db.row(
            _admission,
            (json.dumps([_asked(doctor_id, on, caller.sight, self._paces)]),),
            lambda clinic_id, may_see, own, day: (day, clinic_id, may_see, own),
        )
        if found is None:
            raise DoctorNotFound(doctor_id)
        day, *seen = found
        return Admission(day, _seen(caller, view, "WatchQueue", *seen))

    async def call_next(
        self, caller: Caller, doctor_id: str, on: date | None, room: str, *, key: Key
    ) -> Change[Appointment]:
        """Call the first waiting patient to `room`. Raises DoctorNotFound, QueueEmpty."""
        return await self._appointments.decide(caller, key, doctor=doctor_id, date=iso(on), room=room)

    async def add_walk_in(
        self, caller: Caller, doctor_id: str, patient_id: str, priority: str | None, reason: str, override_reason: str,
        *, key: Key,
    ) -> Change[Appointment]:  # fmt: skip
        """Book the doctor's today for a patient who is here, and check the patient in.

        `override_reason` makes a place on a full day, if the caller may do that. Raises what AddWalkIn names.
        """
        return await self._appointments.decide(
            caller, key, doctor=doctor_id, patient=patient_id, priority=priority, reason=reason, notes="",
            override_reason=override_reason, may_override=caller.may_override,
        )  # fmt: skip

    async def transfer(
        self, caller: Caller, appointment_id: str, to_doctor_id: str, override_reason: str, *, key: Key
    ) -> Change[Appointment]:
        """Hand a patient over to another doctor's queue of today.

        `override_reason` makes a place on a full day, if the caller may do that. Raises what TransferPatient names.
        """
        return await self._appointments.decide(
            caller, key, appointment=appointment_id, doctor=to_doctor_id, override_reason=override_reason,
            may_override=caller.may_override,
        )  # fmt: skip

    async def change(
        self,
        caller: Caller,
        appointment_id: str,
        *,
        room: str = "",
        patient_id: str | None = None,
        priority: str | None = None,
        key: Key,
    ) -> Change[Appointment]:
        """One transition of the queue entry: the method of `key`, by the table in `db/sql/state.sql`.

        `patient_id` guards a check-in; `priority` is the patient's from now on, None the present one. Raises
        AppointmentNotFound, InvalidTransition, AlreadyCheckedIn, PatientMismatch, NotAppointmentDate, RoleRequired,
        CallLimitReached.
        """
        return await self._appointments.decide(
            caller, key, appointment=appointment_id, room=room, patient=patient_id, priority=priority
        )
