"""Leave: what it closes, and what becomes of the appointments that it meets."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, nullcontext
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
import pytest

from clinic.frontdesk.v1 import appointment_pb2, doctor_pb2, slot_pb2
from clinic.frontdesk.v1 import schedule_pb2 as pb
from frontdesk.settings import Settings
from tests.clinic import ZONE, Clock, Front, day, details, outcome, reason_of, refusal, soon, today, tomorrow
from tests.hostile.wire import working
from tests.identities import bearing, create_key, user
from tests.servers import Service
from tests.waiting import until, until_true

Leave = pb.Leave
Outcome = pb.AffectedAppointment
KEEP, CANCEL = Leave.POLICY_KEEP, Leave.POLICY_CANCEL
SAME_DOCTOR, SAME_SPECIALTY = Leave.POLICY_MOVE_SAME_DOCTOR, Leave.POLICY_MOVE_SAME_SPECIALTY
UNKNOWN = "01900000-0000-7000-8000-00000000ffff"


def after(days: int) -> date:
    """So many days after tomorrow."""
    return tomorrow() + timedelta(days=days)


def cancel(leave: pb.Leave, **fields: Any) -> pb.CancelLeaveRequest:
    return pb.CancelLeaveRequest(leave_id=leave.id, **fields)


async def told(front: Front, leave: pb.Leave) -> pb.GetLeaveResponse:
    return await front.schedules.GetLeave(pb.GetLeaveRequest(leave_id=leave.id))


def outcomes(answer: Any) -> list[tuple[str, int]]:
    """The appointments and what became of them, in their order."""
    return [(one.appointment_id, one.outcome) for one in answer.affected]


def places(answer: Any) -> list[tuple[str, int, str] | None]:
    """Where the appointments were moved: doctor, day of the month, slot; None of those that were not."""
    return [
        (one.moved_to.doctor_id, one.moved_to.date.day, one.moved_to.slot_id) if one.HasField("moved_to") else None
        for one in answer.affected
    ]


async def booked(front: Front, doctor_id: str, *offsets: int) -> list[str]:
    """The ids of bookings of new patients, on days so many days after tomorrow."""
    people = await front.people(len(offsets))
    return [
        (await front.book(person.id, doctor_id, after(n))).appointment.id
        for person, n in zip(people, offsets, strict=True)
    ]


@contextmanager
def holding(front: Front, doctor_id: str, on: date) -> Iterator[psycopg.Connection[Any]]:
    """Hold the lock of a doctor-day, as a decision does, until the end of the block or a commit."""
    with psycopg.connect(front.conninfo) as connection:
        connection.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor_id, on))
        yield connection
        connection.commit()


def waiting(front: Front) -> bool:
    """Whether somebody waits for a lock of this database."""
    return front.sql(
        "select count(*) from pg_locks where not granted and locktype = 'advisory'"
        " and database = (select oid from pg_database where datname = current_database())"
    ) != [(0,)]


async def test_days(front: Front) -> None:
    """Leave of days refuses every booking of these dates, of slots too, as absence with LEAVE as its cause."""
    doctor = await front.doctor()
    person, other = await front.people(2)
    slot = await front.slot(doctor.id, soon(24))
    kept = (await front.book(other.id, doctor.id, after(3))).appointment
    answer = await front.leave(doctor.id, after(0), after(1))
    assert (answer.leave.state, answer.leave.policy, answer.leave.reason) == (
        Leave.STATE_APPLIED, KEEP, "holidays",
    )  # fmt: skip
    assert (answer.leave.days.from_date, answer.leave.days.to_date) == (day(after(0)), day(after(1)))
    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(1)))
    for call in (
        front.book(person.id, doctor.id, after(0)),
        front.book(person.id, doctor.id, after(1), validate_only=True),
        front.book_slot(person.id, slot.id),
        front.appointments.RescheduleAppointment(
            appointment_pb2.RescheduleAppointmentRequest(appointment_id=kept.id, doctor_day=target)
        ),
    ):
        refused = details(await refusal(call))["ErrorInfo"]
        assert (refused.reason, refused.metadata["cause"]) == ("DOCTOR_ABSENT", "LEAVE")
    assert (await front.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=slot.id))).slot.state == slot_pb2.Slot.STATE_OPEN
    free = slot_pb2.ListSlotsRequest(doctor_id=doctor.id, available_only=True)
    assert not (await front.slots.ListSlots(free)).slots
    assert await outcome(front.book(person.id, doctor.id, today())) == "OK"
    assert await outcome(front.book(person.id, doctor.id, after(2))) == "OK"
    await front.schedules.CancelLeave(cancel(answer.leave))
    assert [one.id for one in (await front.slots.ListSlots(free)).slots] == [slot.id]
    assert await outcome(front.book_slot(person.id, slot.id)) == "OK"


async def test_absence_and_leave_are_two_things(front: Front) -> None:
    """A doctor takes bookings if availability and leave both allow it."""
    doctor = await front.doctor()
    person = await front.patient()

    async def say(present: bool) -> None:
        said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), is_present=present)
        await front.doctors.SetDoctorAvailability(said)

    async def cause() -> str:
        refused = details(await refusal(front.book(person.id, doctor.id, tomorrow())))
        return str(refused["ErrorInfo"].metadata["cause"])

    leave = (await front.leave(doctor.id, tomorrow())).leave
    await say(True)
    assert await cause() == "LEAVE"
    await say(False)
    await front.schedules.CancelLeave(cancel(leave))
    assert await cause() == "AVAILABILITY"
    await say(True)
    assert await outcome(front.book(person.id, doctor.id, tomorrow())) == "OK"


async def test_hours(front: Front) -> None:
    """Leave of hours blocks the slots that it touches, also those made later; bookings of the day go on."""
    doctor = await front.doctor()
    person = await front.patient()
    before, touched, behind = [await front.slot(doctor.id, soon(hours), minutes=60) for hours in (0, 1, 3)]
    answer = await front.leave(doctor.id, soon(1.5), soon(3))
    assert (answer.leave.hours.start_time.ToDatetime(ZoneInfo("UTC")), answer.leave.HasField("days")) == (
        soon(1.5),
        False,
    )
    later = await front.slot(doctor.id, soon(2), minutes=30)
    assert later.state == slot_pb2.Slot.STATE_BLOCKED

    async def blocked() -> list[str]:
        listed = await front.slots.ListSlots(slot_pb2.ListSlotsRequest(doctor_id=doctor.id))
        return [one.id for one in listed.slots if one.state == slot_pb2.Slot.STATE_BLOCKED]

    assert await blocked() == [touched.id, later.id]
    assert not (await front.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=touched.id))).slot.block_reason
    free = await front.slots.ListSlots(slot_pb2.ListSlotsRequest(doctor_id=doctor.id, available_only=True))
    assert [one.id for one in free.slots] == [before.id, behind.id]
    released = await front.slots.ReleaseSlots(slot_pb2.ReleaseSlotsRequest(slot_ids=[touched.id]))
    assert released.slots[0].state == slot_pb2.Slot.STATE_BLOCKED
    for slot in (touched, later):
        assert await outcome(front.book_slot(person.id, slot.id)) == "SLOT_BLOCKED"
    await front.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[later.id, behind.id], block_reason="cleaning"))
    await front.schedules.CancelLeave(cancel(answer.leave))
    assert await blocked() == [later.id, behind.id]
    assert await outcome(front.book_slot(person.id, touched.id)) == "OK"


async def test_a_day_booking_beside_leave_of_hours(front: Front) -> None:
    """Day bookings have no hours: leave of hours neither refuses nor settles them."""
    doctor = await front.doctor()
    (first,) = await booked(front, doctor.id, 0)
    answer = await front.leave(doctor.id, soon(0), soon(8), policy=CANCEL)
    assert outcomes(answer) == []
    assert (await front.appointment(first)).state == appointment_pb2.Appointment.STATE_BOOKED
    assert await outcome(front.book((await front.patient()).id, doctor.id, tomorrow())) == "OK"


async def test_overlap(front: Front) -> None:
    """Two leaves of a doctor do not overlap, of days or hours; they may touch, and a cancelled one does not count."""
    doctor, other = await front.doctor(), await front.doctor()
    week = (await front.leave(doctor.id, after(0), after(6))).leave
    for call in (
        front.leave(doctor.id, after(6), after(7)),
        front.leave(doctor.id, soon(24), soon(25)),
        front.leave(doctor.id, after(3), validate_only=True),
    ):
        error = await refusal(call)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, "LEAVE_OVERLAP")
        assert details(error)["ResourceInfo"].resource_name == week.id
    assert await outcome(front.leave(doctor.id, after(7))) == "OK"
    assert await outcome(front.leave(other.id, after(0))) == "OK"
    midnight = datetime.combine(after(0), datetime.min.time(), ZoneInfo(ZONE))
    assert await outcome(front.leave(doctor.id, midnight - timedelta(hours=1), midnight)) == "OK"
    await front.schedules.CancelLeave(cancel(week))
    assert await outcome(front.leave(doctor.id, after(2))) == "OK"


async def test_overlapping_at_once(front: Front) -> None:
    """Of ten overlapping leaves that are created at once, one is; the database refuses any other that does not ask."""
    doctor = await front.doctor()
    made = await asyncio.gather(*(outcome(front.leave(doctor.id, after(0), after(n))) for n in range(10)))
    assert Counter(made) == {"OK": 1, "LEAVE_OVERLAP": 9}
    with pytest.raises(psycopg.errors.ExclusionViolation, match="leave_doctor_overlap"):
        front.sql(
            "insert into leave (doctor_id, clinic_id, whole_days, from_date, to_date, start_time, end_time, policy,"
            " next_date, actor) select doctor_id, clinic_id, whole_days, from_date, to_date, start_time, end_time,"
            " policy, next_date, actor from leave"
        )


async def test_past(front: Front) -> None:
    """A leave that has ended is refused; one that still lasts settles the appointments from today on."""
    doctor = await front.doctor()
    yesterday = today() - timedelta(days=1)
    now = datetime.now(ZoneInfo("UTC"))
    assert await outcome(front.leave(doctor.id, yesterday)) == "DATE_IN_PAST"
    assert await outcome(front.leave(doctor.id, now - timedelta(hours=2), now - timedelta(seconds=1))) == "DATE_IN_PAST"
    old, present = await booked(front, doctor.id, -1, 0)
    front.sql("update appointment set date = date - 1 where id = %s", old)
    answer = await front.leave(doctor.id, yesterday, after(0), policy=CANCEL)
    assert outcomes(answer) == [(present, Outcome.OUTCOME_CANCELLED)]
    await front.schedules.CancelLeave(cancel(answer.leave))
    assert await outcome(front.leave(doctor.id, now - timedelta(hours=2), now + timedelta(hours=1))) == "OK"


async def test_bad_input(front: Front) -> None:
    """A leave without doctor or time, of more than 366 days, or that ends before it begins names the wrong field."""
    doctor = await front.doctor()
    days = pb.DateRange(from_date=day(after(0)), to_date=day(after(0)))

    async def field(**fields: Any) -> str:
        wanted = Leave(**{"doctor_id": doctor.id, **fields})
        error = await refusal(front.schedules.CreateLeave(pb.CreateLeaveRequest(leave=wanted)))
        assert reason_of(error) == "INVALID_FIELD"
        return str(details(error)["BadRequest"].field_violations[0].field)

    def hours(start: datetime, end: datetime | None) -> Any:
        found = Leave().hours
        found.start_time.FromDatetime(start)
        if end is not None:
            found.end_time.FromDatetime(end)
        return found

    assert await field() == "leave.period"
    assert await field(doctor_id="", days=days) == "leave.doctor_id"
    assert await field(days=pb.DateRange(from_date=day(after(0)))) == "leave.days.to_date"
    assert await field(days=pb.DateRange(from_date=day(after(1)), to_date=day(after(0)))) == "leave.days.to_date"
    assert await field(days=pb.DateRange(from_date=day(after(0)), to_date=day(after(366)))) == "leave.days.to_date"
    assert await field(hours=hours(soon(1), soon(1))) == "leave.hours.end_time"
    assert await field(hours=hours(soon(0), soon(366 * 24 + 1))) == "leave.hours.end_time"
    assert await field(hours=hours(soon(0), None)) == "leave.hours"
    assert await field(days=days, policy=9) == "leave.policy"
    assert await field(days=days, reason="x" * 2001) == "leave.reason"
    assert await outcome(front.schedules.CreateLeave(pb.CreateLeaveRequest())) == "INVALID_FIELD"
    assert await outcome(front.leave(UNKNOWN, after(0))) == "DOCTOR_NOT_FOUND"
    assert await outcome(front.leave(doctor.id, after(0), after(365))) == "OK"
    unknown = Leave(id=UNKNOWN)
    assert await outcome(told(front, unknown)) == "LEAVE_NOT_FOUND"
    assert await outcome(front.schedules.CancelLeave(cancel(unknown))) == "LEAVE_NOT_FOUND"


async def test_the_last_day_that_we_have(front: Front) -> None:
    """Leave may end with the year 9999, also where its last hours lie in the year 10000 of UTC."""
    doctor = await front.doctor()
    last = date(9999, 12, 31)
    leave = (await front.leave(doctor.id, last)).leave
    listed = await front.schedules.ListLeaves(pb.ListLeavesRequest(doctor_id=doctor.id))
    assert [one.days.to_date for one in listed.leaves] == [day(last)]
    assert (await told(front, leave)).leave.state == Leave.STATE_APPLIED


async def test_no_move_beyond_the_last_day(front: Front) -> None:
    """An appointment of the last days of the year 9999 has no later place, by slot or by day."""
    doctor = await front.doctor()
    last = date(9999, 12, 31)
    visit = (await front.book((await front.patient()).id, doctor.id, last)).appointment
    trial = await front.leave(doctor.id, last, policy=SAME_DOCTOR, validate_only=True)
    answer = await front.leave(doctor.id, last, policy=SAME_DOCTOR)
    assert outcomes(trial) == outcomes(answer) == [(visit.id, Outcome.OUTCOME_NOT_MOVED)]
    assert await front.appointment(visit.id) == visit


async def test_cancel(front: Front) -> None:
    """A leave is cancelled once, and only by the present etag; what it has cancelled stays so."""
    doctor = await front.doctor()
    (mine,) = await booked(front, doctor.id, 0)
    leave = (await front.leave(doctor.id, after(0), policy=CANCEL)).leave
    assert await outcome(front.schedules.CancelLeave(cancel(leave, etag="0"))) == "ETAG_MISMATCH"
    answer = await front.schedules.CancelLeave(cancel(leave, etag=leave.etag))
    assert answer.leave.state == Leave.STATE_CANCELLED
    assert outcomes(answer) == [(mine, Outcome.OUTCOME_CANCELLED)]
    error = await refusal(front.schedules.CancelLeave(cancel(leave)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "LEAVE_STATE")
    assert (await front.appointment(mine)).state == appointment_pb2.Appointment.STATE_CANCELLED


async def test_who_is_here_is_kept(front: Front) -> None:
    """Under every policy a patient who is checked in or in consultation is kept, and ended visits are none of its."""
    for policy in (KEEP, CANCEL, SAME_DOCTOR, SAME_SPECIALTY):
        doctor = await front.doctor(specialty="Cardiology")
        seen, here, gone, coming = await booked(front, doctor.id, -1, -1, -1, -1)
        for each in (seen, here):
            await front.check_in(each)
        await front.appointments.StartAppointment(appointment_pb2.StartAppointmentRequest(appointment_id=seen))
        await front.cancel(gone)
        answer = await front.leave(doctor.id, today(), policy=policy)
        found = dict(outcomes(answer))
        assert found.keys() == {seen, here, coming}
        assert found[seen] == found[here] == Outcome.OUTCOME_KEPT
        assert (found[coming] == Outcome.OUTCOME_KEPT) == (policy == KEEP)
        assert (await front.appointment(seen)).state == appointment_pb2.Appointment.STATE_IN_CONSULTATION
        await front.call_next(doctor.id)


@pytest.mark.parametrize("policy", [CANCEL, SAME_DOCTOR, SAME_SPECIALTY])
async def test_a_running_consultation(at: Clock, policy: "Leave.Policy.ValueType") -> None:
    """Leave of hours that touches a running consultation keeps it, settles who is still to come, and lets it end."""
    start = datetime(2027, 1, 4, 8, 30, tzinfo=UTC)
    async with at("2027-01-04 08:00+00") as front:
        doctor = await front.doctor("UTC", specialty="Cardiology")
        colleague = await front.doctor(specialty="Cardiology", clinic_id=doctor.clinic_id)
        slot = await front.slot(doctor.id, start, capacity=2)
        later = [await front.slot(of.id, start + timedelta(hours=3)) for of in (doctor, colleague)]
        seen, coming = [(await front.book_slot(p.id, slot.id)).appointment.id for p in await front.people(2)]
    async with at("2027-01-04 08:40+00") as front:
        await front.check_in(seen)
        await front.appointments.StartAppointment(appointment_pb2.StartAppointmentRequest(appointment_id=seen))
        answer = await front.leave(doctor.id, start + timedelta(minutes=15), start + timedelta(hours=2), policy=policy)
        settled = Outcome.OUTCOME_CANCELLED if policy == CANCEL else Outcome.OUTCOME_MOVED
        assert outcomes(answer) == [(seen, Outcome.OUTCOME_KEPT), (coming, settled)]
        if policy != CANCEL:
            assert answer.affected[1].moved_to.slot_id == later[policy == SAME_SPECIALTY].id
        complete = appointment_pb2.CompleteAppointmentRequest(appointment_id=seen)
        ended = (await front.appointments.CompleteAppointment(complete)).appointment
        assert (ended.state, ended.slot_id) == (appointment_pb2.Appointment.STATE_COMPLETED, slot.id)


async def test_what_was_moved_stays(front: Front) -> None:
    """CancelLeave opens the days again, and brings nobody back who was moved."""
    doctor = await front.doctor()
    (mine,) = await booked(front, doctor.id, 0)
    leave = (await front.leave(doctor.id, after(0), policy=SAME_DOCTOR)).leave
    assert outcomes(await front.schedules.CancelLeave(cancel(leave))) == [(mine, Outcome.OUTCOME_MOVED)]
    assert (await front.appointment(mine)).date == day(after(1))
    assert await outcome(front.book((await front.patient()).id, doctor.id, after(0))) == "OK"


async def test_order(front: Front) -> None:
    """Appointments are settled by date, start and number, those without a start first, and told in that order."""
    doctor = await front.doctor()
    people = await front.people(5)
    late, early = [await front.slot(doctor.id, soon(hours), capacity=1) for hours in (5, 2)]
    made = [
        (await front.book(people[0].id, doctor.id, after(1))).appointment.id,
        (await front.book_slot(people[1].id, late.id)).appointment.id,
        (await front.book_slot(people[2].id, early.id)).appointment.id,
        (await front.book(people[3].id, doctor.id, after(0))).appointment.id,
        (await front.book(people[4].id, doctor.id, after(0))).appointment.id,
    ]
    answer = await front.leave(doctor.id, after(0), after(1), policy=CANCEL)
    assert [one for one, _ in outcomes(answer)] == [made[n] for n in (3, 4, 2, 1, 0)]
    assert answer.leave.affected_count == 5
    assert outcomes(await told(front, answer.leave)) == outcomes(answer)


async def test_same_doctor_by_day(front: Front) -> None:
    """A day booking moves to the doctor's first later day that is not closed, full or the patient's own already."""
    doctor = await front.doctor(max_patients_per_day=2)
    (first, second) = await booked(front, doctor.id, 0, 0)
    await booked(front, doctor.id, 2, 2, 4)
    person = (await front.appointment(first)).patient_id
    await front.book(person, doctor.id, after(3))
    await front.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(after(5)), is_present=False)
    )
    answer = await front.leave(doctor.id, after(0), after(1), policy=SAME_DOCTOR)
    # After 2 days it is full, after 3 the first has a booking of his own, after 4 there is one place.
    assert places(answer) == [(doctor.id, after(4).day, ""), (doctor.id, after(3).day, "")]
    moved = await front.appointment(first)
    assert (moved.date, moved.number, moved.state) == (day(after(4)), 2, appointment_pb2.Appointment.STATE_BOOKED)
    assert (await front.appointment(second)).date == day(after(3))
    # A move is two changes, each one revision of its doctor-day.
    assert (await front.queue(doctor.id, after(0))).revision == 5
    assert (await front.queue(doctor.id, after(4))).revision == 3


async def test_a_held_place(front: Front) -> None:
    """A move does not take a place that a hold holds, nor does its trial promise it."""
    doctor = await front.doctor(max_patients_per_day=1)
    slots = [await front.slot(doctor.id, soon(24 * n)) for n in (0, 3, 4)]
    (by_day,) = await booked(front, doctor.id, 1)
    await front.book_slot((await front.patient()).id, slots[0].id)
    await front.hold(doctor.id, after(2))
    await front.hold_slot(slots[1].id)
    trial = await front.leave(doctor.id, after(0), after(1), policy=SAME_DOCTOR, validate_only=True)
    answer = await front.leave(doctor.id, after(0), after(1), policy=SAME_DOCTOR)
    assert places(answer) == [(doctor.id, after(4).day, slots[2].id), (doctor.id, after(5).day, "")]
    assert list(trial.affected) == list(answer.affected)
    assert answer.affected[1].appointment_id == by_day


async def test_same_doctor_within_sixty_days(front: Front) -> None:
    """A place is sought up to 60 days after the appointment; without one it stays where it is."""
    doctor = await front.doctor(max_patients_per_day=1)
    (first,) = await booked(front, doctor.id, 0)
    answer = await front.leave(doctor.id, after(0), after(59), policy=SAME_DOCTOR)
    assert places(answer) == [(doctor.id, after(60).day, "")]
    (second,) = await booked(front, doctor.id, 61)
    answer = await front.leave(doctor.id, after(61), after(121), policy=SAME_DOCTOR)
    assert outcomes(answer) == [(second, Outcome.OUTCOME_NOT_MOVED)]
    kept = await front.appointment(second)
    assert (kept.date, kept.state) == (day(after(61)), appointment_pb2.Appointment.STATE_BOOKED)
    assert first != second


async def test_same_doctor_by_slot(front: Front) -> None:
    """A slot moves to the doctor's first later slot with a place, the same day if hours allow it, never to a day."""
    doctor = await front.doctor()
    early, mine, taken, blocked, far = [await front.slot(doctor.id, soon(hours)) for hours in (0, 1, 2, 3, 48)]
    people = await front.people(3)
    moved = (await front.book_slot(people[0].id, mine.id)).appointment
    await front.book_slot(people[1].id, taken.id)
    await front.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[blocked.id]))
    plan = await front.leave(doctor.id, soon(1), soon(1.5), policy=SAME_DOCTOR, validate_only=True)
    assert places(plan) == [(doctor.id, after(2).day, far.id)]
    await front.slots.ReleaseSlots(slot_pb2.ReleaseSlotsRequest(slot_ids=[blocked.id]))
    answer = await front.leave(doctor.id, soon(1), soon(1.5), policy=SAME_DOCTOR)
    assert places(answer) == [(doctor.id, after(0).day, blocked.id)]
    found = await front.appointment(moved.id)
    assert (found.slot_id, found.start_time, found.number) == (blocked.id, blocked.start_time, 1)
    assert early.id != found.slot_id


