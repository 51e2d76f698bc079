"""clinic.frontdesk.v1.QueueService."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from clinic.frontdesk.v1 import queue_pb2 as pb
from frontdesk.core.appointment import Appointment
from frontdesk.core.estimate import Estimate
from frontdesk.core.queue import BOARD, OWN, STAFF, Queue, QueueChange, QueueEntry, Queues, entry_of
from frontdesk.db.change import Change
from frontdesk.errors import InvalidField
from frontdesk.live.feed import Feed
from frontdesk.live.subscription import Subscription
from frontdesk.live.tokens import ResumeToken
from frontdesk.live.watcher import Watchers
from frontdesk.rpc import stream
from frontdesk.rpc.convert import converter, date_from, enum_numbers, key_of
from frontdesk.rpc.pipeline import Call
from frontdesk.rpc.services.appointment import saw, to_appointment

NOTE_SECONDS = 60.0
"""Seconds between two rows of the log about patients who came to a queue while a stream showed it: many streams that
show many patients are to write few."""

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

    def __init__(self, queues: Queues, feed: Feed, watchers: Watchers) -> None:
        self._queues = queues
        self._feed = feed
        self._watchers = watchers

    async def CheckIn(self, request: pb.CheckInRequest, call: Call) -> pb.CheckInResponse:
        return await self._change(
            request, call, pb.CheckInResponse, patient_id=request.patient_id or None, priority=priority_from(request)
        )

    async def AddWalkIn(self, request: pb.AddWalkInRequest, call: Call) -> pb.AddWalkInResponse:
        change = await self._queues.add_walk_in(
            call.caller, request.doctor_id, request.patient_id, priority_from(request), request.reason,
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
        return await self._change(request, call, pb.SetPriorityResponse, priority=priority_from(request))

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

    async def WatchQueue(self, request: pb.WatchQueueRequest, call: Call) -> None:
        self._watchers.require_room(call.identity)
        doctor_id, day, view = request.doctor_id, date_from(request, "date"), _VIEWS[request.view]
        resume = ResumeToken.decode(request.resume_token) if request.resume_token else None
        if resume is not None:
            if resume.doctor_id != doctor_id or (day is not None and resume.date != day):
                raise InvalidField(("resume_token", "is of another doctor-day"))
            day = resume.date
        admitted = await self._queues.admit(call.caller, doctor_id, day, view)
        heartbeat = stream.heartbeat_seconds(request)
        ends, reason = stream.end_of(call.identity)
        # Others may have come during the round trip.
        self._watchers.require_room(call.identity)
        with (
            self._feed.subscribe(doctor_id, admitted.date, admitted.view) as watch,
            self._watchers.counting(watch, call.identity.name),
            _Shown(call, watch) as shown,
        ):
            message = await watch.begin(resume)
            if view == STAFF:
                shown.begin()
            await stream.write(call, message or _heartbeat(watch))
            silent_until = time.monotonic() + heartbeat
            while not self._watchers.draining and (now := time.monotonic()) < ends:
                news = await watch.news(min(silent_until, ends, now + stream.JUDGE_SECONDS) - now)
                if await call.judged_anew() or watch.has_lost_its_own:
                    watch.view = (await self._queues.admit(call.caller, doctor_id, admitted.date, view)).view
                message = await watch.latest() if news else None
                if view == STAFF:
                    shown.go_on()
                if message is None and silent_until <= time.monotonic() < ends:
                    message = _heartbeat(watch)
                if message is not None:
                    await stream.write(call, message)
                    silent_until = time.monotonic() + heartbeat
            await stream.write(
                call, _closing(watch, pb.StreamClosing.REASON_DRAINING if self._watchers.draining else reason)
            )


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


def priority_from(request: Any) -> str | None:
    return _PRIORITIES[request.priority] if request.priority else None


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


def _heartbeat(watch: Subscription) -> bytes:
    message = pb.WatchQueueResponse(
        revision=watch.revision, previous_revision=watch.revision, resume_token=watch.token, heartbeat=pb.Heartbeat()
    )
    message.heartbeat.MergeFromString(watch.heartbeat())
    message.server_time.GetCurrentTime()
    return message.SerializeToString()


def _closing(watch: Subscription, reason: pb.StreamClosing.Reason.ValueType) -> bytes:
    message = pb.WatchQueueResponse(
        revision=watch.revision, previous_revision=watch.revision, closing=stream.closing(reason)
    )
    message.server_time.GetCurrentTime()
    return message.SerializeToString()
