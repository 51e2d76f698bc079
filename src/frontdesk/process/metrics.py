"""Counters and gauges of the service, and the page that shows them: OpenMetrics, one page for all workers.

Workers write their numbers into files that they map into memory (prometheus_client's multi-process mode); the
supervisor reads the files when the page is requested. So a scrape costs no worker anything, and a worker's counts
outlive it.

Labels have few values, all known beforehand: methods, codes, reasons. No value of a request is a label.
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

from frontdesk.process.counts import ProcessCounts
from frontdesk.process.log import dropped

_log = structlog.get_logger("frontdesk.metrics")

PATH = "/metrics"

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAGS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LINES_DROPPED = "log_lines_dropped"
_REQUEST_SECONDS = 10.0
"""A client that connects and then sends nothing holds a thread no longer than this."""


class Files(NamedTuple):
    """Where one worker writes."""

    directory: Path
    number: int
    """The worker's place. The next process in that place continues with the same files, so its counts continue, and a
    worker that dies again and again leaves no more of them."""


class WorkerMetrics:
    """The numbers of one worker. Create one a process, and use it only from the thread of the loop.

    The environment variable PROMETHEUS_MULTIPROC_DIR must name `files.directory`: prometheus_client reads it from there
    alone.
    """

    def __init__(self, files: Files) -> None:
        values.ValueClass = values.MultiProcessValue(lambda: files.number)  # type: ignore[no-untyped-call]
        self._calls = _counter("calls", "Calls that have ended, streams included.", "method", "code")
        self._durations = Histogram(
            "frontdesk_call_duration_seconds",
            "Time from a unary call's request to its answer.",
            ["method"],
            buckets=_LATENCIES,
            registry=None,
        )
        self._refusals = _counter("refusals", "Refused calls, by the reason in their ErrorInfo.", "reason")
        self._ends = _counter(
            "streams_ended",
            "Streams that have ended. COMPLETED: at the maximum age; CANCELLED: by the watcher; others: refused.",
            "reason",
        )
        self._lag = Histogram(
            "frontdesk_watch_lag_seconds",
            "Time from a change until its watchers are told of it. The clocks of PostgreSQL and of this machine must"
            " agree.",
            buckets=_LAGS,
            registry=None,
        )
        self._in_flight = _gauge("calls_in_flight", "Unary calls in progress.")
        self._watchers = _gauge("watchers", "Open streams.")
        self._healthy = _gauge("workers_healthy", "Workers that reach a writable PostgreSQL, as in gRPC health.")
        self._backlog = _gauge("feed_backlog", "Watched doctor-days with changes that have not been read yet.")
        self._age = _gauge(
            "feed_age_seconds",
            "Time since every watched doctor-day was last read, of the slowest worker.",
            mode="livemax",
        )
        self._events_backlog = _gauge(
            "events_backlog", "Rows of the sealed log that those who watch events have not been told of yet."
        )
        self._event_lag = Histogram(
            "frontdesk_event_lag_seconds",
            "Time from a change until those who watch events are told. The clocks of PostgreSQL and this machine must"
            " agree.",
            buckets=_LAGS,
            registry=None,
        )
        connections = _gauge("pool_connections", "Database connections in the pools.", "state")
        self._used, self._idle = connections.labels("used"), connections.labels("idle")
        self._limit = _gauge("pool_limit", "Maximum of database connections in the pools.")
        self._waiting = _gauge("pool_waiting", "Calls waiting for a database connection.")
        # The pool's own counters by name, each with our counter and the divisor that gives our unit.
        self._pool_counts = {
            "requests_queued": (_counter("pool_waits", "Waits for a database connection."), 1),
            "requests_wait_ms": (_counter("pool_wait_seconds", "Time spent waiting for a database connection."), 1000),
            "requests_errors": (
                _counter("pool_timeouts", "Waits that ended without a connection: the call was UNAVAILABLE."),
                1,
            ),
        }
        self._pool_before = dict.fromkeys(self._pool_counts, 0)
        self._lines_dropped = _counter(_LINES_DROPPED, "Lines of the log that could not be written.")
        self._lines_dropped_before = 0
        self._notes_dropped = _counter(
            "audit_notes_dropped",
            "Reads and refusals that are missing in the audit: the database was away for too long.",
        )
        self._notes_dropped_before = 0
        for reason in ("COMPLETED", "CANCELLED", "DRAINING"):
            self._ends.labels(reason)
        self.clock_is_real = False
        """Whether PostgreSQL's `moment()` is the clock. If `frontdesk.now` is set, lags mean nothing."""

    def method(self, name: str, *, streams: bool) -> "MethodMetrics":
        """The counters of one method."""
        return MethodMetrics(self, name, streams=streams)

    def change_seen(self, change_micros: int) -> None:
        """Watchers are woken with a change of that time, in microseconds since 1970."""
        self._observe(self._lag, change_micros)

    def event_seen(self, change_micros: int) -> None:
        """Readers of events are woken with a change of that time, in microseconds since 1970."""
        self._observe(self._event_lag, change_micros)

    def _observe(self, lags: Histogram, change_micros: int) -> None:
        lag = time.time() - change_micros / 1_000_000
        # Negative if the clocks do not agree.
        if self.clock_is_real and lag >= 0:
            lags.observe(lag)

    def sample(
        self,
        *,
        healthy: bool,
        in_flight: int,
        watchers: int,
        backlog: int,
        age: float,
        events_backlog: int,
        notes_dropped: int,
        pool: dict[str, int],
        lines_dropped: int,
    ) -> None:
        """Write the gauges, and what others have counted since the process began.

        `pool` holds the statistics of psycopg_pool; `age` is in seconds.
        """
        self._healthy.set(healthy)
        self._in_flight.set(in_flight)
        self._watchers.set(watchers)
        self._backlog.set(backlog)
        self._age.set(age)
        self._events_backlog.set(events_backlog)
        self._used.set(pool["pool_size"] - pool["pool_available"])
        self._idle.set(pool["pool_available"])
        self._limit.set(pool["pool_max"])
        self._waiting.set(pool.get("requests_waiting", 0))
        for name, (counter, unit) in self._pool_counts.items():
            now = pool.get(name, 0)
            counter.inc((now - self._pool_before[name]) / unit)
            self._pool_before[name] = now
        self._lines_dropped.inc(lines_dropped - self._lines_dropped_before)
        self._lines_dropped_before = lines_dropped
        self._notes_dropped.inc(notes_dropped - self._notes_dropped_before)
        self._notes_dropped_before = notes_dropped


