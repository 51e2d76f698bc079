"""Bring a database to the schema of this release, and tell whether it is there.

Tables come by Alembic steps (`migrations/`). The functions of `sql/` are made again after them, whenever their text has
changed: they hold no data, and one readable text a noun is worth more than a history of patches.
"""

import hashlib
from importlib.resources import files
from pathlib import Path

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

SQL_FILES = ("basics.sql", "appointments.sql", "doctors.sql", "slots.sql")
"""In the order in which they build on one another; the defaults of columns are among the first's."""

OLDEST_SERVER = 150000


class SchemaError(Exception):
    """The database cannot be used as it is; the message is one line that names the way out."""


def _engine(conninfo: str) -> sa.Engine:
    return sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo), poolclass=sa.NullPool)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    return config


def _functions() -> tuple[list[str], str]:
    texts = [files("frontdesk.db").joinpath("sql", name).read_text() for name in SQL_FILES]
    return texts, hashlib.sha256("".join(texts).encode()).hexdigest()


def migrate(conninfo: str, *, default_time_zone: str = "UTC") -> None:
    """Make or bring up to date the schema in the database of `conninfo`, in one transaction.

    The first migration also makes the default clinic, in `default_time_zone`. Safe to run at any time, also by several
    at once: one works, the others wait and find nothing to do. Raises SchemaError.
    """
    texts, fingerprint = _functions()
    try:
        with _engine(conninfo).begin() as connection:
            _refuse_old_server(connection)
            connection.exec_driver_sql("select pg_advisory_xact_lock(hashtextextended('frontdesk migrate', 0))")
            found = None
            if sa.inspect(connection).has_table("installation"):
                found = connection.exec_driver_sql("select functions from installation").scalar()
            if found != fingerprint:
                connection.exec_driver_sql(texts[0].replace("%", "%%"))
            config = _config()
            config.attributes["connection"] = connection
            config.attributes["default_time_zone"] = default_time_zone
            command.upgrade(config, "head")
            if found != fingerprint:
                for text in texts[1:]:
                    connection.exec_driver_sql(text.replace("%", "%%"))
                connection.exec_driver_sql("delete from installation")
                connection.execute(sa.text("insert into installation (functions) values (:f)"), {"f": fingerprint})
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise SchemaError(f"the database refuses: {_first_line(error)}") from None


def check_schema(conninfo: str) -> None:
    """Raise SchemaError where the schema is not the one of this release; runs no DDL."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    try:
        with _engine(conninfo).connect() as connection:
            _refuse_old_server(connection)
            current = MigrationContext.configure(connection).get_current_revision()
            functions = None
            if current == head:
                functions = connection.exec_driver_sql("select functions from installation").scalar()
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        raise SchemaError(f"the database refuses: {_first_line(error)}") from None
    if current != head or functions != _functions()[1]:
        raise SchemaError(
            f"the database's schema is at {current or 'nothing'}, not at {head} of this release: "
            "run `frontdesk migrate --database-url URL`"
        )


def _refuse_old_server(connection: sa.Connection) -> None:
    version = int(connection.exec_driver_sql("show server_version_num").scalar_one())
    if version < OLDEST_SERVER:
        raise SchemaError(f"PostgreSQL {version // 10000} is too old: 15 or newer is needed")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", error)).strip().partition("\n")[0]
