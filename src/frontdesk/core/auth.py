"""What people do with their own users: registering, logging in, the profile, the password, the second factor."""

import asyncio
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frontdesk.core import email_code, second_factor
from frontdesk.core.caller import Caller
from frontdesk.core.credential import changed
from frontdesk.core.limit import holder_of
from frontdesk.core.password import Passwords, require_acceptable
from frontdesk.core.patient import Patients
from frontdesk.core.second_factor import Challenge
from frontdesk.core.user import User, checked, email_key, log_own, records
from frontdesk.core.user_session import Session, Sessions, end_sessions
from frontdesk.db.change import Change, Key, acted, claim
from frontdesk.db.database import Database, Taken, Transaction
from frontdesk.errors import (
    BadLogin,
    EmailTaken,
    LoginThrottled,
    NoChannel,
    RoleRequired,
    SecondFactorState,
)

_LOGINS_IN_DATABASE = 2
"""Logins of one worker that use the database at once before their passwords are checked: when a thousand come, the
others' calls need its connections."""
_FAILURES_OF_ADDRESS = 5
"""Failures in a row of an e-mail from one address after which logins wait."""
_FAILURES_OF_ALL = 50
"""The same from all addresses together."""
_REQUESTS_OF_EMAIL = 5
"""Requests for a new password for an e-mail after which others wait."""


@dataclass(frozen=True, slots=True)
class Registered:
    """A new user; in a replay without a session."""

    user: User
    session: Session | None


@dataclass(frozen=True, slots=True)
class _Password:
    user_id: str
    hash: str
    expired: bool
    """Of a one-time password."""


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


class Auth:
    """What people do with their own users."""

    def __init__(
        self, db: Database, passwords: Passwords, sessions: Sessions, patients: Patients, *, mails: bool
    ) -> None:
        """`mails`: whether the service sends mails."""
        self._db = db
        self._mails = mails
        self._passwords = passwords
        self._sessions = sessions
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
        await self._sessions.ready()

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
                "email_verified": not self._mails,
            }
            user = await records.insert(tx, claimed.result_id, values)
            if self._mails:
                await email_code.plan(tx, user.id, email_code.VERIFICATION)
            await log_own(tx, key, user, "registered")
            return Change(Registered(user, await self._sessions.open(tx, user)), False)

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
        await self._sessions.ready()

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
        await self._sessions.ready()

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
        await log_own(tx, key, user, "logged_in")
        if self._mails and not user.email_verified:
            await email_code.plan(tx, user_id, email_code.VERIFICATION, again=False)
        return await self._sessions.open(tx, user)

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
        await self._sessions.ready()

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
            await log_own(tx, key, user, "password_changed")
            return Change(await self._sessions.open(tx, user), False)

        return await self._db.transaction(work)

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
            await log_own(tx, key, user, "second_factor_enrolled")
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

    async def verify_email(self, code: str, *, key: Key) -> bool:
        """The user of the code has shown that the e-mail is his; whether this is a replay.

        Raises BadLogin, LoginThrottled.
        """
        if key.name and await acted(self._db, key):
            return True
        attempts = await self._attempt_code(key.address)

        async def work(tx: Transaction) -> bool:
            if (await claim(tx, key)).replayed:
                return True
            user_id = await email_code.use(tx, code, email_code.VERIFICATION)
            if user_id is None:
                raise BadLogin
            await tx.run(
                "update user_account set email_verified = true, version = version + 1, update_time = moment()"
                " where id = %s",
                (user_id,),
            )
            await changed(tx, f"users/{user_id}")
            await tx.run(_forget_attempts, (attempts,))
            await log_own(tx, key, await records.get(tx, user_id), "email_verified")
            return False

        return await self._db.transaction(work)

    async def request_password_reset(self, email: str, *, key: Key) -> bool:
        """Plan a mail with a code, if there is such a user; whether this is a replay.

        Raises LoginThrottled, NoChannel.
        """
        if not self._mails:
            raise NoChannel

        async def work(tx: Transaction) -> bool:
            if (await claim(tx, key)).replayed:
                return True
            # Also for an e-mail of nobody's: then this is what the transaction writes, and takes as long.
            await _count(tx, _subject("reset", email_key(email)), _REQUESTS_OF_EMAIL)
            user_id = await tx.row(
                "select id from user_account where email_key = %s and active", (email_key(email),), str
            )
            if user_id is not None:
                await email_code.plan(tx, user_id, email_code.RESET)
                # Not by the user: nobody has proved anything.
                await records.log(tx, key, await records.get(tx, user_id), "password_reset_requested", {})
            return False

        return await self._db.transaction(work)

    async def reset_password(self, code: str, password: str, *, key: Key) -> bool:
        """Set the password of the code's user and end all sessions; whether this is a replay.

        Raises BadLogin, LoginThrottled, InvalidField, Overloaded.
        """
        if key.name and await acted(self._db, key):
            return True
        attempts = await self._attempt_code(key.address)
        found = await email_code.owner(self._db, code, email_code.RESET)
        if found is None:
            raise BadLogin
        email = (await records.get(self._db, found)).email
        require_acceptable(password, email, "password")
        hashed = await self._passwords.hashed(password, key)

        async def work(tx: Transaction) -> bool:
            if (await claim(tx, key)).replayed:
                return True
            user_id = await email_code.use(tx, code, email_code.RESET)
            user = None if user_id is None else await records.get(tx, user_id, lock=True)
            if user is None or not user.active:
                raise BadLogin
            await tx.run(
                "update user_account set password_hash = %s, password_expire_time = null, email_verified = true,"
                " version = version + 1, update_time = moment() where id = %s",
                (hashed, user.id),
            )
            await end_sessions(tx, user.id)
            await changed(tx, f"users/{user.id}")
            # Whoever has forgotten the password has tried some.
            of_email = email_key(user.email)
            tried = [_subject("reset", of_email), _subject(of_email), _subject(of_email, holder_of(key.address))]
            await tx.run(_forget_attempts, ([*attempts, *tried],))
            await log_own(tx, key, await records.get(tx, user.id), "password_reset")
            return False

        return await self._db.transaction(work)

    async def _attempt_code(self, address: str) -> Sequence[bytes]:
        """Count the attempt of a code before it is made; what counts it. Raises LoginThrottled."""
        subject = _subject("code", holder_of(address))
        await _count(self._db, subject, _FAILURES_OF_ADDRESS)
        return [subject]

    async def _attempt(self, email: str, address: str) -> Sequence[bytes]:
        """Count an attempt before it is made, so that many at once are no more guesses; what counts it.

        Raises LoginThrottled.
        """
        subjects = [_subject(email, holder_of(address)), _subject(email)]
        for subject, most in zip(subjects, (_FAILURES_OF_ADDRESS, _FAILURES_OF_ALL), strict=True):
            await _count(self._db, subject, most)
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


async def _count(via: Database | Transaction, subject: bytes, most: int) -> None:
    """Count an attempt. Raises LoginThrottled if the subject must wait."""
    counted = await via.row(_count_attempt, {"subject": subject, "most": most}, int)
    if counted is None:
        seconds = await via.row(_wait, (subject,), lambda seconds: seconds)
        raise LoginThrottled("login", retry_after=max(1.0, seconds or 0.0))


def _own(caller: Caller, method: str) -> str:
    kind, _, user_id = caller.identity.partition("/")
    if kind != "users":
        raise RoleRequired(details={"method": method})
    return str(uuid.UUID(user_id))


def _subject(email: str, address: str = "") -> bytes:
    return hashlib.sha256(f"{email}\0{address}".encode()).digest()
