"""One real PostgreSQL for the whole run, a new database for each test, and a real server on a free port.

`FRONTDESK_TEST_DATABASE_URL` names a PostgreSQL to use in place of the embedded one: 15 or newer, with a role that may
create databases.
"""

import itertools
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import grpc
import hypothesis
import psycopg
import pytest
import structlog
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from frontdesk.db.migrate import migrate
from frontdesk.process.postgres import EmbeddedPostgres
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings
from tests.clinic import Clock, Front
from tests.hostile.wire import serving
from tests.identities import add_identities

_numbers = itertools.count(1)

# Operators want one log line per call; the output of a failing test is easier to read without them.
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))

# `make test` tries some examples of each property, `make soak` many (--hypothesis-profile=soak).
hypothesis.settings.register_profile("test", max_examples=40, stateful_step_count=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("soak", max_examples=1000, stateful_step_count=100, deadline=None)
hypothesis.settings.load_profile("test")

# Each process of a parallel run has its own, also on a server that they share.
TEMPLATE = f"frontdesk_template_{os.getpid()}"


class _Postgres(EmbeddedPostgres):
    # Tests kill processes, never the machine, so written data survives without fsync.
    DURABILITY: ClassVar[Mapping[str, str]] = {**EmbeddedPostgres.DURABILITY, "fsync": "off", "full_page_writes": "off"}


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A connection string with the right to create databases."""
    given = os.environ.get("FRONTDESK_TEST_DATABASE_URL")
    if given:
        yield given
        return
    embedded = _Postgres(tmp_path_factory.mktemp("postgres"))
    embedded.start()
    try:
        yield embedded.conninfo
    finally:
        embedded.stop()


@pytest.fixture(scope="session")
def template(postgres: str) -> Iterator[str]:
    """The name of a migrated database, cloned for each test in some 20 ms."""
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"drop database if exists {TEMPLATE}")
        admin.execute(f"create database {TEMPLATE}")
    conninfo = make_conninfo(postgres, dbname=TEMPLATE)
    migrate(conninfo)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        add_identities(connection)
    yield TEMPLATE
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"drop database {TEMPLATE} with (force)")


@pytest.fixture
def conninfo(postgres: str, template: str) -> Iterator[str]:
    """A new database for this test."""
    name = f"frontdesk_test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"create database {name} template {template}")
        try:
            yield make_conninfo(postgres, dbname=name)
        finally:
            admin.execute(f"drop database {name} with (force)")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """The settings of the tests' servers."""
    return Settings(
        listen="127.0.0.1:0",
        data_dir=tmp_path,
        drain_seconds=5,
        log_level="warning",
        # A test says itself what happens in the background, and when slots are generated.
        background="off",
        slot_horizon_days=0,
        # A test makes all its calls from one address.
        address_requests_per_minute=100_000,
        user_requests_per_minute=100_000,
    )


@pytest.fixture
async def front(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A client of a real server on a new database."""
    worker = Worker(settings, conninfo)
    port = await worker.start("127.0.0.1:0")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Front(channel, conninfo, port)
    await worker.stop()


@pytest.fixture
def at(conninfo: str, settings: Settings) -> Clock:
    """A front desk whose clock stands still at this instant, on the test's database."""

    @asynccontextmanager
    async def open_at(instant: str) -> AsyncIterator[Front]:
        name = conninfo_to_dict(conninfo)["dbname"]
        with psycopg.connect(conninfo, autocommit=True) as admin:
            admin.execute(f"alter database {name} set frontdesk.now = '{instant}'".encode())
        async with serving(settings, conninfo) as (_, front):
            yield front

    return open_at
