"""Holds: a place is kept for some minutes, counts as taken meanwhile, and is sold once."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import date, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import doctor_pb2, patient_pb2, queue_pb2, schedule_pb2, slot_pb2
from frontdesk.db.database import Database
from frontdesk.jobs.maintenance import clean
from frontdesk.settings import Settings
from tests.clinic import Clock, Front, day, details, outcome, reason_of, refusal, soon, today, tomorrow
from tests.hostile.wire import serving
from tests.identities import Metadata, bearing, create_key, user

UNKNOWN = "01890000-0000-7000-8000-000000000000"


def told(error: grpc.RpcError) -> tuple[str, Mapping[str, str]]:
    """The reason of a refusal and its metadata."""
    info = details(error)["ErrorInfo"]
    return info.reason, dict(info.metadata)


def expire(front: Front, hold_id: str) -> None:
    """Let the time of the hold pass."""
    front.sql("update hold set create_time = moment() - interval '1 h', expire_time = moment() where id = %s", hold_id)


def release(front: Front, hold_id: str, **fields: Any) -> Any:
    """A call of ReleaseHold."""
    return front.appointments.ReleaseHold(pb.ReleaseHoldRequest(hold_id=hold_id, **fields))


def move(front: Front, appointment_id: str, doctor_id: str, on: date, **fields: Any) -> Any:
    """A call of RescheduleAppointment to a doctor-day."""
    target = pb.DoctorDay(doctor_id=doctor_id, date=day(on))
    return front.appointments.RescheduleAppointment(
        pb.RescheduleAppointmentRequest(appointment_id=appointment_id, doctor_day=target, **fields)
    )


def undo(front: Front, visit: pb.Appointment) -> Any:
    """A call of UndoTransition."""
    return front.appointments.UndoTransition(pb.UndoTransitionRequest(appointment_id=visit.id, etag=visit.etag))


def walk_in(front: Front, doctor_id: str, patient_id: str, **fields: Any) -> Any:
    """A call of AddWalkIn."""
    return front.queues.AddWalkIn(queue_pb2.AddWalkInRequest(doctor_id=doctor_id, patient_id=patient_id, **fields))


async def slot_now(front: Front, slot_id: str) -> slot_pb2.Slot:
    """The slot as it is now."""
    return (await front.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=slot_id))).slot


async def test_a_hold_takes_a_place(front: Front) -> None:
    """A live hold counts as a place: a full day is bookings and holds, and the refusal says how long to wait."""
    doctor = await front.doctor(max_patients_per_day=2)
    one, two = await front.people(2)
    booked = await front.book(one.id, doctor.id)
    held = await front.hold(doctor.id)
    assert (held.doctor_day.doctor_id, held.doctor_day.date, held.patient_id) == (doctor.id, day(today()), "")
    assert held.expire_time.ToDatetime() - held.create_time.ToDatetime() == timedelta(minutes=5)
    for call in (front.book(two.id, doctor.id), front.hold(doctor.id), front.hold(doctor.id, patient_id=two.id)):
        reason, metadata = told(await refusal(call))
        assert reason == "DAY_FULL"
        assert 290 < int(metadata["retry_after"]) <= 300
        assert metadata == {
            "doctor_id": doctor.id, "date": today().isoformat(), "held": "1", "retry_after": metadata["retry_after"],
        }  # fmt: skip
    await release(front, held.id)
    assert (await front.book(two.id, doctor.id)).revision == booked.revision + 1


async def test_a_full_day_without_holds_says_nothing_of_them(front: Front) -> None:
    """If bookings alone fill the day, the end of a hold would not help, so the refusal has neither count nor time."""
    doctor = await front.doctor(max_patients_per_day=2)
    people = await front.people(3)
    await front.hold(doctor.id)
    await front.book(people[0].id, doctor.id)
    fewer = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), max_patients=1)
    await front.doctors.SetDoctorAvailability(fewer)
    assert told(await refusal(front.book(people[1].id, doctor.id))) == (
        "DAY_FULL", {"doctor_id": doctor.id, "date": today().isoformat()},
    )  # fmt: skip


async def test_a_slot_is_held(front: Front) -> None:
    """A hold of a slot takes a place of the slot and of its day; the slot shows it, and is not offered as available."""
    doctor = await front.doctor(max_patients_per_day=3)
    slot = await front.slot(doctor.id, soon(), capacity=2)
    later = await front.slot(doctor.id, soon(2), capacity=3)
    people = await front.people(4)
    first, second = [await front.hold_slot(slot.id, ttl=Duration(seconds=ttl)) for ttl in (60, 1800)]
    assert (first.slot_id, first.HasField("doctor_day")) == (slot.id, False)
    shown = await slot_now(front, slot.id)
    assert (shown.booked_count, shown.held_count, shown.available_count, shown.etag) == (0, 2, 0, slot.etag)
    reason, metadata = told(await refusal(front.book_slot(people[0].id, slot.id)))
    assert (reason, metadata["held"], metadata["slot_id"]) == ("SLOT_FULL", "2", slot.id)
    assert 50 < int(metadata["retry_after"]) <= 60

    async def available() -> list[str]:
        request = slot_pb2.ListSlotsRequest(doctor_id=doctor.id, available_only=True)
        return [found.id for found in (await front.slots.ListSlots(request)).slots]

    assert await available() == [later.id]
    await front.book_slot(people[0].id, later.id)
    # Two held, one booked: the day has three places.
    assert await available() == []
    reason, metadata = told(await refusal(front.book_slot(people[1].id, later.id)))
    assert (reason, metadata["held"]) == ("DAY_FULL", "2")
    expire(front, first.id)
    assert await available() == [slot.id, later.id]
    shown = await slot_now(front, slot.id)
    assert (shown.held_count, shown.available_count) == (1, 1)
    await release(front, second.id)
    listed = await front.slots.ListSlots(slot_pb2.ListSlotsRequest(doctor_id=doctor.id))
    assert [(found.held_count, found.available_count) for found in listed.slots] == [(0, 2), (0, 2)]


async def test_a_held_place_is_no_way_in(front: Front) -> None:
    """An undo of a cancellation, a walk-in and a transfer are refused a held place, and told how long to wait."""
    doctor = await front.doctor(max_patients_per_day=1)
    other = await front.doctor(clinic_id=doctor.clinic_id)
    one, two = await front.people(2)
    booked = await front.book(one.id, doctor.id)
    cancelled = (await front.cancel(booked.appointment.id)).appointment
    arrived = (await front.arrive(other.id)).appointment
    held = await front.hold(doctor.id)
    transfer = queue_pb2.TransferPatientRequest(appointment_id=arrived.id, to_doctor_id=doctor.id)
    before = await front.standing(doctor.id), await front.standing(other.id)
    for call in (
        undo(front, cancelled), walk_in(front, doctor.id, two.id), front.queues.TransferPatient(transfer),
    ):  # fmt: skip
        reason, metadata = told(await refusal(call))
        assert (reason, metadata["doctor_id"], metadata["held"]) == ("DAY_FULL", doctor.id, "1")
        assert 0 < int(metadata["retry_after"]) <= 300
    assert (await front.standing(doctor.id), await front.standing(other.id)) == before
    await release(front, held.id)
    assert (await undo(front, cancelled)).appointment.state == pb.Appointment.STATE_BOOKED


async def test_a_held_slot_refuses_an_undo(front: Front) -> None:
    """A cancelled visit does not come back to the place of its slot that somebody holds now."""
    doctor, person = await front.doctor(), await front.patient()
    slot = await front.slot(doctor.id, soon())
    booked = await front.book_slot(person.id, slot.id)
    cancelled = (await front.cancel(booked.appointment.id)).appointment
    held = await front.hold_slot(slot.id)
    reason, metadata = told(await refusal(undo(front, cancelled)))
    assert (reason, metadata["slot_id"], metadata["held"]) == ("SLOT_FULL", slot.id, "1")
    assert 0 < int(metadata["retry_after"]) <= 300
    expire(front, held.id)
    assert (await undo(front, cancelled)).appointment.slot_id == slot.id


async def test_an_override_beside_a_hold(front: Front) -> None:
    """On a day that a hold alone fills, a walk-in by override gets a number above the capacity, on record."""
    doctor, person = await front.doctor(max_patients_per_day=1), await front.patient()
    await front.hold(doctor.id)
    over = (await walk_in(front, doctor.id, person.id, override_reason="fainted")).appointment
    assert (over.number, over.override_reason) == (2, "fainted")


async def test_a_hold_is_no_change_of_the_day(front: Front) -> None:
    """A hold, its release and its expiry count no revision; a use is told by the one of the booking."""
    doctor = await front.doctor()
    person = await front.patient()
    held, other = await front.hold(doctor.id), await front.hold(doctor.id)
    await release(front, other.id)
    expire(front, (await front.hold(doctor.id)).id)
    queue = await front.queue(doctor.id)
    assert (queue.revision, queue.expected_count) == (1, 0)
    booked = await front.book(person.id, doctor.id, hold_id=held.id)
    assert (booked.revision, booked.appointment.number) == (2, 1)
    rows = front.sql(
        "select type, revision, data ->> 'hold_id' from log where doctor_id = %s and type not like 'doctor.%%'"
        " order by id",
        doctor.id,
    )
    assert sorted(rows) == [
        ("appointment.booked", 2, held.id),
        ("hold.placed", 0, None), ("hold.placed", 0, None), ("hold.placed", 0, None),
        ("hold.released", 0, None),
    ]  # fmt: skip


async def test_a_hold_gets_its_place(front: Front) -> None:
    """With a hold only bookings count, not other holds; it is used once, and the number is the lowest free one."""
    doctor = await front.doctor(max_patients_per_day=2)
    one, two, three = await front.people(3)
    first, second = await front.hold(doctor.id), await front.hold(doctor.id)
    assert await outcome(front.book(one.id, doctor.id)) == "DAY_FULL"
    assert (await front.book(two.id, doctor.id, hold_id=second.id)).appointment.number == 1
    assert (await front.book(one.id, doctor.id, hold_id=first.id)).appointment.number == 2
    error = await refusal(front.book(three.id, doctor.id, hold_id=first.id))
    assert told(error)[0] == "HOLD_EXPIRED"
    assert told(error)[1]["state"] == "USED"


async def test_the_capacity_holds_for_a_hold(front: Front) -> None:
    """If the day's places are fewer now and booked, a hold does not sell one more; it stays live."""
    doctor = await front.doctor(max_patients_per_day=2)
    one, two = await front.people(2)
    held = await front.hold(doctor.id)
    await front.book(one.id, doctor.id)
    fewer = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), max_patients=1)
    await front.doctors.SetDoctorAvailability(fewer)
    error = await refusal(front.book(two.id, doctor.id, hold_id=held.id))
    assert told(error) == ("DAY_FULL", {"doctor_id": doctor.id, "date": today().isoformat()})
    fewer.max_patients = 2
    await front.doctors.SetDoctorAvailability(fewer)
    assert await outcome(front.book(two.id, doctor.id, hold_id=held.id)) == "OK"


