"""Databases and roles with settings of their own: they change nothing, or a command says in one line what is wrong."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from clinic.frontdesk.v1 import patient_pb2, queue_pb2
from frontdesk.db.database import Database
from frontdesk.db.migrate import SchemaError, check_schema, migrate
from frontdesk.db.session import MARKER
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Front
from tests.waiting import until


def ask(conninfo: str, query: str) -> list[tuple[Any, ...]]:
    """Run a statement as an operator would; its rows."""
    with psycopg.connect(conninfo, autocommit=True, client_encoding="UTF8") as connection:
        cursor = connection.execute(query.encode())
        return cursor.fetchall() if cursor.description else []


Create = Callable[..., str]


@pytest.fixture
def create(postgres: str) -> Iterator[Create]:
    """Creates databases of this test's own; the connection string of each."""
    names: list[str] = []

    def make(options: str = "", **settings: str) -> str:
        name = f"frontdesk_session_{os.getpid()}_{len(names)}"
        names.append(name)
        ask(postgres, f"create database {name} {options}")
        for setting, value in settings.items():
            ask(postgres, f"alter database {name} set {setting.replace('__', '.')} = {value}")
        return make_conninfo(postgres, dbname=name)

    yield make
    for name in names:
        ask(postgres, f"drop database {name} with (force)")


def refused(command: str, conninfo: str) -> str:
    """The one line with which the command refuses this database."""
    listen = ["--listen", "127.0.0.1:0"] if command == "serve" else []
    done = subprocess.run(
        [sys.executable, "-m", "frontdesk.cli", command, *listen, "--database-url", conninfo],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("frontdesk: ")
    return lines[0]


def tables(conninfo: str, schema: str = "public") -> int:
    """The number of tables in a schema."""
    ((count,),) = ask(conninfo, f"select count(*) from pg_tables where schemaname = '{schema}'")
    return int(count)


# --- Databases that cannot work. ---


@pytest.mark.parametrize("command", ["migrate", "serve"])
@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "WIN1252", "EUC_JP"])
def test_only_utf8(create: Create, command: str, encoding: str) -> None:
    """A database whose encoding cannot hold every name is refused by its encoding, and stays empty."""
    conninfo = create(f"encoding '{encoding}' template template0 locale_provider libc locale 'C'")
    assert f"encoding is {encoding}" in refused(command, conninfo)
    assert tables(conninfo) == 0


@pytest.mark.parametrize("command", ["migrate", "serve"])
@pytest.mark.parametrize("where", ["database", "URL"])
def test_read_only(create: Create, command: str, where: str) -> None:
    """A database that takes no changes is refused by the setting that says so."""
    conninfo = create()
    migrate(conninfo)
    if where == "database":
        name = conninfo_to_dict(conninfo)["dbname"]
        ask(conninfo, f"alter database {name} set default_transaction_read_only = on")
    else:
        conninfo = make_conninfo(conninfo, options="-c default_transaction_read_only=on")
    assert "default_transaction_read_only" in refused(command, conninfo)


def test_a_clock_that_is_not_a_time(create: Create) -> None:
    """A `frontdesk.now` that PostgreSQL cannot read is refused at the start, not in every call."""
    conninfo = create()
    migrate(conninfo)
    ask(conninfo, f"alter database {conninfo_to_dict(conninfo)['dbname']} set frontdesk.now = 'soon'")
    assert "soon" in refused("serve", conninfo)


# --- Settings that the service makes its own. ---

HOSTILE = {
    "default_transaction_isolation": "'repeatable read'",
    "default_transaction_deferrable": "on",
    "lock_timeout": "'1ms'",
    "statement_timeout": "'1s'",
    "idle_session_timeout": "'50ms'",
    "idle_in_transaction_session_timeout": "'1s'",
    "client_connection_check_interval": "0",
    "standard_conforming_strings": "off",
    "bytea_output": "escape",
    "datestyle": "'German'",
    "intervalstyle": "'sql_standard'",
    "timezone": "'Asia/Tokyo'",
    "timezone_abbreviations": "'India'",
    "client_encoding": "'LATIN1'",
    "extra_float_digits": "-15",
    "array_nulls": "off",
    "transform_null_equals": "on",
    "exit_on_error": "on",
    "gin_fuzzy_search_limit": "1",
    "plpgsql__extra_errors": "'all'",
    "synchronous_commit": "off",
    "plan_cache_mode": "force_custom_plan",
    "check_function_bodies": "off",
    "row_security": "off",
    "enable_indexscan": "off",
    "default_tablespace": "pg_default",
    "search_path": '"$user", nowhere, public',
}


