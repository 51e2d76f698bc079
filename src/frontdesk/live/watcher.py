"""Streams that wait for news, and the limits of their number."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from frontdesk.core.caller import Identity
from frontdesk.errors import TooManyWatchers


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


class Watchers:
    """All open streams of this process, whatever they watch."""

    def __init__(self, *, most: int, most_of_caller: int) -> None:
        self._most = most
        self._most_of_caller = most_of_caller
        self._held: Counter[str] = Counter()
        self._open: set[Watcher] = set()
        self.draining = False
        """Whether the server stops."""

    def __len__(self) -> int:
        return len(self._open)

    def require_room(self, identity: Identity) -> None:
        """Raise TooManyWatchers if this caller may open no further stream."""
        if len(self._open) >= self._most:
            raise TooManyWatchers
        of_caller = self._held[identity.name]
        if of_caller >= self._most_of_caller and not identity.unrestricted:
            raise TooManyWatchers(identity.name, {"watchers": of_caller})

    @contextmanager
    def counting(self, watcher: Watcher, holder: str) -> Iterator[None]:
        """A block in which the stream is open; `holder` is its caller's identity."""
        self._open.add(watcher)
        self._held[holder] += 1
        try:
            yield
        finally:
            self._open.discard(watcher)
            self._held[holder] -= 1
            if not self._held[holder]:
                del self._held[holder]

    def drain(self) -> None:
        """Wake every stream to tell it that the server stops."""
        self.draining = True
        for watcher in self._open:
            watcher.wake()
