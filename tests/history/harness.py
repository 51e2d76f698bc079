"""Many clients of a real service, whose workers, database and network a seeded nemesis breaks; then the rules.

The seed decides what is asked and what is broken, not how the processes' work interleaves: a run with the same seed
plays the same plan, and a race shows in some of such runs.
"""

import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from datetime import time as daytime
from pathlib import Path
from typing import Any

import grpc
import psycopg

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import queue_pb2
from frontdesk.client import FrontdeskClient, Update
from tests.clinic import Front, day, details
from tests.history.check import (
    BROKEN,
    KINDS,
    OK,
    STEPS,
    UNANSWERED,
    Attempt,
    Checker,
    Day,
    Event,
    Facts,
    History,
    Memory,
    Operation,
    Picture,
    Read,
    Seen,
    Violation,
    Visit,
)
from tests.history.world import Cluster, Proxy, Served

FAULTS = (
    "worker-kill", "postmaster-kill", "terminate-all", "terminate-listen", "network-cut", "network-reset",
    "network-slow", "network-frozen", "answers-lost", "time-zone", "hints-dropped",
)  # fmt: skip
"""What the nemesis breaks."""

ODD_FAULTS = ("date-style",)
"""What it breaks only when asked to: an operator's doing rather than an accident."""

SETTLE_SECONDS = 3.0
"""A watcher must know by then, once nothing is broken. The poll behind the hints takes 0.2 s."""
ANSWER_SECONDS = 15.0
"""A client must have its answer by then, once nothing is broken."""

_APPOINTMENTS = {"BookAppointment", "RescheduleAppointment", "CancelAppointment", "StartAppointment",
                 "CompleteAppointment", "MarkNoShow"}  # fmt: skip
