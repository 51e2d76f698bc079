"""Measure bookings: CPU and time per call of the floor, of pgbench, and of each call of the real service."""

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import psycopg
from google.protobuf.message import Message
from google.type.date_pb2 import Date

from benchmarks import floor, people
from benchmarks.calls import Kind, percentiles, spend
from benchmarks.load import unary_client
from benchmarks.people import DOCTOR, HOLD, PATIENT, SLOT, TO_CHECK_IN, TO_MOVE, make_id
from benchmarks.stage import Child, ServerProcess, Stage, program
from clinic.frontdesk.v1 import appointment_pb2, queue_pb2

IN_FLIGHT = (16, 64)
PACED = 3
"""A round at half of the highest rate makes this many times the calls of a round at full speed: with fewer calls, a
single stall would decide the p99.
"""
CONNECTIONS = 8
"""Connections of the floor's server and of pgbench: as many as a worker's pool has."""

BOOKING, SLOTS, FLOOR = "BookAppointment by doctor-day", "BookAppointment by slot", "the floor"
RESCHEDULE = "RescheduleAppointment"
HELD, HOLDING = "BookAppointment with a hold", "HoldPlace"
QUEUE, ESTIMATED = "GetQueue (10 waiting)", "GetQueue (10 waiting, with estimates)"


@dataclass
class Cost:
    """The cost of one kind of call at one number of calls in flight."""

    name: str
    in_flight: int
    calls: int
    server_us: float
    """CPU of the server process, per call."""
    postgres_us: float
    """CPU of all processes of PostgreSQL, per call."""
    calls_per_second: float
    p50_ms: float
    p99_ms: float
    client_cores: float
    """CPU of the load client, in cores. Near 1 the client is the bottleneck."""
    refused: dict[str, int]

    @property
    def cpu_us(self) -> float:
        """CPU of server and PostgreSQL together, per call."""
        return self.server_us + self.postgres_us


