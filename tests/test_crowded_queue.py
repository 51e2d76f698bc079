"""Everything that moves a queue, by many callers at once: tickets without gaps, and the order as the rule says."""

import asyncio
import random
from collections import Counter
from typing import Any

import grpc

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import queue_pb2
from tests.clinic import Front, outcome, reason_of

Entry = queue_pb2.QueueEntry
PEOPLE = 60
CHANGES = 200
PRIORITIES: list[Any] = [1, 2, 3]


async def change(front: Front, doctors: list[str], visits: list[str], people: list[str], dice: random.Random) -> str:
    """One of the verbs, on a visit that is known."""
    kind = dice.choice(["walk in", "transfer", "priority", "undo", "call", "return", "miss", "park", "leave"])
    if kind == "walk in" and people:
        request = queue_pb2.AddWalkInRequest(
            doctor_id=dice.choice(doctors), patient_id=people.pop(), priority=dice.choice([0, *PRIORITIES]),
            override_reason=dice.choice(["", "fainted"]),
        )  # fmt: skip
        try:
            visits.append((await front.queues.AddWalkIn(request)).appointment.id)
        except grpc.RpcError as error:
            return reason_of(error)
        return "OK"
    visit = dice.choice(visits)
    queues, by_id = front.queues, {"appointment_id": visit}
    match kind:
        case "transfer":
            to = dice.choice(doctors)
            made: Any = queues.TransferPatient(queue_pb2.TransferPatientRequest(**by_id, to_doctor_id=to))
        case "priority":
            made = queues.SetPriority(queue_pb2.SetPriorityRequest(**by_id, priority=dice.choice(PRIORITIES)))
        case "undo":
            etag = (await front.appointment(visit)).etag
            made = front.appointments.UndoTransition(pb.UndoTransitionRequest(**by_id, etag=etag))
        case "return":
            made = queues.ReturnToLine(queue_pb2.ReturnToLineRequest(**by_id))
        case "miss":
            made = queues.MarkMissed(queue_pb2.MarkMissedRequest(**by_id))
        case "park":
            made = queues.ParkPatient(queue_pb2.ParkPatientRequest(**by_id))
        case "leave":
            made = queues.LeaveQueue(queue_pb2.LeaveQueueRequest(**by_id))
        case _:
            made = front.call_next(dice.choice(doctors))
    return await outcome(made)


async def test_two_hundred_changes_at_once(front: Front) -> None:
    """After 200 mixed changes at once, all is as one after another would have left it."""
    dice = random.Random(11)
    one = await front.doctor(max_patients_per_day=20)
    doctors = [one.id, *[(await front.doctor(clinic_id=one.clinic_id, max_patients_per_day=20)).id for _ in range(2)]]
    people = [person.id for person in await front.people(PEOPLE)]
    visits = [(await front.arrive(doctor)).appointment.id for doctor in doctors for _ in range(6)]
    outcomes = Counter(await asyncio.gather(*(change(front, doctors, visits, people, dice) for _ in range(CHANGES))))
    refused = {
        "INVALID_TRANSITION", "INVALID_FIELD", "NOTHING_TO_UNDO", "ETAG_MISMATCH", "QUEUE_EMPTY", "DAY_FULL",
    }  # fmt: skip
    assert outcomes.keys() <= {"OK", *refused}
    assert outcomes["OK"] > CHANGES / 3
    for doctor in doctors:
        await the_day_is_right(front, doctor)
    assert front.sql("select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]


async def the_day_is_right(front: Front, doctor: str) -> None:
    """The log of a doctor-day has no gaps and leads to its queue, which has the order of the rule."""
    log = front.sql(
        "select revision, type, appointment_id::text, queue_state, ticket, priority, check_in_time from log"
        " where doctor_id = %s and revision > 0 order by revision",
        doctor,
    )
    assert [revision for revision, *_ in log] == list(range(2, len(log) + 2))
    drawn = [row[4] for row in log if row[1] in ("queue.checked_in", "queue.transferred_in")]
    assert drawn == list(range(1, len(drawn) + 1))
    states: dict[str, str] = {}
    places: dict[str, tuple[Any, ...]] = {}
    returned: dict[str, int] = {}
    for revision, kind, visit, state, ticket, priority, check_in in log:
        if kind == "queue.called":
            waiting = [one for one, now in states.items() if now == "WAITING"]
            assert visit == min(waiting, key=places.__getitem__), "called out of turn"
        if kind == "queue.transferred_in":
            returned.pop(visit, None)
        elif state == "WAITING" and states.get(visit) == "MISSED":
            returned[visit] = revision
        if state is not None:
            states[visit] = state
            classes = ["URGENT", "PRIORITY", "NORMAL"]
            places[visit] = (classes.index(priority), returned.get(visit, 0), check_in, ticket)
    queue = await front.queue(doctor)
    waiting = [entry.appointment_id for entry in queue.entries if entry.state == Entry.STATE_WAITING]
    assert waiting == sorted((one for one, now in states.items() if now == "WAITING"), key=places.__getitem__)
    shown = {entry.appointment_id: Entry.State.Name(entry.state).removeprefix("STATE_") for entry in queue.entries}
    gone = {"DONE", "LEFT", "TRANSFERRED"}
    assert shown == {visit: state for visit, state in states.items() if state not in gone}
    numbers = front.sql(
        "select number, override_reason from appointment where doctor_id = %s and holds_place(state)", doctor
    )
    assert len({number for number, _ in numbers}) == len(numbers)
    # Above the capacity by recorded overrides alone.
    assert len(numbers) <= 20 + sum(reason != "" for _, reason in numbers)
