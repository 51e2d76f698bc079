"""A change that a caller intends: the key under which it acts once, and the answer that says whether it acted now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from psycopg.types.json import Jsonb

from frontdesk.db.database import Database, Transaction
from frontdesk.errors import IdempotencyKeyReused

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key:
    """The caller's name for one intended change. Without a name every call is another intention."""

    caller: str
    method: str
    """The RPC: the same name means something else to another one."""
    name: str = ""
    fingerprint: bytes = b""
    """Of the request without its key; the same key with another fingerprint is refused."""
    address: str = ""
    """Where the call comes from."""
    trace_id: str = ""

    @property
    def actor(self) -> str:
        """The caller, as the log names him."""
        return actor_of(self.caller)


def actor_of(identity: str) -> str:
    """How the log names an identity: a label that a caller without credentials gives himself proves nothing."""
    return "anonymous" if identity.startswith("name:") else identity


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """A change that was made, now or by an earlier call with the same key."""

    result: T
    replayed: bool
    revision: int = 0
    """Of the doctor-day that was changed; 0 if none was."""
    vacated_revision: int = 0
    """Of the doctor-day that a reschedule left."""
    affected: Sequence[str] = ()
    """The live appointments that the change concerns and leaves as they are."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a key stands for in this transaction."""

    result_id: str
    """The id that the change's resource gets, or got at the first success."""
    replayed: bool


async def claim(tx: Transaction, key: Key) -> Claim:
    """Take the key for this transaction, or find what it did before.

    A concurrent twin waits here until the first has ended. Raises IdempotencyKeyReused.

    For changes that are ordinary transactions; SQL's `decide` recalls and remembers keys under its locks.
    """
    if not key.name:
        fresh = await tx.row("select new_id()", (), str)
        assert fresh is not None
        return Claim(fresh, False)
    taken = await tx.row(
        "insert into idempotency (caller, method, key, fingerprint, result_id) values (%s, %s, %s, %s, new_id())"
        " on conflict do nothing returning result_id",
        (key.caller, key.method, key.name, key.fingerprint),
        str,
    )
    if taken is not None:
        return Claim(taken, False)
    first = await tx.row(
        "select fingerprint, result_id from idempotency where caller = %s and method = %s and key = %s",
        (key.caller, key.method, key.name),
        lambda fingerprint, result_id: (bytes(fingerprint), Claim(result_id, True)),
    )
    if first is None or first[0] != key.fingerprint:
        raise IdempotencyKeyReused
    return first[1]


async def acted(via: Database | Transaction, key: Key) -> bool:
    """Whether the key has made its change already. Raises IdempotencyKeyReused.

    For a change whose preparation would fail once it is made, and that takes the key itself with `claim`.
    """
    first = await via.row(
        "select fingerprint from idempotency where caller = %s and method = %s and key = %s",
        (key.caller, key.method, key.name),
        bytes,
    )
    if first is not None and first != key.fingerprint:
        raise IdempotencyKeyReused
    return first is not None


_append = """
insert into log (id, time, actor, method, address, trace_id, type, resource, clinic_id, doctor_id, patient_id, data)
select log_id(now), now, %(actor)s, %(method)s, %(address)s, %(trace_id)s, %(type)s, %(resource)s, %(clinic_id)s,
       %(doctor_id)s, %(patient_id)s, %(data)s
from (select moment() as now offset 0) clock
"""


async def append(
    tx: Transaction, key: Key, event: str, resource: str, ids: Mapping[str, str | None], data: Mapping[str, str]
) -> None:
    """Append the change to the log: what `record_change` and `append_change` are for changes that `decide` makes.

    `ids` are of clinic_id, doctor_id and patient_id. `data` has no name, phone, e-mail or other text of a person.
    """
    row = {
        "actor": key.actor,
        "method": key.method,
        "address": key.address,
        "trace_id": key.trace_id,
        "type": event,
        "resource": resource,
        "data": Jsonb(data) if data else None,
        **dict.fromkeys(("clinic_id", "doctor_id", "patient_id")),
        **ids,
    }
    await tx.run(_append, row)
