"""`frontdesk audit`: whoever changes, removes or inserts a row of the log is found out."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from frontdesk.db.database import Database, Transaction
from frontdesk.jobs import verification
from frontdesk.jobs.maintenance import Removed, clean
from frontdesk.process.postgres import SERVICE, EmbeddedPostgres, joined
from tests.clinic import Front
from tests.servers import Service
from tests.waiting import until, wait_for

DAY = 86400.0
ROWS = 8


def frontdesk(*arguments: str, status: int = 0) -> str:
    """What the command prints, or says if it fails with this status."""
    done = subprocess.run(
        [sys.executable, "-m", "frontdesk.cli", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == status, done
    return (done.stdout if status == 0 else done.stderr).strip()


def fill(conninfo: str, rows: int = ROWS) -> list[str]:
    """Append rows and seal them; the ids of all rows in their order."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for _ in range(rows):
            connection.execute(
                "insert into log (id, time, actor, method) values (log_id(now()), now(), 'users/1', 'Test')"
            )
        connection.execute("select seal_log()")
        return [row for (row,) in connection.execute("select id::text from seal order by position").fetchall()]


def run(conninfo: str, *statements: str) -> None:
    """Do this to the database, as its owner could."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


RESEALED = """
with recursive c as (
    select s.position, s.id, sha256(first_chain() || log_digest(l)) as chain
    from seal s join log l using (id) where position = 1
    union all
    select s.position, s.id, sha256(c.chain || log_digest(l))
    from c join seal s on s.position = c.position + 1 join log l on l.id = s.id)
update seal set chain = c.chain from c where seal.id = c.id
"""
"""Makes the whole chain anew, as somebody could who may write both tables."""

TAMPERING: dict[str, tuple[Callable[[list[str]], list[str]], str, bool]] = {
    "a changed row": (lambda ids: [f"update log set actor = 'users/2' where id = '{ids[3]}'"], "position 4", False),
    "a changed room": (lambda ids: [f"update log set room = 'x' where id = '{ids[7]}'"], "position 8", False),
    "a removed row": (lambda ids: [f"delete from log where id = '{ids[2]}'"], "removed: position 3", False),
    "a removed row with its seal": (
        lambda ids: [f"delete from {table} where id = '{ids[2]}'" for table in ("log", "seal")],
        "removed: position 3",
        False,
    ),
    "the beginning removed": (
        lambda ids: [
            f"delete from log where id in ('{ids[0]}', '{ids[1]}')",
            f"delete from seal where id = '{ids[0]}'",
        ],
        "up to position 2",
        False,
    ),
    "a row inserted without a seal": (
        lambda ids: [
            "insert into log (transaction, id, time, actor, method)"
            f" select 1, log_id(time), time, actor, method from log where id = '{ids[1]}'"
        ],
        "inserted",
        False,
    ),
    "a row inserted in the chain": (
        lambda ids: [
            "update seal set position = -position where position > 3",
            "update seal set position = 1 - position where position < 0",
            "insert into log (id, time, actor, method) values (log_id(now()), now(), 'users/3', 'Test')",
            "insert into seal select 4, (select id from log where actor = 'users/3'), chain, horizon, cluster from seal"
            " where position = 3",
        ],
        "position 4",
        False,
    ),
    "the end removed": (
        lambda ids: [f"delete from {table} where id = '{ids[7]}'" for table in ("log", "seal")],
        "the log ends at position 7",
        True,
    ),
    "all made anew": (
        lambda ids: [f"update log set actor = 'users/2' where id = '{ids[3]}'", RESEALED],
        "is not what led to the head",
        True,
    ),
}
"""What is done, what `verify` says of it, and whether it takes a head to notice."""


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering(conninfo: str, name: str) -> None:
    """`audit verify` names the first row that was changed, removed or inserted; what only a head shows, with --head."""
    tamper, expected, needs_head = TAMPERING[name]
    ids = fill(conninfo)
    head = frontdesk("audit", "head", "--database-url", conninfo)
    assert head.startswith(f"{ROWS}:")
    verify = ["audit", "verify", "--database-url", conninfo]
    assert frontdesk(*verify, "--head", head) == f"nothing was changed up to {head}"
    run(conninfo, *tamper(ids))
    if needs_head:
        frontdesk(*verify)
    assert expected in frontdesk(*verify, *(["--head", head] if needs_head else []), status=1)


def test_heads(conninfo: str) -> None:
    """An empty log has a head too; heads of any time hold later; what is no head is refused."""
    verify = ["audit", "verify", "--database-url", conninfo]
    heads = [frontdesk("audit", "head", "--database-url", conninfo)]
    assert heads == [f"0:{'0' * 64}"]
    for _ in range(2):
        fill(conninfo, 2)
        heads.append(frontdesk("audit", "head", "--database-url", conninfo))
    for head in heads:
        assert frontdesk(*verify, "--head", head).endswith(heads[-1])
    assert "--head" in frontdesk(*verify, "--head", "12", status=2)


async def cleaned(conninfo: str, keep_days: float) -> Removed:
    """What retention has deleted."""
    db = Database(conninfo, pool_size=1)
    await db.open()
    try:
        return await clean(db, keep_keys_seconds=DAY, keep_audit_seconds=keep_days * DAY)
    finally:
        await db.close()


async def test_retention(conninfo: str) -> None:
    """Old rows go, never of the last 365 days. The rest can be verified, but not against a head of what has gone."""
    ids = fill(conninfo)
    old = frontdesk("audit", "head", "--database-url", conninfo)
    for day, row in enumerate(ids):
        # 372, 371 … 365 days and a bit old.
        run(conninfo, f"update log set time = now() - interval '{372 - day} days 1 hour' where id = '{row}'")
    run(conninfo, RESEALED)
    fill(conninfo, 2)
    head = frontdesk("audit", "head", "--database-url", conninfo)
    assert await cleaned(conninfo, 370) == Removed(0, 3)
    assert await cleaned(conninfo, 370) == Removed(0, 0)
    verify = ["audit", "verify", "--database-url", conninfo]
    frontdesk(*verify, "--head", head)
    assert await cleaned(conninfo, 1) == Removed(0, 5)
    run(conninfo, "select seal_log()")
    frontdesk(*verify, "--head", head)
    assert "too old" in frontdesk(*verify, "--head", f"3:{old[2:]}", status=1)
    with psycopg.connect(conninfo) as connection:
        kept = connection.execute("select actor, method, count from log order by id").fetchall()
        assert kept == [("users/1", "Test", 1)] * 2 + [("system", "Retention", 3), ("system", "Retention", 5)]
        # A session's own clock does not make younger rows old.
        connection.execute("set frontdesk.now = '2100-01-01'")
        assert connection.execute("select delete_old_log(86400, 100)").fetchall() == [(0,)]


async def test_retention_while_the_log_is_verified(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that retention deletes while the log is read are not reported as removed."""
    for row in fill(conninfo)[:6]:
        run(conninfo, f"update log set time = now() - interval '372 days' where id = '{row}'")
    run(conninfo, RESEALED)
    page = verification._page
    removed: list[Removed] = []

    async def read(tx: Transaction, after: verification.Head) -> list[Any]:
        found = await page(tx, after)
        if not removed:
            removed.append(await cleaned(conninfo, 370))
        return found

    monkeypatch.setattr(verification, "_PAGE", 2)
    monkeypatch.setattr(verification, "_page", read)
    db = Database(conninfo, pool_size=1)
    await db.open()
    assert (await verification.verify(db)).position == ROWS
    assert removed == [Removed(0, 6)]
    assert (await verification.verify(db)).position == ROWS
    await db.close()


