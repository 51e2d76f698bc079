"""Requests that arrive at the same time share a round trip, and no request suffers from another."""

import asyncio
from collections.abc import AsyncIterator

import psycopg
import pytest

from frontdesk.db import batch
from frontdesk.db.batch import MOST, Batcher
from frontdesk.db.database import Database, Taken
from frontdesk.errors import Conflict, DatabaseUnavailable
from tests.clinic import Front, outcome, tomorrow
from tests.waiting import until_true

ANSWER = """
create table once (n integer constraint once_key unique);
create function answer(p_requests json) returns table (n integer, transaction bigint) language plpgsql as $$
declare
    r json;
begin
    perform set_config('lock_timeout', case when json_array_length(p_requests) > 1 then '100ms' else '0' end, true);
    for r in select * from json_array_elements(p_requests) loop
        perform pg_advisory_xact_lock((r->>'lock')::bigint);
        insert into once select (r->>'once')::integer where r->>'once' is not null;
        n := (r->>'n')::integer;
        transaction := pg_current_xact_id()::text::bigint;
        return next;
    end loop;
end
$$
"""


class Desk:
    """A batcher, and another connection that holds a lock for which the first request waits."""

    def __init__(self, db: Database, other: psycopg.AsyncConnection) -> None:
        self.batcher: Batcher[tuple[int, int]] = Batcher(
            db, "select n, transaction from answer(%s)", lambda n, transaction: (n, transaction)
        )
        self.db = db
        self.other = other

    def ask(self, n: int, **more: int) -> asyncio.Task[tuple[int, int]]:
        return asyncio.create_task(self.batcher.ask({"n": n, **more}))

    async def hold(self) -> None:
        await self.other.execute("select pg_advisory_xact_lock(1)")

    async def release(self) -> None:
        await self.other.rollback()

    async def waits(self, count: int) -> None:
        """Wait until `count` statements wait for a lock."""

        async def waiting() -> bool:
            async with await psycopg.AsyncConnection.connect(self.other.info.dsn, autocommit=True) as look:
                cursor = await look.execute(
                    "select count(*) from pg_locks where locktype = 'advisory' and not granted"
                    " and database = (select oid from pg_database where datname = current_database())"
                )
                return await cursor.fetchone() == (count,)

        await until_true(waiting)


