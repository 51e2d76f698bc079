"""Missing from asyncio: background work that starts again, a task's sure end, and a cheap timeout."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import psycopg
import structlog

from frontdesk.errors import Refused

_PAUSE_SECONDS = 0.2
_AGAIN_SECONDS = 1.0

_log = structlog.get_logger("frontdesk.tasks")


class Timeout:
    """Ends its `with` block by TimeoutError after so many seconds.

    `asyncio.timeout` does the same at four times the cost, which a thousand watchers pay with every change.
    """

    __slots__ = ("_expired", "_handle", "_seconds", "_task")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._expired = 0
        """How often it has cancelled the task."""
        self._handle = task.get_loop().call_later(self._seconds, self._expire)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        others = self._task.cancelling() - self._expired
        for _ in range(self._expired):
            self._task.uncancel()
        # If somebody else has cancelled the task as well, the task obeys that.
        if self._expired and not others and kind is asyncio.CancelledError:
            raise TimeoutError from None

    def _expire(self) -> None:
        self._expired += 1
        self._task.cancel()
        # Again if need be, as in `end`.
        self._handle = self._task.get_loop().call_later(_AGAIN_SECONDS, self._expire)


def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task that works with the database, and again until it has ended.

    Once is not enough: before Python 3.12 asyncio.wait_for, in which the pool waits, can lose a cancellation, and a
    cancel request that reaches PostgreSQL before the statement does has no effect.
    """
    if not task.done():
        task.cancel()
        task.get_loop().call_later(_AGAIN_SECONDS, end, task)


class Background:
    """Tasks of one owner."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work, and begin it again whenever the database fails it, since the database will come back."""
        self._tasks.append(asyncio.create_task(_forever(work), name=work.__name__))

    async def close(self) -> None:
        """End the tasks, and wait until they have ended."""
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            # Again if need be, as in `end`.
            _, pending = await asyncio.wait(pending, timeout=_PAUSE_SECONDS)


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        with suppress(Refused, psycopg.Error, TimeoutError, OSError):
            await work()
        _log.info("interrupted", work=work.__name__)
        await asyncio.sleep(_PAUSE_SECONDS)