class BackgroundMetrics:
    """The numbers of the process for background work; the environment as WorkerMetrics has it."""

    def __init__(self, files: Files) -> None:
        values.ValueClass = values.MultiProcessValue(lambda: files.number)  # type: ignore[no-untyped-call]
        self._unsealed = _gauge(
            "log_unsealed_seconds",
            "Time for which a change waits to be sealed, because an older transaction is open in the database cluster.",
            mode="livemax",
        )
        self._open = _gauge(
            "transaction_open_seconds",
            "Age of the oldest transaction of the database cluster that may write, if the service's role may see it.",
            mode="livemax",
        )
        self._backlog = _gauge(
            "relay_backlog", "Events that are still to be sent to the broker, up to 10,000.", "relay", mode="livemax"
        )
        self._age = _gauge(
            "relay_age_seconds", "Time for which the oldest event waits to be sent.", "relay", mode="livemax"
        )
        self._sent = _counter("relay_sent", "Events that the broker has taken.", "relay")
        self._set_aside = _counter("relay_set_aside", "Events that the broker has refused for good.", "relay")
        self._due = _gauge(
            "notifications_due", "Notifications that wait to be sent, up to 10,000.", "channel", mode="livemax"
        )
        self._due_age = _gauge(
            "notification_age_seconds",
            "Time for which the oldest notification waits to be sent.",
            "channel",
            mode="livemax",
        )
        self._told = _counter("notifications_sent", "Notifications that were sent.", "channel")
        self._dead = _counter("notifications_dead", "Notifications that were given up.", "channel")
        self._before: dict[str, tuple[int, int]] = {}

    def sample(self, *, unsealed: float, open_transaction: float) -> None:
        """Write the gauges. Both are in seconds."""
        self._unsealed.set(unsealed)
        self._open.set(open_transaction)

    def sample_relay(self, relay: str, *, backlog: int, age: float, sent: int, set_aside: int) -> None:
        """Write a relay's numbers. `age` is in seconds; `sent` and `set_aside` are since the process began."""
        self._backlog.labels(relay).set(backlog)
        self._age.labels(relay).set(age)
        before_sent, before_set_aside = self._before.get(relay, (0, 0))
        self._before[relay] = sent, set_aside
        self._sent.labels(relay).inc(sent - before_sent)
        self._set_aside.labels(relay).inc(set_aside - before_set_aside)

    def sample_channel(self, channel: str, *, due: int, age: float, sent: int, dead: int) -> None:
        """Write a channel's numbers. `age` is in seconds; `sent` and `dead` are since the process began."""
        self._due.labels(channel).set(due)
        self._due_age.labels(channel).set(age)
        before_sent, before_dead = self._before.get(channel, (0, 0))
        self._before[channel] = sent, dead
        self._told.labels(channel).inc(sent - before_sent)
        self._dead.labels(channel).inc(dead - before_dead)


