"""The state of a watch: what the watcher knows and when it tries again. Pure: the clients do the talking."""

import datetime
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import event_pb2, queue_pb2
from frontdesk.client.errors import FrontdeskError
from frontdesk.client.login import Login

HEARTBEAT_SECONDS = (5.0, 60.0)
"""The range of heartbeat intervals; a watch that asks for less or more gets the nearest."""
DEFAULT_HEARTBEAT_SECONDS = 15.0
STREAM_AGE_SECONDS = (20 * 60.0, 30 * 60.0)
"""The age at which a server ends a stream."""
WRITE_SECONDS = 30.0
"""A server ends a stream whose write was blocked for so long."""

SILENT_INTERVALS = 3.0
"""A stream without a message for more heartbeat intervals than these is dead."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two streams, unless the service says otherwise."""
LONGEST_PUSHBACK = 60.0
"""Seconds for which a closing message is obeyed at most."""
ATTEMPTS_BEFORE_WARNING = 5
"""After so many streams in a row without a message the log says so, and again after twice as many, and so on.

If waiting seems not to help, the resume token is given up then too: the service may have too much to tell after it.
"""
MOST_ATTEMPTS = 10
"""After so many streams in a row without a message, for a cause that waiting does not mend, the watch ends."""

EVENTS_AT_ONCE = 500
"""Events that come in one message at most, while a reader is behind."""

_FINAL = {
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT,
    # A cursor of events that is lost or too old.
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
}
# These pass, as does all that the service answers with RetryInfo; a watch waits for as long as they last.
_PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
_log = logging.getLogger("frontdesk.client")

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Update:
    """One update of a watch: the whole queue, and the changes that led to it."""

    queue: queue_pb2.Queue
    """The queue at its revision."""
    changes: tuple[queue_pb2.QueueChange, ...]
    """Every change after `previous_revision` up to the queue's revision, none missing; none on a fresh start."""
    previous_revision: int
    """The revision of the update before this one; 0 on a fresh start."""
    resume_token: str
    """Lets another watch of the same queue go on after this update."""

    @property
    def fresh(self) -> bool:
        """Whether this is a fresh start, which does not tell what happened before it. True of the first update.

        Later only if the service could not go on: after a restore of its database, or too long an interruption.
        """
        return self.previous_revision == 0


OnConnection = Callable[[bool], None]
"""Called with True when a stream has begun, and with False when it has ended and another will be opened."""


OnEstimates = Callable[[queue_pb2.Heartbeat], None]
"""Called with each heartbeat: the estimates have moved with time, and the queue has not changed."""


class RevisionGap(Exception):
    """The service went on from another revision than the one that the watcher knows."""


class Following(Generic[Item]):
    """One watcher, over as many streams as it takes: when it tries again, and when it gives up."""

    def __init__(
        self, request: Any, about: str, heartbeat: float, on_connection: OnConnection | None, login: Login | None
    ) -> None:
        """`about` says in the log what is watched."""
        self._request = request
        self._about = about
        self._login = login
        heartbeat = min(max(heartbeat, HEARTBEAT_SECONDS[0]), HEARTBEAT_SECONDS[1])
        self._request.heartbeat_interval.FromMilliseconds(round(heartbeat * 1000))
        self.longest_silence = SILENT_INTERVALS * heartbeat
        """Seconds without a message after which a stream is dead."""
        self._pushback: float | None = None
        self._longest_pause = 0.0
        self._opened_at = 0.0
        self._live = False
        self._attempts = 0
        """Streams in a row that ended without a message."""
        self._warn_at = ATTEMPTS_BEFORE_WARNING
        self._on_connection = on_connection or (lambda live: None)

    def request(self) -> Any:
        """The request that opens the next stream."""
        self._opened_at = time.monotonic()
        request = type(self._request)()
        request.CopyFrom(self._request)
        return request

    def take(self, message: Any) -> Sequence[Item]:
        """Learn from a message; what to yield. Raises RevisionGap."""
        raise NotImplementedError

    def _has_come(self, message: Any) -> None:
        """A message of any kind has come."""
        if message.HasField("closing"):
            if self._login is not None and message.closing.reason == queue_pb2.StreamClosing.REASON_AUTH_EXPIRING:
                self._login.expire()
            self._pushback = min(message.closing.reconnect_delay.ToNanoseconds() / 1e9, LONGEST_PUSHBACK)
        if not self._live:
            self._live = True
            self._attempts, self._warn_at = 0, ATTEMPTS_BEFORE_WARNING
            self._on_connection(True)

    def pause(self, error: Exception | None) -> float:
        """Seconds to wait after a stream that ended, in `error` or well. Raises FrontdeskError for a final error."""
        if self._live:
            self._live = False
            self._on_connection(False)
        else:
            self._attempts += 1
        if isinstance(error, RevisionGap):
            # Our own server never does this. The missing changes cannot be had, so the watcher gets a fresh start.
            self._start_afresh()
        if self._pushback is not None:
            seconds, self._pushback, self._longest_pause = self._pushback, None, 0.0
            return seconds
        failure = _failure(error)
        if failure.reason == "CREDENTIALS_EXPIRED" and self._login is not None:
            self._login.expire()
            self._give_up_in_the_end(failure, error)
        elif failure.code in _FINAL:
            if failure.code is not grpc.StatusCode.INVALID_ARGUMENT or not self._can_start_afresh():
                raise failure from error
            # The request was accepted before, so it is the token that is wrong: another release may have made it.
            self._start_afresh()
        elif self._attempts:
            self._give_up_in_the_end(failure, error)
        pushback = failure.retry_after or 0.0
        if time.monotonic() - self._opened_at > self._longest_pause:
            # The stream lasted longer than the pause before it, so pauses begin with the shortest again.
            self._longest_pause = 0.0
        self._longest_pause = min(max(2 * self._longest_pause, FIRST_PAUSE), LONGEST_PAUSE)
        return max(random.uniform(self._longest_pause / 2, self._longest_pause), pushback)

    def _give_up_in_the_end(self, failure: FrontdeskError, error: Exception | None) -> None:
        passes = failure.code in _PASSING or failure.retry_after is not None
        if not passes and self._attempts >= MOST_ATTEMPTS:
            raise failure from error
        if self._attempts == self._warn_at:
            self._warn_at *= 2
            _log.warning("no message about %s in %d attempts to watch: %s", self._about, self._attempts, failure)
            if not passes:
                self._start_afresh()

    def _can_start_afresh(self) -> bool:
        return False

    def _start_afresh(self) -> None:
        """Give up the place from which the watch went on, if it can do without."""


