"""The checker finds the error in one small wrong history per rule, and none in a correct history."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.history import mutants
from tests.history.check import (
    Act,
    Attempt,
    Change,
    Checker,
    Closing,
    Day,
    Edit,
    Event,
    Facts,
    Grant,
    History,
    Hold,
    Leave,
    Memory,
    Metered,
    Operation,
    Outcome,
    Probe,
    Read,
    Sealed,
    Seen,
    Stream,
    Violation,
    Visit,
)
from tests.history.shortest import reduced, shortest

DAY, NEXT = ("doctor", "2030-05-06"), ("doctor", "2030-05-07")
AWAY, LATER = ("away", "2030-05-07"), ("away", "2030-05-09")
BUSY, CALM = ("busy", "2030-05-06"), ("calm", "2030-05-06")


def told(start: float, revision: int, appointment: str, state: str, number: int = 1, ticket: int = 0) -> Attempt:
    """An answer that came 0.5 s after its request."""
    return Attempt(start, start + 0.5, "OK", False, revision, 0, appointment, number, state, ticket)


def right() -> tuple[History, Facts]:
    """Two places: a and b are booked, c is refused, a checks in, is called and parked, and b moves to the next day.

    One hold runs out before the bookings; b moves with another one.
    """
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
        Event(DAY, 5, "CALLED", "a", "CALLED", 1, calls=1),
        Event(DAY, 6, "PARKED", "a", "PARKED", 1, calls=1),
        Event(DAY, 7, "MOVED_OUT", "b"),
        Event(NEXT, 2, "MOVED_IN", "b"),
    ]
    for event, method in zip(
        facts.events, [*(one.method for one in facts.memories), "RescheduleAppointment"], strict=True
    ):
        event.method = method
    for event, time in zip(facts.events, (1.2, 2.2, 4.2, 5.2, 6.2, 8.2, 8.2), strict=True):
        event.time = time
    for event in facts.events[5:]:
        event.hold = "h"
    history.holds = ["g", "h"]
    facts.holds = {"g": Hold("g", DAY, "", "", 0.5, 0.9), "h": Hold("h", NEXT, "", "q", 7.5, 9)}
    facts.visits = {"a": Visit("a", "p", DAY, 1, "", "PARKED", 1), "b": Visit("b", "q", NEXT, 1, "", "BOOKED", 0)}
    for number, patient in enumerate("pqr"):
        history.operations[number].patient = patient
    history.operations[0].attempts[0].about = ("p", *DAY, "")
    history.operations[2].attempts[0].about = ("date", DAY[1], "doctor_id", DAY[0])
    facts.revisions = {DAY: 7, NEXT: 2}
    waiting, called = (("a", 1, "WAITING", 1),), (("a", 1, "CALLED", 0),)
    history.reads = [Read(9, DAY, 4.6, 4.7, 4, (waiting, 1))]
    changes: tuple[Change, ...] = ((4, "CHECKED_IN", "a", "WAITING", 1), (5, "CALLED", "a", "CALLED", 1))
    history.seen = [Seen(1, DAY, 2.6, 0, 3, (), ((), 2)), Seen(1, DAY, 5.6, 3, 5, changes, (called, 1), 3)]
    history.drains = [(1, "closing, OK")]
    _with_visitors(history, facts)
    _with_absences(history, facts)
    _with_access(history, facts)
    return history, facts


def _happened(facts: Facts, start: float, event: Event) -> None:
    event.time, event.transaction = start + 0.2, f"{start}"
    event.number = event.number or facts.visits[event.appointment].number
    facts.events.append(event)


def _made(
    history: History, facts: Facts, start: float, method: str, event: Event, *, vacated: int = 0, **asked: Any
) -> None:
    """A change by one operation, whose key is the time."""
    event.method, who = method, event.appointment
    _happened(facts, start, event)
    answer = told(start, event.revision, who, event.state or event.kind, event.number, event.ticket)
    answer.vacated = vacated
    known = "" if method in ("AddWalkIn", "BookAppointment") else who
    history.operations.append(Operation(0, f"v{start}", method, event.day, known, "", [answer], **asked))
    facts.memories.append(Memory(method, f"v{start}", who, event.day, event.number, "", event.revision, vacated))


def _with_visitors(history: History, facts: Facts) -> None:
    """Two more doctors with one place each. Two walk in, of whom n overrides the capacity and is called twice.

    That n is parked is undone, and m, who waits, is handed over to the other doctor.
    """
    facts.capacities |= {"busy": 1, "calm": 1}
    facts.visits["m"] = Visit("m", "s", CALM, 1, "", "WAITING", 1)
    facts.visits["n"] = Visit("n", "t", BUSY, 2, "", "CALLED", 2, "2", "PRIORITY", True)
    facts.revisions |= {BUSY: 11, CALM: 2}

    _happened(facts, 10, Event(BUSY, 2, "BOOKED", "m", method="AddWalkIn"))
    _made(history, facts, 10, "AddWalkIn", Event(BUSY, 3, "CHECKED_IN", "m", "WAITING", 1, check_in=10.2), patient="s")
    _happened(facts, 11, Event(BUSY, 4, "BOOKED", "n", method="AddWalkIn", over=True))
    line: dict[str, Any] = {"check_in": 11.2, "priority": "URGENT"}
    waiting = Event(BUSY, 5, "CHECKED_IN", "n", "WAITING", 2, **line)
    _made(history, facts, 11, "AddWalkIn", waiting, patient="t", override=True, priority="URGENT")
    _made(
        history, facts, 12, "CallNext", Event(BUSY, 6, "CALLED", "n", "CALLED", 2, **line, room="2", calls=1), room="2"
    )
    _made(history, facts, 13, "CallAgain", Event(BUSY, 7, "CALLED_AGAIN", "n", "CALLED", 2, **line, room="2", calls=2))
    _made(history, facts, 14, "ParkPatient", Event(BUSY, 8, "PARKED", "n", "PARKED", 2, **line, calls=2))
    _made(
        history,
        facts,
        15,
        "UndoTransition",
        Event(BUSY, 9, "UNDONE", "n", "CALLED", 2, **line, room="2", calls=2),
        etag="e",
    )
    _happened(
        facts, 16, Event(BUSY, 10, "TRANSFERRED_OUT", "m", "TRANSFERRED", 1, check_in=10.2, method="TransferPatient")
    )
    _made(
        history,
        facts,
        16,
        "TransferPatient",
        Event(CALM, 2, "TRANSFERRED_IN", "m", "WAITING", 1, check_in=10.2),
        vacated=10,
    )
    line["priority"] = "PRIORITY"
    set_priority = Event(BUSY, 11, "PRIORITY_SET", "n", "CALLED", 2, **line, room="2", calls=2)
    _made(history, facts, 17, "SetPriority", set_priority, priority="PRIORITY")


ACT = ("keys/admin", "RevokeApiKey", "api_key.revoked", "apiKeys/desk")


def _with_absences(history: History, facts: Facts) -> None:
    """A doctor is on leave from 13 to 15. Of three patients one is kept, one cancelled, one moved; one books after it.

    Another doctor's hours are set, and slots are generated for them.
    """
    facts.capacities["away"] = 3
    facts.revisions |= {AWAY: 8, LATER: 2}
    for who, day, number, at in (
        ("kept", AWAY, 1, "CANCELLED"), ("gone", AWAY, 2, "CANCELLED"), ("moved", LATER, 1, "BOOKED"),
        ("late", AWAY, 1, "BOOKED"),
    ):  # fmt: skip
        facts.visits[who] = Visit(who, f"patient of {who}", day, number, "", at, 0)
    _made(history, facts, 9, "BookAppointment", Event(AWAY, 2, "BOOKED", "kept"))
    _made(history, facts, 9.5, "BookAppointment", Event(AWAY, 3, "BOOKED", "gone"))
    _made(history, facts, 12.2, "BookAppointment", Event(AWAY, 4, "BOOKED", "moved", number=3))
    _happened(facts, 13.1, Event(AWAY, 5, "CANCELLED", "gone", method="CreateLeave"))
    _happened(facts, 13.1, Event(AWAY, 6, "MOVED_OUT", "moved", method="CreateLeave", number=3))
    _happened(facts, 13.1, Event(LATER, 2, "MOVED_IN", "moved", method="CreateLeave"))
    absent = Attempt(14, 14.5, "DOCTOR_ABSENT")
    history.operations.append(Operation(0, "absent", "BookAppointment", AWAY, "", "", [absent]))
    _made(history, facts, 15.2, "CancelAppointment", Event(AWAY, 7, "CANCELLED", "kept"))
    _made(history, facts, 16.2, "BookAppointment", Event(AWAY, 8, "BOOKED", "late"))
    facts.leaves = {"l": Leave("l", "away", (AWAY[1],), 100, 200, "CANCELLED", 13.4)}
    facts.outcomes = [
        Outcome("l", "kept", "KEPT"), Outcome("l", "gone", "CANCELLED"), Outcome("l", "moved", "MOVED", LATER),
    ]  # fmt: skip
    history.closings = [Closing("away", (AWAY[1],), asked=13, answered=13.6, opening=14.6, id="l", applied=True)]
    history.cancelled = {"l": 15}
    facts.schedules = [("hours", "2030-05-06", "2030-05-08"), ("hours", "2030-05-09", "9999-12-31")]
    facts.owners = {"nine": "hours", "ten": "hours"}
    facts.times = {"nine": (900, 1000), "ten": (1000, 1100)}
    facts.visits_due = [("hours", 900, 1000), ("hours", 1000, 1100)]
    history.edits = [
        Edit("hours", "SetWeeklySchedule", 1, 2), Edit("hours", "GenerateSlots", 3, 4, 2),
        Edit("hours", "GenerateSlots", 5, 6),
    ]  # fmt: skip


def _with_access(history: History, facts: Facts) -> None:
    """All operations are of one key, which is revoked at 20 and then tried; two programs probe, one asks too much."""
    desk = Grant("keys/desk", "staff", 20, 20.5)
    for operation in history.operations:
        operation.identity = desk.identity
        for one in operation.attempts:
            one.grant = desk
    for event in facts.events:
        event.actor = desk.identity
    late = Attempt(30, 30.5, "CREDENTIALS_INVALID", grant=desk)
    soon = Attempt(21, 21.5, "INVALID_TRANSITION", grant=desk)
    history.operations.append(Operation(8, "k8", "CheckIn", DAY, "a", attempts=[soon, late], identity="keys/desk"))
    person = Grant("users/p", "patient")
    early = Attempt(9, 9.5, "CREDENTIALS_EXPIRED", grant=person, expires=8)
    history.operations.append(Operation(9, "k9", "CheckIn", DAY, "b", attempts=[early], identity="users/p"))
    history.probes = [
        Probe(1, "GetAppointment", "b", "APPOINTMENT_NOT_FOUND", person, 40, 1, 1.5, "APPOINTMENT_NOT_FOUND")
    ]
    history.streams = [Stream(desk, 49)]
    history.acts, facts.acts[ACT] = [Act(*ACT, outcome="OK")], 1
    history.quota = 20
    history.metered = [Metered(61 + n, 61.5 + n, "OK" if n < 20 else "RATE_LIMITED") for n in range(25)]
    chain, facts.seals = bytes(32), (seals := [])
    for position, event in enumerate(sorted(facts.events, key=lambda one: (one.day, one.revision)), 1):
        digest = hashlib.sha256(bytes([position])).digest()
        chain = hashlib.sha256(chain + digest).digest()
        seals.append(Sealed(position, str(position), chain, digest, event.day, event.revision))


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
    # b was answered before a asked, but comes after it.
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
    # Only one of two places was taken by then.
    history.operations[2].attempts[0] = Attempt(1.6, 1.7, "DAY_FULL")


def _slot_not_full(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome, history.operations[2].slot = "SLOT_FULL", "slot"


def _not_empty(history: History, facts: Facts) -> None:
    history.operations[6].attempts[0] = Attempt(4.6, 4.9, "QUEUE_EMPTY")


def _allowed(history: History, facts: Facts) -> None:
    history.operations[6] = Operation(6, "k6", "ReturnToLine", DAY, "a", "", [Attempt(7, 7.5, "INVALID_TRANSITION")])


def _not_there(history: History, facts: Facts) -> None:
    # c's patient has no visit.
    history.operations[2].attempts[0].outcome = "DUPLICATE_BOOKING"


def _not_at_that_time(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome, history.operations[2].slot = "PATIENT_OVERLAP", "slot"
    history.operations[2].patient = "q"


def _before_it_was_asked(history: History, facts: Facts) -> None:
    # The check-in was never acknowledged, but it cannot be seen before it was requested.
    history.operations[3].attempts[0] = Attempt(6.5, 6.9, "?CANCELLED")


def _two_places(history: History, facts: Facts) -> None:
    facts.slots["other"] = 1
    facts.times |= {"slot": (0, 30), "other": (29, 60)}
    facts.memories[0].slot = facts.visits["a"].slot = "slot"
    facts.memories[5].slot = facts.visits["b"].slot = "other"
    facts.visits["b"].patient = "p"


def _of_another(history: History, facts: Facts) -> None:
    history.operations[0].attempts[0].about = ("q", *DAY, "")


def _of_another_day(history: History, facts: Facts) -> None:
    history.operations[0].attempts[0].about = ("p", *NEXT, "")


def _anothers_refusal(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].about = ("date", NEXT[1], "doctor_id", NEXT[0])


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


def _late_answer(history: History, facts: Facts) -> None:
    # The key was revoked 9.5 s before.
    _operation(history, "k8").attempts[1].outcome = "INVALID_TRANSITION"


def _expired_answer(history: History, facts: Facts) -> None:
    _operation(history, "k9").attempts[0].outcome = "INVALID_TRANSITION"


def _good_key_refused(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome = "CREDENTIALS_INVALID"


def _good_token_refused(history: History, facts: Facts) -> None:
    _operation(history, "k9").attempts[0].expires = 40


def _expired_token_invalid(history: History, facts: Facts) -> None:
    _operation(history, "k9").attempts[0].outcome = "CREDENTIALS_INVALID"


def _good_role_refused(history: History, facts: Facts) -> None:
    history.operations[2].attempts[0].outcome = "ROLE_REQUIRED"


def _stream_went_on(history: History, facts: Facts) -> None:
    history.streams[0].last = 55


def _shown(history: History, facts: Facts) -> None:
    history.probes[0].outcome = "OK"


def _told_that_it_exists(history: History, facts: Facts) -> None:
    history.probes[0].outcome = "ROLE_REQUIRED"


def _leaked(history: History, facts: Facts) -> None:
    history.probes[0].expected, history.probes[0].outcome = "OK", "LEAK"


def _too_many(history: History, facts: Facts) -> None:
    history.metered[22].outcome = "OK"


def _too_few(history: History, facts: Facts) -> None:
    history.metered[:2] = []


def _logged_as_another(history: History, facts: Facts) -> None:
    facts.events[0].actor = "keys/another"


def _logged_as_another_method(history: History, facts: Facts) -> None:
    # The day that a move leaves is named by no answer, only by its row.
    facts.events[5].method = "CancelAppointment"


def _act_not_logged(history: History, facts: Facts) -> None:
    facts.acts.clear()


def _act_of_nobody(history: History, facts: Facts) -> None:
    facts.acts["keys/admin", "RevokeApiKey", "api_key.revoked", "apiKeys/another"] = 1


def _seals(facts: Facts) -> list[Sealed]:
    assert isinstance(facts.seals, list)
    return facts.seals


def _seal_left_out(history: History, facts: Facts) -> None:
    _seals(facts)[3].position += 1


def _row_deleted(history: History, facts: Facts) -> None:
    _seals(facts)[3].digest = None


def _row_changed(history: History, facts: Facts) -> None:
    _seals(facts)[3].digest = bytes(32)


def _sealed_in_another_order(history: History, facts: Facts) -> None:
    seals = _seals(facts)
    seals[3].revision, seals[4].revision = seals[4].revision, seals[3].revision


def _not_sealed(history: History, facts: Facts) -> None:
    facts.unsealed = 1


def _hold_lost(history: History, facts: Facts) -> None:
    history.holds.append("i")


def _hold_used_twice(history: History, facts: Facts) -> None:
    facts.events[0].hold = "h"


def _hold_used_late(history: History, facts: Facts) -> None:
    facts.holds["h"].expire = 8.2


def _released_hold_used(history: History, facts: Facts) -> None:
    facts.holds["h"].released = 8


def _hold_of_another_day(history: History, facts: Facts) -> None:
    facts.holds["h"].day = DAY


def _hold_of_another_patient(history: History, facts: Facts) -> None:
    facts.holds["h"].patient = "p"


def _booked_beside_a_hold(history: History, facts: Facts) -> None:
    facts.holds["g"].expire = 2.5


def _held_beside_bookings(history: History, facts: Facts) -> None:
    facts.holds["i"] = Hold("i", DAY, "", "", 3, 4)


def _slot_held_twice(history: History, facts: Facts) -> None:
    facts.holds |= {name: Hold(name, NEXT, "slot", "", 3, 4) for name in "ij"}


def _used_by_nobody(history: History, facts: Facts) -> None:
    about = ("hold_id", "g", "state", "USED")
    history.operations[2].attempts = [Attempt(3, 3.5, "HOLD_EXPIRED", about=about, grant=Grant("keys/desk", "service"))]


def _event(facts: Facts, day: Day, revision: int) -> Event:
    return next(event for event in facts.events if (event.day, event.revision) == (day, revision))


def _operation(history: History, key: str) -> Operation:
    return next(operation for operation in history.operations if operation.key == key)


def _check_in_later(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 3).transaction = "another"


def _no_check_in(history: History, facts: Facts) -> None:
    facts.events.remove(_event(facts, BUSY, 5))


def _half_a_walk_in(history: History, facts: Facts) -> None:
    history.reads.append(Read(9, BUSY, 10.1, 10.6, 2, ((), 1)))


def _gone_nowhere(history: History, facts: Facts) -> None:
    facts.events.remove(_event(facts, CALM, 2))


def _come_from_nowhere(history: History, facts: Facts) -> None:
    facts.events.remove(_event(facts, BUSY, 10))


def _moved_in_two(history: History, facts: Facts) -> None:
    facts.events[5].transaction = "another"


def _without_reason(history: History, facts: Facts) -> None:
    _operation(history, "v11").override = False


def _by_a_doctor(history: History, facts: Facts) -> None:
    _operation(history, "v11").attempts[0].grant = Grant("users/d", "doctor")


def _needless(history: History, facts: Facts) -> None:
    facts.capacities["busy"] = 2


def _not_recorded(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 4).over = False


def _recorded_for_nothing(history: History, facts: Facts) -> None:
    facts.visits["a"].over = True


def _priority_ignored(history: History, facts: Facts) -> None:
    for event in facts.events:
        if event.appointment == "m" and event.state:
            event.priority = "URGENT"


def _one_call_too_many(history: History, facts: Facts) -> None:
    facts.max_calls = 1


def _room_forgotten(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 9).room = ""


def _check_in_forgotten(history: History, facts: Facts) -> None:
    _event(facts, CALM, 2).check_in = 16.2


def _undone_late(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 8).time = 4


def _undone_something_else(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 8).kind = "CALLED_AGAIN"


def _undone_twice(history: History, facts: Facts) -> None:
    _operation(history, "v13").etag = "e"


def _ticket_drawn_again(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 5).ticket = 1


def _ticket_left_out(history: History, facts: Facts) -> None:
    _event(facts, CALM, 2).ticket = 2


def _called_elsewhere(history: History, facts: Facts) -> None:
    facts.events.append(Event(CALM, 3, "CALLED", "m", "CALLED", 1, check_in=10.2, calls=1, time=18.2))
    facts.memories.append(Memory("CallNext", "v18", "m", CALM, 1, "", 3, 0))
    history.operations.append(Operation(0, "v18", "CallNext", CALM, "m", "", [told(18, 3, "m", "CALLED", 1, 1)]))
    facts.visits["m"].patient = "t"


def _another_room(history: History, facts: Facts) -> None:
    _operation(history, "v12").room = "1"


def _another_priority(history: History, facts: Facts) -> None:
    _operation(history, "v17").priority = "NORMAL"


def _booked_on_leave(history: History, facts: Facts) -> None:
    history.closings[0].opening, history.cancelled["l"] = 30, 31


def _moved_on_leave(history: History, facts: Facts) -> None:
    history.closings.append(Closing("away", (LATER[1],), asked=1, answered=2, id="m"))
    facts.leaves["m"] = Leave("m", "away", (LATER[1],), 300, 400, "APPLIED")


def _held_on_leave(history: History, facts: Facts) -> None:
    facts.holds["i"] = Hold("i", AWAY, "", "", 14, 14.1)
    history.hold_times["i"] = (13.9, 14.2)


def _booked_at_closed_hours(history: History, facts: Facts) -> None:
    history.closings.append(Closing("away", (), 950, 960, asked=1, answered=2, of_leave=False))
    _event(facts, AWAY, 8).slot, facts.memories = "nine", [one for one in facts.memories if one.key != "v16.2"]


def _absent_without_leave(history: History, facts: Facts) -> None:
    history.closings.clear()


def _settled_twice(history: History, facts: Facts) -> None:
    facts.outcomes.append(Outcome("l", "kept", "KEPT"))


def _settled_without_outcome(history: History, facts: Facts) -> None:
    del facts.outcomes[1]


def _moved_elsewhere(history: History, facts: Facts) -> None:
    facts.outcomes[2].day = NEXT


def _settled_while_here(history: History, facts: Facts) -> None:
    _event(facts, BUSY, 8).method = "CreateLeave"


def _settled_after_its_end(history: History, facts: Facts) -> None:
    history.cancelled["l"] = 13.2


def _leave_lost(history: History, facts: Facts) -> None:
    facts.leaves.clear()


def _leave_goes_on(history: History, facts: Facts) -> None:
    facts.leaves["l"].state = "APPLIED"


def _leave_twice(history: History, facts: Facts) -> None:
    facts.leaves |= {name: Leave(name, "away", (), 300, 400, "APPLIED") for name in "mn"}


def _leave_within_a_leave(history: History, facts: Facts) -> None:
    facts.leaves["m"] = Leave("m", "away", (), 150, 250, "CANCELLED")
    history.closings.append(Closing("away", (), 150, 250, asked=14, answered=14.2, opening=16, id="m"))


def _slipped_past(history: History, facts: Facts) -> None:
    del facts.outcomes[0]


def _schedules_overlap(history: History, facts: Facts) -> None:
    facts.schedules[0] = ("hours", "2030-05-06", "2030-05-09")


def _slots_overlap(history: History, facts: Facts) -> None:
    facts.times["ten"] = (999, 1100)


def _not_generated(history: History, facts: Facts) -> None:
    facts.visits_due.append(("hours", 1100, 1200))


def _generated_again(history: History, facts: Facts) -> None:
    history.edits[2].created = 1


def _broken(history: History, facts: Facts) -> None:
    history.broken.append("CreateLeave")


def _refused(method: str, outcome: str, start: float, who: str = "n", **asked: Any) -> Callable[[History, Facts], None]:
    def spoil(history: History, facts: Facts) -> None:
        desk = Grant("keys/desk", "staff")
        one = Attempt(start, start + 0.2, outcome, grant=desk)
        history.operations.append(Operation(1, "refused", method, BUSY, who, "", [one], identity="keys/desk", **asked))

    return spoil


WRONG: list[tuple[str, Callable[[History, Facts], None]]] = [
    ("acknowledged-lost", _lost), ("key-twice", _forgotten), ("key-twice", _twice),
    ("key-without-effect", _without_effect), ("answers-disagree", _another_answer),
    ("answers-disagree", _acted_twice), ("refused-though-made", _refused_after),
    ("refused-though-made", _refused_though_made), ("no-answer", _unanswered), ("over-capacity", _over),
    ("over-capacity", _slot_over), ("number-twice", _same_number), ("number-twice", _not_lowest),
    ("patient-twice", _one_patient), ("tickets", _ticket_gap), ("revisions", _revision_gap), ("revisions", _counter),
    ("transition", _step), ("transition", _out_of_turn), ("row-and-events", _row), ("real-time", _backwards),
    ("stale-read", _stale), ("real-time", _future), ("wrong-queue", _read_wrong), ("wrong-queue", _seen_wrong),
    ("watch-missed", _change_missed), ("watch-missed", _update_missed), ("watch-missed", _began_anew),
    ("watch-missed", _change_wrong), ("watch-late", _late), ("impossible-refusal", _not_full),
    ("impossible-refusal", _slot_not_full), ("impossible-refusal", _not_empty), ("impossible-refusal", _allowed),
    ("impossible-refusal", _strange), ("impossible-refusal", _not_there), ("impossible-refusal", _not_at_that_time),
    ("real-time", _before_it_was_asked), ("patient-twice", _two_places), ("wrong-answer", _of_another),
    ("wrong-answer", _of_another_day), ("wrong-answer", _anothers_refusal), ("internal", _internal),
    ("conflict", _conflict), ("deadlock", _deadlock), ("drain", _not_told), ("access-late", _late_answer),
    ("access-late", _expired_answer), ("access-refused", _good_key_refused), ("access-refused", _good_token_refused),
    ("access-refused", _expired_token_invalid), ("access-refused", _good_role_refused), ("not-his", _shown),
    ("not-his", _told_that_it_exists), ("not-his", _leaked), ("quota-exceeded", _too_many), ("quota-unused", _too_few),
    ("wrong-actor", _logged_as_another), ("wrong-actor", _logged_as_another_method),
    ("act-not-logged", _act_not_logged), ("act-logged-twice", _act_of_nobody), ("seal-gap", _seal_left_out),
    ("seal-gap", _row_deleted), ("chain-broken", _row_changed), ("seal-order", _sealed_in_another_order),
    ("not-sealed", _not_sealed), ("stream-late", _stream_went_on), ("hold-lost", _hold_lost),
    ("hold-used-twice", _hold_used_twice), ("hold-used-late", _hold_used_late), ("hold-used-late", _released_hold_used),
    ("hold-misused", _hold_of_another_day), ("hold-misused", _hold_of_another_patient),
    ("held-over-capacity", _booked_beside_a_hold), ("held-over-capacity", _held_beside_bookings),
    ("held-over-capacity", _slot_held_twice), ("impossible-refusal", _used_by_nobody),
    ("walk-in-split", _check_in_later), ("walk-in-split", _no_check_in), ("walk-in-split", _half_a_walk_in),
    ("move-split", _gone_nowhere), ("move-split", _come_from_nowhere), ("move-split", _moved_in_two),
    ("override", _without_reason), ("override", _by_a_doctor), ("override", _needless),
    ("over-capacity", _not_recorded), ("row-and-events", _recorded_for_nothing), ("transition", _priority_ignored),
    ("call-limit", _one_call_too_many), ("entry", _room_forgotten), ("entry", _check_in_forgotten),
    ("undo", _undone_late), ("undo", _undone_something_else), ("undo", _undone_twice),
    ("tickets", _ticket_drawn_again), ("tickets", _ticket_left_out), ("called-elsewhere", _called_elsewhere),
    ("wrong-answer", _another_room), ("wrong-answer", _another_priority),
    ("under-leave", _booked_on_leave), ("under-leave", _moved_on_leave), ("under-leave", _held_on_leave),
    ("under-leave", _booked_at_closed_hours), ("impossible-refusal", _absent_without_leave),
    ("outcome-twice", _settled_twice), ("outcome-and-events", _settled_without_outcome),
    ("outcome-and-events", _moved_elsewhere), ("transition", _settled_while_here),
    ("after-cancel", _settled_after_its_end), ("leave-lost", _leave_lost), ("leave-lost", _leave_goes_on),
    ("leave-overlap", _leave_twice), ("leave-overlap", _leave_within_a_leave), ("slipped-past-leave", _slipped_past),
    ("schedule-overlap", _schedules_overlap), ("slot-twice", _slots_overlap), ("not-generated", _not_generated),
    ("generated-again", _generated_again), ("internal", _broken),
    ("impossible-refusal", _refused("UndoTransition", "NOTHING_TO_UNDO", 14.6)),
    ("impossible-refusal", _refused("CallAgain", "CALL_LIMIT_REACHED", 12.6)),
    ("impossible-refusal", _refused("AddWalkIn", "DAY_FULL", 12.6, "", override=True)),
    ("impossible-refusal", _refused("TransferPatient", "INVALID_FIELD", 16.6, "m")),
    ("impossible-refusal", _refused("SetPriority", "INVALID_TRANSITION", 12.6)),
]  # fmt: skip
"""The rule, and the change that breaks it."""


@pytest.mark.parametrize(("rule", "spoil"), WRONG)
def test_a_wrong_history_is_noticed(rule: str, spoil: Callable[[History, Facts], None]) -> None:
    """Each rule catches the history that breaks it."""
    history, facts = right()
    spoil(history, facts)
    assert rule in rules(history, facts)


class Story:
    """A correct day of any length with another doctor, in which errors can hide."""

    def __init__(self, places: int) -> None:
        self.history, self.facts = History(), Facts(capacities={"long": places})
        self.revision, self.ticket = 1, 0
        self.free = list(range(1, places + 1))

    def _step(self, method: str, kind: str, who: str, at: str, state: str = "") -> None:
        self.revision += 1
        day, visit = ("long", DAY[1]), self.facts.visits[who]
        visit.at = at
        self.facts.events.append(
            Event(day, self.revision, kind, who, state, visit.ticket if state else 0, method=method)
        )
        key = f"s{self.revision}"
        self.facts.memories.append(Memory(method, key, who, day, visit.number, "", self.revision, 0))
        self.facts.revisions[day] = self.revision
        answer = told(self.revision, self.revision, who, at, visit.number, visit.ticket)
        self.history.operations.append(Operation(self.revision % 7, key, method, day, who, "", [answer]))

    def book(self, who: str) -> None:
        number = min(self.free)
        self.free.remove(number)
        self.facts.visits[who] = Visit(who, f"patient of {who}", ("long", DAY[1]), number, "", "BOOKED", 0)
        self._step("BookAppointment", "BOOKED", who, "BOOKED")
        self.history.operations[-1].appointment = ""

    def cancel(self, who: str) -> None:
        self.free.append(self.facts.visits[who].number)
        self._step("CancelAppointment", "CANCELLED", who, "CANCELLED")

    def check_in(self, who: str) -> None:
        self.ticket += 1
        self.facts.visits[who].ticket = self.ticket
        self._step("CheckIn", "CHECKED_IN", who, "WAITING", "WAITING")


def long_story() -> Story:
    """Three places; a hundred patients book and cancel, and in the end x and y hold a place."""
    story = Story(3)
    for number in range(100):
        story.book(f"v{number}")
        if number:
            story.cancel(f"v{number - 1}")
    story.cancel("v99")
    story.book("x")
    story.book("y")
    story.check_in("x")
    return story


def found(history: History, facts: Facts, rule: str) -> Violation:
    return next(one for one in Checker(history, facts).check() if one.rule == rule)


def test_a_long_story_is_right() -> None:
    """The long story has no errors, so the tests below find only their own."""
    story = long_story()
    assert Checker(story.history, story.facts).check() == []


def test_the_shortest_history_of_a_place_sold_twice() -> None:
    """Of two hundred events, the three that held the places remain, with the one that should have been refused."""
    story = long_story()
    story.book("z")
    story.free.append(4)
    story.book("w")
    violation = found(story.history, story.facts, "over-capacity")
    assert violation.text.startswith("number 4, place 4 of 3 at r206")
    lines = shortest(story.history, story.facts, violation)
    assert [line.split(",")[0] for line in lines] == [
        "database r203 BOOKED y -", "database r204 CHECKED_IN x WAITING t1", "database r205 BOOKED z -",
        "database r206 BOOKED w -",
    ]  # fmt: skip


def test_the_shortest_history_of_a_stale_read() -> None:
    """Only the acknowledged write and the read that misses it remain."""
    story = long_story()
    story.history.reads.append(Read(3, ("long", DAY[1]), 150.6, 150.7, 100, ((), 1)))
    violation = found(story.history, story.facts, "stale-read")
    assert shortest(story.history, story.facts, violation) == [
        "client 3 BookAppointment key s101: [101.000–101.500] OK r101 #1 BOOKED t0 v50",
        "client 3 GetQueue [150.600–150.700] r100 ((), 1)",
    ]


def test_the_shortest_history_of_a_wrong_refusal() -> None:
    """The bookings that held places remain, with the acknowledgement that bounds their time."""
    story = long_story()
    wish = Operation(1, "wish", "BookAppointment", ("long", DAY[1]), attempts=[Attempt(204.6, 204.9, "DAY_FULL")])
    story.history.operations.append(wish)
    violation = found(story.history, story.facts, "impossible-refusal")
    assert violation.text.endswith("at most 2 of 3 places were taken from r204 to r204 of doctor-day long 2030-05-06")
    assert shortest(story.history, story.facts, violation) == [
        "database r203 BOOKED y -, patient t of y, by key s203 #2",
        "database r204 CHECKED_IN x WAITING t1, patient t of x, by key s204 #1",
        "client 1 CheckIn x key s204: [204.000–204.500] OK r204 #1 WAITING t1 x",
        "client 1 BookAppointment key wish: [204.600–204.900] DAY_FULL",
    ]


@pytest.mark.parametrize(("rule", "spoil"), WRONG)
def test_nothing_can_be_left_out_of_the_shortest(rule: str, spoil: Callable[[History, Facts], None]) -> None:
    """Beside another doctor's long day, a few steps show each error, and none of them can be left out."""
    history, facts = right()
    spoil(history, facts)
    story = long_story()
    for mine, theirs in ((history.operations, story.history.operations), (facts.events, story.facts.events)):
        mine += theirs  # type: ignore[operator]
    facts.memories += story.facts.memories
    facts.visits |= story.facts.visits
    facts.capacities |= story.facts.capacities
    facts.revisions |= story.facts.revisions
    violation = found(history, facts, rule)
    if not violation.days:
        assert shortest(history, facts, violation) == []
        return
    part = reduced(history, facts, violation)

    def shown(left: object) -> bool:
        said = left.checked(history, facts).check([violation.by])  # type: ignore[attr-defined]
        return any((one.rule, one.text) == (violation.rule, violation.text) for one in said)

    assert shown(part)
    assert len(part.observed) + len(part.events) <= 8
    for one in part.observed:
        assert not shown(replace(part, observed=tuple(other for other in part.observed if other is not one)))
    for who in {(event.day, event.appointment) for event in part.events}:
        less = tuple(event for event in part.events if (event.day, event.appointment) != who)
        assert not shown(replace(part, events=less))


def test_every_mutant_fits_the_code() -> None:
    """Each mutant edits a text that the functions still have: making the list of mutants checks that."""
    assert len({mutant.name for mutant in mutants.MUTANTS}) == len(mutants.MUTANTS) >= 80
