"""Events: the changes in the sealed log, in the one order that all readers see."""

import base64
import binascii
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, NamedTuple

from frontdesk.core.caller import Caller, Identity
from frontdesk.db.database import Database, Transaction
from frontdesk.errors import (
    ClinicNotYours,
    CredentialsRequired,
    CursorLost,
    CursorTooOld,
    InvalidField,
    RoleRequired,
)

TYPES = frozenset(
    f"{noun}.{verb}"
    for noun, verbs in {
        "appointment": "booked cancelled moved_in moved_out updated no_show undone",
        "queue": "checked_in called called_again returned parked missed left started completed priority_set"
        " transferred_out transferred_in",
        "doctor_day": "availability_set",
        "clinic": "created updated",
        "doctor": "created updated",
        "patient": "registered updated merged",
        "slot": "created updated blocked released deleted",
        "schedule": "set exception_set exception_deleted",
        "leave": "created applied cancelled",
        "waitlist": "joined offered accepted declined offer_expired left expired",
        "registration": "processed completed failed",
        "payment": "recorded refunded waived",
        "user": "registered created updated roles_set patient_linked password_changed logged_out refresh_reused"
        " second_factor_enrolled second_factor_confirmed second_factor_removed second_factor_reset"
        " email_verified password_reset_requested password_reset",
        "api_key": "created revoked",
    }.items()
    for verb in verbs.split()
)
"""Every type that the log has or will have."""

MERGED = "patient.merged"
"""The type of an event that concerns two records."""

SCANNED = 20_000
"""The rows of the log that one call looks at, at most."""

AT_ONCE = 250
"""The most events that are read at once: some milliseconds of work."""

_OF_USERS = ("user.", "api_key.")
_FORM = struct.Struct(">BQ")
_VERSION = 1
_PIECE = 15
"""Bytes of the chain in a cursor: enough that no other history has the same, and the text needs no padding."""


class Cursor(NamedTuple):
    """A place in the log: between two rows."""

    position: int
    """Of the row before it; 0 is the beginning."""
    piece: bytes
    """Of the chain there. A log that was restored and went another way has another one."""

    @classmethod
    def at(cls, position: int, chain: bytes) -> "Cursor":
        """The place after the row of this position."""
        return cls(position, chain[:_PIECE])

    def encode(self) -> str:
        """The text for the wire."""
        return base64.urlsafe_b64encode(_FORM.pack(_VERSION, self.position) + self.piece).decode()

    @classmethod
    def decode(cls, text: str) -> "Cursor":
        """Raises InvalidField if `encode` cannot have made the text."""
        try:
            raw = base64.b64decode(text, altchars=b"-_", validate=True)
            version, position = _FORM.unpack_from(raw)
            found = cls(position, raw[_FORM.size :])
        except (binascii.Error, ValueError, struct.error):
            raise InvalidField(("cursor", "is malformed")) from None
        if version != _VERSION or position >= 2**63 or len(found.piece) != _PIECE or found.encode() != text:
            raise InvalidField(("cursor", "is malformed"))
        return found


class Event(NamedTuple):
    """One change, in ids, states and times."""

    position: int
    """In the sealed log, which has other rows too: so positions grow, and not by one."""
    chain: bytes
    """The hash of the log up to here."""
    id: str
    type: str
    """Such as appointment.booked."""
    time: datetime
    actor: str
    method: str
    """The RPC that made the change."""
    resource: str
    clinic_id: str | None
    doctor_id: str | None
    patient_id: str | None
    appointment_id: str | None
    slot_id: str | None
    date: date | None
    revision: int
    """Of the doctor-day; 0 if the change is of none."""
    queue_state: str | None
    """Of the patient's entry in the queue, if the change touches the queue; also of the fields that follow `data`."""
    data: Mapping[str, Any] | None
    ticket: int | None
    call_count: int | None
    priority: str | None
    check_in_time: datetime | None
    call_time: datetime | None
    start_visit_time: datetime | None

    @property
    def cursor(self) -> Cursor:
        """The place after it."""
        return Cursor.at(self.position, self.chain)

    @property
    def texts(self) -> dict[str, str]:
        """More of the change by name, as readers are told it: ids, states and times as text."""
        found = {}
        for name, value in (self.data or {}).items():
            if value.__class__ is not str:
                value = _text(value)
            if value:
                found[name] = value
        if self.queue_state is not None:
            for name, value in zip(_OF_ENTRY, (self.queue_state, *self[_AFTER_DATA:]), strict=True):
                if value is not None:
                    found[name] = value if value.__class__ is str else _text(value)
        return found


