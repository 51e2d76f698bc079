"""The callers of a run with access rules: programs with API keys, doctors and patients with tokens, staff who log in.

They are inserted by SQL, past the service. Only what takes their rights away goes through it.
"""

import random
import secrets
import time
from collections.abc import Iterable
from typing import Any

import psycopg

from frontdesk.client import FrontdeskClient, Login
from frontdesk.core.credential import hash_of
from tests.history.check import Grant, Operation
from tests.identities import PASSWORD, Metadata, bearing, carrying, claims, signed

QUOTA = 60
"""Calls a minute of the key that asks for more."""
TOKEN_SECONDS = (2, 2, 3, 40)
"""The lives of tokens that the harness signs. The long ones are still good when their rights are taken away."""
LATE_SECONDS = 25.0
"""For so long after the end of their rights, callers go on trying."""

_FREE = 100_000
_CALLS_PER_MINUTE = 120
"""Of a doctor or a patient, so that the limit of users is not reached."""
_PASSWORD_HASH = "$argon2id$v=19$m=19456,t=2,p=1$E0RJoaKwxhsFKVYWom4LMg$WH6IHsTuNdId20+kotb1oF33e9tDeMtD59MsmUbjM0s"
_OF_PATIENTS = {"BookAppointment", "RescheduleAppointment", "CancelAppointment", "CheckIn", "LeaveQueue"}
_NOT_OF_DOCTORS = {"CheckIn"}


class Caller:
    """Somebody with credentials."""

    def __init__(self, grant: Grant) -> None:
        self.grant = grant
        self.successor: Caller | None = None
        """The same identity with fresh credentials, once these have ended."""

    @property
    def identity(self) -> str:
        """As the log names it."""
        return self.grant.identity

    def credentials(self) -> tuple[Metadata, float]:
        """The metadata of a call, and when they expire."""
        raise NotImplementedError

    def lasting(self) -> Metadata:
        """The metadata of a long call."""
        return self.credentials()[0]

    def renew(self) -> bool:
        """Get other credentials, since these were refused; whether that may help."""
        return False

    def has_time(self) -> bool:
        """Whether a call is within the limit."""
        return True


class Anybody(Caller):
    """A caller without credentials, but for a label."""

    def __init__(self, label: str) -> None:
        super().__init__(Grant("anonymous", "anybody"))
        self._label = label

    def credentials(self) -> tuple[Metadata, float]:
        return (("frontdesk-caller", self._label),), float("inf")


class Program(Caller):
    """An API key."""

    def __init__(self, kind: str, key_id: str, secret: str) -> None:
        super().__init__(Grant(f"keys/{key_id}", kind))
        self.id = key_id
        self.key = f"fdk_{key_id}_{secret}"

    def credentials(self) -> tuple[Metadata, float]:
        return bearing(self.key), float("inf")


class Person(Caller):
    """A doctor or a patient, whose tokens are signed by the key that all tests share."""

    def __init__(self, kind: str, said: dict[str, Any], refresh_token: str, mine: random.Random) -> None:
        super().__init__(Grant(f"users/{said['sub']}", kind))
        self.said = said
        """The user's claims."""
        self.whose: str = said["doctor_id"] or said["patient_id"]
        """The id of the doctor or patient."""
        self.refresh_token = refresh_token
        self._random = mine
        self._token = ""
        self._expires = self._until = 0.0
        self._minute = self._calls = 0

    def credentials(self) -> tuple[Metadata, float]:
        if time.monotonic() > self._until:
            self._sign()
        return carrying(self._token), self._expires

    def lasting(self) -> Metadata:
        return carrying(signed(claims(**self.said)))

    def _sign(self) -> None:
        now, here = time.time(), time.monotonic()
        exp = int(now) + self._random.choice(TOKEN_SECONDS)
        self._expires = exp - now + here
        # Some notice too late that it has expired.
        self._until = self._expires + self._random.uniform(-0.3, 0.3)
        self._token = signed(claims(**self.said, exp=exp))

    def renew(self) -> bool:
        if self.grant.ending < float("inf"):
            return False
        self._until = 0.0
        return True

    def has_time(self) -> bool:
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._calls = minute, 0
        self._calls += 1
        return self._calls <= _CALLS_PER_MINUTE


class Clerk(Caller):
    """One of the staff, who logs in with a password; the client refreshes the tokens."""

    def __init__(self, user_id: str, email: str) -> None:
        super().__init__(Grant(f"users/{user_id}", "clerk", renews=True))
        self.login = Login(email, PASSWORD)
        self.desk: FrontdeskClient
        """On the present connection."""

    def credentials(self) -> tuple[Metadata, float]:
        return (), float("inf")

    def renew(self) -> bool:
        self.login.expire()
        return True


