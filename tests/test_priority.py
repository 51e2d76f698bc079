"""Priority, and the calling order: its classes, and in each the end for those who missed a call."""

from typing import Any

import grpc

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import queue_pb2
from clinic.frontdesk.v1.queue_pb2 import PRIORITY_NORMAL, PRIORITY_PRIORITY, PRIORITY_URGENT
from tests.clinic import Front, details, outcome, reason_of, refusal
from tests.identities import bearing, create_key, user

Entry = queue_pb2.QueueEntry


async def set_priority(
    front: Front, appointment_id: str, priority: queue_pb2.Priority.ValueType, **options: Any
) -> queue_pb2.SetPriorityResponse:
    """Set a patient's priority."""
    request = queue_pb2.SetPriorityRequest(appointment_id=appointment_id, priority=priority)
    return await front.queues.SetPriority(request, **options)


async def waiting(front: Front, doctor_id: str) -> list[int]:
    """The tickets of those who wait, in the order of the queue; each has the position of its place."""
    found = [entry for entry in (await front.standing(doctor_id)).entries if entry.state == Entry.STATE_WAITING]
    assert [entry.position for entry in found] == list(range(1, len(found) + 1))
    return [entry.ticket for entry in found]


async def arrive_with(front: Front, doctor_id: str, priority: queue_pb2.Priority.ValueType) -> str:
    """A new patient, checked in with this priority; the appointment's id."""
    booked = await front.book((await front.patient()).id, doctor_id)
    return (await front.check_in(booked.appointment.id, priority=priority)).appointment.id


async def miss_a_call(front: Front, doctor_id: str, appointment_id: str) -> queue_pb2.ReturnToLineResponse:
    """Call the first patient, who must be this one, mark the call as missed, and return the patient."""
    assert (await front.call_next(doctor_id)).entry.appointment_id == appointment_id
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=appointment_id))
    return await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=appointment_id))


async def test_check_in_with_a_priority(front: Front) -> None:
    """Urgent patients are first, then those with priority, then the others (the default); each class by check-in."""
    doctor = await front.doctor()
    assert (await front.arrive(doctor.id)).entry.priority == PRIORITY_NORMAL
    for priority in (PRIORITY_NORMAL, PRIORITY_PRIORITY, PRIORITY_URGENT, PRIORITY_URGENT, PRIORITY_PRIORITY):
        await arrive_with(front, doctor.id, priority)
    assert await waiting(front, doctor.id) == [4, 5, 3, 6, 1, 2]
    called = [(await front.call_next(doctor.id)).entry for _ in range(6)]
    assert [entry.ticket for entry in called] == [4, 5, 3, 6, 1, 2]
    assert [entry.priority for entry in called] == [1, 1, 2, 2, 3, 3]


async def test_set_priority(front: Front) -> None:
    """The answer has the new place; the same priority again is a change too, with a revision of its own."""
    doctor = await front.doctor()
    _, second = [await front.arrive(doctor.id) for _ in range(2)]
    urgent = await set_priority(front, second.appointment.id, PRIORITY_URGENT)
    assert (urgent.entry.position, urgent.entry.priority) == (1, PRIORITY_URGENT)
    assert (urgent.appointment.state, urgent.revision) == (pb.Appointment.STATE_CHECKED_IN, second.revision + 1)
    again = await set_priority(front, second.appointment.id, PRIORITY_URGENT)
    assert again.revision == urgent.revision + 1
    assert again.appointment.etag != urgent.appointment.etag
    assert await waiting(front, doctor.id) == [2, 1]
    normal = await set_priority(front, second.appointment.id, PRIORITY_NORMAL)
    assert normal.entry.position == 2
    assert await waiting(front, doctor.id) == [1, 2]


async def test_the_priority_stays(front: Front) -> None:
    """A called, parked or missed patient may get a priority, which counts when the patient waits again."""
    doctor = await front.doctor()
    ids = [(await front.arrive(doctor.id)).appointment.id for _ in range(3)]
    await front.call_next(doctor.id)
    called = await set_priority(front, ids[0], PRIORITY_PRIORITY)
    assert (called.entry.state, called.entry.position) == (Entry.STATE_CALLED, 0)
    await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=ids[2]))
    parked = await set_priority(front, ids[2], PRIORITY_URGENT)
    assert parked.entry.state == Entry.STATE_PARKED
    for appointment_id in (ids[0], ids[2]):
        await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=appointment_id))
    assert await waiting(front, doctor.id) == [3, 1, 2]
    await front.call_next(doctor.id)
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=ids[2]))
    missed = await set_priority(front, ids[2], PRIORITY_NORMAL)
    assert (missed.entry.state, missed.entry.priority) == (Entry.STATE_MISSED, PRIORITY_NORMAL)
    assert {entry.ticket: entry.priority for entry in (await front.standing(doctor.id)).entries} == {1: 2, 2: 3, 3: 3}


