"""The second factor of a login: an authenticator app's codes, and recovery codes."""

import asyncio
import time
from typing import Any

import grpc
import pyotp
import pytest

from clinic.frontdesk.v1 import access_pb2, auth_pb2, clinic_pb2
from frontdesk.client import FrontdeskClient, FrontdeskError, Login
from frontdesk.settings import Settings
from tests.clinic import Front, outcome, reason_of, refusal
from tests.hostile.methods import register
from tests.hostile.wire import serving
from tests.identities import ADMIN, PASSWORD, Metadata, access, auth, bearing, carrying, create_key
from tests.test_auth import EMAIL, clinics, create_user, login, profile

_WINDOW = 30


class Owner:
    """Somebody with a user, and an authenticator app."""

    def __init__(self, front: Front, session: auth_pb2.Session) -> None:
        self.front = front
        self.session = session
        self.app: Any = None
        self.recovery_codes: list[str] = []

    @property
    def held(self) -> Metadata:
        return carrying(self.session.access_token)

    async def enroll(self, **fields: Any) -> auth_pb2.EnrollSecondFactorResponse:
        """Take a secret into the app."""
        request = auth_pb2.EnrollSecondFactorRequest(**fields)
        answer: auth_pb2.EnrollSecondFactorResponse = await auth(self.front).EnrollSecondFactor(
            request, metadata=self.held
        )
        if answer.otpauth_uri:
            self.app = pyotp.parse_uri(answer.otpauth_uri)
        return answer

    async def confirm(self, code: str, **fields: Any) -> auth_pb2.ConfirmSecondFactorResponse:
        """Show that the app has the secret."""
        request = auth_pb2.ConfirmSecondFactorRequest(code=code, **fields)
        answer: auth_pb2.ConfirmSecondFactorResponse = await auth(self.front).ConfirmSecondFactor(
            request, metadata=self.held
        )
        self.recovery_codes = list(answer.recovery_codes) or self.recovery_codes
        return answer

    async def remove(self, password: str, code: str, **fields: Any) -> auth_pb2.RemoveSecondFactorResponse:
        """Do without the second factor."""
        request = auth_pb2.RemoveSecondFactorRequest(password=password, code=code, **fields)
        answer: auth_pb2.RemoveSecondFactorResponse = await auth(self.front).RemoveSecondFactor(
            request, metadata=self.held
        )
        return answer

    def code(self, windows_ago: int = 0) -> str:
        """The code that the app shows now, or showed so many windows ago."""
        return str(self.app.at(time.time() - _WINDOW * windows_ago))

    def forget_used(self) -> None:
        """Let the codes of these windows be good again, as if they had not been used."""
        self.front.sql("update second_factor set last_window = 0 where user_id = %s", self.session.user.id)


async def early_in_a_window() -> None:
    """Until the present window of codes lasts longer than a few calls."""
    rest = _WINDOW - time.time() % _WINDOW
    if rest < 10:
        await asyncio.sleep(rest + 0.1)


async def owner(front: Front) -> Owner:
    """Somebody whose logins take a second factor; no code of the app has been used."""
    made = Owner(front, (await register(front, email=EMAIL)).session)
    await made.enroll()
    await made.confirm(made.code())
    made.forget_used()
    return made


async def challenge(front: Front, password: str = PASSWORD) -> str:
    """Begin a login; its challenge."""
    answer = await auth(front).Login(auth_pb2.LoginRequest(email=EMAIL, password=password))
    assert answer.WhichOneof("step") == "second_factor"
    found: str = answer.second_factor.challenge
    return found


async def verify(front: Front, waiting: str, code: str) -> auth_pb2.Session:
    """Go on with a login."""
    request = auth_pb2.VerifySecondFactorRequest(challenge=waiting, code=code)
    found: auth_pb2.Session = (await auth(front).VerifySecondFactor(request)).session
    return found


