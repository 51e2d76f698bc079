"""The clients and watchers of the harness. Each call and its outcome goes into the history.

The clients share their beliefs about the visits, so that most requests can succeed; now and then they act without
looking. Each retries with the same key until it has an answer, like the published retry policy, only faster.

Where the service requires credentials, each change is asked for by somebody who may make it, or could before, and some
calls are probes for what is not the caller's.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import queue_pb2, schedule_pb2
from frontdesk.client import FrontdeskClient, FrontdeskError, Update
from tests.clinic import Front, day
from tests.history.away import Away
from tests.history.callers import QUOTA, Caller, Callers, Clerk
from tests.history.check import (
    AIMED,
    BAD_CREDENTIALS,
    BROKEN,
    KINDS,
    OK,
    PRIORITIES,
    STEPS,
    UNANSWERED,
    UNDOABLE,
    Attempt,
    Day,
    History,
    Metered,
    Operation,
    Picture,
    Probe,
    Read,
    Seen,
)

ANSWER_SECONDS = 15.0
"""Seconds in which a client must get its answer once all faults have ended."""
BUDGET = 400
"""Operations after which another doctor takes over: an ever longer queue shows nothing new."""

_APPOINTMENTS = {"BookAppointment", "RescheduleAppointment", "CancelAppointment", "StartAppointment",
                 "CompleteAppointment", "MarkNoShow", "UndoTransition"}  # fmt: skip
_LEAVES = {"RescheduleAppointment", "TransferPatient"}
"""The methods that may leave a doctor-day for another one."""
_ANSWERED = {"FAILED_PRECONDITION", "ALREADY_EXISTS", "NOT_FOUND", "INVALID_ARGUMENT", "UNAUTHENTICATED",
             "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"}  # fmt: skip
_VERBS = {
    "CheckIn": 10, "CallNext": 7, "StartAppointment": 5, "CompleteAppointment": 3, "CancelAppointment": 4,
    "LeaveQueue": 2, "ReturnToLine": 4, "ParkPatient": 3, "MarkMissed": 3, "CallAgain": 3, "MarkNoShow": 1,
    "SetPriority": 3, "TransferPatient": 2,
}  # fmt: skip
_LINE = {number: name.removeprefix("STATE_") for name, number in queue_pb2.QueueEntry.State.items()}
_VISIT = {number: name.removeprefix("STATE_") for name, number in pb.Appointment.State.items()}
_CHANGE = {number: name.removeprefix("KIND_") for name, number in queue_pb2.QueueChange.Kind.items()}


@dataclass(slots=True)
class Known:
    """The clients' belief about a visit."""

    day: Day
    at: str
    patient: str = ""
    slot: str = ""
    etag: str = ""
    """Of its version, if the last change that was answered can be undone."""


@dataclass(slots=True)
class Kept:
    """A hold that the clients have, or had."""

    id: str
    day: Day
    slot: str
    patient: str
    """Empty if it is for anybody."""


class Shift:
    """One doctor at work: two days, their slots, and the clients' beliefs about their visits."""

    def __init__(self, doctor: str, days: Sequence[Day], slots: dict[Day, dict[str, int]], capacity: int) -> None:
        self.doctor = doctor
        self.days = days
        self.slots = slots
        """Capacity, by day and slot."""
        self.capacity = capacity
        self.asked = 0
        self.visits: dict[str, Known] = {}
        self.ended: dict[str, Known] = {}
        """Those visits that have ended most lately, without their places."""
        self.holds: list[Kept] = []
        """The latest ones, ended ones too."""
        self.busy: set[str] = set()
        """Visits with a request in flight."""
        self.arriving = 0
        """Bookings in flight."""
        self.full: set[Day] = set()
        """Days that were answered to be full, whatever the beliefs say."""
        self.watchers: list[Watcher] = []

    @property
    def over(self) -> bool:
        """Whether nearly all of today's patients have been seen; completed visits keep their places."""
        today = self.days[0]
        done = sum(known.at == "DONE" and known.day == today for known in self.visits.values())
        return done + 1 >= self.capacity or self.asked >= BUDGET

    def room(self, target: Day) -> int:
        """The number of free places."""
        if target in self.full:
            return 0
        return self.capacity - self.arriving - sum(known.day == target for known in self.visits.values())

    def slots_with_room(self, target: Day) -> list[str]:
        taken = [known.slot for known in self.visits.values() if known.slot]
        return [slot for slot, places in self.slots[target].items() if taken.count(slot) < places]

    def in_state(self, states: set[str]) -> list[str]:
        """Visits in one of the states, without a request in flight."""
        return [who for who, known in self.visits.items() if known.at in states and who not in self.busy]


