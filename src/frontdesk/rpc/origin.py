"""Where a call comes from: the address of its client, behind proxies that may be believed."""

import ipaddress
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import grpc

from frontdesk.settings.proxies import UNIX, Proxy

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Origins:
    """Tells the addresses of clients."""

    def __init__(self, proxies: Sequence[Proxy]) -> None:
        """`proxies` are those whose x-forwarded-for is believed."""
        self._networks = [proxy for proxy in proxies if proxy != UNIX]
        self._unix = UNIX in proxies

    def of(self, context: grpc.aio.ServicerContext[Any, Any]) -> str:
        """The address from which the call comes, such as 192.0.2.1, 2001:db8::1, or unix for a Unix socket.

        Behind a proxy that is believed, it is the last address in x-forwarded-for that is not such a proxy's: the
        others were there before, and anybody may have written them.
        """
        here = _peer(context.peer())
        if self._trusts(here):
            metadata: Any = context.invocation_metadata() or ()
            hops = [hop for key, value in metadata if key == "x-forwarded-for" for hop in value.split(",")]
            for hop in reversed(hops):
                found = _address(hop)
                # No address: the proxy that wrote it is the last known.
                if found is None:
                    break
                here = found
                if not self._trusts(here):
                    break
        return UNIX if here is None else str(here)

    def _trusts(self, address: _Address | None) -> bool:
        if address is None:
            return self._unix
        return any(address in network for network in self._networks)


@lru_cache(10_000)
def _peer(peer: str) -> _Address | None:
    kind, _, rest = peer.partition(":")
    return _address(unquote(rest)) if kind in ("ipv4", "ipv6") else None


def _address(text: str) -> _Address | None:
    """Read an address, with a port or without; None if it is none."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
