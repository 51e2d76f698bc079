"""The patients. The same person is found again, never registered twice; a shared phone is no second record."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any
from zoneinfo import ZoneInfo

import sqlalchemy as sa
from psycopg.types.json import Jsonb
from sqlalchemy.dialects.postgresql import JSONB

from frontdesk.core.caller import Caller
from frontdesk.core.formats import e164, folded, require_country
from frontdesk.db import schema
from frontdesk.db.change import Change, Key, claim, note
from frontdesk.db.database import Database, Transaction, compiled
from frontdesk.db.paging import Listing, Page
from frontdesk.db.records import Records
from frontdesk.errors import InvalidField, PatientExists, PatientNotFound


@dataclass(frozen=True, slots=True)
class Patient:
    id: str
    given_name: str
    family_name: str
    birth_date: date | None
    gender: str
    phone: str
    email: str
    blood_group: str
    allergies: list[str]
    emergency_name: str
    emergency_phone: str
    insurances: list[dict[str, str]]
    active: bool
    version: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class Registration:
    """The answer to a registration."""

    patient: Patient
    already_registered: bool


records = Records(schema.patient, Patient, PatientNotFound)

_t = schema.patient.c
_birth = sa.bindparam("birth", type_=sa.Date)
_same_person = compiled(
    sa.select(_t.id)
    .where(
        _t.phone == sa.bindparam("phone"),
        _t.name_key == sa.bindparam("name"),
        sa.or_(_t.birth_date.is_(None), _birth.is_(None), _t.birth_date == _birth),
        _t.id.is_distinct_from(sa.bindparam("but", type_=sa.Uuid)),
    )
    # The one with the very birth date before one that has none.
    .order_by(sa.desc(_t.birth_date.is_not_distinct_from(_birth)), _t.id)
)


class Patients:
    """Register, find and change patients."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def register(
        self, caller: Caller, values: Mapping[str, Any], country: str, *, key: Key
    ) -> Change[Registration]:
        """Find the patient, or create the record.

        The same person is the same phone and the same folded name without a contradicting birth date. `country` reads
        national numbers. Raises InvalidField.
        """
        values = _checked(values, country)
        values |= _name_keys(values)

        async def work(tx: Transaction) -> Change[Registration]:
            claimed = await claim(tx, key)
            if claimed.replayed:
                before = bool(claimed.notes.get("already_registered"))
                return Change(Registration(await records.get(tx, claimed.result_id), before), True)
            found = await _find_person(tx, values["phone"], values["name_key"], values.get("birth_date"))
            if found is None:
                return Change(Registration(await records.insert(tx, claimed.result_id, values), False), False)
            await note(tx, key, found, already_registered=True)
            return Change(Registration(await records.get(tx, found), True), False)

        return await self._db.transaction(work)

    async def get(self, caller: Caller, patient_id: str) -> Patient:
        """Raises PatientNotFound."""
        return await records.get(self._db, patient_id)

    async def update(
        self,
        caller: Caller,
        patient_id: str,
        changes: Mapping[str, Any],
        version: int | None,
        country: str,
        *,
        key: Key,
    ) -> Change[Patient]:
        """Change the given columns. Raises PatientNotFound, PatientExists, EtagMismatch, InvalidField."""

        async def prepare(tx: Transaction, current: Patient | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            if not _PERSON & given.keys():
                return given
            merged = {name: given.get(name, getattr(current, name)) for name in _PERSON}
            keys = _name_keys(merged)
            other = await _find_person(tx, merged["phone"], keys["name_key"], merged["birth_date"], but=patient_id)
            if other is not None:
                raise PatientExists(other)
            return {**given, **keys}

        return await records.update(self._db, key, patient_id, _checked(changes, country), version, prepare)

    async def list(
        self,
        caller: Caller,
        page: Page,
        *,
        phone: str,
        country: str,
        name_prefix: str,
        insurance: Mapping[str, str] | None,
    ) -> Listing[Patient]:
        """Patients for whom every given filter holds, the oldest first. Raises InvalidField."""
        require_country(country, "default_country")
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        if phone:
            filters["phone"] = (_t.phone == sa.bindparam("phone"), e164(phone, country, "phone"))
        if name_prefix:
            filters["name_prefix"] = (sa.or_(_begins(_t.name_key), _begins(_t.family_key)), folded(name_prefix))
        if insurance is not None:
            require_country(insurance["country"], "insurance.country")
            wanted = sa.cast(sa.bindparam("insurance"), JSONB)
            filters["insurance"] = (_t.insurances.contains(wanted), Jsonb([dict(insurance)]))
        return await records.page(self._db, page, filters)


_PERSON = frozenset({"given_name", "family_name", "phone", "birth_date"})
"""The columns that tell persons apart."""


def _name_keys(names: Mapping[str, Any]) -> dict[str, str]:
    family_name = names.get("family_name", "")
    return {"name_key": folded(names["given_name"], family_name), "family_key": folded(family_name)}


def _begins(column: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    # Not LIKE: in a plan that is kept it could use no index for a parameter. These compare code points, as the indexes
    # do, and no code point comes after U+10FFFF.
    prefix = sa.bindparam("name_prefix", type_=sa.Text)
    last: sa.ColumnElement[str] = sa.literal_column(r"U&'\+10FFFF'")
    return sa.and_(column.op("~>=~")(prefix), column.op("~<=~")(sa.func.concat(prefix, last)))


async def _find_person(
    tx: Transaction, phone: str, name_key: str, birth_date: date | None, but: str | None = None
) -> str | None:
    # Locked by phone, in a statement of its own, so that two registrations of one person find each other.
    await tx.run("select lock_all(array['phone/' || %s::text])", (phone,))
    return await tx.row(_same_person, {"phone": phone, "name": name_key, "birth": birth_date, "but": but}, str)


def _checked(values: Mapping[str, Any], country: str) -> dict[str, Any]:
    checked = dict(values)
    require_country(country, "default_country")
    if "phone" in checked:
        checked["phone"] = e164(checked["phone"], country, "patient.phone")
    if "emergency_phone" in checked:
        checked["emergency_phone"] = e164(checked["emergency_phone"], country, "patient.emergency_contact.phone")
    for insurance in checked.get("insurances", ()):
        require_country(insurance["country"], "patient.insurances.country")
    if checked.get("birth_date") is not None and checked["birth_date"] > _latest_today():
        raise InvalidField(("patient.birth_date", "is in the future"))
    return checked


def _latest_today() -> date:
    # A patient belongs to no clinic, so "today" is the furthest that any civil day has come (UTC+14).
    return datetime.now(_FURTHEST).date()


_FURTHEST = ZoneInfo("Pacific/Kiritimati")
