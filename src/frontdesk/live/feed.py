"""Live queues: one tailer a process reads what has changed, and all watchers of a doctor-day share what it read.

Level-triggered throughout: a call of `changed`, a hint from another process and the poll only say "look". The truth is
the revision in the database. A hint that is lost costs at most one poll.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date

from frontdesk.core.queue import Paces, View, read_changes_of, read_queues, read_revisions
from frontdesk.db.database import Database
from frontdesk.errors import DatabaseUnavailable, DoctorNotFound, Refused
from frontdesk.live.hints import QUEUE, Hints
from frontdesk.live.subscription import DoctorDayKey, Subscription, Topic, Updates
from frontdesk.tasks import Background

POLL_SECONDS = 0.2
"""How late a watcher sees a change if every hint of it was lost."""

_READ_AT_ONCE = 32
_MOST_CHANGES = 1_000
"""Of a doctor-day that has changed more often since the last reading, streams read what they need."""


class Feed:
    """The process's one tailer, and its watchers."""

    def __init__(
        self,
        db: Database,
        hints: Hints,
        updates: Updates,
        *,
        keep_seconds: float,
        seen: Callable[[int], None] | None = None,
    ) -> None:
        """Changes older than `keep_seconds`, of days as long ago, are not shown to watchers that resume.

        `seen` is called with the `change_micros` of each change once its watchers are awake.
        """
        self._db = db
        self._updates = updates
        self._keep_seconds = keep_seconds
        self._seen = seen
        self._all_read_at = 0.0
        self._topics: dict[DoctorDayKey, Topic] = {}
        self._look: set[DoctorDayKey] = set()
        self._wake = asyncio.Event()
        self._hints = hints
        hints.hear(QUEUE, self._heard, lambda: self._look_at(*self._topics))
        self._background = Background()
        self.paces = Paces()
        """Of the doctors whose queues were read, here or by others."""

    def start(self) -> None:
        """Begin to tail."""
        self._background.start(self._tail)

    async def close(self) -> None:
        """End the tasks."""
        await self._background.close()

    def changed(self, doctor_id: str, day: date) -> None:
        """A doctor-day has changed: look now, and tell the other processes soon."""
        self._look_at((doctor_id, day))
        self._hints.send(QUEUE, f"{doctor_id}/{day}")

    def subscribe(self, doctor_id: str, day: date, view: View) -> Subscription:
        """Watch a doctor-day until the end of the `with` block that this begins."""
        key = (doctor_id, day)
        if not self._topics:
            # Nothing was polled while nobody watched.
            self._all_read_at = asyncio.get_running_loop().time()
        topic = self._topics.get(key)
        if topic is None:
            topic = self._topics[key] = Topic(key, self._db, self._updates, self._keep_seconds, look=self._look_at)
        return Subscription(topic, view, self._unsubscribed)

    @property
    def backlog(self) -> int:
        """Watched doctor-days that wait to be read."""
        return len(self._look)

    @property
    def age(self) -> float:
        """Seconds since all watched doctor-days were last seen as they are; 0 if none is watched."""
        return asyncio.get_running_loop().time() - self._all_read_at if self._topics else 0.0

    def _unsubscribed(self, topic: Topic) -> None:
        if not topic.watchers and self._topics.get(topic.key) is topic:
            del self._topics[topic.key]

    def _heard(self, hints: Sequence[str]) -> None:
        self._look_at(*((hint[:36], date.fromisoformat(hint[37:])) for hint in hints))

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
            asked = [(topic, reader) for topic in topics for reader in topic.take_readers()]
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

    async def _refresh(self, topics: Sequence[Topic]) -> dict[Topic, Refused]:
        """Read those of these that have changed; the refusals of those whose doctor does not exist."""
        refused: dict[Topic, Refused] = {}
        if not topics:
            return refused
        revisions = await read_revisions(self._db, [topic.key for topic in topics])
        grown = [
            topic
            for topic in topics
            if topic.queue is None or (topic.queue.revision, topic.queue.change_micros) != revisions[topic.key]
        ]
        for start in range(0, len(grown), _READ_AT_ONCE):
            await self._read(grown[start : start + _READ_AT_ONCE], refused)
        return refused

    async def _read(self, topics: Sequence[Topic], refused: dict[Topic, Refused]) -> None:
        found = await read_queues(self._db, self.paces, [topic.key for topic in topics])
        queues = {(queue.doctor_id, queue.date): queue for queue in found}
        since = []
        for topic in topics:
            known = 0 if topic.queue is None else topic.queue.revision
            now = queues[topic.key].revision if topic.key in queues else 0
            if 0 < known < now:
                # The known revision as well: it shows whether this is still the same history.
                since.append((*topic.key, known, now if now - known <= _MOST_CHANGES else known))
        changes = await read_changes_of(self._db, since, self._keep_seconds) if since else {}
        for topic in topics:
            queue = queues.get(topic.key)
            if queue is None:
                refused[topic] = DoctorNotFound(topic.key[0])
                continue
            news = topic.take(queue, changes.get(topic.key, ()))
            if self._seen is not None:
                for change in news:
                    self._seen(change.change_micros)
