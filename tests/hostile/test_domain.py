"""Cases 27 to 40: simultaneous calls, and clocks that disagree."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import appointment_pb2, doctor_pb2, queue_pb2, slot_pb2
from tests.clinic import Clock, Front, day, details, outcome, refusal, today, tomorrow
from tests.hostile.methods import noon, slot_at


def to_day(
    appointment_id: str, doctor_id: str, on: date, **fields: Any
) -> appointment_pb2.RescheduleAppointmentRequest:
    """Move an appointment to this doctor's day."""
    target = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=day(on))
    return appointment_pb2.RescheduleAppointmentRequest(appointment_id=appointment_id, doctor_day=target, **fields)


def cancelling(appointment_id: str) -> appointment_pb2.CancelAppointmentRequest:
    """Cancel the appointment."""
    return appointment_pb2.CancelAppointmentRequest(appointment_id=appointment_id)


def sound(front: Front) -> None:
    """Rules of every clinic's database: no day is oversold; no number, ticket or revision occurs twice."""
    assert not front.sql(
        "select a.doctor_id, a.date from appointment a join doctor d on d.id = a.doctor_id"
        " where a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')"
        " group by a.doctor_id, a.date, d.max_patients_per_day"
        " having count(*) > d.max_patients_per_day or count(*) <> count(distinct a.number)"
    )
    assert not front.sql(
        "select dd.doctor_id, dd.date from doctor_day dd"
        " left join (select * from log where revision > 0) e using (doctor_id, date)"
        " group by dd.doctor_id, dd.date, dd.revision, dd.last_ticket"
        " having count(*) <> dd.revision - 1 or max(e.revision) <> dd.revision or min(e.revision) <> 2"
        " or count(distinct e.ticket) <> dd.last_ticket or coalesce(max(e.ticket), 0) <> dd.last_ticket"
    )


async def test_the_last_places(front: Front) -> None:
    """When thirty patients ask at once for ten places, ten get one and twenty are told that the day is full."""
    doctor, patients = await front.doctor(), await front.people(30)
    answers = await asyncio.gather(*(front.book(p.id, doctor.id) for p in patients), return_exceptions=True)
    got = [a for a in answers if not isinstance(a, BaseException)]
    assert sorted(a.appointment.number for a in got) == list(range(1, 11))
    assert sorted(a.revision for a in got) == list(range(2, 12))
    assert sum(isinstance(a, grpc.aio.AioRpcError) for a in answers) == 20
    assert (await refusal(front.book(patients[0].id, doctor.id))).code() in (
        grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ALREADY_EXISTS,
    )  # fmt: skip
    sound(front)


async def test_the_last_places_of_slots(front: Front) -> None:
    """Two slots for three share a day for four: of thirty who ask at once, four get a place, at most three per slot."""
    doctor, patients = await front.doctor(max_patients_per_day=4), await front.people(30)
    slots = [await front.slot(doctor.id, noon(2) + timedelta(hours=n), capacity=3) for n in range(2)]
    outcomes = await asyncio.gather(
        *(
            outcome(
                front.appointments.BookAppointment(
                    appointment_pb2.BookAppointmentRequest(patient_id=p.id, slot_id=slots[n % 2].id)
                )
            )
            for n, p in enumerate(patients)
        )
    )
    assert Counter(outcomes)["OK"] == 4
    assert set(outcomes) <= {"OK", "SLOT_FULL", "DAY_FULL"}
    for slot in slots:
        found = (await front.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=slot.id))).slot
        assert found.booked_count <= 3
        assert found.available_count == 3 - found.booked_count
    sound(front)


async def test_a_freed_number(front: Front) -> None:
    """After cancellations, the next booking gets the lowest free number."""
    doctor, patients = await front.doctor(), await front.people(12)
    booked = [await front.book(p.id, doctor.id) for p in patients[:10]]
    assert await outcome(front.book(patients[10].id, doctor.id)) == "DAY_FULL"
    for number in (7, 3):
        await front.appointments.CancelAppointment(cancelling(booked[number - 1].appointment.id))
    assert (await front.book(patients[10].id, doctor.id)).appointment.number == 3
    assert (await front.book(patients[11].id, doctor.id)).appointment.number == 7
    sound(front)


