"""Waiting for what nobody announces: until it holds, with an end for what never does."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

SOON = 20.0
"""Seconds: plenty, also on a busy machine. Where another bound tells right from wrong, the test says so."""


async def until(holds: Callable[[], bool], seconds: float = SOON) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - what it waits for is often in another process
            await asyncio.sleep(0.01)


async def until_true(holds: Callable[[], Awaitable[bool]], seconds: float = SOON) -> None:
    """Wait until it holds, where the asking takes its time as well."""
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)


def wait_for(condition: Callable[[], T], seconds: float = SOON) -> T:
    """Block until there is something true, and answer it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value
