"""Timeouts, background work, and reliable cancellation of tasks."""

import asyncio

import pytest

from frontdesk.tasks import Background, Timeout, end
from tests.waiting import until


async def test_a_timeout_expires() -> None:
    """A block that takes too long ends with TimeoutError, and its task continues as if it had never been cancelled."""
    with pytest.raises(TimeoutError), Timeout(0.01):
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with Timeout(10):
        await asyncio.sleep(0)


async def test_a_cancelled_task_stays_cancelled() -> None:
    """A cancellation from outside passes through a timeout, even if both happen at the same time."""

    async def work(seconds: float) -> None:
        with Timeout(seconds):
            await asyncio.Event().wait()

    for seconds in (10.0, 0.0):
        task = asyncio.create_task(work(seconds))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_background_work_is_done_again_and_ends() -> None:
    """Work that failed because of the database starts again. A task that loses one cancellation still ends."""
    background = Background()
    runs = 0
    lost = asyncio.Event()

    async def work() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise TimeoutError
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if lost.is_set():
                raise
            lost.set()

    background.start(work)
    await until(lambda: runs >= 3, 5)
    await background.close()
    assert lost.is_set()


async def test_an_end_that_is_sure() -> None:
    """A task that loses its first cancellation is cancelled again."""
    lost = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            lost.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    end(task)
    async with asyncio.timeout(20):
        await asyncio.wait([task])
    assert lost.is_set()
    assert task.cancelled()
