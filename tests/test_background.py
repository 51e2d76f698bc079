"""The alarm and the background work."""

import asyncio

import pytest

from frontdesk.tasks import Alarm, Background, end
from tests.waiting import until


async def test_the_alarm_rings() -> None:
    """What takes too long ends by TimeoutError, and the task goes on as if it had never been cancelled."""
    with pytest.raises(TimeoutError), Alarm(0.01):
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with Alarm(10):
        await asyncio.sleep(0)


async def test_who_is_cancelled_stays_cancelled() -> None:
    """A cancellation from outside is none of the alarm's: it passes through, also when the alarm rings with it."""

    async def work(seconds: float) -> None:
        with Alarm(seconds):
            await asyncio.Event().wait()

    for seconds in (10.0, 0.0):
        task = asyncio.create_task(work(seconds))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_background_work_is_done_again_and_ends() -> None:
    """Work that the database fails is begun again; a task that loses one cancellation is ended all the same."""
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
