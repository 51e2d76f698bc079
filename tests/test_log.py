"""The log: nothing else depends on whether it can be written, and every line of it is JSON."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from psycopg.conninfo import conninfo_to_dict

from clinic.frontdesk.v1 import clinic_pb2
from tests.clinic import Front, outcome, refusal
from tests.servers import free_port
from tests.waiting import SOON, until, until_true, wait_for

NOBODY = clinic_pb2.GetClinicRequest(clinic_id="0192f5d1-7a5c-7b6e-8f00-0123456789ab")


class Served:
    """`frontdesk serve` with two workers, whose standard error is what a test says."""

    def __init__(self, conninfo: str, *, stderr: int = subprocess.DEVNULL, closed: str = "", **settings: str) -> None:
        """`closed` closes standard files as a shell does, like `2>&-`; `settings` are FRONTDESK_* in small letters."""
        self.port, metrics = free_port(), free_port()
        self.page = f"http://127.0.0.1:{metrics}/metrics"
        settings |= {"metrics_listen": f"127.0.0.1:{metrics}", "database_url": conninfo}
        command = [
            sys.executable,
            "-m",
            "frontdesk.cli",
            "serve",
            "--listen",
            f"127.0.0.1:{self.port}",
            "--workers",
            "2",
        ]
        self.process = subprocess.Popen(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
            env={**os.environ, **{f"FRONTDESK_{name.upper()}": value for name, value in settings.items()}},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )

    def dropped(self) -> float:
        """How many lines of its logs the service says are lost."""
        with urlopen(self.page, timeout=SOON) as page:
            families = text_string_to_metric_families(page.read().decode())
            return sum(s.value for f in families for s in f.samples if "log_lines_dropped" in s.name)


@contextlib.contextmanager
def serving(conninfo: str, **changed: Any) -> Iterator[Served]:
    """A service that must drain and end well."""
    service = Served(conninfo, **changed)
    try:
        yield service
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(2 * SOON) == 0
    finally:
        service.process.kill()
        service.process.wait()


@contextlib.asynccontextmanager
async def client(service: Served, conninfo: str) -> Any:
    """A client, once the service is there."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        front = Front(channel, conninfo, service.port)

        async def there() -> bool:
            assert service.process.poll() is None
            return (await refusal(front.clinics.GetClinic(NOBODY))).code() is grpc.StatusCode.NOT_FOUND

        # Three processes start, on a machine that may be busy.
        await until_true(there, 3 * SOON)
        yield front


async def book(front: Front) -> None:
    """Changes, refusals and reads, each with its line in the log."""
    doctor, people = await front.doctor(), await front.people(12)
    outcomes = [await outcome(front.book(person.id, doctor.id)) for person in people]
    assert outcomes == ["OK"] * 10 + ["DAY_FULL"] * 2


@pytest.mark.parametrize("closed", ["2>/dev/full", "2>&-", "0<&- 1>&- 2>&-", ">/dev/full 2>&1"])
async def test_a_log_that_cannot_be_written(conninfo: str, closed: str) -> None:
    """A full disk or closed standard files cost the lines of the log, which the metrics count, and nothing else."""
    with serving(conninfo, closed=closed) as service:
        async with client(service, conninfo) as front:
            await book(front)
        await until_true(lambda: asyncio.to_thread(lambda: service.dropped() >= 24))


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_files_are_held(tmp_path: Path, closed: str) -> None:
    """No file or connection gets the number of a standard file that was closed, here or in a process started here."""
    told = tmp_path / "told"
    program = f"""
import os, sys
from frontdesk import cli
cli._hold_standard_files()
print("text", flush=True)
print("text", file=sys.stderr, flush=True)
with open({str(told)!r}, "w") as told:
    for number in range(3):
        print(os.readlink(f"/proc/self/fd/{{number}}"), os.get_inheritable(number), file=told)
"""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", program]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    assert told.read_text() == "/dev/null True\n" * 3


