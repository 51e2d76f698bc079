"""The hours of doctors: weekly schedules, exceptions on a date, and the slots that follow from both."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date, datetime
from itertools import accumulate, groupby
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from frontdesk.core import doctor
from frontdesk.core.caller import Caller
from frontdesk.core.decision import asked, iso, refusal
from frontdesk.core.formats import require_order
from frontdesk.core.leave import COLUMNS, Leave, shown_to
from frontdesk.core.slot import AS_SHOWN, LIVE_HOLDS, Slot
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import DoctorNotFound, InvalidField

MOST_DATES_GENERATED = 366
MOST_DATES_SHOWN = 31
_LAST_DATE = date(9999, 12, 30)
"""The last date that has ended before the year 10000 in every time zone."""


@dataclass(frozen=True, slots=True)
class Hours:
    """Hours of a day, in minutes of the clinic's day, filled with visits from `start` on."""

    start: int
    end: int
    visit_length: int
    capacity: int


@dataclass(frozen=True, slots=True)
class WeeklyRule(Hours):
    """Hours of each such weekday."""

    weekday: int
    """1 is Monday."""


@dataclass(frozen=True, slots=True)
class Schedule:
    id: str
    doctor_id: str
    effective_from: date
    effective_until: date | None
    rules: Sequence[WeeklyRule]
    version: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class ScheduleException:
    """What holds on one date in place of the weekly hours."""

    doctor_id: str
    date: date
    closed: bool
    hours: Sequence[Hours]
    version: int
    create_time: datetime
    update_time: datetime


H = TypeVar("H")


@dataclass(frozen=True, slots=True)
class HoursChanged(Generic[H]):
    """What holds now, and the ids of the open slots that the hours before had and these do not have."""

    now: H
    stale_slot_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A visit for which no slot was made."""

    date: date
    start: int | None
    """The minute of the day; None for a closed date."""
    reason: str


@dataclass(frozen=True, slots=True)
class Generated:
    """The slots of a doctor's hours, and the visits that have none."""

    created_count: int
    kept_count: int
    slots: Sequence[Slot]
    skipped_count: int
    skipped: Sequence[Skipped]
    """The first 1,000 of them."""


@dataclass(frozen=True, slots=True)
class Day:
    """One date of a doctor."""

    date: date
    present: bool
    note: str
    leave: Leave | None
    """That of whole days, or the first one of hours."""
    exception: ScheduleException | None
    hours: Sequence[Hours]
    capacity: int
    booked_count: int
    held_count: int
    free_count: int
    slots: Sequence[Slot]


