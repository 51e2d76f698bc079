"""Live queues: one tailer a process reads what has changed, and every watcher of a doctor-day shares what it read.

Level-triggered throughout. A call of `changed`, a hint from another process and the poll only say "look"; what is true
is the revision in the database. A hint that is lost costs at most one poll.
"""

import asyncio
import base64
import binascii
import json
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from types import TracebackType

from frontdesk.core.queue import (
    Queue,
    QueueChange,
    read_changes,
    read_changes_of,
    read_queues,
    read_revisions,
    with_positions,
)
from frontdesk.db.database import Database
from frontdesk.errors import DatabaseUnavailable, DoctorNotFound, InvalidField, Refused
from frontdesk.tasks import Background

DoctorDayKey = tuple[str, date]

Render = Callable[[Queue, Sequence[QueueChange], int, str], bytes]
"""Serialise an update: the queue, the changes, the previous revision (0 = fresh start) and the resume token."""

POLL_SECONDS = 0.2
"""How late a watcher sees a change of which every hint was lost."""

_HINT_PAUSE = 0.02
_HINTS_A_MESSAGE = 150  # of at most 48 bytes each; a payload holds 8,000
_KEPT_CHANGES = 256
_READ_AT_ONCE = 32
_CHANNEL = "frontdesk_changed"


@dataclass(frozen=True, slots=True)
class ResumeToken:
    """Where a stream stood. The stamp tells the revision from another of the same number after a restore."""

    doctor_id: str
    date: date
    revision: int
    stamp: int

    def encode(self) -> str:
        """As it is put on the wire; opaque there."""
        packed = json.dumps([self.doctor_id, self.date.isoformat(), self.revision, self.stamp], separators=(",", ":"))
        return base64.urlsafe_b64encode(packed.encode()).decode()

    @classmethod
    def decode(cls, text: str) -> "ResumeToken":
        """Raises InvalidField where this server's encode cannot have made it."""
        try:
            doctor, day, revision, stamp = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
            token = cls(str(uuid.UUID(doctor)), date.fromisoformat(day), int(revision), int(stamp))
        except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, binascii.Error):
            raise InvalidField(("resume_token", "is malformed")) from None
        if token.encode() != text:
            raise InvalidField(("resume_token", "is malformed"))
        return token


class _Topic:
    """One watched doctor-day: its present queue, its latest changes and who watches it."""

    def __init__(self, key: DoctorDayKey) -> None:
        self.key = key
        self.queue: Queue | None = None
        self.changes: deque[QueueChange] = deque(maxlen=_KEPT_CHANGES)
        self.history = 0
        """Grows when the database is another than the one that was read before."""
        self.watchers: set[Subscription] = set()
        self.messages: dict[int, bytes] = {}
        """Updates to the present revision by the revision they start from, each serialised once."""
        self.readers: list[asyncio.Future[None]] = []
        """Who waits for a reading that begins after they asked."""


