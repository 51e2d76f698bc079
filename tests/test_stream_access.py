"""Streams and credentials: a stream ends before its token does, and soon after its caller has lost the right to it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import access_pb2, auth_pb2, doctor_pb2, policy_pb2, queue_pb2
from frontdesk.client import FrontdeskClient, Login
from frontdesk.core import credential
from frontdesk.core.caller import Identity
from frontdesk.rpc import stream as streams
from frontdesk.settings import Settings
from tests.clinic import Front, day, details, outcome, refusal, today
from tests.hostile.wire import serving
from tests.identities import ADMIN, PASSWORD, Metadata, access, auth, bearing, create_key, user, user_of
from tests.waiting import SOON, until_true

Closing = queue_pb2.StreamClosing


@pytest.fixture(autouse=True)
def judges_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams look at their credentials every half second: the tests need not wait for the usual pause."""
    assert streams.JUDGE_SECONDS + credential.POLL_SECONDS < 30
    monkeypatch.setattr(streams, "JUDGE_SECONDS", 0.5)


def watch(front: Front, doctor_id: str, by: Metadata = (), resume: str = "") -> Any:
    """A stream."""
    request = queue_pb2.WatchQueueRequest(doctor_id=doctor_id, resume_token=resume)
    return front.queues.WatchQueue(request, metadata=by)


async def read(stream: Any) -> Any:
    """The next message of a stream."""
    async with asyncio.timeout(SOON):
        message = await stream.read()
    assert message is not grpc.aio.EOF
    return message


async def change(front: Front, doctor_id: str) -> int:
    """A change of the doctor-day; its revision."""
    said = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor_id, date=day(today()), is_present=True)
    return (await front.doctors.SetDoctorAvailability(said)).revision


async def end_of(stream: Any) -> tuple[grpc.StatusCode, str]:
    """The status and the reason with which a stream ends."""

    async def to_the_end() -> None:
        while await stream.read() is not grpc.aio.EOF:
            pass

    async with asyncio.timeout(SOON):
        error = await refusal(to_the_end())
    return error.code(), details(error)["ErrorInfo"].reason


async def test_a_revoked_key_ends_its_streams(front: Front) -> None:
    """The streams of a revoked API key end as a new call with it would, those of other keys go on."""
    doctor = await front.doctor()
    revoked, kept = [await create_key(front, "STAFF", clinic_ids=[doctor.clinic_id]) for _ in range(2)]
    streams = [watch(front, doctor.id, bearing(made.key)) for made in (revoked, kept)]
    for stream in streams:
        await read(stream)
    await access(front).RevokeApiKey(access_pb2.RevokeApiKeyRequest(api_key_id=revoked.api_key.id), metadata=ADMIN)
    assert await end_of(streams[0]) == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")
    last = (await front.arrive(doctor.id)).revision
    while (await read(streams[1])).revision < last:
        pass


