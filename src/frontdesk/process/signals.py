"""Signals, received by a loop that also waits for other things."""

import os
import signal
import socket
from multiprocessing import connection
from types import FrameType, TracebackType
from typing import Any, Self


class Signals:
    """Counts SIGTERM, SIGINT and SIGHUP, and ends a wait when one arrives.

    SIGHUP also comes from a terminal that closes; then it counts as a stop, unless it was ignored before (nohup).
    """

    def __init__(self) -> None:
        self.stops = 0
        """Requests to stop."""
        self.reloads = 0
        """Requests to replace the workers."""
        self._reader, self._writer = socket.socketpair()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._ends_with_terminal = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN and _has_terminal()
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def _received(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGHUP or (self._ends_with_terminal and not _has_terminal()):
            self.stops += 1
        else:
            self.reloads += 1

    def wait(self, others: list[Any], seconds: float | None) -> None:
        """Wait until one of `others` is ready, a signal arrives, or `seconds` have passed."""
        if self._reader in connection.wait([self._reader, *others], seconds):
            self._reader.recv(4096)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
