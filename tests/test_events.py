"""Events: the log of every change, as ListEvents and WatchEvents tell it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import timedelta
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import access_pb2, appointment_pb2, doctor_pb2, event_pb2, patient_pb2, queue_pb2
from frontdesk.core import event as events
from frontdesk.core.caller import OPERATOR, Identity
from frontdesk.core.event import TYPES, EventFilter, Events, Reach
from frontdesk.db.database import Database
from frontdesk.live import tail
from frontdesk.rpc import stream as streams
from frontdesk.settings import Settings
from tests.clinic import Clock, Front, day, outcome, reason_of, refusal, today
from tests.hostile.methods import path_of
from tests.hostile.wire import RawConnection, framed, serving
from tests.identities import ADMIN, access, bearing, create_key, user
from tests.test_audit import CHANGES
from tests.waiting import SOON, until

PREFIX = "clinic.frontdesk.v1."


@pytest.fixture
async def desk(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A client of a server that also works in the background."""
    async with serving(settings, conninfo, background="on") as (_, front):
        yield front


async def page(front: Front, **fields: Any) -> event_pb2.ListEventsResponse:
    """One page."""
    metadata = fields.pop("metadata", ())
    answer: event_pb2.ListEventsResponse = await front.events.ListEvents(
        event_pb2.ListEventsRequest(**fields), metadata=metadata
    )
    return answer


async def sealed(front: Front) -> None:
    """Wait until everything that was committed is sealed."""
    left = "select count(*) from log where id not in (select id from seal)"
    await until(lambda: front.sql(left) == [(0,)])


async def every(front: Front, **fields: Any) -> list[event_pb2.Event]:
    """Every event with this filter."""
    await sealed(front)
    found: list[event_pb2.Event] = []
    cursor = ""
    while True:
        answer = await page(front, **fields, cursor=cursor)
        found += answer.events
        fields.pop("from_start", None)
        if answer.cursor == cursor:
            return found
        cursor = answer.cursor


def types(events: Sequence[event_pb2.Event]) -> list[str]:
    """Their types, without what all have."""
    return [event.type.removeprefix(PREFIX) for event in events]


def watch(front: Front, metadata: Any = (), **fields: Any) -> Any:
    """A stream."""
    return front.events.WatchEvents(event_pb2.WatchEventsRequest(**fields), metadata=metadata)


async def read(stream: Any) -> event_pb2.WatchEventsResponse:
    """The next message."""
    async with asyncio.timeout(SOON):
        message = await stream.read()
    assert message is not grpc.aio.EOF
    found: event_pb2.WatchEventsResponse = message
    return found


async def next_event(stream: Any) -> event_pb2.Event:
    """The next event."""
    async with asyncio.timeout(SOON):
        while not (message := await read(stream)).HasField("event"):
            pass
    return message.event


async def test_a_visit(desk: Front) -> None:
    """Each change is one event with its ids, states and times, in the order of revisions, and a cursor of its own."""
    doctor, patient = await desk.doctor(), await desk.patient()
    booked = (await desk.book(patient.id, doctor.id)).appointment
    await desk.check_in(booked.id)
    await desk.call_next(doctor.id, room="Sala 1")
    found = await every(desk)
    assert types(found) == [
        "clinic.created", "doctor.created", "patient.registered", "appointment.booked", "queue.checked_in",
        "queue.called",
    ]  # fmt: skip
    assert [event.revision for event in found] == [0, 0, 0, 2, 3, 4]
    event = found[-1]
    assert (event.resource, event.appointment_id) == (f"appointments/{booked.id}", booked.id)
    assert (event.clinic_id, event.doctor_id, event.patient_id) == (doctor.clinic_id, doctor.id, patient.id)
    assert event.date == booked.date
    assert event.actor == "anonymous"
    assert {name: event.data[name] for name in ("state", "queue_state", "ticket", "call_count", "number")} == {
        "state": "CHECKED_IN", "queue_state": "CALLED", "ticket": "1", "call_count": "1", "number": "1",
    }  # fmt: skip
    assert "room" not in event.data
    ids = [str(row) for (row,) in desk.sql("select id from log where type is not null order by id")]
    assert sorted(event.id for event in found) == ids
    assert len({event.cursor for event in found}) == len(found)
    for number, event in enumerate(found):
        assert (await page(desk, cursor=event.cursor)).events[:] == found[number + 1 :]


