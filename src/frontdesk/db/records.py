"""Records that are kept and edited: the statements that clinics, patients and doctors share."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Generic, Protocol, TypeVar

import sqlalchemy as sa
from psycopg.types.json import Jsonb
from sqlalchemy.dialects.postgresql import JSONB

from frontdesk.db.database import Database, Transaction, compiled
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import EtagMismatch, NotFound


class Record(Protocol):
    """A frozen dataclass whose fields are columns of its table, by name."""

    @property
    def id(self) -> str: ...


R = TypeVar("R", bound=Record)


class Records(Generic[R]):
    """The rows of one table as instances of one frozen dataclass."""

    def __init__(self, table: sa.Table, shape: type[R], missing: type[NotFound]) -> None:
        self._table = table
        self._shape = shape
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

    async def insert(self, tx: Transaction, record_id: str, values: Mapping[str, Any]) -> R:
        """A new record with these columns; the others take their defaults."""
        values = {"id": record_id, **values}
        statement = sa.insert(self._table).values({name: sa.bindparam(name) for name in values})
        made = await tx.row(compiled(statement.returning(*self._columns)), self._adapted(values), self._shape)
        assert made is not None
        return made

    async def update(self, tx: Transaction, record_id: str, changes: Mapping[str, Any], version: int | None) -> R:
        """The record with these columns changed; `version` is the one it must have.

        Raises the table's NotFound, EtagMismatch.
        """
        current = await self.get(tx, record_id, lock=True)
        if version is not None and version != current.version:  # type: ignore[attr-defined]
            raise EtagMismatch(record_id)
        if not changes:
            return current
        statement = (
            sa.update(self._table)
            .where(self._table.c.id == sa.bindparam("id_"))
            .values({name: sa.bindparam(name) for name in changes})
            .values(version=sa.literal_column("version + 1"), update_time=sa.func.moment())
            .returning(*self._columns)
        )
        made = await tx.row(compiled(statement), {**self._adapted(changes), "id_": record_id}, self._shape)
        assert made is not None
        return made

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
