"""Identities of tests: the key, the user and the signing key that every test's database has, and what they create."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

import jwt
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.timestamp_pb2 import Timestamp

from clinic.frontdesk.v1 import access_pb2, policy_pb2
from clinic.frontdesk.v1.access_pb2_grpc import AccessServiceStub
from clinic.frontdesk.v1.auth_pb2_grpc import AuthServiceStub
from frontdesk.core.credential import hash_of
from tests.clinic import Front

Metadata = tuple[tuple[str, str], ...]

_ADMINISTRATOR = "01900000-0000-7000-8000-000000000001"
_SECRET = "no-secret-just-the-key-that-all-tests-share"
ADMIN_KEY = f"fdk_{_ADMINISTRATOR}_{_SECRET}"
"""An API key of an administrator of all clinics."""

USER = "01900000-0000-7000-8000-000000000002"
"""A user who is an administrator of all clinics."""
PASSWORD = "correct horse battery"
_PASSWORD_HASH = "$argon2id$v=19$m=19456,t=2,p=1$E0RJoaKwxhsFKVYWom4LMg$WH6IHsTuNdId20+kotb1oF33e9tDeMtD59MsmUbjM0s"
SESSION = "01900000-0000-7000-8000-000000000003"
REFRESH_TOKEN = "no-secret-either"
KID = "testkey"
SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(b"a key that signs in all tests ok"[:32])


def add_identities(connection: psycopg.Connection[Any]) -> None:
    """Add the identities of all tests to a database."""
    for statement, values in (
        (
            "insert into api_key (id, name, secret_hash, roles, requests_per_minute)"
            " values (%s, 'tests', %s, '{ADMIN}', 100000)",
            (_ADMINISTRATOR, hash_of(_SECRET)),
        ),
        (
            "insert into user_account (id, email, email_key, roles, password_hash)"
            " values (%s, 'tests@example.com', 'tests@example.com', '{ADMIN}', %s)",
            (USER, _PASSWORD_HASH),
        ),
        ("insert into session (id, user_id) values (%s, %s)", (SESSION, USER)),
        (
            "insert into refresh_token (hash, session_id, generation) values (%s, %s, 1)",
            (hash_of(REFRESH_TOKEN), SESSION),
        ),
        (
            "insert into signing_key (id, public_key, expire_time) values (%s, %s, 'infinity')",
            (KID, SIGNING_KEY.public_key().public_bytes_raw()),
        ),
    ):
        connection.execute(statement, values)


def bearing(key: str) -> Metadata:
    """The metadata of a call with this API key."""
    return (("x-api-key", key),)


def carrying(token: str) -> Metadata:
    """The metadata of a call with this access token."""
    return (("authorization", f"Bearer {token}"),)


def claims(**changed: Any) -> dict[str, Any]:
    """The claims of a good token of the tests' user; those that are None are left out."""
    now = int(time.time())
    every = {
        "iss": "frontdesk.clinic",
        "aud": "frontdesk.clinic",
        "sub": USER,
        "sid": SESSION,
        "jti": str(uuid.uuid4()),
        "iat": now,
        "exp": now + 900,
        "roles": ["ADMIN"],
        "patient_id": None,
        "doctor_id": None,
        "clinic_ids": [],
    }
    return {**every, **changed}


def signed(given: dict[str, Any], key: Any = SIGNING_KEY, algorithm: str = "EdDSA", **header: Any) -> str:
    """A token with these claims."""
    return jwt.encode(given, key, algorithm, headers={"kid": KID, "typ": "at+jwt", **header})


def user_token() -> Metadata:
    """The metadata of a call of the tests' user."""
    return carrying(signed(claims()))


def user(
    front: Front,
    *roles: str,
    patient_id: str | None = None,
    doctor_id: str | None = None,
    clinic_ids: Sequence[str] = (),
    seconds: int = 900,
) -> Metadata:
    """The metadata of a new user's calls; the token is good for so many seconds."""
    ((user_id, session_id),) = front.sql("select new_id()::text, new_id()::text")
    front.sql(
        "insert into user_account (id, email, email_key, roles, patient_id, doctor_id, clinic_ids, password_hash)"
        " values (%s, %s, %s, %s, %s, %s, %s::uuid[], '')",
        *(user_id, f"{user_id}@example.com", f"{user_id}@example.com", [*roles], patient_id, doctor_id, [*clinic_ids]),
    )
    front.sql("insert into session (id, user_id) values (%s, %s)", session_id, user_id)
    return carrying(
        signed(
            claims(
                sub=user_id,
                sid=session_id,
                exp=int(time.time()) + seconds,
                roles=[*roles],
                patient_id=patient_id,
                doctor_id=doctor_id,
                clinic_ids=[*clinic_ids],
            )
        )
    )


def user_of(token: Metadata) -> tuple[str, str]:
    """The ids of a token's user and session."""
    said = jwt.decode(token[0][1].removeprefix("Bearer "), options={"verify_signature": False})
    return said["sub"], said["sid"]


ADMIN = bearing(ADMIN_KEY)


def access(front: Front) -> Any:
    """The stub of AccessService."""
    return AccessServiceStub(front.channel)


def auth(front: Front) -> Any:
    """The stub of AuthService."""
    return AuthServiceStub(front.channel)


async def create_key(front: Front, *roles: str, by: Metadata = ADMIN, **fields: Any) -> access_pb2.CreateApiKeyResponse:
    """A new API key."""
    wanted = access_pb2.ApiKey(name="a program", roles=[policy_pb2.Role.Value(f"ROLE_{role}") for role in roles])
    fields.setdefault("requests_per_minute", 100_000)
    for name, value in fields.items():
        if isinstance(value, Timestamp):
            getattr(wanted, name).CopyFrom(value)
        elif isinstance(value, list):
            getattr(wanted, name).extend(value)
        else:
            setattr(wanted, name, value)
    answer: access_pb2.CreateApiKeyResponse = await access(front).CreateApiKey(
        access_pb2.CreateApiKeyRequest(api_key=wanted), metadata=by
    )
    return answer
