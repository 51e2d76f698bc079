"""Keep the slots of the next days generated: see `generate_ahead` in `db/sql/schedule.sql`."""

import asyncio
import random

from frontdesk.db.database import Database

PAUSE_SECONDS = 20.0
"""Between two looks for days without slots, on average: new hours have slots within a minute, even if a look fails."""

_generate = "select generate_ahead(%s)"


async def keep_ahead(db: Database, days: int) -> None:
    """Generate for ever, one process at a time. Raises DatabaseUnavailable."""
    while True:
        while await db.row(_generate, (days,), bool):
            pass
        await asyncio.sleep(random.uniform(0.5, 1.5) * PAUSE_SECONDS)
