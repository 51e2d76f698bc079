"""Reminders, and how patients want to be told. The clock stands still, and is put forward."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, notification_pb2, patient_pb2
from clinic.frontdesk.v1.notification_pb2 import Notification
from frontdesk.db.database import Database
from frontdesk.jobs.maintenance import clean
from frontdesk.settings import Settings
from tests.clinic import Front, outcome
from tests.hostile.wire import serving
from tests.identities import bearing, create_key, user
from tests.receivers import SECRET, Receiver
from tests.test_notifications import listed, service, shown
from tests.waiting import until, until_true

HOUR = timedelta(hours=1)
START = datetime(2026, 11, 20, 15, 0, tzinfo=UTC)
"""Noon in São Paulo."""


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with Receiver() as made:
        yield made


@pytest.fixture
def when(conninfo: str, settings: Settings, receiver: Receiver) -> Callable[[datetime], Any]:
    """A server with background work whose clock stands still at this instant."""

    @asynccontextmanager
    async def open_at(instant: datetime, background: str = "on") -> AsyncIterator[Front]:
        name = conninfo_to_dict(conninfo)["dbname"]
        with psycopg.connect(conninfo, autocommit=True) as admin:
            admin.execute(f"alter database {name} set frontdesk.now = '{instant.isoformat()}'".encode())
        hooked = settings.model_copy(update={"webhook_url": receiver.url, "webhook_secret": SECRET})
        async with serving(hooked, conninfo, background=background) as (_, front):
            yield front

    return open_at


async def reminders(front: Front, visit: str, *wanted: str, times: list[datetime] | None = None) -> None:
    """Wait until these are the reminders of a visit, in the order of their times."""

    async def there() -> bool:
        found[:] = await listed(front, appointment_id=visit, kind=Notification.KIND_REMINDER)
        found.sort(key=lambda one: one.plan_time.ToDatetime())
        return [one.removeprefix("REMINDER ") for one in shown(found)] == list(wanted)

    found: list[Notification] = []
    try:
        await until_true(there)
    except TimeoutError:
        raise AssertionError(shown(found)) from None
    if times is not None:
        assert [one.plan_time.ToDatetime(UTC) for one in found] == times


async def slot_visit(front: Front, start: datetime, reminders: list[timedelta] | None = None) -> tuple[str, str]:
    """A booking of a slot at a clinic that reminds so long before; with its doctor."""
    clinic = await front.clinic(reminders=reminders or [])
    doctor = await front.doctor(clinic_id=clinic.id)
    slot = await front.slot(doctor.id, start)
    return (await front.book_slot((await front.patient()).id, slot.id)).appointment.id, doctor.id


async def test_before_a_slot(when: Any, receiver: Receiver) -> None:
    """At its time, once; those whose time had passed when it was booked are not planned."""
    start = START + 30 * HOUR
    async with when(START) as front:
        visit, _ = await slot_visit(front, start, [48 * HOUR, 24 * HOUR, 2 * HOUR])
        plain, _ = await slot_visit(front, start)
        await reminders(front, visit, "PLANNED", "PLANNED", times=[start - 24 * HOUR, start - 2 * HOUR])
        await reminders(front, plain, "PLANNED", times=[start - 24 * HOUR])
        none, _ = await slot_visit(front, start, [timedelta()])
        await until(lambda: receiver.kinds.count("CONFIRMATION") == 3)
        await reminders(front, none)
    async with when(start - 24 * HOUR) as front:
        await reminders(front, visit, "SENT", "PLANNED")
        await reminders(front, plain, "SENT")
    async with when(start - 2 * HOUR) as front:
        await reminders(front, visit, "SENT", "SENT")
    assert sorted(receiver.kinds) == ["CONFIRMATION"] * 3 + ["REMINDER"] * 3
    assert len(set(receiver.ids)) == 6


async def test_before_a_day(when: Any) -> None:
    """At 18:00 of the day before in the clinic's time, whatever the lengths; late until the day begins."""
    async with when(START) as front:
        doctor = await front.doctor()
        visits = [
            (await front.book(person.id, doctor.id, date(2026, 11, 22))).appointment.id
            for person in await front.people(2)
        ]
        for visit in visits:
            await reminders(front, visit, "PLANNED", times=[datetime(2026, 11, 21, 21, 0, tzinfo=UTC)])
        # Of today's, and of tomorrow's when it is late, the time has passed.
        today = (await front.book((await front.patient()).id, doctor.id, date(2026, 11, 20))).appointment.id
        await reminders(front, today)
    async with when(datetime(2026, 11, 22, 2, 59, tzinfo=UTC)) as front:
        for visit in visits:
            await reminders(front, visit, "SENT")


