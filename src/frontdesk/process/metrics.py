"""What the service counts and measures, and the page where it is read: OpenMetrics, one page for all workers.

Workers write their numbers into files that they map into memory, prometheus_client's multi-process mode; the supervisor
reads the files when it is asked for the page. So a scrape costs no worker anything, and what a worker has counted
outlives it.

Labels have few values, all known beforehand: methods, codes, reasons. Nothing of a request is one.
"""

import fcntl
import os
import shutil
import socket
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values
from prometheus_client.exposition import MetricsHandler
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from frontdesk.process.upkeep import Upkeep

_log = structlog.get_logger("frontdesk.metrics")

PATH = "/metrics"

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAGS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_SECONDS = 10.0
"""Who asks for the page and then sends nothing does not hold a thread for longer."""


class Files(NamedTuple):
    """Where one worker writes."""

    directory: Path
    number: int
    """Its place among the workers. The next process in that place goes on with the files, so a worker that dies again
    and again leaves no more of them, and its counts continue."""


class WorkerMetrics:
    """What a worker measures. One a process, and only from the thread of the loop.

    The environment variable PROMETHEUS_MULTIPROC_DIR must name `files.directory`: prometheus_client takes it from there
    alone.
    """

    def __init__(self, files: Files) -> None:
        values.ValueClass = values.MultiProcessValue(lambda: files.number)  # type: ignore[no-untyped-call]
        self._calls = _counter("calls", "Calls that have ended, streams included.", "method", "code")
        self._durations = Histogram(
            "frontdesk_call_duration_seconds",
            "From a unary call's message to its answer.",
            ["method"],
            buckets=_LATENCIES,
            registry=None,
        )
        self._refusals = _counter("refusals", "Calls that were refused, by the reason in their ErrorInfo.", "reason")
        self._ends = _counter(
            "streams_ended",
            "Streams that have ended. COMPLETED: of age; CANCELLED: by the watcher; others: refused.",
            "reason",
        )
        self._lag = Histogram(
            "frontdesk_watch_lag_seconds",
            "From the time of a change to when its watchers are woken with it. The clocks of PostgreSQL and of this"
            " machine must agree.",
            buckets=_LAGS,
            registry=None,
        )
        self._in_flight = _gauge("calls_in_flight", "Unary calls that are worked on.")
        self._watchers = _gauge("watchers", "Open streams.")
        self._healthy = _gauge("workers_healthy", "Workers that reach a writable PostgreSQL, as health says.")
        self._backlog = _gauge("feed_backlog", "Watched doctor-days with news that have not yet been read.")
        self._age = _gauge(
            "feed_age_seconds",
            "Since all watched doctor-days were last seen as they are, of the worker where that is longest.",
            mode="livemax",
        )
        connections = _gauge("pool_connections", "Database connections of the pools.", "state")
        self._used, self._idle = connections.labels("used"), connections.labels("idle")
        self._limit = _gauge("pool_limit", "Database connections that the pools may have.")
        self._waiting = _gauge("pool_waiting", "Calls that wait for a database connection.")
        # What the pool itself has counted since it was made, by the name that it gives it, and our unit of that.
        self._pool_counts = {
            "requests_queued": (_counter("pool_waits", "Times that a database connection was waited for."), 1),
            "requests_wait_ms": (_counter("pool_wait_seconds", "Time spent in such waits."), 1000),
            "requests_errors": (_counter("pool_timeouts", "Such waits in vain: the call was UNAVAILABLE."), 1),
        }
        self._pool_before = dict.fromkeys(self._pool_counts, 0)
        for reason in ("COMPLETED", "CANCELLED", "DRAINING"):
            self._ends.labels(reason)
        self.clock_is_real = False
        """Whether PostgreSQL's `moment()` is the clock; lags are of no use where it has been set."""

    def method(self, name: str, *, streams: bool) -> "MethodMetrics":
        """The counters of one method."""
        return MethodMetrics(self, name, streams=streams)

    def change_seen(self, change_micros: int) -> None:
        """Watchers are woken with a change of that time, in microseconds since 1970."""
        lag = time.time() - change_micros / 1_000_000
        # Less than nothing where the clocks do not agree.
        if self.clock_is_real and lag >= 0:
            self._lag.observe(lag)

    def sample(
        self, *, healthy: bool, in_flight: int, watchers: int, backlog: int, age: float, pool: dict[str, int]
    ) -> None:
        """Write the gauges. `pool` is what psycopg_pool says of itself, `age` is in seconds."""
        self._healthy.set(healthy)
        self._in_flight.set(in_flight)
        self._watchers.set(watchers)
        self._backlog.set(backlog)
        self._age.set(age)
        self._used.set(pool["pool_size"] - pool["pool_available"])
        self._idle.set(pool["pool_available"])
        self._limit.set(pool["pool_max"])
        self._waiting.set(pool.get("requests_waiting", 0))
        for name, (counter, unit) in self._pool_counts.items():
            now = pool.get(name, 0)
            counter.inc((now - self._pool_before[name]) / unit)
            self._pool_before[name] = now


