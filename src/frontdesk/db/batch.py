"""One round trip for what several callers ask at the same time."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from typing import Any, Generic, TypeVar

from frontdesk.background import end
from frontdesk.db.database import Database
from frontdesk.errors import DatabaseUnavailable

T = TypeVar("T")

MOST = 32
"""Requests in one round trip; whoever comes later waits for the next one."""

PATIENCE = 0.1
"""Seconds after which the next round trip begins though the last has no answer: it waits for somebody's lock."""


class _Asked:
    """A request that waits for its answer; once it is sent, by which task."""

    __slots__ = ("answer", "task", "text")

    def __init__(self, text: str, answer: asyncio.Future[Any]) -> None:
        self.text = text
        self.answer = answer
        self.task: asyncio.Task[None] | None = None


class Batcher(Generic[T]):
    """Sends requests to a function that takes a JSON array of them and answers with a row for each, in their order.

    A lone request goes at once. What comes while the database works on it goes together after it, in one transaction:
    its messages, its commit and its flush are paid for once. Where that transaction fails, each request is made again
    alone, so that none suffers from another's failure.

    A caller that gives up leaves the others undisturbed; the statement is cancelled when the last has given up.
    """

    def __init__(self, db: Database, query: str, make: Callable[..., T]) -> None:
        self._db = db
        self._query = query
        self._make = make
        self._waiting: list[_Asked] = []
        self._under_way: asyncio.Task[None] | None = None
        # Here and not in each request: that would be a circle for the garbage collector, and every call's answer in it.
        self._sent: dict[asyncio.Task[None], Sequence[_Asked]] = {}

    async def ask(self, request: Mapping[str, Any]) -> T:
        """The answer to one request, made by calling `make` with the columns of its row.

        Raises DatabaseUnavailable, Conflict, and what another error of the database becomes.
        """
        loop = asyncio.get_running_loop()
        asked = _Asked(json.dumps(request), loop.create_future())
        self._waiting.append(asked)
        if self._under_way is None and len(self._waiting) == 1:
            # Not yet: what arrives in the same moment goes along.
            # And in nobody's context: what is sent is no part of one caller's trace.
            loop.call_soon(self._send, context=Context())
        try:
            with self._db.statement(self._query):
                answer: T = await asked.answer
        except asyncio.CancelledError:
            self._give_up(asked)
            raise
        return answer

    def _send(self) -> None:
        if self._under_way is not None or not self._waiting:
            return
        asked, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
        self._under_way = task = self._start(asked)
        task.add_done_callback(self._go_on)
        task.get_loop().call_later(PATIENCE, self._go_on, task)

    def _go_on(self, task: asyncio.Task[None] | None) -> None:
        if self._under_way is task:
            self._under_way = None
            self._send()

    def _start(self, asked: Sequence[_Asked]) -> asyncio.Task[None]:
        task = asyncio.create_task(self._together(asked))
        for one in asked:
            one.task = task
        self._sent[task] = asked
        task.add_done_callback(self._sent.pop)
        return task

    async def _together(self, asked: Sequence[_Asked]) -> None:
        try:
            rows = await self._db.rows(self._query, ("[" + ",".join(one.text for one in asked) + "]",), self._make)
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
        else:
            # Before anyone looks at an answer: the database works on the next ones meanwhile.
            self._go_on(asked[0].task)
            for one, row in zip(asked, rows, strict=True):
                if not one.answer.done():
                    one.answer.set_result(row)

    def _give_up(self, asked: _Asked) -> None:
        if asked.task is None:
            self._waiting.remove(asked)
        elif all(mate.answer.done() for mate in self._sent.get(asked.task, ())):
            end(asked.task)
