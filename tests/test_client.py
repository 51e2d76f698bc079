"""The client does, on real servers, the work that every caller would otherwise have to do."""

import asyncio
import json
import pickle
import pydoc
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing
from datetime import date
from pathlib import Path
from typing import Any, cast

import grpc
import grpc_testing
import pytest
from google.protobuf import duration_pb2
from google.protobuf.any_pb2 import Any as Packed
from google.rpc import code_pb2, error_details_pb2, status_pb2

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, patient_pb2, queue_pb2
from frontdesk.client import (
    CHANNEL_OPTIONS,
    SERVICE_CONFIG,
    FieldViolation,
    FrontdeskClient,
    FrontdeskError,
    SyncFrontdeskClient,
    Update,
)
from frontdesk.client import watch as watch_state
from frontdesk.client.stubs import Stubs
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front, day, today
from tests.waiting import until

PROTOS = Path(__file__).parents[1] / "protos" / "clinic" / "frontdesk" / "v1"
UNKNOWN = "00000000-0000-7000-8000-000000000000"
SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (appointment_pb2, "AppointmentService"),
        (patient_pb2, "PatientService"),
        (queue_pb2, "QueueService"),
    )
]
REGISTER = patient_pb2.DESCRIPTOR.services_by_name["PatientService"].methods_by_name["RegisterPatient"]
BOOK = appointment_pb2.DESCRIPTOR.services_by_name["AppointmentService"].methods_by_name["BookAppointment"]
GET_QUEUE = queue_pb2.DESCRIPTOR.services_by_name["QueueService"].methods_by_name["GetQueue"]
WATCH = queue_pb2.DESCRIPTOR.services_by_name["QueueService"].methods_by_name["WatchQueue"]


@pytest.fixture
async def desk(front: Front) -> AsyncIterator[FrontdeskClient]:
    """Our client of the test's server."""
    async with FrontdeskClient(f"127.0.0.1:{front.port}", caller="test") as desk:
        yield desk


def details(*messages: Any) -> bytes:
    """The trailer of a refusal."""
    status = status_pb2.Status(code=code_pb2.FAILED_PRECONDITION)
    for message in messages:
        packed = Packed()
        packed.Pack(message)
        status.details.append(packed)
    packed_status: bytes = status.SerializeToString()
    return packed_status


class Watcher:
    """Watches a queue in the background."""

    def __init__(self, updates: Any) -> None:
        self._updates = updates
        self.seen: list[Update] = []
        self._news = asyncio.Condition()
        self.task = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async with aclosing(self._updates) as updates:
            async for update in updates:
                async with self._news:
                    self.seen.append(update)
                    self._news.notify_all()

    async def reaches(self, revision: int) -> Update:
        """The first update at this revision or a later one."""

        def latest() -> Update | None:
            return next((update for update in self.seen if update.queue.revision >= revision), None)

        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(lambda: latest() is not None or self.task.done())
        found = latest()
        if found is None:
            await self.task
            raise AssertionError("the watch has ended")
        return found

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    def assert_nothing_missed(self) -> None:
        """Check that each update continues from the previous one and lists every change between."""
        assert self.seen[0].fresh
        for before, update in zip(self.seen, self.seen[1:], strict=False):
            assert update.previous_revision == before.queue.revision
            revisions = [change.revision for change in update.changes]
            assert revisions == [*range(before.queue.revision + 1, update.queue.revision + 1)]


# Unary calls


async def test_a_refusal_is_typed(desk: FrontdeskClient, front: Front) -> None:
    """A refusal is a FrontdeskError with reason, metadata and gRPC's error as its cause."""
    with pytest.raises(FrontdeskError) as caught:
        await desk.doctors.GetDoctor(doctor_pb2.GetDoctorRequest(doctor_id=UNKNOWN))
    error = caught.value
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "DOCTOR_NOT_FOUND")
    assert error.metadata == {"doctor_id": UNKNOWN}
    assert isinstance(error.__cause__, grpc.aio.AioRpcError)
    assert str(error) == "NOT_FOUND DOCTOR_NOT_FOUND: The doctor does not exist."
    assert (error.field_violations, error.retry_after, error.error_id) == ((), None, "")


