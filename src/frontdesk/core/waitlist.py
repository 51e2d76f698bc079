"""The waiting list: who waits for a place, and what is offered. `db/sql/waitlist.sql` decides about both."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date, datetime, timedelta
from functools import cache
from typing import Any

from frontdesk.core.appointment import Appointment, Appointments
from frontdesk.core.caller import Caller
from frontdesk.core.decision import Target, asked, iso, refusal
from frontdesk.core.names import folded
from frontdesk.db.batch import Batcher
from frontdesk.db.change import Change, Key
from frontdesk.db.database import Database
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import ClinicNotYours, Refused, WaitlistEntryNotFound


@dataclass(frozen=True, slots=True)
class Offer:
    """A place that is kept for a patient who waits."""

    doctor_id: str
    date: date
    slot_id: str | None
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class WaitlistEntry:
    """A patient who waits."""

    id: str
    patient_id: str
    clinic_id: str
    doctor_id: str | None
    """None if it is for any doctor of the specialty."""
    specialty: str
    from_date: date
    to_date: date
    weekdays: Sequence[int]
    """1 is Monday; empty means every day."""
    earliest: int | None
    """Minute of the clinic's day; so is the latest."""
    latest: int | None
    appointment_id: str | None
    priority: str
    state: str
    booked_appointment_id: str | None
    create_time: datetime
    update_time: datetime
    offer: Offer | None
    """If the state is OFFERED."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody joins the list for."""

    doctor_id: str | None
    clinic_id: str | None
    specialty: str
    from_date: date
    to_date: date
    weekdays: Sequence[int]
    earliest: int | None
    latest: int | None
    appointment_id: str | None


@dataclass(frozen=True, slots=True)
class WaitlistFilter:
    """What ListWaitlist asks for; what is None does not matter."""

    patient_id: str | None
    doctor_id: str | None
    clinic_id: str | None
    states: tuple[str, ...]
    """Empty means every state."""


_COLUMNS = [field.name for field in fields(WaitlistEntry) if field.name != "offer"]
_OFFER = [field.name for field in fields(Offer)]
_ENTRY = ", ".join([*(f"e.{name}" for name in _COLUMNS), *(f"h.{name}" for name in _OFFER)])

_decided = (
    "select d.outcome, d.subject, d.details, coalesce(d.replayed, false), "
    + ", ".join([*(f"(d.entry).{name}" for name in _COLUMNS), *(f"(d.hold).{name}" for name in _OFFER)])
    + " from decide(%s) d"
)
_CONDITIONS = {
    "id": "e.id = %(id)s",
    "patient_id": "e.patient_id = current_patient(%(patient_id)s)",
    "doctor_id": "e.doctor_id = %(doctor_id)s",
    "clinic_id": "e.clinic_id = %(clinic_id)s",
    "states": "e.state = any (%(states)s)",
    "after": "e.id > %(after)s",
}
_SIGHT = {
    "sight_clinics": "e.clinic_id = any (%(sight_clinics)s)",
    "sight_patient": "e.patient_id = current_patient(%(sight_patient)s)",
}


@cache
def _select(conditions: Collection[str], sight: Collection[str] | None) -> str:
    wanted = [_CONDITIONS[name] for name in sorted(conditions)]
    if sight is not None:
        wanted.append("(" + (" or ".join(_SIGHT[name] for name in sorted(sight)) or "false") + ")")
    # The entries of a patient or a doctor are few: found first, and sorted then.
    fence = "offset 0" if {"patient_id", "doctor_id"} & {*conditions} else ""
    return (
        f"select {_ENTRY} from (select * from waitlist_entry e where {' and '.join(wanted) or 'true'} {fence}) e"
        " left join hold h on h.id = e.hold_id and e.state = 'OFFERED' order by e.id limit %(size)s"
    )


def _entry(*columns: Any) -> WaitlistEntry:
    entry, offer = columns[: len(_COLUMNS)], columns[len(_COLUMNS) :]
    made: Any = WaitlistEntry
    found: WaitlistEntry = made(*entry, None if offer[0] is None else Offer(*offer))
    return found


def _decision(
    outcome: str, subject: str | None, details: Mapping[str, Any] | None, replayed: bool, *entry: Any
) -> Change[WaitlistEntry] | Refused:
    if outcome != "OK":
        return refusal(outcome, subject, details)
    return Change(_entry(*entry), replayed)


