"""Delete old idempotency keys and old rows of the log, so that the tables do not grow without end."""

import asyncio
from dataclasses import dataclass

from psycopg.abc import Params

from frontdesk.db.database import Database
from frontdesk.settings import Settings

BATCH = 2_000
"""Rows of one transaction: few enough that no call waits for it."""

# Rows that another transaction has locked are left for the next time. The block range index finds the old ones, because
# rows are stored in the order of their times.
_keys = """
delete from idempotency where ctid = any (array(
    select ctid from idempotency
    where create_time < moment() - make_interval(secs => %s) limit %s for update skip locked))
"""
# Workers ask for these every second, and judge everything anew when they could not for ten minutes.
_access_changes = """
delete from access_change where ctid = any (array(
    select ctid from access_change where create_time < moment() - interval '1 hour' limit %s for update skip locked))
"""
# A session's refresh tokens go with it. Those of ended ones are kept for a while, so that a late use is told the truth.
_sessions = """
delete from session where ctid = any (array(
    select ctid from session where refresh_time < moment() - interval '31 days' limit %s for update skip locked))
"""
_login_attempts = """
delete from login_attempt where ctid = any (array(
    select ctid from login_attempt where last_time < moment() - interval '1 day' limit %s for update skip locked))
"""
_challenges = """
delete from login_challenge where ctid = any (array(
    select ctid from login_challenge where expire_time < moment() limit %s for update skip locked))
"""
# An ended hold is kept so long that whoever comes with it late is told the truth.
_holds = """
delete from hold where ctid = any (array(
    select ctid from hold where expire_time < moment() - interval '7 days' limit %s for update skip locked))
"""
# Of a visit as long as its changes are kept, so that a late cancellation still knows who was told.
_notifications = """
delete from notification where ctid = any (array(
    select n.ctid from notification n
    where n.plan_time < moment() - make_interval(secs => %(keep)s)
      and coalesce((select a.date from appointment a where a.id = n.appointment_id), '-infinity')
          < (moment() - make_interval(secs => %(keep)s))::date
      and n.state not in ('PLANNED', 'SENDING') limit %(most)s for update skip locked))
"""
_email_codes = """
delete from email_code where ctid = any (array(
    select ctid from email_code where expire_time < moment() limit %s for update skip locked))
"""
_passes = """
delete from waitlist_pass where ctid = any (array(
    select ctid from waitlist_pass where date < (select moment() - interval '2 days') limit %s for update skip locked))
"""
_rate_windows = """
delete from rate_window where ctid = any (array(
    select ctid from rate_window where minute < clock_timestamp() - interval '1 hour' limit %s for update skip locked))
"""
_signing_keys = """
delete from signing_key where ctid = any (array(
    select ctid from signing_key where expire_time < moment() limit %s for update skip locked))
"""


def retention(settings: Settings) -> dict[str, float]:
    """The arguments of `clean` that the settings ask for."""
    return {
        "keep_keys_seconds": settings.keep_keys_hours * 3600,
        "keep_audit_seconds": settings.keep_audit_days * 86400,
        "keep_events_seconds": settings.keep_events_days * 86400,
    }


@dataclass(frozen=True, slots=True)
class Removed:
    """How many rows were deleted."""

    keys: int
    audit_events: int


async def clean(
    db: Database, *, keep_keys_seconds: float, keep_audit_seconds: float, keep_events_seconds: float = 90 * 86400
) -> Removed:
    """Delete idempotency keys, rows of the log and notifications that are older, in small transactions.

    A retry whose key was deleted acts again. Raises DatabaseUnavailable.
    """
    keys = await _delete_in_batches(db, _keys, (keep_keys_seconds, BATCH))
    for statement in (
        _access_changes,
        _sessions,
        _login_attempts,
        _challenges,
        _holds,
        _passes,
        _email_codes,
        _rate_windows,
        _signing_keys,
    ):
        await _delete_in_batches(db, statement, (BATCH,))
    await _delete_in_batches(db, _notifications, {"keep": keep_events_seconds, "most": BATCH})
    audit_events = 0
    while deleted := await db.row("select delete_old_log(%s, %s)", (keep_audit_seconds, BATCH), int):
        audit_events += deleted
    return Removed(keys, audit_events)


async def _delete_in_batches(db: Database, statement: str, params: Params) -> int:
    total = 0
    while True:
        removed = await db.run(statement, params)
        total += removed
        if removed < BATCH:
            return total
        # Calls have priority.
        await asyncio.sleep(0.05)
