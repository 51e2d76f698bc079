"""What a check works with: a clinic of its own, doctor-days that record their changes, and streams as they came.

Streams are read with the generated stubs and not through our client, which would mend the faults that should be seen.
"""

import asyncio
import datetime
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast
from zoneinfo import ZoneInfo

import grpc
from google.protobuf.message import Message
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, patient_pb2, queue_pb2, slot_pb2
from frontdesk.client.channel import Options
from frontdesk.client.stubs import Stubs
from frontdesk.tools.conformance.expect import Kind, Mismatch, Priority, Response, Skipped, State, expect

_CALL_SECONDS = 10.0
_CAPACITY = 200
"""Places of a doctor-day: more than any scenario books."""
_PHONE = "+5511987654321"
# None of them changes its clocks; at every moment it is between 06:00 and 18:00 in one of them.
_ZONES = ("UTC", "America/Phoenix", "Asia/Tokyo")

_GROUPS = [
    State.STATE_WAITING,
    State.STATE_CALLED,
    State.STATE_IN_CONSULTATION,
    State.STATE_PARKED,
    State.STATE_MISSED,
]
DEPARTED = (State.STATE_DONE, State.STATE_LEFT, State.STATE_TRANSFERRED)
_VERBS: dict[str, tuple[Any, Kind.ValueType, State.ValueType | None]] = {
    "CheckIn": (queue_pb2.CheckInRequest, Kind.KIND_CHECKED_IN, State.STATE_WAITING),
    "CallAgain": (queue_pb2.CallAgainRequest, Kind.KIND_CALLED_AGAIN, State.STATE_CALLED),
    "ReturnToLine": (queue_pb2.ReturnToLineRequest, Kind.KIND_RETURNED, State.STATE_WAITING),
    "ParkPatient": (queue_pb2.ParkPatientRequest, Kind.KIND_PARKED, State.STATE_PARKED),
    "MarkMissed": (queue_pb2.MarkMissedRequest, Kind.KIND_MISSED, State.STATE_MISSED),
    "LeaveQueue": (queue_pb2.LeaveQueueRequest, Kind.KIND_LEFT, State.STATE_LEFT),
    "StartAppointment": (
        appointment_pb2.StartAppointmentRequest,
        Kind.KIND_STARTED,
        State.STATE_IN_CONSULTATION,
    ),
    "CompleteAppointment": (appointment_pb2.CompleteAppointmentRequest, Kind.KIND_COMPLETED, State.STATE_DONE),
    # LEFT only if the patient is in the queue already; a booking alone does not touch the queue.
    "CancelAppointment": (appointment_pb2.CancelAppointmentRequest, Kind.KIND_CANCELLED, State.STATE_LEFT),
    "MarkNoShow": (appointment_pb2.MarkNoShowRequest, Kind.KIND_NO_SHOW, None),
}
"""The verbs that take an appointment: the request, the kind of change, and the state of the entry after it."""


async def ask(method: Any, request: Message) -> Any:
    """Make a unary call."""
    # `method` and answer are Any: a stub's methods have no common type that names their answer.
    return await method(request, timeout=_CALL_SECONDS)


