"""Sessions: what a login begins, refresh tokens go on with, and a logout ends."""

import secrets
from dataclasses import dataclass
from typing import Any

from frontdesk.core import second_factor
from frontdesk.core.credential import changed, hash_of
from frontdesk.core.token import Tokens
from frontdesk.core.user import User, log_own, records
from frontdesk.db.change import Key, claim
from frontdesk.db.database import Database, Transaction
from frontdesk.errors import CredentialsExpired, CredentialsInvalid, RefreshReused, Refused

GRACE_SECONDS = 10.0
"""How long the refresh token before the present one may be repeated: the answer to it may have been lost."""
_SESSION_DAYS = 30
_IDLE_HOURS = 12


@dataclass(frozen=True, slots=True)
class Session:
    """What a login gives."""

    access_token: str
    seconds: int
    """How long the access token is good."""
    refresh_token: str
    user: User


@dataclass(frozen=True, slots=True)
class _Presented:
    """The session of a refresh token that somebody presents."""

    session_id: str
    user_id: str
    generation: int
    """Of the token."""
    latest: int
    """Of the session's newest token."""
    ended: bool
    expired: bool
    age: float
    """Seconds since the newest token was given."""


_session_of_token = f"""
select s.id, s.user_id, t.generation, s.generation, s.end_time is not null,
       moment() > least(s.create_time + interval '{_SESSION_DAYS} days',
                        s.refresh_time + interval '{_IDLE_HOURS} hours'),
       extract(epoch from moment() - s.refresh_time)::float8
from refresh_token t join session s on s.id = t.session_id where t.hash = %s for update of s
"""
_end_sessions = "update session set end_time = moment() where user_id = %s and end_time is null returning id"


class Sessions:
    """Begins sessions, goes on with them and ends them."""

    def __init__(self, db: Database, tokens: Tokens) -> None:
        self._db = db
        self._tokens = tokens

    async def ready(self) -> None:
        """Be able to sign access tokens. Not within a transaction, which would wait for another."""
        await self._tokens.ready()

    async def open(self, tx: Transaction, user: User) -> Session:
        """A new session of the user. `ready` must have been called."""
        session_id = await tx.row("insert into session (user_id) values (%s) returning id", (user.id,), str)
        assert session_id is not None
        return await self._session(tx, user, session_id, 1)

    async def _session(self, tx: Transaction, user: User, session_id: str, generation: int) -> Session:
        secret = secrets.token_urlsafe(32)
        await tx.run(
            "insert into refresh_token (hash, session_id, generation) values (%s, %s, %s)",
            (hash_of(secret), session_id, generation),
        )
        token = self._tokens.issue({"sub": user.id, "sid": session_id, **rights(user)})
        return Session(token, self._tokens.seconds, secret, user)

    async def refresh(self, refresh_token: str, *, key: Key) -> Session:
        """Go on with a session. `key` says whose call it is, and is not kept.

        Raises CredentialsInvalid, CredentialsExpired, RefreshReused.
        """
        await self._tokens.ready()

        async def work(tx: Transaction) -> Session | Refused:
            found = await tx.row(_session_of_token, (hash_of(refresh_token),), _Presented)
            if found is None or found.ended:
                return CredentialsInvalid()
            if found.expired:
                return CredentialsExpired()
            latest = found.latest
            again = found.generation == latest - 1 and found.age <= GRACE_SECONDS
            user = await records.get(tx, found.user_id)
            if found.generation != latest and not again:
                # Two have it, and nobody knows which of them is the thief.
                await _end_session(tx, found.session_id)
                # Not by the user: it may be the thief who calls.
                await records.log(tx, key, user, "refresh_reused", {})
                return RefreshReused()
            if not user.active:
                return CredentialsInvalid()
            if not again:
                latest += 1
                renew = "update session set generation = %s, refresh_time = moment() where id = %s"
                await tx.run(renew, (latest, found.session_id))
            return await self._session(tx, user, found.session_id, latest)

        # Answered and not raised, because a refusal is to be committed too.
        answer = await self._db.transaction(work)
        if isinstance(answer, Refused):
            raise answer
        return answer

    async def logout(self, refresh_token: str, *, everywhere: bool, key: Key) -> bool:
        """End the session of the token, or all of its user; whether this is a replay.

        All only with a token that a session goes on with: an old one may be stolen. Raises CredentialsInvalid.
        """

        async def work(tx: Transaction) -> bool:
            claimed = await claim(tx, key)
            if claimed.replayed:
                return True
            found = await tx.row(_session_of_token, (hash_of(refresh_token),), _Presented)
            if found is None:
                raise CredentialsInvalid
            if everywhere:
                # The one before the latest too: the answer with the latest may have been lost.
                if found.ended or found.expired or found.generation < found.latest - 1:
                    raise CredentialsInvalid
                await end_sessions(tx, found.user_id)
            elif found.ended:
                return False
            else:
                await _end_session(tx, found.session_id)
            await log_own(tx, key, await records.get(tx, found.user_id), "logged_out")
            return False

        return await self._db.transaction(work)


def rights(user: User) -> dict[str, Any]:
    """The claims of a token that give rights."""
    return {
        "roles": user.roles,
        "patient_id": user.patient_id,
        "doctor_id": user.doctor_id,
        "clinic_ids": user.clinic_ids,
    }


async def _end_session(tx: Transaction, session_id: str) -> None:
    await tx.run("update session set end_time = moment() where id = %s", (session_id,))
    await changed(tx, f"sessions/{session_id}")


async def end_sessions(tx: Transaction, user_id: str) -> None:
    """End every session of the user, and every login that waits for its second factor."""
    await second_factor.end_challenges(tx, user_id)
    for session_id in await tx.rows(_end_sessions, (user_id,), str):
        await changed(tx, f"sessions/{session_id}")
