"""clinic.frontdesk.v1.EventService."""

import time
from typing import Any

from clinic.frontdesk.v1 import event_pb2 as pb
from clinic.frontdesk.v1.queue_pb2 import StreamClosing
from frontdesk.core.event import Cursor, Event, EventFilter, Events, Reach
from frontdesk.errors import InvalidField
from frontdesk.live.tail import Tail
from frontdesk.live.watcher import Watchers
from frontdesk.rpc import stream
from frontdesk.rpc.convert import DEFAULT_PAGE, date_to, id_or_none
from frontdesk.rpc.pipeline import Call

MOST_PAGE = 1_000
"""A page of so many events is some 600 kB, well below what clients take by default."""

PREFIX = "clinic.frontdesk.v1."
"""Of every type on the wire."""


def to_event(event: Event) -> pb.Event:
    """The message of an event."""
    # Protobuf takes an instant, and None for what is not there, as the types do not say.
    message: Any = pb.Event
    found: pb.Event = message(
        id=event.id,
        cursor=event.cursor.encode(),
        type=PREFIX + event.type,
        time=event.time,
        actor=event.actor,
        resource=event.resource,
        clinic_id=event.clinic_id,
        doctor_id=event.doctor_id,
        patient_id=event.patient_id,
        appointment_id=event.appointment_id,
        slot_id=event.slot_id,
        date=None if event.date is None else date_to(event.date),
        revision=event.revision,
        data=event.texts,
    )
    return found


def message_of(event: Event) -> bytes:
    """The event as a message of a stream."""
    return pb.WatchEventsResponse(event=to_event(event)).SerializeToString()


class EventServicer:
    """Translates; `Events` and `Tail` decide."""

    service = pb.DESCRIPTOR.services_by_name["EventService"]

    def __init__(self, events: Events, tail: Tail, watchers: Watchers) -> None:
        self._events = events
        self._tail = tail
        self._watchers = watchers

    async def ListEvents(self, request: pb.ListEventsRequest, call: Call) -> pb.ListEventsResponse:
        reach, given = await self._reach(request, call), _cursor(request)
        size = min(request.page_size or DEFAULT_PAGE, MOST_PAGE)
        found = await self._events.read(given or await self._events.start(), reach, size, resumes=given is not None)
        return pb.ListEventsResponse(events=map(to_event, found.events), cursor=found.end.encode())

    async def WatchEvents(self, request: pb.WatchEventsRequest, call: Call) -> None:
        self._watchers.require_room(call.identity)
        reach, place = await self._reach(request, call), _cursor(request)
        heartbeat = stream.heartbeat_seconds(request)
        ends, reason = stream.end_of(call.identity)
        resumes = place is not None
        if place is None:
            place = await (self._events.start() if request.from_start else self._events.now())
        # Others may have come during the round trips.
        self._watchers.require_room(call.identity)
        with (
            self._tail.reader(place, reach, resumes=resumes) as reader,
            self._watchers.counting(reader, call.identity.name),
        ):
            silent_until = 0.0
            while not self._watchers.draining and (now := time.monotonic()) < ends:
                looks = min(ends, now + stream.JUDGE_SECONDS)
                if await call.judged_anew():
                    reader.reach = await self._reach(request, call)
                sent = reader.place
                told = None
                for told in await reader.read():
                    if self._watchers.draining or time.monotonic() >= looks:
                        reader.back_to(sent)
                        break
                    await stream.write(call, told.message)
                    sent = told.event.cursor
                if told is None and silent_until <= time.monotonic():
                    await stream.write(call, _heartbeat(reader.place))
                    silent_until = time.monotonic() + heartbeat
                elif told is not None:
                    silent_until = time.monotonic() + heartbeat
                await reader.news(min(silent_until, looks) - time.monotonic())
            closing = stream.closing(StreamClosing.REASON_DRAINING if self._watchers.draining else reason)
            await stream.write(call, pb.WatchEventsResponse(closing=closing).SerializeToString())

    async def _reach(self, request: Any, call: Call) -> Reach:
        types = None
        if request.types:
            # A type without the prefix is none.
            types = [one.removeprefix(PREFIX) if one.startswith(PREFIX) else "" for one in request.types]
        wanted = EventFilter(
            types, id_or_none(request.clinic_id), id_or_none(request.doctor_id), id_or_none(request.patient_id)
        )
        return await self._events.reach(call.identity, call.caller, wanted)


def _cursor(request: Any) -> Cursor | None:
    if not request.cursor:
        return None
    if request.from_start:
        raise InvalidField(("from_start", "goes not together with a cursor"))
    return Cursor.decode(request.cursor)


def _heartbeat(place: Cursor) -> bytes:
    return pb.WatchEventsResponse(heartbeat=pb.EventHeartbeat(cursor=place.encode())).SerializeToString()
