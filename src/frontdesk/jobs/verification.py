"""Check the log against its seals: has anybody changed, removed or inserted a row since it was sealed?"""

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Self

from frontdesk.db.database import Database, Transaction

_PAGE = 5_000
_FORM = re.compile("([0-9]{1,18}):([0-9a-f]{64})")

_last = "select position, chain from seal order by position desc limit 1"
_seals = """
select s.position, s.id, s.chain, l.method, case when l.id is not null then log_digest(l) end
from seal s left join log l on l.id = s.id where s.position > %s order by s.position limit %s
"""
_checkpoint = """
select exists (select from log where method = 'Retention' and actor = 'system'
               and data = jsonb_build_object('position', %s::bigint, 'chain', %s::text))
"""
# A row that is sealed by now, unless it was written under the id of an earlier transaction, or nobody seals.
_unsealed = """
select l.id, l.method from log l
where not exists (select from seal s where s.id = l.id)
  and (l.time < moment() - interval '10 minutes'
       or l.transaction < (select s.horizon from seal s
                           where s.cluster = (select system_identifier from pg_control_system())
                           order by s.position desc limit 1))
order by l.id limit 1
"""


@dataclass(frozen=True, slots=True)
class Head:
    """The end of the chain. Kept elsewhere, it proves later that everything before it is still there and unchanged."""

    position: int
    chain: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` makes. Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError("is not a head as `frontdesk audit head` prints it")
        return cls(int(found[1]), bytes.fromhex(found[2]))

    def __str__(self) -> str:
        return f"{self.position}:{self.chain.hex()}"


START = Head(0, bytes(32))
"""The head of an empty log."""


class Tampered(Exception):
    """The log is not what was sealed; the message names the first row that is not."""


async def head(db: Database) -> Head:
    """The present end of the chain. Raises DatabaseUnavailable."""
    return await db.row(_last, (), _head) or START


def _head(position: int, chain: bytes) -> Head:
    return Head(position, bytes(chain))


async def verify(db: Database, known: Head | None = None) -> Head:
    """Check every row; the present head. `known` is an earlier one. Raises Tampered, DatabaseUnavailable."""
    return await db.transaction(lambda tx: _verify(tx, known))


async def _verify(tx: Transaction, known: Head | None) -> Head:
    # All pages show the same moment, or what retention deletes meanwhile would look removed.
    await tx.run("set transaction isolation level repeatable read, read only", ())
    # By pages, but one statement looks through all.
    await tx.run("set local statement_timeout = 0", ())
    rows = await _page(tx, START)
    begins = START
    if rows and rows[0][4] is None:
        # The seal of the last row that retention has deleted.
        position, _, chain, *_ = rows.pop(0)
        begins = _head(position, chain)
    at = passed = begins
    while rows:
        for position, row_id, chain, method, digest in rows:
            if position != at.position + 1:
                raise Tampered(f"removed: position {at.position + 1}; the next one is {position}")
            if digest is None:
                raise Tampered(f"removed: position {position}, {row_id}")
            at = Head(position, hashlib.sha256(at.chain + digest).digest())
            if at.chain != chain:
                raise Tampered(f"changed or inserted: position {position}, {row_id} ({method})")
            if known is not None and position == known.position:
                passed = at
        rows = await _page(tx, at)
    if begins.position and not await tx.row(_checkpoint, (begins.position, begins.chain.hex()), bool):
        raise Tampered(f"removed: everything up to position {begins.position}, and not by retention")
    if known is not None and known.position:
        if known.position > at.position:
            raise Tampered(f"removed: the log ends at position {at.position}, and the head is of {known.position}")
        if known.position < begins.position:
            raise Tampered(f"the head is too old: retention has deleted everything up to position {begins.position}")
        if passed != known:
            raise Tampered(f"changed: what leads to position {known.position} is not what led to the head")
    unsealed = await tx.row(_unsealed, (), lambda *columns: columns)
    if unsealed is not None:
        row_id, method = unsealed
        raise Tampered(f"inserted, or left by a service that does not run: {row_id} ({method}) is not sealed")
    return at


async def _page(tx: Transaction, after: Head) -> list[Any]:
    return await tx.rows(_seals, (after.position, _PAGE), lambda *columns: columns)
