"""A patient is handed over to another doctor's queue of today: wholly, or not at all."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import doctor_pb2, queue_pb2
from tests.clinic import CAUSES, Front, day, details, outcome, reason_of, refusal, today, tomorrow
from tests.identities import bearing, create_key, user
from tests.waiting import SOON

UNKNOWN = "01900000-0000-7000-8000-00000000ffff"
Entry, Kind = queue_pb2.QueueEntry, queue_pb2.QueueChange


def transfer(front: Front, appointment_id: str, to_doctor_id: str, *, metadata: Any = (), **fields: Any) -> Any:
    """A call of TransferPatient."""
    request = queue_pb2.TransferPatientRequest(appointment_id=appointment_id, to_doctor_id=to_doctor_id, **fields)
    return front.queues.TransferPatient(request, metadata=metadata)


@pytest.fixture
async def doctors(front: Front) -> list[doctor_pb2.Doctor]:
    """Two doctors of one clinic."""
    one = await front.doctor()
    return [one, await front.doctor(clinic_id=one.clinic_id)]


async def told(front: Front, doctor_id: str, since: str, view: Any = queue_pb2.QUEUE_VIEW_STAFF) -> Any:
    """The changes since this token."""
    request = queue_pb2.WatchQueueRequest(doctor_id=doctor_id, resume_token=since, view=view)
    stream: Any = front.queues.WatchQueue(request)
    async with asyncio.timeout(SOON):
        message = await stream.read()
    stream.cancel()
    return message.update.changes


async def token(front: Front, doctor_id: str, view: Any = queue_pb2.QUEUE_VIEW_STAFF) -> str:
    """A resume token of now."""
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor_id, view=view))
    async with asyncio.timeout(SOON):
        found = (await stream.read()).resume_token
    stream.cancel()
    return str(found)


async def test_what_stays_and_what_goes(front: Front) -> None:
    """Id, reason, priority and check-in time stay; slot, times, room and calls go; place and ticket are new."""
    # In a zone where some hours of the day are left.
    now = datetime.now(UTC)
    one = await front.doctor(zone=f"Etc/GMT{now.hour - 12:+d}")
    other = await front.doctor(clinic_id=one.clinic_id)
    there, person = await front.people(2)
    await front.queues.AddWalkIn(queue_pb2.AddWalkInRequest(doctor_id=other.id, patient_id=there.id))
    slot = await front.slot(one.id, now + timedelta(hours=1))
    booked = (await front.book_slot(person.id, slot.id, reason="cough", notes="limps")).appointment
    arrived = await front.check_in(booked.id, priority=queue_pb2.PRIORITY_PRIORITY)
    await front.call_next(one.id, "7")
    answer = await transfer(front, booked.id, other.id)
    visit, entry = answer.appointment, answer.entry
    assert visit == await front.appointment(booked.id)
    assert (visit.id, visit.reason, visit.notes) == (booked.id, "cough", "limps")
    assert (visit.doctor_id, visit.number, visit.slot_id) == (other.id, 2, "")
    assert (visit.HasField("start_time"), visit.HasField("end_time")) == (False, False)
    assert visit.check_in_time == entry.check_in_time == arrived.entry.check_in_time
    assert (visit.state, visit.override_reason) == (pb.Appointment.STATE_CHECKED_IN, "")
    assert (entry.ticket, entry.state, entry.room, entry.call_count) == (2, Entry.STATE_WAITING, "", 0)
    assert (entry.priority, entry.position) == (queue_pb2.PRIORITY_PRIORITY, 1)
    assert not entry.HasField("call_time")
    assert not (await front.standing(one.id)).entries
    assert (await front.standing(one.id)).revision == answer.vacated_revision == 5
    assert (await front.standing(other.id)).revision == answer.revision == 4
    # The place in the old day and slot is free.
    assert await outcome(front.book_slot((await front.patient()).id, slot.id)) == "OK"
    assert front.sql("select number from appointment where slot_id = %s", slot.id) == [(1,)]


async def test_both_queues_tell(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """The old queue tells TRANSFERRED_OUT with an entry TRANSFERRED, the new one TRANSFERRED_IN; so do boards."""
    one, other = doctors
    arrived = await front.arrive(one.id)
    board = queue_pb2.QUEUE_VIEW_BOARD
    tokens = {(doctor.id, view): await token(front, doctor.id, view) for doctor in doctors for view in (0, board)}
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=other.id))
    await stream.read()
    answer = await transfer(front, arrived.appointment.id, other.id)
    async with asyncio.timeout(SOON):
        live = (await stream.read()).update
    stream.cancel()
    (out,), (into,) = [await told(front, doctor.id, tokens[doctor.id, 0]) for doctor in doctors]
    assert (out.kind, out.revision, out.entry.state) == (
        Kind.KIND_TRANSFERRED_OUT, answer.vacated_revision, Entry.STATE_TRANSFERRED,
    )  # fmt: skip
    assert (out.entry.ticket, out.entry.patient_id, out.entry.patient_name) == (
        arrived.entry.ticket, arrived.entry.patient_id, arrived.entry.patient_name,
    )  # fmt: skip
    assert (into.kind, into.revision) == (Kind.KIND_TRANSFERRED_IN, answer.revision)
    assert into.entry == answer.entry == live.changes[0].entry
    assert list(live.queue.entries) == [answer.entry]
    for doctor, state in ((one, Entry.STATE_TRANSFERRED), (other, Entry.STATE_WAITING)):
        (shown,) = await told(front, doctor.id, tokens[doctor.id, board], board)
        assert (shown.appointment_id, shown.entry.patient_id, shown.entry.patient_name) == ("", "", "")
        assert (shown.entry.state, shown.entry.ticket, shown.entry.priority) == (state, 1, 0)


async def test_the_first_check_in_counts(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """In the new queue the first check-in decides, not the ticket; the end after a missed call was the old queue's."""
    one, other = doctors
    early = await front.arrive(one.id)
    for _ in range(2):
        await front.arrive(other.id)
    late = await front.arrive(one.id)
    await front.call_next(one.id)
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=early.appointment.id))
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=early.appointment.id))
    assert (await transfer(front, late.appointment.id, other.id)).entry.position == 3
    moved = await transfer(front, early.appointment.id, other.id)
    assert (moved.entry.ticket, moved.entry.position) == (4, 1)
    assert [entry.ticket for entry in (await front.standing(other.id)).entries] == [4, 1, 2, 3]


