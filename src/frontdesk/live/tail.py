"""Events as they happen: one tailer a process reads each new stretch of the log once, and all readers share that.

Level-triggered like the feed of queues: a hint and the poll only say "look". A reader keeps its place in the log and
nothing else. One that is behind what the tailer keeps reads pages from the database by itself until it has joined.
"""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple

from frontdesk.core.event import AT_ONCE, EVERYTHING, MERGED, Cursor, Event, Events, Reach, patients_of
from frontdesk.errors import CursorGone
from frontdesk.live.hints import SEALED, Hints
from frontdesk.live.watcher import Watcher
from frontdesk.tasks import Background

POLL_SECONDS = 0.25
"""How late a reader sees an event if every hint of it was lost."""

_KEPT = 2_000
"""Events that the tailer keeps for its readers: more than can come between two looks of one that keeps up."""
SLICE = 25
"""Events that are serialised without a pause: others want their turn."""
_MOST_READING = 2
"""Readers that are behind and read at once: calls need the connections too."""

_Key = tuple[str, str | None]


class Told(NamedTuple):
    """An event, and how it is told."""

    event: Event
    message: bytes


class Tail:
    """The process's one tailer of the log, and its readers."""

    def __init__(
        self,
        events: Events,
        hints: Hints,
        serialise: Callable[[Event], bytes],
        *,
        seen: Callable[[int], None] | None = None,
    ) -> None:
        """`serialise` makes the message of an event. `seen` is called with the age of the newest event, in microseconds
        since 1970, once its readers are awake.
        """
        self._events = events
        self._serialise = serialise
        self._seen = seen
        self._wake = asyncio.Event()
        hints.hear(SEALED, lambda _: self._wake.set(), self._wake.set)
        self._background = Background()
        self._readers: dict[_Key, set[Reader]] = {}
        self._reading = asyncio.Semaphore(_MOST_READING)
        self._told: list[Told] = []
        self._positions: list[int] = []
        self._start = 0
        self.end: Cursor | None = None
        """Up to where the log was read; None while nobody reads."""
        self.backlog = 0
        """Rows of the log that are still to be read."""

    def start(self) -> None:
        """Begin to tail."""
        self._background.start(self._follow)

    async def close(self) -> None:
        """End the task."""
        await self._background.close()

    async def page(self, after: Cursor, reach: Reach, *, resumes: bool) -> tuple[Sequence[Told], Cursor, int]:
        """The events after a place from the database, the place up to which they go, and the last position.

        Raises CursorLost, CursorTooOld, DatabaseUnavailable.
        """
        async with self._reading:
            found = await self._events.read(after, reach, AT_ONCE, resumes=resumes)
            return await self._tell(found.events), found.end, found.last

    def has(self, place: Cursor) -> bool:
        """Whether everything after this place is kept, or still to come."""
        return self.end is not None and self._start <= place.position

    def after(self, place: Cursor) -> tuple[Sequence[Told], Cursor, bool]:
        """What is kept after this place, but at most so much as is read at once; up to where; whether there is more."""
        assert self.end is not None
        first = bisect_right(self._positions, place.position)
        found = self._told[first : first + AT_ONCE]
        if first + AT_ONCE < len(self._told):
            return found, found[-1].event.cursor, True
        return found, max(self.end, place), False

    def reader(self, place: Cursor, reach: Reach, *, resumes: bool, without: Collection[str] = ()) -> "Reader":
        """Read from this place on until the end of the `with` block that this begins.

        `resumes`: the reader has come with the place, so he is told if he has missed something. `without` are the ids
        of events that he is not shown.
        """
        return Reader(self, place, reach, resumes=resumes, without=without)

    def add(self, reader: "Reader", keys: Set[_Key]) -> None:
        """Wake the reader from now on for events with one of these keys."""
        for key in keys:
            self._readers.setdefault(key, set()).add(reader)
        self._wake.set()

    def remove(self, reader: "Reader", keys: Set[_Key]) -> None:
        """Wake it no more."""
        for key in keys:
            readers = self._readers[key]
            readers.discard(reader)
            if not readers:
                del self._readers[key]

    async def _tell(self, events: Sequence[Event]) -> Sequence[Told]:
        told: list[Told] = []
        for first in range(0, len(events), SLICE):
            if first:
                await asyncio.sleep(0)
            told += [Told(event, self._serialise(event)) for event in events[first : first + SLICE]]
        return told

    async def _follow(self) -> None:
        while True:
            # Nobody pays for a log that nobody reads.
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS if self._readers else None):
                    await self._wake.wait()
            self._wake.clear()
            if not self._readers:
                self._forget()
                continue
            if self.end is None:
                self.end = await self._events.now()
                self._start = self.end.position
            while await self._read(self.end):
                pass

    def _forget(self) -> None:
        self._told, self._positions = [], []
        self.end = None
        self.backlog = 0

    async def _read(self, end: Cursor) -> bool:
        """Read what follows; whether there is more."""
        try:
            found = await self._events.read(end, EVERYTHING, AT_ONCE)
        except CursorGone:
            # Another database has taken the place of this one. The readers look for their places, and are told.
            self._forget()
            self._wake_those_of(None)
            self._wake.set()
            return False
        if found.end != end:
            before = end
            told = await self._tell(found.events)
            self._told += told
            self._positions += [event.position for event in found.events]
            self.end = found.end
            if len(self._told) > 2 * _KEPT:
                self._start = self._positions[-_KEPT - 1]
                del self._told[:-_KEPT], self._positions[:-_KEPT]
            self._wake_those_of(found.events, before)
            if self._seen is not None and found.events:
                self._seen(int(found.events[0].time.timestamp() * 1e6))
        self.backlog = found.last - found.end.position
        return self.backlog > 0

    def _wake_those_of(self, events: Sequence[Event] | None, before: Cursor | None = None) -> None:
        """Wake those whom these events may concern, or everybody; for the others nothing has happened."""
        keys = {*self._readers}
        if events is not None:
            keys &= {key for event in events for key in _keys_of(event)}
        for key in keys:
            for reader in self._readers[key]:
                reader.touch(before)


