"""Run many clients on a real service while a seeded nemesis breaks workers, database and network; then check the rules.

The seed decides requests and faults, but not how the processes interleave: runs with one seed follow the same plan, and
a race shows in some of them.
"""

import asyncio
import json
import multiprocessing
import os
import pickle
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from datetime import time as daytime
from pathlib import Path
from typing import Any

import grpc
import psycopg

from clinic.frontdesk.v1 import access_pb2, auth_pb2, policy_pb2, queue_pb2
from frontdesk.client import FrontdeskClient
from tests.clinic import Front, reason_of
from tests.history.callers import QUOTA, Anybody, Caller, Callers, Clerk, Person, add_clerk, add_people, add_program
from tests.history.check import (
    ACCESS_REFUSALS,
    BROKEN,
    OK,
    UNANSWERED,
    Act,
    Checker,
    Day,
    Event,
    Facts,
    Grant,
    History,
    Hold,
    Leave,
    Memory,
    Outcome,
    Sealed,
    Stream,
    Violation,
    Visit,
)
from tests.history.clients import Chapter, Clients, Shift, Watcher, press
from tests.history.shortest import shortest
from tests.history.world import HORIZON_DAYS, Cluster, Proxy, Served
from tests.identities import ADMIN, access, add_identities, auth

ACCESS_FAULTS = ("key-revoked", "user-demoted", "session-ended")
"""Faults that need rules of access; without them they are left out."""

FAULTS = (
    "worker-kill", "worker-frozen", "service-restart", "postmaster-kill", "terminate-all", "terminate-listen",
    "statements-cancelled", "lock-held", "row-held", "network-cut", "network-reset", "network-slow", "network-frozen",
    "answers-lost", "time-zone", "hints-dropped",
    *ACCESS_FAULTS,
)  # fmt: skip
"""The faults of the nemesis."""

ODD_FAULTS = ("date-style",)
"""Faults only on request: an operator's actions rather than accidents."""

SETTLE_SECONDS = 3.0
"""Seconds in which a watcher must have a change once all faults have ended. The poll behind the hints takes 0.2 s."""

_TERMINATE = "select pg_terminate_backend(pid) from pg_stat_activity"
_CANCEL = "select pg_cancel_backend(pid) from pg_stat_activity"
_ZONES = ("Pacific/Kiritimati", "Asia/Kathmandu", "America/St_Johns", "Pacific/Pago_Pago", "<+23>-23:59")
_PATIENCE = 60.0
"""Seconds in which a watcher must have a change while faults continue."""
_OLD_CONNECTIONS = 60.0
"""Seconds for which connections stay open when there are new ones."""
_UNANSWERED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "UNKNOWN")
_PROCESSES = 2
"""Judges that run in parallel."""
_ADMINISTRATION_SECONDS = 20.0
"""Seconds after which the nemesis gives up a change of credentials that gets no answer."""
_ADMINISTRATOR = f"keys/{ADMIN[0][1].split('_')[1]}"
_PATIENTS_WITH_USERS = 24
_SLOTS = 8
"""Slots of a doctor-day, half an hour each, before midnight."""


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    seed: int = 1
    seconds: float = 20.0
    clients: int = 40
    channels: int = 8
    doctors: int = 6
    """Doctors at work at one time; each sees patients today and tomorrow."""
    capacity: tuple[int, int] = (4, 16)
    chapter: float = 30.0
    """Seconds per chapter; then the history is saved, and the run continues with other doctors and patients."""
    patients: int = 300
    faults: Sequence[str] = FAULTS
    pause: tuple[float, float] = (0.5, 3.5)
    """Seconds between faults."""
    moves: float = 0.08
    """The probability that a client wants to move a booked visit."""
    twins: float = 0.05
    """The probability that a request is sent twice at once with one key."""
    bursts: float = 0.02
    """The probability that a client sends many requests at once."""
    holds: float = 0.04
    """The probability that a client holds a place; later it books with it, or lets it expire."""
    haste: float = 0.1
    """The probability that a client acts without looking at the beliefs; most of these requests are refused."""
    mutate: Callable[[psycopg.Connection], None] = lambda admin: None
    """Changes the database before the service starts."""
    bustle: bool = True
    """Whether another doctor-day is busy while the watchers of one get no hints."""
    changed: str = ""
    """A missing safeguard of the workers; see `launcher`."""
    access: str = "open"
    """`open`, or `required`: then all callers have credentials, and some lose them."""
    walk_ins: float = 0.25
    """The probability that a new patient comes without an appointment."""
    undos: float = 0.12
    """The probability that a client takes back one of the latest verbs."""
    leaves: float = 0.004
    """The probability that a client sends a doctor on leave for a moment, or changes the hours."""
    probes: float = 0.06
    """With access required, the probability that a client asks for what is not its own."""


@dataclass
class Verdict:
    """The judges' verdict on a chapter, or on all."""

    violations: list[Violation] = field(default_factory=list)
    methods: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """By method: operations asked, made, refused and unanswered; calls, and replays."""
    outcomes: Counter[str] = field(default_factory=Counter)
    """Outcomes of calls."""
    tally: Counter[str] = field(default_factory=Counter)
    """Bursts, twins, and abandoned operations."""
    reads: int = 0
    probes: int = 0
    updates: int = 0
    changes: int = 0
    """Changes in the updates to watchers."""
    lags: list[float] = field(default_factory=list)
    """Seconds from an answer to a watcher's receipt."""

    def add(self, other: "Verdict") -> None:
        self.violations += other.violations
        for method, counts in other.methods.items():
            self.methods[method].update(counts)
        self.outcomes.update(other.outcomes)
        self.tally.update(other.tally)
        self.reads += other.reads
        self.probes += other.probes
        self.updates += other.updates
        self.changes += other.changes
        self.lags += other.lags


