"""The bookable intervals of the doctors' days."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from functools import cache
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Caller
from frontdesk.core.decision import asked, iso, refusal
from frontdesk.core.names import folded
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import InvalidField, SlotNotFound


@dataclass(frozen=True, slots=True)
class Slot:
    id: str
    doctor_id: str
    clinic_id: str
    date: date
    start_time: datetime
    end_time: datetime
    capacity: int
    booked_count: int
    held_count: int
    state: str
    block_reason: str
    version: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class NewSlot:
    doctor_id: str
    start_time: datetime
    end_time: datetime
    capacity: int


@dataclass(frozen=True, slots=True)
class SlotFilter:
    """What ListSlots asks for; what is None does not matter."""

    doctor_id: str | None
    clinic_id: str | None
    specialty: str | None
    start_time_from: datetime | None
    start_time_to: datetime | None
    available_only: bool


_s, _a, _dd, _e = schema.slot.c, schema.appointment.c, schema.doctor_day.c, schema.schedule_exception.c
_booked = sa.select(sa.func.count()).where(_a.slot_id == _s.id, schema.HOLDING).scalar_subquery().correlate(schema.slot)


def _state(of: str) -> str:
    """SQL for the state that a slot is shown with; `of` is the slot's table or alias. Leave of hours blocks it."""
    leave = f"leaves_over({of}.doctor_id, {of}.date, {of}.start_time, {of}.end_time)"
    return f"case when exists (select from {leave} l where not l.whole_days) then 'BLOCKED' else {of}.state end"


LIVE_HOLDS = "(select moment() as now offset 0) clock, live_holds({of}.doctor_id, {of}.date, clock.now) h"
"""SQL for FROM: the live holds `h` of a row's doctor-day. With moment() itself as the argument, the planner would not
look into the function."""


def _held(of: str) -> str:
    """SQL for the number of live holds in a slot; `of` is the slot's table or alias."""
    return f"(select count(*) from {LIVE_HOLDS.format(of=of)} where h.slot_id = {of}.id)"


_columns: tuple[sa.ColumnElement[Any], ...] = (
    _s.id, _s.doctor_id, _s.clinic_id, _s.date, _s.start_time, _s.end_time, _s.capacity, _booked,
    sa.literal_column(_held("slot")),
    sa.literal_column(_state("slot")),
    _s.block_reason, _s.version, _s.create_time, _s.update_time,
)  # fmt: skip
_get = compiled(sa.select(*_columns).where(_s.id == sa.bindparam("id")))

AS_SHOWN = ", ".join(
    # Counted now, also for a replay.
    f"(select count(*) from appointment where appointment.slot_id = s.id and {schema.HOLDING})"
    if field.name == "booked_count"
    else _held("s")
    if field.name == "held_count"
    # So is leave.
    else _state("s")
    if field.name == "state"
    else f"s.{field.name}"
    for field in fields(Slot)
)
"""The columns of a `Slot`, in SQL; `s` is the row of the slot."""

_decided = (
    f"select d.outcome, d.subject, d.details, coalesce(d.replayed, false), d.affected, {AS_SHOWN}"
    " from decide(%s) d left join lateral unnest(d.slots) with ordinality s on true order by s.ordinality"
)

_BAD_TIMES = {
    "END_NOT_AFTER_START": ("end_time", "is not after start_time"),
    "OVER_MIDNIGHT": ("end_time", "is not on the clinic's civil day of start_time"),
    "AFTER_9999": ("start_time", "is after the year 9999 in the clinic's time zone"),
}