async def test_an_invalid_request_names_its_fields(desk: FrontdeskClient) -> None:
    """The error of INVALID_FIELD has its violations."""
    with pytest.raises(FrontdeskError) as caught:
        await desk.doctors.GetDoctor(doctor_pb2.GetDoctorRequest(doctor_id="x"))
    assert [violation.field for violation in caught.value.field_violations] == ["doctor_id"]
    assert pickle.loads(pickle.dumps(caught.value)).field_violations == caught.value.field_violations


async def test_nobody_answers(unused_tcp_port: int) -> None:
    """Without a service, the error has no reason, and comes after gRPC's retries."""
    async with FrontdeskClient(f"127.0.0.1:{unused_tcp_port}") as desk:
        with pytest.raises(FrontdeskError) as caught:
            await desk.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest())
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.UNAVAILABLE, "")


async def test_every_mutation_gets_a_key(desk: FrontdeskClient, front: Front) -> None:
    """The client gives each change a key, and leaves the caller's request as it is: sent again, it is a new change."""
    request = clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="One", time_zone="UTC"))
    first, second = [await desk.clinics.CreateClinic(request) for _ in range(2)]
    assert request.idempotency_key == ""
    assert first.clinic.id != second.clinic.id
    keys = front.sql("select caller, length(key) from idempotency where method = 'CreateClinic'")
    assert keys == [("name:test", 32)] * 2


async def test_a_given_key_is_kept(desk: FrontdeskClient) -> None:
    """With the caller's own key, the change happens once."""
    request = clinic_pb2.CreateClinicRequest(
        clinic=clinic_pb2.Clinic(name="One", time_zone="UTC"), idempotency_key="mine"
    )
    first, second = [await desk.clinics.CreateClinic(request) for _ in range(2)]
    assert (first.clinic.id, first.replayed, second.replayed) == (second.clinic.id, False, True)


async def test_a_dry_run_stays_one(desk: FrontdeskClient, front: Front) -> None:
    """A call with validate_only books nothing, even with the client's key."""
    doctor, patient = await front.doctor(), await front.patient()
    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
    request = appointment_pb2.BookAppointmentRequest(patient_id=patient.id, doctor_day=target, validate_only=True)
    answers = [await desk.appointments.BookAppointment(request) for _ in range(2)]
    assert [answer.appointment.number for answer in answers] == [1, 1]
    request.validate_only = False
    assert (await desk.appointments.BookAppointment(request)).appointment.id


async def test_calls_are_grpc_calls(desk: FrontdeskClient) -> None:
    """The result of a stub has a code and can be gathered, like gRPC's own calls."""
    call = desk.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest(), timeout=5)
    await asyncio.gather(call, desk.clinics.ListClinics(clinic_pb2.ListClinicsRequest()))
    assert await call.code() is grpc.StatusCode.OK


async def test_retries_act_once() -> None:
    """gRPC retries UNAVAILABLE, ABORTED and CANCELLED mutations with the same key; it retries no other refusal."""
    keys: list[str] = []
    codes = [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED]

    async def create(raw: bytes, context: Any) -> bytes:
        request = clinic_pb2.CreateClinicRequest.FromString(raw)
        keys.append(request.idempotency_key)
        if codes:
            await context.abort(codes.pop(), "once more")
        if request.clinic.name == "":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no")
        return clinic_pb2.CreateClinicResponse(clinic=request.clinic).SerializeToString()

    handlers: dict[str, Any] = {"CreateClinic": grpc.unary_unary_rpc_method_handler(create)}
    async with (
        serving("clinic.frontdesk.v1.ClinicService", handlers) as port,
        FrontdeskClient(f"127.0.0.1:{port}") as desk,
    ):
        await desk.clinics.CreateClinic(clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="One")))
        assert len(keys) == 4
        assert len(set(keys)) == 1
        with pytest.raises(FrontdeskError):
            await desk.clinics.CreateClinic(clinic_pb2.CreateClinicRequest())
        assert len(keys) == 5


