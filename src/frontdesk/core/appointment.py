"""Bookings and the life of a visit. Each decision is one statement: `db/sql/` decides under the doctor-day's lock."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Caller, current_patient, within
from frontdesk.core.decision import Changed, Target, asked, iso, refusal
from frontdesk.core.formats import require_order
from frontdesk.db import schema
from frontdesk.db.batch import Batcher
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, compiled
from frontdesk.db.paging import NO_INSTANT, Listing, Page, cut
from frontdesk.errors import AppointmentNotFound, ClinicNotYours, InvalidField, Refused


@dataclass(frozen=True, slots=True)
class Appointment:
    """A booking and its visit; from `ticket` on, its queue entry."""

    id: str
    patient_id: str
    doctor_id: str
    clinic_id: str
    date: date
    number: int
    slot_id: str | None
    start_time: datetime | None
    end_time: datetime | None
    state: str
    reason: str
    notes: str
    cancel_reason: str
    check_in_time: datetime | None
    start_visit_time: datetime | None
    complete_time: datetime | None
    cancel_time: datetime | None
    no_show_time: datetime | None
    leave_time: datetime | None
    ticket: int | None
    queue_state: str | None
    room: str
    call_count: int
    call_time: datetime | None
    priority: str
    override_reason: str
    version: int
    create_time: datetime
    update_time: datetime
    patient_name: str
    """As it is now, of a merged record that of the kept one; so is the doctor's."""
    doctor_name: str
    position: int = 0
    """1 = next; 0 if the patient is not waiting. Derived, and known after a change of the queue alone."""


@dataclass(frozen=True, slots=True)
class AppointmentFilter:
    """What ListAppointments asks for; what is None does not matter."""

    patient_id: str | None
    doctor_id: str | None
    clinic_id: str | None
    slot_id: str | None
    states: tuple[str, ...]
    """Empty means every state."""
    from_date: date | None
    to_date: date | None
    descending: bool


_DERIVED = {"patient_name", "doctor_name", "position"}
_COLUMNS = tuple(field.name for field in fields(Appointment) if field.name not in _DERIVED)
_t = schema.appointment.c
_selected = [_t[name] for name in _COLUMNS]


def _names(of: Any) -> list[sa.ColumnElement[Any]]:
    """The names of an appointment's patient and doctor, asked for each row that is answered."""
    p, x = schema.patient.c, schema.doctor.c
    blank: sa.ColumnElement[str] = sa.literal_column("' '")
    nothing: sa.ColumnElement[str] = sa.literal_column("''")
    full_name = sa.func.concat_ws(blank, p.given_name, sa.func.nullif(p.family_name, nothing))
    return [
        sa.select(full_name).where(p.id == of.patient_id).scalar_subquery(),
        sa.select(x.display_name).where(x.id == of.doctor_id).scalar_subquery(),
    ]


_decided = (
    "select d.outcome, d.subject, d.details, coalesce(d.replayed, false), coalesce(d.revision, 0),"
    " coalesce(d.vacated_revision, 0), d.vacated_doctor, d.vacated_date, "
    + ", ".join(f"(d.appointment).{name}" for name in _COLUMNS)
    # Of what was true under the locks: this statement may have waited for them.
    + ", d.patient_name, d.doctor_name, coalesce(d.position, 0) from decide(%s) d"
)


@dataclass(frozen=True, slots=True)
class _Decided:
    """An answer of `decide`: the change, and the doctor-day that a reschedule left."""

    change: Change[Appointment]
    vacated: tuple[str, date] | None


def _decision(
    outcome: str, subject: str | None, details: Mapping[str, Any] | None, replayed: bool, revision: int,
    vacated_revision: int, vacated_doctor: str | None, vacated_date: date | None, *appointment: Any,
) -> _Decided | Refused:  # fmt: skip
    if outcome != "OK":
        return refusal(outcome, subject, details)
    vacated = None if vacated_doctor is None or vacated_date is None else (vacated_doctor, vacated_date)
    return _Decided(Change(Appointment(*appointment), replayed, revision, vacated_revision), vacated)


