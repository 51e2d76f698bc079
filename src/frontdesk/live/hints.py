"""Hints between the processes of a service, by PostgreSQL's NOTIFY and LISTEN: something has changed, so look.

A hint may be lost. Whoever hears of them must poll as well; a hint only makes the poll come sooner.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence

from frontdesk.db.database import Database
from frontdesk.tasks import Background

_PAUSE_SECONDS = 0.02
_HINTS_A_MESSAGE = 150  # of at most 48 characters each, without blanks; a payload holds 8,000 bytes


class Hints:
    """Sends what has changed here, and hears what has changed in other processes."""

    def __init__(
        self,
        db: Database,
        channel: str,
        *,
        heard: Callable[[Sequence[str]], None],
        connected: Callable[[], None],
    ) -> None:
        """`heard` is called with the hints of another process; `connected` when we begin to listen.

        Hints from before `connected` are lost.
        """
        self._db = db
        self._channel = channel
        self._heard = heard
        self._connected = connected
        self._unsent: set[str] = set()
        self._wake = asyncio.Event()
        self._sender = uuid.uuid4().hex[:12]
        """Tells our own messages from those of others."""

    def start(self, background: Background) -> None:
        """Send from now on, and listen if the database can be listened to."""
        background.start(self._send)
        if self._db.listens:
            background.start(self._listen)

    def send(self, hint: str) -> None:
        """Tell the other processes soon; equal hints of the same moment are sent once."""
        self._unsent.add(hint)
        self._wake.set()

    async def _send(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            hints, self._unsent = list(self._unsent), set()
            for start in range(0, len(hints), _HINTS_A_MESSAGE):
                message = " ".join([self._sender, *hints[start : start + _HINTS_A_MESSAGE]])
                # Not in a writer's transaction: NOTIFY serialises commits over the whole database. A hint may be lost,
                # so its own commit waits for no disk.
                await self._db.row(
                    "select set_config('synchronous_commit', 'off', true), pg_notify(%s, %s)",
                    (self._channel, message),
                    lambda *_: None,
                )
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _listen(self) -> None:
        async with self._db.listening(self._channel) as payloads:
            self._connected()
            async for payload in payloads:
                sender, *hints = payload.split()
                if sender != self._sender:
                    self._heard(hints)