@pytest.mark.parametrize("policy", [SAME_DOCTOR, SAME_SPECIALTY])
async def test_many_slots(front: Front, policy: "Leave.Policy.ValueType") -> None:
    """Hundreds of appointments move past thousands of slots within the time of a call, tried or done."""
    doctor = await front.doctor(specialty="Cardiology", max_patients_per_day=1000)
    colleague = await front.doctor(specialty="Cardiology", clinic_id=doctor.clinic_id, max_patients_per_day=1000)
    for of in (doctor, colleague):
        front.sql(
            "insert into slot (doctor_id, clinic_id, date, start_time, end_time, capacity, create_time, update_time)"
            " select %s, %s, %s::date + n / 60, t, t + interval '10 min', 1, moment(), moment()"
            " from generate_series(0, 3599) n,"
            " lateral (values (%s + n / 60 * interval '1 day' + n %% 60 * interval '10 min')) v (t)",
            of.id, of.clinic_id, after(0), soon(0),
        )  # fmt: skip
    front.sql(
        "with p as (insert into patient (given_name, name_key) select 'P', id from slot"
        " where doctor_id = %s and date < %s returning id, name_key::uuid as slot)"
        " insert into appointment"
        " (patient_id, doctor_id, clinic_id, date, number, state, slot_id, start_time, end_time)"
        " select p.id, s.doctor_id, s.clinic_id, s.date, row_number() over (partition by s.date), 'BOOKED', s.id,"
        " s.start_time, s.end_time from p join slot s on s.id = p.slot",
        doctor.id, after(10),
    )  # fmt: skip
    plan = await front.leave(doctor.id, after(0), after(9), policy=policy, validate_only=True)
    assert Counter(one.outcome for one in plan.affected) == {Outcome.OUTCOME_MOVED: 600}
    answer = await front.leave(doctor.id, after(0), after(9), policy=policy)
    assert list(answer.affected) == list(plan.affected)
    of, first = (doctor, 10) if policy == SAME_DOCTOR else (colleague, 0)
    assert {place and place[0] for place in places(answer)} == {of.id}
    assert Counter(one.moved_to.date.day for one in answer.affected) == {after(first + n).day: 60 for n in range(10)}


