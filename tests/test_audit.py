"""The log: every change is in it once, with who made it, and nothing of a patient but ids."""

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
import psycopg
import pytest
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import (
    appointment_pb2,
    audit_pb2,
    audit_pb2_grpc,
    auth_pb2,
    clinic_pb2,
    doctor_pb2,
    patient_pb2,
    queue_pb2,
)
from frontdesk.core.audit import _list_statement
from frontdesk.core.notes import Notes
from frontdesk.db.database import Database
from frontdesk.errors import DatabaseUnavailable
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front, day, outcome, reason_of, refusal, today
from tests.hostile.methods import MUTATIONS, call
from tests.hostile.test_idempotency import ELSEWHERE, SCENARIOS, keyed
from tests.hostile.wire import serving, working
from tests.identities import ADMIN, auth, bearing, create_key, user, user_of, user_token
from tests.waiting import early_in_a_minute, until

CHANGES: dict[str, list[str]] = {
    "CreateClinic": ["clinic.created"],
    "UpdateClinic": ["clinic.updated"],
    "RegisterPatient": ["patient.registered"],
    "UpdatePatient": ["patient.updated"],
    "MergePatients": ["patient.merged"],
    "CreateDoctor": ["doctor.created"],
    "UpdateDoctor": ["doctor.updated"],
    "SetDoctorAvailability": ["doctor_day.availability_set"],
    "SetWeeklySchedule": ["schedule.set"],
    "SetScheduleException": ["schedule.exception_set"],
    "DeleteScheduleException": ["schedule.exception_deleted"],
    "GenerateSlots": ["slot.created"],
    "CreateLeave": ["leave.applied", "leave.created"],
    "CancelLeave": ["leave.cancelled"],
    "CreateSlot": ["slot.created"],
    "BatchCreateSlots": ["slot.created"],
    "UpdateSlot": ["slot.updated"],
    "BlockSlots": ["slot.blocked"],
    "ReleaseSlots": ["slot.released"],
    "DeleteSlot": ["slot.deleted"],
    "BookAppointment": ["appointment.booked"],
    "HoldPlace": ["hold.placed"],
    "ReleaseHold": ["hold.released"],
    "JoinWaitlist": ["waitlist.joined"],
    "LeaveWaitlist": ["waitlist.left"],
    "OfferPlace": ["waitlist.offered"],
    "AcceptOffer": ["appointment.booked", "waitlist.accepted"],
    "DeclineOffer": ["waitlist.declined"],
    "UpdateAppointment": ["appointment.updated"],
    "RescheduleAppointment": ["appointment.moved_in", "appointment.moved_out"],
    "CancelAppointment": ["appointment.cancelled"],
    "MarkNoShow": ["appointment.no_show"],
    "StartAppointment": ["queue.started"],
    "CompleteAppointment": ["queue.completed"],
    "CheckIn": ["queue.checked_in"],
    "CallNext": ["queue.called"],
    "CallAgain": ["queue.called_again"],
    "AddWalkIn": ["appointment.booked", "queue.checked_in"],
    "TransferPatient": ["queue.transferred_in", "queue.transferred_out"],
    "UndoTransition": ["appointment.undone"],
    "SetPriority": ["queue.priority_set"],
    "ReturnToLine": ["queue.returned"],
    "ParkPatient": ["queue.parked"],
    "MarkMissed": ["queue.missed"],
    "LeaveQueue": ["queue.left"],
    "CreateApiKey": ["api_key.created"],
    "RevokeApiKey": ["api_key.revoked"],
    "CreateUser": ["user.created"],
    "UpdateUser": ["user.updated"],
    "SetUserRoles": ["user.roles_set"],
    "LinkPatient": ["user.patient_linked"],
    "RegisterUser": ["patient.registered", "user.registered"],
    "Logout": ["user.logged_out"],
    "UpdateProfile": ["user.updated"],
    "ChangePassword": ["user.password_changed"],
    "EnrollSecondFactor": ["user.second_factor_enrolled"],
    "ConfirmSecondFactor": ["user.second_factor_confirmed"],
    "RemoveSecondFactor": ["user.second_factor_removed"],
    "VerifyEmail": ["user.email_verified"],
    "RequestPasswordReset": ["user.password_reset_requested"],
    "ResetPassword": ["user.password_reset"],
    "ResetSecondFactor": ["user.second_factor_reset"],
    "SendConfirmation": ["notification.requested"],
    "RedriveNotifications": ["notification.redriven"],
    "SetContactPreferences": ["contact_preferences.set"],
}
"""The types of event that each method writes for the request of its scenario."""