class Schedules:
    """Set and list the hours of doctors, and make slots of them."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def set_weekly(
        self,
        caller: Caller,
        doctor_id: str,
        rules: Sequence[WeeklyRule],
        effective_from: date,
        effective_until: date | None,
        *,
        key: Key,
    ) -> Change[HoursChanged[Schedule]]:
        """Replace a doctor's weekly hours between the dates; past days keep theirs.

        Raises InvalidField, DoctorNotFound, DateInPast.
        """
        if effective_until and effective_until < effective_from:
            raise InvalidField(("effective_until", "is before effective_from"))
        require_hours(rules, "rules")
        request = asked(
            caller,
            key,
            doctor=doctor_id,
            date=iso(effective_from),
            to_date=iso(effective_until),
            hours=[asdict(rule) for rule in sorted(rules, key=lambda rule: (rule.weekday, rule.start))],
        )
        return await self._changed(_set, request, _schedule)

    async def list_weekly(self, caller: Caller, page: Page, doctor_id: str) -> Listing[Schedule]:
        """A doctor's schedules, past ones too, by their first date. Raises DoctorNotFound."""
        await doctor.records.get(self._db, doctor_id)
        values = {"doctor": doctor_id, "after": page.after[0] if page.after else None, "size": page.size + 1}
        found = await self._db.rows(_list, values, _schedule)
        return cut(page, found, lambda schedule: (schedule.effective_from.isoformat(),))

    async def set_exception(
        self,
        caller: Caller,
        doctor_id: str,
        on: date,
        hours: Sequence[Hours] | None,
        version: int | None,
        *,
        key: Key,
    ) -> Change[HoursChanged[ScheduleException]]:
        """Replace the weekly hours on one date; None closes it. `affected` names the appointments that it concerns.

        Raises InvalidField, DoctorNotFound, DateInPast, EtagMismatch.
        """
        require_hours(hours or (), "hours")
        held = [asdict(one) for one in sorted(hours or (), key=lambda one: one.start)]
        request = asked(caller, key, doctor=doctor_id, date=iso(on), closed=hours is None, hours=held, version=version)
        return await self._changed(_except, request, _exception)

    async def delete_exception(
        self, caller: Caller, doctor_id: str, on: date, version: int | None, *, key: Key
    ) -> Change[HoursChanged[ScheduleException]]:
        """Let the weekly hours hold again on one date; the result is the exception that was deleted.

        Raises DoctorNotFound, DateInPast, ScheduleExceptionNotFound, EtagMismatch.
        """
        request = asked(caller, key, doctor=doctor_id, date=iso(on), version=version)
        return await self._changed(_except, request, _exception)

    async def _changed(
        self, statement: str, request: Mapping[str, Any], made: Callable[..., H]
    ) -> Change[HoursChanged[H]]:
        row = await self._db.row(statement, (json.dumps([request]),), lambda *columns: columns)
        assert row is not None
        outcome, subject, details, replayed, affected, stale, *columns = row
        if outcome != "OK":
            raise refusal(outcome, subject, details)
        return Change(HoursChanged(made(*columns), stale), replayed, affected=affected or ())

    async def list_exceptions(
        self, caller: Caller, page: Page, doctor_id: str, from_date: date | None, to_date: date | None
    ) -> Listing[ScheduleException]:
        """A doctor's exceptions, the earliest date first. Raises DoctorNotFound, InvalidField."""
        require_order(from_date, to_date)
        await doctor.records.get(self._db, doctor_id)
        after = page.after[0] if page.after else None
        values = {"doctor": doctor_id, "from": from_date, "to": to_date, "after": after, "size": page.size + 1}
        found = await self._db.rows(_exceptions, values, _exception)
        return cut(page, found, lambda exception: (exception.date.isoformat(),))

    async def generate(
        self, caller: Caller, doctor_id: str, from_date: date, to_date: date, *, validate_only: bool, key: Key
    ) -> Change[Generated]:
        """Create the slots of a doctor's hours on these dates that do not exist yet.

        Raises InvalidField, DoctorNotFound, DoctorInactive.
        """
        require_range(from_date, to_date, MOST_DATES_GENERATED)
        if to_date > _LAST_DATE:
            raise InvalidField(("to_date", f"is after {_LAST_DATE}"))
        request = asked(
            caller, key, doctor=doctor_id, date=iso(from_date), to_date=iso(to_date), validate_only=validate_only
        )
        rows = await self._db.rows(_generate, (json.dumps([request]),), lambda *columns: columns)
        outcome, subject, details, replayed, counts, *_ = rows[0]
        if outcome == "TOO_MANY_VISITS":
            raise InvalidField(("to_date", "makes more than 5,000 visits: shorten the range"))
        if outcome != "OK":
            raise refusal(outcome, subject, details)
        skipped = [Skipped(date.fromisoformat(one["date"]), one["start"], one["reason"]) for one in counts["skipped"]]
        slots = [Slot(*row[6:]) for row in rows if row[5] is not None]
        generated = Generated(counts["created_count"], counts["kept_count"], slots, counts["skipped_count"], skipped)
        return Change(generated, replayed)

    async def days(
        self, caller: Caller, doctor_id: str, from_date: date, to_date: date, insight: Caller | None
    ) -> Sequence[Day]:
        """Every date of the range, the earliest first; `insight` as in `Leaves.get`.

        Raises InvalidField, DoctorNotFound.
        """
        require_range(from_date, to_date, MOST_DATES_SHOWN)
        values = {"doctor": doctor_id, "from": from_date, "to": to_date}
        rows = await self._db.rows(_days, values, lambda *columns: columns)
        if not rows:
            raise DoctorNotFound(doctor_id)
        return [_day([*same], insight) for _, same in groupby(rows, key=lambda row: row[0])]


def require_range(from_date: date, to_date: date, most: int) -> None:
    """Raise InvalidField unless these are 1 to `most` dates."""
    require_order(from_date, to_date)
    if (to_date - from_date).days >= most:
        raise InvalidField(("to_date", f"makes a range of more than {most} dates"))


def require_hours(hours: Sequence[Hours], path: str) -> None:
    """Raise InvalidField unless each holds at least one visit, and none of a day overlap. `path` is the list's."""
    for n, one in enumerate(hours):
        if one.end <= one.start:
            raise InvalidField((f"{path}[{n}].end", "is not after start"))
        if one.visit_length > one.end - one.start:
            raise InvalidField((f"{path}[{n}].visit_length", "is longer than from start to end"))
        for m, other in enumerate(hours[:n]):
            same_day = getattr(one, "weekday", None) == getattr(other, "weekday", None)
            if same_day and one.start < other.end and other.start < one.end:
                raise InvalidField((f"{path}[{n}]", f"overlaps {path}[{m}]"))


def _schedule(*columns: Any) -> Schedule:
    schedule = Schedule(*columns)
    return replace(schedule, rules=[WeeklyRule(**rule) for rule in columns[4]])


_EXCEPTION, _LEAVE, _SLOT = accumulate((7, len(fields(ScheduleException)), len(fields(Leave))))
"""Where the columns of the exception, the leave and the slot (its id, then all) begin in a row of `_days`."""