async def test_absence_and_block_refuse_a_hold(front: Front) -> None:
    """A hold does not open what is closed meanwhile: absence and a blocked slot refuse its use, and it stays live."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon())
    one, two = await front.people(2)
    of_day, of_slot = await front.hold(doctor.id, tomorrow()), await front.hold_slot(slot.id)
    await front.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id]))
    absent = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), is_present=False)
    await front.doctors.SetDoctorAvailability(absent)
    assert await outcome(front.book_slot(one.id, slot.id, hold_id=of_slot.id)) == "SLOT_BLOCKED"
    assert await outcome(front.book(two.id, doctor.id, tomorrow(), hold_id=of_day.id)) == "DOCTOR_ABSENT"
    assert await outcome(front.hold(doctor.id, tomorrow())) == "DOCTOR_ABSENT"
    assert await outcome(front.hold_slot(slot.id)) == "SLOT_BLOCKED"
    absent.is_present = True
    await front.doctors.SetDoctorAvailability(absent)
    await front.slots.ReleaseSlots(slot_pb2.ReleaseSlotsRequest(slot_ids=[slot.id]))
    assert await outcome(front.book_slot(one.id, slot.id, hold_id=of_slot.id)) == "OK"
    assert await outcome(front.book(two.id, doctor.id, tomorrow(), hold_id=of_day.id)) == "OK"


async def test_leave_refuses_a_hold(front: Front) -> None:
    """During leave of the day or of the hours nothing is held, and a hold from before is not used; it stays live."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon(24))
    one, two = await front.people(2)
    of_day, of_slot = await front.hold(doctor.id, tomorrow()), await front.hold_slot(slot.id)
    leaves = [(await front.leave(doctor.id, *period)).leave for period in ((tomorrow(),), (soon(24), soon(24.25)))]
    for call in (front.hold(doctor.id, tomorrow()), front.book(one.id, doctor.id, tomorrow(), hold_id=of_day.id)):
        reason, metadata = told(await refusal(call))
        assert (reason, metadata["cause"]) == ("DOCTOR_ABSENT", "LEAVE")
    for call in (front.hold_slot(slot.id), front.book_slot(two.id, slot.id, hold_id=of_slot.id)):
        assert await outcome(call) == "SLOT_BLOCKED"
    for leave in leaves:
        await front.schedules.CancelLeave(schedule_pb2.CancelLeaveRequest(leave_id=leave.id))
    assert await outcome(front.book(one.id, doctor.id, tomorrow(), hold_id=of_day.id)) == "OK"
    assert await outcome(front.book_slot(two.id, slot.id, hold_id=of_slot.id)) == "OK"


