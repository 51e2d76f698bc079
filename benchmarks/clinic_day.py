"""Play a clinic day from a file: `python -m benchmarks.clinic_day FILE.csv [--target HOST:PORT] [--workers N]`.

The file has the columns of the public data set "Medical Appointment No Shows"; `PatientId`, `AppointmentID`,
`Neighbourhood` and `No-show` are used. Each neighbourhood becomes a clinic, and each row an appointment today. Patients
who came are checked in, called, and seen until their visits are completed; the others are marked as no-shows. A watcher
follows each doctor's queue. Every fourth doctor works with slots, as long as today has time left for them.
"""

import argparse
import asyncio
import csv
import gc
import hashlib
import math
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import uvloop
from google.type.date_pb2 import Date
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.calls import percentiles
from benchmarks.load import STREAMS_PER_CHANNEL, reason_of
from benchmarks.stage import WholeService
from clinic.frontdesk.v1 import (
    appointment_pb2,
    appointment_pb2_grpc,
    clinic_pb2,
    clinic_pb2_grpc,
    doctor_pb2,
    doctor_pb2_grpc,
    patient_pb2,
    patient_pb2_grpc,
    queue_pb2,
    queue_pb2_grpc,
    slot_pb2,
    slot_pb2_grpc,
)
from frontdesk.client.channel import aio_channel

ZONE = "America/Sao_Paulo"
PATIENTS_PER_DOCTOR = 10
SLOTS_PER_DOCTOR = 12
"""Slots per doctor: two more than patients, so that a patient with slots elsewhere finds a free time."""
SHORTEST_SLOT, LONGEST_SLOT = timedelta(minutes=5), timedelta(minutes=20)
IN_FLIGHT = 32
CATCH_UP_SECONDS = 10.0
"""How long after the last change a watcher may take to show it; then it counts as wrong."""

BOOKED, COMPLETED, NO_SHOW = (
    appointment_pb2.Appointment.STATE_BOOKED,
    appointment_pb2.Appointment.STATE_COMPLETED,
    appointment_pb2.Appointment.STATE_NO_SHOW,
)


@dataclass(frozen=True)
class Row:
    """One appointment of the file."""

    patient: str
    appointment: str
    clinic: str
    came: bool


@dataclass
class Visit:
    """One row, and the state of its appointment."""

    row: Row
    turn: int = 0
    """When it is booked: 0 for the patient's first visit to a doctor; 1, 2 … for further visits to the same one."""
    slot: int | None = None
    """The index of the doctor's slot; None for a place on the doctor-day."""
    id: str = ""
    ticket: int = 0
    start: datetime | None = None
    state: "appointment_pb2.Appointment.State.ValueType" = BOOKED


@dataclass
class Desk:
    """One doctor's day: the patients, the slots, and the watcher of the queue."""

    clinic: str
    code: str
    visits: list[Visit]
    with_slots: bool = False
    doctor: str = ""
    slots: list[str] = field(default_factory=list)
    changes: int = 0
    """The number of acknowledged changes."""
    watcher: "Watcher | None" = None
    calls: int = 0
    """How often the next patient was called for, which makes the keys."""


@dataclass
class Outcome:
    """The result of a played day."""

    rows: int = 0
    clinics: int = 0
    doctors: int = 0
    patients: int = 0
    booked: int = 0
    by_slot: int = 0
    came: int = 0
    no_shows: int = 0
    left_booked: int = 0
    """No-shows whose slot has not started: MarkNoShow refuses them as TOO_EARLY, and they stay BOOKED."""
    refused: Counter[str] = field(default_factory=Counter)
    """Refused bookings, by reason."""
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0
    watchers: int = 0
    watchers_equal: int = 0
    updates: int = 0
    changes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """The number of all calls except streams."""
        return sum(map(len, self.latencies.values()))


def read(path: Path) -> list[Row]:
    """The rows of a file, in its order."""
    with path.open(newline="", encoding="utf-8-sig") as stream:
        return [
            Row(line["PatientId"], line["AppointmentID"], line["Neighbourhood"], line["No-show"].strip() == "No")
            for line in csv.DictReader(stream)
        ]


