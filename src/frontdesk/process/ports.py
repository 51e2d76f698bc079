"""Hold a port, so that no other process serves it."""

import errno
import os
import socket


class ClaimError(Exception):
    """The address cannot be served; the message is the reason."""


def claim(host: str, port: int) -> list[socket.socket]:
    """Sockets that are bound to each address of `host` and do not listen. Only SO_REUSEPORT may bind there as well.

    SO_REUSEPORT alone would let a second service of this user share the port and take half of the calls. Port 0 takes
    a free one, the same on each address. Raises ClaimError.
    """
    # Localhost may be two addresses: then the free port of the first must happen to be free on the second.
    attempts = 1 if port else 20
    while True:
        attempts -= 1
        try:
            return _claim(host, port)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            if not taken or not attempts:
                raise ClaimError("in use by another process" if taken else error.strerror) from None


def _claim(host: str, port: int) -> list[socket.socket]:
    claims: list[socket.socket] = []
    trouble = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    # Without repetitions: /etc/hosts may name an address twice.
    for family, address in dict.fromkeys(
        (family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ):
        claim = socket.socket(family, socket.SOCK_STREAM)
        try:
            address = (address[0], port, *address[2:])
            try:
                claim.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                # Perhaps only by closed connections, which this option disregards. It would also disregard another
                # claim that has the option set, so it is the second choice and taken back.
                claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                claim.bind(address)
                claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            # Set only now: set before, a second service of this user could bind as well.
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            claim.close()
            if error.errno == errno.EADDRINUSE:
                for one in claims:
                    one.close()
                raise
            # A container may lack one of the two addresses of localhost.
            trouble = error
            continue
        claims.append(claim)
        port = claim.getsockname()[1]
    if not claims:
        raise trouble
    return claims
