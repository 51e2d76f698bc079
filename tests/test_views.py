"""The views of a queue: what each shows, to whom, and that a stream stays within its view."""

import asyncio
from contextlib import aclosing
from typing import Any

import grpc

from clinic.frontdesk.v1 import patient_pb2, queue_pb2
from clinic.frontdesk.v1.queue_pb2 import QueueView
from frontdesk.client import FrontdeskClient
from tests.clinic import Front, day, details, outcome, refusal, tomorrow
from tests.identities import ADMIN, Metadata, bearing, create_key, user
from tests.waiting import SOON

STAFF, BOARD, OWN = queue_pb2.QUEUE_VIEW_STAFF, queue_pb2.QUEUE_VIEW_BOARD, queue_pb2.QUEUE_VIEW_OWN
UNKNOWN = "01900000-0000-7000-8000-00000000ffff"


async def seen(
    front: Front, doctor_id: str, view: QueueView.ValueType, by: Metadata = (), *, tomorrows: bool = False
) -> queue_pb2.Queue:
    """The queue as GetQueue answers it."""
    request = queue_pb2.GetQueueRequest(doctor_id=doctor_id, view=view, date=day(tomorrow()) if tomorrows else None)
    return (await front.queues.GetQueue(request, metadata=by)).queue


def watch(front: Front, doctor_id: str, view: QueueView.ValueType, by: Metadata = (), resume: str = "") -> Any:
    """A stream."""
    request = queue_pb2.WatchQueueRequest(doctor_id=doctor_id, view=view, resume_token=resume)
    return front.queues.WatchQueue(request, metadata=by)


async def read(stream: Any) -> Any:
    """The next message of a stream."""
    async with asyncio.timeout(SOON):
        message = await stream.read()
    assert message is not grpc.aio.EOF
    return message


def bare(entry: queue_pb2.QueueEntry) -> queue_pb2.QueueEntry:
    """The entry as a board shows it."""
    shown = queue_pb2.QueueEntry()
    shown.CopyFrom(entry)
    for field in ("appointment_id", "patient_id", "patient_name", "call_count", "priority"):
        shown.ClearField(field)
    return shown


def board(queue: queue_pb2.Queue, but: str = "") -> queue_pb2.Queue:
    """The queue as a board shows it, but with the entry of one patient whole."""
    shown = queue_pb2.Queue()
    shown.CopyFrom(queue)
    del shown.entries[:]
    shown.entries.extend(entry if entry.patient_id == but else bare(entry) for entry in queue.entries)
    return shown


async def test_what_each_view_shows(front: Front) -> None:
    """A board shows no name, id, priority or count of calls; a patient sees the same, and the own entry whole."""
    doctor = await front.doctor()
    first, second = [await front.arrive(doctor.id) for _ in range(2)]
    await front.call_next(doctor.id, "7")
    whole = await seen(front, doctor.id, STAFF)
    assert [entry.patient_name != "" for entry in whole.entries] == [True, True]
    assert await seen(front, doctor.id, queue_pb2.QUEUE_VIEW_UNSPECIFIED) == whole
    assert await seen(front, doctor.id, BOARD) == board(whole) != whole
    called = next(entry for entry in whole.entries if entry.call_count)
    assert bare(called).room == "7"
    assert bare(called).HasField("call_time")
    for arrived in (first, second):
        patient_id = arrived.entry.patient_id
        me = user(front, "PATIENT", patient_id=patient_id)
        assert await seen(front, doctor.id, OWN, me) == board(whole, patient_id)


