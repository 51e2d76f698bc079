"""Undo of a wrong click: the visit and its queue entry are exactly as before, within 15 minutes and on the same day."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import psycopg
import pytest

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import doctor_pb2, queue_pb2, slot_pb2
from frontdesk.settings import Settings
from tests.clinic import (
    CAUSES,
    Front,
    day,
    details,
    outcome,
    reason_of,
    refusal,
    soon,
    today,
    tomorrow,
    without_estimates,
)
from tests.hostile.methods import call, request_class
from tests.hostile.wire import serving
from tests.identities import bearing, create_key, user
from tests.waiting import SOON

UNKNOWN = "01900000-0000-7000-8000-00000000ffff"
NOW = datetime(2030, 5, 6, 12, tzinfo=UTC)
Entry, Kind = queue_pb2.QueueEntry, queue_pb2.QueueChange


def undo_at(front: Front, appointment_id: str, etag: str, *, metadata: Any = (), **fields: Any) -> Any:
    """A call of UndoTransition with this etag."""
    request = pb.UndoTransitionRequest(appointment_id=appointment_id, etag=etag, **fields)
    return front.appointments.UndoTransition(request, metadata=metadata)


async def undo(front: Front, appointment_id: str, **options: Any) -> pb.UndoTransitionResponse:
    """Take back the last verb of the appointment as it is now."""
    etag = (await front.appointment(appointment_id)).etag
    answer: pb.UndoTransitionResponse = await undo_at(front, appointment_id, etag, **options)
    return answer


async def do(front: Front, verb: str, appointment_id: str) -> Any:
    """Call a verb that takes an appointment."""
    return await call(front, verb, request_class(verb)(appointment_id=appointment_id))


def same(appointment: pb.Appointment) -> pb.Appointment:
    """The appointment without what every change changes."""
    bare = pb.Appointment()
    bare.CopyFrom(appointment)
    bare.ClearField("etag")
    bare.ClearField("update_time")
    return bare


async def entries(front: Front, doctor_id: str) -> list[queue_pb2.QueueEntry]:
    """The queue's entries."""
    return list((await front.standing(doctor_id)).entries)


def back_in_time(front: Front, appointment_id: str, ago: timedelta) -> None:
    """Let the last verb be so long ago."""
    front.sql(
        "update appointment set undo = jsonb_set(undo, '{0,time}', to_jsonb((undo -> 0 ->> 'time')::timestamptz - %s))"
        " where id = %s",
        ago,
        appointment_id,
    )