def _keys_of(event: Event) -> Iterator[_Key]:
    yield "", None
    if event.doctor_id is not None:
        yield "doctor", event.doctor_id
    if event.clinic_id is not None:
        yield "clinic", event.clinic_id
    for patient_id in patients_of(event):
        yield "patient", patient_id


class Reader(Watcher):
    """One stream's place in the log, and the events that it is shown.

    A context manager; at its end it reads no more.
    """

    __slots__ = ("_joined", "_keys", "_reach", "_resumes", "_tail", "_without", "place")

    def __init__(self, tail: Tail, place: Cursor, reach: Reach, *, resumes: bool, without: Collection[str]) -> None:
        super().__init__()
        self.place = place
        """Up to where the log was read for it."""
        self._reach = reach
        self._keys: frozenset[_Key] = frozenset()
        self._tail = tail
        self._resumes = resumes
        self._without = set(without)
        self._joined = False

    def __enter__(self) -> "Reader":
        self.reach = self._reach
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tail.remove(self, self._keys)

    @property
    def reach(self) -> Reach:
        """What it is shown."""
        return self._reach

    @reach.setter
    def reach(self, reach: Reach) -> None:
        self._reach = reach
        new = _keys_of_reach(reach) - self._keys
        self._keys |= new
        self._tail.add(self, new)

    def touch(self, before: Cursor | None) -> None:
        """Something that follows `before` may concern it; without a place, everything is different."""
        if before is None:
            self._joined = False
        elif self._joined and not self._news:
            self.place = max(self.place, before)
        self.wake()

    async def read(self) -> Sequence[Told]:
        """What follows, as far as it is at hand; there is more while `news` says so.

        Raises CursorLost, CursorTooOld, DatabaseUnavailable.
        """
        tail, news = self._tail, self._news
        self.seen()
        if not self._joined or not tail.has(self.place):
            # A place with which a reader has come is known only to the database.
            if self._resumes or not tail.has(self.place):
                return self._shown(await self._page())
            self._joined = news = True
        if not news:
            # Whatever has happened since did not concern it.
            assert tail.end is not None
            self.place = max(self.place, tail.end)
            return ()
        found, self.place, more = tail.after(self.place)
        if more:
            self.wake()
        return self._shown([told for told in found if self._reach.passes(told.event)])

    async def _page(self) -> Sequence[Told]:
        self._joined = False
        found, self.place, last = await self._tail.page(self.place, self._reach, resumes=self._resumes)
        self._resumes = False
        # Again soon: to read on, or to join.
        if self.place.position < last or self._tail.has(self.place):
            self.wake()
        return found

    def _shown(self, found: Sequence[Told]) -> Sequence[Told]:
        if self._without:
            found = [told for told in found if told.event.id not in self._without]
        patients = self._reach.patient_ids
        if patients is None:
            return found
        for number, told in enumerate(found):
            if told.event.type == MERGED and not patients.issuperset(merged := patients_of(told.event)):
                # From here on, what concerns one of the records concerns the other: look again.
                self.reach = replace(self._reach, patient_ids=patients.union(merged))
                self.place = told.event.cursor
                self.wake()
                return found[: number + 1]
        return found

    def back_to(self, place: Cursor) -> None:
        """What was read after this place was not sent."""
        self.place = place
        self._joined = False
        self.wake()


def _keys_of_reach(reach: Reach) -> frozenset[_Key]:
    if reach.patient_ids is not None:
        return frozenset(("patient", one) for one in reach.patient_ids)
    if reach.doctor_id is not None:
        return frozenset({("doctor", reach.doctor_id)})
    return frozenset({("", None) if reach.clinic_id is None else ("clinic", reach.clinic_id)})