class Appointments:
    """Book, move, list and end visits."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed
        self._deciding: Batcher[_Decided | Refused] = Batcher(db, _decided, _decision)

    async def book(
        self,
        caller: Caller,
        patient_id: str,
        target: Target,
        *,
        reason: str,
        notes: str,
        validate_only: bool,
        hold_id: str | None = None,
        key: Key,
    ) -> Change[Appointment]:
        """Book a place, never over the capacity of the slot or of the doctor-day.

        `validate_only` changes nothing and answers what would be booked now. A hold is used up. Raises what
        BookAppointment names.
        """
        return await self.decide(
            caller,
            key,
            patient=patient_id,
            slot=target.slot_id,
            doctor=target.doctor_id,
            date=iso(target.on),
            reason=reason,
            notes=notes,
            validate_only=validate_only,
            hold=hold_id,
        )

    async def reschedule(
        self,
        caller: Caller,
        appointment_id: str,
        target: Target,
        version: int | None,
        *,
        hold_id: str | None = None,
        key: Key,
    ) -> Change[Appointment]:
        """Move a BOOKED appointment; the old place is given up only if the new one is got. A hold is used up.

        Raises what RescheduleAppointment names.
        """
        return await self.decide(
            caller,
            key,
            appointment=appointment_id,
            version=version,
            slot=target.slot_id,
            doctor=target.doctor_id,
            date=iso(target.on),
            hold=hold_id,
        )

    async def update(
        self,
        caller: Caller,
        appointment_id: str,
        version: int | None,
        *,
        reason: str | None,
        notes: str | None,
        key: Key,
    ) -> Change[Appointment]:
        """Change reason and notes; None keeps one.

        Raises AppointmentNotFound, EtagMismatch, ClinicNotYours, and RoleRequired for notes by a patient.
        """
        return await self.decide(caller, key, appointment=appointment_id, version=version, reason=reason, notes=notes)

    async def change(
        self, caller: Caller, appointment_id: str, version: int | None, *, reason: str = "", key: Key
    ) -> Change[Appointment]:
        """One transition of the visit: the method of `key`, by the table in `db/sql/state.sql`.

        Raises AppointmentNotFound, ClinicNotYours, InvalidTransition, EtagMismatch, TooEarly.
        """
        return await self.decide(caller, key, appointment=appointment_id, version=version, reason=reason)

    async def undo(self, caller: Caller, appointment_id: str, version: int | None, *, key: Key) -> Change[Appointment]:
        """Take back the visit's last verb. Raises what UndoTransition names."""
        return await self.decide(caller, key, appointment=appointment_id, version=version)

    async def get(self, caller: Caller, appointment_id: str) -> Appointment:
        """Raises AppointmentNotFound, ClinicNotYours."""
        parts = {} if caller.sight is None else caller.sight.parts
        query = _get_statement(None if caller.sight is None else frozenset(parts))
        found = await self._db.row(query, {"id": appointment_id, **parts}, Appointment)
        if found is None:
            if "sight_clinics" in parts:
                elsewhere = await self._db.row(_clinic_of, {"id": appointment_id}, str)
                if elsewhere is not None:
                    raise ClinicNotYours(elsewhere)
            raise AppointmentNotFound(appointment_id)
        return _shown(caller, found)

    async def list(self, caller: Caller, page: Page, wanted: AppointmentFilter) -> Listing[Appointment]:
        """Appointments in the caller's sight for which every given filter holds, by date, start time and id.

        Raises InvalidField, ClinicNotYours.
        """
        parts = {} if caller.sight is None else caller.sight.parts
        narrow = (
            parts.keys() & {"sight_patient", "sight_doctor"}
            or wanted.patient_id
            or wanted.doctor_id
            or wanted.clinic_id
            or wanted.slot_id
        )
        if not (narrow or (wanted.from_date and wanted.to_date)):
            raise InvalidField(("from_date", "a patient, a doctor, a clinic, a slot or both dates are required"))
        require_order(wanted.from_date, wanted.to_date)
        if not narrow and wanted.from_date and wanted.to_date and (wanted.to_date - wanted.from_date).days > 30:
            raise InvalidField(("to_date", "at most 31 days without a patient, a doctor, a clinic or a slot"))
        values = {
            "patient_id": wanted.patient_id, "doctor_id": wanted.doctor_id, "clinic_id": wanted.clinic_id,
            "slot_id": wanted.slot_id, "from_date": wanted.from_date, "to_date": wanted.to_date,
        }  # fmt: skip
        if page.after:
            values |= dict(zip(("after_date", "after_start", "after_id"), page.after, strict=True))
        given = frozenset(name for name, value in values.items() if value is not None) | frozenset(parts)
        states = tuple(sorted(set(wanted.states or schema.VISIT_STATES)))
        query = _list_statement(given, states, wanted.descending, restricted=caller.sight is not None)
        found = await self._db.rows(
            query, {**values, **parts, "size": page.size + 1}, lambda *row: _shown(caller, Appointment(*row))
        )
        if not found and "sight_clinics" in parts and (wanted.clinic_id or wanted.doctor_id or wanted.slot_id):
            # Only an empty list needs the question why.
            elsewhere = await self._db.row(_elsewhere, {**dict.fromkeys(_SIGHT), **values, **parts}, str)
            if elsewhere is not None:
                raise ClinicNotYours(elsewhere)
        return cut(page, found, _place)

    async def decide(self, caller: Caller, key: Key, **attributes: Any) -> Change[Appointment]:
        """Make a change of an appointment, and tell the watchers of its doctor-days. Raises the refusal."""
        decided = await self._deciding.ask(asked(caller, key, **attributes))
        if isinstance(decided, Refused):
            raise decided
        change = decided.change
        if not change.replayed and change.revision:
            self._changed(change.result.doctor_id, change.result.date)
            if decided.vacated is not None:
                self._changed(*decided.vacated)
        return change if caller.sight is None else replace(change, result=_shown(caller, change.result))


