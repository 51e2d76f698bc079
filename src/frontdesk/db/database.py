"""The pool of connections, and how the core talks through it: decisions, reads and transactions.

Errors of the driver never leave this module: what the database refuses becomes one of `frontdesk.errors`, anything
unforeseen stays an exception, which `frontdesk.rpc.pipeline` answers as INTERNAL.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import psycopg
import sqlalchemy as sa
import structlog
from psycopg import AsyncConnection, errors
from psycopg.abc import Params
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import RowMaker
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from sqlalchemy.dialects import postgresql

from frontdesk.errors import Conflict, DatabaseUnavailable

T = TypeVar("T")

STATEMENT_TIMEOUT = 10.0
"""Seconds after which PostgreSQL ends a statement by itself, should the cancel request of a deadline not reach it."""

_ATTEMPTS = 5
_POOL_WAIT = 3.0
_CONNECT_SECONDS = 5
"""For each of the hosts of the connection string, unless that has its own connect_timeout: a server that has vanished
without a word must not keep a service from the one that took over."""
_LINE: dict[str, Any] = {
    "autocommit": True,
    # A network that drops packets in silence is found out within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
_NOT_NOW = (
    psycopg.OperationalError,  # connection lost, refused, too many connections, shutting down
    psycopg.InterfaceError,  # the connection is closed
    errors.ReadOnlySqlTransaction,  # a primary that became a standby
    PoolTimeout,
)
_TRY_AGAIN = (errors.SerializationFailure, errors.DeadlockDetected)
# A step of a migration was committed meanwhile: what was prepared would answer otherwise now, or what the function had
# begun to fill in has another shape than it must return. The statement has done nothing.
_STALE = (errors.FeatureNotSupported, errors.InvalidSqlStatementName, errors.DatatypeMismatch)

_UNTRACED = nullcontext()

_SAFEGUARDS = {
    # Should the cancel request of a deadline get lost.
    "statement_timeout": f"{STATEMENT_TIMEOUT:.0f}s",
    # A statement that waits for a lock ends soon after its worker was killed, and lets the next one through.
    "client_connection_check_interval": "2s",
}
_ECONOMIES = {
    # Each of our statements has one shape of plan, whatever its values; planning the lists anew cost more than reading.
    "plan_cache_mode": "force_generic_plan",
    # No statement here runs for so long that compiling it would pay.
    "jit": "off",
}


class Taken(Exception):
    """A unique constraint, whose name this is, does not allow the row."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


_log = structlog.get_logger("frontdesk.database")
_dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


def compiled(statement: sa.sql.ClauseElement) -> str:
    """The text of a Core statement for `Database.rows`, with its bind parameters by name.

    Compile once and keep it: that costs more than the query.
    """
    text = statement.compile(dialect=_dialect)
    assert all(value is None for value in text.params.values()), "write constants as literals: only the text is kept"
    return str(text)


