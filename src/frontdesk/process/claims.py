"""Hold an address, so that no other process serves it, while worker processes come and go behind it."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Protocol

from frontdesk.settings.addresses import Address


class ClaimError(Exception):
    """The address cannot be served; the message is the reason."""


class Claim(Protocol):
    """An address that this process holds."""

    @property
    def address(self) -> Address:
        """The address that clients use."""

    def worker_address(self) -> Address:
        """The address that the next worker binds, with SO_REUSEPORT if it is TCP."""

    def worker_listens(self, bound: Address) -> None:
        """A worker listens on that address: lead clients to it. Raises ClaimError."""

    def close(self) -> None:
        """Give the address up, after all workers have ended."""


def claim(address: Address) -> Claim:
    """Hold an address; port 0 becomes a free port. Raises ClaimError."""
    return UnixClaim(address) if address.path else TcpClaim(address)


class TcpClaim:
    """A port. Each worker binds it with SO_REUSEPORT, and the kernel spreads the connections."""

    def __init__(self, address: Address) -> None:
        # Localhost may be two addresses: then the free port of the first must happen to be free on the second.
        attempts = 1 if address.port else 20
        while True:
            attempts -= 1
            try:
                self._sockets = _bind(address.host, address.port)
                break
            except OSError as error:
                taken = error.errno == errno.EADDRINUSE
                if not taken or not attempts:
                    raise ClaimError("in use by another process" if taken else str(error.strerror)) from None
            except UnicodeError:
                raise ClaimError("is not a host name") from None
        self.address = Address(address.host, self._sockets[0].getsockname()[1])

    def worker_address(self) -> Address:
        return self.address

    def worker_listens(self, bound: Address) -> None:
        pass

    def close(self) -> None:
        for one in self._sockets:
            one.close()


def _bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that are bound to each address of `host` and do not listen. Only SO_REUSEPORT may bind there as well.

    SO_REUSEPORT alone would let a second service of this user share the port and take half of the calls. Raises
    OSError, UnicodeError.
    """
    bound: list[socket.socket] = []
    trouble = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    # Without repetitions: /etc/hosts may name an address twice.
    for family, address in dict.fromkeys(
        (family, address) for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ):
        one = socket.socket(family, socket.SOCK_STREAM)
        try:
            address = (address[0], port, *address[2:])
            try:
                one.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                # Perhaps only by closed connections, which this option disregards. It would also disregard another
                # claim that has the option set, so it is the second choice and taken back.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                one.bind(address)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            # Set only now: set before, a second service of this user could bind as well.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            one.close()
            if error.errno == errno.EADDRINUSE:
                for other in bound:
                    other.close()
                raise
            # A container may lack one of the two addresses of localhost.
            trouble = error
            continue
        bound.append(one)
        port = one.getsockname()[1]
    if not bound:
        raise trouble
    return bound


class UnixClaim:
    """The path of a socket. It belongs to one worker at a time: the kernel does not spread connections of a path.

    Each worker binds a path of its own, which is then renamed to the claimed one. So a successor takes over without a
    moment in which nobody listens, and a socket that a killed service left behind is replaced.

    PATH.lock holds the claim: a flock, which the kernel releases when its process ends.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._path = Path(address.path)
        self._workers = 0
        self._ours: tuple[int, int] | None = None
        try:
            self._lock = _lock(self._path.with_name(f"{self._path.name}.lock"))
        except BlockingIOError:
            raise ClaimError("in use by another process") from None
        except OSError as error:
            raise ClaimError(f"{error.strerror}: {error.filename}") from None
        try:
            self._refuse_served_path()
        except BaseException:
            self.close()
            raise

    def worker_address(self) -> Address:
        self._workers += 1
        return Address(path=f"{self._path}.{self._workers}")

    def worker_listens(self, bound: Address) -> None:
        try:
            found = os.stat(bound.path)
            os.rename(bound.path, self._path)
        except OSError as error:
            raise ClaimError(f"{error.strerror}: {error.filename}") from None
        self._ours = found.st_dev, found.st_ino

    def close(self) -> None:
        with contextlib.suppress(OSError):
            found = os.lstat(self._path)
            if (found.st_dev, found.st_ino) == self._ours:
                self._path.unlink()
        for left in range(1, self._workers + 1):
            Path(f"{self._path}.{left}").unlink(missing_ok=True)
        self._path.with_name(f"{self._path.name}.lock").unlink(missing_ok=True)
        os.close(self._lock)

    def _refuse_served_path(self) -> None:
        """Raise ClaimError if another program listens on the path, or if it is not a socket."""
        try:
            if not stat.S_ISSOCK(os.lstat(self._path).st_mode):
                raise ClaimError("exists and is not a socket")
        except FileNotFoundError:
            return
        except OSError as error:
            raise ClaimError(str(error.strerror)) from None
        with socket.socket(socket.AF_UNIX) as probe:
            # A full queue of connections is not a stale socket.
            probe.setblocking(False)
            try:
                probe.connect(str(self._path))
            except BlockingIOError:
                pass
            except OSError:
                return
        raise ClaimError("in use by another process")


def _lock(path: Path) -> int:
    """Create and lock the file. Raises OSError, BlockingIOError if another process has locked it."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held it may have deleted it meanwhile, and another may have created it again.
            if os.path.exists(path) and os.path.samestat(os.fstat(lock), os.stat(path)):
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
