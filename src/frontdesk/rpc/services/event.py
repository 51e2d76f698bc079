"""clinic.frontdesk.v1.EventService."""

import asyncio
import time
from collections.abc import Collection, Sequence
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import event_pb2 as pb
from clinic.frontdesk.v1.queue_pb2 import StreamClosing
from frontdesk.core.event import Cursor, Event, EventFilter, Events, Reach
from frontdesk.errors import InvalidField
from frontdesk.live.tail import SLICE, Tail
from frontdesk.live.watcher import Watchers
from frontdesk.rpc import stream
from frontdesk.rpc.convert import DEFAULT_PAGE, date_to, id_or_none
from frontdesk.rpc.pipeline import Call

MOST_PAGE = 1_000
"""A page of so many events is some 600 kB, well below what clients take by default."""

MOST_BATCH = 500

PREFIX = "clinic.frontdesk.v1."
"""Of every type on the wire."""


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@lru_cache(1_000)
def _date_to(day: date) -> Date:
    return date_to(day)


def to_event(event: Event) -> pb.Event:
    """The message of an event."""
    since = event.time - _EPOCH
    # Protobuf takes None for what is not there, as the types do not say.
    message: Any = pb.Event
    found: pb.Event = message(
        id=event.id,
        cursor=event.cursor.encode(),
        type=PREFIX + event.type,
        time=Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1_000),
        actor=event.actor,
        resource=event.resource,
        clinic_id=event.clinic_id,
        doctor_id=event.doctor_id,
        patient_id=event.patient_id,
        appointment_id=event.appointment_id,
        slot_id=event.slot_id,
        date=None if event.date is None else _date_to(event.date),
        revision=event.revision,
        data=event.texts,
    )
    return found


def _part(number: int, content: bytes) -> bytes:
    """A field with a message of this content, as protobuf writes it."""
    found = bytearray([number << 3 | 2])
    size = len(content)
    while size > 127:
        found.append(size & 127 | 128)
        size >>= 7
    found.append(size)
    return bytes(found + content)


_EVENT, _BATCH = pb.WatchEventsResponse.EVENT_FIELD_NUMBER, pb.WatchEventsResponse.BATCH_FIELD_NUMBER
# So the same bytes are a message of the stream, an element of a batch and one of a page.
assert pb.EventBatch.EVENTS_FIELD_NUMBER == pb.ListEventsResponse.EVENTS_FIELD_NUMBER == _EVENT


def message_of(event: Event) -> bytes:
    """The event as a message of a stream."""
    return _part(_EVENT, to_event(event).SerializeToString())


def batch_of(messages: Sequence[bytes]) -> bytes:
    """Several events as one message of a stream."""
    return _part(_BATCH, b"".join(messages))


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
        found = await self._events.list(given or await self._events.start(), reach, size, resumes=given is not None)
        answer = pb.ListEventsResponse(cursor=found.end.encode())
        for first in range(0, len(found.events), SLICE):
            if first:
                await asyncio.sleep(0)
            answer.events.extend(map(to_event, found.events[first : first + SLICE]))
        return answer

    async def WatchEvents(self, request: pb.WatchEventsRequest, call: Call) -> None:
        self._watchers.require_room(call.identity)
        reach, place = await self._reach(request, call), _cursor(request)
        heartbeat = stream.heartbeat_seconds(request)
        ends, reason = stream.end_of(call.identity)
        batch = min(max(request.batch_size, 1), MOST_BATCH)
        resumes = place is not None
        before: Collection[str] = ()
        if place is None and request.from_start:
            place = await self._events.start()
        elif place is None:
            place, before = await self._events.from_now()
        # Others may have come during the round trips.
        self._watchers.require_room(call.identity)
        with (
            self._tail.reader(place, reach, resumes=resumes, without=before) as reader,
            self._watchers.counting(reader, call.identity.name),
        ):
            silent_until = 0.0
            while not self._watchers.draining and (now := time.monotonic()) < ends:
                looks = min(ends, now + stream.JUDGE_SECONDS)
                if await call.judged_anew():
                    reader.reach = await self._reach(request, call)
                sent = reader.place
                told = await reader.read()
                for first in range(0, len(told), batch):
                    if self._watchers.draining or time.monotonic() >= looks:
                        reader.back_to(sent)
                        break
                    several = told[first : first + batch]
                    await stream.write(
                        call, several[0].message if batch == 1 else batch_of([one.message for one in several])
                    )
                    sent = several[-1].event.cursor
                now = time.monotonic()
                if not told and silent_until <= now:
                    await stream.write(call, _heartbeat(reader.place))
                if told or silent_until <= now:
                    silent_until = now + heartbeat
                await reader.news(min(silent_until, looks) - now)
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
