"""Calls: how often a patient is called, and who is passed over."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import clinic_pb2, doctor_pb2, queue_pb2
from tests.clinic import Front, details, outcome, reason_of, refusal, tomorrow

Entry = queue_pb2.QueueEntry


def call_again(front: Front, appointment_id: str) -> Any:
    """A call of CallAgain."""
    return front.queues.CallAgain(queue_pb2.CallAgainRequest(appointment_id=appointment_id))


async def back_to_the_line(front: Front, appointment_id: str) -> None:
    """Return a called patient."""
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=appointment_id))


async def in_two_queues(front: Front) -> tuple[doctor_pb2.Doctor, doctor_pb2.Doctor, list[str]]:
    """Two doctors of a clinic, and the visits of one patient who waits for both, first of all."""
    one = await front.doctor()
    other = await front.doctor(clinic_id=one.clinic_id)
    person = await front.patient()
    visits = [(await front.book(person.id, doctor.id)).appointment.id for doctor in (one, other)]
    for visit in visits:
        await front.check_in(visit)
    return one, other, visits


@pytest.mark.parametrize(("most", "again"), [(None, 2), (1, 0), (5, 4)])
async def test_the_limit(front: Front, most: int | None, again: int) -> None:
    """A patient is called as often as the clinic says, three times by default; CallNext counts as one."""
    clinic = await (front.clinic() if most is None else front.clinic(max_calls=most))
    assert clinic.max_calls == (3 if most is None else most)
    doctor = await front.doctor(clinic_id=clinic.id)
    visit = (await front.arrive(doctor.id)).appointment.id
    await front.call_next(doctor.id)
    for count in range(again):
        assert (await call_again(front, visit)).entry.call_count == 2 + count
    before = await front.standing(doctor.id)
    error = await refusal(call_again(front, visit))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "CALL_LIMIT_REACHED")
    assert dict(details(error)["ErrorInfo"].metadata) == {"appointment_id": visit, "max_calls": str(clinic.max_calls)}
    assert await front.standing(doctor.id) == before
    # From the next CallNext on it is counted anew; the patient's own count goes on.
    await back_to_the_line(front, visit)
    assert (await front.call_next(doctor.id)).entry.call_count == again + 2
    assert await outcome(call_again(front, visit)) == ("OK" if again else "CALL_LIMIT_REACHED")


async def test_no_limit(front: Front) -> None:
    """With 0 there is no limit; a clinic's limit can be changed, and cleared to the default."""
    clinic = await front.clinic(max_calls=0)
    assert clinic.max_calls == 0
    doctor = await front.doctor(clinic_id=clinic.id)
    visit = (await front.arrive(doctor.id)).appointment.id
    await front.call_next(doctor.id)
    for _ in range(5):
        await call_again(front, visit)

    async def update(*paths: str, **fields: Any) -> clinic_pb2.Clinic:
        request = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=clinic.id, **fields))
        request.update_mask.paths.extend(paths)
        return (await front.clinics.UpdateClinic(request)).clinic

    assert (await update(max_calls=7)).max_calls == 7
    assert await outcome(call_again(front, visit)) == "OK"
    assert (await update("max_calls")).max_calls == 3
    assert await outcome(call_again(front, visit)) == "CALL_LIMIT_REACHED"
    assert (await update(name="Other")).max_calls == 3
    for bad in (-1, 1001):
        error = await refusal(update(max_calls=bad))
        assert reason_of(error) == "INVALID_FIELD"
        assert details(error)["BadRequest"].field_violations[0].field == "clinic.max_calls"


async def test_passed_over(front: Front) -> None:
    """Who is called or in consultation in another queue of today is passed over and keeps the place."""
    one, other, visits = await in_two_queues(front)
    await front.arrive(other.id)
    assert (await front.call_next(one.id)).entry.appointment_id == visits[0]
    for busy in ("called", "in consultation"):
        passed = await front.call_next(other.id)
        assert passed.entry.ticket == 2, busy
        first = (await front.standing(other.id)).entries[0]
        assert (first.ticket, first.position) == (1, 1)
        assert await outcome(front.call_next(other.id)) == "QUEUE_EMPTY"
        await back_to_the_line(front, passed.entry.appointment_id)
        if busy == "called":
            await front.appointments.StartAppointment(pb.StartAppointmentRequest(appointment_id=visits[0]))
    await front.appointments.CompleteAppointment(pb.CompleteAppointmentRequest(appointment_id=visits[0]))
    assert (await front.call_next(other.id)).entry.appointment_id == visits[1]


async def test_not_passed_over(front: Front) -> None:
    """A patient who waits, is parked or missed elsewhere, or is called in a queue of another date, is called here."""
    one, other, visits = await in_two_queues(front)
    assert (await front.call_next(one.id)).entry.appointment_id == visits[0]
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=visits[0]))
    assert (await front.call_next(other.id)).entry.appointment_id == visits[1]
    await back_to_the_line(front, visits[1])
    await back_to_the_line(front, visits[0])
    await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=visits[0]))
    assert (await front.call_next(other.id)).entry.appointment_id == visits[1]
    await back_to_the_line(front, visits[1])
    front.sql("update appointment set queue_state = 'CALLED', date = %s where id = %s", tomorrow(), visits[0])
    assert (await front.call_next(other.id)).entry.appointment_id == visits[1]


async def test_two_doctors_do_not_call_one_patient(front: Front) -> None:
    """If two doctors call at once, a patient who waits for both is called by one of them."""
    for _ in range(10):
        one, other, _ = await in_two_queues(front)
        outcomes = await asyncio.gather(*(outcome(front.call_next(doctor.id)) for doctor in (one, other)))
        assert Counter(outcomes) == {"OK": 1, "QUEUE_EMPTY": 1}