class MethodMetrics:
    """The counters of one method. Each is looked up once; after that a call costs two or three additions."""

    __slots__ = ("_codes", "_durations", "_ends", "_metrics", "_name", "_refusals", "_streams")

    def __init__(self, metrics: WorkerMetrics, name: str, *, streams: bool) -> None:
        self._name = name
        self._metrics = metrics
        # From the start, so that the first call shows as an increase.
        self._codes = {code: metrics._calls.labels(name, code) for code in ("OK", "INTERNAL")}
        self._streams = streams
        self._durations: Histogram | None = None
        self._ends: dict[str, Counter] = {}
        self._refusals: dict[str, Counter] = {}

    def ended(self, code: str, seconds: float, refusal: str, end: str) -> None:
        """A call has ended with this status; `refusal` is the reason or empty, `end` says what ended a stream."""
        try:
            self._codes[code].inc()
        except KeyError:
            self._codes[code] = found = self._metrics._calls.labels(self._name, code)
            found.inc()
        if self._streams:
            _labelled(self._ends, self._metrics._ends, end).inc()
        else:
            if self._durations is None:
                self._durations = self._metrics._durations.labels(self._name)
            self._durations.observe(seconds)
        if refusal:
            _labelled(self._refusals, self._metrics._refusals, refusal).inc()


class MetricsPage:
    """The page, served by a thread of the supervisor, and the directory of its workers' files."""

    def __init__(self, listen: str, counts: ProcessCounts) -> None:
        """Listen on `listen`, HOST:PORT; port 0 takes any free one. Raises OSError."""
        host, _, port = listen.rpartition(":")
        registry = CollectorRegistry()
        self._directory = Path(tempfile.mkdtemp(prefix="frontdesk-metrics-"))
        # Cleaners of temporary directories leave one alone that is locked.
        self._lock = os.open(self._directory, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        registry.register(_Workers(self._directory))
        registry.register(_Supervisor(counts))
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

    def worker_ended(self, number: int) -> None:
        """The worker in this place has ended: its gauges go, its counters stay."""
        mark_process_dead(number, str(self._directory))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Stop serving, and delete the directory."""
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
        # Not HTTPServer's own, which looks up the machine's name in the DNS.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # These two mean that the client has gone.
        if not isinstance(error, ConnectionError | TimeoutError):
            _log.error("metrics_failed", error=type(error).__name__)


@dataclass(frozen=True, eq=False)
class _Workers(Collector):
    """The sum of the workers' numbers, by name."""

    directory: Path

    def collect(self) -> Iterator[Metric]:
        # Without those that a worker is just creating.
        files = [str(path) for path in self.directory.glob("*.db") if _size(path)]
        merged = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
        for metric in sorted(merged, key=lambda metric: metric.name):
            # The files do not hold the unit.
            metric.unit = "seconds" if metric.name.endswith("_seconds") else ""
            if metric.name == f"frontdesk_{_LINES_DROPPED}":
                # The supervisor, whose process this is, writes the lines of all.
                metric.samples = [sample._replace(value=sample.value + dropped()) for sample in metric.samples]
            yield metric


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@dataclass(frozen=True, eq=False)
class _Supervisor(Collector):
    """The supervisor's own counts."""

    counts: ProcessCounts

    def collect(self) -> Iterator[Metric]:
        counts = self.counts
        yield InfoMetricFamily("frontdesk_build", "This release.", {"version": version("frontdesk")})
        yield GaugeMetricFamily("frontdesk_workers", "Configured workers.", counts.workers)
        yield GaugeMetricFamily("frontdesk_workers_serving", "Workers that serve.", counts.workers_serving)
        yield CounterMetricFamily(
            "frontdesk_worker_restarts",
            "Restarts of workers that had died.",
            counts.worker_restarts,
        )
        yield CounterMetricFamily(
            "frontdesk_background_restarts",
            "Restarts of the process for background work after it had died.",
            counts.background_restarts,
        )
        yield CounterMetricFamily(
            "frontdesk_postgresql_restarts",
            "Restarts of the embedded PostgreSQL after it had died.",
            counts.postgresql_restarts,
        )


def _counter(name: str, help_text: str, *labels: str) -> Counter:
    return Counter(f"frontdesk_{name}", help_text, labels, registry=None)


def _gauge(name: str, help_text: str, *labels: str, mode: Any = "livesum") -> Gauge:
    return Gauge(f"frontdesk_{name}", help_text, labels, registry=None, multiprocess_mode=mode)


def _labelled(known: dict[str, Counter], family: Counter, label: str) -> Counter:
    found = known.get(label)
    if found is None:
        found = known[label] = family.labels(label)
    return found
