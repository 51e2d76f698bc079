"""The `frontdesk` command as its users see it: real processes and their output."""

import asyncio
import io
import os
import queue as queues
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from rich.console import Console

from clinic.frontdesk.v1 import appointment_pb2, doctor_pb2, queue_pb2
from frontdesk.client import SyncFrontdeskClient
from frontdesk.tools.board import Board, line
from frontdesk.tools.demo import CALLER, fill
from tests.clinic import Front, day, without_estimates

FRONTDESK = [sys.executable, "-m", "frontdesk.cli"]
SECONDS = 60
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}


def frontdesk(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command and wait for its end."""
    return subprocess.run(
        [*FRONTDESK, *arguments], capture_output=True, text=True, timeout=SECONDS, env={**CLEAN, **environment}
    )


class Running:
    """A command in the background, and its output lines as they arrive."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._news: queues.Queue[str | None] = queues.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self._news.put(text.rstrip("\n"))
        self._news.put(None)

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches the pattern."""
        deadline = time.monotonic() + SECONDS
        while (text := self._news.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            self.lines.append(text)
            if found := re.search(pattern, text):
                return found
        raise AssertionError(f"no line like {pattern!r} in {self.lines}; status {self.process.wait(SECONDS)}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Send this signal, and return the exit status."""
        self.process.send_signal(how)
        return self.process.wait(SECONDS)


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def running(*command: str, stderr: int | None = subprocess.DEVNULL) -> Iterator[Running]:
    """Run a command in the background."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=CLEAN,
        # As in a terminal. Tests may run in a shell's background, which ignores Ctrl-C.
        preexec_fn=_heed_interrupts,
    ) as process:
        try:
            yield Running(process)
        finally:
            # Gently, so that no PostgreSQL is left; it ends with the service.
            process.terminate()
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["serve", "--listen", "nowhere"], {}, "--listen"),
        (["serve", "--listen", "0.0.0.0:0"], {}, "loopback"),
        (["serve", "--listen", "::1:50062"], {}, "[::1]:50062"),
        (["serve", "--listen", "::1"], {}, "[::1]:PORT"),
        (["serve", "--listen", "[127.0.0.1]:1"], {}, "[IPV6]:PORT"),
        (["serve", "--listen", "two words:1"], {}, "HOST:PORT"),
        (["serve", "--listen", "unix:"], {}, "unix:PATH"),
        (["serve", "--listen", "unix://run/s"], {}, "unix:///PATH"),
        (["serve", "--listen", f"unix:/{'x' * 100}"], {}, "100 bytes"),
        (["serve", "--listen", "unix:/tmp/s", "--workers", "2"], {}, "one worker"),
        (["serve"], {"FRONTDESK_METRICS_LISTEN": "::1:9464"}, "[::1]:9464"),
        (["serve"], {"FRONTDESK_METRICS_LISTEN": "unix:/tmp/s"}, "HOST:PORT"),
        (["health", "--target", "::1:50051"], {}, "[::1]:50051"),
        (["watch", "--doctor", "D", "--target", "nowhere"], {}, "--target"),
        (["serve", "--workers", "many"], {}, "--workers"),
        (["serve", "--workers", "0"], {}, "--workers"),
        (["serve"], {"FRONTDESK_LISTEN": "127.0.0.1:99999"}, "FRONTDESK_LISTEN"),
        (["serve"], {"FRONTDESK_WORKERS": "-1"}, "FRONTDESK_WORKERS"),
        (["serve"], {"FRONTDESK_TLS_CERT": "/nonexistent"}, "FRONTDESK_TLS_CERT"),
        (["serve", "--frobnicate"], {}, "--frobnicate"),
        (["serve", "--listen"], {}, "--listen"),
        (["serve", "twice"], {}, "twice"),
        (["frobnicate"], {}, "frobnicate"),
        (["watch"], {}, "--doctor"),
        (["watch", "--doctor", "D", "--date", "tomorrow"], {}, "--date"),
        (["watch", "--doctor", "D"], {"FRONTDESK_LISTEN": "127.0.0.1:0"}, "--target"),
        (["migrate"], {"FRONTDESK_DEFAULT_TIME_ZONE": "Mars/Olympus"}, "FRONTDESK_DEFAULT_TIME_ZONE"),
        (["serve", "--database-url", "garbage"], {}, "--database-url"),
        (["migrate"], {"FRONTDESK_DATABASE_URL": "postgresql://%zz/"}, "FRONTDESK_DATABASE_URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(arguments: list[str], environment: dict[str, str], said: str) -> None:
    """A wrong option ends with status 2 and one line that names it."""
    done = frontdesk(*arguments, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("frontdesk: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


@pytest.mark.parametrize("command", [["demo"], ["watch", "--doctor", "DR-SILVA"]], ids=["demo", "watch"])
def test_nobody_there(command: list[str], unused_tcp_port: int) -> None:
    """If the service cannot be reached, the command prints one line."""
    done = frontdesk(*command, "--target", f"127.0.0.1:{unused_tcp_port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"frontdesk: no frontdesk answers at 127.0.0.1:{unused_tcp_port}: connection refused\n"


@pytest.mark.parametrize("command", ["migrate", "serve"])
def test_no_database(command: str) -> None:
    """If the database does not exist, the command prints one line."""
    listen = ["--listen", "127.0.0.1:0"] if command == "serve" else []
    done = frontdesk(command, *listen, "--database-url", "postgresql://127.0.0.1:1/none")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("frontdesk: the database ")
    assert done.stderr.count("\n") == 1


def test_version() -> None:
    """--version prints the version."""
    assert frontdesk("--version").stdout == "frontdesk 0.1.0\n"


def test_an_evening_with_the_embedded_database(tmp_path: Path) -> None:
    """One command serves a demo and prints the next commands; a board follows it; SIGTERM ends it with status 0."""
    console_script = Path(sys.executable).with_name("frontdesk")
    serve = [str(console_script), "serve", "--listen", "127.0.0.1:0", "--data-dir", str(tmp_path / "d"), "--demo"]
    with running(*serve) as service:
        address = service.expect(r"^frontdesk \(access: open\) serves on (127\.0\.0\.1:\d+)$")[1]
        curl = service.expect(r"^  (.*buf curl .*)$")[1]
        grpcurl = service.expect(r"^  (.*grpcurl .*)$")[1]
        watch = service.expect(r"^  (.*frontdesk watch .*)$")[1]
        assert f" {address} " in grpcurl
        listed = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=SECONDS)
        assert '"code": "DR-SILVA"' in listed.stdout, listed.stderr

        again = frontdesk("demo", "--target", address)
        assert again.returncode == 0, again.stderr
        doctor_id = re.search(r"DR-SILVA +([0-9a-f-]{36})", again.stdout)
        assert doctor_id is not None
        assert again.stdout == frontdesk("demo", "--target", address).stdout

        unknown = frontdesk("watch", "--target", address, "--doctor", "DR-NOBODY")
        assert (unknown.returncode, unknown.stdout) == (1, "")
        assert unknown.stderr == "frontdesk: there is no doctor with the id or code 'DR-NOBODY'\n"

        with running(*shlex.split(watch)) as board, SyncFrontdeskClient(address) as desk:
            # 9 bookings, 7 check-ins, 2 calls and 1 start after revision 1, and none of them twice.
            board.expect(r"revision 20: 5 waiting, 2 expected \| called: 2 Bruno Alves \(Room 2\)")
            revision = desk.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor_id[1], room="Room 9")).revision
            board.expect(rf"revision {revision}: 4 waiting.* 3 Carla Dias \(Room 9\)")
            assert board.end(signal.SIGINT) == 0
        with running(*FRONTDESK, "watch", "--target", address, "--doctor", doctor_id[1]) as board:
            board.expect(rf"revision {revision}:")
        busy = frontdesk("migrate", "--data-dir", str(tmp_path / "d"))
        assert busy.returncode == 1
        assert busy.stderr.count("\n") == 1
        assert service.end() == 0
    migrated = frontdesk("migrate", "--data-dir", str(tmp_path / "d"))
    assert (migrated.returncode, migrated.stdout) == (0, "the schema is up to date\n"), migrated.stderr


def test_a_database_of_ones_own(postgres: str) -> None:
    """On a given database `serve` refuses, and changes nothing, before `frontdesk migrate`; then workers serve it."""
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute("drop database if exists frontdesk_cli")
        admin.execute("create database frontdesk_cli")
    url = make_conninfo(postgres, dbname="frontdesk_cli")
    try:
        refused = frontdesk("serve", "--listen", "127.0.0.1:0", "--database-url", url)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "frontdesk migrate" in refused.stderr
        assert refused.stderr.count("\n") == 1
        with psycopg.connect(url) as connection:
            tables = connection.execute("select count(*) from pg_tables where schemaname = 'public'").fetchone()
        assert tables == (0,)
        assert frontdesk("migrate", "--database-url", url).returncode == 0
        serve = ["serve", "--listen", "127.0.0.1:0", "--database-url", url, "--workers", "2"]
        with running(*FRONTDESK, *serve) as service:
            address = service.expect(r"^frontdesk \(access: open\) serves on (.*)$")[1]
            suggested = service.expect(r"^  (.* watch .*)$")[1]
            assert suggested == f"{shlex.join(FRONTDESK)} watch --target {address} --doctor CODE"
            with SyncFrontdeskClient(address) as desk:
                assert not desk.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest()).doctors
            assert service.end() == 0
    finally:
        with psycopg.connect(postgres, autocommit=True) as admin:
            admin.execute("drop database frontdesk_cli with (force)")


# The demo


@pytest.mark.parametrize("hours", [0, 12, 21], ids=["as it is now", "half a day on", "late"])
async def test_the_demo_adds_nothing_twice(front: Front, hours: int) -> None:
    """When the demo is run again, even later in the day, it finds everything and adds nothing."""
    zone = ZoneInfo("America/Sao_Paulo")
    now = datetime.now(UTC)

    def census() -> list[tuple[object, ...]]:
        tables = ("clinic", "doctor", "patient", "slot", "appointment", "idempotency")
        return [front.sql(f"select count(*) from {table}")[0] for table in tables]

    with SyncFrontdeskClient(f"127.0.0.1:{front.port}", caller=CALLER) as desk:
        first = await asyncio.to_thread(fill, desk, now)
        before = census()
        # Later on the same day of the clinic, when slots that were in the future may have started.
        later = now + timedelta(hours=hours)
        if later.astimezone(zone).date() != now.astimezone(zone).date():
            later = datetime.combine(now.astimezone(zone), datetime.max.time(), zone)
        again = await asyncio.to_thread(fill, desk, later)
        for each in (*first, *again):
            each.queue.CopyFrom(without_estimates(each.queue))
        assert again == first
    assert census() == before
    assert [(len(each.queue.entries), each.queue.expected_count) for each in first[:2]] == [(7, 2), (4, 2)]
    assert front.sql("select count(*) from appointment where slot_id is not null") == [(5,)]
    states = [entry.state for entry in first[0].queue.entries]
    assert states.count(queue_pb2.QueueEntry.STATE_IN_CONSULTATION) == 1
    assert states.count(queue_pb2.QueueEntry.STATE_CALLED) == 1


async def test_the_demo_leaves_what_people_did(front: Front) -> None:
    """A cancelled booking or an absent doctor does not stop the demo, and the demo does not undo it."""
    now = datetime.now(UTC)
    with SyncFrontdeskClient(f"127.0.0.1:{front.port}", caller=CALLER) as desk:
        silva, *_ = await asyncio.to_thread(fill, desk, now)
        waiting = silva.queue.entries[0].appointment_id
        await asyncio.to_thread(
            desk.appointments.CancelAppointment, appointment_pb2.CancelAppointmentRequest(appointment_id=waiting)
        )
        absent = doctor_pb2.SetDoctorAvailabilityRequest(
            doctor_id=silva.doctor.id, date=silva.queue.date, is_present=False
        )
        await asyncio.to_thread(desk.doctors.SetDoctorAvailability, absent)
        again, *_ = await asyncio.to_thread(fill, desk, now)
    assert waiting not in [entry.appointment_id for entry in again.queue.entries]


# The board


def entry(ticket: int, state: queue_pb2.QueueEntry.State.ValueType, **fields: object) -> queue_pb2.QueueEntry:
    """A patient who came `ticket` minutes after 1970 began."""
    made = queue_pb2.QueueEntry(ticket=ticket, state=state, patient_name=f"Patient {ticket}", **fields)  # type: ignore[arg-type]
    made.check_in_time.FromSeconds(60 * ticket)
    return made


@pytest.fixture
def line_of_four() -> queue_pb2.Queue:
    """A queue with one patient in each of four states."""
    state = queue_pb2.QueueEntry.State
    seen = entry(1, state.STATE_IN_CONSULTATION, room="Room 1")
    seen.start_time.FromSeconds(60 * 21)
    urgent = entry(3, state.STATE_WAITING)
    urgent.priority = queue_pb2.PRIORITY_URGENT
    for minute, stamp in ((70, urgent.estimate.earliest), (77, urgent.estimate.likely), (90, urgent.estimate.latest)):
        stamp.FromSeconds(60 * minute)
    return queue_pb2.Queue(
        date=day(date(2026, 1, 31)),
        revision=17,
        waiting_count=1,
        expected_count=3,
        entries=[urgent, entry(2, state.STATE_CALLED, room="Room 2"), seen, entry(4, 99)],  # type: ignore[arg-type]
    )


def drawn(board: Board, minute: int, width: int = 80) -> str:
    """The board as text."""
    console = Console(record=True, width=width, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(board.at(60.0 * minute))
    return console.export_text(styles=False)


def test_the_board(line_of_four: queue_pb2.Queue) -> None:
    """Called patients stand first, each with room and wait. States of later releases do no harm."""
    board = Board("Dr. [b]Silva")
    board.queue, board.connected = line_of_four, True
    text = drawn(board, 65)
    assert "Dr. [b]Silva" in text
    assert "● live" in text
    assert "2026-01-31  ·  1 waiting, 3 expected" in text
    assert "revision 17" in text
    rows = re.findall(r"│ +(\d) │ (Patient \d) +│ (.+?) +│ (.*?) +│ +(.+?) │ +(.*?) │", text)
    assert rows == [
        ("2", "Patient 2", "called", "Room 2", "1:03", ""),
        ("1", "Patient 1", "in consultation", "Room 1", "20 min", ""),
        ("3", "Patient 3", "waiting · urgent", "", "1:02", "5–25 min"),
        ("4", "Patient 4", "?", "", "1:01", ""),
    ]


def test_the_board_of_a_waiting_room(line_of_four: queue_pb2.Queue) -> None:
    """It has tickets, states, rooms and turns, and no name, wait or priority. Heartbeats move the turns."""
    board = Board("Dr. Silva", names=False)
    line_of_four.next_estimate.latest.FromSeconds(60 * 95)
    board.queue = line_of_four
    text = drawn(board, 65)
    assert "Patient" not in text
    assert "urgent" not in text
    assert "a newcomer waits 0–30 min" in text
    rows = re.findall(r"│ +(\d) │ (.+?) +│ (.*?) +│ +(.*?) │", text)
    assert rows == [
        ("2", "called", "Room 2", ""),
        ("1", "in consultation", "Room 1", ""),
        ("3", "waiting", "", "5–25 min"),
        ("4", "?", "", ""),
    ]
    heartbeat = queue_pb2.Heartbeat()
    heartbeat.estimates.add(ticket=3).estimate.latest.FromSeconds(60 * 65)
    board.estimates(heartbeat)
    text = drawn(board, 65)
    assert "0–1 min" in text
    assert "newcomer" not in text
    board.estimates(queue_pb2.Heartbeat())
    assert " min" not in drawn(board, 65)


def test_called_patients_stand_out(line_of_four: queue_pb2.Queue) -> None:
    """A called patient has other colours than a waiting one."""
    board = Board("Dr. Silva")
    board.queue = line_of_four
    console = Console(record=True, width=80, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(board.at(0.0))
    coloured = {text for text in console.export_text(styles=True).splitlines() if "\x1b[1;30;43m" in text}
    assert len(coloured) == 1
    assert "Patient 2" in coloured.pop()


def test_a_board_without_news() -> None:
    """The board says so if there is no queue yet, and if nobody is here."""
    board = Board("Dr. Silva")
    assert "connecting" in drawn(board, 0)
    board.queue = queue_pb2.Queue(revision=1, date=day(date(2026, 1, 31)))
    assert "nobody is here yet" in drawn(board, 0)


def test_a_line_of_text(line_of_four: queue_pb2.Queue) -> None:
    """Without a drawn board, each update is one line."""
    assert line(line_of_four) == (
        "2026-01-31 revision 17: 1 waiting, 3 expected | called: 2 Patient 2 (Room 2)"
        " | in consultation: 1 Patient 1 (Room 1) | waiting: 3 Patient 3"
    )
