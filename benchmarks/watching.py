"""Measure watching: the delay from a change to its receipt, and the memory of a stream."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import psycopg

from benchmarks import people
from benchmarks.calls import percentiles
from benchmarks.load import Watched, Worked, desk_client, watch_client
from benchmarks.people import DOCTOR, PATIENT, TO_CHECK_IN, make_id
from benchmarks.stage import Child, Meter, ServerProcess, Stage

WAITING = 8
"""Waiting patients in each watched queue, so that a message has a usual size."""
_DOCTORS = 1_000
_PATIENTS = 20_000
_PAUSE = 1.0


@dataclass(frozen=True)
class Scene:
    """A number of watchers, spread evenly over a number of doctor-days, and the rate of changes."""

    watchers: int
    days: int
    changes_per_second: float


SCENES = (Scene(1, 10, 25), Scene(100, 10, 25), Scene(1000, 10, 25), Scene(100, 1, 5), Scene(1000, 1, 5))
QUICK_SCENES = (Scene(1000, 10, 25),)


@dataclass
class Seen:
    """The result of a scene."""

    watchers: int
    days: int
    changes: int
    changes_per_second: float
    messages_per_second: float
    p50_ms: float
    p99_ms: float
    worst_ms: float
    server_cores: float
    postgres_cores: float
    client_cores: list[float]
    """CPU of each client process, in cores: near 1 the client causes the delay."""
    missed: int
    """Changes that a watcher did not get; 0 unless something is wrong."""
    ended: int
    refused: dict[str, int]


def measure(
    stage: Stage, *, scenes: Sequence[Scene], seconds: float, idle: Sequence[int], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Run every scene, and then measure the memory of idle streams, each on its own server."""
    zone = people.noon_zone()
    day = people.today(zone)
    conninfo = stage.database("watch")
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, _DOCTORS, _PATIENTS)
        people.booked(connection, TO_CHECK_IN, _DOCTORS * WAITING, _DOCTORS, day, checked_in=True)
    people.settle(conninfo)
    seen = []
    for number, scene in enumerate(scenes):
        progress(f"{scene.watchers} watchers on {scene.days} doctor-days")
        # Patients and doctors of this scene alone.
        doctors = [make_id(DOCTOR, number * 10 + n) for n in range(scene.days)]
        first = _DOCTORS * WAITING + number * 2_000
        patients = [make_id(PATIENT, n) for n in range(first, first + 2_000)]
        with stage.serve(conninfo) as server:
            seen.append(_watch(stage, server, scene, day, doctors, patients, seconds))
    memory = []
    with stage.serve(conninfo) as server, Child(watch_client) as client:
        # One stream first: it loads code, which is not the cost of a stream.
        client.ask("open", server.port, [(make_id(DOCTOR, 100), day)])
        time.sleep(2 * _PAUSE)
        base, opened = server.resident, 1
        for streams in idle:
            progress(f"{streams} idle streams")
            client.ask("open", server.port, [(make_id(DOCTOR, 100 + n % 100), day) for n in range(opened, streams)])
            opened = streams
            time.sleep(_PAUSE)
            meter = Meter(stage, server)
            time.sleep(2 * _PAUSE)
            busy, postgres, _ = meter.read()
            memory.append(
                {
                    "streams": streams,
                    "doctor_days": 100,
                    "kib_a_stream": (server.resident - base) / streams / 1024,
                    "server_mib": server.resident / 2**20,
                    "server_cores": busy / (2 * _PAUSE),
                    "postgres_cores": postgres / (2 * _PAUSE),
                }
            )
    return {"scenes": [asdict(one) for one in seen], "memory": memory}


def _watch(
    stage: Stage, server: ServerProcess, scene: Scene, day: date, doctors: Sequence[str], patients: Sequence[str],
    seconds: float,
) -> Seen:  # fmt: skip
    with ExitStack() as stack:
        clients = [stack.enter_context(Child(watch_client)) for _ in range(2 if scene.watchers > 100 else 1)]
        desk = stack.enter_context(Child(desk_client))
        days = [(doctors[n % len(doctors)], day) for n in range(scene.watchers)]
        for n, client in enumerate(clients):
            client.ask("open", server.port, days[n :: len(clients)])
        # Leave out the first moment, in which connections open and plans are prepared.
        desk.ask(server.port, doctors, day, patients[: len(patients) // 2], scene.changes_per_second, _PAUSE)
        time.sleep(_PAUSE / 2)
        for client in clients:
            client.ask("begin")
        meter = Meter(stage, server, clients)
        worked: Worked = desk.ask(
            server.port, doctors, day, patients[len(patients) // 2 :], scene.changes_per_second, seconds
        )
        time.sleep(_PAUSE / 2)
        server_seconds, postgres_seconds, client_seconds = meter.read()
        reports: list[Watched] = [client.ask("report") for client in clients]
    lags = [lag for report in reports for lag in report.lags]
    p50, p99 = percentiles(lags, 50, 99)
    # With fewer watchers than doctor-days, each watcher sees only its share of the changes.
    expected = worked.calls * scene.watchers / scene.days
    period = seconds + _PAUSE / 2
    return Seen(
        scene.watchers, scene.days, worked.calls, worked.calls / seconds,
        sum(report.messages for report in reports) / period, p50 * 1e3, p99 * 1e3, max(lags, default=0.0) * 1e3,
        server_seconds / period, postgres_seconds / period, [seconds / period for seconds in client_seconds],
        0 if scene.watchers < scene.days else round(expected) - len(lags), sum(report.ended for report in reports),
        worked.refused,
    )  # fmt: skip
