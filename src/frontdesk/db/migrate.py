"""Bring a database to the schema of this release, and check whether this release may serve it.

Alembic steps (`migrations/`) create the tables. The functions of `sql/` are created again after them, whenever their
text has changed: they hold no data, and one readable text a noun is worth more than a history of patches.

The schema's number is that of its last step. A release that changes `sql/` alone has a step of its own too, an empty
one, so that the later of two releases is known. ARCHITECTURE.md, Upgrades, says how a schema changes under running
servers.
"""

import hashlib
import random
import re
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
from alembic.util import CommandError

from frontdesk.db import session
from frontdesk.db.schema import metadata

SQL_FILES = (
    # Before the tables: the defaults of columns and the conditions of indexes call these.
    "time.sql", "state.sql",
    # After the tables, in the order in which they build on one another.
    "request.sql", "clinic.sql", "lock.sql", "key.sql", "seal.sql", "change.sql", "patient.sql", "leave.sql",
    "hold.sql", "place.sql", "waitlist.sql", "appointment.sql", "queue.sql", "undo.sql", "doctor.sql", "schedule.sql",
    "slot.sql", "limit.sql", "access.sql", "decide.sql", "retention.sql", "event.sql", "notification.sql",
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

_CREATED = re.compile(r"\bcreate (?:or replace )?(type|function) (\w+)")
_ERRORS = (sa.exc.DBAPIError, psycopg.Error, CommandError)

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
        creator=lambda: psycopg.connect(conninfo, prepare_threshold=None, **session.options(conninfo)),
        poolclass=sa.NullPool,
    )


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _functions() -> tuple[list[str], str]:
    texts = [files("frontdesk.db").joinpath("sql", name).read_text(encoding="utf-8") for name in SQL_FILES]
    return texts, hashlib.sha256("".join(texts).encode()).hexdigest()