async def test_a_stream(desk: Front) -> None:
    """A stream begins at once, with a heartbeat or an event, and tells what happens as it happens."""
    stream = watch(desk)
    first = await read(stream)
    assert first.HasField("heartbeat")
    doctor = await desk.doctor()
    assert types([await next_event(stream), await next_event(stream)]) == ["clinic.created", "doctor.created"]
    await desk.arrive(doctor.id)
    told = [await next_event(stream) for _ in range(3)]
    assert types(told) == ["patient.registered", "appointment.booked", "queue.checked_in"]
    everything = await every(desk)
    assert everything[2:] == told
    stream.cancel()
    for fields in ({"from_start": True}, {"cursor": first.heartbeat.cursor}):
        again = watch(desk, **fields)
        assert (await read(again)).event == everything[0]
        assert [await next_event(again) for _ in range(4)] == everything[1:]
        again.cancel()
    later = watch(desk, cursor=everything[2].cursor)
    assert [await next_event(later) for _ in range(2)] == everything[3:]
    later.cancel()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"page_size": -1}, "page_size"),
        ({"cursor": "x"}, "cursor"),
        ({"cursor": "A" * 32}, "cursor"),
        ({"types": ["appointment.booked"]}, "types"),
        ({"types": [PREFIX + "appointment.eaten"]}, "types"),
        ({"types": [PREFIX + "hold.placed"]}, "types"),
        ({"doctor_id": "x"}, "doctor_id"),
    ],
)
async def test_invalid_requests(front: Front, fields: dict[str, Any], field: str) -> None:
    """A cursor that is none, an unknown type and an id that is none are refused."""
    calls = [page(front, **fields)]
    if "page_size" not in fields:
        calls.append(watch(front, **fields).read())
    for call in calls:
        error = await refusal(call)
        assert reason_of(error) == "INVALID_FIELD"
        assert str(error.details()).startswith(field)


async def test_two_starts(front: Front) -> None:
    """A cursor and the start together are refused."""
    cursor = (await page(front)).cursor
    for call in (page(front, cursor=cursor, from_start=True), watch(front, cursor=cursor, from_start=True).read()):
        assert reason_of(await refusal(call)) == "INVALID_FIELD"


def test_the_types() -> None:
    """What the contract lists is what the methods write, but for what is of the audit alone; the rest comes later."""
    later = {one for one in TYPES if one.startswith(("registration.", "payment."))}
    assert len(later) == 6
    elsewhere = {"user.refresh_reused", "waitlist.offer_expired", "waitlist.expired"}
    written = {one for types in CHANGES.values() for one in types}
    audited = {one for one in written if one.startswith(("hold.", "notification.", "contact_preferences."))}
    assert written - audited | elsewhere == TYPES - later


async def test_later_types_are_known(desk: Front) -> None:
    """A reader may ask for what no service tells yet."""
    found = await every(desk, types=[PREFIX + "registration.failed", PREFIX + "payment.waived"])
    assert found == []


async def test_what_is_no_event(desk: Front) -> None:
    """A replay, a refusal, a dry run, a person who is found again, a hold and a reading are no events."""
    doctor, patient = await desk.doctor(), await desk.patient(given_name="Ana")
    booked = await desk.book(patient.id, doctor.id, idempotency_key="k")
    before = await every(desk)
    assert (await desk.book(patient.id, doctor.id, idempotency_key="k")).replayed
    assert (await desk.patient(given_name="Ana")).id == patient.id
    await refusal(desk.book(patient.id, doctor.id))
    other = await desk.patient()
    await desk.book(other.id, doctor.id, validate_only=True)
    held = await desk.hold(doctor.id)
    await desk.appointments.ReleaseHold(appointment_pb2.ReleaseHoldRequest(hold_id=held.id))
    await desk.appointment(booked.appointment.id)
    await until(lambda: desk.sql("select count(*) from log where method = 'GetAppointment'") == [(1,)])
    assert types((await every(desk))[len(before) :]) == ["patient.registered"]


