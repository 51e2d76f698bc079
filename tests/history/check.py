"""What a history of the service must satisfy, whatever broke meanwhile. Pure: records in, violations out.

A history is what clients saw (operations, reads, watches) and what the database holds afterwards (`Facts`). Every
change was made under a key, so each row of `event` belongs to one remembered key, and each doctor-day can be played
again from its first revision. All times are those of one clock.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

Day = tuple[str, str]
"""A doctor's id and a date (YYYY-MM-DD)."""
Entry = tuple[str, int, str, int]
"""In a line: appointment, ticket, state, position."""
Picture = tuple[tuple[Entry, ...], int]
"""A queue: its entries in order, and how many are booked and not here yet."""
Change = tuple[int, str, str, str, int]
"""Revision, kind, appointment, and the state and ticket in the line (empty and 0 where the line is not touched)."""

OK = "OK"
UNANSWERED = "?"
"""An outcome with this prefix says nothing of whether the change was made; the rest is the status or reason."""
BROKEN = "!"
"""An outcome with this prefix must never be seen."""

WAITING_ROOM = ("WAITING", "CALLED", "IN_CONSULTATION", "PARKED", "MISSED")
LINE = {"WAITING", "CALLED", "PARKED", "MISSED"}
LIVE = {"BOOKED", "IN_CONSULTATION"} | LINE
HOLDING = LIVE | {"DONE"}

STEPS: dict[str, tuple[set[str], str]] = {
    "CHECKED_IN": ({"BOOKED"}, "WAITING"),
    "CALLED": ({"WAITING"}, "CALLED"),
    "CALLED_AGAIN": ({"CALLED"}, "CALLED"),
    "RETURNED": ({"CALLED", "PARKED", "MISSED"}, "WAITING"),
    "PARKED": ({"WAITING", "CALLED"}, "PARKED"),
    "MISSED": ({"CALLED"}, "MISSED"),
    "STARTED": ({"WAITING", "CALLED"}, "IN_CONSULTATION"),
    "COMPLETED": ({"IN_CONSULTATION"}, "DONE"),
    "LEFT": (LINE, "LEFT"),
    "CANCELLED": ({"BOOKED"} | LINE, "CANCELLED"),
    "NO_SHOW": ({"BOOKED"}, "NO_SHOW"),
}
"""From which states a kind of change comes, and to which it leads. Of a visit that is checked in, the state in line."""

KINDS = {
    "BookAppointment": "BOOKED", "RescheduleAppointment": "MOVED_IN", "CancelAppointment": "CANCELLED",
    "MarkNoShow": "NO_SHOW", "CheckIn": "CHECKED_IN", "CallNext": "CALLED", "CallAgain": "CALLED_AGAIN",
    "ReturnToLine": "RETURNED", "ParkPatient": "PARKED", "MarkMissed": "MISSED", "LeaveQueue": "LEFT",
    "StartAppointment": "STARTED", "CompleteAppointment": "COMPLETED",
}  # fmt: skip

_PLACE = {"DAY_FULL", "SLOT_FULL", "DUPLICATE_BOOKING", "PATIENT_OVERLAP"}
REFUSALS: dict[str, set[str]] = {method: {"INVALID_TRANSITION"} for method in KINDS} | {
    "BookAppointment": _PLACE,
    "RescheduleAppointment": _PLACE | {"INVALID_TRANSITION"},
    "CheckIn": {"INVALID_TRANSITION", "ALREADY_CHECKED_IN", "NOT_APPOINTMENT_DATE"},
    "MarkNoShow": {"INVALID_TRANSITION", "TOO_EARLY"},
    "CallNext": {"QUEUE_EMPTY"},
}
"""What the workload of the harness may be refused; it names nobody and nothing that does not exist."""


@dataclass(slots=True)
class Attempt:
    """One call under an operation's key."""

    invoke: float
    complete: float
    outcome: str
    replayed: bool = False
    revision: int = 0
    vacated: int = 0
    appointment: str = ""
    number: int = 0
    state: str = ""
    ticket: int = 0

    @property
    def answer(self) -> tuple[object, ...]:
        """What every answer to the key must say."""
        return (self.appointment, self.revision, self.vacated, self.number, self.state, self.ticket)


