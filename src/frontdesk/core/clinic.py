"""The clinics, whose time zones decide what today is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Caller
from frontdesk.core.formats import e164, require_country, time_zone
from frontdesk.core.names import folded
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page
from frontdesk.db.records import Permit, Records
from frontdesk.errors import ClinicNotFound, InvalidField, TimeZoneInUse


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
    visit_length: timedelta
    """Of a consultation without a slot, as far as nothing else is known."""
    max_calls: int
    reminders: list[timedelta]
    """How long before a visit its patient is reminded; 0 alone means never."""
    offer_ttl: timedelta
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
        return await records.create(self._db, key, values, _checked)

    async def get(self, caller: Caller, clinic_id: str) -> Clinic:
        """Raises ClinicNotFound."""
        return await records.get(self._db, clinic_id)

    async def update(
        self, caller: Caller, clinic_id: str, changes: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[Clinic]:
        """Change the given columns.

        Raises ClinicNotFound, ClinicNotYours, TimeZoneInUse, EtagMismatch, InvalidField.
        """
        return await records.update(self._db, key, clinic_id, changes, version, _checked, permit=_permit(caller))

    async def list(self, caller: Caller, page: Page, *, city: str) -> Listing[Clinic]:
        """Clinics, of one city if given, the oldest first."""
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        if city:
            filters["city"] = (schema.clinic.c.city_key == sa.bindparam("city"), folded(city))
        return await records.page(self._db, page, filters)


def _permit(caller: Caller) -> Permit:
    return lambda clinic: caller.require_clinic(clinic["id"])


async def _checked(tx: Transaction, current: Clinic | None, values: Mapping[str, Any]) -> Mapping[str, Any]:
    checked = dict(values)
    country = values.get("country", current.country if current is not None else "")
    require_country(country, "clinic.country")
    if "reminders" in checked:
        _check_reminders(checked["reminders"])
    if "phone" in checked:
        checked["phone"] = e164(checked["phone"], country, "clinic.phone")
    if "city" in checked:
        checked["city_key"] = folded(checked["city"])
    if "time_zone" in checked and (current is None or checked["time_zone"] != current.time_zone):
        await _require_zone(tx, checked["time_zone"])
        if current is not None:
            await _require_unused_zone(tx, current.id)
    return checked


def _check_reminders(reminders: Sequence[timedelta]) -> None:
    if len(set(reminders)) < len(reminders):
        raise InvalidField(("clinic.reminders", "has one length twice"))
    if any(before < timedelta(minutes=1) for before in reminders) and reminders != [timedelta()]:
        raise InvalidField(("clinic.reminders", "has a length below 1 minute; 0 stands alone"))


async def _require_zone(tx: Transaction, name: str) -> None:
    # PostgreSQL computes the clinic's days, so it must know the name and mean the same by it.
    zone = time_zone(name)
    if zone is None:
        raise InvalidField(("clinic.time_zone", "is not an IANA time zone"))
    offsets = await tx.row("select zone_offsets(%s)", (name,), lambda found: found)
    first_days = (datetime(2012 + n // 12, n % 12 + 1, 1, 12, tzinfo=UTC) for n in range(60))
    if offsets != [(day.astimezone(zone).utcoffset() or timedelta()).total_seconds() for day in first_days]:
        raise InvalidField(("clinic.time_zone", "is not a time zone that PostgreSQL reads as the IANA database does"))


async def _require_unused_zone(tx: Transaction, clinic_id: str) -> None:
    # Under the clinic's row lock, for which those who create or move slots wait. No slot is longer than a day.
    found = await tx.row(
        "select (select count(*) from slot where clinic_id = %(clinic)s and start_time > moment() - interval '1 day'"
        " and end_time > moment()),"
        " (select count(*) from appointment where clinic_id = %(clinic)s and is_live(state)"
        " and date >= (moment() - interval '2 days')::date and end_time > moment())",
        {"clinic": clinic_id},
        lambda slots, appointments: {"slots": slots, "appointments": appointments},
    )
    assert found is not None
    if any(found.values()):
        raise TimeZoneInUse(clinic_id, found)
