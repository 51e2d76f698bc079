"""Events: the changes in the sealed log, in the one order that all readers see."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import Any

from frontdesk.db.database import Database, Transaction


@dataclass(frozen=True, slots=True)
class Event:
    """One change, in ids, states and times."""

    position: int
    """In the sealed log, which has other rows too: so positions grow, and not by one."""
    chain: bytes
    """The hash of the log up to here."""
    id: str
    type: str
    """Such as appointment.booked."""
    time: datetime
    actor: str
    method: str
    """The RPC that made the change."""
    resource: str
    clinic_id: str | None
    doctor_id: str | None
    patient_id: str | None
    appointment_id: str | None
    slot_id: str | None
    date: date | None
    revision: int
    """Of the doctor-day; 0 if the change is of none."""
    queue_state: str | None
    """Of the patient's entry in the queue, if the change touches the queue."""
    data: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the sealed log."""

    events: Sequence[Event]
    end: int
    """The position up to which it was read: that of a row which is no event, as the case may be."""


_COLUMNS = ", ".join(
    f"s.{field.name}" if field.name in ("position", "chain") else f"l.{field.name}" for field in fields(Event)
)

# A seal with a row that is no event has nulls. The subquery keeps the limit on positions, whatever they hold.
_read = f"""
select {_COLUMNS}
from (select position, chain, id from seal where position > %s order by position limit %s) s
left join log l on l.id = s.id and l.type is not null and l.type not like 'hold.%%'
order by s.position
"""


async def read_events(via: Database | Transaction, after: int, most: int) -> Stretch:
    """The events among the next `most` rows after this position. Its end is `after` if there is nothing new."""
    found = await via.rows(_read, (after, most), lambda *columns: columns)
    return Stretch([Event(*columns) for columns in found if columns[2] is not None], found[-1][0] if found else after)


async def reader_position(tx: Transaction, name: str) -> int:
    """How far the reader of this name has come, locked until the transaction ends; a new one begins at the start."""
    await tx.run("insert into log_reader (name, position) values (%s, 0) on conflict do nothing", (name,))
    found = await tx.row("select position from log_reader where name = %s for update", (name,), int)
    assert found is not None
    return found


async def advance_reader(tx: Transaction, name: str, position: int) -> None:
    """Remember how far the reader has come, in the transaction of what it did with the events up to there."""
    await tx.run("update log_reader set position = %s, update_time = moment() where name = %s", (position, name))