class Slots:
    """Open, list, block, release and delete slots."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def create(self, caller: Caller, wanted: Sequence[NewSlot], *, path: str, key: Key) -> Change[Sequence[Slot]]:
        """Open the slots, all or none, in their order. `path` is where a request has them, with {} for the index.

        Raises InvalidField, DoctorNotFound, DoctorInactive, SlotInPast, SlotOverlap.
        """
        new_slots = [
            {
                "doctor": slot.doctor_id,
                "start_time": iso(slot.start_time),
                "end_time": iso(slot.end_time),
                "capacity": slot.capacity,
            }
            for slot in wanted
        ]
        return await self._decide(asked(caller, key, new_slots=new_slots), path)

    async def get(self, caller: Caller, slot_id: str) -> Slot:
        """Raises SlotNotFound."""
        found = await self._db.row(_get, {"id": slot_id}, Slot)
        if found is None:
            raise SlotNotFound(slot_id)
        return found

    async def list(self, caller: Caller, page: Page, wanted: SlotFilter) -> Listing[Slot]:
        """Slots for which every given filter holds, by start time, then id. Raises InvalidField."""
        if wanted.start_time_from and wanted.start_time_to and wanted.start_time_to < wanted.start_time_from:
            raise InvalidField(("start_time_to", "is before start_time_from"))
        values = {
            "doctor_id": wanted.doctor_id, "clinic_id": wanted.clinic_id,
            "specialty": wanted.specialty and folded(wanted.specialty),
            "start_time_from": wanted.start_time_from, "start_time_to": wanted.start_time_to,
            "after_time": page.after[0] if page.after else None, "after_id": page.after[1] if page.after else None,
        }  # fmt: skip
        given = frozenset(name for name, value in values.items() if value is not None)
        query = _list_statement(given, wanted.available_only)
        found = await self._db.rows(query, {**values, "size": page.size + 1}, Slot)
        return cut(page, found, lambda slot: (slot.start_time.isoformat(), slot.id))

    async def update(
        self, caller: Caller, slot_id: str, changes: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[Sequence[Slot]]:
        """Change capacity, start_time or end_time. Neither goes against the slot's bookings.

        Raises InvalidField, SlotNotFound, SlotHasBookings, SlotInPast, SlotOverlap, EtagMismatch.
        """
        times = {name: iso(changes.get(name)) for name in ("start_time", "end_time")}
        request = asked(caller, key, slots=[slot_id], version=version, capacity=changes.get("capacity"), **times)
        return await self._decide(request, "slot")

    async def block(self, caller: Caller, slot_ids: Sequence[str], why: str, *, key: Key) -> Change[Sequence[Slot]]:
        """Take slots out of booking; their bookings stay. Raises SlotNotFound."""
        return await self._decide(asked(caller, key, slots=[*slot_ids], reason=why))

    async def release(self, caller: Caller, slot_ids: Sequence[str], *, key: Key) -> Change[Sequence[Slot]]:
        """Open blocked slots again. Raises SlotNotFound."""
        return await self._decide(asked(caller, key, slots=[*slot_ids], reason=""))

    async def delete(self, caller: Caller, slot_id: str, version: int | None, *, key: Key) -> Change[Sequence[Slot]]:
        """Delete a slot without bookings. Raises SlotNotFound, SlotHasBookings, EtagMismatch."""
        return await self._decide(asked(caller, key, slots=[slot_id], version=version))

    async def _decide(self, request: Mapping[str, Any], path: str = "") -> Change[Sequence[Slot]]:
        rows = await self._db.rows(_decided, (json.dumps([request]),), lambda *columns: columns)
        outcome, subject, details, replayed, affected, *_ = rows[0]
        if outcome in _BAD_TIMES:
            field, wrong = _BAD_TIMES[outcome]
            raise InvalidField((f"{path.format((details or {}).get('index'))}.{field}", wrong))
        if outcome != "OK":
            raise refusal(outcome, subject, details)
        slots = [Slot(*slot) for _, _, _, _, _, *slot in rows if slot[0] is not None]
        return Change(slots, replayed, affected=affected or ())


@cache
def _list_statement(given: frozenset[str], available_only: bool) -> str:
    statement = sa.select(*_columns)
    specialist = schema.doctor.alias("specialist").c
    conditions: dict[str, sa.ColumnElement[bool]] = {
        "doctor_id": _s.doctor_id == sa.bindparam("doctor_id"),
        "clinic_id": _s.clinic_id == sa.bindparam("clinic_id"),
        "specialty": sa.exists()
        .where(
            specialist.id == _s.doctor_id,
            specialist.specialty_key == sa.bindparam("specialty"),
        )
        .correlate(schema.slot),
        "start_time_from": _s.start_time >= sa.bindparam("start_time_from"),
        "start_time_to": _s.start_time < sa.bindparam("start_time_to"),
        "after_time": sa.tuple_(_s.start_time, _s.id)
        > sa.tuple_(
            sa.bindparam("after_time", type_=sa.DateTime(timezone=True)), sa.bindparam("after_id", type_=sa.Uuid)
        ),
    }
    for name in sorted(given & conditions.keys()):
        statement = statement.where(conditions[name])
    if available_only:
        doctor, clinic, day = schema.doctor.c, schema.clinic.c, schema.doctor_day
        taken_that_day = (
            sa.select(sa.func.count())
            .where(_a.doctor_id == _s.doctor_id, _a.date == _s.date, schema.HOLDING)
            .scalar_subquery()
            .correlate(schema.slot)
        )
        # One look at the holds for both counts.
        held = (
            sa.select(
                sa.literal_column("count(*)").label("in_day"),
                sa.literal_column("count(*) filter (where h.slot_id = slot.id)").label("in_slot"),
            )
            .select_from(sa.text(LIVE_HOLDS.format(of="slot")))
            .lateral("held")
        )
        statement = (
            statement.join(schema.doctor, doctor.id == _s.doctor_id)
            .join(schema.clinic, clinic.id == _s.clinic_id)
            .outerjoin(day, sa.and_(_dd.doctor_id == _s.doctor_id, _dd.date == _s.date))
            .join(held, sa.true())
            .where(
                _s.state == sa.literal_column("'OPEN'"),
                # As a subquery it is asked once, and can bound the scan of an index.
                _s.start_time > sa.select(sa.func.moment()).scalar_subquery(),
                doctor.active,
                clinic.active,
                sa.func.coalesce(_dd.is_present, sa.true()),
                sa.literal_column(
                    "not exists (select from leaves_over(slot.doctor_id, slot.date, slot.start_time, slot.end_time))"
                ),
                ~sa.exists().where(_e.doctor_id == _s.doctor_id, _e.date == _s.date, _e.closed).correlate(schema.slot),
                _booked + held.c.in_slot < _s.capacity,
                taken_that_day + held.c.in_day < sa.func.coalesce(_dd.max_patients, doctor.max_patients_per_day),
            )
        )
    statement = statement.order_by(_s.start_time, _s.id).limit(sa.bindparam("size", type_=sa.Integer))
    return compiled(statement)