@pytest.fixture
async def noon(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A server whose clock stands at noon."""
    with psycopg.connect(conninfo, autocommit=True) as admin:
        admin.execute(f"alter database {admin.info.dbname} set frontdesk.now = '{NOW.isoformat()}'")
    async with serving(settings, conninfo) as (_, front):
        yield front


WAYS: list[tuple[str, list[str]]] = [
    ("CheckIn", []),
    ("StartAppointment", ["CheckIn"]),
    ("StartAppointment", ["CheckIn", "CallNext"]),
    ("CompleteAppointment", ["CheckIn", "CallNext", "StartAppointment"]),
    ("MarkNoShow", []),
    ("LeaveQueue", ["CheckIn"]),
    ("LeaveQueue", ["CheckIn", "CallNext", "MarkMissed"]),
    ("MarkMissed", ["CheckIn", "CallNext"]),
    ("ParkPatient", ["CheckIn"]),
    ("ParkPatient", ["CheckIn", "CallNext"]),
    ("CancelAppointment", []),
    ("CancelAppointment", ["CheckIn"]),
    ("CancelAppointment", ["CheckIn", "ParkPatient"]),
    ("CancelAppointment", ["CheckIn", "CallNext", "MarkMissed", "ReturnToLine"]),
]


@pytest.mark.parametrize(("verb", "before"), WAYS, ids=lambda way: way if isinstance(way, str) else "-".join(way))
async def test_everything_is_as_before(front: Front, verb: str, before: list[str]) -> None:
    """After an undo the visit and the queue are as they were before the verb, and one change more is told: UNDONE."""
    doctor, person = await front.doctor(), await front.patient()
    visit = (await front.book(person.id, doctor.id)).appointment.id
    await front.book((await front.patient()).id, doctor.id)
    for step in before:
        if step == "CallNext":
            await front.call_next(doctor.id, "7")
        else:
            await do(front, step, visit)
    kept, queue = await front.appointment(visit), await front.standing(doctor.id)
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    async with asyncio.timeout(SOON):
        await stream.read()
        done = await do(front, verb, visit)
        update: Any = await stream.read()
        assert update.revision == done.revision
        answer = await undo(front, visit)
        update = await stream.read()
    stream.cancel()
    assert answer.appointment == await front.appointment(visit)
    assert same(answer.appointment) == same(kept)
    assert answer.appointment.etag != kept.etag
    assert answer.revision == done.revision + 1 == queue.revision + 2
    now = await front.standing(doctor.id)
    assert without_estimates(update.update.queue) == now
    assert (now.entries, now.expected_count, now.waiting_count) == (
        queue.entries, queue.expected_count, queue.waiting_count,
    )  # fmt: skip
    (change,) = update.update.changes
    assert (change.kind, change.revision, change.appointment_id) == (Kind.KIND_UNDONE, answer.revision, visit)
    if before:
        assert change.entry == queue.entries[0]
    elif verb == "CheckIn":
        assert (change.entry.state, change.entry.ticket) == (Entry.STATE_LEFT, 1)
        assert change.entry.check_in_time == done.entry.check_in_time
    else:
        assert not change.HasField("entry")
    # As before means that the same can be done once more; only the ticket of a check-in is another one.
    again = await do(front, verb, visit)
    assert again.appointment.state == done.appointment.state
    assert not hasattr(again, "entry") or again.entry.ticket == (2 if verb == "CheckIn" else 1)


async def test_the_ticket_stays_spent(front: Front) -> None:
    """Nobody gets the ticket of a check-in that was undone, and the priority and time of it are gone."""
    doctor, person = await front.doctor(), await front.patient()
    visit = (await front.book(person.id, doctor.id)).appointment
    await front.check_in(visit.id, priority=queue_pb2.PRIORITY_URGENT)
    undone = (await undo(front, visit.id)).appointment
    assert (undone.state, undone.HasField("check_in_time")) == (pb.Appointment.STATE_BOOKED, False)
    assert (await front.arrive(doctor.id)).entry.ticket == 2
    again = await front.check_in(visit.id)
    assert (again.entry.ticket, again.entry.position, again.entry.priority) == (3, 2, queue_pb2.PRIORITY_NORMAL)


async def test_two_in_a_row(front: Front) -> None:
    """Each undo takes back one verb more, until one that cannot be taken back, or none is left."""
    doctor = await front.doctor()
    visit = (await front.arrive(doctor.id)).appointment.id
    await do(front, "StartAppointment", visit)
    await do(front, "CompleteAppointment", visit)
    states = [(await undo(front, visit)).appointment.state for _ in range(3)]
    assert states == [
        pb.Appointment.STATE_IN_CONSULTATION, pb.Appointment.STATE_CHECKED_IN, pb.Appointment.STATE_BOOKED,
    ]  # fmt: skip
    error = await refusal(undo(front, visit))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "NOTHING_TO_UNDO")
    metadata = dict(details(error)["ErrorInfo"].metadata)
    assert metadata == {"appointment_id": visit, "state": "BOOKED"}


async def test_what_puts_an_end_to_it(front: Front) -> None:
    """After a call, a return, a priority, a transfer or a reschedule there is nothing to undo; nor what came before."""
    one = await front.doctor()
    other = await front.doctor(clinic_id=one.clinic_id)

    async def nothing(visit: str) -> None:
        before = await front.standing(one.id)
        assert await outcome(undo(front, visit)) == "NOTHING_TO_UNDO"
        assert await front.standing(one.id) == before

    visit = (await front.arrive(one.id)).appointment.id
    await front.call_next(one.id)
    await nothing(visit)
    await do(front, "CallAgain", visit)
    await nothing(visit)
    await do(front, "ReturnToLine", visit)
    await nothing(visit)
    await do(front, "ParkPatient", visit)
    await undo(front, visit)
    await nothing(visit)
    await do(front, "ParkPatient", visit)
    priority = queue_pb2.SetPriorityRequest(appointment_id=visit, priority=queue_pb2.PRIORITY_NORMAL)
    await front.queues.SetPriority(priority)
    await nothing(visit)
    await front.queues.TransferPatient(queue_pb2.TransferPatientRequest(appointment_id=visit, to_doctor_id=other.id))
    await nothing(visit)
    booked = (await front.book((await front.patient()).id, one.id)).appointment.id
    await nothing(booked)
    await front.check_in(booked)
    await do(front, "ParkPatient", booked)
    for _ in range(2):
        await undo(front, booked)
    move = pb.RescheduleAppointmentRequest(
        appointment_id=booked, doctor_day=pb.DoctorDay(doctor_id=other.id, date=day(today()))
    )
    await front.appointments.RescheduleAppointment(move)
    await nothing(booked)


async def test_updates_do_not_count(front: Front) -> None:
    """An update of the notes between a verb and its undo stays, and is no hindrance."""
    doctor = await front.doctor()
    visit = (await front.arrive(doctor.id)).appointment.id
    await do(front, "StartAppointment", visit)
    changed = pb.Appointment(id=visit, notes="allergic", reason="cough")
    await front.appointments.UpdateAppointment(pb.UpdateAppointmentRequest(appointment=changed))
    undone = (await undo(front, visit)).appointment
    assert (undone.state, undone.notes, undone.reason) == (pb.Appointment.STATE_CHECKED_IN, "allergic", "cough")
    assert (await undo(front, visit)).appointment.state == pb.Appointment.STATE_BOOKED


async def test_fifteen_minutes(noon: Front) -> None:
    """A verb can be taken back 15:00 minutes after it, and not a moment later; each of two has its own time."""
    doctor = await noon.doctor(zone="UTC")
    person = await noon.patient()
    visit = (await noon.book(person.id, doctor.id, NOW.date())).appointment.id
    await noon.check_in(visit)
    back_in_time(noon, visit, timedelta(minutes=15))
    await do(noon, "StartAppointment", visit)
    back_in_time(noon, visit, timedelta(minutes=15, microseconds=1))
    assert await outcome(undo(noon, visit)) == "NOTHING_TO_UNDO"
    back_in_time(noon, visit, -timedelta(microseconds=1))
    assert await outcome(undo(noon, visit)) == "OK"
    assert await outcome(undo(noon, visit)) == "OK"


async def test_the_day_of_the_clinic(noon: Front) -> None:
    """A verb of yesterday, by the clinic's own day, cannot be taken back, however late in the evening it was."""
    # Noon in UTC is midnight here, to the second.
    doctor = await noon.doctor(zone="Pacific/Auckland")
    person = await noon.patient()
    visit = (await noon.book(person.id, doctor.id, NOW.date() + timedelta(days=1))).appointment.id
    await noon.cancel(visit)
    back_in_time(noon, visit, timedelta(minutes=1))
    assert await outcome(undo(noon, visit)) == "NOTHING_TO_UNDO"
    back_in_time(noon, visit, -timedelta(minutes=1))
    assert await outcome(undo(noon, visit)) == "OK"


async def test_a_cancellation_of_another_day(front: Front) -> None:
    """The cancellation of a later appointment can be taken back like any other."""
    doctor, person = await front.doctor(), await front.patient()
    visit = (await front.book(person.id, doctor.id, tomorrow())).appointment.id
    await front.cancel(visit, "by mistake")
    undone = (await undo(front, visit)).appointment
    assert (undone.state, undone.cancel_reason, undone.HasField("cancel_time")) == (
        pb.Appointment.STATE_BOOKED, "", False,
    )  # fmt: skip


async def test_the_place_was_sold(front: Front) -> None:
    """A cancelled visit whose place is taken meanwhile stays cancelled; with another free place it gets that number."""
    doctor = await front.doctor(max_patients_per_day=2)
    first, second, third = await front.people(3)
    visit = (await front.book(first.id, doctor.id)).appointment
    await front.cancel(visit.id)
    sold = (await front.book(second.id, doctor.id)).appointment
    assert sold.number == visit.number == 1
    assert (await undo(front, visit.id)).appointment.number == 2
    await front.cancel(visit.id)
    await front.book(third.id, doctor.id)
    before = [await front.standing(doctor.id), await front.appointment(visit.id)]
    error = await refusal(undo(front, visit.id))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "DAY_FULL")
    assert [await front.standing(doctor.id), await front.appointment(visit.id)] == before
    # A refusal takes nothing from what can be undone.
    await front.cancel(sold.id)
    assert (await undo(front, visit.id)).appointment.number == 1


