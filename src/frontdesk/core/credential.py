"""Whose credentials a call brings: an API key's or a user's.

They are judged once and kept, because each judgement is a round trip.

A change of credentials or rights is a row of `access_change`, written in the change's own transaction (`changed`). Each
worker asks for them every second and forgets what they concern, so a revocation reaches every worker within seconds
although a call with known credentials asks nobody.
"""

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from frontdesk.core.caller import ANONYMOUS, Identity
from frontdesk.core.issuer import Issuers
from frontdesk.core.token import Tokens
from frontdesk.db.database import Database, Transaction
from frontdesk.errors import CredentialsExpired, CredentialsInvalid

POLL_SECONDS = 1.0
"""Seconds between two looks at `access_change`."""
_STALE_SECONDS = 3.0
"""Seconds without a look after which a call looks by itself first."""
_LOST_SECONDS = 600.0
"""Seconds without a look after which everything is judged anew: rows of `access_change` are deleted after an hour."""
_MOST_KEPT = 20_000

KEY_PREFIX = "fdk_"
_ID = re.compile("[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_KEY = re.compile(f"fdk_({_ID.pattern})_([-_0-9A-Za-z]{{43}})")

_changes = """
select pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
       array(select distinct subject from access_change where transaction >= %s)
"""
_api_key = """
select secret_hash, roles, clinic_ids, requests_per_minute, revoke_time is not null,
       extract(epoch from expire_time - moment())::float8, extract(epoch from expire_time - create_time)::float8
from api_key where id = %s
"""
_user = """
select roles, patient_id, doctor_id, clinic_ids, password_expire_time is not null, email_verified
from user_account u
where id = %(user)s and active and coalesce(password_expire_time > moment(), true)
  and exists (select from session where id = %(session)s and user_id = u.id and end_time is null)
"""


async def changed(tx: Transaction, subject: str) -> None:
    """Tell every worker, once this is committed, that the subject has changed: keys/ID, users/ID or sessions/ID."""
    await tx.run("insert into access_change (subject) values (%s) on conflict do nothing", (subject,))


def hash_of(secret: str) -> bytes:
    """The form in which a secret of 256 bits is stored. Of its text: two texts may stand for the same bits."""
    return hashlib.sha256(secret.encode()).digest()


@dataclass(frozen=True, slots=True)
class _Judged:
    identity: Identity
    until: float | None
    """When the credentials expire, by `time.monotonic`."""
    subjects: tuple[str, ...]
    """Whose changes end this judgement."""


_EXPIRED = _Judged(ANONYMOUS, float("-inf"), ())


class Credentials:
    """The identities of one worker's callers, by their credentials."""

    def __init__(
        self,
        db: Database,
        tokens: Tokens,
        issuers: Issuers,
        *,
        user_requests_per_minute: int,
        mails: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`user_requests_per_minute` is the limit of each user. Without `mails` every e-mail counts as verified."""
        self._mails = mails
        self._user_requests_per_minute = user_requests_per_minute
        self._db = db
        self._tokens = tokens
        self._issuers = issuers
        self._clock = clock
        self._known: dict[bytes, _Judged] = {}
        self._by_subject: dict[str, set[bytes]] = {}
        self._next: int | None = None
        """The transaction from which on changes are not yet known."""
        self._looked = float("-inf")
        self._looks = 0

    async def follow(self) -> None:
        """Look for changes for ever. Raises DatabaseUnavailable."""
        while True:
            await self._look()
            await asyncio.sleep(POLL_SECONDS)

    async def identity(self, given: str, unknown: Callable[[], None]) -> Identity:
        """The identity that the credentials prove. `unknown` is called before they are judged, which asks the database.

        Raises what it raises, CredentialsInvalid, CredentialsExpired.
        """
        now = self._clock()
        if now - self._looked > _STALE_SECONDS:
            await self._look()
        digest = hashlib.sha256(given.encode()).digest()
        known = self._known.get(digest)
        if known is None:
            unknown()
            looks = self._looks
            try:
                known = await self._judge(given)
            except CredentialsExpired:
                # Remembered too, or one that is good but for its time would be judged again without end.
                known = _EXPIRED
            known = replace(known, identity=replace(known.identity, digest=digest, until=known.until))
            # If there was a look meanwhile, it may have told of a change that this judgement has not seen.
            if looks == self._looks:
                self._keep(digest, known)
        if known.until is not None and known.until <= self._clock():
            raise CredentialsExpired
        return known.identity

    def knows(self, identity: Identity) -> bool:
        """Whether nothing has been heard that may change the identity since it was judged. Asks nobody."""
        if not identity.digest:
            return True
        known = self._known.get(identity.digest)
        return known is not None and known.identity is identity

    async def _judge(self, given: str) -> _Judged:
        if given.startswith(KEY_PREFIX):
            return await self._judge_key(given)
        if self._issuers.wrote(given):
            return await self._judge_outside(given)
        return await self._judge_token(given)

    async def _judge_outside(self, given: str) -> _Judged:
        proved = await self._issuers.prove(given)
        identity = Identity(
            proved.name,
            proved.roles,
            proved.clinic_ids,
            requests_per_minute=self._user_requests_per_minute,
            life=proved.life,
        )
        return _Judged(identity, self._clock() + proved.exp - time.time(), ())

    async def _judge_key(self, given: str) -> _Judged:
        parts = _KEY.fullmatch(given)
        if parts is None:
            raise CredentialsInvalid
        key_id, secret = parts.groups()
        row = await self._db.row(_api_key, (key_id,), lambda *columns: columns)
        if row is None:
            raise CredentialsInvalid
        stored, roles, clinic_ids, requests_per_minute, revoked, seconds, life = row
        if not hmac.compare_digest(bytes(stored), hash_of(secret)) or revoked:
            raise CredentialsInvalid
        name = f"keys/{key_id}"
        identity = Identity(
            name, frozenset(roles), tuple(clinic_ids), requests_per_minute=requests_per_minute, life=life
        )
        return _Judged(identity, None if seconds is None else self._clock() + seconds, (name,))

    async def _judge_token(self, given: str) -> _Judged:
        claims = await self._tokens.claims(given)
        user_id, session_id = claims["sub"], claims["sid"]
        if not all(isinstance(one, str) and _ID.fullmatch(one) for one in (user_id, session_id)):
            raise CredentialsInvalid
        row = await self._db.row(_user, {"user": user_id, "session": session_id}, lambda *columns: columns)
        if row is None:
            raise CredentialsInvalid
        roles, patient_id, doctor_id, clinic_ids, one_time_password, email_verified = row
        said = [claims.get(name) for name in ("roles", "patient_id", "doctor_id", "clinic_ids")]
        subjects = (f"users/{user_id}", f"sessions/{session_id}")
        if said != [roles, patient_id, doctor_id, clinic_ids]:
            return replace(_EXPIRED, subjects=subjects)
        identity = Identity(
            f"users/{user_id}",
            frozenset(roles),
            tuple(clinic_ids),
            patient_id,
            doctor_id,
            requests_per_minute=self._user_requests_per_minute,
            one_time_password=one_time_password,
            unverified_email=self._mails and "PATIENT" in roles and not email_verified,
            life=claims["exp"] - claims["iat"],
        )
        until = self._clock() + claims["exp"] - time.time()
        return _Judged(identity, until, subjects)

    async def _look(self) -> None:
        asked = self._clock()
        found: tuple[int, list[str]] | None = await self._db.row(
            _changes, (self._next,), lambda oldest, subjects: (oldest, subjects)
        )
        assert found is not None
        oldest, subjects = found
        # An older one than before: the database was restored.
        if self._next is None or oldest < self._next or asked - self._looked > _LOST_SECONDS:
            self._known.clear()
            self._by_subject.clear()
        for subject in subjects:
            for digest in self._by_subject.pop(subject, ()):
                self._known.pop(digest, None)
        self._next = oldest
        self._looked = asked
        self._looks += 1

    def _keep(self, digest: bytes, judged: _Judged) -> None:
        if len(self._known) >= _MOST_KEPT:
            self._forget(next(iter(self._known)))
        self._known[digest] = judged
        for subject in judged.subjects:
            self._by_subject.setdefault(subject, set()).add(digest)

    def _forget(self, digest: bytes) -> None:
        judged = self._known.pop(digest, None)
        for subject in () if judged is None else judged.subjects:
            others: Any = self._by_subject.get(subject, set())
            others.discard(digest)
            if not others:
                self._by_subject.pop(subject, None)
