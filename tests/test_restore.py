"""When a backup replaces the database of a running service, all its watchers start afresh."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from clinic.frontdesk.v1 import queue_pb2
from frontdesk.process.postgres_programs import installation
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front, outcome
from tests.hostile.test_watch import first_of, watching


def run(tmp_path: Path, program: str, *arguments: str) -> None:
    """The path of a PostgreSQL program."""
    done = subprocess.run(
        [installation() / "bin" / program, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def spare(postgres: str) -> Iterator[str]:
    """An empty database that takes another one's place; its own name is free afterwards."""
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute("create database frontdesk_spare template template0")
        yield make_conninfo(postgres, dbname="frontdesk_spare")
        for name in ("frontdesk_spare", "frontdesk_lost"):
            admin.execute(f"drop database if exists {name} with (force)".encode())


@pytest.mark.parametrize("changes", [0, 1, 3, 4, 7], ids=["behind", "less behind", "abreast", "ahead", "far ahead"])
async def test_a_restored_database(
    front: Front, postgres: str, spare: str, settings: Settings, tmp_path: Path, changes: int
) -> None:
    """Watchers start afresh, whether the restored database has fewer, as many or more changes than the lost one."""
    doctor = await front.doctor()
    await front.arrive(doctor.id)
    run(tmp_path, "pg_dump", "--format=custom", "--file=backup", "-d", front.conninfo)
    # Three changes that the restore loses.
    lost = await front.arrive(doctor.id)
    await front.cancel(lost.appointment.id)
    watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
    first = await watch.read()
    assert first.revision == 6

    run(tmp_path, "pg_restore", "--exit-on-error", "-d", spare, "backup")
    # Others change the restored database before this server sees it.
    other = Worker(settings, spare)
    port = await other.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        beside = Front(channel, spare, port)
        people = await beside.people(changes)
        for person in people:
            await beside.book(person.id, doctor.id)
    await other.stop()
    name = conninfo_to_dict(front.conninfo)["dbname"]
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"alter database {name} allow_connections false".encode())
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
        admin.execute(f"alter database {name} rename to frontdesk_lost".encode())
        admin.execute(f"alter database frontdesk_spare rename to {name}".encode())

    async with asyncio.timeout(20):
        message = await watch.read()
        while not message.HasField("update"):
            message = await watch.read()
    assert (message.revision, message.previous_revision) == (3 + changes, 0)
    assert not message.update.changes
    assert [entry.ticket for entry in message.update.queue.entries] == [1]
    watch.cancel()
    resumed = await first_of(front, watching(doctor.id, first.resume_token))
    assert (resumed.revision, resumed.previous_revision) == (3 + changes, 0)
    assert not resumed.update.changes
    assert resumed.update.queue == await front.queue(doctor.id)
    # The bookings after the backup are gone, and their places are free: that is what a restore does.
    assert await outcome(front.appointment(lost.appointment.id)) == "APPOINTMENT_NOT_FOUND"
    (late,) = await front.people(1)
    assert (await front.book(late.id, doctor.id)).revision == 4 + changes
