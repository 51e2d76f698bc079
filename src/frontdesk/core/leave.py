"""Leave: when a doctor is away, and what becomes of the appointments that it meets (`db/sql/leave.sql`)."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime

from frontdesk.core import doctor
from frontdesk.core.caller import Caller
from frontdesk.core.decision import Changed, refusal
from frontdesk.core.formats import require_order
from frontdesk.db.change import Change, Key, append, claim
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import Conflict, EtagMismatch, LeaveNotFound, LeaveState

ANSWER_SECONDS = 5.0
"""How long CreateLeave waits until every appointment is settled."""

MOST_AFFECTED = 20_000
"""Settled appointments in one answer: more would be a message that a client refuses by default."""

_BATCH = 20
"""Appointments that are settled in one transaction: it holds their locks for some 50 ms."""

_BUSY_SECONDS = 0.02
"""Until the next try, if somebody else has settled a batch of the same leave."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Whole days have dates, hours have instants; the others are None."""

    id: str
    doctor_id: str
    clinic_id: str
    from_date: date | None
    to_date: date | None
    start_time: datetime | None
    end_time: datetime | None
    reason: str
    policy: str
    state: str
    affected_count: int
    version: int
    create_time: datetime
    update_time: datetime


@dataclass(frozen=True, slots=True)
class NewLeave:
    doctor_id: str
    from_date: date | None
    to_date: date | None
    start_time: datetime | None
    end_time: datetime | None
    reason: str
    policy: str


@dataclass(frozen=True, slots=True)
class Affected:
    """What became of an appointment; the place only of a moved one."""

    appointment_id: str
    outcome: str
    doctor_id: str | None
    date: date | None
    slot_id: str | None


@dataclass(frozen=True, slots=True)
class _Batch:
    outcome: str
    wanted: Sequence[str] | None
    doctors: Sequence[str] | None
    dates: Sequence[date] | None


Told = tuple[Leave, Sequence[Affected]]
"""A leave and what became of the appointments, in the order in which they were settled."""

COLUMNS = """
l.id, l.doctor_id, l.clinic_id, case when l.whole_days then l.from_date end,
       case when l.whole_days then l.to_date end, case when not l.whole_days then l.start_time end,
       case when not l.whole_days then l.end_time end, l.reason, l.policy, l.state,
       l.settled, l.version, l.create_time, l.update_time
"""
"""The columns of a `Leave`, in SQL; `l` is the row of the leave."""

_get = f"select {COLUMNS} from leave l where l.id = %s"
# The start as text: that of the last date that we have lies in the year 10000 in some zones, which Python cannot hold.
_list = f"""
select l.start_time::text, {COLUMNS} from leave l
where l.doctor_id = %(doctor)s and l.to_date >= coalesce(%(from)s::date, '-infinity')
  and l.from_date <= coalesce(%(to)s::date, 'infinity')
  and (%(after_time)s::timestamptz is null or (l.start_time, l.id) > (%(after_time)s, %(after_id)s::uuid))
order by l.start_time, l.id limit %(size)s
"""
_affected = """
select appointment_id, outcome, doctor_id, date, slot_id from leave_outcome where leave_id = %s
order by position limit %s
"""
_create = "select outcome, subject from create_leave(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
_settle = "select outcome, wanted, doctors, dates from settle_leave(%s, %s, %s)"
_counts = "select outcome, count(*) from leave_outcome where leave_id = %s group by 1"
_cancel = "update leave set state = 'CANCELLED', version = version + 1, update_time = moment() where id = %s"
_generate_again = """
select generate_again(doctor_id, daterange(from_date, to_date, '[]')) from leave where id = %s and whole_days
"""


class _Planned(Exception):
    """Undoes a plan, and carries it out of its transaction."""

    def __init__(self, told: Told) -> None:
        super().__init__()
        self.told = told