async def test_two_cancel(front: Front) -> None:
    """Of many simultaneous cancellations of one booking, one succeeds; the place is freed once."""
    doctor, patients = await front.doctor(max_patients_per_day=1), await front.people(3)
    booked = await front.book(patients[0].id, doctor.id)
    outcomes = await asyncio.gather(
        *(outcome(front.appointments.CancelAppointment(cancelling(booked.appointment.id))) for _ in range(10))
    )
    assert Counter(outcomes) == {"OK": 1, "INVALID_TRANSITION": 9}
    outcomes = await asyncio.gather(*(outcome(front.book(p.id, doctor.id)) for p in patients[1:]))
    assert Counter(outcomes) == {"OK": 1, "DAY_FULL": 1}
    sound(front)


async def test_opposing_reschedules(front: Front) -> None:
    """Two hundred moves to and fro between three doctors' days cause no deadlock that a client sees."""
    doctors = [await front.doctor(max_patients_per_day=40) for _ in range(3)]
    patients = await front.people(30)
    booked = await asyncio.gather(*(front.book(p.id, doctors[n % 3].id, tomorrow()) for n, p in enumerate(patients)))

    async def move(n: int) -> str:
        appointment, to = booked[n % 30].appointment, doctors[(n // 30 + n) % 3]
        request = to_day(appointment.id, to.id, tomorrow() + timedelta(days=n % 2))
        return await outcome(front.appointments.RescheduleAppointment(request))

    outcomes = Counter(await asyncio.gather(*map(move, range(200))))
    assert outcomes == {"OK": 200}
    assert front.sql("select count(*) from appointment where state = 'BOOKED'") == [(30,)]
    sound(front)


async def test_a_failed_reschedule(front: Front) -> None:
    """A patient who cannot get the new place keeps the old one, and neither day has changed."""
    full, other = await front.doctor(max_patients_per_day=1), await front.doctor()
    first, second = await front.people(2)
    await front.book(first.id, full.id, tomorrow())
    booked = await front.book(second.id, other.id, tomorrow())
    for request, reason in (
        (to_day(booked.appointment.id, full.id, tomorrow()), "DAY_FULL"),
        (to_day(booked.appointment.id, other.id, today() - timedelta(days=2)), "DATE_IN_PAST"),
        (to_day(booked.appointment.id, other.id, tomorrow(), etag="99"), "ETAG_MISMATCH"),
    ):
        assert await outcome(front.appointments.RescheduleAppointment(request)) == reason
    kept = await front.appointments.GetAppointment(
        appointment_pb2.GetAppointmentRequest(appointment_id=booked.appointment.id)
    )
    assert kept.appointment == booked.appointment
    assert (await front.queue(full.id, tomorrow())).revision == 2
    assert (await front.queue(other.id, tomorrow())).revision == 2
    sound(front)


async def test_one_patient_in_two_places(front: Front) -> None:
    """A patient has one live booking per doctor-day and no two at the same time; one may start when another ends."""
    doctor, other, patient = await front.doctor(), await front.doctor(), await front.patient()
    here = await front.slot(doctor.id, noon(2))
    overlapping = await front.slot(other.id, noon(2) + timedelta(minutes=29))
    adjacent = await front.slot(other.id, noon(2) + timedelta(minutes=59))
    before = await front.slot(other.id, noon(2) - timedelta(minutes=30))

    def book(slot: slot_pb2.Slot) -> Any:
        request = appointment_pb2.BookAppointmentRequest(patient_id=patient.id, slot_id=slot.id)
        return outcome(front.appointments.BookAppointment(request))

    assert await book(here) == "OK"
    assert await book(overlapping) == "PATIENT_OVERLAP"
    assert await book(here) == "DUPLICATE_BOOKING"
    assert await book(before) == "OK"
    assert await book(adjacent) == "DUPLICATE_BOOKING"
    third = await front.doctor()
    assert await book(await front.slot(third.id, noon(2) + timedelta(minutes=30))) == "OK"
    error = await refusal(front.book(patient.id, doctor.id, here_date(here)))
    assert details(error)["ResourceInfo"].resource_type == "clinic.frontdesk.v1.Appointment"


def here_date(slot: slot_pb2.Slot) -> date:
    """The civil date of an instant in a zone, as a message."""
    return date(slot.date.year, slot.date.month, slot.date.day)


async def test_one_patient_in_two_places_at_once(front: Front) -> None:
    """When ten doctors book one patient for the same time at once, one succeeds."""
    patient = await front.patient()
    slots = [await front.slot((await front.doctor()).id, noon(2) + timedelta(minutes=n)) for n in range(10)]
    outcomes = await asyncio.gather(
        *(
            outcome(
                front.appointments.BookAppointment(
                    appointment_pb2.BookAppointmentRequest(patient_id=patient.id, slot_id=slot.id)
                )
            )
            for slot in slots
        )
    )
    assert Counter(outcomes) == {"OK": 1, "PATIENT_OVERLAP": 9}


async def test_two_call_the_next(front: Front) -> None:
    """Simultaneous CallNext calls get different patients, in ticket order; the one too many gets QUEUE_EMPTY."""
    doctor = await front.doctor(max_patients_per_day=100)
    for _ in range(9):
        await front.arrive(doctor.id)
    request = queue_pb2.CallNextRequest(doctor_id=doctor.id)
    answers = await asyncio.gather(*(front.queues.CallNext(request) for _ in range(12)), return_exceptions=True)
    called = [a for a in answers if isinstance(a, queue_pb2.CallNextResponse)]
    assert sorted(a.entry.ticket for a in called) == list(range(1, 10))
    assert [a.entry.ticket for a in sorted(called, key=lambda a: a.revision)] == list(range(1, 10))
    error = await refusal(front.queues.CallNext(request))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert await outcome(front.queues.CallNext(request)) == "QUEUE_EMPTY"
    sound(front)


async def test_two_hundred_check_in(front: Front) -> None:
    """Two hundred simultaneous check-ins get the tickets 1 to 200, and the queue is in their order."""
    doctor, patients = await front.doctor(max_patients_per_day=200), await front.people(200)
    booked = await asyncio.gather(*(front.book(p.id, doctor.id) for p in patients))
    answers = await asyncio.gather(*(front.check_in(b.appointment.id) for b in booked))
    assert sorted(a.entry.ticket for a in answers) == list(range(1, 201))
    assert sorted(a.revision for a in answers) == list(range(202, 402))
    assert [a.entry.ticket for a in sorted(answers, key=lambda a: a.revision)] == list(range(1, 201))
    line = await front.queue(doctor.id)
    assert [(e.ticket, e.position) for e in line.entries] == [(n, n) for n in range(1, 201)]
    assert (line.waiting_count, line.expected_count, line.revision) == (200, 0, 401)
    sound(front)


async def test_everyone_does_everything_at_once(front: Front) -> None:
    """After a storm of verbs in random order no rule is broken, and no answer was a fault of the server."""
    chance = random.Random(27)
    doctor = await front.doctor(max_patients_per_day=15)
    patients = await front.people(25)
    ids: list[str] = []

    async def book() -> str:
        try:
            ids.append((await front.book(chance.choice(patients).id, doctor.id)).appointment.id)
        except grpc.aio.AioRpcError as error:
            return str(details(error)["ErrorInfo"].reason)
        return "OK"

    def some() -> str:
        return chance.choice(ids)

    steps: list[Callable[[], Any]] = [
        book, book, book,
        lambda: outcome(front.check_in(some())),
        lambda: outcome(front.check_in(some())),
        lambda: outcome(front.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor.id))),
        lambda: outcome(front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=some()))),
        lambda: outcome(front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=some()))),
        lambda: outcome(front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=some()))),
        lambda: outcome(front.queues.LeaveQueue(queue_pb2.LeaveQueueRequest(appointment_id=some()))),
        lambda: outcome(front.appointments.CancelAppointment(cancelling(some()))),
        lambda: outcome(
            front.appointments.StartAppointment(appointment_pb2.StartAppointmentRequest(appointment_id=some()))
        ),
        lambda: outcome(
            front.appointments.CompleteAppointment(appointment_pb2.CompleteAppointmentRequest(appointment_id=some()))
        ),
        lambda: outcome(front.appointments.RescheduleAppointment(to_day(some(), doctor.id, tomorrow()))),
    ]  # fmt: skip
    await book()
    outcomes: Counter[str] = Counter()
    for _ in range(12):
        outcomes += Counter(await asyncio.gather(*(chance.choice(steps)() for _ in range(60))))
    assert outcomes["OK"] > 100
    assert not outcomes.keys() & {"INTERNAL", "CONFLICT", "DEADLINE_EXCEEDED", "DATABASE_UNAVAILABLE"}, outcomes
    sound(front)


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago", "Asia/Kathmandu"])
async def test_today_is_the_clinics(front: Front, zone: str) -> None:
    """Check-in follows the civil date of the clinic: a day early, a day late, or today in another zone is refused."""
    doctor, patients = await front.doctor(zone), await front.people(3)
    for patient, days, expected in zip(
        patients, (0, 1, 2), ("OK", "NOT_APPOINTMENT_DATE", "NOT_APPOINTMENT_DATE"), strict=True
    ):
        booked = await front.book(patient.id, doctor.id, today(zone) + timedelta(days=days))
        assert await outcome(front.check_in(booked.appointment.id)) == expected
    late = await outcome(front.book(patients[1].id, doctor.id, today(zone) - timedelta(days=1)))
    assert late == "DATE_IN_PAST"
    line = await front.queue(doctor.id)
    assert (line.date, line.waiting_count) == (day(today(zone)), 1)


