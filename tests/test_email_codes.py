"""Codes by mail: showing that an e-mail is one's own, and setting a new password."""

import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from clinic.frontdesk.v1 import auth_pb2, notification_pb2
from clinic.frontdesk.v1.notification_pb2 import Notification
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, reason_of, refusal
from tests.hostile.methods import register
from tests.hostile.wire import serving
from tests.identities import PASSWORD, auth, carrying
from tests.receivers import MailBox, body
from tests.test_mails import mailing
from tests.test_notifications import listed, service
from tests.waiting import until, until_true

EMAIL = "rosa@patients.test"
NEW = "another horse battery"
CODE = re.compile("[0-9A-Z]{5}(-[0-9A-Z]{5}){3}")


@pytest.fixture
async def box() -> AsyncIterator[MailBox]:
    async with MailBox() as made:
        yield made


@pytest.fixture
async def desk(settings: Settings, conninfo: str, box: MailBox) -> AsyncIterator[Front]:
    """A server with its background work, which tells by mail."""
    async with serving(mailing(settings, box), conninfo, background="on") as (_, front):
        yield front


async def code_of(box: MailBox, nth: int) -> str:
    """The code in the nth mail: alone on a line."""
    await until(lambda: len(box.mails) >= nth)
    (code,) = (line for line in body(box.mails[nth - 1], "plain").splitlines() if CODE.fullmatch(line))
    assert code in body(box.mails[nth - 1], "html")
    return code


async def verify(front: Front, code: str, **fields: Any) -> auth_pb2.VerifyEmailResponse:
    answer: auth_pb2.VerifyEmailResponse = await auth(front).VerifyEmail(
        auth_pb2.VerifyEmailRequest(code=code, **fields)
    )
    return answer


async def request(front: Front, email: str = EMAIL, **fields: Any) -> auth_pb2.RequestPasswordResetResponse:
    answer: auth_pb2.RequestPasswordResetResponse = await auth(front).RequestPasswordReset(
        auth_pb2.RequestPasswordResetRequest(email=email, **fields)
    )
    return answer


async def reset(front: Front, code: str, password: str = NEW, **fields: Any) -> auth_pb2.ResetPasswordResponse:
    answer: auth_pb2.ResetPasswordResponse = await auth(front).ResetPassword(
        auth_pb2.ResetPasswordRequest(code=code, password=password, **fields)
    )
    return answer


async def login(front: Front, password: str = PASSWORD) -> auth_pb2.LoginResponse:
    answer: auth_pb2.LoginResponse = await auth(front).Login(auth_pb2.LoginRequest(email=EMAIL, password=password))
    return answer


async def preferences(front: Front, user: auth_pb2.User, token: str) -> str:
    """The outcome of a call outside AuthService."""
    asked = notification_pb2.GetContactPreferencesRequest(patient_id=user.patient_id)
    return await outcome(service(front).GetContactPreferences(asked, metadata=carrying(token)))


async def test_verification(desk: Front, box: MailBox) -> None:
    """A new user is confined to AuthService until the code from the mail has come; a code is good once."""
    made = await register(desk, email=EMAIL)
    token = made.session.access_token
    assert not made.user.email_verified
    assert await preferences(desk, made.user, token) == "EMAIL_NOT_VERIFIED"
    code = await code_of(box, 1)
    assert box.subjects == ["Your code to confirm your e-mail address"]
    (one,) = await listed(desk, kind=Notification.KIND_EMAIL_VERIFICATION)
    assert (one.patient_id, one.appointment_id) == (made.user.patient_id, "")
    assert desk.sql("select count(*) from email_code where position(%s in email_code::text) > 0", code) == [(0,)]
    assert not (await verify(desk, f" {code.lower().replace('-', ' ')} ", idempotency_key="k")).replayed
    assert (await verify(desk, f" {code.lower().replace('-', ' ')} ", idempotency_key="k")).replayed
    profile = await auth(desk).GetProfile(auth_pb2.GetProfileRequest(), metadata=carrying(token))
    assert profile.user.email_verified

    async def let_in() -> bool:
        return await preferences(desk, made.user, token) == "OK"

    await until_true(let_in, 6)
    assert await outcome(verify(desk, code)) == "BAD_LOGIN"
    events = desk.sql("select actor from log where type = 'user.email_verified'")
    assert events == [(f"users/{made.user.id}",)]


async def test_another_verification(desk: Front, box: MailBox) -> None:
    """A login sends another code, once the last one is older than an hour; the old code is good no more."""
    await register(desk, email=EMAIL)
    old = await code_of(box, 1)
    await login(desk)
    desk.sql("update notification set plan_time = plan_time - interval '61 minutes'")
    desk.sql("update email_code set expire_time = expire_time - interval '61 minutes'")
    await login(desk)
    new = await code_of(box, 2)
    assert len(await listed(desk, kind=Notification.KIND_EMAIL_VERIFICATION)) == 2
    assert await outcome(verify(desk, old)) == "BAD_LOGIN"
    assert await outcome(verify(desk, new)) == "OK"