async def test_the_seconds_are_rounded_up(at: Clock) -> None:
    """A refusal tells the seconds to the first expiry, rounded up: who comes back then finds the place free."""
    async with at("2027-01-04 08:00+00") as front:
        doctor = await front.doctor("UTC", max_patients_per_day=2)
        for ttl in (Duration(seconds=600), Duration(seconds=90, nanos=1000)):
            await front.hold(doctor.id, date(2027, 1, 5), ttl=ttl)
        person = await front.patient()
        _, metadata = told(await refusal(front.book(person.id, doctor.id, date(2027, 1, 5))))
        assert (metadata["held"], metadata["retry_after"]) == ("2", "91")
    async with at("2027-01-04 08:01:31+00") as front:
        assert await outcome(front.book(person.id, doctor.id, date(2027, 1, 5))) == "OK"


async def test_the_refusals_come_in_order(front: Front) -> None:
    """An unknown hold, then one of another place or patient, then an ended one; all before the booking's refusals."""
    doctor, other = await front.doctor(), await front.doctor()
    slot = await front.slot(doctor.id, soon())
    one, two = await front.people(2)
    mine = await front.hold(doctor.id, tomorrow(), patient_id=one.id)
    of_slot = await front.hold_slot(slot.id)
    assert told(await refusal(front.book(one.id, doctor.id, hold_id=UNKNOWN)))[0] == "HOLD_NOT_FOUND"
    for ended in (False, True):
        if ended:
            expire(front, mine.id)
            await release(front, of_slot.id)
        for call in (
            front.book(two.id, doctor.id, tomorrow(), hold_id=mine.id),
            front.book(one.id, other.id, tomorrow(), hold_id=mine.id),
            front.book(one.id, doctor.id, today(), hold_id=mine.id),
            front.book(one.id, doctor.id, today() - timedelta(days=1), hold_id=mine.id),
            front.book_slot(one.id, slot.id, hold_id=mine.id),
            front.book_slot(one.id, UNKNOWN, hold_id=mine.id),
            front.book(one.id, doctor.id, tomorrow(), hold_id=of_slot.id),
            front.book(UNKNOWN, doctor.id, tomorrow(), hold_id=mine.id),
        ):
            error = await refusal(call)
            assert told(error)[0] == "HOLD_MISMATCH"
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    for call, hold, state in (
        (front.book(one.id, doctor.id, tomorrow(), hold_id=mine.id), mine, "EXPIRED"),
        (front.book_slot(UNKNOWN, slot.id, hold_id=of_slot.id), of_slot, "RELEASED"),
    ):
        reason, metadata = told(await refusal(call))
        assert (reason, metadata["hold_id"], metadata["state"]) == ("HOLD_EXPIRED", hold.id, state)