async def test_today_elsewhere(at: Clock) -> None:
    """At one instant there are three different dates: each clinic accepts check-ins only for its own."""
    zones = {
        "Pacific/Kiritimati": date(2026, 11, 21),
        "UTC": date(2026, 11, 20),
        "Pacific/Pago_Pago": date(2026, 11, 19),
    }
    async with at("2026-11-20 10:30+00") as front:
        for zone, here in zones.items():
            doctor = await front.doctor(zone)
            for there in sorted(set(zones.values())):
                patient = await front.patient()
                if there < here:
                    assert await outcome(front.book(patient.id, doctor.id, there)) == "DATE_IN_PAST"
                    continue
                booked = await front.book(patient.id, doctor.id, there)
                expected = "OK" if there == here else "NOT_APPOINTMENT_DATE"
                assert await outcome(front.check_in(booked.appointment.id)) == expected
                shown = appointment_pb2.MarkNoShowRequest(appointment_id=booked.appointment.id)
                missed = await outcome(front.appointments.MarkNoShow(shown))
                assert missed == ("INVALID_TRANSITION" if there == here else "TOO_EARLY")


async def test_a_day_late(at: Clock) -> None:
    """Yesterday's booking cannot be checked in, but can be marked as no-show."""
    async with at("2026-11-20 23:00-03") as front:
        doctor, patient = await front.doctor("America/Sao_Paulo"), await front.patient()
        booked = await front.book(patient.id, doctor.id, date(2026, 11, 20))
    async with at("2026-11-21 00:00-03") as front:
        assert await outcome(front.check_in(booked.appointment.id)) == "NOT_APPOINTMENT_DATE"
        shown = appointment_pb2.MarkNoShowRequest(appointment_id=booked.appointment.id)
        assert await outcome(front.appointments.MarkNoShow(shown)) == "OK"


