"""Notifications: plan what events call for, and send what is due. `db/sql/notification.sql` decides both.

The row of a notification is the state of its job. One planner among all replicas reads the log, in one transaction with
what it plans; senders of all replicas take due rows, each row for some seconds.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

import psycopg
import structlog

from frontdesk.core import email_code
from frontdesk.core.event import Event, advance_reader, read_events, reader_position
from frontdesk.core.notification import READER, Outgoing, Unsent
from frontdesk.db.database import Database, Transaction
from frontdesk.errors import Refused
from frontdesk.jobs.circuit import Circuit, retry_seconds

POLL_SECONDS = 1.0
"""Between two looks for events and for what is due; a hint ends it sooner."""

CONCURRENCY = 8
"""Notifications of a channel that a process sends at once."""

RATE = 50.0
"""Notifications of a channel that a process begins in a second at most: after an outage thousands may be due."""

PROBE_SECONDS = 30.0
"""Between the beginnings of two probes at most."""

SEND_SECONDS = 15.0
"""One attempt."""

LEASE_SECONDS = 20.0
"""How long a sender has what it has taken: longer than an attempt. Then it is taken for killed."""

_LAST_SECONDS = 3.0
"""How long a process that ends waits for its attempts."""

_EVENTS = 500
"""Rows of the log in one transaction."""

_MEASURE_SECONDS = 5.0
"""Between two looks at how much is due."""

_FAULTS = (Refused, psycopg.Error, TimeoutError, OSError)

_behind = """
select coalesce((select max(position) from seal) > (select position from log_reader where name = %s), true)
"""
_skip = """
update log_reader set position = (select max(position) from seal), update_time = moment()
where name = %s and position < (select max(position) from seal)
"""
_plan = "select plan_notifications(%s, %s::text[])"
_claim = "select * from claim_notifications(%s, %s, %s)"
_sent = "select notification_sent(%s)"
_failed = "select coalesce(notification_failed(%s, %s, %s, %s, %s, %s, %s), false)"
_give_up = "select give_up_notifications(%s, %s, %s)"
_due = """
select count(*)::integer, coalesce(extract(epoch from moment() - min(plan_time)), 0)::float8
from (select plan_time from notification
      where channel = %s and state in ('PLANNED', 'SENDING') and plan_time <= (select moment())
      order by plan_time limit 10000) n
"""

_log = structlog.get_logger("frontdesk.notifications")


class Channel(Protocol):
    """A way out of the house."""

    @property
    def name(self) -> str: ...

    async def send(self, one: Outgoing, code: str) -> None:
        """Raises Unsent."""

    async def close(self) -> None: ...


class Planner:
    """Reads events and plans. Each background process has one; the row of the reader lets one at a time."""

    def __init__(self, db: Database, channels: Sequence[str], planned: Callable[[], None]) -> None:
        """`channels` are those that are configured; `planned` is called when something may be due."""
        self._db = db
        self._channels = list(channels)
        self._planned = planned
        self._wake = asyncio.Event()

    def changed(self) -> None:
        """The sealed log has grown: look now."""
        self._wake.set()

    async def follow(self) -> None:
        """Plan for ever. Raises DatabaseUnavailable."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            if not self._channels:
                # Nobody is told later of what was changed while nothing was configured.
                await self._db.run(_skip, (READER,))
                await asyncio.sleep(POLL_SECONDS)
            elif await self._db.row(_behind, (READER,), bool):
                while await self._db.transaction(self._plan_some):
                    self._planned()

    async def _plan_some(self, tx: Transaction) -> bool:
        position = await reader_position(tx, READER)
        stretch = await read_events(tx, position, _EVENTS)
        if stretch.end == position:
            return False
        if wanted := [_told(event) for event in stretch.events if _matters(event)]:
            await tx.row(_plan, (json.dumps(wanted), self._channels), lambda _: None)
        await advance_reader(tx, READER, stretch.end)
        return True


def _matters(event: Event) -> bool:
    match event.type:
        case "appointment.booked":
            return event.method != "AddWalkIn"
        case "appointment.moved_in" | "appointment.cancelled" | "appointment.no_show" | "queue.checked_in":
            return True
        case "appointment.undone":
            return (event.data or {}).get("undone") in ("CancelAppointment", "CheckIn")
        case "waitlist.offered":
            return True
    return False


def _told(event: Event) -> dict[str, Any]:
    return {
        "id": event.id,
        "position": event.position,
        "time": event.time.isoformat(),
        "type": event.type,
        "method": event.method,
        "undone": (event.data or {}).get("undone"),
        "appointment_id": event.appointment_id,
        "entry_id": event.resource.partition("/")[2] if event.type == "waitlist.offered" else None,
        "hold_id": (event.data or {}).get("hold_id"),
        "doctor_id": event.doctor_id,
        "date": None if event.date is None else event.date.isoformat(),
        "slot_id": event.slot_id,
    }


