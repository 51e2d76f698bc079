"""Many at once: several workers, ten thousand idle watchers, and a crowd at one doctor-day."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psycopg
from google.protobuf.message import Message

from benchmarks import people, sizes
from benchmarks.bulk import Past
from benchmarks.calls import Kind, Spent, percentiles, spend
from benchmarks.load import Watched, unary_client, watch_client
from benchmarks.people import DOCTOR, PATIENT, TO_CHECK_IN, make_id
from benchmarks.stage import Child, Meter, Stage, WholeService, cpu_seconds, memory
from clinic.frontdesk.v1 import appointment_pb2

IN_FLIGHT = 64
CONNECTIONS = 32
"""The kernel spreads connections over the workers, so a few connections would reach only some of them."""
WORKERS = (1, 2, 4)
WAITING = 8
"""Waiting patients in each watched queue, so that a message has a usual size."""
PLACES = 1_000
TOO_MANY = 40
"""Callers at the crowded doctor-day after its last place is gone."""
_WATCHED = 2_000
_WATCH_CLIENTS = 4
_CATCH_UP_SECONDS = 60.0
_BOOK = "/clinic.frontdesk.v1.AppointmentService/BookAppointment"


def workers(stage: Stage, *, rows: int, calls: int, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Book on many doctor-days among `rows` appointments. Services with few and with many workers take turns."""
    warmup = calls // 4
    conninfo, day = sizes.opened(stage, rows, progress)
    found: dict[int, list[Spent]] = {count: [] for count in WORKERS}
    shares: dict[int, list[float]] = {}
    with ExitStack() as stack, psycopg.connect(conninfo, autocommit=True) as connection:
        clients = [stack.enter_context(Child(unary_client)) for _ in range(2)]
        requests = sizes.bookings(connection, Past(rows), day, len(WORKERS) * (warmup + rounds * calls))
        services: dict[int, tuple[Kind, WholeService]] = {}
        for n, count in enumerate(WORKERS):
            service = WholeService(count, database_url=conninfo)
            port = _port(stack.enter_context(service))
            mine = requests[n :: len(WORKERS)]
            services[count] = Kind(f"{count} workers", service, port, _BOOK, mine.__getitem__), service
        for kind, _ in services.values():
            progress(f"warm up {kind.name}")
            spend(stage, clients, kind, warmup, IN_FLIGHT, connections=CONNECTIONS)
        for turn in range(rounds):
            for count, (kind, service) in services.items():
                progress(f"{kind.name}, {turn + 1} of {rounds}")
                before = [cpu_seconds(pid) for pid in service.workers]
                found[count].append(spend(stage, clients, kind, calls, IN_FLIGHT, connections=CONNECTIONS))
                now = [cpu_seconds(pid) for pid in service.workers]
                mine_now = shares.setdefault(count, [0.0] * count)
                shares[count] = [was + end - start for was, start, end in zip(mine_now, before, now, strict=True)]
    return {
        "rows": rows,
        "in_flight": IN_FLIGHT,
        "costs": [_summary(of) | {"workers": count, "worker_seconds": shares[count]} for count, of in found.items()],
    }