async def test_too_late(when: Any, receiver: Receiver) -> None:
    """Missed while all was down: late rather than never, one rather than several, and never after the start."""
    start = START + 30 * HOUR
    async with when(START) as front:
        late, _ = await slot_visit(front, start, [24 * HOUR, 2 * HOUR])
        missed, _ = await slot_visit(front, start - HOUR)
        doctor = await front.doctor()
        over = (await front.book((await front.patient()).id, doctor.id, date(2026, 11, 21))).appointment.id
        await reminders(front, over, "PLANNED")
        await reminders(front, late, "PLANNED", "PLANNED")
        await reminders(front, missed, "PLANNED")
    async with when(start - HOUR) as front:
        await reminders(front, late, "SKIPPED SUPERSEDED", "SENT")
        await reminders(front, missed, "SKIPPED TOO_LATE")
        await reminders(front, over, "SKIPPED TOO_LATE")
    assert receiver.kinds.count("REMINDER") == 1


async def test_replanned_and_dropped(when: Any) -> None:
    """A move plans anew, a cancellation and a check-in drop, and their undo plans again."""
    start = START + 50 * HOUR
    async with when(START) as front:
        visit, doctor = await slot_visit(front, start)
        await reminders(front, visit, "PLANNED")
        other = await front.slot(doctor, start + 24 * HOUR)
        await front.appointments.RescheduleAppointment(
            appointment_pb2.RescheduleAppointmentRequest(appointment_id=visit, slot_id=other.id)
        )
        times = [start - 24 * HOUR, start]
        await reminders(front, visit, "SKIPPED SUPERSEDED", "PLANNED", times=times)
        cancelled = await front.cancel(visit)
        await reminders(front, visit, *["SKIPPED SUPERSEDED"] * 2)
        undo = appointment_pb2.UndoTransitionRequest(appointment_id=visit, etag=cancelled.appointment.etag)
        await front.appointments.UndoTransition(undo)
        await reminders(front, visit, "SKIPPED SUPERSEDED", "SKIPPED SUPERSEDED", "PLANNED")

        clinic = await front.clinic(reminders=[timedelta(minutes=30)])
        own = await front.doctor(clinic_id=clinic.id)
        slot = await front.slot(own.id, START + HOUR)
        today = (await front.book_slot((await front.patient()).id, slot.id)).appointment.id
        await reminders(front, today, "PLANNED")
        here = await front.check_in(today)
        await reminders(front, today, "SKIPPED SUPERSEDED")
        undo = appointment_pb2.UndoTransitionRequest(appointment_id=today, etag=here.appointment.etag)
        await front.appointments.UndoTransition(undo)
        await reminders(front, today, "SKIPPED SUPERSEDED", "PLANNED")


async def test_too_late_for_a_confirmation(when: Any, receiver: Receiver) -> None:
    """After an outage nobody is told of what has begun; a cancelled one was never told."""
    async with when(START, "off") as front:
        visit, _ = await slot_visit(front, START + 2 * HOUR)
    async with when(START + 2 * HOUR) as front:

        async def late() -> bool:
            found = await listed(front, appointment_id=visit, kind=Notification.KIND_CONFIRMATION)
            return shown(found) == ["CONFIRMATION SKIPPED TOO_LATE"]

        await until_true(late)
    assert receiver.kinds == []


