"""Events: the log of every change, as ListEvents and WatchEvents tell it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import event_pb2
from frontdesk.settings import Settings
from tests.clinic import Front, reason_of, refusal
from tests.hostile.wire import serving
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
        answer = await page(front, **{**fields, **({"cursor": cursor} if cursor else {})})
        found += answer.events
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
