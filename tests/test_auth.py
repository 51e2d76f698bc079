"""Users: registering, logging in, tokens, and what administrators may do with users."""

import asyncio
import base64
import hashlib
import json
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import grpc
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.field_mask_pb2 import FieldMask
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import access_pb2, appointment_pb2, auth_pb2, clinic_pb2, patient_pb2, policy_pb2
from frontdesk.rpc import pipeline
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, reason_of, refusal, tomorrow
from tests.hostile.methods import register
from tests.hostile.wire import another_client, serving
from tests.identities import (
    ADMIN,
    PASSWORD,
    SESSION,
    SIGNING_KEY,
    USER,
    Metadata,
    access,
    auth,
    bearing,
    carrying,
    claims,
    create_key,
    signed,
    user_token,
)
from tests.waiting import SOON, early_in_a_minute, until

EMAIL = "rosa@example.com"


async def clinics(front: Front, metadata: Metadata) -> str:
    """The outcome of a call that every identity may make."""
    return await outcome(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=metadata))


async def comes_to(front: Front, metadata: Metadata, wanted: str) -> None:
    """Repeat a call, which is accepted until it has this outcome."""
    async with asyncio.timeout(SOON):
        while (found := await clinics(front, metadata)) == "OK":  # noqa: ASYNC110 - another process must look
            await asyncio.sleep(0.05)
    assert found == wanted


async def login(front: Front, email: str = EMAIL, password: str = PASSWORD) -> auth_pb2.Session:
    """A new session."""
    answer = await auth(front).Login(auth_pb2.LoginRequest(email=email, password=password))
    found: auth_pb2.Session = answer.session
    return found


async def refresh(front: Front, token: str) -> auth_pb2.Session:
    """The session that goes on."""
    answer = await auth(front).RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=token))
    found: auth_pb2.Session = answer.session
    return found


async def profile(front: Front, session: auth_pb2.Session) -> auth_pb2.User:
    """The user of a session, as the service has it."""
    answer = await auth(front).GetProfile(auth_pb2.GetProfileRequest(), metadata=carrying(session.access_token))
    found: auth_pb2.User = answer.user
    return found


async def create_user(
    front: Front, *roles: str, by: Metadata = ADMIN, **fields: Any
) -> tuple[auth_pb2.User, str, Metadata]:
    """A new user, the one-time password, and the credentials of a first session."""
    numbers = [policy_pb2.Role.Value(f"ROLE_{role}") for role in roles]
    wanted = auth_pb2.User(email=f"{uuid.uuid4().hex}@example.com", roles=numbers, **fields)
    answer = await access(front).CreateUser(access_pb2.CreateUserRequest(user=wanted), metadata=by)
    session = await login(front, wanted.email, answer.one_time_password)
    return answer.user, answer.one_time_password, carrying(session.access_token)


async def set_roles(front: Front, user_id: str, *roles: str, by: Metadata = ADMIN, **fields: Any) -> auth_pb2.User:
    """Replace the roles of a user."""
    numbers = [policy_pb2.Role.Value(f"ROLE_{role}") for role in roles]
    request = access_pb2.SetUserRolesRequest(user_id=user_id, roles=numbers, **fields)
    found: auth_pb2.User = (await access(front).SetUserRoles(request, metadata=by)).user
    return found


async def link(front: Front, user_id: str, patient_id: str, by: Metadata = ADMIN) -> auth_pb2.User:
    """Say which patient a user is."""
    request = access_pb2.LinkPatientRequest(user_id=user_id, patient_id=patient_id)
    found: auth_pb2.User = (await access(front).LinkPatient(request, metadata=by)).user
    return found


async def deactivate(front: Front, user_id: str, by: Metadata = ADMIN) -> None:
    """Deactivate a user."""
    request = access_pb2.UpdateUserRequest(user=auth_pb2.User(id=user_id, active=False))
    await access(front).UpdateUser(request, metadata=by)


async def test_register(front: Front) -> None:
    """Registering makes a patient with a user of his own, who has the role PATIENT and a session at once."""
    made = await register(front, email="Rosa@Example.com")
    assert list(made.user.roles) == [policy_pb2.ROLE_PATIENT]
    assert (made.user.active, made.user.email_verified, made.user.second_factor) == (True, True, False)
    found = await front.patients.GetPatient(patient_pb2.GetPatientRequest(patient_id=made.user.patient_id))
    assert found.patient.given_name == "Rosa"
    assert await profile(front, made.session) == made.user == made.session.user
    session = await login(front, "rosa@example.COM")
    assert session.user.HasField("last_login_time")
    assert session.user.etag == made.user.etag
    assert session.expires_in.seconds == 900
    assert await outcome(register(front, email="ROSA@example.com")) == "EMAIL_TAKEN"


async def test_a_replayed_registration(front: Front) -> None:
    """Who repeats a registration with its key learns who the user is only with the password."""
    made = await register(front, email=EMAIL, idempotency_key="k")
    again = await register(front, email=EMAIL, idempotency_key="k")
    assert again == auth_pb2.RegisterUserResponse(user=made.user, replayed=True)
    other = register(front, email=EMAIL, idempotency_key="k", password="some other password")
    assert await outcome(other) == "BAD_LOGIN"


