"""The settings of a database session that the service relies on.

A database, a role or a connection string may have its own default for each of them. On a direct connection `prepare`
sets them all, so none of those defaults matters. A pooler that lends sessions by transaction hands a session to any
client, so there only the settings that the pooler carries along can be set, and the defaults of the others are checked.

`default_transaction_read_only` is not among them: operators use it to stop all writes, and the service respects it.
"""

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg.conninfo import conninfo_to_dict
from psycopg.types.string import TextLoader

MARKER = "frontdesk_version"
"""Alembic's table. It tells which schema is ours."""

_CONNECT_SECONDS = 5
"""Timeout for each host of the connection string, unless it has its own connect_timeout. Short, so that a server that
does not answer at all does not keep the service from the one that took over."""

STATEMENT_TIMEOUT = 10.0
"""Seconds after which PostgreSQL ends a statement by itself, if the cancel request of a deadline does not arrive."""

_CARRIED = {
    # PostgreSQL reports changes of these to its client, so a pooler knows them and sets them in each session it lends.
    "timezone": "UTC",
    "datestyle": "ISO",
    "standard_conforming_strings": "on",
}
RELIED_ON = {
    # Under any other level a decision does not see what was committed while it waited for its lock.
    "default_transaction_isolation": "read committed",
    # A call waits for its locks until its deadline. An error ends the statement, but not the session.
    "lock_timeout": "0",
    "exit_on_error": "off",
    # The meaning of names, values and comparisons.
    "timezone_abbreviations": "Default",
    "array_nulls": "on",
    "transform_null_equals": "off",
    "gin_fuzzy_search_limit": "0",
    "plpgsql.extra_errors": "none",
}
"""Each with its value as `current_setting` shows it. With another value the service answers wrongly, or not at all."""

_FORMS = {"bytea_output": "hex", "intervalstyle": "postgres", "extra_float_digits": "1"}
_TIMEOUTS = {"idle_session_timeout": "0", "idle_in_transaction_session_timeout": "60s", "transaction_timeout": "0"}
"""A pool keeps idle sessions open. A worker that hangs in a transaction loses it after a minute."""
_SAFEGUARDS = {
    # In case the cancel request of a deadline is lost.
    "statement_timeout": f"{STATEMENT_TIMEOUT:.0f}s",
    # A statement that waits for a lock ends soon after its worker was killed, so the next one can proceed.
    "client_connection_check_interval": "2s",
}
_ECONOMIES = {
    # Each of our statements needs one plan, whatever its values; planning a list again cost more than reading it.
    "plan_cache_mode": "force_generic_plan",
    # No statement here runs long enough for compiling it to pay off.
    "jit": "off",
}
_SINCE = {"transaction_timeout": 170000}
"""The first version of PostgreSQL that knows a setting, if it is newer than the oldest that we support."""

# An acknowledged booking is on the disk. Any stricter value is the operator's choice and stays.
_KEEP_COMMITS = (
    "select set_config('synchronous_commit', 'on', false) where current_setting('synchronous_commit') = 'off'"
)
# Only our schema, so that no other schema of the search path, now or later, hides one of our names.
_STAY_IN_OUR_SCHEMA = (
    "select set_config('search_path', relnamespace::regnamespace::text, false)"
    f" from pg_class where oid = to_regclass('{MARKER}')"
)


def _known(settings: dict[str, str], server_version: int) -> dict[str, str]:
    return {name: value for name, value in settings.items() if server_version >= _SINCE.get(name, 0)}


def _set(settings: dict[str, str], how: str = "set") -> list[str]:
    return [f"{how} {name} = '{value}'" for name, value in settings.items()]


def options(conninfo: str) -> dict[str, Any]:
    """The options of a connection, whatever it is for, that the connection string does not give."""
    # PostgreSQL applies the encoding before it sends the first text.
    own: dict[str, Any] = {"client_encoding": "UTF8"}
    return own if "connect_timeout" in conninfo_to_dict(conninfo) else own | {"connect_timeout": _CONNECT_SECONDS}


def direct(server_version: int) -> str:
    """The statements that set up a session on a direct connection; the last answers whether it leads to our schema."""
    settings = _CARRIED | RELIED_ON | _FORMS | _TIMEOUTS | _SAFEGUARDS | _ECONOMIES
    known = _known(settings, server_version)
    found = f"select to_regclass('{MARKER}') is not null"
    return "; ".join([*_set(known), _KEEP_COMMITS, _STAY_IN_OUR_SCHEMA, found])


def one_transaction(server_version: int) -> str:
    """The statements that begin a transaction of any length; they leave nothing behind in the session."""
    settings = _known(_CARRIED | RELIED_ON | _TIMEOUTS | {"statement_timeout": "0"}, server_version)
    return "; ".join(["set transaction isolation level read committed", *_set(settings, "set local")])


async def prepare(connection: AsyncConnection[Any]) -> None:
    """Set up a new session on a direct connection.

    Raises OperationalError if its search path does not lead to our schema.
    """
    _load_ids_as_text(connection)
    # Several statements in one round trip cannot be prepared.
    cursor = await connection.execute(direct(connection.info.server_version).encode(), prepare=False)
    while cursor.nextset():
        pass
    if await cursor.fetchone() != (True,):
        raise psycopg.OperationalError(f"the search path does not lead to a table {MARKER}")


async def prepare_pooled(connection: AsyncConnection[Any]) -> None:
    """Set up a new connection to a pooler."""
    _load_ids_as_text(connection)
    await connection.execute("; ".join(_set(_CARRIED)).encode())


def _load_ids_as_text(connection: AsyncConnection[Any]) -> None:
    # Ids are text on both sides of this service, so a UUID object between them would be of no use.
    connection.adapters.register_loader("uuid", TextLoader)


CHECKED_BEHIND_POOLER = (*RELIED_ON, *_SAFEGUARDS, "synchronous_commit")
"""The settings that the next two functions look at."""


def unusable(defaults: Mapping[str, str | None]) -> dict[str, str]:
    """The settings that would make a session behind a pooler answer wrongly or lose a booking, each with a right value.

    `defaults` are those of such a session, as `current_setting` shows them.
    """
    wrong = {name: value for name, value in RELIED_ON.items() if defaults[name] not in (value, None)}
    return wrong | ({"synchronous_commit": "on"} if defaults["synchronous_commit"] == "off" else {})


def lacking_safeguards(defaults: Mapping[str, str | None]) -> dict[str, str]:
    """The safeguards that a session behind a pooler lacks, each with the value to set; `defaults` as in `unusable`.

    They only limit how long a lost statement goes on.
    """
    return {name: value for name, value in _SAFEGUARDS.items() if defaults[name] == "0"}