async def test_an_evening_clinic(at: Clock) -> None:
    """At nine in the evening in São Paulo it is tomorrow in UTC, but still today at the clinic."""
    async with at("2026-11-20 21:30-03") as front:
        doctor, patient = await front.doctor("America/Sao_Paulo"), await front.patient()
        slot = await front.slot(doctor.id, datetime(2026, 11, 21, 1, 0, tzinfo=UTC))
        assert here_date(slot) == date(2026, 11, 20)
        request = appointment_pb2.BookAppointmentRequest(patient_id=patient.id, slot_id=slot.id)
        booked = (await front.appointments.BookAppointment(request)).appointment
        assert booked.date == day(date(2026, 11, 20))
        assert (await front.check_in(booked.id)).entry.ticket == 1
        line = await front.queue(doctor.id)
        assert (line.date, line.waiting_count) == (day(date(2026, 11, 20)), 1)
        called = await front.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor.id))
        assert called.entry.appointment_id == booked.id


async def test_the_hour_that_comes_twice(at: Clock) -> None:
    """When clocks go back, 01:30 comes twice: as two slots that do not overlap, on one day of 25 hours."""
    async with at("2026-10-01 00:00+00") as front:
        doctor = await front.doctor("America/New_York")
        midnight = datetime(2026, 11, 1, 4, 0, tzinfo=UTC)
        slots = [await front.slot(doctor.id, datetime(2026, 11, 1, hour, 30, tzinfo=UTC)) for hour in (5, 6)]
        assert [here_date(slot) for slot in slots] == [date(2026, 11, 1)] * 2
        last = await front.slot(doctor.id, midnight + timedelta(hours=24, minutes=30))
        assert here_date(last) == date(2026, 11, 1)
        over = slot_at(doctor.id, midnight + timedelta(hours=24), 61)
        assert await outcome(front.slots.CreateSlot(slot_pb2.CreateSlotRequest(slot=over))) == "INVALID_FIELD"
        patient, other = await front.people(2)
        for person, slot in ((patient, slots[0]), (other, slots[1])):
            request = appointment_pb2.BookAppointmentRequest(patient_id=person.id, slot_id=slot.id)
            booked = (await front.appointments.BookAppointment(request)).appointment
            assert (booked.start_time, booked.date) == (slot.start_time, day(date(2026, 11, 1)))