def hot(stage: Stage, *, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Sell all places of one doctor-day to a larger crowd, and as many places of a thousand doctor-days."""
    zone = people.noon_zone()
    day = people.today(zone) + timedelta(5)
    calls = PLACES + TOO_MANY
    doctors = rounds + 1 + PLACES
    conninfo = stage.database("hot")
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, doctors, (rounds + 1) * calls)
    people.settle(conninfo)

    def book(patient: int, doctor: int) -> Message:
        return appointment_pb2.BookAppointmentRequest(
            patient_id=make_id(PATIENT, patient), idempotency_key=f"{doctor}-{patient}",
            doctor_day=appointment_pb2.DoctorDay(doctor_id=make_id(DOCTOR, doctor), date=sizes.wire(day)),
        )  # fmt: skip

    with ExitStack() as stack:
        client = stack.enter_context(Child(unary_client))
        server = stack.enter_context(stage.serve(conninfo))
        one = Kind("one doctor-day", server, server.port, _BOOK, lambda n: book(n, n // calls))
        many = Kind("1,000 doctor-days", server, server.port, _BOOK, lambda n: book(n, rounds + 1 + n % PLACES))
        found: dict[str, list[Spent]] = {one.name: [], many.name: []}
        for turn in range(rounds + 1):
            for kind in (one, many):
                progress(f"{kind.name}, {turn} of {rounds}")
                spent = spend(stage, [client], kind, calls, IN_FLIGHT)
                # The first round prepares plans and opens connections.
                if turn:
                    found[kind.name].append(spent)
    with psycopg.connect(conninfo) as connection:
        wrong = connection.execute(
            "select doctor_id::text, count(*), count(distinct number), min(number), max(number) from appointment"
            " where doctor_id = any(%s) and state = 'BOOKED' group by doctor_id"
            " having (count(*), count(distinct number), min(number), max(number)) <> (%s, %s, 1, %s)",
            ([make_id(DOCTOR, n) for n in range(rounds + 1)], PLACES, PLACES, PLACES),
        ).fetchall()
        sold = connection.execute(
            "select count(*) from appointment where doctor_id = any(%s)",
            ([make_id(DOCTOR, n) for n in range(rounds + 1)],),
        ).fetchone() or [0]
    stage.drop("hot")
    return {
        "places": PLACES,
        "too_many": TOO_MANY,
        "in_flight": IN_FLIGHT,
        "rounds": rounds,
        "sold": sold[0],
        "wrong": wrong,
        "costs": [_summary(of) | {"name": name} for name, of in found.items()],
    }


@dataclass(frozen=True)
class Crowd:
    """A number of watchers, and the number of streams on each connection."""

    watchers: int
    streams_a_connection: int


@dataclass
class Burst:
    """A number of changes at once, each on its own doctor-day, and their receipt by the watchers."""

    changes: int
    booking_seconds: float
    """Time until all changes were acknowledged."""
    seconds: float
    """Time until every watcher had its changes, to half a second."""
    server_seconds: float
    """CPU of the workers in that time."""
    postgres_seconds: float
    receipts: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    missed: int
    """Changes that a watcher did not get; 0 unless something is wrong."""
    refused: dict[str, int]


@dataclass
class Idle:
    """The cost of a crowd of watchers while nothing changes, and then of bursts of changes."""

    watchers: int
    connections: int
    doctor_days: int
    workers: int
    open_seconds: float
    """Time until every watcher had its first message."""
    rss_kib: float
    """Memory of the workers per stream, with its share of a connection."""
    pss_kib: float
    worker_mib: list[float]
    client_mib: float
    server_cores: float
    """With heartbeats, every 15 s, the default of the service."""
    postgres_cores: float
    client_cores: float
    files: list[int]
    """Open files of each worker."""
    file_limit: int
    bursts: list[Burst]
    ended: int
    """Streams that ended; 0 unless something is wrong."""


def watchers(
    stage: Stage, *, crowds: Sequence[Crowd], seconds: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Let each crowd watch two thousand doctor-days through two workers: idle for `seconds`, then with two bursts."""
    zone = people.noon_zone()
    day = people.today(zone)
    conninfo = stage.database("crowd")
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, _WATCHED, _WATCHED * (WAITING + len(crowds)))
        people.booked(connection, TO_CHECK_IN, _WATCHED * WAITING, _WATCHED, day, checked_in=True)
    people.settle(conninfo)
    seen = []
    for n, crowd in enumerate(crowds):
        first = _WATCHED * (WAITING + n)
        seen.append(asdict(_watch(stage, conninfo, crowd, day, first, seconds, progress)))
    stage.drop("crowd")
    return {"crowds": seen}


