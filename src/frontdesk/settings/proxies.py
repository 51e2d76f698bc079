"""Proxies as operators write them: addresses and networks, and `unix` for those behind a Unix socket."""

import ipaddress
from collections.abc import Sequence
from typing import Literal

UNIX: Literal["unix"] = "unix"

Proxy = ipaddress.IPv4Network | ipaddress.IPv6Network | Literal["unix"]


def parse_proxies(text: str) -> Sequence[Proxy]:
    """Read a list that commas separate. Raises ValueError."""
    return [_parse(part.strip()) for part in text.split(",")]


def _parse(text: str) -> Proxy:
    if text == UNIX:
        return UNIX
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not an address, a network such as 10.0.0.0/8, or unix") from None
    raise ValueError(f"{text!r} is an address within a network: write {meant}, or the address alone")