# A change of one thing of its own.
RESOURCES = {
    "appointment": "appointments/", "queue": "appointments/", "doctor_day": "doctorDays/", "clinic": "clinics/",
    "patient": "patients/", "doctor": "doctors/", "slot": "slots/", "api_key": "apiKeys/", "user": "users/",
    "schedule": "schedules/", "hold": "holds/", "leave": "leaves/", "waitlist": "waitlistEntries/",
    "notification": "notifications/", "contact_preferences": "contactPreferences/",
}  # fmt: skip


def changes(front: Front) -> list[dict[str, Any]]:
    """The changes in the log, in the order of their types."""
    return [row for (row,) in front.sql("select to_jsonb(l) from log l where type is not null order by type, id")]


def test_every_change_has_a_type() -> None:
    """The table of types contains every method that takes a key, and no others."""
    assert CHANGES.keys() == set(MUTATIONS)


@pytest.mark.parametrize("name", sorted(CHANGES.keys() - ELSEWHERE))
async def test_a_change_is_logged_once(front: Front, name: str) -> None:
    """A change writes its rows, in its own transaction, with its actor and resource; a replay and a refusal none."""
    scenario = await SCENARIOS[name](front)
    before = {row["id"] for row in changes(front)}
    await call(front, name, keyed(scenario.request))
    after = [row for row in changes(front) if row["id"] not in before]
    assert sorted({row["type"] for row in after}) == CHANGES[name]
    # A leave's appointments are settled after it was made.
    assert len({row["transaction"] for row in after}) == (2 if name == "CreateLeave" else 1)
    for row in after:
        kind = row["type"].partition(".")[0]
        assert row["resource"].startswith("scheduleExceptions/" if "exception" in row["type"] else RESOURCES[kind])
        assert row["method"] == name or (row["method"], name) == ("RegisterPatient", "RegisterUser")
        assert row["address"] in ("127.0.0.1", "::1")
        assert row["outcome"] == "OK"
        ids = {
            "appointment": ("appointment_id", "patient_id", "doctor_id", "clinic_id"),
            "slot": ("slot_id", "doctor_id"),
            "hold": ("doctor_id", "clinic_id", "patient_id", "slot_id"),
        }
        for column in ids.get(kind, ()):
            assert row[column]
        assert (row["revision"] > 0) == (kind in ("appointment", "queue", "doctor_day"))
    assert (await call(front, name, keyed(scenario.request))).replayed
    assert len(changes(front)) == len(before) + len(after)


async def test_actors(front: Front) -> None:
    """A change is logged under the identity of its credentials; a label that anybody may send is no identity."""
    key = await create_key(front, "STAFF")
    doctor, people = await front.doctor(), await front.people(2)
    for person, metadata in zip(people, (bearing(key.key), (("frontdesk-caller", "users/somebody"),)), strict=True):
        target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
        request = appointment_pb2.BookAppointmentRequest(patient_id=person.id, doctor_day=target)
        await front.appointments.BookAppointment(request, metadata=metadata)
    assert [row["actor"] for row in changes(front) if row["type"] == "appointment.booked"] == [
        f"keys/{key.api_key.id}",
        "anonymous",
    ]


