"""Wait until a condition holds that nothing announces, with a limit for conditions that never hold."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

T = TypeVar("T")

SOON = 20.0
"""Seconds: enough for a busy machine. If a test needs another limit to tell right from wrong, it says so."""


async def until(holds: Callable[[], bool], seconds: float = SOON) -> None:
    """Wait until the condition holds."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what it waits for is often in another process
            await asyncio.sleep(0.01)


async def until_true(holds: Callable[[], Awaitable[bool]], seconds: float = SOON) -> None:
    """Wait until the condition holds; asking for it takes time too."""
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


def wait_for(condition: Callable[[], T], seconds: float = SOON) -> T:
    """Block until the value is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


async def early_in_a_minute() -> None:
    """Until the present minute lasts longer than a test."""
    second = datetime.now(UTC).second
    if second > 40:
        await asyncio.sleep(61 - second)