async def test_a_server_can_forbid_retries() -> None:
    """A negative pushback (gRFC A6) ends the retries of an ABORTED call, as a stale etag requires."""
    attempts: list[bytes] = []

    async def update_clinic(raw: bytes, context: Any) -> bytes:
        attempts.append(raw)
        await context.abort(grpc.StatusCode.ABORTED, "stale", (("grpc-retry-pushback-ms", "-1"),))
        raise AssertionError

    handlers: dict[str, Any] = {"UpdateClinic": grpc.unary_unary_rpc_method_handler(update_clinic)}
    async with (
        serving("clinic.frontdesk.v1.ClinicService", handlers) as port,
        FrontdeskClient(f"127.0.0.1:{port}") as desk,
    ):
        with pytest.raises(FrontdeskError):
            await desk.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest())
    assert len(attempts) == 1


def test_the_service_config_covers_every_service() -> None:
    """The published JSON names every service, keeps gRPC's limits, and leaves streams to their resume tokens."""
    config = json.loads(SERVICE_CONFIG)
    retried, watch = config["methodConfig"]
    assert {name["service"] for name in retried["name"]} == services_of_the_protos()
    assert retried["retryPolicy"]["maxAttempts"] <= 5
    assert set(retried["retryPolicy"]["retryableStatusCodes"]) == {"UNAVAILABLE", "ABORTED", "CANCELLED"}
    assert watch == {
        "name": [
            {"service": "clinic.frontdesk.v1.QueueService", "method": "WatchQueue"},
            {"service": "clinic.frontdesk.v1.EventService", "method": "WatchEvents"},
        ]
    }
    assert dict(CHANNEL_OPTIONS)["grpc.service_config"] == SERVICE_CONFIG


class Recorder:
    """A channel that records the requested methods."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> None:
        self.methods.append(method)

    unary_stream = unary_unary


def services_of_the_protos() -> set[str]:
    """The full names of all services."""
    found = (re.findall(r"^service (\w+)", path.read_text(), re.MULTILINE) for path in PROTOS.glob("*.proto"))
    return {f"clinic.frontdesk.v1.{name}" for names in found for name in names}


def test_the_clients_offer_every_service() -> None:
    """Each service of the protos is an attribute of both clients."""
    recorder = Recorder()
    desk = SyncFrontdeskClient(cast(grpc.Channel, recorder))
    for name in vars(Stubs):
        if not name.startswith("_"):
            getattr(desk, name)
    assert {method.split("/")[1] for method in recorder.methods} == services_of_the_protos()
    assert issubclass(FrontdeskClient, Stubs)
    assert "clinics" in pydoc.plain(pydoc.render_doc(FrontdeskClient))


@pytest.mark.parametrize("caller", ["", "x" * 65, "recepção", "a\nb"])
def test_a_caller_that_metadata_cannot_hold(caller: str) -> None:
    """A caller's name is printable ASCII."""
    with pytest.raises(ValueError, match="caller"):
        SyncFrontdeskClient("127.0.0.1:1", caller=caller)


# The watch


async def test_a_watch_tells_every_change(desk: FrontdeskClient, front: Front) -> None:
    """The first update is the present queue; later ones list the changes; heartbeats are not yielded."""
    doctor = await front.doctor()
    lives: list[bool] = []
    watcher = Watcher(desk.watch_updates(doctor.id, on_connection=lives.append))
    first = await watcher.reaches(1)
    assert first.fresh
    assert first.changes == ()
    revision = (await front.arrive(doctor.id)).revision
    assert [entry.ticket for entry in (await watcher.reaches(revision)).queue.entries] == [1]
    watcher.assert_nothing_missed()
    assert lives == [True]
    await watcher.end()


async def test_a_watch_of_queues(desk: FrontdeskClient, front: Front) -> None:
    """watch_queue yields queues only, and leaving the loop ends the stream at the server."""
    doctor = await front.doctor()
    async with aclosing(desk.watch_queue(doctor.id, today())) as queues:
        assert (await anext(queues)).revision == 1
        await front.arrive(doctor.id)
        assert (await anext(queues)).revision > 1