async def test_reset(desk: Front, box: MailBox) -> None:
    """A code sets the password once, ends all sessions and proves the e-mail; it is for nothing else."""
    made = await register(desk, email=EMAIL)
    verification = await code_of(box, 1)
    assert not (await request(desk, EMAIL.upper(), idempotency_key="k")).replayed
    assert (await request(desk, EMAIL.upper(), idempotency_key="k")).replayed
    code = await code_of(box, 2)
    assert await outcome(verify(desk, code)) == "BAD_LOGIN"
    assert await outcome(reset(desk, verification)) == "BAD_LOGIN"
    for bad in (EMAIL, "password1", "short"):
        assert await outcome(reset(desk, code, bad)) == "INVALID_FIELD"
    assert not (await reset(desk, code, idempotency_key="k")).replayed
    assert (await reset(desk, code, idempotency_key="k")).replayed
    assert await outcome(reset(desk, code)) == "BAD_LOGIN"
    assert await outcome(login(desk)) == "BAD_LOGIN"
    assert (await login(desk, NEW)).session.user.email_verified
    refresh = auth_pb2.RefreshTokenRequest(refresh_token=made.session.refresh_token)
    assert await outcome(auth(desk).RefreshToken(refresh)) == "CREDENTIALS_INVALID"
    rows = desk.sql("select type from log where type like 'user.%' order by id")
    types = [found for (found,) in rows if found != "user.logged_in"]
    assert types == ["user.registered", "user.password_reset_requested", "user.password_reset"]


async def test_the_same_answer(desk: Front, box: MailBox) -> None:
    """Whether there is such a user cannot be told, not even by who is throttled; nobody else gets a mail."""
    await register(desk, email=EMAIL)
    await code_of(box, 1)
    answers = {}
    for email in (EMAIL, "nobody@patients.test"):
        found: list[Any] = [await request(desk, email) for _ in range(5)]
        error = await refusal(request(desk, email))
        assert reason_of(error) == "LOGIN_THROTTLED"
        assert details(error)["RetryInfo"].retry_delay.seconds in range(1, 31)
        answers[email] = [*found, error.code(), error.details()]
    assert answers[EMAIL] == answers["nobody@patients.test"]
    await until(lambda: len(box.mails) == 6)
    assert {address for to in box.to for address in to} == {EMAIL}
    desk.sql("update user_account set active = false")
    desk.sql("delete from login_attempt")
    await request(desk)
    assert len(await listed(desk, kind=Notification.KIND_PASSWORD_RESET)) == 5


async def test_guesses_are_throttled(desk: Front, box: MailBox) -> None:
    """After five wrong codes in a row from one address the right one must wait too."""
    await register(desk, email=EMAIL)
    code = await code_of(box, 1)
    assert [await outcome(verify(desk, f"wrong{n}")) for n in range(3)] == ["BAD_LOGIN"] * 3
    assert [await outcome(reset(desk, f"wrong{n}")) for n in range(3)] == ["BAD_LOGIN"] * 2 + ["LOGIN_THROTTLED"]
    error = await refusal(verify(desk, code))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LOGIN_THROTTLED")
    desk.sql("update login_attempt set wait_until = null")
    assert await outcome(verify(desk, code)) == "OK"
    # A right one ends the row.
    assert desk.sql("select count(*) from login_attempt") == [(0,)]


async def test_old_codes(settings: Settings, conninfo: str, box: MailBox) -> None:
    """A code is good for an hour; a mail that could not be sent for an hour is not sent."""
    async with serving(mailing(settings, box), conninfo, background="on") as (_, front):
        await register(front, email=EMAIL)
        await request(front)
        await until(lambda: len(box.mails) == 2)
        (code,) = [await code_of(box, n + 1) for n, subject in enumerate(box.subjects) if "password" in subject]
        await box.stop()
        await request(front)
        await until(lambda: front.sql("select 1 from notification where failure <> ''") != [])
    with psycopg.connect(conninfo, autocommit=True) as admin:
        ((later,),) = admin.execute("select (now() + interval '61 minutes')::text").fetchall()
        name = conninfo_to_dict(conninfo)["dbname"]
        admin.execute(f"alter database {name} set frontdesk.now = '{later}'".encode())
    await box.start()
    async with serving(mailing(settings, box), conninfo, background="on") as (_, front):
        assert await outcome(reset(front, code)) == "BAD_LOGIN"
        await until(lambda: front.sql("select 1 from notification where skip_reason = 'TOO_LATE'") != [])
    assert len(box.mails) == 2


async def test_without_mail(front: Front) -> None:
    """Where no mail is configured an e-mail counts as verified, and a reset is refused, whoever asks."""
    made = await register(front, email=EMAIL)
    assert made.user.email_verified
    front.sql("update user_account set email_verified = false where id = %s", made.user.id)
    assert await preferences(front, made.user, made.session.access_token) == "OK"
    assert [await outcome(request(front, email)) for email in (EMAIL, "nobody@patients.test")] == ["NO_CHANNEL"] * 2