async def test_access_tokens(front: Front) -> None:
    """An access token is a JSON Web Token of RFC 9068, signed with EdDSA, and tells the rights."""
    session = (await register(front, email=EMAIL)).session
    header = jwt.get_unverified_header(session.access_token)
    assert (header["typ"], header["alg"]) == ("at+jwt", "EdDSA")
    ((public_key,),) = front.sql("select public_key from signing_key where id = %s", header["kid"])
    assert len(public_key) == 32
    told = jwt.decode(session.access_token, options={"verify_signature": False})
    assert {"iss", "aud", "sub", "exp", "iat", "jti", "sid", "roles", "patient_id", "doctor_id", "clinic_ids"} == set(
        told
    )
    assert (told["sub"], told["roles"]) == (session.user.id, ["PATIENT"])
    assert told["exp"] - told["iat"] == 900


async def test_each_worker_signs_with_a_key_of_its_own(front: Front, conninfo: str, settings: Settings) -> None:
    """The tokens of one worker are good at another, which signs with another key; shorter lives are possible."""
    first = (await register(front, email=EMAIL)).session
    async with serving(settings, conninfo, access_token_seconds=60) as (_, elsewhere):
        assert await clinics(elsewhere, carrying(first.access_token)) == "OK"
        second = await login(elsewhere)
        assert second.expires_in.seconds == 60
        assert await clinics(front, carrying(second.access_token)) == "OK"
    kids = {jwt.get_unverified_header(session.access_token)["kid"] for session in (first, second)}
    assert len(kids) == 2


async def test_a_person_on_file(front: Front) -> None:
    """Who registers as a person on file gets no patient and changes nothing, until staff link the two."""
    known = await front.patient(given_name="Rosa", family_name="Alves", phone="+5511987654321")
    made = await register(front, email=EMAIL)
    assert not made.user.patient_id
    request = patient_pb2.GetPatientRequest(patient_id=known.id)
    assert (await front.patients.GetPatient(request)).patient == known
    staff = bearing((await create_key(front, "STAFF")).key)
    linked = await link(front, made.user.id, known.id, by=staff)
    assert linked.patient_id == known.id
    assert await link(front, made.user.id, known.id, by=staff) == linked
    await comes_to(front, carrying(made.session.access_token), "CREDENTIALS_EXPIRED")
    renewed = await refresh(front, made.session.refresh_token)
    assert renewed.user.patient_id == known.id
    assert await clinics(front, carrying(renewed.access_token)) == "OK"


async def test_one_user_a_patient(front: Front) -> None:
    """A patient has one user, and a user one patient."""
    first, second = await front.people(2)
    ana = (await register(front)).user
    other = (await register(front)).user
    assert ana.patient_id
    assert not other.patient_id, "the same person"
    assert await outcome(link(front, ana.id, first.id)) == "PATIENT_LINKED"
    assert await outcome(link(front, other.id, ana.patient_id)) == "PATIENT_LINKED"
    assert await outcome(link(front, other.id, USER)) == "PATIENT_NOT_FOUND"
    assert await outcome(link(front, SESSION, second.id)) == "USER_NOT_FOUND"
    assert (await link(front, other.id, second.id)).patient_id == second.id


@pytest.mark.parametrize(
    "password", ["", "1234567", "x" * 257, EMAIL, EMAIL.upper(), "password", "PassWord1", "iloveyou", "good\0password"]
)
async def test_bad_passwords(front: Front, password: str) -> None:
    """A password has 8 to 256 characters, and is neither the e-mail nor among the most common."""
    assert await outcome(register(front, email=EMAIL, password=password)) == "INVALID_FIELD"


async def test_bad_logins_look_alike(front: Front) -> None:
    """A wrong password, an unknown e-mail and an inactive user get the same answer, down to the last byte."""
    await register(front, email=EMAIL)
    idle = await register(front)
    await deactivate(front, idle.user.id)
    errors = [
        await refusal(login(front, email, password))
        for email, password in ((EMAIL, "wrong"), ("nobody@example.com", PASSWORD), (idle.user.email, PASSWORD))
    ]
    assert {reason_of(error) for error in errors} == {"BAD_LOGIN"}
    assert len({(error.code(), error.details(), repr(error.trailing_metadata())) for error in errors}) == 1


async def test_throttling(front: Front) -> None:
    """After five failures in a row a login waits, with the right password too; the delay doubles."""
    await register(front, email=EMAIL)
    for email in (EMAIL, "nobody@example.com"):
        for _ in range(5):
            assert await outcome(login(front, email, "wrong")) == "BAD_LOGIN"
        error = await refusal(login(front, email.upper()))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LOGIN_THROTTLED")
        assert 0 < details(error)["RetryInfo"].retry_delay.ToSeconds() <= 30
    for _ in range(8):
        front.sql("update login_attempt set wait_until = moment()")
        assert await outcome(login(front, EMAIL, "wrong")) == "BAD_LOGIN"
    error = await refusal(login(front))
    assert 800 < details(error)["RetryInfo"].retry_delay.ToSeconds() <= 900
    front.sql("update login_attempt set wait_until = moment()")
    await login(front)
    for _ in range(4):
        assert await outcome(login(front, EMAIL, "wrong")) == "BAD_LOGIN"
    await login(front)


async def test_throttling_over_all_addresses(front: Front) -> None:
    """After fifty failures of an e-mail from all addresses together its logins wait."""
    await register(front, email=EMAIL)
    assert await outcome(login(front, EMAIL, "wrong")) == "BAD_LOGIN"
    everywhere = hashlib.sha256(f"{EMAIL}\0".encode()).digest()
    front.sql("update login_attempt set count = 49 where subject = %s", everywhere)
    assert await outcome(login(front, EMAIL, "wrong")) == "BAD_LOGIN"
    assert await outcome(login(front)) == "LOGIN_THROTTLED"


