"""The patients. The same person is found again, never registered twice; a shared phone is no second record."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Caller
from frontdesk.core.decision import Changed, asked, refusal
from frontdesk.core.formats import e164, insurance_key, require_country
from frontdesk.core.names import folded, sought_words
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.db.records import Records
from frontdesk.errors import InvalidField, PatientAmbiguous, PatientNotFound, RoleRequired


@dataclass(frozen=True, slots=True)
class Patient:
    id: str
    given_name: str
    family_name: str
    birth_date: str
    """As much as is known, in ISO 8601: 1980-05-05, 1980-05, 1980 or nothing."""
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


_t = schema.patient.c
_KEPT = _t.merged_into.is_(None)
_keys = sa.bindparam("insurance", type_=_t.insurance_keys.type)
# Looked up first. The planner takes a number for frequent, and would read all patients in the order of their ids.
_OF_NUMBER = _t.id == sa.any_(
    sa.func.array(sa.select(_t.id).where(_t.insurance_keys.op("@>")(_keys), _KEPT).correlate(None).scalar_subquery())
)
_COLUMNS = [field.name for field in fields(Patient)]
_BAD_BIRTH_DATES = {
    "BIRTH_DATE_IN_FUTURE": "is in the future",
    "BIRTH_DATE_TOO_EARLY": "is more than 130 years ago",
}

records = Records(schema.patient, Patient, PatientNotFound)

_get = f"select {', '.join(_COLUMNS)} from patient p where id = current_patient(%(patient)s)"
_get_in_sight = f"""{_get} and (id = current_patient(%(own)s) or exists (
    select from appointment a where a.patient_id = p.id and a.doctor_id = %(doctor)s))
