"""Limits of rate, which all workers and replicas count together."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import pytest

from frontdesk.core.limit import Limits
from frontdesk.db.database import Database
from frontdesk.errors import RateLimited
from tests.waiting import early_in_a_minute


@pytest.fixture
async def replicas(conninfo: str) -> AsyncIterator[Sequence[Limits]]:
    """The limits of three workers on one database."""
    databases = [Database(conninfo, pool_size=2) for _ in range(3)]
    for database in databases:
        await database.open()
    workers = [Limits(database) for database in databases]
    yield workers
    for worker in workers:
        await worker.close()
    for database in databases:
        await database.close()


async def admitted(workers: Sequence[Limits], subject: str, limit: int, calls: int) -> int:
    """How many of so many calls at once are admitted; the others are told to come back within the minute."""

    async def one(number: int) -> str:
        try:
            await workers[number % len(workers)].admit(subject, limit)
        except RateLimited as refused:
            return "refused" if 0 < (refused.retry_after or 0) <= 60 else "refused without an end"
        return "admitted"

    return Counter(await asyncio.gather(*map(one, range(calls))))["admitted"]


@pytest.mark.parametrize("limit", [1, 20, 100, 1000])
async def test_workers_count_together(replicas: Sequence[Limits], limit: int) -> None:
    """Of calls without end, all workers together admit at most the limit of a minute, and at least 95 % of it."""
    await early_in_a_minute()
    found = 0
    for _ in range(3):
        found += await admitted(replicas, f"keys/{limit}", limit, limit)
    assert 0.95 * limit <= found <= limit
    assert await admitted(replicas[:1], "keys/another", limit, 1) == 1


async def test_a_new_minute(replicas: Sequence[Limits], conninfo: str) -> None:
    """With a new minute the whole quota is there again, and no lease of the old one counts."""
    await early_in_a_minute()
    assert await admitted(replicas, "keys/a", 20, 40) == 20
    worker = replicas[0]
    for lease in worker._leases.values():
        lease.ends = 0.0
    # The minute of the row is over.
    await worker._db.run("update rate_window set minute = minute - interval '1 minute'", ())
    assert await admitted([worker], "keys/a", 20, 40) == 20