async def test_a_held_place(front: Front) -> None:
    """A place that somebody holds meanwhile is not free for an undo, which is told how long the hold lasts."""
    doctor, person = await front.doctor(max_patients_per_day=1), await front.patient()
    visit = (await front.book(person.id, doctor.id)).appointment.id
    await front.cancel(visit)
    held = await front.hold(doctor.id)
    error = await refusal(undo(front, visit))
    assert reason_of(error) == "DAY_FULL"
    metadata = details(error)["ErrorInfo"].metadata
    assert (metadata["held"], 0 < int(metadata["retry_after"]) <= 300) == ("1", True)
    await front.appointments.ReleaseHold(pb.ReleaseHoldRequest(hold_id=held.id))
    assert await outcome(undo(front, visit)) == "OK"


async def test_the_same_number(front: Front) -> None:
    """If its number is free the visit has it again, although a lower one is free too."""
    doctor = await front.doctor()
    visits = [(await front.book(person.id, doctor.id)).appointment for person in await front.people(3)]
    for visit in visits[:2]:
        await front.cancel(visit.id)
    assert (await undo(front, visits[1].id)).appointment.number == 2
    assert (await undo(front, visits[0].id)).appointment.number == 1


async def test_the_slot(front: Front) -> None:
    """The place in the slot is taken again, too, if the slot is still there at that time and has one."""
    doctor = await front.doctor()
    slot = await front.slot(doctor.id, soon())
    one, two = await front.people(2)
    visit = (await front.book_slot(one.id, slot.id)).appointment
    await front.cancel(visit.id)
    other = (await front.book_slot(two.id, slot.id)).appointment
    assert await outcome(undo(front, visit.id)) == "SLOT_FULL"
    await front.cancel(other.id)
    undone = (await undo(front, visit.id)).appointment
    assert same(undone) == same(visit)
    # Blocked meanwhile: that refuses new bookings alone.
    await front.cancel(visit.id)
    await front.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id]))
    assert await outcome(undo(front, visit.id)) == "OK"
    await front.cancel(visit.id)
    later = slot_pb2.Slot(id=slot.id, capacity=1)
    later.end_time.FromSeconds(slot.end_time.seconds + 60)
    await front.slots.UpdateSlot(slot_pb2.UpdateSlotRequest(slot=later))
    assert await outcome(undo(front, visit.id)) == "SLOT_NOT_FOUND"
    later.end_time.FromSeconds(slot.end_time.seconds)
    await front.slots.UpdateSlot(slot_pb2.UpdateSlotRequest(slot=later))
    await front.slots.DeleteSlot(slot_pb2.DeleteSlotRequest(slot_id=slot.id))
    assert await outcome(undo(front, visit.id)) == "SLOT_NOT_FOUND"