async def test_closed_dates_are_passed_over(front: Front) -> None:
    """Nobody moves to a date that an exception closes, by slot or by day."""
    doctor = await front.doctor()
    slots = [await front.slot(doctor.id, soon(24 * n)) for n in (0, 1, 2)]
    (by_day,) = await booked(front, doctor.id, 0)
    by_slot = (await front.book_slot((await front.patient()).id, slots[0].id)).appointment.id
    closed = pb.SetScheduleExceptionRequest(doctor_id=doctor.id, date=day(after(1)), closed=True)
    await front.schedules.SetScheduleException(closed)
    answer = await front.leave(doctor.id, after(0), policy=SAME_DOCTOR)
    assert [one for one, _ in outcomes(answer)] == [by_day, by_slot]
    assert places(answer) == [(doctor.id, after(2).day, ""), (doctor.id, after(2).day, slots[2].id)]


async def test_nobody_moves_to_an_inactive_doctor(front: Front) -> None:
    """An inactive doctor takes no patients of his own leave either."""
    doctor = await front.doctor()
    (mine,) = await booked(front, doctor.id, 0)
    retired = doctor_pb2.Doctor(id=doctor.id, active=False)
    await front.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=retired))
    answer = await front.leave(doctor.id, after(0), policy=SAME_DOCTOR)
    assert outcomes(answer) == [(mine, Outcome.OUTCOME_NOT_MOVED)]