async def test_a_second_factor(front: Front, conninfo: str, settings: Settings) -> None:
    """Once a code is confirmed, a login takes the password and a code, at another worker too."""
    person = Owner(front, (await register(front, email=EMAIL)).session)
    await person.enroll()
    assert (person.app.issuer, person.app.name, person.app.digits, person.app.interval) == ("frontdesk", EMAIL, 6, 30)
    assert len(person.app.byte_secret()) == 20
    await login(front)
    assert await outcome(person.confirm("12345")) == "BAD_LOGIN"
    assert not (await profile(front, person.session)).second_factor
    answer = await person.confirm(person.code())
    assert len(set(answer.recovery_codes)) == 10
    assert (await profile(front, person.session)).second_factor
    assert await clinics(front, person.held) == "OK", "sessions that there were go on"
    person.forget_used()
    waiting = await challenge(front)
    async with serving(settings, conninfo) as (_, elsewhere):
        session = await verify(elsewhere, waiting, f" {person.code()[:3]} {person.code()[3:]}")
    assert session.user.second_factor
    assert session.user.HasField("last_login_time")
    assert await clinics(front, carrying(session.access_token)) == "OK"


async def test_the_password_comes_first(front: Front) -> None:
    """A wrong password gets the same answer as that of a user without a second factor."""
    await owner(front)
    await register(front, email="plain@example.com")
    errors = [await refusal(login(front, email, "wrong")) for email in (EMAIL, "plain@example.com")]
    assert {reason_of(error) for error in errors} == {"BAD_LOGIN"}
    assert len({(error.code(), error.details(), repr(error.trailing_metadata())) for error in errors}) == 1


async def test_codes_of_the_app_are_good_once(front: Front) -> None:
    """The code of this or the last window is good once; one that is older, ahead or before the last used is not."""
    person = await owner(front)
    await early_in_a_window()
    for windows_ago in (2, -1):
        assert await outcome(verify(front, await challenge(front), person.code(windows_ago))) == "BAD_LOGIN"
    await verify(front, await challenge(front), person.code(1))
    assert await outcome(verify(front, await challenge(front), person.code(1))) == "BAD_LOGIN"
    await verify(front, await challenge(front), person.code())
    for windows_ago in (0, 1):
        assert await outcome(verify(front, await challenge(front), person.code(windows_ago))) == "BAD_LOGIN"


async def test_one_code_at_once(front: Front) -> None:
    """Of many logins that bring the same code at the same time, one gets in."""
    person = await owner(front)
    await early_in_a_window()
    waiting = [await challenge(front) for _ in range(4)]
    for code in (person.code(), person.recovery_codes[0]):
        outcomes = await asyncio.gather(*(outcome(verify(front, one, code)) for one in waiting))
        assert sorted(outcomes) == ["BAD_LOGIN"] * 3 + ["OK"]
        waiting = [one for one, said in zip(waiting, outcomes, strict=True) if said != "OK"]
        waiting.append(await challenge(front))


async def test_recovery_codes_are_good_once(front: Front) -> None:
    """A recovery code stands in for the app's, once, however it is typed."""
    person = await owner(front)
    for number, code in enumerate(person.recovery_codes):
        typed = (code, code.upper(), code.replace("-", " "))[number % 3]
        await verify(front, await challenge(front), typed)
        waiting = await challenge(front)
        assert await outcome(verify(front, waiting, typed)) == "BAD_LOGIN"
        await verify(front, waiting, person.code())
        person.forget_used()