@dataclass(slots=True)
class Operation:
    """One intention of a client: a key, and all calls that were made with it."""

    client: int
    key: str
    method: str
    day: Day
    """The doctor-day that it is about, as far as the client knew."""
    appointment: str = ""
    slot: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    given_up: bool = False
    """Nothing answered it although nothing was broken any more."""

    @property
    def successes(self) -> list[Attempt]:
        return sorted((one for one in self.attempts if one.outcome == OK), key=lambda one: one.complete)

    @property
    def span(self) -> tuple[float, float]:
        """Between these instants it took effect; of one that succeeded."""
        first = self.successes[0]
        acted = [one for one in self.successes if not one.replayed]
        start = acted[0].invoke if acted else min(one.invoke for one in self.attempts)
        return start, first.complete

    def __str__(self) -> str:
        def told(one: Attempt) -> str:
            text = f"[{one.invoke:.3f}–{one.complete:.3f}] {one.outcome}"
            if one.outcome == OK:
                text += f" r{one.revision}{f' (left r{one.vacated})' if one.vacated else ''} #{one.number} {one.state}"
                text += f" t{one.ticket} {one.appointment[-6:]}{' replayed' if one.replayed else ''}"
            return text

        what = self.appointment[-6:] or self.slot[-6:]
        calls = self.attempts if len(self.attempts) < 6 else [*self.attempts[:2], *self.attempts[-3:]]
        return f"client {self.client} {self.method} {what} key {self.key}: " + "; ".join(map(told, calls))


@dataclass(slots=True)
class Read:
    """A GetQueue."""

    client: int
    day: Day
    invoke: float
    complete: float
    revision: int
    picture: Picture

    def __str__(self) -> str:
        return f"client {self.client} GetQueue [{self.invoke:.3f}–{self.complete:.3f}] r{self.revision} {self.picture}"


@dataclass(slots=True)
class Seen:
    """An update that a watcher got."""

    watcher: int
    day: Day
    at: float
    previous: int
    revision: int
    changes: tuple[Change, ...]
    picture: Picture

    def __str__(self) -> str:
        kinds = ", ".join(f"r{change[0]} {change[1]}" for change in self.changes)
        return f"watcher {self.watcher} [{self.at:.3f}] r{self.previous} → r{self.revision} ({kinds}) {self.picture}"


@dataclass(slots=True)
class History:
    """What the clients saw."""

    operations: list[Operation] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    late: list[tuple[int, Day, int, int, str]] = field(default_factory=list)
    """A watcher, its doctor-day, what it knew, what it should have known by then, and when that was."""
    drains: list[tuple[int, str]] = field(default_factory=list)
    """How each stream ended when the service was told to stop: `closing, OK` if well."""


@dataclass(slots=True)
class Event:
    """A row of `event`."""

    day: Day
    revision: int
    kind: str
    appointment: str
    state: str = ""
    ticket: int = 0


@dataclass(slots=True)
class Visit:
    """A row of `appointment`; `at` is the state in the line where the patient is checked in."""

    id: str
    patient: str
    day: Day
    number: int
    slot: str
    at: str
    ticket: int


@dataclass(slots=True)
class Memory:
    """A row of `idempotency`."""

    method: str
    key: str
    appointment: str
    day: Day
    number: int
    slot: str
    revision: int
    vacated: int


@dataclass(slots=True)
class Facts:
    """What the database holds at the end."""

    capacities: dict[str, int] = field(default_factory=dict)
    """Places a day, by doctor."""
    slots: dict[str, int] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    visits: dict[str, Visit] = field(default_factory=dict)
    memories: list[Memory] = field(default_factory=list)
    revisions: dict[Day, int] = field(default_factory=dict)
    deadlocks: int = 0
    """Since PostgreSQL was last started."""


