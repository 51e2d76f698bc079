"""When those who wait will be called: the estimates of QueueService."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import grpc
import pytest
from google.protobuf import duration_pb2, timestamp_pb2

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, queue_pb2
from frontdesk.core.estimate import Estimate, Pace, Visit, estimates
from frontdesk.core.queue import Queue, QueueEntry, estimated
from tests.clinic import Front, reason_of, refusal, today

NEAR = 60.0
"""Seconds within which an instant counts as the expected one: a busy machine is slow, and minutes are told apart."""

NOON = datetime(2027, 1, 4, 12, tzinfo=UTC)


def _in(stamp: timestamp_pb2.Timestamp) -> float:
    """Minutes from now to this instant."""
    return (stamp.ToDatetime(UTC) - datetime.now(UTC)).total_seconds() / 60


def _likely(queue: queue_pb2.Queue) -> list[float | None]:
    """Minutes to the likely instant of each who waits, and of a newcomer."""
    waiting = [one for one in queue.entries if one.state == queue_pb2.QueueEntry.STATE_WAITING]
    return [_in(one.estimate.likely) if one.HasField("estimate") else None for one in waiting] + [
        _in(queue.next_estimate.likely) if queue.HasField("next_estimate") else None
    ]


def _about(*minutes: float) -> list[object]:
    return [pytest.approx(each, abs=NEAR / 60) for each in minutes]


async def _begin(front: Front, doctor_id: str) -> str:
    """A new patient, called and in consultation; the appointment's id."""
    appointment_id = (await front.arrive(doctor_id)).appointment.id
    await front.appointments.StartAppointment(appointment_pb2.StartAppointmentRequest(appointment_id=appointment_id))
    return appointment_id


def _past(front: Front, doctor: doctor_pb2.Doctor, minutes: list[float], days_ago: int = 1) -> None:
    """Consultations of a former day that took so many minutes."""
    for number, length in enumerate(minutes, start=1):
        front.sql(
            "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state, queue_state, ticket,"
            " check_in_time, start_visit_time, complete_time)"
            " select new_id(), %s, %s, %s, %s, 'COMPLETED', 'DONE', %s, t, t, t + make_interval(secs => %s)"
            " from (values (now() - make_interval(days => %s, mins => %s))) as v (t)",
            doctor.id, doctor.clinic_id, today() - timedelta(days=days_ago), number, number, length * 60, days_ago,
            1000 - number,
        )  # fmt: skip


async def test_nobody_in_consultation(front: Front) -> None:
    """There is no estimate as long as nobody is in consultation and none was for an hour."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    await front.arrive(doctor.id)
    await front.call_next(doctor.id)
    assert _likely(await front.queue(doctor.id)) == [None, None]


async def test_without_past_consultations(front: Front) -> None:
    """If no consultation of the doctor is known, each lasts as long as the clinic says, by default 12 minutes."""
    doctor = await front.doctor()
    await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    await front.arrive(doctor.id)
    assert _likely(await front.queue(doctor.id)) == _about(12, 24, 36)
    clinic = clinic_pb2.Clinic(id=doctor.clinic_id, visit_length=duration_pb2.Duration(seconds=20 * 60))
    answer = await front.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=clinic))
    assert answer.clinic.visit_length.seconds == 20 * 60
    assert _likely(await front.queue(doctor.id)) == _about(20, 40, 60)


async def test_the_length_of_a_visit_of_a_clinic(front: Front) -> None:
    """A clinic's visit_length is 12 minutes unless it is given, and 1 minute to 24 hours."""
    clinic = await front.clinic()
    assert clinic.visit_length.seconds == 12 * 60
    for seconds, nanos in ((0, 0), (59, 999_999_999), (86_400, 1), (-60, 0)):
        length = duration_pb2.Duration(seconds=seconds, nanos=nanos)
        error = await refusal(front.clinic(visit_length=length))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    for seconds in (60, 86_400):
        made = await front.clinic(visit_length=duration_pb2.Duration(seconds=seconds))
        assert made.visit_length.seconds == seconds
    update = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=made.id))
    update.update_mask.paths.append("visit_length")
    assert (await front.clinics.UpdateClinic(update)).clinic.visit_length.seconds == 12 * 60


async def test_the_pace_of_the_doctor(front: Front) -> None:
    """The last 30 completed consultations say how long one lasts: no odd one, and no older ones."""
    doctor = await front.doctor()
    _past(front, doctor, [3.0] * 40, days_ago=9)
    _past(front, doctor, [*[20.0] * 29, 180.0], days_ago=2)
    await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    length = (30 * 20 + 2 * 12) / 32
    assert _likely(await front.queue(doctor.id)) == _about(length, 2 * length)