_ANSWERED = {"FAILED_PRECONDITION", "ALREADY_EXISTS", "NOT_FOUND", "INVALID_ARGUMENT"}
_TERMINATE = "select pg_terminate_backend(pid) from pg_stat_activity"
_ZONES = ("Pacific/Kiritimati", "Asia/Kathmandu", "America/St_Johns", "Pacific/Pago_Pago", "<+23>-23:59")
_VERBS = {
    "CheckIn": 10, "CallNext": 7, "StartAppointment": 4, "CompleteAppointment": 2, "CancelAppointment": 4,
    "LeaveQueue": 2, "ReturnToLine": 4, "ParkPatient": 3, "MarkMissed": 3, "CallAgain": 1, "MarkNoShow": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    seed: int = 1
    seconds: float = 20.0
    clients: int = 24
    channels: int = 6
    doctors: int = 4
    """Doctors who work at a time; each sees patients today and tomorrow."""
    capacity: tuple[int, int] = (2, 6)
    budget: int = 400
    """Operations after which a doctor goes home and another comes, because finished visits keep their places."""
    faults: Sequence[str] = FAULTS
    pause: tuple[float, float] = (0.3, 1.5)
    """Seconds between faults."""
    moves: float = 0.12
    """How often a booked visit is to be moved."""
    twins: float = 0.05
    """How often a key is asked with twice at once."""
    mutate: Callable[[psycopg.Connection], None] = lambda admin: None
    """Changes the database before the service starts."""
    bustle: bool = True
    """Whether another doctor-day is kept busy while the watchers of one must do without hints."""
    changed: str = ""
    """A safety that the workers lack; see `launcher`."""


@dataclass
class Report:
    """What a run has shown."""

    plan: Plan
    operations: int
    attempts: int
    reads: int
    updates: int
    seconds: float
    faults: Counter[str]
    outcomes: Counter[str]
    violations: list[Violation]
    internal: Counter[str]
    """What the service logged of its INTERNAL answers: exception, SQLSTATE and constraint."""
    lag: tuple[float, float]
    """Median and 99th percentile of the seconds from an answer to the watchers' knowing, faults included."""

    def __str__(self) -> str:
        lines = [
            f"seed {self.plan.seed}: {self.operations} operations in {self.attempts} calls, {self.reads} reads,"
            f" {self.updates} updates of watches, {self.operations / self.seconds:.0f} operations/s",
            "faults: " + (", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())) or "none"),
            "outcomes: " + ", ".join(f"{name} {count}" for name, count in self.outcomes.most_common()),
            f"watchers knew after {self.lag[0] * 1000:.0f} ms (median), {self.lag[1] * 1000:.0f} ms (p99)",
            *(f"internal error {what}: {count}" for what, count in self.internal.most_common(5)),
            f"violations: {len(self.violations)}"
            + "".join(f", {rule} {count}" for rule, count in Counter(v.rule for v in self.violations).most_common()),
        ]
        seen: set[str] = set()
        for violation in self.violations:
            # The first of each rule; the others are mostly its echoes.
            if violation.rule not in seen:
                seen.add(violation.rule)
                lines.append(str(violation))
        return "\n".join(lines)


class Shift:
    """A doctor at work: two days, their slots, and what the clients believe of their visits."""

    def __init__(self, doctor: str, days: Sequence[Day], slots: dict[Day, list[str]], capacity: int) -> None:
        self.doctor = doctor
        self.days = days
        self.slots = slots
        self.capacity = capacity
        self.asked = 0
        self.done = 0
        self.visits: dict[str, tuple[Day, str]] = {}
        self.full: set[Day] = set()
        self.watchers: list[Watcher] = []

    @property
    def over(self) -> bool:
        return self.done + 1 >= self.capacity


class Watcher:
    """Watches a doctor-day, goes away now and then, and comes back with its token."""

    def __init__(self, number: int, target: Day, clients: Sequence[FrontdeskClient], history: History, seed: int):
        self.number = number
        self.day = target
        self.revision = 0
        self.dozes = True
        """Whether it leaves off reading now and then, but not long: what is on the way by then comes to it late."""
        self._clients = clients
        self._history = history
        self._random = random.Random(f"{seed}/watcher/{number}")
        self.task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        token = ""
        on = datetime.fromisoformat(self.day[1]).date()
        while True:
            stay = self._random.expovariate(1 / 6)
            with suppress(TimeoutError):
                async with asyncio.timeout(stay):
                    client = self._random.choice(self._clients)
                    watch = client.watch_updates(self.day[0], on, heartbeat=5, resume_token=token)
                    async with aclosing(watch) as updates:
                        async for update in updates:
                            token = update.resume_token
                            self._history.seen.append(_seen(self.number, self.day, update))
                            self.revision = update.queue.revision
                            if self.dozes and self._random.random() < 0.03:
                                await asyncio.sleep(self._random.uniform(0.1, 1))

    async def settle(self, revision: int, seconds: float, when: str) -> None:
        """Wait until it knows the revision; if it does not in time, that is a part of the history."""
        deadline = time.monotonic() + seconds
        while self.revision < revision:
            if time.monotonic() > deadline or self.task.done():
                self._history.late.append((self.number, self.day, self.revision, revision, when))
                return
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        self.task.cancel()
        # What it died of, had it died before.
        with suppress(asyncio.CancelledError):
            await self.task


class Run:
    """One run, from an empty database to the verdict."""

    def __init__(self, plan: Plan, cluster: Cluster, directory: Path) -> None:
        self._plan = plan
        self._cluster = cluster
        self._conninfo = cluster.database(plan.mutate)
        self._directory = directory
        self._random = random.Random(plan.seed)
        self._history = History()
        self._blocking = ThreadPoolExecutor(1)
        self._faults: Counter[str] = Counter()
        self._faults_over = False
        self._keys = 0
        self._requests: dict[str, Any] = {}
        self._watchers = 0
        self._all_desks: list[FrontdeskClient] = []
        self._ending: list[asyncio.Task[None]] = []

    async def run(self) -> Report:
        """Play the plan. The service and the proxy are gone afterwards."""
        self._set_up()
        # Its path must fit into a socket's address.
        with tempfile.TemporaryDirectory(prefix="fd") as short:
            self._proxy = Proxy(self._conninfo, Path(short))
            await self._proxy.start()
            self._served = await asyncio.to_thread(
                Served, self._proxy.conninfo, self._directory, changed=self._plan.changed
            )
            try:
                async with self._connected():
                    began = time.monotonic()
                    await self._play()
                    seconds = time.monotonic() - began
                    await self._drain()
            finally:
                self._proxy.heal()
                await asyncio.to_thread(self._served.end)
                await self._proxy.close()
        violations = Checker(self._history, self._facts()).check()
        attempts = [one for operation in self._history.operations for one in operation.attempts]
        return Report(
            self._plan, len(self._history.operations), len(attempts), len(self._history.reads),
            len(self._history.seen), seconds, self._faults,
            Counter(" ".join(one.outcome.split()[:2]) for one in attempts), violations, self._internal(), self._lag(),
        )  # fmt: skip

    # The clinic.

    def _set_up(self) -> None:
        """Doctors, their slots and patients, by SQL: they are no part of the history."""
        plan, now = self._plan, datetime.now(UTC)
        # Somewhere it is early morning: today lasts longer than any run, and the evening's slots are to come.
        offset = 6 - now.hour if 6 - now.hour >= -12 else 30 - now.hour
        self._today = (now + timedelta(hours=offset)).date()
        evening = datetime.combine(self._today, daytime(20), UTC) - timedelta(hours=offset)
        doctors = plan.doctors + 3 + int(plan.seconds * 3)
        self._shifts: list[Shift] = []
        with psycopg.connect(self._conninfo) as admin:
            (clinic,) = admin.execute(
                "insert into clinic (name, time_zone) values ('History', %s) returning id::text",
                (f"Etc/GMT{-offset:+d}",),
            ).fetchone() or ("",)
            for number in range(doctors):
                # The last two are kept for the end of the run, and have a place for everybody.
                capacity = self._random.randint(*plan.capacity) if number < doctors - 2 else 500
                (doctor,) = admin.execute(
                    "insert into doctor (code, display_name, clinic_id, max_patients_per_day) values (%s, 'D', %s, %s)"
                    " returning id::text", (f"H-{number}", clinic, capacity),
                ).fetchone() or ("",)  # fmt: skip
                days = [(doctor, str(self._today + timedelta(days=later))) for later in (0, 1)]
                slots: dict[Day, list[str]] = {}
                for later, target in enumerate(days):
                    slots[target] = []
                    for half in range(3):
                        start = evening + timedelta(days=later, minutes=30 * half)
                        (slot,) = admin.execute(
                            "insert into slot (doctor_id, clinic_id, date, start_time, end_time, capacity)"
                            " values (%s, %s, %s, %s, %s, %s) returning id::text",
                            (doctor, clinic, target[1], start, start + timedelta(minutes=30), 1 + half % 2),
                        ).fetchone() or ("",)  # fmt: skip
                        slots[target].append(slot)
                self._shifts.append(Shift(doctor, days, slots, capacity))
            self._patients = [
                str(row[0])
                for row in admin.execute(
                    "insert into patient (given_name, name_key, phone) select 'P', 'p' || n, '+5511987654321'"
                    " from generate_series(1, %s) n returning id::text", (max(20, plan.clients),),
                )
            ]  # fmt: skip
        self._busy, self._quiet = self._shifts.pop(), self._shifts.pop()
        self._at_work = [self._shifts.pop() for _ in range(plan.doctors)]
        self._last_shifts: list[Shift] = []

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        self._channels: list[grpc.aio.Channel] = []
        self._fronts: list[Front] = []
        self._desks: list[FrontdeskClient] = []
        self._connect_anew()
        try:
            yield
        finally:
            for desk in self._all_desks:
                await desk.close()
            for channel in self._channels:
                await channel.close()

    def _connect_anew(self) -> None:
        """Give everybody a new connection. All go to the one worker that is left when the other is killed."""
        target = f"127.0.0.1:{self._served.port}"
        options = [
            # Each its own connection, so that both workers get some; and the history has every attempt.
            ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 300),
        ]  # fmt: skip
        channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(self._plan.channels + 4)]
        self._channels += channels
        self._fronts[:] = [Front(one, self._conninfo, self._served.port) for one in channels[: self._plan.channels]]
        # The watchers choose among these whenever they come back.
        self._desks[:] = [FrontdeskClient(one, caller="watch") for one in channels[self._plan.channels :]]
        self._all_desks += self._desks

    def _watch(self, shift: Shift) -> None:
        for target in shift.days:
            for _ in range(2 if target[1] == str(self._today) else 1):
                self._watchers += 1
                watcher = Watcher(self._watchers, target, self._desks, self._history, self._plan.seed)
                shift.watchers.append(watcher)

    # The course of a run.

    async def _play(self) -> None:
        for shift in self._at_work:
            self._watch(shift)
        end = time.monotonic() + self._plan.seconds
        clients = [asyncio.create_task(self._client(number, end)) for number in range(self._plan.clients)]
        nemesis = asyncio.create_task(self._nemesis(end))
        await nemesis
        await asyncio.gather(*clients)
        await asyncio.gather(*self._ending)
        await self._repeat_keys()
        await self._quiet_end()
        for shift in [*self._at_work, *self._last_shifts, self._busy, self._quiet]:
            await self._go_home(shift, SETTLE_SECONDS)

    async def _client(self, number: int, end: float) -> None:
        mine = random.Random(f"{self._plan.seed}/client/{number}")
        while time.monotonic() < end:
            if mine.random() < 0.15:
                shift = mine.choice(self._at_work)
                read = await self._read(number, mine.choice(shift.days), mine)
                if read is not None:
                    shift.visits |= {who: (read.day, state) for who, _, state, _ in read.picture[0]}
            else:
                await self._one(number, mine)

    async def _one(self, number: int, mine: random.Random) -> None:
        shift = mine.choice(self._at_work)
        shift.asked += 1
        if shift.asked == self._plan.budget or (shift.over and shift.asked > 20):
            self._relieve(shift)
        operation, request = self._intention(number, shift, mine)
        self._history.operations.append(operation)
        await self._insist(operation, request, mine)
        self._believe(shift, operation)

    def _relieve(self, shift: Shift) -> None:
        if self._shifts and shift in self._at_work:
            fresh = self._shifts.pop()
            self._at_work[self._at_work.index(shift)] = fresh
            self._watch(fresh)
            self._last_shifts.append(shift)
            if len(self._last_shifts) > 20:
                # Long ago: its last operations have been answered, and the watchers had time, faults or not.
                self._ending.append(asyncio.create_task(self._go_home(self._last_shifts.pop(0), 30)))

    def _intention(self, number: int, shift: Shift, mine: random.Random) -> tuple[Operation, Any]:
        self._keys += 1
        key = f"{self._plan.seed}-{self._keys}"
        today = shift.days[0]
        # Somewhat more ask than there are places.
        target, slot = self._target(shift, mine)
        # Seldom ask for what is believed to be gone.
        if not shift.visits or mine.random() < (0.4 if target not in shift.full else 0.03):
            request: Any = pb.BookAppointmentRequest(patient_id=mine.choice(self._patients), idempotency_key=key)
            _aim(request, target, slot)
            return Operation(number, key, "BookAppointment", target, slot=slot), request
        if mine.random() < self._plan.moves:
            visit = self._visit(shift, {"BOOKED"}, mine)
            target, slot = self._target(mine.choice(self._at_work), mine)
            request = pb.RescheduleAppointmentRequest(appointment_id=visit, idempotency_key=key)
            _aim(request, target, slot)
            return Operation(number, key, "RescheduleAppointment", target, visit, slot), request
        (verb,) = mine.choices([*_VERBS], [*_VERBS.values()])
        if verb == "CallNext":
            request = queue_pb2.CallNextRequest(doctor_id=shift.doctor, room="1", idempotency_key=key)
            return Operation(number, key, verb, today), request
        visit = self._visit(shift, STEPS[KINDS[verb]][0], mine)
        messages: Any = pb if verb in _APPOINTMENTS else queue_pb2
        request = getattr(messages, f"{verb}Request")(appointment_id=visit, idempotency_key=key)
        return Operation(number, key, verb, shift.visits[visit][0], visit), request

    def _target(self, shift: Shift, mine: random.Random) -> tuple[Day, str]:
        target = shift.days[mine.random() < 0.3]
        return target, mine.choice(shift.slots[target]) if mine.random() < 0.35 else ""

    def _visit(self, shift: Shift, states: set[str], mine: random.Random) -> str:
        """One for which the verb is allowed, if the clients know one; now and then any."""
        fitting = [one for one, (_, at) in shift.visits.items() if at in states]
        return mine.choice(fitting if fitting and mine.random() < 0.85 else [*shift.visits])

    def _believe(self, shift: Shift, operation: Operation) -> None:
        if not operation.successes:
            refused = operation.attempts[-1].outcome
            if refused == "DAY_FULL":
                next((one for one in self._at_work if one.doctor == operation.day[0]), shift).full.add(operation.day)
            if refused == "INVALID_TRANSITION" and operation.method != "RescheduleAppointment":
                shift.visits.pop(operation.appointment, None)
            return
        made = operation.successes[0]
        where = shift
        if operation.method == "RescheduleAppointment":
            shift.visits.pop(made.appointment, None)
            where = next((one for one in self._at_work if one.doctor == operation.day[0]), shift)
        at = {"CHECKED_IN": "WAITING", "COMPLETED": "DONE"}.get(made.state, made.state)
        if at in ("DONE", "LEFT", "CANCELLED", "NO_SHOW"):
            # Seldom asked about again.
            where.visits.pop(made.appointment, None)
            if at != "DONE":
                where.full.discard(operation.day)
            where.done += at == "DONE" and operation.day == where.days[0]
        elif where.doctor == operation.day[0]:
            where.visits[made.appointment] = (operation.day, at)

    async def _insist(self, operation: Operation, request: Any, mine: random.Random) -> None:
        """Ask with the same key until there is an answer."""
        self._requests[operation.key] = request
        if mine.random() < self._plan.twins:
            two = mine.sample(self._fronts, 2)
            await asyncio.gather(*(self._attempt(operation, request, front) for front in two))
        else:
            await self._attempt(operation, request, mine.choice(self._fronts))
        healed = 0.0
        while operation.attempts[-1].outcome.startswith((UNANSWERED, BROKEN)) and not operation.successes:
            await asyncio.sleep(mine.uniform(0.02, 0.2))
            if self._faults_over:
                healed = healed or time.monotonic()
                if time.monotonic() > healed + ANSWER_SECONDS:
                    operation.given_up = True
                    return
            if operation.attempts[-1].outcome.startswith(BROKEN) and len(operation.attempts) > 8:
                return
            await self._attempt(operation, request, mine.choice(self._fronts))

    async def _attempt(self, operation: Operation, request: Any, front: Front) -> None:
        service: Any = front.appointments if operation.method in _APPOINTMENTS else front.queues
        call = getattr(service, operation.method)
        invoke = time.monotonic()
        try:
            answer = await call(request, timeout=4, metadata=(("frontdesk-caller", "history"),))
        except grpc.aio.AioRpcError as error:
            operation.attempts.append(Attempt(invoke, time.monotonic(), _outcome(error)))
            return
        made = Attempt(invoke, time.monotonic(), OK, answer.replayed, answer.revision)
        if operation.method == "CallNext":
            made.appointment = answer.entry.appointment_id
        else:
            visit = answer.appointment
            made.appointment, made.number = visit.id, visit.number
            made.state = pb.Appointment.State.Name(visit.state).removeprefix("STATE_")
        if operation.method not in _APPOINTMENTS:
            made.ticket = answer.entry.ticket
            made.state = queue_pb2.QueueEntry.State.Name(answer.entry.state).removeprefix("STATE_")
        if operation.method == "RescheduleAppointment":
            made.vacated = answer.vacated_revision
        operation.attempts.append(made)

    async def _read(self, number: int, target: Day, mine: random.Random) -> Read | None:
        front = mine.choice(self._fronts)
        request = queue_pb2.GetQueueRequest(doctor_id=target[0], date=day(datetime.fromisoformat(target[1]).date()))
        invoke = time.monotonic()
        try:
            answer = await front.queues.GetQueue(request, timeout=4)
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.05)
            return None
        read = Read(number, target, invoke, time.monotonic(), answer.queue.revision, _picture(answer.queue))
        self._history.reads.append(read)
        return read

    async def _repeat_keys(self) -> None:
        """Ask again with keys of long ago; each must get its first answer."""
        for operation in self._random.sample(self._history.operations, min(150, len(self._history.operations))):
            request = self._requests.get(operation.key)
            if request is not None and operation.successes:
                await self._attempt(operation, request, self._random.choice(self._fronts))

    async def _quiet_end(self) -> None:
        """While one doctor-day is busy and every hint is lost, the watchers of another must learn of its changes."""
        self._connect_anew()
        for shift in (self._busy, self._quiet):
            for _ in range(3):
                self._watch(shift)
        for shift in [*self._at_work, *self._last_shifts, self._busy, self._quiet]:
            for watcher in shift.watchers:
                watcher.dozes = False
        self._proxy.deaf = True
        stop = asyncio.Event()

        async def book(shift: Shift, front: Front, patient: str) -> str:
            self._keys += 1
            request = pb.BookAppointmentRequest(patient_id=patient, idempotency_key=f"{self._plan.seed}-{self._keys}")
            _aim(request, shift.days[0], "")
            operation = Operation(-1, request.idempotency_key, "BookAppointment", shift.days[0])
            self._history.operations.append(operation)
            await self._attempt(operation, request, front)
            return operation.attempts[0].appointment

        async def bustle(front: Front, patient: str) -> None:
            while not stop.is_set():
                who = await book(self._busy, front, patient)
                self._keys += 1
                request = pb.CancelAppointmentRequest(
                    appointment_id=who, idempotency_key=f"{self._plan.seed}-{self._keys}"
                )
                operation = Operation(-1, request.idempotency_key, "CancelAppointment", self._busy.days[0], who)
                if who:
                    self._history.operations.append(operation)
                    await self._attempt(operation, request, front)
                await asyncio.sleep(0.02)

        bustling = [
            asyncio.create_task(bustle(front, patient))
            for front, patient in zip(self._fronts if self._plan.bustle else (), self._patients, strict=False)
        ]
        await asyncio.sleep(0.5)
        when = "while its hints were lost" + (" and another doctor-day was busy" if self._plan.bustle else "")
        for front, patient in zip(self._fronts, self._patients, strict=False):
            await book(self._quiet, front, patient)
            await self._settled(self._quiet, 2, when)
            if self._history.late:
                break
        stop.set()
        await asyncio.gather(*bustling)
        self._proxy.deaf = False

    async def _settled(self, shift: Shift, seconds: float, when: str) -> None:
        mine = random.Random(0)
        for target in shift.days:
            read = None
            for _ in range(400):
                read = read or await self._read(-1, target, mine)
            watchers = [watcher for watcher in shift.watchers if watcher.day == target]
            if read is not None:
                await asyncio.gather(*(watcher.settle(read.revision, seconds, when) for watcher in watchers))

    async def _go_home(self, shift: Shift, seconds: float) -> None:
        await self._settled(shift, seconds, f"{seconds:.0f} s after the last change")
        for watcher in shift.watchers:
            await watcher.close()

    async def _drain(self) -> None:
        """Stop the service under open streams: each is told, and the service ends with status 0."""
        streams: list[Any] = []
        for number in range(12):
            shift = self._at_work[number % len(self._at_work)]
            stub = self._fronts[number % len(self._fronts)].queues
            stream: Any = stub.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=shift.doctor))
            await stream.read()
            streams.append(stream)
        self._served.process.send_signal(signal.SIGTERM)

        async def end(number: int, stream: Any) -> None:
            last = "nothing"
            try:
                async with asyncio.timeout(20):
                    while (message := await stream.read()) is not grpc.aio.EOF:
                        last = str(message.WhichOneof("event"))
                    code = (await stream.code()).name
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else "silence"
            self._history.drains.append((number, f"{last}, {code}"))

        await asyncio.gather(*(end(number, stream) for number, stream in enumerate(streams)))
        try:
            status = await asyncio.to_thread(self._served.process.wait, 25)
            self._history.drains.append((-1, "closing, OK" if status == 0 else f"exit status {status}"))
        except Exception as error:
            self._history.drains.append((-1, repr(error)))

    # The nemesis.

    async def _nemesis(self, end: float) -> None:
        mine = random.Random(f"{self._plan.seed}/nemesis")
        plan = self._plan
        # Each kind comes before any comes twice.
        left: list[str] = []
        while plan.faults:
            pause = mine.uniform(*plan.pause)
            if time.monotonic() + pause > end - 1:
                break
            await asyncio.sleep(pause)
            if not left:
                left = mine.sample(list(plan.faults), len(plan.faults))
                self._connect_anew()
            kind = left.pop()
            self._faults[kind] += 1
            await self._break(kind, mine)
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        self._proxy.heal()
        with suppress(psycopg.Error):
            await self._sql("alter database {} reset all")
        self._faults_over = True

    async def _break(self, kind: str, mine: random.Random) -> None:
        proxy = self._proxy
        if kind == "worker-kill":
            workers = self._served.workers()
            if workers:
                with suppress(ProcessLookupError):
                    os.kill(mine.choice(workers), signal.SIGKILL)
        elif kind == "postmaster-kill":
            await asyncio.get_running_loop().run_in_executor(self._blocking, self._cluster.kill)
        elif kind == "terminate-all":
            await self._sql(f"{_TERMINATE} where application_name ~ 'frontdesk'")
        elif kind == "terminate-listen":
            await self._sql(f"{_TERMINATE} where application_name = 'frontdesk listen'")
        elif kind == "network-cut":
            proxy.refusing = True
            proxy.reset()
            await asyncio.sleep(mine.uniform(0.1, 2))
            proxy.refusing = False
        elif kind == "network-reset":
            proxy.reset()
        elif kind == "network-slow":
            proxy.delay = mine.uniform(0.002, 0.05)
            await asyncio.sleep(mine.uniform(0.5, 2))
            proxy.delay = 0.0
        elif kind == "network-frozen":
            proxy.asks.clear()
            proxy.answers.clear()
            await asyncio.sleep(mine.uniform(0.2, 2))
            proxy.asks.set()
            proxy.answers.set()
        elif kind == "answers-lost":
            # What is asked is done, and nobody hears of it.
            proxy.answers.clear()
            await asyncio.sleep(mine.uniform(0.02, 0.3))
            proxy.reset()
            proxy.answers.set()
        elif kind == "time-zone":
            await self._sql(f"alter database {{}} set timezone to '{mine.choice(_ZONES)}'")
            await self._sql(f"{_TERMINATE} where application_name ~ 'frontdesk' and random() < 0.5")
        elif kind == "date-style":
            await self._sql(f"alter database {{}} set datestyle to '{mine.choice(('German', 'SQL, DMY', 'Postgres'))}'")
            await self._sql(f"{_TERMINATE} where application_name ~ 'frontdesk' and random() < 0.5")
        elif kind == "hints-dropped":
            proxy.deaf = True
            await asyncio.sleep(mine.uniform(0.5, 2))
            proxy.deaf = False

    async def _sql(self, query: str) -> None:
        """Past the proxy."""
        name = psycopg.conninfo.conninfo_to_dict(self._conninfo)["dbname"]
        async with await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True) as admin:
            await admin.execute(query.format(name).encode())

    # The verdict.

    def _facts(self) -> Facts:
        facts = Facts()
        with psycopg.connect(self._conninfo) as admin:
            name = admin.info.dbname
            facts.capacities = dict(admin.execute("select id::text, max_patients_per_day from doctor").fetchall())
            facts.slots = dict(admin.execute("select id::text, capacity from slot").fetchall())
            for doctor, date, revision in admin.execute("select doctor_id::text, date::text, revision from doctor_day"):
                facts.revisions[doctor, date] = revision
            for doctor, date, *rest in admin.execute(
                "select doctor_id::text, date::text, revision, kind, coalesce(appointment_id::text, ''),"
                " coalesce(queue_state, ''), coalesce(ticket, 0) from event"
            ):
                facts.events.append(Event((doctor, date), *rest))
            for who, patient, doctor, date, number, slot, state, line, ticket in admin.execute(
                "select id::text, patient_id::text, doctor_id::text, date::text, number, coalesce(slot_id::text, ''),"
                " state, coalesce(queue_state, ''), coalesce(ticket, 0) from appointment"
            ):
                at = str({"CHECKED_IN": line, "COMPLETED": "DONE"}.get(state, state))
                facts.visits[who] = Visit(who, patient, (doctor, date), number, slot, at, ticket)
            for method, key, who, snapshot, revision, vacated in admin.execute(
                "select method, key, result_id::text, snapshot, revision, coalesce(vacated_revision, 0)"
                " from idempotency"
            ):
                target = (snapshot["doctor_id"], snapshot["date"])
                facts.memories.append(
                    Memory(method, key, who, target, snapshot["number"], snapshot["slot_id"] or "", revision, vacated)
                )
            ((facts.deadlocks,),) = admin.execute(
                "select deadlocks from pg_stat_database where datname = %s", (name,)
            ).fetchall()
        return facts

    def _internal(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in self._served.log.read_text().splitlines():
            if '"internal_error"' in line:
                said = json.loads(line)
                found[f"{said['error']} {said['sqlstate']} {said['constraint']}"] += 1
        return found

    def _lag(self) -> tuple[float, float]:
        made: dict[Day, list[tuple[int, float]]] = defaultdict(list)
        for operation in self._history.operations:
            for one in operation.successes[:1]:
                made[operation.day].append((one.revision, one.complete))
        for answers in made.values():
            answers.sort()
        lags = []
        for seen in self._history.seen:
            if seen.previous:
                lags += [
                    max(0.0, seen.at - at) for r, at in made.get(seen.day, ()) if seen.previous < r <= seen.revision
                ]
        lags.sort()
        return (lags[len(lags) // 2], lags[len(lags) * 99 // 100]) if lags else (0.0, 0.0)


def _aim(request: Any, target: Day, slot: str) -> None:
    if slot:
        request.slot_id = slot
    else:
        on = day(datetime.fromisoformat(target[1]).date())
        request.doctor_day.CopyFrom(pb.DoctorDay(doctor_id=target[0], date=on))


def _outcome(error: grpc.aio.AioRpcError) -> str:
    info = details(error).get("ErrorInfo")
    code = error.code().name
    if info is None:
        # Of the way there and back, not of the service.
        return f"{UNANSWERED}{code}"
    if code in _ANSWERED:
        return str(info.reason)
    return f"{BROKEN}{info.reason} {dict(info.metadata)}" if code == "INTERNAL" else f"{UNANSWERED}{info.reason}"


def _picture(queue: queue_pb2.Queue) -> Picture:
    return tuple((e.appointment_id, e.ticket, _line(e), e.position) for e in queue.entries), queue.expected_count


def _line(entry: queue_pb2.QueueEntry) -> str:
    return queue_pb2.QueueEntry.State.Name(entry.state).removeprefix("STATE_")


def _seen(watcher: int, target: Day, update: Update) -> Seen:
    changes = tuple(
        (
            change.revision, queue_pb2.QueueChange.Kind.Name(change.kind).removeprefix("KIND_"), change.appointment_id,
            _line(change.entry) if change.HasField("entry") else "", change.entry.ticket,
        )
        for change in update.changes
    )  # fmt: skip
    return Seen(
        watcher, target, time.monotonic(), update.previous_revision, update.queue.revision, changes,
        _picture(update.queue),
    )  # fmt: skip


def play(plan: Plan, cluster: Cluster | None = None) -> Report:
    """Run it, on a PostgreSQL of its own unless one is given, and return what it has shown."""
    import uvloop

    with tempfile.TemporaryDirectory(prefix="frontdesk-history-") as directory:
        own = cluster or Cluster(Path(directory) / "data")
        try:
            run = Run(plan, own, Path(directory))
            main: Callable[[], Awaitable[Report]] = run.run
            return uvloop.run(main())  # type: ignore[arg-type]
        finally:
            if cluster is None:
                own.close()
