"""Visits and the queue: tickets without gaps, calling order, and every transition, allowed or refused."""

import asyncio
from collections.abc import Callable
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import clinic_pb2, patient_pb2, queue_pb2
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, reason_of, refusal, today, tomorrow
from tests.hostile.wire import serving
from tests.identities import user

Entry = queue_pb2.QueueEntry
State = pb.Appointment


async def test_tickets_without_gaps(front: Front) -> None:
    """Two hundred patients who check in at once get the tickets 1 to 200."""
    doctor = await front.doctor(max_patients_per_day=200)
    booked = await asyncio.gather(*(front.book(p.id, doctor.id) for p in await front.people(200)))
    arrived = await asyncio.gather(*(front.check_in(answer.appointment.id) for answer in booked))
    assert sorted(answer.entry.ticket for answer in arrived) == list(range(1, 201))
    queue = await front.queue(doctor.id)
    assert [entry.ticket for entry in queue.entries] == list(range(1, 201))
    assert [entry.position for entry in queue.entries] == list(range(1, 201))
    assert (queue.waiting_count, queue.expected_count) == (200, 0)


async def test_two_rooms_call_two_patients(front: Front) -> None:
    """Two simultaneous CallNext calls get the first two patients; on an empty queue the call is refused."""
    doctor = await front.doctor()
    tickets = [(await front.arrive(doctor.id)).entry.ticket for _ in range(2)]
    called = await asyncio.gather(*(front.call_next(doctor.id, room) for room in ("1", "2")))
    assert sorted(answer.entry.ticket for answer in called) == tickets
    assert {answer.entry.room for answer in called} == {"1", "2"}
    assert await outcome(front.call_next(doctor.id)) == "QUEUE_EMPTY"


async def test_the_life_of_a_visit(front: Front) -> None:
    """From booked to completed, the queue entry and the visit state change together."""
    doctor = await front.doctor()
    arrived = await front.arrive(doctor.id, given_name="Ana", family_name="Lima")
    assert (arrived.entry.ticket, arrived.entry.position, arrived.entry.patient_name) == (1, 1, "Ana Lima")
    assert arrived.appointment.state == State.STATE_CHECKED_IN
    called = await front.call_next(doctor.id, "7")
    assert (called.entry.state, called.entry.room, called.entry.call_count) == (Entry.STATE_CALLED, "7", 1)
    appointment_id = arrived.appointment.id
    started = await front.appointments.StartAppointment(pb.StartAppointmentRequest(appointment_id=appointment_id))
    assert started.appointment.state == State.STATE_IN_CONSULTATION
    (entry,) = (await front.queue(doctor.id)).entries
    assert (entry.state, entry.room) == (Entry.STATE_IN_CONSULTATION, "7")
    ended = await front.appointments.CompleteAppointment(pb.CompleteAppointmentRequest(appointment_id=appointment_id))
    assert ended.appointment.state == State.STATE_COMPLETED
    assert ended.revision == 6
    assert not (await front.queue(doctor.id)).entries
    # A completed visit keeps its place on the doctor-day.
    assert front.sql("select number from appointment where id = %s", appointment_id) == [(1,)]


async def test_places_in_the_line(front: Front) -> None:
    """A returned patient gets the place of the check-in, after a missed call the end; parked patients wait aside."""
    doctor = await front.doctor()
    ids = [(await front.arrive(doctor.id)).appointment.id for _ in range(3)]

    async def waiting() -> list[int]:
        entries = (await front.queue(doctor.id)).entries
        return [entry.ticket for entry in entries if entry.state == Entry.STATE_WAITING]

    assert await waiting() == [1, 2, 3]
    await front.call_next(doctor.id)
    assert await waiting() == [2, 3]
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=ids[0]))
    assert await waiting() == [1, 2, 3]
    await front.call_next(doctor.id)
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=ids[0]))
    back = await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=ids[0]))
    assert (back.entry.position, await waiting()) == (3, [2, 3, 1])
    # The end stays the end: a patient who checks in later comes before the one who missed the call.
    await front.arrive(doctor.id)
    assert await waiting() == [2, 3, 4, 1]
    await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=ids[1]))
    assert await waiting() == [3, 4, 1]
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=ids[1]))
    assert await waiting() == [2, 3, 4, 1]
    # The place after a missed call stays through park and return, too.
    await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=ids[0]))
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=ids[0]))
    assert await waiting() == [2, 3, 4, 1]
    states = [entry.state for entry in (await front.queue(doctor.id)).entries]
    assert states == [Entry.STATE_WAITING] * 4