async def test_a_log_whose_reader_has_gone(conninfo: str) -> None:
    """If nobody reads standard error any more, calls are answered as before and the service ends well."""
    reading, writing = os.pipe()
    with serving(conninfo, stderr=writing) as service:
        os.close(writing)
        async with client(service, conninfo) as front:
            assert os.read(reading, 1)
            os.close(reading)
            await book(front)
        await until_true(lambda: asyncio.to_thread(lambda: service.dropped() >= 24))


async def test_a_log_whose_reader_stops(conninfo: str) -> None:
    """If the reader of standard error stops, no call waits for it; later it gets whole lines, none torn or mixed."""
    reading, writing = os.pipe()
    with serving(conninfo, stderr=writing) as service:
        os.close(writing)
        async with client(service, conninfo) as front:
            for _ in range(20):
                answers = [front.clinics.GetClinic(NOBODY, timeout=SOON) for _ in range(100)]
                assert set(await asyncio.gather(*map(outcome, answers))) == {"CLINIC_NOT_FOUND"}
        read: list[bytes] = []
        reader = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reading, 65536), b"")))
        reader.start()
        await until(lambda: sum(map(len, read)) > 4 * 65536)
    await asyncio.to_thread(reader.join, SOON)
    os.close(reading)
    lines = [json.loads(line) for line in b"".join(read).splitlines()]
    assert sum(line["event"] == "call" for line in lines) > 2000


async def test_a_stop_waits_for_no_reader(conninfo: str) -> None:
    """A service whose log nobody reads drains and ends as soon as any other."""
    reading, writing = os.pipe()
    with serving(conninfo, stderr=writing, drain_seconds="1") as service:
        os.close(writing)
        async with client(service, conninfo) as front:
            for _ in range(10):
                await asyncio.gather(*(outcome(front.clinics.GetClinic(NOBODY)) for _ in range(100)))
    os.close(reading)


async def test_every_line_is_json(conninfo: str, tmp_path: Path) -> None:
    """What the pool of connections and gRPC's own core have to say is JSON, like all else, and named after them."""
    path = tmp_path / "log"
    with path.open("wb") as log, pytest.MonkeyPatch.context() as patch:
        # All that gRPC can say.
        patch.setenv("GRPC_VERBOSITY", "debug")
        patch.setenv("GRPC_TRACE", "http")
        with serving(conninfo, stderr=log.fileno()) as service:
            async with client(service, conninfo) as front:
                await book(front)
                name = conninfo_to_dict(conninfo)["dbname"]
                with psycopg.connect(conninfo, dbname="postgres", autocommit=True) as admin:
                    admin.execute(f"alter database {name} allow_connections false".encode())
                    admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
                    assert await outcome(front.clinics.GetClinic(NOBODY)) == "DATABASE_UNAVAILABLE"
                    await until(lambda: b'"psycopg.pool"' in path.read_bytes())
                    admin.execute(f"alter database {name} allow_connections true".encode())
    events = {json.loads(line)["event"] for line in path.read_text().splitlines()}
    assert {"call", "database_unavailable", "psycopg.pool", "grpc"} <= events


def logged(program: str, **more: Any) -> tuple[list[dict[str, Any]], str]:
    """The log of a program, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", f"from frontdesk.process.log import *\n{program}"],
        capture_output=True, text=True, timeout=SOON, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines()], done.stdout


def test_lines_of_others() -> None:
    """Warnings, failed threads, ignored exceptions and plain text become JSON, and tell nothing of a patient."""
    lines, _ = logged(
        """
import asyncio, gc, logging, os, subprocess, sys, threading, warnings

def fail(of):
    raise ValueError(f"{of} Ana")

class Resource:
    def __del__(self):
        fail("resource")

