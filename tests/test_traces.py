"""Traces of calls: in this process with the SDK's own exporter, and from `frontdesk serve` by OTLP."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from clinic.frontdesk.v1 import queue_pb2
from frontdesk.process.tracing import Tracing
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front, day, refusal, today
from tests.servers import Service
from tests.waiting import until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = ("traceparent", f"00-{TRACE}-{PARENT}-01")
METHOD = "clinic.frontdesk.v1."


class Spans:
    """The exported spans."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def all(self) -> Sequence[ReadableSpan]:
        return self.exporter.get_finished_spans()

    async def call(self, method: str) -> ReadableSpan:
        """The span of the one call of this method, which may end a moment after its answer has come."""
        await until(lambda: any(span.name == METHOD + method for span in self.all()))
        (found,) = (span for span in self.all() if span.name == METHOD + method)
        return found

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        assert parent.context is not None
        return [one for one in self.all() if one.parent is not None and one.parent.span_id == parent.context.span_id]


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def traced(conninfo: str, settings: Settings, spans: Spans) -> AsyncIterator[Front]:
    """A client of a server with tracing."""
    worker = Worker(settings, conninfo, tracing=Tracing(spans.provider))
    port = await worker.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Front(channel, conninfo, port)
    await worker.stop()


async def test_a_call_and_its_statements(traced: Front, spans: Spans) -> None:
    """A call is a span below its caller's span, its statements are spans below it, and nothing else is traced."""
    doctor = await traced.doctor()
    patient = await traced.patient()
    booked = await traced.book(patient.id, doctor.id)
    spans.exporter.clear()
    request = queue_pb2.CheckInRequest(appointment_id=booked.appointment.id)
    await traced.queues.CheckIn(request, metadata=[TRACEPARENT, ("tracestate", "patient=zuleika")])
    call = await spans.call("QueueService/CheckIn")
    assert call.context is not None
    assert call.parent is not None
    assert (f"{call.context.trace_id:032x}", f"{call.parent.span_id:016x}") == (TRACE, PARENT)
    assert call.parent.is_remote
    assert not call.context.trace_state, "whatever a caller writes there"
    assert call.kind is SpanKind.SERVER
    assert dict(call.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": METHOD + "QueueService/CheckIn",
        "rpc.response.status_code": "OK",
    }
    (statement,) = spans.below(call)
    assert statement.kind is SpanKind.CLIENT
    assert statement.name == "SELECT decide"
    assert dict(statement.attributes or {}) == {
        "db.system.name": "postgresql",
        "db.operation.name": "SELECT",
        "db.query.summary": "SELECT decide",
    }
    assert {call.status.status_code, statement.status.status_code} == {StatusCode.UNSET}
    assert len(spans.all()) == 2, "the tailer's polls and the health check's query belong to no call"


async def test_callers_that_share_a_statement(traced: Front, spans: Spans) -> None:
    """If callers share a statement, each has a span for its wait in its own trace, and no trace contains another's."""
    doctor = await traced.doctor(max_patients_per_day=50)
    people = await traced.people(12)
    spans.exporter.clear()
    async with await psycopg.AsyncConnection.connect(traced.conninfo) as other:
        await other.execute("select lock_all(array[doctor_day_name(%s, clinic_today(%s))])", (doctor.id, doctor.id))
        bookings = [asyncio.create_task(traced.book(person.id, doctor.id)) for person in people]
        await until(lambda: bool(traced.sql("select 1 from pg_locks where locktype = 'advisory' and not granted")))
    await asyncio.gather(*bookings)
    await traced.book((await traced.patient()).id, doctor.id)
    calls = [span for span in spans.all() if span.name.endswith("BookAppointment")]
    assert len(calls) == 13
    assert [[one.name for one in spans.below(call)] for call in calls] == [["SELECT decide"]] * 13
    assert len({call.context.trace_id for call in calls if call.context}) == 13


async def test_statements_of_a_transaction(traced: Front, spans: Spans) -> None:
    """Each statement of a call has its own span in the call's trace."""
    await traced.clinic()
    names = [span.name for span in spans.below(await spans.call("ClinicService/CreateClinic"))]
    assert len(names) >= 2
    assert "INSERT clinic" in names


async def test_whose_fault_it_was(traced: Front, spans: Spans) -> None:
    """A refusal is not an error of the span. A failure of the server is, and its span contains nothing of the row."""
    doctor = await traced.doctor()
    patient = await traced.patient(given_name="Zuleika", phone="+5511912345678", email="zq@example.org")
    await traced.book(patient.id, doctor.id, reason="vertigo")
    spans.exporter.clear()
    await refusal(traced.book(patient.id, doctor.id, reason="vertigo"))
    call = await spans.call("AppointmentService/BookAppointment")
    assert call.status.status_code is StatusCode.UNSET
    assert call.attributes is not None
    assert call.attributes["rpc.response.status_code"] == "ALREADY_EXISTS"
    assert call.attributes["frontdesk.refusal.reason"] == "DUPLICATE_BOOKING"

    spans.exporter.clear()
    traced.sql("alter table appointment add constraint never check (reason <> 'vertigo') not valid")
    other = await traced.patient(given_name="Quirina", phone="+5511912345679")
    error = await refusal(traced.book(other.id, doctor.id, reason="vertigo"))
    assert error.code() == grpc.StatusCode.INTERNAL
    call = await spans.call("AppointmentService/BookAppointment")
    assert call.status.status_code is StatusCode.ERROR
    assert call.attributes is not None
    assert call.attributes["error.type"] == "INTERNAL"
    (statement,) = spans.below(call)
    assert statement.status.status_code is StatusCode.ERROR
    assert statement.attributes is not None
    assert statement.attributes["db.response.status_code"] == "23514"
    assert not call.events
    assert not statement.events
    said = "".join(span.to_json() for span in spans.all())
    for secret in ("Zuleika", "Quirina", "55119", "zq@", "vertigo", patient.id, other.id, doctor.id):
        assert secret not in said