async def test_a_challenge_is_good_once(front: Front) -> None:
    """A challenge that was answered, has expired, is unknown or belongs to an older password, is good for nothing."""
    person = await owner(front)
    waiting = await challenge(front)
    await verify(front, waiting, person.recovery_codes[0])
    assert await outcome(verify(front, waiting, person.recovery_codes[1])) == "BAD_LOGIN"
    assert await outcome(verify(front, "unknown", person.recovery_codes[1])) == "BAD_LOGIN"
    answer = await auth(front).Login(auth_pb2.LoginRequest(email=EMAIL, password=PASSWORD))
    assert 0 < answer.second_factor.expire_time.ToSeconds() - time.time() <= 300 + 5
    front.sql("update login_challenge set expire_time = moment()")
    assert await outcome(verify(front, answer.second_factor.challenge, person.recovery_codes[1])) == "BAD_LOGIN"
    waiting = await challenge(front)
    request = auth_pb2.ChangePasswordRequest(old_password=PASSWORD, new_password="another good password")
    await auth(front).ChangePassword(request, metadata=person.held)
    assert await outcome(verify(front, waiting, person.recovery_codes[1])) == "BAD_LOGIN"
    await verify(front, await challenge(front, "another good password"), person.recovery_codes[1])


async def test_the_client_says_what_it_needs(front: Front) -> None:
    """The Python client logs a user with a second factor in by the refresh token of a session, not by the password."""
    person = await owner(front)
    async with FrontdeskClient(f"127.0.0.1:{front.port}", login=Login(EMAIL, PASSWORD)) as desk:
        with pytest.raises(FrontdeskError, match="second factor"):
            await desk.clinics.ListClinics(clinic_pb2.ListClinicsRequest())
    session = await verify(front, await challenge(front), person.code())
    login_of_session = Login(refresh_token=session.refresh_token)
    async with FrontdeskClient(f"127.0.0.1:{front.port}", login=login_of_session) as desk:
        await desk.clinics.ListClinics(clinic_pb2.ListClinicsRequest())


async def test_an_inactive_user_gets_no_further(front: Front) -> None:
    """A user who is deactivated after the password was right does not get in with the code."""
    person = await owner(front)
    waiting = await challenge(front)
    user = auth_pb2.User(id=person.session.user.id, active=False)
    await access(front).UpdateUser(access_pb2.UpdateUserRequest(user=user), metadata=ADMIN)
    assert await outcome(verify(front, waiting, person.code())) == "BAD_LOGIN"


async def test_five_tries(front: Front) -> None:
    """A challenge takes five codes; who has the password gets no endless tries by new ones."""
    person = await owner(front)
    waiting = await challenge(front)
    guesses = await asyncio.gather(*(outcome(verify(front, waiting, f"guess {n}")) for n in range(20)))
    assert set(guesses) == {"BAD_LOGIN"}
    assert front.sql("select tries from login_challenge") == [(5,)]
    assert await outcome(verify(front, waiting, person.code())) == "BAD_LOGIN"
    for _ in range(4):
        waiting = await challenge(front)
    assert await outcome(challenge(front)) == "LOGIN_THROTTLED"
    await verify(front, waiting, person.code())
    await challenge(front)


async def test_removing(front: Front) -> None:
    """Removing takes the password and a code; then a login takes the password alone, and one may enroll anew."""
    person = await owner(front)
    waiting = await challenge(front)
    assert await outcome(person.remove("wrong", person.code())) == "BAD_LOGIN"
    assert await outcome(person.remove(PASSWORD, "123")) == "BAD_LOGIN"
    assert not (await person.remove(PASSWORD, person.recovery_codes[0], idempotency_key="k")).replayed
    assert (await person.remove(PASSWORD, person.recovery_codes[0], idempotency_key="k")).replayed
    assert await outcome(person.remove(PASSWORD, "other", idempotency_key="k")) == "IDEMPOTENCY_KEY_REUSED"
    assert not (await profile(front, person.session)).second_factor
    assert await outcome(verify(front, waiting, person.code())) == "BAD_LOGIN"
    assert (await login(front)).access_token
    for table in ("second_factor", "recovery_code", "login_challenge"):
        assert front.sql(f"select count(*) from {table}") == [(0,)]
    await person.enroll()
    await person.confirm(person.code())
    assert len(person.recovery_codes) == 10


