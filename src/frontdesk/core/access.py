"""Administration: the API keys. An administrator of some clinics reaches what belongs to none but his own."""

import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from frontdesk.core.caller import Caller
from frontdesk.core.credential import KEY_PREFIX, changed, hash_of
from frontdesk.db import schema
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page
from frontdesk.db.records import Records
from frontdesk.errors import ApiKeyNotFound, ClinicNotFound, ClinicNotYours, InvalidField

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

        return await records.update(self._db, key, api_key_id, {}, None, prepare, permit=_permit(caller))


def require_clinics(caller: Caller, clinic_ids: Sequence[str]) -> None:
    """Raise ClinicNotYours unless these, where none means all, are all the caller's."""
    if caller.sight is None:
        return
    others = set(clinic_ids) - set(_clinics_of(caller))
    if others or not clinic_ids:
        raise ClinicNotYours(min(others, default=None))


def _permit(caller: Caller) -> Callable[[ApiKey], None]:
    return lambda api_key: require_clinics(caller, api_key.clinic_ids)


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