async def test_call_again(front: Front) -> None:
    """CallAgain counts the call, and may name another room."""
    doctor = await front.doctor()
    arrived = await front.arrive(doctor.id)
    await front.call_next(doctor.id, "1")
    again = await front.queues.CallAgain(queue_pb2.CallAgainRequest(appointment_id=arrived.appointment.id))
    assert (again.entry.call_count, again.entry.room) == (2, "1")
    moved = await front.queues.CallAgain(queue_pb2.CallAgainRequest(appointment_id=arrived.appointment.id, room="2"))
    assert (moved.entry.call_count, moved.entry.room) == (3, "2")


async def test_freed_places(front: Front) -> None:
    """Cancelled, left and no-show visits free their place on the doctor-day; completed ones do not."""
    doctor = await front.doctor(max_patients_per_day=1)

    async def full() -> bool:
        (person,) = await front.people(1)
        return await outcome(front.book(person.id, doctor.id, validate_only=True)) == "DAY_FULL"

    left = await front.arrive(doctor.id)
    assert await full()
    await front.queues.LeaveQueue(queue_pb2.LeaveQueueRequest(appointment_id=left.appointment.id))
    assert (await front.appointment(left.appointment.id)).state == State.STATE_LEFT
    cancelled = await front.arrive(doctor.id)
    await front.cancel(cancelled.appointment.id, "went home")
    assert not (await front.queue(doctor.id)).entries
    (absent,) = await front.people(1)
    missed = await front.book(absent.id, doctor.id)
    await front.appointments.MarkNoShow(pb.MarkNoShowRequest(appointment_id=missed.appointment.id))
    seen = await front.arrive(doctor.id)
    assert seen.entry.ticket == 3
    await front.appointments.StartAppointment(pb.StartAppointmentRequest(appointment_id=seen.appointment.id))
    await front.appointments.CompleteAppointment(pb.CompleteAppointmentRequest(appointment_id=seen.appointment.id))
    assert await full()


async def test_check_in_guards(front: Front) -> None:
    """Check-in works for the right patient, on the right date, and once."""
    doctor = await front.doctor()
    one, two = await front.people(2)
    booked = (await front.book(one.id, doctor.id)).appointment
    assert await outcome(front.check_in(booked.id, patient_id=two.id)) == "PATIENT_MISMATCH"
    assert await outcome(front.check_in(booked.id, patient_id=one.id.upper())) == "OK"
    assert await outcome(front.check_in(booked.id)) == "ALREADY_CHECKED_IN"
    later = (await front.book(two.id, doctor.id, tomorrow())).appointment
    error = await refusal(front.check_in(later.id))
    assert reason_of(error) == "NOT_APPOINTMENT_DATE"
    assert details(error)["ErrorInfo"].metadata["date"] == tomorrow().isoformat()
    assert await outcome(front.appointments.MarkNoShow(pb.MarkNoShowRequest(appointment_id=later.id))) == "TOO_EARLY"


async def test_every_transition(front: Front) -> None:
    """Each verb works only from its states; otherwise it is refused with the present state, and changes nothing."""
    doctor = await front.doctor(max_patients_per_day=1000)
    a, q = front.appointments, front.queues
    verbs: dict[str, Callable[[str], Any]] = {
        "CheckIn": lambda i: q.CheckIn(queue_pb2.CheckInRequest(appointment_id=i)),
        "Start": lambda i: a.StartAppointment(pb.StartAppointmentRequest(appointment_id=i)),
        "Complete": lambda i: a.CompleteAppointment(pb.CompleteAppointmentRequest(appointment_id=i)),
        "Cancel": lambda i: a.CancelAppointment(pb.CancelAppointmentRequest(appointment_id=i)),
        "NoShow": lambda i: a.MarkNoShow(pb.MarkNoShowRequest(appointment_id=i)),
        "CallAgain": lambda i: q.CallAgain(queue_pb2.CallAgainRequest(appointment_id=i)),
        "Return": lambda i: q.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=i)),
        "Park": lambda i: q.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=i)),
        "Miss": lambda i: q.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=i)),
        "Leave": lambda i: q.LeaveQueue(queue_pb2.LeaveQueueRequest(appointment_id=i)),
        "SetPriority": lambda i: q.SetPriority(
            queue_pb2.SetPriorityRequest(appointment_id=i, priority=queue_pb2.PRIORITY_PRIORITY)
        ),
    }
    ways = {
        "BOOKED": [],
        "WAITING": ["CheckIn"],
        "CALLED": ["CheckIn", "call"],
        "PARKED": ["CheckIn", "Park"],
        "MISSED": ["CheckIn", "call", "Miss"],
        "IN_CONSULTATION": ["CheckIn", "Start"],
        "COMPLETED": ["CheckIn", "Start", "Complete"],
        "CANCELLED": ["Cancel"],
        "NO_SHOW": ["NoShow"],
        "LEFT": ["CheckIn", "Leave"],
    }
    allowed = {
        "BOOKED": {"CheckIn", "Cancel", "NoShow"},
        "WAITING": {"Start", "Cancel", "Park", "Leave", "SetPriority"},
        "CALLED": {"Start", "Cancel", "CallAgain", "Return", "Park", "Miss", "Leave", "SetPriority"},
        "PARKED": {"Cancel", "Return", "Leave", "SetPriority"},
        "MISSED": {"Cancel", "Return", "Leave", "SetPriority"},
        "IN_CONSULTATION": {"Complete"},
    }
    for state, way in ways.items():
        for verb, call in verbs.items():
            (person,) = await front.people(1)
            booked = (await front.book(person.id, doctor.id)).appointment
            for step in way:
                if step == "call":
                    called = await front.call_next(doctor.id)
                    assert called.entry.appointment_id == booked.id
                else:
                    await verbs[step](booked.id)
            before = await front.appointment(booked.id)
            if verb in allowed.get(state, set()):
                await call(booked.id)
            else:
                error = await refusal(call(booked.id))
                checked_in = verb == "CheckIn" and state in {"WAITING", "CALLED", "PARKED", "MISSED", "IN_CONSULTATION"}
                assert reason_of(error) == ("ALREADY_CHECKED_IN" if checked_in else "INVALID_TRANSITION"), (state, verb)
                if not checked_in:
                    states = details(error)["ErrorInfo"].metadata
                    assert state in (states["state"], states.get("queue_state"))
                    assert pb.Appointment.State.Value(f"STATE_{states['state']}") == before.state
                assert await front.appointment(booked.id) == before
            # The queue is empty again for the next round.
            await outcome(a.CancelAppointment(pb.CancelAppointmentRequest(appointment_id=booked.id)))


