"""Limits of rate, which all workers and replicas count together."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from clinic.frontdesk.v1 import auth_pb2, clinic_pb2
from frontdesk.core.limit import Limits
from frontdesk.db.database import Database
from frontdesk.errors import RateLimited
from frontdesk.jobs.maintenance import clean, retention
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings, SettingsError
from tests.clinic import Front, details, outcome, refusal
from tests.hostile.wire import serving
from tests.identities import REFRESH_TOKEN, Metadata, auth, bearing, create_key, user_token
from tests.waiting import early_in_a_minute, until


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


async def test_a_lease_that_waited_into_a_new_minute(replicas: Sequence[Limits], conninfo: str) -> None:
    """A request that waited for others since before the minute began takes of their quota, and does not renew it."""
    await early_in_a_minute()
    assert await admitted(replicas, "keys/a", 20, 40) == 20
    worker = replicas[0]
    worker._leases.clear()
    # To a request of the minute before, the row of the others looks so.
    await worker._db.run("update rate_window set minute = minute + interval '1 minute'", ())
    assert await admitted([worker], "keys/a", 20, 1) == 0


LIMITS = {"address_requests_per_minute": 20, "user_requests_per_minute": 20, "access": "required"}


def limited(settings: Settings, conninfo: str, **changed: object) -> AbstractAsyncContextManager[tuple[Worker, Front]]:
    """One more worker that requires credentials, with the usual limit of an address and a low one of a user."""
    return serving(settings, conninfo, **{**LIMITS, **changed})


def behind(*hops: str) -> Metadata:
    """The metadata of a call that came through proxies."""
    return (("x-forwarded-for", ", ".join(hops)),)


async def clinics(front: Front, metadata: Metadata = ()) -> str:
    """The outcome of a call that every identity may make."""
    return await outcome(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=metadata))


async def refresh(front: Front, metadata: Metadata = ()) -> str:
    """The outcome of a call that needs no credentials, and hashes no password."""
    request = auth_pb2.RefreshTokenRequest(refresh_token="unknown")
    return await outcome(auth(front).RefreshToken(request, metadata=metadata))


async def counted(front: Front, metadata: Metadata = ()) -> dict[str, int]:
    """The outcomes of thirty such calls."""
    return Counter(await asyncio.gather(*(refresh(front, metadata) for _ in range(30))))


ADMITTED, NONE = {"CREDENTIALS_INVALID": 20, "RATE_LIMITED": 10}, {"RATE_LIMITED": 30}


async def test_calls_of_a_user(conninfo: str, settings: Settings) -> None:
    """All tokens of a user share one limit at all workers, and a caller without credentials has none of it."""
    await early_in_a_minute()
    async with limited(settings, conninfo, access="open") as (_, one), limited(settings, conninfo) as (_, two):
        outcomes = await asyncio.gather(*(clinics((one, two)[n % 2], user_token()) for n in range(40)))
        assert Counter(outcomes) == {"OK": 20, "RATE_LIMITED": 20}
        assert Counter([await clinics(one) for _ in range(40)]) == {"OK": 40}


async def test_a_flood(conninfo: str, settings: Settings) -> None:
    """Who goes on after many refusals waits for the next ones, and takes no place from others meanwhile."""
    async with serving(settings, conninfo, max_in_flight=20) as (worker, front):
        limited = bearing((await create_key(front, "SERVICE", requests_per_minute=1)).key)
        pipeline = worker._pipeline

        async def some(count: int) -> Counter[str]:
            request = clinic_pb2.ListClinicsRequest()
            calls = (outcome(front.clinics.ListClinics(request, metadata=limited)) for _ in range(count))
            return Counter(await asyncio.gather(*calls))

        await early_in_a_minute()
        for _ in range(10):
            assert (await some(11)).keys() <= {"OK", "RATE_LIMITED"}
        flood = asyncio.create_task(some(60))
        await until(lambda: pipeline._held > 40)
        assert pipeline.in_flight <= 20
        assert await outcome(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest())) == "OK"
        assert (await flood).keys() <= {"RATE_LIMITED", "OVERLOADED"}
        assert (pipeline._held, pipeline.in_flight) == (0, 0)


async def test_calls_of_an_address(conninfo: str, settings: Settings) -> None:
    """Calls that need no credentials are limited by address, at all workers; the answer tells when to come back."""
    await early_in_a_minute()
    async with limited(settings, conninfo) as (_, one), limited(settings, conninfo) as (_, two):
        outcomes = await asyncio.gather(*(refresh((one, two)[n % 2]) for n in range(30)))
        assert Counter(outcomes) == ADMITTED
        login = auth_pb2.LoginRequest(email="nobody@example.com", password="a password")
        error = await refusal(auth(two).Login(login))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(error)
        assert 0 < found["RetryInfo"].retry_delay.ToMilliseconds() <= 60_000
        assert found["QuotaFailure"].violations[0].subject == "address"
        assert 0 < int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) <= 60_000
        assert one.sql("select count(*) from login_attempt") == [(0,)], "the address is looked at first"
        assert await clinics(one, user_token()) == await clinics(two, user_token()) == "OK"


async def test_open_access(conninfo: str, settings: Settings) -> None:
    """With open access the calls that need no credentials have no limit, but wrong credentials have one."""
    await early_in_a_minute()
    async with limited(settings, conninfo, access="open") as (_, front):
        assert await counted(front) == {"CREDENTIALS_INVALID": 30}
        outcomes = [await clinics(front, bearing("fdk_wrong")) for _ in range(21)]
        assert outcomes == ["CREDENTIALS_INVALID"] * 20 + ["RATE_LIMITED"]
        assert await clinics(front) == "OK"


async def test_refused_credentials(conninfo: str, settings: Settings) -> None:
    """An address with twenty wrong credentials waits before the next ones are judged; known good ones go on."""
    await early_in_a_minute()
    async with limited(settings, conninfo) as (_, front):
        known, unknown = [bearing((await create_key(front, "BOARD")).key) for _ in range(2)]
        assert await clinics(front, known) == "OK"
        wrong = bearing(known[0][1][:-1] + "?")
        twice = (*known, *known)
        outcomes = [await clinics(front, (wrong, twice)[n % 2]) for n in range(25)]
        assert outcomes == ["CREDENTIALS_INVALID"] * 20 + ["RATE_LIMITED"] * 5
        with psycopg.connect(conninfo) as holder:
            # A judgement would wait for this one.
            holder.execute("lock table api_key in access exclusive mode")
            assert await clinics(front, unknown) == "RATE_LIMITED"
            assert await clinics(front, known) == "OK"
        request = auth_pb2.RefreshTokenRequest(refresh_token=REFRESH_TOKEN)
        assert await outcome(auth(front).RefreshToken(request)) == "OK", "these have a limit of their own"


async def test_an_address_behind_proxies(conninfo: str, settings: Settings) -> None:
    """Behind proxies that are believed, the last address that is not theirs counts, whatever stands before it."""
    await early_in_a_minute()
    async with limited(settings, conninfo, trusted_proxies="127.0.0.1, 10.0.0.0/8") as (_, front):
        assert await counted(front, behind("198.51.100.7")) == ADMITTED
        for same in (
            behind("203.0.113.9", "198.51.100.7"),
            behind("203.0.113.10", "198.51.100.7", "10.1.2.3", "10.0.0.1"),
            behind("198.51.100.7:4711"),
            behind("::ffff:198.51.100.7"),
            (*behind("203.0.113.11"), *behind("198.51.100.7", "10.0.0.1")),
        ):
            assert await counted(front, same) == NONE, same
        assert await counted(front, behind("198.51.100.7", "198.51.100.8")) == ADMITTED
        # No address: the proxy that says so is the last known.
        assert await counted(front, behind("198.51.100.9", "somebody", "10.0.0.2")) == ADMITTED
        assert await counted(front, behind("198.51.100.10", "", "10.0.0.2")) == NONE
        assert await counted(front) == ADMITTED


async def test_addresses_of_ipv6(conninfo: str, settings: Settings) -> None:
    """The addresses of one IPv6 network of 64 bits count as one."""
    await early_in_a_minute()
    async with limited(settings, conninfo, trusted_proxies="127.0.0.1") as (_, front):
        assert await counted(front, behind("2001:db8:0:1::1")) == ADMITTED
        assert await counted(front, behind("[2001:db8:0:1:ffff::9]:443")) == NONE
        assert await counted(front, behind("2001:db8:0:2::1")) == ADMITTED


async def test_nobody_is_believed_unasked(conninfo: str, settings: Settings) -> None:
    """Without a list of proxies, and from an address that is not on it, x-forwarded-for means nothing."""
    await early_in_a_minute()
    for proxies in (None, "10.0.0.0/8, unix, ::1"):
        async with limited(settings, conninfo, trusted_proxies=proxies) as (_, front):
            outcomes = [await refresh(front, behind(f"198.51.100.{n}")) for n in range(30)]
            assert outcomes[-1] == "RATE_LIMITED"


async def test_a_unix_socket(conninfo: str, settings: Settings, tmp_path: Path) -> None:
    """The clients on a Unix socket are one address, unless `unix` is among the proxies that are believed."""
    for proxies, expected in ((None, "RATE_LIMITED"), ("unix", "CREDENTIALS_INVALID")):
        worker = Worker(settings.model_copy(update={**LIMITS, "trusted_proxies": proxies}), conninfo)
        path = f"unix:{tmp_path}/{proxies}.sock"
        await worker.start(path)
        await early_in_a_minute()
        async with grpc.aio.insecure_channel(path) as channel:
            front = Front(channel, conninfo, 0)
            outcomes = [await refresh(front, behind(f"198.51.100.{n}")) for n in range(30)]
            assert outcomes[-1] == expected
        await worker.stop(drain=False)


@pytest.mark.parametrize(
    "proxies", ["localhost", "10.0.0.1/8", "10.0.0.0/33", "127.0.0.1,", "unix:/tmp/s", "127.0.0.1:80"]
)
def test_bad_lists_of_proxies(proxies: str) -> None:
    """A list of proxies that has anything but addresses, networks and `unix` is refused in one line."""
    with pytest.raises(SettingsError, match=r"^--trusted-proxies: [^\n]+$"):
        Settings.load(trusted_proxies=proxies)


async def test_old_counts_are_deleted(conninfo: str, settings: Settings) -> None:
    """Maintenance deletes the counts of minutes that are long over, and keeps the others."""
    async with limited(settings, conninfo) as (worker, front):
        assert await refresh(front) == "CREDENTIALS_INVALID"
        count = "select count(*) from rate_window"
        await clean(worker._db, **retention(settings))
        assert front.sql(count) == [(1,)]
        front.sql("update rate_window set minute = minute - interval '2 hours'")
        await clean(worker._db, **retention(settings))
        assert front.sql(count) == [(0,)]


class Counting(Database):
    """A database that counts what it is asked."""

    asked = 0

    async def row(self, *question: Any, **more: Any) -> Any:
        self.asked += 1
        return await super().row(*question, **more)


async def test_few_calls_cost_few_round_trips(conninfo: str) -> None:
    """Blocks are a twentieth of what is left, so the first half of a usual limit takes fewer than 20 round trips."""
    db = Counting(conninfo, pool_size=1)
    await db.open()
    limits = Limits(db)
    await early_in_a_minute()
    for _ in range(50):
        await limits.admit("keys/a", 100)
    assert db.asked < 20
    await limits.close()
    await db.close()


async def test_a_block_that_is_used_up_at_once(conninfo: str) -> None:
    """Calls that come in the moment in which a block arrives, and find it used up, wait for the next one."""
    db = Database(conninfo, pool_size=2)
    await db.open()
    limits = Limits(db)
    pauses = random.Random(1)
    admitted: Counter[str] = Counter()

    async def calls() -> None:
        for subject in map(str, range(20)):
            for _ in range(pauses.randrange(40)):
                await asyncio.sleep(0)
            with suppress(RateLimited):
                # Of so small a limit a block is one call.
                await limits.admit(subject, 99)
                admitted[subject] += 1

    await early_in_a_minute()
    await asyncio.gather(*(calls() for _ in range(150)))
    assert set(admitted.values()) == {99}
    await limits.close()
    await db.close()