_AFTER_DATA = Event._fields.index("data") + 1
_OF_ENTRY = ("queue_state", *Event._fields[_AFTER_DATA:])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if value.__class__ is bool:
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A stretch of the sealed log."""

    events: Sequence[Event]
    end: int
    """The position up to which it was read: that of a row which is no event, as the case may be."""


_COLUMNS = ", ".join(f"s.{name}" if name in ("position", "chain") else f"l.{name}" for name in Event._fields)

# A seal with a row that is no event has nulls. The subquery keeps the limit on positions, whatever they hold.
_read = f"""
select {_COLUMNS}
from (select position, chain, id from seal where position > %s order by position limit %s) s
left join log l on l.id = s.id and is_event(l.type)
order by s.position
"""


async def read_events(via: Database | Transaction, after: int, most: int) -> Stretch:
    """The events among the next `most` rows after this position. Its end is `after` if there is nothing new."""
    found = await via.rows(_read, (after, most), _columns)
    return Stretch(
        [Event._make(columns) for columns in found if columns[2] is not None], found[-1][0] if found else after
    )


async def reader_position(tx: Transaction, name: str) -> int:
    """How far the reader of this name has come, locked until the transaction ends; a new one begins at the start."""
    await tx.run("insert into log_reader (name, position) values (%s, 0) on conflict do nothing", (name,))
    found = await tx.row("select position from log_reader where name = %s for update", (name,), int)
    assert found is not None
    return found


async def advance_reader(tx: Transaction, name: str, position: int) -> None:
    """Remember how far the reader has come, in the transaction of what it did with the events up to there."""
    await tx.run("update log_reader set position = %s, update_time = moment() where name = %s", (position, name))


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What a reader asks for; what is None does not matter."""

    types: Collection[str] | None
    clinic_id: str | None
    doctor_id: str | None
    patient_id: str | None


@dataclass(frozen=True, slots=True)
class Reach:
    """The events that a reader is shown: those that he asks for, as far as he may see them."""

    users: bool
    """Also those of users and API keys."""
    types: frozenset[str] | None
    clinics: frozenset[str] | None
    """Only those of these clinics, and of none."""
    clinic_id: str | None
    doctor_id: str | None
    patient_ids: frozenset[str] | None
    """All records of the patient."""

    def passes(self, event: Event) -> bool:
        """Whether it has the event: what `read_stretch` decides in SQL."""
        if self.types is not None and event.type not in self.types:
            return False
        if self.doctor_id is not None and event.doctor_id != self.doctor_id:
            return False
        if self.clinic_id is not None and event.clinic_id != self.clinic_id:
            return False
        if self.clinics is not None and event.clinic_id is not None and event.clinic_id not in self.clinics:
            return False
        if not self.users and event.type.startswith(_OF_USERS):
            return False
        return self.patient_ids is None or not self.patient_ids.isdisjoint(patients_of(event))

    @property
    def values(self) -> tuple[Any, ...]:
        """As the parameters of `read_stretch` want them."""
        return (
            self.users,
            *(None if many is None else list(many) for many in (self.types, self.clinics)),
            self.clinic_id,
            self.doctor_id,
            None if self.patient_ids is None else list(self.patient_ids),
        )


def patients_of(event: Event) -> Sequence[str]:
    """The records that an event concerns: of a merge both."""
    if event.type == MERGED and event.data is not None:
        return (str(event.patient_id), str(event.data["merged_patient_id"]))
    return () if event.patient_id is None else (event.patient_id,)


class Pages(NamedTuple):
    """A part of what a reader is shown."""

    events: Sequence[Event]
    end: Cursor
    """Up to where the log was read."""
    last: int
    """The last position of the log."""


EVERYTHING = Reach(True, None, None, None, None, None)
"""Every event."""

