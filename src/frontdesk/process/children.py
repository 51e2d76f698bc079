"""Worker processes, as the supervisor sees them: start one, poll it, reap it."""

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_LONG_LIFE = 30.0
_PR_SET_PDEATHSIG = 1


class Backoff:
    """When to restart a dead process: after 0.1 s, doubling to 5 s; from 0.1 s again after a life of 30 s."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY
        self._started = 0.0
        self.due = 0.0

    def started(self) -> None:
        """The process was started now."""
        self._started = time.monotonic()

    def died(self) -> None:
        """The process died now."""
        now = time.monotonic()
        if now - self._started >= _LONG_LIFE:
            self._delay = _FIRST_DELAY
        self.due = now + self._delay
        self._delay = min(2 * self._delay, _LONGEST_DELAY)


class WorkerFailure(Exception):
    """A worker cannot be started, or has ended; the message is one line that says why."""


class WorkerPlace:
    """The place of one worker: its process, and each process that replaces it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: SpawnProcess | None = None
        self.ready: Connection | None = None
        self.serves = False
        self.backoff = Backoff()

    def start(self, target: Callable[..., None], task: dict[str, Any]) -> None:
        """Run `target` with `task`, and `ready` to report on, in a process. Raises WorkerFailure."""
        spawn = multiprocessing.get_context("spawn")
        self.ready, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=_run, args=(os.getpid(), target, {**task, "ready": theirs}))
        # A Ctrl-C must not hit a worker that is not yet able to ignore it, so it is started with SIGINT blocked. The
        # tracker that multiprocessing starts with the first process unblocks it, so that goes before.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        except OSError as error:
            raise WorkerFailure(f"a worker cannot be started: {error.strerror}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # Only the worker holds it now, so that its end is seen.
            theirs.close()
        self.process = process
        self.backoff.started()

    def poll(self) -> int | None:
        """The port that the worker serves, if it has reported it since the last poll.

        Raises WorkerFailure if the worker has ended or cannot serve.
        """
        process = self.process
        assert process is not None
        port = None
        if self.ready is not None and self.ready.poll():
            try:
                report: int | str | None = self.ready.recv()
            except EOFError:
                report = None
                # Its status says more, and comes a moment later.
                process.join(timeout=1)
            self.ready.close()
            self.ready = None
            if not isinstance(report, int):
                raise WorkerFailure(
                    report or f"worker {process.pid} ended with status {process.exitcode} before it served"
                )
            self.serves = True
            port = report
        if process.exitcode is not None:
            raise WorkerFailure(f"worker {process.pid} ended with status {process.exitcode}")
        return port

    def reap(self) -> None:
        """Collect a process that has ended or is of no use, so that another can take its place."""
        if self.process is not None:
            # One that has reported why it cannot serve is about to end.
            self.process.join(timeout=1)
            self.process.kill()
            self.process.join()
            self.process.close()
        if self.ready is not None:
            self.ready.close()
        self.process = self.ready = None
        self.serves = False


def _run(parent: int, target: Callable[..., None], task: dict[str, Any]) -> None:
    """The entry of a worker process."""
    # A terminal sends Ctrl-C to all its processes; the supervisor alone says when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # A supervisor that was killed leaves no orphan; one that was killed before this line is told by the parent's id.
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0 and os.getppid() != parent:
        return
    target(**task)
