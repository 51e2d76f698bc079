"""Hold a running service against the contract's WatchQueue, through the API alone.

    async for result in conform("127.0.0.1:50051"):
        print(result.check.name, result.verdict)

For any server of the contract: each run makes a clinic, doctors and patients of its own, and leaves them there, since
nothing deletes them. What the streams say is read from the generated stubs, as it came, and not through our client,
which heals what should be seen here. A check is a function whose docstring names the rule and says the fact; it raises
where something else is seen, so that a run goes on with the next one.

The clinic lies where it is day now: what is done has to fall on one date there. So the two machines' clocks may differ
by some hours, not more.
"""

import asyncio
import datetime
import itertools
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal
from zoneinfo import ZoneInfo

import grpc
from google.protobuf import text_format
from google.protobuf.message import Message
from google.type.date_pb2 import Date
from rich.table import Table
from rich.text import Text

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, patient_pb2, queue_pb2, slot_pb2
from clinic.frontdesk.v1.appointment_pb2_grpc import AppointmentServiceStub
from clinic.frontdesk.v1.clinic_pb2_grpc import ClinicServiceStub
from clinic.frontdesk.v1.doctor_pb2_grpc import DoctorServiceStub
from clinic.frontdesk.v1.patient_pb2_grpc import PatientServiceStub
from clinic.frontdesk.v1.queue_pb2_grpc import QueueServiceStub
from clinic.frontdesk.v1.slot_pb2_grpc import SlotServiceStub
from frontdesk.client import FrontdeskError

DEFAULT_PATIENCE = 5.0
"""Seconds that a check waits for a message."""

STREAM_AGE = (20 * 60.0, 30 * 60.0)
"""Seconds after which a server ends a stream."""

WRITE_SECONDS = 30.0
"""Seconds that a watcher may leave a blocked write unread."""

_MARGIN = 2.0
"""Seconds by which what a server times may come late, for the network's sake."""
_CALL_SECONDS = 10.0
_CALLERS = 24
_LONG_LINE, _MANY_CHANGES = 80, 120
_PHONE = "+5511987654321"
# None changes its clocks; at every moment one of them is between 06:00 and 18:00.
_ZONES = ("UTC", "America/Phoenix", "Asia/Tokyo")

Verdict = Literal["PASS", "FAIL", "SKIPPED"]
Update = queue_pb2.WatchQueueResponse
_State = queue_pb2.QueueEntry.State
_Kind = queue_pb2.QueueChange.Kind
_GROUPS = [
    _State.STATE_WAITING,
    _State.STATE_CALLED,
    _State.STATE_IN_CONSULTATION,
    _State.STATE_PARKED,
    _State.STATE_MISSED,
]
_GONE = (_State.STATE_DONE, _State.STATE_LEFT)
_VERBS: dict[str, tuple[Any, _Kind.ValueType, _State.ValueType | None]] = {
    "CheckIn": (queue_pb2.CheckInRequest, _Kind.KIND_CHECKED_IN, _State.STATE_WAITING),
    "CallAgain": (queue_pb2.CallAgainRequest, _Kind.KIND_CALLED_AGAIN, _State.STATE_CALLED),
    "ReturnToLine": (queue_pb2.ReturnToLineRequest, _Kind.KIND_RETURNED, _State.STATE_WAITING),
    "ParkPatient": (queue_pb2.ParkPatientRequest, _Kind.KIND_PARKED, _State.STATE_PARKED),
    "MarkMissed": (queue_pb2.MarkMissedRequest, _Kind.KIND_MISSED, _State.STATE_MISSED),
    "LeaveQueue": (queue_pb2.LeaveQueueRequest, _Kind.KIND_LEFT, _State.STATE_LEFT),
    "StartAppointment": (
        appointment_pb2.StartAppointmentRequest,
        _Kind.KIND_STARTED,
        _State.STATE_IN_CONSULTATION,
    ),
    "CompleteAppointment": (appointment_pb2.CompleteAppointmentRequest, _Kind.KIND_COMPLETED, _State.STATE_DONE),
    # LEFT only where the patient is in the line; a booked one touches no line.
    "CancelAppointment": (appointment_pb2.CancelAppointmentRequest, _Kind.KIND_CANCELLED, _State.STATE_LEFT),
    "MarkNoShow": (appointment_pb2.MarkNoShowRequest, _Kind.KIND_NO_SHOW, None),
}
"""The verbs that take an appointment: the request, the kind of change, and the state of the entry after it."""


# What checks are made of