async def test_refusals_and_dry_runs_are_no_changes(front: Front) -> None:
    """Neither a refusal, nor a dry run, nor a person who is found again, is a change."""
    doctor, patient = await front.doctor(), await front.patient(given_name="Ana")
    before = changes(front)
    assert (await front.patient(given_name="Ana")).id == patient.id
    await front.book(patient.id, doctor.id, validate_only=True)
    await refusal(front.book(patient.id, doctor.id, today() - timedelta(days=1)))
    assert changes(front) == before
    # A date of birth that says more changes the record.
    assert (await front.patient(given_name="Ana", birth_date=Date(year=1980))).id == patient.id
    assert [row["data"] for row in changes(front) if row not in before] == [{"fields": "birth_date"}]


def notes(front: Front, *columns: str) -> list[tuple[Any, ...]]:
    """These columns of the rows that are no changes, in the order of their times."""
    return front.sql(f"select {', '.join(columns)} from log where type is null order by id")


async def test_reads_are_logged(front: Front) -> None:
    """Whoever reads patients' records is logged within a second or so, with the patients; other reads are not."""
    first = await front.arrive((doctor := await front.doctor()).id)
    second = await front.arrive(doctor.id)
    ids = [answer.appointment.patient_id for answer in (first, second)]
    key = bearing((await create_key(front, "STAFF")).key)

    async def one(method: str, call: Any, *expected: Any) -> None:
        seen = len(notes(front, "id"))
        await call
        await until(lambda: len(notes(front, "id")) > seen)
        columns = ("method", "resource", "patient_id::text", "patient_ids::text[]", "count", "outcome")
        assert notes(front, *columns)[seen:] == [(method, *expected, "OK")]

    await front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=key)
    await front.appointments.ListAppointments(
        appointment_pb2.ListAppointmentsRequest(doctor_id=(await front.doctor()).id), metadata=key
    )
    patient = patient_pb2.GetPatientRequest(patient_id=ids[0])
    read = front.patients.GetPatient(patient, metadata=key)
    await one("GetPatient", read, f"patients/{ids[0]}", ids[0], None, 1)
    some = patient_pb2.ListPatientsRequest(phone="+5511987654321")
    await one("ListPatients", front.patients.ListPatients(some), None, None, sorted(ids), 2)
    visit = first.appointment.id
    await one("GetAppointment", front.appointment(visit), f"appointments/{visit}", ids[0], None, 1)
    mine = appointment_pb2.ListAppointmentsRequest(patient_id=ids[0])
    await one("ListAppointments", front.appointments.ListAppointments(mine), None, ids[0], None, 1)
    day_name = f"doctorDays/{doctor.id}/{today()}"
    await one("GetQueue", front.queue(doctor.id), day_name, None, sorted(ids), 2)
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    await one("WatchQueue", stream.read(), day_name, None, sorted(ids), 2)
    stream.cancel()
    board = queue_pb2.GetQueueRequest(doctor_id=doctor.id, view=queue_pb2.QUEUE_VIEW_BOARD)
    await front.queues.GetQueue(board)
    actors = [actor for (actor,) in notes(front, "actor")]
    assert actors[0].startswith("keys/")
    assert set(actors[1:]) == {"anonymous"}


async def test_whom_a_stream_shows(front: Front) -> None:
    """Patients who come to a watched queue are logged too, each once a stream, also if they have left since."""
    doctor = await front.doctor()
    first = await front.arrive(doctor.id)
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    token = (await watch.read()).resume_token

    async def noted(*expected: queue_pb2.CheckInResponse) -> None:
        ids = [[one.entry.patient_id] for one in expected]
        columns = ("method", "resource", "coalesce(patient_ids, array[patient_id])::text[]", "count")
        rows = [("WatchQueue", f"doctorDays/{doctor.id}/{today()}", one, 1) for one in ids]
        await until(lambda: len(notes(front, "id")) >= len(rows))
        assert notes(front, *columns) == rows

    await noted(first)
    second = await front.arrive(doctor.id)
    while (await watch.read()).revision < second.revision:
        pass
    await noted(first, second)
    # The third has left when the next stream goes on from here.
    third = await front.arrive(doctor.id)
    left = await front.queues.LeaveQueue(queue_pb2.LeaveQueueRequest(appointment_id=third.appointment.id))
    while (await watch.read()).revision < left.revision:
        pass
    watch.cancel()
    await noted(first, second, third)
    for view, seen in ((queue_pb2.QUEUE_VIEW_BOARD, []), (queue_pb2.QUEUE_VIEW_STAFF, [first, second, third])):
        request = queue_pb2.WatchQueueRequest(doctor_id=doctor.id, resume_token=token, view=view)
        watch = front.queues.WatchQueue(request)
        assert (await watch.read()).revision == left.revision
        watch.cancel()
        ids = sorted(one.entry.patient_id for one in seen)
        await until(lambda seen=seen: len(notes(front, "id")) == 3 + bool(seen))  # type: ignore[misc]
        if seen:
            assert notes(front, "patient_ids::text[]")[3:] == [(ids,)]
    found = [event.method for event in await listed(front, patient_id=third.entry.patient_id)]
    assert found.count("WatchQueue") == 2


