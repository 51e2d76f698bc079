"""A stream that waits for news."""

import asyncio


class Watcher:
    """One stream that waits for news. Nothing is queued for it: it only knows that there is something to look at."""

    __slots__ = ("_news", "_waiter")

    def __init__(self) -> None:
        self._news = False
        self._waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """There is something to look at."""
        self._news = True
        if self._waiter is not None:
            _finish(self._waiter)

    def seen(self) -> None:
        """The stream looks at what there is now; only what comes later is news."""
        self._news = False

    async def news(self, seconds: float) -> bool:
        """Wait for news, at most so many seconds; whether there is any."""
        if not self._news:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            timeout = loop.call_later(seconds, _finish, waiter)
            try:
                await waiter
            finally:
                timeout.cancel()
                self._waiter = None
        return self._news


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
