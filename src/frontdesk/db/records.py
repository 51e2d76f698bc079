"""Records that are kept and edited: what clinics, patients and doctors share, idempotent create and update included."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
from psycopg.types.json import Jsonb
from sqlalchemy.dialects.postgresql import JSONB

from frontdesk.db.change import Change, Key, append, claim
from frontdesk.db.database import Database, Taken, Transaction, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import AlreadyExists, EtagMismatch, NotFound


class Record(Protocol):
    """A frozen dataclass whose fields are columns of its table, by name."""

    @property
    def id(self) -> str: ...

    @property
    def version(self) -> int: ...


R = TypeVar("R", bound=Record)

Permit = Callable[[Mapping[str, Any]], None]
"""Raises the refusal if the caller may not reach the record with these columns."""

Prepare = Callable[[Transaction, R | None, Mapping[str, Any]], Awaitable[Mapping[str, Any]]]
"""Completes what is to be written: from the transaction, the record as it is (None if it is new) and what was given."""


class Records(Generic[R]):
    """The rows of one table as instances of one frozen dataclass."""

    def __init__(
        self,
        table: sa.Table,
        shape: type[R],
        missing: type[NotFound],
        taken: Mapping[str, tuple[type[AlreadyExists], str]] | None = None,
        *,
        noun: str = "",
    ) -> None:
        """`taken` says by the name of a unique constraint how a violation is refused, and which column it is about.

        `noun` is what events call a record, if not as the table: api_key.created of apiKeys/ID.
        """
        self._table = table
        self._taken = taken or {}
        self._shape = shape
        self._noun = noun or table.name
        first, *others = self._noun.split("_")
        self._collection = "".join([first, *map(str.title, others)]) + "s"
        self._missing = missing
        self._columns = [table.c[field.name] for field in fields(shape)]  # type: ignore[arg-type]
        self._get = compiled(sa.select(*self._columns).where(table.c.id == sa.bindparam("id")))
        self._pages: dict[tuple[str, ...], str] = {}

    async def get(self, via: Database | Transaction, record_id: str, *, lock: bool = False) -> R:
        """The record; `lock` keeps it from changing until the transaction ends. Raises the table's NotFound."""
        found = await via.row(self._get + (" for update" if lock else ""), {"id": record_id}, self._shape)
        if found is None:
            raise self._missing(record_id)
        return found

    async def find(
        self,
        via: Database | Transaction,
        record_id: str,
        condition: "sa.ColumnElement[bool]",
        values: Mapping[str, Any],
    ) -> R | None:
        """The record, if the condition holds for it; `values` are of the condition's bind parameters."""
        statement = sa.select(*self._columns).where(self._table.c.id == sa.bindparam("id"), condition)
        return await via.row(compiled(statement), {"id": record_id, **values}, self._shape)

    async def insert(self, tx: Transaction, record_id: str, values: Mapping[str, Any]) -> R:
        """A new record with these columns; the others take their defaults."""
        values = {"id": record_id, **values}
        statement = sa.insert(self._table).values({name: sa.bindparam(name) for name in values})
        made = await tx.row(compiled(statement.returning(*self._columns)), self._adapted(values), self._shape)
        assert made is not None
        return made

    async def create(
        self,
        db: Database,
        key: Key,
        values: Mapping[str, Any],
        prepare: Prepare[R] | None = None,
        *,
        permit: Permit | None = None,
    ) -> Change[R]:
        """Create the record once, however often the key comes.

        `prepare` completes the values in the transaction; `permit` is asked about them before they are written, and
        about the record of a replay. Raises what they raise, IdempotencyKeyReused and the refusals of `taken`.
        """

        async def work(tx: Transaction) -> Change[R]:
            claimed = await claim(tx, key)
            if claimed.replayed:
                record = await self.get(tx, claimed.result_id)
                if permit is not None:
                    permit(self._values_of(record))
            else:
                complete = values if prepare is None else await prepare(tx, None, values)
                if permit is not None:
                    permit(complete)
                record = await self.insert(tx, claimed.result_id, complete)
                await self.log(tx, key, record, "created")
            return Change(record, claimed.replayed)

        return await self._unless_taken(db, values, work)

    async def update(
        self,
        db: Database,
        key: Key,
        record_id: str,
        changes: Mapping[str, Any],
        version: int | None,
        prepare: Prepare[R] | None = None,
        *,
        permit: Permit | None = None,
        event: str = "updated",
    ) -> Change[R]:
        """Change these columns once, however often the key comes; `version` is the one that the record must have.

        `event` is what the log calls the change. `prepare` completes the changes in the transaction, under the record's
        lock; `permit` is asked about the record as it is, and before the write as it is to be. Raises what they raise,
        IdempotencyKeyReused, the table's NotFound, EtagMismatch and the refusals of `taken`.
        """

        async def work(tx: Transaction) -> Change[R]:
            claimed = await claim(tx, key)
            current = await self.get(tx, record_id, lock=True)
            if permit is not None:
                permit(self._values_of(current))
            if claimed.replayed:
                return Change(current, True)
            if version is not None and version != current.version:
                raise EtagMismatch(record_id)
            complete = changes if prepare is None else await prepare(tx, current, changes)
            if permit is not None:
                permit({**self._values_of(current), **complete})
            changed = await self._changed(tx, current, complete)
            if complete:
                await self.log(tx, key, changed, event, complete)
            return Change(changed, False)

        return await self._unless_taken(db, changes, work)

    async def log(
        self, tx: Transaction, key: Key, record: R, event: str, changes: Mapping[str, Any] | None = None
    ) -> None:
        """Append a change of the record to the log; `changes` are the columns that it sets, None all."""
        columns = sorted(name for name in changes or () if hasattr(record, name))
        data = {"fields": ",".join(columns)} if columns else {}
        if changes is None or "roles" in changes:
            data |= {"roles": ",".join(getattr(record, "roles", ()))} if hasattr(record, "roles") else {}
        ids = {name: getattr(record, name, None) for name in ("clinic_id", "doctor_id", "patient_id")}
        if f"{self._noun}_id" in ids:
            ids[f"{self._noun}_id"] = record.id
        await append(tx, key, f"{self._noun}.{event}", f"{self._collection}/{record.id}", ids, data)

    def _values_of(self, record: R) -> Mapping[str, Any]:
        return {column.name: getattr(record, column.name) for column in self._columns}

    async def _changed(self, tx: Transaction, current: R, changes: Mapping[str, Any]) -> R:
        if not changes:
            return current
        statement = (
            sa.update(self._table)
            .where(self._table.c.id == sa.bindparam("id_"))
            .values({name: sa.bindparam(name) for name in changes})
            .values(version=sa.literal_column("version + 1"), update_time=sa.func.moment())
            .returning(*self._columns)
        )
        made = await tx.row(compiled(statement), {**self._adapted(changes), "id_": current.id}, self._shape)
        assert made is not None
        return made

    async def _unless_taken(
        self, db: Database, values: Mapping[str, Any], work: Callable[[Transaction], Awaitable[Change[R]]]
    ) -> Change[R]:
        try:
            return await db.transaction(work)
        except Taken as taken:
            if taken.constraint not in self._taken:
                raise
            refusal, column = self._taken[taken.constraint]
            holder = sa.select(self._table.c.id).where(self._table.c[column] == sa.bindparam("value"))
            raise refusal(await db.row(compiled(holder), {"value": values[column]}, str)) from None

    async def page(
        self, db: Database, page: Page, filters: Mapping[str, tuple[sa.ColumnElement[bool], Any]]
    ) -> Listing[R]:
        """The records for which every given filter holds, the oldest first.

        A filter is a condition with one bind parameter of the filter's name, and that parameter's value.
        """
        asked = tuple(sorted(filters)) + (("after",) if page.after else ())
        if asked not in self._pages:
            statement = sa.select(*self._columns).where(*(condition for condition, _ in filters.values()))
            if page.after:
                statement = statement.where(self._table.c.id > sa.bindparam("after", type_=sa.Uuid))
            statement = statement.order_by(self._table.c.id).limit(sa.bindparam("size", type_=sa.Integer))
            self._pages[asked] = compiled(statement)
        values = {name: value for name, (_, value) in filters.items()}
        values |= {"size": page.size + 1, "after": page.after[0] if page.after else None}
        found: Sequence[R] = await db.rows(self._pages[asked], values, self._shape)
        return cut(page, found, lambda record: (record.id,))

    def _adapted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        # To the driver a list is an array, unless it is told that the column is JSON.
        return {
            name: Jsonb(value) if isinstance(self._table.c[name].type, JSONB) else value
            for name, value in values.items()
        }