async def test_what_a_clinic_may_set(when: Any) -> None:
    """24 hours if nothing is set; at most five lengths, each once, from a minute to 60 days, or 0 alone."""
    async with when(START, "off") as front:
        clinic = await front.clinic()
        assert [one.ToTimedelta() for one in clinic.reminders] == [24 * HOUR]
        for bad in (
            [HOUR, HOUR], [timedelta(), HOUR], [timedelta(seconds=59)], [timedelta(days=61)], [-HOUR],
            [n * HOUR for n in range(1, 7)],
        ):  # fmt: skip
            assert await outcome(front.clinic(reminders=bad)) == "INVALID_FIELD", bad
        lengths: Any = [2 * HOUR, HOUR]
        changed = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=clinic.id, reminders=lengths))
        found = (await front.clinics.UpdateClinic(changed)).clinic
        assert [one.ToTimedelta() for one in found.reminders] == [2 * HOUR, HOUR]
        back = clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=clinic.id))
        back.update_mask.paths.append("reminders")
        found = (await front.clinics.UpdateClinic(back)).clinic
        assert [one.ToTimedelta() for one in found.reminders] == [24 * HOUR]


def preferring(patient_id: str, *channels: Any, **fields: Any) -> notification_pb2.SetContactPreferencesRequest:
    return notification_pb2.SetContactPreferencesRequest(patient_id=patient_id, channels=channels, **fields)


async def test_preferences(when: Any, receiver: Receiver) -> None:
    """They are read when something is sent: no channel sends nothing, and reminders can be off alone."""
    start = START + 30 * HOUR
    webhook = Notification.CHANNEL_WEBHOOK
    async with when(START) as front:
        visit, doctor = await slot_visit(front, start)
        patient = (await front.appointment(visit)).patient_id
        get = notification_pb2.GetContactPreferencesRequest(patient_id=patient)
        found = (await service(front).GetContactPreferences(get)).contact_preferences
        assert (list(found.channels), found.language, found.reminders) == ([webhook], "", True)
        assert not found.HasField("update_time")
        set_to = (
            await service(front).SetContactPreferences(preferring(patient, webhook, reminders=False))
        ).contact_preferences
        assert (list(set_to.channels), set_to.reminders, set_to.etag != found.etag) == ([webhook], False, True)
        stale = preferring(patient, etag=found.etag)
        assert await outcome(service(front).SetContactPreferences(stale)) == "ETAG_MISMATCH"
        silent = await front.patient()
        await service(front).SetContactPreferences(preferring(silent.id))
        # The other channel alone is none here.
        mail = await front.patient()
        await service(front).SetContactPreferences(preferring(mail.id, Notification.CHANNEL_EMAIL))
        for person in (silent, mail):
            quiet = (await front.book(person.id, doctor, date(2026, 11, 24))).appointment.id

            async def opted_out(quiet: str = quiet) -> bool:
                found = await listed(front, appointment_id=quiet, kind=Notification.KIND_CONFIRMATION)
                return shown(found) == ["CONFIRMATION SKIPPED OPTED_OUT"]

            await until_true(opted_out)
        # A record that is merged into another one takes its wish along.
        kept = await front.patient()
        merge = patient_pb2.MergePatientsRequest(keep_patient_id=kept.id, merge_patient_id=silent.id)
        await front.patients.MergePatients(merge)
        get.patient_id = kept.id
        assert list((await service(front).GetContactPreferences(get)).contact_preferences.channels) == []
    async with when(start - 24 * HOUR) as front:
        await reminders(front, visit, "SKIPPED OPTED_OUT")
    assert receiver.kinds == ["CONFIRMATION"]