class Watcher:
    """Watches a doctor-day, leaves now and then, and resumes with its token."""

    def __init__(
        self, number: int, target: Day, clients: Sequence[FrontdeskClient], history: History, seed: int
    ) -> None:
        self.number = number
        self.day = target
        self.revision = 0
        self.dozes = True
        """Whether it pauses its reading now and then, briefly; updates on their way then arrive late."""
        self._clients = clients
        self._history = history
        self._random = random.Random(f"{seed}/watcher/{number}")
        self.task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        token = ""
        on = datetime.fromisoformat(self.day[1]).date()
        while True:
            stay = min(self._random.expovariate(1 / 6), 30)
            with suppress(TimeoutError):
                async with asyncio.timeout(stay):
                    client = self._random.choice(self._clients)
                    watch = client.watch_updates(self.day[0], on, heartbeat=5, resume_token=token)
                    async with aclosing(watch) as updates:
                        async for update in updates:
                            token = update.resume_token
                            self._history.seen.append(_seen(self.number, self.day, update, self.revision))
                            self.revision = update.queue.revision
                            if self.dozes and self._random.random() < 0.03:
                                await asyncio.sleep(self._random.uniform(0.1, 1))
                    # Its connection was closed for good: in a moment there are new ones, or the run is over.
                    await asyncio.sleep(0.05)

    async def settle(self, revision: int, seconds: float, when: str) -> None:
        """Wait until the watcher has the revision. If it does not get it in time, record that in the history."""
        deadline = time.monotonic() + seconds
        while self.revision < revision:
            if time.monotonic() > deadline or self.task.done():
                self._history.late.append((self.number, self.day, self.revision, revision, when))
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        self.task.cancel()
        # Raise the error with which it ended, if it did.
        with suppress(asyncio.CancelledError):
            await self.task


@dataclass
class Chapter:
    """A part of a run that is judged alone: it has its own doctors, patients, callers and keys.

    A run is a sequence of chapters, however long it is, so that only the present one is in memory.
    """

    name: str
    """The start of this chapter's keys."""
    waiting: list[Shift]
    """Doctors who take over from others."""
    at_work: list[Shift]
    busy: Shift
    quiet: Shift
    """These two are for the end of the run, with a place for every patient."""
    patients: list[str]
    callers: Callers
    evening: datetime
    """When today's first slot begins."""
    history: History = field(default_factory=History)
    gone_home: list[Shift] = field(default_factory=list)
    requests: dict[str, Any] = field(default_factory=dict)
    """Some requests by key, to be repeated at the end."""
    keys: int = 0
    ending: list[asyncio.Task[None]] = field(default_factory=list)
    """Waits for the watchers of doctors who went home."""

    @property
    def shifts(self) -> list[Shift]:
        """All doctors who worked in it."""
        return [*self.at_work, *self.gone_home, self.busy, self.quiet]

    def key(self) -> str:
        """A new key."""
        self.keys += 1
        return f"{self.name}-{self.keys}"


