"""The hours of doctors: weekly schedules, exceptions on a date, and the slots that follow from both."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, datetime
from typing import Any

import sqlalchemy as sa

from frontdesk.core import doctor
from frontdesk.core.caller import Caller
from frontdesk.core.decision import asked, iso, refusal
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import InvalidField


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
class ScheduleSet:
    """A schedule, and the open slots of the hours before."""

    schedule: Schedule
    stale_slot_ids: Sequence[str]


class Schedules:
    """Set and list the hours of doctors."""

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
    ) -> Change[ScheduleSet]:
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
        row = await self._db.row(_set, (json.dumps([request]),), lambda *columns: columns)
        assert row is not None
        outcome, subject, details, replayed, stale, *schedule = row
        if outcome != "OK":
            raise refusal(outcome, subject, details)
        return Change(ScheduleSet(_schedule(*schedule), stale), replayed)

    async def list_weekly(self, caller: Caller, page: Page, doctor_id: str) -> Listing[Schedule]:
        """A doctor's schedules, past ones too, by their first date. Raises DoctorNotFound."""
        await doctor.records.get(self._db, doctor_id)
        values = {"doctor": doctor_id, "after": page.after[0] if page.after else None, "size": page.size + 1}
        found = await self._db.rows(_list, values, _schedule)
        return cut(page, found, lambda schedule: (schedule.effective_from.isoformat(),))


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


_s = schema.schedule.c
_list = compiled(
    sa.select(
        _s.id, _s.doctor_id, _s.effective_from, _s.effective_until, _s.rules, _s.version, _s.create_time, _s.update_time
    )
    .where(
        _s.doctor_id == sa.bindparam("doctor"),
        _s.effective_from > sa.func.coalesce(sa.bindparam("after", type_=sa.Date), sa.text("'-infinity'::date")),
    )
    .order_by(_s.effective_from)
    .limit(sa.bindparam("size", type_=sa.Integer))
)
_set = (
    "select outcome, subject, details, coalesce(replayed, false), stale,"
    " (schedule).id, (schedule).doctor_id, (schedule).effective_from, (schedule).effective_until, (schedule).rules,"
    " (schedule).version, (schedule).create_time, (schedule).update_time from decide(%s)"
)
