"""The doctors, and whether they are there on a date."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import sqlalchemy as sa

from frontdesk.core import clinic
from frontdesk.core.caller import Caller
from frontdesk.core.decision import Changed, asked, iso, refusal
from frontdesk.core.formats import require_order
from frontdesk.core.names import folded
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, Transaction, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.db.records import Permit, Records
from frontdesk.errors import CodeTaken, DoctorNotFound, LicenseTaken, Refused


@dataclass(frozen=True, slots=True)
class Doctor:
    id: str
    code: str
    display_name: str
    specialty: str
    license_number: str
    qualifications: str
    experience_years: int
    clinic_id: str
    max_patients_per_day: int
    active: bool
    version: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class Availability:
    """What was said of one doctor-day."""

    doctor_id: str
    date: date
    is_present: bool | None
    """None in a change keeps it as it was."""
    note: str
    max_patients: int | None
    version: int | None


records = Records(
    schema.doctor,
    Doctor,
    DoctorNotFound,
    taken={
        "doctor_code_key": (CodeTaken, "code"),
        "doctor_license_number_key": (LicenseTaken, "license_number"),
    },
)

_d = schema.doctor_day.c


class Doctors:
    """Take on, read and change doctors; say when they are there."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed

    async def create(self, caller: Caller, values: Mapping[str, Any], *, key: Key) -> Change[Doctor]:
        """Take a doctor on. Raises ClinicNotFound, ClinicNotYours, CodeTaken, LicenseTaken."""
        return await records.create(self._db, key, values, _completed, permit=_permit(caller))

    async def get(self, caller: Caller, doctor_id: str) -> Doctor:
        """Raises DoctorNotFound."""
        return await records.get(self._db, doctor_id)

    async def update(
        self, caller: Caller, doctor_id: str, changes: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[Doctor]:
        """Change the given columns. A lowered daily maximum keeps the bookings and takes no more.

        Raises DoctorNotFound, ClinicNotFound, ClinicNotYours, CodeTaken, LicenseTaken, EtagMismatch.
        """
        permit = _permit(caller)
        return await records.update(self._db, key, doctor_id, changes, version, _completed, permit=permit)

    async def list(self, caller: Caller, page: Page, *, specialty: str, clinic_id: str, code: str) -> Listing[Doctor]:
        """Doctors for whom every given filter holds, the oldest first."""
        t = schema.doctor.c
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        if specialty:
            filters["specialty"] = (t.specialty_key == sa.bindparam("specialty"), folded(specialty))
        if clinic_id:
            filters["clinic_id"] = (t.clinic_id == sa.bindparam("clinic_id"), clinic_id)
        if code:
            filters["code"] = (t.code == sa.bindparam("code"), code)
        return await records.page(self._db, page, filters)

    async def set_availability(self, caller: Caller, wanted: Availability, *, key: Key) -> Change[Availability]:
        """Say whether a doctor is there on a date. What is booked stays booked; `affected` names it if he is absent.

        Raises DoctorNotFound, EtagMismatch.
        """
        request = asked(
            caller,
            key,
            doctor=wanted.doctor_id,
            date=iso(wanted.date),
            is_present=wanted.is_present,
            notes=wanted.note,
            max_patients=wanted.max_patients,
            version=wanted.version,
        )
        change = await self._db.row(_decided, (json.dumps([request]),), _change)
        assert change is not None
        if isinstance(change, Refused):
            raise change
        if not change.replayed:
            self._changed(wanted.doctor_id, wanted.date)
        return change

    async def list_availability(
        self, caller: Caller, page: Page, doctor_id: str, from_date: date | None, to_date: date | None
    ) -> Listing[Availability]:
        """What was set for a doctor's dates, the earliest first. Raises DoctorNotFound, InvalidField."""
        require_order(from_date, to_date)
        await records.get(self._db, doctor_id)
        after = page.after[0] if page.after else None
        found = await self._db.rows(
            _availabilities,
            {"doctor": doctor_id, "from": from_date, "to": to_date, "after": after, "size": page.size + 1},
            Availability,
        )
        return cut(page, found, lambda said: (said.date.isoformat(),))


_availabilities = compiled(
    sa.select(_d.doctor_id, _d.date, _d.is_present, _d.note, _d.max_patients, _d.availability_version)
    .where(
        _d.doctor_id == sa.bindparam("doctor"),
        _d.is_present.is_not(None),
        _d.date >= sa.func.coalesce(sa.bindparam("from", type_=sa.Date), sa.text("'-infinity'::date")),
        _d.date <= sa.func.coalesce(sa.bindparam("to", type_=sa.Date), sa.text("'infinity'::date")),
        _d.date > sa.func.coalesce(sa.bindparam("after", type_=sa.Date), sa.text("'-infinity'::date")),
    )
    .order_by(_d.date)
    .limit(sa.bindparam("size", type_=sa.Integer))
)


_decided = (
    "select outcome, subject, details, coalesce(replayed, false), revision, affected,"
    " (day).doctor_id, (day).date, (day).is_present, (day).note, (day).max_patients,"
    " (day).availability_version from decide(%s)"
)


def _change(
    outcome: str, subject: str, details: dict[str, Any], replayed: bool, revision: int, affected: list[str], *day: Any
) -> Change[Availability] | Refused:
    if outcome != "OK":
        return refusal(outcome, subject, details)
    return Change(Availability(*day), replayed, revision, affected=affected)


def _permit(caller: Caller) -> Permit:
    return lambda doctor: caller.require_clinic(doctor["clinic_id"])


async def _completed(tx: Transaction, current: Doctor | None, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with what follows from them; a new doctor without a clinic belongs to the default clinic."""
    values = dict(values)
    if "specialty" in values:
        values["specialty_key"] = folded(values["specialty"])
    if values.get("clinic_id"):
        values["clinic_id"] = (await clinic.records.get(tx, values["clinic_id"])).id
    elif current is None or "clinic_id" in values:
        values["clinic_id"] = await tx.row("select id from clinic where is_default", (), str)
    if current is not None and values.get("clinic_id", current.clinic_id) != current.clinic_id:
        # The hours are of another clock from now on.
        await tx.run(_lock_hours, (current.id,))
        await tx.run(_generate_again, (current.id,))
    return values


_lock_hours = "select lock_all(array[schedule_name(%s)])"
_generate_again = "select generate_again(%s, daterange(null, null))"