def _day(rows: Sequence[Sequence[Any]], insight: Caller | None) -> Day:
    on, present, note, hours, capacity, booked, held = rows[0][:_EXCEPTION]
    excepted, away = rows[0][_EXCEPTION:_LEAVE], rows[0][_LEAVE:_SLOT]
    exception = None if excepted[0] is None else _exception(*excepted)
    leave = None if away[0] is None else shown_to(insight, Leave(*away))
    closed = exception is not None and exception.closed
    # Leave of hours closes slots, not the day.
    on_leave = leave is not None and leave.from_date is not None
    return Day(
        on,
        present,
        note,
        leave,
        exception,
        [_hours(one) for one in hours],
        capacity,
        booked,
        held,
        max(capacity - booked - held, 0) if present and not on_leave and not closed else 0,
        [Slot(*row[_SLOT + 1 :]) for row in rows if row[_SLOT] is not None],
    )


def _hours(stored: Mapping[str, Any]) -> Hours:
    """Hours as they are stored, of an exception or of a weekday."""
    return Hours(*(stored[field.name] for field in fields(Hours)))


def _exception(*columns: Any) -> ScheduleException:
    exception = ScheduleException(*columns)
    return replace(exception, hours=[_hours(hours) for hours in columns[3]])


_s, _e = schema.schedule.c, schema.schedule_exception.c
_list = compiled(
    sa.select(*(_s[field.name] for field in fields(Schedule)))
    .where(
        _s.doctor_id == sa.bindparam("doctor"),
        _s.effective_from > sa.func.coalesce(sa.bindparam("after", type_=sa.Date), sa.text("'-infinity'::date")),
    )
    .order_by(_s.effective_from)
    .limit(sa.bindparam("size", type_=sa.Integer))
)
_exceptions = compiled(
    sa.select(*(_e[field.name] for field in fields(ScheduleException)))
    .where(
        _e.doctor_id == sa.bindparam("doctor"),
        _e.date >= sa.func.coalesce(sa.bindparam("from", type_=sa.Date), sa.text("'-infinity'::date")),
        _e.date <= sa.func.coalesce(sa.bindparam("to", type_=sa.Date), sa.text("'infinity'::date")),
        _e.date > sa.func.coalesce(sa.bindparam("after", type_=sa.Date), sa.text("'-infinity'::date")),
    )
    .order_by(_e.date)
    .limit(sa.bindparam("size", type_=sa.Integer))
)


def _decided(attribute: str, shape: type[Any]) -> str:
    columns = ", ".join(f"({attribute}).{field.name}" for field in fields(shape))
    return f"select outcome, subject, details, coalesce(replayed, false), affected, stale, {columns} from decide(%s)"


_set = _decided("schedule", Schedule)
_except = _decided("schedule_exception", ScheduleException)
# What all rows would repeat is in the first alone.
_generate = (
    "select d.outcome, d.subject, d.details, coalesce(d.replayed, false),"
    f" case when coalesce(s.ordinality, 1) = 1 then d.generated end, s.ordinality, {AS_SHOWN}"
    " from decide(%s) d left join lateral unnest(d.slots) with ordinality s on true order by s.ordinality"
)
# One row for each slot, and for each date without slots. Slots are sought by the instants that the dates have in any
# time zone, because a slot keeps the date of its clinic when the doctor moves to another one.
_days = f"""
with day as materialized (
    select x.id as doctor_id, on_date.date, coalesce(dd.is_present, true) as is_present, coalesce(dd.note, '') as note,
           hours_on(x.id, on_date.date) as hours, coalesce(dd.max_patients, x.max_patients_per_day) as capacity,
           (select count(*) from appointment where appointment.doctor_id = x.id and appointment.date = on_date.date
                                               and {schema.HOLDING}) as booked_count,
           (select count(*) from {LIVE_HOLDS.format(of="on_date")}) as held_count,
           (select l.id
            from leaves_over(x.id, on_date.date, on_date.date::timestamp at time zone c.time_zone,
                             (on_date.date + 1)::timestamp at time zone c.time_zone) o
            join leave l on l.id = o.id order by o.whole_days desc, l.start_time limit 1) as leave_id
    from doctor x join clinic c on c.id = x.clinic_id
    cross join (
        select %(doctor)s::uuid as doctor_id, %(from)s::date + n as date
        from generate_series(0, %(to)s::date - %(from)s::date) n
    ) on_date
    left join doctor_day dd on dd.doctor_id = x.id and dd.date = on_date.date
    where x.id = %(doctor)s
)
select day.date, day.is_present, day.note, day.hours, day.capacity, day.booked_count, day.held_count,
       {", ".join(f"e.{field.name}" for field in fields(ScheduleException))}, {COLUMNS}, s.id, {AS_SHOWN}
from day
left join leave l on l.id = day.leave_id
left join schedule_exception e on e.doctor_id = day.doctor_id and e.date = day.date
left join (
    select slot.* from slot
    where doctor_id = %(doctor)s and start_time >= (%(from)s::date - 1)::timestamp at time zone 'UTC'
      and start_time < (%(to)s::date + 2)::timestamp at time zone 'UTC'
) s on s.date = day.date
order by day.date, s.start_time
"""
