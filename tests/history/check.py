"""The rules for a history of the service, whatever faults there were. Pure: records in, violations out.

A history is the clients' record (operations, reads, watches) and the final state of the database (`Facts`). Every
change has a key, so each change in `log` belongs to one row of `idempotency`, and each doctor-day can be replayed from
its first revision. All times are from one clock, but for those of `Metered`.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise
from typing import Generic, TypeVar

Day = tuple[str, str]
"""A doctor's id and a date (YYYY-MM-DD)."""
Entry = tuple[str, int, str, int]
"""A queue entry: appointment, ticket, state, position."""
Picture = tuple[tuple[Entry, ...], int]
"""A queue: its entries in order, and expected_count."""
Change = tuple[int, str, str, str, int]
"""Revision, kind, appointment, and the queue state and ticket (empty and 0 if the change does not touch the queue)."""

OK = "OK"
UNANSWERED = "?"
"""Prefix of an outcome that leaves open whether the change was made; the status or reason follows."""
BROKEN = "!"
"""Prefix of an outcome that must never happen."""

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
    "PRIORITY_SET": (LINE, ""),
    "TRANSFERRED_OUT": ({"WAITING", "CALLED", "PARKED"}, ""),
}
"""By kind of change: the states that allow it, and the state after it. For a checked-in patient, the entry's state.
Empty if the state stays as it is, or if the visit is not here afterwards.
"""

UNDOABLE = {"CHECKED_IN", "STARTED", "COMPLETED", "NO_SHOW", "LEFT", "MISSED", "PARKED", "CANCELLED"}
"""The kinds of change that an undo takes back."""
UNDO_SECONDS = 3.0
"""Seconds in which a verb can be taken back: the harness has shortened the quarter of an hour, see `world`."""
PRIORITIES = ("URGENT", "PRIORITY", "NORMAL")
"""The classes of the queue, the first first."""
TAKES = {"BOOKED", "MOVED_IN", "TRANSFERRED_IN", "UNDONE"}
"""The kinds of change that may take a place."""

KINDS = {
    "BookAppointment": "BOOKED", "RescheduleAppointment": "MOVED_IN", "CancelAppointment": "CANCELLED",
    "MarkNoShow": "NO_SHOW", "CheckIn": "CHECKED_IN", "CallNext": "CALLED", "CallAgain": "CALLED_AGAIN",
    "ReturnToLine": "RETURNED", "ParkPatient": "PARKED", "MarkMissed": "MISSED", "LeaveQueue": "LEFT",
    "StartAppointment": "STARTED", "CompleteAppointment": "COMPLETED", "AddWalkIn": "CHECKED_IN",
    "SetPriority": "PRIORITY_SET", "TransferPatient": "TRANSFERRED_IN", "UndoTransition": "UNDONE",
}  # fmt: skip
"""The kind of change of the revision that each method answers."""
AIMED = {"BookAppointment", "RescheduleAppointment", "AddWalkIn", "TransferPatient"}
"""The methods that name the place that they want."""

_CLOSED = {"DOCTOR_ABSENT", "SLOT_BLOCKED"}
_PLACE = {"DAY_FULL", "SLOT_FULL", "DUPLICATE_BOOKING", "PATIENT_OVERLAP", "HOLD_EXPIRED"} | _CLOSED
REFUSALS: dict[str, set[str]] = {method: {"INVALID_TRANSITION"} for method in KINDS} | {
    "BookAppointment": _PLACE,
    "RescheduleAppointment": _PLACE | {"INVALID_TRANSITION"},
    "CheckIn": {"INVALID_TRANSITION", "ALREADY_CHECKED_IN", "NOT_APPOINTMENT_DATE"},
    "MarkNoShow": {"INVALID_TRANSITION", "TOO_EARLY"},
    "CallAgain": {"INVALID_TRANSITION", "CALL_LIMIT_REACHED"},
    "CallNext": {"QUEUE_EMPTY"},
    "AddWalkIn": {"DAY_FULL", "DUPLICATE_BOOKING", "DOCTOR_ABSENT"},
    "TransferPatient": {"INVALID_TRANSITION", "INVALID_FIELD", "DAY_FULL", "DUPLICATE_BOOKING", "DOCTOR_ABSENT"},
    "UndoTransition": {
        "NOTHING_TO_UNDO", "ETAG_MISMATCH", "DAY_FULL", "SLOT_FULL", "DUPLICATE_BOOKING", "PATIENT_OVERLAP",
    },
}  # fmt: skip
"""The reasons for which the harness's requests may be refused. They never name unknown resources."""

BAD_CREDENTIALS = {"CREDENTIALS_REQUIRED", "CREDENTIALS_INVALID", "CREDENTIALS_EXPIRED"}
NOT_ALLOWED = {"ROLE_REQUIRED", "CLINIC_NOT_YOURS"}
ACCESS_REFUSALS = BAD_CREDENTIALS | NOT_ALLOWED
"""The reasons that say something of the caller, and nothing of the visit."""

REVOKED_SECONDS = 5.0
"""Seconds after which no call is answered that began with credentials or rights that had ended."""
STREAM_SECONDS = 30.0
"""Seconds after which no stream goes on whose caller's credentials or rights had ended."""
_READING_SECONDS = 1.0
"""By which a busy client reads a message late."""
_CLOCK_SECONDS = 0.05
"""By which the end of a token is not known exactly."""
_SAME_CLOCK_SECONDS = 0.005
"""By which two clocks of one machine may be read apart."""
_ENDED = {"CANCELLED", "NO_SHOW", "LEFT", "DONE"}
_QUOTA_USED = 0.95
_LOST_TO_A_FAULT = 2
"""Calls of a quota that one fault may lose: those that the two workers are just leasing."""


@dataclass(slots=True)
class Grant:
    """Credentials of an identity: an API key, or the rights of a user in one session."""

    identity: str
    """As the log names it."""
    kind: str
    ending: float = float("inf")
    """When somebody first asked to end it."""
    ended: float = float("inf")
    """When the answer came that it had ended."""
    renews: bool = False
    """Whether a client renews them by itself, at times that nobody else knows."""


@dataclass(slots=True)
class Attempt:
    """One call with an operation's key."""

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
    about: tuple[str, ...] = ()
    """Of an answer: its patient, doctor, date and slot. Of a refusal: its metadata, as names and values in turn."""
    etag: str = ""
    grant: Grant | None = None
    """The credentials; None if no rules of access hold."""
    expires: float = float("inf")
    """When the token expires."""

    @property
    def answer(self) -> tuple[object, ...]:
        """The part that every answer to the key must share."""
        return (self.appointment, self.revision, self.vacated, self.number, self.state, self.ticket)


@dataclass(slots=True)
class Operation:
    """One change that a client wants: a key, and all calls with that key."""

    client: int
    key: str
    method: str
    day: Day
    """Its doctor-day, as far as the client knew."""
    appointment: str = ""
    slot: str = ""
    attempts: list[Attempt] = field(default_factory=list)
    patient: str = ""
    """The patient to book; BookAppointment only."""
    given_up: bool = False
    """Whether it got no answer even after all faults had ended."""
    identity: str = ""
    """Who asks, as the log should name him."""
    priority: str = ""
    """What it asks for; empty if it asks for none."""
    room: str = ""
    override: bool = False
    """Whether it gives a reason to override the capacity."""
    etag: str = ""
    """The version of the visit that it wants to change; UndoTransition only."""

    @property
    def overrides(self) -> bool:
        """Whether it may get a place above the capacity: it gives a reason, and the caller is of the clinic's desk."""
        kinds = {one.grant.kind for one in self.attempts if one.grant is not None}
        return self.override and kinds <= {"staff", "clerk"}

    @property
    def successes(self) -> list[Attempt]:
        return sorted((one for one in self.attempts if one.outcome == OK), key=lambda one: one.complete)

    @property
    def span(self) -> tuple[float, float]:
        """The instants between which a successful operation took effect."""
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
        return f"client {self.client} {self.method}{' ' * bool(what)}{what} key {self.key}: " + "; ".join(
            map(told, calls)
        )


@dataclass(slots=True)
class Read:
    """One call of GetQueue."""

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
    """One update to a watcher."""

    watcher: int
    day: Day
    at: float
    previous: int
    revision: int
    changes: tuple[Change, ...]
    picture: Picture
    known: int = 0
    """The revision that the watcher had before; 0 before the first update."""

    def __str__(self) -> str:
        kinds = ", ".join(f"r{change[0]} {change[1]}" for change in self.changes)
        return f"watcher {self.watcher} [{self.at:.3f}] r{self.previous} → r{self.revision} ({kinds}) {self.picture}"


@dataclass(slots=True)
class Probe:
    """A call for something that the caller may not see, or not all of it."""

    client: int
    method: str
    what: str
    expected: str
    """The reason of the refusal; OK if it should be answered, without what is not the caller's."""
    grant: Grant
    expires: float
    invoke: float
    complete: float = 0.0
    outcome: str = ""
    """LEAK if the answer shows what is not the caller's."""
    appointment: str = ""
    """What it is about."""


@dataclass(slots=True)
class Stream:
    """A stream that was open when its caller lost the credentials."""

    grant: Grant
    last: float = 0.0
    """When its last message came; 0 if there was none."""


@dataclass(slots=True)
class Metered:
    """A call with a key whose quota is small. Its times are of the wall clock, because so are the minutes of quotas."""

    invoke: float
    complete: float
    outcome: str


@dataclass(slots=True)
class Act:
    """A change of credentials or rights."""

    actor: str
    method: str
    type: str
    resource: str
    outcome: str = ""
    """OK, a refusal, or empty if it was never answered."""


