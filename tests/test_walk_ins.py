"""Walk-ins: booked and checked in at once, and above the capacity only by an override that is on record."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import doctor_pb2, queue_pb2
from tests.clinic import CAUSES, Front, day, details, outcome, reason_of, refusal, today
from tests.identities import bearing, create_key, user

UNKNOWN = "01900000-0000-7000-8000-00000000ffff"
Kind = queue_pb2.QueueChange


def walk_in(front: Front, doctor_id: str, patient_id: str, *, metadata: Any = (), **fields: Any) -> Any:
    """A call of AddWalkIn."""
    request = queue_pb2.AddWalkInRequest(doctor_id=doctor_id, patient_id=patient_id, **fields)
    return front.queues.AddWalkIn(request, metadata=metadata)


async def set_day(front: Front, doctor_id: str, **fields: Any) -> None:
    """Set the availability of the doctor's today."""
    request = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor_id, date=day(today()), **fields)
    await front.doctors.SetDoctorAvailability(request)


async def test_a_walk_in(front: Front) -> None:
    """A walk-in is booked and checked in by one call: two revisions, of which the answer has the second."""
    doctor, person = await front.doctor(), await front.patient(given_name="Ana", family_name="Lima")
    await front.arrive(doctor.id)
    before = (await front.standing(doctor.id)).revision
    answer = await walk_in(front, doctor.id, person.id, priority=queue_pb2.PRIORITY_URGENT, reason="cough")
    assert answer.revision == before + 2
    entry = answer.entry
    assert (entry.ticket, entry.position, entry.priority, entry.patient_name) == (2, 1, 1, "Ana Lima")
    visit = answer.appointment
    assert (visit.state, visit.number, visit.reason, visit.override_reason) == (
        pb.Appointment.STATE_CHECKED_IN, 2, "cough", "",
    )  # fmt: skip
    assert visit == await front.appointment(visit.id)
    events = front.sql("select revision, type from log where appointment_id = %s order by revision", visit.id)
    assert events == [(before + 1, "appointment.booked"), (before + 2, "queue.checked_in")]


async def test_watchers_see_both_changes_together(front: Front) -> None:
    """No update ends between a walk-in's booking and its check-in, however many there are."""
    doctor = await front.doctor(max_patients_per_day=100)
    people = await front.people(30)
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    assert (await stream.read()).revision == 1

    async def seen() -> list[queue_pb2.QueueChange]:
        changes: list[queue_pb2.QueueChange] = []
        while not changes or changes[-1].revision < 61:
            message = await stream.read()
            assert message.revision % 2 == 1
            queue = message.update.queue
            assert (queue.waiting_count, queue.expected_count) == ((message.revision - 1) // 2, 0)
            changes += message.update.changes
        return changes

    watched = asyncio.create_task(seen())
    await asyncio.gather(*(walk_in(front, doctor.id, person.id) for person in people))
    changes = await watched
    stream.cancel()
    assert [change.kind for change in changes] == [Kind.KIND_BOOKED, Kind.KIND_CHECKED_IN] * 30
    assert [change.entry.ticket for change in changes[1::2]] == list(range(1, 31))
    assert not any(change.HasField("entry") for change in changes[::2])


async def test_a_full_day(front: Front) -> None:
    """On a full day a walk-in is refused, and with a reason gets the lowest free number above the capacity."""
    doctor = await front.doctor(max_patients_per_day=2)
    people = await front.people(6)
    assert (
        await walk_in(front, doctor.id, people[0].id, override_reason="not needed")
    ).appointment.override_reason == ""
    await walk_in(front, doctor.id, people[1].id)
    before = await front.standing(doctor.id)
    error = await refusal(walk_in(front, doctor.id, people[2].id))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "DAY_FULL")
    assert await front.standing(doctor.id) == before
    over = [await walk_in(front, doctor.id, person.id, override_reason="collapsed outside") for person in people[2:5]]
    assert [answer.appointment.number for answer in over] == [3, 4, 5]
    assert {answer.appointment.override_reason for answer in over} == {"collapsed outside"}
    # A number above the capacity that is free again is given again; a place below it is one for everybody.
    await front.cancel(over[0].appointment.id)
    again = await walk_in(front, doctor.id, people[2].id, override_reason="fainted")
    assert again.appointment.number == 3
    assert await outcome(walk_in(front, doctor.id, people[5].id)) == "DAY_FULL"
    recorded = front.sql("select data ->> 'over_capacity' from log where type = 'appointment.booked' order by revision")
    assert [row for (row,) in recorded] == [None, None, *["true"] * 4]
    assert not front.sql("select from log where to_jsonb(log)::text like '%%fainted%%'")