class Feed:
    """The process's one tailer, and its watchers."""

    def __init__(self, db: Database, render: Render, *, seen: Callable[[int], None] | None = None) -> None:
        """`seen` is called with the stamp of each change once its watchers are awake."""
        self._db = db
        self._render = render
        self._seen = seen
        self._all_read_at = 0.0
        self._topics: dict[DoctorDayKey, _Topic] = {}
        self._look: set[DoctorDayKey] = set()
        self._wake = asyncio.Event()
        self._hints: set[DoctorDayKey] = set()
        self._hint_wake = asyncio.Event()
        self._me = uuid.uuid4().hex[:12]
        self._background = Background()
        self.watchers = 0
        """How many streams are open."""
        self.draining = False

    def start(self) -> None:
        """Begin to tail, to listen for the hints of other processes and to send ours."""
        for work in (self._tail, self._send_hints):
            self._background.start(work)
        if self._db.listens:
            self._background.start(self._listen)

    async def close(self) -> None:
        """End the tasks."""
        await self._background.close()

    def drain(self) -> None:
        """Wake every watcher to tell it that the server stops."""
        self.draining = True
        for topic in self._topics.values():
            for watcher in topic.watchers:
                watcher.wake()

    def changed(self, doctor_id: str, day: date) -> None:
        """A doctor-day has changed: look now, and tell the other processes soon."""
        key = (doctor_id, day)
        self._look_at(key)
        self._hints.add(key)
        self._hint_wake.set()

    def subscribe(self, doctor_id: str, day: date) -> "Subscription":
        """Watch a doctor-day, from the entry of this context manager to its exit."""
        return Subscription(self, (doctor_id, day))

    @property
    def backlog(self) -> int:
        """Watched doctor-days that wait to be read."""
        return len(self._look)

    @property
    def age(self) -> float:
        """Seconds since all watched doctor-days were last seen as they are; 0 where none is watched."""
        return asyncio.get_running_loop().time() - self._all_read_at if self._topics else 0.0

    def _look_at(self, *keys: DoctorDayKey) -> None:
        for key in keys:
            if key in self._topics:
                self._look.add(key)
                self._wake.set()

    async def _tail(self) -> None:
        now = asyncio.get_running_loop().time
        poll_at = now()
        while True:
            # At its own time, however often something else wakes us; without watchers there is nothing to poll.
            with suppress(TimeoutError):
                async with asyncio.timeout_at(poll_at if self._topics else None):
                    await self._wake.wait()
            began = now()
            polls = began >= poll_at
            if polls:
                self._look |= self._topics.keys()
                poll_at = began + POLL_SECONDS
            self._wake.clear()
            look, self._look = self._look, set()
            topics = [topic for key in look if (topic := self._topics.get(key)) is not None]
            # Those who ask from now on wait for the next round: this one may have read already.
            asked = [(topic, reader) for topic in topics for reader in topic.readers]
            for topic in topics:
                topic.readers = []
            try:
                refused = await self._refresh(topics)
            except BaseException:
                self._look |= look
                for _, reader in asked:
                    if not reader.done():
                        reader.set_exception(DatabaseUnavailable())
                raise
            if polls:
                self._all_read_at = began
            for topic, reader in asked:
                if reader.done():
                    continue
                if topic in refused:
                    reader.set_exception(refused[topic])
                else:
                    reader.set_result(None)

    async def _refresh(self, topics: Sequence[_Topic]) -> dict[_Topic, Refused]:
        """Read what has changed of these; the refusals, where there is no such doctor."""
        refused: dict[_Topic, Refused] = {}
        if not topics:
            return refused
        revisions = await read_revisions(self._db, [topic.key for topic in topics])
        grown = [
            topic
            for topic in topics
            if topic.queue is None or (topic.queue.revision, topic.queue.stamp) != revisions[topic.key]
        ]
        for start in range(0, len(grown), _READ_AT_ONCE):
            await self._read(grown[start : start + _READ_AT_ONCE], refused)
        return refused

    async def _read(self, topics: Sequence[_Topic], refused: dict[_Topic, Refused]) -> None:
        found = await read_queues(self._db, [topic.key for topic in topics])
        queues = {(queue.doctor_id, queue.date): queue for queue in found}
        since = [
            (*topic.key, topic.queue.revision, queues[topic.key].revision)
            for topic in topics
            if topic.queue is not None and topic.key in queues and queues[topic.key].revision > topic.queue.revision
        ]
        changes = await read_changes_of(self._db, since) if since else {}
        for topic in topics:
            known = topic.queue
            queue = queues.get(topic.key)
            if queue is None:
                refused[topic] = DoctorNotFound(topic.key[0])
                continue
            news: Sequence[QueueChange] = ()
            goes_on = False
            if known is not None and queue.revision > known.revision:
                news = changes.get(topic.key, [])
                # Nothing is kept of the revision 1, at which a doctor-day begins.
                goes_on = known.revision == 1
                if news and news[0].revision == known.revision:
                    goes_on = news[0].stamp == known.stamp
                    news = news[1:]
            if goes_on:
                topic.changes.extend(news)
            else:
                # The first reading, or a database that was restored under us: what we kept is of another history.
                news = ()
                topic.history += 1
                topic.changes.clear()
            topic.queue = queue
            topic.messages = {}
            for watcher in topic.watchers:
                watcher.wake()
            if self._seen is not None:
                for change in news:
                    self._seen(change.stamp)

    async def _listen(self) -> None:
        async with self._db.listening(_CHANNEL) as payloads:
            # What was hinted while nobody listened.
            self._look_at(*self._topics)
            async for payload in payloads:
                sender, *keys = payload.split()
                if sender != self._me:
                    self._look_at(*((key[:36], date.fromisoformat(key[37:])) for key in keys))

    async def _send_hints(self) -> None:
        while True:
            await self._hint_wake.wait()
            self._hint_wake.clear()
            hints, self._hints = list(self._hints), set()
            for start in range(0, len(hints), _HINTS_A_MESSAGE):
                keys = " ".join(f"{doctor}/{day}" for doctor, day in hints[start : start + _HINTS_A_MESSAGE])
                # Not in a writer's transaction: NOTIFY serialises commits over the whole database. A hint may be lost,
                # so its own commit waits for no disk.
                await self._db.row(
                    "select set_config('synchronous_commit', 'off', true), pg_notify(%s, %s)",
                    (_CHANNEL, f"{self._me} {keys}"),
                    lambda *_: None,
                )
            await asyncio.sleep(_HINT_PAUSE)


