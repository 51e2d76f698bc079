"""The pool of connections, and how the core talks through it: decisions, reads and transactions.

Errors of the driver never leave this module: what the database refuses becomes one of `frontdesk.errors`, anything
unforeseen stays an exception, which `frontdesk.rpc.pipeline` answers as INTERNAL.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
import structlog
from psycopg import AsyncConnection, errors
from psycopg.abc import Params
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


class Database:
    """PostgreSQL, as one worker sees it."""

    def __init__(self, conninfo: str, *, pool_size: int) -> None:
        self._conninfo = conninfo
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
            kwargs={"prepare_threshold": 0, "application_name": "frontdesk", **_LINE},
            configure=_configure,
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

    async def rows(self, query: str, params: Params, make: Callable[..., T]) -> list[T]:
        """One statement, answered by its rows.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.rows(query, params, make))

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

    async def _try(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        for attempt in range(_ATTEMPTS):
            try:
                async with self._pool.connection() as connection:
                    try:
                        return await work(Transaction(connection))
                    except errors.ReadOnlySqlTransaction:
                        # A connection stays as it was opened: writable ones have to be opened anew.
                        await connection.close()
                        raise
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
                _log.warning("database_unavailable", error=type(error).__name__)
                self._look_over_idle_connections()
                raise DatabaseUnavailable from None
        raise Conflict

    def _look_over_idle_connections(self) -> None:
        # Where one connection was cut the others may be: find out now, not one failing call at a time.
        if self._look_over is None or self._look_over.done():
            self._look_over = asyncio.create_task(self._pool.check())

    @asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[AsyncIterator[str]]:
        """A connection of its own that listens on `channel`; iterate over the payloads. Raises psycopg errors."""
        connection = await AsyncConnection.connect(self._conninfo, application_name="frontdesk listen", **_LINE)
        try:
            await connection.execute(f"listen {channel}".encode())

            async def payloads() -> AsyncIterator[str]:
                async for notification in connection.notifies():
                    yield notification.payload

            yield payloads()
        finally:
            await connection.close()


async def _configure(connection: AsyncConnection[Any]) -> None:
    # Ids are text on both sides of this service; a UUID object between them would serve nobody.
    connection.adapters.register_loader("uuid", TextLoader)
    await connection.execute(f"set statement_timeout = {int(STATEMENT_TIMEOUT * 1000)}".encode())
    # A statement that waits for a lock ends soon after its worker was killed, and lets the next one through.
    await connection.execute(b"set client_connection_check_interval = '2s'")
    # Whatever the database's defaults: what is read here is read in these forms.
    await connection.execute(b"set timezone = 'UTC'")
    await connection.execute(b"set datestyle = 'ISO'")
    # Each of our statements has one shape of plan, whatever its values; planning the lists anew cost more than reading.
    await connection.execute(b"set plan_cache_mode = force_generic_plan")
    # No statement here runs for so long that compiling it would pay.
    await connection.execute(b"set jit = off")
