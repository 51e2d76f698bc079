"""Readers of events through restarts, kills, restores and transactions left open; our clients; the command."""

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from clinic.frontdesk.v1 import clinic_pb2, event_pb2
from frontdesk.client import FrontdeskClient, FrontdeskError, SyncFrontdeskClient
from frontdesk.process.postgres_programs import installation
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, reason_of, refusal
from tests.hostile.wire import serving, working
from tests.servers import Service
from tests.test_cli import FRONTDESK, running
from tests.test_events import PREFIX, every, next_event, page, read, sealed, types, watch
from tests.waiting import SOON, until


@pytest.fixture
async def desk(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A client of a server that also works in the background."""
    async with serving(settings, conninfo, background="on") as (_, front):
        yield front


async def test_late_commits(desk: Front) -> None:
    """What commits after an older transaction waits for that one; then all readers are told both, in one order."""
    stream = watch(desk)
    await read(stream)
    with psycopg.connect(desk.conninfo) as late:
        late.execute("select pg_current_xact_id()")
        await desk.clinic()
        # Without the wait it would be sealed by now: rounds of the sealer have passed.
        await until(lambda: desk.sql("select waiting from seal_log()") == [(True,)])
        assert list((await page(desk)).events) == []
        late.execute(
            "insert into log (id, time, actor, method, type, resource)"
            " values (log_id(now()), now(), 'system', 'Test', 'clinic.updated', 'clinics/1')"
        )
    found = [await next_event(stream) for _ in range(2)]
    assert sorted(types(found)) == ["clinic.created", "clinic.updated"]
    assert await every(desk) == found
    stream.cancel()


async def test_two_replicas(desk: Front, conninfo: str, settings: Settings) -> None:
    """Readers at two replicas are told the same in the same order; a cursor of one is good at the other."""
    async with serving(settings, conninfo, background="on") as (_, other):
        fronts = (desk, other)
        streams = [watch(front) for front in fronts]
        for stream in streams:
            await read(stream)
        doctors = [await front.doctor(max_patients_per_day=30) for front in fronts]
        await asyncio.gather(*(front.arrive(doctor.id) for front in fronts for doctor in doctors for _ in range(5)))
        everything = await every(desk)
        assert len({event.id for event in everything}) == len(everything) == 4 + 3 * 20
        for stream in streams:
            assert [await next_event(stream) for _ in everything] == everything
            stream.cancel()
        for number in (0, 7, len(everything) - 1):
            answer = await page(other, cursor=everything[number].cursor, page_size=100)
            assert list(answer.events) == everything[number + 1 :]


async def test_a_restart(conninfo: str, settings: Settings) -> None:
    """A cursor outlives the server."""
    async with serving(settings, conninfo, background="on") as (_, front):
        await front.clinic()
        await sealed(front)
        cursor = (await page(front)).cursor
    async with serving(settings, conninfo, background="on") as (_, front):
        await front.doctor()
        await sealed(front)
        assert types((await page(front, cursor=cursor)).events) == ["clinic.created", "doctor.created"]


async def test_without_hints(conninfo: str, settings: Settings) -> None:
    """Without LISTEN, as behind a pooler that shares sessions, the poll alone tells readers."""
    async with serving(settings, conninfo, background="on", pooler="transaction", database_url=conninfo) as (_, front):
        stream = watch(front)
        await read(stream)
        await front.doctor()
        assert types([await next_event(stream) for _ in range(2)]) == ["clinic.created", "doctor.created"]
        stream.cancel()


@pytest.fixture
def spare(postgres: str) -> Iterator[str]:
    """An empty database that takes another one's place."""
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute("create database frontdesk_events_spare template template0")
        yield make_conninfo(postgres, dbname="frontdesk_events_spare")
        for name in ("frontdesk_events_spare", "frontdesk_events_lost"):
            admin.execute(f"drop database if exists {name} with (force)".encode())


@pytest.mark.parametrize("changes", [0, 3, 9], ids=["behind", "abreast", "ahead"])
async def test_a_restored_database(
    conninfo: str, settings: Settings, postgres: str, spare: str, tmp_path: Path, changes: int
) -> None:
    """A cursor from before the backup goes on; one of the lost future is refused with the present end, also after the
    log has grown past its place; so are the streams that stand there.
    """

    def run(program: str, *arguments: str) -> None:
        subprocess.run([installation() / "bin" / program, *arguments], cwd=tmp_path, check=True, timeout=60)

    async with serving(settings, conninfo) as (_, front):
        async with working(settings, conninfo):
            for _ in range(2):
                await front.clinic()
            await sealed(front)
        before = await page(front)
        run("pg_dump", "--format=custom", "--file=backup", "-d", conninfo)
        async with working(settings, conninfo):
            for _ in range(3):
                await front.clinic()
            await sealed(front)
            stream = watch(front, cursor=before.cursor)
            lost = [await next_event(stream) for _ in range(3)]
        run("pg_restore", "--exit-on-error", "-d", spare, "backup")
        async with serving(settings, spare, background="on") as (_, other):
            for _ in range(changes):
                await other.clinic()
            await sealed(other)
        name = conninfo_to_dict(conninfo)["dbname"]
        with psycopg.connect(postgres, autocommit=True) as admin:
            admin.execute(f"alter database {name} allow_connections false".encode())
            admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
            admin.execute(f"alter database {name} rename to frontdesk_events_lost".encode())
            admin.execute(f"alter database frontdesk_events_spare rename to {name}".encode())

        async def to_the_end() -> None:
            while True:
                await read(stream)

        error = await refusal(to_the_end())
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_LOST")
        async with asyncio.timeout(SOON):
            while (found := await outcome(page(front, cursor=lost[-1].cursor))) == "DATABASE_UNAVAILABLE":
                pass
        assert found == "CURSOR_LOST"
        for event in lost:
            for call in (page(front, cursor=event.cursor), watch(front, cursor=event.cursor).read()):
                error = await refusal(call)
                assert reason_of(error) == "CURSOR_LOST"
                end = details(error)["ErrorInfo"].metadata["cursor"]
                assert list((await page(front, cursor=end)).events) == []
        assert len((await page(front, cursor=before.cursor)).events) == changes
        assert end == (await page(front)).cursor


async def test_kills(conninfo: str, tmp_path: Path) -> None:
    """Through kill -9 of workers and of the background process, a client is told each event once, in order."""
    with Service(tmp_path / "log", conninfo, workers=2, access="open") as service:
        told: list[event_pb2.Event] = []
        lives = asyncio.Event()
        async with (
            FrontdeskClient(f"127.0.0.1:{service.port}") as client,
            grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel,
        ):
            front = Front(channel, conninfo, service.port)

            async def follow() -> None:
                async with aclosing(
                    client.watch_events(on_connection=lambda live: lives.set() if live else None)
                ) as events:
                    async for event in events:
                        told.append(event)

            following = asyncio.create_task(follow())
            await lives.wait()
            for number in range(30):
                if number in (10, 20):
                    for pid in (*service.workers(), *service.workers("background")):
                        os.kill(pid, signal.SIGKILL)
                request = clinic_pb2.CreateClinicRequest(
                    clinic=clinic_pb2.Clinic(name="Clinic", time_zone="UTC"), idempotency_key=f"{number}"
                )
                async with asyncio.timeout(SOON):
                    while True:
                        try:
                            await front.clinics.CreateClinic(request)
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.05)
                        else:
                            break
            await sealed(front)
            everything: list[event_pb2.Event] = []
            async with asyncio.timeout(SOON):
                while not everything or len(told) < len(everything):
                    try:
                        everything = await every(front)
                    except grpc.aio.AioRpcError:
                        continue
            following.cancel()
        assert told == everything
        assert len({event.id for event in told}) == len(told) == 30