@pytest.mark.parametrize("policy", [SAME_DOCTOR, SAME_SPECIALTY])
async def test_slots_within_sixty_days(front: Front, policy: "Leave.Policy.ValueType") -> None:
    """A slot is sought up to 60 days after the appointment; without one it stays where it is."""
    doctor = await front.doctor(specialty="Cardiology")
    colleague = await front.doctor(specialty="Cardiology", clinic_id=doctor.clinic_id)
    of = doctor if policy == SAME_DOCTOR else colleague
    for n, person in zip((0, 1), await front.people(2), strict=True):
        await front.book_slot(person.id, (await front.slot(doctor.id, soon(24 * n))).id)
    near, _ = [await front.slot(of.id, soon(24 * n)) for n in (60, 62)]
    answer = await front.leave(doctor.id, after(0), after(1), policy=policy)
    assert places(answer) == [(of.id, after(60).day, near.id), None]
    assert answer.affected[1].outcome == Outcome.OUTCOME_NOT_MOVED


async def test_same_specialty_within_sixty_days(front: Front) -> None:
    """So is a day of a colleague."""
    doctor = await front.doctor(specialty="Cardiology")
    colleague = await front.doctor(specialty="Cardiology", clinic_id=doctor.clinic_id, max_patients_per_day=1)
    await booked(front, doctor.id, 0, 0)
    await front.leave(colleague.id, after(0), after(59))
    answer = await front.leave(doctor.id, after(0), policy=SAME_SPECIALTY)
    assert places(answer) == [(colleague.id, after(60).day, ""), None]