async def test_hostile_defaults(create: Create, settings: Settings) -> None:
    """Whatever the defaults of the database, a day at the clinic goes well, and no session or watcher is cut."""
    version = int(ask(create(), "show server_version_num")[0][0])
    hostile = HOSTILE | ({"transaction_timeout": "'5s'"} if version >= 170000 else {})
    conninfo = create(**hostile)
    await asyncio.to_thread(migrate, conninfo)
    assert await asyncio.to_thread(migrate, conninfo)
    await asyncio.to_thread(check_schema, conninfo)
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        front = Front(channel, conninfo, port)
        doctor = await front.doctor(max_patients_per_day=20)
        patient = await front.patient(given_name="Łukasz", family_name="Wiśniewski 李")
        watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
        await watch.read()
        booked = await front.book(patient.id, doctor.id, idempotency_key="k")
        again = await front.book(patient.id, doctor.id, idempotency_key="k")
        assert (again.replayed, again.appointment) == (True, booked.appointment)
        assert (await watch.read()).revision == booked.revision
        # All at once, so that they are decided together and wait for one another.
        people = await front.people(19)
        answers = await asyncio.gather(*(front.book(person.id, doctor.id) for person in people))
        assert sorted(answer.appointment.number for answer in answers) == list(range(2, 21))
        found = await front.patients.GetPatient(patient_pb2.GetPatientRequest(patient_id=patient.id))
        assert (found.patient.given_name, found.patient.family_name) == ("Łukasz", "Wiśniewski 李")

        sessions = (
            "select pid, extract(epoch from clock_timestamp() - state_change) from pg_stat_activity"
            " where datname = current_database() and application_name like 'frontdesk%' and state = 'idle'"
        )
        operator = make_conninfo(conninfo, options="-c statement_timeout=0")

        def idle() -> set[int]:
            """The sessions that have been idle for longer than the database allows."""
            return {pid for pid, seconds in ask(operator, sessions) if seconds > 0.2}

        await until(lambda: bool(idle()))
        assert (await front.check_in(booked.appointment.id)).entry.ticket == 1
        watch.cancel()
    await worker.stop()


async def test_what_a_session_is_set_to(create: Create) -> None:
    """Each hostile default is another value in our sessions; a stricter synchronous_commit stays."""
    for commit, expected in (("off", "on"), ("remote_apply", "remote_apply"), ("local", "local")):
        conninfo = create(**(HOSTILE | {"synchronous_commit": commit}))
        await asyncio.to_thread(migrate, conninfo)
        db = Database(conninfo, pool_size=1)
        await db.open()

        async def current(name: str, db: Database = db) -> str | None:
            return await db.row("select current_setting(%s)", (name,), str)

        assert await current("synchronous_commit") == expected
        assert await current("search_path") == "public"
        for name, value in {
            "transaction_isolation": "read committed",
            "lock_timeout": "0",
            "statement_timeout": "10s",
            "idle_session_timeout": "0",
            "idle_in_transaction_session_timeout": "1min",
            "client_connection_check_interval": "2s",
            "standard_conforming_strings": "on",
            "bytea_output": "hex",
            "DateStyle": "ISO, DMY",
            "TimeZone": "UTC",
            "client_encoding": "UTF8",
            "exit_on_error": "off",
        }.items():
            assert await current(name) == value, name
        await db.close()


# --- Schemas. ---


def test_a_schema_of_the_operators_choice(create: Create) -> None:
    """The tables live in the schema that the search path names; a database without that search path is refused."""
    conninfo = create(search_path="clinic")
    ask(conninfo, "create schema clinic")
    migrate(conninfo)
    check_schema(conninfo)
    assert (tables(conninfo), tables(conninfo, "clinic") > 5) == (0, True)
    name = conninfo_to_dict(conninfo)["dbname"]
    # As after a restore: the tables are there, the setting is not.
    ask(conninfo, f"alter database {name} reset search_path")
    for command in ("migrate", "serve"):
        assert "'clinic' holds a frontdesk" in refused(command, conninfo)
    assert tables(conninfo) == 0
    # What the line tells, helps.
    ask(conninfo, f"alter role current_user in database {name} set search_path = clinic")
    migrate(conninfo)
    check_schema(conninfo)


