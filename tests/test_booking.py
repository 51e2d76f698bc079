"""Bookings on a doctor-day or in a slot: never over capacity, never twice, always with the lowest free number."""

import asyncio
from collections import Counter
from datetime import timedelta
from typing import Any

import grpc

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import doctor_pb2, patient_pb2, queue_pb2, slot_pb2
from tests.clinic import Front, day, details, outcome, reason_of, refusal, soon, today, tomorrow


async def test_last_places(front: Front) -> None:
    """When thirty patients ask at once for ten places, ten get one and twenty are told that the day is full."""
    doctor = await front.doctor()
    patients = await front.people(30)
    outcomes = await asyncio.gather(*(outcome(front.book(patient.id, doctor.id)) for patient in patients))
    assert Counter(outcomes) == {"OK": 10, "DAY_FULL": 20}
    numbers = front.sql("select number from appointment where doctor_id = %s order by 1", doctor.id)
    assert [number for (number,) in numbers] == list(range(1, 11))


async def test_full_day_is_a_precondition(front: Front) -> None:
    """A full day is FAILED_PRECONDITION, because clients retry RESOURCE_EXHAUSTED blindly; it names doctor and date."""
    doctor = await front.doctor(max_patients_per_day=1)
    one, two = await front.people(2)
    await front.book(one.id, doctor.id)
    error = await refusal(front.book(two.id, doctor.id))
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    found = details(error)
    assert dict(found["ErrorInfo"].metadata) == {"doctor_id": doctor.id, "date": today().isoformat()}
    assert found["PreconditionFailure"].violations[0].type == "DAY_FULL"


async def test_lowest_free_number(front: Front) -> None:
    """The next booking gets the number of a cancelled one."""
    doctor = await front.doctor()
    booked = [await front.book(patient.id, doctor.id) for patient in await front.people(4)]
    assert [answer.appointment.number for answer in booked] == [1, 2, 3, 4]
    await front.cancel(booked[1].appointment.id)
    (late,) = await front.people(1)
    assert (await front.book(late.id, doctor.id)).appointment.number == 2
    (last,) = await front.people(1)
    assert (await front.book(last.id, doctor.id)).appointment.number == 5


async def test_revisions_count_every_change(front: Front) -> None:
    """A doctor-day without changes is at revision 1, and each booking and cancellation adds one."""
    doctor = await front.doctor()
    assert (await front.queue(doctor.id)).revision == 1
    one, two = await front.people(2)
    first = await front.book(one.id, doctor.id)
    second = await front.book(two.id, doctor.id)
    cancelled = await front.cancel(first.appointment.id)
    assert [first.revision, second.revision, cancelled.revision] == [2, 3, 4]
    assert (await front.queue(doctor.id)).revision == 4


async def test_one_booking_a_patient_and_day(front: Front) -> None:
    """A patient with a live appointment on the doctor-day cannot book another; the refusal names the existing one."""
    doctor = await front.doctor()
    (patient,) = await front.people(1)
    first = await front.book(patient.id, doctor.id)
    error = await refusal(front.book(patient.id, doctor.id))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_BOOKING")
    assert details(error)["ResourceInfo"].resource_name == first.appointment.id
    await front.cancel(first.appointment.id)
    assert await outcome(front.book(patient.id, doctor.id)) == "OK"


async def test_validate_only(front: Front) -> None:
    """A dry run answers the number to be given and changes nothing; on a full day it is refused like a booking."""
    doctor = await front.doctor(max_patients_per_day=1)
    one, two = await front.people(2)
    dry = await front.book(one.id, doctor.id, validate_only=True, reason="cough")
    assert (dry.appointment.id, dry.appointment.number, dry.revision) == ("", 1, 0)
    assert dry.appointment.reason == "cough"
    assert (await front.queue(doctor.id)).revision == 1
    await front.book(one.id, doctor.id)
    assert await outcome(front.book(two.id, doctor.id, validate_only=True)) == "DAY_FULL"


async def test_absent_doctor(front: Front) -> None:
    """An absent doctor takes no bookings, and existing ones stay and are listed; afterwards bookings work again."""
    doctor = await front.doctor()
    one, two = await front.people(2)
    booked = await front.book(one.id, doctor.id)

    async def say(present: bool) -> doctor_pb2.SetDoctorAvailabilityResponse:
        return await front.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), is_present=present)
        )

    absent = await say(False)
    assert list(absent.affected_appointment_ids) == [booked.appointment.id]
    assert absent.revision == 3
    refused = details(await refusal(front.book(two.id, doctor.id)))["ErrorInfo"]
    assert (refused.reason, refused.metadata["cause"]) == ("DOCTOR_ABSENT", "AVAILABILITY")
    assert (await front.appointment(booked.appointment.id)).state == pb.Appointment.STATE_BOOKED
    assert list((await say(True)).affected_appointment_ids) == []
    assert await outcome(front.book(two.id, doctor.id)) == "OK"