async def test_back_again(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """A patient who is handed over and back gets one more ticket each time; a spent one is given to nobody."""
    one, other = doctors
    visit = (await front.arrive(one.id)).appointment.id
    await transfer(front, visit, other.id)
    back = await transfer(front, visit, one.id)
    assert back.entry.ticket == 2
    assert (await front.arrive(one.id)).entry.ticket == 3


async def test_from_which_states(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """Waiting, called and parked patients are handed over; others are not, and nothing changes."""
    one, other = doctors

    async def called(visit: str) -> None:
        assert (await front.call_next(one.id)).entry.appointment_id == visit

    async def parked(visit: str) -> None:
        await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=visit))

    async def missed(visit: str) -> None:
        await called(visit)
        await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=visit))

    async def started(visit: str) -> None:
        await front.appointments.StartAppointment(pb.StartAppointmentRequest(appointment_id=visit))

    async def left(visit: str) -> None:
        await front.queues.LeaveQueue(queue_pb2.LeaveQueueRequest(appointment_id=visit))

    for step, allowed in ((called, True), (parked, True), (missed, False), (started, False), (left, False)):
        visit = (await front.arrive(one.id)).appointment.id
        await step(visit)
        before = [await front.standing(doctor.id) for doctor in doctors]
        error = None if allowed else await refusal(transfer(front, visit, other.id))
        if error is None:
            assert (await transfer(front, visit, other.id)).entry.state == Entry.STATE_WAITING
        else:
            assert reason_of(error) == "INVALID_TRANSITION"
            assert [await front.standing(doctor.id) for doctor in doctors] == before
    booked = (await front.book((await front.patient()).id, one.id)).appointment.id
    assert await outcome(transfer(front, booked, other.id)) == "INVALID_TRANSITION"