async def test_a_dry_run_and_a_refusal_leave_the_hold(front: Front) -> None:
    """validate_only answers what a booking with the hold would get, and a refused booking uses nothing up."""
    doctor = await front.doctor(max_patients_per_day=1)
    one, inactive = await front.people(2)
    changed = patient_pb2.Patient(id=inactive.id, active=False)
    await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))
    held = await front.hold(doctor.id)
    dry = await front.book(one.id, doctor.id, hold_id=held.id, validate_only=True)
    assert (dry.appointment.number, dry.appointment.id) == (1, "")
    assert await outcome(front.book(one.id, doctor.id, validate_only=True)) == "DAY_FULL"
    assert await outcome(front.book(inactive.id, doctor.id, hold_id=held.id)) == "PATIENT_INACTIVE"
    assert await outcome(front.book(UNKNOWN, doctor.id, hold_id=held.id)) == "PATIENT_NOT_FOUND"
    assert await outcome(front.book(one.id, doctor.id, hold_id=held.id)) == "OK"


async def test_a_move_uses_a_hold(front: Front) -> None:
    """A reschedule takes the held place, and gives the old one up; a refused one leaves appointment and hold."""
    doctor = await front.doctor(max_patients_per_day=1)
    one, two = await front.people(2)
    visit = (await front.book(one.id, doctor.id)).appointment
    held = await front.hold(doctor.id, tomorrow())
    assert await outcome(move(front, visit.id, doctor.id, tomorrow())) == "DAY_FULL"
    assert await outcome(move(front, visit.id, doctor.id, today(), hold_id=held.id)) == "HOLD_MISMATCH"
    assert await outcome(move(front, visit.id, doctor.id, tomorrow(), hold_id=held.id, etag="9")) == "ETAG_MISMATCH"
    moved = await move(front, visit.id, doctor.id, tomorrow(), hold_id=held.id, idempotency_key="k")
    assert (moved.appointment.date, moved.appointment.number) == (day(tomorrow()), 1)
    again = await move(front, visit.id, doctor.id, tomorrow(), hold_id=held.id, idempotency_key="k")
    assert (again.replayed, again.revision) == (True, moved.revision)
    assert await outcome(front.book(two.id, doctor.id)) == "OK"
    assert told(await refusal(move(front, visit.id, doctor.id, tomorrow(), hold_id=held.id)))[1]["state"] == "USED"


async def test_the_refusals_of_a_move(front: Front) -> None:
    """A move is refused an unknown hold, that of another patient, also an ended one, and an ended hold."""
    doctor = await front.doctor()
    one, two = await front.people(2)
    visit = (await front.book(one.id, doctor.id)).appointment
    theirs = await front.hold(doctor.id, tomorrow(), patient_id=two.id)
    ended = await front.hold(doctor.id, tomorrow())
    await release(front, ended.id)
    for hold, expected in ((UNKNOWN, "HOLD_NOT_FOUND"), (theirs.id, "HOLD_MISMATCH"), (ended.id, "HOLD_EXPIRED")):
        reason, metadata = told(await refusal(move(front, visit.id, doctor.id, tomorrow(), hold_id=hold)))
        assert (reason, metadata["hold_id"]) == (expected, hold)
    expire(front, theirs.id)
    assert await outcome(move(front, visit.id, doctor.id, tomorrow(), hold_id=theirs.id)) == "HOLD_MISMATCH"
    assert await front.appointment(visit.id) == visit


