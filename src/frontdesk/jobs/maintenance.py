"""What a service that runs for years throws away, so that its tables do not grow without end."""

import asyncio
from dataclasses import dataclass

from frontdesk.db.database import Database
from frontdesk.settings import Settings

BATCH = 2_000
"""Rows of one transaction: short enough that nobody waits for it."""

# Rows that another is at work on are left for the next time. The block range index finds the old ones, since rows are
# stored in the order of their times.
_keys = """
delete from idempotency where ctid = any (array(
    select ctid from idempotency
    where create_time < moment() - make_interval(secs => %s) limit %s for update skip locked))
"""
_events = """
delete from event where ctid = any (array(
    select ctid from event
    where create_time < moment() - make_interval(secs => %s)
      and date < (moment() - make_interval(secs => %s))::date limit %s for update skip locked))
"""


def retention(settings: Settings) -> dict[str, float]:
    """How long things are kept, as `clean` takes it."""
    return {
        "keep_keys_seconds": settings.keep_keys_hours * 3600,
        "keep_events_seconds": settings.keep_events_days * 86400,
    }


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows went."""

    keys: int
    events: int


async def clean(db: Database, *, keep_keys_seconds: float, keep_events_seconds: float) -> Removed:
    """Remove idempotency keys and events that are older, in small transactions, beside any traffic.

    A key that is gone makes its retry another intention. Events go only with dates as old as they: a watch that resumes
    there begins afresh, and the queue itself stays. Raises DatabaseUnavailable.
    """
    keys = await _until_none(db, _keys, (keep_keys_seconds, BATCH))
    events = await _until_none(db, _events, (keep_events_seconds, keep_events_seconds, BATCH))
    return Removed(keys, events)


async def _until_none(db: Database, statement: str, params: tuple[float, ...]) -> int:
    total = 0
    while True:
        removed = await db.run(statement, params)
        total += removed
        if removed < BATCH:
            return total
        # Calls come first.
        await asyncio.sleep(0.05)
