"""A watched doctor-day, which its streams share, and one stream's view of it."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence, Set
from datetime import date
from types import TracebackType
from typing import NamedTuple, Protocol

from frontdesk.core.queue import OWN, Queue, QueueChange, View, as_of, estimated_now, read_changes
from frontdesk.db.database import Database
from frontdesk.live.tokens import ResumeToken
from frontdesk.live.watcher import Watcher

DoctorDayKey = tuple[str, date]

MOST_BYTES = 1024 * 1024
"""The most that an update may have with its changes; if it had more, the stream starts afresh, without any."""

_KEPT_CHANGES = 256
_CHANGES_AT_ONCE = 500
"""So many are read and serialised at once; the worker does other things in between."""
_LEAST_BYTES = 12
"""No change has fewer on the wire."""
_KEPT_BYTES = 8 * MOST_BYTES
"""Of updates that wait for further streams that start from the same revision."""


class Updates(Protocol):
    """Serialises updates."""

    def changes(self, changes: Sequence[QueueChange]) -> bytes:
        """A part of an update's changes."""
        ...

    def update(self, queue: Queue, changes: Sequence[bytes], previous: int, token: str) -> bytes:
        """The update with these parts of its changes, from the revision `previous`; 0 is a fresh start."""
        ...

    def heartbeat(self, queue: Queue) -> bytes:
        """What a heartbeat says: the estimates of a queue that stands still."""
        ...


class Update(NamedTuple):
    """A message that brings a stream to a revision of a history."""

    queue: Queue
    history: int
    message: "Message"


class Message(NamedTuple):
    """An update on the wire."""

    data: bytes
    patient_ids: frozenset[str]
    """The patients whom it names."""


class Topic:
    """One watched doctor-day: its present queue, its latest changes, and its watchers.

    The tailer hands in what it has read (`take`); all the streams of the doctor-day share that.
    """

    def __init__(
        self,
        key: DoctorDayKey,
        db: Database,
        updates: Updates,
        keep_seconds: float,
        *,
        look: Callable[[DoctorDayKey], None],
    ) -> None:
        """`keep_seconds` as in `Feed`; `look` asks the tailer to read this doctor-day soon."""
        self.key = key
        self.queue: Queue | None = None
        self.watchers: set[Watcher] = set()
        self.history = 0
        """Grows when the database is another than the one that was read before."""
        self._db = db
        self._updates = updates
        self._keep_seconds = keep_seconds
        self._look = look
        self._changes: deque[QueueChange] = deque(maxlen=_KEPT_CHANGES)
        self._messages: dict[tuple[View, int], Message] = {}
        """Updates to the present revision by view and the revision they start from, each serialised once."""
        self._heartbeat: tuple[Queue, float, bytes] | None = None
        """The latest, of which queue and moment."""
        self._reading_changes = asyncio.Lock()
        self._readers: list[asyncio.Future[None]] = []
        """Those who wait for a reading that begins after they asked."""

    async def read(self) -> Queue:
        """The queue by a reading that begins after this moment, so that it has every acknowledged change.

        All who ask meanwhile share it. Raises DatabaseUnavailable, DoctorNotFound.
        """
        reading = asyncio.get_running_loop().create_future()
        self._readers.append(reading)
        self._look(self.key)
        await reading
        assert self.queue is not None
        return self.queue

    def take_readers(self) -> list[asyncio.Future[None]]:
        """Those who wait for a reading; who asks from now on waits for the next one."""
        readers, self._readers = self._readers, []
        return readers

    def take(self, queue: Queue, changes: Sequence[QueueChange]) -> Sequence[QueueChange]:
        """The tailer has read this queue, and the changes from the known revision on, that revision included.

        Wakes the watchers. Answers the changes that are new to them.
        """
        known, self.queue = self.queue, queue
        news: Sequence[QueueChange] = ()
        goes_on = False
        if known is not None and queue.revision > known.revision:
            news = changes
            # No change made revision 1, at which a doctor-day begins, so there is none to compare with.
            goes_on = known.revision == 1
            if news and news[0].revision == known.revision:
                goes_on = news[0].change_micros == known.change_micros
                news = news[1:]
        if goes_on:
            self._changes.extend(news)
        else:
            # The first reading, or a database that was restored under us: the changes we kept are of another history.
            news = ()
            self.history += 1
            self._changes.clear()
        self._messages = {}
        for watcher in self.watchers:
            watcher.wake()
        return news

    async def update(self, view: View, previous: int, history: int) -> Update:
        """The update to the present revision, from the revision `previous` of that history; 0 is a fresh start."""
        found = self._at_hand(view, previous, history)
        if found is None:
            # One after the other: many streams that come back at once may start from the same revision.
            async with self._reading_changes:
                found = self._at_hand(view, previous, history) or await self._read_update(view, previous)
        return found

    def _at_hand(self, view: View, previous: int, history: int) -> Update | None:
        """The update, if that needs no changes but those that are kept."""
        queue = self.queue
        assert queue is not None
        if history != self.history or previous > queue.revision:
            previous = 0
        message = self._messages.get((view, previous))
        if message is None:
            changes: Sequence[QueueChange] = ()
            if previous:
                changes = [change for change in self._changes if previous < change.revision <= queue.revision]
                if len(changes) != queue.revision - previous:
                    return None
            shown = view.changes(as_of(changes, queue))
            parts = (self._updates.changes(shown),) if shown else ()
            message = self._serialised(view, queue, parts, previous, _patients(shown))
        return Update(queue, self.history, message)

    async def _read_update(self, view: View, previous: int) -> Update:
        """The update with changes from the database; a fresh start if it has not all of them, or too many."""
        queue, history = self.queue, self.history
        assert queue is not None
        parts: list[bytes] | None = []
        patient_ids: set[str] = set()
        size = 0
        first = previous + 1
        while parts is not None and first <= queue.revision:
            last = min(first + _CHANGES_AT_ONCE - 1, queue.revision)
            changes: Sequence[QueueChange] = ()
            if size + (queue.revision - first + 1) * _LEAST_BYTES <= MOST_BYTES:
                changes = await read_changes(self._db, *self.key, first, last, self._keep_seconds)
            if len(changes) == last - first + 1:
                shown = view.changes(as_of(changes, queue))
                parts.append(self._updates.changes(shown))
                patient_ids |= _patients(shown)
                size += len(parts[-1])
                first = last + 1
            else:
                parts = None
        return Update(queue, history, self._serialised(view, queue, parts, previous, patient_ids))

    def _serialised(
        self, view: View, queue: Queue, parts: Sequence[bytes] | None, previous: int, patient_ids: Set[str]
    ) -> Message:
        """The update with these parts of its changes, which name these patients; a fresh start if there are none, or
        too many.
        """
        token = ResumeToken(*self.key, queue.revision, queue.change_micros, view.name).encode()
        shown = view.queue(estimated_now(queue))
        data = b"" if parts is None else self._updates.update(shown, parts, previous, token)
        if parts is None or (previous and len(data) > MOST_BYTES):
            data, patient_ids = self._updates.update(shown, (), 0, token), frozenset()
        # A view that shows no patient has an empty id.
        message = Message(data, frozenset((patient_ids | {entry.patient_id for entry in shown.entries}) - {""}))
        kept = self._messages
        if self.queue is queue and sum(len(one.data) for one in kept.values()) + len(data) <= _KEPT_BYTES:
            kept[view, previous] = message
        return message

    def heartbeat(self) -> bytes:
        """What the heartbeats of this second say, the same for all streams."""
        queue, now = self.queue, time.monotonic()
        assert queue is not None
        kept = self._heartbeat
        if kept is None or kept[0] is not queue or now > kept[1] + 1:
            kept = self._heartbeat = (queue, now, self._updates.heartbeat(estimated_now(queue)))
        return kept[2]

    async def was(self, token: ResumeToken, queue: Queue) -> bool:
        """Whether the token's revision is one of the history that led to `queue`."""
        if token.revision > queue.revision:
            return False
        if token.revision == queue.revision:
            return token.change_micros == queue.change_micros
        if token.revision == 1:
            return token.change_micros == 0
        return any(
            change.change_micros == token.change_micros
            for change in await read_changes(self._db, *self.key, token.revision, token.revision, self._keep_seconds)
        )


