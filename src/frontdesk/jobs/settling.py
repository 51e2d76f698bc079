"""Go on with leaves whose appointments are not all settled: those of large ones, and of workers that were killed."""

import asyncio

from frontdesk.core.leave import Leaves

POLL_SECONDS = 1.0
"""Between two looks for leaves."""


async def go_on(leaves: Leaves) -> None:
    """Settle for ever; the database lets one process at a time settle a leave. Raises DatabaseUnavailable."""
    while True:
        for leave_id in await leaves.applying():
            await leaves.settle(leave_id)
        await asyncio.sleep(POLL_SECONDS)
