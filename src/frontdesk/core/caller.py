"""Who asks for a change, and under which name: what makes a retried call act once.

The SQL functions of the deciding writes do this by themselves, under their locks; `claim` does it for the records of
clinics, patients and doctors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

from frontdesk.db.database import Transaction
from frontdesk.errors import IdempotencyKeyReused


@dataclass(frozen=True, slots=True)
class Intent:
    """One change that a caller intends. Without a key every call is another intention."""

    caller: str
    key: str = ""
    fingerprint: bytes = b""
    """Of the request without its key; the same key with another fingerprint is refused."""


Changed = Callable[[str, date], None]
"""Told after the commit which doctor-day has changed, so that its watchers are woken; losing a call costs only time."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The id that the change's resource gets, or had at the first success."""

    result_id: str
    replayed: bool


async def claim(tx: Transaction, intent: Intent, method: str) -> Claim:
    """Take the key for this transaction, or find what it did before.

    A concurrent twin waits here until the first has ended. Raises IdempotencyKeyReused.
    """
    if not intent.key:
        fresh = await tx.row("select new_id()", (), str)
        assert fresh is not None
        return Claim(fresh, replayed=False)
    named = {"caller": intent.caller, "method": method, "key": intent.key, "fingerprint": intent.fingerprint}
    taken = await tx.row(
        "insert into idempotency (caller, method, key, fingerprint, result_id)"
        " values (%(caller)s, %(method)s, %(key)s, %(fingerprint)s, new_id())"
        " on conflict do nothing returning result_id",
        named,
        str,
    )
    if taken is not None:
        return Claim(taken, replayed=False)
    first = await tx.row(
        "select fingerprint, result_id from idempotency"
        " where caller = %(caller)s and method = %(method)s and key = %(key)s",
        named,
        lambda fingerprint, result_id: (bytes(fingerprint), result_id),
    )
    if first is None or first[0] != intent.fingerprint:
        raise IdempotencyKeyReused
    return Claim(first[1], replayed=True)
