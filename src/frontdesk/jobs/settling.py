"""Go on with leaves whose appointments are not all settled: those of large ones, and of workers that were killed."""

import asyncio
from collections.abc import Callable

from frontdesk.core.leave import Leaves

POLL_SECONDS = 1.0
"""Between two looks for leaves."""


async def go_on(leaves: Leaves, changed: Callable[[], None]) -> None:
    """Settle for ever; the database lets one process at a time settle a leave. `changed` is told after each leave.

    Raises DatabaseUnavailable.
    """
    while True:
        for leave_id in await leaves.applying():
            await leaves.settle(leave_id)
            changed()
        await asyncio.sleep(POLL_SECONDS)