@dataclass(slots=True)
class Violation:
    """A broken rule, and the least of the history that shows it."""

    rule: str
    text: str
    excerpt: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n    ".join([f"{self.rule}: {self.text}", *self.excerpt])


class _Replay:
    """A doctor-day played again from its events."""

    def __init__(self, day: Day, events: Sequence[Event], memories: dict[tuple[Day, int], Memory], facts: Facts):
        self.day = day
        self.violations: list[tuple[str, str, int]] = []
        """Rule, text and revision."""
        self.pictures: dict[int, Picture] = {1: ((), 0)}
        self.taken: dict[int, int] = {1: 0}
        self.taken_of_slot: dict[int, Counter[str]] = {1: Counter()}
        self.states: dict[str, list[tuple[int, str]]] = defaultdict(list)
        """Of each appointment, the revisions at which its state changed here; `` where it is elsewhere."""
        self.at: dict[str, str] = {}
        self.place: dict[str, tuple[int, str]] = {}
        self.ticket: dict[str, int] = {}
        self.moved: set[str] = set()
        self._order: dict[str, tuple[int, int]] = {}
        self._last_ticket = 0
        self._capacity = facts.capacities.get(day[0], 0)
        self._facts = facts
        expected = 2
        for event in events:
            if event.revision != expected:
                self._say("revisions", f"r{expected} is followed by r{event.revision}", event.revision)
            expected = event.revision + 1
            self._apply(event, memories.get((day, event.revision)))
            self.pictures[event.revision] = self._picture()
            self.taken[event.revision] = sum(at in HOLDING for at in self.at.values())
            self.taken_of_slot[event.revision] = self._slots()
        self.last = expected - 1

    def _say(self, rule: str, text: str, revision: int) -> None:
        self.violations.append((rule, text, revision))

    def _slots(self) -> Counter[str]:
        return Counter(self.place[who][1] for who, at in self.at.items() if at in HOLDING and self.place[who][1])

    def _apply(self, event: Event, memory: Memory | None) -> None:
        who, revision = event.appointment, event.revision
        before = self.at.get(who, "")
        if event.kind in ("BOOKED", "MOVED_IN"):
            if before and (event.kind == "BOOKED" or before != "BOOKED"):
                self._say("transition", f"{event.kind} of {who}, which is {before}", revision)
            self.at.pop(who, None)
            number, slot = (memory.number, memory.slot) if memory else self._guess(who)
            self._take(who, number, slot, revision)
            self.at[who], self.place[who] = "BOOKED", (number, slot)
            after, in_line = "BOOKED", ""
            if event.kind == "MOVED_IN":
                self.moved.add(who)
        elif event.kind == "MOVED_OUT":
            if before != "BOOKED":
                self._say("transition", f"MOVED_OUT of {who}, which is {before or 'not here'}", revision)
            self.at.pop(who, None)
            self.moved.add(who)
            after = in_line = ""
        elif event.kind in STEPS:
            allowed, after = STEPS[event.kind]
            if before not in allowed:
                self._say("transition", f"{event.kind} of {who}, which is {before or 'not here'}", revision)
            in_line = after if after in WAITING_ROOM or after in ("DONE", "LEFT") else ""
            if event.kind == "CANCELLED" and before != "BOOKED":
                in_line = "LEFT"
            if event.kind == "CHECKED_IN":
                self._last_ticket += 1
                if event.ticket != self._last_ticket:
                    self._say("tickets", f"ticket {event.ticket} where {self._last_ticket} is next", revision)
                    self._last_ticket = event.ticket
                self.ticket[who] = event.ticket
            if event.kind == "CALLED":
                waiting = [one for one, at in self.at.items() if at == "WAITING"]
                if waiting and who != (first := min(waiting, key=lambda one: self._order[one])):
                    self._say("transition", f"called {who} before {first}", revision)
            if after == "WAITING":
                self._order[who] = (self._last_ticket, revision) if before == "MISSED" else (self.ticket.get(who, 0), 0)
            self.at[who] = after
            self.place.setdefault(who, (0, ""))
        else:
            after, in_line = before, event.state
        if event.state != in_line:
            self._say("transition", f"{event.kind} left the line at '{event.state}', not '{in_line}'", revision)
        self.states[who].append((revision, after))

    def _guess(self, who: str) -> tuple[int, str]:
        visit = self._facts.visits.get(who)
        return (visit.number, visit.slot) if visit else (0, "")

    def _take(self, who: str, number: int, slot: str, revision: int) -> None:
        holders = {self.place[one][0]: one for one, at in self.at.items() if at in HOLDING}
        if len(holders) >= self._capacity or number > self._capacity:
            self._say("over-capacity", f"number {number}, {len(holders) + 1} of {self._capacity} places", revision)
        elif number in holders:
            self._say("number-twice", f"number {number} is that of {holders[number]} and of {who}", revision)
        elif number != (free := min(set(range(1, self._capacity + 1)) - holders.keys())):
            self._say("number-twice", f"number {number}, where {free} is the lowest free", revision)
        if slot and self._slots()[slot] >= self._facts.slots.get(slot, 0):
            self._say("over-capacity", f"slot {slot} has no place left", revision)
        visits = self._facts.visits
        for one, at in self.at.items():
            if at in LIVE and one in visits and who in visits and visits[one].patient == visits[who].patient:
                self._say("patient-twice", f"{one} and {who} are live and of one patient", revision)

    def _picture(self) -> Picture:
        waiting = sorted((one for one, at in self.at.items() if at == "WAITING"), key=lambda one: self._order[one])
        entries = [(one, self.ticket.get(one, 0), "WAITING", place) for place, one in enumerate(waiting, 1)]
        for state in WAITING_ROOM[1:]:
            here = sorted((self.ticket.get(one, 0), one) for one, at in self.at.items() if at == state)
            entries += [(one, ticket, state, 0) for ticket, one in here]
        return tuple(entries), sum(at == "BOOKED" for at in self.at.values())

    def ever(self, appointment: str, low: int, high: int, states: Iterable[str]) -> bool:
        """Whether the appointment was in one of the states at a revision from `low` to `high`."""
        steps = self.states.get(appointment, [])
        start = max(bisect_right(steps, (low, "\U0010ffff")) - 1, 0)
        wanted = set(states)
        return any(at in wanted for revision, at in steps[start:] if revision <= high)