@pytest.mark.parametrize("drain", [True, False], ids=["drained", "killed"])
async def test_a_watch_survives_a_restart(
    conninfo: str, settings: Settings, drain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a server restarts on its port, cleanly or not, the watcher misses no revision and gets none twice."""
    monkeypatch.setattr("frontdesk.rpc.stream.DRAIN_SPREAD_SECONDS", 0.2)
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    # Another server on the same database, through which work continues meanwhile.
    other = Worker(settings, conninfo)
    other_port = await other.start("127.0.0.1:0")
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{other_port}") as channel,
        FrontdeskClient(f"127.0.0.1:{port}") as desk,
    ):
        front = Front(channel, conninfo, other_port)
        doctor = await front.doctor(max_patients_per_day=100)
        lives: list[bool] = []
        watcher = Watcher(desk.watch_updates(doctor.id, on_connection=lives.append))
        await watcher.reaches((await front.arrive(doctor.id)).revision)
        for round_ in range(2):
            await worker.stop(drain=drain)
            await until(lambda: lives[-1:] == [False])
            answer = await front.arrive(doctor.id)
            assert watcher.seen[-1].queue.revision < answer.revision
            worker = Worker(settings, conninfo)
            assert await worker.start(f"127.0.0.1:{port}") == port
            update = await watcher.reaches(answer.revision)
            assert not update.fresh, round_
        watcher.assert_nothing_missed()
        assert lives == [True, False, True, False, True]
        await watcher.end()
    await worker.stop(drain=False)
    await other.stop(drain=False)


async def test_a_watch_goes_on_from_a_token(desk: FrontdeskClient, front: Front) -> None:
    """Another watch continues from an earlier one's token, and gets the changes since."""
    doctor = await front.doctor()
    async with aclosing(desk.watch_updates(doctor.id)) as updates:
        token = (await anext(updates)).resume_token
    revision = (await front.arrive(doctor.id)).revision
    async with aclosing(desk.watch_updates(doctor.id, resume_token=token)) as updates:
        update = await anext(updates)
    assert (update.previous_revision, update.queue.revision) == (1, revision)
    assert [change.revision for change in update.changes] == [*range(2, revision + 1)]


@pytest.mark.parametrize(
    ("doctor_id", "token", "reason"),
    [(UNKNOWN, "", "DOCTOR_NOT_FOUND"), ("x", "", "INVALID_FIELD"), (UNKNOWN, "x", "INVALID_FIELD")],
)
async def test_a_watch_that_cannot_be(desk: FrontdeskClient, doctor_id: str, token: str, reason: str) -> None:
    """An error that another attempt would repeat is raised."""
    with pytest.raises(FrontdeskError) as caught:
        await anext(desk.watch_updates(doctor_id, resume_token=token))
    assert caught.value.reason == reason


async def test_cancelling_ends_the_stream(desk: FrontdeskClient, front: Front) -> None:
    """Cancelling a watch works, and the client can be used afterwards."""
    doctor = await front.doctor()
    watcher = Watcher(desk.watch_updates(doctor.id))
    await watcher.reaches(1)
    watcher.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watcher.task
    await desk.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest())


async def test_closing_the_client_ends_its_watches(front: Front) -> None:
    """A watch ends soon and without an error when its client is closed."""
    doctor = await front.doctor()
    desk = FrontdeskClient(f"127.0.0.1:{front.port}")
    watcher = Watcher(desk.watch_updates(doctor.id))
    await watcher.reaches(1)
    await desk.close()
    async with asyncio.timeout(5):
        await watcher.task


# The watch on faulty servers


class Script:
    """A QueueService that answers each WatchQueue with the next part of a script, and records the requests."""

    def __init__(self, *parts: Callable[[Any], Awaitable[None]]) -> None:
        self._parts = list(parts)
        self.requests: list[queue_pb2.WatchQueueRequest] = []
        self.times: list[float] = []

    async def watch(self, raw: bytes, context: Any) -> None:
        self.requests.append(queue_pb2.WatchQueueRequest.FromString(raw))
        self.times.append(time.monotonic())
        await (self._parts.pop(0) if self._parts else silent())(context)

    def serving(self) -> "serving":
        return serving(
            "clinic.frontdesk.v1.QueueService", {"WatchQueue": grpc.unary_stream_rpc_method_handler(self.watch)}
        )


class serving:
    """A server with these handlers; yields its port."""

    def __init__(self, service: str, handlers: dict[str, Any]) -> None:
        self._service, self._handlers = service, handlers

    async def __aenter__(self) -> int:
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self._service, self._handlers),))
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return port

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)