def newest() -> int:
    """The number of this release's schema."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None
    return int(head)


def migrate(conninfo: str, *, default_time_zone: str = "UTC", service_role: str | None = None) -> int:
    """Create or update the schema in the database of `conninfo`, in one transaction; its number.

    The first migration also creates the default clinic, in `default_time_zone`. `service_role` gets the rights that a
    service needs, which are less than its owner's: it can only add to the log. Safe to run at any time: several at
    once wait for one another, running calls go on, and the schema of a later release is left as it is. Raises
    SchemaError, also if other transactions hold a table for a minute.
    """
    give_up = time.monotonic() + _PATIENCE
    while True:
        try:
            with _engine(conninfo).begin() as connection:
                number = _migrate(connection, default_time_zone)
                if service_role is not None:
                    _grant(connection, service_role)
                return number
        except _ERRORS as error:
            cause = getattr(error, "orig", error)
            if not isinstance(cause, psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected):
                raise _refusal(error) from None
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
    _begin(connection)
    _refuse_unusable_database(connection)
    connection.exec_driver_sql("select pg_advisory_xact_lock(hashtextextended('frontdesk migrate', 0))")
    schema = _schema(connection)
    found = _installed(connection) if schema.is_ours else None
    if found is None:
        _refuse_foreign_schema(connection, schema.name)
    # Nothing is created in, or found in, another schema of the search path.
    connection.exec_driver_sql("select set_config('search_path', quote_ident(%s), true)", (schema.name,))
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


def _grant(connection: sa.Connection, role: str) -> None:
    schema = connection.exec_driver_sql("select quote_ident(current_schema())").scalar_one()
    for statement in (
        f"grant usage on schema {schema} to {role}",
        f"grant select, insert, update, delete on all tables in schema {schema} to {role}",
        f"revoke update, delete, truncate on log, seal from {role}",
    ):
        connection.exec_driver_sql(statement)


def check_schema(conninfo: str, *, pooled: bool = False) -> None:
    """Raise SchemaError if this release may not serve the database; runs no DDL.

    `pooled`: `conninfo` leads to a pooler, behind which the role must have settings that we cannot make.
    """
    number = newest()
    try:
        with _engine(conninfo).connect() as connection:
            if pooled:
                _check_pooled_session(connection)
                connection.rollback()
            _begin(connection)
            _refuse_unusable_database(connection)
            found = _installed(connection) if _schema(connection).is_ours else None
            if found is not None:
                # A `frontdesk.now` that is not a time would fail every call.
                connection.exec_driver_sql("select moment()")
    except _ERRORS as error:
        raise _refusal(error) from None
    if found is not None and found.number > number:
        _refuse_later(found, number)
    elif found is None or found.number < number or found.functions != _functions()[1]:
        there = "has no schema of frontdesk" if found is None else f"has schema {found.number}"
        raise SchemaError(
            f"the database {there}, this release needs {number}: run `frontdesk migrate --database-url URL`"
        )


class _Schema(NamedTuple):
    """The schema to which the search path leads."""

    name: str
    is_ours: bool


def _schema(connection: sa.Connection) -> _Schema:
    ours = connection.exec_driver_sql(
        "select nspname, pg_table_is_visible(c.oid) from pg_class c join pg_namespace n on n.oid = relnamespace"
        " where relname = %s and relkind = 'r' and has_schema_privilege(n.oid, 'usage') order by 2 desc, 1",
        (session.MARKER,),
    ).all()
    if ours and ours[0][1]:
        return _Schema(ours[0][0], is_ours=True)
    path, current = connection.exec_driver_sql("select current_setting('search_path'), current_schema()").one()
    if ours:
        raise SchemaError(
            f"the database's schema {ours[0][0]!r} holds a frontdesk, but the search_path of this role, {path!r}, does "
            f"not lead there: alter role … in database … set search_path = {ours[0][0]}"
        )
    if current is None or current.startswith("pg_"):
        raise SchemaError(f"the search_path of this role, {path!r}, names no schema that exists: alter role … set it")
    return _Schema(current, is_ours=False)


def _installed(connection: sa.Connection) -> _Installed:
    row = connection.exec_driver_sql("select schema, serves_from, functions from installation").first()
    if row is None:
        raise SchemaError("the table installation is empty: restore a backup")
    return _Installed(*row)


def _refuse_foreign_schema(connection: sa.Connection, schema: str) -> None:
    """Raise SchemaError if the schema has tables, types or functions of our names that we did not create."""
    created = [found for text in _functions()[0] for found in _CREATED.findall(text)]
    types = {*metadata.tables, *(name for kind, name in created if kind == "type")}
    functions = {name for kind, name in created if kind == "function"}
    foreign = connection.exec_driver_sql(
        # Each table is a type as well.
        "select typname from pg_type join pg_namespace n on n.oid = typnamespace"
        " where nspname = %s and typname = any (%s)"
        " union select proname from pg_proc join pg_namespace n on n.oid = pronamespace"
        " where nspname = %s and proname = any (%s) order by 1",
        (schema, sorted(types), schema, sorted(functions)),
    ).scalars()
    if names := ", ".join(foreign):
        raise SchemaError(
            f"the database's schema {schema!r} has a {names} that is not frontdesk's: create a database of its own for "
            "frontdesk"
        )


def _begin(connection: sa.Connection) -> None:
    version = connection.dialect.server_version_info
    assert version is not None
    connection.exec_driver_sql(session.one_transaction(int(version[0]) * 10000))


def _refuse_unusable_database(connection: sa.Connection) -> None:
    version, encoding, standby, read_only = connection.exec_driver_sql(
        "select current_setting('server_version_num')::int, current_setting('server_encoding'), pg_is_in_recovery(),"
        " current_setting('default_transaction_read_only')::boolean"
    ).one()
    if version < OLDEST_POSTGRESQL:
        raise SchemaError(f"PostgreSQL {version // 10000} is too old: 15 or newer is needed")
    if encoding != "UTF8":
        raise SchemaError(
            f"the database's encoding is {encoding}, which cannot hold every name: create a database with "
            "`encoding 'UTF8' template template0`"
        )
    if read_only and not standby:
        raise SchemaError(
            "the database takes no changes: default_transaction_read_only is on for the database, for this role or in "
            "the URL"
        )


def _check_pooled_session(connection: sa.Connection) -> None:
    """Raise SchemaError if a session has settings that it must not have, and log a warning for each recommended one."""
    defaults: dict[str, str | None] = dict(
        connection.exec_driver_sql(
            "select name, current_setting(name, true) from unnest(%s::text[]) name",
            (list(session.CHECKED_BEHIND_POOLER),),
        ).all()
    )
    if wrong := session.unusable(defaults):
        role, database = connection.exec_driver_sql("select current_user, current_database()").one()
        statements = "; ".join(
            f"alter role {role} in database {database} set {name} = '{value}'" for name, value in wrong.items()
        )
        raise SchemaError(f"behind a pooler the role's own settings hold, and these must be others: {statements}")
    for name, value in session.lacking_safeguards(defaults).items():
        _log.warning("safeguard_is_off", setting=name, recommended=value)


def _refuse_later(found: _Installed, number: int) -> None:
    if found.serves_from > number:
        raise SchemaError(
            f"the database has schema {found.number}, which serves releases from {found.serves_from} on, and this is "
            f"{number}: run a later release"
        )


def _refusal(error: Exception) -> SchemaError:
    line = str(getattr(error, "orig", error)).strip().partition("\n")[0]
    return SchemaError(f"the database refuses: {line}")