def test_an_odd_schema_name(create: Create) -> None:
    """A schema may have any name."""
    conninfo = create(search_path="'Front desk; \"q\"'")
    with psycopg.connect(conninfo) as connection:
        connection.execute(sql.SQL("create schema {}").format(sql.Identifier('Front desk; "q"')))
    migrate(conninfo)
    check_schema(conninfo)


@pytest.mark.parametrize("path", ["''", "nowhere", "pg_temp", "pg_catalog"])
def test_a_search_path_to_nowhere(create: Create, path: str) -> None:
    """A search path that names no schema is refused in one line."""
    conninfo = create(search_path=path)
    for command in ("migrate", "serve"):
        assert "search_path" in refused(command, conninfo)


async def test_a_schema_in_front_of_ours(create: Create, settings: Settings) -> None:
    """A later schema, earlier in the search path, with tables and functions of our names changes nothing."""
    conninfo = create()
    await asyncio.to_thread(migrate, conninfo)
    user = ask(conninfo, "select current_user")[0][0]
    ask(
        conninfo,
        f"create schema {user}; create table {user}.patient (id int); create table {user}.appointment (id int);"
        f" create function {user}.moment() returns timestamptz language sql as 'select null::timestamptz'",
    )
    await asyncio.to_thread(migrate, conninfo)
    await asyncio.to_thread(check_schema, conninfo)
    assert tables(conninfo, user) == 2
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        front = Front(channel, conninfo, port)
        doctor, patient = await front.doctor(), await front.patient()
        assert (await front.book(patient.id, doctor.id)).appointment.number == 1
    await worker.stop()


def test_a_foreign_alembic_version(create: Create) -> None:
    """Another application's Alembic in the same schema is left alone, and does not hinder ours."""
    conninfo = create()
    ask(
        conninfo, "create table alembic_version (version_num text); insert into alembic_version values ('abcdef012345')"
    )
    migrate(conninfo)
    migrate(conninfo)
    check_schema(conninfo)
    assert ask(conninfo, "select version_num from alembic_version") == [("abcdef012345",)]


@pytest.mark.parametrize(
    ("foreign", "named"),
    [
        ("create table patient (id int)", "patient"),
        ("create table installation (place text)", "installation"),
        ("create view appointment as select 1 as id", "appointment"),
        ("create type request as (id int)", "request"),
        ("create function moment() returns int language sql as 'select 1'", "moment"),
        (
            "create table alembic_version (version_num text); create table event (id int); create table slot (n int)",
            "slot",
        ),
    ],
)
def test_a_foreign_schema(create: Create, foreign: str, named: str) -> None:
    """A schema with another application's tables, types or functions of our names is refused, and stays as it is."""
    conninfo = create()
    ask(conninfo, foreign)
    before = tables(conninfo)
    assert named in refused("migrate", conninfo)
    assert "frontdesk migrate" in refused("serve", conninfo)
    assert tables(conninfo) == before


@pytest.mark.parametrize(
    "damage",
    [
        f"update {MARKER} set version_num = 'abcdef012345'",
        f"insert into {MARKER} values ('0000')",
        "delete from installation",
        "drop table installation",
        "alter table installation drop column schema",
        f"drop table {MARKER}",
    ],
)
def test_a_damaged_schema(create: Create, damage: str) -> None:
    """A schema whose own records were changed by hand is refused in one line, or repaired, and never a traceback."""
    conninfo = create()
    migrate(conninfo)
    ask(conninfo, damage)
    # So that there is a step to make.
    with pytest.raises(SchemaError) as refusal:
        ask_again(conninfo)
    assert "\n" not in str(refusal.value)


def ask_again(conninfo: str) -> None:
    migrate(conninfo)
    check_schema(conninfo)
    raise SchemaError("all is well")


def test_a_role_without_rights(create: Create, postgres: str) -> None:
    """A role that may not use the schema is refused in one line."""
    conninfo = create()
    migrate(conninfo)
    role = f"frontdesk_poor_{os.getpid()}"
    ask(postgres, f"create role {role}")
    try:
        poor = make_conninfo(conninfo, options=f"-c role={role}")
        for command in ("migrate", "serve"):
            assert re.search("permission denied", refused(command, poor))
    finally:
        ask(postgres, f"drop role {role}")