async def test_moves_and_undone_steps(desk: Front) -> None:
    """A move between two days is two events, one of each; an undone check-in tells that the entry has left."""
    doctor, patient = await desk.doctor(), await desk.patient()
    booked = (await desk.book(patient.id, doctor.id, today() + timedelta(days=1))).appointment
    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
    await desk.appointments.RescheduleAppointment(
        appointment_pb2.RescheduleAppointmentRequest(appointment_id=booked.id, doctor_day=target)
    )
    arrived = await desk.check_in(booked.id)
    undo = appointment_pb2.UndoTransitionRequest(appointment_id=booked.id, etag=arrived.appointment.etag)
    await desk.appointments.UndoTransition(undo)
    found = await every(desk, patient_id=patient.id)
    assert types(found[:2] + found[4:]) == [
        "patient.registered", "appointment.booked", "queue.checked_in", "appointment.undone",
    ]  # fmt: skip
    # Both are of one transaction.
    assert {(kind, event.date.day, event.revision) for kind, event in zip(types(found), found, strict=True)} >= {
        ("appointment.moved_out", booked.date.day, 3), ("appointment.moved_in", today().day, 2),
    }  # fmt: skip
    assert [event.revision for event in found[4:]] == [3, 4]
    assert found[-1].data["queue_state"] == "LEFT"
    assert found[-1].data["state"] == "BOOKED"


async def test_times_and_ids_in_data(desk: Front) -> None:
    """`data` has a slot's times, an override, what a merge took in, and never a text that somebody has typed."""
    doctor = await desk.doctor(max_patients_per_day=1)
    first, second = await desk.people(2)
    await desk.book(first.id, doctor.id)
    await desk.queues.AddWalkIn(
        queue_pb2.AddWalkInRequest(
            doctor_id=doctor.id, patient_id=second.id, reason="typed", override_reason="typed too"
        )
    )
    merge = patient_pb2.MergePatientsRequest(
        keep_patient_id=first.id, merge_patient_id=(await desk.patient(given_name="Typed")).id
    )
    await desk.patients.MergePatients(merge)
    changed = patient_pb2.Patient(id=first.id, email="typed@example.com")
    await desk.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))
    found = await every(desk)
    assert "typed" not in str(found).lower()
    by_type = {event.type.removeprefix(PREFIX): event for event in found}
    assert by_type["patient.merged"].patient_id == first.id
    assert by_type["patient.merged"].data["merged_patient_id"] == merge.merge_patient_id
    assert by_type["patient.updated"].data == {"fields": "email"}
    assert [event.data.get("over_capacity") for event in found if event.type.endswith(".booked")] == [None, "true"]


async def _two_clinics(desk: Front) -> tuple[doctor_pb2.Doctor, doctor_pb2.Doctor, list[str]]:
    """Events of two clinics and three patients, of whom two are merged in the end."""
    here, there = await desk.doctor(), await desk.doctor()
    people = [person.id for person in await desk.people(3)]
    for doctor in (here, there):
        for person in people:
            await desk.book(person, doctor.id)
    await create_key(desk, "STAFF")
    merge = patient_pb2.MergePatientsRequest(keep_patient_id=people[0], merge_patient_id=people[2])
    found = await outcome(desk.patients.MergePatients(merge))
    assert found == "DUPLICATE_BOOKING"
    listed = await desk.appointments.ListAppointments(appointment_pb2.ListAppointmentsRequest(patient_id=people[2]))
    for visit in listed.appointments:
        await desk.cancel(visit.id)
    await desk.patients.MergePatients(merge)
    await desk.patients.UpdatePatient(
        patient_pb2.UpdatePatientRequest(patient=patient_pb2.Patient(id=people[0], email="a@example.com"))
    )
    return here, there, people


