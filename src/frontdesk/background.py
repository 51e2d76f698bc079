"""Work that goes on beside the calls, until it is closed."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import psycopg
import structlog

from frontdesk.errors import Refused

_PAUSE_SECONDS = 0.2

_log = structlog.get_logger("frontdesk.background")


class Background:
    """Tasks of one owner."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, and again from its beginning whenever the database fails it: it comes back."""
        self._tasks.append(asyncio.create_task(_forever(work), name=work.__name__))

    async def close(self) -> None:
        """End the tasks, and wait until they have ended."""
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            # Again if need be: before Python 3.12 asyncio.wait_for, in which the pool waits, can lose a cancellation.
            _, pending = await asyncio.wait(pending, timeout=_PAUSE_SECONDS)


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        with suppress(Refused, psycopg.Error, TimeoutError, OSError):
            await work()
        _log.info("interrupted", work=work.__name__)
        await asyncio.sleep(_PAUSE_SECONDS)