@dataclass(slots=True)
class _Point:
    """Something that is known to have happened at, or to have seen, a revision of a doctor-day."""

    start: float
    end: float
    revision: int
    writes: bool
    source: Operation | Read


class _Bounds:
    """Between which revisions a doctor-day was in an interval of time."""

    def __init__(self, points: Sequence[_Point]) -> None:
        by_end = sorted(points, key=lambda point: point.end)
        self._ends = [point.end for point in by_end]
        self._low = [1]
        for point in by_end:
            self._low.append(max(self._low[-1], point.revision))
        by_start = sorted(points, key=lambda point: point.start)
        self._starts = [point.start for point in by_start]
        self._high = [1 << 60]
        for point in reversed(by_start):
            self._high.append(min(self._high[-1], point.revision - point.writes))
        self._high.reverse()

    def of(self, invoke: float, complete: float) -> tuple[int, int]:
        low = self._low[bisect_left(self._ends, invoke)]
        return low, self._high[bisect_right(self._starts, complete)]


class Checker:
    """The rules, over one history."""

    def __init__(self, history: History, facts: Facts) -> None:
        self._history = history
        self._facts = facts
        self._events: dict[Day, list[Event]] = defaultdict(list)
        for event in sorted(facts.events, key=lambda event: (event.day, event.revision)):
            self._events[event.day].append(event)
        self._event = {(event.day, event.revision): event for event in facts.events}
        self._left: dict[tuple[str, int], list[Day]] = defaultdict(list)
        for event in facts.events:
            if event.kind == "MOVED_OUT":
                self._left[event.appointment, event.revision].append(event.day)
        self._memory = {(memory.method, memory.key): memory for memory in facts.memories}
        made = {(memory.day, memory.revision): memory for memory in facts.memories}
        self._replays = {day: _Replay(day, events, made, facts) for day, events in self._events.items()}
        self._points: dict[Day, list[_Point]] = defaultdict(list)
        for operation in history.operations:
            for day, revision in self._effects(operation):
                self._points[day].append(_Point(*operation.span, revision, True, operation))
        for read in history.reads:
            self._points[read.day].append(_Point(read.invoke, read.complete, read.revision, False, read))
        self._bounds = {day: _Bounds(points) for day, points in self._points.items()}

    def check(self) -> list[Violation]:
        """Every violation that is found."""
        rules = (
            self._acknowledged, self._keys, self._answers, self._replayed, self._final, self._real_time, self._pictures,
            self._watches, self._refusals, self._manners,
        )  # fmt: skip
        return [violation for rule in rules for violation in rule()]

    def _effects(self, operation: Operation) -> Iterator[tuple[Day, int]]:
        """The doctor-days and revisions that an answered operation made."""
        if not operation.successes:
            return
        first = operation.successes[0]
        memory = self._memory.get((operation.method, operation.key))
        day = memory.day if memory is not None else operation.day
        yield day, first.revision
        # The answer does not say which day was left. With equal revisions it may have been this one; and where the
        # appointment left two days at revisions of one number, either: then nothing is concluded.
        left = self._left.get((first.appointment, first.vacated), [])
        if first.vacated != first.revision and len(left) == 1 and left[0] != day:
            yield left[0], first.vacated

    def _excerpt(self, day: Day, revision: int = 0, *shown: object) -> list[str]:
        """What the history says of a doctor-day around a revision."""
        lines = [f"doctor-day {day[0][-6:]} {day[1]}", *map(str, shown)]
        near = [e for e in self._events.get(day, []) if abs(e.revision - revision) <= 3]
        lines += [f"event r{e.revision} {e.kind} {e.appointment[-6:]} {e.state or '-'} t{e.ticket}" for e in near]
        points = [p for p in self._points.get(day, []) if abs(p.revision - revision) <= 2 and p.source not in shown]
        lines += [str(point.source) for point in sorted(points, key=lambda point: point.start)[:8]]
        return lines

    def _acknowledged(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.successes[:1]:
                memory = self._memory.get((operation.method, operation.key))
                day = memory.day if memory is not None else operation.day
                event = self._event.get((day, one.revision))
                if event is None or (event.kind, event.appointment) != (KINDS[operation.method], one.appointment):
                    text = f"{operation.method} was acknowledged as r{one.revision}, where the database has {event}"
                    yield Violation("acknowledged-lost", text, self._excerpt(day, one.revision, operation))

    def _keys(self) -> Iterator[Violation]:
        claims: Counter[tuple[Day, int]] = Counter()
        leaving: Counter[tuple[str, int]] = Counter()
        for memory in self._facts.memories:
            claims[memory.day, memory.revision] += 1
            if (memory.day, memory.revision) not in self._event:
                text = f"{memory.method} {memory.key} is remembered as r{memory.revision}, which is not there"
                yield Violation("key-without-effect", text, self._excerpt(memory.day, memory.revision))
            if memory.vacated:
                leaving[memory.appointment, memory.vacated] += 1
        for event in self._facts.events:
            count = claims[event.day, event.revision]
            if event.kind == "MOVED_OUT":
                count = min(leaving[event.appointment, event.revision], 1)
            if count != 1:
                text = f"{event.kind} at r{event.revision} was made by {count} keys"
                yield Violation("key-twice", text, self._excerpt(event.day, event.revision))

    def _answers(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            successes = operation.successes
            memory = self._memory.get((operation.method, operation.key))
            day, revision = (memory.day, memory.revision) if memory is not None else (operation.day, 0)
            if len({one.answer for one in successes}) > 1 or sum(not one.replayed for one in successes) > 1:
                text = f"{operation.method} {operation.key}: {len(successes)} answers of one key"
                yield Violation("answers-disagree", text, self._excerpt(day, revision, operation))
            if successes and memory is not None:
                told = (successes[0].appointment, successes[0].revision)
                if told != (memory.appointment, memory.revision):
                    text = f"{operation.key} was answered {told}, and remembered {memory}"
                    yield Violation("answers-disagree", text, self._excerpt(day, revision, operation))
            for one in operation.attempts:
                if one.outcome == OK or one.outcome.startswith((UNANSWERED, BROKEN)):
                    continue
                if successes and one.invoke > successes[0].complete:
                    text = f"{one.outcome} to a key that had been answered"
                    yield Violation("refused-though-made", text, self._excerpt(day, revision, operation))
                elif memory is not None:
                    low, _ = self._span(memory.day, one.invoke, one.complete)
                    if low >= memory.revision or len(operation.attempts) == 1:
                        text = f"{one.outcome} to a key that had acted"
                        yield Violation("refused-though-made", text, self._excerpt(day, revision, operation))
            if operation.given_up:
                yield Violation("no-answer", f"{operation}", self._excerpt(day, revision))

    def _replayed(self) -> Iterator[Violation]:
        for replay in self._replays.values():
            for rule, text, revision in replay.violations:
                yield Violation(rule, f"{text} at r{revision}", self._excerpt(replay.day, revision))

    def _final(self) -> Iterator[Violation]:
        for day in self._facts.revisions.keys() | self._replays.keys():
            kept = self._facts.revisions.get(day, 1)
            last = self._replays[day].last if day in self._replays else 1
            if kept != last:
                text = f"the counter is at {kept}, the events at {last}"
                yield Violation("revisions", text, self._excerpt(day, last))
        for visit in self._facts.visits.values():
            replay = self._replays.get(visit.day)
            played = replay.at.get(visit.id, "nowhere") if replay else "nowhere"
            place = replay.place.get(visit.id, (0, "")) if replay else (0, "")
            ticket = replay.ticket.get(visit.id, 0) if replay else 0
            if (played, place, ticket) != (visit.at, (visit.number, visit.slot), visit.ticket):
                text = f"the events lead to {played} {place} t{ticket}, and the row is {visit}"
                yield Violation("row-and-events", text, self._excerpt(visit.day))

    def _real_time(self) -> Iterator[Violation]:
        """Who was answered before another asked comes first. Of watches: nobody sees what nobody has asked for."""
        for day, points in self._points.items():
            # From the highest revision down: none of those above may have ended before this one began. A write comes
            # before the reads of its revision, and those in any order.
            earliest: _Point | None = None
            ordered = sorted(points, key=lambda point: (-point.revision, point.writes))
            for _, group in groupby(ordered, key=lambda point: (point.revision, point.writes)):
                same = list(group)
                late = max(same, key=lambda point: point.start)
                if earliest is not None and earliest.end < late.start:
                    text = f"r{earliest.revision} was answered before r{late.revision} was asked for"
                    shown = [f"doctor-day {day}", str(earliest.source), str(late.source)]
                    yield Violation("real-time" if late.writes else "stale-read", text, shown)
                    break
                earliest = min([*same, *([earliest] if earliest else [])], key=lambda point: point.end)
        for seen in self._history.seen:
            _, high = self._span(seen.day, seen.at, seen.at)
            if seen.revision > high:
                text = f"r{seen.revision} was seen before it was asked for"
                yield Violation("real-time", text, self._excerpt(seen.day, seen.revision, seen))

    def _pictures(self) -> Iterator[Violation]:
        sights: list[Read | Seen] = [*self._history.reads, *self._history.seen]
        for sight in sights:
            replay = self._replays.get(sight.day)
            true = replay.pictures.get(sight.revision) if replay else ((), 0) if sight.revision == 1 else None
            if sight.picture != true:
                text = f"r{sight.revision} was shown as {sight.picture}, and is {true}"
                yield Violation("wrong-queue", text, self._excerpt(sight.day, sight.revision, sight))

    def _watches(self) -> Iterator[Violation]:
        known: dict[int, int] = {}
        for seen in self._history.seen:
            before = known.get(seen.watcher, 0)
            known[seen.watcher] = seen.revision
            told = [change[0] for change in seen.changes]
            if seen.previous != before:
                text = f"a watcher that knew r{before} was told what came after r{seen.previous}"
            elif seen.previous and told != [*range(seen.previous + 1, seen.revision + 1)]:
                text = f"the changes from r{seen.previous} to r{seen.revision} are {told}"
            else:
                wrong = [change for change in seen.changes if change != self._change(seen.day, change[0])]
                if not wrong:
                    continue
                text = f"{wrong[0]} is {self._change(seen.day, wrong[0][0])} in the database"
            yield Violation("watch-missed", text, self._excerpt(seen.day, seen.revision, seen))
        for watcher, day, knew, should, when in self._history.late:
            text = f"watcher {watcher} knew r{knew} of r{should} {when}"
            yield Violation("watch-late", text, self._excerpt(day, should))

    def _change(self, day: Day, revision: int) -> Change | None:
        event = self._event.get((day, revision))
        return None if event is None else (revision, event.kind, event.appointment, event.state, event.ticket)

    def _span(self, day: Day, invoke: float, complete: float) -> tuple[int, int]:
        return self._bounds[day].of(invoke, complete) if day in self._bounds else (1, 1 << 60)

    def _refusals(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.attempts:
                if one.outcome == OK or one.outcome.startswith((UNANSWERED, BROKEN)):
                    continue
                possible = one.outcome in REFUSALS[operation.method]
                if possible and operation.day in self._replays:
                    possible = self._possible(operation, one)
                if not possible:
                    text = f"{operation.method} cannot have been refused by {one.outcome}"
                    low, _ = self._span(operation.day, one.invoke, one.complete)
                    yield Violation("impossible-refusal", text, self._excerpt(operation.day, low, operation))

    def _possible(self, operation: Operation, one: Attempt) -> bool:
        """Whether what the refusal says held at some moment between the call and its answer; True where unsure."""
        replay = self._replays[operation.day]
        low, high = self._span(operation.day, one.invoke, one.complete)
        span = range(low, min(high, replay.last) + 1)
        capacity = self._facts.capacities[operation.day[0]]
        # A move leaves its own place out of the count.
        own = int(operation.method == "RescheduleAppointment")
        if one.outcome == "DAY_FULL":
            return any(replay.taken.get(revision, 0) >= capacity for revision in span)
        if one.outcome == "SLOT_FULL":
            full = self._facts.slots[operation.slot]
            return any(replay.taken_of_slot[revision][operation.slot] >= full for revision in span) or bool(own)
        if one.outcome == "QUEUE_EMPTY":
            return any(all(entry[2] != "WAITING" for entry in replay.pictures[revision][0]) for revision in span)
        if one.outcome in ("INVALID_TRANSITION", "ALREADY_CHECKED_IN") and operation.appointment not in replay.moved:
            if operation.method == "RescheduleAppointment":
                return True
            allowed = STEPS[KINDS[operation.method]][0]
            others = {"BOOKED", "CANCELLED", "NO_SHOW", "LEFT", *WAITING_ROOM, "DONE"} - allowed
            return replay.ever(operation.appointment, low, high, others)
        return True

    def _manners(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.attempts:
                if one.outcome.startswith(BROKEN):
                    yield Violation("internal", f"{one.outcome} to {operation}", self._excerpt(operation.day))
                elif one.outcome == f"{UNANSWERED}CONFLICT":
                    text = "the database gave up on a conflict that the locks should have kept away"
                    yield Violation("conflict", text, [str(operation)])
        if self._facts.deadlocks:
            yield Violation("deadlock", f"PostgreSQL broke {self._facts.deadlocks} deadlocks")
        for watcher, end in self._history.drains:
            if end != "closing, OK":
                yield Violation("drain", f"stream {watcher} of the service that stopped ended with: {end}")
