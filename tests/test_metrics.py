"""The metrics page of `frontdesk serve` with two workers, as a scraper reads it."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import grpc
import psycopg
import pytest
import yaml
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from clinic.frontdesk.v1 import clinic_pb2, doctor_pb2, queue_pb2
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, day, outcome, today, tomorrow
from tests.receivers import SECRET
from tests.servers import Service
from tests.test_server import two_fronts
from tests.waiting import until, until_true

OPERATIONS = Path(__file__).parent.parent / "docs" / "operations"
METHOD = "clinic.frontdesk.v1."
BOOK = METHOD + "AppointmentService/BookAppointment"

Page = dict[tuple[str, tuple[tuple[str, str], ...]], float]
"""Samples by name and labels."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Service]]:
    """Start two workers with metrics, on this database; on an embedded PostgreSQL if it is empty."""
    monkeypatch.setenv("FRONTDESK_METRICS_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("FRONTDESK_POOL_SIZE", "4")
    # Nobody is there.
    monkeypatch.setenv("FRONTDESK_EVENTS_NATS", "nats://127.0.0.1:9")
    monkeypatch.setenv("FRONTDESK_WEBHOOK_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("FRONTDESK_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("FRONTDESK_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    started: list[Service] = []

    def begin(conninfo: str) -> Service:
        started.append(Service(tmp_path / "log", conninfo, workers=2))
        return started[-1]

    yield begin
    (running,) = started
    running.stop()
    assert not list(tmp_path.glob("frontdesk-metrics-*")), "the files outlive the service"


@pytest.fixture
def service(conninfo: str, start: Callable[[str], Service]) -> Service:
    """Two workers with metrics."""
    return start(conninfo)


def url(service: Service) -> str:
    """The address of the page, from the log."""
    lines = map(json.loads, service.log.read_text().splitlines())
    return str(next(line["url"] for line in lines if line["event"] == "metrics"))


def text(service: Service) -> str:
    with urllib.request.urlopen(url(service), timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        return str(answer.read().decode())


def families(said: str) -> list[Metric]:
    return list(text_string_to_metric_families(said))  # type: ignore[no-untyped-call]


def page(service: Service) -> Page:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(text(service))
        for sample in family.samples
    }


def value(found: Page, name: str, **labels: str) -> float | None:
    return found.get((f"frontdesk_{name}", tuple(sorted(labels.items()))))


async def watch(front: Front, doctor_id: str) -> Any:
    """An open stream whose first message has arrived."""
    stream: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor_id))
    await stream.read()
    return stream


def form_of_the_page(service: Service, tmp_path: Path) -> None:
    """A scraper may ask for the text format before OpenMetrics. The workers' files are private."""
    asked = urllib.request.Request(url(service), headers={"Accept": "text/plain;version=0.0.4"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        assert "# EOF" not in answer.read().decode()
    with pytest.raises(HTTPError, match="404"):
        urllib.request.urlopen(url(service).removesuffix("metrics"), timeout=10)
    (directory,) = tmp_path.glob("frontdesk-metrics-*")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


async def test_one_page_for_all_workers(service: Service, conninfo: str) -> None:
    """Calls of both workers add up; the dashboard shows every metric; no metric contains patient data."""
    first, second = await two_fronts(service, conninfo)
    doctor = await first.doctor(max_patients_per_day=5)
    streams = [await watch(front, doctor.id) for front in (first, second)]
    person = {
        "given_name": "Zuleika",
        "family_name": "Quintanilha",
        "phone": "+5511912345678",
        "email": "zq@example.org",
    }
    patient = await first.patient(**person)
    for front, many in ((first, 3), (second, 4)):
        for _ in range(many):
            await outcome(front.book(patient.id, doctor.id, reason="vertigo", idempotency_key="tell-nobody"))
    assert await outcome(second.book(patient.id, doctor.id)) == "DUPLICATE_BOOKING"
    assert await outcome(first.book(patient.id, "0190a0b0-1111-7222-8333-444455556666")) == "DOCTOR_NOT_FOUND"
    for stream in streams:
        await stream.read()
    unknown: Any = first.channel.unary_unary("/clinic.frontdesk.v1.QueueService/Quintanilha")
    with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
        await unknown(b"")
    streams[0].cancel()
    ended = {"method": METHOD + "QueueService/WatchQueue", "code": "CANCELLED"}
    await until(lambda: value(page(service), "calls_total", **ended) == 1)
    await until(lambda: value(page(service), "watchers") == 1)

    found = page(service)
    assert value(found, "calls_total", method=BOOK, code="OK") == 7
    assert value(found, "calls_total", method=BOOK, code="ALREADY_EXISTS") == 1
    assert value(found, "calls_total", method=BOOK, code="NOT_FOUND") == 1
    assert value(found, "call_duration_seconds_count", method=BOOK) == 9
    assert value(found, "call_duration_seconds_bucket", method=BOOK, le="+Inf") == 9
    assert 0 < (value(found, "call_duration_seconds_sum", method=BOOK) or 0) < 90
    assert value(found, "call_duration_seconds_count", method=ended["method"]) is None, "a stream is no latency"
    assert value(found, "refusals_total", reason="DUPLICATE_BOOKING") == 1
    assert value(found, "refusals_total", reason="DOCTOR_NOT_FOUND") == 1
    assert value(found, "streams_ended_total", reason="CANCELLED") == 1
    assert value(found, "watch_lag_seconds_count") == 2, "each worker woke its watcher"
    assert value(found, "workers") == value(found, "workers_serving") == value(found, "workers_healthy") == 2
    assert value(found, "pool_limit") == 8
    assert value(found, "worker_restarts_total") == value(found, "postgresql_restarts_total") == 0
    assert value(found, "build_info", version=version("frontdesk")) == 1
    for name in ("notifications_sent_total", "notifications_dead_total"):
        assert value(found, name, channel="WEBHOOK") == 0
    assert value(found, "relay_sent_total", relay="nats") == value(found, "relay_set_aside_total", relay="nats") == 0

    said = text(service)
    assert said.endswith("# EOF\n")
    for secret in (*person.values(), "vertigo", "tell-nobody", patient.id, doctor.id, "Quintanilha"):
        assert secret not in said

    await until(lambda: (value(page(service), "notifications_due", channel="WEBHOOK") or 0) > 0, 30)
    assert (value(page(service), "notification_age_seconds", channel="WEBHOOK") or 0) > 0
    names = {name for name, _ in found}
    shown = dashboard_expressions()
    assert used_in(shown) <= names
    assert used_in(alert_expressions()) <= names
    for family in families(said):
        assert any(name.startswith(family.name) for name in used_in(shown)), family.name
        assert family.documentation

    streams[1].cancel()
    for front in (first, second):
        await front.channel.close()


async def test_what_is_under_way(service: Service, conninfo: str, tmp_path: Path) -> None:
    """Calls in progress show in the gauges, and so do calls that wait for a connection."""
    form_of_the_page(service, tmp_path)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        front = Front(channel, conninfo, service.port)
        doctor = await front.doctor()
        request = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(today()), is_present=True)
        async with await psycopg.AsyncConnection.connect(conninfo) as other:
            # The doctor-day is locked, so the calls wait: four in the database, the others for a connection of the
            # pool.
            await other.execute("select lock_all(array[doctor_day_name(%s, clinic_today(%s))])", (doctor.id, doctor.id))
            calls = [asyncio.create_task(outcome(front.doctors.SetDoctorAvailability(request))) for _ in range(10)]

            def waits() -> bool:
                found = page(service)
                return (
                    value(found, "calls_in_flight") == 10
                    and (value(found, "pool_waiting") or 0) >= 6
                    and (value(found, "pool_connections", state="used") or 0) >= 4
                )

            await until(waits)
        await asyncio.gather(*calls)
        await until(lambda: value(page(service), "calls_in_flight") == 0)
        found = page(service)
        assert (value(found, "pool_waits_total") or 0) >= 6
        assert (value(found, "pool_wait_seconds_total") or 0) > 0


async def test_the_dead_have_counts_and_no_gauges(service: Service, conninfo: str) -> None:
    """The counts of killed workers stay, their gauges go, and their successors add to the counts."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        front = Front(channel, conninfo, service.port)
        doctor = await front.doctor(max_patients_per_day=5)
        (patient, another) = await front.people(2)
        await watch(front, doctor.id)
        await front.book(patient.id, doctor.id)
        await until(lambda: value(page(service), "watchers") == 1)
        await until(lambda: value(page(service), "watch_lag_seconds_count") == 1)
        # The sessions of the next workers have another clock, so their changes give no lag.
        with psycopg.connect(conninfo, autocommit=True) as admin:
            admin.execute(f"alter database {admin.info.dbname} set frontdesk.now = '{_now(conninfo)}'".encode())
        for pid in service.workers():
            os.kill(pid, signal.SIGKILL)
        await until(lambda: value(page(service), "workers_serving") == 0)
        found = page(service)
        assert value(found, "watchers") is None
        assert value(found, "pool_limit") is None
        assert value(found, "workers_healthy") is None
        assert value(found, "calls_total", method=BOOK, code="OK") == 1
    await until(lambda: value(page(service), "workers_healthy") == 2, seconds=40)
    found = page(service)
    assert value(found, "worker_restarts_total") == 2
    assert value(found, "watchers") == 0
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        front = Front(channel, conninfo, service.port)
        stream = await watch(front, doctor.id)
        await front.book(another.id, doctor.id, tomorrow())
        await front.book(another.id, doctor.id)
        await stream.read()
        stream.cancel()
    await until(lambda: value(page(service), "streams_ended_total", reason="CANCELLED") == 1)
    found = page(service)
    assert value(found, "calls_total", method=BOOK, code="OK") == 3
    assert value(found, "call_duration_seconds_count", method=BOOK) == 3
    assert value(found, "watch_lag_seconds_count") == 1


async def test_a_postgresql_that_died(start: Callable[[str], Service], tmp_path: Path) -> None:
    """The supervisor restarts an embedded PostgreSQL that died; the page counts it, and stays available meanwhile."""
    service = await asyncio.to_thread(start, "")
    await until(lambda: value(page(service), "workers_healthy") == 2)
    os.kill(int((tmp_path / "data" / "postgres" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
    # It may be back before a worker looks, and the gauge is written once a second.
    await until(lambda: value(page(service), "postgresql_restarts_total") == 1)
    await until(lambda: value(page(service), "workers_healthy") == 2, seconds=40)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        front = Front(channel, "", service.port)

        async def serves() -> bool:
            return await outcome(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest())) == "OK"

        await until_true(serves)
    found = page(service)
    assert value(found, "postgresql_restarts_total") == 1
    assert value(found, "worker_restarts_total") == 0


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:9464", "192.0.2.1:9464", "example.org:9464"])
def test_only_loopback(listen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page has no credentials, so it is served on loopback only."""
    monkeypatch.setenv("FRONTDESK_METRICS_LISTEN", listen)
    with pytest.raises(SettingsError, match=r"FRONTDESK_METRICS_LISTEN: .*only loopback"):
        Settings.load()


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "frontdesk.cli", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path)],
            env={**os.environ, "FRONTDESK_METRICS_LISTEN": listen, "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (
        1,
        f"frontdesk: FRONTDESK_METRICS_LISTEN {listen}: in use by another process\n",
    )
    assert not list(tmp_path.iterdir())


