"""Seal the log, soon after each change: see `db/sql/seal.sql`."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from frontdesk.db.database import Database, Transaction

PAUSE_SECONDS = 0.08
"""Between two runs: as long as a change waits to be sealed, while all changes meanwhile share the cost of one run."""
_HELD_SECONDS = 1.0
"""The longest pause while a transaction that somebody has left open holds up everything."""
POLL_SECONDS = 0.32
"""The longest pause while nothing is to be sealed; a hint of a change ends it. Not all changes are hinted at."""

# Of other roles only if this one may see them: a superuser, or a member of pg_read_all_stats.
_oldest = """
select coalesce(extract(epoch from max(clock_timestamp() - xact_start)), 0)::float8
from pg_stat_activity where backend_xid is not null and pid <> pg_backend_pid()
"""

_seal = "select sealed, coalesce(waiting, true), coalesce(age, 0) from seal_log()"


class Sealer:
    """Each background process has one. The database lets one at a time."""

    def __init__(self, db: Database, sealed: Callable[[], None]) -> None:
        """`sealed` is called when the sealed log has grown."""
        self._db = db
        self._sealed = sealed
        self._wake = asyncio.Event()
        self.age = 0.0
        """Seconds for which the oldest change that cannot be sealed yet has waited."""

    def changed(self) -> None:
        """The log may have grown: look soon."""
        self._wake.set()

    async def follow(self) -> None:
        """Seal for ever. Raises DatabaseUnavailable."""
        idle = PAUSE_SECONDS
        while True:
            # Changes that come together share a run, and hints of them come all the time.
            await asyncio.sleep(PAUSE_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(idle - PAUSE_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            sealed, waiting, self.age = await self._run()
            idle = PAUSE_SECONDS if sealed else min(2 * idle, _HELD_SECONDS if waiting else POLL_SECONDS)

    async def oldest_transaction(self) -> float:
        """Seconds for which the oldest transaction is open that holds up sealing. Raises DatabaseUnavailable."""
        return await self._db.row(_oldest, (), float) or 0.0

    async def finish(self) -> None:
        """Seal what is there now. Raises DatabaseUnavailable."""
        await self._run()

    async def _run(self) -> tuple[int | None, bool, float]:
        try:
            found = await self._db.row(_seal, (), _columns)
        except TimeoutError:
            # Much has come together, or a backup was restored: as long as it takes.
            found = await self._db.transaction(_at_leisure)
        assert found is not None
        if found[0]:
            self._sealed()
        return found


async def _at_leisure(tx: Transaction) -> tuple[int | None, bool, float] | None:
    await tx.run("set local statement_timeout = 0", ())
    return await tx.row(_seal, (), _columns)


def _columns(sealed: int | None, waiting: bool, age: float) -> tuple[int | None, bool, float]:
    return sealed, waiting, age