_place = "select position, chain, waiting::text[] from event_place(%s)"
_stretch = "select * from read_stretch(%s, %s, %s, %s, %s, %s, %s::text[], %s::uuid[], %s::uuid, %s::uuid, %s::uuid[])"
_same_record = "select same_record(%s)::text[]"
_elsewhere = """
select d.clinic_id from doctor d where d.id = %s and d.clinic_id <> all (%s::uuid[])
"""


class Events:
    """Shows the log to those who follow it."""

    def __init__(self, db: Database, *, keep_seconds: float) -> None:
        """Events that are older than `keep_seconds` are not shown."""
        self._db = db
        self._keep_seconds = keep_seconds

    async def reach(self, identity: Identity, caller: Caller, wanted: EventFilter) -> Reach:
        """What the caller is shown of what he asks for.

        Raises InvalidField, ClinicNotYours, RoleRequired, CredentialsRequired.
        """
        users = "ADMIN" in identity.roles and caller.sight is None
        types = None if wanted.types is None else frozenset(wanted.types)
        if types is not None:
            if types - TYPES:
                raise InvalidField(("types", "has a type that does not exist"))
            if not users and any(one.startswith(_OF_USERS) for one in types):
                raise CredentialsRequired if identity.unrestricted else RoleRequired(details={"field": "types"})
        clinics = None if caller.sight is None else frozenset(caller.sight.clinic_ids or ())
        if wanted.clinic_id is not None:
            caller.require_clinic(wanted.clinic_id)
        if wanted.doctor_id is not None and clinics is not None:
            elsewhere = await self._db.row(_elsewhere, (wanted.doctor_id, list(clinics)), str)
            if elsewhere is not None:
                raise ClinicNotYours(elsewhere)
        patients = None
        if wanted.patient_id is not None:
            # Nobody's id is a record of its own.
            found: list[str | None] | None = await self._db.row(_same_record, (wanted.patient_id,), list)
            patients = frozenset({wanted.patient_id, *(one for one in found or () if one)})
        return Reach(users, types, clinics, wanted.clinic_id, wanted.doctor_id, patients)

    async def start(self) -> Cursor:
        """The place before the oldest event that is kept."""
        place, _ = await self._place(self._keep_seconds)
        return place

    async def now(self) -> Cursor:
        """The present end of the log."""
        place, _ = await self.from_now()
        return place

    async def from_now(self) -> tuple[Cursor, Collection[str]]:
        """The present end, and the ids of changes that come after it although they were made before."""
        return await self._place(None)

    async def _place(self, keep_seconds: float | None) -> tuple[Cursor, Collection[str]]:
        found = await self._db.row(
            _place, (keep_seconds,), lambda position, chain, waiting: (Cursor.at(position, chain), waiting or ())
        )
        assert found is not None
        return found

    async def list(self, after: Cursor, reach: Reach, size: int, *, resumes: bool) -> Pages:
        """At most `size` events of a bounded stretch of the log. Raises as `read`."""
        events: list[Event] = []
        end, scanned = after, 0
        while True:
            # In parts, so that other calls of this process get their turns.
            part = await self.read(
                end, reach, min(size - len(events), AT_ONCE), rows=SCANNED - scanned, resumes=resumes and not scanned
            )
            scanned += part.end.position - end.position
            events += part.events
            end = part.end
            if len(events) == size or end.position >= part.last or scanned >= SCANNED:
                return Pages(events, end, part.last)

    async def read(
        self, after: Cursor, reach: Reach, size: int, *, rows: int = SCANNED, resumes: bool = False
    ) -> Pages:
        """At most `size` events of those in the next `rows` rows of the log.

        `resumes`: the reader comes with the cursor, so he is told if he has missed something.

        Raises CursorLost, CursorTooOld.
        """
        keep = self._keep_seconds if resumes else None
        found = await self._db.rows(_stretch, (*after, rows, size, keep, *reach.values), _columns)
        standing, end, chain, last = found[0][:4]
        if standing == "LOST":
            raise CursorLost(details={"cursor": Cursor.at(end, chain).encode()})
        if standing == "TOO_OLD":
            raise CursorTooOld
        events = [Event._make(columns[4:]) for columns in found if columns[4] is not None]
        if len(events) == size:
            end, chain = events[-1].position, events[-1].chain
        return Pages(events, Cursor.at(end, chain), last)


def _columns(*columns: Any) -> tuple[Any, ...]:
    return columns