async def test_answers_with_a_record_are_logged(front: Front) -> None:
    """A replay, a person who is found again and an empty change are logged as reads: their answers have the record."""
    doctor, person = await front.doctor(), await front.patient(given_name="Ana")
    by = bearing((await create_key(front, "STAFF")).key)

    async def reads(method: str, expected: str, call: Callable[[], Any], times: int) -> None:
        seen = len(notes(front, "id"))
        for _ in range(times):
            await call()
        await until(lambda: len(notes(front, "id")) > seen)
        found = notes(front, "method", "patient_id::text", "resource", "outcome")[seen:]
        assert found == [(method, person.id, expected, "OK")]

    record = f"patients/{person.id}"
    found = patient_pb2.Patient(given_name="Ana", phone=person.phone)
    register = patient_pb2.RegisterPatientRequest(patient=found)
    await reads("RegisterPatient", record, lambda: front.patients.RegisterPatient(register, metadata=by), 1)
    nothing = patient_pb2.UpdatePatientRequest(patient=patient_pb2.Patient(id=person.id))
    await reads("UpdatePatient", record, lambda: front.patients.UpdatePatient(nothing, metadata=by), 1)
    changed = patient_pb2.Patient(id=person.id, email="ana@example.com")
    update = patient_pb2.UpdatePatientRequest(patient=changed, idempotency_key="k")
    await reads("UpdatePatient", record, lambda: front.patients.UpdatePatient(update, metadata=by), 2)
    other = (await front.patient()).id
    merge = patient_pb2.MergePatientsRequest(keep_patient_id=person.id, merge_patient_id=other, idempotency_key="k")
    await reads("MergePatients", record, lambda: front.patients.MergePatients(merge, metadata=by), 2)

    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
    book = appointment_pb2.BookAppointmentRequest(patient_id=person.id, doctor_day=target, idempotency_key="k")
    booked = (await front.appointments.BookAppointment(book, metadata=by)).appointment
    visit = f"appointments/{booked.id}"
    await reads("BookAppointment", visit, lambda: front.appointments.BookAppointment(book, metadata=by), 1)
    reason = appointment_pb2.UpdateAppointmentRequest(
        appointment=appointment_pb2.Appointment(id=booked.id, reason="cough"), idempotency_key="k"
    )
    await reads("UpdateAppointment", visit, lambda: front.appointments.UpdateAppointment(reason, metadata=by), 2)
    arrive = queue_pb2.CheckInRequest(appointment_id=booked.id, idempotency_key="k")
    await reads("CheckIn", visit, lambda: front.queues.CheckIn(arrive, metadata=by), 2)
    following = queue_pb2.CallNextRequest(doctor_id=doctor.id, idempotency_key="k")
    await reads("CallNext", visit, lambda: front.queues.CallNext(following, metadata=by), 2)


