"""What `frontdesk serve` runs: PostgreSQL, the workers, and whatever of them has to be started again.

The supervisor itself serves nothing and imports no gRPC: gRPC objects must not exist in a process that starts others.
"""

import ctypes
import errno
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog

from frontdesk.process.postgres import EmbeddedError, EmbeddedPostgres
from frontdesk.process.upkeep import Upkeep
from frontdesk.settings import Settings, SettingsError

if TYPE_CHECKING:
    from frontdesk.process.metrics import MetricsPage

_FIRST_DELAY, _LONGEST_DELAY = 0.1, 5.0
_LONG_LIFE = 30.0
"""A child that lived so long is started again at once; one that keeps dying waits longer each time."""
_POSTGRES_POLL = 0.2
_DRAIN_MARGIN = 5.0
"""What a worker gets beyond its own drain time, to end its pool and its process."""
_PR_SET_PDEATHSIG = 1

_log = structlog.get_logger("frontdesk.supervisor")


class StartError(Exception):
    """The service cannot start; the message is one line that tells an operator why."""


def supervise(
    settings: Settings,
    *,
    worker: Callable[..., None],
    migrate: Callable[[str], object],
    check_schema: Callable[[str], None],
    announce: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status. Call it from the main thread.

    Without `settings.database_url` it runs the embedded PostgreSQL and calls `migrate(conninfo)`; with one it calls
    `check_schema(conninfo)` and changes nothing. Either may raise SettingsError or StartError.

    `worker` is an importable function. It is called in each worker process, by keyword, with

    - `settings`; `conninfo`, a libpq string;
    - `address`, the HOST:PORT to bind, and `reuse_port`, whether to bind it with SO_REUSEPORT (only then may it be);
    - `ready`, a Connection to send one thing on: the bound port (int) once it serves, or one line (str) that says why
      it cannot;
    - with `settings.metrics_listen`, `metrics`: the frontdesk.process.metrics.Files in which it measures.

    It serves until SIGTERM, then drains within `settings.drain_seconds` and returns. SIGINT does not reach it.
    `announce` is called once, with the line that says where all workers serve.

    A first signal drains; a second one ends the workers at once. PostgreSQL is shut down properly in both cases.
    The status is 0 after a signal and 1 when the service could not start, with one line about it on stderr. Any other
    exception of `migrate` or `check_schema` passes through, after everything has ended.
    """
    with _Signals() as signals:
        supervisor = _Supervisor(settings, worker, signals)
        try:
            supervisor.prepare(migrate, check_schema)
            supervisor.run(announce)
        except (EmbeddedError, SettingsError, StartError) as error:
            # Told to stop while starting: what failed because of that is no failure.
            if not signals.count:
                sys.stderr.write(f"frontdesk: {error}\n")
                return 1
        finally:
            supervisor.end()
    return 0


class _Signals:
    """Counts SIGTERM and SIGINT, and makes `reader` readable when one arrives, so that a wait ends."""

    def __init__(self) -> None:
        self.count = 0
        self.reader, self._writer = socket.socketpair()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self.reader.setblocking(False)
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self.reader.close()
        self._writer.close()

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def wait(self, others: list[Any], seconds: float | None) -> None:
        """Wait until one of `others` is ready, a signal arrives, or `seconds` have passed."""
        if self.reader in connection.wait([self.reader, *others], seconds):
            self.reader.recv(4096)


class _Backoff:
    """When a child that died is started again: after 0.1 s, doubling to 5 s, and anew once it has lived for 30 s."""

    def __init__(self) -> None:
        self._delay = _FIRST_DELAY
        self._started = 0.0
        self.due = 0.0

    def started(self) -> None:
        self._started = time.monotonic()

    def died(self) -> None:
        now = time.monotonic()
        if now - self._started >= _LONG_LIFE:
            self._delay = _FIRST_DELAY
        self.due = now + self._delay
        self._delay = min(2 * self._delay, _LONGEST_DELAY)


class _Worker:
    """One place for a worker process, and the process in it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: SpawnProcess | None = None
        self.ready: Connection | None = None
        self.serves = False
        self.again = _Backoff()


class _Supervisor:
    def __init__(self, settings: Settings, worker: Callable[..., None], signals: _Signals) -> None:
        self._settings = settings
        self._target = worker
        self._signals = signals
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._reuse_port = settings.workers > 1
        self._host = settings.listen.rpartition(":")[0]
        self._port = settings.port
        self._claims: list[socket.socket] = []
        self._postgres: EmbeddedPostgres | None = None
        self._postgres_again = _Backoff()
        self._postgres_was_alive = False
        self._conninfo = ""
        self._announced = False
        self._upkeep = Upkeep(settings.workers)
        self._metrics: MetricsPage | None = None

    def prepare(self, migrate: Callable[[str], object], check_schema: Callable[[str], None]) -> None:
        """Have a port and a database to serve. Raises StartError, EmbeddedError and what the two functions raise."""
        self._claim_port()
        self._open_metrics()
        if self._settings.database_url is not None:
            self._conninfo = self._settings.database_url
            check_schema(self._conninfo)
            return
        # Each worker's pool, its listening connection and the like, and a migration or an operator's psql besides.
        connections = max(300, self._settings.workers * (self._settings.pool_size + 4) + 20)
        self._postgres = EmbeddedPostgres(self._settings.data_dir, max_connections=connections)
        self._postgres.start(self._told_to_stop)
        self._postgres_was_alive = True
        self._postgres_again.started()
        self._conninfo = self._postgres.conninfo
        migrate(self._conninfo)

    def run(self, announce: Callable[[str], None]) -> None:
        """Keep everything running until a signal. Raises StartError when a worker fails before all have served."""
        while not self._told_to_stop():
            self._tend_postgres()
            for worker in self._workers:
                self._tend(worker)
            if not self._announced and all(worker.serves for worker in self._workers):
                self._announced = True
                announce(f"frontdesk serves on {self._host}:{self._port}")
            self._wait()

    def end(self) -> None:
        """End the workers, at first gently, and then PostgreSQL."""
        # After a failed start the first signal is already an impatient one.
        patience = max(1, self._signals.count)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + _DRAIN_MARGIN
        while running := [w.process for w in self._workers if w.process is not None and w.process.is_alive()]:
            seconds = deadline - time.monotonic()
            if seconds <= 0 or self._signals.count > patience:
                for process in running:
                    _log.warning("worker_killed", pid=process.pid)
                    process.kill()
                    process.join()
                break
            self._signals.wait([process.sentinel for process in running], seconds)
        if self._postgres is not None:
            self._postgres.stop()
        if self._metrics is not None:
            self._metrics.close()
        self._release_port()

    def _told_to_stop(self) -> bool:
        return self._signals.count > 0

    def _claim_port(self) -> None:
        """See that nobody serves our address, and for several workers hold it, so that nobody else gets it.

        SO_REUSEPORT alone would let a second service of this user share the port and take half of the calls. Raises
        StartError.
        """
        # A single worker finds a free port by itself and reports it.
        if self._port == 0 and not self._reuse_port:
            return
        # Localhost may be two addresses: then the free port of the first must happen to be free on the second.
        for attempt in range(1 if self._port else 20):
            try:
                self._claims = _claim(self._settings.host, self._port)
            except OSError as error:
                if error.errno == errno.EADDRINUSE and self._port == 0 and attempt < 19:
                    continue
                reason = "in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
                raise StartError(f"--listen {self._settings.listen}: {reason}") from None
            break
        self._port = self._claims[0].getsockname()[1]
        if not self._reuse_port:
            # The worker binds it, alone.
            self._release_port()

    def _open_metrics(self) -> None:
        """Raises StartError."""
        listen = self._settings.metrics_listen
        if listen is None:
            return
        # Only here, since it takes its time.
        from frontdesk.process.metrics import MetricsPage

        try:
            self._metrics = MetricsPage(listen, self._upkeep)
        except OSError as error:
            reason = "in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
            raise StartError(f"FRONTDESK_METRICS_LISTEN {listen}: {reason}") from None
        _log.info("metrics", url=self._metrics.url)

    def _release_port(self) -> None:
        for claim in self._claims:
            claim.close()
        self._claims = []

    def _tend_postgres(self) -> None:
        """Start PostgreSQL again when it has died. The workers answer UNAVAILABLE meanwhile."""
        postgres = self._postgres
        if postgres is None or postgres.alive:
            return
        if self._postgres_was_alive:
            self._postgres_was_alive = False
            self._postgres_again.died()
            _log.error("postgresql_died")
        if time.monotonic() < self._postgres_again.due:
            return
        try:
            postgres.start(self._told_to_stop)
        except EmbeddedError as error:
            self._postgres_again.died()
            if not self._told_to_stop():
                _log.error("postgresql_not_started", reason=str(error))
            return
        self._postgres_was_alive = True
        self._postgres_again.started()
        self._upkeep.postgresql_restarts += 1
        _log.info("postgresql_started_again", pid=postgres.pid)

    def _tend(self, worker: _Worker) -> None:
        """Start, hear or bury the worker, whichever is due. Raises StartError until all have served."""
        if worker.process is None:
            if time.monotonic() < worker.again.due:
                return
            failure = self._start(worker)
        else:
            failure = self._hear(worker)
        if failure is None:
            return
        if not self._announced:
            raise StartError(failure)
        _log.error("worker_died", worker=worker.number, reason=failure)
        self._bury(worker)
        worker.again.died()

    def _start(self, worker: _Worker) -> str | None:
        """Start the worker's process; returns why it cannot, or None."""
        spawn = multiprocessing.get_context("spawn")
        worker.ready, theirs = spawn.Pipe(duplex=False)
        task = {
            "settings": self._settings,
            "conninfo": self._conninfo,
            "address": f"{self._host}:{self._port}",
            "reuse_port": self._reuse_port,
            "ready": theirs,
        }
        if self._metrics is not None:
            task["metrics"] = self._metrics.files(worker.number)
        process = spawn.Process(target=_run_worker, args=(os.getpid(), self._target, task))
        # A Ctrl-C must not hit a worker that is not yet able to ignore it, so it is started with SIGINT blocked. The
        # tracker that multiprocessing starts with the first process unblocks it, so that goes before.
        resource_tracker.ensure_running()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        except OSError as error:
            return f"a worker cannot be started: {error.strerror}"
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            # Only the worker holds it now, so that its end is seen.
            theirs.close()
        worker.process = process
        worker.again.started()
        if self._announced:
            self._upkeep.worker_restarts += 1
        return None

    def _hear(self, worker: _Worker) -> str | None:
        """Take what the worker reports; returns why it is of no use any more, or None."""
        process = worker.process
        assert process is not None
        if worker.ready is not None and worker.ready.poll():
            try:
                said: int | str | None = worker.ready.recv()
            except EOFError:
                said = None
                # Its status says more, and comes a moment later.
                process.join(timeout=1)
            worker.ready.close()
            worker.ready = None
            if isinstance(said, int):
                worker.serves = True
                self._upkeep.workers_serving += 1
                self._port = said
                _log.info("worker_serves", worker=worker.number, pid=process.pid)
            else:
                return said or f"worker {process.pid} ended with status {process.exitcode} before it served"
        if process.exitcode is not None:
            return f"worker {process.pid} ended with status {process.exitcode}"
        return None

    def _bury(self, worker: _Worker) -> None:
        if worker.process is not None:
            # One that has said why it cannot serve is about to end.
            worker.process.join(timeout=1)
            worker.process.kill()
            worker.process.join()
            worker.process.close()
        if worker.ready is not None:
            worker.ready.close()
        worker.process = worker.ready = None
        self._upkeep.workers_serving -= worker.serves
        worker.serves = False
        if self._metrics is not None:
            self._metrics.buried(worker.number)

    def _wait(self) -> None:
        """Wait until there may be something to do."""
        now = time.monotonic()
        # PostgreSQL was started without multiprocessing, so its end has to be looked for.
        dues = [] if self._postgres is None else [now + _POSTGRES_POLL]
        children: list[Connection | int] = []
        for worker in self._workers:
            if worker.process is None:
                dues.append(worker.again.due)
                continue
            children.append(worker.process.sentinel)
            if worker.ready is not None:
                children.append(worker.ready)
        self._signals.wait(children, max(0.0, min(dues) - now) if dues else None)


def _claim(host: str, port: int) -> list[socket.socket]:
    """Sockets that are bound to each address of `host` and do not listen. Only SO_REUSEPORT may bind there as well.

    Raises OSError, with EADDRINUSE when another process serves there or has claimed it.
    """
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
                # Perhaps only by closed connections, which this disregards. It would disregard another claim as
                # well, had that the option set, so it is the second choice and taken back.
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


def _run_worker(parent: int, target: Callable[..., None], task: dict[str, Any]) -> None:
    """What a worker process runs first."""
    # A terminal sends Ctrl-C to all its processes; the supervisor alone says when a worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    # A supervisor that was killed leaves no orphan; one that was killed before this line is told by the parent's id.
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0 and os.getppid() != parent:
        return
    target(**task)