async def test_a_days_own_maximum(front: Front) -> None:
    """The capacity of a date overrides the doctor's own. Lowered below the bookings, it keeps them and adds none."""
    doctor = await front.doctor(max_patients_per_day=1)
    people = await front.people(4)

    async def allow(patients: int) -> None:
        await front.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(
                doctor_id=doctor.id, date=day(today()), is_present=True, max_patients=patients
            )
        )

    await allow(3)
    assert [await outcome(front.book(p.id, doctor.id)) for p in people[:3]] == ["OK"] * 3
    await allow(2)
    assert await outcome(front.book(people[3].id, doctor.id)) == "DAY_FULL"
    assert (await front.queue(doctor.id)).expected_count == 3


async def test_unknown_and_inactive(front: Front) -> None:
    """An unknown resource is NOT_FOUND; an inactive patient, doctor or clinic takes no booking."""
    doctor, nobody = await front.doctor(), "0190a0b0-1111-7222-8333-444455556666"
    (patient,) = await front.people(1)
    assert await outcome(front.book(nobody, doctor.id)) == "PATIENT_NOT_FOUND"
    assert await outcome(front.book(patient.id, nobody)) == "DOCTOR_NOT_FOUND"
    assert await outcome(front.book(patient.id, doctor.id, today() - timedelta(days=1))) == "DATE_IN_PAST"
    await front.doctors.UpdateDoctor(
        doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=doctor.id, active=False))
    )
    assert await outcome(front.book(patient.id, doctor.id)) == "DOCTOR_INACTIVE"
    other = await front.doctor()
    await front.patients.UpdatePatient(
        patient_pb2.UpdatePatientRequest(patient=patient_pb2.Patient(id=patient.id, active=False))
    )
    assert await outcome(front.book(patient.id, other.id)) == "PATIENT_INACTIVE"


async def test_slot_and_day_share_the_capacity(front: Front) -> None:
    """The capacity of the slot and of the doctor-day both hold for slot and day bookings together."""
    doctor = await front.doctor(max_patients_per_day=3)
    slot = await front.slot(doctor.id, soon(), capacity=2)
    people = await front.people(5)
    assert (await front.book_slot(people[0].id, slot.id)).appointment.number == 1
    assert await outcome(front.book_slot(people[1].id, slot.id)) == "OK"
    assert await outcome(front.book_slot(people[2].id, slot.id)) == "SLOT_FULL"
    booked = await front.book(people[2].id, doctor.id, tomorrow())
    assert booked.appointment.number == 3
    other = await front.slot(doctor.id, soon(hours=2))
    assert await outcome(front.book_slot(people[3].id, other.id)) == "DAY_FULL"
    found = (await front.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=slot.id))).slot
    assert (found.booked_count, found.available_count) == (2, 0)


async def test_slot_and_day_race(front: Front) -> None:
    """Simultaneous day and slot bookings share the last places; none is sold twice."""
    doctor = await front.doctor(max_patients_per_day=10)
    slot = await front.slot(doctor.id, soon(), capacity=8)
    people = await front.people(30)
    calls = [
        front.book_slot(person.id, slot.id) if index % 2 else front.book(person.id, doctor.id, tomorrow())
        for index, person in enumerate(people)
    ]
    outcomes = Counter(await asyncio.gather(*map(outcome, calls)))
    assert outcomes["OK"] == 10
    ((slots, total),) = front.sql("select count(slot_id), count(*) from appointment where doctor_id = %s", doctor.id)
    assert total == 10
    assert slots <= 8


async def test_patient_overlap(front: Front) -> None:
    """A patient cannot be with two doctors at one time, even by simultaneous calls; back to back is allowed."""
    one, two, three = [await front.doctor() for _ in range(3)]
    start = soon()
    slots = [
        await front.slot(one.id, start, minutes=30),
        await front.slot(two.id, start + timedelta(minutes=15), minutes=30),
        await front.slot(three.id, start + timedelta(minutes=45), minutes=30),
    ]
    (patient,) = await front.people(1)
    both = await asyncio.gather(*(outcome(front.book_slot(patient.id, slot.id)) for slot in slots[:2]))
    assert sorted(both) == ["OK", "PATIENT_OVERLAP"]
    assert await outcome(front.book_slot(patient.id, slots[2].id)) == "OK"


async def test_reschedule(front: Front) -> None:
    """A move gives up the old place only if it gets the new one, and answers both revisions."""
    one, two = await front.doctor(max_patients_per_day=1), await front.doctor(max_patients_per_day=1)
    anna, bert = await front.people(2)
    first = await front.book(anna.id, one.id)
    second = await front.book(bert.id, two.id)

    def to(doctor_id: str) -> pb.RescheduleAppointmentRequest:
        return pb.RescheduleAppointmentRequest(
            appointment_id=first.appointment.id, doctor_day=pb.DoctorDay(doctor_id=doctor_id, date=day(today()))
        )

    assert await outcome(front.appointments.RescheduleAppointment(to(two.id))) == "DAY_FULL"
    assert (await front.appointment(first.appointment.id)).doctor_id == one.id
    await front.cancel(second.appointment.id)
    moved = await front.appointments.RescheduleAppointment(to(two.id))
    assert (moved.appointment.doctor_id, moved.appointment.number) == (two.id, 1)
    assert (moved.vacated_revision, moved.revision) == (3, 4)
    assert await outcome(front.book(bert.id, one.id)) == "OK"
    same = await front.appointments.RescheduleAppointment(to(two.id))
    assert same.vacated_revision == same.revision == 5