def measure(stage: Stage, *, calls: int, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run everything of this part. The kinds of call take turns, so that a noisy moment affects all of them."""
    zone = people.noon_zone()
    day = people.today(zone)
    warmup = max(200, calls // 10)
    total = len(IN_FLIGHT) * (rounds * calls + warmup) + PACED * rounds * calls
    doctors = max(10, total // 10)
    progress("prepare two databases")
    bare = _prepared(stage, "floor", zone, day, total, doctors)
    real = _prepared(stage, "real", zone, day, total, doctors)
    with (
        ServerProcess(floor.serve, bare, CONNECTIONS) as floor_server,
        stage.serve(real, log_level="info", pool_size=CONNECTIONS) as server,
        Child(unary_client) as client,
    ):
        kinds = list(_kinds(floor_server, server, day, doctors))
        costs = []
        for in_flight in IN_FLIGHT:
            runs: dict[str, list[Cost]] = {kind.name: [] for kind in kinds}
            for kind in kinds:
                _run(stage, client, kind, warmup, in_flight)
            for turn in range(rounds):
                for kind in kinds:
                    progress(f"{kind.name}, {in_flight} in flight, {turn + 1} of {rounds}")
                    runs[kind.name].append(_run(stage, client, kind, calls, in_flight))
            costs += [_middle(found) for found in runs.values()]
        rate = max(cost.calls_per_second for cost in costs if cost.name == BOOKING) / 2
        paced = [kind for kind in kinds if kind.name in (FLOOR, BOOKING)]
        waits: dict[str, list[list[float]]] = {kind.name: [] for kind in paced}
        refused = Counter[str]()
        for turn in range(rounds):
            for kind in paced:
                progress(f"{kind.name} at half of the highest rate, {turn + 1} of {rounds}")
                spent = spend(stage, [client], kind, PACED * calls, 0, rate=rate)
                waits[kind.name].append([1e3 * ms for ms in percentiles(spent.latencies, 50, 99)])
                refused += spent.refused
    progress("pgbench")
    pgbench = {
        name: _pgbench(stage, conninfo, script, doctors, total, day, calls * rounds)
        for name, conninfo, script in (("the bare function", bare, _BARE), ("decide, one booking", real, _REAL))
    }
    return {
        "half_rate": {"calls_per_second": rate, "p50_and_p99_ms": waits, "refused": refused},
        "costs": [asdict(cost) | {"cpu_us": cost.cpu_us} for cost in costs],
        "pgbench": pgbench,
        "ratios": _ratios(costs),
    }


def _prepared(stage: Stage, name: str, zone: str, day: date, total: int, doctors: int) -> str:
    conninfo = stage.database(name)
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, doctors, total)
        people.history(connection, 2 * total, doctors, total, day)
        people.booked(connection, TO_CHECK_IN, total, doctors, day)
        people.booked(connection, TO_MOVE, total, doctors, day + timedelta(days=10))
        # A queue to read. Its ids are of their own kind, and nothing changes it.
        people.booked(connection, 100, doctors * 10, doctors, day + timedelta(days=40), checked_in=True)
        # And one with an eleventh patient, in consultation, so that it has estimates.
        people.booked(connection, 200, doctors * 11, doctors, day + timedelta(days=41), checked_in=True)
        connection.execute(
            "update appointment set state = 'IN_CONSULTATION', queue_state = 'IN_CONSULTATION',"
            " start_visit_time = now() where date = %s and number = 1",
            (day + timedelta(days=41),),
        )
        people.holds(connection, total, doctors, day + timedelta(days=35))
        people.slots(connection, total, doctors, day + timedelta(days=20), zone)
        connection.execute(floor.BARE_FUNCTION)
    people.settle(conninfo)
    return conninfo


def _wire(day: date) -> Date:
    return Date(year=day.year, month=day.month, day=day.day)


def _kinds(floor_server: ServerProcess, server: ServerProcess, day: date, doctors: int) -> Iterator[Kind]:
    appointments, queues = "/clinic.frontdesk.v1.AppointmentService/", "/clinic.frontdesk.v1.QueueService/"

    def doctor_day(n: int, later: int) -> appointment_pb2.DoctorDay:
        return appointment_pb2.DoctorDay(
            doctor_id=make_id(DOCTOR, n % doctors), date=_wire(day + timedelta(days=later))
        )

    def book(n: int) -> Message:
        return appointment_pb2.BookAppointmentRequest(
            patient_id=make_id(PATIENT, n), doctor_day=doctor_day(n, 5), idempotency_key=f"book-{n}"
        )

    def book_slot(n: int) -> Message:
        return appointment_pb2.BookAppointmentRequest(
            patient_id=make_id(PATIENT, n), slot_id=make_id(SLOT, n), idempotency_key=f"slot-{n}"
        )

    def book_held(n: int) -> Message:
        return appointment_pb2.BookAppointmentRequest(
            patient_id=make_id(PATIENT, n),
            doctor_day=doctor_day(n, 35),
            hold_id=make_id(HOLD, n),
            idempotency_key=f"held-{n}",
        )

    def hold(n: int) -> Message:
        return appointment_pb2.HoldPlaceRequest(
            patient_id=make_id(PATIENT, n), doctor_day=doctor_day(n, 36), idempotency_key=f"hold-{n}"
        )

    def move(n: int) -> Message:
        return appointment_pb2.RescheduleAppointmentRequest(
            appointment_id=make_id(TO_MOVE, n), doctor_day=doctor_day(n, 30), idempotency_key=f"move-{n}"
        )

    def check_in(n: int) -> Message:
        return queue_pb2.CheckInRequest(appointment_id=make_id(TO_CHECK_IN, n), idempotency_key=f"check-in-{n}")

    def get_queue(n: int, later: int = 40) -> Message:
        line = doctor_day(n, later)
        return queue_pb2.GetQueueRequest(doctor_id=line.doctor_id, date=line.date)

    def list_day(n: int) -> Message:
        line = doctor_day(n, 40)
        return appointment_pb2.ListAppointmentsRequest(doctor_id=line.doctor_id, from_date=line.date, to_date=line.date)

    def kind(name: str, method: str, request: Callable[[int], Message]) -> Kind:
        return Kind(name, server, server.port, method, request)

    yield Kind(FLOOR, floor_server, floor_server.port, appointments + "BookAppointment", book)
    yield kind(BOOKING, appointments + "BookAppointment", book)
    yield kind(SLOTS, appointments + "BookAppointment", book_slot)
    yield kind(HELD, appointments + "BookAppointment", book_held)
    yield kind(HOLDING, appointments + "HoldPlace", hold)
    yield kind(RESCHEDULE, appointments + "RescheduleAppointment", move)
    yield kind("CheckIn", queues + "CheckIn", check_in)
    yield kind(QUEUE, queues + "GetQueue", get_queue)
    yield kind(ESTIMATED, queues + "GetQueue", lambda n: get_queue(n, 41))
    yield kind("ListAppointments (a doctor-day of 10)", appointments + "ListAppointments", list_day)


def _run(stage: Stage, client: Child, kind: Kind, calls: int, in_flight: int) -> Cost:
    spent = spend(stage, [client], kind, calls, in_flight)
    p50, p99 = percentiles(spent.latencies, 50, 99)
    return Cost(
        kind.name, in_flight, calls, spent.server / calls * 1e6, spent.postgres / calls * 1e6, calls / spent.seconds,
        p50 * 1e3, p99 * 1e3, spent.clients / spent.seconds, spent.refused,
    )  # fmt: skip


def _middle(runs: Sequence[Cost]) -> Cost:
    """The run with the median CPU per call, but with the calls and refusals of all runs."""
    middle = sorted(runs, key=lambda cost: cost.cpu_us)[len(runs) // 2]
    middle.refused = sum((Counter(run.refused) for run in runs), Counter())
    middle.calls = sum(run.calls for run in runs)
    return middle


def _ratios(costs: Sequence[Cost]) -> dict[str, dict[int, float]]:
    by = {(cost.name, cost.in_flight): cost.cpu_us for cost in costs}

    def ratio(one: str, other: str) -> dict[int, float]:
        return {n: by[one, n] / by[other, n] for n in IN_FLIGHT}

    return {
        "booking / floor": ratio(BOOKING, FLOOR),
        "slot booking / day booking": ratio(SLOTS, BOOKING),
        "booking with a hold / day booking": ratio(HELD, BOOKING),
        "hold / day booking": ratio(HOLDING, BOOKING),
        "reschedule / day booking": ratio(RESCHEDULE, BOOKING),
        "queue / floor": ratio(QUEUE, FLOOR),
        "queue with estimates / without": ratio(ESTIMATED, QUEUE),
    }


# Every call has its own number, which selects a doctor and a patient who never meet again.
_PICK = """
\\set n :n + 1
\\set call :n * :clients + :client_id
\\set doctor :call % :doctors
\\set patient :call % :patients
"""
_BARE = _PICK + "select * from bare_book(bench_id(3, :patient), bench_id(2, :doctor), date 'DAY');\n"
_REAL = _PICK + (
    "select outcome, (appointment).id from decide(json_build_array(json_build_object('verb', 'BookAppointment',"
    " 'caller', 'bench', 'actor', 'anonymous', 'key',"
    " 'pgbench-' || :call, 'fingerprint', '\\x00', 'patient', bench_id(3, :patient),"
    " 'doctor', bench_id(2, :doctor), 'date', 'DAY', 'reason', '', 'notes', '')));\n"
)


def _pgbench(
    stage: Stage, conninfo: str, script: str, doctors: int, patients: int, day: date, calls: int
) -> dict[str, Any]:
    path = Path(stage.directory) / "script.sql"
    path.write_text(script.replace("DAY", str(day + timedelta(days=50))))
    before = stage.cpu
    command: list[str | Path] = [program("pgbench"), "-n", "-M", "prepared", "-f", path, "-c", str(CONNECTIONS)]
    command += ["-j", "1", "-t", str(calls // CONNECTIONS), "-D", "n=0", "-D", f"clients={CONNECTIONS}"]
    command += ["-D", f"doctors={doctors}", "-D", f"patients={patients}"]
    said = subprocess.run([*command, conninfo], capture_output=True, text=True, check=True).stdout
    rate = re.search(r"tps = ([\d.]+)", said)
    failed = re.search(r"number of failed transactions: (\d+)", said)
    assert rate is not None
    return {
        "calls_per_second": float(rate[1]),
        "postgres_us": (stage.cpu - before) / (calls // CONNECTIONS * CONNECTIONS) * 1e6,
        "failed": int(failed[1]) if failed else 0,
    }