async def test_a_completed_consultation_counts_at_once(front: Front) -> None:
    """A consultation that has just ended is one of the last 30 in the next answer."""
    doctor = await front.doctor()
    first = await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    assert _likely(await front.queue(doctor.id)) == _about(12, 24)
    _past(front, doctor, [40.0] * 30)
    front.sql("update appointment set start_visit_time = start_visit_time - interval '40 minutes' where id = %s", first)
    await front.appointments.CompleteAppointment(appointment_pb2.CompleteAppointmentRequest(appointment_id=first))
    # Nobody is in consultation: the first can be called at once.
    length = (30 * 40 + 2 * 12) / 32
    assert _likely(await front.queue(doctor.id)) == _about(0, length)


async def test_an_hour_after_the_last_consultation(front: Front) -> None:
    """An hour after the last consultation there are no estimates any more."""
    doctor = await front.doctor()
    first = await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    await front.appointments.CompleteAppointment(appointment_pb2.CompleteAppointmentRequest(appointment_id=first))
    for minutes, known in ((58, True), (61, False)):
        front.sql(
            "update appointment set complete_time = now() - make_interval(mins => %s),"
            " start_visit_time = now() - interval '2 hours' where id = %s",
            minutes, first,
        )  # fmt: skip
        # As every change does: a queue at the same revision is not read again.
        front.sql("update doctor_day set revision = revision + 1")
        assert [each is not None for each in _likely(await front.queue(doctor.id))] == [known, known]


async def test_a_heartbeat_clears_estimates(front: Front) -> None:
    """An hour after the last consultation a stream that goes on is told that those who wait have no estimate."""
    doctor = await front.doctor()
    first = await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    await front.appointments.CompleteAppointment(appointment_pb2.CompleteAppointmentRequest(appointment_id=first))
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    shown = await watch.read()
    watch.cancel()
    assert None not in _likely(shown.update.queue)
    front.sql(
        "update appointment set complete_time = now() - interval '61 minutes',"
        " start_visit_time = now() - interval '2 hours' where id = %s",
        first,
    )
    again: Any = front.queues.WatchQueue(
        queue_pb2.WatchQueueRequest(doctor_id=doctor.id, resume_token=shown.resume_token)
    )
    message = await again.read()
    again.cancel()
    assert message.HasField("heartbeat")
    assert [(one.ticket, one.HasField("estimate")) for one in message.heartbeat.estimates] == [(2, False)]
    assert not message.heartbeat.HasField("next_estimate")


async def test_a_visit_under_way_is_credited(front: Front) -> None:
    """The time that a consultation has taken already is not waited for again; a long one goes on a little."""
    doctor = await front.doctor()
    first = await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    for taken, rest in ((5, 7), (200, 3)):
        front.sql(
            "update appointment set start_visit_time = now() - make_interval(mins => %s) where id = %s", taken, first
        )
        front.sql("update doctor_day set revision = revision + 1")
        assert _likely(await front.queue(doctor.id)) == _about(rest, rest + 12)


async def test_several_consultations_at_a_time(front: Front) -> None:
    """As many patients are seen at a time as are called or in consultation now."""
    doctor = await front.doctor()
    await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    await front.call_next(doctor.id)
    for _ in range(3):
        await front.arrive(doctor.id)
    assert _likely(await front.queue(doctor.id)) == _about(12, 12, 24, 24)


async def test_nobody_is_called_before_the_start_of_his_slot(front: Front) -> None:
    """The start of a patient's slot is a floor for that patient alone; the slot's length is the consultation's."""
    zone = _morning_zone()
    doctor = await front.doctor(zone)
    slot = await front.slot(doctor.id, datetime.now(UTC) + timedelta(hours=2), minutes=30)
    first, later, last = await front.people(3)
    for person in (first, last):
        await front.book(person.id, doctor.id, today(zone))
    await front.book_slot(later.id, slot.id)
    ids = dict(front.sql("select patient_id::text, id::text from appointment"))
    for person in (first, later, last):
        await front.check_in(ids[person.id])
    await front.appointments.StartAppointment(appointment_pb2.StartAppointmentRequest(appointment_id=ids[first.id]))
    assert _likely(await front.queue(doctor.id)) == _about(120, 42, 54)


