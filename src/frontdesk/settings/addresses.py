"""Addresses that a server listens on, as operators write them: HOST:PORT or unix:PATH."""

import ipaddress
import os
import re
from dataclasses import dataclass

LONGEST_PATH = 100
"""Bytes of a socket's path. The kernel takes 107, of which a worker needs some for a temporary name."""


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address, or a Unix socket if it has a path."""

    host: str = ""
    """Without the brackets of an IPv6 address."""
    port: int = 0
    path: str = ""
    """Absolute."""

    def __str__(self) -> str:
        """As gRPC takes it."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        if self.path or self.host == "localhost":
            return True
        ip = _ip(self.host)
        return ip is not None and ip.is_loopback

    @property
    def local(self) -> "Address":
        """How a client on this machine reaches it: a wildcard listens on loopback too."""
        ip = _ip(self.host)
        if self.path or ip is None or not ip.is_unspecified:
            return self
        # Without IPv6 the IPv6 wildcard listens on IPv4; localhost is both.
        return Address("127.0.0.1" if ip.version == 4 else "localhost", self.port)


def parse(text: str) -> Address:
    """Read HOST:PORT, [IPV6]:PORT or unix:PATH.

    Raises ValueError; its message does not quote a text that may hold a password.
    """
    if text.startswith("unix:"):
        return _parse_path(text.removeprefix("unix:"))
    # A database URL in the wrong variable has a password.
    shown = "is" if re.search("[@=]|://", text) else f"{text!r} is"
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{shown} not HOST:PORT, with a port from 0 to 65535, or unix:PATH")
    if host.startswith("[") and host.endswith("]"):
        if not isinstance(_ip(host[1:-1]), ipaddress.IPv6Address):
            raise ValueError(f"{shown} not [IPV6]:PORT")
        return Address(host[1:-1], int(port))
    for bare, rest in ((host, port), (text, "PORT")):
        if isinstance(_ip(bare), ipaddress.IPv6Address):
            raise ValueError(f"{shown} an IPv6 address without brackets: write [{bare}]:{rest}")
    if not host or not all(char.isalnum() or char in ".-_" for char in host):
        raise ValueError(f"{shown} not HOST:PORT, with a port from 0 to 65535, or unix:PATH")
    return Address(host, int(port))


def _parse_path(path: str) -> Address:
    # unix:///PATH is gRPC's other form; in unix://PATH it reads a host.
    if path.startswith("//") and not path.startswith("///"):
        raise ValueError("is not unix:PATH or unix:///PATH")
    try:
        path = os.path.abspath("/" + path.lstrip("/") if path.startswith("//") else path) if path else ""
    except FileNotFoundError:
        raise ValueError("is a path below the working directory, which has been deleted") from None
    if not path or path == "/" or "\0" in path:
        raise ValueError("is not unix:PATH")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(f"the path of a socket has at most {LONGEST_PATH} bytes, and {path!r} has more")
    return Address(path=path)


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
