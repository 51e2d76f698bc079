"""Notifications over the wire, with a real receiver of webhooks: what is told, when, once, and what is not."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import appointment_pb2, notification_pb2, queue_pb2, schedule_pb2, waitlist_pb2
from clinic.frontdesk.v1.notification_pb2 import Notification
from clinic.frontdesk.v1.notification_pb2_grpc import NotificationServiceStub
from frontdesk.settings import Settings
from tests.clinic import Front, day, outcome, tomorrow
from tests.hostile.wire import serving, working
from tests.receivers import SECRET, Receiver
from tests.servers import Service
from tests.waiting import until, until_true

PHONE = "+5511987654321"


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as made:
        yield made


@pytest.fixture
def hooked(settings: Settings, receiver: Receiver) -> Settings:
    """The settings with the channel WEBHOOK."""
    return settings.model_copy(update={"webhook_url": receiver.url, "webhook_secret": SECRET})


@pytest.fixture
async def desk(hooked: Settings, conninfo: str) -> AsyncIterator[Front]:
    """A server with its background work, which tells by webhook."""
    async with serving(hooked, conninfo, background="on") as (_, front):
        yield front


def service(front: Front) -> Any:
    return NotificationServiceStub(front.channel)


async def listed(front: Front, **fields: Any) -> list[Notification]:
    """The notifications that the filter finds, in the order in which they were planned."""
    answer = await service(front).ListNotifications(notification_pb2.ListNotificationsRequest(**fields))
    return list(reversed(answer.notifications))


def shown(found: list[Notification]) -> list[str]:
    """Kind and state, and why one was skipped."""
    return [
        " ".join(
            [
                Notification.Kind.Name(one.kind).removeprefix("KIND_"),
                Notification.State.Name(one.state).removeprefix("STATE_"),
                *([Notification.SkipReason.Name(one.skip_reason).removeprefix("SKIP_REASON_")] * bool(one.skip_reason)),
            ]
        )
        for one in found
    ]


async def told(front: Front, *wanted: str, **fields: Any) -> list[Notification]:
    """Wait until these are the notifications, reminders left out."""

    async def there() -> bool:
        found.clear()
        found.extend(one for one in await listed(front, **fields) if one.kind != Notification.KIND_REMINDER)
        return shown(found) == list(wanted)

    found: list[Notification] = []
    try:
        await until_true(there)
    except TimeoutError:
        raise AssertionError(shown(found)) from None
    return found


async def test_a_booking_is_confirmed(desk: Front, receiver: Receiver) -> None:
    """Within seconds, signed, to the patient's phone, in the language of the clinic's country."""
    doctor = await desk.doctor(clinic_id=(await desk.clinic(country="BR")).id, display_name="Dra. Ana")
    person = await desk.patient(phone=PHONE)
    visit = (await desk.book(person.id, doctor.id, tomorrow(), reason="private", notes="private")).appointment
    (one,) = await told(desk, "CONFIRMATION SENT", appointment_id=visit.id)
    (post,) = receiver.posts
    assert receiver.ids == [one.id]
    assert post["type"] == "notification.confirmation"
    assert post["data"]["to"] == PHONE
    assert post["data"]["language"] == "pt"
    assert post["data"]["text"].startswith("Clinic: sua consulta com Dra. Ana em ")
    assert "private" not in str(post)
    assert (one.channel, one.patient_id, one.attempts) == (Notification.CHANNEL_WEBHOOK, person.id, 1)
    assert one.send_time.ToDatetime() - one.plan_time.ToDatetime() < timedelta(seconds=5)
    request = notification_pb2.GetNotificationRequest(notification_id=one.id)
    assert (await service(desk).GetNotification(request)).notification == one


async def test_each_change_is_told_once(desk: Front, receiver: Receiver) -> None:
    """A move, a cancellation and its undo are told, each once and in their order."""
    doctor, person = await desk.doctor(), await desk.patient()
    visit = (await desk.book(person.id, doctor.id, tomorrow())).appointment.id
    await told(desk, "CONFIRMATION SENT", appointment_id=visit)
    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(tomorrow() + timedelta(days=3)))
    await desk.appointments.RescheduleAppointment(
        appointment_pb2.RescheduleAppointmentRequest(appointment_id=visit, doctor_day=target)
    )
    await told(desk, "CONFIRMATION SENT", "RESCHEDULED SENT", appointment_id=visit)
    cancelled = await desk.cancel(visit, "private")
    await told(desk, "CONFIRMATION SENT", "RESCHEDULED SENT", "CANCELLATION SENT", appointment_id=visit)
    undo = appointment_pb2.UndoTransitionRequest(appointment_id=visit, etag=cancelled.appointment.etag)
    await desk.appointments.UndoTransition(undo)
    await told(
        desk, "CONFIRMATION SENT", "RESCHEDULED SENT", "CANCELLATION SENT", "CONFIRMATION SENT", appointment_id=visit
    )
    assert receiver.kinds == ["CONFIRMATION", "RESCHEDULED", "CANCELLATION", "CONFIRMATION"]
    assert len(set(receiver.ids)) == len(receiver.ids)
    assert "private" not in str(receiver.posts)
    found = desk.sql("select sequence from notification where kind <> 'REMINDER' order by id")
    assert found == [(0,), (1,), (2,), (3,)]


def wish(patient_id: str, doctor_id: str, on: date) -> waitlist_pb2.JoinWaitlistRequest:
    return waitlist_pb2.JoinWaitlistRequest(
        patient_id=patient_id, doctor_id=doctor_id, from_date=day(on), to_date=day(on)
    )


async def test_an_offer_is_told(desk: Front, receiver: Receiver) -> None:
    """Whom the waiting list offers a place is told so; an accepted offer is confirmed as a booking is."""
    doctor, on = await desk.doctor(max_patients_per_day=1, display_name="Dr. Who"), tomorrow() + timedelta(days=6)
    taken = (await desk.book((await desk.patient()).id, doctor.id, on)).appointment
    person = await desk.patient(phone=PHONE)
    entry = (await desk.waitlist.JoinWaitlist(wish(person.id, doctor.id, on))).entry
    await desk.cancel(taken.id)
    (one,) = await told(desk, "WAITLIST_OFFER SENT", patient_id=person.id)
    assert (one.appointment_id, one.channel) == ("", Notification.CHANNEL_WEBHOOK)
    (post,) = [post for post in receiver.posts if post["type"] == "notification.waitlist_offer"]
    assert post["data"]["to"] == PHONE
    assert "Dr. Who" in post["data"]["text"]
    await desk.waitlist.AcceptOffer(waitlist_pb2.AcceptOfferRequest(entry_id=entry.id))
    await told(desk, "WAITLIST_OFFER SENT", "CONFIRMATION SENT", patient_id=person.id)


async def test_an_offer_that_is_no_more(desk: Front, receiver: Receiver) -> None:
    """An offer that was declined before anybody could be told is not told."""
    await receiver.stop()
    doctor, person, on = await desk.doctor(), await desk.patient(), tomorrow() + timedelta(days=2)
    entry = (await desk.waitlist.JoinWaitlist(wish(person.id, doctor.id, on))).entry
    await until(lambda: desk.sql("select 1 from notification where failure = 'CONNECTION_FAILED'") != [])
    await desk.waitlist.DeclineOffer(waitlist_pb2.DeclineOfferRequest(entry_id=entry.id, leave=True))
    await receiver.start()
    await told(desk, "WAITLIST_OFFER SKIPPED SUPERSEDED", patient_id=person.id)
    assert not receiver.posts


async def test_a_leave_is_told(desk: Front, receiver: Receiver) -> None:
    """Whom a leave has moved is told so; whom it has cancelled is told that."""
    doctor = await desk.doctor()
    first, second = await desk.people(2)
    moved = (await desk.book(first.id, doctor.id, tomorrow())).appointment.id
    await told(desk, "CONFIRMATION SENT", appointment_id=moved)
    await desk.leave(doctor.id, tomorrow(), policy=schedule_pb2.Leave.POLICY_MOVE_SAME_DOCTOR)
    await told(desk, "CONFIRMATION SENT", "LEAVE_MOVED SENT", appointment_id=moved)
    off = tomorrow() + timedelta(days=20)
    gone = (await desk.book(second.id, doctor.id, off)).appointment.id
    await told(desk, "CONFIRMATION SENT", appointment_id=gone)
    await desk.leave(doctor.id, off, policy=schedule_pb2.Leave.POLICY_CANCEL)
    await told(desk, "CONFIRMATION SENT", "CANCELLATION SENT", appointment_id=gone)


async def test_what_is_not_told(desk: Front, receiver: Receiver) -> None:
    """Walk-ins, transfers, who has no phone, and what became untrue before it was told."""
    doctor = await desk.doctor()
    other = await desk.doctor(clinic_id=doctor.clinic_id)
    person, nobody = await desk.patient(), await desk.patient(phone="", given_name="Ana")
    walk_in = await desk.queues.AddWalkIn(queue_pb2.AddWalkInRequest(doctor_id=doctor.id, patient_id=person.id))
    await desk.queues.TransferPatient(
        queue_pb2.TransferPatientRequest(appointment_id=walk_in.appointment.id, to_doctor_id=other.id)
    )
    cancelled = await desk.cancel(walk_in.appointment.id)
    await desk.appointments.UndoTransition(
        appointment_pb2.UndoTransitionRequest(appointment_id=walk_in.appointment.id, etag=cancelled.appointment.etag)
    )
    unreachable = (await desk.book(nobody.id, doctor.id, tomorrow())).appointment.id
    await told(desk, "CONFIRMATION SKIPPED NO_ADDRESS", appointment_id=unreachable)
    assert await listed(desk, appointment_id=walk_in.appointment.id) == []
    # Nothing was told, so there is nothing to take back.
    await desk.cancel(unreachable)
    last = (await desk.book(person.id, other.id, tomorrow())).appointment.id
    await told(desk, "CONFIRMATION SENT", appointment_id=last)
    await told(desk, "CONFIRMATION SKIPPED NO_ADDRESS", appointment_id=unreachable)
    assert receiver.kinds == ["CONFIRMATION"]


async def test_superseded(hooked: Settings, conninfo: str, receiver: Receiver) -> None:
    """What was cancelled or moved before it was told is not told; who was told nothing hears of no cancellation."""
    async with serving(hooked, conninfo) as (_, front):
        doctor = await front.doctor()
        first, second = await front.people(2)
        gone = (await front.book(first.id, doctor.id, tomorrow())).appointment.id
        moved = (await front.book(second.id, doctor.id, tomorrow())).appointment.id
        await front.cancel(gone)
        target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(tomorrow() + timedelta(days=3)))
        await front.appointments.RescheduleAppointment(
            appointment_pb2.RescheduleAppointmentRequest(appointment_id=moved, doctor_day=target)
        )
        async with working(hooked, conninfo):
            await told(front, "CONFIRMATION SKIPPED SUPERSEDED", "RESCHEDULED SENT", appointment_id=moved)
            await told(front, "CONFIRMATION SKIPPED SUPERSEDED", appointment_id=gone)
    assert receiver.kinds == ["RESCHEDULED"]


async def test_nothing_is_planned_without_a_channel(conninfo: str, settings: Settings, hooked: Settings) -> None:
    """An unset channel plans nothing, and what happened meanwhile is not told once it is set."""
    async with serving(settings, conninfo, background="on") as (_, front):
        doctor, person = await front.doctor(), await front.patient()
        visit = (await front.book(person.id, doctor.id, tomorrow())).appointment.id
        ask = notification_pb2.SendConfirmationRequest(appointment_id=visit)
        assert await outcome(service(front).SendConfirmation(ask)) == "NO_CHANNEL"
        behind = (
            "select position < (select max(position) from seal) or exists ("
            " select from log where id not in (select id from seal)) from log_reader where name = 'notifications'"
        )
        await until(lambda: front.sql(behind) == [(False,)])
    async with serving(hooked, conninfo, background="on") as (_, front):
        later = (await front.book((await front.patient()).id, doctor.id, tomorrow())).appointment.id
        await told(front, "CONFIRMATION SENT", appointment_id=later)
        assert await listed(front, appointment_id=visit) == []


async def test_send_confirmation(desk: Front, receiver: Receiver) -> None:
    """A booked visit is confirmed again as often as somebody asks; another one is refused."""
    doctor, person = await desk.doctor(), await desk.patient()
    visit = (await desk.book(person.id, doctor.id)).appointment.id
    await told(desk, "CONFIRMATION SENT", appointment_id=visit)
    ask = notification_pb2.SendConfirmationRequest(appointment_id=visit, idempotency_key="once")
    first = await service(desk).SendConfirmation(ask)
    assert first.notification == first.notifications[0]
    await told(desk, *["CONFIRMATION SENT"] * 2, appointment_id=visit)
    again = await service(desk).SendConfirmation(ask)
    assert again.replayed
    assert again.notification == first.notification
    ask.idempotency_key = ""
    await service(desk).SendConfirmation(ask)
    await told(desk, *["CONFIRMATION SENT"] * 3, appointment_id=visit)
    ask.idempotency_key = "twins"
    twins = await asyncio.gather(*(service(desk).SendConfirmation(ask) for _ in range(20)))
    assert sorted(one.replayed for one in twins) == [False] + [True] * 19
    assert len({one.notification.id for one in twins}) == 1
    await told(desk, *["CONFIRMATION SENT"] * 4, appointment_id=visit)
    ((resources, actors),) = desk.sql(
        "select array_agg(resource order by id), array_agg(distinct actor) from log"
        " where type = 'notification.requested'"
    )
    assert resources[0] == f"notifications/{first.notification.id}"
    assert (len(resources), actors) == (3, ["anonymous"])
    await desk.check_in(visit)
    assert await outcome(service(desk).SendConfirmation(ask)) == "OK"
    ask.idempotency_key = ""
    assert await outcome(service(desk).SendConfirmation(ask)) == "INVALID_TRANSITION"
    ask.appointment_id = person.id
    assert await outcome(service(desk).SendConfirmation(ask)) == "APPOINTMENT_NOT_FOUND"


async def test_an_outage(desk: Front, receiver: Receiver) -> None:
    """While the receiver is away everything waits; when it is back it is told what is still true, each once."""
    doctor = await desk.doctor(max_patients_per_day=30)
    await receiver.stop()
    people = await desk.people(12)
    visits = [(await desk.book(person.id, doctor.id, tomorrow())).appointment.id for person in people]
    await desk.cancel(visits[3])
    await until(lambda: desk.sql("select 1 from notification where failure = 'CONNECTION_FAILED'") != [])
    await receiver.start()
    for visit in visits[:3] + visits[4:]:
        await told(desk, "CONFIRMATION SENT", appointment_id=visit)
    await told(desk, "CONFIRMATION SKIPPED SUPERSEDED", appointment_id=visits[3])
    assert len(receiver.posts) == 11
    assert len({post["data"]["notification"]["id"] for post in receiver.posts}) == 11


async def test_a_circuit(desk: Front, receiver: Receiver) -> None:
    """A receiver in trouble is probed by one notification at a time; a good answer lets the others go."""
    doctor = await desk.doctor(max_patients_per_day=30)
    receiver.status = 503
    for person in await desk.people(10):
        await desk.book(person.id, doctor.id, tomorrow())
    await until(lambda: desk.sql("select count(*) from notification where kind = 'CONFIRMATION'") == [(10,)])
    await until(lambda: len(receiver.ids) >= 3)
    # Those that were sent together before the first answer came, then one a probe.
    assert desk.sql("select sum(attempts) < 14 from notification") == [(True,)]
    receiver.status = 204
    await until(lambda: len(receiver.posts) == 10)
    assert receiver.most <= 8


async def test_refused_for_good(desk: Front, receiver: Receiver) -> None:
    """410 gives a notification up at once; redriven, it is sent, by its id or by the time range."""
    doctor = await desk.doctor()
    receiver.status = 410
    ids = []
    for person in await desk.people(3):
        visit = (await desk.book(person.id, doctor.id, tomorrow())).appointment.id
        (one,) = await told(desk, "CONFIRMATION DEAD", appointment_id=visit)
        assert (one.attempts, one.failure) == (1, "HTTP_410")
        ids.append(one.id)
    receiver.status = 200
    redrive = notification_pb2.RedriveNotificationsRequest(ids=ids[:1], idempotency_key="k")
    assert (await service(desk).RedriveNotifications(redrive)).count == 1
    again = await service(desk).RedriveNotifications(redrive)
    assert (again.count, again.replayed) == (1, True)
    await until(lambda: len(receiver.posts) == 1)
    redrive = notification_pb2.RedriveNotificationsRequest(state=Notification.STATE_DEAD)
    redrive.time_from.FromSeconds(1)
    assert (await service(desk).RedriveNotifications(redrive)).count == 2
    await until(lambda: len(receiver.posts) == 3)
    assert sorted(receiver.ids[-3:]) == sorted(ids)
    assert (await service(desk).RedriveNotifications(redrive)).count == 0


async def test_what_redrive_refuses(desk: Front) -> None:
    """Neither ids nor a range, both, another state, a state without a range, an unknown id, a range backwards."""
    some = "01900000-0000-7000-8000-000000000009"

    async def refused(**fields: Any) -> str:
        request = notification_pb2.RedriveNotificationsRequest(**{n: v for n, v in fields.items() if n != "times"})
        for name, seconds in fields.get("times", {}).items():
            getattr(request, name).FromSeconds(seconds)
        return await outcome(service(desk).RedriveNotifications(request))

    dead = Notification.STATE_DEAD
    assert await refused() == "INVALID_FIELD"
    assert await refused(state=dead) == "INVALID_FIELD"
    assert await refused(ids=[some], state=dead, times={"time_from": 1}) == "INVALID_FIELD"
    assert await refused(ids=[some], times={"time_from": 1}) == "INVALID_FIELD"
    assert await refused(state=Notification.STATE_SENT, times={"time_from": 1}) == "INVALID_FIELD"
    assert await refused(state=dead, times={"time_from": 2, "time_to": 1}) == "INVALID_FIELD"
    assert await refused(ids=[some]) == "NOTIFICATION_NOT_FOUND"
    assert await refused(ids=[some, some]) == "INVALID_FIELD"
    get = notification_pb2.GetNotificationRequest(notification_id=some)
    assert await outcome(service(desk).GetNotification(get)) == "NOTIFICATION_NOT_FOUND"


async def test_given_up(hooked: Settings, conninfo: str, receiver: Receiver) -> None:
    """What cannot be sent for so long is given up, also what only waited for the probe; a refusal of one is retried."""
    async with serving(hooked, conninfo, retry_hours=0.001) as (_, front):
        doctor = await front.doctor()
        receiver.status = 503
        for person in await front.people(3):
            await front.book(person.id, doctor.id, tomorrow())
        async with working(hooked, conninfo, retry_hours=0.001):
            await told(front, *["CONFIRMATION DEAD"] * 3)
            failures = front.sql("select distinct failure from notification where state = 'DEAD'")
            assert failures == [("HTTP_503",)]
            receiver.status = 422
            visit = (await front.book((await front.patient()).id, doctor.id, tomorrow())).appointment.id
            await until(lambda: front.sql("select 1 from notification where failure = 'HTTP_422'") != [])
            receiver.status = 200
            (one,) = await told(front, "CONFIRMATION SENT", appointment_id=visit)
            assert one.attempts >= 2
            assert one.failure == ""


async def test_two_replicas(hooked: Settings, conninfo: str, receiver: Receiver) -> None:
    """However many plan and send, each is sent once; also after the reader of the log was set back."""
    async with serving(hooked, conninfo) as (_, front), working(hooked, conninfo), working(hooked, conninfo):
        doctor = await front.doctor(max_patients_per_day=50)
        people = await front.people(30)
        await asyncio.gather(*(front.book(person.id, doctor.id, tomorrow()) for person in people))
        await until(lambda: len(receiver.posts) == 30)
        front.sql("update log_reader set position = 0 where name = 'notifications'")
        await front.book((await front.patient()).id, doctor.id, tomorrow())
        await until(lambda: len(receiver.posts) == 31)
        await until(lambda: front.sql("select 1 from notification where state in ('SENDING')") == [])
    assert len(receiver.ids) == 31
    assert len(set(receiver.ids)) == 31
    assert front.sql(
        "select count(*), count(distinct appointment_id) from notification where kind = 'CONFIRMATION'"
    ) == [(31, 31)]


async def test_a_killed_sender(hooked: Settings, conninfo: str, receiver: Receiver) -> None:
    """What a killed process has taken is sent by another one, with the same id, and only one is kept."""
    async with serving(hooked, conninfo) as (_, front):
        doctor, person = await front.doctor(), await front.patient()
        visit = (await front.book(person.id, doctor.id, tomorrow())).appointment.id
        receiver.gate.clear()
        async with working(hooked, conninfo) as work:
            await until(lambda: len(receiver.ids) == 1)
            # As after a kill: nobody writes the result.
            for task in work._senders[0]._running:
                task.cancel()
        (one,) = await listed(front, appointment_id=visit, kind=Notification.KIND_CONFIRMATION)
        assert one.state == Notification.STATE_SENDING
        front.sql("update notification set try_time = now() where state = 'SENDING'")
        receiver.gate.set()
        async with working(hooked, conninfo):
            (one,) = await told(front, "CONFIRMATION SENT", appointment_id=visit)
            assert one.attempts == 2
        assert set(receiver.ids) == {one.id}


async def test_kill_9(conninfo: str, receiver: Receiver, tmp_path: Path) -> None:
    """A killed background process loses and doubles nothing: what it had begun goes out again under the same id."""
    settings: Any = {"webhook_url": receiver.url, "webhook_secret": SECRET}
    with await asyncio.to_thread(lambda: Service(tmp_path / "log", conninfo, **settings)) as running:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.port}") as channel:
            front = Front(channel, conninfo, running.port)
            doctor = await front.doctor(max_patients_per_day=30)
            receiver.gate.clear()
            people = await front.people(6)
            for person in people[:3]:
                await front.book(person.id, doctor.id, tomorrow())
            await until(lambda: len(receiver.ids) == 3)
            (pid,) = running.workers("background")
            os.kill(pid, signal.SIGKILL)
            for person in people[3:]:
                await front.book(person.id, doctor.id, tomorrow())
            receiver.gate.set()
            await until(lambda: len(set(receiver.ids)) == 6)
            # Not to wait for the end of the lease.
            front.sql("update notification set try_time = now() where state = 'SENDING'")
            sent = "select count(*), count(distinct appointment_id) from notification where state = 'SENT'"
            await until(lambda: front.sql(sent) == [(6, 6)])
            ids = {found for (found,) in front.sql("select id::text from notification where kind = 'CONFIRMATION'")}
            assert set(receiver.ids) == ids
            assert len(ids) == 6
    assert PHONE not in running.log.read_text()
    assert receiver.url not in running.log.read_text()
