"""Hints between the processes of a service, by PostgreSQL's NOTIFY and LISTEN: something has changed, so look.

A hint may be lost. Whoever hears of them must poll as well; a hint only makes the poll come sooner.
"""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from frontdesk.db.database import Database
from frontdesk.tasks import Background

_PAUSE_SECONDS = 0.02
_HINTS_A_MESSAGE = 140  # of at most 54 characters each, without blanks; a payload holds 8,000 bytes
_CHANNEL = "frontdesk_changed"

QUEUE = "queue"
"""Doctor-days that have changed, as DOCTOR/DATE."""
SEALED = "log"
"""The sealed log has grown; the hint is empty."""


class _Ear(NamedTuple):
    heard: Callable[[Sequence[str]], None]
    connected: Callable[[], None]


class Hints:
    """Sends what has changed here, and hears what has changed in other processes. One of each process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._ears: dict[str, _Ear] = {}
        self._unsent: set[str] = set()
        self._wake = asyncio.Event()
        self._background = Background()
        self._sender = uuid.uuid4().hex[:12]
        """Tells our own messages from those of others."""

    def hear(self, topic: str, heard: Callable[[Sequence[str]], None], connected: Callable[[], None]) -> None:
        """Before `start`: `heard` is called with the hints of other processes; `connected` when we begin to listen.

        Hints from before `connected` are lost.
        """
        self._ears[topic] = _Ear(heard, connected)

    def start(self) -> None:
        """Send from now on, and listen if somebody wants to hear and the database can be listened to."""
        self._background.start(self._send)
        if self._ears and self._db.listens:
            self._background.start(self._listen)

    async def close(self) -> None:
        """End the tasks."""
        await self._background.close()

    def send(self, topic: str, hint: str = "") -> None:
        """Tell the other processes soon; equal hints of the same moment are sent once."""
        self._unsent.add(f"{topic}:{hint}")
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
                    (_CHANNEL, message),
                    lambda *_: None,
                )
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _listen(self) -> None:
        async with self._db.listening(_CHANNEL) as payloads:
            for ear in self._ears.values():
                ear.connected()
            async for payload in payloads:
                sender, *hints = payload.split()
                if sender == self._sender:
                    continue
                by_topic: dict[str, list[str]] = {}
                for hint in hints:
                    topic, _, text = hint.partition(":")
                    by_topic.setdefault(topic, []).append(text)
                for topic, texts in by_topic.items():
                    if topic in self._ears:
                        self._ears[topic].heard(texts)