async def test_the_last_notes_are_written(conninfo: str, settings: Settings) -> None:
    """A worker that ends writes its notes, and the background process seals as it ends.

    Equal refusals of a caller are one row with their number.
    """
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        front = Front(channel, conninfo, port)
        board = await create_key(front, "BOARD")
        patient = await front.patient()
        request = patient_pb2.GetPatientRequest(patient_id=patient.id)
        for _ in range(3):
            error = await refusal(front.patients.GetPatient(request, metadata=bearing(board.key)))
            assert reason_of(error) == "ROLE_REQUIRED"
        assert (
            await outcome(front.patients.GetPatient(request, metadata=bearing("fdk_unknown"))) == "CREDENTIALS_INVALID"
        )
        await front.patients.GetPatient(request)
        # Who may see nothing but his own is told that another's does not exist.
        own = user(front, "PATIENT", patient_id=patient.id)
        other = await front.book((await front.patient()).id, (await front.doctor()).id)
        visit = appointment_pb2.GetAppointmentRequest(appointment_id=other.appointment.id)
        assert await outcome(front.appointments.GetAppointment(visit, metadata=own)) == "APPOINTMENT_NOT_FOUND"
        # A mistake of the desk is no refused access.
        nobody = patient_pb2.GetPatientRequest(patient_id=board.api_key.id)
        assert await outcome(front.patients.GetPatient(nobody)) == "PATIENT_NOT_FOUND"
    await worker.stop()
    async with working(settings, conninfo):
        pass
    assert sorted(notes(front, "actor", "outcome", "count")) == [
        ("anonymous", "CREDENTIALS_INVALID", 1),
        ("anonymous", "OK", 1),
        (f"keys/{board.api_key.id}", "ROLE_REQUIRED", 3),
        (f"users/{user_of(own)[0]}", "APPOINTMENT_NOT_FOUND", 1),
    ]
    assert front.sql("select count(*) from log where id not in (select id from seal)") == [(0,)]


async def test_what_was_refused(conninfo: str, settings: Settings) -> None:
    """A refused access is in the log with what its request named, and found by it."""
    async with serving(settings, conninfo, address_requests_per_minute=3) as (worker, front):
        doctor, (ana, rui) = await front.doctor(), await front.people(2)
        visit = (await front.book(rui.id, doctor.id)).appointment.id
        desk = bearing((await create_key(front, "STAFF", clinic_ids=[(await front.clinic()).id])).key)
        board = bearing((await create_key(front, "BOARD")).key)
        own = user(front, "PATIENT", patient_id=ana.id)
        await early_in_a_minute()
        target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
        read = appointment_pb2.GetAppointmentRequest(appointment_id=visit)
        book = appointment_pb2.BookAppointmentRequest(patient_id=rui.id, doctor_day=target)
        look = queue_pb2.GetQueueRequest(doctor_id=doctor.id, date=day(today()))
        get = patient_pb2.GetPatientRequest(patient_id=rui.id.upper())
        for attempt, reason in (
            (front.appointments.GetAppointment(read, metadata=own), "APPOINTMENT_NOT_FOUND"),
            (front.appointments.BookAppointment(book, metadata=own), "PATIENT_NOT_FOUND"),
            (front.queues.GetQueue(look, metadata=desk), "CLINIC_NOT_YOURS"),
            (front.patients.GetPatient(get, metadata=board), "ROLE_REQUIRED"),
        ):
            assert await outcome(attempt) == reason
        outcomes = [await outcome(front.patients.GetPatient(get, metadata=bearing("fdk_wrong"))) for _ in range(4)]
        assert outcomes == ["CREDENTIALS_INVALID"] * 3 + ["RATE_LIMITED"]
        await worker._notes.finish()
        by_resource = {
            f"appointments/{visit}": [("GetAppointment", "APPOINTMENT_NOT_FOUND", 1, "", "")],
            f"doctorDays/{doctor.id}/{today()}": [("GetQueue", "CLINIC_NOT_YOURS", 1, doctor.clinic_id, "")],
            f"patients/{rui.id}": [
                ("BookAppointment", "PATIENT_NOT_FOUND", 1, doctor.clinic_id, rui.id),
                ("GetPatient", "CREDENTIALS_INVALID", 3, "", rui.id),
                ("GetPatient", "RATE_LIMITED", 1, "", rui.id),
                ("GetPatient", "ROLE_REQUIRED", 1, "", rui.id),
            ],
        }
        for resource, expected in by_resource.items():
            found = [
                (event.method, event.outcome, event.count, event.clinic_id, event.patient_id)
                for event in await listed(front, resource=resource)
                if event.outcome != "OK"
            ]
            assert sorted(found) == expected


