"""Codes that are sent by mail: whoever has one reads the mails of its user."""

import hashlib
import secrets

from frontdesk.db.database import Database, Transaction

VERIFICATION, RESET = "EMAIL_VERIFICATION", "PASSWORD_RESET"
"""The kinds of notification that carry a code."""

_LETTERS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
"""Without those that look like others: 32, so 5 bits each."""
_GROUPS = 4

# Those before it stay good, because an earlier attempt may have been sent.
_make = "insert into email_code (hash, user_id, kind, expire_time) values (%s, %s, %s, moment() + interval '1 hour')"
_find = "select user_id from email_code where hash = %s and kind = %s and expire_time > moment()"
_use = "delete from email_code where hash = %s and kind = %s and expire_time > moment() returning user_id"
_forget = "delete from email_code where user_id = %s and kind = %s"
_plan = """
insert into notification (cause, kind, channel, user_id, patient_id, plan_time)
select new_id(), %(kind)s, 'EMAIL', u.id, u.patient_id, moment() from user_account u
where u.id = %(user)s and u.active
  and (%(again)s or not exists (
      select from notification n where n.user_id = u.id and n.kind = %(kind)s
         and n.plan_time > moment() - interval '1 hour'))
"""


async def plan(tx: Transaction, user_id: str, kind: str, *, again: bool = True) -> None:
    """Plan a mail with a code; unless `again`, only if none was planned within the hour."""
    await tx.run(_plan, {"user": user_id, "kind": kind, "again": again})


async def make(db: Database, user_id: str, kind: str) -> str:
    """A new code, good for an hour and once. Raises DatabaseUnavailable."""
    letters = "".join(secrets.choice(_LETTERS) for _ in range(5 * _GROUPS))
    code = "-".join(letters[n : n + 5] for n in range(0, len(letters), 5))
    await db.run(_make, (_hash(code), user_id, kind))
    return code


async def owner(db: Database, code: str, kind: str) -> str | None:
    """The user of a code that is good; it stays so."""
    return await db.row(_find, (_hash(code), kind), str)


async def use(tx: Transaction, code: str, kind: str) -> str | None:
    """The user of a code that is good; it and all others of the user and kind are not good any more."""
    user_id = await tx.row(_use, (_hash(code), kind), str)
    if user_id is not None:
        await tx.run(_forget, (user_id, kind))
    return user_id


def _hash(code: str) -> bytes:
    # 100 random bits need neither salt nor a slow hash.
    return hashlib.sha256(code.upper().replace("-", "").replace(" ", "").encode()).digest()