async def test_filters(desk: Front) -> None:
    """Each filter passes what concerns its clinic, doctor, patient or types; all together pass what passes each.

    Pages decide that in SQL, and streams by themselves: both alike.
    """
    stream = watch(desk, metadata=ADMIN)
    await read(stream)
    here, there, people = await _two_clinics(desk)
    everything = await every(desk, metadata=ADMIN)
    live = [await next_event(stream) for _ in everything]
    stream.cancel()
    assert live == everything
    booked, made = PREFIX + "appointment.booked", PREFIX + "api_key.created"
    of_two = (people[0], people[2])
    wanted: list[tuple[dict[str, Any], Callable[[event_pb2.Event], bool]]] = [
        ({"clinic_id": here.clinic_id}, lambda event: event.clinic_id == here.clinic_id),
        ({"doctor_id": there.id}, lambda event: event.doctor_id == there.id),
        ({"patient_id": people[1]}, lambda event: event.patient_id == people[1]),
        ({"patient_id": people[0]}, lambda event: event.patient_id in of_two),
        ({"patient_id": people[2]}, lambda event: event.patient_id in of_two),
        ({"types": [booked, made]}, lambda event: event.type in (booked, made)),
        (
            {"types": [booked], "clinic_id": here.clinic_id, "doctor_id": here.id, "patient_id": people[1]},
            lambda event: (event.type, event.doctor_id, event.patient_id) == (booked, here.id, people[1]),
        ),
        ({"clinic_id": here.clinic_id, "doctor_id": there.id}, lambda event: False),
        ({"doctor_id": here.clinic_id}, lambda event: False),
        ({"patient_id": here.id}, lambda event: False),
    ]
    db = Database(desk.conninfo, pool_size=1)
    await db.open()
    log = Events(db, keep_seconds=1e6)
    rows = (await log.read(await log.start(), Reach(True, None, None, None, None, None), 1_000)).events
    assert [row.id for row in rows] == [event.id for event in everything]
    for fields, passes in wanted:
        expected = [event for event in everything if passes(event)]
        assert await every(desk, metadata=ADMIN, **fields) == expected, fields
        again = watch(desk, metadata=ADMIN, from_start=True, **fields)
        assert [await next_event(again) for _ in expected] == expected, fields
        again.cancel()
        asked = EventFilter(
            fields.get("types") and [one.removeprefix(PREFIX) for one in fields["types"]],
            *(fields.get(name) for name in ("clinic_id", "doctor_id", "patient_id")),
        )
        reach = await log.reach(Identity("keys/1", frozenset({"ADMIN"})), OPERATOR, asked)
        assert [row.id for row in rows if reach.passes(row)] == [event.id for event in expected], fields
    await db.close()


async def test_whose_events(desk: Front, settings: Settings, conninfo: str) -> None:
    """A caller of some clinics sees theirs and what is of no clinic; users and keys only administrators of all."""
    stream = watch(desk)
    await read(stream)
    here, there, _ = await _two_clinics(desk)
    everything = await every(desk, metadata=ADMIN)
    secret = [event for event in everything if "api_key" in event.type]
    assert len(secret) == 1
    public = [event for event in everything if event not in secret]
    here_only = [event for event in public if event.clinic_id in ("", here.clinic_id)]
    assert types(here_only).count("patient.registered") == 3
    assert len(here_only) < len(public)
    # Made before the comparison: each key is an event.
    keys = {
        name: bearing((await create_key(desk, role, clinic_ids=clinics)).key)
        for name, role, clinics in (
            ("staff", "STAFF", [here.clinic_id]), ("admin", "ADMIN", [here.clinic_id]),
            ("service", "SERVICE", [here.clinic_id]), ("all", "SERVICE", []),
        )
    }  # fmt: skip
    expected = {"staff": here_only, "admin": here_only, "service": here_only, "all": public}
    ids = {event.id for event in everything}
    for name, key in keys.items():
        assert [event for event in await every(desk, metadata=key) if event.id in ids] == expected[name], name
        again = watch(desk, metadata=key, from_start=True)
        assert [await next_event(again) for _ in expected[name]] == expected[name], name
        again.cancel()
        asked = {"types": [PREFIX + "api_key.created"], "metadata": key}
        for call in (page(desk, **asked), watch(desk, **asked).read()):
            assert await outcome(call) == "ROLE_REQUIRED"
        if name != "all":
            for fields in ({"clinic_id": there.clinic_id}, {"doctor_id": there.id}):
                for call in (page(desk, metadata=key, **fields), watch(desk, metadata=key, **fields).read()):
                    assert await outcome(call) == "CLINIC_NOT_YOURS"
            assert [event.doctor_id for event in await every(desk, metadata=key, doctor_id=here.id)]
    # Without credentials, where none are needed: the same as with a service's.
    assert [event for event in await every(desk) if event.id in ids] == public
    assert [await next_event(stream) for _ in public] == public
    assert await outcome(page(desk, types=[PREFIX + "user.created"])) == "CREDENTIALS_REQUIRED"
    stream.cancel()