async def test_one_hold_of_a_patient_on_a_day(front: Front) -> None:
    """A patient's hold of a slot is the one of its doctor-day: no other slot and no place of the day can be held."""
    doctor, person = await front.doctor(), await front.patient()
    slots = [await front.slot(doctor.id, soon(n)) for n in (1, 2)]
    held = await front.hold_slot(slots[0].id, patient_id=person.id)
    for call in (
        front.hold_slot(slots[1].id, patient_id=person.id), front.hold(doctor.id, tomorrow(), patient_id=person.id),
    ):  # fmt: skip
        reason, metadata = told(await refusal(call))
        assert (reason, metadata["hold_id"]) == ("DUPLICATE_BOOKING", held.id)


async def test_a_patients_hold(front: Front) -> None:
    """With a patient a hold makes booking's refusals at once, and a patient has one live hold on a doctor-day."""
    doctor, other = await front.doctor(max_patients_per_day=2), await front.doctor()
    slot, same_time = await front.slot(doctor.id, soon()), await front.slot(other.id, soon())
    one, two, inactive = await front.people(3)
    changed = patient_pb2.Patient(id=inactive.id, active=False)
    await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))
    assert await outcome(front.hold(doctor.id, patient_id=UNKNOWN)) == "PATIENT_NOT_FOUND"
    assert await outcome(front.hold(doctor.id, patient_id=inactive.id)) == "PATIENT_INACTIVE"
    booked = (await front.book_slot(one.id, slot.id)).appointment
    assert details(await refusal(front.hold(doctor.id, tomorrow(), patient_id=one.id)))[
        "ResourceInfo"
    ].resource_name == (booked.id)
    assert await outcome(front.hold_slot(same_time.id, patient_id=one.id)) == "PATIENT_OVERLAP"
    held = await front.hold(doctor.id, tomorrow(), patient_id=two.id)
    # Also when the day is full.
    reason, metadata = told(await refusal(front.hold(doctor.id, tomorrow(), patient_id=two.id)))
    assert (reason, metadata["hold_id"], metadata["date"]) == ("DUPLICATE_BOOKING", held.id, tomorrow().isoformat())
    assert await outcome(front.hold(other.id, tomorrow(), patient_id=two.id)) == "OK"
    assert await outcome(front.hold(doctor.id, today(), patient_id=two.id)) == "OK"
    expire(front, held.id)
    again = await front.hold(doctor.id, tomorrow(), patient_id=two.id)
    assert (await front.book(two.id, doctor.id, tomorrow(), hold_id=again.id)).appointment.number == 2


@pytest.mark.parametrize("kind", ["day", "slot"])
async def test_fifty_ask_for_the_last_place(front: Front, kind: str) -> None:
    """When fifty ask at once to hold the last place, one gets it."""
    doctor = await front.doctor(max_patients_per_day=1 if kind == "day" else 10)
    slot = await front.slot(doctor.id, soon())

    def ask() -> Any:
        return front.hold(doctor.id, tomorrow()) if kind == "day" else front.hold_slot(slot.id)

    outcomes = await asyncio.gather(*(outcome(ask()) for _ in range(50)))
    assert Counter(outcomes) == {"OK": 1, "DAY_FULL" if kind == "day" else "SLOT_FULL": 49}


async def test_one_hold_of_a_patient_at_once(front: Front) -> None:
    """When a patient asks twenty times at once to hold on one doctor-day, he gets one hold."""
    doctor, patient = await front.doctor(), await front.patient()
    outcomes = await asyncio.gather(*(outcome(front.hold(doctor.id, patient_id=patient.id)) for _ in range(20)))
    assert Counter(outcomes) == {"OK": 1, "DUPLICATE_BOOKING": 19}


async def test_one_use_of_a_hold(front: Front, conninfo: str, settings: Settings) -> None:
    """Of many who use one hold at once, on two workers, one is booked; the others are told that it was used."""
    async with serving(settings, conninfo) as (_, other):
        doctor = await front.doctor(max_patients_per_day=20)
        people = await front.people(20)
        held = await front.hold(doctor.id)
        calls = (
            outcome(desk.book(person.id, doctor.id, hold_id=held.id))
            for desk, person in zip([front, other] * 10, people, strict=True)
        )
        assert Counter(await asyncio.gather(*calls)) == {"OK": 1, "HOLD_EXPIRED": 19}


