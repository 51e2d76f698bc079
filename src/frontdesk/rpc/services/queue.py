"""clinic.frontdesk.v1.QueueService."""

import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from google.protobuf import duration_pb2

from clinic.frontdesk.v1 import queue_pb2 as pb
from frontdesk.core.appointment import Appointment
from frontdesk.core.caller import Identity
from frontdesk.core.estimate import Estimate
from frontdesk.core.queue import BOARD, OWN, STAFF, Queue, QueueChange, QueueEntry, Queues, entry_of
from frontdesk.db.change import Change
from frontdesk.errors import InvalidField, TooManyWatchers, WatcherTooSlow
from frontdesk.live.feed import Feed
from frontdesk.live.subscription import Subscription
from frontdesk.live.tokens import ResumeToken
from frontdesk.rpc.convert import converter, date_from, enum_numbers, key_of
from frontdesk.rpc.pipeline import Call
from frontdesk.rpc.services.appointment import saw, to_appointment
from frontdesk.tasks import Timeout

MAX_AGE_SECONDS = (20 * 60, 30 * 60)
"""A stream ends at a random age between these, so that streams which began together do not end together."""

DRAIN_SPREAD_SECONDS = 5.0
"""Watchers of a server that stops come back at random within so long."""

AUTH_NOTICE_SECONDS = 30.0
"""How long before its credentials expire a stream is closed; or a third of their life, if that is less."""

JUDGE_SECONDS = 10.0
"""A stream notices within so long that something about its caller's credentials has changed."""

NOTE_SECONDS = 60.0
"""Seconds between two rows of the log about patients who came to a queue while a stream showed it: many streams that
show many patients are to write few."""

WRITE_SECONDS = 30.0
"""How long a watcher may leave a message unread once gRPC takes no more for it."""

HEARTBEAT_SECONDS = (5.0, 60.0)
DEFAULT_HEARTBEAT_SECONDS = 15.0

R = TypeVar("R")

_to_estimate = converter(pb.Estimate, Estimate)


def _estimate(estimate: Estimate | None) -> pb.Estimate | None:
    return None if estimate is None else _to_estimate(estimate)


to_entry = converter(pb.QueueEntry, QueueEntry, estimate=lambda entry: _estimate(entry.estimate))
to_queue = converter(
    pb.Queue,
    Queue,
    entries=lambda queue: map(to_entry, queue.entries),
    next_estimate=lambda queue: _estimate(queue.next_estimate),
    waiting_count=lambda queue: sum(entry.state == "WAITING" for entry in queue.entries),
)
_VIEWS = {
    pb.QUEUE_VIEW_UNSPECIFIED: STAFF,
    pb.QUEUE_VIEW_STAFF: STAFF,
    pb.QUEUE_VIEW_BOARD: BOARD,
    pb.QUEUE_VIEW_OWN: OWN,
}
_PRIORITIES = {number: name for name, number in enum_numbers(pb.Priority.DESCRIPTOR).items()}
_KINDS: dict[str, Any] = enum_numbers(pb.QueueChange.Kind.DESCRIPTOR)


class Updates:
    """Serialises updates for the wire, each once for all its watchers."""

    def changes(self, changes: Sequence[QueueChange]) -> bytes:
        """A part of an update's changes."""
        return pb.QueueUpdate(changes=map(_to_change, changes)).SerializeToString()

    def update(self, queue: Queue, changes: Sequence[bytes], previous: int, token: str) -> bytes:
        """The update with these parts of its changes."""
        message = pb.WatchQueueResponse(
            revision=queue.revision,
            previous_revision=previous,
            resume_token=token,
            update=pb.QueueUpdate(queue=to_queue(queue)),
        )
        for part in changes:
            message.update.MergeFromString(part)
        message.server_time.GetCurrentTime()
        return message.SerializeToString()

    def heartbeat(self, queue: Queue) -> bytes:
        """The estimates of those who wait."""
        message = pb.Heartbeat(next_estimate=_estimate(queue.next_estimate))
        for entry in queue.entries:
            if entry.state == "WAITING":
                message.estimates.add(ticket=entry.ticket, estimate=_estimate(entry.estimate))
        return message.SerializeToString()


def _to_change(change: QueueChange) -> pb.QueueChange:
    message = pb.QueueChange(
        revision=change.revision,
        kind=_KINDS[change.kind],
        appointment_id=change.appointment_id,
        entry=None if change.entry is None else to_entry(change.entry),
    )
    message.change_time.FromMicroseconds(change.change_micros)
    return message


