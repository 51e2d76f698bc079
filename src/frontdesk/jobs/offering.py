"""Offer free places to patients who wait: see `db/sql/waitlist.sql`.

All here only says "look there": at a doctor-day, where a place may be free, or at an entry that must change. What is
found is decided under the locks, so to look twice, or in two replicas at once, does nothing twice. What has changed is
read from the log, whose position is moved on once all of it was looked at. The passing of time leaves nothing in the
log, so it is asked for. And the whole list is looked through slowly all the time, for ways that nobody has thought of.
"""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from datetime import date
from typing import TypeVar

import psycopg
import structlog

from frontdesk.core.event import Event, advance_reader, read_events, reader_position
from frontdesk.db.database import Database, Taken
from frontdesk.errors import Conflict, DatabaseUnavailable, Refused

PAUSE_SECONDS = 0.5
"""Between two looks."""
_AT_ONCE = 2_000
"""Rows of the log that are read at once."""
_SETTLED = 500
"""Entries that are settled in one look."""
_LONGEST_SECONDS = 7 * 86400.0
"""How long ended holds are kept: after a start all of them are looked at."""
_READER = "waitlist"

DoctorDayKey = tuple[str, date]
T = TypeVar("T")

_log = structlog.get_logger("frontdesk.waitlist")

# While nobody waits there is nothing to look for; who joins later has an event beyond this.
_anybody = "select exists (select from waitlist_entry where state in ('WAITING', 'OFFERED'))"
_skip = """
insert into log_reader as r (name, position)
select %s, coalesce(max(position), 0) from seal
having not exists (select from waitlist_entry where state in ('WAITING', 'OFFERED'))
on conflict (name) do update set position = excluded.position, update_time = moment()
where r.position < excluded.position
"""
_offer = "select offered, busy from offer_places(%s, %s)"
_unsettled = "select id from unsettled_entries(%s) id"
_settle = "select doctor_id, date from settle_entry(%s)"
_free_for_entry = "select doctor_id, date from free_days(%s, null)"
_free_of_doctor = "select doctor_id, date from free_days(null, %s)"
_is_waiting = "select exists (select from waitlist_entry where id = %s and state = 'WAITING')"
_entries_of = "select id from waitlist_entry where patient_id = any (%s) and state = 'WAITING'"
_that_would_move = """
select id from waitlist_entry e
where appointment_id = any (%s) and state in ('WAITING', 'OFFERED') and not is_unmoved(e)
"""
_doctors_of = """
select distinct x.id from doctor x
where x.clinic_id = any (%s) and exists (
    select from waitlist_entry e
    where e.state = 'WAITING' and (e.doctor_id = x.id
          or e.doctor_id is null and e.clinic_id = x.clinic_id and e.specialty_key = x.specialty_key))
"""
# Holds leave no event when they end: those that were given up stand in the log, the others run out.
_released = """
select distinct l.doctor_id, l.date from seal s join log l on l.id = s.id
where s.position > %s and s.position <= %s and l.type = 'hold.released'
"""
_run_out = """
select distinct doctor_id, date from hold
where state = 'HELD' and expire_time <= (select moment())
  and expire_time > (select moment() - make_interval(secs => 5 + %s))
  and date >= (select moment() - interval '2 days')::date
"""
_next_entry = "select id, is_unmoved(e) from waitlist_entry e where state = 'WAITING' and id > %s order by id limit 1"
_FIRST = "00000000-0000-0000-0000-000000000000"