def update(revision: int, previous: int, changes: list[int] | None = None) -> queue_pb2.WatchQueueResponse:
    """An update, complete unless other changes are given."""
    if changes is None:
        changes = [*range(previous + 1, revision + 1)] if previous else []
    return queue_pb2.WatchQueueResponse(
        revision=revision,
        previous_revision=previous,
        resume_token=f"at {revision}",
        update=queue_pb2.QueueUpdate(
            queue=queue_pb2.Queue(revision=revision),
            changes=[queue_pb2.QueueChange(revision=number) for number in changes],
        ),
    )


def heartbeat(revision: int) -> queue_pb2.WatchQueueResponse:
    """A heartbeat."""
    return queue_pb2.WatchQueueResponse(
        revision=revision, previous_revision=revision, resume_token=f"at {revision}", heartbeat=queue_pb2.Heartbeat()
    )


def said(*messages: queue_pb2.WatchQueueResponse) -> Callable[[Any], Awaitable[None]]:
    """Send these messages, then end with OK."""

    async def part(context: Any) -> None:
        for message in messages:
            await context.write(message.SerializeToString())

    return part


def silent(*messages: queue_pb2.WatchQueueResponse) -> Callable[[Any], Awaitable[None]]:
    """Send these messages, then nothing more."""

    async def part(context: Any) -> None:
        await said(*messages)(context)
        await asyncio.Event().wait()

    return part


def failed(
    code: grpc.StatusCode, *messages: queue_pb2.WatchQueueResponse, retry_after: float | None = None
) -> Callable[[Any], Awaitable[None]]:
    """Send these messages, then end with this status."""

    async def part(context: Any) -> None:
        await said(*messages)(context)
        trailers: tuple[tuple[str, bytes], ...] = ()
        if retry_after is not None:
            delay = duration_pb2.Duration(nanos=int(retry_after * 1e9))
            trailers = (("grpc-status-details-bin", details(error_details_pb2.RetryInfo(retry_delay=delay))),)
        await context.abort(code, "as the script says", trailers)

    return part


async def followed(script: Script, count: int, **options: Any) -> list[Update]:
    """The first updates of a watch of the scripted server."""
    async with (
        asyncio.timeout(20),
        script.serving() as port,
        FrontdeskClient(f"127.0.0.1:{port}") as desk,
        aclosing(desk.watch_updates(UNKNOWN, **options)) as updates,
    ):
        return [await anext(updates) for _ in range(count)]


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.OK,
    ],
)
async def test_any_interruption_is_resumed(code: grpc.StatusCode) -> None:
    """However a stream ends, the next one continues from its last token, and only changes are yielded."""
    ending = (
        said(update(5, 0), heartbeat(5)) if code is grpc.StatusCode.OK else failed(code, update(5, 0), heartbeat(5))
    )
    script = Script(ending, said(heartbeat(5)), silent(update(7, 5)))
    updates = await followed(script, 2)
    assert [(one.previous_revision, one.queue.revision) for one in updates] == [(0, 5), (5, 7)]
    assert [request.resume_token for request in script.requests] == ["", "at 5", "at 5"]


async def test_a_silent_stream_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a stream has no heartbeats, the client leaves it and opens another."""
    monkeypatch.setattr(watch_state, "SILENT_INTERVALS", 0.01)
    script = Script(silent(update(5, 0)), silent(update(6, 5)))
    lives: list[bool] = []
    assert len(await followed(script, 2, heartbeat=5, on_connection=lives.append)) == 2
    assert lives == [True, False, True]


async def test_a_planned_end_says_when_to_come_back() -> None:
    """The client waits for StreamClosing's delay, whether it is longer or shorter than its back-off."""
    closing_ = queue_pb2.StreamClosing(reconnect_delay=duration_pb2.Duration(nanos=400_000_000))
    script = Script(
        said(update(5, 0), queue_pb2.WatchQueueResponse(revision=5, previous_revision=5, closing=closing_)),
        silent(update(6, 5)),
    )
    await followed(script, 2)
    assert script.times[1] - script.times[0] >= 0.4
    assert script.requests[1].resume_token == "at 5"


async def test_a_pushback_is_obeyed() -> None:
    """A refused watcher does not retry before the delay in the refusal has passed."""
    script = Script(failed(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.5), silent(update(5, 0)))
    await followed(script, 1)
    assert script.times[1] - script.times[0] >= 0.5