class QueueServicer:
    """Translates; `Queues` and `Feed` decide."""

    service = pb.DESCRIPTOR.services_by_name["QueueService"]

    def __init__(self, queues: Queues, feed: Feed, *, max_watchers: int, max_watchers_per_caller: int) -> None:
        self._queues = queues
        self._feed = feed
        self._max_watchers = max_watchers
        self._max_watchers_per_caller = max_watchers_per_caller

    async def CheckIn(self, request: pb.CheckInRequest, call: Call) -> pb.CheckInResponse:
        return await self._change(
            request, call, pb.CheckInResponse, patient_id=request.patient_id or None, priority=_priority(request)
        )

    async def AddWalkIn(self, request: pb.AddWalkInRequest, call: Call) -> pb.AddWalkInResponse:
        change = await self._queues.add_walk_in(
            call.caller, request.doctor_id, request.patient_id, _priority(request), request.reason,
            request.override_reason, key=key_of(request, call),
        )  # fmt: skip
        return _answer(change, call, pb.AddWalkInResponse)

    async def TransferPatient(self, request: pb.TransferPatientRequest, call: Call) -> pb.TransferPatientResponse:
        change = await self._queues.transfer(
            call.caller, request.appointment_id, request.to_doctor_id, request.override_reason,
            key=key_of(request, call),
        )  # fmt: skip
        return _answer(change, call, pb.TransferPatientResponse, vacated_revision=change.vacated_revision)

    async def SetPriority(self, request: pb.SetPriorityRequest, call: Call) -> pb.SetPriorityResponse:
        return await self._change(request, call, pb.SetPriorityResponse, priority=_priority(request))

    async def GetQueue(self, request: pb.GetQueueRequest, call: Call) -> pb.GetQueueResponse:
        view = _VIEWS[request.view]
        found = await self._queues.get(call.caller, request.doctor_id, date_from(request, "date"), view)
        if view == STAFF and found.entries:
            _saw(call, found, [entry.patient_id for entry in found.entries])
        return pb.GetQueueResponse(queue=to_queue(found))

    async def CallNext(self, request: pb.CallNextRequest, call: Call) -> pb.CallNextResponse:
        change = await self._queues.call_next(
            call.caller, request.doctor_id, date_from(request, "date"), request.room, key=key_of(request, call)
        )
        if change.replayed:
            saw(call, change.result)
        return pb.CallNextResponse(
            entry=to_entry(entry_of(change.result)), revision=change.revision, replayed=change.replayed
        )

    async def CallAgain(self, request: pb.CallAgainRequest, call: Call) -> pb.CallAgainResponse:
        return await self._change(request, call, pb.CallAgainResponse, room=request.room)

    async def ReturnToLine(self, request: pb.ReturnToLineRequest, call: Call) -> pb.ReturnToLineResponse:
        return await self._change(request, call, pb.ReturnToLineResponse)

    async def ParkPatient(self, request: pb.ParkPatientRequest, call: Call) -> pb.ParkPatientResponse:
        return await self._change(request, call, pb.ParkPatientResponse)

    async def MarkMissed(self, request: pb.MarkMissedRequest, call: Call) -> pb.MarkMissedResponse:
        return await self._change(request, call, pb.MarkMissedResponse)

    async def LeaveQueue(self, request: pb.LeaveQueueRequest, call: Call) -> pb.LeaveQueueResponse:
        return await self._change(request, call, pb.LeaveQueueResponse)

    async def _change(self, request: Any, call: Call, response: Callable[..., R], **more: Any) -> R:
        change = await self._queues.change(call.caller, request.appointment_id, **more, key=key_of(request, call))
        return _answer(change, call, response)

    def _require_room(self, call: Call) -> None:
        if self._feed.watchers >= self._max_watchers:
            raise TooManyWatchers
        of_caller = self._feed.watchers_of(call.identity.name)
        if of_caller >= self._max_watchers_per_caller and not call.identity.unrestricted:
            raise TooManyWatchers(call.identity.name, {"watchers": of_caller})

    async def WatchQueue(self, request: pb.WatchQueueRequest, call: Call) -> None:
        self._require_room(call)
        doctor_id, day, view = request.doctor_id, date_from(request, "date"), _VIEWS[request.view]
        resume = ResumeToken.decode(request.resume_token) if request.resume_token else None
        if resume is not None:
            if resume.doctor_id != doctor_id or (day is not None and resume.date != day):
                raise InvalidField(("resume_token", "is of another doctor-day"))
            day = resume.date
        admitted = await self._queues.admit(call.caller, doctor_id, day, view)
        heartbeat = _heartbeat_seconds(request)
        ends, reason = _end(call.identity)
        # Others may have come during the round trip.
        self._require_room(call)
        with (
            self._feed.subscribe(doctor_id, admitted.date, admitted.view, call.identity.name) as watch,
            _Shown(call, watch) as shown,
        ):
            message = await watch.begin(resume)
            if view == STAFF:
                shown.begin()
            await _write(call, message or _heartbeat(watch))
            silent_until = time.monotonic() + heartbeat
            while not self._feed.draining and (now := time.monotonic()) < ends:
                news = await watch.news(min(silent_until, ends, now + JUDGE_SECONDS) - now)
                if await call.judged_anew() or watch.has_lost_its_own:
                    watch.view = (await self._queues.admit(call.caller, doctor_id, admitted.date, view)).view
                message = await watch.latest() if news else None
                if view == STAFF:
                    shown.go_on()
                if message is None and silent_until <= time.monotonic() < ends:
                    message = _heartbeat(watch)
                if message is not None:
                    await _write(call, message)
                    silent_until = time.monotonic() + heartbeat
            await _write(call, _closing(watch, pb.StreamClosing.REASON_DRAINING if self._feed.draining else reason))