class Watch(Following[Update]):
    """One watcher of one queue."""

    def __init__(
        self,
        doctor_id: str,
        date: datetime.date | None,
        heartbeat: float,
        view: queue_pb2.QueueView.ValueType,
        resume_token: str,
        on_connection: OnConnection | None,
        on_estimates: OnEstimates | None = None,
        login: Login | None = None,
    ) -> None:
        request = queue_pb2.WatchQueueRequest(doctor_id=doctor_id, view=view, resume_token=resume_token)
        if date is not None:
            request.date.CopyFrom(Date(year=date.year, month=date.month, day=date.day))
        super().__init__(request, f"doctor {doctor_id}", heartbeat, on_connection, login)
        self._revision: int | None = None
        self._on_estimates = on_estimates or (lambda heartbeat: None)

    def take(self, message: queue_pb2.WatchQueueResponse) -> Sequence[Update]:
        """Learn from a message; the update to yield, if it has one. Raises RevisionGap."""
        updates: Sequence[Update] = ()
        if message.HasField("update"):
            previous = message.previous_revision
            told = [change.revision for change in message.update.changes]
            if previous and (
                self._revision not in (None, previous) or told != [*range(previous + 1, message.revision + 1)]
            ):
                raise RevisionGap
            changes = tuple(message.update.changes)
            updates = (Update(message.update.queue, changes, previous, message.resume_token),)
        elif not message.HasField("closing") and self._revision not in (None, message.revision):
            raise RevisionGap
        self._revision = message.revision
        self._request.resume_token = message.resume_token or self._request.resume_token
        self._has_come(message)
        if message.HasField("heartbeat"):
            self._on_estimates(message.heartbeat)
        return updates

    def _can_start_afresh(self) -> bool:
        return self._revision is not None

    def _start_afresh(self) -> None:
        self._request.resume_token, self._revision = "", None


class EventWatch(Following[event_pb2.Event]):
    """One reader of events. It never gives up its place, so that it never leaves out an event by itself."""

    def __init__(
        self,
        request: event_pb2.WatchEventsRequest,
        heartbeat: float,
        on_connection: OnConnection | None,
        login: Login | None = None,
    ) -> None:
        super().__init__(request, "events", heartbeat, on_connection, login)

    def take(self, message: event_pb2.WatchEventsResponse) -> Sequence[event_pb2.Event]:
        """Learn from a message; the events to yield."""
        found = (message.event,) if message.HasField("event") else tuple(message.batch.events)
        if cursor := found[-1].cursor if found else message.heartbeat.cursor:
            self._request.cursor, self._request.from_start = cursor, False
        self._has_come(message)
        return found


def _failure(error: Exception | None) -> FrontdeskError:
    """Why a stream ended, as an error of ours."""
    if isinstance(error, FrontdeskError):
        return error
    if isinstance(error, grpc.RpcError):
        return FrontdeskError.of(error)
    if isinstance(error, TimeoutError):
        return FrontdeskError(grpc.StatusCode.DEADLINE_EXCEEDED, message="the stream was silent")
    if isinstance(error, RevisionGap):
        return FrontdeskError(grpc.StatusCode.DATA_LOSS, message="the stream left out changes")
    return FrontdeskError(grpc.StatusCode.UNKNOWN, message="the stream ended without a message")
