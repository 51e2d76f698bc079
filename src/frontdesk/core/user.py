"""Users: the record, and what every change of it has in common."""

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from frontdesk.core.formats import e164
from frontdesk.db import schema
from frontdesk.db.change import Key
from frontdesk.db.database import Transaction
from frontdesk.db.records import Records
from frontdesk.errors import EmailTaken, PatientLinked, UserNotFound


@dataclass(frozen=True, slots=True)
class User:
    id: str
    email: str
    name: str
    phone: str
    address: str
    roles: list[str]
    patient_id: str | None
    doctor_id: str | None
    clinic_ids: list[str]
    email_verified: bool
    second_factor: bool
    active: bool
    version: int
    create_time: datetime
    update_time: datetime
    last_login_time: datetime | None


records = Records(
    schema.user_account,
    User,
    UserNotFound,
    {
        "user_account_email_key_key": (EmailTaken, "email_key"),
        "user_account_patient_id_key": (PatientLinked, "patient_id"),
    },
    noun="user",
)


def email_key(email: str) -> str:
    """The form in which e-mail addresses are compared."""
    return unicodedata.normalize("NFKC", email).casefold()


def checked(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns as they are written. Raises InvalidField."""
    if "phone" in changes:
        return {**changes, "phone": e164(changes["phone"], "", "user.phone")}
    return changes


async def log_own(tx: Transaction, key: Key, user: User, event: str) -> None:
    """Log what a user has done, who has just proved it, also where the call itself needs no credentials."""
    await records.log(tx, replace(key, caller=f"users/{user.id}"), user, event, {})