class Offering:
    """The look-out of one background process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._position: int | None = None
        """Up to where the log was read. It is remembered once all that was noticed on the way is done."""
        self._look: dict[DoctorDayKey, None] = {}
        """Doctor-days where a place may be free, in the order in which they were noticed."""
        self._entries: dict[str, None] = {}
        """Entries for whom a place may be free."""
        self._changed: dict[str, None] = {}
        """Entries that may have to change."""
        self._swept = _FIRST
        self._held_since: float | None = None

    async def follow(self) -> None:
        """Look for ever. Raises DatabaseUnavailable."""
        while True:
            if not await self.look():
                await asyncio.sleep(PAUSE_SECONDS)

    async def look(self) -> bool:
        """Offer what is free now; whether there is more to read."""
        if not await self._db.row(_anybody, (), bool):
            await self._db.run(_skip, (_READER,))
            self._position = None
            return False
        began = self._position
        if began is None:
            began = await self._db.transaction(lambda tx: reader_position(tx, _READER))
        stretch = await read_events(self._db, began, _AT_ONCE)
        if stretch.end > began:
            await self._notice(stretch.events)
            self._notice_days(await self._db.rows(_released, (began, stretch.end), _key))
        await self._settle()
        await self._watch_holds()
        await self._sweep()
        while self._entries:
            entry_id = next(iter(self._entries))
            del self._entries[entry_id]
            await self._guarded(self._seek(entry_id))
        for key in [*self._look]:
            del self._look[key]
            await self._guarded(self._offer(key))
        self._position = stretch.end
        if not self._look and stretch.end > began:
            await self._db.transaction(lambda tx: advance_reader(tx, _READER, stretch.end))
        return stretch.end - began == _AT_ONCE

    async def _guarded(self, work: Awaitable[T]) -> T | None:
        """What cannot be done keeps nobody else waiting; the slow look through the list comes to it again."""
        try:
            return await work
        except DatabaseUnavailable:
            raise
        except (Refused, Taken, psycopg.Error, TimeoutError) as error:
            _log.warning("not_looked_at", error=type(error).__name__)
            return None

    async def _notice(self, events: Sequence[Event]) -> None:
        patients, doctors, clinics, moved = set(), set(), set(), set()
        for event in events:
            if event.doctor_id is not None and event.date is not None:
                self._look[event.doctor_id, event.date] = None
            if event.type == "waitlist.joined":
                self._entries[event.resource.partition("/")[2]] = None
            elif event.patient_id is not None:
                patients.add(event.patient_id)
            if event.appointment_id is not None:
                moved.add(event.appointment_id)
            # A slot that has moved may have left a day to day bookings.
            if event.doctor_id is not None and event.type.startswith(
                ("leave.", "schedule.", "doctor.", "slot.updated")
            ):
                doctors.add(event.doctor_id)
            changed = str((event.data or {}).get("fields", "")).split(",")
            if event.clinic_id is not None and event.type == "clinic.updated" and {"active", "time_zone"} & {*changed}:
                clinics.add(event.clinic_id)
        if patients:
            # Another appointment may have kept the patient from a place.
            self._entries.update(dict.fromkeys(await self._db.rows(_entries_of, (list(patients),), str)))
        if moved:
            self._changed.update(dict.fromkeys(await self._db.rows(_that_would_move, (list(moved),), str)))
        if clinics:
            doctors |= set(await self._db.rows(_doctors_of, (list(clinics),), str))
        for doctor_id in doctors:
            self._notice_days(await self._guarded(self._db.rows(_free_of_doctor, (doctor_id,), _key)) or ())

    def _notice_days(self, keys: Iterable[DoctorDayKey]) -> None:
        self._look.update(dict.fromkeys(keys))

    async def _settle(self) -> None:
        unsettled = await self._guarded(self._db.rows(_unsettled, (_SETTLED,), str)) or ()
        changed, self._changed = self._changed, {}
        for entry_id in {**dict.fromkeys(unsettled), **changed}:
            freed = await self._guarded(self._db.row(_settle, (entry_id,), lambda *key: key))
            if freed is not None and freed[0] is not None:
                self._look[freed[0], freed[1]] = None
                self._entries[entry_id] = None

    async def _watch_holds(self) -> None:
        now = asyncio.get_running_loop().time()
        since = _LONGEST_SECONDS if self._held_since is None else now - self._held_since
        self._notice_days(await self._db.rows(_run_out, (since,), _key))
        self._held_since = now

    async def _sweep(self) -> None:
        found = await self._db.row(_next_entry, (self._swept,), lambda *columns: columns)
        if found is None:
            self._swept = _FIRST
            return
        self._swept, unmoved = found
        (self._entries if unmoved else self._changed)[self._swept] = None

    async def _seek(self, entry_id: str) -> None:
        """Offer the places that are free for an entry, the first one first, until it has one."""
        for key in await self._db.rows(_free_for_entry, (entry_id,), _key):
            self._look.pop(key, None)
            await self._offer(key)
            if not await self._db.row(_is_waiting, (entry_id,), bool):
                return

    async def _offer(self, key: DoctorDayKey) -> None:
        try:
            busy = await self._db.row(_offer, key, lambda _, busy: bool(busy))
        except Conflict:
            busy = True
        if busy:
            # Somebody has the lock of the doctor-day or of the first patient: again at the next look.
            self._look[key] = None


def _key(doctor_id: str, day: date) -> DoctorDayKey:
    return doctor_id, day