async def test_a_merge_on_the_way(desk: Front) -> None:
    """From the merge on, who follows one of the records is told of the other."""
    doctor = await desk.doctor()
    kept, merged = [person.id for person in await desk.people(2)]
    following = [watch(desk, patient_id=one) for one in (kept, merged)]
    for stream in following:
        await read(stream)
    await desk.patients.MergePatients(patient_pb2.MergePatientsRequest(keep_patient_id=kept, merge_patient_id=merged))
    await desk.book(kept, doctor.id)
    for stream in following:
        assert types([await next_event(stream) for _ in range(2)]) == ["patient.merged", "appointment.booked"]
        stream.cancel()


async def test_pages(desk: Front) -> None:
    """Pages of any size go on from one another, over all replicas; the last cursor waits for what comes."""
    doctor = await desk.doctor()
    await asyncio.gather(*(desk.arrive(doctor.id) for _ in range(4)))
    everything = await every(desk)
    assert len(everything) == 14
    for size in (1, 3, 14, 15):
        assert await every(desk, page_size=size) == everything
    assert await every(desk, from_start=True) == everything
    end = await page(desk)
    assert end.events[-1].cursor == end.cursor or end.cursor
    again = await page(desk, cursor=end.cursor)
    assert (list(again.events), again.cursor) == ([], end.cursor)
    await desk.clinic()
    await sealed(desk)
    assert types((await page(desk, cursor=end.cursor)).events) == ["clinic.created"]


async def test_the_size_of_pages(desk: Front) -> None:
    """A page has 50 events unless another size is asked for, and at most 1,000."""
    desk.sql(
        "insert into log (id, time, actor, method, type, resource)"
        " select log_id(moment()), moment(), 'system', 'Test', 'clinic.updated', 'clinics/1'"
        " from generate_series(1, 1100)"
    )
    await sealed(desk)
    assert [len((await page(desk, page_size=size)).events) for size in (0, 1, 100, 1_000, 2_000)] == [
        50, 1, 100, 1_000, 1_000,
    ]  # fmt: skip


