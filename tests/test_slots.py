"""Slots: no two of one doctor overlap, and each lies within one civil day of the clinic."""

import asyncio
from collections.abc import Awaitable
from datetime import UTC, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2
from clinic.frontdesk.v1 import slot_pb2 as pb
from tests.clinic import ZONE, Front, day, details, outcome, reason_of, refusal, soon, today, tomorrow


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


async def test_refusals_of_a_batch_name_the_slot(front: Front) -> None:
    """Every refusal about one slot of a batch says which, and its ids are what their names say."""
    doctor, idle = await front.doctor(), await front.doctor()
    await front.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=idle.id, active=False)))
    hour = timedelta(hours=1)
    good = wanted(doctor.id, soon(), soon() + hour)
    past = datetime.now(UTC) - 2 * hour
    unknown = "01890000-0000-7000-8000-000000000000"
    for bad, reason, subject in (
        (wanted(doctor.id, past, past + timedelta(minutes=1)), "SLOT_IN_PAST", {"doctor_id": doctor.id}),
        (wanted(unknown, soon(2), soon(3)), "DOCTOR_NOT_FOUND", {"doctor_id": unknown}),
        (wanted(idle.id, soon(2), soon(3)), "DOCTOR_INACTIVE", {"doctor_id": idle.id}),
        (wanted(doctor.id, soon() + hour / 2, soon(3)), "SLOT_OVERLAP", {}),
    ):
        error = await refusal(create(front, good, bad))
        info = details(error)["ErrorInfo"]
        assert (info.reason, dict(info.metadata)) == (reason, {**subject, "index": "1"})
    error = await refusal(front.slot(doctor.id, past))
    assert "slot_id" not in details(error)["ErrorInfo"].metadata
    slot = await front.slot(doctor.id, soon(5))
    for call in (
        front.slots.BlockSlots(pb.BlockSlotsRequest(slot_ids=[slot.id, unknown])),
        front.slots.ReleaseSlots(pb.ReleaseSlotsRequest(slot_ids=[slot.id, unknown])),
    ):
        error = await refusal(call)
        assert dict(details(error)["ErrorInfo"].metadata) == {"slot_id": unknown, "index": "1"}


async def test_blocking_names_the_bookings(front: Front) -> None:
    """Blocking slots answers whom it concerns, by start time; a replay answers the same."""
    doctor = await front.doctor()
    late, early = await front.slot(doctor.id, soon(2), capacity=2), await front.slot(doctor.id, soon(1))
    first, second, gone = [
        (await front.book_slot(person.id, slot)).appointment.id
        for person, slot in zip(await front.people(3), (late.id, early.id, late.id), strict=True)
    ]
    await front.cancel(gone)
    request = pb.BlockSlotsRequest(slot_ids=[late.id, early.id], idempotency_key="block")
    for replayed in (False, True):
        answer = await front.slots.BlockSlots(request)
        assert (answer.replayed, list(answer.affected_appointment_ids)) == (replayed, [second, first])
    assert (await front.appointment(first)).state == appointment_pb2.Appointment.STATE_BOOKED


async def test_a_range_that_ends_before_it_begins(front: Front) -> None:
    """A range of times or dates in the wrong order is refused; it does not read as "nothing is free"."""
    doctor = await front.doctor()
    request = pb.ListSlotsRequest(doctor_id=doctor.id)
    request.start_time_from.FromDatetime(soon(2))
    request.start_time_to.FromDatetime(soon(1))
    assert await outcome(front.slots.ListSlots(request)) == "INVALID_FIELD"
    request.start_time_to.FromDatetime(soon(2))
    assert await outcome(front.slots.ListSlots(request)) == "OK"
    dates = doctor_pb2.ListDoctorAvailabilityRequest(
        doctor_id=doctor.id, from_date=day(tomorrow()), to_date=day(today())
    )
    assert await outcome(front.doctors.ListDoctorAvailability(dates)) == "INVALID_FIELD"


def changed(slot: pb.Slot, start: datetime | None = None, end: datetime | None = None, **fields: Any) -> pb.Slot:
    """What UpdateSlot is asked for."""
    change = pb.Slot(id=slot.id, **fields)
    if start is not None:
        change.start_time.FromDatetime(start)
    if end is not None:
        change.end_time.FromDatetime(end)
    return change


