"""Notifications: what patients were told of their appointments, and how they want to be told.

What is planned and whether it is still true is decided in `db/sql/notification.sql`; `jobs/notifying.py` sends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, datetime
from typing import Any

from frontdesk.core.caller import Caller
from frontdesk.db.change import Change, Key, append, claim
from frontdesk.db.database import Database, Transaction
from frontdesk.db.paging import Listing, Page, cut
from frontdesk.errors import (
    AppointmentNotFound,
    EtagMismatch,
    InvalidField,
    InvalidTransition,
    NoChannel,
    NotificationNotFound,
    PatientNotFound,
)

EMAIL, WEBHOOK = "EMAIL", "WEBHOOK"

READER = "notifications"
"""The name of the reader of the log that plans."""


@dataclass(frozen=True, slots=True)
class Notification:
    id: str
    kind: str
    channel: str
    state: str
    skip_reason: str
    appointment_id: str | None
    patient_id: str | None
    attempts: int
    failure: str
    plan_time: datetime
    send_time: datetime | None


@dataclass(frozen=True, slots=True)
class NotificationFilter:
    """What ListNotifications asks for; what is None does not matter."""

    appointment_id: str | None
    patient_id: str | None
    state: str | None
    kind: str | None
    time_from: datetime | None
    time_to: datetime | None


@dataclass(frozen=True, slots=True)
class ContactPreferences:
    patient_id: str
    channels: Sequence[str]
    language: str
    reminders: bool
    version: int
    update_time: datetime | None


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A notification that is to be sent now, with everything that its text needs. Never in a log."""

    id: str
    kind: str
    attempts: int
    """This one included."""
    sequence: int
    """How many changes of the appointment came before: iCalendar's SEQUENCE."""
    plan_time: datetime
    appointment_id: str | None
    patient_id: str | None
    user_id: str | None
    to: str
    """The e-mail address, or the phone."""
    language: str
    """As the patient wants it; empty means the clinic's."""
    country: str
    """Of the clinic."""
    name: str
    doctor: str
    clinic: str
    address: str
    city: str
    phone: str
    email: str
    time_zone: str
    date: date | None
    start_time: datetime | None
    end_time: datetime | None
    local_start: datetime | None
    """`start_time` by the clinic's clock, without a zone."""
    reminder: bool
    until: datetime | None
    """By the clinic's clock: when the offer that it tells of runs out."""


class Unsent(Exception):
    """An attempt to send has failed; the message is a code such as SMTP_451, without an address."""

    def __init__(self, code: str, *, for_good: bool = False, away: bool = False, perhaps: bool = False) -> None:
        super().__init__(code)
        self.code = code
        self.for_good = for_good
        """No other attempt will do better."""
        self.away = away
        """It is not this one that was refused: nothing can be sent on this channel just now."""
        self.perhaps = perhaps
        """It may have been sent for all that."""


_COLUMNS = ", ".join(f"n.{field.name}" for field in fields(Notification))
_get = f"select n.clinic_id, {_COLUMNS} from notification n where n.id = %s"
_CONDITIONS = {
    "appointment_id": "n.appointment_id = %(appointment_id)s",
    "patient_id": "n.patient_id = any (same_record(%(patient_id)s))",
    "state": "n.state = %(state)s",
    "kind": "n.kind = %(kind)s",
    "time_from": "n.plan_time >= %(time_from)s",
    "time_to": "n.plan_time < %(time_to)s",
    "clinics": "n.clinic_id = any (%(clinics)s::uuid[])",
    "ids": "n.id = any (%(ids)s::uuid[])",
    "after": "n.id < %(after)s",
}
_visit = """
select a.clinic_id, a.state, a.queue_state from appointment a where a.id = %s
"""
_plan = """
select plan_notification(
    a, 'CONFIRMATION', %(channels)s::text[], moment(),
    coalesce((select max(n.sequence) from notification n where n.appointment_id = a.id), 0), %(cause)s)
from appointment a where a.id = %(appointment)s
"""
_planned = f"select {_COLUMNS} from notification n where n.cause = %s order by n.channel"
# Each is an entry of the audit, because each concerns somebody else.
_redrive = """
with redriven as (
    update notification n set state = 'PLANNED', failure = '', try_time = null, due_since = null
    where n.state = 'DEAD' and {} returning n.*)
insert into log (id, time, actor, method, address, trace_id, type, resource, clinic_id, patient_id, appointment_id)
select log_id(now), now, %(actor)s, %(method)s, %(address)s, %(trace_id)s, 'notification.redriven',
       'notifications/' || r.id, r.clinic_id, r.patient_id, r.appointment_id
from redriven r, (select moment() as now offset 0) clock
"""
_keep_count = "update idempotency set revision = %s where caller = %s and method = %s and key = %s"
_kept_count = "select coalesce(revision, 0) from idempotency where caller = %s and method = %s and key = %s"

