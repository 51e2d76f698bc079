"""Requests of every method that break the rules of the wire and of the contract, sent to a running service.

`make soak` sends many more than `make test`.
"""

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import hypothesis
import psycopg
import pytest
import structlog
from google.protobuf import message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status.rpc_status import from_call
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, patient_pb2, queue_pb2, slot_pb2
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front, day, today
from tests.fuzz.requests import CANARY, METADATA, Known, requests
from tests.hostile.methods import LISTS, METHODS, STREAMS, VALID, call, credentials_for, noon, path_of, world

OK = "OK"
ANSWERS = {
    "INVALID_ARGUMENT": {"INVALID_FIELD", "IDEMPOTENCY_KEY_REUSED"},
    "NOT_FOUND": None,
    "ALREADY_EXISTS": None,
    "FAILED_PRECONDITION": None,
    "ABORTED": {"ETAG_MISMATCH"},
    # Of the methods that judge what is in the message, and of a view that needs a patient's credentials.
    "UNAUTHENTICATED": {"BAD_LOGIN", "CREDENTIALS_INVALID", "CREDENTIALS_REQUIRED", "REFRESH_REUSED"},
    "RESOURCE_EXHAUSTED": {"LOGIN_THROTTLED"},
}
"""The statuses with which a healthy service may refuse, and for some of them the only reasons allowed."""

DECIDED = (OK, "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED", "UNAUTHENTICATED")
"""The statuses of requests that were valid enough to be decided."""

EXAMPLES = 60
"""Requests per example that Hypothesis's profile allows for a test."""


@dataclass
class Service:
    """A running service, its resources, and its log."""

    channel: grpc.Channel
    conninfo: str
    known: Known
    logged: list[Any] = field(default_factory=list)

    def sql(self, query: str) -> list[tuple[Any, ...]]:
        """The rows of a query on its database."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            return connection.execute(query).fetchall()

    def ask(self, method: str, raw: bytes, metadata: Any = ()) -> tuple[str, Any]:
        """The status, with the answer or the error; for a stream, the first message."""
        answer = message_factory.GetMessageClass(METHODS[method].output_type).FromString
        try:
            if method not in STREAMS:
                call: Any = self.channel.unary_unary(path_of(method), response_deserializer=answer)
                return OK, call(raw, timeout=20, metadata=metadata)
            watch: Any = self.channel.unary_stream(path_of(method), response_deserializer=answer)
            stream = watch(raw, timeout=20, metadata=metadata)
            found = next(stream)
            stream.cancel()
        except grpc.RpcError as error:
            return error.code().name, error
        return OK, found


@pytest.fixture
def service(conninfo: str, settings: Settings) -> Iterator[Service]:
    """A real server in its own thread, because Hypothesis is synchronous, with its log from `info` on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Worker, int, Known]:
        worker = Worker(settings, conninfo)
        port = await worker.start("127.0.0.1:0")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            front = Front(channel, conninfo, port)
            worlds = [await world(front) for _ in range(3)]
            now = today()
            tokens: dict[str, list[str]] = {}
            for name in LISTS:
                request: Any = VALID[name](worlds[0])
                request.page_size = 1
                tokens[name] = [(await call(front, name, request)).next_page_token]
            tokens["WatchQueue"] = [
                (await call(front, "WatchQueue", VALID["WatchQueue"](one))).resume_token for one in worlds
            ]
            tokens = {name: list(filter(None, found)) for name, found in tokens.items()}
            return worker, port, Known(worlds, (now.year, now.month, now.day), int(noon(1).timestamp()), tokens)

    worker, port, known = asyncio.run_coroutine_threadsafe(start(), loop).result()
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))
    with (
        structlog.testing.capture_logs() as logged,
        grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_retries", 0)]) as channel,
    ):
        yield Service(channel, conninfo, known, logged)
    structlog.configure(**before)
    asyncio.run_coroutine_threadsafe(worker.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def faults(status: str, error: Any) -> list[str]:
    """The faults of a refusal."""
    if status not in ANSWERS:
        return [f"{status}: {error.details()}"]
    found = from_call(error)
    infos = [detail for detail in (found.details if found else ()) if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR)]
    if len(infos) != 1:
        return ["no ErrorInfo"]
    info = error_details_pb2.ErrorInfo.FromString(infos[0].value)
    wrong = []
    reasons = ANSWERS[status]
    if info.domain != "frontdesk.clinic" or not info.reason or (reasons is not None and info.reason not in reasons):
        wrong.append(f"{status} for {info.reason} of {info.domain}")
    said = repr((error.details(), found, error.trailing_metadata()))
    if CANARY.lower() in said.lower():
        wrong.append("repeats what was sent")
    return wrong