class Leaves:
    """Create, read and cancel leaves; settle the appointments that they meet."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self._db = db
        self._changed = changed

    async def create(self, caller: Caller, wanted: NewLeave, *, validate_only: bool, key: Key) -> Change[Told]:
        """Close what the leave takes, then settle the appointments that it meets, for some seconds at most.

        `settle` goes on with the rest. `validate_only` writes a leave and its outcomes, moves nobody, and is undone.

        Raises DoctorNotFound, ClinicNotYours, RoleRequired, DateInPast, LeaveOverlap.
        """

        async def work(tx: Transaction) -> tuple[str, bool]:
            claimed = await claim(tx, key)
            if claimed.replayed:
                first = await _read(tx, claimed.result_id)
                caller.require_doctor(first.clinic_id, first.doctor_id, key.method)
                return claimed.result_id, True
            of = await doctor.records.get(tx, wanted.doctor_id)
            caller.require_doctor(of.clinic_id, of.id, key.method)
            made = await tx.row(
                _create,
                (
                    claimed.result_id, wanted.doctor_id, wanted.from_date, wanted.to_date, wanted.start_time,
                    wanted.end_time, wanted.reason, wanted.policy, key.actor, key.address, key.trace_id,
                ),
                lambda outcome, subject: (outcome, subject),
            )  # fmt: skip
            assert made is not None
            if made[0] != "OK":
                raise refusal(*made, None)
            if validate_only:
                await tx.run("select plan_leave(%s)", (claimed.result_id,))
                planned = await _read(tx, claimed.result_id)
                raise _Planned((planned, await _read_affected(tx, claimed.result_id)))
            await _log(tx, key, await _read(tx, claimed.result_id), "created")
            return claimed.result_id, False

        try:
            leave_id, replayed = await self._db.transaction(work)
        except _Planned as planned:
            leave, affected = planned.told
            return Change((replace(leave, id="", state="APPLIED"), affected), replayed=False)
        await self.settle(leave_id, ANSWER_SECONDS)
        leave, affected = await self._tell(leave_id)
        if replayed and leave.state == "CANCELLED":
            # A replay answers the state of the first success.
            leave = replace(leave, state="APPLIED")
        return Change((leave, affected), replayed)

    async def get(self, caller: Caller, leave_id: str, insight: Caller | None) -> Told:
        """The leave and what became of the appointments; `insight` is the caller if a role gives the whole of it.

        Raises LeaveNotFound.
        """
        leave = await _read(self._db, leave_id)
        if not _may_know(insight, leave):
            return shown_to(insight, leave), ()
        return await self._tell(leave_id)

    async def list(
        self,
        caller: Caller,
        page: Page,
        doctor_id: str,
        from_date: date | None,
        to_date: date | None,
        insight: Caller | None,
    ) -> Listing[Leave]:
        """The leaves of a doctor that touch these dates, cancelled ones too, by start.

        Raises DoctorNotFound, InvalidField.
        """
        require_order(from_date, to_date)
        await doctor.records.get(self._db, doctor_id)
        after_time, after_id = page.after or (None, None)
        found = await self._db.rows(
            _list,
            {
                "doctor": doctor_id, "from": from_date, "to": to_date, "after_time": after_time, "after_id": after_id,
                "size": page.size + 1,
            },
            lambda start, *columns: (start, Leave(*columns)),
        )  # fmt: skip
        kept = cut(page, found, lambda row: (row[0], row[1].id))
        shown = [shown_to(insight, leave) for _, leave in kept.items]
        return Listing(shown, kept.next)

    async def cancel(self, caller: Caller, leave_id: str, version: int | None, *, key: Key) -> Change[Told]:
        """Open what the leave closed, and settle no more appointments. What was moved or cancelled stays so.

        Raises LeaveNotFound, ClinicNotYours, RoleRequired, LeaveState, EtagMismatch.
        """

        async def work(tx: Transaction) -> bool:
            claimed = await claim(tx, key)
            leave = await _read(tx, leave_id, lock=True)
            caller.require_doctor(leave.clinic_id, leave.doctor_id, key.method)
            if claimed.replayed:
                return True
            if version is not None and version != leave.version:
                raise EtagMismatch(leave_id)
            if leave.state == "CANCELLED":
                raise LeaveState(leave_id, {"state": leave.state})
            await tx.run(_cancel, (leave_id,))
            # After a generation that still saw the leave.
            await tx.run("select lock_all(array[schedule_name(%s)])", (leave.doctor_id,))
            await tx.run(_generate_again, (leave_id,))
            await _log(tx, key, await _read(tx, leave_id), "cancelled")
            return False

        replayed = await self._db.transaction(work)
        return Change(await self._tell(leave_id), replayed)

    async def applying(self) -> Sequence[str]:
        """The ids of leaves that have appointments to settle, the oldest first. Raises DatabaseUnavailable."""
        return await self._db.rows("select id from leave where state = 'APPLYING' order by id", (), str)

    async def settle(self, leave_id: str, seconds: float | None = None) -> None:
        """Settle the appointments that a leave meets, batch after batch, to the end or for so many seconds.

        Without `seconds` it also ends if somebody else settles the same leave, or has one of the locks for long. Raises
        DatabaseUnavailable.
        """
        until = None if seconds is None else time.monotonic() + seconds
        wanted: Sequence[str] = ()
        while until is None or time.monotonic() < until:
            try:
                batch = await self._settle_some(leave_id, wanted)
            except Conflict:
                batch = _Batch("BUSY", None, None, None)
            for doctor_id, on in set(zip(batch.doctors or (), batch.dates or (), strict=True)):
                self._changed(doctor_id, on)
            if batch.outcome in ("APPLIED", "ENDED"):
                return
            if batch.outcome == "BUSY":
                if until is None:
                    return
                await asyncio.sleep(_BUSY_SECONDS)
            else:
                wanted = batch.wanted or ()

    async def _settle_some(self, leave_id: str, wanted: Sequence[str]) -> _Batch:
        async def work(tx: Transaction) -> _Batch:
            batch = await tx.row(_settle, (leave_id, _BATCH, list(wanted)), _Batch)
            assert batch is not None
            if batch.outcome == "APPLIED":
                actor = await tx.row(
                    "select actor, 'CreateLeave', '', ''::bytea, address, trace_id from leave where id = %s",
                    (leave_id,),
                    Key,
                )
                assert actor is not None
                counts = await tx.rows(_counts, (leave_id,), lambda outcome, count: (outcome.lower(), str(count)))
                await _log(tx, actor, await _read(tx, leave_id), "applied", dict(counts))
            return batch

        return await self._db.transaction(work)

    async def _tell(self, leave_id: str) -> Told:
        return await _read(self._db, leave_id), await _read_affected(self._db, leave_id)


def _may_know(insight: Caller | None, leave: Leave) -> bool:
    """Whether somebody may know why, and what becomes of the appointments."""
    return insight is not None and insight.may_reach_doctor(leave.clinic_id, leave.doctor_id)


def shown_to(insight: Caller | None, leave: Leave) -> Leave:
    """The leave as this caller may see it: everybody may know when somebody is away."""
    return leave if _may_know(insight, leave) else replace(leave, reason="", affected_count=0)


async def _read(via: Database | Transaction, leave_id: str, *, lock: bool = False) -> Leave:
    found = await via.row(_get + (" for update of l" if lock else ""), (leave_id,), Leave)
    if found is None:
        raise LeaveNotFound(leave_id)
    return found


async def _read_affected(via: Database | Transaction, leave_id: str) -> Sequence[Affected]:
    return await via.rows(_affected, (leave_id, MOST_AFFECTED), Affected)


async def _log(tx: Transaction, key: Key, leave: Leave, event: str, more: dict[str, str] | None = None) -> None:
    times = {
        name: str(value.isoformat())
        for name in ("from_date", "to_date", "start_time", "end_time")
        if (value := getattr(leave, name)) is not None
    }
    ids = {"clinic_id": leave.clinic_id, "doctor_id": leave.doctor_id}
    data = {"state": leave.state, "policy": leave.policy, **times, **(more or {})}
    await append(tx, key, f"leave.{event}", f"leaves/{leave.id}", ids, data)