async def test_queue_of_another_day(front: Front) -> None:
    """Each date has its own queue: tomorrow's is empty and expects the booked patients."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    (person,) = await front.people(1)
    await front.book(person.id, doctor.id, tomorrow())
    queue = await front.queue(doctor.id, tomorrow())
    assert (len(queue.entries), queue.expected_count, queue.revision) == (0, 1, 2)
    assert (await front.queue(doctor.id)).date.day == today().day


async def test_a_queue_is_of_now(front: Front, conninfo: str, settings: Settings) -> None:
    """A worker that keeps a queue tells the present one, whatever another has done; and each caller what he may see."""
    doctor = await front.doctor()
    ana, _ = [await front.arrive(doctor.id, given_name=name) for name in ("Ana", "Bruno")]
    own = user(front, "PATIENT", patient_id=ana.appointment.patient_id)
    request = queue_pb2.GetQueueRequest(doctor_id=doctor.id, view=queue_pb2.QUEUE_VIEW_OWN)
    async with serving(settings, conninfo) as (_, other):

        async def agreed() -> queue_pb2.Queue:
            found = [await front.queue(doctor.id, on) for on in (None, today(), None)]
            found += [await other.queue(doctor.id) for _ in range(2)]
            shown = (await front.queues.GetQueue(request, metadata=own)).queue
            assert [entry.patient_name for entry in shown.entries] == [
                entry.patient_name if entry.patient_id == ana.appointment.patient_id else ""
                for entry in found[0].entries
            ]
            for queue in found:
                queue.ClearField("next_estimate")
                for entry in queue.entries:
                    entry.ClearField("estimate")
            assert all(queue == found[0] for queue in found)
            return found[0]

        assert (await agreed()).entries[0].patient_name.startswith("Ana")
        await other.patients.UpdatePatient(
            patient_pb2.UpdatePatientRequest(
                patient=patient_pb2.Patient(id=ana.appointment.patient_id, given_name="Anna"),
                update_mask=FieldMask(paths=["given_name"]),
            )
        )
        assert (await agreed()).entries[0].patient_name.startswith("Anna")
        await other.book((await front.patient()).id, doctor.id)
        assert (await agreed()).expected_count == 1
        await other.call_next(doctor.id, "3")
        await front.appointments.StartAppointment(pb.StartAppointmentRequest(appointment_id=ana.appointment.id))
        assert (await agreed()).entries[-1].room == "3"
        before = (await front.queue(doctor.id)).next_estimate.likely.seconds
        await other.clinics.UpdateClinic(
            clinic_pb2.UpdateClinicRequest(
                clinic=clinic_pb2.Clinic(id=doctor.clinic_id, visit_length=Duration(seconds=3600)),
                update_mask=FieldMask(paths=["visit_length"]),
            )
        )
        assert (await front.queue(doctor.id)).next_estimate.likely.seconds > before + 1800
        assert await outcome(front.queues.GetQueue(request, metadata=user(front, "PATIENT"))) == "APPOINTMENT_NOT_FOUND"