async def test_a_rare_filter(desk: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call looks at a bounded stretch: it may answer few events, or none, and always a cursor that goes on."""
    monkeypatch.setattr(events, "SCANNED", 5)
    monkeypatch.setattr(events, "AT_ONCE", 2)
    doctor = await desk.doctor()
    await asyncio.gather(*(desk.arrive(doctor.id) for _ in range(4)))
    await desk.clinic(city="Lima")
    await sealed(desk)
    cursor = ""
    answers: list[event_pb2.ListEventsResponse] = []
    while not answers or answers[-1].cursor != cursor:
        cursor = answers[-1].cursor if answers else ""
        answers.append(await page(desk, types=[PREFIX + "clinic.created"], cursor=cursor))
    assert [len(answer.events) for answer in answers] == [1, 0, 1, 0]


async def test_heartbeats_move_on(desk: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat comes after the silence asked for, with the cursor of what has passed that the filter left out."""
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", (0.2, 60.0))
    doctor = await desk.doctor()
    request = event_pb2.WatchEventsRequest(doctor_id=doctor.id)
    request.heartbeat_interval.FromMilliseconds(1)
    stream = desk.events.WatchEvents(request)
    first = (await read(stream)).heartbeat.cursor
    await desk.clinic()
    await sealed(desk)
    end = (await page(desk)).cursor
    assert end != first
    async with asyncio.timeout(SOON):
        while (await read(stream)).heartbeat.cursor != end:
            pass
    await desk.arrive(doctor.id)
    assert types([await next_event(stream) for _ in range(2)]) == ["appointment.booked", "queue.checked_in"]
    stream.cancel()


@pytest.mark.parametrize("batch", [0, 1, 3, 500])
async def test_batches(desk: Front, batch: int) -> None:
    """With a batch size, events that are at hand come together, in the same order."""
    doctor = await desk.doctor()
    await asyncio.gather(*(desk.arrive(doctor.id) for _ in range(4)))
    everything = await every(desk)
    stream = watch(desk, from_start=True, batch_size=batch)
    found: list[event_pb2.Event] = []
    while len(found) < len(everything):
        message = await read(stream)
        assert message.HasField("batch") == (batch > 1)
        assert len(message.batch.events) <= batch
        found += message.batch.events if batch > 1 else [message.event]
    assert found == everything
    stream.cancel()
    assert await outcome(watch(desk, batch_size=-1).read()) == "INVALID_FIELD"


async def test_readers_that_are_behind(desk: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers with any filter and any pace, behind and abreast, are told each event once, in one order."""
    monkeypatch.setattr(tail, "_KEPT", 6)
    monkeypatch.setattr(tail, "AT_ONCE", 4)
    doctors = [await desk.doctor(max_patients_per_day=30) for _ in range(3)]
    streams_of = {doctor.id: watch(desk, doctor_id=doctor.id, batch_size=2) for doctor in doctors}
    for stream in streams_of.values():
        await read(stream)
    await sealed(desk)
    slow = watch(desk, from_start=True)
    await next_event(slow)
    told: dict[str, list[str]] = {doctor.id: [] for doctor in doctors}

    async def follow(doctor_id: str, count: int) -> None:
        while len(told[doctor_id]) < count:
            message = await read(streams_of[doctor_id])
            told[doctor_id] += [
                event.id for event in ([message.event] if message.HasField("event") else message.batch.events)
            ]

    async with asyncio.TaskGroup() as group:
        for number, doctor in enumerate(doctors):
            group.create_task(follow(doctor.id, 16 * (number + 1)))
            for _ in range(8 * (number + 1)):
                group.create_task(desk.arrive(doctor.id))
    everything = await every(desk)
    for doctor in doctors:
        mine = [event for event in everything if event.doctor_id == doctor.id][1:]
        assert told[doctor.id] == [event.id for event in mine]
        assert [event.revision for event in mine] == [*range(2, 2 + len(mine))]
    assert [(await next_event(slow)).id for _ in everything[1:]] == [event.id for event in everything[1:]]
    for stream in (slow, *streams_of.values()):
        stream.cancel()


async def test_a_cursor_too_old(desk: Front, at: Clock) -> None:
    """Events older than the setting are not shown: the start is the oldest kept, and who comes back later is told."""
    await desk.clinic()
    await sealed(desk)
    start = (await page(desk, page_size=1)).events[0]
    await desk.clinic()
    await sealed(desk)
    last = (await page(desk)).cursor
    ((later,),) = desk.sql("select (now() + interval '91 days')::text")
    async with at(later) as future:
        assert await outcome(page(future, cursor=start.cursor)) == "CURSOR_TOO_OLD"
        error = await refusal(watch(future, cursor=start.cursor).read())
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_TOO_OLD")
        # Nothing has come after these.
        assert list((await page(future, cursor=last)).events) == []
        assert list((await page(future)).events) == []
        await future.clinic()
        await sealed(desk)
        for answer in (await page(future), await page(future, from_start=True), await page(future, cursor=last)):
            assert types(answer.events) == ["clinic.created"]
        begun = watch(future, from_start=True)
        assert await next_event(begun) == answer.events[0]
        begun.cancel()


async def test_after_retention(desk: Front) -> None:
    """A cursor of rows that retention has deleted is too old; the start is what is left."""
    for _ in range(3):
        await desk.clinic()
    await sealed(desk)
    found = list((await page(desk)).events)
    desk.sql("delete from log where id in (select id from seal where position <= 2)")
    desk.sql("delete from seal where position < 2")
    assert await outcome(page(desk, cursor=found[0].cursor)) == "CURSOR_TOO_OLD"
    # The seal of the last deleted row is kept.
    for fields in ({}, {"cursor": found[1].cursor}, {"from_start": True}):
        assert list((await page(desk, **fields)).events) == found[2:]


async def test_limits(conninfo: str, settings: Settings) -> None:
    """Streams of events and of queues count together."""
    async with serving(settings, conninfo, max_watchers=2) as (_, front):
        doctor = await front.doctor()
        queue: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
        await queue.read()
        stream = watch(front)
        await read(stream)
        error = await refusal(watch(front).read())
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        other: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
        assert await outcome(other.read()) == "TOO_MANY_WATCHERS"
        stream.cancel()
        async with asyncio.timeout(SOON):
            while await outcome(watch(front).read()) != "OK":
                pass
        queue.cancel()


async def test_limits_of_a_caller(conninfo: str, settings: Settings) -> None:
    """A caller may have so many streams, of events and of queues together."""
    async with serving(settings, conninfo, max_watchers_per_caller=1) as (_, front):
        keys = [bearing((await create_key(front, "SERVICE")).key) for _ in range(2)]
        stream = watch(front, metadata=keys[0])
        await read(stream)
        assert await outcome(watch(front, metadata=keys[0]).read()) == "TOO_MANY_WATCHERS"
        other = watch(front, metadata=keys[1])
        await read(other)
        for one in (stream, other):
            one.cancel()


async def test_planned_ends(conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends by its age, before its credentials do, and when the server stops: with a message, and OK."""
    closing = queue_pb2.StreamClosing
    async with serving(settings, conninfo) as (worker, front):
        me = user(front, "STAFF", seconds=3)
        expiring = watch(front, metadata=me)
        draining = watch(front)
        for stream in (expiring, draining):
            await read(stream)
        monkeypatch.setattr(streams, "MAX_AGE_SECONDS", (0.1, 0.2))
        aged = watch(front)
        for stream, reason in ((aged, closing.REASON_MAX_AGE), (expiring, closing.REASON_AUTH_EXPIRING)):
            while not (message := await read(stream)).HasField("closing"):
                assert message.HasField("heartbeat")
            assert message.closing.reason == reason
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() is grpc.StatusCode.OK
        stopping = asyncio.create_task(worker.stop())
        while not (message := await read(draining)).HasField("closing"):
            pass
        assert message.closing.reason == closing.REASON_DRAINING
        assert message.closing.HasField("reconnect_delay")
        assert await draining.code() is grpc.StatusCode.OK
        await stopping


async def test_a_right_that_is_lost(desk: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends soon after its key was revoked, with the refusal of a new call."""
    monkeypatch.setattr(streams, "JUDGE_SECONDS", 0.3)
    made = await create_key(desk, "STAFF")
    stream = watch(desk, metadata=bearing(made.key))
    await read(stream)
    request = access_pb2.RevokeApiKeyRequest(api_key_id=made.api_key.id)
    await access(desk).RevokeApiKey(request, metadata=ADMIN)

    async def to_the_end() -> None:
        while True:
            await read(stream)

    error = await refusal(to_the_end())
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")


async def test_a_reader_too_slow(conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who leaves a message unread too long loses its stream."""
    monkeypatch.setattr(streams, "WRITE_SECONDS", 0.5)
    async with (
        serving(settings, conninfo, background="on", max_watchers=1) as (worker, front),
        RawConnection(front.port, reads=False) as wire,
    ):
        front.sql(
            "insert into log (id, time, actor, method, type, resource)"
            " select log_id(moment()), moment(), 'system', 'Test', 'clinic.updated', 'clinics/' || repeat('x', 100)"
            " from generate_series(1, 2000)"
        )
        await sealed(front)
        stream = await wire.open(path_of("WatchEvents"))
        await wire.send(stream, framed(event_pb2.WatchEventsRequest(from_start=True)), end=True)
        # Its place is free before it reads again.
        await until(lambda: len(worker._watchers) == 1)
        await until(lambda: len(worker._watchers) == 0)
        await wire.read()
        assert await wire.status(stream) == "8"