async def test_two_workers_see_one_hold(front: Front, conninfo: str, settings: Settings) -> None:
    """A hold that one worker made counts for the other, which can use it."""
    async with serving(settings, conninfo) as (_, other):
        doctor = await front.doctor(max_patients_per_day=1)
        one, two = await front.people(2)
        held = await front.hold(doctor.id)
        assert await outcome(other.book(one.id, doctor.id)) == "DAY_FULL"
        assert await outcome(other.book(two.id, doctor.id, hold_id=held.id)) == "OK"


async def test_use_against_expiry(front: Front) -> None:
    """While a hold of the only place runs out, its user and somebody without one race: one of them gets the place."""
    doctors = [await front.doctor(max_patients_per_day=1) for _ in range(12)]

    async def without(patient_id: str, doctor_id: str) -> str:
        while True:
            try:
                await front.book(patient_id, doctor_id)
            except grpc.aio.AioRpcError as error:
                reason, metadata = told(error)
                if "held" not in metadata:
                    return reason
            else:
                return "OK"

    for milliseconds, doctor in enumerate(doctors):
        mine, theirs = await front.people(2)
        held = await front.hold(doctor.id, patient_id=mine.id)
        front.sql(
            "update hold set create_time = create_time - interval '1 h',"
            " expire_time = clock_timestamp() + make_interval(secs => %s / 1000.0) where id = %s",
            milliseconds,
            held.id,
        )
        found = await asyncio.gather(
            outcome(front.book(mine.id, doctor.id, hold_id=held.id)), without(theirs.id, doctor.id)
        )
        assert tuple(found) in (("OK", "DAY_FULL"), ("HOLD_EXPIRED", "OK"))
    assert front.sql("select count(*) from appointment") == [(12,)]


async def test_the_instant_of_expiry(front: Front) -> None:
    """At `expire_time` a hold is over; a microsecond before it is live."""
    doctor = await front.doctor()
    held = await front.hold(doctor.id)

    def live(microseconds: int) -> bool:
        ((count,),) = front.sql(
            "select count(*) from hold h,"
            " live_holds(h.doctor_id, h.date, h.expire_time + %s * interval '1 microsecond') where h.id = %s",
            microseconds,
            held.id,
        )
        ((refused,),) = front.sql(
            "select (hold_refusal(h.id, null, h.doctor_id, h.date, null,"
            " h.expire_time + %s * interval '1 microsecond')).state from hold h where h.id = %s",
            microseconds,
            held.id,
        )
        assert refused == (None if count else "EXPIRED")
        return bool(count)

    assert [live(n) for n in (-1, 0, 1)] == [True, False, False]


async def test_bad_times(front: Front) -> None:
    """A hold lasts from 30 s to 30 min; a ttl of nothing, of less than nothing or of a day is refused."""
    doctor = await front.doctor()
    for ttl in (0, -1, 29, 1801, 86400, 315576000000):
        error = await refusal(front.hold(doctor.id, ttl=Duration(seconds=ttl)))
        assert reason_of(error) == "INVALID_FIELD"
        assert details(error)["BadRequest"].field_violations[0].field == "ttl"
    assert await outcome(front.hold(doctor.id, ttl=Duration(seconds=1800, nanos=1))) == "INVALID_FIELD"
    assert await outcome(front.hold(doctor.id, ttl=Duration(seconds=60, nanos=-1))) == "INVALID_FIELD"
    for ttl in (30, 1800):
        held = await front.hold(doctor.id, ttl=Duration(seconds=ttl))
        assert held.expire_time.ToDatetime() - held.create_time.ToDatetime() == timedelta(seconds=ttl)


async def test_bad_places(front: Front) -> None:
    """A hold needs one place that exists, in the future; it is refused as a booking of it would be."""
    doctor, retired = await front.doctor(), await front.doctor(active=False)
    slot = await front.slot(doctor.id, soon())
    front.sql("update slot set start_time = moment() - interval '1 h', end_time = moment(), date = %s", today())
    assert await outcome(front.hold(doctor.id, today() - timedelta(days=1))) == "DATE_IN_PAST"
    assert await outcome(front.hold_slot(slot.id)) == "SLOT_IN_PAST"
    assert await outcome(front.hold(UNKNOWN)) == "DOCTOR_NOT_FOUND"
    assert await outcome(front.hold_slot(UNKNOWN)) == "SLOT_NOT_FOUND"
    assert await outcome(front.hold(retired.id)) == "DOCTOR_INACTIVE"
    for request in (
        pb.HoldPlaceRequest(),
        pb.HoldPlaceRequest(slot_id="x"),
        pb.HoldPlaceRequest(doctor_day=pb.DoctorDay(doctor_id=doctor.id)),
        pb.HoldPlaceRequest(slot_id=slot.id, patient_id="x"),
    ):
        assert await outcome(front.appointments.HoldPlace(request)) == "INVALID_FIELD"
    assert await outcome(front.book(UNKNOWN, doctor.id, hold_id="x")) == "INVALID_FIELD"
    assert await outcome(release(front, UNKNOWN)) == "HOLD_NOT_FOUND"