async def test_the_patient_is_elsewhere(front: Front) -> None:
    """A visit that would be the patient's second one there, or at that time, stays ended; a completed one as well."""
    one, other = await front.doctor(), await front.doctor()
    person = await front.patient()
    visit = (await front.book(person.id, one.id)).appointment.id
    await front.cancel(visit)
    second = (await front.book(person.id, one.id)).appointment.id
    error = await refusal(undo(front, visit))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_BOOKING")
    assert details(error)["ErrorInfo"].metadata["appointment_id"] == second
    for verb in ("CheckIn", "StartAppointment", "CompleteAppointment"):
        await do(front, verb, second)
    await front.book(person.id, one.id)
    assert await outcome(undo(front, second)) == "DUPLICATE_BOOKING"
    slots = [await front.slot(doctor.id, soon()) for doctor in (one, other)]
    there = await front.patient()
    first = (await front.book_slot(there.id, slots[0].id)).appointment.id
    await front.cancel(first)
    await front.book_slot(there.id, slots[1].id)
    assert await outcome(undo(front, first)) == "PATIENT_OVERLAP"


async def test_nothing_else_is_checked(front: Front) -> None:
    """A doctor who is absent or inactive and a patient who is inactive are no hindrance for a wrong click."""
    doctor, person = await front.doctor(), await front.patient()
    visit = (await front.book(person.id, doctor.id)).appointment.id
    await do(front, "MarkNoShow", visit)
    absent = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), is_present=False)
    await front.doctors.SetDoctorAvailability(absent)
    front.sql("update doctor set active = false")
    front.sql("update patient set active = false")
    front.sql("update clinic set active = false")
    assert (await undo(front, visit)).appointment.state == pb.Appointment.STATE_BOOKED