class Clients:
    """The clients of a chapter. `fronts` may change during the run; each is one connection, so one worker."""

    def __init__(
        self, chapter: Chapter, fronts: Sequence[Front], *,
        moves: float, twins: float, bursts: float, haste: float, holds: float, walk_ins: float, undos: float,
        leaves: float, probes: float,
        relieve: Callable[[Shift], None], healed: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.chapter = chapter
        self._history = chapter.history
        self._fronts = fronts
        self._moves, self._twins, self._bursts, self._haste = moves, twins, bursts, haste
        self._relieve = relieve
        self._healed = healed
        self._holds = holds
        self._walk_ins = walk_ins
        self._undos = undos
        self._leaves = leaves
        self._probes = probes
        slots = max(len(slots) for shift in chapter.at_work for slots in shift.slots.values())
        self._away = Away(chapter.name, chapter.history, fronts, chapter.callers, chapter.evening, slots, self._settled)
        self._callers = chapter.callers
        self._asking: dict[str, Caller] = {}
        """Who asks for an operation, by its key."""

    async def play(self, number: int, seed: str, end: float) -> None:
        """Act as one client until then."""
        mine = random.Random(seed)
        while time.monotonic() < end:
            dice = mine.random()
            if dice < 0.08:
                shift = mine.choice(self.chapter.at_work)
                read = await self.read(number, mine.choice(shift.days), mine)
                if read is not None:
                    self._look(shift, read)
            elif dice < 0.08 + self._bursts:
                await self._burst(number, mine)
            elif dice < 0.08 + self._bursts + self._probes:
                await self._probe(number, mine)
            elif dice < 0.08 + self._bursts + self._probes + self._holds:
                await self._hold(mine.choice(self.chapter.at_work), mine)
            elif dice > 1 - self._leaves:
                shift = mine.choice(self.chapter.at_work)
                await self._away.act(shift.doctor, datetime.fromisoformat(shift.days[0][1]).date(), mine)
            else:
                await self._one(number, mine)

    async def _one(self, number: int, mine: random.Random) -> None:
        shift = mine.choice(self.chapter.at_work)
        shift.asked += 1
        if shift.over and shift.asked > 20:
            self._relieve(shift)
        if mine.random() < self._undos:
            known = {who: one for who, one in [*shift.visits.items(), *shift.ended.items()] if one.etag}
            if known:
                visit = mine.choice([*known])
                await self._undo(number, shift, visit, known[visit], mine)
                return
        operation, request = self._intention(number, shift, mine)
        await self._pursue(shift, operation, request, mine, twins=mine.random() < self._twins)

    async def _undo(self, number: int, shift: Shift, visit: str, known: Known, mine: random.Random) -> None:
        """Take back the last verb of a visit. Now and then two clients do, who have seen the same version."""
        etag, wishes = known.etag, []
        if mine.random() < 0.08:
            # Nobody else does it meanwhile, and it may be too late then.
            known.etag = ""
            await asyncio.sleep(mine.uniform(2, 4))
        for _ in range(1 + (mine.random() < 0.3)):
            key = self.chapter.key()
            request = pb.UndoTransitionRequest(appointment_id=visit, etag=etag, idempotency_key=key)
            operation = Operation(number, key, "UndoTransition", known.day, visit, known.slot, etag=etag)
            wishes.append(self._pursue(shift, operation, request, mine, twins=mine.random() < self._twins))
        await asyncio.gather(*wishes)

    async def _pursue(
        self, shift: Shift, operation: Operation, request: Any, mine: random.Random, *,
        twins: bool, front: Front | None = None, patience: float = 4.0, leave: float = 0.0, give_up: bool = False,
    ) -> None:  # fmt: skip
        """Call until there is an answer. The first attempt may be twins, have a short deadline, or be abandoned."""
        self._history.operations.append(operation)
        if mine.random() < 0.02:
            self.chapter.requests[operation.key] = request
        known = shift.visits.get(operation.appointment)
        doctor = shift.doctor if known is not None else ""
        caller = self._callers.chosen(operation, known.patient if known else "", doctor, mine)
        self.ask(operation, caller)
        if operation.method == "CheckIn" and caller.grant.kind != "patient" and mine.random() < 0.4:
            self._urge(operation, request, mine)
        books = operation.method in AIMED
        shift.arriving += books
        mark = operation.appointment or operation.method
        shift.busy.add(mark)
        try:
            if twins:
                self._history.tally["twins"] += 1
                two = [front, front] if front is not None else mine.sample(self._fronts, 2)
                await asyncio.gather(*(self.attempt(operation, request, one, patience) for one in two))
            else:
                await self.attempt(operation, request, front or mine.choice(self._fronts), patience, leave)
            self._history.tally["abandoned"] += give_up
            if not give_up:
                await self._insist(operation, request, mine)
        finally:
            shift.arriving -= books
            shift.busy.discard(mark)
        self._believe(shift, operation)

    async def _insist(self, operation: Operation, request: Any, mine: random.Random) -> None:
        healed = 0.0
        refused = 0
        while not operation.successes:
            outcome = operation.attempts[-1].outcome
            if outcome in BAD_CREDENTIALS:
                refused += 1
                if refused > 8 or not self._renewed(operation):
                    return
            elif not outcome.startswith((UNANSWERED, BROKEN)):
                return
            await asyncio.sleep(mine.uniform(0.02, 0.2))
            if self._healed():
                healed = healed or time.monotonic()
                if time.monotonic() > healed + ANSWER_SECONDS:
                    operation.given_up = True
                    return
            if operation.attempts[-1].outcome.startswith(BROKEN) and len(operation.attempts) > 8:
                return
            await self.attempt(operation, request, mine.choice(self._fronts))

    def ask(self, operation: Operation, caller: Caller) -> None:
        """Let the caller ask for the operation."""
        operation.identity = caller.identity
        self._asking[operation.key] = caller

    def _renewed(self, operation: Operation) -> bool:
        """Whether the caller has other credentials now."""
        caller = self._asking[operation.key]
        if caller.successor is not None:
            self._asking[operation.key] = caller.successor
            return True
        return caller.renew()

    async def attempt(
        self, operation: Operation, request: Any, front: Front, patience: float = 4.0, leave: float = 0.0
    ) -> None:
        """Make one call with the deadline `patience`. If `leave` is not 0, cancel it after so many seconds."""
        caller = self._asking[operation.key]
        desk: Any = caller.desk if isinstance(caller, Clerk) else front
        service = desk.appointments if operation.method in _APPOINTMENTS else desk.queues
        metadata, expires = caller.credentials()
        # Without access rules nothing is said of the caller.
        by = (caller.grant, expires) if self._callers.programs else (None, expires)
        invoke = time.monotonic()
        call = getattr(service, operation.method)(request, timeout=patience, metadata=metadata)
        if leave and not isinstance(caller, Clerk):
            asyncio.get_running_loop().call_later(leave, call.cancel)
        try:
            answer = await call
        except (grpc.aio.AioRpcError, FrontdeskError) as error:
            outcome, about = _refused(error)
            operation.attempts.append(
                Attempt(invoke, time.monotonic(), outcome, about=about, grant=by[0], expires=by[1])
            )
            return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            operation.attempts.append(Attempt(invoke, time.monotonic(), f"{UNANSWERED}CANCELLED"))
            return
        made = Attempt(invoke, time.monotonic(), OK, answer.replayed, answer.revision, grant=by[0], expires=by[1])
        if operation.method == "CallNext":
            made.appointment = answer.entry.appointment_id
            made.about = (answer.entry.patient_id, *operation.day, "")
        else:
            visit = answer.appointment
            made.appointment, made.number = visit.id, visit.number
            made.state = _VISIT[visit.state]
            made.about = (visit.patient_id, visit.doctor_id, _date(visit.date), visit.slot_id)
            made.etag = visit.etag
        if operation.method not in _APPOINTMENTS:
            made.ticket = answer.entry.ticket
            made.state = _LINE[answer.entry.state]
        if operation.method in _LEAVES:
            made.vacated = answer.vacated_revision
        operation.attempts.append(made)

    async def read(self, number: int, target: Day, mine: random.Random) -> Read | None:
        """Call GetQueue once; None if it was not answered."""
        front = mine.choice(self._fronts)
        request = queue_pb2.GetQueueRequest(doctor_id=target[0], date=day(datetime.fromisoformat(target[1]).date()))
        invoke = time.monotonic()
        try:
            metadata, _ = self._callers.reader(target[0], mine).credentials()
            answer = await front.queues.GetQueue(request, timeout=4, metadata=metadata)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)
            return None
        read = Read(number, target, invoke, time.monotonic(), answer.queue.revision, _picture(answer.queue))
        self._history.reads.append(read)
        return read

    async def _hold(self, shift: Shift, mine: random.Random) -> None:
        """Hold a place, or release one. Without a key: whatever the answer, the database tells what was done."""
        target, slot = self._target(shift, mine, mine.random() < 0.3)
        patient = self._patient(shift, target, mine, False)
        # Whoever may book may hold.
        wish, _ = self.booking(0, patient, target, slot)
        caller = self._callers.chosen(wish, "", "", mine)
        desk: Any = caller.desk if isinstance(caller, Clerk) else mine.choice(self._fronts)
        metadata, _ = caller.credentials()
        with suppress(grpc.aio.AioRpcError, FrontdeskError):
            if shift.holds and mine.random() < 0.15:
                release = pb.ReleaseHoldRequest(hold_id=mine.choice(shift.holds).id)
                await desk.appointments.ReleaseHold(release, timeout=4, metadata=metadata)
                self._history.tally["releases of holds"] += 1
                return
            request = pb.HoldPlaceRequest(patient_id=patient if mine.random() < 0.5 else "")
            request.ttl.seconds = mine.choice((30, 60, 300))
            _aim(request, target, slot)
            invoke = time.monotonic()
            held = (await desk.appointments.HoldPlace(request, timeout=4, metadata=metadata)).hold
            self._history.tally["holds"] += 1
            self._history.holds.append(held.id)
            self._history.hold_times[held.id] = (invoke, time.monotonic())
            shift.holds.append(Kept(held.id, target, slot, held.patient_id))
            del shift.holds[:-6]

    # Probes

    async def _probe(self, number: int, mine: random.Random) -> None:
        """Ask for what is not the caller's."""
        shift, other = mine.choice(self.chapter.at_work), mine.choice(self.chapter.at_work)
        kind = mine.choice(("patient", "patient", "doctor", "stranger"))
        on = day(datetime.fromisoformat(shift.days[0][1]).date())
        queue = queue_pb2.GetQueueRequest(doctor_id=shift.doctor, date=on)
        # A visit that is BOOKED may be moved to the doctor who probes.
        seen = [
            (who, known)
            for who, known in shift.visits.items()
            if known.patient and (kind != "doctor" or known.at != "BOOKED")
        ]
        if not seen or not self._callers.patients:
            return
        visit, known = mine.choice(seen)
        get = pb.GetAppointmentRequest(appointment_id=visit)
        cancel = pb.CancelAppointmentRequest(appointment_id=visit)
        start = pb.StartAppointmentRequest(appointment_id=visit)
        call_next = queue_pb2.CallNextRequest(doctor_id=shift.doctor, date=on)
        caller: Caller | None
        unknown = "APPOINTMENT_NOT_FOUND"
        if kind == "patient":
            own, caller = mine.choice([*self._callers.patients.items()])
            if own == known.patient:
                return
            board = queue_pb2.GetQueueRequest(doctor_id=shift.doctor, date=on, view=queue_pb2.QUEUE_VIEW_BOARD)
            book = pb.BookAppointmentRequest(patient_id=known.patient)
            _aim(book, shift.days[1], "")
            wishes: list[tuple[str, Any, str]] = [
                ("GetAppointment", get, unknown), ("CancelAppointment", cancel, unknown),
                ("BookAppointment", book, "PATIENT_NOT_FOUND"), ("CallNext", call_next, "ROLE_REQUIRED"),
                ("GetQueue", queue, "ROLE_REQUIRED"), ("GetQueue", board, OK),
                ("ListAppointments", pb.ListAppointmentsRequest(doctor_id=shift.doctor), OK),
            ]  # fmt: skip
        elif kind == "doctor":
            own, caller = other.doctor, self._callers.doctors.get(other.doctor)
            if own == shift.doctor:
                return
            wishes = [
                ("GetAppointment", get, unknown), ("CancelAppointment", cancel, unknown),
                ("StartAppointment", start, "ROLE_REQUIRED"), ("CallNext", call_next, "ROLE_REQUIRED"),
                ("GetQueue", queue, "ROLE_REQUIRED"),
                ("ListAppointments", pb.ListAppointmentsRequest(patient_id=known.patient), OK),
            ]  # fmt: skip
        else:
            own, caller = "", self._callers.stranger
            wishes = [
                ("GetAppointment", get, "CLINIC_NOT_YOURS"), ("CancelAppointment", cancel, "CLINIC_NOT_YOURS"),
                ("CallNext", call_next, "CLINIC_NOT_YOURS"), ("GetQueue", queue, "CLINIC_NOT_YOURS"),
                ("ListAppointments", pb.ListAppointmentsRequest(patient_id=known.patient), OK),
            ]  # fmt: skip
        if caller is None or not caller.has_time():
            return
        method, request, expected = mine.choice(wishes)
        front = mine.choice(self._fronts)
        service: Any = front.appointments if "Appointment" in method else front.queues
        metadata, expires = caller.credentials()
        what = f"what is not of {kind} {own[-6:]}"
        subject = getattr(request, "appointment_id", "")
        probe = Probe(number, method, what, expected, caller.grant, expires, time.monotonic(), appointment=subject)
        try:
            answer = await getattr(service, method)(request, metadata=metadata, timeout=4)
        except grpc.aio.AioRpcError as error:
            probe.outcome = _refused(error)[0]
            if probe.outcome in BAD_CREDENTIALS:
                caller.renew()
        else:
            probe.outcome = "LEAK" if _shows_others(answer, kind, own) else OK
        probe.complete = time.monotonic()
        self._history.probes.append(probe)

    # Requests

    def booking(self, number: int, patient: str, target: Day, slot: str = "", hold: str = "") -> tuple[Operation, Any]:
        """A booking."""
        key = self.chapter.key()
        request = pb.BookAppointmentRequest(patient_id=patient, idempotency_key=key, hold_id=hold)
        _aim(request, target, slot)
        return Operation(number, key, "BookAppointment", target, slot=slot, patient=patient), request

    def cancelling(self, number: int, visit: str, target: Day) -> tuple[Operation, Any]:
        """A cancellation."""
        key = self.chapter.key()
        request = pb.CancelAppointmentRequest(appointment_id=visit, idempotency_key=key)
        return Operation(number, key, "CancelAppointment", target, visit), request

    def _moving(self, number: int, visit: str, target: Day, slot: str) -> tuple[Operation, Any]:
        key = self.chapter.key()
        request = pb.RescheduleAppointmentRequest(appointment_id=visit, idempotency_key=key)
        _aim(request, target, slot)
        return Operation(number, key, "RescheduleAppointment", target, visit, slot), request

    def _intention(self, number: int, shift: Shift, mine: random.Random) -> tuple[Operation, Any]:
        hasty = mine.random() < self._haste
        booked = [*shift.visits] if hasty else shift.in_state({"BOOKED"})
        if booked and mine.random() < self._moves:
            target, slot = self._target(mine.choice(self.chapter.at_work), mine, hasty)
            return self._moving(number, mine.choice(booked), target, slot)
        if shift.holds and mine.random() < 0.5 * min(self._holds * 10, 1):
            held = mine.choice(shift.holds)
            if not hasty:
                # Else somebody else, or the same one again, may use it too.
                shift.holds.remove(held)
            self._history.tally["bookings with holds"] += 1
            patient = held.patient or self._patient(shift, held.day, mine, False)
            return self.booking(number, patient, held.day, held.slot, held.id)
        target, slot = self._target(shift, mine, hasty)
        # Who has a place above the capacity keeps others away when somebody has left.
        urgent = mine.random() < 0.15 and len(shift.visits) < 2 * shift.capacity
        if (hasty or urgent or shift.room(target) > 0) and mine.random() < 0.45:
            patient = self._patient(shift, target, mine, hasty)
            if target == shift.days[0] and not slot and mine.random() < self._walk_ins:
                return self._walk_in(number, patient, target, urgent, mine)
            return self.booking(number, patient, target, slot)
        verb, visit = self._verb(shift, mine, hasty)
        if verb == "CallNext":
            key, room = self.chapter.key(), mine.choice("12")
            request: Any = queue_pb2.CallNextRequest(doctor_id=shift.doctor, room=room, idempotency_key=key)
            return Operation(number, key, verb, shift.days[0], room=room), request
        if not visit:
            return self.booking(number, self._patient(shift, target, mine, hasty), target, slot)
        if verb == "TransferPatient":
            others = [one for one in self.chapter.at_work if one is not shift] or [shift]
            return self._transfer(number, visit, mine.choice(others).days[0], urgent)
        key = self.chapter.key()
        messages: Any = pb if verb in _APPOINTMENTS else queue_pb2
        request = getattr(messages, f"{verb}Request")(appointment_id=visit, idempotency_key=key)
        operation = Operation(number, key, verb, shift.visits[visit].day, visit)
        if verb == "SetPriority":
            self._urge(operation, request, mine)
        return operation, request

    def _walk_in(
        self, number: int, patient: str, target: Day, override: bool, mine: random.Random
    ) -> tuple[Operation, Any]:
        key = self.chapter.key()
        request = queue_pb2.AddWalkInRequest(doctor_id=target[0], patient_id=patient, idempotency_key=key)
        request.override_reason = "fainted" if override else ""
        operation = Operation(number, key, "AddWalkIn", target, patient=patient, override=override)
        if mine.random() < 0.4:
            self._urge(operation, request, mine)
        return operation, request

    def _transfer(self, number: int, visit: str, target: Day, override: bool) -> tuple[Operation, Any]:
        key = self.chapter.key()
        request = queue_pb2.TransferPatientRequest(appointment_id=visit, to_doctor_id=target[0], idempotency_key=key)
        request.override_reason = "called away" if override else ""
        return Operation(number, key, "TransferPatient", target, visit, override=override), request

    @staticmethod
    def _urge(operation: Operation, request: Any, mine: random.Random) -> None:
        operation.priority = mine.choice(PRIORITIES)
        request.priority = queue_pb2.Priority.Value(f"PRIORITY_{operation.priority}")

    def _verb(self, shift: Shift, mine: random.Random, hasty: bool) -> tuple[str, str]:
        if hasty and shift.visits:
            (verb,) = mine.choices([*_VERBS], [*_VERBS.values()])
            return verb, mine.choice([*shift.visits])
        today = shift.days[0]
        fitting: dict[str, list[str]] = {}
        for verb in _VERBS:
            if verb == "CallNext":
                waits = any(known.at == "WAITING" for known in shift.visits.values())
                fitting[verb] = [""] if waits and verb not in shift.busy else []
                continue
            found = shift.in_state(STEPS["TRANSFERRED_OUT" if verb == "TransferPatient" else KINDS[verb]][0])
            if verb in ("CheckIn", "MarkNoShow"):
                found = [who for who in found if shift.visits[who].day == today]
            if verb == "MarkNoShow":
                found = [who for who in found if not shift.visits[who].slot]
            if verb == "CancelAppointment" and mine.random() < 0.7:
                # Tomorrow's can do nothing else, and today's queue needs some.
                found = [who for who in found if shift.visits[who].day != today]
            fitting[verb] = found
        possible = [verb for verb, found in fitting.items() if found]
        if not possible:
            return "", ""
        (verb,) = mine.choices(possible, [_VERBS[verb] for verb in possible])
        return verb, mine.choice(fitting[verb])

    def _target(self, shift: Shift, mine: random.Random, hasty: bool) -> tuple[Day, str]:
        target = shift.days[mine.random() < 0.3]
        if not hasty and shift.room(target) <= 0:
            target = shift.days[target == shift.days[0]]
        if mine.random() >= 0.35:
            return target, ""
        slots = [*shift.slots[target]] if hasty else shift.slots_with_room(target)
        return target, mine.choice(slots) if slots else ""

    def _patient(self, shift: Shift, target: Day, mine: random.Random, hasty: bool) -> str:
        patients = self.chapter.patients
        if hasty:
            # Use these few often.
            return mine.choice(patients[:8])
        there = {known.patient for known in shift.visits.values() if known.day == target}
        return next((one for one in (mine.choice(patients) for _ in range(5)) if one not in there), patients[0])

    async def _burst(self, number: int, mine: random.Random) -> None:
        """Send many requests at once to one worker: same places, same patients, twins, and some that do not wait.

        The worker may batch them on the way to the database; each must get the answer that it would get alone.
        """
        front = mine.choice(self._fronts)
        shifts = mine.sample(self.chapter.at_work, min(2, len(self.chapter.at_work)))
        shifts.sort(key=lambda one: -max(one.room(target) for target in one.days))
        self._history.tally["bursts"] += 1
        patients = mine.sample(self.chapter.patients, 5) + mine.sample(self.chapter.patients[:8], 2)
        wishes = []
        for _ in range(mine.randint(5, 14)):
            shift = shifts[0 if mine.random() < 0.75 else -1]
            shift.asked += 1
            booked = shift.in_state({"BOOKED"})
            dice = mine.random()
            if booked and dice < 0.12:
                visit = mine.choice(booked)
                wish = self.cancelling(number, visit, shift.visits[visit].day)
            elif booked and dice < 0.22:
                wish = self._moving(number, mine.choice(booked), *self._target(mine.choice(shifts), mine, False))
            else:
                target = shift.days[mine.random() < 0.4]
                slot = mine.choice([*shift.slots[target]]) if mine.random() < 0.4 else ""
                wish = self.booking(number, mine.choice(patients), target, slot)
            dice = mine.random()
            leave = mine.uniform(0.001, 0.03) if dice < 0.12 else 0.0
            patience = mine.uniform(0.004, 0.06) if 0.12 < dice < 0.24 else 4.0
            give_up = dice < 0.24 and mine.random() < 0.3
            wishes.append(
                self._pursue(
                    shift, *wish, mine, twins=mine.random() < 0.15, front=front, patience=patience, leave=leave,
                    give_up=give_up,
                )
            )  # fmt: skip
        await asyncio.gather(*wishes)

    # Beliefs

    def _look(self, shift: Shift, read: Read) -> None:
        for who, _, state, _ in read.picture[0]:
            if who not in shift.busy:
                shift.visits.setdefault(who, Known(read.day, state)).at = state

    def _believe(self, shift: Shift, operation: Operation) -> None:
        if not operation.successes:
            refused = operation.attempts[-1].outcome
            where = self._shift_of(operation.day, shift)
            if refused == "DAY_FULL" and "held" not in operation.attempts[-1].about:
                where.full.add(operation.day)
            if refused in ("NOTHING_TO_UNDO", "ETAG_MISMATCH"):
                for one in (shift.visits, shift.ended):
                    if operation.appointment in one:
                        one[operation.appointment].etag = ""
            known = shift.visits.get(operation.appointment)
            if refused == "INVALID_TRANSITION" and known is not None:
                state = operation.attempts[-1].about[-1]
                if state in ("CANCELLED", "NO_SHOW", "LEFT"):
                    del shift.visits[operation.appointment]
                else:
                    # For a patient in the queue, only a look at the queue tells more.
                    known.at = {"COMPLETED": "DONE"}.get(state, state)
            return
        made = operation.successes[0]
        # The visit may have been moved since the client asked.
        target = (made.about[1], made.about[2]) if made.about else operation.day
        if operation.method in _LEAVES:
            left = shift.visits.pop(made.appointment, None)
            if left is not None:
                shift.full.discard(left.day)
        at = {"CHECKED_IN": "WAITING", "COMPLETED": "DONE"}.get(made.state, made.state)
        where = self._shift_of(target, shift)
        # Of a visit that is undone, another verb may be left to be undone.
        etag = made.etag if KINDS[operation.method] in UNDOABLE or operation.method == "UndoTransition" else ""
        where.ended.pop(made.appointment, None)
        if at in ("LEFT", "CANCELLED", "NO_SHOW"):
            left = where.visits.pop(made.appointment, None)
            where.full.discard(target)
            if left is not None:
                left.day, left.slot, left.etag = target, made.about[3], etag
                where.ended[made.appointment] = left
                for who in [*where.ended][:-4]:
                    del where.ended[who]
        elif where.doctor == target[0]:
            slot = made.about[3] if made.about else ""
            if operation.method == "CallNext" and made.appointment in where.visits:
                slot = where.visits[made.appointment].slot
            where.visits[made.appointment] = Known(target, at, made.about[0] if made.about else "", slot, etag)

    def _settled(self, one: schedule_pb2.AffectedAppointment) -> None:
        """A leave has moved or cancelled a visit, or kept it."""
        kept = schedule_pb2.AffectedAppointment.OUTCOME_KEPT, schedule_pb2.AffectedAppointment.OUTCOME_NOT_MOVED
        if one.outcome in kept:
            return
        for shift in self.chapter.at_work:
            known = shift.visits.pop(one.appointment_id, None)
            if known is None:
                continue
            shift.full.discard(known.day)
            known.etag = ""
            if one.HasField("moved_to"):
                known.day, known.slot = (one.moved_to.doctor_id, _date(one.moved_to.date)), one.moved_to.slot_id
                where = self._shift_of(known.day, shift)
                if known.day in where.days:
                    where.visits[one.appointment_id] = known
            return

    def _shift_of(self, target: Day, near: Shift) -> Shift:
        if near.doctor == target[0]:
            return near
        return next((one for one in self.chapter.at_work if one.doctor == target[0]), near)


