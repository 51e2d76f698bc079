"""The waiting list: who joins it, and how free places find those who wait."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.type import dayofweek_pb2, timeofday_pb2
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import appointment_pb2, doctor_pb2, patient_pb2, queue_pb2, schedule_pb2, slot_pb2
from clinic.frontdesk.v1 import waitlist_pb2 as pb
from frontdesk.settings import Settings
from tests.clinic import ZONE, Clock, Front, day, details, outcome, reason_of, refusal, today
from tests.hostile.wire import working
from tests.identities import user
from tests.servers import Service
from tests.waiting import until, until_true

Entry = pb.WaitlistEntry
NEVER = "01900000-0000-7000-8000-000000000000"


@pytest.fixture
async def desk(front: Front, conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A front desk with background work."""
    async with working(settings, conninfo):
        yield front


def after(days: int) -> date:
    return today() + timedelta(days=days)


async def join(front: Front, patient_id: str, doctor_id: str = "", **fields: Any) -> Entry:
    """Wait for this doctor in the next 60 days, if nothing else is said."""
    fields.setdefault("from_date", day(today()))
    fields.setdefault("to_date", day(today() + timedelta(days=60)))
    if doctor_id:
        fields["doctor_id"] = doctor_id
    return (await front.waitlist.JoinWaitlist(pb.JoinWaitlistRequest(patient_id=patient_id, **fields))).entry


async def now(front: Front, entry: Entry) -> Entry:
    """The entry as it is now."""
    return (await front.waitlist.GetWaitlistEntry(pb.GetWaitlistEntryRequest(entry_id=entry.id))).entry


async def offered(front: Front, entry: Entry) -> pb.Offer:
    """The offer of an entry, once it has one."""

    async def has() -> bool:
        return (await now(front, entry)).state == Entry.STATE_OFFERED

    await until_true(has)
    return (await now(front, entry)).offer


async def in_state(front: Front, entry: Entry, state: "Entry.State.ValueType") -> Entry:
    """The entry, once it is in this state."""

    async def reached() -> bool:
        return (await now(front, entry)).state == state

    await until_true(reached)
    return await now(front, entry)


async def looked(front: Front) -> None:
    """Until the background work has looked at everything that is in the log now, and at what came of it."""
    for _ in range(2):
        await _looked_once(front)


async def _looked_once(front: Front) -> None:
    rows = front.sql("select count(*) from log")[0][0]
    seen = "select count(*) >= %s from log_reader r join seal s on s.position <= r.position where r.name = 'waitlist'"
    await until(lambda: front.sql(seen, rows) == [(True,)])


async def full_day(front: Front, doctor_id: str, on: date) -> list[str]:
    """Fill the day; the appointments."""
    found = []
    while True:
        try:
            found.append((await front.book((await front.patient()).id, doctor_id, on)).appointment.id)
        except grpc.aio.AioRpcError:
            return found


async def accept(front: Front, entry: Entry, **fields: Any) -> pb.AcceptOfferResponse:
    return await front.waitlist.AcceptOffer(pb.AcceptOfferRequest(entry_id=entry.id, **fields))


async def decline(front: Front, entry: Entry, *, leave: bool = False) -> Entry:
    return (await front.waitlist.DeclineOffer(pb.DeclineOfferRequest(entry_id=entry.id, leave=leave))).entry


async def leave(front: Front, entry: Entry) -> Entry:
    return (await front.waitlist.LeaveWaitlist(pb.LeaveWaitlistRequest(entry_id=entry.id))).entry


def minute(hours: int, minutes: int = 0) -> timeofday_pb2.TimeOfDay:
    return timeofday_pb2.TimeOfDay(hours=hours, minutes=minutes)


def at(on: date, hour: int, minute: int = 0) -> datetime:
    """An instant of the clinic's clock."""
    return datetime(on.year, on.month, on.day, hour, minute, tzinfo=ZoneInfo(ZONE))


async def one_place(front: Front, **fields: Any) -> tuple[doctor_pb2.Doctor, str, date]:
    """A doctor with one place a day, the appointment that takes it in a week, and that date."""
    doctor = await front.doctor(max_patients_per_day=1, **fields)
    on = after(7)
    taken = await front.book((await front.patient()).id, doctor.id, on)
    return doctor, taken.appointment.id, on


def only(on: date) -> dict[str, Any]:
    return {"from_date": day(on), "to_date": day(on)}


# Joining and leaving


async def test_an_entry(front: Front) -> None:
    """An entry has what was asked for; it can be got, listed and left, once."""
    doctor, person = await front.doctor(), await front.patient()
    entry = await join(
        front, person.id, doctor.id,
        from_date=day(after(1)), to_date=day(after(366)),
        weekdays=[dayofweek_pb2.FRIDAY, dayofweek_pb2.MONDAY],
        earliest=minute(8), latest=minute(24), priority=queue_pb2.PRIORITY_URGENT,
    )  # fmt: skip
    assert (entry.patient_id, entry.doctor_id, entry.clinic_id) == (person.id, doctor.id, doctor.clinic_id)
    assert (entry.from_date, entry.to_date) == (day(after(1)), day(after(366)))
    assert list(entry.weekdays) == [dayofweek_pb2.MONDAY, dayofweek_pb2.FRIDAY]
    assert (entry.earliest, entry.latest) == (minute(8), minute(24))
    assert (entry.state, entry.priority) == (Entry.STATE_WAITING, queue_pb2.PRIORITY_URGENT)
    assert not entry.HasField("offer")
    assert await now(front, entry) == entry
    other = await join(front, person.id, specialty=pb.Specialty(clinic_id=doctor.clinic_id, specialty="Cardiology"))
    assert other.specialty == pb.Specialty(clinic_id=doctor.clinic_id, specialty="Cardiology")
    assert other.priority == queue_pb2.PRIORITY_NORMAL
    left = await leave(front, entry)
    assert left.state == Entry.STATE_LEFT
    error = await refusal(leave(front, entry))
    assert reason_of(error) == "INVALID_TRANSITION"
    assert details(error)["ErrorInfo"].metadata["state"] == "LEFT"


