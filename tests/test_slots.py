"""Slots: no two of one doctor overlap, and each lies within one civil day of the clinic."""

import asyncio
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import psycopg
import pytest

from clinic.frontdesk.v1 import appointment_pb2, doctor_pb2
from clinic.frontdesk.v1 import slot_pb2 as pb
from tests.clinic import ZONE, Front, day, details, outcome, refusal, soon, tomorrow


def wanted(doctor_id: str, start: datetime, end: datetime, capacity: int = 0) -> pb.Slot:
    slot = pb.Slot(doctor_id=doctor_id, capacity=capacity)
    slot.start_time.FromDatetime(start)
    slot.end_time.FromDatetime(end)
    return slot


async def create(front: Front, *slots: pb.Slot) -> list[pb.Slot]:
    return list((await front.slots.BatchCreateSlots(pb.BatchCreateSlotsRequest(slots=slots))).slots)


def _of(patient_id: str) -> appointment_pb2.ListAppointmentsRequest:
    return appointment_pb2.ListAppointmentsRequest(patient_id=patient_id)


async def test_half_open(front: Front) -> None:
    """One slot may start when another of the doctor ends, but not a minute earlier; other doctors do not matter."""
    doctor, other = await front.doctor(), await front.doctor()
    at = soon()
    first = await front.slot(doctor.id, at)
    assert await outcome(front.slot(doctor.id, at + timedelta(minutes=30))) == "OK"
    error = await refusal(front.slot(doctor.id, at + timedelta(minutes=29)))
    assert details(error)["ResourceInfo"].resource_name == first.id
    assert await outcome(front.slot(other.id, at)) == "OK"
    assert (first.capacity, first.available_count, first.state) == (1, 1, pb.Slot.STATE_OPEN)
    assert first.date == day(tomorrow())


async def test_a_race_for_one_time(front: Front) -> None:
    """Of twenty simultaneous calls that create the same slot, one succeeds."""
    doctor = await front.doctor()
    outcomes = await asyncio.gather(*(outcome(front.slot(doctor.id, soon())) for _ in range(20)))
    assert sorted(outcomes) == ["OK"] + ["SLOT_OVERLAP"] * 19


async def test_overlap_stands_behind_the_check(front: Front) -> None:
    """The database refuses overlapping slots of one doctor even from a writer that does not check."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon())
    with pytest.raises(psycopg.errors.ExclusionViolation, match="slot_doctor_overlap"):
        front.sql(
            "insert into slot (doctor_id, clinic_id, date, start_time, end_time)"
            " select doctor_id, clinic_id, date, start_time + interval '1 minute', end_time from slot where id = %s",
            slot.id,
        )


async def test_all_or_none(front: Front) -> None:
    """A batch with one impossible slot creates none, and the refusal says which one."""
    doctor = await front.doctor()
    at = [soon(hours) for hours in (0, 1, 2)]
    good = [wanted(doctor.id, start, start + timedelta(minutes=30)) for start in at]
    bad = wanted(doctor.id, at[1] + timedelta(minutes=10), at[1] + timedelta(minutes=20))
    error = await refusal(create(front, *good, bad))
    assert details(error)["ErrorInfo"].reason == "SLOT_OVERLAP"
    assert details(error)["ErrorInfo"].metadata["index"] == "3"
    assert front.sql("select count(*) from slot") == [(0,)]
    made = await create(front, *reversed(good))
    assert [slot.start_time for slot in made] == [slot.start_time for slot in reversed(good)]
    assert await outcome(create(front)) == "INVALID_FIELD"
    many = [wanted(doctor.id, soon(5) + timedelta(minutes=n), soon(5) + timedelta(minutes=n + 1)) for n in range(501)]
    assert await outcome(create(front, *many)) == "INVALID_FIELD"
    assert len(await create(front, *many[:500])) == 500


async def test_one_civil_day(front: Front) -> None:
    """A slot may end at the clinic's midnight, but not later; it must be in the future."""
    doctor = await front.doctor()
    midnight = datetime.combine(tomorrow() + timedelta(days=1), datetime.min.time(), ZoneInfo(ZONE))
    late = wanted(doctor.id, midnight - timedelta(minutes=30), midnight)
    over = wanted(doctor.id, midnight - timedelta(minutes=30), midnight + timedelta(minutes=1))
    assert await outcome(create(front, over)) == "INVALID_FIELD"
    (slot,) = await create(front, late)
    assert slot.date == day(tomorrow())
    now = datetime.now(UTC)
    assert (
        await outcome(create(front, wanted(doctor.id, now - timedelta(minutes=2), now - timedelta(minutes=1))))
        == "SLOT_IN_PAST"
    )