async def test_same_specialty_by_day(front: Front) -> None:
    """A day booking moves to a colleague of its clinic and specialty: on its own date first, then by code."""
    doctor = await front.doctor(code="M", specialty="Cardiology", max_patients_per_day=3)
    shared: dict[str, Any] = {"clinic_id": doctor.clinic_id, "max_patients_per_day": 1}
    second = await front.doctor(code="b", specialty="cardiology", **shared)
    first = await front.doctor(code="B", specialty="Cardiology", **shared)
    await front.doctor(code="A", specialty="Cardiology")
    await front.doctor(code="A2", specialty="Dermatology", **shared)
    idle = await front.doctor(code="A3", specialty="Cardiology", **shared, active=False)
    mine = await booked(front, doctor.id, 0, 0, 0)
    answer = await front.leave(doctor.id, after(0), policy=SAME_SPECIALTY)
    assert [one for one, _ in outcomes(answer)] == mine
    assert places(answer) == [
        (first.id, after(0).day, ""), (second.id, after(0).day, ""), (first.id, after(1).day, ""),
    ]  # fmt: skip
    assert idle.id not in {place[0] for place in places(answer) if place}


async def test_same_specialty_by_slot(front: Front) -> None:
    """A slot moves to a colleague's slot: by date, then start, then doctor code."""
    doctor = await front.doctor(code="M", specialty="Cardiology")
    colleagues = [
        await front.doctor(code=code, specialty="Cardiology", clinic_id=doctor.clinic_id) for code in ("Z", "K")
    ]
    mine = [await front.slot(doctor.id, soon(hours)) for hours in (4, 5, 6)]
    early = await front.slot(colleagues[0].id, soon(1))
    late = [await front.slot(colleague.id, soon(8)) for colleague in colleagues]
    people = await front.people(3)
    for person, slot in zip(people, mine, strict=True):
        await front.book_slot(person.id, slot.id)
    # The first patient is elsewhere at the early hour.
    other = await front.doctor()
    await front.book_slot(people[0].id, (await front.slot(other.id, soon(1))).id)
    answer = await front.leave(doctor.id, after(0), policy=SAME_SPECIALTY)
    assert [place and place[2] for place in places(answer)] == [late[1].id, early.id, late[0].id]


