"""The pool of connections, and how the core uses it: decisions, reads and transactions.

The driver's errors never leave this module: a refusal of the database becomes one of `frontdesk.errors`; any unforeseen
error stays an exception, which `frontdesk.rpc.pipeline` answers as INTERNAL.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import psycopg
import sqlalchemy as sa
import structlog
from psycopg import AsyncConnection, errors
from psycopg.abc import Params
from psycopg.rows import RowMaker
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from sqlalchemy.dialects import postgresql

from frontdesk.db import session
from frontdesk.errors import Conflict, DatabaseUnavailable

T = TypeVar("T")

_ATTEMPTS = 5
_POOL_WAIT = 3.0
_CONNECTION: dict[str, Any] = {
    "autocommit": True,
    # A network that drops packets silently is noticed within half a minute.
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
# A step of a migration was committed meanwhile: the answer of a prepared statement would change its type, or the row
# that a function had begun to fill has another shape than it must return. The statement has done nothing.
_STALE = (errors.FeatureNotSupported, errors.InvalidSqlStatementName, errors.DatatypeMismatch)

_UNTRACED = nullcontext()


class Taken(Exception):
    """The unique constraint of this name does not allow the row."""

    def __init__(self, constraint: str) -> None:
        super().__init__(constraint)
        self.constraint = constraint


_log = structlog.get_logger("frontdesk.database")
_dialect = postgresql.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]


def compiled(statement: sa.sql.ClauseElement) -> str:
    """The text of a Core statement for `Database.rows`, with its bind parameters by name.

    Compile once and keep the text: compiling costs more than the query.
    """
    text = statement.compile(dialect=_dialect)
    assert all(value is None for value in text.params.values()), "write constants as literals: only the text is kept"
    return str(text)


class Transaction:
    """Statements that happen together or not at all."""

    def __init__(self, connection: AsyncConnection[Any]) -> None:
        self._connection = connection

    def savepoint(self) -> AbstractAsyncContextManager[Any]:
        """A block that is undone alone if it raises."""
        return self._connection.transaction()

    async def row(self, query: str, params: Params, make: Callable[..., T]) -> T | None:
        """The first row of the query, made by calling `make` with its columns; None if there is no row."""
        cursor = self._connection.cursor(row_factory=_rows_by(make))
        await cursor.execute(query.encode(), params)
        return await cursor.fetchone()

    async def rows(self, query: str, params: Params, make: Callable[..., T]) -> list[T]:
        """Every row of the query, each made by calling `make` with its columns."""
        cursor = self._connection.cursor(row_factory=_rows_by(make))
        await cursor.execute(query.encode(), params)
        return await cursor.fetchall()

    async def run(self, query: str, params: Params) -> int:
        """Run a statement that returns no rows; the number of rows that it changed."""
        return (await self._connection.execute(query.encode(), params)).rowcount


def _rows_by(make: Callable[..., T]) -> Callable[[Any], RowMaker[T]]:
    return lambda cursor: lambda values: make(*values)


class Tracing(Protocol):
    """Creates a span for each statement."""

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
        """`pooled`: a pooler between us and PostgreSQL gives each transaction another session. `direct` is a connection
        string that bypasses it, for `listening`; without a pooler `conninfo` itself does.
        """
        self._transaction = Transaction if tracing is None else tracing.transaction
        self.statement = _untraced if tracing is None else tracing.statement
        """A context manager around the wait for a statement that serves several callers; takes its query."""
        self._direct = direct or (None if pooled else conninfo)
        self._check: asyncio.Task[None] | None = None
        self._pool = AsyncConnectionPool(
            conninfo,
            min_size=min(2, pool_size),
            max_size=pool_size,
            open=False,
            timeout=_POOL_WAIT,
            # The pool's pauses between attempts double until this time is over, and start again with the next call.
            # Kept short, so that the service is back within two seconds of the database.
            reconnect_timeout=2.0,
            kwargs={
                "prepare_threshold": None if pooled else 0,
                "application_name": "frontdesk",
                **_CONNECTION,
                **session.options(conninfo),
            },
            configure=session.prepare_pooled if pooled else session.prepare,
        )

    async def open(self) -> None:
        """Begin to connect; does not wait until the database is available."""
        await self._pool.open()

    async def close(self) -> None:
        """Close every connection."""
        if self._check is not None:
            self._check.cancel()
        await self._pool.close()

    async def row(self, query: str, params: Params, make: Callable[..., T]) -> T | None:
        """Run one statement; its first row or None.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.row(query, params, make))

    async def rows(
        self, query: str, params: Params, make: Callable[..., T], *, on: AsyncConnection[Any] | None = None
    ) -> list[T]:
        """Run one statement; its rows. It runs on a connection from `connection`, or on any.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.rows(query, params, make), on)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[AsyncConnection[Any]]:
        """A connection for statements that follow one another closely.

        It saves the pool's work for each statement, and PostgreSQL's process keeps its caches warm.

        Raises DatabaseUnavailable.
        """
        try:
            async with self._pool.connection() as connection:
                yield connection
        except _NOT_NOW as error:
            raise self._unavailable(error) from None

    async def run(self, query: str, params: Params) -> int:
        """Run one statement that returns no rows; the number of rows that it changed.

        Raises DatabaseUnavailable, Conflict.
        """
        return await self._try(lambda tx: tx.run(query, params))

    async def transaction(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Do `work` in one transaction, and repeat it from its beginning if the database asks for that.

        Raises DatabaseUnavailable, Conflict, and any error of `work`, which rolls it back.
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
                        # An open connection stays read-only: a writable one must be opened.
                        await connection.close()
                        raise
                    except psycopg.InternalError as error:
                        if error.sqlstate is not None:
                            raise
                        # Not an error of PostgreSQL: the connection was cut, and the driver got half an answer, or two.
                        await connection.close()
                        raise psycopg.OperationalError from error
            except errors.QueryCanceled:
                # PostgreSQL's own limit; the deadline of the call has passed as well.
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
        # If one connection was cut, others may be too: check all now, rather than fail one call at a time.
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._pool.check())
        return DatabaseUnavailable()

    def pool_stats(self) -> dict[str, int]:
        """The pool's statistics, under the names of psycopg_pool."""
        return self._pool.get_stats()

    @property
    def listens(self) -> bool:
        """Whether `listening` is possible: not through a pooler that shares sessions."""
        return self._direct is not None

    @asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[AsyncIterator[str]]:
        """Listen on `channel` with a connection of its own; iterate over the payloads. Raises psycopg errors."""
        assert self._direct is not None
        connection = await AsyncConnection.connect(
            self._direct, application_name="frontdesk listen", **_CONNECTION, **session.options(self._direct)
        )
        try:
            await session.prepare(connection)
            await connection.execute(f"listen {channel}".encode())

            async def payloads() -> AsyncIterator[str]:
                async for notification in connection.notifies():
                    yield notification.payload

            yield payloads()
        finally:
            await connection.close()


def _untraced(query: str) -> AbstractContextManager[None]:
    return _UNTRACED