async def test_update_slot(front: Front) -> None:
    """Capacity goes up, and down to the bookings; times change only while nobody is booked, as for new slots."""
    doctor = await front.doctor()
    slot, other = await front.slot(doctor.id, soon(1), capacity=2), await front.slot(doctor.id, soon(3))

    async def update(change: pb.Slot, *paths: str, **fields: Any) -> pb.UpdateSlotResponse:
        return await front.slots.UpdateSlot(
            pb.UpdateSlotRequest(slot=change, update_mask=FieldMask(paths=paths), **fields)
        )

    moved = await update(changed(slot, soon(1) + timedelta(days=1), soon(2) + timedelta(days=1)), idempotency_key="m")
    assert moved.slot.date == day(tomorrow() + timedelta(days=1))
    assert (moved.slot.capacity, moved.slot.etag) == (2, "2")
    assert (await update(changed(slot, soon(1), soon(2)), etag="2")).slot.date == slot.date
    replay = await update(changed(slot, soon(1) + timedelta(days=1), soon(2) + timedelta(days=1)), idempotency_key="m")
    assert (replay.replayed, replay.slot) == (True, moved.slot)

    assert await outcome(update(changed(slot, soon(3), soon(4)))) == "SLOT_OVERLAP"
    assert await outcome(update(changed(slot, end=soon(1)))) == "INVALID_FIELD"
    past = datetime.now(UTC) - timedelta(hours=1)
    assert await outcome(update(changed(slot, past))) in ("SLOT_IN_PAST", "INVALID_FIELD")
    assert await outcome(update(changed(slot, past, past + timedelta(seconds=1)))) in ("SLOT_IN_PAST", "INVALID_FIELD")
    assert await outcome(update(changed(slot, capacity=3), etag="1")) == "ETAG_MISMATCH"
    assert await outcome(update(changed(slot), "state")) == "INVALID_FIELD"
    assert await outcome(update(changed(slot, capacity=3), "start_time")) == "INVALID_FIELD"
    assert await outcome(update(pb.Slot(id="01890000-0000-7000-8000-000000000000", capacity=2))) == "SLOT_NOT_FOUND"

    people = await front.people(4)
    booked = [(await front.book_slot(person.id, slot.id)).appointment.id for person in people[:2]]
    assert await outcome(front.book_slot(people[2].id, slot.id)) == "SLOT_FULL"
    assert (await update(changed(slot, capacity=3))).slot.available_count == 1
    await front.book_slot(people[2].id, slot.id)
    error = await refusal(update(changed(slot, capacity=2)))
    assert details(error)["ErrorInfo"].metadata["booked_count"] == "3"
    await front.cancel(booked[0])
    assert (await update(changed(slot, capacity=2))).slot.available_count == 0
    assert await outcome(update(changed(slot, soon(5), soon(6)))) == "SLOT_HAS_BOOKINGS"
    assert (await update(changed(slot, soon(1), soon(2), capacity=4), "*")).slot.capacity == 4
    assert (await update(changed(other, soon(8), soon(9)))).slot.booked_count == 0


async def test_a_slot_moves_while_people_book_it(front: Front) -> None:
    """Bookings that race with a slot's move to another date are on the date where the slot is in the end."""
    doctor = await front.doctor(max_patients_per_day=50)
    slot = await front.slot(doctor.id, soon(1), capacity=20)
    people = await front.people(12)
    there = [soon(1), soon(1) + timedelta(days=1)]

    async def move(at: datetime) -> str:
        return await outcome(
            front.slots.UpdateSlot(pb.UpdateSlotRequest(slot=changed(slot, at, at + timedelta(minutes=30))))
        )

    async def book(patient_id: str) -> str:
        return await outcome(front.book_slot(patient_id, slot.id))

    outcomes = await asyncio.gather(*(move(there[n % 2]) for n in range(8)), *(book(person.id) for person in people))
    assert set(outcomes) <= {"OK", "SLOT_HAS_BOOKINGS", "CONFLICT"}
    now = (await front.slots.GetSlot(pb.GetSlotRequest(slot_id=slot.id))).slot
    request = appointment_pb2.ListAppointmentsRequest(slot_id=slot.id)
    found = (await front.appointments.ListAppointments(request)).appointments
    assert len(found) == now.booked_count == outcomes[8:].count("OK")
    assert {(a.date.day, a.start_time.seconds) for a in found} <= {(now.date.day, now.start_time.seconds)}


async def test_a_slot_belongs_to_its_clinic(front: Front) -> None:
    """When a doctor changes clinic, the slots of the old one stay there: its id, its zone, and whether it is active."""
    old, new = await front.clinic(), await front.clinic("Asia/Tokyo")
    doctor = await front.doctor(clinic_id=old.id)
    slot, second = await front.slot(doctor.id, soon(1)), await front.slot(doctor.id, soon(2))
    await front.doctors.UpdateDoctor(
        doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=doctor.id, clinic_id=new.id))
    )
    booked = (await front.book_slot((await front.patient()).id, slot.id)).appointment
    assert (booked.clinic_id, booked.date) == (old.id, slot.date)
    close = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=old.id, active=False))
    await front.clinics.UpdateClinic(close)
    assert await outcome(front.book_slot((await front.patient()).id, second.id)) == "CLINIC_INACTIVE"
    available = pb.ListSlotsRequest(doctor_id=doctor.id, available_only=True)
    assert not (await front.slots.ListSlots(available)).slots
    assert await outcome(front.book((await front.patient()).id, doctor.id, tomorrow("Asia/Tokyo"))) == "OK"