def _answer(change: Change[Appointment], call: Call, response: Callable[..., R], **more: Any) -> R:
    if change.replayed:
        saw(call, change.result)
    return response(
        entry=to_entry(entry_of(change.result)),
        appointment=to_appointment(change.result),
        revision=change.revision,
        replayed=change.replayed,
        **more,
    )


def _priority(request: Any) -> str | None:
    return _PRIORITIES[request.priority] if request.priority else None


def _end(identity: Identity) -> tuple[float, pb.StreamClosing.Reason.ValueType]:
    """When a stream of this caller that begins now is closed, by `time.monotonic`, and why."""
    now = time.monotonic()
    ends = now + random.uniform(*MAX_AGE_SECONDS)
    if identity.until is not None and identity.life is not None:
        closes = identity.until - min(AUTH_NOTICE_SECONDS, identity.life / 3)
        if closes <= now:
            # Not at once: a client that has nothing fresh would come back without end.
            closes = identity.until - (identity.until - now) / 3
        if closes < ends:
            return closes, pb.StreamClosing.REASON_AUTH_EXPIRING
    return ends, pb.StreamClosing.REASON_MAX_AGE


class _Shown:
    """Notes whom a stream shows: each patient once, those who are there when it begins together.

    A context manager; at its end it notes those who are left.
    """

    def __init__(self, call: Call, watch: Subscription) -> None:
        self._call = call
        self._watch = watch
        self._noted: set[str] = set()
        self._new: set[str] = set()
        self._due = 0.0

    def begin(self) -> None:
        """The stream has its first message. That is noted if the queue is empty, too."""
        here = {entry.patient_id for entry in self._watch.queue.entries}
        self._new = here | self._watch.patient_ids
        self._note()
        self._due = 0.0

    def go_on(self) -> None:
        """The stream may have another message."""
        self._new |= self._watch.patient_ids - self._noted
        if self._new and time.monotonic() >= self._due:
            self._note()

    def _note(self) -> None:
        _saw(self._call, self._watch.queue, sorted(self._new))
        self._noted |= self._new
        self._new = set()
        self._due = time.monotonic() + NOTE_SECONDS

    def __enter__(self) -> "_Shown":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._new:
            self._note()


def _saw(call: Call, queue: Queue, patient_ids: Sequence[str]) -> None:
    resource = f"doctorDays/{queue.doctor_id}/{queue.date}"
    call.saw(patient_ids, resource=resource, doctor_id=queue.doctor_id, date=queue.date)


async def _write(call: Call, message: bytes) -> None:
    try:
        with Timeout(WRITE_SECONDS):
            await call.write(message)
    except TimeoutError:
        raise WatcherTooSlow from None


def _heartbeat_seconds(request: pb.WatchQueueRequest) -> float:
    if not request.HasField("heartbeat_interval"):
        return DEFAULT_HEARTBEAT_SECONDS
    asked = request.heartbeat_interval.seconds + request.heartbeat_interval.nanos / 1e9
    return min(max(asked, HEARTBEAT_SECONDS[0]), HEARTBEAT_SECONDS[1])


def _heartbeat(watch: Subscription) -> bytes:
    message = pb.WatchQueueResponse(
        revision=watch.revision, previous_revision=watch.revision, resume_token=watch.token, heartbeat=pb.Heartbeat()
    )
    message.heartbeat.MergeFromString(watch.heartbeat())
    message.server_time.GetCurrentTime()
    return message.SerializeToString()


def _closing(watch: Subscription, reason: pb.StreamClosing.Reason.ValueType) -> bytes:
    delay = random.uniform(0, DRAIN_SPREAD_SECONDS) if reason == pb.StreamClosing.REASON_DRAINING else 0.0
    closing = pb.StreamClosing(
        reason=reason,
        reconnect_delay=duration_pb2.Duration(seconds=int(delay), nanos=int(delay % 1 * 1e9)),
    )
    message = pb.WatchQueueResponse(revision=watch.revision, previous_revision=watch.revision, closing=closing)
    message.server_time.GetCurrentTime()
    return message.SerializeToString()