async def test_guesses_at_once(front: Front) -> None:
    """Of many guesses at once no more are checked than of guesses one after another."""
    guesses = await asyncio.gather(*(outcome(login(front, EMAIL, f"guess {n}")) for n in range(30)))
    assert Counter(guesses) == {"BAD_LOGIN": 5, "LOGIN_THROTTLED": 25}


async def test_logins_hold_up_nobody(front: Front) -> None:
    """While passwords are checked, other calls are answered."""
    logins = [asyncio.create_task(outcome(login(front, f"{n}@example.com"))) for n in range(20)]
    await asyncio.wait(logins, return_when=asyncio.FIRST_COMPLETED)
    for _ in range(3):
        assert await clinics(front, ()) == "OK"
    assert not all(task.done() for task in logins)
    assert set(await asyncio.gather(*logins)) == {"BAD_LOGIN"}


async def test_new_users_hold_up_nobody(conninfo: str, settings: Settings) -> None:
    """While a new user's one-time password waits to be hashed, no connection of the database waits with it."""
    async with serving(settings, conninfo, pool_size=1) as (_, front):
        assert await clinics(front, ADMIN) == "OK"
        logins = [asyncio.create_task(outcome(login(front, f"{n}@example.com"))) for n in range(20)]
        await asyncio.wait(logins, return_when=asyncio.FIRST_COMPLETED)
        creating = asyncio.create_task(create_user(front, "STAFF"))
        for _ in range(3):
            assert await clinics(front, ADMIN) == "OK"
        assert not creating.done()
        await creating
        assert set(await asyncio.gather(*logins)) == {"BAD_LOGIN"}


async def test_logins_leave_connections_to_others(conninfo: str, settings: Settings) -> None:
    """However many log in at once, two of them use the database before their passwords are checked."""
    async with serving(settings, conninfo, pool_size=3) as (_, front):
        async with await psycopg.AsyncConnection.connect(conninfo) as other:
            await other.execute("lock table login_attempt in access exclusive mode")
            logins = [asyncio.create_task(outcome(login(front, f"{n}@example.com"))) for n in range(20)]
            waiting = "select 1 from pg_locks where not granted and relation = 'login_attempt'::regclass"
            await until(lambda: len(front.sql(waiting)) == 2)
            for _ in range(3):
                assert await clinics(front, ADMIN) == "OK"
        assert set(await asyncio.gather(*logins)) == {"BAD_LOGIN"}