def test_what_is_off_is_not_even_imported() -> None:
    """A worker without metrics and traces does not load their packages."""
    code = (
        "import sys, frontdesk.process.worker;"
        " print([m for m in ('prometheus_client', 'opentelemetry') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# --- The files in docs/operations ---


@pytest.mark.skipif(shutil.which("promtool") is None, reason="without Prometheus's promtool")
def test_what_fires() -> None:
    """Each alert fires in its case, and none fires if all is well."""
    rules = Path(__file__).parent / "alerts_test.yaml"
    done = subprocess.run(["promtool", "test", "rules", rules], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def dashboard_expressions() -> list[str]:
    """Every query of the dashboard."""
    board = json.loads((OPERATIONS / "dashboard.json").read_text())
    panels = [panel for row in board["panels"] for panel in (row, *row.get("panels", ()))]
    assert len({panel["id"] for panel in panels}) == len(panels)
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def alert_expressions() -> list[str]:
    """Every condition of an alert. Each alert has a summary and an action."""
    rules = [
        rule for group in yaml.safe_load((OPERATIONS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule
        assert rule["annotations"]["summary"], rule
        assert rule["annotations"]["action"], rule
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return [rule["expr"] for rule in rules]


def used_in(expressions: list[str]) -> set[str]:
    """The names of our samples."""
    return set(re.findall(r"\bfrontdesk_\w+", " ".join(expressions)))


def _now(conninfo: str) -> str:
    with psycopg.connect(conninfo) as connection:
        row = connection.execute("select clock_timestamp()").fetchone()
        assert row is not None
        return str(row[0].isoformat())