def assign(rows: Iterable[Row]) -> list[Desk]:
    """Share out each clinic's rows to as few doctors as possible, ten each, and a patient's rows to different doctors.

    A patient with more rows than the clinic has doctors sees one doctor again. Such a row gets a later turn, after the
    earlier visit has ended, because a second live booking on a doctor-day would be refused.
    """
    clinics: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        clinics[row.clinic][row.patient].append(row)
    desks: list[Desk] = []
    for clinic, patients in clinics.items():
        doctors = math.ceil(sum(map(len, patients.values())) / PATIENTS_PER_DOCTOR)
        theirs = [Desk(clinic, f"{len(desks) + n}", []) for n in range(doctors)]
        for found in patients.values():
            for turn, start in enumerate(range(0, len(found), doctors)):
                # Always to the doctors with the fewest rows, so that their counts differ by at most one.
                roomy = sorted(theirs, key=lambda desk: len(desk.visits))
                for row, desk in zip(found[start:], roomy, strict=False):
                    desk.visits.append(Visit(row, turn))
        desks += theirs
    return desks


def assign_slots(desks: Sequence[Desk]) -> None:
    """Give every fourth doctor slots, at times when the patients have no slot elsewhere."""
    busy: dict[str, set[int]] = defaultdict(set)
    for desk in desks[::4]:
        desk.with_slots = True
        free = set(range(SLOTS_PER_DOCTOR))
        comes_back = {visit.row.patient for visit in desk.visits if visit.turn}
        for visit in sorted(desk.visits, key=lambda visit: -len(busy[visit.row.patient])):
            times = busy[visit.row.patient]
            # Patients without a free time get a place on the doctor-day. So do those who see the doctor again: a
            # no-show whose slot has not started stays booked, and would cause a refusal.
            if visit.row.patient in comes_back:
                continue
            visit.slot = min(free - times, default=None)
            if visit.slot is not None:
                free.discard(visit.slot)
                times.add(visit.slot)