async def test_no_specialty(front: Front) -> None:
    """A doctor without a specialty has no colleagues."""
    doctor = await front.doctor()
    await front.doctor(clinic_id=doctor.clinic_id)
    (mine,) = await booked(front, doctor.id, 0)
    answer = await front.leave(doctor.id, after(0), policy=SAME_SPECIALTY)
    assert outcomes(answer) == [(mine, Outcome.OUTCOME_NOT_MOVED)]


@pytest.mark.parametrize("policy", [KEEP, CANCEL, SAME_DOCTOR, SAME_SPECIALTY])
async def test_a_trial_tells_what_would_happen(front: Front, policy: "Leave.Policy.ValueType") -> None:
    """With validate_only nothing changes, and the leave that follows does just what was told."""
    doctor = await front.doctor(code="M", specialty="Cardiology", max_patients_per_day=3)
    colleague = await front.doctor(code="N", specialty="Cardiology", clinic_id=doctor.clinic_id, max_patients_per_day=2)
    people = await front.people(4)
    for n in range(3):
        for person in people[:3]:
            await front.book(person.id, doctor.id, after(n))
    for of in (doctor, colleague):
        slots = [await front.slot(of.id, soon(24 * 3 + n), capacity=2) for n in range(2)]
    mine = await front.slot(doctor.id, soon(24 * 3 + 4), capacity=3)
    for person in people[:3]:
        await front.book_slot(person.id, mine.id)
    await front.book(people[3].id, colleague.id, after(0))
    await front.check_in((await front.book(people[3].id, doctor.id, today())).appointment.id)
    before = front.sql("select count(*), (select count(*) from leave), (select count(*) from leave_outcome) from log")
    plan = await front.leave(doctor.id, today(), after(3), policy=policy, validate_only=True)
    assert (plan.leave.id, plan.leave.affected_count) == ("", 13)
    assert before == front.sql(
        "select count(*), (select count(*) from leave), (select count(*) from leave_outcome) from log"
    )
    assert slots
    answer = await front.leave(doctor.id, today(), after(3), policy=policy)
    assert list(answer.affected) == list(plan.affected)
    assert len({one.appointment_id for one in plan.affected}) == 13


async def test_the_log_names_who_made_the_leave(front: Front) -> None:
    """Each move and cancellation is logged under the actor of the leave, in the method CreateLeave."""
    doctor = await front.doctor()
    await booked(front, doctor.id, 0, 1)
    key = await create_key(front, "STAFF")
    for n, policy in enumerate((CANCEL, SAME_DOCTOR)):
        days = pb.DateRange(from_date=day(after(n)), to_date=day(after(n)))
        wanted = Leave(doctor_id=doctor.id, days=days, policy=policy)
        await front.schedules.CreateLeave(pb.CreateLeaveRequest(leave=wanted), metadata=bearing(key.key))
    found = front.sql(
        "select distinct actor, method, type from log where method = 'CreateLeave' and type like 'appointment.%%'"
        " order by type"
    )
    assert found == [
        (f"keys/{key.api_key.id}", "CreateLeave", f"appointment.{type_}")
        for type_ in ("cancelled", "moved_in", "moved_out")
    ]


async def test_who_may_know_why(front: Front) -> None:
    """Everybody sees that a doctor is away; only the desk and the doctor see why, and whose appointments that meets."""
    doctor = await front.doctor()
    colleague = await front.doctor(clinic_id=doctor.clinic_id)
    (mine,) = await booked(front, doctor.id, 0)
    leave = (await front.leave(doctor.id, after(0))).leave
    patient = (await front.appointment(mine)).patient_id
    elsewhere = (await front.clinic()).id
    knowing = [
        user(front, "STAFF", clinic_ids=[doctor.clinic_id]),
        user(front, "ADMIN"),
        user(front, "DOCTOR", doctor_id=doctor.id),
        bearing((await create_key(front, "SERVICE")).key),
        (),
    ]
    others = [
        user(front, "STAFF", clinic_ids=[elsewhere]),
        user(front, "DOCTOR", doctor_id=colleague.id),
        user(front, "PATIENT", patient_id=patient),
        bearing((await create_key(front, "BOARD")).key),
        user(front, "PATIENT", "STAFF", patient_id=(await front.patient()).id, clinic_ids=[elsewhere]),
    ]
    for who, whole in [(one, True) for one in knowing] + [(one, False) for one in others]:
        found = await front.schedules.GetLeave(pb.GetLeaveRequest(leave_id=leave.id), metadata=who)
        listed = await front.schedules.ListLeaves(pb.ListLeavesRequest(doctor_id=doctor.id), metadata=who)
        assert [one.id for one in listed.leaves] == [leave.id]
        assert found.leave.days == leave.days
        for shown in (found.leave, listed.leaves[0]):
            assert (shown.reason, shown.affected_count) == (("holidays", 1) if whole else ("", 0))
        assert len(found.affected) == whole