@dataclass
class Report:
    """The result of a run."""

    plan: Plan
    seconds: float
    judged: float
    """Seconds that the judges took."""
    faults: Counter[str]
    verdict: Verdict
    internal: Counter[str]
    """The logged causes of INTERNAL answers: exception, SQLSTATE and constraint."""
    sealed: int
    """Rows of the log in the chain."""
    metered: Counter[str]
    """Outcomes of the calls with a small quota."""
    streams: int
    """Streams that still got a message after their caller's credentials were to end."""

    @property
    def violations(self) -> list[Violation]:
        return self.verdict.violations

    @property
    def outcomes(self) -> Counter[str]:
        """Outcomes of all calls except reads."""
        return self.verdict.outcomes

    @property
    def total(self) -> Counter[str]:
        """The sum over all methods."""
        return sum(self.verdict.methods.values(), Counter())

    @property
    def operations(self) -> int:
        """The number of reads and probes, and of changes asked, each with its own key."""
        return self.total["asked"] + self.verdict.reads + self.verdict.probes

    def __str__(self) -> str:
        verdict, total = self.verdict, self.total
        lags = sorted(verdict.lags) or [0.0]
        columns = ("asked", "made", "refused", "unanswered", "calls", "replayed")
        methods = {**verdict.methods, "GetQueue": Counter(dict.fromkeys(("asked", "made", "calls"), verdict.reads))}
        rows = [(method, [counts[name] for name in columns]) for method, counts in sorted(methods.items())]
        rows.append(("in all", [sum(counts) for counts in zip(*(row[1] for row in rows), strict=True)]))
        lines = [
            f"seed {self.plan.seed}, access {self.plan.access}: {self.operations} operations in {self.seconds:.0f} s,"
            f" {self.operations / self.seconds:.0f} a second; {total['made'] * 100 / max(total['asked'], 1):.0f} % of"
            f" {total['asked']} changes made; judged in {self.judged:.0f} s",
            "",
            "| method |" + "|".join(f" {name} " for name in columns) + "|",
            "|---|" + "--:|" * len(columns),
            *(f"| {method} | " + " | ".join(map(str, counts)) + " |" for method, counts in rows),
            "",
            f"faults, {sum(self.faults.values())}: "
            + (", ".join(f"{kind} {count}" for kind, count in sorted(self.faults.items())) or "none"),
            "calls: " + ", ".join(f"{name} {count}" for name, count in verdict.outcomes.most_common()),
            ", ".join(f"{name} {count}" for name, count in sorted(verdict.tally.items())),
            f"watchers: {verdict.updates} updates with {verdict.changes} changes, received after"
            f" {lags[len(lags) // 2] * 1000:.0f} ms (median), {lags[len(lags) * 99 // 100] * 1000:.0f} ms (p99, faults"
            " included)",
            f"probes: {verdict.probes}; rows sealed: {self.sealed}; streams of those who lost their credentials, with a"
            f" message since: {self.streams}; calls with a quota of {QUOTA} a minute: "
            + (", ".join(f"{name} {count}" for name, count in self.metered.most_common()) or "none"),
            *(f"internal error {what}: {count}" for what, count in self.internal.most_common(5)),
            f"violations: {len(self.violations)}"
            + "".join(f", {rule} {count}" for rule, count in Counter(v.rule for v in self.violations).most_common()),
        ]
        # The first violation of each rule; most others are its consequences.
        lines += [str(violation) for violation in _firsts(self.violations)]
        return "\n".join(lines)