@pytest.mark.parametrize("cause", CAUSES)
async def test_closed_meanwhile(front: Front, cause: str) -> None:
    """What refuses new bookings of the day is no hindrance: absence, a closed date, leave."""
    doctor, person = await front.doctor(), await front.patient()
    visit = (await front.book(person.id, doctor.id)).appointment
    await front.cancel(visit.id)
    await front.absent(doctor.id, cause)
    assert await outcome(front.book(person.id, doctor.id)) == "DOCTOR_ABSENT"
    assert same((await undo(front, visit.id)).appointment) == same(visit)


async def test_a_lowered_capacity(front: Front) -> None:
    """A completed visit keeps its place while its end is undone, also on a day whose capacity was lowered."""
    doctor = await front.doctor()
    visits = [(await front.arrive(doctor.id)).appointment for _ in range(2)]
    for verb in ("StartAppointment", "CompleteAppointment"):
        await do(front, verb, visits[0].id)
    await do(front, "LeaveQueue", visits[1].id)
    lowered = doctor_pb2.SetDoctorAvailabilityRequest(
        doctor_id=doctor.id, date=day(today()), is_present=True, max_patients=0
    )
    await front.doctors.SetDoctorAvailability(lowered)
    assert (await undo(front, visits[0].id)).appointment.number == 1
    assert await outcome(undo(front, visits[1].id)) == "DAY_FULL"


async def test_a_number_above_the_others(front: Front) -> None:
    """The same number is given again if it is free, however far it is above the numbers of the others."""
    doctor = await front.doctor(max_patients_per_day=1)
    visits = [(await front.arrive(doctor.id)).appointment]
    for person in await front.people(2):
        request = queue_pb2.AddWalkInRequest(doctor_id=doctor.id, patient_id=person.id, override_reason="fainted")
        visits.append((await front.queues.AddWalkIn(request)).appointment)
    await do(front, "StartAppointment", visits[2].id)
    await do(front, "CompleteAppointment", visits[2].id)
    await do(front, "LeaveQueue", visits[1].id)
    assert (await undo(front, visits[2].id)).appointment.number == visits[2].number == 3

    other = await front.doctor()
    booked = [(await front.book(person.id, other.id)).appointment for person in await front.people(8)]
    for visit in booked:
        await front.cancel(visit.id)
    lowered = doctor_pb2.SetDoctorAvailabilityRequest(
        doctor_id=other.id, date=day(today()), is_present=True, max_patients=2
    )
    await front.doctors.SetDoctorAvailability(lowered)
    assert (await undo(front, booked[7].id)).appointment.number == booked[7].number == 8


async def test_the_etag(front: Front) -> None:
    """An undo needs the etag of the visit as it is: without one it is malformed, with a stale one refused."""
    doctor = await front.doctor()
    arrived = await front.arrive(doctor.id)
    visit = arrived.appointment
    for etag in ("", "x" * 65, "a\nb"):
        error = await refusal(undo_at(front, visit.id, etag))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
        assert details(error)["BadRequest"].field_violations[0].field == "etag"
    for stale in ("1", "no etag of ours", "99"):
        error = await refusal(undo_at(front, visit.id, stale))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert await outcome(undo_at(front, UNKNOWN, "1")) == "APPOINTMENT_NOT_FOUND"
    assert await outcome(undo_at(front, "x", "1")) == "INVALID_FIELD"
    assert (await front.appointment(visit.id)) == visit