@dataclass(slots=True)
class Closing:
    """What closes places of a doctor for a while: a leave, or an exception that closes a date."""

    doctor: str
    days: tuple[str, ...] = ()
    """The dates that it closes as a whole."""
    start: float = 0.0
    end: float = 0.0
    """The time whose slots it closes, if it closes no dates; by the clock of the database."""
    asked: float = 0.0
    answered: float = float("inf")
    opening: float = float("inf")
    """When somebody first asked to open it again, if it is this one."""
    opened: float = float("inf")
    """When it was answered that it is open again. Not of leaves; see `History.cancelled`."""
    of_leave: bool = True
    id: str = ""
    """Of the leave, once it is answered."""
    applied: bool = False
    """Whether all its appointments were settled when it was answered."""


@dataclass(slots=True)
class Edit:
    """A change of a doctor's hours, or a generation of slots; always of the same dates."""

    doctor: str
    method: str
    asked: float
    answered: float = float("inf")
    created: int = 0
    """The slots that a generation made."""
    replayed: bool = False


@dataclass(slots=True)
class History:
    """The clients' record."""

    operations: list[Operation] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    late: list[tuple[int, Day, int, int, str]] = field(default_factory=list)
    """A watcher, its doctor-day, its revision, the revision that it should have had, and when, in words."""
    tally: Counter[str] = field(default_factory=Counter)
    """Counts of other actions of the clients, for the report only."""
    drains: list[tuple[int, str]] = field(default_factory=list)
    """The end of each stream when the service was told to stop: `closing, OK` if correct."""
    probes: list[Probe] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    metered: list[Metered] = field(default_factory=list)
    quota: int = 0
    """Calls a minute of the key of `metered`."""
    faults: list[tuple[float, float]] = field(default_factory=list)
    """When each fault began and ended, by the wall clock."""
    acts: list[Act] = field(default_factory=list)
    holds: list[str] = field(default_factory=list)
    """The holds that were acknowledged."""
    hold_times: dict[str, tuple[float, float]] = field(default_factory=dict)
    """When each was asked for and answered."""
    closings: list[Closing] = field(default_factory=list)
    cancelled: dict[str, float] = field(default_factory=dict)
    """When it was answered that a leave is cancelled."""
    edits: list[Edit] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Internal errors that were answered to others than operations."""
    clock: float = 0.0
    """What to add to an instant of the record for the time of the database."""


@dataclass(slots=True)
class Event:
    """A row of `log` that is a change of a doctor-day."""

    day: Day
    revision: int
    kind: str
    appointment: str
    state: str = ""
    ticket: int = 0
    actor: str = ""
    method: str = ""
    time: float = 0.0
    """By the clock of the database."""
    hold: str = ""
    """The hold that was used."""
    transaction: str = ""
    number: int = 0
    """The visit's number afterwards; 0 if it is not known."""
    slot: str = ""
    """The visit's slot afterwards; if the number is known."""
    over: bool = False
    """Whether an override of the capacity is recorded with it."""
    room: str = ""
    priority: str = "NORMAL"
    check_in: float = 0.0
    calls: int = 0
    """These four are of the queue entry afterwards; the calls are those since the check-in or transfer."""


@dataclass(slots=True)
class Hold:
    """A row of `hold`. Its times are of the clock of the database."""

    id: str
    day: Day
    slot: str
    patient: str
    placed: float
    expire: float
    released: float = float("inf")

    def live(self, at: float, used: float) -> bool:
        """Whether it counts as a place at that time; `used` is when it was used."""
        return self.placed < at < min(self.expire, self.released, used)


@dataclass(slots=True)
class Leave:
    """A row of `leave`. Its times are of the clock of the database."""

    id: str
    doctor: str
    days: tuple[str, ...]
    """All its dates; empty if it is of hours."""
    start: float
    end: float
    state: str
    applied: float = float("inf")
    """When all its appointments were settled."""


@dataclass(slots=True)
class Outcome:
    """A row of `leave_outcome`."""

    leave: str
    appointment: str
    outcome: str
    day: Day | None = None
    """To where it was moved."""


@dataclass(slots=True)
class Sealed:
    """A row of `seal`, with the row of `log` that it seals."""

    position: int
    id: str
    chain: bytes
    digest: bytes | None
    """The hash of the row as it is now; None if there is none."""
    day: Day | None = None
    revision: int = 0
    """Of the row; 0 if it is not a change of a doctor-day."""


@dataclass(slots=True)
class Visit:
    """A row of `appointment`; `at` is the visit state, or the queue state while the patient is checked in."""

    id: str
    patient: str
    day: Day
    number: int
    slot: str
    at: str
    ticket: int
    room: str = ""
    priority: str = "NORMAL"
    over: bool = False
    """Whether it has the reason of an override."""


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
    """The final state of the database."""

    capacities: dict[str, int] = field(default_factory=dict)
    """Capacity of each date, by doctor."""
    slots: dict[str, int] = field(default_factory=dict)
    """Capacity, by slot."""
    times: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Start and end, by slot."""
    max_calls: int = 3
    """Calls of a patient until the next CallNext, which is the first."""
    events: list[Event] = field(default_factory=list)
    visits: dict[str, Visit] = field(default_factory=dict)
    memories: list[Memory] = field(default_factory=list)
    holds: dict[str, Hold] = field(default_factory=dict)
    revisions: dict[Day, int] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    """Doctor, by slot."""
    leaves: dict[str, Leave] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    schedules: list[tuple[str, str, str]] = field(default_factory=list)
    """Doctor, first and last date of each row of `schedule`."""
    visits_due: list[tuple[str, float, float]] = field(default_factory=list)
    """Doctor, start and end of the visits of the hours, for which there should be slots."""
    deadlocks: int = 0
    """Deadlocks that PostgreSQL broke during the run."""
    acts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    """The rows of `log` about credentials and rights: actor, method, type and resource."""
    seals: Iterable[Sealed] = ()
    """By position. May be read once."""
    unsealed: int = 0
    """Rows of `log` without a seal, though every transaction has ended."""


@dataclass(slots=True)
class Violation:
    """A broken rule. `rule` and `text` identify one instance, with all evidence that matters."""

    rule: str
    text: str
    days: tuple[Day, ...] = ()
    """The doctor-days that it concerns; empty if it concerns the service as a whole."""
    revision: int = 0
    """Later revisions of the first of these days do not matter; 0 if all matter."""
    by: str = ""
    """The part of the checker that found it."""
    shortest: list[str] = field(default_factory=list)
    """The shortest history that shows it, as lines; see `tests.history.shortest`."""

    def __str__(self) -> str:
        return "\n    ".join([f"{self.rule}: {self.text}", *self.shortest])


T = TypeVar("T")


class _Steps(Generic[T]):
    """A value that changes at some revisions."""

    def __init__(self, first: T) -> None:
        self._revisions = [1]
        self._values = [first]

    def set(self, revision: int, value: T) -> None:
        if value != self._values[-1]:
            self._revisions.append(revision)
            self._values.append(value)

    def between(self, low: int, high: int) -> list[T]:
        """The values from revision `low` to `high`."""
        start = max(bisect_right(self._revisions, low) - 1, 0)
        return self._values[start : max(bisect_right(self._revisions, high), start + 1)]


@dataclass(frozen=True, slots=True)
class _Entry:
    """The queue entry of a visit, but for its state. What an undo must restore, and what no other verb may change."""

    ticket: int = 0
    room: str = ""
    priority: str = "NORMAL"
    check_in: float = 0.0
    calls: int = 0
    returned: int = 0
    """The revision of the return after a missed call."""

    @property
    def place(self) -> tuple[int, int, float, int]:
        """The place in the queue, the smallest first."""
        return (PRIORITIES.index(self.priority), self.returned, self.check_in, self.ticket)

    @property
    def shown(self) -> tuple[str, str, float, int]:
        """What the log says of it."""
        return (self.room, self.priority, self.check_in, self.calls)


_NOBODY = _Entry()


class _Company:
    """When each patient was called or in consultation, by the clients' record: two doctor-days have no common order."""

    def __init__(
        self,
        events: Iterable[Event],
        visits: dict[str, Visit],
        when: dict[tuple[Day, int], tuple[float, float]],
    ) -> None:
        self._visits = visits
        self._when = when
        self._spans: dict[str, list[tuple[Day, int, tuple[float, float], tuple[float, float]]]] = defaultdict(list)
        """By patient: the doctor-day, the revision of the call, and the intervals in which it began and ended."""
        since: dict[tuple[Day, str], int] = {}
        for event in events:
            here = (event.day, event.appointment)
            if event.state in ("CALLED", "IN_CONSULTATION"):
                since.setdefault(here, event.revision)
            elif here in since:
                self._add(*here, since.pop(here), self.interval(event.day, event.revision))
        for (day, who), revision in since.items():
            self._add(day, who, revision, (float("inf"), float("inf")))

    def interval(self, day: Day, revision: int) -> tuple[float, float]:
        """The instants between which the revision was made."""
        return self._when.get((day, revision), (-float("inf"), float("inf")))

    def _add(self, day: Day, who: str, revision: int, end: tuple[float, float]) -> None:
        if who in self._visits:
            self._spans[self._visits[who].patient].append((day, revision, self.interval(day, revision), end))

    def _of(self, who: str, day: Day) -> Iterator[tuple[Day, int, tuple[float, float], tuple[float, float]]]:
        if who in self._visits:
            for span in self._spans.get(self._visits[who].patient, ()):
                if span[0] != day and span[0][1] == day[1]:
                    yield span

    def maybe(self, who: str, day: Day, first: float, last: float) -> bool:
        """Whether the patient of this visit may have been with another doctor of the date, at some time in between."""
        return any(begun[0] <= last and first <= ended[1] for _, _, begun, ended in self._of(who, day))

    def surely(self, who: str, day: Day, first: float, last: float) -> tuple[Day, int] | None:
        """Where the patient of this visit was all the time in between: another doctor-day, and the call there."""
        for other, revision, begun, ended in self._of(who, day):
            if begun[1] < first and last < ended[0]:
                return other, revision
        return None


