"""The audit: who did what. Rows of the log come here from `db/sql/change.sql`, `db/change.py` and `core/notes.py`."""

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime, timedelta
from functools import cache
from typing import Any

from frontdesk.core.caller import Caller
from frontdesk.db.database import Database
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import InvalidField


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One thing that was done or refused."""

    id: str
    time: datetime
    actor: str
    method: str
    resource: str | None
    clinic_id: str | None
    patient_id: str | None
    outcome: str
    count: int
    address: str
    trace_id: str
    over_capacity: bool
    """The change gave a place above the capacity of the doctor-day."""


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """What ListAuditEvents asks for; what is None does not matter."""

    patient_id: str | None
    actor: str | None
    resource: str | None
    method: str | None
    time_from: datetime | None
    time_to: datetime | None


_COLUMNS = ", ".join(
    "coalesce((data->>'over_capacity')::boolean, false)" if field.name == "over_capacity" else field.name
    for field in fields(AuditEvent)
)
_APPOINTMENT = re.compile("appointments/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_DOCTOR_DAY = re.compile("doctorDays/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/([0-9]{4}-[0-9]{2}-[0-9]{2})")

_CONDITIONS = {
    "patient_id": "(patient_id = any (same_record(%(patient_id)s)) or patient_ids && same_record(%(patient_id)s))",
    "actor": "actor = %(actor)s",
    "method": "method = %(method)s",
    # No index has the resource of a change of a doctor-day, which would pay for it: it is found by its ids.
    "resource": "resource = %(resource)s and revision = 0",
    "of_appointment": (
        "(resource = %(resource)s and revision = 0 or appointment_id = %(of_appointment)s and revision > 0"
        " and patient_id = any (same_record((select a.patient_id from appointment a where a.id = %(of_appointment)s))))"
    ),
    "of_doctor": (
        "(resource = %(resource)s and revision = 0"
        " or doctor_id = %(of_doctor)s and date = %(of_date)s and revision > 0 and resource = %(resource)s)"
    ),
    # Ids have the time in them, and lead to the place in an index; some are made a little later than the time is read.
    "time_from": "id >= %(first_id)s and time >= %(time_from)s",
    "time_to": "id < %(last_id)s and time < %(time_to)s",
    "after": "id < %(after)s",
}
_LATE = timedelta(seconds=10)


class Audit:
    """Shows the log to administrators of all clinics."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def list(self, caller: Caller, page: Page, wanted: AuditFilter) -> Listing[AuditEvent]:
        """What was done, the newest first. Raises InvalidField."""
        if wanted.time_from and wanted.time_to and wanted.time_to < wanted.time_from:
            raise InvalidField(("time_to", "is before time_from"))
        values: dict[str, Any] = {
            field.name: value for field in fields(wanted) if (value := getattr(wanted, field.name)) is not None
        }
        conditions = set(values)
        if wanted.resource is not None:
            if found := _APPOINTMENT.fullmatch(wanted.resource):
                values["of_appointment"] = found[1]
                conditions = conditions - {"resource"} | {"of_appointment"}
            elif found := _DOCTOR_DAY.fullmatch(wanted.resource):
                try:
                    values |= {"of_doctor": found[1], "of_date": date.fromisoformat(found[2])}
                except ValueError:
                    raise InvalidField(("resource", "is not a resource")) from None
                conditions = conditions - {"resource"} | {"of_doctor"}
        if wanted.time_from is not None:
            values["first_id"] = _first_id(wanted.time_from)
        if wanted.time_to is not None:
            values["last_id"] = _first_id(wanted.time_to + _LATE)
        if page.after is not None:
            values["after"] = page.after[0]
            conditions |= {"after"}
        query = _list_statement(frozenset(conditions))
        found_rows = await self._db.rows(query, {**values, "size": page.size + 1}, AuditEvent)
        return cut(page, found_rows, lambda event: (event.id,))


@cache
def _list_statement(conditions: Collection[str]) -> str:
    where = " and ".join(_CONDITIONS[name] for name in sorted(conditions)) or "true"
    # Those of a patient, an appointment or a doctor-day are few: found first, and sorted then. The planner might read
    # the whole log in the order of ids until it has a page of them.
    fence = "offset 0" if {"patient_id", "of_appointment", "of_doctor"} & {*conditions} else ""
    return f"select {_COLUMNS} from (select * from log where {where} {fence}) found order by id desc limit %(size)s"


def _first_id(time: datetime) -> uuid.UUID:
    """The lowest id with that time."""
    milliseconds = int((time - datetime(1970, 1, 1, tzinfo=UTC)) / timedelta(milliseconds=1))
    return uuid.UUID(int=min(milliseconds, 2**48 - 1) << 80)