class Callers:
    """All who call in one chapter."""

    def __init__(self, anybody: Caller) -> None:
        self.programs: list[Program] = []
        self.clerks: list[Clerk] = []
        self.doctors: dict[str, Person] = {}
        """By doctor's id."""
        self.patients: dict[str, Person] = {}
        """By patient's id; most patients have no user."""
        self.stranger: Program | None = None
        """The desk of another clinic."""
        self.anybody = anybody
        self.former: list[Caller] = []
        """Those who have lost their credentials, and try."""
        self.names: set[str] = set()
        """All identities that there have been."""

    def desk(self, mine: random.Random) -> Caller:
        """Somebody who may do everything here."""
        return mine.choice(self.programs) if self.programs else self.anybody

    def reader(self, doctor: str, mine: random.Random) -> Caller:
        """Somebody who may read the doctor's queues."""
        person = self.doctors.get(doctor)
        return person if person is not None and mine.random() < 0.3 and person.has_time() else self.desk(mine)

    def chosen(self, operation: Operation, patient: str, doctor: str, mine: random.Random) -> Caller:
        """Somebody who may make the change, or could before.

        `patient` and `doctor` are those of its visit, empty if they are not known.
        """
        if not self.programs:
            return self.anybody
        fitting: list[Caller] = []
        person = self.patients.get(operation.patient or patient)
        if person is not None and operation.method in _OF_PATIENTS:
            fitting += [person] * 3
        # A doctor moves only what stays his own.
        physician = operation.day[0] if doctor in ("", operation.day[0]) else ""
        if operation.method in _NOT_OF_DOCTORS:
            physician = ""
        if physician in self.doctors:
            fitting.append(self.doctors[physician])
        self.former = [one for one in self.former if time.monotonic() < one.grant.ended + LATE_SECONDS]
        if self.former and mine.random() < 0.08:
            one = mine.choice(self.former)
            whose = {physician, operation.patient if operation.method in _OF_PATIENTS else ""}
            if isinstance(one, Program) or (isinstance(one, Person) and one.whose in whose):
                return one
        if self.clerks and mine.random() < 0.1:
            return mine.choice(self.clerks)
        if fitting and mine.random() < 0.6 and (one := mine.choice(fitting)).has_time():
            return one
        return self.desk(mine)

    def lost(self, one: Caller, following: Caller) -> None:
        """Let another take over from one whose credentials end."""
        self.names.add(following.identity)
        if isinstance(one, Program) and isinstance(following, Program):
            self.programs[self.programs.index(one)] = following
        for people in (self.doctors, self.patients):
            for whose, person in people.items():
                if person is one and isinstance(following, Person):
                    people[whose] = following
        if following.identity == one.identity:
            one.successor = following
        self.former.append(one)


def add_program(
    admin: psycopg.Connection, kind: str, role: str, clinic_ids: Iterable[str] = (), limit: int = _FREE
) -> Program:
    """A new API key."""
    secret = secrets.token_urlsafe(32)
    row = admin.execute(
        "insert into api_key (name, secret_hash, roles, clinic_ids, requests_per_minute)"
        " values (%s, %s, %s, %s::uuid[], %s) returning id::text",
        (kind, hash_of(secret), [role], [*clinic_ids], limit),
    ).fetchone()
    assert row is not None
    return Program(kind, row[0], secret)


def add_people(
    admin: psycopg.Connection, role: str, mine: random.Random, ids: Iterable[str], users: Iterable[str] = ()
) -> dict[str, Person]:
    """A user with a session for each of these doctors or patients; new sessions if the users are given."""
    column, kind = f"{role.lower()}_id", role.lower()
    wanted = [*ids]
    known = [*users]
    with admin.cursor() as cursor:
        rows: list[tuple[str, str, str, str]] = []
        for number, one in enumerate(wanted):
            user, session = _new_ids(admin)
            rows.append((one, known[number] if known else user, session, secrets.token_urlsafe(32)))
        if not known:
            cursor.executemany(
                f"insert into user_account (id, email, email_key, roles, {column}, password_hash)"
                " values (%s, %s, %s, %s, %s, '')",
                [(user, f"{user}@example.com", f"{user}@example.com", [role], one) for one, user, _, _ in rows],
            )
        cursor.executemany(
            "insert into session (id, user_id) values (%s, %s)", [(session, user) for _, user, session, _ in rows]
        )
        cursor.executemany(
            "insert into refresh_token (hash, session_id, generation) values (%s, %s, 1)",
            [(hash_of(token), session) for _, _, session, token in rows],
        )
    return {
        one: Person(
            kind,
            {"sub": user, "sid": session, "roles": [role], "patient_id": None, "doctor_id": None, column: one},
            token,
            mine,
        )
        for one, user, session, token in rows
    }


def add_clerk(admin: psycopg.Connection, clinic_id: str) -> Clerk:
    """One of the clinic's staff."""
    user, _ = _new_ids(admin)
    email = f"{user}@example.com"
    admin.execute(
        "insert into user_account (id, email, email_key, roles, clinic_ids, password_hash)"
        " values (%s, %s, %s, '{STAFF}', %s::uuid[], %s)",
        (user, email, email, [clinic_id], _PASSWORD_HASH),
    )
    return Clerk(user, email)


def _new_ids(admin: psycopg.Connection) -> tuple[str, str]:
    row = admin.execute("select new_id()::text, new_id()::text").fetchone()
    assert row is not None
    return row[0], row[1]
