"""The Python side of SQL's `decide`: how a change of doctor-days is asked for, and how a refusal comes back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from frontdesk.core.caller import Caller
from frontdesk.db.change import Key
from frontdesk.errors import REFUSALS, InvalidField, Refused

Changed = Callable[[str, date], None]
"""Told after the commit which doctor-day has changed, so that its watchers are woken; losing a call costs only time."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is booked or held: a place of a slot, or of a doctor's day."""

    slot_id: str | None = None
    doctor_id: str | None = None
    on: date | None = None


def asked(caller: Caller, key: Key, **attributes: Any) -> dict[str, Any]:
    """One request for `decide`: the key, and attributes of SQL's type `request`. The verb is the key's method."""
    return {
        "verb": key.method,
        "caller": key.caller,
        "actor": key.actor,
        "address": key.address,
        "trace_id": key.trace_id,
        "key": key.name,
        "fingerprint": "\\x" + key.fingerprint.hex(),
        **({} if caller.sight is None else {"restricted": True, "sight": caller.sight.as_json()}),
        **attributes,
    }


def refusal(outcome: str, subject: str | None, details: Mapping[str, Any] | None) -> Refused:
    """The refusal that `decide` answered."""
    if outcome == InvalidField.reason and details is not None:
        return InvalidField((details["field"], details["rule"]))
    return REFUSALS[outcome](subject, details)


def iso(value: Any) -> str | None:
    """A date or an instant as JSON carries it."""
    return None if value is None else str(value.isoformat())