@pytest.mark.parametrize(
    "wrong", [update(9, 7), update(9, 5, [6, 7, 9]), heartbeat(6)], ids=["gap", "change missing", "heartbeat ahead"]
)
async def test_what_is_missing_is_said(wrong: queue_pb2.WatchQueueResponse) -> None:
    """A watcher that may have missed something starts afresh and says so; it never passes on a gap."""
    script = Script(silent(update(5, 0), wrong), silent(update(9, 0)))
    updates = await followed(script, 2)
    assert [(one.fresh, one.queue.revision) for one in updates] == [(True, 5), (True, 9)]
    assert script.requests[1].resume_token == ""


async def test_a_token_that_became_invalid() -> None:
    """If a server cannot read our token any more, the watch starts afresh and does not end."""
    script = Script(said(update(5, 0)), failed(grpc.StatusCode.INVALID_ARGUMENT), silent(update(6, 0)))
    assert [one.fresh for one in await followed(script, 2)] == [True, True]
    assert [request.resume_token for request in script.requests] == ["", "at 5", ""]


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED]
)
async def test_final_errors_are_raised(code: grpc.StatusCode) -> None:
    """An error that another attempt would repeat ends the watch, even later on."""
    with pytest.raises(FrontdeskError) as caught:
        await followed(Script(said(update(5, 0)), failed(code)), 2)
    assert caught.value.code is code


# The watch when errors persist


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow without the usual pauses."""
    monkeypatch.setattr(watch_state, "LONGEST_PAUSE", 0.01)


TOO_LARGE = update(60_000, 5)
TOO_LARGE.update.changes[0].appointment_id = "x" * 5_000_000
"""An update larger than the 4 MiB that gRPC's clients receive by default. Our server sends none; other servers may."""
Follow = Callable[[Script, int], Awaitable[list[Update]]]


async def followed_by_sync(script: Script, count: int) -> list[Update]:
    """Like `followed`, with the synchronous client."""

    def follow(port: int) -> list[Update]:
        with (
            SyncFrontdeskClient(f"127.0.0.1:{port}") as desk,
            closing(desk.watch_updates(UNKNOWN)) as updates,
        ):
            return [next(updates) for _ in range(count)]

    async with script.serving() as port, asyncio.timeout(20):
        return await asyncio.to_thread(follow, port)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of the client's log."""
    return [record.getMessage() for record in caplog.records if record.name == "frontdesk.client"]


both_clients = pytest.mark.parametrize("follow", [followed, followed_by_sync], ids=["asyncio", "sync"])


@both_clients
@pytest.mark.usefixtures("short_pauses")
async def test_too_much_to_tell_becomes_a_fresh_start(follow: Follow, caplog: pytest.LogCaptureFixture) -> None:
    """If the update since the token is too large to receive, the watch gives up the token and logs that."""
    script = Script(said(update(5, 0)), *[said(TOO_LARGE)] * 5, silent(update(60_000, 0)))
    updates = await follow(script, 2)
    assert [(one.fresh, one.queue.revision) for one in updates] == [(True, 5), (True, 60_000)]
    assert [request.resume_token for request in script.requests] == ["", *["at 5"] * 5, ""]
    [warning] = warnings_of(caplog)
    assert warning.startswith(f"no message about doctor {UNKNOWN} in 5 attempts to watch: RESOURCE_EXHAUSTED: ")


@both_clients
@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("part", "code"),
    [
        (said(TOO_LARGE), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (failed(grpc.StatusCode.INTERNAL), grpc.StatusCode.INTERNAL),
        (failed(grpc.StatusCode.UNKNOWN), grpc.StatusCode.UNKNOWN),
        (failed(grpc.StatusCode.DATA_LOSS), grpc.StatusCode.DATA_LOSS),
        (failed(grpc.StatusCode.FAILED_PRECONDITION), grpc.StatusCode.FAILED_PRECONDITION),
        (said(), grpc.StatusCode.UNKNOWN),
        (said(update(9, 7, [9])), grpc.StatusCode.DATA_LOSS),
    ],
    ids=["too large", "INTERNAL", "UNKNOWN", "DATA_LOSS", "FAILED_PRECONDITION", "empty", "gap"],
)
async def test_what_waiting_does_not_mend_is_raised(
    follow: Follow, part: Callable[[Any], Awaitable[None]], code: grpc.StatusCode
) -> None:
    """If streams keep failing before their first message, the watch ends after ten attempts, begun or not."""
    for begun in ([], [said(update(5, 0))]):
        script = Script(*begun, *[part] * 50)
        with pytest.raises(FrontdeskError) as caught:
            await follow(script, 2)
        assert caught.value.code is code
        assert len(script.requests) == 10 + len(begun)