async def test_throttled_logins_are_logged(conninfo: str, settings: Settings) -> None:
    """A login that must wait is a refused access; a good caller who is over the limit is not."""
    async with serving(settings, conninfo, user_requests_per_minute=1) as (worker, front):
        request = auth_pb2.LoginRequest(email="nobody@example.com", password="a password")
        outcomes = [await outcome(auth(front).Login(request)) for _ in range(7)]
        assert outcomes == ["BAD_LOGIN"] * 5 + ["LOGIN_THROTTLED"] * 2
        await early_in_a_minute()
        for expected in ("OK", "RATE_LIMITED"):
            listed_clinics = front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=user_token())
            assert await outcome(listed_clinics) == expected
        await worker._notes.finish()
        assert sorted(notes(front, "method", "outcome", "count")) == [
            ("Login", "BAD_LOGIN", 5),
            ("Login", "LOGIN_THROTTLED", 2),
        ]


async def test_many_different_refusals(front: Front, conninfo: str) -> None:
    """Of a caller who names thing after thing, only the first hundred of a minute are told apart."""
    db = Database(conninfo, pool_size=1)
    await db.open()
    summing = Notes(db)
    for _ in range(2):
        for n in range(150):
            summing.refused("users/1", "GetPatient", "PATIENT_NOT_FOUND", "unix", {"resource": f"patients/{n}"})
        summing.refused("users/2", "GetPatient", "PATIENT_NOT_FOUND", "unix", {"resource": "patients/1"})
        await summing.finish()
    await db.close()
    found = front.sql("select actor, resource is null, count(*), sum(count) from log where type is null group by 1, 2")
    assert sorted(found) == [("users/1", False, 200, 200), ("users/1", True, 2, 100), ("users/2", False, 2, 2)]


async def test_notes_wait_for_the_database(conninfo: str) -> None:
    """Notes of a time without a database are written later, and equal refusals meanwhile are added to them."""
    now = 1000.0
    db = Database("host=/nowhere dbname=none", pool_size=1)
    away = Notes(db, lambda: now)
    for patient in range(3):
        away.read("users/1", "GetPatient", [f"01900000-0000-7000-8000-00000000000{patient}"], {}, "unix", "")
    away.refused("name:anybody", "GetPatient", "CREDENTIALS_REQUIRED", "unix", {})
    await db.open()
    with pytest.raises(DatabaseUnavailable):
        await away.finish()
    await db.close()
    away.refused("name:somebody", "GetPatient", "CREDENTIALS_REQUIRED", "unix", {})
    now += 30
    away._db = db = Database(conninfo, pool_size=1)
    await db.open()
    await away.finish()
    await away.finish()
    found = await db.rows(
        "select actor, outcome, count, extract(epoch from moment() - time)::float8 from log order by actor, id", (),
        lambda *columns: columns,
    )  # fmt: skip
    await db.close()
    assert [columns[:3] for columns in found] == [("anonymous", "CREDENTIALS_REQUIRED", 2), *[("users/1", "OK", 1)] * 3]
    assert all(30 <= age < 40 for *_, age in found)