async def test_a_busy_stream_ends_too(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that is never silent notices the revocation as well, without waiting for a pause."""
    monkeypatch.setattr(streams, "JUDGE_SECONDS", 3600.0)
    doctor = await front.doctor()
    made = await create_key(front, "STAFF")
    stream = watch(front, doctor.id, bearing(made.key))
    await read(stream)
    await access(front).RevokeApiKey(access_pb2.RevokeApiKeyRequest(api_key_id=made.api_key.id), metadata=ADMIN)
    ending = asyncio.create_task(end_of(stream))
    while not ending.done():
        await change(front, doctor.id)
    assert await ending == (grpc.StatusCode.UNAUTHENTICATED, "CREDENTIALS_INVALID")


@pytest.mark.parametrize("how", ["demoted", "deactivated", "logged out"])
async def test_a_user_who_loses_the_right(front: Front, how: str) -> None:
    """The stream of a user who is demoted, deactivated or logged out ends with the status of a new call."""
    doctor = await front.doctor()
    me = user(front, "STAFF", clinic_ids=[doctor.clinic_id])
    user_id, session_id = user_of(me)
    stream = watch(front, doctor.id, me)
    await read(stream)
    if how == "demoted":
        request = access_pb2.SetUserRolesRequest(user_id=user_id, roles=[policy_pb2.ROLE_PATIENT])
        await access(front).SetUserRoles(request, metadata=ADMIN)
    elif how == "deactivated":
        gone = access_pb2.UpdateUserRequest(user=auth_pb2.User(id=user_id, active=False))
        await access(front).UpdateUser(gone, metadata=ADMIN)
    else:
        front.sql("update session set end_time = now() where id = %s", session_id)
        front.sql("insert into access_change (subject) values (%s)", f"sessions/{session_id}")
    wanted = "CREDENTIALS_EXPIRED" if how == "demoted" else "CREDENTIALS_INVALID"
    assert await end_of(stream) == (grpc.StatusCode.UNAUTHENTICATED, wanted)
    assert await outcome(read(watch(front, doctor.id, me))) == wanted


async def test_a_change_that_takes_no_right(front: Front) -> None:
    """The stream of a user of whom something else changes goes on."""
    doctor = await front.doctor()
    me = user(front, "STAFF", clinic_ids=[doctor.clinic_id])
    stream = watch(front, doctor.id, me)
    known = (await read(stream)).revision
    front.sql("insert into access_change (subject) values (%s)", f"users/{user_of(me)[0]}")
    begun = time.monotonic()
    while time.monotonic() < begun + 4 * streams.JUDGE_SECONDS + credential.POLL_SECONDS:
        last = await change(front, doctor.id)
        while known < last:
            known = (await read(stream)).revision


async def test_a_token_that_runs_out(front: Front) -> None:
    """Before a token runs out its stream is told so and closed; with a fresh token it goes on and misses nothing."""
    doctor = await front.doctor()
    seconds = 6
    me = user(front, "STAFF", clinic_ids=[doctor.clinic_id], seconds=seconds)
    begun = time.monotonic()
    stream = watch(front, doctor.id, me)
    first = await read(stream)
    last = first
    while not (message := await read(stream)).HasField("closing"):
        last = message
    assert message.closing.reason == Closing.REASON_AUTH_EXPIRING
    assert time.monotonic() - begun < seconds
    assert await stream.read() is grpc.aio.EOF
    assert await stream.code() is grpc.StatusCode.OK
    arrived = await front.arrive(doctor.id)
    fresh = user(front, "STAFF", clinic_ids=[doctor.clinic_id])
    resumed = await read(watch(front, doctor.id, fresh, last.resume_token))
    assert (resumed.previous_revision, resumed.revision) == (last.revision, arrived.revision)
    assert [change.revision for change in resumed.update.changes] == [*range(last.revision + 1, arrived.revision + 1)]


def _holding(left: float | None, life: float | None) -> Identity:
    return Identity("users/1", until=left and time.monotonic() + left, life=life)


@pytest.mark.parametrize(
    ("left", "life", "notice"),
    [(900.0, 900.0, 30.0), (40.0, 900.0, 30.0), (60.0, 60.0, 20.0), (25.0, 60.0, 20.0), (24.0, 900.0, 8.0)],
)
def test_the_notice(left: float, life: float, notice: float) -> None:
    """The notice is 30 s, or a third of the whole life if that is less; of a stream that begins later, of the rest."""
    ends, reason = streams.end_of(_holding(left, life))
    assert reason == Closing.REASON_AUTH_EXPIRING
    assert abs(ends + notice - time.monotonic() - left) < 1


def test_credentials_that_last_longer() -> None:
    """A stream whose credentials outlast it ends by its age."""
    for left in (None, 7200.0):
        assert streams.end_of(_holding(left, left))[1] == Closing.REASON_MAX_AGE


@pytest.fixture
async def short(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A client of a server whose access tokens last three seconds."""
    async with serving(settings, conninfo, access_token_seconds=3) as (_, front):
        yield front


async def test_the_client_outlives_its_tokens(short: Front) -> None:
    """A watch of the Python client goes on over several tokens, and every change is told once."""
    doctor = await short.doctor()
    email = "desk@example.com"
    made = auth_pb2.User(email=email, name="Ana", roles=[policy_pb2.ROLE_STAFF], clinic_ids=[doctor.clinic_id])
    created = await access(short).CreateUser(access_pb2.CreateUserRequest(user=made), metadata=ADMIN)
    login = auth_pb2.LoginRequest(email=email, password=created.one_time_password)
    token = (await auth(short).Login(login)).session.access_token
    new = auth_pb2.ChangePasswordRequest(old_password=created.one_time_password, new_password=PASSWORD)
    await auth(short).ChangePassword(new, metadata=(("authorization", f"Bearer {token}"),))
    streams = 0

    def on_connection(live: bool) -> None:
        nonlocal streams
        streams += live

    async with FrontdeskClient(f"127.0.0.1:{short.port}", login=Login(email, PASSWORD)) as client:
        updates = client.watch_updates(doctor.id, on_connection=on_connection)
        async with aclosing(updates), asyncio.timeout(2 * SOON):
            known = (await anext(updates)).queue.revision
            while streams < 4:
                last = await change(short, doctor.id)
                while known < last:
                    update = await anext(updates)
                    assert not update.fresh
                    assert update.previous_revision == known
                    known = update.queue.revision


async def test_watchers_of_one_caller(front: Front, conninfo: str, settings: Settings) -> None:
    """An identity may have so many streams and no more, until one ends; others and anonymous callers may go on."""
    doctor = await front.doctor()
    key, other = [bearing((await create_key(front, "STAFF")).key) for _ in range(2)]
    async with serving(settings, conninfo, max_watchers_per_caller=2) as (_, narrow):
        streams = [watch(narrow, doctor.id, key) for _ in range(2)]
        for stream in streams:
            await read(stream)
        error = await refusal(read(watch(narrow, doctor.id, key)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(error)["ErrorInfo"].reason == "TOO_MANY_WATCHERS"
        held = [watch(narrow, doctor.id, by) for by in (other, other, (), (), ())]
        for stream in held:
            await read(stream)
        streams[0].cancel()

        async def has_room() -> bool:
            return await outcome(read(watch(narrow, doctor.id, key))) == "OK"

        await until_true(has_room)