async def test_lists(front: Front) -> None:
    """The list has filters for patient, doctor, clinic and states, in the order of joining, by pages."""
    doctor, other = await front.doctor(), await front.doctor()
    people = await front.people(3)
    entries = [await join(front, one.id, doctor.id) for one in people] + [await join(front, people[0].id, other.id)]
    await leave(front, entries[1])

    async def listed(**fields: Any) -> list[int]:
        answer = await front.waitlist.ListWaitlist(pb.ListWaitlistRequest(**fields))
        return [[one.id for one in entries].index(one.id) for one in answer.entries]

    assert await listed() == [0, 1, 2, 3]
    assert await listed(patient_id=people[0].id) == [0, 3]
    assert await listed(doctor_id=doctor.id) == [0, 1, 2]
    assert await listed(clinic_id=doctor.clinic_id, states=[Entry.STATE_WAITING]) == (
        [0, 2, 3] if other.clinic_id == doctor.clinic_id else [0, 2]
    )
    assert await listed(states=[Entry.STATE_LEFT, Entry.STATE_BOOKED]) == [1]
    found, token = [], ""
    while True:
        answer = await front.waitlist.ListWaitlist(pb.ListWaitlistRequest(page_size=3, page_token=token))
        found += [one.id for one in answer.entries]
        token = answer.next_page_token
        if not token:
            break
    assert found == [one.id for one in entries]


async def test_joining_is_refused(front: Front) -> None:
    """Each bad wish is refused with its reason."""
    doctor, person = await front.doctor(), await front.patient()
    inactive = await front.doctor(active=False)
    visit = (await front.book(person.id, doctor.id, after(3))).appointment
    cancelled = (await front.book(person.id, doctor.id, after(4))).appointment
    await front.cancel(cancelled.id)
    of_other = (await front.book((await front.patient()).id, doctor.id, after(3))).appointment
    clinic = doctor.clinic_id
    some = pb.Specialty(clinic_id=clinic, specialty="x")
    for reason, patient, wish in (
        ("PATIENT_NOT_FOUND", NEVER, {"doctor_id": doctor.id}),
        ("DOCTOR_NOT_FOUND", person.id, {"doctor_id": NEVER}),
        ("DOCTOR_INACTIVE", person.id, {"doctor_id": inactive.id}),
        ("CLINIC_NOT_FOUND", person.id, {"specialty": pb.Specialty(clinic_id=NEVER, specialty="x")}),
        ("INVALID_FIELD", person.id, {"specialty": pb.Specialty(clinic_id=clinic, specialty=" ")}),
        ("INVALID_FIELD", person.id, {"specialty": pb.Specialty(clinic_id=clinic)}),
        ("INVALID_FIELD", person.id, {}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "from_date": None}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "to_date": None}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "from_date": day(after(2)), "to_date": day(after(1))}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "to_date": day(today() + timedelta(days=366))}),
        ("DATE_IN_PAST", person.id, {"doctor_id": doctor.id, "from_date": day(after(-9)), "to_date": day(after(-2))}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "weekdays": [0]}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "weekdays": [9]}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "weekdays": [1, 1]}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "earliest": minute(25)}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "earliest": minute(9), "latest": minute(9)}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "earliest": minute(24)}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "latest": timeofday_pb2.TimeOfDay(hours=9, seconds=1)}),
        ("INVALID_FIELD", person.id, {"doctor_id": doctor.id, "priority": 9}),
        ("APPOINTMENT_NOT_FOUND", person.id, {"doctor_id": doctor.id, "appointment_id": NEVER}),
        ("APPOINTMENT_NOT_FOUND", person.id, {"doctor_id": doctor.id, "appointment_id": of_other.id}),
        ("INVALID_TRANSITION", person.id, {"doctor_id": doctor.id, "appointment_id": cancelled.id}),
        ("OK", person.id, {"doctor_id": doctor.id, "appointment_id": visit.id}),
        ("ALREADY_WAITING", person.id, {"doctor_id": doctor.id}),
        ("OK", person.id, {"doctor_id": doctor.id, "from_date": day(after(61)), "to_date": day(after(61))}),
        ("OK", person.id, {"specialty": some}),
        ("ALREADY_WAITING", person.id, {"specialty": pb.Specialty(clinic_id=clinic, specialty="X")}),
    ):  # fmt: skip
        assert await outcome(join(front, patient, **wish)) == reason, wish
    front.sql("update patient set active = false where id = %s", person.id)
    assert await outcome(join(front, person.id, doctor.id, from_date=day(after(70)), to_date=day(after(70)))) == (
        "PATIENT_INACTIVE"
    )
    front.sql("update clinic set active = false")
    assert await outcome(join(front, (await front.patient()).id, doctor.id)) == "CLINIC_INACTIVE"