async def main():
    task = asyncio.create_task(asyncio.to_thread(fail, "task"))
    await asyncio.wait([task])
    del task
    gc.collect()
    asyncio.get_running_loop().call_soon(fail, "callback of Ana")
    await asyncio.sleep(0)

configure_log("info")
forward_stderr()
warnings.warn("an old way")
os.write(2, b"plain text\\nE1126 14:38:24.989379   18480 chttp2_transport.cc:1435] too many pings\\n")
logging.getLogger("psycopg.pool").warning("error connecting in %r: %s", "pool-1", "connection refused")
logging.getLogger("somebody").error("a call of %s", "Ana")
logging.getLogger("another").error("a call of <Ana>")
thread = threading.Thread(target=fail, args=["thread"])
thread.start()
thread.join()
Resource()
asyncio.run(main())
subprocess.run([sys.executable, "-c", "import os; os.write(2, b'last words'); os.abort()"])
"""
    )
    assert lines.pop()["said"] == "last words"
    found = {line["event"]: line for line in lines}
    assert found["py.warnings"]["said"].endswith("UserWarning: an old way")
    assert found["stderr"]["said"] == "plain text"
    assert (found["grpc"]["said"], found["grpc"]["level"]) == ("chttp2_transport.cc:1435] too many pings", "error")
    assert found["psycopg.pool"]["said"] == "error connecting in 'pool-1': connection refused"
    assert (found["somebody"]["said"], found["another"]["said"]) == ("a call of %s", "a call of")
    assert found["thread_failed"]["error"] == found["exception_ignored"]["error"] == "ValueError"
    asyncs = [line for line in lines if line["event"] == "asyncio"]
    assert [line["said"] for line in asyncs] == ["Task exception was never retrieved", "Exception in callback fail"]
    assert all(line["where"][-1].startswith("fail ") for line in asyncs)
    assert "Ana" not in json.dumps(lines)


def test_room_is_bounded() -> None:
    """Lines for which there is no room are counted; those that waited are written once somebody reads."""
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            """
import sys, structlog
from frontdesk.process import log
log.configure_log("info")
log.forward_stderr()
for n in range(40_000):
    structlog.get_logger().info("line", n=n)
print(log.dropped(), flush=True)
sys.stdin.read()
""",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writing,
    )
    os.close(writing)
    assert process.stdout is not None
    assert process.stdin is not None
    dropped = int(process.stdout.readline())
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.extend(iter(lambda: os.read(reading, 65536), b"")))
    reader.start()
    wait_for(lambda: b"".join(read).count(b"\n") == 40_000 - dropped)
    process.stdin.close()
    assert process.wait(SOON) == 0
    process.stdout.close()
    reader.join(SOON)
    os.close(reading)
    # The pipe and what the thread has taken out of it hold some 20,600 of these lines at most.
    assert dropped > 10_000
    numbers = [json.loads(line)["n"] for line in b"".join(read).splitlines()]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("forward", ["log.forward_stderr()", ""], ids=["forwarded", "written directly"])
def test_a_file_that_may_not_grow(tmp_path: Path, forward: str) -> None:
    """A line that was cut off at a limit of the file's size spoils none of those that come when there is room again."""
    path = tmp_path / "log"
    with path.open("wb") as log:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                f"""
import resource, structlog, time
from frontdesk.process import log
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
log.configure_log("info")
{forward}
logger = structlog.get_logger()
for n in range(20):
    logger.info("line", n=n)
while not log.dropped():
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
logger.info("last", n=20)
print(log.dropped())
""",
            ],
            stdout=subprocess.PIPE,
            stderr=log,
            timeout=SOON,
        )
    assert done.returncode == 0
    whole = []
    *_, torn, last = path.read_text().splitlines()
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            whole.append(json.loads(line)["n"])
    assert json.loads(last)["n"] == 20
    with pytest.raises(ValueError, match=r"Unterminated|Expecting|delimiter"):
        json.loads(torn)
    assert len(whole) + int(done.stdout) == 21