"""
_DESKS_OWN = ("insurances", "active")
"""What a patient may not change in the own record."""
_decided = (
    "select d.outcome, d.subject, d.details, coalesce(d.replayed, false), coalesce(d.already_registered, false),"
    f" coalesce(d.days, '[]'), {', '.join(f'(d.patient).{name}' for name in _COLUMNS)} from decide(%s) d"
)
_searched = (
    f"select word, {', '.join(f'(patient).{name}' for name in _COLUMNS)}"
    " from search_patients(%(words)s, %(after_word)s, %(after_id)s, %(size)s)"
)


class Patients:
    """Register, find, change and merge patients."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed

    async def register(
        self, caller: Caller, values: Mapping[str, Any], country: str, *, key: Key
    ) -> Change[Registration]:
        """Find the patient, or create the record.

        The same person has the same phone, the same name as `names.folded` has it, and no contradicting birth date; a
        found record takes a birth date that says more. `country` reads national numbers. Raises PatientAmbiguous if
        the person may be one of several, InvalidField.
        """
        return await self._decide(asked(caller, key, record=_record(values, country)))

    async def register_unknown(
        self, tx: Transaction, caller: Caller, values: Mapping[str, Any], country: str, *, key: Key
    ) -> str | None:
        """Create the record in this transaction; its id. None if the person is on file, or may be: nothing is changed.

        Raises InvalidField.
        """
        inner = replace(key, method="RegisterPatient", name="")
        request = asked(caller, inner, record=_record(values, country))
        try:
            async with tx.savepoint():
                answer = await tx.row(_decided, (json.dumps([request]),), _registered)
                assert answer is not None
                if answer.result.already_registered:
                    raise _OnFile
                return answer.result.patient.id
        except (_OnFile, PatientAmbiguous):
            return None

    async def get(self, caller: Caller, patient_id: str) -> Patient:
        """The patient; of a merged record, the kept one. Raises PatientNotFound.

        A doctor sees those who have or had an appointment with him.
        """
        if caller.everywhere:
            found = await self._db.row(_get, {"patient": patient_id}, Patient)
        else:
            assert caller.sight is not None
            values = {"patient": patient_id, "own": caller.sight.patient_id, "doctor": caller.sight.doctor_id}
            found = await self._db.row(_get_in_sight, values, Patient)
        if found is None:
            raise PatientNotFound(patient_id)
        return found

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
        """Change the given columns.

        Raises PatientNotFound, PatientExists, EtagMismatch, InvalidField, and RoleRequired if a patient would change
        what is the desk's.
        """
        if not caller.everywhere:
            for name in _DESKS_OWN:
                if name in changes:
                    raise RoleRequired(details={"method": key.method, "field": name})
        record = _record(changes, country)
        change = await self._decide(asked(caller, key, patient=patient_id, version=version, record=record))
        return Change(change.result.patient, change.replayed)

    async def merge(self, caller: Caller, keep_id: str, merge_id: str, *, key: Key) -> Change[Patient]:
        """Make two records of one person one; the id of the other one stands for the kept one from now on.

        Raises PatientNotFound, SamePatient, DuplicateBooking, PatientOverlap, InvalidField.
        """
        if keep_id.lower() == merge_id.lower():
            raise InvalidField(("merge_patient_id", "is the id of the patient to keep"))
        change = await self._decide(asked(caller, key, keep=keep_id, patient=merge_id))
        return Change(change.result.patient, change.replayed)

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
        """Patients for whom every given filter holds.

        The oldest first; if only a name is sought, by the word of theirs that matches, then the oldest first. Raises
        InvalidField.
        """
        require_country(country, "default_country")
        words = sought_words(name_prefix)
        if name_prefix and not words:
            raise InvalidField(("name_prefix", "has no word"))
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        if phone:
            of_phone = sa.and_(_t.phone == sa.bindparam("phone"), _t.phone != sa.literal_column("''"), _KEPT)
            filters["phone"] = (of_phone, e164(phone, country, "phone"))
        if insurance is not None:
            require_country(insurance["country"], "insurance.country")
            filters["insurance"] = (_OF_NUMBER, [insurance_key(**insurance)])
        if not filters:
            return await self._search(page, words)
        if words:
            filters["words"] = (sa.func.has_words(_t.id, sa.bindparam("words", type_=sa.ARRAY(sa.Text))), words)
        return await records.page(self._db, page, filters)

    async def _search(self, page: Page, words: Sequence[str]) -> Listing[Patient]:
        after_word, after_id = page.after or (None, None)
        found = await self._db.rows(
            _searched,
            {"words": words, "after_word": after_word, "after_id": after_id, "size": page.size + 1},
            lambda word, *columns: (word, Patient(*columns)),
        )
        listing = cut(page, found, lambda row: (row[0], row[1].id))
        return Listing([patient for _, patient in listing.items], listing.next)

    async def _decide(self, request: Mapping[str, Any]) -> Change[Registration]:
        answer = await self._db.row(_decided, (json.dumps([request]),), _decision)
        assert answer is not None
        change, days = answer
        for doctor_id, day in days:
            self._changed(doctor_id, date.fromisoformat(day))
        return change


class _OnFile(Exception):
    """The person has a record already."""


def _registered(*columns: Any) -> Change[Registration]:
    return _decision(*columns)[0]


def _decision(
    outcome: str,
    subject: str | None,
    details: Mapping[str, Any] | None,
    replayed: bool,
    already_registered: bool,
    days: Sequence[tuple[str, str]],
    *patient: Any,
) -> tuple[Change[Registration], Sequence[tuple[str, str]]]:
    """The change, and the doctor-days that it concerns. Raises the refusal."""
    if outcome in _BAD_BIRTH_DATES:
        raise InvalidField(("patient.birth_date", _BAD_BIRTH_DATES[outcome]))
    if outcome != "OK":
        raise refusal(outcome, subject, details)
    return Change(Registration(Patient(*patient), already_registered), replayed), days


def _record(values: Mapping[str, Any], country: str) -> dict[str, Any]:
    """The columns as they are written, with those that follow from them. Raises InvalidField."""
    record = dict(values)
    require_country(country, "default_country")
    for name in ("given", "family"):
        if f"{name}_name" in record:
            record[f"{name}_key"] = folded(record[f"{name}_name"])
    if "phone" in record:
        record["phone"] = e164(record["phone"], country, "patient.phone")
    if "emergency_phone" in record:
        record["emergency_phone"] = e164(record["emergency_phone"], country, "patient.emergency_contact.phone")
    if "insurances" in record:
        for n, insurance in enumerate(record["insurances"]):
            require_country(insurance["country"], f"patient.insurances[{n}].country")
        record["insurance_keys"] = [insurance_key(**insurance) for insurance in record["insurances"]]
    return record