class _Replay:
    """The replay of a doctor-day from its events."""

    def __init__(
        self,
        day: Day,
        events: Sequence[Event],
        memories: dict[tuple[Day, int], Memory],
        facts: Facts,
        company: _Company,
    ) -> None:
        self.day = day
        self._company = company
        self.violations: list[tuple[str, str, int]] = []
        """Rule, text and revision."""
        self.pictures: dict[int, Picture] = {1: ((), 0)}
        self.taken: _Steps[int] = _Steps(0)
        self.taken_of_slot: dict[str, _Steps[int]] = defaultdict(lambda: _Steps(0))
        self.states: dict[str, _Steps[str]] = defaultdict(lambda: _Steps(""))
        """The states of each appointment; empty while it is on another doctor-day."""
        self.slots: dict[str, set[str]] = defaultdict(set)
        """All slots that each appointment had on this day."""
        self.at: dict[str, str] = {}
        self.place: dict[str, tuple[int, str]] = {}
        self.entry: dict[str, _Entry] = {}
        self.over: set[str] = set()
        """Those with a recorded override of the capacity."""
        self.calls: dict[str, _Steps[int]] = defaultdict(lambda: _Steps(0))
        """Calls of each patient since the last CallNext, which counts as one."""
        self.undoable: dict[str, _Steps[float]] = defaultdict(lambda: _Steps(0.0))
        """When the verb was done that an undo of each visit would take back; 0 if there is none."""
        self.moved: set[str] = set()
        """Those that came from another doctor-day or went to one."""
        self._steps: dict[str, list[tuple[float, str, _Entry]]] = defaultdict(list)
        """For each verb that can be taken back, the last one at the end: its time, and what was before it."""
        self._holding: dict[str, str] = {}
        """The part of `at` that holds a place."""
        self._last_ticket = 0
        self._capacity = facts.capacities.get(day[0], 0)
        self._facts = facts
        expected = 2
        for event in events:
            if event.revision != expected:
                self._say("revisions", f"r{expected} is followed by r{event.revision}", event.revision)
            expected = event.revision + 1
            slot = self.place.get(event.appointment, (0, ""))[1]
            self._apply(event, memories.get((day, event.revision)))
            self.pictures[event.revision] = self._picture()
            self.taken.set(event.revision, len(self._holding))
            for touched in {slot, self.place.get(event.appointment, (0, ""))[1]} - {""}:
                self.taken_of_slot[touched].set(event.revision, self._taken_of(touched))
        self.last = expected - 1

    def _say(self, rule: str, text: str, revision: int) -> None:
        self.violations.append((rule, f"{text} at r{revision} of {_told(self.day)}", revision))

    def _taken_of(self, slot: str) -> int:
        return sum(self.place[who][1] == slot for who in self._holding)

    def _put(self, who: str, at: str) -> None:
        self.at[who] = at
        self.place.setdefault(who, (0, ""))
        if at in HOLDING:
            self._holding[who] = at
        else:
            self._holding.pop(who, None)

    def _apply(self, event: Event, memory: Memory | None) -> None:
        who, revision, kind = event.appointment, event.revision, event.kind
        before, entry = self.at.get(who, ""), self.entry.get(who, _NOBODY)
        # In a shortened history the first events of a visit may be missing.
        known = who in self.at
        if not known and event.state and kind != "CHECKED_IN":
            entry = _Entry(event.ticket, event.room, event.priority, event.check_in, event.calls)
        after = in_line = ""
        steps = self._steps.pop(who, [])
        if kind in ("BOOKED", "MOVED_IN", "TRANSFERRED_IN"):
            if before and (kind != "MOVED_IN" or before != "BOOKED"):
                self._say("transition", f"{kind} of {who}, which is {before}", revision)
            self._holding.pop(who, None)
            stays = kind == "MOVED_IN" and before == "BOOKED"
            if not stays:
                self.over.discard(who)
                if event.over:
                    self.over.add(who)
            after, entry = "BOOKED", _NOBODY
            if kind == "TRANSFERRED_IN":
                after = in_line = "WAITING"
                entry = _Entry(self._drawn(event), "", event.priority, event.check_in, 0, 0)
                self.calls[who].set(revision, 0)
            if kind != "BOOKED":
                self.moved.add(who)
            self._take(event, *self._placed(event, memory), after, stays=stays)
        elif kind in ("MOVED_OUT", "TRANSFERRED_OUT"):
            if before not in STEPS.get(kind, ({"BOOKED"}, ""))[0]:
                self._say("transition", f"{kind} of {who}, which is {before or 'not here'}", revision)
            self.at.pop(who, None)
            self._holding.pop(who, None)
            self.over.discard(who)
            self.moved.add(who)
            in_line = "TRANSFERRED" if kind == "TRANSFERRED_OUT" else ""
        elif kind in STEPS:
            allowed, after = STEPS[kind]
            after = after or before
            if before not in allowed:
                self._say("transition", f"{kind} of {who}, which is {before or 'not here'}", revision)
            if event.method == "CreateLeave" and before != "BOOKED":
                self._say("transition", f"a leave made {kind} of {who}, which is {before or 'not here'}", revision)
            if kind in UNDOABLE and event.method != "CreateLeave":
                steps.append((event.time, before, entry))
                self._steps[who] = steps
            in_line = after if after in WAITING_ROOM or after in ("DONE", "LEFT") else ""
            if kind == "CANCELLED" and before != "BOOKED":
                in_line = "LEFT"
            if kind == "CALLED":
                self._check_turn(event, entry)
            entry = self._changed(event, before, entry)
            self._put(who, after)
        elif kind == "UNDONE":
            after, in_line, entry = self._undo(event, memory, before, entry, steps)
        else:
            after, in_line = before, event.state
        if event.state != in_line:
            self._say("transition", f"{kind} left the queue entry at '{event.state}', not '{in_line}'", revision)
        elif in_line and known:
            # Of an undone check-in the entry is told as it was before the undo.
            told = self.entry[who] if in_line == "LEFT" and after == "BOOKED" else entry
            shown = (event.room, event.priority, event.check_in, event.calls)
            if (event.ticket, *shown) != (told.ticket, *told.shown):
                text = f"{kind} of {who} left the entry as t{event.ticket} {shown}, not t{told.ticket} {told.shown}"
                self._say("entry", text, revision)
        self.entry[who] = entry
        self.states[who].set(revision, after)
        self.undoable[who].set(revision, self._steps[who][-1][0] if self._steps.get(who) else 0.0)

    def _drawn(self, event: Event) -> int:
        """The ticket that the event draws."""
        self._last_ticket += 1
        if event.ticket != self._last_ticket:
            self._say("tickets", f"ticket {event.ticket}, but {self._last_ticket} is next", event.revision)
            self._last_ticket = event.ticket
        return event.ticket

    def _changed(self, event: Event, before: str, entry: _Entry) -> _Entry:
        """The queue entry after a verb."""
        calls = self.calls[event.appointment]
        if event.kind == "CHECKED_IN":
            calls.set(event.revision, 0)
            return _Entry(self._drawn(event), entry.room, event.priority, event.check_in, entry.calls, entry.returned)
        if event.kind == "PRIORITY_SET":
            return replace(entry, priority=event.priority)
        if event.kind == "CALLED":
            calls.set(event.revision, 1)
            return replace(entry, room=event.room or entry.room, calls=entry.calls + 1)
        if event.kind == "CALLED_AGAIN":
            (made,) = calls.between(event.revision, event.revision)
            if made >= self._facts.max_calls > 0:
                text = f"call {made + 1} of {event.appointment}, of {self._facts.max_calls} at most"
                self._say("call-limit", text, event.revision)
            calls.set(event.revision, made + 1)
            return replace(entry, calls=entry.calls + 1)
        if event.kind in ("RETURNED", "PARKED"):
            returned = event.revision if event.kind == "RETURNED" and before == "MISSED" else entry.returned
            return replace(entry, room="", returned=returned)
        return entry

    def _check_turn(self, event: Event, entry: _Entry) -> None:
        """CallNext takes the first who waits, and passes over those who are with another doctor."""
        who, when = event.appointment, self._company.interval(self.day, event.revision)
        waiting = [
            one
            for one, at in self._holding.items()
            if at == "WAITING" and (one == who or not self._company.maybe(one, self.day, *when))
        ]
        if waiting and who != (first := min(waiting, key=self._place_in_queue)):
            places = f"{entry.place}, {self._place_in_queue(first)}"
            self._say("transition", f"called {who} before {first} ({places})", event.revision)

    def _undo(
        self, event: Event, memory: Memory | None, before: str, entry: _Entry, steps: list[tuple[float, str, _Entry]]
    ) -> tuple[str, str, _Entry]:
        """The state, the state of the queue entry that is told, and the entry after an undo."""
        who, revision = event.appointment, event.revision
        if not steps:
            self._say("undo", f"UNDONE of {who}, which has nothing to undo", revision)
            self._put(who, event.state or before)
            return event.state or before, event.state, entry
        time, after, restored = steps.pop()
        if steps:
            self._steps[who] = steps
        if event.time - time > UNDO_SECONDS:
            self._say("undo", f"UNDONE of {who} {event.time - time:.3f} s after the verb", revision)
        in_line = after if after in WAITING_ROOM else "LEFT" if before == "WAITING" else ""
        if before in LIVE:
            self._put(who, after)
        else:
            number, slot = self._placed(event, memory)
            own, own_slot = self.place.get(who, (0, ""))
            if slot != own_slot:
                self._say("undo", f"UNDONE of {who} gave slot '{slot}', not '{own_slot}'", revision)
            stays = self._holding.pop(who, None) is not None
            self._take(event, number, slot, after, own=own, stays=stays)
        return after, in_line, restored

    def _ticket(self, who: str) -> int:
        return self.entry.get(who, _NOBODY).ticket

    def _place_in_queue(self, who: str) -> tuple[int, int, float, int]:
        return self.entry.get(who, _NOBODY).place

    def _placed(self, event: Event, memory: Memory | None) -> tuple[int, str]:
        """The number and slot that the event gave."""
        if memory is not None:
            return memory.number, memory.slot
        if event.number:
            return event.number, event.slot
        visit = self._facts.visits.get(event.appointment)
        return (visit.number, visit.slot) if visit else (0, "")

    def _take(self, event: Event, number: int, slot: str, at: str, *, own: int = 0, stays: bool = False) -> None:
        """A place is taken: of this number and slot, with this state. `own` is the number that is wanted if it is free;
        `stays`: it has a place of the doctor-day already.
        """
        who, revision = event.appointment, event.revision
        holders = {self.place[one][0]: one for one in self._holding}
        first = self._capacity + 1 if event.over and not own else 1
        free = next(n for n in [own, *range(first, first + len(holders) + 1)] if n and n not in holders)
        if len(holders) >= self._capacity and not stays and first == 1:
            self._say("over-capacity", f"number {number}, place {len(holders) + 1} of {self._capacity}", revision)
        elif number in holders:
            self._say("number-twice", f"number {number} belongs to both {holders[number]} and {who}", revision)
        elif number != free:
            self._say("number-twice", f"number {number}, but {free} is the lowest free one", revision)
        if slot:
            taken, places = self._taken_of(slot), self._facts.slots.get(slot, 0)
            if taken >= places:
                self._say("over-capacity", f"place {taken + 1} of {places} in slot {slot}", revision)
            self.slots[who].add(slot)
        visits = self._facts.visits
        for one, state in self._holding.items():
            if state in LIVE and one in visits and who in visits and visits[one].patient == visits[who].patient:
                self._say("patient-twice", f"{one} and {who} are live appointments of one patient", revision)
        self.place[who] = (number, slot)
        self._put(who, at)

    def _picture(self) -> Picture:
        by_state: dict[str, list[str]] = defaultdict(list)
        for who, at in self._holding.items():
            by_state[at].append(who)
        waiting = sorted(by_state["WAITING"], key=self._place_in_queue)
        entries = [(one, self._ticket(one), "WAITING", place) for place, one in enumerate(waiting, 1)]
        for state in WAITING_ROOM[1:]:
            here = sorted((self._ticket(one), one) for one in by_state[state])
            entries += [(one, ticket, state, 0) for ticket, one in here]
        return tuple(entries), len(by_state["BOOKED"])

    def ever(self, appointment: str, low: int, high: int, states: Iterable[str]) -> bool:
        """Whether the appointment was in one of the states at any revision from `low` to `high`."""
        return appointment in self.states and not set(states).isdisjoint(self.states[appointment].between(low, high))