async def test_a_thousand_logins_at_once(conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a thousand logins come from fifty addresses, another caller's calls and health are answered."""
    # Those who are not let in give up sooner.
    monkeypatch.setattr(pipeline, "DEADLINE_SECONDS", 4.0)
    changed = {"trusted_proxies": "127.0.0.1", "address_requests_per_minute": 20, "max_in_flight": 2_000}
    await early_in_a_minute()
    async with AsyncExitStack() as stack:
        _, other = await stack.enter_async_context(serving(settings, conninfo, **changed))
        # A connection takes a hundred calls at once.
        crowd = [await stack.enter_async_context(another_client(other)) for _ in range(10)]
        assert await clinics(other, user_token()) == "OK"

        def attempt(number: int) -> Any:
            request = auth_pb2.LoginRequest(email=f"{number}@example.com", password=PASSWORD)
            metadata = (("x-forwarded-for", f"198.51.100.{number % 50}"),)
            return auth(crowd[number % 10]).Login(request, metadata=metadata)

        logins = [asyncio.create_task(outcome(attempt(number))) for number in range(1_000)]
        health = health_pb2_grpc.HealthStub(other.channel)
        beside = 0
        while not all(login.done() for login in logins):
            assert await clinics(other, user_token()) == "OK"
            assert (
                await health.Check(health_pb2.HealthCheckRequest())
            ).status == health_pb2.HealthCheckResponse.SERVING
            beside += 1
        assert beside >= 5
        outcomes = Counter(await asyncio.gather(*logins))
        assert outcomes["BAD_LOGIN"] >= 5, "some are checked"
        assert outcomes.keys() <= {"BAD_LOGIN", "OVERLOADED", "DEADLINE_EXCEEDED"}


def _public_pem() -> bytes:
    return SIGNING_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _key_confusion(secret: bytes) -> str:
    # By hand: the library refuses to sign like this.
    import hmac

    def part(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    header = {"alg": "HS256", "kid": "testkey", "typ": "at+jwt"}
    text = part(json.dumps(header).encode()) + b"." + part(json.dumps(claims()).encode())
    return (text + b"." + part(hmac.digest(secret, text, "sha256"))).decode()


def _now() -> int:
    return int(time.time())


BAD_TOKENS: dict[str, Any] = {
    "alg none": lambda: jwt.encode(claims(), "", "none", headers={"kid": "testkey", "typ": "at+jwt"}),
    "HS256 with the public key": lambda: _key_confusion(SIGNING_KEY.public_key().public_bytes_raw()),
    "HS256 with its PEM": lambda: _key_confusion(_public_pem()),
    "unknown kid": lambda: signed(claims(), kid="0" * 32),
    "no kid": lambda: jwt.encode(claims(), SIGNING_KEY, "EdDSA", headers={"typ": "at+jwt"}),
    "kid that is no name": lambda: signed(claims(), kid="../../etc/passwd"),
    "another key": lambda: signed(claims(), Ed25519PrivateKey.generate()),
    "wrong iss": lambda: signed(claims(iss="https://example.com")),
    "wrong aud": lambda: signed(claims(aud="billing")),
    "typ of another token": lambda: signed(claims(), typ="JWT"),
    "not yet valid": lambda: signed(claims(nbf=_now() + 120)),
    "issued in the future": lambda: signed(claims(iat=_now() + 120, exp=_now() + 900)),
    "too long a life": lambda: signed(claims(iat=_now() - 10, exp=_now() + 891)),
    "unknown crit": lambda: signed(claims(), crit=["x"], x=1),
    "no exp": lambda: signed({k: v for k, v in claims().items() if k != "exp"}),
    "exp that is no number": lambda: signed(claims(exp="tomorrow")),
    "exp that is a text": lambda: signed(claims(exp=str(_now() + 300))),
    "exp that is a truth value": lambda: signed(claims(exp=True)),
    "a huge exp": lambda: signed(claims(exp=10**400)),
    "a huge nbf": lambda: signed(claims(nbf=10**400)),
    "unknown user": lambda: signed(claims(sub=SESSION)),
    "sub that is no id": lambda: signed(claims(sub="root")),
    "unknown session": lambda: signed(claims(sid=USER)),
    "one character changed": lambda: signed(claims())[:-10] + "A" + signed(claims())[-9:],
    "no token": lambda: "eyJ.eyJ.x",
    "long": lambda: signed(claims(jti="x" * 9_000)),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
async def test_bad_tokens(front: Front, kind: str) -> None:
    """A token that is not ours, or not in order, is refused, and the answer does not repeat it."""
    assert await clinics(front, user_token()) == "OK"
    token = BAD_TOKENS[kind]()
    error = await refusal(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=carrying(token)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    assert token[:20] not in repr(error)


async def test_expired_tokens(front: Front) -> None:
    """A token is refused from its expiry on, also where it is known; one with other rights than now likewise."""
    assert await clinics(front, carrying(signed(claims(iat=_now() - 900, exp=_now())))) == "CREDENTIALS_EXPIRED"
    brief = carrying(signed(claims(exp=_now() + 2)))
    assert await clinics(front, brief) == "OK"
    await comes_to(front, brief, "CREDENTIALS_EXPIRED")
    for changed in ({"roles": ["ADMIN", "STAFF"]}, {"clinic_ids": [USER]}, {"patient_id": USER}):
        assert await clinics(front, carrying(signed(claims(**changed)))) == "CREDENTIALS_EXPIRED"


async def test_expired_tokens_are_remembered(conninfo: str, settings: Settings) -> None:
    """A token that was refused as expired is refused again without being judged; with its old rights it is good."""
    late, demoted = carrying(signed(claims(iat=_now() - 900, exp=_now()))), carrying(signed(claims(roles=["STAFF"])))
    async with serving(settings, conninfo) as (worker, front):
        for token in (late, demoted):
            assert await clinics(front, token) == "CREDENTIALS_EXPIRED"
        worker._credentials._tokens._public.clear()
        with psycopg.connect(conninfo) as holder:
            # A judgement would wait for this one.
            holder.execute("lock table signing_key, user_account in access exclusive mode")
            for token in (late, demoted):
                assert await clinics(front, token) == "CREDENTIALS_EXPIRED"
        await create_user(front, "ADMIN")
        await set_roles(front, USER, "STAFF")
        async with asyncio.timeout(SOON):
            while await clinics(front, demoted) != "OK":  # noqa: ASYNC110 - the worker must look
                await asyncio.sleep(0.05)


async def test_access_tokens_are_no_api_keys(front: Front) -> None:
    """An access token in the place of an API key is refused, also where it is known."""
    token = user_token()
    assert await clinics(front, token) == "OK"
    assert await clinics(front, bearing(token[0][1].removeprefix("Bearer "))) == "CREDENTIALS_INVALID"


async def test_refreshing(front: Front) -> None:
    """A refresh token works once; the last one again for 10 s; a used one after that ends the session."""
    first = (await register(front, email=EMAIL)).session
    second = await refresh(front, first.refresh_token)
    again = await refresh(front, first.refresh_token)
    assert len({first.refresh_token, second.refresh_token, again.refresh_token}) == 3
    third = await refresh(front, again.refresh_token)
    assert await clinics(front, carrying(third.access_token)) == "OK"
    front.sql("update session set refresh_time = refresh_time - interval '11 seconds'")
    assert await outcome(refresh(front, again.refresh_token)) == "REFRESH_REUSED"
    assert await outcome(refresh(front, third.refresh_token)) == "CREDENTIALS_INVALID"
    await comes_to(front, carrying(third.access_token), "CREDENTIALS_INVALID")
    assert await outcome(refresh(front, "x" * 43)) == "CREDENTIALS_INVALID"


async def test_an_older_refresh_token(front: Front) -> None:
    """Only the token before the present one may be repeated within 10 s, not the one before that."""
    first = (await register(front, email=EMAIL)).session
    second = await refresh(front, first.refresh_token)
    await refresh(front, second.refresh_token)
    assert await outcome(refresh(front, first.refresh_token)) == "REFRESH_REUSED"


async def test_refreshing_at_once(front: Front) -> None:
    """Threads of one client that refresh at the same time all go on."""
    first = (await register(front, email=EMAIL)).session
    sessions = await asyncio.gather(*(refresh(front, first.refresh_token) for _ in range(20)))
    assert len({session.refresh_token for session in sessions}) == 20
    assert await outcome(refresh(front, sessions[7].refresh_token)) == "OK"


@pytest.mark.parametrize(("column", "hours", "kept"), [("refresh_time", 12, 11), ("create_time", 720, 719)])
async def test_sessions_end(front: Front, column: str, hours: int, kept: int) -> None:
    """A session ends after 12 hours without a refresh, and 30 days after the login."""
    session = (await register(front, email=EMAIL)).session
    front.sql(f"update session set {column} = moment() - make_interval(hours => %s)", kept)
    session = await refresh(front, session.refresh_token)
    front.sql(f"update session set {column} = moment() - make_interval(hours => %s, secs => 1)", hours)
    assert await outcome(refresh(front, session.refresh_token)) == "CREDENTIALS_EXPIRED"


async def test_logout(front: Front, conninfo: str, settings: Settings) -> None:
    """A logout ends one session, or all of the user, at every worker."""
    first = (await register(front, email=EMAIL)).session
    second, third = [await login(front) for _ in range(2)]
    async with serving(settings, conninfo) as (_, elsewhere):
        for session in (first, second, third):
            assert await clinics(elsewhere, carrying(session.access_token)) == "OK"
        await auth(front).Logout(auth_pb2.LogoutRequest(refresh_token=first.refresh_token))
        await comes_to(elsewhere, carrying(first.access_token), "CREDENTIALS_INVALID")
        assert await outcome(refresh(front, first.refresh_token)) == "CREDENTIALS_INVALID"
        assert await clinics(elsewhere, carrying(second.access_token)) == "OK"
        await auth(front).Logout(auth_pb2.LogoutRequest(refresh_token=first.refresh_token))
        assert front.sql("select count(*) from log where type = 'user.logged_out'") == [(1,)], "that changed nothing"
        await auth(front).Logout(auth_pb2.LogoutRequest(refresh_token=second.refresh_token, everywhere=True))
        for session in (second, third):
            await comes_to(elsewhere, carrying(session.access_token), "CREDENTIALS_INVALID")
    unknown = auth_pb2.LogoutRequest(refresh_token="unknown")
    assert await outcome(auth(front).Logout(unknown)) == "CREDENTIALS_INVALID"


async def test_old_refresh_tokens_end_no_other_session(front: Front) -> None:
    """Logout everywhere takes one of the last two tokens of a session that goes on; an older one may be stolen."""
    first = (await register(front, email=EMAIL)).session
    other = await login(front)

    def logout(session: auth_pb2.Session, *, everywhere: bool = True) -> Any:
        request = auth_pb2.LogoutRequest(refresh_token=session.refresh_token, everywhere=everywhere)
        return outcome(auth(front).Logout(request))

    second = await refresh(front, first.refresh_token)
    third = await refresh(front, second.refresh_token)
    assert await logout(first) == "CREDENTIALS_INVALID"
    assert await outcome(refresh(front, first.refresh_token)) == "REFRESH_REUSED"
    for session in (first, second, third):
        assert await logout(session) == "CREDENTIALS_INVALID", "the session has ended"
        assert await logout(session, everywhere=False) == "OK"
    other = await refresh(front, (before := other).refresh_token)
    front.sql("update session set refresh_time = moment() - interval '13 hours'")
    assert await logout(other) == "CREDENTIALS_INVALID", "the session has expired"
    front.sql("update session set refresh_time = moment()")
    assert await logout(before) == "OK", "the answer with the last one may have been lost"
    assert await outcome(refresh(front, other.refresh_token)) == "CREDENTIALS_INVALID"


async def test_a_reused_token_is_logged(front: Front) -> None:
    """The end of a session whose used token came again is in the log, with its user."""
    first = (await register(front, email=EMAIL)).session
    await refresh(front, (await refresh(front, first.refresh_token)).refresh_token)
    assert await outcome(refresh(front, first.refresh_token)) == "REFRESH_REUSED"
    logged = front.sql(
        "select actor, method, type, resource, address from log order by transaction desc, id desc limit 1"
    )
    ((*what, address),) = logged
    assert what == ["anonymous", "RefreshToken", "user.refresh_reused", f"users/{first.user.id}"]
    assert address in ("127.0.0.1", "::1")


async def test_expired_credentials_do_not_hinder_a_refresh(front: Front) -> None:
    """Methods that need no credentials do not look at those that come, so a client may send old ones along."""
    session = (await register(front, email=EMAIL)).session
    old = carrying(signed(claims(iat=_now() - 900, exp=_now() - 1)))
    request = auth_pb2.RefreshTokenRequest(refresh_token=session.refresh_token)
    assert await outcome(auth(front).RefreshToken(request, metadata=old)) == "OK"


async def test_change_password(front: Front) -> None:
    """A new password takes the old one, ends every session but the new one, and may be retried with its key."""
    first = (await register(front, email=EMAIL)).session
    second = await login(front)

    def change(old: str, new: str, **fields: Any) -> Any:
        request = auth_pb2.ChangePasswordRequest(old_password=old, new_password=new, **fields)
        return auth(front).ChangePassword(request, metadata=carrying(second.access_token))

    new = "another good password"
    assert await outcome(change("wrong", new)) == "BAD_LOGIN"
    for bad in ("short", "password123", EMAIL, PASSWORD):
        assert await outcome(change(PASSWORD, bad)) == "INVALID_FIELD"
    third = (await change(PASSWORD, new, idempotency_key="k")).session
    again = await change(PASSWORD, new, idempotency_key="k")
    assert (again.replayed, again.HasField("session")) == (True, False)
    for session in (first, second):
        await comes_to(front, carrying(session.access_token), "CREDENTIALS_INVALID")
        assert await outcome(refresh(front, session.refresh_token)) == "CREDENTIALS_INVALID"
    assert await clinics(front, carrying(third.access_token)) == "OK"
    assert await outcome(login(front)) == "BAD_LOGIN"
    await login(front, password=new)
    logged = front.sql("select type, actor from log where type like 'user.%' order by transaction")
    logins = ["user.registered", "user.logged_in", "user.password_changed", "user.logged_in"]
    assert logged == [(event, f"users/{first.user.id}") for event in logins]


async def test_one_time_passwords(front: Front) -> None:
    """A new user's one-time password lets him change it, and nothing else, for 24 hours."""
    user, password, first = await create_user(front, "STAFF", name="Ana")
    assert user.name == "Ana"
    error = await refusal(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=first))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "PASSWORD_CHANGE_REQUIRED")
    update = auth_pb2.UpdateProfileRequest(user=auth_pb2.User(name="Ana Alves"))
    assert await outcome(auth(front).UpdateProfile(update, metadata=first)) == "PASSWORD_CHANGE_REQUIRED"
    assert await outcome(auth(front).GetProfile(auth_pb2.GetProfileRequest(), metadata=first)) == "OK"
    request = auth_pb2.ChangePasswordRequest(old_password=password, new_password=PASSWORD)
    session = (await auth(front).ChangePassword(request, metadata=first)).session
    assert await clinics(front, carrying(session.access_token)) == "OK"
    late, password, held = await create_user(front, "STAFF")
    front.sql("update user_account set password_expire_time = moment() where id = %s", late.id)
    assert await clinics(front, held) == "CREDENTIALS_INVALID"
    assert await outcome(login(front, late.email, password)) == "BAD_LOGIN"


@pytest.fixture
async def mailing(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A server that would send mails, which need not arrive."""
    async with serving(settings, conninfo, smtp_url="smtp://localhost:1", mail_from="a@clinic.test") as (_, front):
        yield front


async def test_unverified_emails(mailing: Front) -> None:
    """Until the e-mail is verified a patient may only use AuthService, whatever other roles he has."""
    front = mailing
    user, session = (made := await register(front, email=EMAIL)).user, made.session
    for roles in (("PATIENT",), ("PATIENT", "STAFF")):
        await set_roles(front, user.id, *roles)
        session = await refresh(front, session.refresh_token)
        held = carrying(session.access_token)
        error = await refusal(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=held))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "EMAIL_NOT_VERIFIED")
        assert not (await profile(front, session)).email_verified
        update = auth_pb2.UpdateProfileRequest(user=auth_pb2.User(name="Ana"))
        assert await outcome(auth(front).UpdateProfile(update, metadata=held)) == "OK"
    await set_roles(front, user.id, "STAFF")
    session = await refresh(front, session.refresh_token)
    assert await clinics(front, carrying(session.access_token)) == "OK"


async def test_a_user_follows_a_merge(front: Front) -> None:
    """After a merge the user of the other record has the kept one, and sees all its appointments."""
    doctor, kept = await front.doctor(), await front.patient()
    made = await register(front, email=EMAIL)
    booked = await front.book(kept.id, doctor.id, tomorrow())
    await merge(front, kept.id, made.user.patient_id)
    await comes_to(front, carrying(made.session.access_token), "CREDENTIALS_EXPIRED")
    session = await refresh(front, made.session.refresh_token)
    assert session.user.patient_id == kept.id
    assert session.user.etag != made.user.etag
    assert await own(front, session) == [booked.appointment.id]
    logged = front.sql("select method, resource, patient_id::text from log where type = 'user.patient_linked'")
    assert logged == [("MergePatients", f"users/{made.user.id}", kept.id)]


async def test_two_users_of_merged_records(front: Front) -> None:
    """If both records have a user, both users have the kept one from then on, and a third is not linked to it."""
    first = await register(front, email=EMAIL)
    second = await register(front, patient=patient_pb2.Patient(given_name="Rosinha", phone="+5511987654321"))
    third = await register(front, patient=patient_pb2.Patient(given_name="Rosita", phone="+5511987654321"))
    doctor = await front.doctor()
    booked = await front.book(first.user.patient_id, doctor.id, tomorrow())
    other = await front.book(second.user.patient_id, (await front.doctor()).id, tomorrow())
    await merge(front, first.user.patient_id, second.user.patient_id)
    for made in (first, second):
        session = await refresh(front, made.session.refresh_token)
        assert await own(front, session) == sorted([booked.appointment.id, other.appointment.id])
    front.sql("update user_account set patient_id = null where id = %s", third.user.id)
    for patient in (first.user.patient_id, second.user.patient_id):
        assert await outcome(link(front, third.user.id, patient)) == "PATIENT_LINKED"


async def merge(front: Front, keep: str, other: str) -> None:
    """Make two patients one."""
    request = patient_pb2.MergePatientsRequest(keep_patient_id=keep, merge_patient_id=other)
    await front.patients.MergePatients(request)


async def own(front: Front, session: auth_pb2.Session) -> list[str]:
    """The ids of the appointments that a user sees."""
    request = appointment_pb2.ListAppointmentsRequest()
    held = carrying(session.access_token)
    answer = await front.appointments.ListAppointments(request, metadata=held)
    for found in answer.appointments:
        one = appointment_pb2.GetAppointmentRequest(appointment_id=found.id)
        assert await outcome(front.appointments.GetAppointment(one, metadata=held)) == "OK"
    mine = patient_pb2.GetPatientRequest(patient_id=session.user.patient_id)
    assert await outcome(front.patients.GetPatient(mine, metadata=held)) == "OK"
    return sorted(found.id for found in answer.appointments)


async def test_demotion_reaches_every_worker(front: Front, conninfo: str, settings: Settings) -> None:
    """A user with other roles must refresh, and then has them; a deactivated one is out, at every worker."""
    made = await register(front, email=EMAIL)
    user, session = made.user, made.session
    user = await set_roles(front, user.id, "ADMIN")
    session = await refresh(front, session.refresh_token)
    async with serving(settings, conninfo) as (_, elsewhere):
        held = carrying(session.access_token)
        assert await outcome(elsewhere.clinics.CreateClinic(_clinic(), metadata=held)) == "OK"
        await set_roles(front, user.id, "PATIENT")
        await comes_to(elsewhere, held, "CREDENTIALS_EXPIRED")
        session = await refresh(elsewhere, session.refresh_token)
        held = carrying(session.access_token)
        assert await outcome(elsewhere.clinics.CreateClinic(_clinic(), metadata=held)) == "ROLE_REQUIRED"
        assert await clinics(elsewhere, held) == "OK"
        await deactivate(front, user.id)
        await comes_to(elsewhere, held, "CREDENTIALS_INVALID")
        assert await outcome(refresh(elsewhere, session.refresh_token)) == "CREDENTIALS_INVALID"
        assert await outcome(login(elsewhere)) == "BAD_LOGIN"


def _clinic() -> clinic_pb2.CreateClinicRequest:
    return clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="Clinic", time_zone="America/Lima"))


async def test_the_last_administrator(front: Front) -> None:
    """The last active administrator of all clinics is neither demoted nor deactivated, also if two do it at once."""
    clinic = await front.clinic()
    await create_user(front, "ADMIN", clinic_ids=[clinic.id])
    for attempt in (
        set_roles(front, USER, "STAFF"),
        set_roles(front, USER, "ADMIN", clinic_ids=[clinic.id]),
        deactivate(front, USER),
    ):
        assert await outcome(attempt) == "LAST_ADMIN"
    late, *_ = await create_user(front, "ADMIN")
    front.sql("update user_account set password_expire_time = moment() where id = %s", late.id)
    assert await outcome(deactivate(front, USER)) == "LAST_ADMIN", "the other one cannot log in any more"
    for _ in range(5):
        other, *_ = await create_user(front, "ADMIN")
        outcomes = await asyncio.gather(outcome(set_roles(front, USER, "STAFF")), outcome(deactivate(front, other.id)))
        assert sorted(outcomes) == ["LAST_ADMIN", "OK"]
        front.sql("update user_account set roles = '{ADMIN}' where id = %s", USER)
        front.sql("update user_account set active = false where id <> %s", USER)


@pytest.mark.parametrize("path", ["roles", "patient_id", "doctor_id", "clinic_ids", "active", "email", "second_factor"])
async def test_masks_of_a_profile(front: Front, path: str) -> None:
    """Nobody gives himself rights: a mask that names them is refused, and `*` leaves them as they are."""
    made = await register(front, email=EMAIL)
    wanted = auth_pb2.User(
        name="Ana", roles=[policy_pb2.ROLE_ADMIN], patient_id=USER, active=False, email="a@b.example"
    )

    def update(*paths: str) -> Any:
        request = auth_pb2.UpdateProfileRequest(user=wanted, update_mask=FieldMask(paths=paths))
        return auth(front).UpdateProfile(request, metadata=carrying(made.session.access_token))

    assert await outcome(update(path)) == "INVALID_FIELD"
    assert await outcome(update("name", path)) == "INVALID_FIELD"
    changed = (await update("*")).user
    for name in ("roles", "patient_id", "active", "email"):
        assert getattr(changed, name) == getattr(made.user, name)
    assert (changed.name, changed.phone) == ("Ana", "")


async def test_the_mask_of_a_user(front: Front) -> None:
    """A mask of UpdateUser that names roles or the patient is refused, and `*` leaves them as they are."""
    user = (await register(front, email=EMAIL)).user
    wanted = auth_pb2.User(
        id=user.id, name="Ana", roles=[policy_pb2.ROLE_ADMIN], patient_id=USER, email="a@b.example", active=True
    )

    def update(*paths: str) -> Any:
        request = access_pb2.UpdateUserRequest(user=wanted, update_mask=FieldMask(paths=paths))
        return access(front).UpdateUser(request, metadata=ADMIN)

    for path in ("roles", "patient_id", "clinic_ids", "email", "email_verified"):
        assert await outcome(update(path)) == "INVALID_FIELD"
        assert await outcome(update("name", path)) == "INVALID_FIELD"
    changed = (await update("*")).user
    for name in ("roles", "patient_id", "email"):
        assert getattr(changed, name) == getattr(user, name)
    assert changed.name == "Ana"


async def test_profiles_belong_to_users(front: Front) -> None:
    """Only a user has a profile: a caller without credentials, or with an API key, does not."""
    for request, method in (
        (auth_pb2.GetProfileRequest(), auth(front).GetProfile),
        (auth_pb2.UpdateProfileRequest(user=auth_pb2.User(name="x")), auth(front).UpdateProfile),
        (auth_pb2.ChangePasswordRequest(old_password="x", new_password=PASSWORD), auth(front).ChangePassword),
    ):
        assert await outcome(method(request)) == "CREDENTIALS_REQUIRED"
        assert await outcome(method(request, metadata=ADMIN)) == "ROLE_REQUIRED"


async def test_users_of_some_clinics(front: Front) -> None:
    """An administrator of some clinics reaches patients, and those whose roles hold in his clinics alone."""
    mine, yours = [(await front.clinic()).id for _ in range(2)]
    here = bearing((await create_key(front, "ADMIN", clinic_ids=[mine])).key)
    patient = (await register(front)).user.id
    own = (await create_user(front, "STAFF", by=here, clinic_ids=[mine]))[0].id
    others = [(await create_user(front, "STAFF", clinic_ids=ids))[0].id for ids in ([yours], [mine, yours], [])]
    doctor_of = {clinic: (await front.doctor(clinic_id=clinic)).id for clinic in (mine, yours)}

    async def get(user_id: str) -> str:
        return await outcome(access(front).GetUser(access_pb2.GetUserRequest(user_id=user_id), metadata=here))

    assert [await get(one) for one in (own, patient)] == ["OK", "OK"]
    assert {await get(one) for one in (*others, USER)} == {"CLINIC_NOT_YOURS"}
    listed = (await access(front).ListUsers(access_pb2.ListUsersRequest(), metadata=here)).users
    assert {user.id for user in listed} == {own, patient}
    for other in (*others, USER):
        assert await outcome(set_roles(front, other, "PATIENT", by=here)) == "CLINIC_NOT_YOURS"
        assert await outcome(deactivate(front, other, by=here)) == "CLINIC_NOT_YOURS"
    for ids in ([yours], [mine, yours], []):
        assert await outcome(set_roles(front, patient, "ADMIN", by=here, clinic_ids=ids)) == "CLINIC_NOT_YOURS"
        assert await outcome(create_user(front, "ADMIN", by=here, clinic_ids=ids)) == "CLINIC_NOT_YOURS"
    for clinic, wanted in ((yours, "CLINIC_NOT_YOURS"), (mine, "OK")):
        promoted = set_roles(front, patient, "DOCTOR", by=here, clinic_ids=[mine], doctor_id=doctor_of[clinic])
        assert await outcome(promoted) == wanted


async def test_lists_of_users(front: Front) -> None:
    """Users are found by e-mail, whatever its letter case, and by role."""
    rosa = (await register(front, email="Rosa@example.com")).user
    ana, *_ = await create_user(front, "STAFF", "DOCTOR", doctor_id=(await front.doctor()).id)

    async def found(**filters: Any) -> list[str]:
        answer = await access(front).ListUsers(access_pb2.ListUsersRequest(**filters), metadata=ADMIN)
        return [user.id for user in answer.users]

    assert await found(email="rosa@EXAMPLE.com") == [rosa.id]
    assert await found(role=policy_pb2.ROLE_DOCTOR) == await found(role=policy_pb2.ROLE_STAFF) == [ana.id]
    assert await found() == [USER, rosa.id, ana.id]


async def test_doctors_have_a_doctor(front: Front) -> None:
    """A user with the role DOCTOR is a doctor who exists, and no other user is one."""
    user = (await register(front)).user.id
    doctor = await front.doctor()
    assert await outcome(set_roles(front, user, "DOCTOR")) == "INVALID_FIELD"
    assert await outcome(set_roles(front, user, "STAFF", doctor_id=doctor.id)) == "INVALID_FIELD"
    assert await outcome(set_roles(front, user, "DOCTOR", doctor_id=USER)) == "DOCTOR_NOT_FOUND"
    assert await outcome(set_roles(front, user, "STAFF", clinic_ids=[USER])) == "CLINIC_NOT_FOUND"
    assert await outcome(set_roles(front, user, "SERVICE")) == "INVALID_FIELD"
    assert (await set_roles(front, user, "PATIENT", "DOCTOR", doctor_id=doctor.id)).doctor_id == doctor.id


async def test_secrets_of_users_are_kept_nowhere(front: Front, capfd: pytest.CaptureFixture[str]) -> None:
    """Passwords and tokens are in no row and no line of the log; an e-mail is in its user's row alone."""
    word = "zzyzx-password-canary"
    request = {"email": "zzyzx-mail-canary@example.com", "password": word, "idempotency_key": "k"}
    first = await register(front, **request)
    again = await register(front, **request)
    assert (again.replayed, again.HasField("session"), again.user) == (True, False, first.user)
    assert not (await register(front, **{**request, "email": "other@example.com", "idempotency_key": "l"})).replayed
    session = await login(front, request["email"], word)
    await outcome(login(front, "zzyzx-mail-canary@example.org", word))
    _, one_time, _ = await create_user(front, "STAFF")
    secrets = [word, one_time]
    for held in (first.session, session, await refresh(front, session.refresh_token)):
        assert await clinics(front, carrying(held.access_token)) == "OK"
        secrets += [held.refresh_token, held.access_token, held.access_token.rpartition(".")[2]]
    for (table,) in front.sql("select tablename from pg_tables where schemaname = 'public'"):
        for (row,) in front.sql(f'select t::text from "{table}" t'):
            assert not [secret for secret in secrets if secret in row], table
            assert table == "user_account" or "zzyzx-mail" not in row, table
    said = capfd.readouterr()
    for secret in (*secrets, "zzyzx-mail"):
        assert secret not in said.out + said.err


async def test_admin_create(front: Front) -> None:
    """`frontdesk admin create` makes an administrator of all clinics, who logs in with the password that it prints."""
    command = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "frontdesk.cli", "admin", "create", "--email", EMAIL, "--name", "Ana"),
        *("--database-url", front.conninfo),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    said, _ = await command.communicate()
    assert command.returncode == 0
    session = await login(front, EMAIL, said.decode().strip())
    assert list(session.user.roles) == [policy_pb2.ROLE_ADMIN]
    assert not session.user.clinic_ids
    assert await clinics(front, carrying(session.access_token)) == "PASSWORD_CHANGE_REQUIRED"