async def test_bad_preferences(when: Any) -> None:
    """An unknown patient, a channel twice or none of the enum's, a language without texts."""
    async with when(START, "off") as front:
        person = (await front.patient()).id
        email = Notification.CHANNEL_EMAIL
        for bad in (
            preferring(person, email, email), preferring(person, 0), preferring(person, 9), preferring("x"),
            preferring(person, language="fr"), preferring(person, language="pt_BR"), preferring(person, language="EN"),
        ):  # fmt: skip
            assert await outcome(service(front).SetContactPreferences(bad)) == "INVALID_FIELD", bad
        unknown = preferring("01900000-0000-7000-8000-000000000009")
        assert await outcome(service(front).SetContactPreferences(unknown)) == "PATIENT_NOT_FOUND"
        own = user(front, "PATIENT", patient_id=person)
        assert await outcome(service(front).SetContactPreferences(preferring(person, email), metadata=own)) == "OK"
        other = preferring((await front.patient()).id, email)
        assert await outcome(service(front).SetContactPreferences(other, metadata=own)) == "PATIENT_NOT_FOUND"


async def test_clinics_of_ones_own(when: Any) -> None:
    """A caller of one clinic sees and redrives that clinic's notifications only."""
    async with when(START) as front:
        mine, _ = await slot_visit(front, START + HOUR)
        other, _ = await slot_visit(front, START + 2 * HOUR)
        clinic = (await front.appointment(mine)).clinic_id
        key = bearing((await create_key(front, "STAFF", clinic_ids=[clinic])).key)

        async def both() -> bool:
            return len(await listed(front)) == 2

        await until_true(both)
        answer = await service(front).ListNotifications(notification_pb2.ListNotificationsRequest(), metadata=key)
        assert [one.appointment_id for one in answer.notifications] == [mine]
        (hidden,) = await listed(front, appointment_id=other)
        get = notification_pb2.GetNotificationRequest(notification_id=hidden.id)
        assert await outcome(service(front).GetNotification(get, metadata=key)) == "CLINIC_NOT_YOURS"
        ids = notification_pb2.RedriveNotificationsRequest(ids=[hidden.id])
        assert await outcome(service(front).RedriveNotifications(ids, metadata=key)) == "CLINIC_NOT_YOURS"
        front.sql("update notification set state = 'DEAD'")
        ranged = notification_pb2.RedriveNotificationsRequest(state=Notification.STATE_DEAD)
        ranged.time_from.FromDatetime(START)
        assert (await service(front).RedriveNotifications(ranged, metadata=key)).count == 1
        filtered = notification_pb2.ListNotificationsRequest(
            state=Notification.STATE_DEAD, kind=Notification.KIND_CONFIRMATION
        )
        filtered.time_from.FromDatetime(START)
        filtered.time_to.FromDatetime(START + HOUR)
        found = await service(front).ListNotifications(filtered)
        assert [one.id for one in found.notifications] == [hidden.id]
        filtered.time_to.FromDatetime(START)
        assert not (await service(front).ListNotifications(filtered)).notifications


async def test_old_notifications_go(when: Any, conninfo: str) -> None:
    """Ninety days after its date a visit's notifications are deleted, and not before, nor one that waits."""
    async with when(START) as front:
        visit, _ = await slot_visit(front, START + 40 * 24 * HOUR)
        await reminders(front, visit, "PLANNED")
        for days, left in ((129, 2), (131, 1)):
            name = conninfo_to_dict(conninfo)["dbname"]
            front.sql(f"alter database {name} set frontdesk.now = '{(START + days * 24 * HOUR).isoformat()}'")
            front.sql("update notification set state = 'PLANNED', skip_reason = '' where kind = 'REMINDER'")
            db = Database(conninfo, pool_size=1)
            await db.open()
            await clean(db, keep_keys_seconds=1e6, keep_audit_seconds=1e9)
            await db.close()
            assert front.sql("select count(*) from notification") == [(left,)]