async def test_keys(desk: Front) -> None:
    """A key joins, accepts and declines once; its replay says so."""
    doctor, taken, on = await one_place(desk)
    person = await desk.patient()
    request = pb.JoinWaitlistRequest(patient_id=person.id, doctor_id=doctor.id, **only(on), idempotency_key="k")
    twins = await asyncio.gather(*(desk.waitlist.JoinWaitlist(request) for _ in range(5)))
    assert Counter(one.replayed for one in twins) == {False: 1, True: 4}
    (entry,) = {one.entry.id: one.entry for one in twins}.values()
    await desk.cancel(taken)
    await offered(desk, entry)
    answers = await asyncio.gather(*(accept(desk, entry, idempotency_key="k") for _ in range(5)))
    assert Counter(one.replayed for one in answers) == {False: 1, True: 4}
    assert len({one.appointment.id for one in answers}) == 1
    assert {one.entry.state for one in answers} == {Entry.STATE_BOOKED}


# Offers


async def test_a_freed_place_finds_its_patient(desk: Front) -> None:
    """A cancelled place is offered by priority, then by joining; declined it goes on, accepted it is booked."""
    doctor, taken, on = await one_place(desk)
    first, second, urgent = [
        await join(desk, one.id, doctor.id, **only(on), priority=priority)
        for one, priority in zip(await desk.people(3), (0, 0, queue_pb2.PRIORITY_URGENT), strict=True)
    ]
    await desk.cancel(taken)
    offer = await offered(desk, urgent)
    assert offer.doctor_day == appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(on))
    assert timedelta(minutes=29) < offer.expire_time.ToDatetime() - datetime.utcnow() <= timedelta(minutes=30)
    # It is nobody else's: it is held.
    error = await refusal(desk.book((await desk.patient()).id, doctor.id, on))
    assert (reason_of(error), details(error)["ErrorInfo"].metadata["held"]) == ("DAY_FULL", "1")
    assert (await now(desk, first)).state == Entry.STATE_WAITING
    assert (await decline(desk, urgent)).state == Entry.STATE_WAITING
    await offered(desk, first)
    assert (await decline(desk, first, leave=True)).state == Entry.STATE_LEFT
    await offered(desk, second)
    answer = await accept(desk, second)
    assert answer.entry.state == Entry.STATE_BOOKED
    assert answer.entry.booked_appointment_id == answer.appointment.id
    assert (answer.appointment.patient_id, answer.appointment.doctor_id) == (second.patient_id, doctor.id)
    assert (answer.appointment.number, answer.appointment.date) == (1, day(on))
    assert answer.revision == 4
    # What was declined is not offered again, until somebody has taken it.
    await desk.cancel(answer.appointment.id)
    await offered(desk, urgent)


async def test_what_was_declined(desk: Front) -> None:
    """A declined place is not offered to the patient again, though it is free, until somebody has taken it."""
    doctor, taken, on = await one_place(desk)
    entry = await join(desk, (await desk.patient()).id, doctor.id, **only(on))
    await desk.cancel(taken)
    await offered(desk, entry)
    await decline(desk, entry)
    await looked(desk)
    assert (await now(desk, entry)).state == Entry.STATE_WAITING
    again = await desk.book((await desk.patient()).id, doctor.id, on)
    await desk.cancel(again.appointment.id)
    await offered(desk, entry)


async def test_what_was_free_already(desk: Front) -> None:
    """A place that is free when somebody joins is offered too: the first date, and slots rather than days."""
    doctor = await desk.doctor()
    entry = await join(desk, (await desk.patient()).id, doctor.id)
    assert (await offered(desk, entry)).doctor_day.date == day(after(1))
    other = await desk.doctor()
    slot = await desk.slot(other.id, at(after(5), 9))
    narrow = await join(desk, (await desk.patient()).id, other.id, earliest=minute(8))
    assert (await offered(desk, narrow)).slot_id == slot.id
    # That day has a slot, so its places have times.
    days = await join(desk, (await desk.patient()).id, other.id, **only(after(5)))
    await looked(desk)
    assert (await now(desk, days)).state == Entry.STATE_WAITING


async def test_what_fits(desk: Front) -> None:
    """Weekday, dates and times of day decide whether a slot fits; so does the specialty, without letter case."""
    doctor = await desk.doctor(specialty="Cardiology")
    monday = today() + timedelta(days=14 - today().weekday())
    people = await desk.people(7)
    wishes: Sequence[tuple[bool, dict[str, Any]]] = (
        (False, {"doctor_id": doctor.id, "weekdays": [dayofweek_pb2.TUESDAY]}),
        (False, {"doctor_id": doctor.id, "earliest": minute(9, 1)}),
        (False, {"doctor_id": doctor.id, "latest": minute(9, 29)}),
        (False, {"doctor_id": doctor.id, "to_date": day(monday - timedelta(days=1))}),
        (False, {"specialty": pb.Specialty(clinic_id=doctor.clinic_id, specialty="Neurology")}),
        (True, {"doctor_id": doctor.id, "weekdays": [1], "earliest": minute(9), "latest": minute(9, 30)}),
        (True, {"specialty": pb.Specialty(clinic_id=doctor.clinic_id, specialty="CARDIOLOGY"), "earliest": minute(0)}),
    )
    # Nothing else is free.
    desk.sql("update doctor set max_patients_per_day = 2 where id = %s", doctor.id)
    entries = []
    await desk.slot(doctor.id, at(monday, 9), capacity=7)
    for person, (_, wish) in zip(people, wishes, strict=True):
        entries.append(
            await join(
                desk,
                person.id,
                **{
                    "from_date": day(monday),
                    "to_date": day(monday),
                    **(wish if "to_date" not in wish else {**wish, "from_date": wish["to_date"]}),
                },
            )
        )
    for entry, (fits, _) in zip(entries, wishes, strict=True):
        if fits:
            await offered(desk, entry)
    await looked(desk)
    states = [(await now(desk, entry)).state == Entry.STATE_OFFERED for entry in entries]
    assert states[3] in (True, False)
    assert states[:3] + states[4:] == [fits for n, (fits, _) in enumerate(wishes) if n != 3]


