"""Channels to the service: their options, retries included, and the way past a proxy."""

import re
import socket
from collections.abc import Sequence
from importlib.resources import files
from ipaddress import IPv4Address, IPv6Address
from urllib.parse import unquote

import grpc

SERVICE_CONFIG = files("frontdesk.client").joinpath("service_config.json").read_text(encoding="utf-8")
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

_LOCAL_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost", "ip6-loopback"}


def aio_channel(
    target: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Options = CHANNEL_OPTIONS,
    *,
    server_name: str | None = None,
) -> grpc.aio.Channel:
    """A channel for asyncio; in plain text without `credentials`.

    `server_name` is the name that the server's certificate must have, by default the host of `target`.

    A proxy that the environment names (`http_proxy` …) is not used for loopback.
    """
    options = _past_proxies(target, _expecting(server_name, options))
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)


def sync_channel(
    target: str,
    credentials: grpc.ChannelCredentials | None = None,
    options: Options = CHANNEL_OPTIONS,
    *,
    server_name: str | None = None,
) -> grpc.Channel:
    """A channel for synchronous callers; otherwise like `aio_channel`."""
    options = _past_proxies(target, _expecting(server_name, options))
    if credentials is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)


def _expecting(server_name: str | None, options: Options) -> Options:
    return options if server_name is None else [*options, ("grpc.ssl_target_name_override", server_name)]


def _past_proxies(target: str, options: Options) -> Options:
    # gRPC obeys http_proxy for every host that no_proxy does not name, and a proxy has another loopback than we have.
    return [*options, ("grpc.enable_http_proxy", 0)] if is_loopback(target) else options


def is_loopback(target: str) -> bool:
    """Whether all addresses of a gRPC target are this machine's own, as far as the text shows: no name is looked up."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    scheme = re.match("(dns|ipv4|ipv6):(?://[^/]*/)?", target)
    if scheme is None:
        return _is_own(target)
    addresses = unquote(target[scheme.end() :])
    return all(map(_is_own, addresses.split(",")))


def _is_own(address: str) -> bool:
    """Whether HOST, HOST:PORT or [HOST]:PORT is on this machine. The wildcard is: connections to it go to loopback."""
    bracketed = re.fullmatch(r"\[(.*)\](?::\w*)?", address)
    host = bracketed[1] if bracketed else address
    if not bracketed and host.count(":") == 1:
        host = host.partition(":")[0]
    name = host.lower().removesuffix(".")
    if name in _LOCAL_NAMES or name.endswith(".localhost"):
        return True
    ip: IPv4Address | IPv6Address
    try:
        if ":" in host:
            ip = IPv6Address(host)
            ip = ip.ipv4_mapped or ip
        else:
            # Not IPv4Address, which refuses forms like 127.1 that resolvers take.
            ip = IPv4Address(socket.inet_aton(host))
    except (OSError, ValueError):
        return False
    return ip.is_loopback or ip.is_unspecified