async def test_who_may_create_and_cancel(front: Front) -> None:
    """A doctor may take leave for himself; staff for the doctors of their clinics."""
    doctor = await front.doctor()
    colleague = await front.doctor(clinic_id=doctor.clinic_id)
    leave = (await front.leave(doctor.id, after(9))).leave

    async def may(who: Any) -> tuple[str, str]:
        days = pb.DateRange(from_date=day(after(0)), to_date=day(after(0)))
        wanted = pb.CreateLeaveRequest(leave=Leave(doctor_id=doctor.id, days=days), validate_only=True)
        return (
            await outcome(front.schedules.CreateLeave(wanted, metadata=who)),
            await outcome(front.schedules.CancelLeave(cancel(leave, etag="0"), metadata=who)),
        )

    assert await may(user(front, "DOCTOR", doctor_id=doctor.id)) == ("OK", "ETAG_MISMATCH")
    assert await may(user(front, "STAFF", clinic_ids=[doctor.clinic_id])) == ("OK", "ETAG_MISMATCH")
    assert await may(user(front, "DOCTOR", doctor_id=colleague.id)) == ("ROLE_REQUIRED", "ROLE_REQUIRED")
    elsewhere = user(front, "STAFF", clinic_ids=[(await front.clinic()).id])
    assert await may(elsewhere) == ("CLINIC_NOT_YOURS", "CLINIC_NOT_YOURS")


async def test_list(front: Front) -> None:
    """Leaves are listed by their start, page by page; dates choose those that touch them, cancelled ones too."""
    doctor = await front.doctor()
    last = (await front.leave(doctor.id, after(20), after(22))).leave
    first = (await front.leave(doctor.id, after(0), after(5))).leave
    hours = (await front.leave(doctor.id, soon(24 * 10), soon(24 * 10 + 1))).leave
    await front.schedules.CancelLeave(cancel(first))

    async def listed(**fields: Any) -> list[str]:
        found: list[str] = []
        token = ""
        while True:
            request = pb.ListLeavesRequest(doctor_id=doctor.id, page_size=1, page_token=token, **fields)
            answer = await front.schedules.ListLeaves(request)
            found += [one.id for one in answer.leaves]
            token = answer.next_page_token
            if not token:
                return found

    assert await listed() == [first.id, hours.id, last.id]
    assert await listed(from_date=day(after(5)), to_date=day(after(10))) == [first.id, hours.id]
    assert await listed(from_date=day(after(6)), to_date=day(after(9))) == []
    assert await listed(from_date=day(after(22))) == [last.id]
    turned = pb.ListLeavesRequest(doctor_id=doctor.id, from_date=day(after(1)), to_date=day(after(0)))
    assert await outcome(front.schedules.ListLeaves(turned)) == "INVALID_FIELD"
    assert await outcome(front.schedules.ListLeaves(pb.ListLeavesRequest(doctor_id=UNKNOWN))) == "DOCTOR_NOT_FOUND"


async def test_no_booking_slips_through(front: Front) -> None:
    """Of bookings that come while a leave is created each is refused, or was made before and is settled."""
    doctor = await front.doctor(max_patients_per_day=100)
    people = await front.people(40)

    async def book(n: int) -> str:
        return await outcome(front.book(people[n].id, doctor.id, after(n % 4)))

    bookings = [asyncio.ensure_future(book(n)) for n in range(20)]
    leave = asyncio.ensure_future(front.leave(doctor.id, after(0), after(3), policy=CANCEL))
    bookings += [asyncio.ensure_future(book(n)) for n in range(20, 40)]
    answer = await leave
    found = Counter(await asyncio.gather(*bookings))
    assert found.keys() <= {"OK", "DOCTOR_ABSENT"}
    assert len(answer.affected) == found["OK"]
    assert front.sql("select count(*) from appointment where state = 'BOOKED'") == [(0,)]


async def test_a_booking_that_began_before(front: Front) -> None:
    """A booking that did not see the leave, and is committed after it, is settled with the others."""
    doctor = await front.doctor()
    (first,) = await booked(front, doctor.id, 5)
    with holding(front, doctor.id, after(1)) as booking:
        booking.execute(
            "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state)"
            " select patient_id, doctor_id, clinic_id, %s, 1, 'BOOKED' from appointment where id = %s",
            (after(1), first),
        )
        leave = asyncio.ensure_future(front.leave(doctor.id, after(0), after(2), policy=CANCEL))
        await until(lambda: waiting(front))
        booking.commit()
        answer = await leave
    assert [outcome for _, outcome in outcomes(answer)] == [Outcome.OUTCOME_CANCELLED]
    assert answer.leave.state == Leave.STATE_APPLIED


async def test_a_busy_place(front: Front) -> None:
    """A move to a day, or of a patient, whom somebody else has locked just now waits for him, and is made then."""
    doctor = await front.doctor()
    mine = await booked(front, doctor.id, 0, 0)
    with holding(front, doctor.id, after(1)):
        leave = asyncio.ensure_future(front.leave(doctor.id, after(0), policy=SAME_DOCTOR))
        await until(lambda: waiting(front))
    assert places(await leave) == [(doctor.id, after(1).day, "")] * 2
    patient = (await front.appointment(mine[1])).patient_id
    with psycopg.connect(front.conninfo) as connection:
        connection.execute("select lock_all(array['patient/' || %s])", (patient,))
        leave = asyncio.ensure_future(front.leave(doctor.id, after(1), policy=SAME_DOCTOR))
        await until(lambda: waiting(front))
    assert places(await leave) == [(doctor.id, after(2).day, "")] * 2


@asynccontextmanager
async def applying(front: Front) -> AsyncIterator[tuple[pb.CreateLeaveResponse, list[str]]]:
    """A leave that is being applied: of its three appointments the last is on a day that somebody has locked."""
    doctor = await front.doctor()
    mine = await booked(front, doctor.id, 0, 1, 12)
    with holding(front, doctor.id, after(12)):
        yield await front.leave(doctor.id, after(0), after(20), policy=CANCEL, idempotency_key="k"), mine


def cancellations(front: Front) -> Counter[str]:
    """How often each appointment was cancelled."""
    found = front.sql("select appointment_id::text from log where type = 'appointment.cancelled'")
    return Counter(one for (one,) in found)


