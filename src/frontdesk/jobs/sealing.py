"""Seal the log, soon after each change: see `db/sql/seal.sql`."""

import asyncio
from contextlib import suppress

from frontdesk.db.database import Database, Transaction

PAUSE_SECONDS = 0.08
"""Between two runs: as long as a change waits to be sealed, while all changes meanwhile share the cost of one run."""
_HELD_SECONDS = 1.0
"""The longest pause while a transaction that somebody has left open holds up everything."""
POLL_SECONDS = 5.0
"""Between two looks for what others have left, such as a worker that was killed after a commit."""

_seal = "select sealed, coalesce(waiting, true), coalesce(age, 0) from seal_log()"


class Sealer:
    """Each worker has one and seals after changes of its own. The database lets one at a time."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._wake = asyncio.Event()
        self.age = 0.0
        """Seconds for which the oldest change that cannot be sealed yet has waited."""

    def changed(self) -> None:
        """The log has grown."""
        self._wake.set()

    async def follow(self) -> None:
        """Seal for ever. Raises DatabaseUnavailable."""
        pause = PAUSE_SECONDS
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            sealed, waiting, self.age = await self._run()
            if waiting:
                self._wake.set()
            pause = PAUSE_SECONDS if sealed or not waiting else min(2 * pause, _HELD_SECONDS)
            await asyncio.sleep(pause)

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
        return found


async def _at_leisure(tx: Transaction) -> tuple[int | None, bool, float] | None:
    await tx.run("set local statement_timeout = 0", ())
    return await tx.row(_seal, (), _columns)


def _columns(sealed: int | None, waiting: bool, age: float) -> tuple[int | None, bool, float]:
    return sealed, waiting, age