def _place(appointment: Appointment) -> tuple[str, ...]:
    start = appointment.start_time
    return appointment.date.isoformat(), NO_INSTANT if start is None else start.isoformat(), appointment.id


@cache
def _get_statement(parts: frozenset[str] | None) -> str:
    statement = sa.select(*_selected, *_names(_t)).where(_t.id == sa.bindparam("id"))
    return compiled(statement if parts is None else statement.where(within(parts, _t)))


_SIGHT = ("sight_clinics", "sight_patient", "sight_doctor")

# The clinic that a filter leads to and that is not the caller's; none if something of the caller's own is there.
_elsewhere = """
select f.clinic_id
from (select c.id, null::uuid from clinic c where c.id = %(clinic_id)s
      union all select d.clinic_id, d.id from doctor d where d.id = %(doctor_id)s
      union all select s.clinic_id, s.doctor_id from slot s where s.id = %(slot_id)s) as f (clinic_id, doctor_id)
where f.clinic_id <> all (%(sight_clinics)s::uuid[])
  and not exists (
      select from doctor d
      where d.id = %(sight_doctor)s and (f.doctor_id = d.id or f.doctor_id is null and f.clinic_id = d.clinic_id))
  and not exists (
      select from appointment a
      where a.patient_id = current_patient(%(sight_patient)s) and a.clinic_id = f.clinic_id
        and (f.doctor_id is null or f.doctor_id = a.doctor_id))
limit 1
"""

_clinic_of = compiled(sa.select(_t.clinic_id).where(_t.id == sa.bindparam("id")))


def _shown(caller: Caller, appointment: Appointment) -> Appointment:
    """The appointment as the caller may see it: notes and an override's reason are for the clinic and the doctor."""
    if not (appointment.notes or appointment.override_reason) or caller.may_reach_clinic(appointment.clinic_id):
        return appointment
    if caller.sight is not None and caller.sight.doctor_id == appointment.doctor_id:
        return appointment
    return replace(appointment, notes="", override_reason="")


@cache
def _list_statement(given: frozenset[str], states: tuple[str, ...], descending: bool, *, restricted: bool) -> str:
    after = sa.tuple_(
        sa.bindparam("after_date", type_=sa.Date),
        sa.bindparam("after_start", type_=sa.DateTime(timezone=True)),
        sa.bindparam("after_id", type_=sa.Uuid),
    )
    sort_key = (_t.date, sa.func.coalesce(_t.start_time, schema.FIRST), _t.id)
    place = sa.tuple_(*sort_key)
    conditions: dict[str, sa.ColumnElement[bool]] = {
        "patient_id": _t.patient_id == current_patient("patient_id"),
        "doctor_id": _t.doctor_id == sa.bindparam("doctor_id"),
        "clinic_id": _t.clinic_id == sa.bindparam("clinic_id"),
        "slot_id": _t.slot_id == sa.bindparam("slot_id"),
        "from_date": _t.date >= sa.bindparam("from_date"),
        "to_date": _t.date <= sa.bindparam("to_date"),
        "after_date": place < after if descending else place > after,
    }
    chosen = [conditions[name] for name in sorted(given & conditions.keys())]
    if restricted:
        chosen.append(within(given, _t))
    size = sa.bindparam("size", type_=sa.Integer)

    def ordered(statement: sa.Select[Any], columns: Sequence[sa.ColumnElement[Any]]) -> sa.Select[Any]:
        return statement.order_by(*(column.desc() if descending else column for column in columns)).limit(size)

    if given & {"patient_id", "doctor_id", "slot_id", "sight_patient", "sight_doctor"}:
        # The list of a patient, a doctor or a slot is short: one scan that skips other states. The planner must not
        # search by state: it does not know that nearly everyone who is checked in is so today, and would read all.
        state = _t.state.concat(sa.literal_column("''"))
        statement = ordered(
            sa.select(*_selected, *_names(_t)).where(*chosen, state.in_([sa.literal_column(f"'{s}'") for s in states])),
            sort_key,
        )
    else:
        # A clinic's list and everyone's are long, and a rare state would be searched for in all of them: one scan a
        # state on the index that the state leads, merged, each no longer than the page.
        each = [
            ordered(
                sa.select(*_selected).where(*chosen, _t.state == sa.literal_column(f"'{state}'")), sort_key
            ).subquery()
            for state in states
        ]
        merged = sa.union_all(*(sa.select(part) for part in each)).subquery()
        start = sa.func.coalesce(merged.c.start_time, schema.FIRST)
        statement = ordered(sa.select(merged, *_names(merged.c)), (merged.c.date, start, merged.c.id))
    return compiled(statement)
