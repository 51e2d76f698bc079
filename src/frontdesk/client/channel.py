"""Channels to the service: their options, retries included."""

from collections.abc import Sequence
from importlib.resources import files

import grpc

SERVICE_CONFIG = files("frontdesk.client").joinpath("service_config.json").read_text()
"""gRPC's retries, as JSON that a client in any language takes: of calls that end as UNAVAILABLE, ABORTED, or CANCELLED
by the server.

When a server stops, gRPC's core cancels the calls that it has received and not yet handed over. A call that the caller
cancels has ended, and is not retried.

With it, a change is safe only under an idempotency key. Five attempts are the most that gRPC makes; they spread over
some four seconds, in which a worker that died is replaced. WatchQueue is left out: a resume token is worth more than a
retry.
"""

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.service_config", SERVICE_CONFIG),
    # The server allows a ping every 10 s, with calls or without: a dead connection is noticed within 30 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # By default gRPC waits up to two minutes before it tries a server that came back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

Options = Sequence[tuple[str, str | int]]


def aio_channel(
    target: str, credentials: grpc.ChannelCredentials | None = None, options: Options = CHANNEL_OPTIONS
) -> grpc.aio.Channel:
    """A channel for asyncio; in plain text without `credentials`."""
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


def sync_channel(
    target: str, credentials: grpc.ChannelCredentials | None = None, options: Options = CHANNEL_OPTIONS
) -> grpc.Channel:
    """A channel for synchronous callers; in plain text without `credentials`."""
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)