class Run:
    """One run, from an empty database to the verdict."""

    def __init__(self, plan: Plan, cluster: Cluster, directory: Path) -> None:
        self._plan = plan
        self._cluster = cluster
        self._conninfo = cluster.database(plan.mutate)
        self._directory = directory
        self._random = random.Random(plan.seed)
        self._blocking = ThreadPoolExecutor(2)
        self._faults: Counter[str] = Counter()
        self._faults_over = False
        self._watchers = 0
        self._chapters = 0
        self._files: list[tuple[Path, str, list[str], list[str]]] = []
        """The file with the history of each chapter, its name, identities and doctors."""
        self._closing: list[asyncio.Task[None]] = []
        self._whole = History()
        """What is of the run as a whole."""
        self._required = plan.access == "required"
        self._clerks: list[Clerk] = []
        self._tails: list[asyncio.Task[None]] = []
        """Read the streams of those who have lost their credentials."""

    async def run(self) -> Report:
        """Play the plan. Service and proxy have ended afterwards."""
        deadlocks = self._cluster.deadlocks()
        self._clinic()
        # The path must fit into a socket address.
        with tempfile.TemporaryDirectory(prefix="fd") as short:
            self._proxy = Proxy(self._conninfo, Path(short))
            await self._proxy.start()
            self._served = await asyncio.to_thread(
                Served, self._proxy.conninfo, self._directory, changed=self._plan.changed, access=self._plan.access
            )
            try:
                async with self._connected():
                    began = time.monotonic()
                    await self._play()
                    seconds = time.monotonic() - began
                    await self._drain(last=True)
            except BaseException:
                # Do not wait for clients that are still running.
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                raise
            finally:
                self._proxy.heal()
                await asyncio.to_thread(self._served.end)
                await self._proxy.close()
        began = time.monotonic()
        sealed, wrong = _judge_whole(self._conninfo, self._whole, self._cluster.deadlocks() - deadlocks)
        verdict = Verdict(wrong)
        with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn")) as judges:
            for one in judges.map(_judge, *zip(*((self._conninfo, *file) for file in self._files), strict=True)):
                verdict.add(one)
        judged = time.monotonic() - began
        over = sum(one.last > one.grant.ending for one in self._whole.streams)
        metered = Counter(one.outcome for one in self._whole.metered)
        return Report(self._plan, seconds, judged, self._faults, verdict, self._internal(), sealed, metered, over)

    # The clinic

    def _clinic(self) -> None:
        now = datetime.now(UTC)
        # A zone where it is early morning: today is longer than any run, and the evening's slots are in the future.
        offset = 6 - now.hour if 6 - now.hour >= -12 else 30 - now.hour
        self._today = (now + timedelta(hours=offset)).date()
        self._evening = datetime.combine(self._today, daytime(20), UTC) - timedelta(hours=offset)
        with psycopg.connect(self._conninfo) as admin:
            clinics = admin.execute(
                "insert into clinic (name, time_zone, max_calls) select 'History', %s, 2 from generate_series(1, 2)"
                " returning id::text", (f"Etc/GMT{-offset:+d}",),
            ).fetchall()  # fmt: skip
            self._clinic_id, self._other_clinic_id = (one[0] for one in clinics)
            if self._required:
                add_identities(admin)
                self._clerks = [add_clerk(admin, self._clinic_id) for _ in range(2)]
                self._watching = add_program(admin, "service", "SERVICE")
                self._pressing = add_program(admin, "service", "SERVICE", limit=QUOTA)

    async def _chapter(self) -> Chapter:
        """The next chapter. PostgreSQL may be unavailable for a while."""
        self._chapters += 1
        number, seed = self._chapters, self._random.random()
        while True:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._blocking, self._populate, number, seed)
            except psycopg.OperationalError:
                await asyncio.sleep(0.2)

    def _populate(self, number: int, seed: float) -> Chapter:
        """Insert doctors, their slots and patients by SQL, past the proxy: they are not part of the history."""
        plan, mine = self._plan, random.Random(seed)
        wanted = plan.doctors + 5 + int(min(plan.seconds, plan.chapter) * 3)
        # The last two are for the end of the run, and have a place for every patient.
        capacities = [mine.randint(*plan.capacity) for _ in range(wanted - 2)] + [900, 900]
        shifts = []
        with psycopg.connect(self._conninfo) as admin:
            admin.execute("set timezone = 'UTC'")
            admin.execute("set datestyle = 'ISO'")
            doctors = admin.execute(
                "insert into doctor (code, display_name, clinic_id, max_patients_per_day, specialty, specialty_key)"
                " select %s || '-' || n, 'D', %s, c, %s || n / 3, %s || n / 3"
                " from unnest(%s::int[]) with ordinality given (c, n) returning id::text, max_patients_per_day",
                (f"H-{number}", self._clinic_id, f"s-{number}-", f"s-{number}-", capacities),
            ).fetchall()  # fmt: skip
            slots: dict[Day, dict[str, int]] = defaultdict(dict)
            for doctor, date, slot, places in admin.execute(
                "insert into slot (doctor_id, clinic_id, date, start_time, end_time, capacity)"
                " select d::uuid, %s, %s::date + later, %s + later * interval '1 day' + n * interval '30 min',"
                " %s + later * interval '1 day' + (n + 1) * interval '30 min', 1 + n %% 3"
                " from unnest(%s::text[]) d, generate_series(0, 1) later, generate_series(0, %s - 1) n"
                " returning doctor_id::text, date::text, id::text, capacity",
                (self._clinic_id, self._today, self._evening, self._evening, [one[0] for one in doctors], _SLOTS),
            ):
                slots[doctor, date][slot] = places
            patients = admin.execute(
                "insert into patient (given_name, name_key, phone) select 'P', 'p' || %s || '/' || n, '+5511987654321'"
                " from generate_series(1, %s) n returning id::text", (number, max(plan.patients, plan.clients)),
            ).fetchall()  # fmt: skip
            everybody = [one[0] for one in patients]
            name = f"history-{plan.seed}-{number}"
            callers = self._callers(admin, name, mine, [one[0] for one in doctors], everybody)
        for doctor, capacity in doctors:
            days = [(doctor, str(self._today + timedelta(days=later))) for later in (0, 1)]
            shifts.append(Shift(doctor, days, {target: slots[target] for target in days}, capacity))
        busy, quiet = shifts.pop(), shifts.pop()
        at_work = [shifts.pop() for _ in range(plan.doctors)]
        chapter = Chapter(name, shifts, at_work, busy, quiet, everybody, callers, self._evening)
        # Of one machine, so both clocks go alike.
        chapter.history.clock = time.time() - time.monotonic()
        return chapter

    def _callers(
        self, admin: psycopg.Connection, name: str, mine: random.Random, doctors: list[str], patients: list[str]
    ) -> Callers:
        callers = Callers(Anybody(name))
        if not self._required:
            callers.names = {f"name:{name}"}
            return callers
        callers.programs = [add_program(admin, "service", "SERVICE") for _ in range(2)]
        callers.programs += [add_program(admin, "staff", "STAFF", [self._clinic_id]) for _ in range(2)]
        callers.stranger = add_program(admin, "stranger", "STAFF", [self._other_clinic_id])
        callers.clerks = self._clerks
        callers.doctors = add_people(admin, "DOCTOR", mine, doctors)
        callers.patients = add_people(admin, "PATIENT", mine, patients[:_PATIENTS_WITH_USERS])
        every: list[Caller] = [
            *callers.programs,
            *callers.clerks,
            *callers.doctors.values(),
            *callers.patients.values(),
        ]
        callers.names = {one.identity for one in every}
        return callers

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[None]:
        self._fronts: list[Front] = []
        self._desks: list[FrontdeskClient] = []
        self._connections: list[tuple[float, list[grpc.aio.Channel], list[FrontdeskClient]]] = []
        await self._connect_anew()
        try:
            yield
        finally:
            while self._connections:
                await self._disconnect()

    async def _connect_anew(self) -> None:
        """Open new connections. When a worker is killed, all of them move to the one that is left."""
        target = f"127.0.0.1:{self._served.port}"
        options = [
            # Each has its own connection, so that both workers get some. No retries, so that the history has every
            # attempt.
            ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0),
            ("grpc.initial_reconnect_backoff_ms", 50), ("grpc.min_reconnect_backoff_ms", 50),
            ("grpc.max_reconnect_backoff_ms", 300),
        ]  # fmt: skip
        channels = [grpc.aio.insecure_channel(target, options=options) for _ in range(self._plan.channels + 6)]
        self._fronts[:] = [Front(one, self._conninfo, self._served.port) for one in channels[: self._plan.channels]]
        # The watchers choose among these whenever they resume: some have a token that expires.
        key = self._watching.key if self._required else None
        own = channels[self._plan.channels :]
        self._desks[:] = [FrontdeskClient(one, caller="watch", api_key=key) for one in own[:4]]
        for clerk, channel in zip(self._clerks, own[4:], strict=False):
            clerk.desk = FrontdeskClient(channel, login=clerk.login)
        self._desks += [clerk.desk for clerk in self._clerks]
        self._connections.append((time.monotonic(), channels, [*self._desks]))
        # Calls may be under way on those that were replaced only now.
        while len(self._connections) > 1 and self._connections[1][0] < time.monotonic() - _OLD_CONNECTIONS:
            await self._disconnect()

    async def _disconnect(self) -> None:
        _, channels, desks = self._connections.pop(0)
        for desk in desks:
            await desk.close()
        for channel in channels:
            await channel.close()

    def _watch(self, chapter: Chapter, shift: Shift, watchers: int = 0) -> None:
        """Start `watchers` per day; by default one or two for today, and one for tomorrow with every other doctor."""
        for later, target in enumerate(shift.days):
            for _ in range(watchers or (1 - shift.capacity % 2 if later else 1 + shift.capacity % 2)):
                self._watchers += 1
                watcher = Watcher(self._watchers, target, self._desks, chapter.history, self._plan.seed)
                shift.watchers.append(watcher)

    # The course of a run

    async def _play(self) -> None:
        end = time.monotonic() + self._plan.seconds
        self._now = await self._chapter()
        nemesis = asyncio.create_task(self._nemesis(end))
        pressing = [
            asyncio.create_task(press(self._pressing, self._fronts, self._whole, lambda: self._now.at_work[0].doctor))
            for _ in range(2 if self._required else 0)
        ]
        while True:
            chapter = self._now
            for shift in chapter.at_work:
                self._watch(chapter, shift)
            clients = self._clients(chapter)
            left = end - time.monotonic()
            # No short chapter at the end.
            until = end if left < 1.5 * self._plan.chapter else time.monotonic() + self._plan.chapter
            playing = [
                asyncio.create_task(clients.play(number, f"{chapter.name}/client/{number}", until))
                for number in range(self._plan.clients)
            ]
            if until == end:
                await nemesis
                await asyncio.gather(*playing)
                for task in (*pressing, *self._tails):
                    task.cancel()
                for failure in await asyncio.gather(*pressing, *self._tails, return_exceptions=True):
                    if isinstance(failure, Exception):
                        raise failure
                await asyncio.gather(*self._closing, *chapter.ending)
                await self._quiet_end(clients)
                await self._close(clients, playing, SETTLE_SECONDS)
                return
            following = asyncio.create_task(self._chapter())
            # Some clients are still busy when the next chapter begins.
            ended, _ = await asyncio.wait({*playing, nemesis}, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                # Raise the error with which it ended, if it did.
                task.result()
            self._now = await following
            self._closing = [task for task in self._closing if not task.done() or task.exception() is not None]
            self._closing.append(asyncio.create_task(self._close(clients, playing, _PATIENCE)))

    def _clients(self, chapter: Chapter) -> Clients:
        plan = self._plan

        def relieve(shift: Shift) -> None:
            if chapter.waiting and shift in chapter.at_work:
                fresh = chapter.waiting.pop()
                chapter.at_work[chapter.at_work.index(shift)] = fresh
                self._watch(chapter, fresh)
                chapter.gone_home.append(shift)
                long_ago = [one for one in chapter.gone_home if one.watchers]
                if len(long_ago) > 20:
                    # Its last operations have been answered, and its watchers had enough time, even with faults.
                    watchers, long_ago[0].watchers = long_ago[0].watchers, []
                    chapter.ending.append(asyncio.create_task(self._go_home(clients, long_ago[0], watchers, _PATIENCE)))

        clients = Clients(
            chapter, self._fronts, moves=plan.moves, twins=plan.twins, bursts=plan.bursts, haste=plan.haste,
            holds=plan.holds, walk_ins=plan.walk_ins, undos=plan.undos, leaves=plan.leaves,
            probes=plan.probes if self._required else 0.0,
            relieve=relieve, healed=lambda: self._faults_over,
        )  # fmt: skip
        return clients

    async def _close(self, clients: Clients, playing: list[asyncio.Task[None]], seconds: float) -> None:
        """When all clients have answers, repeat some old keys, let the watchers catch up, and save the history."""
        await asyncio.gather(*playing)
        chapter = clients.chapter
        for operation in chapter.history.operations:
            request = chapter.requests.get(operation.key)
            if request is not None and operation.successes:
                await clients.attempt(operation, request, self._random.choice(self._fronts))
        homes = []
        for shift in chapter.shifts:
            watchers, shift.watchers = shift.watchers, []
            homes.append(self._go_home(clients, shift, watchers, seconds))
        await asyncio.gather(*homes)
        await asyncio.gather(*chapter.ending)
        file = self._directory / f"{chapter.name}.history"
        await asyncio.get_running_loop().run_in_executor(self._blocking, _put_away, file, chapter.history)
        shifts = [*chapter.shifts, *chapter.waiting]
        self._files.append((file, chapter.name, [*chapter.callers.names], [shift.doctor for shift in shifts]))

    async def _quiet_end(self, clients: Clients) -> None:
        """While one doctor-day is busy and every hint is lost, the watchers of another must still see its changes."""
        await self._connect_anew()
        chapter = clients.chapter
        for shift in (chapter.busy, chapter.quiet):
            self._watch(chapter, shift, 3)
        for shift in chapter.shifts:
            for watcher in shift.watchers:
                watcher.dozes = False
        self._proxy.deaf = True
        stop = asyncio.Event()

        async def book(shift: Shift, front: Front, patient: str) -> str:
            operation, request = clients.booking(-1, patient, shift.days[0])
            clients.ask(operation, chapter.callers.desk(self._random))
            chapter.history.operations.append(operation)
            await clients.attempt(operation, request, front)
            return operation.attempts[0].appointment

        async def bustle(front: Front, patient: str) -> None:
            while not stop.is_set():
                who = await book(chapter.busy, front, patient)
                if who:
                    operation, request = clients.cancelling(-1, who, chapter.busy.days[0])
                    clients.ask(operation, chapter.callers.desk(self._random))
                    chapter.history.operations.append(operation)
                    await clients.attempt(operation, request, front)
                await asyncio.sleep(0.02)

        bustling = [
            asyncio.create_task(bustle(front, patient))
            for front, patient in zip(self._fronts if self._plan.bustle else (), chapter.patients, strict=False)
        ]
        await asyncio.sleep(0.5)
        when = "while its hints were lost" + (" and another doctor-day was busy" if self._plan.bustle else "")
        for front, patient in zip(self._fronts, chapter.patients, strict=False):
            await book(chapter.quiet, front, patient)
            await self._settled(clients, chapter.quiet, chapter.quiet.watchers, 2, when)
            if chapter.history.late:
                break
        stop.set()
        await asyncio.gather(*bustling)
        self._proxy.deaf = False

    async def _settled(
        self, clients: Clients, shift: Shift, watchers: Sequence[Watcher], seconds: float, when: str
    ) -> None:
        mine = random.Random(0)
        for target in shift.days:
            waiting = [watcher for watcher in watchers if watcher.day == target]
            read = None
            for _ in range(400 if waiting else 0):
                read = read or await clients.read(-1, target, mine)
            if read is not None:
                await asyncio.gather(*(watcher.settle(read.revision, seconds, when) for watcher in waiting))

    async def _go_home(self, clients: Clients, shift: Shift, watchers: Sequence[Watcher], seconds: float) -> None:
        await self._settled(clients, shift, watchers, seconds, f"{seconds:.0f} s after the last change")
        for watcher in watchers:
            await watcher.close()

    async def _drain(self, *, last: bool) -> None:
        """Stop the service with open streams: each must get its closing message, and the exit status must be 0.

        The `last` time every stream must open. Before that the service may be recovering, and some may not.
        """
        shifts, streams = self._now.at_work, []
        async with asyncio.timeout(60):
            for number in range(12):
                stub = self._fronts[number % len(self._fronts)].queues
                request = queue_pb2.WatchQueueRequest(doctor_id=shifts[number % len(shifts)].doctor)
                metadata, _ = self._watching.credentials() if self._required else ((), 0.0)
                stream: Any = stub.WatchQueue(request, wait_for_ready=True, metadata=metadata)
                try:
                    if await stream.read() is not grpc.aio.EOF:
                        streams.append(stream)
                except grpc.aio.AioRpcError as error:
                    if last:
                        self._whole.drains.append((number, f"nothing, {error.code().name}"))
        self._served.process.send_signal(signal.SIGTERM)

        async def end(number: int, stream: Any) -> None:
            said = "nothing"
            try:
                async with asyncio.timeout(20):
                    while (message := await stream.read()) is not grpc.aio.EOF:
                        said = str(message.WhichOneof("event"))
                    code = (await stream.code()).name
            except (grpc.aio.AioRpcError, TimeoutError) as error:
                code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else "silence"
            self._whole.drains.append((number, f"{said}, {code}"))

        await asyncio.gather(*(end(number, stream) for number, stream in enumerate(streams)))
        try:
            status = await asyncio.to_thread(self._served.process.wait, 25)
            self._whole.drains.append((-1, "closing, OK" if status == 0 else f"exit status {status}"))
        except Exception as error:
            self._whole.drains.append((-1, repr(error)))

    # The nemesis

    async def _nemesis(self, end: float) -> None:
        mine = random.Random(f"{self._plan.seed}/nemesis")
        plan = self._plan
        # Each kind comes before any kind comes twice.
        left: list[str] = []
        faults = [kind for kind in plan.faults if self._required or kind not in ACCESS_FAULTS]
        while faults:
            pause = mine.uniform(*plan.pause)
            if time.monotonic() + pause > end - 1:
                break
            await asyncio.sleep(pause)
            if not left:
                left = mine.sample(faults, len(faults))
                await self._connect_anew()
            kind = left.pop()
            self._faults[kind] += 1
            began = time.time()
            await self._break(kind, mine)
            if kind not in ACCESS_FAULTS:
                self._whole.faults.append((began, time.time()))
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        self._proxy.heal()
        with suppress(psycopg.Error):
            await self._sql("alter database {} reset all")
        self._faults_over = True

    async def _break(self, kind: str, mine: random.Random) -> None:
        proxy = self._proxy
        if kind in ("worker-kill", "worker-frozen"):
            await self._signal_worker(kind, mine)
        elif kind == "service-restart":
            await self._drain(last=False)
            await asyncio.to_thread(self._served.start_again)
        elif kind == "postmaster-kill":
            await asyncio.get_running_loop().run_in_executor(self._blocking, self._cluster.kill)
        elif kind == "terminate-all":
            await self._sql(f"{_TERMINATE} where application_name ~ 'frontdesk'")
        elif kind == "terminate-listen":
            await self._sql(f"{_TERMINATE} where application_name = 'frontdesk listen'")
        elif kind == "statements-cancelled":
            for _ in range(5):
                await self._sql(
                    "select pg_cancel_backend(pid) from pg_stat_activity where application_name ~ 'frontdesk'"
                )
                await asyncio.sleep(0.02)
        elif kind in ("lock-held", "row-held"):
            await self._hold(kind, mine)
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
            # Requests are executed, but their answers are lost.
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
        elif kind in ACCESS_FAULTS:
            await self._end_access(kind, mine)

    async def _end_access(self, kind: str, mine: random.Random) -> None:
        """Take somebody's credentials or rights away; another takes over. The former goes on trying."""
        callers = self._now.callers
        following: Caller

        def anew(role: str, whose: str, *users: str) -> Person:
            return add_people(admin, role, mine, [whose], users)[whose]

        with psycopg.connect(self._conninfo) as admin:
            if kind == "key-revoked":
                program = mine.choice(callers.programs)
                role, clinics = ("STAFF", [self._clinic_id]) if program.grant.kind == "staff" else ("SERVICE", [])
                following = add_program(admin, program.grant.kind, role, clinics)
                revoke = access_pb2.RevokeApiKeyRequest(api_key_id=program.id)
                one: Caller = program
                watched = mine.choice(self._now.at_work).doctor
            elif kind == "user-demoted":
                doctor = mine.choice(self._now.at_work).doctor
                person = callers.doctors[doctor]
                following = anew("DOCTOR", doctor)
                one, watched = person, doctor
            else:
                patient, person = mine.choice([*callers.patients.items()])
                following = anew("PATIENT", patient, person.said["sub"])
                one, watched = person, mine.choice(self._now.at_work).doctor
        resource = f"users/{one.identity.partition('/')[2]}"
        callers.lost(one, following)
        view = queue_pb2.QUEUE_VIEW_BOARD if one.grant.kind == "patient" else queue_pb2.QUEUE_VIEW_STAFF
        watch = queue_pb2.WatchQueueRequest(doctor_id=watched, view=view)
        watch.heartbeat_interval.seconds = 5
        begun = asyncio.Event()
        self._tails.append(asyncio.create_task(self._tail(one, watch, begun)))
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                await begun.wait()
        if kind == "key-revoked":
            act = Act(_ADMINISTRATOR, "RevokeApiKey", "api_key.revoked", f"apiKeys/{program.id}")
            await self._administer(access, revoke, act, one.grant)
        elif kind == "user-demoted":
            act = Act(_ADMINISTRATOR, "SetUserRoles", "user.roles_set", resource)
            demote = access_pb2.SetUserRolesRequest(user_id=person.said["sub"], roles=[policy_pb2.ROLE_PATIENT])
            await self._administer(access, demote, act, one.grant)
        else:
            act = Act(person.identity, "Logout", "user.logged_out", resource)
            await self._administer(auth, auth_pb2.LogoutRequest(refresh_token=person.refresh_token), act, one.grant)

    async def _tail(self, caller: Caller, request: queue_pb2.WatchQueueRequest, begun: asyncio.Event) -> None:
        told = Stream(caller.grant)
        self._whole.streams.append(told)
        call: Any = self._random.choice(self._fronts).queues.WatchQueue(request, metadata=caller.lasting())
        with suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                told.last = time.monotonic()
                begun.set()
        begun.set()

    async def _administer(self, service: Callable[[Front], Any], request: Any, act: Act, grant: Grant) -> None:
        """Make a change of credentials, whatever faults there are."""
        request.idempotency_key = f"{act.resource}/{len(self._whole.acts)}"
        self._whole.acts.append(act)
        grant.ending = time.monotonic()
        while time.monotonic() < grant.ending + _ADMINISTRATION_SECONDS:
            front = self._random.choice(self._fronts)
            try:
                await getattr(service(front), act.method)(request, metadata=ADMIN, timeout=4)
            except grpc.aio.AioRpcError as error:
                if error.code().name not in _UNANSWERED:
                    act.outcome = reason_of(error)
                    return
                await asyncio.sleep(0.1)
            else:
                act.outcome, grant.ended = OK, time.monotonic()
                return

    async def _signal_worker(self, kind: str, mine: random.Random) -> None:
        workers = self._served.workers()
        if not workers:
            return
        worker = mine.choice(workers)
        with suppress(ProcessLookupError):
            if kind == "worker-kill":
                os.kill(worker, signal.SIGKILL)
                return
            os.kill(worker, signal.SIGSTOP)
            try:
                await asyncio.sleep(mine.uniform(0.2, 2))
            finally:
                os.kill(worker, signal.SIGCONT)

    async def _hold(self, kind: str, mine: random.Random) -> None:
        """Hold the lock or the row of a busy doctor-day in an idle transaction, as an operator's psql might."""
        shift = mine.choice(self._now.at_work)
        doctor, date = shift.days[0]
        query = {
            "lock-held": "select lock_all(array[doctor_day_name(%s, %s::date)])",
            "row-held": "update doctor_day set note = note where doctor_id = %s and date = %s::date",
        }[kind]
        with suppress(psycopg.OperationalError):
            async with await psycopg.AsyncConnection.connect(self._conninfo) as admin:
                await admin.execute(query.encode(), (doctor, date))
                await asyncio.sleep(mine.uniform(0.2, 2))

    async def _sql(self, query: str) -> None:
        """Run a statement, past the proxy."""
        name = psycopg.conninfo.conninfo_to_dict(self._conninfo)["dbname"]
        async with await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True) as admin:
            await admin.execute(query.format(name).encode())

    def _internal(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in self._served.log.read_text().splitlines():
            if '"internal_error"' in line:
                said = json.loads(line)
                found[f"{said['error']} {said['sqlstate']} {said['constraint']}"] += 1
        return found


# The verdict, in separate processes


def _put_away(file: Path, history: History) -> None:
    with file.open("wb") as to:
        pickle.dump(history, to, pickle.HIGHEST_PROTOCOL)


def _judge_whole(conninfo: str, history: History, deadlocks: int) -> tuple[int, list[Violation]]:
    """Check what is of the run as a whole; with the number of sealed rows."""
    with psycopg.connect(conninfo) as admin:
        # What the job in the background has not generated yet.
        while True:
            (more,) = admin.execute("select generate_ahead(%s)", (HORIZON_DAYS,)).fetchone() or (False,)
            admin.commit()
            if not more:
                break
        # Transactions that have ended only now, such as a killed worker's last, were left to the next worker.
        sealed = waiting = 1
        while sealed or waiting:
            row = admin.execute("select sealed, waiting::integer from seal_log()").fetchone()
            admin.commit()
            sealed, waiting = row or (0, 0)
        methods = sorted({act.method for act in history.acts})
        acts = admin.execute(
            "select actor, method, type, resource, count(*) from log where type is not null and method = any(%s)"
            " group by 1, 2, 3, 4", (methods,),
        ).fetchall()  # fmt: skip
        (unsealed,) = admin.execute(
            "select count(*) from log l where not exists (select from seal s where s.id = l.id)"
        ).fetchone() or (0,)
        (count,) = admin.execute("select count(*) from seal").fetchone() or (0,)
        with admin.cursor("seals") as cursor:
            cursor.itersize = 10_000
            cursor.execute(
                "select s.position, s.id::text, s.chain, case when l.id is not null then log_digest(l) end,"
                " l.doctor_id::text, l.date::text, coalesce(l.revision, 0)"
                " from seal s left join log l on l.id = s.id order by s.position"
            )
            seals = (
                Sealed(position, who, chain, digest, (doctor, date) if revision else None, revision)
                for position, who, chain, digest, doctor, date, revision in cursor
            )
            facts = Facts(
                deadlocks=deadlocks, acts=Counter({tuple(row[:4]): row[4] for row in acts}), seals=seals,
                unsealed=unsealed,
            )  # fmt: skip
            return count, Checker(history, facts).check()


def _judge(conninfo: str, file: Path, name: str, identities: list[str], doctors: list[str]) -> Verdict:
    """Check the history of a chapter against the database."""
    with file.open("rb") as source:
        history: History = pickle.load(source)
    facts = _facts(conninfo, name, identities, doctors)
    verdict = Verdict(Checker(history, facts).check())
    for violation in _firsts(verdict.violations):
        violation.shortest = shortest(history, facts, violation)
    for operation in history.operations:
        _count(verdict.methods[operation.method], [one.outcome for one in operation.attempts])
        verdict.methods[operation.method]["replayed"] += sum(one.replayed for one in operation.attempts)
        verdict.outcomes.update(" ".join(one.outcome.split()[:2]) for one in operation.attempts)
    verdict.outcomes.update(one.outcome for one in history.probes if one.outcome in ACCESS_REFUSALS)
    verdict.tally = history.tally
    verdict.reads, verdict.updates, verdict.probes = len(history.reads), len(history.seen), len(history.probes)
    verdict.changes = sum(len(seen.changes) for seen in history.seen)
    verdict.lags = _lags(history)
    return verdict


def _count(counts: Counter[str], outcomes: Sequence[str]) -> None:
    counts["asked"] += 1
    counts["calls"] += len(outcomes)
    if OK in outcomes:
        counts["made"] += 1
    elif outcomes and not outcomes[-1].startswith((UNANSWERED, BROKEN)):
        counts["refused"] += 1
    else:
        counts["unanswered"] += 1


def _firsts(violations: Sequence[Violation]) -> Iterator[Violation]:
    """The first violation of each rule, or the first of it with a shortest history."""
    for rule in dict.fromkeys(violation.rule for violation in violations):
        alike = [violation for violation in violations if violation.rule == rule]
        yield next((one for one in alike if one.shortest), alike[0])


def _facts(conninfo: str, name: str, identities: list[str], doctors: list[str]) -> Facts:
    facts = Facts()
    with psycopg.connect(conninfo) as admin:
        admin.execute("set datestyle = 'ISO'")
        admin.execute("set timezone = 'UTC'")
        of = (doctors,)
        for doctor, places in admin.execute(
            "select id::text, max_patients_per_day from doctor where id = any(%s::uuid[])", of
        ):
            facts.capacities[doctor] = places
        (facts.max_calls,) = admin.execute(
            "select max_calls from clinic c join doctor d on d.clinic_id = c.id where d.id = any(%s::uuid[]) limit 1",
            of,
        ).fetchone() or (0,)
        for slot, doctor, places, start, end in admin.execute(
            "select id::text, doctor_id::text, capacity, extract(epoch from start_time)::float8,"
            " extract(epoch from end_time)::float8 from slot where doctor_id = any(%s::uuid[])", of,
        ):  # fmt: skip
            facts.slots[slot], facts.times[slot], facts.owners[slot] = places, (start, end), doctor
        _add_calendar(facts, admin, doctors)
        for doctor, date, revision in admin.execute(
            "select doctor_id::text, date::text, revision from doctor_day where doctor_id = any(%s::uuid[])", of
        ):
            facts.revisions[doctor, date] = revision
        for doctor, date, *rest in admin.execute(
            "select doctor_id::text, date::text, revision, change_kind(type), coalesce(appointment_id::text, ''),"
            " coalesce(queue_state, ''), coalesce(ticket, 0), actor, method, extract(epoch from time)::float8,"
            " coalesce(data ->> 'hold_id', ''), transaction::text, coalesce((data ->> 'number')::integer, 0),"
            " coalesce(slot_id::text, ''), coalesce((data ->> 'over_capacity')::boolean, false), coalesce(room, ''),"
            " coalesce(priority, 'NORMAL'), coalesce(extract(epoch from check_in_time)::float8, 0),"
            " coalesce(call_count, 0) from log"
            " where revision > 0 and doctor_id = any(%s::uuid[])", of,
        ):  # fmt: skip
            facts.events.append(Event((doctor, date), *rest))
        for hold, doctor, date, *of_hold in admin.execute(
            "select h.id::text, h.doctor_id::text, h.date::text, coalesce(h.slot_id::text, ''),"
            " coalesce(h.patient_id::text, ''), extract(epoch from h.create_time)::float8,"
            " extract(epoch from h.expire_time)::float8, coalesce(extract(epoch from l.time)::float8, 'infinity')"
            " from hold h left join log l on l.resource = 'holds/' || h.id and l.revision = 0"
            " and l.type = 'hold.released' where h.doctor_id = any(%s::uuid[])", of,
        ):  # fmt: skip
            facts.holds[hold] = Hold(hold, (doctor, date), *of_hold)
        for who, patient, doctor, date, number, slot, state, line, ticket, *rest in admin.execute(
            "select id::text, patient_id::text, doctor_id::text, date::text, number, coalesce(slot_id::text, ''),"
            " state, coalesce(queue_state, ''), coalesce(ticket, 0), room, priority, override_reason <> ''"
            " from appointment"
            " where doctor_id = any(%s::uuid[])", of,
        ):  # fmt: skip
            at = str({"CHECKED_IN": line, "COMPLETED": "DONE"}.get(state, state))
            facts.visits[who] = Visit(who, patient, (doctor, date), number, slot, at, ticket, *rest)
        for method, key, who, snapshot, revision, vacated in admin.execute(
            "select method, key, result_id::text, snapshot, revision, coalesce(vacated_revision, 0)"
            " from idempotency where caller = any(%s) and key like %s", (identities, f"{name}-%"),
        ):  # fmt: skip
            target = (snapshot["doctor_id"], snapshot["date"])
            facts.memories.append(
                Memory(method, key, who, target, snapshot["number"], snapshot["slot_id"] or "", revision, vacated)
            )
    return facts


def _add_calendar(facts: Facts, admin: psycopg.Connection, doctors: list[str]) -> None:
    """Leaves, what became of the appointments, schedules, and the visits that follow from the latter."""
    of = (doctors,)
    for leave, doctor, whole, first, last, *rest in admin.execute(
        "select l.id::text, l.doctor_id::text, whole_days, from_date, to_date, extract(epoch from start_time)::float8,"
        " extract(epoch from end_time)::float8, state, coalesce((select extract(epoch from g.time)::float8 from log g"
        " where g.resource = 'leaves/' || l.id and g.type = 'leave.applied' limit 1), 'infinity')"
        " from leave l where l.doctor_id = any(%s::uuid[])", of,
    ):  # fmt: skip
        days = tuple(str(first + timedelta(days=n)) for n in range((last - first).days + 1)) if whole else ()
        facts.leaves[leave] = Leave(leave, doctor, days, *rest)
    for leave, who, outcome, doctor, date in admin.execute(
        "select o.leave_id::text, o.appointment_id::text, o.outcome, o.doctor_id::text, o.date::text"
        " from leave_outcome o join leave l on l.id = o.leave_id where l.doctor_id = any(%s::uuid[])", of,
    ):  # fmt: skip
        facts.outcomes.append(Outcome(leave, who, outcome, (doctor, date) if doctor else None))
    facts.schedules = admin.execute(
        "select doctor_id::text, effective_from::text, coalesce(effective_until, '9999-12-31')::text from schedule"
        " where doctor_id = any(%s::uuid[])", of,
    ).fetchall()  # fmt: skip
    facts.visits_due = admin.execute(
        "select s.doctor_id::text, extract(epoch from starts)::float8,"
        " extract(epoch from starts + make_interval(mins => r.visit_length))::float8"
        " from schedule s join doctor d on d.id = s.doctor_id join clinic c on c.id = d.clinic_id,"
        " lateral (select (now() at time zone c.time_zone)::date + n as on_date from generate_series(0, %s - 1) n) w,"
        " jsonb_to_recordset(s.rules) as r (weekday integer, start integer, \"end\" integer, visit_length integer),"
        " generate_series(r.start, r.end - r.visit_length, r.visit_length) m,"
        " lateral (select (on_date + make_interval(mins => m)) at time zone c.time_zone as starts) v"
        " where s.doctor_id = any(%s::uuid[]) and r.weekday = extract(isodow from on_date)"
        " and on_date between s.effective_from and coalesce(s.effective_until, 'infinity') and starts > now()"
        " and not exists (select from schedule_exception e where e.doctor_id = s.doctor_id and e.date = on_date)"
        " and not exists (select from leave l where l.doctor_id = s.doctor_id and l.state <> 'CANCELLED'"
        " and l.whole_days and on_date between l.from_date and l.to_date)", (HORIZON_DAYS, doctors),
    ).fetchall()  # fmt: skip


def _lags(history: History) -> list[float]:
    """A sample of at most 2,000."""
    made: dict[Day, dict[int, float]] = defaultdict(dict)
    for operation in history.operations:
        for one in operation.successes[:1]:
            made[operation.day][one.revision] = one.complete
    lags = []
    for seen in history.seen:
        for change in seen.changes:
            answered = made[seen.day].get(change[0])
            if answered is not None:
                lags.append(max(0.0, seen.at - answered))
    return random.Random(0).sample(lags, min(2000, len(lags)))


def play(plan: Plan, cluster: Cluster | None = None) -> Report:
    """Run the plan, on its own PostgreSQL unless one is given, and return the report."""
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
