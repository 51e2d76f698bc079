"""Limits of rate, counted for all workers and replicas together, without a round trip for each call.

A worker leases a block of a subject's quota of the present minute, and admits so many calls by itself (limit.sql says
how many). The minute is PostgreSQL's: a worker counts it from before it asked, so that it never admits a call with the
lease of a minute that is over.
"""

import asyncio
import ipaddress
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from frontdesk.db.database import Database
from frontdesk.errors import RateLimited
from frontdesk.tasks import end

_NETWORK = 64
"""Bits of an IPv6 address that tell customers apart: within them, each has as many addresses as he likes."""
_CALM = 100
"""Refusals of a subject in a minute, by one worker, until it counts as a flood."""
_ADDRESSES_AT_ONCE = 2
"""Leases for addresses that are asked for at once: a crowd of strangers leaves the database to the others."""
_MOST_SUBJECTS = 100_000
"""Subjects that a worker knows; when there are more, those whose minute is over are forgotten."""


def holder_of(address: str) -> str:
    """The part of a client's address that counts: an IPv4 address whole, of an IPv6 address its network of 64 bits."""
    if ":" not in address:
        return address
    return str(ipaddress.IPv6Network((address, _NETWORK), strict=False))


def _public(subject: str) -> str:
    """What a refusal says of the subject: an identity by its name, an address without itself."""
    return "address" if _is_address(subject) else subject


def _is_address(subject: str) -> bool:
    return subject.startswith(("calls/", "refusals/"))


@dataclass(slots=True)
class _Lease:
    """A worker's part of a quota."""

    left: int
    ends: float
    """When the minute is over, by the loop's clock."""
    used_up: bool
    """Whether the whole quota of this minute is leased."""
    refused: int = 0
    """Calls that were refused in this minute."""


class Limits:
    """Admits calls of any subject, such as an API key, a user or an address."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._leases: dict[str, _Lease] = {}
        self._asking: dict[str, asyncio.Task[_Lease]] = {}
        self._addresses = asyncio.Semaphore(_ADDRESSES_AT_ONCE)

    def require_left(self, subject: str) -> None:
        """Raise RateLimited if this worker knows that the quota is used up; counts nothing."""
        lease = self._leases.get(subject)
        if lease is not None and lease.used_up and not lease.left:
            seconds = lease.ends - asyncio.get_running_loop().time()
            if seconds > 0:
                raise RateLimited(_public(subject), retry_after=seconds)

    async def admit(self, subject: str, limit: int) -> None:
        """Count one call of the subject, of which `limit` a minute are admitted. Raises RateLimited."""
        now = asyncio.get_running_loop().time
        while True:
            lease = self._leases.get(subject)
            if lease is not None and lease.ends > now():
                if lease.left > 0:
                    lease.left -= 1
                    return
                if lease.used_up:
                    lease.refused += 1
                    refusal = RateLimited(_public(subject), retry_after=lease.ends - now())
                    refusal.flood = lease.refused > _CALM
                    raise refusal
            await self._renew(subject, limit)

    async def _renew(self, subject: str, limit: int) -> None:
        """Lease the next block; all who need it meanwhile wait for the same one."""
        asking = self._asking.get(subject)
        # One that is done may not be forgotten yet, if its block was used up in the same turn of the loop. To wait for
        # it again would be no wait, and the loop would never turn again.
        if asking is None or asking.done():
            asking = asyncio.create_task(self._lease(subject, limit))
            self._asking[subject] = asking
            asking.add_done_callback(partial(self._forget, subject))
        # One who gives up leaves the others undisturbed.
        await asyncio.shield(asking)

    def _forget(self, subject: str, asked: "asyncio.Task[_Lease]") -> None:
        if self._asking.get(subject) is asked:
            del self._asking[subject]

    async def _lease(self, subject: str, limit: int) -> _Lease:
        async with self._addresses if _is_address(subject) else nullcontext():
            return await self._ask(subject, limit)

    async def _ask(self, subject: str, limit: int) -> _Lease:
        now = asyncio.get_running_loop().time()
        found = await self._db.row(
            "select granted, seconds, used_up from lease(%s, %s)",
            (subject, limit),
            lambda granted, seconds, used_up: _Lease(granted, now + seconds, used_up),
        )
        assert found is not None
        if len(self._leases) >= _MOST_SUBJECTS:
            self._leases = {name: lease for name, lease in self._leases.items() if lease.ends > now}
        self._leases[subject] = found
        return found

    async def close(self) -> None:
        """End what is under way."""
        for task in [*self._asking.values()]:
            end(task)