async def press(caller: Caller, fronts: Sequence[Front], history: History, doctors: Callable[[], str]) -> None:
    """Call without end, on all connections in turn, with a key whose quota is small."""
    history.quota = QUOTA
    number = 0
    while True:
        number += 1
        front = fronts[number % len(fronts)]
        metadata, _ = caller.credentials()
        invoke = time.time()
        try:
            await front.queues.GetQueue(queue_pb2.GetQueueRequest(doctor_id=doctors()), metadata=metadata, timeout=2)
        except grpc.aio.AioRpcError as error:
            outcome = _refused(error)[0]
        else:
            outcome = OK
        history.metered.append(Metered(invoke, time.time(), outcome))
        await asyncio.sleep(0.05)


def _shows_others(answer: Any, kind: str, own: str) -> bool:
    """Whether an answer shows what is not of this patient or doctor, or of this clinic at all."""
    if isinstance(answer, pb.ListAppointmentsResponse):
        whose = [getattr(one, f"{kind}_id", "") for one in answer.appointments]
        return any(one != own for one in whose) or (kind == "stranger" and bool(whose))
    if isinstance(answer, queue_pb2.GetQueueResponse):
        return any(one.patient_id or one.appointment_id or one.patient_name for one in answer.queue.entries)
    return False


def _aim(request: Any, target: Day, slot: str) -> None:
    if slot:
        request.slot_id = slot
    else:
        on = day(datetime.fromisoformat(target[1]).date())
        request.doctor_day.CopyFrom(pb.DoctorDay(doctor_id=target[0], date=on))


