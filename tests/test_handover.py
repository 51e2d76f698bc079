"""Workers that are replaced under load, and services on Unix sockets."""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from datetime import date, timedelta
from pathlib import Path

import grpc
import pytest

from frontdesk.client import CHANNEL_OPTIONS
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, tomorrow
from tests.servers import Service
from tests.streams import many_people
from tests.waiting import until


def frontdesk(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "frontdesk.cli", *arguments], capture_output=True, text=True, timeout=60
    )


Booked = dict[date, list[int]]
"""The numbers of the bookings of each date."""


async def under_load(target: str, conninfo: str, disturb: Callable[[Booked], Awaitable[None]]) -> None:
    """Book on many connections, with the retries of the service config, until `disturb` has ended."""
    async with grpc.aio.insecure_channel(target) as channel:
        front = Front(channel, conninfo, 0)
        doctor = await front.doctor(max_patients_per_day=1000)
        people = await many_people(front, 100)
    booked: Booked = defaultdict(list)
    wishes = itertools.product((tomorrow() + timedelta(days=n) for n in range(10_000)), people)
    disturbing = asyncio.ensure_future(disturb(booked))

    async def some(channel: grpc.aio.Channel) -> None:
        front = Front(channel, conninfo, 0)
        for on, patient_id in wishes:
            if disturbing.done():
                return
            answer = await front.book(patient_id, doctor.id, on, idempotency_key=f"{on} {patient_id}")
            booked[on].append(answer.appointment.number)

    options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with asyncio.timeout(120), contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(target, options=options)) for _ in range(4)
        ]
        await asyncio.gather(disturbing, *(some(channel) for channel in channels for _ in range(2)))
    for numbers in booked.values():
        assert sorted(numbers) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("workers", [1, 2])
async def test_sighup_fails_no_call(conninfo: str, tmp_path: Path, workers: int) -> None:
    """SIGHUP replaces every worker under load, and callers who retry as the service config says notice nothing."""
    with Service(tmp_path / "log", conninfo, workers=workers, drain_seconds="2") as service:

        async def reload(booked: Booked) -> None:
            await until(lambda: bool(booked))
            before = set(service.workers())
            os.kill(service.process.pid, signal.SIGHUP)
            await until(lambda: not before & set(service.workers()), 60)

        await under_load(f"127.0.0.1:{service.port}", conninfo, reload)
        assert len(service.workers()) == workers
        service.stop()


async def test_the_only_worker_is_stopped(conninfo: str, tmp_path: Path) -> None:
    """The only worker is told to stop under load: it goes when its successor listens, and nobody is refused."""
    with Service(tmp_path / "log", conninfo, drain_seconds="2") as service:

        async def stop(booked: Booked) -> None:
            await until(lambda: bool(booked))
            (before,) = service.workers()
            os.kill(before, signal.SIGTERM)
            await until(lambda: before not in service.workers(), 60)

        await under_load(f"127.0.0.1:{service.port}", conninfo, stop)
        service.stop()


# --- Unix sockets ---


@pytest.fixture
def on_socket(conninfo: str, tmp_path: Path) -> Iterator[tuple[Service, str]]:
    """A service on a Unix socket, and its target."""
    with Service(tmp_path / "log", conninfo, listen=f"unix:{tmp_path}/frontdesk.sock") as service:
        yield service, f"unix:{tmp_path}/frontdesk.sock"


async def test_a_unix_socket(on_socket: tuple[Service, str], conninfo: str, tmp_path: Path) -> None:
    """Clients and commands reach a Unix socket without credentials; it counts as loopback and ends with the service."""
    service, target = on_socket
    assert (await asyncio.to_thread(frontdesk, "health", "--target", target)).stdout.startswith("SERVING")
    assert "DR-SILVA" in (await asyncio.to_thread(frontdesk, "demo", "--target", target)).stdout
    curl: list[str | Path]
    curl = [Path(sys.executable).with_name("buf"), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    curl += ["--unix-socket", target.removeprefix("unix:"), "-d", "{}"]
    url = "http://localhost/clinic.frontdesk.v1.DoctorService/ListDoctors"
    process = await asyncio.create_subprocess_exec(*curl, url, stdout=asyncio.subprocess.PIPE)
    assert b'"code": "DR-SILVA"' in (await process.communicate())[0]

    async def reload(booked: Booked) -> None:
        await until(lambda: bool(booked))
        before = set(service.workers())
        os.kill(service.process.pid, signal.SIGHUP)
        await until(lambda: not before & set(service.workers()), 60)

    await under_load(target, conninfo, reload)
    service.stop()
    assert not [name for name in os.listdir(tmp_path) if name.startswith("frontdesk.sock")]


def test_one_worker_a_socket() -> None:
    """The kernel does not spread the connections of a path, so more workers are refused."""
    with pytest.raises(SettingsError, match="one worker"):
        Settings.load(listen="unix:/run/frontdesk.sock", workers="2")
