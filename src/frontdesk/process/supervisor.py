"""The process of `frontdesk serve`: it runs PostgreSQL and the workers, and restarts each of them that dies.

The supervisor itself serves nothing and imports no gRPC: gRPC objects must not exist in a process that starts others.
"""

import errno
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import structlog

from frontdesk.process.children import Backoff, ChildFailure, ChildProcess, State, WorkerProcess
from frontdesk.process.claims import Claim, ClaimError, claim
from frontdesk.process.counts import ProcessCounts
from frontdesk.process.postgres import EmbeddedError, EmbeddedPostgres
from frontdesk.process.signals import Signals
from frontdesk.settings import Settings, SettingsError
from frontdesk.settings.addresses import Address

if TYPE_CHECKING:
    from frontdesk.process.metrics import MetricsPage

_POSTGRES_POLL = 0.2
_DRAIN_MARGIN = 5.0
"""Seconds that a worker gets beyond its own drain time, to close its pool and end its process."""
_BACKGROUND_PLACE = -1
"""Where the background process measures: no worker has that number."""

_log = structlog.get_logger("frontdesk.supervisor")


class StartError(Exception):
    """The service cannot start; the message is one line that tells an operator why."""


def supervise(
    settings: Settings,
    *,
    worker: Callable[..., None],
    background: Callable[..., None],
    migrate: Callable[[str], object],
    check_schema: Callable[[str], None],
    announce: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status. Call it from the main thread.

    Without `settings.database_url` it runs the embedded PostgreSQL and calls `migrate(conninfo)`; with one it calls
    `check_schema(conninfo)` and changes nothing. Either may raise SettingsError or StartError.

    `worker` is an importable function. It is called in each worker process, by keyword, with

    - `settings`; `conninfo`, a libpq string;
    - `address`, the HOST:PORT or unix:PATH to bind, and `reuse_port`, whether to bind it with SO_REUSEPORT;
    - with `settings.certificate_listen` and `settings.health_listen`, `certificate_address` and `health_address`, the
      HOST:PORT of those, to bind likewise;
    - `ready`, a Connection to send one message on: the bound port (int) once it listens, or one line (str) that says
      why it cannot;
    - `handover`, a Connection. A message on it, or its end, tells the worker to stop. On a SIGTERM without one the
      worker sends a message and goes on until it is told to stop, or gets a second SIGTERM: the supervisor starts a
      successor first, so that there is always a worker that listens;
    - with `settings.metrics_listen`, `metrics`: the frontdesk.process.metrics.Files in which it measures.

    `background` is called in one more process, unless `settings.background` is off, with `settings`, `conninfo`,
    `ready`, `handover` and `metrics`, of which it may ignore `handover`. It ends at SIGTERM, and after the workers.

    A worker that is told to stop drains within `settings.drain_seconds` and returns. SIGINT does not reach it.
    `announce` is called once all workers serve, with the line that says where.

    A first SIGTERM or SIGINT drains; a second one ends the workers at once. PostgreSQL is shut down properly in both
    cases. SIGHUP replaces all workers, one after another. The status is 0 after a signal and 1 when the service could
    not start, with one line about it on stderr. Any other exception of `migrate` or `check_schema` passes through,
    after everything has ended.
    """
    with Signals() as signals:
        supervisor = _Supervisor(settings, worker, background, signals)
        try:
            supervisor.prepare(migrate, check_schema)
            supervisor.run(announce)
        except (EmbeddedError, SettingsError, StartError) as error:
            # After a signal to stop, a failed start is not a failure.
            if not signals.stops:
                sys.stderr.write(f"frontdesk: {error}\n")
                return 1
        finally:
            supervisor.end()
    return 0


class _Supervisor:
    def __init__(
        self, settings: Settings, worker: Callable[..., None], background: Callable[..., None], signals: Signals
    ) -> None:
        self._settings = settings
        self._target = worker
        self._background_target = background
        self._background: ChildProcess | None = None
        self._background_backoff = Backoff()
        self._background_died = False
        self._signals = signals
        self._workers: list[WorkerProcess] = []
        self._worker_backoff = Backoff()
        self._deaths = 0
        """Dead workers that have not been replaced yet."""
        self._outdated: list[WorkerProcess] = []
        """Workers that SIGHUP is still to replace."""
        self._reloads = 0
        self._claim: Claim | None = None
        self._other_claims: dict[str, Claim] = {}
        """Beside `listen`, by the name of the worker's argument."""
        self._postgres: EmbeddedPostgres | None = None
        self._postgres_backoff = Backoff()
        self._postgres_started: float | None = None
        """The monotonic time of the start of the PostgreSQL that runs; None after its death."""
        self._conninfo = ""
        self._announced = False
        self._counts = ProcessCounts(settings.workers)
        self._metrics: MetricsPage | None = None

    def prepare(self, migrate: Callable[[str], object], check_schema: Callable[[str], None]) -> None:
        """Claim the port and get the database ready. Raises EmbeddedError, StartError and the two functions' errors."""
        self._claim = _claim("--listen", self._settings.address)
        for name, address in (
            ("certificate", self._settings.certificate_address),
            ("health", self._settings.health_address),
        ):
            if address is not None:
                held = _claim(f"FRONTDESK_{name.upper()}_LISTEN", address)
                self._other_claims[f"{name}_address"] = held
                _log.info(name, address=str(held.address))
        self._open_metrics()
        if self._settings.database_url is not None:
            self._conninfo = self._settings.database_url
            check_schema(self._conninfo)
            return
        # Each worker's pool, its listening connection and the like; a successor's; and a migration or an operator's
        # psql besides.
        connections = max(300, (self._settings.workers + 1) * (self._settings.pool_size + 4) + 20)
        self._postgres = EmbeddedPostgres(self._settings.embedded_dir, max_connections=connections)
        self._postgres.start(self._told_to_stop)
        self._postgres_started = time.monotonic()
        migrate(self._postgres.conninfo)
        self._conninfo = self._postgres.service_conninfo

    def run(self, announce: Callable[[str], None]) -> None:
        """Keep everything running until a signal. Raises StartError when a worker fails before all have served."""
        assert self._claim is not None
        while not self._told_to_stop():
            self._tend_postgres()
            for worker in list(self._workers):
                self._poll(worker)
            self._start_missing()
            self._replace()
            self._tend_background()
            if not self._announced and self._all_serve():
                self._announced = True
                access = self._settings.access_mode
                announce(f"frontdesk (access: {access}) serves on {self._claim.address}")
            self._wait()

    def end(self) -> None:
        """End the workers, gently at first, and then PostgreSQL."""
        # After a failed start the first signal is already an impatient one.
        patience = max(1, self._signals.stops)
        self._end_children(self._workers, patience)
        if self._background is not None:
            # After the workers, whose last changes it seals.
            self._end_children([self._background], patience)
        if self._postgres is not None:
            self._postgres.stop()
        if self._metrics is not None:
            self._metrics.close()
        for held in self._other_claims.values():
            held.close()
        if self._claim is not None:
            self._claim.close()

    def _end_children(self, children: Sequence[ChildProcess], patience: int) -> None:
        for child in children:
            child.stop(self._stop_seconds)
        while running := [child for child in children if child.process.is_alive()]:
            seconds = max(child.deadline for child in running) - time.monotonic()
            if seconds <= 0 or self._signals.stops > patience:
                for child in running:
                    self._kill(child)
                break
            self._signals.wait([child.process.sentinel for child in running], seconds)
        for child in children:
            child.reap()

    def _told_to_stop(self) -> bool:
        return self._signals.stops > 0

    @property
    def _stop_seconds(self) -> float:
        return self._settings.drain_seconds + _DRAIN_MARGIN

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
        if self._postgres_started is not None:
            self._postgres_backoff.died(self._postgres_started)
            self._postgres_started = None
            _log.error("postgresql_died")
        if time.monotonic() < self._postgres_backoff.due:
            return
        began = time.monotonic()
        try:
            postgres.start(self._told_to_stop)
        except EmbeddedError as error:
            self._postgres_backoff.died(began)
            if not self._told_to_stop():
                _log.error("postgresql_not_started", reason=str(error))
            return
        self._postgres_started = time.monotonic()
        self._counts.postgresql_restarts += 1
        _log.info("postgresql_started_again", pid=postgres.pid)

    def _tend_background(self) -> None:
        """Start the background process, and again when it has died. Raises StartError until all workers have served."""
        child = self._background
        try:
            if child is not None:
                child.poll()
                if child.state is State.STOPPING and time.monotonic() > child.deadline:
                    self._kill(child)
            elif self._settings.background == "on" and time.monotonic() >= self._background_backoff.due:
                self._start_background()
        except ChildFailure as failure:
            if not self._announced:
                raise StartError(str(failure)) from None
            if child is not None and child.state is State.STOPPING:
                _log.info("background_replaced")
            else:
                _log.error("background_died", reason=str(failure))
                self._background_backoff.died(time.monotonic() if child is None else child.started)
                self._background_died = True
            if child is not None:
                child.reap()
                self._background = None
                if self._metrics is not None:
                    self._metrics.worker_ended(_BACKGROUND_PLACE)

    def _start_background(self) -> None:
        """Raises ChildFailure."""
        task: dict[str, Any] = {"settings": self._settings, "conninfo": self._conninfo}
        if self._metrics is not None:
            task["metrics"] = self._metrics.files(_BACKGROUND_PLACE)
        child = ChildProcess("background")
        child.start(self._background_target, task)
        self._background = child
        self._counts.background_restarts += self._background_died
        self._background_died = False

    def _poll(self, worker: WorkerProcess) -> None:
        """Learn what a worker does, and reap it if it has ended. Raises StartError until all have served."""
        before = worker.state
        try:
            worker.poll()
        except ChildFailure as failure:
            if not self._announced:
                raise StartError(str(failure)) from None
            if worker.state is State.STOPPING:
                _log.info("worker_replaced", worker=worker.number)
            else:
                _log.error("worker_died", worker=worker.number, reason=str(failure))
                self._worker_backoff.died(worker.started)
                # The successor of one that leaves is not a restart.
                self._deaths += worker.state is not State.LEAVING
            self._remove(worker)
            return
        if before is State.STARTING and worker.state is not before:
            self._lead_clients_to(worker)
        elif worker.state is State.STOPPING and time.monotonic() > worker.deadline:
            self._kill(worker)
        self._counts.workers_serving = self._serving()

    def _lead_clients_to(self, worker: WorkerProcess) -> None:
        """Raises StartError until all have served."""
        assert self._claim is not None
        try:
            self._claim.worker_listens(worker.address)
        except ClaimError as error:
            if not self._announced:
                raise StartError(f"--listen {self._settings.listen}: {error}") from None
            _log.error("worker_unreachable", worker=worker.number, reason=str(error))
            self._worker_backoff.died(worker.started)
            worker.stop(self._stop_seconds)
            return
        _log.info("worker_serves", worker=worker.number, pid=worker.process.pid)

    def _start_missing(self) -> None:
        """Start the workers that are missing, and the successors of those that leave."""
        if time.monotonic() >= self._worker_backoff.due:
            for _ in range(self._missing()):
                self._start()

    def _start(self) -> None:
        """Raises StartError until all have served."""
        assert self._claim is not None
        taken = {worker.number for worker in self._workers}
        number = next(number for number in itertools.count() if number not in taken)
        worker = WorkerProcess(number, self._claim.worker_address())
        task: dict[str, Any] = {
            "settings": self._settings,
            "conninfo": self._conninfo,
            "address": str(worker.address),
            "reuse_port": not worker.address.path,
            **{name: str(held.worker_address()) for name, held in self._other_claims.items()},
        }
        if self._metrics is not None:
            task["metrics"] = self._metrics.files(number)
        try:
            worker.start(self._target, task)
        except ChildFailure as failure:
            if not self._announced:
                raise StartError(str(failure)) from None
            _log.error("worker_not_started", reason=str(failure))
            self._worker_backoff.died(worker.started)
            return
        self._workers.append(worker)
        if self._deaths:
            self._deaths -= 1
            self._counts.worker_restarts += 1

    def _replace(self) -> None:
        """Let workers go whose successors listen, and after SIGHUP let the next one leave."""
        if self._signals.reloads > self._reloads:
            self._reloads = self._signals.reloads
            self._outdated = list(self._workers)
            _log.info("reload", workers=len(self._outdated))
            if self._background is not None and self._background.state is not State.STOPPING:
                self._background.stop(self._stop_seconds)
        if self._all_serve():
            for worker in self._workers:
                if worker.state is State.LEAVING:
                    worker.stop(self._stop_seconds)
            self._counts.workers_serving = self._serving()
        # One after another: the last one has ended before the next one leaves.
        while self._outdated and all(worker.state is State.SERVING for worker in self._workers):
            worker = self._outdated.pop(0)
            if worker in self._workers:
                worker.state = State.LEAVING
                _log.info("worker_leaves", worker=worker.number)
                self._start_missing()

    def _all_serve(self) -> bool:
        """Whether as many workers as configured serve, those not counted that leave."""
        return sum(worker.state is State.SERVING for worker in self._workers) >= self._settings.workers

    def _missing(self) -> int:
        staying = sum(worker.state in (State.STARTING, State.SERVING) for worker in self._workers)
        return max(0, self._settings.workers - staying)

    def _serving(self) -> int:
        return sum(worker.state in (State.SERVING, State.LEAVING) for worker in self._workers)

    def _kill(self, child: ChildProcess) -> None:
        _log.warning("worker_killed", pid=child.process.pid)
        child.process.kill()
        child.process.join()

    def _remove(self, worker: WorkerProcess) -> None:
        worker.reap()
        self._workers.remove(worker)
        self._counts.workers_serving = self._serving()
        if self._metrics is not None:
            self._metrics.worker_ended(worker.number)

    def _wait(self) -> None:
        """Wait until there may be something to do."""
        now = time.monotonic()
        # PostgreSQL was started without multiprocessing, so its end is polled.
        dues = [] if self._postgres is None else [now + _POSTGRES_POLL]
        if self._missing():
            dues.append(self._worker_backoff.due)
        if self._background is None and self._settings.background == "on":
            dues.append(self._background_backoff.due)
        children = [*self._workers, *filter(None, [self._background])]
        dues += [child.deadline for child in children if child.state is State.STOPPING]
        others = [one for child in children for one in child.waits_on]
        self._signals.wait(others, max(0.0, min(dues) - now) if dues else None)


def _claim(setting: str, address: Address) -> Claim:
    """Raises StartError."""
    try:
        return claim(address)
    except ClaimError as error:
        raise StartError(f"{setting} {address}: {error}") from None
