"""Bring a database to the schema of this release, and check whether this release may serve it.

Alembic steps (`migrations/`) create the tables. The functions of `sql/` are created again after them, whenever their
text has changed: they hold no data, and one readable text a noun is worth more than a history of patches.

The schema's number is that of its last step. A release that changes `sql/` alone has a step of its own too, an empty
one, so that the later of two releases is known. ARCHITECTURE.md, Upgrades, says how a schema changes under running
servers.
"""

import hashlib
import random
import time
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import psycopg
import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

SQL_FILES = (
    # Before the tables: the defaults of columns and the conditions of indexes call these.
    "time.sql", "state.sql",
    # After the tables, in the order in which they build on one another.
    "request.sql", "clinic.sql", "lock.sql", "key.sql", "change.sql", "place.sql", "appointment.sql", "queue.sql",
    "doctor.sql", "slot.sql", "decide.sql",
)  # fmt: skip
_BEFORE_TABLES = 2

OLDEST_POSTGRESQL = 150000

SERVES_FROM = 1
"""The number of the oldest release that still runs on the schema of this one. Raise it with a step that removes, or
gives another meaning to, something which that release still uses."""

_LOCK_TIMEOUT = 0.4
"""Seconds that a step waits for a table. Later statements wait behind it, so it gives way and tries again. Shorter than
PostgreSQL's deadlock_timeout, so that in a deadlock with a call it is never the call that is ended."""
_PATIENCE = 60.0
"""Seconds after which a step that did not get its table gives up."""

_log = structlog.get_logger("frontdesk.migrate")


class SchemaError(Exception):
    """The database cannot be used as it is; the message is one line that says what to do."""


class _Installed(NamedTuple):
    """The schema of a database, as it is recorded there."""

    number: int
    serves_from: int
    functions: str


def _engine(conninfo: str) -> sa.Engine:
    # Nothing is prepared: a pooler that shares sessions by transaction would lose it.
    return sa.create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(conninfo, prepare_threshold=None, connect_timeout=10),
        poolclass=sa.NullPool,
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _functions() -> tuple[list[str], str]:
    texts = [files("frontdesk.db").joinpath("sql", name).read_text() for name in SQL_FILES]
    return texts, hashlib.sha256("".join(texts).encode()).hexdigest()


def newest() -> int:
    """The number of this release's schema."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return int(head)


def migrate(conninfo: str, *, default_time_zone: str = "UTC") -> int:
    """Create or update the schema in the database of `conninfo`, in one transaction; its number.

    The first migration also creates the default clinic, in `default_time_zone`. Safe to run at any time: several at
    once wait for one another, running calls go on, and the schema of a later release is left as it is. Raises
    SchemaError, also if other transactions hold a table for a minute.
    """
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            with _engine(conninfo).begin() as connection:
                return _migrate(connection, default_time_zone)
        except (sa.exc.DBAPIError, psycopg.Error) as error:
            cause = getattr(error, "orig", error)
            if not isinstance(cause, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
                raise SchemaError(f"the database refuses: {_first_line(error)}") from None
            if time.monotonic() > give_up:
                raise SchemaError(
                    f"other transactions have held a table that must change for {_PATIENCE:.0f} s: see "
                    "pg_stat_activity, end them, and run it again"
                ) from None
            _log.warning("schema_is_held", error=type(cause).__name__)
            # Long in comparison with the time for which it held up the others.
            time.sleep(random.uniform(1, 3) * _LOCK_TIMEOUT)


def _migrate(connection: sa.Connection, default_time_zone: str) -> int:
    texts, fingerprint = _functions()
    _refuse_old_postgresql(connection)
    connection.exec_driver_sql("select pg_advisory_xact_lock(hashtextextended('frontdesk migrate', 0))")
    found = _installed(connection)
    number = newest()
    if found is not None and found.number > number:
        _refuse_later(found, number)
        return found.number
    renew = found is None or found.functions != fingerprint
    connection.exec_driver_sql(f"set local lock_timeout = {int(_LOCK_TIMEOUT * 1000)}")
    if renew:
        for text in texts[:_BEFORE_TABLES]:
            connection.exec_driver_sql(text.replace("%", "%%"))
    config = _config()
    config.attributes["connection"] = connection
    config.attributes["default_time_zone"] = default_time_zone
    command.upgrade(config, "head")
    if renew:
        for text in texts[_BEFORE_TABLES:]:
            connection.exec_driver_sql(text.replace("%", "%%"))
    installed = _Installed(number, SERVES_FROM, fingerprint)
    if found != installed:
        connection.exec_driver_sql("delete from installation")
        connection.execute(
            sa.text(
                "insert into installation (schema, serves_from, functions) values (:number, :serves_from, :functions)"
            ),
            installed._asdict(),
        )
    return number


def check_schema(conninfo: str) -> None:
    """Raise SchemaError if this release may not serve the database's schema; runs no DDL."""
    number = newest()
    try:
        with _engine(conninfo).connect() as connection:
            _refuse_old_postgresql(connection)
            found = _installed(connection)
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise SchemaError(f"the database refuses: {_first_line(error)}") from None
    if found is not None and found.number > number:
        _refuse_later(found, number)
    elif found is None or found.number < number or found.functions != _functions()[1]:
        there = "has no schema of frontdesk" if found is None else f"has schema {found.number}"
        raise SchemaError(
            f"the database {there}, this release needs {number}: run `frontdesk migrate --database-url URL`"
        )


def _installed(connection: sa.Connection) -> _Installed | None:
    if not sa.inspect(connection).has_table("installation"):
        return None
    row = connection.exec_driver_sql("select schema, serves_from, functions from installation").one()
    return _Installed(*row)


def _refuse_later(found: _Installed, number: int) -> None:
    if found.serves_from > number:
        raise SchemaError(
            f"the database has schema {found.number}, which serves releases from {found.serves_from} on, and this is "
            f"{number}: run a later release"
        )


def _refuse_old_postgresql(connection: sa.Connection) -> None:
    version = int(connection.exec_driver_sql("show server_version_num").scalar_one())
    if version < OLDEST_POSTGRESQL:
        raise SchemaError(f"PostgreSQL {version // 10000} is too old: 15 or newer is needed")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", error)).strip().partition("\n")[0]
