"""Users and their sessions: registering, logging in, refreshing, logging out, and the password."""

import asyncio
import hashlib
import secrets
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from frontdesk.core import second_factor
from frontdesk.core.caller import Caller
from frontdesk.core.credential import changed, hash_of
from frontdesk.core.formats import e164
from frontdesk.core.limit import holder_of
from frontdesk.core.password import Passwords, require_acceptable
from frontdesk.core.patient import Patients
from frontdesk.core.second_factor import Challenge
from frontdesk.core.token import Tokens
from frontdesk.db import schema
from frontdesk.db.change import Change, Key, acted, claim
from frontdesk.db.database import Database, Taken, Transaction
from frontdesk.db.records import Records
from frontdesk.errors import (
    BadLogin,
    CredentialsExpired,
    CredentialsInvalid,
    EmailTaken,
    LoginThrottled,
    PatientLinked,
    RefreshReused,
    Refused,
    RoleRequired,
    SecondFactorState,
    UserNotFound,
)

GRACE_SECONDS = 10.0
"""How long the refresh token before the present one may be repeated: the answer to it may have been lost."""
_SESSION_DAYS = 30
_IDLE_HOURS = 12
_LOGINS_IN_DATABASE = 2
"""Logins of one worker that use the database at once before their passwords are checked: when a thousand come, the
others' calls need its connections."""
_FAILURES_OF_ADDRESS = 5
"""Failures in a row of an e-mail from one address after which logins wait."""
_FAILURES_OF_ALL = 50
"""The same from all addresses together."""


@dataclass(frozen=True, slots=True)
class User:
    id: str
    email: str
    name: str
    phone: str
    address: str
    roles: list[str]
    patient_id: str | None
    doctor_id: str | None
    clinic_ids: list[str]
    email_verified: bool
    second_factor: bool
    active: bool
    version: int
    create_time: datetime
    update_time: datetime
    last_login_time: datetime | None


@dataclass(frozen=True, slots=True)
class Session:
    """What a login gives."""

    access_token: str
    seconds: int
    """How long the access token is good."""
    refresh_token: str
    user: User


@dataclass(frozen=True, slots=True)
class Registered:
    """A new user; in a replay without a session."""

    user: User
    session: Session | None


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


@dataclass(frozen=True, slots=True)
class _Password:
    user_id: str
    hash: str
    expired: bool
    """Of a one-time password."""


records = Records(
    schema.user_account,
    User,
    UserNotFound,
    {
        "user_account_email_key_key": (EmailTaken, "email_key"),
        "user_account_patient_id_key": (PatientLinked, "patient_id"),
    },
    noun="user",
)

# No row if the subject must wait. The delay doubles from 30 s to 15 min.
_count_attempt = """
insert into login_attempt as a (subject, count, last_time) values (%(subject)s, 1, moment())
on conflict (subject) do update set
    count = case when a.last_time < moment() - interval '1 day' then 1 else a.count + 1 end,
    last_time = moment(),
    wait_until = case when a.count + 1 >= %(most)s and a.last_time >= moment() - interval '1 day'
        then moment() + least(interval '15 minutes', interval '30 seconds' * 2 ^ least(a.count + 1 - %(most)s, 9)) end
where a.wait_until is null or a.wait_until <= moment()
returning count
"""
_wait = "select extract(epoch from wait_until - moment())::float8 from login_attempt where subject = %s"
_forget_attempts = "delete from login_attempt where subject = any (%s)"

_password = """
select id, password_hash, coalesce(password_expire_time <= moment(), false)
from user_account where {} and active
"""
_password_of_email = _password.format("email_key = %s")
_password_of_user = _password.format("id = %s")

_session_of_token = f"""
select s.id, s.user_id, t.generation, s.generation, s.end_time is not null,
       moment() > least(s.create_time + interval '{_SESSION_DAYS} days',
                        s.refresh_time + interval '{_IDLE_HOURS} hours'),
       extract(epoch from moment() - s.refresh_time)::float8
from refresh_token t join session s on s.id = t.session_id where t.hash = %s for update of s
"""
_end_sessions = "update session set end_time = moment() where user_id = %s and end_time is null returning id"