def _date(on: Any) -> str:
    return f"{on.year:04}-{on.month:02}-{on.day:02}"


def _refused(error: grpc.aio.AioRpcError | FrontdeskError) -> tuple[str, tuple[str, ...]]:
    """The outcome, and the metadata of the refusal."""
    if isinstance(error, FrontdeskError):
        assert isinstance(error.__cause__, grpc.aio.AioRpcError)
        error = error.__cause__
    info = error_details_pb2.ErrorInfo()
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin" and isinstance(value, bytes):
            for packed in status_pb2.Status.FromString(value).details:
                packed.Unpack(info)
    code = error.code().name
    if not info.reason:
        # From gRPC on either side, not from the service.
        return f"{UNANSWERED}{code}", ()
    if (code in _ANSWERED and info.reason != "TOO_MANY_WATCHERS") or info.reason == "ETAG_MISMATCH":
        return info.reason, tuple(part for pair in sorted(info.metadata.items()) for part in pair)
    return (f"{BROKEN}{info.reason} {dict(info.metadata)}" if code == "INTERNAL" else f"{UNANSWERED}{info.reason}"), ()


def _picture(queue: queue_pb2.Queue) -> Picture:
    return tuple((e.appointment_id, e.ticket, _LINE[e.state], e.position) for e in queue.entries), queue.expected_count


def _seen(watcher: int, target: Day, update: Update, known: int) -> Seen:
    changes = tuple(
        (
            change.revision, _CHANGE[change.kind], change.appointment_id,
            _LINE[change.entry.state] if change.HasField("entry") else "", change.entry.ticket,
        )
        for change in update.changes
    )  # fmt: skip
    return Seen(
        watcher, target, time.monotonic(), update.previous_revision, update.queue.revision, changes,
        _picture(update.queue), known,
    )  # fmt: skip