async def test_a_release_of_an_ended_hold(front: Front) -> None:
    """Releasing a hold that has ended succeeds and changes nothing: a used one does not give up its booking."""
    doctor = await front.doctor(max_patients_per_day=3)
    person = await front.patient()
    used, released, expired = [await front.hold(doctor.id) for _ in range(3)]
    await front.book(person.id, doctor.id, hold_id=used.id)
    await release(front, released.id)
    expire(front, expired.id)
    before = front.sql("select count(*) from log")
    for hold in (used, released, expired):
        assert await outcome(release(front, hold.id)) == "OK"
    assert front.sql("select count(*) from log") == before
    states = front.sql("select state from hold order by id")
    assert states == [("USED",), ("RELEASED",), ("HELD",)]


async def test_a_replay_of_a_hold(front: Front) -> None:
    """The same key answers the first hold, also when it has ended, and holds nothing more."""
    doctor = await front.doctor(max_patients_per_day=1)
    request = pb.HoldPlaceRequest(
        doctor_day=pb.DoctorDay(doctor_id=doctor.id, date=day(today())), idempotency_key="k", ttl=Duration(seconds=60)
    )
    answers = await asyncio.gather(*(front.appointments.HoldPlace(request) for _ in range(10)))
    assert len({answer.hold.id for answer in answers}) == 1
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 9
    await release(front, answers[0].hold.id)
    again = await front.appointments.HoldPlace(request)
    assert (again.hold, again.replayed) == (answers[0].hold, True)
    assert await outcome(front.book((await front.patient()).id, doctor.id, hold_id=again.hold.id)) == "HOLD_EXPIRED"
    assert await outcome(front.book((await front.patient()).id, doctor.id)) == "OK"
    request.ttl.seconds = 90
    assert await outcome(front.appointments.HoldPlace(request)) == "IDEMPOTENCY_KEY_REUSED"


async def test_a_held_slot_is_not_changed(front: Front) -> None:
    """A held slot is not deleted, not moved, and not made smaller than what is booked and held."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon(), capacity=3)
    held = await front.hold_slot(slot.id)
    await front.book_slot((await front.patient()).id, slot.id)

    def change(**fields: Any) -> Any:
        return front.slots.UpdateSlot(slot_pb2.UpdateSlotRequest(slot=slot_pb2.Slot(id=slot.id, **fields)))

    later = slot_pb2.Slot(id=slot.id)
    later.end_time.FromDatetime(soon(2))
    numbers = {"slot_id": slot.id, "booked_count": "1", "held": "1"}
    assert told(await refusal(change(capacity=1))) == ("SLOT_HAS_BOOKINGS", numbers)
    assert await outcome(change(capacity=2)) == "OK"
    delete = slot_pb2.DeleteSlotRequest(slot_id=slot.id)
    assert told(await refusal(front.slots.DeleteSlot(delete))) == (
        "SLOT_HAS_BOOKINGS",
        {"slot_id": slot.id, "held": "1"},
    )
    ((visit,),) = front.sql("select id::text from appointment")
    await front.cancel(visit)
    for call in (front.slots.UpdateSlot(slot_pb2.UpdateSlotRequest(slot=later)), front.slots.DeleteSlot(delete)):
        reason, metadata = told(await refusal(call))
        assert (reason, metadata["held"]) == ("SLOT_HAS_BOOKINGS", "1")
    expire(front, held.id)
    assert await outcome(front.slots.UpdateSlot(slot_pb2.UpdateSlotRequest(slot=later))) == "OK"
    assert await outcome(front.slots.DeleteSlot(delete)) == "OK"


async def test_a_merge_takes_the_holds_along(front: Front) -> None:
    """The kept patient gets the merged one's live holds, and one of two on a doctor-day; either id books with them."""
    doctor, other = await front.doctor(max_patients_per_day=2), await front.doctor()
    kept, merged = await front.people(2)
    double = await front.hold(doctor.id, patient_id=kept.id)
    second = await front.hold(doctor.id, patient_id=merged.id)
    alone = await front.hold(other.id, patient_id=merged.id)
    request = patient_pb2.MergePatientsRequest(keep_patient_id=kept.id, merge_patient_id=merged.id)
    await front.patients.MergePatients(request)
    assert told(await refusal(front.book(kept.id, doctor.id, hold_id=second.id)))[1]["state"] == "RELEASED"
    assert told(await refusal(front.hold(other.id, patient_id=kept.id)))[1]["hold_id"] == alone.id
    assert (await front.book(merged.id, other.id, hold_id=alone.id)).appointment.patient_id == kept.id
    assert await outcome(front.book(kept.id, doctor.id, hold_id=double.id)) == "OK"
    assert await outcome(front.hold(doctor.id)) == "OK"


