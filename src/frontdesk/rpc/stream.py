"""What streams have in common: their age and their end, how long a message may wait, the silence that is broken."""

import random
import time
from typing import Any

from google.protobuf import duration_pb2

from clinic.frontdesk.v1.queue_pb2 import StreamClosing
from frontdesk.core.caller import Identity
from frontdesk.errors import WatcherTooSlow
from frontdesk.rpc.pipeline import Call
from frontdesk.tasks import Timeout

MAX_AGE_SECONDS = (20 * 60, 30 * 60)
"""A stream ends at a random age between these, so that streams which began together do not end together."""

DRAIN_SPREAD_SECONDS = 5.0
"""Watchers of a server that stops come back at random within so long."""

AUTH_NOTICE_SECONDS = 30.0
"""How long before its credentials expire a stream is closed; or a third of their life, if that is less."""

JUDGE_SECONDS = 10.0
"""A stream notices within so long that something about its caller's credentials has changed."""

WRITE_SECONDS = 30.0
"""How long a watcher may leave a message unread once gRPC takes no more for it."""

HEARTBEAT_SECONDS = (5.0, 60.0)
DEFAULT_HEARTBEAT_SECONDS = 15.0


def end_of(identity: Identity) -> tuple[float, StreamClosing.Reason.ValueType]:
    """When a stream of this caller that begins now is closed, by `time.monotonic`, and why."""
    now = time.monotonic()
    ends = now + random.uniform(*MAX_AGE_SECONDS)
    if identity.until is not None and identity.life is not None:
        closes = identity.until - min(AUTH_NOTICE_SECONDS, identity.life / 3)
        if closes <= now:
            # Not at once: a client that has nothing fresh would come back without end.
            closes = identity.until - (identity.until - now) / 3
        if closes < ends:
            return closes, StreamClosing.REASON_AUTH_EXPIRING
    return ends, StreamClosing.REASON_MAX_AGE


def closing(reason: StreamClosing.Reason.ValueType) -> StreamClosing:
    """The last message of a stream, as far as it is the same for all."""
    delay = random.uniform(0, DRAIN_SPREAD_SECONDS) if reason == StreamClosing.REASON_DRAINING else 0.0
    return StreamClosing(
        reason=reason,
        reconnect_delay=duration_pb2.Duration(seconds=int(delay), nanos=int(delay % 1 * 1e9)),
    )


def heartbeat_seconds(request: Any) -> float:
    """The silence after which a stream says that it lives."""
    if not request.HasField("heartbeat_interval"):
        return DEFAULT_HEARTBEAT_SECONDS
    asked: float = request.heartbeat_interval.seconds + request.heartbeat_interval.nanos / 1e9
    return min(max(asked, HEARTBEAT_SECONDS[0]), HEARTBEAT_SECONDS[1])


async def write(call: Call, message: bytes) -> None:
    """Send a message. Raises WatcherTooSlow."""
    try:
        with Timeout(WRITE_SECONDS):
            await call.write(message)
    except TimeoutError:
        raise WatcherTooSlow from None