async def together(*work: Coroutine[Any, Any, object]) -> None:
    """Run all of it at once; the first failure ends the rest."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


class Watch:
    """One stream, as it came. Nothing reads ahead: a message that is not asked for stays with the server."""

    def __init__(self, call: Any, patience: float) -> None:
        self._messages = aiter(call)
        self._patience = patience
        self.updates: list[Response] = []
        """The updates that were read, the first message included."""

    @property
    def changes(self) -> list[queue_pb2.QueueChange]:
        """Every change in the updates, in the order in which it came."""
        return [change for update in self.updates for change in update.update.changes]

    async def next(self, patience: float | None = None) -> Response:
        """The next message of any kind."""
        patience = self._patience if patience is None else patience
        try:
            async with asyncio.timeout(patience):
                message: Response = await anext(self._messages)
        except TimeoutError:
            raise Mismatch("stream", f"nothing for {patience:g} s", "a message") from None
        except StopAsyncIteration:
            raise Mismatch("stream", "its end with status OK", "a message") from None
        if message.HasField("update"):
            self.updates.append(message)
        return message

    async def end(self) -> None:
        """Expect no further message, and status OK."""
        try:
            async with asyncio.timeout(self._patience):
                message = await anext(self._messages)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise Mismatch("stream", f"nothing for {self._patience:g} s", "its end with status OK") from None
        raise Mismatch("stream", message, "its end with status OK")

    async def reach(self, revision: int) -> Response:
        """Read on until an update has this revision or a later one; that update."""
        # Each new revision extends the wait; heartbeats and repetitions do not.
        gives_up_at = time.monotonic() + self._patience
        while not self.updates or self.updates[-1].revision < revision:
            before = self.updates[-1].revision if self.updates else 0
            left = gives_up_at - time.monotonic()
            if left <= 0:
                raise Mismatch("stream", f"revision {before} for {self._patience:g} s", f"revision {revision}")
            try:
                await self.next(left)
            except Mismatch as mismatch:
                raise Mismatch("stream", f"revision {before}, then: {mismatch}", f"revision {revision}") from None
            if self.updates and self.updates[-1].revision > before:
                gives_up_at = time.monotonic() + self._patience
        return self.updates[-1]


class QueueOrder:
    """The order of a queue by the contract's words alone."""

    def __init__(self, entries: Sequence[queue_pb2.QueueEntry] = ()) -> None:
        self._places: dict[str, tuple[State.ValueType, tuple[int, int, int, int]]] = {}
        for entry in entries:
            self.take(entry.appointment_id, entry.state, entry, 0)

    def take(self, appointment_id: str, state: State.ValueType, entry: queue_pb2.QueueEntry, revision: int) -> None:
        """Put a patient into this state, by the change that made this revision.

        The entry tells the ticket, the priority and the first check-in.
        """
        before = self._places.pop(appointment_id, None)
        # Who comes back after a missed call keeps the place at the end.
        returned = 0 if before is None else before[1][1]
        if state == State.STATE_WAITING and before is not None and before[0] == State.STATE_MISSED:
            returned = revision
        if state not in DEPARTED:
            place = (entry.priority, returned, entry.check_in_time.ToMicroseconds(), entry.ticket)
            self._places[appointment_id] = (state, place)

    def order(self) -> list[tuple[str, State.ValueType]]:
        """The appointments that a queue shows, in its order, with their states."""
        ordered = sorted(
            (_GROUPS.index(state), place if state == State.STATE_WAITING else place[3:], appointment_id, state)
            for appointment_id, (state, place) in self._places.items()
        )
        return [(appointment_id, state) for _, _, appointment_id, state in ordered]


@dataclass(frozen=True, slots=True)
class Step:
    """One change of a doctor-day: the answer, and what must be true after it."""

    verb: str
    kind: Kind.ValueType
    revision: int
    """As answered."""
    appointment_id: str
    state: State.ValueType | None
    """The state of the entry after it; None if the queue is not touched."""
    entry: queue_pb2.QueueEntry | None
    """As answered; None for verbs that do not answer one."""
    order: list[tuple[str, State.ValueType]]
    expected_count: int