async def test_a_time_zone_in_use(front: Front) -> None:
    """A clinic's zone stays while slots or live slot visits lie ahead, and the refusal counts them."""
    clinic = await front.clinic("UTC")
    doctor = await front.doctor(clinic_id=clinic.id)
    start = datetime.combine(tomorrow("UTC"), time(10), UTC)
    slots = [await front.slot(doctor.id, start + timedelta(hours=n)) for n in range(2)]
    booked = (await front.book_slot((await front.patient()).id, slots[0].id)).appointment

    def move(zone: str) -> Awaitable[Any]:
        change = clinic_pb2.Clinic(id=clinic.id, time_zone=zone)
        return front.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=change))

    error = await refusal(move("Asia/Tokyo"))
    info = details(error)["ErrorInfo"]
    assert (error.code().name, info.reason) == ("FAILED_PRECONDITION", "TIME_ZONE_IN_USE")
    assert dict(info.metadata) == {"clinic_id": clinic.id, "slots": "2", "appointments": "1"}
    assert (await front.clinics.GetClinic(clinic_pb2.GetClinicRequest(clinic_id=clinic.id))).clinic == clinic
    assert await outcome(move("UTC")) == "OK"
    await front.cancel(booked.id)
    for slot in slots:
        await front.slots.DeleteSlot(pb.DeleteSlotRequest(slot_id=slot.id))
    await front.book((await front.patient()).id, doctor.id, tomorrow("UTC"))
    assert await outcome(move("Asia/Tokyo")) == "OK"


async def test_a_zone_does_not_change_under_new_slots(front: Front) -> None:
    """Slots that are created while the clinic's zone changes have their date by the zone that it has in the end."""
    clinic = await front.clinic("UTC")
    doctor = await front.doctor(clinic_id=clinic.id)
    start = datetime.combine(tomorrow("UTC"), time(20), UTC)

    async def move(zone: str) -> str:
        change = clinic_pb2.Clinic(id=clinic.id, time_zone=zone)
        return await outcome(front.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=change)))

    async def open_and_delete(n: int) -> str:
        try:
            slot = await front.slot(doctor.id, start + timedelta(minutes=5 * n), minutes=5)
        except grpc.RpcError as error:
            return reason_of(error)
        if n % 2:
            await front.slots.DeleteSlot(pb.DeleteSlotRequest(slot_id=slot.id))
        return "OK"

    outcomes = await asyncio.gather(
        *(move(("Asia/Tokyo", "UTC")[n % 2]) for n in range(6)), *(open_and_delete(n) for n in range(20))
    )
    assert set(outcomes) <= {"OK", "TIME_ZONE_IN_USE", "CONFLICT"}
    wrong = front.sql(
        "select s.id from slot s join clinic c on c.id = s.clinic_id"
        " where s.date <> (s.start_time at time zone c.time_zone)::date"
    )
    assert not wrong


@pytest.mark.parametrize(
    "zone", ["CET", "EET", "MET", "WET", "localtime", "posixrules", "cet", "america/lima", "Mars/X"]
)
async def test_zones_that_are_read_otherwise(front: Front, zone: str) -> None:
    """A zone that is unknown, or that PostgreSQL does not read as the IANA database does, is refused at entry."""
    error = await refusal(front.clinic(zone))
    assert details(error)["BadRequest"].field_violations[0].field == "clinic.time_zone"
    clinic = await front.clinic("UTC")
    change = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=clinic.id, time_zone=zone))
    assert await outcome(front.clinics.UpdateClinic(change)) == "INVALID_FIELD"


async def test_every_other_zone_is_accepted(front: Front) -> None:
    """Each name of the IANA database that PostgreSQL reads alike can be a clinic's zone, and its day can be told."""
    from frontdesk.core.formats import _zones

    refused = []
    clinic = await front.clinic("UTC")
    for zone in sorted(_zones()):
        change = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=clinic.id, time_zone=zone))
        if await outcome(front.clinics.UpdateClinic(change)) != "OK":
            refused.append(zone)
        else:
            front.sql("select moment() at time zone time_zone from clinic where id = %s", clinic.id)
    assert {"CET", "EET", "MET", "WET"} <= set(refused)
    assert len(refused) < 12, refused