async def test_more_than_a_thousand(front: Front) -> None:
    """The largest capacity can be overridden too."""
    doctor = await front.doctor(max_patients_per_day=1000)
    person = await front.patient()
    front.sql(
        "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state)"
        " select new_id(), %s, %s, %s, n, 'BOOKED' from generate_series(1, 1000) n",
        doctor.id, doctor.clinic_id, today(),
    )  # fmt: skip
    assert await outcome(walk_in(front, doctor.id, person.id)) == "DAY_FULL"
    assert (await walk_in(front, doctor.id, person.id, override_reason="fainted")).appointment.number == 1001


async def test_a_day_without_places(front: Front) -> None:
    """Also a day whose capacity was set to 0, or below what is booked, takes walk-ins with a reason."""
    doctor = await front.doctor()
    people = await front.people(4)
    await set_day(front, doctor.id, is_present=True, max_patients=0)
    assert await outcome(walk_in(front, doctor.id, people[0].id)) == "DAY_FULL"
    assert (await walk_in(front, doctor.id, people[0].id, override_reason="x")).appointment.number == 1
    await set_day(front, doctor.id, is_present=True, max_patients=3)
    assert (await walk_in(front, doctor.id, people[1].id)).appointment.number == 2
    await set_day(front, doctor.id, is_present=True, max_patients=1)
    assert (await walk_in(front, doctor.id, people[2].id, override_reason="x")).appointment.number == 3


async def test_what_is_not_overridden(front: Front) -> None:
    """A reason overrides neither absence, nor another appointment of the patient, nor an inactive record."""
    doctor, person = await front.doctor(), await front.patient()
    why = {"override_reason": "urgent"}
    await set_day(front, doctor.id, is_present=False)
    error = await refusal(walk_in(front, doctor.id, person.id, **why))
    assert reason_of(error) == "DOCTOR_ABSENT"
    assert details(error)["ErrorInfo"].metadata["cause"] == "AVAILABILITY"
    await set_day(front, doctor.id, is_present=True)
    await front.book(person.id, doctor.id)
    assert await outcome(walk_in(front, doctor.id, person.id, **why)) == "DUPLICATE_BOOKING"
    assert await outcome(walk_in(front, doctor.id, UNKNOWN, **why)) == "PATIENT_NOT_FOUND"
    assert await outcome(walk_in(front, UNKNOWN, person.id, **why)) == "DOCTOR_NOT_FOUND"
    front.sql("update doctor set active = false where id = %s", doctor.id)
    assert await outcome(walk_in(front, doctor.id, (await front.patient()).id, **why)) == "DOCTOR_INACTIVE"


@pytest.mark.parametrize("cause", CAUSES)
async def test_an_absent_doctor(front: Front, cause: str) -> None:
    """An absent doctor takes no walk-in, by an override neither, and the refusal says why the doctor is absent."""
    doctor, person = await front.doctor(), await front.patient()
    await front.absent(doctor.id, cause)
    before = await front.standing(doctor.id)
    for why in ("", "urgent"):
        refused = details(await refusal(walk_in(front, doctor.id, person.id, override_reason=why)))["ErrorInfo"]
        assert (refused.reason, refused.metadata["cause"]) == ("DOCTOR_ABSENT", cause)
    assert await front.standing(doctor.id) == before


async def test_who_may_override(front: Front) -> None:
    """The desk of the clinic may override; a service or the doctor is told that the day is full."""
    doctor, other = await front.doctor(max_patients_per_day=1), await front.doctor()
    await front.arrive(doctor.id)
    here = [doctor.clinic_id]
    for by, expected in (
        (bearing((await create_key(front, "SERVICE")).key), "DAY_FULL"),
        (user(front, "DOCTOR", doctor_id=doctor.id), "DAY_FULL"),
        (user(front, "DOCTOR", doctor_id=other.id), "ROLE_REQUIRED"),
        # Of another clinic's desk, and here as a doctor alone.
        (user(front, "STAFF", "DOCTOR", doctor_id=doctor.id, clinic_ids=[other.clinic_id]), "DAY_FULL"),
        (bearing((await create_key(front, "STAFF", clinic_ids=[other.clinic_id])).key), "CLINIC_NOT_YOURS"),
        (user(front, "PATIENT", patient_id=(await front.patient()).id), "ROLE_REQUIRED"),
        (bearing((await create_key(front, "STAFF", clinic_ids=here)).key), "OK"),
        (bearing((await create_key(front, "ADMIN")).key), "OK"),
        ((), "OK"),
    ):
        call = walk_in(front, doctor.id, (await front.patient()).id, override_reason="fainted", metadata=by)
        assert await outcome(call) == expected
    # Without need the others may give a reason too: it has no effect.
    service = bearing((await create_key(front, "SERVICE")).key)
    answer = await walk_in(front, other.id, (await front.patient()).id, override_reason="fainted", metadata=service)
    assert answer.appointment.override_reason == ""