class Day:
    """One doctor-day: changes it, and keeps a record of each change in `steps`."""

    def __init__(self, desk: "Desk", doctor_id: str, date: datetime.date) -> None:
        self._desk = desk
        self._order = QueueOrder()
        self._expected: set[str] = set()
        self._last_ticket = 0
        self._entries: dict[str, queue_pb2.QueueEntry] = {}
        """What the order depends on, of everybody who has checked in."""
        self.doctor_id = doctor_id
        self.date = date
        self.steps: list[Step] = []

    @property
    def revision(self) -> int:
        """The latest revision of the changes made through this object."""
        return max((step.revision for step in self.steps), default=1)

    @property
    def target(self) -> appointment_pb2.DoctorDay:
        """The doctor-day as the target of a booking."""
        return appointment_pb2.DoctorDay(doctor_id=self.doctor_id, date=wire_date(self.date))

    async def queue(self) -> queue_pb2.Queue:
        """The queue as GetQueue answers it."""
        request = queue_pb2.GetQueueRequest(doctor_id=self.doctor_id, date=wire_date(self.date))
        answer: queue_pb2.GetQueueResponse = await ask(self._desk.queues.GetQueue, request)
        return answer.queue

    async def availability(self) -> Step:
        """Mark the doctor as present."""
        request = doctor_pb2.SetDoctorAvailabilityRequest(
            doctor_id=self.doctor_id, date=wire_date(self.date), is_present=True
        )
        answer = await ask(self._desk.doctors.SetDoctorAvailability, request)
        return self._record("SetDoctorAvailability", Kind.KIND_AVAILABILITY, answer, "", None)

    async def book(self, patient_id: str = "") -> Step:
        """Book a place, for a new patient unless one is given."""
        request = appointment_pb2.BookAppointmentRequest(
            patient_id=patient_id or await self._desk.patient(),
            doctor_day=self.target,
        )
        answer = await ask(self._desk.appointments.BookAppointment, request)
        self._expected.add(answer.appointment.id)
        return self._record("BookAppointment", Kind.KIND_BOOKED, answer, answer.appointment.id, None)

    async def arrive(self) -> str:
        """Book and check in a new patient; the appointment."""
        appointment_id = (await self.book()).appointment_id
        await self.do("CheckIn", appointment_id)
        return appointment_id

    async def update(self, appointment_id: str) -> Step:
        """Change the notes."""
        appointment = appointment_pb2.Appointment(id=appointment_id, notes=uuid.uuid4().hex)
        request = appointment_pb2.UpdateAppointmentRequest(appointment=appointment)
        answer = await ask(self._desk.appointments.UpdateAppointment, request)
        return self._record("UpdateAppointment", Kind.KIND_UPDATED, answer, appointment_id, None)

    async def do(self, verb: str, appointment_id: str) -> Step:
        """Call one of the verbs that take an appointment."""
        request, kind, state = _VERBS[verb]
        service: Any = self._desk.queues if hasattr(self._desk.queues, verb) else self._desk.appointments
        answer = await ask(getattr(service, verb), request(appointment_id=appointment_id))
        if verb == "CheckIn":
            self._give_ticket(appointment_id, answer)
        if appointment_id not in self._entries:
            state = None
        self._expected.discard(appointment_id)
        return self._record(verb, kind, answer, appointment_id, state)

    async def set_priority(self, appointment_id: str, priority: Priority.ValueType) -> Step:
        """Set the priority of a patient in the queue."""
        request = queue_pb2.SetPriorityRequest(appointment_id=appointment_id, priority=priority)
        answer = await ask(self._desk.queues.SetPriority, request)
        self._entries[appointment_id].priority = priority
        return self._record("SetPriority", Kind.KIND_PRIORITY_SET, answer, appointment_id, answer.entry.state)

    async def transfer(self, appointment_id: str, to: "Day") -> Step:
        """Hand a patient over to another doctor's queue of the same date; the step on this day."""
        request = queue_pb2.TransferPatientRequest(appointment_id=appointment_id, to_doctor_id=to.doctor_id)
        answer = await ask(self._desk.queues.TransferPatient, request)
        to._give_ticket(appointment_id, answer)
        to._record("TransferPatient", Kind.KIND_TRANSFERRED_IN, answer, appointment_id, State.STATE_WAITING)
        left = queue_pb2.CallNextResponse(revision=answer.vacated_revision)
        return self._record(
            "TransferPatient", Kind.KIND_TRANSFERRED_OUT, left, appointment_id, State.STATE_TRANSFERRED, answered=False
        )

    async def undo(self, appointment_id: str, state: State.ValueType) -> Step:
        """Take back the last verb, after which the entry is in this state; LEFT after a check-in."""
        found = await ask(
            self._desk.appointments.GetAppointment, appointment_pb2.GetAppointmentRequest(appointment_id=appointment_id)
        )
        request = appointment_pb2.UndoTransitionRequest(appointment_id=appointment_id, etag=found.appointment.etag)
        answer = await ask(self._desk.appointments.UndoTransition, request)
        if state == State.STATE_LEFT:
            self._expected.add(appointment_id)
        step = self._record("UndoTransition", Kind.KIND_UNDONE, answer, appointment_id, state)
        if state == State.STATE_LEFT:
            del self._entries[appointment_id]
        return step

    def _give_ticket(self, appointment_id: str, answer: Any) -> None:
        self._last_ticket += 1
        self._entries[appointment_id] = queue_pb2.QueueEntry(
            ticket=self._last_ticket, priority=answer.entry.priority, check_in_time=answer.entry.check_in_time
        )

    async def call_next(self, room: str = "") -> Step:
        """Call the patient whom the server picks."""
        request = queue_pb2.CallNextRequest(doctor_id=self.doctor_id, date=wire_date(self.date), room=room)
        answer = await ask(self._desk.queues.CallNext, request)
        return self._record("CallNext", Kind.KIND_CALLED, answer, answer.entry.appointment_id, State.STATE_CALLED)

    async def move(self, appointment_id: str, to: "Day", slot_id: str = "") -> Step:
        """Move a booking to another day, or to a slot of this one; the step on this day."""
        request = appointment_pb2.RescheduleAppointmentRequest(appointment_id=appointment_id)
        if slot_id:
            request.slot_id = slot_id
        else:
            request.doctor_day.CopyFrom(to.target)
        answer = await ask(self._desk.appointments.RescheduleAppointment, request)
        self._expected.discard(appointment_id)
        to._expected.add(appointment_id)
        step = to._record("RescheduleAppointment", Kind.KIND_MOVED_IN, answer, appointment_id, None)
        if to is self:
            expect("vacated_revision within a doctor-day", answer.vacated_revision, answer.revision)
            return step
        answer.revision = answer.vacated_revision
        return self._record("RescheduleAppointment", Kind.KIND_MOVED_OUT, answer, appointment_id, None)

    def _record(
        self, verb: str, kind: Kind.ValueType, answer: Any, appointment_id: str, state: State.ValueType | None,
        *, answered: bool = True,
    ) -> Step:  # fmt: skip
        if state is not None:
            self._order.take(appointment_id, state, self._entries[appointment_id], answer.revision)
        entry = answer.entry if answered and "entry" in answer.DESCRIPTOR.fields_by_name else None
        step = Step(verb, kind, answer.revision, appointment_id, state, entry, self._order.order(), len(self._expected))
        self.steps.append(step)
        return step