async def test_refusals(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """Whoever cannot take the patient is named by the refusal, and all stays as it was."""
    one, other = doctors
    elsewhere = await front.doctor()
    arrived = await front.arrive(one.id)
    visit = arrived.appointment
    before = await front.standing(one.id)

    async def refused(to: str, **fields: Any) -> grpc.aio.AioRpcError:
        error = await refusal(transfer(front, visit.id, to, **fields))
        assert await front.standing(one.id) == before
        assert await front.appointment(visit.id) == visit
        return error

    error = await refused(one.id)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert [one.field for one in details(error)["BadRequest"].field_violations] == ["to_doctor_id"]
    error = await refused(elsewhere.id)
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "OTHER_CLINIC")
    assert details(error)["ErrorInfo"].metadata["doctor_id"] == elsewhere.id
    assert reason_of(await refused(UNKNOWN)) == "DOCTOR_NOT_FOUND"
    absent = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=other.id, date=day(today()), is_present=False)
    await front.doctors.SetDoctorAvailability(absent)
    assert reason_of(await refused(other.id, override_reason="the doctor will come")) == "DOCTOR_ABSENT"
    absent.is_present = True
    await front.doctors.SetDoctorAvailability(absent)
    twice = await front.book(arrived.entry.patient_id, other.id)
    error = await refused(other.id, override_reason="why not")
    assert reason_of(error) == "DUPLICATE_BOOKING"
    assert details(error)["ErrorInfo"].metadata["appointment_id"] == twice.appointment.id
    await front.cancel(twice.appointment.id)
    front.sql("update doctor set active = false where id = %s", other.id)
    assert reason_of(await refused(other.id)) == "DOCTOR_INACTIVE"
    assert await outcome(transfer(front, UNKNOWN, other.id)) == "APPOINTMENT_NOT_FOUND"
    for field in ("appointment_id", "to_doctor_id"):
        wrong = {"appointment_id": visit.id, "to_doctor_id": other.id, field: "x"}
        bad = await refusal(front.queues.TransferPatient(queue_pb2.TransferPatientRequest(**wrong)))
        assert details(bad)["BadRequest"].field_violations[0].field == field


@pytest.mark.parametrize("cause", CAUSES)
async def test_an_absent_doctor(front: Front, doctors: list[doctor_pb2.Doctor], cause: str) -> None:
    """Nobody is handed over to an absent doctor, by an override neither, and the refusal says why he is absent."""
    one, other = doctors
    visit = (await front.arrive(one.id)).appointment
    await front.absent(other.id, cause)
    for why in ("", "urgent"):
        refused = details(await refusal(transfer(front, visit.id, other.id, override_reason=why)))["ErrorInfo"]
        assert (refused.reason, refused.metadata["cause"]) == ("DOCTOR_ABSENT", cause)
    assert await front.appointment(visit.id) == visit