async def test_the_clients(desk: Front) -> None:
    """Both clients yield events with their filters, from any place; and refusals end them."""
    address = f"127.0.0.1:{desk.port}"
    doctor = await desk.doctor()
    await desk.arrive(doctor.id)
    everything = await every(desk)
    wanted: Any = {"doctor_id": doctor.id, "types": [PREFIX + "queue.checked_in", PREFIX + "appointment.booked"]}
    async with FrontdeskClient(address) as client:
        async with aclosing(client.watch_events(from_start=True)) as events:
            assert [await anext(events) for _ in everything] == everything
            await desk.clinic()
            assert types([await anext(events)]) == ["clinic.created"]
        async with aclosing(client.watch_events(cursor=everything[0].cursor, **wanted)) as events:
            assert [await anext(events) for _ in range(2)] == everything[-2:]
        async with aclosing(client.watch_events(cursor="x")) as events:
            with pytest.raises(FrontdeskError, match="cursor"):
                await anext(events)

    def synchronously() -> list[event_pb2.Event]:
        with (
            SyncFrontdeskClient(address) as client,
            closing(client.watch_events(cursor=everything[0].cursor, **wanted)) as events,
        ):
            return [next(events) for _ in range(2)]

    assert await asyncio.to_thread(synchronously) == everything[-2:]


async def test_the_command(desk: Front) -> None:
    """`frontdesk events tail` prints a line for each event, and ends with status 130 at Ctrl-C."""
    doctor = await desk.doctor()
    arrived = await desk.arrive(doctor.id)

    def follow() -> None:
        command = (*FRONTDESK, "events", "tail", "--target", f"127.0.0.1:{desk.port}")
        with running(*command, "--from-start", "--types", "clinic.created,queue.checked_in") as tail:
            tail.expect("^20.*Z clinic.created clinics/")
            said = tail.expect("queue.checked_in (.*)")[1]
            assert said.startswith(f"appointments/{arrived.appointment.id} by anonymous revision=3 ")
            assert re.search(" queue_state=WAITING .*ticket=1", said)
            assert len(tail.lines) == 2
            assert tail.end(signal.SIGINT) == 130
        with running(*command, "--cursor", "x", stderr=subprocess.PIPE) as tail:
            assert tail.process.wait(60) == 1

    await asyncio.to_thread(follow)