class MethodMetrics:
    """The counters of one method. Each is looked for once; after that a call pays two or three additions."""

    __slots__ = ("_codes", "_durations", "_ends", "_metrics", "_name", "_refusals", "_streams")

    def __init__(self, metrics: WorkerMetrics, name: str, *, streams: bool) -> None:
        self._name = name
        self._metrics = metrics
        # From the beginning, so that the first one is seen to be one more.
        self._codes = {code: metrics._calls.labels(name, code) for code in ("OK", "INTERNAL")}
        self._streams = streams
        self._durations: Histogram | None = None
        self._ends: dict[str, Counter] = {}
        self._refusals: dict[str, Counter] = {}

    def ended(self, code: str, seconds: float, refusal: str, end: str) -> None:
        """A call has ended with this status; `refusal` is the reason, or empty, `end` what ended it if a stream."""
        try:
            self._codes[code].inc()
        except KeyError:
            self._codes[code] = found = self._metrics._calls.labels(self._name, code)
            found.inc()
        if self._streams:
            _kept(self._ends, self._metrics._ends, end).inc()
        else:
            if self._durations is None:
                self._durations = self._metrics._durations.labels(self._name)
            self._durations.observe(seconds)
        if refusal:
            _kept(self._refusals, self._metrics._refusals, refusal).inc()


class MetricsPage:
    """The page, served by a thread of the supervisor, and the directory of its workers' files."""

    def __init__(self, listen: str, upkeep: Upkeep) -> None:
        """Listen on `listen`, HOST:PORT; port 0 takes any free one. Raises OSError."""
        host, _, port = listen.rpartition(":")
        registry = CollectorRegistry()
        self._directory = Path(tempfile.mkdtemp(prefix="frontdesk-metrics-"))
        # What clears temporary directories of what looks old keeps away from one that is locked.
        self._lock = os.open(self._directory, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        registry.register(_Workers(self._directory))
        registry.register(_Supervisor(upkeep))
        try:
            self._server = _Server(host.strip("[]"), int(port), registry)
        except OSError:
            self._remove()
            raise
        self.url = f"http://{host}:{self._server.server_port}{PATH}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="metrics", daemon=True)
        self._thread.start()

    def files(self, number: int) -> Files:
        """Where the worker in this place writes."""
        return Files(self._directory, number)

    def buried(self, number: int) -> None:
        """The worker in this place is dead: its gauges go, its counters stay."""
        mark_process_dead(number, str(self._directory))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stop serving, and remove the directory."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._remove()

    def _remove(self) -> None:
        os.close(self._lock)
        shutil.rmtree(self._directory, ignore_errors=True)


class _Handler(MetricsHandler):
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        if urlsplit(self.path).path != PATH:
            self.send_error(404)
            return
        # OpenMetrics, unless the older form is asked for by name.
        if "text/plain" not in self.headers.get("Accept", ""):
            del self.headers["Accept"]
            self.headers["Accept"] = "application/openmetrics-text; version=1.0.0"
        super().do_GET()


class _Server(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        self.address_family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        super().__init__((str(address[0]), port), _Handler.factory(registry))

    def server_bind(self) -> None:
        # Not that of HTTPServer, which looks for the machine's name in the DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # The others are of one who asked and has gone.
        if not isinstance(error, ConnectionError | TimeoutError):
            _log.error("metrics_failed", error=type(error).__name__)


@dataclass(frozen=True, eq=False)
class _Workers(Collector):
    """The sum of what the workers have written, by name."""

    directory: Path

    def collect(self) -> Iterator[Metric]:
        # Without those that a worker is just making.
        files = [str(path) for path in self.directory.glob("*.db") if _size(path)]
        merged = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        for metric in sorted(merged, key=lambda metric: metric.name):
            # The files do not say it.
            metric.unit = "seconds" if metric.name.endswith("_seconds") else ""
            yield metric


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, eq=False)
class _Supervisor(Collector):
    """What the supervisor knows."""

    upkeep: Upkeep

    def collect(self) -> Iterator[Metric]:
        upkeep = self.upkeep
        yield InfoMetricFamily("frontdesk_build", "This release.", {"version": version("frontdesk")})
        yield GaugeMetricFamily("frontdesk_workers", "Workers that there shall be.", upkeep.workers)
        yield GaugeMetricFamily("frontdesk_workers_serving", "Workers that serve the port.", upkeep.workers_serving)
        yield CounterMetricFamily(
            "frontdesk_worker_restarts",
            "Workers that were started again after another's death.",
            upkeep.worker_restarts,
        )
        yield CounterMetricFamily(
            "frontdesk_postgresql_restarts",
            "Times that the embedded PostgreSQL was started again after its death.",
            upkeep.postgresql_restarts,
        )


def _counter(name: str, help_text: str, *labels: str) -> Counter:
    return Counter(f"frontdesk_{name}", help_text, labels, registry=None)


def _gauge(name: str, help_text: str, *labels: str, mode: Any = "livesum") -> Gauge:
    return Gauge(f"frontdesk_{name}", help_text, labels, registry=None, multiprocess_mode=mode)


def _kept(known: dict[str, Counter], family: Counter, label: str) -> Counter:
    found = known.get(label)
    if found is None:
        found = known[label] = family.labels(label)
    return found