async def test_the_hour_that_does_not_come(at: Clock) -> None:
    """When clocks go forward, the day has 23 hours: midnight comes an hour earlier, and slots end there."""
    async with at("2026-03-01 00:00+00") as front:
        doctor = await front.doctor("America/New_York")
        midnight = datetime(2026, 3, 8, 5, 0, tzinfo=UTC)
        # On the clock, 01:30 to 03:30 is one hour.
        across = await front.slot(doctor.id, midnight + timedelta(minutes=90), minutes=60)
        assert here_date(across) == date(2026, 3, 8)
        end = midnight + timedelta(hours=23)
        assert here_date(await front.slot(doctor.id, end - timedelta(minutes=30))) == date(2026, 3, 8)
        assert here_date(await front.slot(doctor.id, end)) == date(2026, 3, 9)
        over = slot_at(doctor.id, end - timedelta(hours=2), 121)
        assert await outcome(front.slots.CreateSlot(slot_pb2.CreateSlotRequest(slot=over))) == "INVALID_FIELD"


async def test_a_slot_that_has_begun(at: Clock) -> None:
    """A slot can be booked until it starts, and its patient cannot be marked as no-show before it starts."""
    async with at("2026-11-20 12:00+00") as front:
        doctor, patients = await front.doctor("UTC"), await front.people(2)
        slot = await front.slot(doctor.id, datetime(2026, 11, 20, 13, 0, tzinfo=UTC), capacity=2)
        request = appointment_pb2.BookAppointmentRequest(patient_id=patients[0].id, slot_id=slot.id)
        booked = (await front.appointments.BookAppointment(request)).appointment
        shown = appointment_pb2.MarkNoShowRequest(appointment_id=booked.id)
        assert await outcome(front.appointments.MarkNoShow(shown)) == "TOO_EARLY"
    async with at("2026-11-20 13:00+00") as front:
        request = appointment_pb2.BookAppointmentRequest(patient_id=patients[1].id, slot_id=slot.id)
        assert await outcome(front.appointments.BookAppointment(request)) == "SLOT_IN_PAST"
        assert await outcome(front.appointments.MarkNoShow(shown)) == "OK"


async def test_an_absent_doctor(front: Front) -> None:
    """During leave nobody is booked, and existing bookings are listed and stay. Afterwards bookings work again."""
    doctor, patients = await front.doctor(), await front.people(3)
    booked = [await front.book(p.id, doctor.id, tomorrow()) for p in patients[:2]]
    said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), is_present=False)
    answer = await front.doctors.SetDoctorAvailability(said)
    assert list(answer.affected_appointment_ids) == [b.appointment.id for b in booked]
    assert await outcome(front.book(patients[2].id, doctor.id, tomorrow())) == "DOCTOR_ABSENT"
    wanted = appointment_pb2.ListAppointmentsRequest(doctor_id=doctor.id, from_date=said.date, to_date=said.date)
    listed = (await front.appointments.ListAppointments(wanted)).appointments
    assert {a.id: a.state for a in listed} == {b.appointment.id: b.appointment.state for b in booked}
    said.is_present = True
    assert not (await front.doctors.SetDoctorAvailability(said)).affected_appointment_ids
    assert (await front.book(patients[2].id, doctor.id, tomorrow())).appointment.number == 3
    sound(front)


@pytest.mark.parametrize("how", ["doctor", "day"])
async def test_a_lowered_maximum(front: Front, how: str) -> None:
    """A lowered maximum keeps existing bookings, and refuses new ones until enough have been cancelled."""
    doctor, patients = await front.doctor(max_patients_per_day=3), await front.people(5)
    booked = [await front.book(p.id, doctor.id, tomorrow()) for p in patients[:3]]
    if how == "doctor":
        lowered = doctor_pb2.Doctor(id=doctor.id, max_patients_per_day=1)
        await front.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=lowered))
    else:
        said = doctor_pb2.SetDoctorAvailabilityRequest(
            doctor_id=doctor.id, date=day(tomorrow()), is_present=True, max_patients=1
        )
        await front.doctors.SetDoctorAvailability(said)
    assert front.sql("select count(*) from appointment where state = 'BOOKED'") == [(3,)]
    for number in range(3):
        assert await outcome(front.book(patients[3].id, doctor.id, tomorrow())) == "DAY_FULL"
        await front.appointments.CancelAppointment(cancelling(booked[number].appointment.id))
    assert await outcome(front.book(patients[3].id, doctor.id, tomorrow())) == "OK"
    assert await outcome(front.book(patients[4].id, doctor.id, tomorrow())) == "DAY_FULL"
