"""Identities of tests: the administrator that every test's database has, and the keys that they create."""

from typing import Any

import grpc
import psycopg
from google.protobuf.timestamp_pb2 import Timestamp

from clinic.frontdesk.v1 import access_pb2, policy_pb2
from frontdesk.core.credential import hash_of
from tests.clinic import Front

Metadata = tuple[tuple[str, str], ...]

_ADMINISTRATOR = "01900000-0000-7000-8000-000000000001"
_SECRET = "no-secret-just-the-key-that-all-tests-share"
ADMIN_KEY = f"fdk_{_ADMINISTRATOR}_{_SECRET}"
"""An API key of an administrator of all clinics."""


def add_administrator(connection: psycopg.Connection[Any]) -> None:
    """Add the API key of all tests to a database."""
    connection.execute(
        "insert into api_key (id, name, secret_hash, roles, requests_per_minute)"
        " values (%s, 'tests', %s, '{ADMIN}', 100000)",
        (_ADMINISTRATOR, hash_of(_SECRET)),
    )


def bearing(key: str) -> Metadata:
    """The metadata of a call with this API key."""
    return (("x-api-key", key),)


ADMIN = bearing(ADMIN_KEY)


def stub(front: Front, channel: grpc.aio.Channel | None = None) -> Any:
    """The stub of AccessService."""
    from clinic.frontdesk.v1.access_pb2_grpc import AccessServiceStub

    return AccessServiceStub(channel or front.channel)


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
    answer: access_pb2.CreateApiKeyResponse = await stub(front).CreateApiKey(
        access_pb2.CreateApiKeyRequest(api_key=wanted), metadata=by
    )
    return answer