def _morning_zone() -> str:
    """A time zone in which it is ten to eleven o'clock now, or nine in the last of them."""
    ahead = (10 - datetime.now(UTC).hour + 11) % 24 - 11
    return f"Etc/GMT{-ahead:+}" if ahead else "Etc/GMT"


async def test_only_who_waits_has_an_estimate(front: Front) -> None:
    """Patients who are called, in consultation, parked or missed have no estimate."""
    doctor = await front.doctor()
    await _begin(front, doctor.id)
    _, missed, _, parked, _ = [(await front.arrive(doctor.id)).appointment.id for _ in range(5)]
    for _ in range(3):
        await front.call_next(doctor.id)
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=missed))
    await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=parked))
    entries = (await front.queue(doctor.id)).entries
    assert {entry.state for entry in entries} == {1, 2, 3, 4, 5}
    assert [entry.ticket for entry in entries if entry.HasField("estimate")] == [6]


async def test_a_newcomer_goes_before_who_came_back(front: Front) -> None:
    """The estimate of a newcomer is that of his place: before those who came back after a missed call."""
    doctor = await front.doctor()
    await _begin(front, doctor.id)
    missed = (await front.arrive(doctor.id)).appointment.id
    await front.call_next(doctor.id)
    await front.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=missed))
    await front.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=missed))
    assert _likely(await front.queue(doctor.id)) == _about(12, 12)
    await front.arrive(doctor.id)
    assert _likely(await front.queue(doctor.id)) == _about(12, 24, 24)


async def test_boards_show_estimates(front: Front) -> None:
    """The view BOARD has the estimates; both views come with them in updates, and heartbeats carry them."""
    doctor = await front.doctor()
    await _begin(front, doctor.id)
    await front.arrive(doctor.id)
    for view in (queue_pb2.QUEUE_VIEW_STAFF, queue_pb2.QUEUE_VIEW_BOARD):
        request = queue_pb2.GetQueueRequest(doctor_id=doctor.id, view=view)
        assert _likely((await front.queues.GetQueue(request)).queue) == _about(12, 24)
        watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id, view=view))
        first = await watch.read()
        assert _likely(first.update.queue) == _about(12, 24)
        watch.cancel()
        # A stream that goes on without a change begins with a heartbeat.
        again: Any = front.queues.WatchQueue(
            queue_pb2.WatchQueueRequest(doctor_id=doctor.id, view=view, resume_token=first.resume_token)
        )
        heartbeat = (await again.read()).heartbeat
        again.cancel()
        assert [(one.ticket, _in(one.estimate.likely)) for one in heartbeat.estimates] == [(2, *_about(12))]
        assert [_in(heartbeat.next_estimate.likely)] == _about(24)


def test_an_estimate_without_reason_is_cleared() -> None:
    """While the queue stands still, its estimates end an hour after the last consultation."""
    waiting = QueueEntry(2, 1, "a", "p", "", "WAITING", "", 0, NOON, None, None, "NORMAL")
    queue = Queue(
        "d", NOON.date(), 5, 0, (waiting,), 0, frozenset(), NOON, 0.0, NOON - timedelta(minutes=30), Pace((), 720.0)
    )
    assert estimated(queue, NOON).entries[0].estimate is not None
    later = estimated(queue, NOON + timedelta(minutes=31))
    assert (later.entries[0].estimate, later.next_estimate) == (None, None)


def test_ranges() -> None:
    """earliest <= likely <= latest, never before now, and each place later and less certain than the one before it."""
    pace = Pace((300.0, 500.0, 600.0, 620.0, 640.0, 700.0, 900.0, 1500.0, 2400.0), 720.0)
    found = estimates(NOON, [Visit(began=NOON - timedelta(minutes=2))], [Visit()] * 8, pace)
    assert len(found) == 9
    for one in found:
        assert NOON <= one.earliest <= one.likely <= one.latest
    for one, following in pairwise(found):
        assert following.likely > one.likely
        assert _width(following) > _width(one)


def test_equal_consultations_are_certain() -> None:
    """If all consultations took the same time, the range is narrow."""
    exact = estimates(NOON, [], [Visit(planned=600.0)] * 3, Pace((600.0,) * 30, 600.0))
    assert [one.likely for one in exact] == [NOON + timedelta(minutes=10 * n) for n in range(4)]
    assert all(_width(one) < timedelta(minutes=10) for one in exact)


def _width(one: Estimate) -> timedelta:
    return one.latest - one.earliest