async def test_nothing_of_a_patient_but_ids(front: Front) -> None:
    """No text of a patient is in any column of the log, nor a room where events are made from."""
    canary = "Xylophon"
    number = "+5511912345678"
    doctor = await front.doctor(display_name=canary)
    fields: dict[str, Any] = {"phone": number, "email": f"{canary}@example.org", "family_name": canary}
    people = [await front.patient(given_name=f"{canary} {n}", **fields) for n in range(2)]
    booked = [await front.book(person.id, doctor.id, reason=canary, notes=canary) for person in people]
    await front.check_in(booked[0].appointment.id)
    await front.call_next(doctor.id, room="Room of the canary")
    await front.cancel(booked[1].appointment.id, canary)
    for n, person in enumerate(people):
        changed = patient_pb2.Patient(id=person.id, given_name=f"{canary} the {n}", allergies=[canary])
        await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))
    await front.patients.MergePatients(
        patient_pb2.MergePatientsRequest(keep_patient_id=people[0].id, merge_patient_id=people[1].id)
    )
    await front.patients.ListPatients(patient_pb2.ListPatientsRequest(name_prefix=canary))
    await front.patients.ListPatients(patient_pb2.ListPatientsRequest(phone=number))
    await until(lambda: len(notes(front, "id")) == 2)
    for (row,) in front.sql("select lower((to_jsonb(l) - 'room')::text) from log l"):
        assert canary.lower() not in row
        assert number not in row
        assert "example.org" not in row
        assert "room of" not in row


async def listed(front: Front, **fields: Any) -> list[audit_pb2.AuditEvent]:
    """The events of these filters, newest first, page by page of three."""
    stub: Any = audit_pb2_grpc.AuditServiceStub(front.channel)
    found: list[audit_pb2.AuditEvent] = []
    token = ""
    while True:
        request = audit_pb2.ListAuditEventsRequest(page_size=3, page_token=token, **fields)
        answer = await stub.ListAuditEvents(request, metadata=ADMIN)
        found += answer.audit_events
        token = answer.next_page_token
        if not token:
            return found


async def test_the_audit(front: Front) -> None:
    """ListAuditEvents finds what was done by patient, actor, resource, method and time, newest first, in pages."""
    key = await create_key(front, "STAFF")
    staff = bearing(key.key)
    doctor, (ana, rui) = await front.doctor(), await front.people(2)
    booked = {}
    for patient in (ana, rui):
        target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
        request = appointment_pb2.BookAppointmentRequest(patient_id=patient.id, doctor_day=target)
        booked[patient.id] = (await front.appointments.BookAppointment(request, metadata=staff)).appointment
    await front.check_in(booked[rui.id].id)
    await front.appointments.ListAppointments(
        appointment_pb2.ListAppointmentsRequest(doctor_id=doctor.id), metadata=staff
    )
    await until(lambda: len(notes(front, "id")) == 1)

    everything = await listed(front)
    assert len(everything) == len({event.id for event in everything}) == len(front.sql("select id from log"))
    assert [event.id for event in everything] == sorted((event.id for event in everything), reverse=True)

    async def methods(**fields: Any) -> list[str]:
        return [event.method for event in await listed(front, **fields)]

    visit = booked[rui.id]
    assert await methods(patient_id=ana.id) == ["ListAppointments", "BookAppointment", "RegisterPatient"]
    assert await methods(patient_id=rui.id, method="CheckIn") == ["CheckIn"]
    assert await methods(actor=f"keys/{key.api_key.id}") == ["ListAppointments", "BookAppointment", "BookAppointment"]
    assert await methods(resource=f"appointments/{visit.id}") == ["CheckIn", "BookAppointment"]
    assert await methods(resource=f"patients/{ana.id}") == ["RegisterPatient"]
    assert await methods(resource=f"doctors/{doctor.id}", actor="anonymous") == ["CreateDoctor"]
    assert await methods(method="CreateApiKey") == ["CreateApiKey"]
    assert await methods(resource=f"doctorDays/{doctor.id}/{today()}") == []
    await front.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), is_present=True)
    )
    (said,) = await listed(front, resource=f"doctorDays/{doctor.id}/{today()}")
    assert (said.clinic_id, said.patient_id, said.outcome, said.count) == (doctor.clinic_id, "", "OK", 1)
    assert said.address in ("127.0.0.1", "::1")
    middle = everything[3].time
    later = [event.id for event in await listed(front, time_from=middle)]
    earlier = [event.id for event in await listed(front, time_to=middle)]
    assert later[1:] + earlier == [event.id for event in everything]
    assert everything[3].id in later

    # What was done with a record before it was merged is found under the kept one.
    await front.patients.MergePatients(
        patient_pb2.MergePatientsRequest(keep_patient_id=ana.id, merge_patient_id=(await front.patient()).id)
    )
    assert (await methods(patient_id=ana.id))[:2] == ["MergePatients", "RegisterPatient"]