async def test_ways_of_becoming_free(desk: Front) -> None:
    """However a place becomes free, it is offered."""
    on = after(7)

    async def waiting(doctor: doctor_pb2.Doctor, **fields: Any) -> Entry:
        return await join(desk, (await desk.patient()).id, doctor.id, **{**only(on), **fields})

    doctor, taken, _ = await one_place(desk)
    moved = await waiting(doctor)
    await desk.appointments.RescheduleAppointment(
        appointment_pb2.RescheduleAppointmentRequest(
            appointment_id=taken, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(8)))
        )
    )
    await offered(desk, moved)

    doctor, taken, _ = await one_place(desk)
    raised = await waiting(doctor)
    await desk.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(on), is_present=True, max_patients=2)
    )
    await offered(desk, raised)

    doctor, taken, _ = await one_place(desk)
    wider = await waiting(doctor)
    await desk.doctors.UpdateDoctor(
        doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=doctor.id, max_patients_per_day=5))
    )
    await offered(desk, wider)

    doctor = await desk.doctor()
    opened = await waiting(doctor, earliest=minute(1))
    slot = await desk.slot(doctor.id, at(on, 9))
    await offered(desk, opened)

    doctor = await desk.doctor()
    slot = await desk.slot(doctor.id, at(on, 9))
    await desk.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id]))
    blocked = await waiting(doctor, earliest=minute(1))
    await looked(desk)
    assert (await now(desk, blocked)).state == Entry.STATE_WAITING
    await desk.slots.ReleaseSlots(slot_pb2.ReleaseSlotsRequest(slot_ids=[slot.id]))
    await offered(desk, blocked)

    doctor = await desk.doctor()
    away = (await desk.leave(doctor.id, on, on)).leave
    back = await waiting(doctor)
    await looked(desk)
    assert (await now(desk, back)).state == Entry.STATE_WAITING
    await desk.schedules.CancelLeave(schedule_pb2.CancelLeaveRequest(leave_id=away.id))
    await offered(desk, back)

    held = await desk.doctor(max_patients_per_day=1)
    hold = await desk.hold(held.id, on)
    after_hold = await waiting(held)
    await looked(desk)
    assert (await now(desk, after_hold)).state == Entry.STATE_WAITING
    desk.sql("update hold set expire_time = create_time + interval '1 ms' where id = %s", hold.id)
    await offered(desk, after_hold)

    # By hand, in a way that the log does not know: the slow look through the list finds it.
    doctor, taken, _ = await one_place(desk)
    swept = await waiting(doctor)
    await looked(desk)
    desk.sql("update appointment set state = 'CANCELLED', cancel_time = now() where id = %s", taken)
    await offered(desk, swept)


async def test_an_earlier_appointment(desk: Front) -> None:
    """Who has an appointment is offered only what is earlier; accepting moves it, and its place is offered on."""
    doctor, taken, on = await one_place(desk)
    person, other = await desk.people(2)
    mine = (await desk.book(person.id, doctor.id, on + timedelta(days=1))).appointment
    entry = await join(
        desk, person.id, doctor.id, from_date=day(on), to_date=day(on + timedelta(days=30)), appointment_id=mine.id
    )
    following = await join(desk, other.id, doctor.id, **only(on + timedelta(days=1)))
    await looked(desk)
    assert (await now(desk, entry)).state == Entry.STATE_WAITING, "everything later is free"
    await desk.cancel(taken)
    await offered(desk, entry)
    answer = await accept(desk, entry)
    assert (answer.appointment.id, answer.appointment.date) == (mine.id, day(on))
    assert answer.vacated_revision > 0
    assert answer.entry.booked_appointment_id == mine.id
    await offered(desk, following)


async def test_an_appointment_that_is_no_more(desk: Front) -> None:
    """If the appointment that would be moved is cancelled, moved or begun, the entry is LEFT."""
    doctor = await desk.doctor()
    people = await desk.people(3)
    visits = [(await desk.book(one.id, doctor.id)).appointment for one in people]
    entries = [
        await join(desk, one.id, doctor.id, appointment_id=visit.id) for one, visit in zip(people, visits, strict=True)
    ]
    await desk.cancel(visits[0].id)
    await desk.appointments.RescheduleAppointment(
        appointment_pb2.RescheduleAppointmentRequest(
            appointment_id=visits[1].id, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(9)))
        )
    )
    await desk.check_in(visits[2].id)
    for entry in entries:
        await in_state(desk, entry, Entry.STATE_LEFT)


