"""One round trip for the requests that several callers make at the same time."""

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
"""Requests in one round trip; later ones wait for the next."""

PATIENCE = 0.1
"""Seconds after which another sender starts although the last round trip has no answer: it waits for a lock."""


class _Asked:
    """A request that waits for its answer; once it is sent, also its sender."""

    __slots__ = ("answer", "sender", "text")

    def __init__(self, text: str, answer: asyncio.Future[Any]) -> None:
        self.text = text
        self.answer = answer
        self.sender: asyncio.Task[None] | None = None


def one_row_each(rows: Sequence[T], requests: int) -> Sequence[T]:
    """The answers of a query that has a row for each request, in their order."""
    return rows


class Batcher(Generic[T]):
    """Sends requests to a query that takes a JSON array of them.

    A lone request goes at once. Those that come while the database works on it go together after it, in one
    transaction: they share the cost of its messages, its commit and its flush. If that transaction fails, each request
    is made again alone, so that none suffers from another's failure.

    A sender is a task that makes one round trip after another, on one connection, as long as requests wait.

    A caller that gives up leaves the others undisturbed; the statement is cancelled when all have given up.
    """

    def __init__(
        self,
        db: Database,
        query: str,
        make: Callable[..., Any],
        answers: Callable[[Sequence[Any], int], Sequence[T]] = one_row_each,
    ) -> None:
        """`make` is called with the columns of each row, and `answers` with what it made and the number of requests: it
        returns an answer for each request, in their order.
        """
        self._db = db
        self._query = query
        self._make = make
        self._answers = answers
        self._waiting: list[_Asked] = []
        self._next_sender: asyncio.Task[None] | None = None
        """The sender that will take the waiting requests. Any other one ends with its round trip."""
        # Here and not in each request: that would be a circle for the garbage collector, and every call's answer in it.
        self._under_way: dict[asyncio.Task[None], Sequence[_Asked]] = {}

    async def ask(self, request: Mapping[str, Any]) -> T:
        """The answer to one request.

        Raises DatabaseUnavailable, Conflict, and whatever `Database.rows` makes of another error.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(json.dumps(request), loop.create_future())
        self._waiting.append(asked)
        if self._next_sender is None and len(self._waiting) == 1:
            # Not at once, so that requests of the same moment go along.
            # And in no caller's context: the round trip is not part of one caller's trace.
            loop.call_soon(self._begin, context=Context())
        try:
            with self._db.statement(self._query):
                answer: T = await asked.answer
        except asyncio.CancelledError:
            self._give_up(asked)
            raise
        return answer

    def _begin(self) -> None:
        """Start a sender for the waiting requests, if none will take them."""
        if self._next_sender is None and self._waiting:
            self._next_sender = self._start(self._take())
            self._next_sender.add_done_callback(self._close)

    def _close(self, sender: asyncio.Task[None]) -> None:
        """Leave the waiting requests to another sender."""
        if self._next_sender is sender:
            self._next_sender = None
            self._begin()

    def _take(self) -> Sequence[_Asked]:
        asked, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        return asked

    def _start(self, asked: Sequence[_Asked]) -> asyncio.Task[None]:
        sender = asyncio.create_task(self._send(asked))
        self._note(sender, asked)
        sender.add_done_callback(self._under_way.pop)
        return sender

    def _note(self, sender: asyncio.Task[None], asked: Sequence[_Asked]) -> None:
        self._under_way[sender] = asked
        for one in asked:
            one.sender = sender

    async def _send(self, asked: Sequence[_Asked]) -> None:
        sender = asyncio.current_task()
        assert sender is not None
        late = sender.get_loop().call_later(PATIENCE, self._close, sender)
        try:
            async with self._db.connection() as connection:
                while True:
                    requests = "[" + ",".join(one.text for one in asked) + "]"
                    rows = await self._db.rows(self._query, (requests,), self._make, on=connection)
                    late.cancel()
                    # If nobody wanted an answer the sender is being cancelled; it ends before it takes other requests.
                    answers = self._answers(rows, len(asked))
                    goes_on = _answer(asked, answers) and self._next_sender is sender
                    # The next round trip goes out before any caller looks at these answers: the database works
                    # meanwhile.
                    asked = self._take() if goes_on else ()
                    self._note(sender, asked)
                    if not asked:
                        return
                    late = sender.get_loop().call_later(PATIENCE, self._close, sender)
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
        if asked.sender is None:
            self._waiting.remove(asked)
            return
        # Of the round trip that the sender makes now: it may be a later one, or none.
        mates = self._under_way.get(asked.sender, ())
        if mates and all(mate.answer.done() for mate in mates):
            end(asked.sender)


def _answer(asked: Sequence[_Asked], answers: Sequence[Any]) -> bool:
    """Give each request its answer; whether any caller still waited."""
    wanted = False
    for one, answer in zip(asked, answers, strict=True):
        if not one.answer.done():
            one.answer.set_result(answer)
            wanted = True
    return wanted