def slot_times(now: datetime, today: date, rows: int) -> list[tuple[datetime, datetime]]:
    """The start and end of each of a doctor's slots, within the rest of today; empty if too little time is left."""
    # Booking must be finished before the first slot starts.
    begin = now + timedelta(seconds=60 + rows * 0.1)
    midnight = datetime.combine(today + timedelta(days=1), datetime.min.time(), now.tzinfo)
    # Whole seconds, so that rounding does not move the last end past midnight.
    length = min(LONGEST_SLOT, timedelta(seconds=(midnight - begin) // timedelta(seconds=SLOTS_PER_DOCTOR)))
    if length < SHORTEST_SLOT:
        return []
    return [(begin + n * length, begin + (n + 1) * length) for n in range(SLOTS_PER_DOCTOR)]


@dataclass
class Watcher:
    """Follow a queue, and check every update against the contract."""

    name: str
    queue: queue_pb2.Queue | None = None
    revision: int = 0
    updates: int = 0
    changes: int = 0
    tickets: dict[int, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by every message, and when the stream ends."""

    async def follow(self, stub: queue_pb2_grpc.QueueServiceStub, doctor: str, day: Date) -> None:
        """Watch until cancelled. If a stream ends, resume from its last message."""
        token = ""
        while True:
            request = queue_pb2.WatchQueueRequest(doctor_id=doctor, date=day, resume_token=token)
            try:
                stream: Any = stub.WatchQueue(request)
                async for message in stream:
                    self._take(message, resumed=bool(token))
                    token = message.resume_token or token
                    self.news.set()
            except grpc.aio.AioRpcError as error:
                self.problems.append(f"{self.name}: the stream ended: {reason_of(error)}")
                self.news.set()
            await asyncio.sleep(0.1)

    def _take(self, message: queue_pb2.WatchQueueResponse, *, resumed: bool) -> None:
        if message.WhichOneof("event") != "update":
            return
        self.updates += 1
        queue, changes = message.update.queue, message.update.changes
        if message.previous_revision != self.revision and (self.updates > 1 or resumed):
            self._wrong(f"previous_revision {message.previous_revision} after revision {self.revision}")
        first = message.previous_revision + 1
        expected = range(first, message.revision + 1) if message.previous_revision else range(0)
        if [change.revision for change in changes] != list(expected):
            self._wrong(f"changes {[change.revision for change in changes]}, expected {list(expected)}")
        if queue.revision != message.revision:
            self._wrong(f"a queue at revision {queue.revision} in a message at revision {message.revision}")
        for change in changes:
            if change.HasField("entry"):
                known = self.tickets.setdefault(change.entry.ticket, change.appointment_id)
                if known != change.appointment_id:
                    self._wrong(f"ticket {change.entry.ticket} was given twice")
        self.changes += len(changes)
        self.revision, self.queue = message.revision, queue

    def _wrong(self, what: str) -> None:
        self.problems.append(f"{self.name}: {what}")


class Day:
    """One play of a file against one server."""

    def __init__(self, rows: Sequence[Row], target: str, advance: Callable[[str, int], None]) -> None:
        self._rows = rows
        self._target = target
        self._advance = advance
        self._run = uuid.uuid4().hex[:12]
        self._places = asyncio.Semaphore(IN_FLIGHT)
        self._patients: dict[str, str] = {}
        self._clinics: dict[str, str] = {}
        self._desks = assign(rows)
        self._visits_of = Counter(row.patient for row in rows)
        self.outcome = Outcome(rows=len(rows), doctors=len(self._desks))

    async def play(self) -> Outcome:
        """Play the whole day."""
        await self._await_room_before_midnight()
        today = datetime.now(ZoneInfo(ZONE)).date()
        self._day = Date(year=today.year, month=today.month, day=today.day)
        options = (("grpc.use_local_subchannel_pool", 1),)
        connections = 1 + math.ceil(len(self._desks) / STREAMS_PER_CHANNEL)
        channels = [aio_channel(self._target, options=options) for _ in range(connections)]
        try:
            way = channels[0]
            self._queues = queue_pb2_grpc.QueueServiceStub(way)
            self._appointments = appointment_pb2_grpc.AppointmentServiceStub(way)
            started = time.perf_counter()
            await self._open_clinics(way)
            await self._open_slots(way, today)
            watching = await self._watch(channels[1:])
            for turn in range(1 + max((visit.turn for desk in self._desks for visit in desk.visits), default=0)):
                await self._take_turn(turn)
            await self._all("check", (self._check(desk) for desk in self._desks))
            self.outcome.seconds = time.perf_counter() - started
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        finally:
            for channel in channels:
                await channel.close()
        self._count()
        return self.outcome

    async def _await_room_before_midnight(self) -> None:
        """Wait for the next day if today could end during the play: its check-ins would be refused."""
        now = datetime.now(ZoneInfo(ZONE))
        left = (datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), now.tzinfo) - now).total_seconds()
        if left < 30 + len(self._rows) * 0.05:
            await asyncio.sleep(left + 1)

    async def _all(self, what: str, work: Iterable[Awaitable[None]]) -> None:
        tasks = list(work)
        if not tasks:
            return
        self._advance(what, len(tasks))

        async def one(task: Awaitable[None]) -> None:
            await task
            self._advance(what, 0)

        await asyncio.gather(*map(one, tasks))

    async def _call(self, method: Any, request: Any, key: str = "") -> Any:
        """Make one call. With `key` it is a mutation, which is safe to retry."""
        if key:
            request.idempotency_key = f"{self._run}/{key}"
        name = type(request).__name__.removesuffix("Request")
        async with self._places:
            started = time.perf_counter()
            try:
                return await method(request)
            finally:
                self.outcome.latencies[name].append(time.perf_counter() - started)

    async def _open_clinics(self, way: grpc.aio.Channel) -> None:
        clinics = clinic_pb2_grpc.ClinicServiceStub(way)
        doctors = doctor_pb2_grpc.DoctorServiceStub(way)
        patients = patient_pb2_grpc.PatientServiceStub(way)

        async def clinic(n: int, name: str) -> None:
            wanted = clinic_pb2.Clinic(name=name, city="Vitória", country="BR", time_zone=ZONE)
            # A key must be ASCII, and the name of a neighbourhood may not be.
            made = await self._call(clinics.CreateClinic, clinic_pb2.CreateClinicRequest(clinic=wanted), f"clinic/{n}")
            self._clinics[name] = made.clinic.id

        async def doctor(desk: Desk) -> None:
            wanted = doctor_pb2.Doctor(
                code=f"{self._run}-{desk.code}", display_name=f"Doctor {desk.code}",
                clinic_id=self._clinics[desk.clinic],
            )  # fmt: skip
            made = await self._call(
                doctors.CreateDoctor, doctor_pb2.CreateDoctorRequest(doctor=wanted), f"doctor/{desk.code}"
            )
            desk.doctor = made.doctor.id

        async def patient(name: str) -> None:
            wanted = patient_pb2.Patient(given_name="Patient", family_name=name, phone=self._phone(name))
            made = await self._call(
                patients.RegisterPatient, patient_pb2.RegisterPatientRequest(patient=wanted), f"patient/{name}"
            )
            self._patients[name] = made.patient.id

        names = dict.fromkeys(desk.clinic for desk in self._desks)
        people = dict.fromkeys(row.patient for row in self._rows)
        self.outcome.clinics, self.outcome.patients = len(names), len(people)
        await self._all("create clinics", (clinic(n, name) for n, name in enumerate(names)))
        await self._all("create doctors", (doctor(desk) for desk in self._desks))
        await self._all("register patients", (patient(name) for name in people))
        if len(set(self._patients.values())) != len(people):
            self._wrong(f"{len(people)} people became {len(set(self._patients.values()))} patients")

    def _phone(self, patient: str) -> str:
        """An invented mobile number. Each run has its own, so that a server can be used for two runs."""
        digits = int.from_bytes(hashlib.blake2b(f"{self._run}/{patient}".encode(), digest_size=8).digest()) % 10**8
        return f"+55279{digits:08}"

    async def _open_slots(self, way: grpc.aio.Channel, today: date) -> None:
        """Give every fourth doctor slots in the rest of today, if there is enough time."""
        stub = slot_pb2_grpc.SlotServiceStub(way)
        times = slot_times(datetime.now(ZoneInfo(ZONE)), today, len(self._rows))
        if not times:
            return
        assign_slots(self._desks)

        async def open_slots(desk: Desk) -> None:
            request = slot_pb2.BatchCreateSlotsRequest()
            for start, end in times:
                slot = request.slots.add(doctor_id=desk.doctor, capacity=1)
                slot.start_time.FromDatetime(start)
                slot.end_time.FromDatetime(end)
            made = await self._call(stub.BatchCreateSlots, request, f"slots/{desk.code}")
            desk.slots = [slot.id for slot in made.slots]

        await self._all("create slots", (open_slots(desk) for desk in self._desks if desk.with_slots))

    async def _watch(self, channels: Sequence[grpc.aio.Channel]) -> list[asyncio.Task[None]]:
        tasks = []
        for n, desk in enumerate(self._desks):
            desk.watcher = Watcher(f"doctor {desk.code}")
            stub = queue_pb2_grpc.QueueServiceStub(channels[n // STREAMS_PER_CHANNEL])
            tasks.append(asyncio.create_task(desk.watcher.follow(stub, desk.doctor, self._day)))

        async def begun(desk: Desk) -> None:
            assert desk.watcher is not None
            await desk.watcher.news.wait()

        await self._all("watch the queues", (begun(desk) for desk in self._desks))
        return tasks

    async def _take_turn(self, turn: int) -> None:
        """Book, see and mark all patients of this turn."""
        visits = [(desk, visit) for desk in self._desks for visit in desk.visits if visit.turn == turn]
        desks = {id(desk): desk for desk, _ in visits}.values()
        again = "" if turn == 0 else f", return visit {turn}"
        absent = [(desk, visit) for desk, visit in visits if not visit.row.came]
        await self._all(f"book{again}", (self._book(desk, visit) for desk, visit in visits))
        await self._all(f"see the patients{again}", (self._hold(desk, turn) for desk in desks))
        await self._all(f"mark no-shows{again}", (self._mark(desk, visit) for desk, visit in absent))

    async def _book(self, desk: Desk, visit: Visit) -> None:
        request = appointment_pb2.BookAppointmentRequest(patient_id=self._patients[visit.row.patient])
        if visit.slot is not None:
            request.slot_id = desk.slots[visit.slot]
        else:
            request.doctor_day.doctor_id = desk.doctor
            request.doctor_day.date.CopyFrom(self._day)
        try:
            made = await self._call(self._appointments.BookAppointment, request, f"book/{visit.row.appointment}")
        except grpc.aio.AioRpcError as error:
            self.outcome.refused[reason_of(error)] += 1
            return
        desk.changes += 1
        visit.id = made.appointment.id
        if visit.slot is not None:
            visit.start = made.appointment.start_time.ToDatetime(ZoneInfo("UTC"))
            self.outcome.by_slot += 1

    async def _hold(self, desk: Desk, turn: int) -> None:
        """Check in at once all patients who came, then call them in order, and start and complete their visits."""
        here = {visit.id: visit for visit in desk.visits if visit.turn == turn and visit.row.came and visit.id}
        before = sum(bool(visit.ticket) for visit in desk.visits)
        try:
            answers = await asyncio.gather(*(self._check_in(visit) for visit in here.values()))
            desk.changes += len(answers)
            if [visit.ticket for visit in sorted(here.values(), key=lambda visit: visit.ticket)] != [
                *range(before + 1, before + len(here) + 1)
            ]:
                self._wrong(f"doctor {desk.code}: the tickets have gaps")
            waiting = {visit.ticket: visit for visit in here.values()}
            while waiting:
                called = await self._next(desk)
                if called is None:
                    # All who are left are with other doctors just now.
                    await asyncio.sleep(0.01)
                    continue
                visit = here[called.appointment_id]
                before_him = [ticket for ticket in waiting if ticket < called.ticket]
                # A patient with several visits today is passed over while he is with another doctor.
                passed = all(self._visits_of[waiting[ticket].row.patient] > 1 for ticket in before_him)
                if waiting.pop(called.ticket, None) is not visit or not passed:
                    self._wrong(f"doctor {desk.code}: ticket {called.ticket} was called out of turn")
                start = appointment_pb2.StartAppointmentRequest(appointment_id=visit.id)
                await self._call(self._appointments.StartAppointment, start, f"start/{visit.row.appointment}")
                done = appointment_pb2.CompleteAppointmentRequest(appointment_id=visit.id)
                made = await self._call(
                    self._appointments.CompleteAppointment, done, f"complete/{visit.row.appointment}"
                )
                visit.state = made.appointment.state
                desk.changes += 3
                self.outcome.came += 1
        except grpc.aio.AioRpcError as error:
            self._wrong(f"doctor {desk.code}: a call of the queue was refused: {reason_of(error)}")

    async def _next(self, desk: Desk) -> queue_pb2.QueueEntry | None:
        """Call the next patient; None if nobody can be called."""
        request = queue_pb2.CallNextRequest(doctor_id=desk.doctor, date=self._day, room="1")
        desk.calls += 1
        try:
            answer: queue_pb2.CallNextResponse = await self._call(
                self._queues.CallNext, request, f"call/{desk.code}/{desk.calls}"
            )
        except grpc.aio.AioRpcError as error:
            if reason_of(error) != "QUEUE_EMPTY":
                raise
            return None
        return answer.entry

    async def _check_in(self, visit: Visit) -> None:
        request = queue_pb2.CheckInRequest(appointment_id=visit.id, patient_id=self._patients[visit.row.patient])
        made = await self._call(self._queues.CheckIn, request, f"check-in/{visit.row.appointment}")
        visit.ticket = made.entry.ticket

    async def _mark(self, desk: Desk, visit: Visit) -> None:
        if not visit.id:
            return
        request = appointment_pb2.MarkNoShowRequest(appointment_id=visit.id)
        asked = datetime.now(ZoneInfo(ZONE))
        try:
            made = await self._call(self._appointments.MarkNoShow, request, f"no-show/{visit.row.appointment}")
        except grpc.aio.AioRpcError as error:
            if reason_of(error) == "TOO_EARLY" and visit.start is not None and visit.start > asked:
                self.outcome.left_booked += 1
            else:
                self._wrong(f"doctor {desk.code}: a no-show was refused: {reason_of(error)}")
            return
        if visit.start is not None and visit.start > datetime.now(ZoneInfo(ZONE)):
            self._wrong(f"doctor {desk.code}: a no-show was marked before the slot started")
        visit.state = made.appointment.state
        desk.changes += 1
        self.outcome.no_shows += 1

    async def _check(self, desk: Desk) -> None:
        """Compare the server's answers for this doctor-day, and the watcher's record, with the changes made."""
        assert desk.watcher is not None
        equal = await self._watcher_is_equal(desk, desk.watcher)
        self.outcome.watchers += 1
        self.outcome.watchers_equal += equal
        wrong = [
            *self._wrong_line(desk, await self._queue(desk)),
            *self._wrong_list(desk, await self._list(desk)),
            *desk.watcher.problems,
        ]
        if desk.watcher.changes != desk.changes:
            wrong.append(f"the watcher saw {desk.watcher.changes} changes, {desk.changes} were made")
        for what in wrong:
            self._wrong(f"doctor {desk.code}: {what}")

    async def _queue(self, desk: Desk) -> queue_pb2.Queue:
        request = queue_pb2.GetQueueRequest(doctor_id=desk.doctor, date=self._day)
        queue: queue_pb2.Queue = (await self._call(self._queues.GetQueue, request)).queue
        return queue

    async def _list(self, desk: Desk) -> dict[str, appointment_pb2.Appointment]:
        """All appointments of the doctor-day, read in small pages."""
        request = appointment_pb2.ListAppointmentsRequest(
            doctor_id=desk.doctor, from_date=self._day, to_date=self._day, page_size=4
        )
        found: list[appointment_pb2.Appointment] = []
        while True:
            page = await self._call(self._appointments.ListAppointments, request)
            found += page.appointments
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        listed = {appointment.id: appointment for appointment in found}
        if len(listed) != len(found):
            self._wrong(f"doctor {desk.code}: a list names an appointment twice")
        return listed

    def _wrong_line(self, desk: Desk, queue: queue_pb2.Queue) -> Iterator[str]:
        if queue.entries or queue.waiting_count:
            yield f"{len(queue.entries)} entries are still in the queue"
        expected = sum(visit.state == BOOKED for visit in desk.visits if visit.id)
        if queue.expected_count != expected:
            yield f"expected_count is {queue.expected_count}, not {expected}"
        if queue.revision != 1 + desk.changes:
            yield f"revision {queue.revision} after {desk.changes} changes"
        tickets = {visit.ticket: visit.id for visit in desk.visits if visit.ticket}
        if sorted(tickets) != list(range(1, sum(visit.row.came for visit in desk.visits if visit.id) + 1)):
            yield f"the tickets are {sorted(tickets)}"
        if desk.watcher is not None and desk.watcher.tickets != tickets:
            yield "the watcher saw different tickets from those that the patients got"

    def _wrong_list(self, desk: Desk, listed: dict[str, appointment_pb2.Appointment]) -> Iterator[str]:
        held = {visit.id: visit for visit in desk.visits if visit.id}
        if listed.keys() != held.keys():
            yield f"{len(listed)} appointments are listed, {len(held)} were booked"
        # A return visit gets the number of a no-show, or the one after all others.
        numbers = sorted(listed[visit.id].number for visit in held.values() if visit.turn == 0 and visit.id in listed)
        holding = [listed[visit.id].number for visit in held.values() if visit.state != NO_SHOW and visit.id in listed]
        if numbers != list(range(1, len(numbers) + 1)) or len(set(holding)) != len(holding):
            yield f"the numbers are {numbers}; those of appointments that hold a place are {holding}"
        for visit in held.values():
            found = listed.get(visit.id)
            if found is not None and found.state != visit.state:
                yield f"an appointment is {found.state}, not {visit.state}"
            if found is not None and found.patient_id != self._patients[visit.row.patient]:
                yield "an appointment belongs to another patient"
            if visit.row.came and visit.state != COMPLETED:
                yield "the visit of a patient who came was not completed"

    async def _watcher_is_equal(self, desk: Desk, watcher: Watcher) -> bool:
        """Whether the watcher's last queue equals GetQueue's. Wait a moment for the watcher to see the last change."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CATCH_UP_SECONDS):
                while watcher.revision != 1 + desk.changes:
                    watcher.news.clear()
                    await watcher.news.wait()
        queue = await self._queue(desk)
        if watcher.queue is None or _without_estimates(watcher.queue) != _without_estimates(queue):
            self._wrong(
                f"doctor {desk.code}: the watcher's queue, at revision {watcher.revision}, differs from GetQueue's"
            )
            return False
        return True

    def _count(self) -> None:
        outcome = self.outcome
        watchers = [desk.watcher for desk in self._desks if desk.watcher is not None]
        outcome.updates = sum(watcher.updates for watcher in watchers)
        outcome.changes = sum(desk.changes for desk in self._desks)
        outcome.booked = sum(bool(visit.id) for desk in self._desks for visit in desk.visits)
        if outcome.booked + outcome.refused.total() != outcome.rows:
            self._wrong(f"{outcome.rows} rows, but {outcome.booked} booked and {outcome.refused.total()} refused")
        if outcome.came + outcome.no_shows + outcome.left_booked != outcome.booked:
            self._wrong("some bookings are neither completed, nor marked as no-shows, nor left booked")
        if outcome.refused:
            self._wrong(f"bookings were refused: {dict(outcome.refused)}")

    def _wrong(self, what: str) -> None:
        self.outcome.problems.append(what)


async def play(
    rows: Sequence[Row], target: str, advance: Callable[[str, int], None] = lambda what, total: None
) -> Outcome:
    """Play the rows as today's on the server at `target`.

    `advance` is called with the name of a step and its number of parts when it starts, and with 0 when one part is
    done.
    """
    return await Day(rows, target, advance).play()


def _without_estimates(queue: queue_pb2.Queue) -> queue_pb2.Queue:
    """The part of a queue that its revision decides: two readings of one revision may estimate otherwise."""
    bare = queue_pb2.Queue()
    bare.CopyFrom(queue)
    bare.ClearField("next_estimate")
    for entry in bare.entries:
        entry.ClearField("estimate")
    return bare


def report(console: Console, outcome: Outcome) -> None:
    """Print the result of the day."""
    table = Table(title="The day", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    absent = outcome.no_shows + outcome.left_booked
    for name, value in (
        ("rows", f"{outcome.rows:,}"),
        ("clinics, doctors, patients", f"{outcome.clinics:,}, {outcome.doctors:,}, {outcome.patients:,}"),
        ("booked", f"{outcome.booked:,}"),
        ("  by slot", f"{outcome.by_slot:,}"),
        ("refused", f"{outcome.refused.total():,}"),
        *((f"  {reason}", f"{count:,}") for reason, count in outcome.refused.most_common()),
        ("came, and completed", f"{outcome.came:,}"),
        ("no-shows", f"{absent:,} ({absent / max(1, outcome.booked):.2%})"),
        ("  marked", f"{outcome.no_shows:,}"),
        ("  left booked, because the slot has not started", f"{outcome.left_booked:,}"),
        ("changes of doctor-days", f"{outcome.changes:,}"),
        ("calls", f"{outcome.calls:,}"),
        ("seconds", f"{outcome.seconds:.1f}"),
        ("calls/s", f"{outcome.calls / outcome.seconds:,.0f}"),
        ("watchers whose last queue equals GetQueue's", f"{outcome.watchers_equal:,} / {outcome.watchers:,}"),
        ("updates to the watchers", f"{outcome.updates:,}"),
    ):
        table.add_row(name, value)
    console.print(table)
    table = Table(title=f"Latency in ms, {IN_FLIGHT} calls in flight", title_justify="left")
    for column in ("method", "calls", "p50", "p95", "p99"):
        table.add_column(column, justify="left" if column == "method" else "right")
    every = [latency for found in outcome.latencies.values() for latency in found]
    for name, found in (("all", every), *outcome.latencies.items()):
        table.add_row(name, f"{len(found):,}", *(f"{value * 1e3:.1f}" for value in percentiles(found, 50, 95, 99)))
    console.print(table)
    for problem in outcome.problems[:50]:
        console.print(f"[red]wrong: {problem}")
    if outcome.problems:
        console.print(f"[red]{len(outcome.problems)} problems")
    else:
        console.print(
            "[green]All correct: states, numbers and tickets of every doctor-day, without gaps, and the revisions of "
            "every watcher."
        )


def main() -> int:
    """Play the file. The exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description="Play a clinic day from a file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--target", help="HOST:PORT of a running service; without it, one is started for the run")
    parser.add_argument("--workers", type=int, default=1, help="workers of the service that is started (default 1)")
    arguments = parser.parse_args()
    rows = read(arguments.file)
    console = Console(width=None if sys.stdout.isatty() else 120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    service = nullcontext(arguments.target) if arguments.target else WholeService(arguments.workers)
    # A collection would stop this process for 100 ms, which would count as the service's time.
    gc.disable()
    with service as target, Progress(*columns, console=console) as progress:
        steps: dict[str, Any] = {}

        def advance(what: str, total: int) -> None:
            if total or what not in steps:
                steps[what] = progress.add_task(what, total=total)
            else:
                progress.advance(steps[what])

        outcome = uvloop.run(play(rows, target, advance))
    report(console, outcome)
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