async def test_a_long_leave_answers_before_its_end(front: Front, conninfo: str, settings: Settings) -> None:
    """CreateLeave answers after 5 s with what is done so far, and the rest follows by itself."""
    async with applying(front) as (answer, mine):
        assert answer.leave.state == Leave.STATE_APPLYING
        assert outcomes(answer) == [(one, Outcome.OUTCOME_CANCELLED) for one in mine[:2]]
        assert (await told(front, answer.leave)).affected == answer.affected
        person = await front.patient()
        assert await outcome(front.book(person.id, answer.leave.doctor_id, after(20))) == "DOCTOR_ABSENT"

    async def applied() -> bool:
        return (await told(front, answer.leave)).leave.state == Leave.STATE_APPLIED

    async with working(settings, conninfo):
        await until_true(applied)
    assert outcomes(await told(front, answer.leave)) == [(one, Outcome.OUTCOME_CANCELLED) for one in mine]
    assert front.sql("select type from log where resource = %s order by id", f"leaves/{answer.leave.id}") == [
        ("leave.created",), ("leave.applied",),
    ]  # fmt: skip


async def test_cancel_while_applying(front: Front) -> None:
    """CancelLeave of a leave that is being applied stops it, without waiting for what holds it up."""
    async with applying(front) as (answer, mine):
        stopped = await front.schedules.CancelLeave(cancel(answer.leave))
        assert stopped.leave.state == Leave.STATE_CANCELLED
        assert outcomes(stopped) == [(one, Outcome.OUTCOME_CANCELLED) for one in mine[:2]]
    await until(lambda: not waiting(front))
    assert await outcome(front.book((await front.patient()).id, answer.leave.doctor_id, after(0))) == "OK"
    assert (await front.appointment(mine[2])).state == appointment_pb2.Appointment.STATE_BOOKED
    assert (await told(front, answer.leave)).leave.affected_count == 2


async def test_two_replicas(front: Front, conninfo: str, settings: Settings) -> None:
    """Of several replicas one at a time settles a leave, so each appointment is settled once."""
    async with working(settings, conninfo), working(settings, conninfo):
        doctor = await front.doctor(max_patients_per_day=200)
        front.sql(
            "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state)"
            " select new_id(), %s, %s, %s::date + (n %% 3)::integer, n / 3 + 1, 'BOOKED'"
            " from generate_series(0, 299) n",
            *(doctor.id, doctor.clinic_id, after(0)),
        )
        answer = await front.leave(doctor.id, after(0), after(2), policy=CANCEL)
        await until(lambda: front.sql("select state from leave") == [("APPLIED",)])
        found = (await told(front, answer.leave)).affected
    assert len(found) == 300
    assert cancellations(front) == {one.appointment_id: 1 for one in found}


@pytest.mark.soak
async def test_ten_thousand_appointments(front: Front, conninfo: str, settings: Settings) -> None:
    """A leave over 10,000 appointments moves each of them once, and bookings of other doctors succeed meanwhile."""
    doctor = await front.doctor(max_patients_per_day=1000)
    other = await front.doctor(clinic_id=doctor.clinic_id, max_patients_per_day=1000)
    front.sql(
        "with p as (insert into patient (given_name, name_key) select 'P', 'p' || n from generate_series(0, 9999) n"
        " returning id), numbered as (select id, (row_number() over () - 1)::integer as n from p)"
        " insert into appointment (patient_id, doctor_id, clinic_id, date, number, state)"
        " select id, %s, %s, %s::date + n / 1000, n %% 1000 + 1, 'BOOKED' from numbered",
        *(doctor.id, doctor.clinic_id, after(0)),
    )
    person = await front.patient()
    bookings = 0

    async def applied() -> bool:
        nonlocal bookings
        visit = (await front.book(person.id, other.id, after(bookings % 100))).appointment
        await front.cancel(visit.id)
        bookings += 1
        return front.sql("select state from leave") == [("APPLIED",)]

    leave = asyncio.ensure_future(front.leave(doctor.id, after(0), after(9), policy=SAME_DOCTOR))
    async with working(settings, conninfo):
        await until_true(applied, 900)
        answer = await leave
    assert bookings > 1
    found = await told(front, answer.leave)
    assert (found.leave.state, found.leave.affected_count) == (Leave.STATE_APPLIED, 10_000)
    assert Counter(one.outcome for one in found.affected) == {Outcome.OUTCOME_MOVED: 10_000}
    assert len({one.appointment_id for one in found.affected}) == 10_000
    moved = (
        "select count(*), count(distinct appointment_id) from log where type = 'appointment.moved_in'"
        " and doctor_id = %s"
    )
    assert front.sql(moved, doctor.id) == [(10_000, 10_000)]
    assert front.sql(
        "select date, count(*) from appointment where doctor_id = %s group by 1 order by 1", doctor.id
    ) == [(after(10 + n), 1000) for n in range(10)]


@asynccontextmanager
async def client_of(service: Service, conninfo: str) -> AsyncIterator[Front]:
    """A client of a service that runs as processes."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        yield Front(channel, conninfo, service.port)


@pytest.mark.parametrize("victim", ["worker", "service"])
async def test_a_killed_process(conninfo: str, tmp_path: Path, victim: str) -> None:
    """After SIGKILL a leave goes on where it was, in the same service or in the next one: each appointment once."""
    with Service(tmp_path / "one.log", conninfo) as service:
        async with client_of(service, conninfo) as front:
            doctor = await front.doctor()
            mine = await booked(front, doctor.id, 0, 1, 12)
            with holding(front, doctor.id, after(12)):
                leave = asyncio.ensure_future(front.leave(doctor.id, after(0), after(20), policy=CANCEL))
                await until(lambda: front.sql("select settled from leave") == [(2,)] and waiting(front))
                workers = service.workers()
                if victim == "service":
                    service.process.kill()
                for worker in workers:
                    os.kill(worker, signal.SIGKILL)
                with pytest.raises(grpc.aio.AioRpcError):
                    await leave
            with nullcontext() if victim == "worker" else Service(tmp_path / "two.log", conninfo):
                await until(lambda: front.sql("select state from leave") == [("APPLIED",)])
            assert cancellations(front) == dict.fromkeys(mine, 1)