@both_clients
@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    "part",
    [
        failed(grpc.StatusCode.UNAVAILABLE),
        failed(grpc.StatusCode.ABORTED),
        failed(grpc.StatusCode.DEADLINE_EXCEEDED),
        failed(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.01),
    ],
    ids=["UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED with RetryInfo"],
)
async def test_what_passes_is_waited_for(
    follow: Follow, part: Callable[[Any], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    """The watch waits for a server that is away for long, logs that now and then, and keeps its token."""
    script = Script(said(update(5, 0)), *[part] * 25, silent(update(6, 5)))
    updates = await follow(script, 2)
    assert [one.previous_revision for one in updates] == [0, 5]
    assert [re.search(r"in (\d+) attempts", text)[1] for text in warnings_of(caplog)] == ["5", "10", "20"]  # type: ignore[index]


@pytest.mark.usefixtures("short_pauses")
async def test_messages_reset_the_count() -> None:
    """Streams that start well and fail later are resumed any number of times."""
    parts = [failed(grpc.StatusCode.INTERNAL, update(number, number - 1)) for number in range(6, 40)]
    updates = await followed(Script(said(update(5, 0)), *parts), 35)
    assert [one.queue.revision for one in updates] == [*range(5, 40)]


# The synchronous client, on gRPC's testing channel


@pytest.fixture
def channel() -> grpc_testing.Channel:
    """A channel whose server side the test plays."""
    return grpc_testing.channel(SERVICES, grpc_testing.strict_real_time())


def test_sync_refusals_are_typed(channel: grpc_testing.Channel) -> None:
    """All details of a refusal are parsed."""
    desk = SyncFrontdeskClient(channel)
    request = appointment_pb2.BookAppointmentRequest(patient_id=UNKNOWN)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(desk.appointments.BookAppointment, request)
        _, _, rpc = channel.take_unary_unary(BOOK)
        trailer = details(
            error_details_pb2.ErrorInfo(reason="DAY_FULL", metadata={"doctor_id": UNKNOWN}),
            error_details_pb2.BadRequest(
                field_violations=[error_details_pb2.BadRequest.FieldViolation(field="a.b", description="wrong")]
            ),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        )
        rpc.terminate(None, (("grpc-status-details-bin", trailer),), grpc.StatusCode.FAILED_PRECONDITION, "full")
        with pytest.raises(FrontdeskError) as caught:
            answer.result(timeout=10)
    error = caught.value
    assert (error.code, error.reason, error.message) == (grpc.StatusCode.FAILED_PRECONDITION, "DAY_FULL", "full")
    assert error.metadata == {"doctor_id": UNKNOWN}
    assert error.field_violations == (FieldViolation("a.b", "wrong"),)
    assert error.retry_after == 1.5
    assert isinstance(error.__cause__, grpc.RpcError)


@pytest.mark.parametrize("trailers", [(), (("grpc-status-details-bin", b"\xff"),)], ids=["none", "garbage"])
def test_sync_errors_without_details(channel: grpc_testing.Channel, trailers: tuple[tuple[str, bytes], ...]) -> None:
    """An error from a proxy between client and service is an error all the same."""
    desk = SyncFrontdeskClient(channel)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(desk.queues.GetQueue, queue_pb2.GetQueueRequest())
        channel.take_unary_unary(GET_QUEUE)[2].terminate(None, trailers, grpc.StatusCode.INTERNAL, "proxy")
        with pytest.raises(FrontdeskError, match=r"^INTERNAL: proxy$"):
            answer.result(timeout=10)


def test_sync_calls_have_key_and_caller(channel: grpc_testing.Channel) -> None:
    """A mutation has a key, a read has none; both have the caller's name and their own metadata."""
    desk = SyncFrontdeskClient(channel, caller="billing")
    with ThreadPoolExecutor(1) as pool:
        register = patient_pb2.RegisterPatientRequest()
        pool.submit(desk.patients.RegisterPatient, register, metadata=(("a", "b"),))
        metadata, sent, rpc = channel.take_unary_unary(REGISTER)
        assert len(sent.idempotency_key) == 32
        assert not register.idempotency_key
        assert {("frontdesk-caller", "billing"), ("a", "b")} <= {tuple(one) for one in metadata}
        rpc.terminate(patient_pb2.RegisterPatientResponse(), (), grpc.StatusCode.OK, "")
        read = pool.submit(desk.queues.GetQueue.with_call, queue_pb2.GetQueueRequest(doctor_id=UNKNOWN))
        metadata, sent, rpc = channel.take_unary_unary(GET_QUEUE)
        assert sent == queue_pb2.GetQueueRequest(doctor_id=UNKNOWN)
        rpc.terminate(queue_pb2.GetQueueResponse(), (), grpc.StatusCode.OK, "")
        assert read.result(timeout=10)[0] == queue_pb2.GetQueueResponse()
        future = desk.patients.RegisterPatient.future(register)
        assert len(channel.take_unary_unary(REGISTER)[1].idempotency_key) == 32
        future.cancel()


def test_sync_watch_resumes(channel: grpc_testing.Channel) -> None:
    """The synchronous watch opens its next stream with the last token."""
    desk = SyncFrontdeskClient(channel, caller="screen")
    with ThreadPoolExecutor(1) as pool, closing(desk.watch_updates(UNKNOWN, date(2026, 1, 31))) as updates:
        first = pool.submit(next, updates)
        metadata, request, rpc = channel.take_unary_stream(WATCH)
        assert ("frontdesk-caller", "screen") in {tuple(one) for one in metadata}
        assert request.date == day(date(2026, 1, 31))
        rpc.send_response(update(5, 0))
        assert first.result(timeout=10).fresh
        second = pool.submit(next, updates)
        rpc.terminate((), grpc.StatusCode.UNAVAILABLE, "gone")
        _, request, rpc = channel.take_unary_stream(WATCH)
        assert request.resume_token == "at 5"
        rpc.send_response(update(6, 5))
        assert second.result(timeout=10).previous_revision == 5


# The synchronous client, on real servers


async def test_sync_watch_of_a_real_server(front: Front) -> None:
    """A synchronous watcher in a thread sees the same as an asyncio one, and ends when its client is closed."""
    doctor = await front.doctor()
    seen: list[int] = []

    def follow(desk: SyncFrontdeskClient) -> None:
        for queue in desk.watch_queue(doctor.id):
            seen.append(queue.revision)

    with SyncFrontdeskClient(f"127.0.0.1:{front.port}") as desk:
        await asyncio.to_thread(desk.doctors.GetDoctor, doctor_pb2.GetDoctorRequest(doctor_id=doctor.id))
        with pytest.raises(FrontdeskError) as caught:
            await asyncio.to_thread(next, desk.watch_queue(UNKNOWN))
        assert caught.value.reason == "DOCTOR_NOT_FOUND"
        following = asyncio.create_task(asyncio.to_thread(follow, desk))
        await until(lambda: seen == [1])
        revision = (await front.arrive(doctor.id)).revision
        await until(lambda: seen[-1] == revision)
    async with asyncio.timeout(5):
        await following


async def test_sync_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The synchronous watch leaves a silent stream too, and its helper threads end with it."""
    monkeypatch.setattr(watch_state, "SILENT_INTERVALS", 0.01)
    script = Script(silent(update(5, 0)), silent(update(6, 5)))

    def follow(port: int) -> list[int]:
        with (
            SyncFrontdeskClient(f"127.0.0.1:{port}") as desk,
            closing(desk.watch_queue(UNKNOWN, heartbeat=5)) as queues,
        ):
            return [next(queues).revision for _ in range(2)]

    async with script.serving() as port, asyncio.timeout(20):
        assert await asyncio.to_thread(follow, port) == [5, 6]
    await until(lambda: not any(thread.name == "frontdesk-watch" for thread in threading.enumerate()))