async def test_merges_and_uses_at_once(front: Front) -> None:
    """A patient who books with a hold while two records are made one is booked once, or told that he has no hold."""
    doctor = await front.doctor(max_patients_per_day=8)
    for _ in range(8):
        kept, merged = await front.people(2)
        held = await front.hold(doctor.id, patient_id=merged.id)
        request = patient_pb2.MergePatientsRequest(keep_patient_id=kept.id, merge_patient_id=merged.id)
        found = await asyncio.gather(
            outcome(front.patients.MergePatients(request)),
            outcome(front.book(merged.id, doctor.id, hold_id=held.id)),
        )
        assert list(found) == ["OK", "OK"]
    assert front.sql("select count(*), count(distinct patient_id) from appointment") == [(8, 8)]


@asynccontextmanager
async def guarded(front: Front, settings: Settings) -> AsyncIterator[Front]:
    """A desk on the same database that asks for credentials."""
    async with serving(settings, front.conninfo, access="required") as (_, desk):
        yield desk


async def test_who_may(front: Front, conninfo: str, settings: Settings) -> None:
    """A patient holds for himself alone; another's hold is to him an unknown one, and staff keep to their clinics."""
    doctor, elsewhere = await front.doctor(), await front.doctor()
    me, other = await front.people(2)
    theirs = await front.hold(doctor.id, patient_id=other.id)
    anybodys = await front.hold(doctor.id)
    async with guarded(front, settings) as desk:
        patient = user(desk, "PATIENT", patient_id=me.id)
        staff = bearing((await create_key(front, "STAFF", clinic_ids=[doctor.clinic_id])).key)
        board = bearing((await create_key(front, "BOARD")).key)

        async def hold(by: Metadata, doctor_id: str, on: date, **fields: Any) -> pb.Hold:
            target = pb.DoctorDay(doctor_id=doctor_id, date=day(on))
            request = pb.HoldPlaceRequest(doctor_day=target, **fields)
            return (await desk.appointments.HoldPlace(request, metadata=by)).hold

        def release_by(by: Metadata, hold_id: str) -> Any:
            return desk.appointments.ReleaseHold(pb.ReleaseHoldRequest(hold_id=hold_id), metadata=by)

        mine = await hold(patient, doctor.id, today())
        assert mine.patient_id == me.id
        assert await outcome(hold(patient, doctor.id, today())) == "DUPLICATE_BOOKING"
        assert await outcome(hold(patient, doctor.id, tomorrow(), patient_id=other.id)) == "PATIENT_NOT_FOUND"
        for hidden in (theirs.id, anybodys.id, UNKNOWN):
            assert await outcome(release_by(patient, hidden)) == "HOLD_NOT_FOUND"
        assert await outcome(hold(staff, elsewhere.id, today())) == "CLINIC_NOT_YOURS"
        assert await outcome(hold(board, doctor.id, today())) == "ROLE_REQUIRED"
        assert await outcome(release_by(staff, (await front.hold(elsewhere.id)).id)) == "CLINIC_NOT_YOURS"
        assert await outcome(release_by(staff, UNKNOWN)) == "HOLD_NOT_FOUND"
        assert await outcome(release_by(staff, theirs.id)) == "OK"
        assert await outcome(release_by(patient, mine.id)) == "OK"
        assert await outcome(hold(patient, doctor.id, today())) == "OK"


async def test_dead_holds_are_deleted(front: Front) -> None:
    """Maintenance deletes holds a week after their end; a younger one is still told from an unknown one."""
    doctor, person = await front.doctor(), await front.patient()
    old, young = await front.hold(doctor.id), await front.hold(doctor.id)
    for hold, days in ((old, 8), (young, 6)):
        front.sql(
            "update hold set create_time = create_time - make_interval(days => %s),"
            " expire_time = expire_time - make_interval(days => %s) where id = %s",
            days,
            days,
            hold.id,
        )
    db = Database(front.conninfo, pool_size=1)
    await db.open()
    await clean(db, keep_keys_seconds=3 * 86400, keep_audit_seconds=86400)
    await db.close()
    assert await outcome(front.book(person.id, doctor.id, hold_id=old.id)) == "HOLD_NOT_FOUND"
    assert await outcome(front.book(person.id, doctor.id, hold_id=young.id)) == "HOLD_EXPIRED"


async def test_many_dead_holds_do_not_slow_a_booking(front: Front) -> None:
    """Expired holds of the same day are not looked at: the index leads past them."""
    doctor = await front.doctor()
    front.sql(
        "insert into hold (doctor_id, clinic_id, date, expire_time, create_time)"
        " select %s, %s, %s, moment() - n * interval '1 s', moment() - interval '1 day'"
        " from generate_series(1, 5000) n",
        doctor.id,
        doctor.clinic_id,
        today(),
    )
    front.sql("analyze hold")
    (plan,) = front.sql(
        "explain (analyze, format json) select count(*) from live_holds(%s, %s, now())", doctor.id, today()
    )[0]
    assert "hold_live_idx" in str(plan)
    assert "Rows Removed by Filter" not in str(plan)
    assert await outcome(front.book((await front.patient()).id, doctor.id)) == "OK"