async def test_places_above_the_capacity_are_on_record(front: Front) -> None:
    """The audit tells which walk-ins and transfers got a place above the capacity, and no later change of the visit."""
    full = await front.doctor(max_patients_per_day=1)
    other = await front.doctor(clinic_id=full.clinic_id, max_patients_per_day=1)
    await front.arrive(full.id)
    await front.arrive(other.id)
    person = await front.patient()
    taken = await front.queues.AddWalkIn(
        queue_pb2.AddWalkInRequest(doctor_id=full.id, patient_id=person.id, override_reason="fainted")
    )
    visit = taken.appointment.id
    await front.queues.TransferPatient(
        queue_pb2.TransferPatientRequest(appointment_id=visit, to_doctor_id=other.id, override_reason="fainted")
    )
    await front.cancel(visit)
    events = await listed(front, resource=f"appointments/{visit}")
    assert Counter((event.method, event.over_capacity) for event in events) == Counter(
        {
            ("AddWalkIn", True): 1,
            ("AddWalkIn", False): 1,
            ("TransferPatient", True): 1,
            ("TransferPatient", False): 1,
            ("CancelAppointment", False): 1,
        }
    )


async def test_who_may_see_the_audit(front: Front) -> None:
    """Only an administrator of all clinics sees the audit."""
    stub: Any = audit_pb2_grpc.AuditServiceStub(front.channel)
    request = audit_pb2.ListAuditEventsRequest()
    clinic = await front.clinic()
    some = bearing((await create_key(front, "ADMIN", clinic_ids=[clinic.id])).key)
    staff = bearing((await create_key(front, "STAFF")).key)
    assert await outcome(stub.ListAuditEvents(request)) == "CREDENTIALS_REQUIRED"
    for metadata in (some, staff):
        assert await outcome(stub.ListAuditEvents(request, metadata=metadata)) == "ROLE_REQUIRED"
    bad = audit_pb2.ListAuditEventsRequest(resource=f"doctorDays/{clinic.id}/2026-02-30")
    assert await outcome(stub.ListAuditEvents(bad, metadata=ADMIN)) == "INVALID_FIELD"
    backwards = audit_pb2.ListAuditEventsRequest()
    backwards.time_from.FromSeconds(10)
    backwards.time_to.FromSeconds(9)
    assert await outcome(stub.ListAuditEvents(backwards, metadata=ADMIN)) == "INVALID_FIELD"


@pytest.mark.parametrize(
    "given",
    [
        set(), {"patient_id"}, {"actor"}, {"method"}, {"resource"}, {"of_appointment"}, {"of_doctor"},
        {"after", "actor"}, {"time_from", "time_to"},
    ],
    # Sorted, because each process has another order of sets, and xdist compares the names.
    ids=lambda given: "-".join(sorted(given)) or "none",
)  # fmt: skip
async def test_an_index_serves_each_filter(front: Front, given: set[str]) -> None:
    """No filter reads the whole log."""
    ids = ("patient_id", "of_appointment", "of_doctor", "after", "first_id", "last_id")
    values: dict[str, Any] = dict.fromkeys(ids, "01900000-0000-7000-8000-000000000009")
    values |= {"actor": "users/1", "method": "GetPatient", "resource": "clinics/1", "of_date": "2026-11-26"}
    values |= {"time_from": "2026-11-26", "time_to": "2026-11-27", "size": "50"}
    with psycopg.connect(front.conninfo) as connection:
        connection.execute("set plan_cache_mode = force_generic_plan")
        connection.execute("set enable_seqscan = off")
        plan = connection.execute(f"explain {_list_statement(frozenset(given))}", values).fetchall()
    shown = "\n".join(line for (line,) in plan)
    assert "Seq Scan on log" not in shown, shown
    if given - {"time_from", "time_to"}:
        assert "log_pkey" not in shown, shown