async def test_not_today(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """A patient who was left in the queue of another date is not handed over."""
    one, other = doctors
    visit = (await front.arrive(one.id)).appointment.id
    for on in (today() - timedelta(days=1), tomorrow()):
        front.sql("update appointment set date = %s where id = %s", on, visit)
        error = await refusal(transfer(front, visit, other.id))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_TODAY")
        assert details(error)["ErrorInfo"].metadata["date"] == on.isoformat()


async def test_a_full_day(front: Front) -> None:
    """A full day takes nobody over without an override of the desk, which is on record only if it was needed."""
    one = await front.doctor()
    full = await front.doctor(clinic_id=one.clinic_id, max_patients_per_day=1)
    await front.arrive(full.id)
    first, second = [(await front.arrive(one.id)).appointment.id for _ in range(2)]
    before = [await front.standing(doctor.id) for doctor in (one, full)]
    assert await outcome(transfer(front, first, full.id)) == "DAY_FULL"
    service = bearing((await create_key(front, "SERVICE")).key)
    assert await outcome(transfer(front, first, full.id, override_reason="x", metadata=service)) == "DAY_FULL"
    assert [await front.standing(doctor.id) for doctor in (one, full)] == before
    staff = bearing((await create_key(front, "STAFF", clinic_ids=[one.clinic_id])).key)
    over = await transfer(front, first, full.id, override_reason="one is ill", metadata=staff)
    assert (over.appointment.number, over.appointment.override_reason) == (2, "one is ill")
    # Back to a day with places: no override any more.
    back = await transfer(front, first, one.id, override_reason="not needed")
    assert (back.appointment.number, back.appointment.override_reason) == (1, "")
    assert (await transfer(front, second, full.id, override_reason="one is ill")).appointment.number == 2


async def test_who_may(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """The desk, services and the doctor of the visit hand over; another's doctor and the patient do not."""
    one, other = doctors
    elsewhere = await front.doctor()
    for by, expected in (
        (user(front, "DOCTOR", doctor_id=other.id), "ROLE_REQUIRED"),
        (bearing((await create_key(front, "STAFF", clinic_ids=[elsewhere.clinic_id])).key), "CLINIC_NOT_YOURS"),
        (user(front, "DOCTOR", doctor_id=one.id), "OK"),
        (bearing((await create_key(front, "STAFF", clinic_ids=[one.clinic_id])).key), "OK"),
        (bearing((await create_key(front, "SERVICE")).key), "OK"),
    ):
        visit = (await front.arrive(one.id)).appointment.id
        assert await outcome(transfer(front, visit, other.id, metadata=by)) == expected
    arrived = await front.arrive(one.id)
    mine = user(front, "PATIENT", patient_id=arrived.entry.patient_id)
    assert await outcome(transfer(front, arrived.appointment.id, other.id, metadata=mine)) == "ROLE_REQUIRED"


async def test_the_own_stream_ends(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """A patient who watches the own entry is told by the end of the stream, and sees the new queue from then on."""
    one, other = doctors
    arrived = await front.arrive(one.id)
    mine = user(front, "PATIENT", patient_id=arrived.entry.patient_id)

    def watch(doctor_id: str) -> Any:
        request = queue_pb2.WatchQueueRequest(doctor_id=doctor_id, view=queue_pb2.QUEUE_VIEW_OWN)
        return front.queues.WatchQueue(request, metadata=mine)

    stream = watch(one.id)
    await stream.read()
    await transfer(front, arrived.appointment.id, other.id)

    async def to_the_end() -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    async with asyncio.timeout(SOON):
        assert await outcome(to_the_end()) == "APPOINTMENT_NOT_FOUND"
    stream = watch(other.id)
    (entry,) = (await stream.read()).update.queue.entries
    stream.cancel()
    assert entry.patient_id == arrived.entry.patient_id


async def test_opposing_transfers(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """Two full queues hand over to each other at once, again and again: none waits for ever, nobody is lost."""
    one, other = doctors
    here, there = [[(await front.arrive(doctor.id)).appointment.id for _ in range(5)] for doctor in doctors]
    for _ in range(6):
        calls = [transfer(front, visit, other.id) for visit in here] + [transfer(front, v, one.id) for v in there]
        assert Counter(await asyncio.gather(*map(outcome, calls))) == {"OK": 10}
        here, there = there, here
    assert front.sql("select deadlocks from pg_stat_database where datname = current_database()") == [(0,)]
    for doctor, visits in ((one, here), (other, there)):
        queue = await front.standing(doctor.id)
        assert {entry.appointment_id for entry in queue.entries} == set(visits)
        given = front.sql(
            "select ticket from log where doctor_id = %s and type in ('queue.checked_in', 'queue.transferred_in')"
            " order by revision",
            doctor.id,
        )
        assert [ticket for (ticket,) in given] == list(range(1, 36))


async def test_two_hand_over_one_patient(front: Front, doctors: list[doctor_pb2.Doctor]) -> None:
    """If one patient is handed over to two doctors at once, one comes after the other, and one queue has him."""
    one, other = doctors
    third = await front.doctor(clinic_id=one.clinic_id)
    visit = (await front.arrive(one.id)).appointment.id
    outcomes = await asyncio.gather(*(outcome(transfer(front, visit, doctor.id)) for doctor in (other, third)))
    assert set(outcomes) == {"OK"}
    found = [len((await front.standing(doctor.id)).entries) for doctor in (one, other, third)]
    assert sorted(found) == [0, 0, 1]