async def test_a_stream_is_one_span(traced: Front, spans: Spans) -> None:
    """The span of a stream lasts from its start to its end, whoever ends it."""
    doctor = await traced.doctor()
    request = queue_pb2.WatchQueueRequest(doctor_id=doctor.id, date=day(today()))
    watch: Any = traced.queues.WatchQueue(request, metadata=[TRACEPARENT])
    await watch.read()
    await traced.patient()
    assert not [span for span in spans.all() if span.name.endswith("WatchQueue")]
    watch.cancel()
    await until(lambda: any(span.name.endswith("WatchQueue") for span in spans.all()))
    call = await spans.call("QueueService/WatchQueue")
    assert call.context is not None
    assert f"{call.context.trace_id:032x}" == TRACE
    assert call.attributes is not None
    assert call.attributes["rpc.response.status_code"] == "CANCELLED"
    assert call.status.status_code is StatusCode.UNSET


async def test_callers_that_do_not_trace(traced: Front, spans: Spans) -> None:
    """A call without a valid traceparent starts a trace; one that is not sampled leaves no span."""
    await traced.clinic()
    assert (await spans.call("ClinicService/CreateClinic")).parent is None
    spans.exporter.clear()
    for header in ("nonsense", f"00-{TRACE}-{'0' * 16}-01", f"ff-{TRACE}-{PARENT}-01", "x" * 5000):
        await refusal(traced.queues.GetQueue(queue_pb2.GetQueueRequest(), metadata=[("traceparent", header)]))
    assert [span.parent for span in spans.all()] == [None] * 4
    spans.exporter.clear()
    unsampled = ("traceparent", f"00-{TRACE}-{PARENT}-00")
    await refusal(traced.queues.GetQueue(queue_pb2.GetQueueRequest(), metadata=[unsampled]))
    assert not spans.all()


# --- `frontdesk serve`, and our own collector ---


class Collector:
    """A collector of OTLP over HTTP."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


async def one_call(service: Service, conninfo: str) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        front = Front(channel, conninfo, service.port)
        await refusal(front.queues.GetQueue(queue_pb2.GetQueueRequest(), metadata=[TRACEPARENT]))


def stopped(service: Service) -> list[dict[str, Any]]:
    """Stop the service, and return its log."""
    service.stop()
    return [json.loads(line) for line in service.log.read_text().splitlines()]


async def test_sent_to_a_collector(
    collector: Collector, conninfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The standard variables apply; the last spans are sent before a worker ends, and the log names the trace."""
    monkeypatch.setenv("FRONTDESK_TRACES", "on")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    service = await asyncio.to_thread(Service, tmp_path / "log", conninfo, workers=2)
    await one_call(service, conninfo)
    log = await asyncio.to_thread(stopped, service)
    (line,) = (line for line in log if line["event"] == "call")
    assert line["trace_id"] == TRACE
    sent = [
        ({pair.key: pair.value.string_value for pair in resource.resource.attributes}["service.name"], span)
        for request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    ((name, span),) = sent
    assert name == "frontdesk"
    assert span.name == METHOD + "QueueService/GetQueue"
    assert span.trace_id.hex() == TRACE


async def test_without_a_collector(
    conninfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_tcp_port: int
) -> None:
    """Without a collector, calls are answered, the log reports lost spans in its form, and workers end in time."""
    monkeypatch.setenv("FRONTDESK_TRACES", "on")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{unused_tcp_port}")
    service = await asyncio.to_thread(Service, tmp_path / "log", conninfo, workers=2)
    await one_call(service, conninfo)
    log = await asyncio.to_thread(stopped, service)
    assert [line for line in log if line["event"] == "opentelemetry"]
    assert not [line for line in log if line["event"] == "worker_killed"]


async def test_off_by_default(
    collector: Collector, conninfo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables of OpenTelemetry alone do not switch traces on: they may be set for other programs."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    service = await asyncio.to_thread(Service, tmp_path / "log", conninfo, workers=2)
    await one_call(service, conninfo)
    log = await asyncio.to_thread(stopped, service)
    (line,) = (line for line in log if line["event"] == "call")
    assert "trace_id" not in line
    assert not collector.requests


def test_the_packages_are_needed(tmp_path: Path) -> None:
    """If the extra is not installed, one line says how to install it."""
    # An import hook hides the SDK, as if it were not installed.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('opentelemetry.sdk'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "frontdesk.cli", "serve", "--data-dir", str(tmp_path / "data")],
        env={**os.environ, "FRONTDESK_TRACES": "on", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "frontdesk: FRONTDESK_TRACES: on needs more packages: pip install 'frontdesk[otel]'\n"