@dataclass(frozen=True, slots=True)
class Check:
    """One fact that a server of the contract keeps."""

    name: str
    rule: str
    """Where the contract says it: the rules of WatchQueue by number, other sections by name."""
    fact: str
    run: Callable[["Desk"], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one check."""

    check: Check
    verdict: Verdict
    said: str
    """What was expected and what was seen, or why nothing was tried; empty where it passed."""
    seconds: float


class Mismatch(Exception):
    """The server says something else than the contract; the message has what was expected and what was seen."""

    def __init__(self, what: str, seen: object, expected: object) -> None:
        super().__init__(f"{what}: expected {_text(expected)}, seen {_text(seen)}")


class Skipped(Exception):
    """The check cannot be made now; the message says why."""


CHECKS: dict[str, Check] = {}
"""Every check by its name, in the order of a run."""


def _check(run: Callable[["Desk"], Awaitable[None]]) -> Callable[["Desk"], Awaitable[None]]:
    rule, _, fact = " ".join((run.__doc__ or "").split()).partition(": ")
    name = run.__name__.replace("_", "-")
    CHECKS[name] = Check(name, re.sub("^Rules? ", "", rule), fact, run)
    return run


def _expect(what: str, seen: object, expected: object) -> None:
    if seen != expected:
        raise Mismatch(what, seen, expected)


def _expect_same(what: str, seen: Message, expected: Message) -> None:
    """As `_expect`, naming the first field that differs."""
    if seen != expected:
        raise Mismatch(*_difference(what, seen, expected))


def _difference(path: str, seen: Any, expected: Any) -> tuple[str, Any, Any]:
    if isinstance(expected, Message):
        for name in expected.DESCRIPTOR.fields_by_name:
            if getattr(seen, name) != getattr(expected, name):
                return _difference(f"{path}.{name}", getattr(seen, name), getattr(expected, name))
    elif not isinstance(expected, str | bytes) and isinstance(expected, Sequence) and len(seen) == len(expected):
        for place, (left, right) in enumerate(zip(seen, expected, strict=True)):
            if left != right:
                return _difference(f"{path}[{place}]", left, right)
    return path, seen, expected


def _text(value: object) -> str:
    if isinstance(value, Message):
        said = text_format.MessageToString(value, as_one_line=True) or "an empty message"
    elif isinstance(value, str):
        said = value or "nothing"
    elif isinstance(value, list):
        said = f"[{', '.join(map(_text, value))}]"
    else:
        said = str(value)
    return said if len(said) <= 300 else f"{said[:300]} …"


def _name(number: _State.ValueType | None) -> str:
    # An enum of proto3 is open: another server may send a number that we do not know.
    if number is None:
        return "no entry"
    return _State.Name(number).removeprefix("STATE_") if number in _State.values() else str(number)


def _kind(number: _Kind.ValueType) -> str:
    return _Kind.Name(number).removeprefix("KIND_") if number in _Kind.values() else str(number)


async def _ask(method: Any, request: Message) -> Any:
    """Make a unary call."""
    # `method` and answer as Any: a stub's methods have no type in common that says what they answer.
    return await method(request, timeout=_CALL_SECONDS)


async def _expect_refusal(call: Awaitable[object], code: grpc.StatusCode, reason: str) -> None:
    expected = f"{code.name} {reason}"
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        refused = FrontdeskError.of(error)
        _expect("refusal", f"{refused.code.name} {refused.reason}", expected)
    else:
        raise Mismatch("refusal", answer, expected)


async def _together(*work: Coroutine[Any, Any, object]) -> None:
    """Do all of it at once; the first failure ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


class Watch:
    """One stream, as it came. Nothing reads ahead: what is not asked for stays with the server."""

    def __init__(self, call: Any, patience: float) -> None:
        self._messages = aiter(call)
        self._patience = patience
        self.updates: list[Update] = []
        """The updates that were read, the first message included."""

    @property
    def changes(self) -> list[queue_pb2.QueueChange]:
        """Every change that was told, in the order in which it was."""
        return [change for update in self.updates for change in update.update.changes]

    async def next(self, patience: float | None = None) -> Update:
        """The next message of any kind."""
        patience = self._patience if patience is None else patience
        try:
            async with asyncio.timeout(patience):
                message: Update = await anext(self._messages)
        except TimeoutError:
            raise Mismatch("stream", f"nothing for {patience:g} s", "a message") from None
        except StopAsyncIteration:
            raise Mismatch("stream", "its end with status OK", "a message") from None
        if message.HasField("update"):
            self.updates.append(message)
        return message

    async def end(self) -> None:
        """Expect no message any more, and status OK."""
        try:
            async with asyncio.timeout(self._patience):
                message = await anext(self._messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Mismatch("stream", f"nothing for {self._patience:g} s", "its end with status OK") from None
        raise Mismatch("stream", message, "its end with status OK")

    async def reach(self, revision: int) -> Update:
        """Read on until an update has this revision, or a later one; that update."""
        # Each new revision is a sign of life; heartbeats and repetitions are none.
        silent_at = time.monotonic() + self._patience
        while not self.updates or self.updates[-1].revision < revision:
            before = self.updates[-1].revision if self.updates else 0
            left = silent_at - time.monotonic()
            if left <= 0:
                raise Mismatch("stream", f"revision {before} for {self._patience:g} s", f"revision {revision}")
            try:
                await self.next(left)
            except Mismatch as mismatch:
                raise Mismatch("stream", f"revision {before}, then: {mismatch}", f"revision {revision}") from None
            if self.updates and self.updates[-1].revision > before:
                silent_at = time.monotonic() + self._patience
        return self.updates[-1]


class Line:
    """The order of a line by the contract's words alone."""

    def __init__(self, entries: Sequence[queue_pb2.QueueEntry] = ()) -> None:
        self._places: dict[str, tuple[_State.ValueType, tuple[int, int]]] = {}
        self._last_ticket = 0
        for entry in entries:
            self.take(entry.appointment_id, entry.state, entry.ticket, 0)

    def take(self, appointment_id: str, state: _State.ValueType, ticket: int, revision: int) -> None:
        """The patient with this ticket came into this state, by the change that made this revision."""
        before = self._places.pop(appointment_id, None)
        self._last_ticket = max(self._last_ticket, ticket)
        place = (ticket, 0)
        if state == _State.STATE_WAITING and before is not None and before[0] == _State.STATE_MISSED:
            # At the end: behind every ticket that is given out, and before those that will be.
            place = (self._last_ticket, revision)
        if state not in _GONE:
            self._places[appointment_id] = (state, place)

    def order(self) -> list[tuple[str, _State.ValueType]]:
        """The appointments that a queue shows, in its order, with their states."""
        ordered = sorted(self._places.items(), key=lambda item: (_GROUPS.index(item[1][0]), item[1][1]))
        return [(appointment_id, state) for appointment_id, (state, _) in ordered]


@dataclass(frozen=True, slots=True)
class Step:
    """One change that a doctor-day was asked for, what its answer said, and what must be true then."""

    verb: str
    kind: _Kind.ValueType
    revision: int
    """As answered."""
    appointment_id: str
    state: _State.ValueType | None
    """The state of the entry after it; None where the line is not touched."""
    entry: queue_pb2.QueueEntry | None
    """As answered, by the verbs that answer one."""
    order: list[tuple[str, _State.ValueType]]
    expected_count: int


class Day:
    """One doctor-day: changes it, and keeps a record of each change in `steps`."""

    def __init__(self, desk: "Desk", doctor_id: str, date: datetime.date) -> None:
        self._desk = desk
        self._line = Line()
        self._expected: set[str] = set()
        self._tickets: dict[str, int] = {}
        self.doctor_id = doctor_id
        self.date = date
        self.steps: list[Step] = []

    @property
    def revision(self) -> int:
        """Where it stands, as far as it was changed through this object."""
        return max((step.revision for step in self.steps), default=1)

    @property
    def target(self) -> appointment_pb2.DoctorDay:
        """As bookings name it."""
        return appointment_pb2.DoctorDay(doctor_id=self.doctor_id, date=_date(self.date))

    async def queue(self) -> queue_pb2.Queue:
        """The line as GetQueue answers it."""
        request = queue_pb2.GetQueueRequest(doctor_id=self.doctor_id, date=_date(self.date))
        answer: queue_pb2.GetQueueResponse = await _ask(self._desk.queues.GetQueue, request)
        return answer.queue

    async def availability(self) -> Step:
        """Say that the doctor is there."""
        request = doctor_pb2.SetDoctorAvailabilityRequest(
            doctor_id=self.doctor_id, date=_date(self.date), is_present=True
        )
        answer = await _ask(self._desk.doctors.SetDoctorAvailability, request)
        return self._record("SetDoctorAvailability", _Kind.KIND_AVAILABILITY, answer, "", None)

    async def book(self, patient_id: str = "") -> Step:
        """Book a place; for a new patient unless one is given."""
        request = appointment_pb2.BookAppointmentRequest(
            patient_id=patient_id or await self._desk.patient(),
            doctor_day=self.target,
        )
        answer = await _ask(self._desk.appointments.BookAppointment, request)
        self._expected.add(answer.appointment.id)
        return self._record("BookAppointment", _Kind.KIND_BOOKED, answer, answer.appointment.id, None)

    async def arrive(self) -> str:
        """A new patient, booked and checked in; the appointment."""
        appointment_id = (await self.book()).appointment_id
        await self.do("CheckIn", appointment_id)
        return appointment_id

    async def update(self, appointment_id: str) -> Step:
        """Change the notes."""
        appointment = appointment_pb2.Appointment(id=appointment_id, notes=uuid.uuid4().hex)
        request = appointment_pb2.UpdateAppointmentRequest(appointment=appointment)
        answer = await self._desk.appointments.UpdateAppointment(request)
        return self._record("UpdateAppointment", _Kind.KIND_UPDATED, answer, appointment_id, None)

    async def do(self, verb: str, appointment_id: str) -> Step:
        """Ask for one of the verbs that take an appointment."""
        request, kind, state = _VERBS[verb]
        service: Any = self._desk.queues if hasattr(self._desk.queues, verb) else self._desk.appointments
        answer = await _ask(getattr(service, verb), request(appointment_id=appointment_id))
        if verb == "CheckIn":
            self._tickets[appointment_id] = len(self._tickets) + 1
        if appointment_id not in self._tickets:
            state = None
        self._expected.discard(appointment_id)
        return self._record(verb, kind, answer, appointment_id, state)

    async def call_next(self, room: str = "") -> Step:
        """Call whom the server takes."""
        request = queue_pb2.CallNextRequest(doctor_id=self.doctor_id, date=_date(self.date), room=room)
        answer = await _ask(self._desk.queues.CallNext, request)
        return self._record("CallNext", _Kind.KIND_CALLED, answer, answer.entry.appointment_id, _State.STATE_CALLED)

    async def move(self, appointment_id: str, to: "Day", slot_id: str = "") -> Step:
        """Move a booking to another day, or to a slot of this one; the step on this day. The other's is recorded."""
        request = appointment_pb2.RescheduleAppointmentRequest(appointment_id=appointment_id)
        if slot_id:
            request.slot_id = slot_id
        else:
            request.doctor_day.CopyFrom(to.target)
        answer = await _ask(self._desk.appointments.RescheduleAppointment, request)
        self._expected.discard(appointment_id)
        to._expected.add(appointment_id)
        step = to._record("RescheduleAppointment", _Kind.KIND_MOVED_IN, answer, appointment_id, None)
        if to is self:
            _expect("vacated_revision within a doctor-day", answer.vacated_revision, answer.revision)
            return step
        answer.revision = answer.vacated_revision
        return self._record("RescheduleAppointment", _Kind.KIND_MOVED_OUT, answer, appointment_id, None)

    def _record(
        self, verb: str, kind: _Kind.ValueType, answer: Any, appointment_id: str, state: _State.ValueType | None
    ) -> Step:
        if state is not None:
            self._line.take(appointment_id, state, self._tickets.get(appointment_id, 0), answer.revision)
        entry = answer.entry if "entry" in answer.DESCRIPTOR.fields_by_name else None
        step = Step(verb, kind, answer.revision, appointment_id, state, entry, self._line.order(), len(self._expected))
        self.steps.append(step)
        return step


class Desk:
    """What a check is given: the stubs, and people and doctors who are this run's own."""

    def __init__(self, connect: Callable[[Sequence[tuple[str, int]]], grpc.aio.Channel], patience: float) -> None:
        self._connect = connect
        self._run = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)
        self._clinic_id = ""
        self.patience = patience
        self.channel = connect(())
        self._clinics = ClinicServiceStub(self.channel)
        self._patients = PatientServiceStub(self.channel)
        self._slots = SlotServiceStub(self.channel)
        self.doctors = DoctorServiceStub(self.channel)
        self.appointments = AppointmentServiceStub(self.channel)
        self.queues = QueueServiceStub(self.channel)

    async def open(self) -> None:
        """Have a clinic where it is day."""
        now = datetime.datetime.now(datetime.UTC)
        zone = next(zone for zone in _ZONES if 6 <= now.astimezone(ZoneInfo(zone)).hour < 18)
        clinic = clinic_pb2.Clinic(name=f"Conformance {self._run}", time_zone=zone)
        request = clinic_pb2.CreateClinicRequest(clinic=clinic)
        self._clinic_id = (await _ask(self._clinics.CreateClinic, request)).clinic.id

    async def day(self) -> Day:
        """Today of a new doctor."""
        code = f"CF-{self._run}-{next(self._numbers)}"
        doctor = doctor_pb2.Doctor(
            code=code, display_name=code, clinic_id=self._clinic_id, max_patients_per_day=2 * _CALLERS + _LONG_LINE
        )
        created = await _ask(self.doctors.CreateDoctor, doctor_pb2.CreateDoctorRequest(doctor=doctor))
        # Today is the server's to say.
        request = queue_pb2.GetQueueRequest(doctor_id=created.doctor.id)
        today = (await _ask(self.queues.GetQueue, request)).queue.date
        return Day(self, created.doctor.id, datetime.date(today.year, today.month, today.day))

    def day_after(self, day: Day) -> Day:
        """The same doctor's next date."""
        return Day(self, day.doctor_id, day.date + datetime.timedelta(days=1))

    async def patient(self, padding: str = "") -> str:
        """A new patient."""
        # One household: the phone is real enough for every server, and the names tell them apart.
        name = f"Conformance {self._run} {next(self._numbers)}"
        patient = patient_pb2.Patient(given_name=f"{name}{padding}"[:200], family_name=padding[:200], phone=_PHONE)
        request = patient_pb2.RegisterPatientRequest(patient=patient)
        registered: patient_pb2.RegisterPatientResponse = await _ask(self._patients.RegisterPatient, request)
        return registered.patient.id

    async def slot(self, day: Day) -> str:
        """A slot of this doctor, later today: the clinic's day has some hours left."""
        start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        slot = slot_pb2.Slot(doctor_id=day.doctor_id)
        slot.start_time.FromDatetime(start)
        slot.end_time.FromDatetime(start + datetime.timedelta(minutes=30))
        created: slot_pb2.CreateSlotResponse = await _ask(self._slots.CreateSlot, slot_pb2.CreateSlotRequest(slot=slot))
        return created.slot.id

    @asynccontextmanager
    async def watch(
        self, day: Day, token: str = "", *, heartbeat: int | None = None, channel: grpc.aio.Channel | None = None
    ) -> AsyncIterator[Watch]:
        """A stream of this doctor-day."""
        request = queue_pb2.WatchQueueRequest(doctor_id=day.doctor_id, date=_date(day.date), resume_token=token)
        if heartbeat is not None:
            request.heartbeat_interval.FromSeconds(heartbeat)
        async with self.stream(request, channel) as watch:
            yield watch

    @asynccontextmanager
    async def stream(
        self, request: queue_pb2.WatchQueueRequest, channel: grpc.aio.Channel | None = None
    ) -> AsyncIterator[Watch]:
        """The stream of this request."""
        queues = self.queues if channel is None else QueueServiceStub(channel)
        call = queues.WatchQueue(request)
        try:
            yield Watch(call, self.patience)
        finally:
            call.cancel()

    @asynccontextmanager
    async def unread(self, day: Day) -> AsyncIterator[Watch]:
        """A stream on a connection of its own, whose reader takes as little as HTTP/2 lets it until it is asked."""
        channel = self._connect((("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)))
        async with channel, self.watch(day, channel=channel) as watch:
            yield watch

    def needs(self, seconds: float) -> None:
        """Skip the check where nobody waits so long for a message."""
        if self.patience < seconds:
            raise Skipped(f"takes more patience: --patience {seconds:g} or more")


async def conform(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    only: Sequence[str] = (),
    patience: float = DEFAULT_PATIENCE,
) -> AsyncGenerator[Result]:
    """Make the checks, or `only` those with these names, one after another, and say what became of each.

    `patience` is how many seconds a check waits for a message. Raises KeyError for a name that is none, FrontdeskError
    where the service cannot be reached at all.
    """
    chosen = [CHECKS[name] for name in only] or list(CHECKS.values())

    def connect(options: Sequence[tuple[str, int]]) -> grpc.aio.Channel:
        # No pooling of connections: a second one is there to be another.
        given: Any = [*options, ("grpc.use_local_subchannel_pool", 1)]
        if credentials is None:
            return grpc.aio.insecure_channel(target, given)
        return grpc.aio.secure_channel(target, credentials, given)

    desk = Desk(connect, patience)
    async with desk.channel:
        try:
            await desk.open()
        except grpc.aio.AioRpcError as error:
            raise FrontdeskError.of(error) from error
        for check in chosen:
            yield await _judge(check, desk)


async def _judge(check: Check, desk: Desk) -> Result:
    verdict: Verdict = "FAIL"
    said = ""
    started = time.perf_counter()
    try:
        await check.run(desk)
        verdict = "PASS"
    except Skipped as why:
        verdict, said = "SKIPPED", str(why)
    except Mismatch as mismatch:
        said = str(mismatch)
    except grpc.aio.AioRpcError as error:
        said = f"expected success, seen {FrontdeskError.of(error)}"
    except Exception as error:
        # What a server says may be of a shape that no check thought of: its fault all the same, and the run goes on.
        said = f"expected an answer of the contract, seen one that is none: {type(error).__name__}: {error}"
    return Result(check, verdict, said, time.perf_counter() - started)


def report(results: Sequence[Result]) -> Table:
    """The results as a table for people, with how many of each below."""
    counts = [f"{sum(one.verdict == verdict for one in results)} {verdict}" for verdict in ("PASS", "FAIL", "SKIPPED")]
    table = Table(header_style="bold", caption=", ".join(counts), caption_justify="left")
    for heading in ("Rule", "Check", "Result"):
        table.add_column(heading, no_wrap=heading != "Rule")
    table.add_column("What must hold; what was expected and seen", ratio=1, overflow="fold")
    table.add_column("Seconds", justify="right")
    styles = {"PASS": "green", "FAIL": "bold red", "SKIPPED": "dim"}
    for one in results:
        # As text: what a server says is no markup.
        said = Text(one.check.fact, "dim")
        if one.said:
            said.append(f"\n{one.said}", "not dim")
        table.add_row(
            one.check.rule, one.check.name, Text(one.verdict, styles[one.verdict]), said, f"{one.seconds:.2f}"
        )
    return table


def _date(value: datetime.date) -> Date:
    return Date(year=value.year, month=value.month, day=value.day)


# What many checks watch


async def _play(desk: Desk, day: Day) -> AsyncGenerator[Step]:
    """A day with every kind of change, one after another, from every state of the line that each may come from."""
    tomorrow = desk.day_after(day)
    yield await day.availability()
    booked = []
    for _ in range(7):
        step = await day.book()
        booked.append(step.appointment_id)
        yield step
    a, b, c, d, e, f, g = booked
    yield await day.update(a)
    yield await day.move(b, day, await desk.slot(day))
    yield await day.move(c, tomorrow)
    await tomorrow.move(c, day)
    yield day.steps[-1]
    yield await day.do("CancelAppointment", d)
    yield await day.do("MarkNoShow", e)
    for one in (a, b, c, f, g):
        yield await day.do("CheckIn", one)
    yield await day.update(f)
    yield await day.call_next("1")
    yield await day.do("CallAgain", a)
    yield await day.do("ReturnToLine", a)
    # Back at the first place, so called again; and missed, so behind everybody.
    yield await day.call_next("2")
    yield await day.do("MarkMissed", a)
    yield await day.do("ReturnToLine", a)
    yield await day.do("ParkPatient", c)
    yield await day.call_next("1")
    yield await day.do("ParkPatient", b)
    yield await day.do("ReturnToLine", b)
    yield await day.call_next("1")
    yield await day.do("StartAppointment", b)
    yield await day.call_next("2")
    yield await day.do("MarkMissed", f)
    # Somebody in each of the five states from here on.
    yield await day.call_next("2")
    step = await day.book()
    yield step
    h = step.appointment_id
    yield await day.do("CheckIn", h)
    yield await day.do("CompleteAppointment", b)
    yield await day.do("StartAppointment", a)
    yield await day.do("LeaveQueue", h)
    yield await day.do("CancelAppointment", g)
    yield await day.do("LeaveQueue", c)
    yield await day.do("ReturnToLine", f)
    yield await day.do("CancelAppointment", f)
    yield await day.do("CompleteAppointment", a)


async def _step_by_step(desk: Desk) -> tuple[Day, Watch]:
    """Play a day, reading the update of each step before the next is taken."""
    day = await desk.day()
    async with desk.watch(day) as watch, aclosing(_play(desk, day)) as steps:
        await watch.next()
        async for step in steps:
            await watch.reach(step.revision)
    return day, watch


def _told(watch: Watch, step: Step) -> queue_pb2.QueueChange:
    """The change that the watcher was told of under the revision that the step was answered with."""
    for change in watch.changes:
        if change.revision == step.revision:
            return change
    raise Mismatch(
        f"changes after {step.verb}", [one.revision for one in watch.changes], f"one of revision {step.revision}"
    )


def _shown(watch: Watch, step: Step) -> queue_pb2.Queue:
    """The queue that the watcher was shown at the step's revision."""
    for update in watch.updates:
        if update.revision == step.revision:
            return update.update.queue
    raise Mismatch(
        f"updates after {step.verb}", [one.revision for one in watch.updates], f"one of revision {step.revision}"
    )


def _rush_changes() -> int:
    return sum(2 if caller % 4 == 3 else 4 for caller in range(_CALLERS))


async def _rush(day: Day) -> None:
    """Many callers who change one doctor-day at once."""

    async def caller(number: int) -> None:
        appointment_id = (await day.book()).appointment_id
        if number % 4 == 3:
            await day.do("CancelAppointment", appointment_id)
            return
        await day.do("CheckIn", appointment_id)
        # Never an empty line: nobody calls more often than checked in.
        called = (await day.call_next(str(number))).appointment_id
        await day.do("StartAppointment" if number % 2 else "ParkPatient", called)

    await _together(*(caller(number) for number in range(_CALLERS)))


async def _watched_rush(desk: Desk, watchers: int) -> tuple[Day, list[Watch]]:
    day = await desk.day()
    async with AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(desk.watch(day)) for _ in range(watchers)]
        for watch in watches:
            await watch.next()
        await _together(_rush(day), *(watch.reach(1 + _rush_changes()) for watch in watches))
    return day, watches


def _expect_chain(updates: Sequence[Update]) -> None:
    """Each update goes on from the one before it, and lists one change for each revision since."""
    for before, update in itertools.pairwise(updates):
        _expect(f"previous_revision at revision {update.revision}", update.previous_revision, before.revision)
        _expect_cover(update)


def _expect_cover(update: Update) -> None:
    _expect(
        f"revisions of the changes from {update.previous_revision} to {update.revision}",
        [change.revision for change in update.update.changes],
        [*range(update.previous_revision + 1, update.revision + 1)],
    )


# Rule 1: how a stream begins


@_check
async def starts_empty(desk: Desk) -> None:
    """Rules 1, 2: the first message of a doctor-day that nothing has happened to is its empty queue at revision 1."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        first = await watch.next()
    _expect("event", first.WhichOneof("event"), "update")
    _expect("revision", first.revision, 1)
    _expect("previous_revision", first.previous_revision, 0)
    _expect("number of changes", len(first.update.changes), 0)
    empty = queue_pb2.Queue(doctor_id=day.doctor_id, date=_date(day.date), revision=1)
    _expect_same("queue", first.update.queue, empty)


@_check
async def starts_whole(desk: Desk) -> None:
    """Rules 1, 2: the first message has all that was acknowledged before the stream was opened, as a fresh start."""
    day = await desk.day()
    for _ in range(3):
        await day.arrive()
    await day.book()
    await day.call_next("1")
    async with desk.watch(day) as watch:
        first = await watch.next()
    _expect("event", first.WhichOneof("event"), "update")
    _expect("revision", first.revision, day.revision)
    _expect("previous_revision", first.previous_revision, 0)
    _expect("number of changes", len(first.update.changes), 0)
    _expect_same("queue", first.update.queue, await day.queue())
    _expect("number of entries", len(first.update.queue.entries), 3)


@_check
async def default_date(desk: Desk) -> None:
    """Rule 1: a request without a date watches the clinic's today."""
    day = await desk.day()
    async with desk.stream(queue_pb2.WatchQueueRequest(doctor_id=day.doctor_id)) as watch:
        _expect_same("date", (await watch.next()).update.queue.date, _date(day.date))
        step = await day.book()
        await watch.reach(step.revision)


@_check
async def unknown_doctor(desk: Desk) -> None:
    """Errors: a watch of a doctor that does not exist is refused as NOT_FOUND, with or without a date."""
    nobody = Day(desk, str(uuid.uuid4()), (await desk.day()).date)
    async with desk.watch(nobody) as watch:
        await _expect_refusal(watch.next(), grpc.StatusCode.NOT_FOUND, "DOCTOR_NOT_FOUND")
    async with desk.stream(queue_pb2.WatchQueueRequest(doctor_id=nobody.doctor_id)) as watch:
        await _expect_refusal(watch.next(), grpc.StatusCode.NOT_FOUND, "DOCTOR_NOT_FOUND")


@_check
async def present_token(desk: Desk) -> None:
    """Rule 1: a token of the present revision is answered by a heartbeat, and the next update goes on from there."""
    day = await desk.day()
    for _ in range(2):
        async with desk.watch(day) as watch:
            token = (await watch.next()).resume_token
        async with desk.watch(day, token) as watch:
            first = await watch.next()
            _expect("event", first.WhichOneof("event"), "heartbeat")
            _expect("revision", first.revision, day.revision)
            before = day.revision
            step = await day.book()
            update = await watch.reach(step.revision)
        _expect("previous_revision", update.previous_revision, before)
        _expect_cover(update)


@_check
async def older_token(desk: Desk) -> None:
    """Rule 1: an older token, of revision 1 too, is answered by one update with exactly the changes since then."""
    day = await desk.day()
    tokens = []
    async with desk.watch(day) as watch:
        tokens.append(await watch.next())
        for _ in range(4):
            appointment_id = await day.arrive()
            tokens.append(await watch.reach(day.revision))
        await day.do("LeaveQueue", appointment_id)
        await watch.reach(day.revision)
    for known in tokens:
        async with desk.watch(day, known.resume_token) as watch:
            first = await watch.next()
        _expect("event", first.WhichOneof("event"), "update")
        _expect("previous_revision", first.previous_revision, known.revision)
        _expect("revision", first.revision, day.revision)
        _expect_cover(first)
        kinds = [_kind(step.kind) for step in day.steps if step.revision > known.revision]
        _expect("kinds of the changes", [_kind(change.kind) for change in first.update.changes], kinds)
        _expect_same("queue", first.update.queue, await day.queue())


@_check
async def tokens_and_times(desk: Desk) -> None:
    """Rules 1, 2: updates and heartbeats carry a token and the server's time; a heartbeat's token resumes too."""
    day = await desk.day()
    token = ""
    for event in ("update", "heartbeat", "heartbeat"):
        async with desk.watch(day, token) as watch:
            message = await watch.next()
        _expect("event", message.WhichOneof("event"), event)
        _expect(f"whether the {event} has a token", bool(message.resume_token), True)
        _expect(f"whether the {event} has a server_time", message.HasField("server_time"), True)
        token = message.resume_token


@_check
async def malformed_token(desk: Desk) -> None:
    """Rule 1: a malformed token is refused as INVALID_ARGUMENT."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        token = (await watch.next()).resume_token
    for malformed in ("garbage", "~", "AAAA", "[]", token[: len(token) // 2], token * 2):
        async with desk.watch(day, malformed) as watch:
            await _expect_refusal(watch.next(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@_check
async def foreign_token(desk: Desk) -> None:
    """Rule 1: the token of another doctor, or of another date of the same one, is refused as INVALID_ARGUMENT."""
    day, other = await desk.day(), await desk.day()
    for foreign in (other, desk.day_after(day)):
        async with desk.watch(foreign) as watch:
            token = (await watch.next()).resume_token
        async with desk.watch(day, token) as watch:
            await _expect_refusal(watch.next(), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")


@_check
async def lost_token(desk: Desk) -> None:
    """Rule 1: a token that is too old, from the future or from before a restore is answered with a fresh start."""
    raise Skipped("such a token cannot be got through the API: it takes a restored database")


# Rule 2: what an update says


@_check
async def chain(desk: Desk) -> None:
    """Rule 2: the previous_revision of each later update is the revision of the stream's last update."""
    day = await desk.day()
    async with desk.watch(day) as watch, aclosing(_play(desk, day)) as steps:
        await watch.next()
        async for _ in steps:
            pass
        await watch.reach(day.revision)
    for before, update in itertools.pairwise(watch.updates):
        _expect(f"previous_revision at revision {update.revision}", update.previous_revision, before.revision)


@_check
async def changes_cover(desk: Desk) -> None:
    """Rule 2: an update lists one change for each revision after previous_revision up to its own, in order."""
    _, watch = await _step_by_step(desk)
    for update in watch.updates[1:]:
        _expect_cover(update)


@_check
async def queue_identity(desk: Desk) -> None:
    """Rule 2: an update's queue is of the doctor-day and of the revision that the message says."""
    day, watch = await _step_by_step(desk)
    for update in watch.updates:
        queue = update.update.queue
        _expect("queue.revision", queue.revision, update.revision)
        _expect("queue.doctor_id", queue.doctor_id, day.doctor_id)
        _expect_same("queue.date", queue.date, _date(day.date))


@_check
async def kinds_of_change(desk: Desk) -> None:
    """Rule 2: each verb's change is told with its kind and its appointment, under the revision that was answered."""
    day, watch = await _step_by_step(desk)
    for step in day.steps:
        change = _told(watch, step)
        _expect(f"kind after {step.verb}", _kind(change.kind), _kind(step.kind))
        _expect(f"appointment_id after {step.verb}", change.appointment_id, step.appointment_id)
    never = {*_Kind.values()} - {step.kind for step in day.steps} - {_Kind.KIND_UNSPECIFIED}
    # A kind that a later contract adds would be forgotten here.
    _expect("kinds that were not tried", [_kind(kind) for kind in never], [])


@_check
async def entries_of_changes(desk: Desk) -> None:
    """Rule 2: a change has an entry exactly where the line is touched, in the state that the verb leads to."""
    day, watch = await _step_by_step(desk)
    for step in day.steps:
        change = _told(watch, step)
        state = change.entry.state if change.HasField("entry") else None
        _expect(f"entry after {step.verb}", _name(state), _name(step.state))
        if step.state is not None:
            _expect(f"entry.appointment_id after {step.verb}", change.entry.appointment_id, step.appointment_id)


@_check
async def answered_entries(desk: Desk) -> None:
    """Rules 2, 3: the entry of a change is the entry that the caller was answered."""
    day, watch = await _step_by_step(desk)
    for step in day.steps:
        if step.entry is not None:
            # The caller is answered as of the change, and so is a watcher who was told of it alone.
            _expect_same(f"entry after {step.verb}", _told(watch, step).entry, step.entry)


@_check
async def queue_order(desk: Desk) -> None:
    """Services: waiting in calling order (who missed: last), then called, in consultation, parked, missed."""
    day, watch = await _step_by_step(desk)
    for step in day.steps:
        shown = [(entry.appointment_id, entry.state) for entry in _shown(watch, step).entries]
        tickets = {entry.appointment_id: entry.ticket for entry in _shown(watch, step).entries}

        def told(order: list[tuple[str, _State.ValueType]], tickets: dict[str, int] = tickets) -> list[str]:
            return [f"{tickets.get(appointment_id, '?')} {_name(state)}" for appointment_id, state in order]

        if shown != step.order:
            raise Mismatch(f"tickets after {step.verb}", told(shown), told(step.order))


@_check
async def queue_positions(desk: Desk) -> None:
    """Services: the waiting have the positions 1, 2, 3 … in the order of the queue, and all others 0."""
    day, watch = await _step_by_step(desk)
    for step in day.steps:
        waits = [entry.state == _State.STATE_WAITING for entry in _shown(watch, step).entries]
        positions = [entry.position for entry in _shown(watch, step).entries]
        _expect(f"positions after {step.verb}", positions, [n if here else 0 for n, here in enumerate(waits, start=1)])


@_check
async def ticket_numbers(desk: Desk) -> None:
    """Services: the tickets of a doctor-day are 1, 2, 3 … in the order of the check-ins, and stay with the patient."""
    day, watch = await _step_by_step(desk)
    tickets: dict[str, int] = {}
    for step in day.steps:
        if step.verb == "CheckIn":
            tickets[step.appointment_id] = len(tickets) + 1
        if step.state is not None:
            _expect(f"ticket after {step.verb}", _told(watch, step).entry.ticket, tickets[step.appointment_id])


@_check
async def queue_counts(desk: Desk) -> None:
    """Services: waiting_count is how many wait, expected_count how many are booked and not here yet."""
    day, watch = await _step_by_step(desk)
    for step in day.steps:
        queue = _shown(watch, step)
        waiting = sum(state == _State.STATE_WAITING for _, state in step.order)
        _expect(f"waiting_count after {step.verb}", queue.waiting_count, waiting)
        _expect(f"expected_count after {step.verb}", queue.expected_count, step.expected_count)


@_check
async def departed_entries(desk: Desk) -> None:
    """Services: an entry that is DONE or LEFT is told in a change, and stands in no queue."""
    day, watch = await _step_by_step(desk)
    gone: set[str] = set()
    for update in watch.updates:
        gone |= {change.appointment_id for change in update.update.changes if change.entry.state in _GONE}
        shown = [
            f"{entry.ticket} {_name(entry.state)}"
            for entry in update.update.queue.entries
            if entry.appointment_id in gone or entry.state in _GONE
        ]
        _expect(f"departed entries in the queue of revision {update.revision}", shown, [])
    departed = {step.appointment_id for step in day.steps if step.state in _GONE}
    _expect("number of departed in the changes", len(gone), len(departed))


@_check
async def calling_order(desk: Desk) -> None:
    """Services: CallNext takes whoever stands first in the queue that a watcher saw before."""
    day, watch = await _step_by_step(desk)
    for before, step in itertools.pairwise(day.steps):
        if step.verb == "CallNext":
            first = _shown(watch, before).entries[0]
            called = _told(watch, step).entry
            _expect("called ticket", called.ticket, first.ticket)
            _expect("called appointment", step.appointment_id, first.appointment_id)


@_check
async def get_queue(desk: Desk) -> None:
    """Rule 2: after each change, the update's queue equals what GetQueue answers at the same revision."""
    day = await desk.day()
    async with desk.watch(day) as watch, aclosing(_play(desk, day)) as steps:
        await watch.next()
        async for step in steps:
            update = await watch.reach(step.revision)
            _expect_same(f"queue after {step.verb}", update.update.queue, await day.queue())


@_check
async def folding(desk: Desk) -> None:
    """Rule 2: who applies the changes to the first queue has each later queue, with its order and positions."""
    _, watch = await _step_by_step(desk)
    # Not from the start, so that the first queue is not an empty one.
    first = next((number for number, update in enumerate(watch.updates) if update.update.queue.entries), 0)
    begin = watch.updates[first].update.queue
    entries = {entry.appointment_id: entry for entry in begin.entries}
    line = Line(begin.entries)
    for update in watch.updates[first + 1 :]:
        for change in update.update.changes:
            if change.HasField("entry"):
                entries[change.appointment_id] = change.entry
                line.take(change.appointment_id, change.entry.state, change.entry.ticket, change.revision)
        folded = queue_pb2.Queue()
        for place, (appointment_id, state) in enumerate(line.order(), start=1):
            entry = folded.entries.add()
            entry.CopyFrom(entries[appointment_id])
            # Of later changes to others, so derived.
            entry.position = place if state == _State.STATE_WAITING else 0
        shown = queue_pb2.Queue(entries=update.update.queue.entries)
        _expect_same(f"queue of revision {update.revision}", shown, folded)


# Rule 3: what makes a revision


@_check
async def one_revision_a_change(desk: Desk) -> None:
    """Rule 3: every change of a doctor-day, bookings included, makes the next revision, and its answer says which."""
    day = await desk.day()
    async with aclosing(_play(desk, day)) as steps:
        async for _ in steps:
            pass
    _expect("answered revisions", [step.revision for step in day.steps], [*range(2, len(day.steps) + 2)])
    _expect("revision of GetQueue", (await day.queue()).revision, day.revision)


@_check
async def refusals(desk: Desk) -> None:
    """Rule 3: what is refused, and what is only tried out with validate_only, changes nothing."""
    day = await desk.day()
    precondition = grpc.StatusCode.FAILED_PRECONDITION
    async with desk.watch(day) as watch:
        await watch.next()
        patient_id, stranger_id = await desk.patient(), await desk.patient()
        booked = (await day.book(patient_id)).appointment_id
        wanted = appointment_pb2.GetAppointmentRequest(appointment_id=booked)
        etag = (await _ask(desk.appointments.GetAppointment, wanted)).appointment.etag
        await day.update(booked)
        again = appointment_pb2.BookAppointmentRequest(patient_id=patient_id, doctor_day=day.target)
        start = appointment_pb2.StartAppointmentRequest(appointment_id=booked)
        empty = queue_pb2.CallNextRequest(doctor_id=day.doctor_id)
        wrong = queue_pb2.CheckInRequest(appointment_id=booked, patient_id=stranger_id)
        stale = appointment_pb2.CancelAppointmentRequest(appointment_id=booked, etag=etag)
        refused: list[tuple[Any, Message, grpc.StatusCode, str]] = [
            (desk.appointments.BookAppointment, again, grpc.StatusCode.ALREADY_EXISTS, "DUPLICATE_BOOKING"),
            (desk.appointments.StartAppointment, start, precondition, "INVALID_TRANSITION"),
            (desk.queues.CallNext, empty, precondition, "QUEUE_EMPTY"),
            (desk.queues.CheckIn, wrong, precondition, "PATIENT_MISMATCH"),
            (desk.appointments.CancelAppointment, stale, grpc.StatusCode.ABORTED, "ETAG_MISMATCH"),
        ]
        for method, request, code, reason in refused:
            await _expect_refusal(_ask(method, request), code, reason)
        again.patient_id, again.validate_only = stranger_id, True
        await _ask(desk.appointments.BookAppointment, again)
        await day.do("CheckIn", booked)
        await watch.reach(day.revision)
    _expect("changes", [_kind(change.kind) for change in watch.changes], ["BOOKED", "UPDATED", "CHECKED_IN"])
    _expect("answered revisions", [step.revision for step in day.steps], [2, 3, 4])


@_check
async def replays(desk: Desk) -> None:
    """Rule 3, Conventions: a call repeated with its idempotency key answers the first one's revision and makes none."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        await watch.next()
        patient_id = await desk.patient()
        key = uuid.uuid4().hex
        book = appointment_pb2.BookAppointmentRequest(patient_id=patient_id, doctor_day=day.target, idempotency_key=key)
        booked = await _ask(desk.appointments.BookAppointment, book)
        arrive = queue_pb2.CheckInRequest(appointment_id=booked.appointment.id, idempotency_key=key)
        call = queue_pb2.CallNextRequest(doctor_id=day.doctor_id, idempotency_key=key)
        again = queue_pb2.CallAgainRequest(appointment_id=booked.appointment.id, idempotency_key=key)
        repeated: list[tuple[Any, Message]] = [
            (desk.appointments.BookAppointment, book),
            (desk.queues.CheckIn, arrive),
            (desk.queues.CallNext, call),
            (desk.queues.CallAgain, again),
        ]
        for revision, (method, request) in enumerate(repeated, start=2):
            name = type(request).__name__.removesuffix("Request")
            first = booked if request is book else await _ask(method, request)
            _expect(f"revision of {name}", (first.revision, first.replayed), (revision, False))
            replay = await _ask(method, request)
            _expect(f"revision and replayed of {name} again", (replay.revision, replay.replayed), (revision, True))
        step = await day.update(booked.appointment.id)
        await watch.reach(step.revision)
    kinds = ["BOOKED", "CHECKED_IN", "CALLED", "CALLED_AGAIN", "UPDATED"]
    _expect("changes", [_kind(change.kind) for change in watch.changes], kinds)


@_check
async def move_across_days(desk: Desk) -> None:
    """Rule 3: rescheduling across doctor-days makes one revision on each: MOVED_OUT there, MOVED_IN here."""
    day = await desk.day()
    for other in (desk.day_after(day), await desk.day()):
        async with desk.watch(day) as left, desk.watch(other) as entered:
            await left.next()
            await entered.next()
            booked = (await day.book()).appointment_id
            before = (day.revision, other.revision)
            await day.move(booked, other)
            _expect("revisions answered", (day.revision, other.revision), (before[0] + 1, before[1] + 1))
            out = (await left.reach(day.revision)).update
            into = (await entered.reach(other.revision)).update
        for update, kind, expected_count in ((out, "MOVED_OUT", 0), (into, "MOVED_IN", 1)):
            last = update.changes[-1]
            _expect(f"change of the {kind} day", (_kind(last.kind), last.appointment_id), (kind, booked))
            _expect(f"expected_count of the {kind} day", update.queue.expected_count, expected_count)


@_check
async def move_within_a_day(desk: Desk) -> None:
    """Rule 3: rescheduling within a doctor-day makes one revision, and both answered revisions are that one."""
    day = await desk.day()
    async with desk.watch(day) as watch:
        await watch.next()
        booked = (await day.book()).appointment_id
        await day.move(booked, day, await desk.slot(day))
        await day.move(booked, day)
        await watch.reach((await day.update(booked)).revision)
    kinds = [(change.revision, _kind(change.kind)) for change in watch.changes]
    _expect("changes", kinds, [(2, "BOOKED"), (3, "MOVED_IN"), (4, "MOVED_IN"), (5, "UPDATED")])


@_check
async def concurrent_changes(desk: Desk) -> None:
    """Rule 3: of many callers' changes at once none is skipped, none told twice, each under its answered revision."""
    day, (watch,) = await _watched_rush(desk, 1)
    every = [*range(2, 2 + _rush_changes())]
    _expect("answered revisions", sorted(step.revision for step in day.steps), every)
    _expect("revisions of the changes", [change.revision for change in watch.changes], every)
    _expect_chain(watch.updates)
    for step in day.steps:
        change = _told(watch, step)
        told = (_kind(change.kind), change.appointment_id)
        _expect(f"change of revision {step.revision}", told, (_kind(step.kind), step.appointment_id))
    _expect_same("last queue", watch.updates[-1].update.queue, await day.queue())


@_check
async def watchers_agree(desk: Desk) -> None:
    """Rules 3, 7: watchers of a doctor-day are told the same changes in one order, and shown the same queues."""
    _, watches = await _watched_rush(desk, 3)
    first, *others = watches
    # Positions are as of the update that tells the change, and another watcher's may be a later one.
    history = [(one.revision, one.kind, one.appointment_id, one.entry.state) for one in first.changes]
    queues = {update.revision: update.update.queue for update in first.updates}
    for other in others:
        told = [(one.revision, one.kind, one.appointment_id, one.entry.state) for one in other.changes]
        _expect("changes of another watcher", told, history)
        for update in other.updates:
            if update.revision in queues:
                _expect_same(
                    f"another's queue of revision {update.revision}", update.update.queue, queues[update.revision]
                )


@_check
async def cut_streams(desk: Desk) -> None:
    """Rules 1, 3: who opens a new stream with the last token, again and again amid changes, misses none of them."""
    day = await desk.day()
    last = 1 + _rush_changes()
    changes: list[queue_pb2.QueueChange] = []
    async with desk.watch(day) as watch:
        begin = await watch.next()

    async def come_and_go() -> None:
        known = begin
        while known.revision < last:
            async with desk.watch(day, known.resume_token) as watch:
                await watch.reach(known.revision + 1)
            update = watch.updates[0]
            _expect("previous_revision", update.previous_revision, known.revision)
            _expect_cover(update)
            changes.extend(update.update.changes)
            known = update

    await _together(come_and_go(), _rush(day))
    _expect("revisions of the changes", [change.revision for change in changes], [*range(2, last + 1)])


# Rule 4: slow consumers


@_check
async def slow_reader(desk: Desk) -> None:
    """Rule 4: a reader who falls behind gets fewer, newer updates, none of them missing a change."""
    day = await _long_line(desk)
    begin = day.revision
    async with desk.unread(day) as watch:
        await watch.next()
        # 5 MB, were each sent: more than twice of what a network and proxies hold of one stream.
        for _ in range(_MANY_CHANGES):
            await day.update(day.steps[0].appointment_id)
        await watch.reach(day.revision)
    _expect_chain(watch.updates)
    _expect("revisions", [change.revision for change in watch.changes], [*range(begin + 1, day.revision + 1)])
    if len(watch.updates) - 1 > _MANY_CHANGES // 2:
        raise Mismatch("updates", len(watch.updates) - 1, f"at most {_MANY_CHANGES // 2} for {_MANY_CHANGES} changes")


@_check
async def blocked_reader(desk: Desk) -> None:
    """Rule 4: a stream whose write was blocked for 30 s ends as RESOURCE_EXHAUSTED."""
    desk.needs(WRITE_SECONDS + 5 * _MARGIN)
    day, clock = await _long_line(desk), await desk.day()
    async with desk.unread(day) as watch, desk.watch(clock, heartbeat=5) as ticks:
        await watch.next()
        for _ in range(_MANY_CHANGES):
            await day.update(day.steps[0].appointment_id)
        blocked_at = (await ticks.next()).server_time.ToSeconds()
        # Another stream's heartbeats tell the time.
        while (await ticks.next()).server_time.ToSeconds() < blocked_at + WRITE_SECONDS + _MARGIN:
            pass

        async def to_the_end() -> None:
            while True:
                await watch.next()

        await _expect_refusal(to_the_end(), grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHER_TOO_SLOW")


async def _long_line(desk: Desk) -> Day:
    """A day whose queue takes some 40 KB."""
    day = await desk.day()

    async def arrive() -> None:
        await day.do("CheckIn", (await day.book(await desk.patient(padding="x" * 200))).appointment_id)

    await _together(*(arrive() for _ in range(_LONG_LINE)))
    return day


# Rule 5: silence


@_check
async def shortest_heartbeat(desk: Desk) -> None:
    """Rule 5: a request for more than one heartbeat in 5 s is clamped; they carry the revision and a token."""
    await _expect_heartbeat(desk, 1, 5)


@_check
async def default_heartbeat(desk: Desk) -> None:
    """Rule 5: where nothing is requested, 15 s of silence end in a heartbeat."""
    await _expect_heartbeat(desk, None, 15)


@_check
async def longest_heartbeat(desk: Desk) -> None:
    """Rule 5: a request for less than one heartbeat in 60 s is clamped."""
    await _expect_heartbeat(desk, 600, 60)


async def _expect_heartbeat(desk: Desk, asked: int | None, seconds: float) -> None:
    desk.needs(seconds + _MARGIN)
    day = await desk.day()
    async with desk.watch(day, heartbeat=asked) as watch:
        await watch.next()
        # Silence begins with the last message, which need not be the first.
        step = await day.book()
        await watch.reach(step.revision)
        silent = time.monotonic()
        message = await watch.next()
        waited = time.monotonic() - silent
    _expect("event", message.WhichOneof("event"), "heartbeat")
    _expect("revision", message.revision, step.revision)
    _expect("previous_revision", message.previous_revision, step.revision)
    _expect("whether it has a token", bool(message.resume_token), True)
    if not seconds - _MARGIN / 4 <= waited <= seconds + _MARGIN:
        raise Mismatch("seconds of silence", round(waited, 1), seconds)


# Rule 6: planned ends


@_check
async def stream_age(desk: Desk) -> None:
    """Rule 6: at the age of 20 to 30 min a stream ends with a closing message of MAX_AGE, and then with status OK."""
    desk.needs(STREAM_AGE[1] + _MARGIN)
    day = await desk.day()
    async with desk.watch(day, heartbeat=60) as watch:
        opened = time.monotonic()
        message = await watch.next()
        while not message.HasField("closing"):
            message = await watch.next()
        age = time.monotonic() - opened
        _expect("reason", message.closing.reason, queue_pb2.StreamClosing.REASON_MAX_AGE)
        await watch.end()
    if not STREAM_AGE[0] - _MARGIN <= age <= STREAM_AGE[1] + _MARGIN:
        raise Mismatch("age of the stream in seconds", round(age), f"{STREAM_AGE[0]:g} to {STREAM_AGE[1]:g}")


# Rule 7: what a stream is of


@_check
async def one_doctor_day(desk: Desk) -> None:
    """Rule 7: changes of other doctors, and of the same doctor's other dates, are no news to a watcher."""
    day, stranger = await desk.day(), await desk.day()
    async with desk.watch(day) as watch:
        await watch.next()
        for other in (stranger, desk.day_after(day)):
            await other.book()
            await other.availability()
        step = await day.book()
        update = await watch.reach(step.revision)
    _expect("answered revision", step.revision, 2)
    _expect("number of updates", len(watch.updates), 2)
    _expect("changes", [change.appointment_id for change in update.update.changes], [step.appointment_id])
