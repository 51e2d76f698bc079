"""Signals, received by a loop that also waits for other things."""

import signal
import socket
from multiprocessing import connection
from types import FrameType, TracebackType
from typing import Any, Self


class StopSignals:
    """Counts SIGTERM and SIGINT, and ends a wait when one arrives."""

    def __init__(self) -> None:
        self.count = 0
        self._reader, self._writer = socket.socketpair()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._reader.close()
        self._writer.close()

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def wait(self, others: list[Any], seconds: float | None) -> None:
        """Wait until one of `others` is ready, a signal arrives, or `seconds` have passed."""
        if self._reader in connection.wait([self._reader, *others], seconds):
            self._reader.recv(4096)
