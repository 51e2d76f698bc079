"""The shortest history that shows a violation, found by leaving out everything that the checker does not need.

Candidates are the clients' records (an operation with all its calls, a read, an update) and the events of a visit: all
of them, or the first ones, but none in the middle, which would make it a different visit. The checker must still report
the same text, which names the instance and all evidence that matters (places taken, states of a visit, revisions), so
no evidence is lost.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from tests.history.check import Checker, Day, Event, Facts, History, Memory, Operation, Read, Seen, Violation

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The rest of a history. The rows of visits, capacities and slots stay, because they are not steps."""

    observed: tuple[Operation | Read | Seen, ...]
    events: tuple[Event, ...]

    def checked(self, whole: History, facts: Facts) -> Checker:
        history, kept = (
            replace(whole, operations=[], reads=[], seen=[]),
            replace(facts, events=list(self.events), deadlocks=0),
        )
        for one in self.observed:
            if isinstance(one, Operation):
                history.operations.append(one)
            elif isinstance(one, Read):
                history.reads.append(one)
            else:
                history.seen.append(one)
        return Checker(history, kept)


def shortest(history: History, facts: Facts, violation: Violation, seconds: float = 20.0) -> list[str]:
    """The steps that show the violation, found in at most `seconds`; empty if it concerns the whole service."""
    if not violation.days:
        return []
    part = reduced(history, facts, violation, seconds)
    return _lines(part, facts, violation)


def reduced(history: History, facts: Facts, violation: Violation, seconds: float = 20.0) -> Part:
    """A part in which every step is needed for the checker to report the same violation."""
    deadline = time.monotonic() + seconds
    days = set(violation.days)
    # Other records concern only the rows, and rows of other days are not checked.
    kept = Facts(
        facts.capacities, facts.slots, facts.times, facts.max_calls, visits=facts.visits, holds=facts.holds,
        owners=facts.owners, leaves=facts.leaves, outcomes=facts.outcomes,
        memories=[one for one in facts.memories if one.day in days],
        revisions={day: last for day, last in facts.revisions.items() if day in days},
    )  # fmt: skip
    whole = Checker(history, facts)
    seen: list[Operation | Read | Seen] = [one for one in history.operations if whole.days_of(one) & days]
    seen += [one for one in history.reads if one.day in days]
    seen += [one for one in history.seen if one.day in days]
    part = Part(tuple(seen), tuple(one for one in facts.events if one.day in days))
    late = replace(history, late=[one for one in history.late if one[1] in days])

    def shows(tried: Part) -> bool:
        if time.monotonic() > deadline:
            return False
        found = tried.checked(late, kept).check([violation.by])
        return any((one.rule, one.text) == (violation.rule, violation.text) for one in found)

    if not shows(part):
        # It depends on more than its doctor-days.
        kept, part = facts, Part((*history.operations, *history.reads, *history.seen), tuple(facts.events))
    if violation.revision:
        early = [one for one in part.events if one.day != violation.days[0] or one.revision <= violation.revision]
        if shows(replace(part, events=tuple(early))):
            part = replace(part, events=tuple(early))
    while True:
        before = part
        part = replace(part, observed=_fewest(part.observed, partial(_if_observed, shows, part)))
        visits = tuple({(one.day, one.appointment): None for one in part.events})
        part = _of(part, _fewest(visits, partial(_if_held, shows, part)))
        for visit in visits:
            while own := [one for one in part.events if (one.day, one.appointment) == visit]:
                first = min(own, key=_revision)
                fewer = replace(part, events=tuple(one for one in part.events if one is not first))
                if not shows(fewer):
                    break
                part = fewer
        if part == before or time.monotonic() > deadline:
            return part


def _if_observed(shows: Callable[[Part], bool], part: Part, left: tuple[Operation | Read | Seen, ...]) -> bool:
    return shows(replace(part, observed=left))


def _if_held(shows: Callable[[Part], bool], part: Part, left: tuple[tuple[Day, str], ...]) -> bool:
    return shows(_of(part, left))


def _of(part: Part, visits: tuple[tuple[Day, str], ...]) -> Part:
    kept = set(visits)
    return replace(part, events=tuple(one for one in part.events if (one.day, one.appointment) in kept))


def _revision(event: Event) -> int:
    return event.revision


def _fewest(items: tuple[T, ...], shows: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """Delta debugging (Zeller's ddmin, complements only): leave out pieces, ever smaller, down to single items."""
    pieces = 1
    while items:
        size = -(-len(items) // pieces)
        for start in range(0, len(items), size):
            left = items[:start] + items[start + size :]
            if shows(left):
                items = left
                pieces = max(pieces - 1, 1)
                break
        else:
            if size == 1:
                break
            pieces = min(2 * pieces, len(items))
    return items


def _lines(part: Part, facts: Facts, violation: Violation) -> list[str]:
    """As text: first the database, in its order; then the clients' records, by time."""
    lines = []
    memories: dict[tuple[object, int], list[Memory]] = {}
    for memory in facts.memories:
        memories.setdefault((memory.day, memory.revision), []).append(memory)
    several = len(violation.days) > 1
    for event in sorted(part.events, key=lambda one: (one.day, one.revision)):
        visit = facts.visits.get(event.appointment)
        where = f" of {event.day[0][-6:]} {event.day[1]}" if several else ""
        line = f"database r{event.revision}{where} {event.kind} {event.appointment[-6:]} {event.state or '-'}"
        line += f" t{event.ticket}" if event.ticket else ""
        line += f", patient {visit.patient[-6:]}" if visit else ""
        for memory in memories.get((event.day, event.revision), ()):
            slot = f" slot {memory.slot[-6:]}" if memory.slot else ""
            line += f", by key {memory.key} #{memory.number}{slot}"
        lines.append(line)

    def instant(one: Operation | Read | Seen) -> float:
        if isinstance(one, Operation):
            return min((attempt.invoke for attempt in one.attempts), default=0.0)
        return one.invoke if isinstance(one, Read) else one.at

    return lines + [str(one) for one in sorted(part.observed, key=instant)]