class Waitlist:
    """Join the list and leave it; offer places, accept and decline them."""

    def __init__(self, db: Database, appointments: Appointments) -> None:
        self._db = db
        self._appointments = appointments
        self._deciding: Batcher[Change[WaitlistEntry] | Refused] = Batcher(db, _decided, _decision)

    async def join(
        self, caller: Caller, patient_id: str, wish: Wish, priority: str, *, key: Key
    ) -> Change[WaitlistEntry]:
        """Wait for a place. Raises what JoinWaitlist names."""
        waits = {
            **asdict(wish),
            "specialty_key": folded(wish.specialty),
            "from_date": iso(wish.from_date),
            "to_date": iso(wish.to_date),
        }
        return await self._decide(
            asked(caller, key, patient=patient_id, doctor=wish.doctor_id, waits=waits, priority=priority)
        )

    async def leave(self, caller: Caller, entry_id: str, *, key: Key) -> Change[WaitlistEntry]:
        """Leave the list. Raises what LeaveWaitlist names."""
        return await self._decide(asked(caller, key, entry=entry_id))

    async def offer(
        self, caller: Caller, entry_id: str, target: Target, ttl: timedelta | None, *, key: Key
    ) -> Change[WaitlistEntry]:
        """Offer a place of the desk's choice; `ttl` None is the clinic's. Raises what OfferPlace names."""
        length = None if ttl is None else f"{ttl // timedelta(microseconds=1)} microseconds"
        wanted = {"slot": target.slot_id, "doctor": target.doctor_id, "date": iso(target.on)}
        return await self._decide(asked(caller, key, entry=entry_id, ttl=length, **wanted))

    async def decline(self, caller: Caller, entry_id: str, *, leave: bool, key: Key) -> Change[WaitlistEntry]:
        """Let the offered place go, and with `leave` also leave the list. Raises what DeclineOffer names."""
        return await self._decide(asked(caller, key, entry=entry_id, leaves=leave))

    async def accept(self, caller: Caller, entry_id: str, *, key: Key) -> tuple[WaitlistEntry, Change[Appointment]]:
        """Take the offered place. Raises what AcceptOffer names."""
        change = await self._appointments.decide(caller, key, entry=entry_id)
        return await self.get(caller, entry_id), change

    async def get(self, caller: Caller, entry_id: str) -> WaitlistEntry:
        """Raises WaitlistEntryNotFound, ClinicNotYours."""
        parts = _sight(caller)
        found = await self._db.row(
            _select(frozenset({"id"}), None if parts is None else frozenset(parts)),
            {"id": entry_id, "size": 1, **(parts or {})},
            _entry,
        )
        if found is None:
            if parts and "sight_clinics" in parts:
                elsewhere = await self._db.row("select clinic_id from waitlist_entry where id = %s", (entry_id,), str)
                if elsewhere is not None:
                    raise ClinicNotYours(elsewhere)
            raise WaitlistEntryNotFound(entry_id)
        return found

    async def list(self, caller: Caller, page: Page, wanted: WaitlistFilter) -> Listing[WaitlistEntry]:
        """The entries in the caller's sight for which every given filter holds, in the order of joining."""
        if wanted.clinic_id is not None and caller.everywhere:
            caller.require_clinic(wanted.clinic_id)
        values: dict[str, Any] = {
            field.name: value for field in fields(wanted) if (value := getattr(wanted, field.name))
        }
        if wanted.states:
            values["states"] = list(wanted.states)
        if page.after:
            values["after"] = page.after[0]
        parts = _sight(caller)
        found = await self._db.rows(
            _select(frozenset(values), None if parts is None else frozenset(parts)),
            {**values, **(parts or {}), "size": page.size + 1},
            _entry,
        )
        return cut(page, found, lambda entry: (entry.id,))

    async def _decide(self, request: Mapping[str, Any]) -> Change[WaitlistEntry]:
        decided = await self._deciding.ask(request)
        if isinstance(decided, Refused):
            raise decided
        return decided


def _sight(caller: Caller) -> dict[str, Any] | None:
    """The bind parameters of what a restricted caller may see; None if he may see everything."""
    if caller.sight is None:
        return None
    return {name: value for name, value in caller.sight.parts.items() if name in _SIGHT}