async def test_who_may_ask_for_which_view(front: Front) -> None:
    """Each role sees the views that are for it, at the clinics that are the caller's."""
    here, there = await front.doctor(), await front.doctor()
    arrived = await front.arrive(here.id)
    patient_id, mine = arrived.entry.patient_id, [here.clinic_id]
    role, clinic, none = "ROLE_REQUIRED", "CLINIC_NOT_YOURS", "APPOINTMENT_NOT_FOUND"
    expected = [
        ((), ("OK", "OK"), ("OK", "OK"), ("CREDENTIALS_REQUIRED",) * 2),
        (ADMIN, ("OK", "OK"), ("OK", "OK"), (role, role)),
        (user(front, "STAFF", clinic_ids=mine), ("OK", clinic), ("OK", clinic), (role, role)),
        (bearing((await create_key(front, "BOARD", clinic_ids=mine)).key), (role, role), ("OK", clinic), (role, role)),
        (bearing((await create_key(front, "BOARD")).key), (role, role), ("OK", "OK"), (role, role)),
        (user(front, "DOCTOR", doctor_id=here.id), ("OK", role), ("OK", "OK"), (role, role)),
        (user(front, "DOCTOR", doctor_id=here.id, clinic_ids=mine), ("OK", role), ("OK", clinic), (role, role)),
        (user(front, "PATIENT", patient_id=patient_id), (role, role), ("OK", "OK"), ("OK", none)),
        (user(front, "PATIENT"), (role, role), ("OK", "OK"), (none, none)),
    ]
    for by, *views in expected:
        for view, outcomes in zip((STAFF, BOARD, OWN), views, strict=True):
            for doctor, wanted in zip((here, there), outcomes, strict=True):
                assert await outcome(seen(front, doctor.id, view, by)) == wanted, (by, view)
                assert await outcome(read(watch(front, doctor.id, view, by))) == wanted, (by, view)
        assert await outcome(seen(front, UNKNOWN, BOARD, by)) == "DOCTOR_NOT_FOUND"
        assert await outcome(read(watch(front, UNKNOWN, BOARD, by))) == "DOCTOR_NOT_FOUND"


async def test_the_refusal_names_the_view(front: Front) -> None:
    """If it is the view that a role may not ask for, the refusal says so."""
    doctor = await front.doctor()
    key = bearing((await create_key(front, "BOARD")).key)
    error = await refusal(seen(front, doctor.id, STAFF, key))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert dict(details(error)["ErrorInfo"].metadata) == {"method": "GetQueue", "field": "view"}


async def test_own_needs_an_appointment_of_the_day(front: Front) -> None:
    """A patient sees the queue of a day with an appointment that is not cancelled; a merged record's is the same."""
    doctor = await front.doctor()
    person, double = await front.people(2)
    # A user of both: else the merged record's user would get the kept one, and need another token.
    user(front, "PATIENT", patient_id=person.id)
    me = user(front, "PATIENT", patient_id=double.id)
    assert await outcome(seen(front, doctor.id, OWN, me)) == "APPOINTMENT_NOT_FOUND"
    booked = await front.book(double.id, doctor.id)
    assert await outcome(seen(front, doctor.id, OWN, me)) == "OK"
    assert await outcome(seen(front, doctor.id, OWN, me, tomorrows=True)) == "APPOINTMENT_NOT_FOUND"
    await front.patients.MergePatients(
        patient_pb2.MergePatientsRequest(keep_patient_id=person.id, merge_patient_id=double.id)
    )
    await front.check_in(booked.appointment.id)
    assert [entry.patient_id for entry in (await seen(front, doctor.id, OWN, me)).entries] == [person.id]
    await front.cancel(booked.appointment.id)
    assert await outcome(seen(front, doctor.id, OWN, me)) == "APPOINTMENT_NOT_FOUND"


async def test_streams_of_every_view(front: Front) -> None:
    """Each view's stream tells the same revisions, with its own entries in the queue and in the changes."""
    doctor = await front.doctor()
    person = await front.patient()
    booked = await front.book(person.id, doctor.id)
    streams = {
        STAFF: watch(front, doctor.id, STAFF),
        BOARD: watch(front, doctor.id, BOARD),
        OWN: watch(front, doctor.id, OWN, user(front, "PATIENT", patient_id=person.id)),
    }
    for stream in streams.values():
        assert (await read(stream)).revision == booked.revision
    known = booked.revision
    for step in (
        front.arrive(doctor.id),
        front.check_in(booked.appointment.id),
        front.call_next(doctor.id, "1"),
    ):
        last = (await step).revision
        told: dict[QueueView.ValueType, list[queue_pb2.QueueChange]] = {}
        for view, stream in streams.items():
            told[view] = []
            message = None
            while message is None or message.revision < last:
                message = await read(stream)
                told[view] += message.update.changes
                queue = message.update.queue
            assert [change.revision for change in told[view]] == [*range(known + 1, last + 1)]
            if view == STAFF:
                whole = queue
            else:
                assert queue == board(whole, person.id if view == OWN else "")
        for n, change in enumerate(told[STAFF]):
            for view in (BOARD, OWN):
                shown = told[view][n]
                assert (shown.kind, shown.change_time) == (change.kind, change.change_time)
                mine = view == OWN and change.entry.patient_id == person.id
                assert shown.appointment_id == (change.appointment_id if mine else "")
                if change.HasField("entry"):
                    assert bare(shown.entry) == bare(change.entry)
                    assert (shown.entry == change.entry) == mine
        known = last