class Auth:
    """What people do with their own users."""

    def __init__(self, db: Database, passwords: Passwords, tokens: Tokens, patients: Patients) -> None:
        self._db = db
        self._passwords = passwords
        self._tokens = tokens
        self._patients = patients
        self._in_database = asyncio.Semaphore(_LOGINS_IN_DATABASE)

    async def register(
        self, caller: Caller, email: str, password: str, patient: Mapping[str, Any], country: str, *, key: Key
    ) -> Change[Registered]:
        """Make a user with the role PATIENT, and the patient if that person is not on file.

        Raises EmailTaken, InvalidField; BadLogin for a replay without the password that the user has.
        """
        require_acceptable(password, email, "password")
        hashed = await self._passwords.hashed(password, key)
        await self._tokens.ready()

        async def work(tx: Transaction) -> Change[Registered]:
            claimed = await claim(tx, key)
            if claimed.replayed:
                return Change(Registered(await records.get(tx, claimed.result_id), None), True)
            patient_id = await self._patients.register_unknown(tx, caller, patient, country, key=key)
            values = {
                "email": email,
                "email_key": email_key(email),
                "name": " ".join(filter(None, (patient["given_name"], patient.get("family_name")))),
                "roles": ["PATIENT"],
                "patient_id": patient_id,
                "password_hash": hashed,
            }
            user = await records.insert(tx, claimed.result_id, values)
            await self._log(tx, key, user, "registered")
            return Change(Registered(user, await self._open(tx, user)), False)

        try:
            change = await self._db.transaction(work)
        except Taken as taken:
            if taken.constraint != "user_account_email_key_key":
                raise
            # Not whose it is: the caller is a stranger.
            raise EmailTaken from None
        if change.replayed:
            # All callers without credentials have their keys in common.
            await self._require_same(change.result.user.id, password, hashed)
        return change

    async def _require_same(self, user_id: str, password: str, hashed: str) -> None:
        stored = await self._db.row("select password_hash from user_account where id = %s", (user_id,), str)
        # Copies of a request that waited together have one hash.
        if stored == hashed:
            return
        with self._passwords.place():
            if not await self._passwords.matches(stored, password):
                raise BadLogin

    async def login(self, email: str, password: str, *, key: Key) -> Session | Challenge:
        """Begin a session, or say that it takes a second factor. `key` says whose call it is, and is not kept.

        Raises BadLogin, LoginThrottled.
        """
        found, attempts = await self._proved(_password_of_email, email_key(email), email, password, key.address)
        await self._tokens.ready()

        async def work(tx: Transaction) -> Session | Challenge:
            # Whose password or activity has changed since it was checked, does not get in.
            await self._still(tx, found)
            user = await records.get(tx, found.user_id)
            if user.second_factor:
                # The attempt counts until the code is right, or who has the password could guess codes without end.
                return await second_factor.challenge(tx, user.id, attempts)
            return await self._logged_in(tx, user.id, attempts, key)

        return await self._db.transaction(work)

    async def verify_second_factor(self, challenge: str, code: str, *, key: Key) -> Session:
        """Go on with a login that takes a second factor. Raises BadLogin."""
        await self._tokens.ready()

        async def work(tx: Transaction) -> Session | None:
            found = await second_factor.answered(tx, challenge, code)
            return None if found is None else await self._logged_in(tx, *found, key)

        session = await self._db.transaction(work)
        if session is None:
            raise BadLogin
        return session

    async def _logged_in(self, tx: Transaction, user_id: str, attempts: Sequence[bytes], key: Key) -> Session:
        await tx.run("update user_account set last_login_time = moment() where id = %s", (user_id,))
        await tx.run(_forget_attempts, (attempts,))
        user = await records.get(tx, user_id)
        await self._log(tx, key, user, "logged_in")
        return await self._open(tx, user)

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
            await self._log(tx, key, await records.get(tx, found.user_id), "logged_out")
            return False

        return await self._db.transaction(work)

    async def profile(self, caller: Caller, method: str) -> User:
        """The caller's own user. Raises RoleRequired."""
        return await records.get(self._db, _own(caller, method))

    async def update_profile(
        self, caller: Caller, changes: Mapping[str, Any], version: int | None, *, key: Key
    ) -> Change[User]:
        """Change columns of the caller's own user. Raises EtagMismatch, InvalidField, RoleRequired."""
        return await records.update(self._db, key, _own(caller, key.method), checked(changes), version)

    async def change_password(self, caller: Caller, old: str, new: str, *, key: Key) -> Change[Session | None]:
        """Change the caller's password and end all sessions but the new one. A replay has none.

        Raises BadLogin, LoginThrottled, InvalidField, RoleRequired.
        """
        user_id = _own(caller, key.method)
        # The old password is wrong by then.
        if key.name and await acted(self._db, key):
            return Change(None, True)
        user = await records.get(self._db, user_id)
        require_acceptable(new, user.email, "new_password", old)
        found, attempts = await self._proved(_password_of_user, user_id, user.email, old, key.address)
        hashed = await self._passwords.hashed(new, key)
        await self._tokens.ready()

        async def work(tx: Transaction) -> Change[Session | None]:
            claimed = await claim(tx, key)
            if claimed.replayed:
                return Change(None, True)
            await self._still(tx, found)
            await tx.run(
                "update user_account set password_hash = %s, password_expire_time = null, version = version + 1,"
                " update_time = moment() where id = %s",
                (hashed, user_id),
            )
            await tx.run(_forget_attempts, (attempts,))
            await end_sessions(tx, user_id)
            user = await records.get(tx, user_id)
            await self._log(tx, key, user, "password_changed")
            return Change(await self._open(tx, user), False)

        return await self._db.transaction(work)

    async def _log(self, tx: Transaction, key: Key, user: User, event: str) -> None:
        # By the user, who has just proved it, also where the call itself needs no credentials.
        await records.log(tx, replace(key, caller=f"users/{user.id}"), user, event, {})

    async def enroll_second_factor(self, caller: Caller, *, key: Key) -> Change[str]:
        """Make a secret for the caller's authenticator app; its otpauth URI, which a replay leaves out.

        Raises SecondFactorState if the caller has a second factor already, RoleRequired.
        """
        user_id = _own(caller, key.method)

        async def work(tx: Transaction) -> Change[str]:
            if (await claim(tx, key)).replayed:
                return Change("", True)
            user = await records.get(tx, user_id, lock=True)
            if user.second_factor:
                raise SecondFactorState(user_id)
            await self._log(tx, key, user, "second_factor_enrolled")
            return Change(await second_factor.enroll(tx, user_id, user.email), False)

        return await self._db.transaction(work)

    async def confirm_second_factor(self, caller: Caller, code: str, *, key: Key) -> Change[Sequence[str]]:
        """Let logins take a second factor from now on; the recovery codes, which a replay leaves out.

        Raises BadLogin, SecondFactorState if none waits to be confirmed, RoleRequired.
        """
        codes: Sequence[str] = ()

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            nonlocal codes
            assert current is not None
            if current.second_factor:
                raise SecondFactorState(current.id)
            codes = await second_factor.confirm(tx, current.id, code)
            return given

        user_id, changes = _own(caller, key.method), {"second_factor": True}
        change = await records.update(self._db, key, user_id, changes, None, prepare, event="second_factor_confirmed")
        return Change(() if change.replayed else codes, change.replayed)

    async def remove_second_factor(self, caller: Caller, password: str, code: str, *, key: Key) -> Change[None]:
        """Let the caller's logins take no second factor from now on.

        Raises BadLogin, LoginThrottled, SecondFactorState if there is none, RoleRequired.
        """
        user_id = _own(caller, key.method)
        # There is none by then.
        if key.name and await acted(self._db, key):
            return Change(None, True)
        user = await records.get(self._db, user_id)
        if not user.second_factor:
            raise SecondFactorState(user_id)
        found, attempts = await self._proved(_password_of_user, user_id, user.email, password, key.address)

        async def prepare(tx: Transaction, current: User | None, given: Mapping[str, Any]) -> Mapping[str, Any]:
            assert current is not None
            if not current.second_factor:
                raise SecondFactorState(user_id)
            await self._still(tx, found)
            await second_factor.require(tx, user_id, code)
            await second_factor.remove(tx, user_id)
            await tx.run(_forget_attempts, (attempts,))
            return given

        changes = {"second_factor": False}
        change = await records.update(self._db, key, user_id, changes, None, prepare, event="second_factor_removed")
        return Change(None, change.replayed)

    async def _attempt(self, email: str, address: str) -> Sequence[bytes]:
        """Count an attempt before it is made, so that many at once are no more guesses; what counts it.

        Raises LoginThrottled.
        """
        subjects = [_subject(email, holder_of(address)), _subject(email)]
        for subject, most in zip(subjects, (_FAILURES_OF_ADDRESS, _FAILURES_OF_ALL), strict=True):
            counted = await self._db.row(_count_attempt, {"subject": subject, "most": most}, int)
            if counted is None:
                seconds = await self._db.row(_wait, (subject,), lambda seconds: seconds)
                raise LoginThrottled("login", retry_after=max(1.0, seconds or 0.0))
        return subjects

    async def _proved(
        self, statement: str, of: str, email: str, password: str, address: str
    ) -> tuple[_Password, Sequence[bytes]]:
        """The stored password, which this is, and the attempts to forget once all else is right.

        Raises BadLogin, LoginThrottled, Overloaded.
        """
        # The place comes first: who is turned away has used up no attempt, and the others' calls need the database.
        with self._passwords.place():
            async with self._in_database:
                attempts = await self._attempt(email_key(email), address)
                found = await self._db.row(statement, (of,), _Password)
            right = await self._passwords.matches(None if found is None else found.hash, password)
        if not right or found is None or found.expired:
            raise BadLogin
        return found, attempts

    async def _still(self, tx: Transaction, checked: _Password) -> None:
        same = await tx.row(_password_of_user + " for update", (checked.user_id,), _Password)
        if same != checked:
            raise BadLogin

    async def _open(self, tx: Transaction, user: User) -> Session:
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


def email_key(email: str) -> str:
    """The form in which e-mail addresses are compared."""
    return unicodedata.normalize("NFKC", email).casefold()


def checked(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns as they are written. Raises InvalidField."""
    if "phone" in changes:
        return {**changes, "phone": e164(changes["phone"], "", "user.phone")}
    return changes


def _own(caller: Caller, method: str) -> str:
    kind, _, user_id = caller.identity.partition("/")
    if kind != "users":
        raise RoleRequired(details={"method": method})
    return str(uuid.UUID(user_id))


def _subject(email: str, address: str = "") -> bytes:
    return hashlib.sha256(f"{email}\0{address}".encode()).digest()