class Transaction:
    """Statements that happen together or not at all."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    async def row(self, query: str, params: Params, make: Callable[..., T]) -> T | None:
        """The first row of the query, made by calling `make` with its columns; None where there is none."""
        cursor = self._connection.cursor(row_factory=_rows_by(make))
        await cursor.execute(query.encode(), params)
        return await cursor.fetchone()

    async def rows(self, query: str, params: Params, make: Callable[..., T]) -> list[T]:
        """Every row of the query, each made by calling `make` with its columns."""
        cursor = self._connection.cursor(row_factory=_rows_by(make))
        await cursor.execute(query.encode(), params)
        return await cursor.fetchall()

    async def run(self, query: str, params: Params) -> int:
        """Run a statement without an answer; how many rows it changed."""
        return (await self._connection.execute(query.encode(), params)).rowcount


def _rows_by(make: Callable[..., T]) -> Callable[[Any], RowMaker[T]]:
    return lambda cursor: lambda values: make(*values)


class Tracing(Protocol):
    """Makes a span for each statement."""

    def transaction(self, connection: AsyncConnection[Any]) -> Transaction: ...

    def statement(self, query: str) -> AbstractContextManager[None]: ...


class Database:
    """PostgreSQL, as one worker sees it."""

    def __init__(
        self,
        conninfo: str,
        *,
        pool_size: int,
        pooled: bool = False,
        direct: str | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """`pooled`: between us and PostgreSQL a pooler gives each transaction another session. `direct` is a way around
        it, for `listening`; without a pooler `conninfo` is one.
        """
        self._transaction = Transaction if tracing is None else tracing.transaction
        self.statement = _untraced if tracing is None else tracing.statement
        """A context manager around the wait for a statement that is made for several callers; takes its query."""
        self._direct = direct or (None if pooled else conninfo)
        self._look_over: asyncio.Task[None] | None = None
        self._pool = AsyncConnectionPool(
            conninfo,
            min_size=min(2, pool_size),
            max_size=pool_size,
            open=False,
            timeout=_POOL_WAIT,
            # The pool's pauses between attempts double until this time is over, and begin anew with the next call: kept
            # short, the service is back within two seconds of the database.
            reconnect_timeout=2.0,
            kwargs={
                "prepare_threshold": None if pooled else 0,
                "application_name": "frontdesk",
                **_LINE,
                **_patience(conninfo),
            },
            configure=_configure_pooled if pooled else _configure,
        )

    async def open(self) -> None:
        """Begin to connect; does not wait for the database to be there."""
        await self._pool.open()

    async def close(self) -> None:
        """Give every connection back."""
        if self._look_over is not None:
            self._look_over.cancel()
        await self._pool.close()

    async def row(self, query: str, params: Params, make: Callable[..., T]) -> T | None:
        """One statement, answered by its first row or None.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.row(query, params, make))

    async def rows(
        self, query: str, params: Params, make: Callable[..., T], *, on: AsyncConnection[Any] | None = None
    ) -> list[T]:
        """One statement, answered by its rows; on a connection from `connection`, or on any.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.rows(query, params, make), on)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection[Any]]:
        """A connection for statements that follow one another closely.

        It spares the pool's work for each, and what PostgreSQL's process behind it has at hand stays of use.

        Raises DatabaseUnavailable.
        """
        try:
            async with self._pool.connection() as connection:
                yield connection
        except _NOT_NOW as error:
            raise self._unavailable(error) from None

    async def run(self, query: str, params: Params) -> int:
        """One statement without an answer; how many rows it changed.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.run(query, params))

    async def transaction(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Do `work` in one transaction, and again from its beginning where the database asks for that.

        Raises DatabaseUnavailable, Conflict, and what `work` raises, which undoes it.
        """

        async def together(tx: Transaction) -> T:
            async with tx._connection.transaction():
                return await work(tx)

        return await self._try(together)

    async def _try(self, work: Callable[[Transaction], Awaitable[T]], held: AsyncConnection[Any] | None = None) -> T:
        for attempt in range(_ATTEMPTS):
            try:
                async with self._pool.connection() if held is None else nullcontext(held) as connection:
                    try:
                        return await work(self._transaction(connection))
                    except _STALE as error:
                        _log.warning("prepared_anew", error=type(error).__name__)
                        await connection.execute(b"deallocate all")
                        return await work(self._transaction(connection))
                    except errors.ReadOnlySqlTransaction:
                        # A connection stays as it was opened: writable ones have to be opened anew.
                        await connection.close()
                        raise
                    except psycopg.InternalError as error:
                        if error.sqlstate is not None:
                            raise
                        # Not PostgreSQL's: the driver got half an answer, or two, as the connection was cut.
                        await connection.close()
                        raise psycopg.OperationalError from error
            except errors.QueryCanceled:
                # PostgreSQL's own limit; the deadline of the call is over as well.
                raise TimeoutError from None
            except errors.LockNotAvailable:
                raise Conflict from None
            except errors.UniqueViolation as error:
                raise Taken(error.diag.constraint_name or "") from error
            except _TRY_AGAIN:
                await asyncio.sleep(random.uniform(0, 0.01 * 2**attempt))
            except _NOT_NOW as error:
                raise self._unavailable(error) from None
        raise Conflict

    def _unavailable(self, error: Exception) -> DatabaseUnavailable:
        _log.warning("database_unavailable", error=type(error).__name__)
        # Where one connection was cut the others may be: find out now, not one failing call at a time.
        if self._look_over is None or self._look_over.done():
            self._look_over = asyncio.create_task(self._pool.check())
        return DatabaseUnavailable()

    def pool_stats(self) -> dict[str, int]:
        """What the pool says of itself, by the names of psycopg_pool."""
        return self._pool.get_stats()

    @property
    def listens(self) -> bool:
        """Whether `listening` is to be had: not through a pooler that shares sessions."""
        return self._direct is not None

    @asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[AsyncIterator[str]]:
        """A connection of its own that listens on `channel`; iterate over the payloads. Raises psycopg errors."""
        assert self._direct is not None
        connection = await AsyncConnection.connect(
            self._direct, application_name="frontdesk listen", **_LINE, **_patience(self._direct)
        )
        try:
            await connection.execute(f"listen {channel}".encode())

            async def payloads() -> AsyncIterator[str]:
                async for notification in connection.notifies():
                    yield notification.payload

            yield payloads()
        finally:
            await connection.close()


def _untraced(query: str) -> AbstractContextManager[None]:
    return _UNTRACED


def lacking_safeguards(conninfo: str) -> dict[str, str]:
    """What a session behind a pooler ought to have by default and has not, with the value to give it.

    There a session is set up for whoever comes next, so what `_configure` sets has to be the role's own. Nothing
    depends on it but how long a lost statement goes on. Raises psycopg errors.
    """
    with psycopg.connect(conninfo, autocommit=True, prepare_threshold=None, **_patience(conninfo)) as connection:
        off = connection.execute(
            "select name from pg_settings where name = any (%s) and setting = '0'", (list(_SAFEGUARDS),)
        )
        return {name: _SAFEGUARDS[name] for (name,) in off}


def _patience(conninfo: str) -> dict[str, Any]:
    return {} if "connect_timeout" in conninfo_to_dict(conninfo) else {"connect_timeout": _CONNECT_SECONDS}


async def _configure(connection: AsyncConnection[Any]) -> None:
    await _configure_pooled(connection)
    for name, value in (_SAFEGUARDS | _ECONOMIES).items():
        await connection.execute(f"set {name} = '{value}'".encode())


async def _configure_pooled(connection: AsyncConnection[Any]) -> None:
    # Ids are text on both sides of this service; a UUID object between them would serve nobody.
    connection.adapters.register_loader("uuid", TextLoader)
    # Whatever the database's defaults: what is read here is read in these forms. PostgreSQL reports these two to its
    # client, so a pooler knows them, and gives them to each session that it lends.
    await connection.execute(b"set timezone = 'UTC'")
    await connection.execute(b"set datestyle = 'ISO'")