async def test_a_resume_token_belongs_to_its_view(front: Front) -> None:
    """A stream that resumes with the token of another view begins afresh; with its own it goes on."""
    doctor = await front.doctor()
    first = await read(watch(front, doctor.id, BOARD))
    arrived = await front.arrive(doctor.id)
    for view in (STAFF, BOARD):
        message = await read(watch(front, doctor.id, view, resume=first.resume_token))
        assert message.revision == arrived.revision
        assert message.previous_revision == (first.revision if view == BOARD else 0)
        assert len(message.update.changes) == (arrived.revision - first.revision if view == BOARD else 0)


async def test_a_stream_of_ones_own_ends_with_the_appointment(front: Front) -> None:
    """A patient's stream survives a merge of the record, and ends when the appointment is cancelled."""
    doctor = await front.doctor()
    person, double = await front.people(2)
    # A user of both: else the merged record's user would get the kept one, and need another token.
    user(front, "PATIENT", patient_id=person.id)
    booked = await front.book(double.id, doctor.id)
    await front.check_in(booked.appointment.id)
    stream = watch(front, doctor.id, OWN, user(front, "PATIENT", patient_id=double.id))
    assert (await read(stream)).update.queue.entries[0].patient_id == double.id
    await front.patients.MergePatients(
        patient_pb2.MergePatientsRequest(keep_patient_id=person.id, merge_patient_id=double.id)
    )
    assert (await read(stream)).update.queue.entries[0].patient_id == person.id
    await front.cancel(booked.appointment.id)
    error = await refusal(read(stream))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert details(error)["ErrorInfo"].reason == "APPOINTMENT_NOT_FOUND"


async def test_a_patients_own_day(front: Front) -> None:
    """A patient checks in and leaves the queue for the own appointment, and for no other."""
    doctor = await front.doctor()
    mine, yours = [(await front.book(person.id, doctor.id)).appointment for person in await front.people(2)]
    me = user(front, "PATIENT", patient_id=mine.patient_id)
    for name in ("CheckIn", "LeaveQueue"):
        kind = getattr(queue_pb2, f"{name}Request")
        method = getattr(front.queues, name)
        assert await outcome(method(kind(appointment_id=mine.id), metadata=me)) == "OK"
        foreign = await refusal(method(kind(appointment_id=yours.id), metadata=me))
        unknown = await refusal(method(kind(appointment_id=UNKNOWN), metadata=me))
        assert foreign.code() is grpc.StatusCode.NOT_FOUND
        assert (foreign.code(), foreign.details()) == (unknown.code(), unknown.details())


async def test_the_client_watches_a_view(front: Front) -> None:
    """A watch of the Python client has the view that it asks for, also after it was interrupted."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    key = (await create_key(front, "BOARD")).key
    async with FrontdeskClient(f"127.0.0.1:{front.port}", api_key=key) as client:
        watch = client.watch_updates(doctor.id, view=BOARD)
        async with aclosing(watch) as updates, asyncio.timeout(SOON):
            first = await anext(updates)
            assert first.queue == await seen(front, doctor.id, BOARD)
        await front.arrive(doctor.id)
        watch = client.watch_updates(doctor.id, view=BOARD, resume_token=first.resume_token)
        async with aclosing(watch) as updates, asyncio.timeout(SOON):
            update = await anext(updates)
            assert update.previous_revision == first.queue.revision
            assert [change.entry.patient_name for change in update.changes] == [""] * len(update.changes)
        queues = client.watch_queue(doctor.id, view=BOARD)
        async with aclosing(queues) as lines, asyncio.timeout(SOON):
            assert await anext(lines) == await seen(front, doctor.id, BOARD)
