"""Child processes, as the supervisor sees them: start one, poll it, tell it to stop, reap it."""

import contextlib
import ctypes
import enum
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from frontdesk.settings.addresses import Address

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_LONG_LIFE = 30.0
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


class Backoff:
    """When to restart a dead process: after 0.1 s, doubling to 5 s; from 0.1 s again after a life of 30 s."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY
        self.due = 0.0

    def died(self, started: float) -> None:
        """A process that was started at this monotonic time has died now."""
        now = time.monotonic()
        if now - started >= _LONG_LIFE:
            self._delay = _FIRST_DELAY
        self.due = now + self._delay
        self._delay = min(2 * self._delay, _LONGEST_DELAY)


class ChildFailure(Exception):
    """A process cannot be started, or has ended; the message is one line that says why."""


class State(enum.Enum):
    """The life of a process, in order."""

    STARTING = enum.auto()
    SERVING = enum.auto()
    """It works; a worker listens."""
    LEAVING = enum.auto()
    """A worker that serves until a successor does."""
    STOPPING = enum.auto()
    """It was told to stop, and drains."""


class ChildProcess:
    """One process. `noun` is what messages call it, and the system, after fd-: at most 12 letters."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self.state = State.STARTING
        self.started = time.monotonic()
        self.deadline = 0.0
        """The monotonic time at which a process that is told to stop must have ended."""

    def start(self, target: Callable[..., None], task: dict[str, Any]) -> None:
        """Run `target` with `task`, `ready` and `handover` in a process. Raises ChildFailure."""
        spawn = multiprocessing.get_context("spawn")
        pipes: list[Connection] = []
        try:
            self._ready, ready = spawn.Pipe(duplex=False)
            pipes += [self._ready, ready]
            self._handover, handover = spawn.Pipe()
            pipes += [self._handover, handover]
            task = {**task, "ready": ready, "handover": handover}
            self.process = spawn.Process(target=_run, args=(os.getpid(), self._noun, target, task))
            # A Ctrl-C must not hit a process that is not yet able to ignore it, so it is started with SIGINT blocked.
            # The tracker that multiprocessing starts with the first process unblocks it, so that goes before.
            resource_tracker.ensure_running()
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except OSError as error:
            for pipe in pipes:
                pipe.close()
            raise ChildFailure(f"a {self._noun} cannot be started: {error.strerror}") from None
        # Only the child holds these ends now, so that its end is seen.
        ready.close()
        handover.close()

    @property
    def waits_on(self) -> list[Any]:
        """Objects that become ready when `poll` has something to report."""
        pipes = [pipe for pipe in (self._ready, self._handover) if not pipe.closed]
        return [self.process.sentinel, *pipes]

    def poll(self) -> None:
        """Bring `state` up to date. Raises ChildFailure if the process has ended or cannot serve."""
        if not self._ready.closed and self._ready.poll():
            self._receive_ready()
        if not self._handover.closed and self._handover.poll():
            try:
                # Somebody has told the process to stop.
                self._handover.recv()
                if self.state is State.SERVING:
                    self.state = State.LEAVING
            except (EOFError, OSError):
                self._handover.close()
        if self.process.exitcode is not None:
            raise ChildFailure(f"{self._noun} {self.process.pid} ended with status {self.process.exitcode}")

    def _receive_ready(self) -> None:
        try:
            report: int | str | None = self._ready.recv()
        except (EOFError, OSError):
            report = None
            # Its status says more, and comes a moment later.
            self.process.join(timeout=1)
        self._ready.close()
        if not isinstance(report, int):
            raise ChildFailure(
                report or f"{self._noun} {self.process.pid} ended with status {self.process.exitcode} before it served"
            )
        self.state = State.SERVING

    def stop(self, seconds: float) -> None:
        """Tell the process to stop. It may drain, and must have ended after so many seconds."""
        self.state = State.STOPPING
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            self._handover.send(None)
        self.process.terminate()

    def reap(self) -> None:
        """Collect a process that has ended or cannot serve."""
        # One that has reported why it cannot serve is about to end.
        self.process.join(timeout=1)
        self.process.kill()
        self.process.join()
        self.process.close()
        self._ready.close()
        self._handover.close()


class WorkerProcess(ChildProcess):
    """One process that serves `address`. No other worker that runs at the same time has its number."""

    def __init__(self, number: int, address: Address) -> None:
        super().__init__("worker")
        self.number = number
        self.address = address


def _run(parent: int, noun: str, target: Callable[..., None], task: dict[str, Any]) -> None:
    """The entry of a child process."""
    # What `ps` and `top` show.
    ctypes.CDLL(None).prctl(_PR_SET_NAME, f"fd-{noun}".encode(), 0, 0, 0)
    # A terminal sends Ctrl-C to all its processes; the supervisor alone says when one ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # SIGHUP is for the supervisor alone; a terminal that closes sends it to all.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # A supervisor that was killed leaves no orphan; one that was killed before this line is told by the parent's id.
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0 and os.getppid() != parent:
        return
    target(**task)