async def test_two_undo_at_once(front: Front) -> None:
    """Of twenty who undo at once with one etag, one acts, and one step is taken back."""
    doctor = await front.doctor()
    visit = (await front.arrive(doctor.id)).appointment.id
    await do(front, "StartAppointment", visit)
    etag = (await front.appointment(visit)).etag
    outcomes = await asyncio.gather(*(outcome(undo_at(front, visit, etag)) for _ in range(20)))
    assert Counter(outcomes) == {"OK": 1, "ETAG_MISMATCH": 19}
    assert (await front.appointment(visit)).state == pb.Appointment.STATE_CHECKED_IN


async def test_the_key_of_an_undone_verb(front: Front) -> None:
    """The key of an undone verb replays its first success and acts no more; so does the key of the undo."""
    doctor, person = await front.doctor(), await front.patient()
    booked = (await front.book(person.id, doctor.id)).appointment
    first = await front.check_in(booked.id, idempotency_key="wrong click")
    etag = first.appointment.etag
    undone = await undo_at(front, booked.id, etag, idempotency_key="back")
    again = await front.check_in(booked.id, idempotency_key="wrong click")
    assert again.replayed
    assert (again.revision, again.entry.ticket, again.appointment) == (first.revision, 1, first.appointment)
    assert not await entries(front, doctor.id)
    replay = await undo_at(front, booked.id, etag, idempotency_key="back")
    assert (replay.replayed, replay.revision, replay.appointment) == (True, undone.revision, undone.appointment)
    assert (await front.standing(doctor.id)).revision == undone.revision
    assert not (await front.check_in(booked.id, idempotency_key="another")).replayed


async def test_undo_against_a_booking(front: Front) -> None:
    """If a booking and an undo want the last place at once, one of them gets it."""
    for _ in range(10):
        doctor = await front.doctor(max_patients_per_day=1)
        first, second = await front.people(2)
        visit = (await front.book(first.id, doctor.id)).appointment.id
        etag = (await front.cancel(visit)).appointment.etag
        outcomes = await asyncio.gather(outcome(undo_at(front, visit, etag)), outcome(front.book(second.id, doctor.id)))
        assert sorted(outcomes) == ["DAY_FULL", "OK"]


async def test_a_merged_patient(front: Front) -> None:
    """A visit that another record has taken over meanwhile is restored for that record."""
    doctor = await front.doctor()
    keep, other = await front.people(2)
    visit = (await front.book(other.id, doctor.id)).appointment.id
    await front.cancel(visit)
    merge = request_class("MergePatients")(keep_patient_id=keep.id, merge_patient_id=other.id)
    await call(front, "MergePatients", merge)
    assert (await undo(front, visit)).appointment.patient_id == keep.id


async def test_who_may_undo(front: Front) -> None:
    """The desk, services and the doctor of the visit undo; another's doctor, another clinic and the patient do not."""
    doctor, other = await front.doctor(), await front.doctor()
    arrived = await front.arrive(doctor.id)
    visit = arrived.appointment
    for by, expected in (
        (user(front, "PATIENT", patient_id=arrived.entry.patient_id), "ROLE_REQUIRED"),
        (user(front, "DOCTOR", doctor_id=other.id), "ROLE_REQUIRED"),
        (bearing((await create_key(front, "STAFF", clinic_ids=[other.clinic_id])).key), "CLINIC_NOT_YOURS"),
        (user(front, "DOCTOR", doctor_id=doctor.id), "OK"),
        (bearing((await create_key(front, "STAFF", clinic_ids=[doctor.clinic_id])).key), "OK"),
        (bearing((await create_key(front, "SERVICE")).key), "OK"),
    ):
        etag = (await front.appointment(visit.id)).etag
        assert await outcome(undo_at(front, visit.id, etag, metadata=by)) == expected
        if expected == "OK":
            await front.check_in(visit.id)