async def test_only_a_booked_appointment_moves(front: Front) -> None:
    """An appointment whose patient is in the queue cannot be moved."""
    doctor = await front.doctor()
    arrived = await front.arrive(doctor.id)
    error = await refusal(
        front.appointments.RescheduleAppointment(
            pb.RescheduleAppointmentRequest(
                appointment_id=arrived.appointment.id,
                doctor_day=pb.DoctorDay(doctor_id=doctor.id, date=day(tomorrow())),
            )
        )
    )
    assert reason_of(error) == "INVALID_TRANSITION"
    assert details(error)["ErrorInfo"].metadata["state"] == "CHECKED_IN"


async def test_update_reason_and_notes(front: Front) -> None:
    """An update changes reason and notes by mask, and only from the etag that was read."""
    doctor = await front.doctor()
    (patient,) = await front.people(1)
    booked = (await front.book(patient.id, doctor.id, reason="cough", notes="first visit")).appointment

    async def update(etag: str = "", paths: tuple[str, ...] = (), **fields: Any) -> pb.Appointment:
        request = pb.UpdateAppointmentRequest(appointment=pb.Appointment(id=booked.id, **fields), etag=etag)
        request.update_mask.paths.extend(paths)
        return (await front.appointments.UpdateAppointment(request)).appointment

    changed = await update(etag=booked.etag, reason="fever")
    assert (changed.reason, changed.notes) == ("fever", "first visit")
    assert await outcome(update(etag=booked.etag, reason="flu")) == "ETAG_MISMATCH"
    cleared = await update(paths=("notes",))
    assert (cleared.reason, cleared.notes) == ("fever", "")
    assert await outcome(update(paths=("state",))) == "INVALID_FIELD"


async def test_a_move_within_a_day_takes_no_further_place(front: Front) -> None:
    """Whoever has a place of an overfull day or slot may change within it; nobody else gets in."""
    doctor = await front.doctor(max_patients_per_day=2)
    first, second, third = await front.people(3)
    one = (await front.book(first.id, doctor.id, tomorrow())).appointment
    await front.book(second.id, doctor.id, tomorrow())
    await front.doctors.UpdateDoctor(
        doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=doctor.id, max_patients_per_day=1))
    )
    slot = await front.slot(doctor.id, soon(1))
    moved = await front.appointments.RescheduleAppointment(
        pb.RescheduleAppointmentRequest(appointment_id=one.id, slot_id=slot.id)
    )
    assert (moved.appointment.slot_id, moved.appointment.number) == (slot.id, one.number)
    back = pb.RescheduleAppointmentRequest(appointment_id=one.id)
    back.doctor_day.CopyFrom(pb.DoctorDay(doctor_id=doctor.id, date=day(tomorrow())))
    assert await outcome(front.appointments.RescheduleAppointment(back)) == "OK"
    assert await outcome(front.book(third.id, doctor.id, tomorrow())) == "DAY_FULL"
    elsewhere = (await front.book(third.id, doctor.id, tomorrow() + timedelta(days=1))).appointment
    back.appointment_id = elsewhere.id
    assert await outcome(front.appointments.RescheduleAppointment(back)) == "DAY_FULL"


async def test_an_id_in_capitals_is_the_same_request(front: Front) -> None:
    """The same key with the same request in another spelling of its ids is a replay."""
    doctor, person = await front.doctor(), await front.patient()
    booked = await front.book(person.id, doctor.id, tomorrow(), idempotency_key="k")
    again = await front.book(person.id.upper(), doctor.id.upper(), tomorrow(), idempotency_key="k")
    assert (again.replayed, again.appointment) == (True, booked.appointment)


async def test_a_refused_transition_tells_both_states(front: Front) -> None:
    """INVALID_TRANSITION has the state of the visit, and beside it that of the queue entry if there is one."""
    doctor = await front.doctor()
    here = (await front.arrive(doctor.id)).appointment.id
    queues, visits = front.queues, front.appointments
    error = await refusal(queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=here)))
    metadata = {"appointment_id": here, "state": "CHECKED_IN", "queue_state": "WAITING"}
    assert dict(details(error)["ErrorInfo"].metadata) == metadata
    error = await refusal(visits.MarkNoShow(pb.MarkNoShowRequest(appointment_id=here)))
    assert dict(details(error)["ErrorInfo"].metadata) == metadata
    booked = (await front.book((await front.patient()).id, doctor.id)).appointment.id
    error = await refusal(visits.CompleteAppointment(pb.CompleteAppointmentRequest(appointment_id=booked)))
    assert dict(details(error)["ErrorInfo"].metadata) == {"appointment_id": booked, "state": "BOOKED"}
