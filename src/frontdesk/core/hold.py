"""Holds: places that are kept for some minutes while somebody chooses. `db/sql/hold.sql` decides about them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from typing import Any

from frontdesk.core.caller import Caller
from frontdesk.core.decision import Target, asked, iso, refusal
from frontdesk.db.batch import Batcher
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database
from frontdesk.errors import Refused

DEFAULT_TTL = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Hold:
    id: str
    doctor_id: str
    date: date
    slot_id: str | None
    patient_id: str | None
    expire_time: datetime
    create_time: datetime


_decided = (
    "select d.outcome, d.subject, d.details, coalesce(d.replayed, false), "
    + ", ".join(f"(d.hold).{field.name}" for field in fields(Hold))
    + " from decide(%s) d"
)


def _decision(
    outcome: str, subject: str | None, details: Mapping[str, Any] | None, replayed: bool, *hold: Any
) -> Change[Hold] | Refused:
    if outcome != "OK":
        return refusal(outcome, subject, details)
    return Change(Hold(*hold), replayed)


class Holds:
    """Hold places and release them."""

    def __init__(self, db: Database) -> None:
        self._deciding: Batcher[Change[Hold] | Refused] = Batcher(db, _decided, _decision)

    async def place(
        self, caller: Caller, patient_id: str | None, target: Target, ttl: timedelta, *, key: Key
    ) -> Change[Hold]:
        """Keep a place that BookAppointment would get now, for as long as `ttl`. Raises what HoldPlace names."""
        wanted = {"slot": target.slot_id, "doctor": target.doctor_id, "date": iso(target.on)}
        length = f"{ttl // timedelta(microseconds=1)} microseconds"
        return await self._decide(asked(caller, key, patient=patient_id, ttl=length, **wanted))

    async def release(self, caller: Caller, hold_id: str, *, key: Key) -> Change[Hold]:
        """Give up a hold, if it is live. Raises HoldNotFound, ClinicNotYours."""
        return await self._decide(asked(caller, key, hold=hold_id))

    async def _decide(self, request: Mapping[str, Any]) -> Change[Hold]:
        decided = await self._deciding.ask(request)
        if isinstance(decided, Refused):
            raise decided
        return decided