@pytest.fixture
async def desk(conninfo: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    """A desk whose first round trip may take as long as the test needs."""
    monkeypatch.setattr(batch, "PATIENCE", 60)
    async with await psycopg.AsyncConnection.connect(conninfo) as other:
        await other.execute(ANSWER.encode())
        await other.commit()
        db = Database(conninfo, pool_size=4)
        await db.open()
        yield Desk(db, other)
        await db.close()


async def test_requests_that_wait_go_together(desk: Desk) -> None:
    """A lone request goes alone. Requests that arrive meanwhile go in one transaction, and each gets its own answer.

    All use the connection of the first one.
    """
    await desk.hold()
    first = desk.ask(0, lock=1)
    await desk.waits(1)
    others = [desk.ask(n) for n in range(1, MOST + 2)]
    await asyncio.sleep(0)
    await desk.release()
    (n, alone), answers = await first, await asyncio.gather(*others)
    assert (n, [n for n, _ in answers]) == (0, list(range(1, MOST + 2)))
    together = {transaction for _, transaction in answers[:MOST]}
    assert len(together) == 1
    assert len(together | {alone, answers[MOST][1]}) == 3
    assert desk.db.pool_stats()["requests_num"] == 1


async def test_one_that_fails_fails_alone(desk: Desk) -> None:
    """If a constraint refuses one of several requests, each of the others is still made, and only once."""
    await desk.hold()
    first = desk.ask(0, lock=1, once=7)
    await desk.waits(1)
    others = [desk.ask(n, once=once) for n, once in enumerate((5, 6, 7, 8), start=1)]
    await asyncio.sleep(0)
    await desk.release()
    await first
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert [a[0] if isinstance(a, tuple) else type(a) for a in answers] == [1, 2, Taken, 4]
    cursor = await desk.other.execute("select array_agg(n order by n) from once")
    assert await cursor.fetchone() == ([5, 6, 7, 8],)


async def test_one_that_waits_lets_the_others_go(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that needs a held lock waits alone; later ones pass it and are answered first."""
    monkeypatch.setattr(batch, "PATIENCE", 0.05)
    await desk.hold()
    stuck = [desk.ask(0, lock=1)]
    await desk.waits(1)
    # Another sender takes these. One of them has to wait as well, so each is made again alone.
    stuck.append(desk.ask(1, lock=1))
    others = [desk.ask(n) for n in (2, 3)]
    assert [n for n, _ in await asyncio.gather(*others)] == [2, 3]
    await desk.waits(2)
    await desk.release()
    assert [n for n, _ in await asyncio.gather(*stuck)] == [0, 1]


async def test_one_that_gives_up_leaves_the_others(desk: Desk) -> None:
    """A cancelled request, sent or not, leaves the others alone. The statement is cancelled only after the last one."""
    await desk.hold()
    first = desk.ask(0, lock=1)
    await desk.waits(1)
    second, third = desk.ask(1, once=1), desk.ask(2, once=2)
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    first.cancel()
    await desk.waits(0)
    assert (await third)[0] == 2
    cursor = await desk.other.execute("select array_agg(n order by n) from once")
    assert await cursor.fetchone() == ([2],)


async def test_a_lost_connection(desk: Desk) -> None:
    """After a lost connection, nobody knows whether the requests in flight have acted, so none is made again."""
    await desk.hold()
    first = desk.ask(0, lock=1)
    await desk.waits(1)
    others = [desk.ask(n, lock=1, once=n) for n in (1, 2)]
    await asyncio.sleep(0)
    async with await psycopg.AsyncConnection.connect(desk.other.info.dsn, autocommit=True) as admin:
        cut = "select pg_terminate_backend(pid) from pg_stat_activity where query like 'select n, transaction%'"
        await admin.execute(cut)
        assert isinstance((await asyncio.gather(first, return_exceptions=True))[0], DatabaseUnavailable)
        await desk.waits(1)
        await admin.execute(cut)
    answers = await asyncio.gather(*others, return_exceptions=True)
    assert {type(a) for a in answers} == {DatabaseUnavailable}


async def test_a_lone_lock_timeout_is_a_conflict(desk: Desk) -> None:
    """If an operator's `lock_timeout` ends the wait of a lone request, the caller may retry."""
    await desk.other.execute("set lock_timeout = 0")
    async with await psycopg.AsyncConnection.connect(desk.other.info.dsn, autocommit=True) as admin:
        await admin.execute("create or replace function answer(p_requests json) returns table (n integer,"
                            " transaction bigint) language plpgsql set lock_timeout = 50 as $$ begin"
                            " perform pg_advisory_xact_lock(1); end $$")  # fmt: skip
    await desk.hold()
    with pytest.raises(Conflict):
        await desk.ask(0)


async def test_bookings_go_together(front: Front) -> None:
    """Fifty bookings at once for ten doctor-days of three places: thirty succeed, in far fewer transactions."""
    doctors = [await front.doctor(max_patients_per_day=3) for _ in range(10)]
    patients = await front.people(50)
    outcomes = await asyncio.gather(
        *(outcome(front.book(p.id, doctors[i % 10].id, tomorrow())) for i, p in enumerate(patients))
    )
    assert sorted(outcomes) == ["DAY_FULL"] * 20 + ["OK"] * 30
    ((transactions,),) = front.sql("select count(distinct xmin::text) from appointment")
    assert transactions < 30
    (numbers,) = front.sql("select array_agg(distinct number order by number) from appointment")
    assert numbers[0] == [1, 2, 3]
