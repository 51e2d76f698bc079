"""What asyncio lacks: work that goes on beside the calls, an end that is sure, and a cheap alarm."""

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


class Alarm:
    """Ends what stands in its `with` block by TimeoutError after so many seconds.

    `asyncio.timeout` does the same at four times the cost, which a thousand watchers pay with every change.
    """

    __slots__ = ("_handle", "_rang", "_seconds", "_task")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._rang = 0
        self._handle = task.get_loop().call_later(self._seconds, self._ring)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.cancel()
        others = self._task.cancelling() - self._rang
        for _ in range(self._rang):
            self._task.uncancel()
        # Where somebody else has cancelled the task as well, that is to be obeyed.
        if self._rang and not others and kind is asyncio.CancelledError:
            raise TimeoutError from None

    def _ring(self) -> None:
        self._rang += 1
        self._task.cancel()
        # Again, if need be, as in `end`.
        self._handle = self._task.get_loop().call_later(_AGAIN_SECONDS, self._ring)


def end(task: asyncio.Task[Any]) -> None:
    """Cancel a task that works with the database, and again until it has ended.

    Once is not enough: before Python 3.12 asyncio.wait_for, in which the pool waits, can lose a cancellation, and a
    cancel request that reaches PostgreSQL before the statement does is for nothing.
    """
    if not task.done():
        task.cancel()
        task.get_loop().call_later(_AGAIN_SECONDS, end, task)


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
            # Again, if need be, as in `end`.
            _, pending = await asyncio.wait(pending, timeout=_PAUSE_SECONDS)


async def _forever(work: Callable[[], Awaitable[None]]) -> None:
    while True:
        with suppress(Refused, psycopg.Error, TimeoutError, OSError):
            await work()
        _log.info("interrupted", work=work.__name__)
        await asyncio.sleep(_PAUSE_SECONDS)
