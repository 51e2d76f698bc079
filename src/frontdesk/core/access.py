"""Administration: users and API keys. An administrator of some clinics reaches what belongs to none but his own."""

import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from frontdesk.core import second_factor
from frontdesk.core.caller import Caller
from frontdesk.core.credential import KEY_PREFIX, changed, hash_of
from frontdesk.core.password import Passwords
from frontdesk.core.user import User, checked, email_key
from frontdesk.core.user import records as users
from frontdesk.core.user_session import end_sessions
from frontdesk.db import schema
from frontdesk.db.change import Change, Key, acted
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page
from frontdesk.db.records import Permit, Records
from frontdesk.errors import (
    ApiKeyNotFound,
    ClinicNotFound,
    ClinicNotYours,
    Conflict,
    DoctorNotFound,
    InvalidField,
    LastAdmin,
    PatientLinked,
    PatientNotFound,
    SecondFactorState,
)

DEFAULT_REQUESTS_PER_MINUTE = 100
KEY_ROLES = ("SERVICE", "STAFF", "BOARD", "ADMIN")
"""The roles that an API key may have."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    id: str
    name: str
    roles: list[str]
    clinic_ids: list[str]
    expire_time: datetime | None
    requests_per_minute: int
    create_time: datetime
    revoke_time: datetime | None
    version: int


records = Records(schema.api_key, ApiKey, ApiKeyNotFound)

ONE_TIME_HOURS = 24
"""How long a one-time password is good."""


@dataclass(frozen=True, slots=True)
class CreatedKey:
    """A new API key. `credentials` are empty if it is not new: only their hash is kept."""

    api_key: ApiKey
    credentials: str


class ApiKeys:
    """Create, list and revoke API keys."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def create(self, caller: Caller, values: Mapping[str, Any], *, key: Key) -> Change[CreatedKey]:
        """Raises ClinicNotFound, ClinicNotYours, InvalidField."""
        secret = secrets.token_urlsafe(32)

        async def prepare(tx: Transaction, current: ApiKey | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            await _require_known_clinics(tx, given["clinic_ids"])
            if given["expire_time"] is not None and given["expire_time"] <= await _now(tx):
                raise InvalidField(("api_key.expire_time", "has passed"))
            return {
                **given,
                "clinic_ids": [uuid.UUID(clinic_id) for clinic_id in given["clinic_ids"]],
                "requests_per_minute": given["requests_per_minute"] or DEFAULT_REQUESTS_PER_MINUTE,
                "secret_hash": hash_of(secret),
            }

        change = await records.create(self._db, key, values, prepare, permit=_permit(caller))
        credentials = "" if change.replayed else f"{KEY_PREFIX}{change.result.id}_{secret}"
        return Change(CreatedKey(change.result, credentials), change.replayed)

    async def list(self, caller: Caller, page: Page, *, active_only: bool) -> Listing[ApiKey]:
        """Those whose clinics are all the caller's, the oldest first; only those that are accepted, if so wanted."""
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        columns = schema.api_key.c
        if active_only:
            lasts = sa.or_(columns.expire_time.is_(None), columns.expire_time > sa.func.moment())
            wanted = sa.bindparam("active_only", type_=sa.Boolean)
            filters["active_only"] = (sa.and_(columns.revoke_time.is_(None), lasts, wanted), True)
        if caller.sight is not None:
            clinic_ids = columns.clinic_ids
            own = clinic_ids.op("<@")(sa.cast(sa.bindparam("clinics"), sa.ARRAY(sa.Uuid)))
            filters["clinics"] = (sa.and_(own, clinic_ids != sa.literal_column("'{}'")), list(_clinics_of(caller)))
        return await records.page(self._db, page, filters)

    async def revoke(self, caller: Caller, api_key_id: str, *, key: Key) -> Change[ApiKey]:
        """Raises ApiKeyNotFound, ClinicNotYours."""

        async def prepare(tx: Transaction, current: ApiKey | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            if current.revoke_time is not None:
                return {}
            await changed(tx, f"keys/{api_key_id}")
            return {"revoke_time": await _now(tx)}

        return await records.update(
            self._db, key, api_key_id, {}, None, prepare, permit=_permit(caller), event="revoked"
        )


@dataclass(frozen=True, slots=True)
class CreatedUser:
    """A new user. The one-time password is empty if the user is not new: only its hash is kept."""

    user: User
    one_time_password: str


_u = schema.user_account.c
_REACHED = sa.or_(
    # Patients belong to all clinics.
    _u.roles == sa.literal_column("'{PATIENT}'"),
    sa.and_(
        _u.clinic_ids.op("<@")(sa.cast(sa.bindparam("clinics"), sa.ARRAY(sa.Uuid))),
        _u.clinic_ids != sa.literal_column("'{}'"),
    ),
)
"""The users whom an administrator of these clinics reaches; `_permit_user` says it of one."""


class Users:
    """Create, find and change users."""

    def __init__(self, db: Database, passwords: Passwords) -> None:
        self._db = db
        self._passwords = passwords

    async def create(self, caller: Caller, values: Mapping[str, Any], *, key: Key) -> Change[CreatedUser]:
        """Raises EmailTaken, ClinicNotFound, DoctorNotFound, ClinicNotYours, InvalidField."""
        password = hashed = ""
        # Before the transaction, because a hash may wait for many others. A replay needs none.
        if not (key.name and await acted(self._db, key)):
            password, hashed = await self._passwords.one_time(key)
        given = {**checked(values), "email_key": email_key(values["email"])}

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            if not hashed:
                # The key was deleted since it was looked at.
                raise Conflict
            expires = await _now(tx) + timedelta(hours=ONE_TIME_HOURS)
            roles = await _roles(tx, caller, given)
            return {**given, **roles, "password_expire_time": expires, "password_hash": hashed}

        change = await users.create(self._db, key, given, prepare, permit=_permit_user(caller))
        return Change(CreatedUser(change.result, "" if change.replayed else password), change.replayed)

    async def get(self, caller: Caller, user_id: str) -> User:
        """Raises UserNotFound, ClinicNotYours."""
        if caller.sight is None:
            return await users.get(self._db, user_id)
        found = await users.find(self._db, user_id, _REACHED, {"clinics": list(_clinics_of(caller))})
        if found is None:
            # Only a refusal needs the question why.
            found = await users.get(self._db, user_id)
            require_clinics(caller, found.clinic_ids)
        return found

    async def list(self, caller: Caller, page: Page, *, email: str, role: str | None) -> Listing[User]:
        """Those that the caller reaches and for whom every given filter holds, the oldest first."""
        filters: dict[str, tuple[sa.ColumnElement[bool], Any]] = {}
        columns = schema.user_account.c
        if email:
            filters["email"] = (columns.email_key == sa.bindparam("email"), email_key(email))
        if role is not None:
            filters["role"] = (sa.bindparam("role", type_=sa.Text) == sa.any_(columns.roles), role)
        if caller.sight is not None:
            filters["clinics"] = (_REACHED, list(_clinics_of(caller)))
        return await users.page(self._db, page, filters)

    async def update(
        self, caller: Caller, user_id: str, changes: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[User]:
        """Change the given columns. Raises UserNotFound, ClinicNotYours, EtagMismatch, LastAdmin, InvalidField."""

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            if current.active and given.get("active") is False:
                await _keep_an_administrator(tx, current)
                await end_sessions(tx, user_id)
                await changed(tx, f"users/{user_id}")
            return given

        permit = _permit_user(caller)
        return await users.update(self._db, key, user_id, checked(changes), version, prepare, permit=permit)

    async def set_roles(
        self, caller: Caller, user_id: str, roles: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[User]:
        """Replace roles, doctor_id and clinic_ids.

        Raises UserNotFound, ClinicNotFound, DoctorNotFound, ClinicNotYours, EtagMismatch, LastAdmin.
        """

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            if "ADMIN" not in given["roles"] or given["clinic_ids"]:
                await _keep_an_administrator(tx, current)
            await changed(tx, f"users/{user_id}")
            return await _roles(tx, caller, given)

        permit = _permit_user(caller)
        return await users.update(self._db, key, user_id, roles, version, prepare, permit=permit, event="roles_set")

    async def link_patient(
        self, caller: Caller, user_id: str, patient_id: str, version: int | None, *, key: Key
    ) -> Change[User]:
        """Say which patient the user is.

        Raises UserNotFound, PatientNotFound, PatientLinked, ClinicNotYours, EtagMismatch.
        """

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            kept = await tx.row("select id from patient where id = current_patient(%s)", (patient_id,), str)
            if kept is None:
                raise PatientNotFound(patient_id)
            if current.patient_id == kept:
                return {}
            if current.patient_id is not None:
                raise PatientLinked(user_id)
            await changed(tx, f"users/{user_id}")
            return {"patient_id": kept}

        given = {"patient_id": patient_id}
        permit = _permit_user(caller)
        return await users.update(
            self._db, key, user_id, given, version, prepare, permit=permit, event="patient_linked"
        )

    async def reset_second_factor(self, caller: Caller, user_id: str, version: int | None, *, key: Key) -> Change[User]:
        """Remove the second factor of somebody who has lost it.

        Raises UserNotFound, ClinicNotYours, EtagMismatch, SecondFactorState if there is none.
        """

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            if not current.second_factor:
                raise SecondFactorState(user_id)
            await second_factor.remove(tx, user_id)
            return given

        changes, permit = {"second_factor": False}, _permit_user(caller)
        return await users.update(
            self._db, key, user_id, changes, version, prepare, permit=permit, event="second_factor_reset"
        )


async def _roles(tx: Transaction, caller: Caller, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of the roles as they are written. Raises ClinicNotFound, DoctorNotFound, ClinicNotYours."""
    await _require_known_clinics(tx, given["clinic_ids"])
    if given["doctor_id"] is not None:
        clinic_id = await tx.row("select clinic_id from doctor where id = %s", (given["doctor_id"],), str)
        if clinic_id is None:
            raise DoctorNotFound(given["doctor_id"])
        require_clinics(caller, [clinic_id])
    clinic_ids = [uuid.UUID(clinic_id) for clinic_id in given["clinic_ids"]]
    return {"roles": given["roles"], "doctor_id": given["doctor_id"], "clinic_ids": clinic_ids}


async def _keep_an_administrator(tx: Transaction, user: User) -> None:
    """Raise LastAdmin if this is the last active administrator of all clinics. Others who change one wait."""
    if not user.active or "ADMIN" not in user.roles or user.clinic_ids:
        return
    # In a statement of its own, so that the next one sees what was committed during the wait.
    await tx.run("select lock_all(array['administrators'])", ())
    other = await tx.row(
        "select id from user_account where id <> %s and active and 'ADMIN' = any (roles) and clinic_ids = '{}'"
        " and coalesce(password_expire_time > moment(), true) limit 1",
        (user.id,),
        str,
    )
    if other is None:
        raise LastAdmin(user.id)


def _permit_user(caller: Caller) -> Permit:
    def permit(user: Mapping[str, Any]) -> None:
        # Patients belong to all clinics.
        if set(user["roles"]) != {"PATIENT"}:
            require_clinics(caller, user["clinic_ids"])

    return permit


def require_clinics(caller: Caller, clinic_ids: Sequence[str | uuid.UUID]) -> None:
    """Raise ClinicNotYours unless these, where none means all, are all the caller's."""
    if caller.sight is None:
        return
    others = set(map(str, clinic_ids)) - set(_clinics_of(caller))
    if others or not clinic_ids:
        raise ClinicNotYours(min(others, default=None))


def _permit(caller: Caller) -> Permit:
    return lambda api_key: require_clinics(caller, api_key["clinic_ids"])


def _clinics_of(caller: Caller) -> Sequence[str]:
    assert caller.sight is not None
    return caller.sight.clinic_ids or ()


async def _require_known_clinics(tx: Transaction, clinic_ids: Sequence[str]) -> None:
    known = await tx.rows("select id from clinic where id = any (%s::uuid[])", (list(clinic_ids),), str)
    for clinic_id in clinic_ids:
        if clinic_id not in known:
            raise ClinicNotFound(clinic_id)


async def _now(tx: Transaction) -> datetime:
    now: datetime | None = await tx.row("select moment()", (), lambda instant: instant)
    assert now is not None
    return now