def _patients(changes: Sequence[QueueChange]) -> Set[str]:
    return {change.entry.patient_id for change in changes if change.entry is not None}


class Subscription(Watcher):
    """One stream's view of a doctor-day: what it was sent last, and whether there is news.

    A context manager; at its end the stream no longer watches.
    """

    __slots__ = ("_ended", "_sent", "_sent_history", "_sent_micros", "_topic", "patient_ids", "view")

    def __init__(self, topic: Topic, view: View, ended: Callable[[Topic], None]) -> None:
        """`ended` is called when the stream no longer watches."""
        super().__init__()
        self.view = view
        self._topic = topic
        self._ended = ended
        self._sent = 0
        self._sent_micros = 0
        self._sent_history = 0
        self.patient_ids: frozenset[str] = frozenset()
        """The patients whom the latest message names."""

    def __enter__(self) -> "Subscription":
        self._topic.watchers.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._topic.watchers.discard(self)
        self._ended(self._topic)

    @property
    def queue(self) -> Queue:
        """The queue as it was read last, once the stream has begun."""
        assert self._topic.queue is not None
        return self._topic.queue

    @property
    def revision(self) -> int:
        """The revision that the stream was sent last."""
        return self._sent

    @property
    def token(self) -> str:
        """Resumes after that revision."""
        return ResumeToken(*self._topic.key, self._sent, self._sent_micros, self.view.name).encode()

    @property
    def has_lost_its_own(self) -> bool:
        """Whether the patient of the view OWN has no appointment of the day any more, or another record."""
        queue = self._topic.queue
        assert queue is not None
        return self.view.name == OWN and self.view.patient_id not in queue.patient_ids

    def heartbeat(self) -> bytes:
        """What a heartbeat says now; nothing if there is news, which says more."""
        queue = self._topic.queue
        stands_still = queue is not None and (queue.revision, queue.change_micros) == (self._sent, self._sent_micros)
        return self._topic.heartbeat() if stands_still else b""

    async def begin(self, resume: ResumeToken | None) -> bytes | None:
        """The first message: the whole queue as of now, or the changes since the token; None if there are none.

        Raises DatabaseUnavailable, DoctorNotFound.
        """
        queue = await self._topic.read()
        if resume is not None and resume.view == self.view.name and await self._topic.was(resume, queue):
            self._sent, self._sent_micros = resume.revision, resume.change_micros
            self._sent_history = self._topic.history
        return await self.latest()

    async def latest(self) -> bytes | None:
        """The update from what the stream was sent to the present revision; None if that is the one it was sent."""
        self.seen()
        queue = self._topic.queue
        assert queue is not None
        if (queue.revision, queue.change_micros) == (self._sent, self._sent_micros):
            return None
        queue, self._sent_history, message = await self._topic.update(self.view, self._sent, self._sent_history)
        self._sent, self._sent_micros = queue.revision, queue.change_micros
        self.patient_ids = message.patient_ids
        return message.data
