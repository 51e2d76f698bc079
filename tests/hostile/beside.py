"""`python -m tests.hostile.beside [--seconds N]`: measure the effect of a hostile client on other clients.

A legitimate load at a fixed rate runs against a real service with two workers: alone, and then beside one attack after
another. The time of a call counts from the moment at which it was due. Attackers, service and load share one machine,
so the table shows the CPU of each attack, and the row `control` shows the cost of sharing alone. On a machine that also
does other work, only the column `ms each` is reliable: the workers' CPU per hostile request. The exit status is 1 if a
legitimate call failed, or if a p99 is more than twice that of the quiet phases before and after.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import appointment_pb2, queue_pb2
from frontdesk.db.migrate import migrate
from frontdesk.process.postgres import EmbeddedPostgres
from tests.clinic import Front
from tests.history.world import Served
from tests.hostile.attacks import ATTACKS, NICE, Target, knowing
from tests.hostile.wire import OWN_CONNECTION

RATE = 80.0
"""Legitimate calls per second."""
WATCHERS = 24
DOCTORS = 4
SETTLE_SECONDS = 0.5
MOST_RATIO = 2.0


@dataclass
class Phase:
    """One phase of the legitimate load: the times and failures of its calls, and the CPU of the workers."""

    seconds: float = 0
    cpu: float = 0
    """CPU of the workers, in seconds."""
    ms: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def percentile(self, percent: int) -> float:
        return statistics.quantiles(self.ms, n=100, method="inclusive")[percent - 1]

    def __add__(self, other: "Phase") -> "Phase":
        return Phase(
            self.seconds + other.seconds, self.cpu + other.cpu, self.ms + other.ms, self.failures + other.failures
        )


class Load:
    """Patients who book, check in, are called and leave, and callers who read queues and lists."""

    def __init__(self, served: Served, desks: Sequence[Front], patients: Sequence[str]) -> None:
        self._served = served
        self._desks = itertools.cycle(desks)
        self._patients = itertools.cycle(patients)
        self._booked: list[str] = []
        self._turn = itertools.count()
        self.updates = 0

    async def phase(self, doctors: Sequence[str], seconds: float) -> Phase:
        """Run the load with these doctors for `seconds`."""
        phase = Phase()
        self._booked.clear()
        began, used = time.monotonic(), self._cpu()
        async with asyncio.TaskGroup() as group:
            watches = [group.create_task(self._watch(doctors[n % len(doctors)], phase)) for n in range(WATCHERS)]
            async with asyncio.TaskGroup() as calls:
                for n in range(int(seconds * RATE)):
                    due = began + n / RATE
                    if (early := due - time.monotonic()) > 0:
                        await asyncio.sleep(early)
                    calls.create_task(self._call(doctors, due, phase))
            phase.seconds, phase.cpu = time.monotonic() - began, self._cpu() - used
            for watch in watches:
                watch.cancel()
        return phase

    def _cpu(self) -> float:
        """Seconds of CPU that the workers have used so far."""
        ticks = 0
        for pid in self._served.workers():
            stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(stat[11]) + int(stat[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    async def _call(self, doctors: Sequence[str], due: float, phase: Phase) -> None:
        try:
            await self._ask(doctors)
        except grpc.aio.AioRpcError as error:
            phase.failures[f"{error.code().name} {error.details()}"[:80]] += 1
        phase.ms.append((time.monotonic() - due) * 1000)

    async def _ask(self, doctors: Sequence[str]) -> None:
        n, front = next(self._turn), next(self._desks)
        doctor = doctors[n // 4 % len(doctors)]
        match n % 4:
            case 0:
                self._booked.append((await front.book(next(self._patients), doctor)).appointment.id)
            case 1 if self._booked:
                await front.check_in(self._booked.pop(0))
            case 2:
                await front.queue(doctor)
            case _:
                request = appointment_pb2.ListAppointmentsRequest(doctor_id=doctor)
                await front.appointments.ListAppointments(request)

    async def _watch(self, doctor: str, phase: Phase) -> None:
        stream: Any = next(self._desks).queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor))
        try:
            while await stream.read() is not grpc.aio.EOF:
                self.updates += 1
            phase.failures["a watch ended"] += 1
        except grpc.aio.AioRpcError as error:
            phase.failures[f"watch {error.code().name}"] += 1
        finally:
            stream.cancel()


class Measure:
    """One run: the service, the load, and the attacks."""

    def __init__(self, served: Served, names: Sequence[str], seconds: float) -> None:
        self._served = served
        self._names = names
        share = max((seconds - 15) / len(names), 3.0)
        self._quiet, self._beside = share * 0.3, share * 0.6
        self._watched: list[list[str]] = []
        self.over: list[str] = []
        self.doubts: list[str] = []
        self.failures: Counter[str] = Counter()

    async def run(self) -> None:
        """Run everything, and print the table."""
        async with AsyncExitStack() as stack:
            desks = [Front(await stack.enter_async_context(self._channel()), "", self._served.port) for _ in range(4)]
            patients = [patient.id for patient in await desks[0].people(400)]
            clinic = (await desks[0].clinic()).id
            own = await desks[0].doctor(clinic_id=clinic, max_patients_per_day=1000)
            shifts = iter([await self._shift(desks[0], clinic) for _ in range(2 * len(self._names) + 2)])
            load = Load(self._served, desks, patients)
            await load.phase(next(shifts), 2)  # to warm up
            target = Target(self._served.port, own.id, patients[:50], clinic, [], self._beside)
            print(
                f"{RATE:.0f} legitimate calls/s and {WATCHERS} watchers; attackers at nice {NICE}; {os.cpu_count()}"
                f" cores; {self._quiet:.1f} s quiet, {self._beside:.1f} s beside each attack; times in ms\n\n"
                f"{'attack':16} {'requests':>8} {'its CPU':>8} {'workers':>8} | {'quiet p50':>9} {'p99':>7} | "
                f"{'beside p50':>10} {'p99':>7} | {'ratio':>6} | {'ms each':>8}  outcomes"
            )
            quiets = [await load.phase(next(shifts), self._quiet)]
            for name in self._names:
                shift = next(shifts)
                found, phase = await self._attacked(name, load, shift, replace(target, watched=shift))
                await asyncio.sleep(SETTLE_SECONDS)
                quiets.append(await load.phase(next(shifts), self._quiet))
                self._row(name, found, quiets[-2] + quiets[-1], phase)
            spread = sorted(quiet.percentile(99) for quiet in quiets)
            print(
                f"\nquiet p99 over {len(quiets)} phases: {spread[0]:.1f} to {spread[-1]:.1f} ms, "
                f"median {statistics.median(spread):.1f}; {load.updates} updates reached the watchers"
            )
            for quiet in quiets:
                self.failures += quiet.failures
            health = health_pb2_grpc.HealthStub(desks[0].channel)
            status = (await health.Check(health_pb2.HealthCheckRequest(), timeout=5)).status
            if status != health_pb2.HealthCheckResponse.SERVING:
                self.failures["not serving at the end"] += 1

    def _channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"127.0.0.1:{self._served.port}", options=[OWN_CONNECTION])

    async def _shift(self, front: Front, clinic: str) -> list[str]:
        """Doctors without bookings, so that every phase does the same work."""
        return [(await front.doctor(clinic_id=clinic, max_patients_per_day=1000)).id for _ in range(DOCTORS)]

    async def _attacked(
        self, name: str, load: Load, shift: Sequence[str], target: Target
    ) -> tuple[dict[str, Any], Phase]:
        attacker = await asyncio.to_thread(
            subprocess.Popen, [sys.executable, "-m", "tests.hostile.attacks", name],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert attacker.stdin is not None
        assert attacker.stdout is not None
        try:
            attacker.stdin.write(knowing(target))
            attacker.stdin.flush()
            assert await asyncio.to_thread(attacker.stdout.readline) == "ready\n", name
            attacker.stdin.write("go\n")
            attacker.stdin.flush()
            phase = await load.phase(shift, self._beside)
            found = json.loads(await asyncio.to_thread(attacker.stdout.read))
        finally:
            attacker.kill()
            attacker.communicate()
        return found, phase

    def _row(self, name: str, found: dict[str, Any], quiet: Phase, beside: Phase) -> None:
        ratio = beside.percentile(99) / quiet.percentile(99)
        self.failures += beside.failures
        if ratio > MOST_RATIO:
            (self.over if name != "control" else self.doubts).append(name)
        requests = sum(found["outcomes"].values())
        more = beside.cpu - quiet.cpu / quiet.seconds * beside.seconds
        outcomes = ", ".join(f"{what} {count}" for what, count in Counter(found["outcomes"]).most_common(3))
        if beside.failures:
            outcomes += f" | FAILED: {dict(beside.failures)}"
        print(
            f"{name:16} {requests:8} {found['cpu'] / beside.seconds:8.0%} {beside.cpu / beside.seconds:8.0%} |"
            f" {quiet.percentile(50):9.1f} {quiet.percentile(99):7.1f} | {beside.percentile(50):10.1f}"
            f" {beside.percentile(99):7.1f} | {ratio:6.2f} | {more / max(requests, 1) * 1000:8.2f}  {outcomes}",
            flush=True,
        )


def main() -> int:
    """Measure. The exit status is 1 if a legitimate client suffered."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.beside", description=__doc__)
    parser.add_argument("--seconds", type=float, default=220.0, help="approximate length of the whole run")
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="separated by commas")
    given = parser.parse_args()
    names = given.attacks.split(",")
    with tempfile.TemporaryDirectory(prefix="fd") as directory, EmbeddedPostgres(Path(directory)) as postgres:
        migrate(postgres.conninfo)
        served = Served(postgres.conninfo, Path(directory))
        try:
            measure = Measure(served, names, given.seconds)
            asyncio.run(measure.run())
        finally:
            served.end()
        faults = served.log.read_text().count("internal_error")
    print(f"legitimate calls that failed: {dict(measure.failures) or 'none'}; faults of the server: {faults or 'none'}")
    print(f"p99 over {MOST_RATIO:.0f} times the quiet: {', '.join(measure.over) or 'none'}")
    if measure.doubts:
        print("The control, which sends no requests, exceeds it too: this machine is too busy for a verdict.")
    return int(bool(measure.failures or faults or measure.over))


if __name__ == "__main__":
    sys.exit(main())
