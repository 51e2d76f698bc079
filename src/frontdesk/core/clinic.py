"""The clinics, whose time zones decide what today is."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Caller
from frontdesk.core.formats import e164, require_country, require_zone
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page
from frontdesk.db.records import Records
from frontdesk.errors import ClinicNotFound


@dataclass(frozen=True, slots=True)
class Clinic:
    id: str
    name: str
    address: str
    city: str
    state: str
    postal_code: str
    country: str
    phone: str
    email: str
    time_zone: str
    active: bool
    version: int
    create_time: datetime
    update_time: datetime


records = Records(schema.clinic, Clinic, ClinicNotFound)


class Clinics:
    """Open, read and change clinics."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def create(self, caller: Caller, values: Mapping[str, Any], *, key: Key) -> Change[Clinic]:
        """Open a clinic. Raises InvalidField."""
        return await records.create(self._db, key, _checked(values, values.get("country", "")))

    async def get(self, caller: Caller, clinic_id: str) -> Clinic:
        """Raises ClinicNotFound."""
        return await records.get(self._db, clinic_id)

    async def update(
        self, caller: Caller, clinic_id: str, changes: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[Clinic]:
        """Change the given columns. Raises ClinicNotFound, EtagMismatch, InvalidField."""

        async def prepare(tx: Transaction, current: Clinic | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            return _checked(given, given.get("country", current.country))

        return await records.update(self._db, key, clinic_id, changes, version, prepare)

    async def list(self, caller: Caller, page: Page, *, city: str) -> Listing[Clinic]:
        """Clinics, of one city if given, the oldest first."""
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        if city:
            filters["city"] = (sa.func.lower(schema.clinic.c.city) == sa.func.lower(sa.bindparam("city")), city)
        return await records.page(self._db, page, filters)


def _checked(values: Mapping[str, Any], country: str) -> dict[str, Any]:
    checked = dict(values)
    require_country(country, "clinic.country")
    if "time_zone" in checked:
        require_zone(checked["time_zone"], "clinic.time_zone")
    if "phone" in checked:
        checked["phone"] = e164(checked["phone"], country, "clinic.phone")
    return checked