class _Keyed:
    """A channel whose calls have this metadata."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]) -> None:
        self._channel: Any = channel
        self._metadata = metadata

    def unary_unary(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(self._channel.unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return partial(self._channel.unary_stream(*args, **kwargs), metadata=self._metadata)


class Desk(Stubs[grpc.aio.Channel]):
    """The server under test: its stubs, and doctors and patients that this run creates."""

    def __init__(
        self, connect: Callable[[Options], grpc.aio.Channel], patience: float, api_key: str | None = None
    ) -> None:
        self._connect = connect
        self._metadata = () if api_key is None else (("x-api-key", api_key),)
        self._run = uuid.uuid4().hex[:12]
        self._numbers = itertools.count(1)
        self._clinic_id = ""
        self.patience = patience
        self.channel = connect(())
        super().__init__(cast(grpc.aio.Channel, _Keyed(self.channel, self._metadata)))

    async def open(self) -> None:
        """Create a clinic in a zone where it is daytime."""
        now = datetime.datetime.now(datetime.UTC)
        zone = next(zone for zone in _ZONES if 6 <= now.astimezone(ZoneInfo(zone)).hour < 18)
        clinic = clinic_pb2.Clinic(name=f"Conformance {self._run}", time_zone=zone)
        request = clinic_pb2.CreateClinicRequest(clinic=clinic)
        self._clinic_id = (await ask(self.clinics.CreateClinic, request)).clinic.id

    async def day(self) -> Day:
        """Today of a new doctor."""
        code = f"CF-{self._run}-{next(self._numbers)}"
        doctor = doctor_pb2.Doctor(
            code=code, display_name=code, clinic_id=self._clinic_id, max_patients_per_day=_CAPACITY
        )
        created = await ask(self.doctors.CreateDoctor, doctor_pb2.CreateDoctorRequest(doctor=doctor))
        # The server decides which date is today.
        request = queue_pb2.GetQueueRequest(doctor_id=created.doctor.id)
        today = (await ask(self.queues.GetQueue, request)).queue.date
        return Day(self, created.doctor.id, datetime.date(today.year, today.month, today.day))

    def day_after(self, day: Day) -> Day:
        """The same doctor's next date."""
        return Day(self, day.doctor_id, day.date + datetime.timedelta(days=1))

    async def patient(self, padding: str = "") -> str:
        """A new patient."""
        # One household: every server accepts the phone, and the names tell the patients apart.
        name = f"Conformance {self._run} {next(self._numbers)}"
        patient = patient_pb2.Patient(given_name=f"{name}{padding}"[:200], family_name=padding[:200], phone=_PHONE)
        request = patient_pb2.RegisterPatientRequest(patient=patient)
        registered: patient_pb2.RegisterPatientResponse = await ask(self.patients.RegisterPatient, request)
        return registered.patient.id

    async def slot(self, day: Day) -> str:
        """A slot of this doctor later today: some hours of the clinic's day are left."""
        start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
        slot = slot_pb2.Slot(doctor_id=day.doctor_id)
        slot.start_time.FromDatetime(start)
        slot.end_time.FromDatetime(start + datetime.timedelta(minutes=30))
        created: slot_pb2.CreateSlotResponse = await ask(self.slots.CreateSlot, slot_pb2.CreateSlotRequest(slot=slot))
        return created.slot.id

    @asynccontextmanager
    async def watch(
        self, day: Day, token: str = "", *, heartbeat: int | None = None, channel: grpc.aio.Channel | None = None
    ) -> AsyncIterator[Watch]:
        """A stream of this doctor-day."""
        request = queue_pb2.WatchQueueRequest(doctor_id=day.doctor_id, date=wire_date(day.date), resume_token=token)
        if heartbeat is not None:
            request.heartbeat_interval.FromSeconds(heartbeat)
        async with self.stream(request, channel) as watch:
            yield watch

    @asynccontextmanager
    async def stream(
        self, request: queue_pb2.WatchQueueRequest, channel: grpc.aio.Channel | None = None
    ) -> AsyncIterator[Watch]:
        """The stream of this request."""
        queues = self.queues
        if channel is not None:
            queues = Stubs(cast(grpc.aio.Channel, _Keyed(channel, self._metadata))).queues
        call = queues.WatchQueue(request)
        try:
            yield Watch(call, self.patience)
        finally:
            call.cancel()

    @asynccontextmanager
    async def unread(self, day: Day) -> AsyncIterator[Watch]:
        """A stream on its own connection, whose reader takes as little as HTTP/2 allows until it is asked."""
        channel = self._connect((("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_535)))
        async with channel, self.watch(day, channel=channel) as watch:
            yield watch

    def needs(self, seconds: float) -> None:
        """Skip the check if a message may take longer than the patience of this run."""
        if self.patience < seconds:
            raise Skipped(f"needs --patience {seconds:g} or more")


def wire_date(value: datetime.date) -> Date:
    """The wire's form of a date."""
    return Date(year=value.year, month=value.month, day=value.day)
