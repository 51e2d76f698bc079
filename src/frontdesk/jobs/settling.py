"""Go on with leaves whose appointments are not all settled: those of large ones, and of workers that were killed."""

import asyncio
from collections.abc import Callable

from frontdesk.core.leave import Leaves

POLL_SECONDS = 1.0
"""Between two looks for leaves."""


class Settling:
    """Each worker has one. The database lets one at a time settle a leave."""

    def __init__(self, leaves: Leaves, logged: Callable[[], None]) -> None:
        """`logged` is told that the log has grown."""
        self._leaves = leaves
        self._logged = logged

    async def follow(self) -> None:
        """Settle for ever. Raises DatabaseUnavailable."""
        while True:
            for leave_id in await self._leaves.applying():
                await self._leaves.settle(leave_id)
                self._logged()
            await asyncio.sleep(POLL_SECONDS)