async def test_a_booking_ends_the_wait(desk: Front) -> None:
    """A booking that fits ends the entry; the offered place can be booked without its hold, and another one too."""
    doctor, taken, on = await one_place(desk)
    person = await desk.patient()
    entry = await join(desk, person.id, doctor.id, **only(on))
    elsewhere = await join(desk, person.id, (await desk.doctor()).id, **only(after(30)))
    await desk.cancel(taken)
    await offered(desk, entry)
    booked = (await desk.book(person.id, doctor.id, on)).appointment
    ended = await now(desk, entry)
    assert (ended.state, ended.booked_appointment_id) == (Entry.STATE_BOOKED, booked.id)
    assert (await now(desk, elsewhere)).state in (Entry.STATE_WAITING, Entry.STATE_OFFERED)
    assert await outcome(accept(desk, entry)) == "NO_OFFER"


async def test_an_offer_runs_out(desk: Front) -> None:
    """An offer that runs out goes to the next one; who comes late is told."""
    clinic = await desk.clinic(offer_ttl=Duration(seconds=1))
    doctor, taken, on = await one_place(desk, clinic_id=clinic.id)
    first, second = [await join(desk, one.id, doctor.id, **only(on)) for one in await desk.people(2)]
    await desk.cancel(taken)
    await offered(desk, first)
    await offered(desk, second)
    assert (await now(desk, first)).state == Entry.STATE_WAITING
    assert await outcome(accept(desk, first)) == "OFFER_EXPIRED"
    assert await outcome(decline(desk, first)) == "OFFER_EXPIRED"
    told = "select type from log where resource = %s and type is not null order by id"
    assert desk.sql(told, f"waitlistEntries/{first.id}") == [
        ("waitlist.joined",), ("waitlist.offered",), ("waitlist.offer_expired",),
    ]  # fmt: skip


@pytest.mark.parametrize("closed", ["absent", "leave", "exception", "blocked", "inactive"])
async def test_a_closed_place_is_withdrawn(desk: Front, closed: str) -> None:
    """An offer whose place is closed is withdrawn, and accepting says why; a lowered capacity leaves it."""
    doctor, on = await desk.doctor(), after(7)
    slot = await desk.slot(doctor.id, at(on, 9))
    # At some time of the day: without open slots the day's places would be offered.
    entry = await join(desk, (await desk.patient()).id, doctor.id, **only(on), earliest=minute(1))
    await offered(desk, entry)
    await desk.doctors.UpdateDoctor(
        doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=doctor.id, max_patients_per_day=1))
    )
    reason = "DOCTOR_ABSENT"
    if closed == "absent":
        await desk.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(on), is_present=False)
        )
    elif closed == "leave":
        await desk.leave(doctor.id, on, on)
    elif closed == "exception":
        await desk.schedules.SetScheduleException(
            schedule_pb2.SetScheduleExceptionRequest(doctor_id=doctor.id, date=day(on), closed=True)
        )
    elif closed == "blocked":
        await desk.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id]))
        reason = "SLOT_BLOCKED"
    else:
        await desk.doctors.UpdateDoctor(
            doctor_pb2.UpdateDoctorRequest(
                doctor=doctor_pb2.Doctor(id=doctor.id, active=False), update_mask=FieldMask(paths=["active"])
            )
        )
        reason = "DOCTOR_INACTIVE"
    assert await outcome(accept(desk, entry)) == reason
    await in_state(desk, entry, Entry.STATE_WAITING)
    assert await outcome(accept(desk, entry)) == reason


async def test_the_desk_offers(front: Front) -> None:
    """The desk may offer what does not fit, for as long as it says; not what cannot be booked, nor too late."""
    doctor, other = await front.doctor(), await front.doctor(max_patients_per_day=1)
    person = await front.patient()
    entry = await join(front, person.id, doctor.id, **only(after(30)))

    async def offer(on: date, to: str = other.id, **fields: Any) -> Entry:
        target = appointment_pb2.DoctorDay(doctor_id=to, date=day(on))
        request = pb.OfferPlaceRequest(entry_id=entry.id, doctor_day=target, **fields)
        return (await front.waitlist.OfferPlace(request)).entry

    made = await offer(after(3), ttl=Duration(seconds=86400))
    assert made.state == Entry.STATE_OFFERED
    assert made.offer.doctor_day == appointment_pb2.DoctorDay(doctor_id=other.id, date=day(after(3)))
    length = made.offer.expire_time.ToDatetime() - datetime.utcnow()
    assert timedelta(hours=23) < length <= timedelta(hours=24)
    # Another offer takes its place.
    again = await offer(after(4))
    assert again.offer.doctor_day.date == day(after(4))
    assert await outcome(front.book((await front.patient()).id, other.id, after(3))) == "OK"
    assert await outcome(offer(after(3))) == "DAY_FULL"
    assert (await now(front, entry)).offer == again.offer, "a refused offer leaves the other one"
    assert await outcome(offer(today())) == "TOO_LATE"
    for seconds in (0, 86401):
        assert await outcome(offer(after(5), ttl=Duration(seconds=seconds))) == "INVALID_FIELD"
    assert await outcome(offer(after(5), NEVER)) == "DOCTOR_NOT_FOUND"
    soon = await front.slot(doctor.id, datetime.now(ZoneInfo(ZONE)) + timedelta(minutes=50))
    assert (
        await outcome(front.waitlist.OfferPlace(pb.OfferPlaceRequest(entry_id=entry.id, slot_id=soon.id))) == "TOO_LATE"
    )
    later = await front.slot(doctor.id, datetime.now(ZoneInfo(ZONE)) + timedelta(minutes=90))
    until_then = (
        await front.waitlist.OfferPlace(
            pb.OfferPlaceRequest(entry_id=entry.id, slot_id=later.id, ttl=Duration(seconds=86400))
        )
    ).entry.offer.expire_time
    assert later.start_time.seconds - until_then.seconds == 3600
    booked = await accept(front, entry)
    assert booked.appointment.slot_id == later.id
    assert await outcome(offer(after(6))) == "INVALID_TRANSITION"
    for call in (
        front.waitlist.GetWaitlistEntry(pb.GetWaitlistEntryRequest(entry_id=NEVER)),
        front.waitlist.LeaveWaitlist(pb.LeaveWaitlistRequest(entry_id=NEVER)),
        front.waitlist.AcceptOffer(pb.AcceptOfferRequest(entry_id=NEVER)),
        front.waitlist.DeclineOffer(pb.DeclineOfferRequest(entry_id=NEVER)),
    ):
        assert await outcome(call) == "WAITLIST_ENTRY_NOT_FOUND"
    fresh = await join(front, person.id, doctor.id, **only(after(31)))
    assert await outcome(accept(front, fresh)) == "NO_OFFER"
    assert await outcome(decline(front, fresh)) == "NO_OFFER"


