"""Offer free places to patients who wait: see `db/sql/waitlist.sql`.

All here only says "look there": at a doctor-day, where a place may be free, or at an entry that must change. What is
found is decided under the locks, so to look twice, or in two replicas at once, does nothing twice. What has changed is
read from the log, whose position is moved on once all of it was looked at. The passing of time leaves nothing in the
log, so it is asked for. And the whole list is looked through slowly all the time, for ways that nobody has thought of.
"""

import asyncio
from collections.abc import Iterable, Sequence
from datetime import date

from frontdesk.core.event import Event, advance_reader, read_events, reader_position
from frontdesk.db.database import Database
from frontdesk.errors import Conflict

PAUSE_SECONDS = 0.5
"""Between two looks."""
_AT_ONCE = 500
_READER = "waitlist"
_OWN = ("waitlist.offered", "waitlist.accepted", "waitlist.declined", "waitlist.offer_expired", "waitlist.expired")

DoctorDayKey = tuple[str, date]

_offer = "select offered, busy from offer_places(%s, %s)"
_unsettled = "select id from unsettled_entries(%s) id"
_settle = "select doctor_id, date from settle_entry(%s)"
_free_for_entry = "select doctor_id, date from free_days(%s, null)"
_free_of_doctor = "select doctor_id, date from free_days(null, %s)"
_is_waiting = "select exists (select from waitlist_entry where id = %s and state = 'WAITING')"
_entries_of = "select id from waitlist_entry where patient_id = any (%s) and state = 'WAITING'"
_doctors_of = """
select distinct x.id from doctor x
where x.clinic_id = any (%s) and exists (
    select from waitlist_entry e
    where e.state = 'WAITING' and (e.doctor_id = x.id
          or e.doctor_id is null and e.clinic_id = x.clinic_id and e.specialty_key = x.specialty_key))
"""
_anybody = "select exists (select from waitlist_entry where state in ('WAITING', 'OFFERED'))"
# Holds end without a change. Those of the last minutes again: an offer that was made from them costs one look.
_ended_holds = """
select distinct doctor_id, date from hold
where state = 'HELD' and expire_time <= moment() and expire_time > moment() - interval '5 s' - make_interval(secs => %s)
"""
_next_entry = """
select id from waitlist_entry where state = 'WAITING' and id > %s order by id limit 1
"""
_FIRST = "00000000-0000-0000-0000-000000000000"


class Offering:
    """The look-out of one background process."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._look: dict[DoctorDayKey, None] = {}
        """Doctor-days where a place may be free, in the order in which they were noticed."""
        self._entries: dict[str, None] = {}
        """Entries for whom a place may be free."""
        self._swept = _FIRST
        self._held_since: float | None = None

    async def follow(self) -> None:
        """Look for ever. Raises DatabaseUnavailable."""
        while True:
            await self.look()
            await asyncio.sleep(PAUSE_SECONDS)

    async def look(self) -> None:
        """Offer what is free now."""
        read_to = await self._read_log()
        if await self._db.row(_anybody, (), bool):
            await self._settle()
            await self._watch_holds()
            await self._sweep()
            for entry_id in [*self._entries]:
                await self._seek(entry_id)
                del self._entries[entry_id]
            for key in [*self._look]:
                await self._offer(key)
        else:
            self._look.clear()
            self._entries.clear()
        if read_to is not None:
            await self._db.transaction(lambda tx: advance_reader(tx, _READER, read_to))

    async def _read_log(self) -> int | None:
        """Notice what has changed; the position up to which the log was read, None if there is nothing new."""
        began = await self._db.transaction(lambda tx: reader_position(tx, _READER))
        stretch = await read_events(self._db, began, _AT_ONCE)
        await self._notice(stretch.events)
        return stretch.end if stretch.end > began else None

    async def _notice(self, events: Sequence[Event]) -> None:
        patients, doctors, clinics = set(), set(), set()
        for event in events:
            if event.type in _OWN and event.date is None:
                continue
            if event.doctor_id is not None and event.date is not None:
                self._look[event.doctor_id, event.date] = None
            if event.type == "waitlist.joined":
                self._entries[event.resource.partition("/")[2]] = None
            elif event.patient_id is not None:
                patients.add(event.patient_id)
            if event.type.startswith(("leave.", "schedule.", "doctor.")) and event.doctor_id is not None:
                doctors.add(event.doctor_id)
            if event.type.startswith("clinic.") and event.clinic_id is not None:
                clinics.add(event.clinic_id)
        if patients:
            # Another appointment may have kept the patient from a place.
            self._entries.update(dict.fromkeys(await self._db.rows(_entries_of, (list(patients),), str)))
        if clinics:
            doctors |= set(await self._db.rows(_doctors_of, (list(clinics),), str))
        for doctor_id in doctors:
            self._notice_days(await self._db.rows(_free_of_doctor, (doctor_id,), _key))

    def _notice_days(self, keys: Iterable[DoctorDayKey]) -> None:
        self._look.update(dict.fromkeys(keys))

    async def _settle(self) -> None:
        for entry_id in await self._db.rows(_unsettled, (_AT_ONCE,), str):
            try:
                freed = await self._db.row(_settle, (entry_id,), lambda *key: key)
            except Conflict:
                continue
            if freed is not None and freed[0] is not None:
                self._look[freed[0], freed[1]] = None
                self._entries[entry_id] = None

    async def _watch_holds(self) -> None:
        now = asyncio.get_running_loop().time()
        since = 60.0 if self._held_since is None else now - self._held_since
        self._notice_days(await self._db.rows(_ended_holds, (since,), _key))
        self._held_since = now

    async def _sweep(self) -> None:
        found = await self._db.row(_next_entry, (self._swept,), str)
        if found is None:
            self._swept = _FIRST
        else:
            self._swept = found
            self._entries[found] = None

    async def _seek(self, entry_id: str) -> None:
        """Offer the places that are free for an entry, the first one first, until it has one."""
        for key in await self._db.rows(_free_for_entry, (entry_id,), _key):
            self._look.pop(key, None)
            await self._offer(key)
            if not await self._db.row(_is_waiting, (entry_id,), bool):
                return

    async def _offer(self, key: DoctorDayKey) -> None:
        self._look.pop(key, None)
        try:
            busy = await self._db.row(_offer, key, lambda _, busy: bool(busy))
        except Conflict:
            busy = True
        if busy:
            # Somebody has the lock of the doctor-day or of the first patient: again at the next look.
            self._look[key] = None


def _key(doctor_id: str, day: date) -> DoctorDayKey:
    return doctor_id, day
