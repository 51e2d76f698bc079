"""The process of `frontdesk serve`: it runs PostgreSQL and the workers, and restarts each of them that dies.

The supervisor itself serves nothing and imports no gRPC: gRPC objects must not exist in a process that starts others.
"""

import errno
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import structlog

from frontdesk.process.children import Backoff, WorkerFailure, WorkerPlace
from frontdesk.process.counts import ProcessCounts
from frontdesk.process.ports import ClaimError, claim
from frontdesk.process.postgres import EmbeddedError, EmbeddedPostgres
from frontdesk.process.signals import StopSignals
from frontdesk.settings import Settings, SettingsError

if TYPE_CHECKING:
    from frontdesk.process.metrics import MetricsPage

_POSTGRES_POLL = 0.2
_DRAIN_MARGIN = 5.0
"""Seconds that a worker gets beyond its own drain time, to close its pool and end its process."""

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
    - `ready`, a Connection to send one message on: the bound port (int) once it serves, or one line (str) that says why
      it cannot;
    - with `settings.metrics_listen`, `metrics`: the frontdesk.process.metrics.Files in which it measures.

    It serves until SIGTERM, then drains within `settings.drain_seconds` and returns. SIGINT does not reach it.
    `announce` is called once all workers serve, with the line that says where.

    A first signal drains; a second one ends the workers at once. PostgreSQL is shut down properly in both cases.
    The status is 0 after a signal and 1 when the service could not start, with one line about it on stderr. Any other
    exception of `migrate` or `check_schema` passes through, after everything has ended.
    """
    with StopSignals() as signals:
        supervisor = _Supervisor(settings, worker, signals)
        try:
            supervisor.prepare(migrate, check_schema)
            supervisor.run(announce)
        except (EmbeddedError, SettingsError, StartError) as error:
            # After a signal to stop, a failed start is not a failure.
            if not signals.count:
                sys.stderr.write(f"frontdesk: {error}\n")
                return 1
        finally:
            supervisor.end()
    return 0


class _Supervisor:
    def __init__(self, settings: Settings, worker: Callable[..., None], signals: StopSignals) -> None:
        self._settings = settings
        self._target = worker
        self._signals = signals
        self._places = [WorkerPlace(number) for number in range(settings.workers)]
        self._reuse_port = settings.workers > 1
        self._host = settings.listen.rpartition(":")[0]
        self._port = settings.port
        self._claims: list[socket.socket] = []
        self._postgres: EmbeddedPostgres | None = None
        self._postgres_backoff = Backoff()
        self._postgres_was_alive = False
        self._conninfo = ""
        self._announced = False
        self._counts = ProcessCounts(settings.workers)
        self._metrics: MetricsPage | None = None

    def prepare(self, migrate: Callable[[str], object], check_schema: Callable[[str], None]) -> None:
        """Claim the port and get the database ready. Raises EmbeddedError, StartError and the two functions' errors."""
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
        self._postgres_backoff.started()
        self._conninfo = self._postgres.conninfo
        migrate(self._conninfo)

    def run(self, announce: Callable[[str], None]) -> None:
        """Keep everything running until a signal. Raises StartError when a worker fails before all have served."""
        while not self._told_to_stop():
            self._tend_postgres()
            for place in self._places:
                self._tend(place)
            if not self._announced and all(place.serves for place in self._places):
                self._announced = True
                announce(f"frontdesk serves on {self._host}:{self._port}")
            self._wait()

    def end(self) -> None:
        """End the workers, gently at first, and then PostgreSQL."""
        # After a failed start the first signal is already an impatient one.
        patience = max(1, self._signals.count)
        for place in self._places:
            if place.process is not None:
                place.process.terminate()
        deadline = time.monotonic() + self._settings.drain_seconds + _DRAIN_MARGIN
        while running := [w.process for w in self._places if w.process is not None and w.process.is_alive()]:
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
        """Check that no other process serves our address; with several workers, hold it. Raises StartError."""
        # A single worker finds a free port by itself and reports it.
        if self._port == 0 and not self._reuse_port:
            return
        try:
            self._claims = claim(self._settings.host, self._port)
        except ClaimError as error:
            raise StartError(f"--listen {self._settings.listen}: {error}") from None
        self._port = self._claims[0].getsockname()[1]
        if not self._reuse_port:
            # The worker binds it, alone.
            self._release_port()

    def _release_port(self) -> None:
        for held in self._claims:
            held.close()
        self._claims = []

    def _open_metrics(self) -> None:
        """Raises StartError."""
        listen = self._settings.metrics_listen
        if listen is None:
            return
        # Imported here, because that takes time.
        from frontdesk.process.metrics import MetricsPage

        try:
            self._metrics = MetricsPage(listen, self._counts)
        except OSError as error:
            reason = "in use by another process" if error.errno == errno.EADDRINUSE else error.strerror
            raise StartError(f"FRONTDESK_METRICS_LISTEN {listen}: {reason}") from None
        _log.info("metrics", url=self._metrics.url)

    def _tend_postgres(self) -> None:
        """Restart PostgreSQL if it has died. The workers answer UNAVAILABLE meanwhile."""
        postgres = self._postgres
        if postgres is None or postgres.alive:
            return
        if self._postgres_was_alive:
            self._postgres_was_alive = False
            self._postgres_backoff.died()
            _log.error("postgresql_died")
        if time.monotonic() < self._postgres_backoff.due:
            return
        try:
            postgres.start(self._told_to_stop)
        except EmbeddedError as error:
            self._postgres_backoff.died()
            if not self._told_to_stop():
                _log.error("postgresql_not_started", reason=str(error))
            return
        self._postgres_was_alive = True
        self._postgres_backoff.started()
        self._counts.postgresql_restarts += 1
        _log.info("postgresql_started_again", pid=postgres.pid)

    def _tend(self, place: WorkerPlace) -> None:
        """Start, poll or reap the worker, as is due. Raises StartError until all have served."""
        try:
            if place.process is None:
                if time.monotonic() >= place.backoff.due:
                    self._start(place)
            elif (port := place.poll()) is not None:
                self._port = port
                self._counts.workers_serving += 1
                _log.info("worker_serves", worker=place.number, pid=place.process.pid)
        except WorkerFailure as failure:
            if not self._announced:
                raise StartError(str(failure)) from None
            _log.error("worker_died", worker=place.number, reason=str(failure))
            self._reap(place)

    def _start(self, place: WorkerPlace) -> None:
        """Raises WorkerFailure."""
        task: dict[str, Any] = {
            "settings": self._settings,
            "conninfo": self._conninfo,
            "address": f"{self._host}:{self._port}",
            "reuse_port": self._reuse_port,
        }
        if self._metrics is not None:
            task["metrics"] = self._metrics.files(place.number)
        place.start(self._target, task)
        if self._announced:
            self._counts.worker_restarts += 1

    def _reap(self, place: WorkerPlace) -> None:
        self._counts.workers_serving -= place.serves
        place.reap()
        if self._metrics is not None:
            self._metrics.worker_ended(place.number)
        place.backoff.died()

    def _wait(self) -> None:
        """Wait until there may be something to do."""
        now = time.monotonic()
        # PostgreSQL was started without multiprocessing, so its end is polled.
        dues = [] if self._postgres is None else [now + _POSTGRES_POLL]
        children: list[Any] = []
        for place in self._places:
            if place.process is None:
                dues.append(place.backoff.due)
                continue
            children.append(place.process.sentinel)
            if place.ready is not None:
                children.append(place.ready)
        self._signals.wait(children, max(0.0, min(dues) - now) if dues else None)