async def test_an_undone_cancellation_meets_the_offer(desk: Front) -> None:
    """An offered place counts: a cancellation is not undone against it."""
    doctor, taken, on = await one_place(desk)
    entry = await join(desk, (await desk.patient()).id, doctor.id, **only(on))
    visit = (await desk.cancel(taken)).appointment
    await offered(desk, entry)
    error = await refusal(
        desk.appointments.UndoTransition(appointment_pb2.UndoTransitionRequest(appointment_id=taken, etag=visit.etag))
    )
    assert (reason_of(error), details(error)["ErrorInfo"].metadata.get("held")) == ("DAY_FULL", "1")


async def test_the_last_date_passes(at: Clock, conninfo: str, settings: Settings) -> None:
    """After the last date an entry is EXPIRED, in the clinic's time."""
    async with at("2027-03-01 12:00+00") as front:
        doctor = await front.doctor(max_patients_per_day=1)
        taken = await front.book((await front.patient()).id, doctor.id, date(2027, 3, 2))
        entry = await join(front, (await front.patient()).id, doctor.id, **only(date(2027, 3, 2)))
        assert taken.revision
    # 23:59 in São Paulo.
    async with at("2027-03-03 02:59+00") as front, working(settings, conninfo):
        await looked(front)
        assert (await now(front, entry)).state == Entry.STATE_WAITING
    async with at("2027-03-03 03:00+00") as front, working(settings, conninfo):
        await in_state(front, entry, Entry.STATE_EXPIRED)


async def test_merged_patients(desk: Front) -> None:
    """A merged patient's entries go on as the kept one's; a second one for the same ends."""
    doctor, taken, on = await one_place(desk)
    kept, merged = await desk.people(2)
    same = [await join(desk, one.id, doctor.id, **only(on)) for one in (kept, merged)]
    more = await join(desk, merged.id, doctor.id, **only(on + timedelta(days=40)), earliest=minute(1))
    await desk.patients.MergePatients(
        patient_pb2.MergePatientsRequest(keep_patient_id=kept.id, merge_patient_id=merged.id)
    )
    assert [(await now(desk, one)).state for one in same] == [Entry.STATE_WAITING, Entry.STATE_LEFT]
    assert (await now(desk, more)).patient_id == kept.id
    await desk.cancel(taken)
    await offered(desk, same[0])
    assert (await accept(desk, same[0])).appointment.patient_id == kept.id


async def test_who_may(front: Front) -> None:
    """A patient reaches his own entries, and sets no priority; staff their clinic's; a doctor offers his own places."""
    clinic = await front.clinic()
    doctor, other = await front.doctor(clinic_id=clinic.id), await front.doctor()
    person, stranger = await front.people(2)
    own, others = user(front, "PATIENT", patient_id=person.id), user(front, "PATIENT", patient_id=stranger.id)
    staff, elsewhere = user(front, "STAFF", clinic_ids=[clinic.id]), user(front, "STAFF", clinic_ids=[other.clinic_id])
    wish = pb.JoinWaitlistRequest(
        patient_id=person.id, doctor_id=doctor.id, from_date=day(after(3)), to_date=day(after(3))
    )
    for who, said in ((others, "PATIENT_NOT_FOUND"), (elsewhere, "CLINIC_NOT_YOURS")):
        assert await outcome(front.waitlist.JoinWaitlist(wish, metadata=who)) == said
    urgent = pb.JoinWaitlistRequest()
    urgent.CopyFrom(wish)
    urgent.priority = queue_pb2.PRIORITY_URGENT
    assert await outcome(front.waitlist.JoinWaitlist(urgent, metadata=own)) == "ROLE_REQUIRED"
    entry = (await front.waitlist.JoinWaitlist(wish, metadata=own)).entry
    get = pb.GetWaitlistEntryRequest(entry_id=entry.id)
    for who, said in (
        (own, "OK"), (staff, "OK"), (others, "WAITLIST_ENTRY_NOT_FOUND"), (elsewhere, "CLINIC_NOT_YOURS"),
    ):  # fmt: skip
        assert await outcome(front.waitlist.GetWaitlistEntry(get, metadata=who)) == said
    for who, count in ((own, 1), (staff, 1), (others, 0), (elsewhere, 0)):
        answer = await front.waitlist.ListWaitlist(pb.ListWaitlistRequest(), metadata=who)
        assert len(answer.entries) == count
    offer = pb.OfferPlaceRequest(
        entry_id=entry.id, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(3)))
    )
    mine, colleague = user(front, "DOCTOR", doctor_id=doctor.id), user(front, "DOCTOR", doctor_id=other.id)
    assert await outcome(front.waitlist.OfferPlace(offer, metadata=own)) == "ROLE_REQUIRED"
    assert await outcome(front.waitlist.OfferPlace(offer, metadata=colleague)) == "WAITLIST_ENTRY_NOT_FOUND"
    assert await outcome(front.waitlist.OfferPlace(offer, metadata=mine)) == "OK"
    assert await outcome(front.waitlist.GetWaitlistEntry(get, metadata=mine)) == "ROLE_REQUIRED"
    taking = pb.AcceptOfferRequest(entry_id=entry.id)
    for who, said in ((others, "WAITLIST_ENTRY_NOT_FOUND"), (elsewhere, "CLINIC_NOT_YOURS"), (own, "OK")):
        assert await outcome(front.waitlist.AcceptOffer(taking, metadata=who)) == said
    for who, said in ((others, "WAITLIST_ENTRY_NOT_FOUND"), (own, "INVALID_TRANSITION")):
        call = front.waitlist.LeaveWaitlist(pb.LeaveWaitlistRequest(entry_id=entry.id), metadata=who)
        assert await outcome(call) == said