_preferences = """
select p.id, coalesce(c.channels, %(channels)s::text[]), coalesce(c.language, ''), coalesce(c.reminders, true),
       coalesce(c.version, 1), c.update_time
from patient p
left join lateral (
    select * from contact_preferences x where x.patient_id = any (same_record(p.id))
    order by x.patient_id = p.id desc, x.update_time desc limit 1) c on true
where p.id = current_patient(%(patient)s)
"""
_set_preferences = """
insert into contact_preferences (patient_id, channels, language, reminders, version, update_time)
values (%(patient)s, %(channels)s, %(language)s, %(reminders)s, %(version)s, moment())
on conflict (patient_id) do update
set channels = excluded.channels, language = excluded.language, reminders = excluded.reminders,
    version = excluded.version, update_time = excluded.update_time
"""


class Notifications:
    """Show what was told, tell again, and keep how patients want to be told."""

    def __init__(self, db: Database, channels: Sequence[str]) -> None:
        """`channels` are those that are configured."""
        self._db = db
        self._channels = channels

    async def send_confirmation(
        self, caller: Caller, appointment_id: str, *, key: Key
    ) -> Change[Sequence[Notification]]:
        """Plan one more confirmation on each channel.

        Raises AppointmentNotFound, ClinicNotYours, InvalidTransition, NoChannel.
        """

        async def work(tx: Transaction) -> Change[Sequence[Notification]]:
            claimed = await claim(tx, key)
            found = await tx.row(_visit, (appointment_id,), lambda *columns: columns)
            if found is None:
                raise AppointmentNotFound(appointment_id)
            clinic_id, state, queue_state = found
            caller.require_clinic(clinic_id)
            if not claimed.replayed:
                if state != "BOOKED":
                    raise InvalidTransition(appointment_id, {"state": state, "queue_state": queue_state})
                if not self._channels:
                    raise NoChannel
                values = {"appointment": appointment_id, "channels": self._channels, "cause": claimed.result_id}
                await tx.rows(_plan, values, lambda *_: None)
            planned = await tx.rows(_planned, (claimed.result_id,), Notification)
            if not claimed.replayed:
                ids = {"clinic_id": clinic_id, "patient_id": planned[0].patient_id}
                await append(tx, key, "notification.requested", f"notifications/{planned[0].id}", ids, {})
            return Change(list(map(_as_planned, planned)), claimed.replayed)

        return await self._db.transaction(work)

    async def get(self, caller: Caller, notification_id: str) -> Notification:
        """Raises NotificationNotFound, ClinicNotYours."""
        found = await self._db.row(_get, (notification_id,), lambda clinic, *columns: (clinic, Notification(*columns)))
        if found is None:
            raise NotificationNotFound(notification_id)
        clinic_id, notification = found
        if caller.sight is not None:
            # What is told to a user is of no clinic.
            caller.require_clinic(clinic_id or "")
        return notification

    async def list(self, caller: Caller, page: Page, wanted: NotificationFilter) -> Listing[Notification]:
        """Notifications, the latest first. Raises InvalidField."""
        conditions, values = _filtered(caller, wanted)
        if page.after is not None:
            conditions.append(_CONDITIONS["after"])
            values["after"] = page.after[0]
        where = " and ".join(conditions) or "true"
        # Those of an appointment or a patient are few: found first, and sorted then.
        fence = "offset 0" if wanted.appointment_id or wanted.patient_id else ""
        query = (
            f"select {_COLUMNS} from (select * from notification n where {where} {fence}) n"
            " order by n.id desc limit %(size)s"
        )
        found = await self._db.rows(query, {**values, "size": page.size + 1}, Notification)
        return cut(page, found, lambda one: (one.id,))

    async def redrive(self, caller: Caller, ids: Sequence[str], wanted: NotificationFilter, *, key: Key) -> Change[int]:
        """Plan those that were given up again, with these ids or by the filter; how many.

        Raises NotificationNotFound, ClinicNotYours, InvalidField.
        """
        ranged = wanted.time_from is not None or wanted.time_to is not None
        if bool(ids) == ranged:
            raise InvalidField(("time_from", "goes with no ids" if ids else "or time_to is required with a state"))

        async def work(tx: Transaction) -> Change[int]:
            claimed = await claim(tx, key)
            if claimed.replayed:
                return Change(await tx.row(_kept_count, (key.caller, key.method, key.name), int) or 0, True)
            if ids:
                await _require(tx, caller, ids)
                conditions, values = [_CONDITIONS["ids"]], {"ids": list(ids)}
            else:
                conditions, values = _filtered(caller, wanted)
            actor = {"actor": key.actor, "method": key.method, "address": key.address, "trace_id": key.trace_id}
            count = await tx.run(_redrive.format(" and ".join(conditions)), {**values, **actor})
            await tx.run(_keep_count, (count, key.caller, key.method, key.name))
            return Change(count, False)

        return await self._db.transaction(work)

    async def preferences(self, caller: Caller, patient_id: str) -> ContactPreferences:
        """How the patient wants to be told; of a merged record, the kept one's. Raises PatientNotFound."""
        return await self._own_preferences(self._db, caller, patient_id)

    async def set_preferences(
        self,
        caller: Caller,
        patient_id: str,
        channels: Sequence[str],
        language: str,
        reminders: bool,
        version: int | None,
        *,
        key: Key,
    ) -> Change[ContactPreferences]:
        """Replace how the patient wants to be told. Raises PatientNotFound, EtagMismatch."""

        async def work(tx: Transaction) -> Change[ContactPreferences]:
            claimed = await claim(tx, key)
            await tx.row("select from patient where id = current_patient(%s) for update", (patient_id,), lambda: None)
            current = await self._own_preferences(tx, caller, patient_id)
            if claimed.replayed:
                return Change(current, True)
            if version is not None and version != current.version:
                raise EtagMismatch(current.patient_id)
            values = {
                "patient": current.patient_id,
                "channels": sorted(channels),
                "language": language,
                "reminders": reminders,
                "version": current.version + 1,
            }
            await tx.run(_set_preferences, values)
            ids = {"patient_id": current.patient_id}
            await append(tx, key, "contact_preferences.set", f"contactPreferences/{current.patient_id}", ids, {})
            return Change(await self._own_preferences(tx, caller, patient_id), False)

        return await self._db.transaction(work)

    async def _own_preferences(
        self, via: Database | Transaction, caller: Caller, patient_id: str
    ) -> ContactPreferences:
        values: dict[str, Any] = {"patient": patient_id, "channels": list(self._channels)}
        query = _preferences
        if not caller.everywhere:
            assert caller.sight is not None
            query += " and p.id = current_patient(%(own)s)"
            values["own"] = caller.sight.patient_id
        found = await via.row(query, values, ContactPreferences)
        if found is None:
            raise PatientNotFound(patient_id)
        return found