@dataclass(slots=True)
class _Point:
    """A write or a read at a known revision of a doctor-day, in a known interval of time."""

    start: float
    end: float
    revision: int
    writes: bool
    source: Operation | Read


class _Bounds:
    """The possible revisions of a doctor-day in an interval of time."""

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


def _told(day: Day) -> str:
    return f"doctor-day {day[0][-6:]} {day[1]}"


def _named(source: Operation | Read) -> str:
    return f"{source.method} {source.key}" if isinstance(source, Operation) else f"a read of client {source.client}"


class Checker:
    """Checks one history against the rules."""

    def __init__(self, history: History, facts: Facts) -> None:
        self._history = history
        self._facts = facts
        self._events: dict[Day, list[Event]] = defaultdict(list)
        for event in sorted(facts.events, key=lambda event: (event.day, event.revision)):
            self._events[event.day].append(event)
        self._event = {(event.day, event.revision): event for event in facts.events}
        self._left: dict[tuple[str, int], list[Day]] = defaultdict(list)
        for event in facts.events:
            if event.kind in ("MOVED_OUT", "TRANSFERRED_OUT"):
                self._left[event.appointment, event.revision].append(event.day)
        self._memory = {(memory.method, memory.key): memory for memory in facts.memories}
        self._made = {(memory.day, memory.revision): memory for memory in facts.memories}
        self._closings: dict[str, list[Closing]] = defaultdict(list)
        for closing in history.closings:
            self._closings[closing.doctor].append(closing)
        effects = [(one, *effect) for one in history.operations for effect in self._effects(one)]
        self._when = {(day, revision): span for _, day, revision, span in effects}
        """The interval of time in which a revision was made, as the clients saw it."""
        self._settling = self._settled()
        ordered = (event for events in self._events.values() for event in events)
        self._company = _Company(ordered, facts.visits, self._when)
        self._replays = {
            day: _Replay(day, events, self._made, facts, self._company) for day, events in self._events.items()
        }
        self._of_patient: dict[str, list[str]] = defaultdict(list)
        for visit in facts.visits.values():
            self._of_patient[visit.patient].append(visit.id)
        self._days_of: dict[str, list[Day]] = defaultdict(list)
        for day, replay in self._replays.items():
            for who in replay.states:
                self._days_of[who].append(day)
        self._points: dict[Day, list[_Point]] = defaultdict(list)
        for operation, day, revision, span in effects:
            self._points[day].append(_Point(*span, revision, True, operation))
        for read in history.reads:
            self._points[read.day].append(_Point(read.invoke, read.complete, read.revision, False, read))
        self._bounds = {day: _Bounds(points) for day, points in self._points.items()}

    PARTS = (
        "acknowledged", "keys", "answers", "replayed", "final", "overlaps", "real_time", "pictures", "watches",
        "refusals", "asked", "manners", "holds", "pairs", "wishes", "elsewhere", "closed", "leaves", "slipped", "hours",
        "access", "streams", "probes", "quota", "log", "acts", "seals",
    )  # fmt: skip
    """The parts of the checker, each with some rules."""

    def check(self, parts: Sequence[str] = PARTS) -> list[Violation]:
        """All violations that these parts find."""
        found: list[Violation] = []
        for part in parts:
            for violation in getattr(self, f"_{part}")():
                violation.by = part
                found.append(violation)
        return found

    def _effects(self, operation: Operation) -> Iterator[tuple[Day, int, tuple[float, float]]]:
        """The doctor-days and revisions that an operation changed, with the interval of time."""
        memory = self._memory.get((operation.method, operation.key))
        if not operation.successes:
            if memory is not None and operation.attempts:
                # It was never acknowledged: it was made at some time after the first call.
                span = (min(one.invoke for one in operation.attempts), float("inf"))
                yield memory.day, memory.revision, span
                if operation.method == "AddWalkIn":
                    yield memory.day, memory.revision - 1, span
            return
        first = operation.successes[0]
        day = memory.day if memory is not None else operation.day
        yield day, first.revision, operation.span
        if operation.method == "AddWalkIn":
            yield day, first.revision - 1, operation.span
        # The answer does not name the day that was left. If the revisions are equal, it may have been this one; if the
        # appointment left two days at equal revisions, it may have been either. Then conclude nothing.
        left = self._left.get((first.appointment, first.vacated), [])
        if first.vacated != first.revision and len(left) == 1 and left[0] != day:
            yield left[0], first.vacated, operation.span

    def days_of(self, operation: Operation) -> set[Day]:
        """The doctor-days that an operation concerns."""
        found = {operation.day, *self._days_of.get(operation.appointment, ())}
        return found | {day for day, _, _ in self._effects(operation)}

    def _acknowledged(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.successes[:1]:
                memory = self._memory.get((operation.method, operation.key))
                day = memory.day if memory is not None else operation.day
                event = self._event.get((day, one.revision))
                if event is None or (event.kind, event.appointment) != (KINDS[operation.method], one.appointment):
                    text = (
                        f"{_named(operation)} was acknowledged as r{one.revision} of {_told(day)}, but the database"
                        f" has {event or 'nothing'}"
                    )
                    yield Violation("acknowledged-lost", text, (day,))

    def _keys(self) -> Iterator[Violation]:
        claims: dict[tuple[Day, int], list[str]] = defaultdict(list)
        leaving: set[tuple[str, int]] = set()
        for memory in self._facts.memories:
            claims[memory.day, memory.revision].append(f"{memory.method} {memory.key}")
            if (memory.day, memory.revision) not in self._event:
                text = (
                    f"{memory.method} {memory.key} is stored as r{memory.revision} of {_told(memory.day)}, which does"
                    " not exist"
                )
                yield Violation("key-without-effect", text, (memory.day,))
            if memory.method == "AddWalkIn":
                claims[memory.day, memory.revision - 1].append(f"{memory.method} {memory.key}")
            if memory.vacated:
                leaving.add((memory.appointment, memory.vacated))
        for event in self._facts.events:
            keys = claims[event.day, event.revision]
            count = len(keys)
            if event.method == "CreateLeave":
                # Counted by outcomes.
                continue
            if event.kind in ("MOVED_OUT", "TRANSFERRED_OUT"):
                count = int((event.appointment, event.revision) in leaving)
            if count != 1:
                text = f"{event.kind} at r{event.revision} of {_told(event.day)} was made by {count} keys {keys}"
                yield Violation("key-twice", text, (event.day,), event.revision)

    def _answers(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            successes = operation.successes
            memory = self._memory.get((operation.method, operation.key))
            days = (memory.day if memory is not None else operation.day,)
            if len({one.answer for one in successes}) > 1 or sum(not one.replayed for one in successes) > 1:
                text = f"{_named(operation)}: {len(successes)} different answers to one key"
                yield Violation("answers-disagree", text, days)
            if successes and memory is not None:
                told = (successes[0].appointment, successes[0].revision)
                if told != (memory.appointment, memory.revision):
                    yield Violation(
                        "answers-disagree", f"{operation.key} was answered {told}, but stored as {memory}", days
                    )
            for one in operation.attempts:
                if (
                    one.outcome == OK
                    or one.outcome.startswith((UNANSWERED, BROKEN))
                    or self._for_access(operation, one)
                ):
                    continue
                if successes and one.invoke > successes[0].complete:
                    text = f"{one.outcome} to {_named(operation)} after its success was answered"
                    yield Violation("refused-though-made", text, days)
                elif memory is not None:
                    low, _ = self._span(memory.day, one.invoke, one.complete)
                    if low >= memory.revision or len(operation.attempts) == 1:
                        text = f"{one.outcome} to {_named(operation)} after it had acted"
                        yield Violation("refused-though-made", text, days)
            if operation.given_up:
                yield Violation("no-answer", f"{operation}", days)

    def _replayed(self) -> Iterator[Violation]:
        for replay in self._replays.values():
            for rule, text, revision in replay.violations:
                yield Violation(rule, text, (replay.day,), revision)

    def _final(self) -> Iterator[Violation]:
        for day in self._facts.revisions.keys() | self._replays.keys():
            kept = self._facts.revisions.get(day, 1)
            last = self._replays[day].last if day in self._replays else 1
            if kept != last:
                text = f"the counter of {_told(day)} is {kept}, but the last event is {last}"
                yield Violation("revisions", text, (day,))
        for visit in self._facts.visits.values():
            replay = self._replays.get(visit.day)
            played = replay.at.get(visit.id, "nowhere") if replay else "nowhere"
            place = replay.place.get(visit.id, (0, "")) if replay else (0, "")
            entry = replay.entry.get(visit.id, _NOBODY) if replay else _NOBODY
            over = replay is not None and visit.id in replay.over
            led = (played, place, entry.ticket, entry.room, entry.priority, over)
            row = (visit.at, (visit.number, visit.slot), visit.ticket, visit.room, visit.priority, visit.over)
            if led != row:
                yield Violation("row-and-events", f"the events lead to {led}, but the row is {visit}", (visit.day,))

    def _overlaps(self) -> Iterator[Violation]:
        """No patient is in two places at one time. Checked on the rows, because doctor-days have no common order."""
        for patient, visits in self._of_patient.items():
            live = [self._facts.visits[who] for who in visits]
            timed = [(self._facts.times[v.slot], v) for v in live if v.at in LIVE and v.slot in self._facts.times]
            timed.sort(key=lambda one: one[0])
            for ((_, end), one), ((start, _), other) in pairwise(timed):
                if start < end:
                    text = f"{one.id} and {other.id} of patient {patient} overlap"
                    yield Violation("patient-twice", text, (one.day, other.day))

    def _real_time(self) -> Iterator[Violation]:
        """Operations that do not overlap in time are in that order. No watcher sees a change before its request."""
        for day, points in self._points.items():
            # From the highest revision down: no higher one may have ended before this one started. A write comes before
            # the reads of its revision, which may be in any order.
            earliest: _Point | None = None
            ordered = sorted(points, key=lambda point: (-point.revision, point.writes))
            for _, group in groupby(ordered, key=lambda point: (point.revision, point.writes)):
                same = list(group)
                late = max(same, key=lambda point: point.start)
                if earliest is not None and earliest.end < late.start:
                    text = (
                        f"r{earliest.revision} of {_told(day)} was answered to {_named(earliest.source)} before"
                        f" {_named(late.source)} started, which got r{late.revision}"
                    )
                    yield Violation("real-time" if late.writes else "stale-read", text, (day,), earliest.revision)
                    break
                earliest = min([*same, *([earliest] if earliest else [])], key=lambda point: point.end)
        for seen in self._history.seen:
            _, high = self._span(seen.day, seen.at, seen.at)
            if seen.revision > high:
                text = (
                    f"watcher {seen.watcher} saw r{seen.revision} of {_told(seen.day)} before anything after r{high}"
                    " was requested"
                )
                yield Violation("real-time", text, (seen.day,))

    def _pictures(self) -> Iterator[Violation]:
        sights: list[Read | Seen] = [*self._history.reads, *self._history.seen]
        for sight in sights:
            replay = self._replays.get(sight.day)
            true = replay.pictures.get(sight.revision) if replay else ((), 0) if sight.revision == 1 else None
            if sight.picture != true:
                text = f"r{sight.revision} of {_told(sight.day)} was shown as {sight.picture}, but is {true}"
                yield Violation("wrong-queue", text, (sight.day,), sight.revision)

    def _watches(self) -> Iterator[Violation]:
        for seen in self._history.seen:
            told = [change[0] for change in seen.changes]
            if seen.previous != seen.known:
                text = f"at r{seen.known} got the changes after r{seen.previous}"
            elif seen.previous and told != [*range(seen.previous + 1, seen.revision + 1)]:
                text = f"got these changes from r{seen.previous} to r{seen.revision}: {told}"
            else:
                wrong = [change for change in seen.changes if change != self._change(seen.day, change[0])]
                if not wrong:
                    continue
                text = f"got {wrong[0]}, but the database has {self._change(seen.day, wrong[0][0])}"
            yield Violation("watch-missed", f"watcher {seen.watcher} of {_told(seen.day)} {text}", (seen.day,))
        for watcher, day, knew, should, when in self._history.late:
            text = f"watcher {watcher} of {_told(day)} was at r{knew} of r{should} {when}"
            yield Violation("watch-late", text, (day,), should)

    def _change(self, day: Day, revision: int) -> Change | None:
        event = self._event.get((day, revision))
        return None if event is None else (revision, event.kind, event.appointment, event.state, event.ticket)

    def _span(self, day: Day, invoke: float, complete: float) -> tuple[int, int]:
        return self._bounds[day].of(invoke, complete) if day in self._bounds else (1, 1 << 60)

    def _refusals(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.attempts:
                if (
                    one.outcome == OK
                    or one.outcome.startswith((UNANSWERED, BROKEN))
                    or self._for_access(operation, one)
                ):
                    continue
                why = "which its method never answers"
                if one.outcome in REFUSALS[operation.method]:
                    why = self._impossible(operation, one)
                if why:
                    text = f"{one.outcome} to {_named(operation)}, {why}"
                    yield Violation("impossible-refusal", text, tuple(sorted(self.days_of(operation))))

    def _impossible(self, operation: Operation, one: Attempt) -> str:
        """Evidence that the reason was never true between call and answer; empty if it may have been true."""
        if operation.day not in self._replays:
            return ""
        replay = self._replays[operation.day]
        low, high = self._span(operation.day, one.invoke, one.complete)
        high = min(high, replay.last)
        when = f"from r{low} to r{high} of {_told(operation.day)}"
        # A move does not count its own place.
        moves = operation.method in ("RescheduleAppointment", "TransferPatient")
        if one.outcome == "DAY_FULL":
            if operation.overrides:
                return "but it overrides the capacity"
            capacity = self._facts.capacities[operation.day[0]]
            most = max(replay.taken.between(low, high)) + _held(one)
            return f"but at most {most} of {capacity} places were taken {when}" if most < capacity else ""
        if one.outcome == "SLOT_FULL" and not moves:
            places = self._facts.slots.get(operation.slot, 0)
            if not places:
                return "but it named no slot"
            most = max(replay.taken_of_slot[operation.slot].between(low, high)) + _held(one)
            return f"but at most {most} of the slot's {places} places were taken {when}" if most < places else ""
        if one.outcome == "HOLD_EXPIRED":
            about = dict(zip(one.about[::2], one.about[1::2], strict=True))
            uses = [event for event in self._facts.events if event.hold == about.get("hold_id")]
            return "but nobody has used it" if about.get("state") == "USED" and not uses else ""
        if one.outcome == "QUEUE_EMPTY":
            pictures = (replay.pictures.get(revision) for revision in range(low, high + 1))
            empty = any(
                p is None
                or all(
                    entry[2] != "WAITING" or self._company.maybe(entry[0], operation.day, one.invoke, one.complete)
                    for entry in p[0]
                )
                for p in pictures
            )
            return "" if empty else f"but a patient was always waiting {when}"
        if one.outcome in ("DUPLICATE_BOOKING", "PATIENT_OVERLAP"):
            return self._patient_was_free(operation, one)
        if one.outcome in _CLOSED:
            day, slot = operation.day, operation.slot if one.outcome == "SLOT_BLOCKED" else ""
            closed = any(
                closing.asked <= one.complete
                and one.invoke <= self._history.cancelled.get(closing.id, closing.opened)
                and self._closes(closing, day, slot)
                for closing in self._closings[day[0]]
            )
            return "" if closed else f"but nothing closed slot '{slot}' of {_told(day)}"
        if one.outcome == "INVALID_FIELD":
            here = replay.ever(operation.appointment, low, high, {*WAITING_ROOM})
            return "" if here else f"but {operation.appointment} was not with the doctor whom it names {when}"
        if one.outcome == "CALL_LIMIT_REACHED":
            made = max(replay.calls[operation.appointment].between(low, high))
            enough = operation.appointment in replay.moved or made >= self._facts.max_calls
            return "" if enough else f"but {operation.appointment} had {made} calls at most {when}"
        if one.outcome == "NOTHING_TO_UNDO":
            times = replay.undoable[operation.appointment].between(low, high)
            late = one.complete + self._history.clock - min(times) > UNDO_SECONDS - _CLOCK_SECONDS
            if late or not all(times) or operation.appointment in replay.moved:
                return ""
            return f"but {operation.appointment} had a verb to undo {when}"
        if one.outcome in ("INVALID_TRANSITION", "ALREADY_CHECKED_IN") and operation.appointment not in replay.moved:
            others = {"CANCELLED", "NO_SHOW", "LEFT", *WAITING_ROOM, "DONE"}
            if not moves:
                others = (others | {"BOOKED"}) - STEPS[KINDS[operation.method]][0]
            if moves or replay.ever(operation.appointment, low, high, others):
                return ""
            was = replay.states[operation.appointment].between(low, high)
            return f"but {operation.appointment} was {', '.join(was)} {when}"
        return ""

    def _patient_was_free(self, operation: Operation, one: Attempt) -> str:
        """Evidence that no other visit of the patient conflicted; empty if one may have."""
        patient = operation.patient
        if not patient and operation.appointment in self._facts.visits:
            patient = self._facts.visits[operation.appointment].patient
        if not patient:
            return ""
        mine = self._facts.times.get(operation.slot, (0.0, 0.0))
        for who in self._of_patient[patient]:
            if who == operation.appointment:
                continue
            for day in self._days_of[who]:
                if one.outcome == "DUPLICATE_BOOKING" and day != operation.day:
                    continue
                replay = self._replays[day]
                if one.outcome == "PATIENT_OVERLAP":
                    theirs = [self._facts.times.get(slot, (0.0, 0.0)) for slot in replay.slots[who]]
                    if not any(start < mine[1] and mine[0] < end for start, end in theirs):
                        continue
                if replay.ever(who, *self._span(day, one.invoke, one.complete), LIVE):
                    return ""
        return "but no other visit of the patient conflicted then"

    def _asked(self) -> Iterator[Violation]:
        """Answers and refusals concern the resources of the request."""
        for operation in self._history.operations:
            for one in operation.attempts:
                wrong = self._mistaken(operation, one) if one.about else ""
                if wrong:
                    text = f"{one.outcome} to {_named(operation)} {wrong}; it concerns {one.about}"
                    yield Violation("wrong-answer", text, (operation.day,))

    def _mistaken(self, operation: Operation, one: Attempt) -> str:
        visits = self._facts.visits
        if one.outcome == OK:
            patient, doctor, date, slot = one.about
            if one.appointment in visits and visits[one.appointment].patient != patient:
                return f"names the wrong patient for visit {one.appointment}"
            if operation.patient and operation.patient != patient:
                return f"requested patient {operation.patient}"
            if operation.appointment and operation.appointment != one.appointment:
                return f"requested {operation.appointment}"
            if operation.method in AIMED and (doctor, date, slot) != (*operation.day, operation.slot):
                return f"requested {operation.day} {operation.slot}"
            return ""
        about = dict(zip(one.about[::2], one.about[1::2], strict=True))
        if about.get("doctor_id", operation.day[0]) != operation.day[0]:
            return "requested another doctor"
        if "doctor_id" in about and about.get("date", operation.day[1]) != operation.day[1]:
            return "requested another day"
        if about.get("slot_id", operation.slot) != operation.slot:
            return "requested another slot"
        subject = about.get("appointment_id", "")
        if one.outcome in ("DUPLICATE_BOOKING", "PATIENT_OVERLAP"):
            moved = visits.get(operation.appointment)
            patient = operation.patient or (moved.patient if moved else "")
            if subject in visits and patient and visits[subject].patient != patient:
                return "names a visit of another patient"
        elif subject and subject != operation.appointment:
            return f"requested {operation.appointment}"
        return ""

    def _manners(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.attempts:
                if one.outcome.startswith(BROKEN):
                    yield Violation("internal", f"{one.outcome} to {_named(operation)}", (operation.day,))
                elif one.outcome == f"{UNANSWERED}CONFLICT" and not self._may_be_locked(operation):
                    text = f"the database aborted {_named(operation)} for a conflict that the locks should prevent"
                    yield Violation("conflict", text, (operation.day,))
        for broken in self._history.broken:
            yield Violation("internal", broken)
        if self._facts.deadlocks:
            yield Violation("deadlock", f"PostgreSQL broke {self._facts.deadlocks} deadlocks")
        for watcher, end in self._history.drains:
            if end != "closing, OK":
                yield Violation("drain", f"stream {watcher} of the stopping service ended with: {end}")

    def _may_be_locked(self, operation: Operation) -> bool:
        """Whether CallNext may want the lock of a patient with another visit, for which it does not wait for long."""
        replay = self._replays.get(operation.day)
        if operation.method != "CallNext" or replay is None:
            return False
        visits = self._facts.visits
        patients = [visits[who].patient for who in replay.entry if replay.entry[who].ticket and who in visits]
        return any(
            day != operation.day and day[1] == operation.day[1]
            for patient in patients
            for other in self._of_patient[patient]
            for day in self._days_of[other]
        )

    def _holds(self) -> Iterator[Violation]:
        """A hold is used once, while it is live and for its own place; and live holds take places as bookings do."""
        for missing in sorted({*self._history.holds} - self._facts.holds.keys()):
            yield Violation("hold-lost", f"hold {missing} was acknowledged, but the database does not have it")
        uses: dict[str, list[Event]] = defaultdict(list)
        for day in self._events:
            for event in self._events[day]:
                if event.hold and event.kind != "MOVED_OUT":
                    uses[event.hold].append(event)
        used: dict[str, float] = defaultdict(lambda: float("inf"))
        for name, events in uses.items():
            used[name] = min(event.time for event in events)
            days = tuple(sorted({event.day for event in events}))
            if len(events) > 1:
                told = ", ".join(f"r{event.revision} of {_told(event.day)}" for event in events)
                yield Violation("hold-used-twice", f"hold {name} was used at {told}", days)
            hold = self._facts.holds.get(name)
            for event in events:
                at = f"r{event.revision} of {_told(event.day)}"
                if hold is None:
                    yield Violation("hold-misused", f"{at} used hold {name}, which does not exist", days)
                elif event.time >= min(hold.expire, hold.released):
                    late = event.time - min(hold.expire, hold.released)
                    yield Violation("hold-used-late", f"{at} used hold {name} {late:.6f} s after its end", days)
                elif event.day != hold.day or self._place_of(event) != hold.slot:
                    yield Violation("hold-misused", f"{at} used hold {name} of {_told(hold.day)} {hold.slot}", days)
                elif hold.patient and self._patient_of(event) != hold.patient:
                    yield Violation("hold-misused", f"{at} used hold {name} of patient {hold.patient}", days)
        of_day: dict[Day, list[Hold]] = {day: [] for day in self._events}
        for hold in self._facts.holds.values():
            of_day.setdefault(hold.day, []).append(hold)
        for day, holds in of_day.items():
            yield from self._held_places(day, holds, used)

    def _held_places(self, day: Day, holds: Sequence[Hold], used: dict[str, float]) -> Iterator[Violation]:
        events, replay = self._events[day], self._replays.get(day)
        capacity = self._facts.capacities.get(day[0], 0)
        # Whenever somebody takes a place without a hold, or holds one: the time, the revision and the slot.
        takes = [(hold.placed, 0, hold.slot, f"hold {hold.id}") for hold in holds]
        for event in events:
            if replay is not None and event.kind in TAKES and not event.hold:
                before, after = (replay.taken.between(r, r)[-1] for r in (event.revision - 1, event.revision))
                if event.over and event.kind != "UNDONE":
                    held = sum(one.live(event.time, used[one.id]) for one in holds)
                    if before + held < capacity:
                        text = f"r{event.revision} of {_told(day)} overrides beside {before} booked and {held} held"
                        yield Violation("override", f"{text} of {capacity}", (day,), event.revision)
                elif after > before:
                    takes.append((event.time, event.revision, self._place_of(event), f"r{event.revision}"))
        for at, revision, slot, what in takes:
            last = revision or max((event.revision for event in events if event.time < at), default=1)
            live = [one for one in holds if one.live(at, used[one.id]) or (not revision and one.placed == at)]
            booked = replay.taken.between(last, last)[-1] if replay is not None else 0
            if booked + len(live) > capacity:
                text = f"{what} of {_told(day)} took a place beside {booked} booked and {len(live)} held of {capacity}"
                yield Violation("held-over-capacity", text, (day,), revision)
            if slot:
                booked = replay.taken_of_slot[slot].between(last, last)[-1] if replay is not None else 0
                held = sum(one.slot == slot for one in live)
                if booked + held > (places := self._facts.slots.get(slot, 0)):
                    text = f"{what} took a place beside {booked} booked and {held} held of {places} in slot {slot}"
                    yield Violation("held-over-capacity", text, (day,), revision)

    def _place_of(self, event: Event) -> str:
        """The slot that a booking or a move got."""
        memory = self._made.get((event.day, event.revision))
        visit = self._facts.visits.get(event.appointment)
        return memory.slot if memory else event.slot if event.number else visit.slot if visit else ""

    def _patient_of(self, event: Event) -> str:
        visit = self._facts.visits.get(event.appointment)
        return visit.patient if visit else ""

    # What belongs together

    def _pairs(self) -> Iterator[Violation]:
        """A walk-in is a booking and a check-in in one transaction, and so is a move a leaving and an arrival."""
        arrived = {
            (event.appointment, event.kind, event.transaction)
            for event in self._facts.events
            if event.kind in ("MOVED_IN", "TRANSFERRED_IN")
        }
        left = {
            (event.appointment, event.transaction): event
            for event in self._facts.events
            if event.kind == "TRANSFERRED_OUT"
        }
        for event in self._facts.events:
            who, at = event.appointment, f"r{event.revision} of {_told(event.day)}"
            if event.kind in ("MOVED_OUT", "TRANSFERRED_OUT"):
                arrival = event.kind.replace("OUT", "IN")
                if (who, arrival, event.transaction) not in arrived:
                    text = f"{event.kind} of {who} at {at} has no {arrival} in its transaction"
                    yield Violation("move-split", text, (event.day,))
            elif event.kind == "TRANSFERRED_IN":
                before = left.get((who, event.transaction))
                if before is None:
                    text = f"{event.kind} of {who} at {at} has no TRANSFERRED_OUT in its transaction"
                    yield Violation("move-split", text, (event.day,))
                elif (before.priority, before.check_in) != (event.priority, event.check_in):
                    text = f"{who} came at {at} with {event.priority} {event.check_in}, not as it left: {before}"
                    yield Violation("entry", text, (event.day, before.day))
            elif event.method == "AddWalkIn" and event.kind in ("BOOKED", "CHECKED_IN"):
                step, kind = (1, "CHECKED_IN") if event.kind == "BOOKED" else (-1, "BOOKED")
                other = self._event.get((event.day, event.revision + step))
                pair = (kind, "AddWalkIn", who, event.transaction)
                if other is None or (other.kind, other.method, other.appointment, other.transaction) != pair:
                    text = f"the walk-in {event.kind} of {who} at {at} has no {kind} in its transaction, but {other}"
                    yield Violation("walk-in-split", text, (event.day,))
        sights: list[Read | Seen] = [*self._history.reads, *self._history.seen]
        for sight in sights:
            shown = self._event.get((sight.day, sight.revision))
            if shown is not None and (shown.kind, shown.method) == ("BOOKED", "AddWalkIn"):
                text = (
                    f"r{sight.revision} of {_told(sight.day)} was shown, the booking of a walk-in without its check-in"
                )
                yield Violation("walk-in-split", text, (sight.day,))

    def _wishes(self) -> Iterator[Violation]:
        """Who asked for a priority or a room got it; nobody got an override who did not ask, or may not."""
        undone: dict[tuple[str, str], list[str]] = defaultdict(list)
        for operation in self._history.operations:
            for day, revision, _ in self._effects(operation):
                event = self._event.get((day, revision))
                if event is None or event.method != operation.method:
                    continue
                at = f"r{revision} of {_told(day)}, {_named(operation)},"
                if event.over and not operation.overrides:
                    yield Violation("override", f"{at} overrides the capacity, but must not", (day,), revision)
                if event.kind != KINDS[operation.method]:
                    continue
                wanted = (operation.priority or event.priority, operation.room or event.room)
                if (event.priority, event.room) != wanted:
                    text = f"{at} made it {event.priority} in room '{event.room}', not {wanted}"
                    yield Violation("wrong-answer", text, (day,), revision)
                if operation.etag:
                    undone[event.appointment, operation.etag].append(at)
        for (who, etag), made in undone.items():
            if len(made) > 1:
                yield Violation("undo", f"{who} was undone twice with etag {etag}: {' '.join(sorted(made))}")

    def _elsewhere(self) -> Iterator[Violation]:
        """Nobody is called who is with another doctor."""
        for event in self._facts.events:
            if event.kind == "CALLED":
                when = self._company.interval(event.day, event.revision)
                where = self._company.surely(event.appointment, event.day, *when)
                if where is not None:
                    text = (
                        f"r{event.revision} of {_told(event.day)} called {event.appointment}, whose patient had been"
                        f" called at r{where[1]} of {_told(where[0])} and was still there"
                    )
                    yield Violation("called-elsewhere", text, (event.day, where[0]))

    # Leave and hours

    def _closes(self, closing: Closing | Leave, day: Day, slot: str) -> bool:
        """Whether it closes this place."""
        if closing.doctor != day[0]:
            return False
        if closing.days:
            return day[1] in closing.days
        start, end = self._facts.times.get(slot, (0.0, 0.0))
        return start < closing.end and closing.start < end

    def _settled(self) -> dict[tuple[Day, int], str]:
        """By which leave each change was made, where only one can have made it."""
        leaves: dict[tuple[str, str, Day | None], list[str]] = defaultdict(list)
        for outcome in self._facts.outcomes:
            leaves[outcome.appointment, outcome.outcome, outcome.day].append(outcome.leave)
        found = {}
        for event in self._facts.events:
            if event.method == "CreateLeave" and event.kind in ("CANCELLED", "MOVED_IN"):
                moved = event.kind == "MOVED_IN"
                wanted = (event.appointment, "MOVED" if moved else "CANCELLED", event.day if moved else None)
                if len(leaves[wanted]) == 1:
                    found[event.day, event.revision] = leaves[wanted][0]
        for closing in self._history.closings:
            for place, leave in found.items():
                if leave == closing.id and closing.applied:
                    self._when[place] = (closing.asked, closing.answered)
        return found

    def _closed(self) -> Iterator[Violation]:
        """Nobody gets a place that a leave or an exception has closed, from its answer on."""

        def shut(what: str, day: Day, slot: str, span: tuple[float, float], revision: int = 0) -> Iterator[Violation]:
            for closing in self._closings[day[0]]:
                if closing.answered < span[0] and span[1] < closing.opening and self._closes(closing, day, slot):
                    told = ", ".join(closing.days) or f"{closing.start:.0f} to {closing.end:.0f}"
                    name = f"leave {closing.id}" if closing.of_leave else "the exception"
                    text = f"{what} of {_told(day)} got a place that {name} of {told} had closed"
                    yield Violation("under-leave", text, (day,), revision)

        for event in self._facts.events:
            if event.kind in TAKES - {"UNDONE"}:
                when = self._company.interval(event.day, event.revision)
                yield from shut(f"r{event.revision}", event.day, self._place_of(event), when, event.revision)
        for name, span in self._history.hold_times.items():
            if (hold := self._facts.holds.get(name)) is not None:
                yield from shut(f"hold {name}", hold.day, hold.slot, span)

    def _leaves(self) -> Iterator[Violation]:
        """Each appointment has one outcome of a leave, and what was done is what the outcomes say."""
        rows = Counter((one.leave, one.appointment) for one in self._facts.outcomes)
        for (leave, who), count in rows.items():
            if count > 1:
                yield Violation("outcome-twice", f"{who} has {count} outcomes of leave {leave}")
        said = Counter(
            (one.appointment, "MOVED_IN" if one.outcome == "MOVED" else one.outcome, one.day)
            for one in self._facts.outcomes
            if one.outcome in ("MOVED", "CANCELLED")
        )
        made = Counter(
            (event.appointment, event.kind, event.day if event.kind == "MOVED_IN" else None)
            for event in self._facts.events
            if event.method == "CreateLeave" and event.kind in ("MOVED_IN", "CANCELLED")
        )
        for what in sorted(said.keys() | made.keys(), key=str):
            if said[what] != made[what]:
                text = f"{what[1]} of {what[0]} has {said[what]} outcomes, but was made {made[what]} times by leaves"
                yield Violation("outcome-and-events", text)
        for (day, revision), leave in self._settling.items():
            over = self._history.cancelled.get(leave, float("inf")) + self._history.clock
            if (late := self._event[day, revision].time - over) > _SAME_CLOCK_SECONDS:
                text = f"r{revision} of {_told(day)} was made by leave {leave} {late:.3f} s after its end was answered"
                yield Violation("after-cancel", text, (day,), revision)
        acknowledged = [one for one in self._history.closings if one.id]
        for closing in acknowledged:
            row = self._facts.leaves.get(closing.id)
            if row is None:
                yield Violation("leave-lost", f"leave {closing.id} was acknowledged, but the database does not have it")
            elif closing.id in self._history.cancelled and row.state != "CANCELLED":
                yield Violation("leave-lost", f"leave {closing.id} was cancelled, but is {row.state}")
        rest = sorted((one for one in self._facts.leaves.values() if one.state != "CANCELLED"), key=_start)
        found = [(one.id, other.id) for one, other in _overlaps(rest)]
        lives = [(self._facts.leaves[one.id], one) for one in acknowledged if one.id in self._facts.leaves]
        for (earlier, one), (later, other) in _overlaps(sorted(lives, key=lambda pair: _start(pair[0]))):
            # Both were there at one time.
            if max(one.answered, other.answered) < min(one.opening, other.opening):
                found.append((earlier.id, later.id))
        for both in dict.fromkeys(found):
            yield Violation("leave-overlap", f"leaves {both[0]} and {both[1]} of one doctor overlap")

    def _slipped(self) -> Iterator[Violation]:
        """Nobody who was there when a leave had been applied was forgotten by it."""
        settled = {(one.leave, one.appointment) for one in self._facts.outcomes}
        applied: dict[str, list[Leave]] = defaultdict(list)
        for leave in self._facts.leaves.values():
            if leave.applied < float("inf"):
                applied[leave.doctor].append(leave)
        for day, events in self._events.items():
            # From an arrival to the end; not of those whom an undo brought back, which a leave does not hinder.
            stays: list[tuple[str, str, float, float]] = []
            here: dict[str, tuple[str, float]] = {}
            for event in events if applied[day[0]] else ():
                who = event.appointment
                ends = event.kind in ("MOVED_OUT", "TRANSFERRED_OUT") or STEPS.get(event.kind, ("", ""))[1] in _ENDED
                arrives = event.kind in TAKES - {"UNDONE"}
                if (ends or arrives) and who in here:
                    slot, came = here.pop(who)
                    stays.append((who, slot, came, event.time))
                if arrives:
                    here[who] = (self._place_of(event), event.time)
            stays += [(who, slot, came, float("inf")) for who, (slot, came) in here.items()]
            for leave in applied[day[0]]:
                for who, slot, came, left in stays:
                    inside = came < leave.applied < left and self._closes(leave, day, slot)
                    if inside and (leave.id, who) not in settled:
                        text = f"{who} of {_told(day)} was there when leave {leave.id} was applied, but has no outcome"
                        yield Violation("slipped-past-leave", text, (day,))

    def _hours(self) -> Iterator[Violation]:
        """Schedules do not overlap, nor slots; every visit of the hours has a slot; generating again makes none."""
        of_doctor: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for doctor, first, last in self._facts.schedules:
            of_doctor[doctor].append((first, last))
        for doctor, dates in of_doctor.items():
            for (_, end), (start, _) in pairwise(sorted(dates)):
                if start <= end:
                    text = f"two schedules of {doctor} hold on {start}, of which one ends on {end}"
                    yield Violation("schedule-overlap", text)
        slots: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for slot, doctor in self._facts.owners.items():
            slots[doctor].append(self._facts.times[slot])
        for doctor, times in slots.items():
            for (_, ended), (begun, _) in pairwise(sorted(times)):
                if begun < ended:
                    yield Violation("slot-twice", f"two slots of {doctor} overlap at {begun:.0f}")
        for doctor, starts, ends in self._facts.visits_due:
            if not any(begun < ends and starts < ended for begun, ended in slots[doctor]):
                yield Violation("not-generated", f"the hours of {doctor} at {starts:.0f} have no slot")
        changes: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for edit in self._history.edits:
            if edit.method != "GenerateSlots":
                changes[edit.doctor].append((edit.asked, edit.answered))
        for closing in self._history.closings:
            # What is closed is not generated; and nobody knows for how long.
            changes[closing.doctor].append((closing.asked, self._history.cancelled.get(closing.id, closing.opened)))
        generated = [one for one in self._history.edits if one.method == "GenerateSlots"]
        for again in generated:
            if not again.created or again.replayed:
                continue
            for before in generated:
                if before.doctor != again.doctor or before.answered >= again.asked:
                    continue
                if not any(a <= again.answered and before.asked <= b for a, b in changes[again.doctor]):
                    text = f"{again.created} slots of {again.doctor} were generated again"
                    yield Violation("generated-again", text)
                    break

    # Access

    def _for_access(self, operation: Operation, one: Attempt) -> bool:
        """Whether the caller was refused, rather than the change."""
        if one.grant is None:
            return False
        return one.outcome in ACCESS_REFUSALS or (
            one.outcome == "APPOINTMENT_NOT_FOUND" and self._may_have_left(operation, one.grant)
        )

    def _may_have_left(self, operation: Operation, grant: Grant) -> bool:
        """Whether the appointment may have been moved to another doctor: then it is out of this one's sight."""
        made = {one.appointment for one in operation.successes} | {operation.appointment}
        return grant.kind == "doctor" and any(replay.moved & made for replay in self._replays.values())

    def _access(self) -> Iterator[Violation]:
        for operation in self._history.operations:
            for one in operation.attempts:
                if one.grant is None or one.outcome.startswith((UNANSWERED, BROKEN)):
                    continue
                wrong = _credentials_misjudged(one)
                if not wrong and one.outcome in NOT_ALLOWED and not self._may_have_left(operation, one.grant):
                    wrong = ("access-refused", "who may do that")
                if wrong:
                    text = (
                        f"{one.outcome} to {_named(operation)} of {one.grant.identity} ({one.grant.kind}), {wrong[1]}"
                    )
                    yield Violation(wrong[0], text, (operation.day,))

    def _streams(self) -> Iterator[Violation]:
        for stream in self._history.streams:
            if stream.last > stream.grant.ended + STREAM_SECONDS + _READING_SECONDS:
                seconds = stream.last - stream.grant.ended
                text = (
                    f"a stream of {stream.grant.identity} went on for {seconds:.1f} s after the credentials had ended"
                )
                yield Violation("stream-late", text)

    def _probes(self) -> Iterator[Violation]:
        for probe in self._history.probes:
            if probe.outcome.startswith(UNANSWERED):
                continue
            who = f"{probe.grant.identity} ({probe.grant.kind})"
            wrong = _credentials_misjudged(probe)
            if wrong:
                yield Violation(wrong[0], f"{probe.outcome} to {probe.method} of {who}, {wrong[1]}")
            elif probe.grant.kind == "doctor" and any(probe.appointment in one.moved for one in self._replays.values()):
                # The client may have been wrong about whose it is.
                continue
            elif probe.outcome != probe.expected and probe.outcome not in BAD_CREDENTIALS:
                text = f"{probe.method} of {who} for {probe.what} was answered {probe.outcome}, not {probe.expected}"
                yield Violation("not-his", text)

    def _quota(self) -> Iterator[Violation]:
        quota = self._history.quota
        inside: dict[int, list[Metered]] = defaultdict(list)
        maybe: Counter[int] = Counter()
        for one in self._history.metered:
            first, last = int(one.invoke // 60), int(one.complete // 60)
            if first == last:
                inside[first].append(one)
            if one.outcome != "RATE_LIMITED":
                maybe.update(range(first, last + 1))
        for minute, calls in inside.items():
            count = sum(one.outcome == OK for one in calls)
            if count > quota:
                yield Violation("quota-exceeded", f"{count} calls were answered in one minute, of {quota}")
            faults = sum(int(begin // 60) <= minute <= int(end // 60) for begin, end in self._history.faults)
            lost = _LOST_TO_A_FAULT * faults
            refused = any(one.outcome == "RATE_LIMITED" for one in calls)
            if refused and maybe[minute] + lost < _QUOTA_USED * quota:
                text = f"calls were refused after {maybe[minute]} of {quota} in one minute, and {lost} lost to faults"
                yield Violation("quota-unused", text)

    # The log

    def _log(self) -> Iterator[Violation]:
        """Each change is logged by its method, under the identity that made it."""
        for operation in self._history.operations:
            for day, revision, _ in self._effects(operation):
                event = self._event.get((day, revision))
                if event is None or (event.actor, event.method) == (operation.identity, operation.method):
                    continue
                if event.appointment in {operation.appointment, *(one.appointment for one in operation.successes)}:
                    text = (
                        f"r{revision} of {_told(day)} is logged as {event.method} of {event.actor}, but it was"
                        f" {_named(operation)} of {operation.identity}"
                    )
                    yield Violation("wrong-actor", text, (day,))

    def _acts(self) -> Iterator[Violation]:
        """Each change of credentials and rights has one row, and nothing else has one."""
        most, least = Counter[tuple[str, str, str, str]](), Counter[tuple[str, str, str, str]]()
        for act in self._history.acts:
            row = (act.actor, act.method, act.type, act.resource)
            least[row] += act.outcome == OK
            most[row] += act.outcome in ("", OK)
        for row in sorted(most.keys() | self._facts.acts.keys()):
            if not least[row] <= (rows := self._facts.acts[row]) <= most[row]:
                text = f"{' '.join(row)} has {rows} rows in the log, but was made {least[row]} to {most[row]} times"
                yield Violation("act-not-logged" if rows < least[row] else "act-logged-twice", text)

    def _seals(self) -> Iterator[Violation]:
        """Every row has one place in the chain, and those of a doctor-day are in the order of their revisions."""
        chain, position = bytes(32), 0
        last: dict[Day, int] = {}
        said: set[str] = set()
        for seal in self._facts.seals:
            wrong = []
            if seal.position != position + 1:
                wrong.append(("seal-gap", f"position {position} is followed by {seal.position}"))
            if seal.digest is None:
                wrong.append(("seal-gap", f"position {seal.position} seals a row that does not exist"))
            elif hashlib.sha256(chain + seal.digest).digest() != seal.chain:
                wrong.append(("chain-broken", f"the row at position {seal.position} is not what was sealed"))
            if seal.day is not None:
                if seal.revision != (expected := last.get(seal.day, 1) + 1):
                    text = f"position {seal.position} is r{seal.revision} of {_told(seal.day)}, but r{expected} is next"
                    wrong.append(("seal-order", text))
                last[seal.day] = seal.revision
            chain, position = seal.chain, seal.position
            for rule, text in wrong:
                # Most others are consequences of the first.
                if rule not in said:
                    said.add(rule)
                    yield Violation(rule, text)
        if self._facts.unsealed:
            yield Violation("not-sealed", f"{self._facts.unsealed} rows of the log were never sealed")


def _start(leave: Leave) -> tuple[str, float]:
    return (leave.doctor, leave.start)


def _overlaps(ordered: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Leaves of one doctor that overlap; `ordered` has them by doctor and start, alone or as the first of a pair."""
    for number, one in enumerate(ordered):
        for other in ordered[number + 1 :]:
            leave, later = (each[0] if isinstance(each, tuple) else each for each in (one, other))
            assert isinstance(leave, Leave)
            assert isinstance(later, Leave)
            if leave.doctor != later.doctor or later.start >= leave.end:
                break
            yield one, other


def _held(one: Attempt) -> int:
    """How many places were held, as a refusal says."""
    about = dict(zip(one.about[::2], one.about[1::2], strict=True))
    return int(about.get("held", 0))


def _credentials_misjudged(one: Attempt | Probe) -> tuple[str, str] | None:
    """The rule that an answered call breaks by how its credentials were judged, and how; None if it breaks none."""
    grant = one.grant
    if grant is None:
        return None
    if one.outcome not in BAD_CREDENTIALS:
        if one.invoke > grant.ended + REVOKED_SECONDS:
            return "access-late", f"sent {one.invoke - grant.ended:.1f} s after the credentials had ended"
        if one.invoke > one.expires + _CLOCK_SECONDS:
            return "access-late", f"sent {one.invoke - one.expires:.2f} s after the token had expired"
    elif not grant.renews:
        if one.complete < min(grant.ending, one.expires - _CLOCK_SECONDS):
            return "access-refused", "whose credentials were good"
        if one.outcome != "CREDENTIALS_EXPIRED" and one.complete < grant.ending:
            return "access-refused", "whose token had expired"
    return None
