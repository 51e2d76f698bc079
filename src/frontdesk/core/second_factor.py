"""The second factor of a login: codes of the time (TOTP, RFC 6238) and recovery codes, each good once.

To check a code of the time the service needs the secret itself, so the database has it as it is. Of recovery codes and
challenges it has hashes.
"""

import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from frontdesk.core.credential import hash_of
from frontdesk.db.database import Transaction
from frontdesk.errors import BadLogin, SecondFactorState

if TYPE_CHECKING:
    from pyotp import TOTP

ISSUER = "frontdesk"
"""As authenticator apps show it."""
RECOVERY_CODES = 10
CHALLENGE_MINUTES = 5
"""How long a login waits for its second factor."""
_TRIES = 5
"""Codes that may be tried for one challenge."""
_DIGITS = 6
_WINDOW_SECONDS = 30
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
"""Of recovery codes: no two look alike."""

_enroll = """
insert into second_factor (user_id, secret) values (%s, %s)
on conflict (user_id) do update set secret = excluded.secret, last_window = 0
"""
_locked = (
    "select secret, last_window, extract(epoch from moment())::float8 from second_factor where user_id = %s for update"
)
_begin = f"""
insert into login_challenge (hash, user_id, attempts, expire_time)
values (%s, %s, %s, moment() + interval '{CHALLENGE_MINUTES} minutes') returning expire_time
"""
_try = f"""
update login_challenge set tries = tries + 1
where hash = %s and tries < {_TRIES} and expire_time > moment() returning user_id, attempts
"""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a login with the right password gets if it takes a second factor."""

    challenge: str
    expire_time: datetime


async def enroll(tx: Transaction, user_id: str, email: str) -> str:
    """A new secret, which counts once a code of it is confirmed, as a URI for an authenticator app."""
    import pyotp

    secret = pyotp.random_base32()
    await tx.run(_enroll, (user_id, secret))
    return _totp(secret).provisioning_uri(name=email, issuer_name=ISSUER)


async def confirm(tx: Transaction, user_id: str, code: str) -> Sequence[str]:
    """The recovery codes, if the code is right. Raises BadLogin, SecondFactorState if no secret waits for it."""
    if await tx.row("select 1 from second_factor where user_id = %s", (user_id,), int) is None:
        raise SecondFactorState(user_id)
    if not await _is_of_time(tx, user_id, code):
        raise BadLogin
    codes = [_recovery_code() for _ in range(RECOVERY_CODES)]
    for one in codes:
        await tx.run("insert into recovery_code (user_id, hash) values (%s, %s)", (user_id, hash_of(_bare(one))))
    return codes


async def require(tx: Transaction, user_id: str, code: str) -> None:
    """Use up a code of the time or a recovery code. Raises BadLogin."""
    if not await _is_right(tx, user_id, code):
        raise BadLogin


async def remove(tx: Transaction, user_id: str) -> None:
    """Forget the secret and the recovery codes, and end the logins that wait for a code."""
    await end_challenges(tx, user_id)
    await tx.run("delete from recovery_code where user_id = %s", (user_id,))
    await tx.run("delete from second_factor where user_id = %s", (user_id,))


async def challenge(tx: Transaction, user_id: str, attempts: Sequence[bytes]) -> Challenge:
    """Let a login wait for its second factor; `attempts` are what `answered` gives back."""
    secret = secrets.token_urlsafe(32)
    expires: datetime | None = await tx.row(_begin, (hash_of(secret), user_id, list(attempts)), lambda instant: instant)
    assert expires is not None
    return Challenge(secret, expires)


async def answered(tx: Transaction, secret: str, code: str) -> tuple[str, Sequence[bytes]] | None:
    """The user of a challenge and its attempts, if the code is right; the challenge is used up then.

    None otherwise; this is to be committed, because it counts the try.
    """
    found = await tx.row(_try, (hash_of(secret),), lambda user_id, attempts: (user_id, attempts))
    if found is None:
        return None
    user_id, _ = found
    if not await _is_right(tx, user_id, code):
        return None
    await tx.run("delete from login_challenge where hash = %s", (hash_of(secret),))
    return found


async def end_challenges(tx: Transaction, user_id: str) -> None:
    """End the logins of the user that wait for a code."""
    await tx.run("delete from login_challenge where user_id = %s", (user_id,))


async def _is_right(tx: Transaction, user_id: str, code: str) -> bool:
    return await _is_of_time(tx, user_id, code) or await _is_recovery(tx, user_id, code)


async def _is_of_time(tx: Transaction, user_id: str, code: str) -> bool:
    row = await tx.row(_locked, (user_id,), lambda *columns: columns)
    if row is None:
        return False
    secret, last_window, now = row
    totp, given = _totp(secret), _bare(code)
    present = int(now) // _WINDOW_SECONDS
    for window in (present, present - 1):
        # Not the window of the last code that was used, nor one before it: each code is good once.
        if window > last_window and hmac.compare_digest(totp.generate_otp(window).encode(), given.encode()):
            await tx.run("update second_factor set last_window = %s where user_id = %s", (window, user_id))
            return True
    return False


async def _is_recovery(tx: Transaction, user_id: str, code: str) -> bool:
    used = "delete from recovery_code where user_id = %s and hash = %s"
    return await tx.run(used, (user_id, hash_of(_bare(code)))) == 1


def _totp(secret: str) -> "TOTP":
    # Imported when the first user needs it.
    import pyotp

    return pyotp.TOTP(secret, digits=_DIGITS, interval=_WINDOW_SECONDS)


def _recovery_code() -> str:
    """Sixteen letters and digits, which have 79 random bits, in groups of four."""
    return "-".join("".join(secrets.choice(_ALPHABET) for _ in range(4)) for _ in range(4))


def _bare(code: str) -> str:
    """The code as it is compared, however it was typed."""
    return code.replace(" ", "").replace("-", "").lower()