def test_the_service_can_only_add_to_the_log(tmp_path: Path) -> None:
    """A service with the embedded PostgreSQL has a role that cannot change the log; the commands work beside it."""
    with Service(tmp_path / "log", "", data_dir=str(tmp_path / "data"), access="open") as service:
        with joined(tmp_path / "data") as (conninfo, started):
            assert not started
            with psycopg.connect(conninfo, autocommit=True) as owner:
                role = "select distinct usename from pg_stat_activity where application_name like 'frontdesk%'"
                assert owner.execute(role.encode()).fetchall() == [(SERVICE,)]
                owner.execute(
                    "insert into log (id, time, actor, method) values (log_id(now()), now(), 'users/1', 'Test')"
                )
                wait_for(lambda: owner.execute("select count(*) from seal").fetchall() == [(1,)])
                owner.execute(f"set role {SERVICE}".encode())
                for table in ("log", "seal"):
                    for statement in (f"delete from {table}", f"truncate {table}", f"update {table} set id = id"):
                        with pytest.raises(psycopg.errors.InsufficientPrivilege):
                            owner.execute(statement.encode())
                owner.execute("create temp table seal (position bigint, id uuid, chain bytea)")
                assert owner.execute("select delete_old_log(0, 100)").fetchall() == [(0,)]
        assert frontdesk("audit", "verify", "--data-dir", str(tmp_path / "data")).startswith(
            "nothing was changed up to 1:"
        )
        assert "removed 0" in frontdesk("maintain", "--data-dir", str(tmp_path / "data"))
        assert service.process.poll() is None


async def test_killed_workers(conninfo: str, tmp_path: Path) -> None:
    """No change that was committed is missing in the log when workers are killed, and every row is sealed once."""
    with Service(tmp_path / "log", conninfo, workers=2, access="open") as service:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            front = Front(channel, conninfo, service.port)
            doctor = await front.doctor(max_patients_per_day=200)
            people = [(await front.patient()).id for _ in range(60)]
            done = 0

            async def book(patient_id: str) -> None:
                nonlocal done
                key = f"of {patient_id}"
                while True:
                    try:
                        await front.book(patient_id, doctor.id, idempotency_key=key)
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(0.05)
                    else:
                        break
                done += 1

            async def kill() -> None:
                for enough in (5, 25):
                    await until(lambda enough=enough: done >= enough)  # type: ignore[misc]
                    os.kill(service.workers()[0], signal.SIGKILL)

            killing = asyncio.create_task(kill())
            for start in range(0, len(people), 6):
                await asyncio.gather(*(book(patient_id) for patient_id in people[start : start + 6]))
            await killing
        booked = "select count(*), count(distinct appointment_id) from log where type = 'appointment.booked'"
        assert front.sql(booked) == [(60, 60)]
        # Another worker seals what a killed one has left.
        left = "select count(*) from log where id not in (select id from seal)"
        await until(lambda: front.sql(left) == [(0,)])
    frontdesk("audit", "verify", "--database-url", conninfo)


def test_embedded_databases_get_the_role_later(tmp_path: Path) -> None:
    """A data directory of before the role gets it at its next start."""
    with EmbeddedPostgres(tmp_path) as postgres, psycopg.connect(postgres.conninfo, autocommit=True) as owner:
        owner.execute(f"drop role {SERVICE}".encode())
    with EmbeddedPostgres(tmp_path) as postgres, psycopg.connect(postgres.service_conninfo) as service:
        assert service.execute("select current_user").fetchall() == [(SERVICE,)]
