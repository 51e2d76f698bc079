"""The checker notices: one small wrong history a rule, and a right one that it leaves alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.history.check import (
    Attempt,
    Change,
    Checker,
    Event,
    Facts,
    History,
    Memory,
    Operation,
    Read,
    Seen,
    Visit,
)

DAY, NEXT = ("doctor", "2030-05-06"), ("doctor", "2030-05-07")


def told(start: float, revision: int, appointment: str, state: str, number: int = 1, **more: int) -> Attempt:
    """An answer that came 0.5 s after it was asked for."""
    return Attempt(start, start + 0.5, "OK", False, revision, 0, appointment, number, state, **more)


def right() -> tuple[History, Facts]:
    """Two places: a and b are booked, c is refused, a checks in, is called and parked, and b moves to the next day."""
    history, facts = History(), Facts(capacities={"doctor": 2}, slots={"slot": 1})
    steps = [
        ("BookAppointment", "a", told(1, 2, "a", "BOOKED")),
        ("BookAppointment", "b", told(2, 3, "b", "BOOKED", 2)),
        ("BookAppointment", "", Attempt(3, 3.5, "DAY_FULL")),
        ("CheckIn", "a", told(4, 4, "a", "WAITING", ticket=1)),
        ("CallNext", "a", told(5, 5, "a", "CALLED", ticket=1)),
        ("ParkPatient", "a", told(6, 6, "a", "PARKED", ticket=1)),
        ("CallNext", "", Attempt(7, 7.5, "QUEUE_EMPTY")),
        ("RescheduleAppointment", "b", replace(told(8, 2, "b", "BOOKED"), vacated=7)),
    ]
    for number, (method, appointment, attempt) in enumerate(steps):
        day = NEXT if method == "RescheduleAppointment" else DAY
        history.operations.append(Operation(number, f"k{number}", method, day, appointment, "", [attempt]))
        if attempt.outcome == "OK":
            memory = Memory(
                method, f"k{number}", attempt.appointment, day, attempt.number, "", attempt.revision, attempt.vacated
            )
            facts.memories.append(memory)
    facts.events = [
        Event(DAY, 2, "BOOKED", "a"),
        Event(DAY, 3, "BOOKED", "b"),
        Event(DAY, 4, "CHECKED_IN", "a", "WAITING", 1),
        Event(DAY, 5, "CALLED", "a", "CALLED", 1),
        Event(DAY, 6, "PARKED", "a", "PARKED", 1),
        Event(DAY, 7, "MOVED_OUT", "b"),
        Event(NEXT, 2, "MOVED_IN", "b"),
    ]
    facts.visits = {"a": Visit("a", "p", DAY, 1, "", "PARKED", 1), "b": Visit("b", "q", NEXT, 1, "", "BOOKED", 0)}
    facts.revisions = {DAY: 7, NEXT: 2}
    waiting, called = (("a", 1, "WAITING", 1),), (("a", 1, "CALLED", 0),)
    history.reads = [Read(9, DAY, 4.6, 4.7, 4, (waiting, 1))]
    changes: tuple[Change, ...] = ((4, "CHECKED_IN", "a", "WAITING", 1), (5, "CALLED", "a", "CALLED", 1))
    history.seen = [Seen(1, DAY, 2.6, 0, 3, (), ((), 2)), Seen(1, DAY, 5.6, 3, 5, changes, (called, 1))]
    history.drains = [(1, "closing, OK")]
    return history, facts


def rules(history: History, facts: Facts) -> set[str]:
    return {violation.rule for violation in Checker(history, facts).check()}


def test_a_right_history_is_right() -> None:
    assert Checker(*right()).check() == []


def _lost(history: History, facts: Facts) -> None:
    del facts.events[6], facts.memories[5], facts.revisions[NEXT]


def _forgotten(history: History, facts: Facts) -> None:
    del facts.memories[2]


def _twice(history: History, facts: Facts) -> None:
    facts.events.append(Event(NEXT, 3, "BOOKED", "b2"))
    facts.visits["b2"] = Visit("b2", "r", NEXT, 2, "", "BOOKED", 0)
    facts.revisions[NEXT] = 3


def _without_effect(history: History, facts: Facts) -> None:
    facts.memories.append(Memory("CheckIn", "k", "a", DAY, 1, "", 99, 0))


def _another_answer(history: History, facts: Facts) -> None:
    again = replace(history.operations[0].attempts[0], invoke=9, complete=9.5, replayed=True, number=2)
    history.operations[0].attempts.append(again)


def _acted_twice(history: History, facts: Facts) -> None:
    history.operations[0].attempts.append(replace(history.operations[0].attempts[0], invoke=9, complete=9.5))


def _refused_after(history: History, facts: Facts) -> None:
    history.operations[0].attempts.append(Attempt(9, 9.5, "DUPLICATE_BOOKING"))


def _refused_though_made(history: History, facts: Facts) -> None:
    history.operations[0].attempts = [Attempt(1, 1.5, "?UNAVAILABLE"), Attempt(9, 9.5, "DUPLICATE_BOOKING")]


def _unanswered(history: History, facts: Facts) -> None:
    history.operations[2].given_up = True


def _over(history: History, facts: Facts) -> None:
    facts.capacities["doctor"] = 1


def _slot_over(history: History, facts: Facts) -> None:
    for memory, who in zip(facts.memories[:2], "ab", strict=True):
        memory.slot = facts.visits[who].slot = "slot"


def _same_number(history: History, facts: Facts) -> None:
    facts.memories[1].number = 1


def _not_lowest(history: History, facts: Facts) -> None:
    facts.memories[0].number = facts.visits["a"].number = 2
    facts.memories[1].number = 1


def _one_patient(history: History, facts: Facts) -> None:
    facts.visits["b"].patient = "p"


def _ticket_gap(history: History, facts: Facts) -> None:
    for event in facts.events[2:5]:
        event.ticket = 2
    facts.visits["a"].ticket = 2


def _revision_gap(history: History, facts: Facts) -> None:
    facts.events[5].revision = facts.memories[5].vacated = 8


def _counter(history: History, facts: Facts) -> None:
    facts.revisions[DAY] = 8


def _step(history: History, facts: Facts) -> None:
    facts.events[3].kind = "MISSED"


def _out_of_turn(history: History, facts: Facts) -> None:
    # b checks in first, and a is called.
    facts.events[2:3] = [Event(DAY, 4, "CHECKED_IN", "b", "WAITING", 1), Event(DAY, 5, "CHECKED_IN", "a", "WAITING", 2)]
    facts.events[4].revision = 6


def _row(history: History, facts: Facts) -> None:
    facts.visits["a"].at = "WAITING"


def _backwards(history: History, facts: Facts) -> None:
    # b was answered before a asked, and yet comes after it.
    history.operations[0].attempts[0].invoke, history.operations[0].attempts[0].complete = 2.6, 2.7


def _stale(history: History, facts: Facts) -> None:
    history.reads[0] = replace(history.reads[0], invoke=5.6, complete=5.7)


def _future(history: History, facts: Facts) -> None:
    history.seen[1] = replace(history.seen[1], at=4.9)


def _read_wrong(history: History, facts: Facts) -> None:
    history.reads[0] = replace(history.reads[0], picture=((), 1))


def _seen_wrong(history: History, facts: Facts) -> None:
    history.seen[1] = replace(history.seen[1], picture=((), 1))


def _change_missed(history: History, facts: Facts) -> None:
    history.seen[1] = replace(history.seen[1], changes=history.seen[1].changes[1:])


def _update_missed(history: History, facts: Facts) -> None:
    history.seen[1] = replace(history.seen[1], previous=4, changes=history.seen[1].changes[1:])


def _began_anew(history: History, facts: Facts) -> None:
    history.seen[1] = replace(history.seen[1], previous=0, changes=())


def _change_wrong(history: History, facts: Facts) -> None:
    first, second = history.seen[1].changes
    history.seen[1] = replace(history.seen[1], changes=((*first[:4], 2), second))


def _late(history: History, facts: Facts) -> None:
    history.late.append((1, DAY, 5, 7, "3 s after the last change"))


def _not_full(history: History, facts: Facts) -> None:
    # Only one place of two was taken by then.
    history.operations[2].attempts[0] = Attempt(1.6, 1.7, "DAY_FULL")


def _slot_not_full(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome, history.operations[2].slot = "SLOT_FULL", "slot"


def _not_empty(history: History, facts: Facts) -> None:
    history.operations[6].attempts[0] = Attempt(4.6, 4.9, "QUEUE_EMPTY")


def _allowed(history: History, facts: Facts) -> None:
    history.operations[6] = Operation(6, "k6", "ReturnToLine", DAY, "a", "", [Attempt(7, 7.5, "INVALID_TRANSITION")])


def _strange(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome = "DATE_IN_PAST"


def _internal(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome = "!INTERNAL"


def _conflict(history: History, facts: Facts) -> None:
    history.operations[2].attempts.insert(0, Attempt(2.6, 2.9, "?CONFLICT"))


def _deadlock(history: History, facts: Facts) -> None:
    facts.deadlocks = 1


def _not_told(history: History, facts: Facts) -> None:
    history.drains.append((2, "update, UNAVAILABLE"))


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("acknowledged-lost", _lost), ("key-twice", _forgotten), ("key-twice", _twice),
        ("key-without-effect", _without_effect), ("answers-disagree", _another_answer),
        ("answers-disagree", _acted_twice), ("refused-though-made", _refused_after),
        ("refused-though-made", _refused_though_made), ("no-answer", _unanswered), ("over-capacity", _over),
        ("over-capacity", _slot_over), ("number-twice", _same_number), ("number-twice", _not_lowest),
        ("patient-twice", _one_patient), ("tickets", _ticket_gap), ("revisions", _revision_gap),
        ("revisions", _counter), ("transition", _step), ("transition", _out_of_turn), ("row-and-events", _row),
        ("real-time", _backwards), ("stale-read", _stale), ("real-time", _future), ("wrong-queue", _read_wrong),
        ("wrong-queue", _seen_wrong), ("watch-missed", _change_missed), ("watch-missed", _update_missed),
        ("watch-missed", _began_anew), ("watch-missed", _change_wrong), ("watch-late", _late),
        ("impossible-refusal", _not_full), ("impossible-refusal", _slot_not_full), ("impossible-refusal", _not_empty),
        ("impossible-refusal", _allowed), ("impossible-refusal", _strange), ("internal", _internal),
        ("conflict", _conflict), ("deadlock", _deadlock), ("drain", _not_told),
    ],
)  # fmt: skip
def test_a_wrong_history_is_noticed(rule: str, spoil: Callable[[History, Facts], None]) -> None:
    """Each rule catches the history that breaks it."""
    history, facts = right()
    spoil(history, facts)
    assert rule in rules(history, facts)