async def test_the_hour_that_comes_twice(front: Front) -> None:
    """When clocks go back, 01:30 exists twice: the instants distinguish the two slots."""
    doctor = await front.doctor(zone="America/New_York")
    # 2040-11-04: daylight saving time ends at 06:00 UTC.
    first = datetime(2040, 11, 4, 5, 30, tzinfo=UTC)
    second = first + timedelta(hours=1)
    zone = ZoneInfo("America/New_York")
    assert first.astimezone(zone).time() == second.astimezone(zone).time()
    slots = await create(front, *(wanted(doctor.id, start, start + timedelta(minutes=30)) for start in (first, second)))
    assert [slot.date.day for slot in slots] == [4, 4]


async def test_list_available(front: Front) -> None:
    """An available slot is open, in the future, with a place in slot and doctor-day, and the doctor present."""
    doctor = await front.doctor(specialty="Cardiology", max_patients_per_day=2)
    free, taken, blocked = [await front.slot(doctor.id, soon(hours)) for hours in (0, 1, 2)]
    (one, two) = await front.people(2)
    await front.book_slot(one.id, taken.id)
    await front.slots.BlockSlots(pb.BlockSlotsRequest(slot_ids=[blocked.id], block_reason="cleaning"))

    async def listed(**fields: object) -> list[str]:
        answer = await front.slots.ListSlots(pb.ListSlotsRequest(doctor_id=doctor.id, **fields))  # type: ignore[arg-type]
        return [slot.id for slot in answer.slots]

    assert await listed() == [free.id, taken.id, blocked.id]
    assert await listed(available_only=True) == [free.id]
    assert await listed(available_only=True, specialty="cardiology", clinic_id=doctor.clinic_id) == [free.id]
    assert await listed(specialty="CARDIOLOGY", clinic_id=doctor.clinic_id) == [free.id, taken.id, blocked.id]
    assert await listed(specialty="Dermatology") == []
    assert await listed(start_time_from=taken.start_time, start_time_to=blocked.start_time) == [taken.id]
    released = await front.slots.ReleaseSlots(pb.ReleaseSlotsRequest(slot_ids=[blocked.id]))
    assert released.slots[0].block_reason == ""
    assert await listed(available_only=True) == [free.id, blocked.id]
    await front.book(two.id, doctor.id, tomorrow())
    assert await listed(available_only=True) == [], "the doctor-day is full"
    await front.cancel((await front.appointments.ListAppointments(_of(two.id))).appointments[0].id)
    assert await listed(available_only=True) == [free.id, blocked.id]
    await front.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), is_present=False)
    )
    assert await listed(available_only=True) == []


async def test_pages_of_slots(front: Front) -> None:
    """Pages of slots are ordered by start time and show each slot once."""
    doctor = await front.doctor()
    made = [await front.slot(doctor.id, soon(hours / 2)) for hours in (3, 1, 2, 0, 4)]
    request = pb.ListSlotsRequest(doctor_id=doctor.id, page_size=2)
    seen = []
    while True:
        page = await front.slots.ListSlots(request)
        seen += [slot.id for slot in page.slots]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == [made[index].id for index in (3, 1, 2, 0, 4)]


async def test_block_keeps_what_is_booked(front: Front) -> None:
    """A blocked slot keeps its bookings and takes no new ones; an unknown id among the ids blocks none."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon(), capacity=2)
    one, two = await front.people(2)
    booked = await front.book_slot(one.id, slot.id)
    nothing = "0190a0b0-1111-7222-8333-444455556666"
    assert await outcome(front.slots.BlockSlots(pb.BlockSlotsRequest(slot_ids=[slot.id, nothing]))) == "SLOT_NOT_FOUND"
    assert await outcome(front.book_slot(two.id, slot.id, validate_only=True)) == "OK"
    answer = await front.slots.BlockSlots(pb.BlockSlotsRequest(slot_ids=[slot.id]))
    assert (answer.slots[0].state, answer.slots[0].booked_count) == (pb.Slot.STATE_BLOCKED, 1)
    assert await outcome(front.book_slot(two.id, slot.id)) == "SLOT_BLOCKED"
    assert (await front.appointment(booked.appointment.id)).slot_id == slot.id


async def test_delete(front: Front) -> None:
    """A slot with a live booking is not deleted. Without one it is, and its cancelled booking stays in the history."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon())
    (patient,) = await front.people(1)
    booked = (await front.book_slot(patient.id, slot.id)).appointment
    delete = pb.DeleteSlotRequest(slot_id=slot.id)
    assert await outcome(front.slots.DeleteSlot(delete)) == "SLOT_HAS_BOOKINGS"
    await front.cancel(booked.id)
    assert await outcome(front.slots.DeleteSlot(pb.DeleteSlotRequest(slot_id=slot.id, etag="99"))) == "ETAG_MISMATCH"
    assert await outcome(front.slots.DeleteSlot(delete)) == "OK"
    assert await outcome(front.slots.GetSlot(pb.GetSlotRequest(slot_id=slot.id))) == "SLOT_NOT_FOUND"
    assert (await front.appointment(booked.id)).slot_id == slot.id