async def test_patients_do_not_read_the_reason(front: Front) -> None:
    """An override's reason is the clinic's: the patient gets it empty."""
    doctor, person = await front.doctor(max_patients_per_day=1), await front.patient()
    await front.arrive(doctor.id)
    visit = (await walk_in(front, doctor.id, person.id, override_reason="fainted")).appointment
    request = pb.GetAppointmentRequest(appointment_id=visit.id)
    mine = user(front, "PATIENT", patient_id=person.id)
    assert (await front.appointments.GetAppointment(request, metadata=mine)).appointment.override_reason == ""
    doctors = user(front, "DOCTOR", doctor_id=doctor.id)
    assert (await front.appointments.GetAppointment(request, metadata=doctors)).appointment.override_reason == "fainted"


async def test_the_last_place(front: Front) -> None:
    """Of thirty walk-ins at once for ten places ten come in; of twins of one patient, one."""
    doctor = await front.doctor()
    outcomes = await asyncio.gather(*(outcome(walk_in(front, doctor.id, p.id)) for p in await front.people(30)))
    assert Counter(outcomes) == {"OK": 10, "DAY_FULL": 20}
    free, person = await front.doctor(), await front.patient()
    outcomes = await asyncio.gather(*(outcome(walk_in(front, free.id, person.id)) for _ in range(10)))
    assert Counter(outcomes) == {"OK": 1, "DUPLICATE_BOOKING": 9}
    queue = await front.standing(doctor.id)
    assert [entry.ticket for entry in queue.entries] == list(range(1, 11))


async def test_a_place_moves_below_the_capacity(front: Front) -> None:
    """A visit that was above the capacity and is moved to another day has a usual place and no override there."""
    doctor, person = await front.doctor(max_patients_per_day=1), await front.patient()
    await front.arrive(doctor.id)
    visit = (await walk_in(front, doctor.id, person.id, override_reason="fainted")).appointment
    undo = pb.UndoTransitionRequest(appointment_id=visit.id, etag=visit.etag)
    assert (await front.appointments.UndoTransition(undo)).appointment.override_reason == "fainted"
    other = await front.doctor()
    target = pb.DoctorDay(doctor_id=other.id, date=day(today()))
    move = pb.RescheduleAppointmentRequest(appointment_id=visit.id, doctor_day=target)
    moved = (await front.appointments.RescheduleAppointment(move)).appointment
    assert (moved.number, moved.override_reason) == (1, "")


async def test_bad_walk_ins(front: Front) -> None:
    """Unknown priorities, too long texts, control characters and malformed ids are refused by their fields."""
    doctor, person = await front.doctor(), await front.patient()
    good = {"doctor_id": doctor.id, "patient_id": person.id}
    for field, value in (
        ("doctor_id", ""), ("doctor_id", "x"), ("patient_id", ""), ("priority", 4), ("reason", "x" * 2001),
        ("override_reason", "x" * 2001), ("override_reason", "a\x00b"), ("idempotency_key", "é"),
    ):  # fmt: skip
        wrong: dict[str, Any] = {**good, field: value}
        error = await refusal(front.queues.AddWalkIn(queue_pb2.AddWalkInRequest(**wrong)))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert details(error)["BadRequest"].field_violations[0].field == field
    assert not (await front.standing(doctor.id)).entries


async def test_a_day_full_of_holds(front: Front) -> None:
    """A hold takes the place from a walk-in, who is told when it may be free; with a reason he comes in above it."""
    doctor = await front.doctor(max_patients_per_day=1)
    held = await front.hold(doctor.id)
    person = await front.patient()
    error = await refusal(walk_in(front, doctor.id, person.id))
    assert reason_of(error) == "DAY_FULL"
    assert details(error)["ErrorInfo"].metadata["held"] == "1"
    over = await walk_in(front, doctor.id, person.id, override_reason="fainted")
    assert (over.appointment.number, over.appointment.override_reason) == (2, "fainted")
    target = pb.DoctorDay(doctor_id=doctor.id, date=day(today()))
    booking = pb.BookAppointmentRequest(patient_id=(await front.patient()).id, doctor_day=target, hold_id=held.id)
    assert reason_of(await refusal(front.appointments.BookAppointment(booking))) == "DAY_FULL"