# Many


async def test_a_whole_day_at_once(front: Front, conninfo: str, settings: Settings) -> None:
    """A day that is cancelled at once finds as many of those who wait, each one place, with two replicas at work."""
    doctor, on = await front.doctor(max_patients_per_day=20), after(7)
    taken = await full_day(front, doctor.id, on)
    people = await front.people(40)
    for start in range(0, 40, 10):
        await asyncio.gather(*(join(front, one.id, doctor.id, **only(on)) for one in people[start : start + 10]))
    async with working(settings, conninfo), working(settings, conninfo):
        await asyncio.gather(*(front.cancel(one) for one in taken))
        await until(lambda: front.sql("select count(*) from waitlist_entry where state = 'OFFERED'") == [(20,)])
        await looked(front)
    live = "select count(*), count(distinct patient_id) from hold where state = 'HELD' and entry_id is not null"
    assert front.sql(live) == [(20, 20)]
    # By joining.
    assert front.sql(
        "select max(create_time) filter (where state = 'OFFERED') < min(create_time) filter (where state = 'WAITING')"
        " from waitlist_entry"
    ) == [(True,)]


async def test_a_killed_background_process(conninfo: str, tmp_path: Any) -> None:
    """After SIGKILL the next process goes on: what was freed meanwhile is offered, once."""
    with Service(tmp_path / "log", conninfo, access="open") as service:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            front = Front(channel, conninfo, service.port)
            doctor, taken, on = await one_place(front)
            entry = await join(front, (await front.patient()).id, doctor.id, **only(on))
            (pid,) = service.workers("background")
            os.kill(pid, signal.SIGKILL)
            await front.cancel(taken)
            await offered(front, entry)
            assert (await accept(front, entry)).entry.state == Entry.STATE_BOOKED


# What must not stop the others


async def _others_wait(front: Front) -> None:
    """So many who wait for a full doctor that the slow look through the list comes to nobody else in time."""
    full, on = await front.doctor(max_patients_per_day=1), after(90)
    await front.book((await front.patient()).id, full.id, on)
    front.sql(
        "with p as (insert into patient (given_name, name_key) select 'W', 'w' || n from generate_series(1, 200) n"
        " returning id)"
        " insert into waitlist_entry (patient_id, clinic_id, doctor_id, from_date, to_date, create_time, update_time)"
        " select id, %s, %s, %s, %s, now(), now() from p",
        *(full.clinic_id, full.id, on, on),
    )


async def test_a_place_that_is_given_up(desk: Front) -> None:
    """Whoever leaves the list, books elsewhere or releases a hold gives the place to the next one at once."""
    await _others_wait(desk)
    doctor, taken, on = await one_place(desk)
    first, second, third = [
        await join(desk, one.id, doctor.id, from_date=day(on), to_date=day(on + timedelta(days=1)), weekdays=())
        if n == 1
        else await join(desk, one.id, doctor.id, **only(on))
        for n, one in enumerate(await desk.people(3))
    ]
    blocker = await desk.book((await desk.patient()).id, doctor.id, on + timedelta(days=1))
    await desk.cancel(taken)
    await offered(desk, first)
    await leave(desk, first)
    await offered(desk, second)
    await desk.cancel(blocker.appointment.id)
    await desk.book(second.patient_id, doctor.id, on + timedelta(days=1))
    assert (await now(desk, second)).state == Entry.STATE_BOOKED
    await offered(desk, third)
    await accept(desk, third)

    held = await desk.doctor(max_patients_per_day=1)
    hold = await desk.hold(held.id, on)
    fourth = await join(desk, (await desk.patient()).id, held.id, **only(on))
    await looked(desk)
    assert (await now(desk, fourth)).state == Entry.STATE_WAITING
    await desk.appointments.ReleaseHold(appointment_pb2.ReleaseHoldRequest(hold_id=hold.id))
    await offered(desk, fourth)


