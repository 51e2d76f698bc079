"""What the log says beside changes: who has read patients' records, and who was refused.

A call only appends to a list, which the worker writes into the log every second. If the database is away, notes are
kept up to a limit, and then dropped and counted: no call waits or fails for them. A worker that is killed loses the
notes of its last second, and refusals that it still sums.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from frontdesk.db.change import actor_of
from frontdesk.db.database import Database

WRITE_SECONDS = 1.0
"""Seconds between two writes."""
SUM_SECONDS = 60.0
"""Seconds for which equal refusals of a caller are summed, from the first one on."""
_MOST_KEPT = 20_000
_AT_ONCE = 1_000
_MOST_DIFFERENT = 100
"""Different things that a caller's refusals name; those of others are summed without it."""

_write = """
insert into log (id, time, actor, method, outcome, count, resource, clinic_id, doctor_id, patient_id, patient_ids,
                 appointment_id, date, address, trace_id)
select log_id(t), t, n.actor, n.method, n.outcome, n.count, n.resource,
       coalesce(n.clinic_id, (select d.clinic_id from doctor d where d.id = n.doctor_id)), n.doctor_id, n.patient_id,
       n.patient_ids, n.appointment_id, n.date, n.address, n.trace_id
from json_to_recordset(%s) as n (
         age float8, actor text, method text, outcome text, count integer, resource text, clinic_id uuid,
         doctor_id uuid, patient_id uuid, patient_ids uuid[], appointment_id uuid, date date, address text,
         trace_id text)
cross join lateral (select moment() - make_interval(secs => n.age) as t offset 0) at
"""


class _Read(NamedTuple):
    """Records that a call has read."""

    at: float
    """When, by the notes' clock."""
    identity: str
    method: str
    patient_ids: Sequence[str]
    about: Mapping[str, Any]
    address: str
    trace_id: str


class _Refusal(NamedTuple):
    """What refusals have in common that are summed."""

    actor: str
    method: str
    reason: str
    address: str
    about: tuple[tuple[str, str], ...]


class Notes:
    """The notes of one worker."""

    def __init__(self, db: Database, clock: Callable[[], float] = time.monotonic) -> None:
        self._db = db
        self._clock = clock
        self._reads: list[_Read] = []
        self._refusals: dict[_Refusal, tuple[float, int]] = {}
        """When the first of equal refusals came, and how many came."""
        self._different: Counter[tuple[str, str]] = Counter()
        """How many of them name a thing, of each actor at an address."""
        self.dropped = 0
        """How many notes were not written because the database was away for too long."""

    def read(
        self,
        identity: str,
        method: str,
        patient_ids: Sequence[str],
        about: Mapping[str, Any],
        address: str,
        trace_id: str,
    ) -> None:
        """A call has read these patients' records, one for each id; `about` are other columns of the log."""
        if len(self._reads) < _MOST_KEPT:
            self._reads.append(_Read(self._clock(), identity, method, patient_ids, about, address, trace_id))
        else:
            self.dropped += 1

    def refused(self, identity: str, method: str, reason: str, address: str, about: Mapping[str, str]) -> None:
        """A call was refused access; `about` are columns of the log: what the request named."""
        actor = actor_of(identity)
        what = _Refusal(actor, method, reason, address, tuple(sorted(about.items())))
        if what not in self._refusals and self._different[actor, address] >= _MOST_DIFFERENT:
            what = what._replace(about=())
        since, count = self._refusals.get(what, (self._clock(), 0))
        if count or len(self._refusals) < _MOST_KEPT:
            self._sum(what, since, count + 1)
        else:
            self.dropped += 1

    def _sum(self, what: "_Refusal", since: float, count: int) -> None:
        if what.about and what not in self._refusals:
            self._different[what.actor, what.address] += 1
        self._refusals[what] = since, count

    def _take(self, what: "_Refusal") -> tuple[float, int]:
        caller = (what.actor, what.address)
        if what.about:
            self._different[caller] -= 1
        if not self._different[caller]:
            del self._different[caller]
        return self._refusals.pop(what)

    async def follow(self) -> None:
        """Write for ever. Raises DatabaseUnavailable."""
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            await self._flush(self._clock() - SUM_SECONDS)

    async def finish(self) -> None:
        """Write all. Raises DatabaseUnavailable."""
        await self._flush(float("inf"))

    async def _flush(self, refused_before: float) -> None:
        """Write what was read, and what was refused for the first time before that."""
        while reads := self._reads[:_AT_ONCE]:
            await self._insert([self._row_of_read(read) for read in reads])
            # Others may have been appended meanwhile.
            del self._reads[: len(reads)]
        while due := [what for what, (since, _) in self._refusals.items() if since <= refused_before][:_AT_ONCE]:
            rows = {what: self._row_of_refusal(what, *self._take(what)) for what in due}
            try:
                await self._insert([*rows.values()])
            except BaseException:
                for what, row in rows.items():
                    _, count = self._refusals.get(what, (0.0, 0))
                    self._sum(what, self._clock() - row["age"], count + row["count"])
                raise

    async def _insert(self, rows: Sequence[Mapping[str, Any]]) -> None:
        await self._db.run(_write, (json.dumps(rows, default=str),))

    def _row_of_read(self, read: _Read) -> dict[str, Any]:
        different = sorted(set(read.patient_ids))
        return {
            "age": self._clock() - read.at,
            "actor": actor_of(read.identity),
            "method": read.method,
            "outcome": "OK",
            "count": len(read.patient_ids),
            **({"patient_id": different[0]} if len(different) == 1 else {"patient_ids": different or None}),
            **read.about,
            "address": read.address,
            "trace_id": read.trace_id,
        }

    def _row_of_refusal(self, what: "_Refusal", since: float, count: int) -> dict[str, Any]:
        return {
            "age": self._clock() - since,
            "actor": what.actor,
            "method": what.method,
            "outcome": what.reason,
            "count": count,
            **dict(what.about),
            "address": what.address,
            "trace_id": "",
        }
