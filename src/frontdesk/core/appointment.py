"""Bookings and the life of a visit. Who gets a place, and which verb goes from which state, is decided in
`db/sql/appointments.sql`, under the doctor-day's lock; here each decision is one statement."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Changed, Intent
from frontdesk.db import schema
from frontdesk.db.batch import Batcher
from frontdesk.db.database import Database, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import REFUSALS, AppointmentNotFound, InvalidField, Refused


@dataclass(frozen=True, slots=True)
class Appointment:
    """A booking and its visit; from `ticket` on, its place in the line."""

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
    version: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class Decision:
    """A change that was made, now or by an earlier call with the same key."""

    replayed: bool
    revision: int
    """Of the doctor-day that the appointment is on."""
    vacated_revision: int | None
    """Of the doctor-day that it was on before; RescheduleAppointment alone."""
    vacated_doctor: str | None
    vacated_date: date | None
    position: int
    """1 = next; 0 where the patient is not waiting."""
    patient_name: str
    appointment: Appointment


@dataclass(frozen=True, slots=True)
class Target:
    """What is booked: a place of a slot, or of a doctor's day."""

    slot_id: str | None = None
    doctor_id: str | None = None
    on: date | None = None


@dataclass(frozen=True, slots=True)
class AppointmentFilter:
    """What ListAppointments asks for; what is None does not matter."""

    patient_id: str | None
    doctor_id: str | None
    clinic_id: str | None
    states: tuple[str, ...]
    """Empty means every state."""
    from_date: date | None
    to_date: date | None
    descending: bool


_COLUMNS = tuple(field.name for field in fields(Appointment))
_t = schema.appointment.c
_selected = [_t[name] for name in _COLUMNS]
_get = compiled(sa.select(*_selected).where(_t.id == sa.bindparam("id")))
_answer = (
    "select d.outcome, d.subject, d.detail, coalesce(d.replayed, false), coalesce(d.revision, 0), d.vacated_revision,"
    " d.vacated_doctor, d.vacated_date, coalesce(d.position, 0), coalesce(d.patient_name, ''), "
    + ", ".join(f"(d.appointment).{name}" for name in _COLUMNS)
    + " from "
)


def _decision(outcome: str, subject: str | None, detail: str | None, *columns: Any) -> Decision | Refused:
    if outcome != "OK":
        return REFUSALS[outcome](subject, detail)
    made: list[Any] = [*columns[:7], Appointment(*columns[7:])]
    return Decision(*made)