async def test_nobody_is_kept_by_others(desk: Front) -> None:
    """Neither a closed day that thousands want, nor who cannot book, nor a far wish keeps others from their offers."""
    await _others_wait(desk)
    wanted, on = await desk.doctor(max_patients_per_day=5), after(20)
    desk.sql(
        "with p as (insert into patient (given_name, name_key, active) select 'P', 'p' || n, n % 2 = 0"
        " from generate_series(1, 3000) n returning id)"
        " insert into waitlist_entry (patient_id, clinic_id, doctor_id, from_date, to_date, create_time, update_time)"
        " select id, %s, %s, %s, %s, now() - interval '1 day', now() from p".replace("n % 2", "n %% 2"),
        *(wanted.clinic_id, wanted.id, on, on),
    )
    far = {"from_date": Date(year=9999, month=12, day=30), "to_date": Date(year=9999, month=12, day=31)}
    await join(desk, (await desk.patient()).id, wanted.id, **far)
    doctor, taken, _ = await one_place(desk)
    good = await join(desk, (await desk.patient()).id, doctor.id, **only(after(7)))
    visit = (await desk.book((await desk.patient()).id, wanted.id, on)).appointment
    await desk.leave(wanted.id, on, on, policy=schedule_pb2.Leave.POLICY_CANCEL)
    await desk.cancel(taken)
    await offered(desk, good)
    assert (await desk.appointment(visit.id)).state == appointment_pb2.Appointment.STATE_CANCELLED
    of_that_day = "select count(*) from waitlist_entry where state = 'OFFERED' and doctor_id = %s and from_date = %s"
    assert desk.sql(of_that_day, wanted.id, on) == [(0,)]


async def test_one_bad_row(desk: Front) -> None:
    """An entry that cannot be changed keeps nobody from an offer."""
    doctor, taken, on = await one_place(desk)
    bad, good = [await join(desk, one.id, doctor.id, **only(on)) for one in await desk.people(2)]
    desk.sql("update waitlist_entry set from_date = current_date - 9, to_date = current_date - 8 where id = %s", bad.id)
    desk.sql(
        "create function broken() returns trigger language plpgsql as"
        " $$ begin raise exception 'broken' using errcode = 'XX000'; end $$"
    )
    desk.sql(
        "create trigger broken before update on waitlist_entry for each row"
        f" when (old.id = '{bad.id}') execute function broken()"
    )
    await desk.cancel(taken)
    await offered(desk, good)


async def test_declined_among_several_places(desk: Front) -> None:
    """A booking of another place of the day is no reason to offer the declined one again."""
    doctor, on = await desk.doctor(max_patients_per_day=2), after(7)
    entry = await join(desk, (await desk.patient()).id, doctor.id, **only(on))
    await offered(desk, entry)
    await decline(desk, entry)
    other = await desk.book((await desk.patient()).id, doctor.id, on)
    await looked(desk)
    assert (await now(desk, entry)).state == Entry.STATE_WAITING
    await desk.cancel(other.appointment.id)
    await offered(desk, entry)


async def test_an_offered_slot_that_is_deleted(desk: Front) -> None:
    """Accepting an offer whose slot was closed and deleted says that there is none; one that has moved has run out."""
    doctor, on = await desk.doctor(), after(7)
    slot = await desk.slot(doctor.id, at(on, 9))
    entry = await join(desk, (await desk.patient()).id, doctor.id, **only(on), earliest=minute(1))
    await offered(desk, entry)
    await desk.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id]))
    await in_state(desk, entry, Entry.STATE_WAITING)
    await desk.slots.DeleteSlot(slot_pb2.DeleteSlotRequest(slot_id=slot.id))
    assert await outcome(accept(desk, entry)) == "SLOT_NOT_FOUND"


async def test_a_moved_appointment_is_not_moved_back(front: Front) -> None:
    """Nobody is moved to an offer that was made for another appointment than he has now."""
    doctor, person = await front.doctor(), await front.patient()
    mine = (await front.book(person.id, doctor.id, after(9))).appointment
    entry = await join(front, person.id, doctor.id, appointment_id=mine.id)
    place = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(5)))
    await front.waitlist.OfferPlace(pb.OfferPlaceRequest(entry_id=entry.id, doctor_day=place))
    await front.appointments.RescheduleAppointment(
        appointment_pb2.RescheduleAppointmentRequest(
            appointment_id=mine.id, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(3)))
        )
    )
    assert await outcome(accept(front, entry)) == "NO_OFFER"


async def test_who_reaches_what(front: Front) -> None:
    """Staff learn nothing of another clinic's appointment; a doctor reaches no entry for another specialty."""
    here, there = await front.clinic(), await front.clinic()
    doctor = await front.doctor(clinic_id=here.id, specialty="Cardiology")
    other = await front.doctor(clinic_id=there.id, specialty="Neurology")
    person = await front.patient()
    visit = (await front.book(person.id, other.id, after(9))).appointment
    await front.cancel(visit.id)
    staff = user(front, "STAFF", clinic_ids=[here.id])
    wish = pb.JoinWaitlistRequest(
        patient_id=person.id, doctor_id=doctor.id, appointment_id=visit.id,
        from_date=day(after(1)), to_date=day(after(1)),
    )  # fmt: skip
    assert await outcome(front.waitlist.JoinWaitlist(wish, metadata=staff)) == "CLINIC_NOT_YOURS"
    entry = await join(front, person.id, specialty=pb.Specialty(clinic_id=there.id, specialty="Neurology"))
    mine = user(front, "DOCTOR", doctor_id=doctor.id)
    offer = pb.OfferPlaceRequest(
        entry_id=entry.id, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(after(3)))
    )
    assert await outcome(front.waitlist.OfferPlace(offer, metadata=mine)) == "WAITLIST_ENTRY_NOT_FOUND"