def _as_planned(one: Notification) -> Notification:
    """As it was at first: a replay answers the state of the first success."""
    return replace(one, state="PLANNED", skip_reason="", attempts=0, failure="", send_time=None)


def _filtered(caller: Caller, wanted: NotificationFilter) -> tuple[list[str], dict[str, Any]]:
    if wanted.time_from and wanted.time_to and wanted.time_to < wanted.time_from:
        raise InvalidField(("time_to", "is before time_from"))
    values: dict[str, Any] = {
        field.name: value for field in fields(wanted) if (value := getattr(wanted, field.name)) is not None
    }
    conditions = [_CONDITIONS[name] for name in values]
    if caller.sight is not None:
        conditions.append(_CONDITIONS["clinics"])
        values["clinics"] = list(caller.sight.clinic_ids or ())
    return conditions, values


async def _require(tx: Transaction, caller: Caller, ids: Sequence[str]) -> None:
    clinics = dict(
        await tx.rows(
            "select id, clinic_id from notification where id = any (%s::uuid[])",
            (list(ids),),
            lambda found, clinic_id: (found, clinic_id),
        )
    )
    for one in ids:
        if one.lower() not in clinics:
            raise NotificationNotFound(one)
        if caller.sight is not None:
            caller.require_clinic(clinics[one.lower()] or "")