async def test_the_end_of_a_class(front: Front) -> None:
    """Who missed a call is at the end of the class, whichever that is, in the order of the returns, and stays there."""
    doctor = await front.doctor()
    ids = [(await front.arrive(doctor.id)).appointment.id for _ in range(4)]
    assert (await miss_a_call(front, doctor.id, ids[0])).entry.position == 4
    await miss_a_call(front, doctor.id, ids[1])
    assert await waiting(front, doctor.id) == [3, 4, 1, 2]
    # The end of the other class, too, and there behind one who comes later.
    await set_priority(front, ids[0], PRIORITY_URGENT)
    await arrive_with(front, doctor.id, PRIORITY_URGENT)
    assert await waiting(front, doctor.id) == [5, 1, 3, 4, 2]
    await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=ids[0]))
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=ids[0]))
    await set_priority(front, ids[0], PRIORITY_NORMAL)
    assert await waiting(front, doctor.id) == [5, 3, 4, 1, 2]
    # A second missed call is a new end.
    await set_priority(front, ids[0], PRIORITY_URGENT)
    await front.call_next(doctor.id)
    await miss_a_call(front, doctor.id, ids[0])
    await set_priority(front, ids[0], PRIORITY_NORMAL)
    assert await waiting(front, doctor.id) == [3, 4, 2, 1]


async def test_who_may_set_a_priority(front: Front) -> None:
    """The desk, services and the day's doctor set priorities; a patient cannot, nor at the own check-in."""
    doctor, other = await front.doctor(), await front.doctor()
    arrived = await front.arrive(doctor.id)
    visit = arrived.appointment.id
    staff = bearing((await create_key(front, "STAFF", clinic_ids=[doctor.clinic_id])).key)
    elsewhere = bearing((await create_key(front, "STAFF", clinic_ids=[other.clinic_id])).key)
    service = bearing((await create_key(front, "SERVICE")).key)
    for metadata, expected in (
        (staff, "OK"),
        (elsewhere, "CLINIC_NOT_YOURS"),
        (service, "OK"),
        (user(front, "DOCTOR", doctor_id=doctor.id), "OK"),
        (user(front, "DOCTOR", doctor_id=other.id), "ROLE_REQUIRED"),
        (user(front, "PATIENT", patient_id=arrived.entry.patient_id), "ROLE_REQUIRED"),
    ):
        assert await outcome(set_priority(front, visit, PRIORITY_URGENT, metadata=metadata)) == expected
    person = await front.patient()
    booked = (await front.book(person.id, doctor.id)).appointment
    mine = user(front, "PATIENT", patient_id=person.id)
    request = queue_pb2.CheckInRequest(appointment_id=booked.id, priority=PRIORITY_URGENT)
    error = await refusal(front.queues.CheckIn(request, metadata=mine))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
    assert dict(details(error)["ErrorInfo"].metadata) == {"method": "CheckIn", "field": "priority"}
    request.priority = PRIORITY_NORMAL
    assert (await front.queues.CheckIn(request, metadata=mine)).entry.priority == PRIORITY_NORMAL


async def test_bad_priorities(front: Front) -> None:
    """SetPriority needs a priority, and one that exists; a check-in one that exists."""
    doctor = await front.doctor()
    arrived = await front.arrive(doctor.id)
    before = await front.standing(doctor.id)
    bad: list[Any] = [0, 4, 99, -1]
    for priority in bad:
        error = await refusal(set_priority(front, arrived.appointment.id, priority))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert [one.field for one in details(error)["BadRequest"].field_violations] == ["priority"]
    booked = (await front.book((await front.patient()).id, doctor.id)).appointment
    for priority in bad[1:]:
        assert await outcome(front.check_in(booked.id, priority=priority)) == "INVALID_FIELD"
    assert (await front.standing(doctor.id)).entries == before.entries


async def test_watchers_see_priorities(front: Front) -> None:
    """A watcher is told of PRIORITY_SET with the priority as that change left it, also if it was changed since."""
    doctor = await front.doctor()
    arrived = await front.arrive(doctor.id)
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    token = (await stream.read()).resume_token
    stream.cancel()
    for priority in (PRIORITY_URGENT, PRIORITY_PRIORITY):
        await set_priority(front, arrived.appointment.id, priority)
    stream = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id, resume_token=token))
    update = (await stream.read()).update
    stream.cancel()
    kind = queue_pb2.QueueChange.KIND_PRIORITY_SET
    assert [(change.kind, change.entry.priority) for change in update.changes] == [(kind, 1), (kind, 2)]
    assert [entry.priority for entry in update.queue.entries] == [PRIORITY_PRIORITY]
