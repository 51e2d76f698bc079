"""One round trip for what several callers ask at the same time."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from typing import Any, Generic, TypeVar

from frontdesk.db.database import Database
from frontdesk.errors import DatabaseUnavailable
from frontdesk.tasks import end

T = TypeVar("T")

MOST = 32
"""Requests in one round trip; whoever comes later waits for the next one."""

PATIENCE = 0.1
"""Seconds after which another lane is opened though the last round trip has no answer: it waits for somebody's lock."""


class _Asked:
    """A request that waits for its answer; once it is sent, in which lane."""

    __slots__ = ("answer", "lane", "text")

    def __init__(self, text: str, answer: asyncio.Future[Any]) -> None:
        self.text = text
        self.answer = answer
        self.lane: asyncio.Task[None] | None = None


class Batcher(Generic[T]):
    """Sends requests to a function that takes a JSON array of them and answers with a row for each, in their order.

    A lone request goes at once. What comes while the database works on it goes together after it, in one transaction:
    its messages, its commit and its flush are paid for once. Where that transaction fails, each request is made again
    alone, so that none suffers from another's failure.

    A lane is a task that makes one round trip after the other, on one connection, as long as somebody waits.

    A caller that gives up leaves the others undisturbed; the statement is cancelled when the last has given up.
    """

    def __init__(self, db: Database, query: str, make: Callable[..., T]) -> None:
        self._db = db
        self._query = query
        self._make = make
        self._waiting: list[_Asked] = []
        self._open: asyncio.Task[None] | None = None
        """The lane that goes on with those who wait. Another one ends with its round trip."""
        # Here and not in each request: that would be a circle for the garbage collector, and every call's answer in it.
        self._under_way: dict[asyncio.Task[None], Sequence[_Asked]] = {}

    async def ask(self, request: Mapping[str, Any]) -> T:
        """The answer to one request, made by calling `make` with the columns of its row.

        Raises DatabaseUnavailable, Conflict, and what another error of the database becomes.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(json.dumps(request), loop.create_future())
        self._waiting.append(asked)
        if self._open is None and len(self._waiting) == 1:
            # Not yet: what arrives in the same moment goes along.
            # And in nobody's context: what is sent is no part of one caller's trace.
            loop.call_soon(self._begin, context=Context())
        try:
            with self._db.statement(self._query):
                answer: T = await asked.answer
        except asyncio.CancelledError:
            self._give_up(asked)
            raise
        return answer

    def _begin(self) -> None:
        """Open a lane for those who wait, where none is open."""
        if self._open is None and self._waiting:
            self._open = self._start(self._next())
            self._open.add_done_callback(self._close)

    def _close(self, lane: asyncio.Task[None]) -> None:
        """Another lane is to go on with those who wait."""
        if self._open is lane:
            self._open = None
            self._begin()

    def _next(self) -> Sequence[_Asked]:
        asked, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        return asked

    def _start(self, asked: Sequence[_Asked]) -> asyncio.Task[None]:
        lane = asyncio.create_task(self._run(asked))
        self._note(lane, asked)
        lane.add_done_callback(self._under_way.pop)
        return lane

    def _note(self, lane: asyncio.Task[None], asked: Sequence[_Asked]) -> None:
        self._under_way[lane] = asked
        for one in asked:
            one.lane = lane

    async def _run(self, asked: Sequence[_Asked]) -> None:
        lane = asyncio.current_task()
        assert lane is not None
        late = lane.get_loop().call_later(PATIENCE, self._close, lane)
        try:
            async with self._db.connection() as connection:
                while True:
                    requests = "[" + ",".join(one.text for one in asked) + "]"
                    rows = await self._db.rows(self._query, (requests,), self._make, on=connection)
                    late.cancel()
                    # Without anyone who wanted an answer the lane is being cancelled, and ends before others are in it.
                    goes_on = _answer(asked, rows) and self._open is lane
                    # The next round trip goes out before anyone looks at these answers: the database works meanwhile.
                    asked = self._next() if goes_on else ()
                    self._note(lane, asked)
                    if not asked:
                        return
                    late = lane.get_loop().call_later(PATIENCE, self._close, lane)
        except DatabaseUnavailable:
            for one in asked:
                if not one.answer.done():
                    one.answer.set_exception(DatabaseUnavailable())
        except Exception as error:
            for one in asked:
                if one.answer.done():
                    continue
                if len(asked) > 1:
                    self._start([one])
                else:
                    one.answer.set_exception(error)
        except asyncio.CancelledError:
            for one in asked:
                one.answer.cancel()
            raise
        finally:
            late.cancel()

    def _give_up(self, asked: _Asked) -> None:
        if asked.lane is None:
            self._waiting.remove(asked)
            return
        # Of the round trip that the lane makes now: it may be a later one, or none.
        mates = self._under_way.get(asked.lane, ())
        if mates and all(mate.answer.done() for mate in mates):
            end(asked.lane)


def _answer(asked: Sequence[_Asked], rows: Sequence[Any]) -> bool:
    """Give each its row; whether anyone still waited."""
    wanted = False
    for one, row in zip(asked, rows, strict=True):
        if not one.answer.done():
            one.answer.set_result(row)
            wanted = True
    return wanted
