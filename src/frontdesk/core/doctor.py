"""The doctors, and whether they are there on a date."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import sqlalchemy as sa

from frontdesk.core import clinic as clinics
from frontdesk.core.caller import Changed, Intent, claim
from frontdesk.db import schema
from frontdesk.db.database import Database, Taken, Transaction, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.db.records import Records
from frontdesk.errors import REFUSALS, AlreadyExists, CodeTaken, DoctorNotFound, LicenseTaken


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
    is_present: bool
    note: str
    max_patients: int | None


@dataclass(frozen=True, slots=True)
class AvailabilitySet:
    availability: Availability
    affected: list[str]
    """The live appointments of a day that was marked absent, by number."""
    revision: int
    replayed: bool


records = Records(schema.doctor, Doctor, DoctorNotFound)

_TAKEN: dict[str, tuple[type[AlreadyExists], str]] = {
    "doctor_code_key": (CodeTaken, "code"),
    "doctor_license_number_key": (LicenseTaken, "license_number"),
}

_d = schema.doctor_day.c


class Doctors:
    """Take on, read and change doctors; say when they are there."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed

    async def create(self, intent: Intent, values: Mapping[str, Any]) -> tuple[Doctor, bool]:
        """Take a doctor on. Raises ClinicNotFound, CodeTaken, LicenseTaken."""

        async def work(tx: Transaction) -> tuple[Doctor, bool]:
            claimed = await claim(tx, intent, "CreateDoctor")
            if claimed.replayed:
                return await records.get(tx, claimed.result_id), True
            return await records.insert(tx, claimed.result_id, await _in_a_clinic(tx, values)), False

        return await self._unless_taken(work, values)

    async def get(self, doctor_id: str) -> Doctor:
        """Raises DoctorNotFound."""
        return await records.get(self._db, doctor_id)

    async def update(
        self, intent: Intent, doctor_id: str, changes: Mapping[str, Any], version: int | None
    ) -> tuple[Doctor, bool]:
        """Change the given columns. A lowered daily maximum keeps what is booked and takes no more.

        Raises DoctorNotFound, ClinicNotFound, CodeTaken, LicenseTaken, EtagMismatch.
        """

        async def work(tx: Transaction) -> tuple[Doctor, bool]:
            claimed = await claim(tx, intent, "UpdateDoctor")
            if claimed.replayed:
                return await records.get(tx, doctor_id), True
            placed = await _in_a_clinic(tx, changes) if "clinic_id" in changes else changes
            return await records.update(tx, doctor_id, placed, version), False

        return await self._unless_taken(work, changes)

    async def list(self, page: Page, *, specialty: str, clinic_id: str, code: str) -> Listing[Doctor]:
        """Doctors for whom every given filter holds, the oldest first."""
        t = schema.doctor.c
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        if specialty:
            same = sa.func.lower(t.specialty) == sa.func.lower(sa.bindparam("specialty"))
            filters["specialty"] = (same, specialty)
        if clinic_id:
            filters["clinic_id"] = (t.clinic_id == sa.bindparam("clinic_id"), clinic_id)
        if code:
            filters["code"] = (t.code == sa.bindparam("code"), code)
        return await records.page(self._db, page, filters)

    async def set_availability(self, intent: Intent, said: Availability) -> AvailabilitySet:
        """Say whether a doctor is there on a date. What is booked stays booked. Raises DoctorNotFound."""
        answer = await self._db.row(
            "select outcome, subject, replayed, revision, affected, is_present, note, max_patients"
            " from set_availability(%s, %s, %s, %s, %s, %s, %s, %s)",
            (intent.caller, intent.key, intent.fingerprint, said.doctor_id, said.date, said.is_present, said.note,
             said.max_patients),
            lambda *columns: columns,
        )  # fmt: skip
        assert answer is not None
        outcome, subject, replayed, revision, affected, *_ = answer
        if outcome != "OK":
            raise REFUSALS[outcome](subject)
        if not replayed:
            self._changed(said.doctor_id, said.date)
        return AvailabilitySet(said, affected, revision, bool(replayed))

    async def list_availability(
        self, page: Page, doctor_id: str, from_date: date | None, to_date: date | None
    ) -> Listing[Availability]:
        """What was said of a doctor's dates, the earliest first. Raises DoctorNotFound."""
        await records.get(self._db, doctor_id)
        after = page.after[0] if page.after else None
        found = await self._db.rows(
            _availabilities,
            {"doctor": doctor_id, "from": from_date, "to": to_date, "after": after, "size": page.size + 1},
            Availability,
        )
        return cut(page, found, lambda said: (said.date.isoformat(),))

    async def _unless_taken(
        self, work: Callable[[Transaction], Awaitable[tuple[Doctor, bool]]], values: Mapping[str, Any]
    ) -> tuple[Doctor, bool]:
        try:
            return await self._db.transaction(work)
        except Taken as taken:
            if taken.constraint not in _TAKEN:
                raise
            refusal, column = _TAKEN[taken.constraint]
            holder = sa.select(schema.doctor.c.id).where(schema.doctor.c[column] == sa.bindparam("value"))
            raise refusal(await self._db.row(compiled(holder), {"value": values[column]}, str)) from None


_availabilities = compiled(
    sa.select(_d.doctor_id, _d.date, _d.is_present, _d.note, _d.max_patients)
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


async def _in_a_clinic(tx: Transaction, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the clinic they name, or with the default clinic."""
    if values.get("clinic_id"):
        clinic = await clinics.records.get(tx, values["clinic_id"])
        return {**values, "clinic_id": clinic.id}
    default = await tx.row("select id from clinic where is_default", (), str)
    return {**values, "clinic_id": default}
