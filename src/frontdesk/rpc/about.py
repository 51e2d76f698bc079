"""The thing that a refused request names, for the log. Only ids and a date get there, whatever the caller has sent."""

import re
from collections.abc import Iterator, Mapping
from datetime import date
from typing import Any

from google.protobuf.message import DecodeError, Message

from frontdesk.errors import Refused

# The first that a request names is the one that it is about.
_COLLECTIONS = {
    "appointment": "appointments",
    "user": "users",
    "api_key": "apiKeys",
    "slot": "slots",
    "leave": "leaves",
    "doctor": "doctors",
    "patient": "patients",
    "clinic": "clinics",
}
_ID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MOST_BYTES = 4_096
"""Of a request that is read for this: a flood of refused calls is not to cost more."""


def about(raw: bytes, kind: type[Message], refusal: Refused) -> Mapping[str, str]:
    """Columns of the log by name: `resource`, and clinic_id, doctor_id and patient_id; without those not named."""
    named: dict[str, str] = {}
    if len(raw) <= _MOST_BYTES:
        try:
            for name, value in _named(kind.FromString(raw)):
                named.setdefault(name, value)
        except DecodeError:
            pass
    first = next((name for name in _COLLECTIONS if name in named), None)
    if refusal.resource in _COLLECTIONS and refusal.subject and _ID.fullmatch(refusal.subject):
        named[refusal.resource] = refusal.subject
        # A clinic is why the call was refused, and what it was about only if nothing else was named.
        if first is None or refusal.resource != "clinic":
            first = refusal.resource
    found = {f"{name}_id": named[name] for name in ("clinic", "doctor", "patient") if name in named}
    if first == "doctor" and "date" in named:
        found["resource"] = f"doctorDays/{named['doctor']}/{named['date']}"
    elif first is not None:
        found["resource"] = f"{_COLLECTIONS[first]}/{named[first]}"
    return found


def _named(message: Any, of: str = "") -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.is_repeated:
            continue
        if field.name == "date":
            try:
                yield "date", date(value.year, value.month, value.day).isoformat()
            except ValueError:
                continue
        elif field.message_type is not None:
            if not of:
                yield from _named(value, field.name)
        elif field.name == "id" or field.name.endswith("_id"):
            name = of if field.name == "id" else field.name.removesuffix("_id")
            # Also keep_patient and merge_patient.
            name = next((one for one in _COLLECTIONS if name == one or name.endswith(f"_{one}")), "")
            if name and _ID.fullmatch(value.lower()):
                yield name, value.lower()