def everything_can_be_read(service: Service) -> None:
    """Everything that was stored can be read: each list, page by page, and each queue."""
    asked: list[tuple[str, Any]] = [
        ("ListClinics", clinic_pb2.ListClinicsRequest()),
        *(
            ("GetPatient", patient_pb2.GetPatientRequest(patient_id=one))
            for (one,) in service.sql("select id::text from patient")
        ),
        ("ListDoctors", doctor_pb2.ListDoctorsRequest()),
        ("ListSlots", slot_pb2.ListSlotsRequest()),
    ]
    for (one,) in service.sql("select id::text from doctor"):
        asked.append(("ListDoctorAvailability", doctor_pb2.ListDoctorAvailabilityRequest(doctor_id=one)))
        asked.append(("ListAppointments", appointment_pb2.ListAppointmentsRequest(doctor_id=one)))
    for one, on in service.sql("select doctor_id::text, date from doctor_day"):
        asked.append(("GetQueue", queue_pb2.GetQueueRequest(doctor_id=one, date=day(on))))
        asked.append(("WatchQueue", queue_pb2.WatchQueueRequest(doctor_id=one, date=day(on))))
    for name, request in asked:
        token = None
        while token != "":
            status, answer = service.ask(name, request.SerializeToString())
            assert status == OK, (name, answer)
            token = getattr(answer, "next_page_token", "")
            if token:
                request.page_token = token


RULES = {
    "a repeated number, or one below 1": (
        "select 1 from appointment where state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')"
        " group by doctor_id, date having count(*) <> count(distinct number) or min(number) < 1"
    ),
    "a slot over its capacity": (
        "select 1 from appointment a join slot s on s.id = a.slot_id"
        " where a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')"
        " group by s.id, s.capacity having count(*) > s.capacity"
    ),
    "a patient twice on a doctor-day": (
        "select 1 from appointment where state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION')"
        " group by patient_id, doctor_id, date having count(*) > 1"
    ),
    "revisions or tickets with gaps": (
        "select 1 from doctor_day dd"
        " left join log e on (e.doctor_id, e.date) = (dd.doctor_id, dd.date) and e.revision > 0"
        " group by dd.doctor_id, dd.date, dd.revision, dd.last_ticket"
        " having count(*) filter (where e.revision is not null) <> dd.revision - 1"
        " or coalesce(max(e.revision), 1) <> dd.revision or coalesce(max(e.ticket), 0) <> dd.last_ticket"
        " or count(distinct e.ticket) <> dd.last_ticket"
    ),
    "a visit without a doctor-day": (
        "select 1 from appointment a where not exists"
        " (select from doctor_day d where d.doctor_id = a.doctor_id and d.date = a.date)"
    ),
}
"""Queries for rows that break a rule."""


# The service runs in a thread of this process, and draws random numbers while Hypothesis draws its own.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
def test_hostile_requests(service: Service) -> None:
    """No request causes a fault of the server, no refusal or log repeats its texts, and the database stays sound."""
    answers: Counter[tuple[str, str]] = Counter()

    def send_to(methods: Sequence[str], examples: int) -> None:
        @hypothesis.settings(
            max_examples=examples, suppress_health_check=list(HealthCheck), database=None, print_blob=False
        )
        @given(st.data())
        def send(data: st.DataObject) -> None:
            method = data.draw(st.sampled_from(methods), "method")
            raw = data.draw(requests(method, service.known), "request")
            del service.logged[:]
            metadata = (*data.draw(METADATA, "metadata"), *credentials_for(method))
            status, answer = service.ask(method, raw, metadata)
            answers[method, status] += 1
            if status != OK:
                assert not faults(status, answer)
            assert CANARY.lower() not in repr(service.logged).lower()
            assert not [entry for entry in service.logged if entry["log_level"] in ("error", "critical")]

        send()

    def decided(method: str) -> int:
        return sum(answers[method, code] for code in DECIDED)

    send_to(sorted(METHODS), EXAMPLES * hypothesis.settings().max_examples)
    for method in METHODS:
        # Chance may have given a method with many conditions nothing that passes them: give it more.
        for _ in range(5):
            if not decided(method):
                send_to([method], 200)
    for method in METHODS:
        # Some requests must get as far as a decision. A fuzz whose requests are all invalid tests little.
        assert decided(method) > 0, method
    everything_can_be_read(service)
    health = health_pb2_grpc.HealthStub(service.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    for rule, query in RULES.items():
        assert not service.sql(query), rule