class Subscription:
    """One stream's view of a doctor-day: what it was sent last, and that there is news. Nothing is queued for it."""

    def __init__(self, feed: Feed, key: DoctorDayKey) -> None:
        self._feed = feed
        self._key = key
        self._news = False
        self._waiter: asyncio.Future[None] | None = None
        self._sent = 0
        self._sent_stamp = 0
        self._sent_history = 0

    def __enter__(self) -> "Subscription":
        if not self._feed._topics:
            # Nothing was polled while nobody watched.
            self._feed._all_read_at = asyncio.get_running_loop().time()
        self._topic = self._feed._topics.setdefault(self._key, _Topic(self._key))
        self._topic.watchers.add(self)
        self._feed.watchers += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._topic.watchers.discard(self)
        self._feed.watchers -= 1
        if not self._topic.watchers and self._feed._topics.get(self._key) is self._topic:
            del self._feed._topics[self._key]

    @property
    def revision(self) -> int:
        """What the watcher knows."""
        return self._sent

    @property
    def token(self) -> str:
        """Resumes after what the watcher knows."""
        return ResumeToken(*self._key, self._sent, self._sent_stamp).encode()

    def wake(self) -> None:
        """There is news, or the feed drains."""
        self._news = True
        if self._waiter is not None:
            _let_go(self._waiter)

    async def begin(self, resume: ResumeToken | None) -> bytes | None:
        """The first message: the whole queue as of now, or what has changed since the token; None if nothing has.

        Raises DatabaseUnavailable, DoctorNotFound.
        """
        # A reading that starts after this moment, shared by all who ask meanwhile: it sees every acknowledged change.
        reading = asyncio.get_running_loop().create_future()
        self._topic.readers.append(reading)
        self._feed._look_at(self._key)
        await reading
        queue = self._topic.queue
        assert queue is not None
        if resume is not None and await self._still_true(resume, queue):
            self._sent, self._sent_stamp, self._sent_history = resume.revision, resume.stamp, self._topic.history
            return await self.latest()
        self._news = False
        return await self._message_from(0, queue)

    async def latest(self) -> bytes | None:
        """The update from what the watcher knows to the present revision; None where that is what it knows."""
        self._news = False
        queue = self._topic.queue
        assert queue is not None
        if (queue.revision, queue.stamp) == (self._sent, self._sent_stamp):
            return None
        return await self._message_from(self._sent, queue)

    async def news(self, seconds: float) -> bool:
        """Wait for news, at most so long; whether there is any."""
        if not self._news:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            alarm = loop.call_later(seconds, _let_go, waiter)
            try:
                await waiter
            finally:
                alarm.cancel()
                self._waiter = None
        return self._news

    async def _message_from(self, previous: int, queue: Queue) -> bytes:
        topic = self._topic
        history = topic.history
        if previous > queue.revision or self._sent_history != history:
            previous = 0
        if previous not in topic.messages or topic.queue is not queue:
            changes: Sequence[QueueChange] = ()
            if previous:
                changes = [change for change in topic.changes if previous < change.revision <= queue.revision]
                if len(changes) != queue.revision - previous:
                    changes = await read_changes(self._feed._db, *self._key, previous + 1, queue.revision)
                if len(changes) != queue.revision - previous:
                    # Longer ago than what is kept.
                    previous, changes = 0, ()
            token = ResumeToken(*self._key, queue.revision, queue.stamp).encode()
            message = self._feed._render(queue, with_positions(changes, queue), previous, token)
            if topic.queue is queue:
                topic.messages[previous] = message
        else:
            message = topic.messages[previous]
        self._sent, self._sent_stamp, self._sent_history = queue.revision, queue.stamp, history
        return message

    async def _still_true(self, token: ResumeToken, queue: Queue) -> bool:
        """Whether the token's revision is one of this database's history."""
        if token.revision > queue.revision:
            return False
        if token.revision == queue.revision:
            return token.stamp == queue.stamp
        if token.revision == 1:
            return token.stamp == 0
        return any(
            change.stamp == token.stamp
            for change in await read_changes(self._feed._db, *self._key, token.revision, token.revision)
        )


def _let_go(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