class Sender:
    """Sends what is due on one channel."""

    def __init__(self, db: Database, channel: Channel, patience_seconds: float) -> None:
        """`patience_seconds` is how long it is tried."""
        self._db = db
        self._channel = channel
        self._patience = patience_seconds
        self._circuit = Circuit()
        self._wake = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._began = 0.0
        """When the latest attempt began, by `time.monotonic`."""
        self.name = channel.name
        self.due = 0
        """How many are due and not sent yet, at most 10,000."""
        self.age = 0.0
        """Seconds for which the oldest of them has been due."""
        self.sent = 0
        self.dead = 0
        """How many this process has sent, and given up."""

    def planned(self) -> None:
        """Something may be due: look now."""
        self._wake.set()

    async def follow(self) -> None:
        """Send for ever. Raises DatabaseUnavailable."""
        while True:
            if self._circuit.open:
                # One at a time probes, and the rest waits for it.
                await self._settled()
                await asyncio.sleep(self._pause)
            self._wake.clear()
            room = 1 if self._circuit.open else CONCURRENCY - len(self._running)
            claimed = await self._db.rows(_claim, (self.name, room, LEASE_SECONDS), Outgoing) if room else []
            if claimed:
                self._began = time.monotonic()
            for one in claimed:
                task = asyncio.create_task(self._send(one), name="send")
                self._running.add(task)
                task.add_done_callback(self._running.discard)
            if claimed:
                await asyncio.sleep(len(claimed) / RATE)
            elif len(self._running) == CONCURRENCY:
                await asyncio.wait(self._running, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._wake.wait()

    @property
    def _pause(self) -> float:
        """Seconds until the channel is probed again. The time of an attempt in vain counts, because it may be long."""
        return max(0.0, min(self._circuit.wait_seconds, self._began + PROBE_SECONDS - time.monotonic()))

    async def finish(self) -> None:
        """Let the attempts end, for a while; what was begun and not ended is taken up again after its lease."""
        if self._running:
            await asyncio.wait(self._running, timeout=_LAST_SECONDS)
        for task in self._running:
            task.cancel()
        await self._settled()
        await self._channel.close()

    async def _settled(self) -> None:
        while self._running:
            await asyncio.wait(self._running)

    async def _send(self, one: Outgoing) -> None:
        probes = self._circuit.open
        try:
            async with asyncio.timeout(SEND_SECONDS):
                code = "" if one.user_id is None else await email_code.make(self._db, one.user_id, one.kind)
                await self._channel.send(one, code)
        except Unsent as unsent:
            await self._failed(one, unsent, probes)
        except Refused:
            # Our own database.
            await self._failed(one, Unsent("DATABASE_UNAVAILABLE"), probes)
        except TimeoutError:
            await self._failed(one, Unsent("TIMEOUT", away=True, perhaps=True), probes)
        except Exception as error:
            # A template of the operator's, or a fault of ours: the next attempt may be made by a better release.
            _log.error("notification_failed", notification=one.id, error=type(error).__name__)
            await self._failed(one, Unsent("INTERNAL", perhaps=True), probes)
        else:
            self._circuit.worked()
            await self._written(_sent, (one.id,))
            self.sent += 1

    async def _failed(self, one: Outgoing, unsent: Unsent, probed: bool) -> None:
        if not unsent.away:
            self._circuit.worked()
        elif probed or not self._circuit.open:
            # Of several that failed together the first one counts.
            self._circuit.failed()
        again = self._pause if unsent.away else retry_seconds(one.attempts)
        dead = await self._written(
            _failed,
            (one.id, one.attempts, unsent.code, unsent.for_good, unsent.perhaps, again, self._patience),
        )
        self.dead += bool(dead)
        _log.info("notification_unsent", notification=one.id, channel=self.name, failure=unsent.code, dead=bool(dead))
        if unsent.away:
            self.dead += await self._written(_give_up, (self.name, unsent.code, self._patience)) or 0

    async def _written(self, statement: str, params: tuple[Any, ...]) -> int | None:
        """Run a statement about what was done outside, however long the database is away."""
        while True:
            with suppress(*_FAULTS):
                return await self._db.row(statement, params, lambda found: found)
            await asyncio.sleep(0.5)

    async def measure(self) -> None:
        """Keep `due` and `age` for ever. Raises DatabaseUnavailable."""
        while True:
            found = await self._db.row(_due, (self.name,), lambda due, age: (due, age))
            assert found is not None
            self.due, self.age = found
            await asyncio.sleep(_MEASURE_SECONDS)