async def test_states(front: Front) -> None:
    """Who has a second factor cannot enroll another, and who has none can neither confirm nor remove it."""
    person = Owner(front, (await register(front, email=EMAIL)).session)
    for attempt in (person.confirm("123456"), person.remove(PASSWORD, "123456")):
        error = await refusal(attempt)
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "SECOND_FACTOR_STATE")
    await person.enroll()
    old = person.code()
    await person.enroll()
    assert await outcome(person.confirm(old)) == "BAD_LOGIN", "the later secret counts"
    await person.confirm(person.code())
    assert await outcome(person.enroll()) == "SECOND_FACTOR_STATE"
    assert await outcome(person.confirm(person.code())) == "SECOND_FACTOR_STATE"


async def test_replays_leave_secrets_out(front: Front) -> None:
    """A replay says that the change was made, and answers neither the secret nor the recovery codes again."""
    person = Owner(front, (await register(front, email=EMAIL)).session)
    first = await person.enroll(idempotency_key="k")
    again = await person.enroll(idempotency_key="k")
    assert (bool(first.otpauth_uri), first.replayed, again.otpauth_uri, again.replayed) == (True, False, "", True)
    code = person.code()
    done = await person.confirm(code, idempotency_key="k")
    again_done = await person.confirm(code, idempotency_key="k")
    assert (len(done.recovery_codes), done.replayed) == (10, False)
    assert (len(again_done.recovery_codes), again_done.replayed) == (0, True)
    assert await outcome(person.confirm("other", idempotency_key="k")) == "IDEMPOTENCY_KEY_REUSED"


async def test_an_administrator_resets(front: Front) -> None:
    """An administrator resets the second factor of a user in his clinics, and nobody else does."""
    person = await owner(front)
    mine, yours = [(await front.clinic()).id for _ in range(2)]
    here = bearing((await create_key(front, "ADMIN", clinic_ids=[mine])).key)
    desk = bearing((await create_key(front, "STAFF")).key)
    other, *_ = await create_user(front, "STAFF", clinic_ids=[yours])

    def reset(user_id: str, by: Metadata, **fields: Any) -> Any:
        request = access_pb2.ResetSecondFactorRequest(user_id=user_id, **fields)
        return access(front).ResetSecondFactor(request, metadata=by)

    user_id = person.session.user.id
    assert await outcome(reset(user_id, desk)) == "ROLE_REQUIRED"
    assert await outcome(reset(user_id, person.held)) == "ROLE_REQUIRED"
    assert await outcome(reset(other.id, here)) == "CLINIC_NOT_YOURS"
    assert await outcome(reset(other.id, ADMIN)) == "SECOND_FACTOR_STATE"
    assert await outcome(reset(user_id, here, etag="1000")) == "ETAG_MISMATCH"
    waiting = await challenge(front)
    assert not (await reset(user_id, here)).user.second_factor
    assert await outcome(verify(front, waiting, person.code())) == "BAD_LOGIN"
    assert (await login(front)).access_token


async def test_what_is_kept(front: Front, capfd: pytest.CaptureFixture[str]) -> None:
    """No recovery code and no challenge is in a row, and no secret but in its own; nothing of them is in the log."""
    person = await owner(front)
    waiting = await challenge(front)
    assert await outcome(verify(front, waiting, "wrong")) == "BAD_LOGIN"
    secrets = [waiting, person.app.secret, *person.recovery_codes]
    secrets += [code.replace("-", "") for code in person.recovery_codes]
    for (table,) in front.sql("select tablename from pg_tables where schemaname = 'public'"):
        for (row,) in front.sql(f'select t::text from "{table}" t'):
            found = [secret for secret in secrets if secret in row]
            assert not found or (table, found) == ("second_factor", [person.app.secret]), table
    said = capfd.readouterr()
    for secret in secrets:
        assert secret not in said.out + said.err