def _watch(
    stage: Stage, conninfo: str, crowd: Crowd, day: date, first: int, seconds: float, progress: Callable[[str], None]
) -> Idle:
    count = crowd.watchers
    progress(f"{count:,} watchers, {crowd.streams_a_connection} on a connection")
    with ExitStack() as stack:
        service = WholeService(2, database_url=conninfo)
        port = _port(stack.enter_context(service))
        clients = [stack.enter_context(Child(watch_client)) for _ in range(_WATCH_CLIENTS)]
        desk = stack.enter_context(Child(unary_client))
        # The first streams load code, which is not the cost of a stream. Their doctor-day is not part of a burst.
        _ask_all(clients, [("open", port, [(make_id(DOCTOR, 0), day)] * 8, 1)] * _WATCH_CLIENTS)
        time.sleep(2.0)
        before = [memory(pid) for pid in service.workers]
        started = time.perf_counter()
        watched = [(make_id(DOCTOR, n % _WATCHED), day) for n in range(count)]
        _ask_all(
            clients,
            [("open", port, watched[n::_WATCH_CLIENTS], crowd.streams_a_connection, 15) for n in range(_WATCH_CLIENTS)],
        )
        open_seconds = time.perf_counter() - started
        time.sleep(2.0)
        now = [memory(pid) for pid in service.workers]
        progress(f"{count:,} idle watchers")
        meter = Meter(stage, service, clients)
        time.sleep(seconds)
        server, postgres, own = meter.read()

        files = [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in service.workers]
        limit = Path(f"/proc/{service.workers[0]}/limits").read_text().partition("Max open files")[2].split()[0]
        client_mib = sum(client.resident for client in clients) / 2**20
        made, bursts = 0, []
        # Doctor 0 already has watchers.
        watched_days = min(_WATCHED, count) - 1
        for changes in (watched_days // 20, watched_days - watched_days // 20):
            progress(f"{count:,} watchers, {changes:,} changes at once")
            _ask_all(clients, [("begin",)] * _WATCH_CLIENTS)
            requests = [
                appointment_pb2.BookAppointmentRequest(
                    patient_id=make_id(PATIENT, first + n), idempotency_key=f"burst-{first + n}",
                    doctor_day=appointment_pb2.DoctorDay(doctor_id=make_id(DOCTOR, 1 + n), date=sizes.wire(day)),
                )
                for n in range(made, made + changes)
            ]  # fmt: skip
            concerned = sum(1 for n in range(count) if made < n % _WATCHED <= made + changes)
            made += changes
            meter, started = Meter(stage, service), time.perf_counter()
            kind = Kind("burst", service, port, _BOOK, requests.__getitem__)
            booked = spend(stage, [desk], kind, changes, IN_FLIGHT, connections=8)
            reports = _reports(clients, concerned)
            caught_up = time.perf_counter() - started
            server_seconds, postgres_seconds, _ = meter.read()
            lags = [lag for report in reports for lag in report.lags]
            p50, p99 = percentiles(lags, 50, 99)
            bursts.append(
                Burst(
                    changes, booked.seconds, caught_up, server_seconds, postgres_seconds, len(lags), p50 * 1e3,
                    p99 * 1e3, max(lags, default=0.0) * 1e3, concerned - len(lags), dict(booked.refused),
                )
            )  # fmt: skip
    rss, pss = (sum(b[i] for b in now) - sum(a[i] for a in before) for i in (0, 1))
    return Idle(
        count, -(-count // crowd.streams_a_connection), min(_WATCHED, count), 2, open_seconds, rss / count / 1024,
        pss / count / 1024, [held / 2**20 for held, _ in now], client_mib, server / seconds, postgres / seconds,
        sum(own) / seconds, files, int(limit), bursts, sum(report.ended for report in reports),
    )  # fmt: skip


def _ask_all(clients: Sequence[Child], commands: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Send each client its command at once, and wait for all answers."""
    for client, command in zip(clients, commands, strict=True):
        client.pipe.send(command)
    return [client.receive() for client in clients]


def _reports(clients: Sequence[Child], expected: int) -> list[Watched]:
    """The watchers' reports, once they have everything or time is up."""
    deadline = time.monotonic() + _CATCH_UP_SECONDS
    while True:
        reports: list[Watched] = _ask_all(clients, [("report",)] * len(clients))
        if sum(len(report.lags) for report in reports) >= expected or time.monotonic() > deadline:
            return reports
        time.sleep(0.5)


def _port(address: str) -> int:
    return int(address.rpartition(":")[2])


def _summary(runs: Sequence[Spent]) -> dict[str, Any]:
    """Medians of the runs, and percentiles over all calls."""
    latencies = [latency for run in runs for latency in run.latencies]
    p50, p99 = percentiles(latencies, 50, 99)
    refused = sum((run.refused for run in runs), Counter[str]())
    return {
        "calls": sum(run.calls for run in runs),
        "calls_per_second": statistics.median(run.calls / run.seconds for run in runs),
        "server_us": statistics.median(run.server / run.calls for run in runs) * 1e6,
        "postgres_us": statistics.median(run.postgres / run.calls for run in runs) * 1e6,
        "client_cores": statistics.median(run.clients / run.seconds for run in runs),
        "p50_ms": p50 * 1e3,
        "p99_ms": p99 * 1e3,
        "refused": dict(refused),
    }