class Appointments:
    """Book, move, list, call and end visits."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed
        self._deciding = Batcher(db, f"{_answer}decide(%s) d", _decision)

    async def book(
        self, intent: Intent, patient_id: str, target: Target, *, reason: str, notes: str, validate_only: bool
    ) -> Decision:
        """Book a place, never over the capacity of the slot or of the doctor-day.

        `validate_only` changes nothing and answers what would be booked now. Raises what BookAppointment names.
        """
        return await self._decide(
            "Book", "BookAppointment", intent, patient=patient_id, slot=target.slot_id, doctor=target.doctor_id,
            date=_day(target.on), reason=reason, notes=notes, validate_only=validate_only,
        )  # fmt: skip

    async def reschedule(self, intent: Intent, appointment_id: str, target: Target, version: int | None) -> Decision:
        """Move a BOOKED appointment; the old place is given up only if the new one is got.

        Raises what RescheduleAppointment names.
        """
        return await self._decide(
            "Reschedule", "RescheduleAppointment", intent, appointment=appointment_id, version=version,
            slot=target.slot_id, doctor=target.doctor_id, date=_day(target.on),
        )  # fmt: skip

    async def update(
        self, intent: Intent, appointment_id: str, version: int | None, *, reason: str | None, notes: str | None
    ) -> Decision:
        """Change reason and notes; None keeps one. Raises AppointmentNotFound, EtagMismatch."""
        return await self._decide(
            "Update", "UpdateAppointment", intent, appointment=appointment_id, version=version, reason=reason,
            notes=notes,
        )  # fmt: skip

    async def change(
        self, intent: Intent, method: str, verb: str, appointment_id: str, *,
        version: int | None = None, text: str = "", patient_id: str | None = None,
    ) -> Decision:  # fmt: skip
        """One transition of the visit or of the line: a verb of the table in `change_visit`.

        `method` is the RPC that the idempotency key belongs to. Raises AppointmentNotFound, InvalidTransition,
        EtagMismatch, and what the verb names.
        """
        return await self._decide(
            verb, method, intent, appointment=appointment_id, version=version, text=text, patient=patient_id
        )

    async def call_next(self, intent: Intent, doctor_id: str, on: date | None, room: str) -> Decision:
        """Call the first waiting patient to `room`. Raises DoctorNotFound, QueueEmpty."""
        return await self._decide("CallNext", "CallNext", intent, doctor=doctor_id, date=_day(on), text=room)

    async def get(self, appointment_id: str) -> Appointment:
        """Raises AppointmentNotFound."""
        found = await self._db.row(_get, {"id": appointment_id}, Appointment)
        if found is None:
            raise AppointmentNotFound(appointment_id)
        return found

    async def list(self, page: Page, wanted: AppointmentFilter) -> Listing[Appointment]:
        """Appointments for which every given filter holds, by date, then id. Raises InvalidField."""
        if not (wanted.patient_id or wanted.doctor_id or wanted.clinic_id or (wanted.from_date and wanted.to_date)):
            raise InvalidField(("from_date", "a patient, a doctor, a clinic or both dates are required"))
        if wanted.from_date and wanted.to_date:
            days = (wanted.to_date - wanted.from_date).days
            if days < 0:
                raise InvalidField(("to_date", "is before from_date"))
            if days > 30 and not (wanted.patient_id or wanted.doctor_id or wanted.clinic_id):
                raise InvalidField(("to_date", "at most 31 days without a patient, a doctor or a clinic"))
        values = {
            "patient_id": wanted.patient_id, "doctor_id": wanted.doctor_id, "clinic_id": wanted.clinic_id,
            "from_date": wanted.from_date, "to_date": wanted.to_date,
            "after_date": page.after[0] if page.after else None, "after_id": page.after[1] if page.after else None,
        }  # fmt: skip
        given = frozenset(name for name, value in values.items() if value is not None)
        states = tuple(sorted(set(wanted.states or schema.VISIT_STATES)))
        query = _list_statement(given, states, wanted.descending)
        found: Sequence[Appointment] = await self._db.rows(query, {**values, "size": page.size + 1}, Appointment)
        return cut(page, found, lambda appointment: (appointment.date.isoformat(), appointment.id))

    async def _decide(self, verb: str, method: str, intent: Intent, **request: str | int | bool | None) -> Decision:
        # Tells the watchers what changed, and raises what is refused. `request` is the rest of SQL's type of that name.
        decision = await self._deciding.ask(
            {
                "verb": verb, "method": method, "caller": intent.caller, "key": intent.key,
                "fingerprint": "\\x" + intent.fingerprint.hex(), **request,
            }
        )  # fmt: skip
        if isinstance(decision, Refused):
            raise decision
        if not decision.replayed and decision.revision:
            self._changed(decision.appointment.doctor_id, decision.appointment.date)
            if decision.vacated_doctor is not None and decision.vacated_date is not None:
                self._changed(decision.vacated_doctor, decision.vacated_date)
        return decision


def _day(on: date | None) -> str | None:
    return None if on is None else on.isoformat()


@cache
def _list_statement(given: frozenset[str], states: tuple[str, ...], descending: bool) -> str:
    later = sa.tuple_(sa.bindparam("after_date", type_=sa.Date), sa.bindparam("after_id", type_=sa.Uuid))
    place = sa.tuple_(_t.date, _t.id)
    conditions: dict[str, sa.ColumnElement[bool]] = {
        "patient_id": _t.patient_id == sa.bindparam("patient_id"),
        "doctor_id": _t.doctor_id == sa.bindparam("doctor_id"),
        "clinic_id": _t.clinic_id == sa.bindparam("clinic_id"),
        "from_date": _t.date >= sa.bindparam("from_date"),
        "to_date": _t.date <= sa.bindparam("to_date"),
        "after_date": place < later if descending else place > later,
    }
    chosen = [conditions[name] for name in sorted(given & conditions.keys())]
    size = sa.bindparam("size", type_=sa.Integer)

    def ordered(statement: sa.Select[Any], columns: Sequence[sa.ColumnElement[Any]]) -> sa.Select[Any]:
        return statement.order_by(*(column.desc() if descending else column for column in columns)).limit(size)

    if given & {"patient_id", "doctor_id"}:
        # A patient's or a doctor's list is short: one scan, other states passed over. Of the state as it stands the
        # planner would make too much: that nearly everyone who is checked in is so today it does not know, and it would
        # read those of the whole service.
        state = _t.state.concat(sa.literal_column("''"))
        statement = ordered(
            sa.select(*_selected).where(*chosen, state.in_([sa.literal_column(f"'{s}'") for s in states])),
            (_t.date, _t.id),
        )
    else:
        # A clinic's list and everyone's are long, and a rare state would be searched for in all of them: one scan a
        # state on the index that the state leads, merged, each no longer than the page.
        each = [
            ordered(
                sa.select(*_selected).where(*chosen, _t.state == sa.literal_column(f"'{state}'")), (_t.date, _t.id)
            ).subquery()
            for state in states
        ]
        merged = sa.union_all(*(sa.select(part) for part in each)).subquery()
        statement = ordered(sa.select(merged), (merged.c.date, merged.c.id))
    return compiled(statement)
