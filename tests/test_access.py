"""API keys: who gets in with them, until when, and how they are managed."""

import asyncio
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import access_pb2, appointment_pb2, auth_pb2, clinic_pb2, doctor_pb2, patient_pb2, policy_pb2
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, reason_of, refusal, tomorrow
from tests.hostile.wire import serving
from tests.identities import ADMIN, ADMIN_KEY, Metadata, access, bearing, create_key, user, user_of
from tests.waiting import SOON, early_in_a_minute, until

UNKNOWN = "01900000-0000-7000-8000-00000000ffff"


@pytest.fixture
async def guarded(conninfo: str, settings: Settings) -> AsyncIterator[Front]:
    """A client of a server whose calls need credentials."""
    async with serving(settings, conninfo, access="required") as (_, front):
        yield front


async def clinics(front: Front, *metadata: tuple[str, str]) -> str:
    """The outcome of a call that every identity may make."""
    return await outcome(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=metadata))


async def comes_to(front: Front, key: str, wanted: str) -> None:
    """Repeat a call with the key, which is accepted until it has this outcome."""
    async with asyncio.timeout(SOON):
        while (found := await clinics(front, *bearing(key))) in ("OK", "DATABASE_UNAVAILABLE"):  # noqa: ASYNC110 - another process must look
            await asyncio.sleep(0.05)
    assert found == wanted


async def revoke(front: Front, api_key_id: str, by: Metadata = ADMIN) -> access_pb2.ApiKey:
    """Revoke a key."""
    request = access_pb2.RevokeApiKeyRequest(api_key_id=api_key_id)
    answer: access_pb2.RevokeApiKeyResponse = await access(front).RevokeApiKey(request, metadata=by)
    return answer.api_key


async def listed(front: Front, by: Metadata = ADMIN, **filters: bool) -> set[str]:
    """The ids of the keys that a caller sees, over all pages."""
    found: set[str] = set()
    token = ""
    while True:
        request = access_pb2.ListApiKeysRequest(page_size=2, page_token=token, **filters)
        answer = await access(front).ListApiKeys(request, metadata=by)
        assert not found & {key.id for key in answer.api_keys}
        found |= {key.id for key in answer.api_keys}
        token = answer.next_page_token
        if not token:
            return found


def after(seconds: float) -> Timestamp:
    """The instant that is so many seconds from now."""
    instant = Timestamp()
    instant.FromDatetime(datetime.now(UTC) + timedelta(seconds=seconds))
    return instant


async def test_required(guarded: Front) -> None:
    """If credentials are required, a call without them is refused, whatever name it gives itself."""
    assert await clinics(guarded) == "CREDENTIALS_REQUIRED"
    assert await clinics(guarded, ("frontdesk-caller", "kiosk")) == "CREDENTIALS_REQUIRED"
    error = await refusal(guarded.clinics.ListClinics(clinic_pb2.ListClinicsRequest()))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert await clinics(guarded, ("x-api-key", ADMIN_KEY)) == "OK"
    assert await clinics(guarded, ("authorization", f"Bearer {ADMIN_KEY}")) == "OK"
    assert await clinics(guarded, ("authorization", f"bearer {ADMIN_KEY}")) == "OK"


async def test_health_needs_no_credentials(guarded: Front, front: Front) -> None:
    """Health answers everybody, and says in its trailers whether calls need credentials."""
    for server, mode in ((guarded, "required"), (front, "open")):
        call = health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
        assert (await call).status == health_pb2.HealthCheckResponse.SERVING
        assert dict(await call.trailing_metadata())["frontdesk-access"] == mode


async def test_streams_need_credentials(guarded: Front) -> None:
    """A watch without credentials is refused too."""
    from clinic.frontdesk.v1 import queue_pb2

    call = guarded.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=UNKNOWN))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call.read()
    assert reason_of(error.value) == "CREDENTIALS_REQUIRED"


@pytest.mark.parametrize(
    "metadata",
    [
        (("x-api-key", ADMIN_KEY), ("authorization", f"Bearer {ADMIN_KEY}")),
        (("x-api-key", ADMIN_KEY), ("x-api-key", ADMIN_KEY)),
        (("authorization", f"Bearer {ADMIN_KEY}"), ("authorization", f"Bearer {ADMIN_KEY}")),
        (("authorization", ADMIN_KEY),),
        (("authorization", f"Basic {ADMIN_KEY}"),),
        (("authorization", f"Bearer  {ADMIN_KEY}"),),
        (("authorization", "Bearer"),),
        (("authorization", ""),),
        (("x-api-key", ""),),
        (("x-api-key", ADMIN_KEY + " "),),
        (("x-api-key", ADMIN_KEY + "A"),),
        (("x-api-key", ADMIN_KEY.upper()),),
        (("x-api-key", ADMIN_KEY[:-1]),),
        (("x-api-key", f"fdk_{UNKNOWN}_{'A' * 43}"),),
        (("x-api-key", "fdk_" + "x" * 8_000),),
    ],
)
async def test_unusable_credentials(front: Front, guarded: Front, metadata: Metadata) -> None:
    """Two credentials, or one that is none, are refused in both modes: a call with credentials is judged by them."""
    for server in (front, guarded):
        assert await clinics(server, *metadata) == "CREDENTIALS_INVALID"


async def test_credentials_of_a_megabyte(front: Front) -> None:
    """Credentials of a megabyte never reach the service's code: gRPC refuses such metadata."""
    error = await refusal(
        front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=bearing("fdk_" * 250_000))
    )
    assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL)
    assert await clinics(front) == "OK"


async def test_one_character_changed(front: Front) -> None:
    """A key with any one character changed is refused, also where the changed one would encode the same bits."""
    made = await create_key(front, "BOARD")
    assert await clinics(front, *bearing(made.key)) == "OK"
    assert made.key == f"fdk_{made.api_key.id}_{made.key[-43:]}"
    changed = []
    for place, character in enumerate(made.key):
        for other in {character.swapcase(), chr(ord(character) ^ 1), "A", "0"} - {character}:
            if other.isascii() and other.isprintable():
                changed.append(made.key[:place] + other + made.key[place + 1 :])
    outcomes = await asyncio.gather(*(clinics(front, *bearing(key)) for key in changed))
    assert set(outcomes) == {"CREDENTIALS_INVALID"}


async def test_roles_of_a_key(front: Front) -> None:
    """A key may do what its roles may: a board may look at clinics and book nothing, in the open mode too."""
    board = bearing((await create_key(front, "BOARD")).key)
    desk = bearing((await create_key(front, "STAFF", "BOARD")).key)
    assert await clinics(front, *board) == "OK"
    doctor, patient = await front.doctor(), await front.patient()
    booking = appointment_pb2.BookAppointmentRequest(
        patient_id=patient.id, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id)
    )
    booking.doctor_day.date.year, booking.doctor_day.date.month, booking.doctor_day.date.day = tomorrow().timetuple()[
        :3
    ]
    error = await refusal(front.appointments.BookAppointment(booking, metadata=board))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")
    assert dict(details(error)["ErrorInfo"].metadata) == {"method": "BookAppointment"}
    assert await outcome(front.appointments.BookAppointment(booking, metadata=desk)) == "OK"


async def test_expiry(front: Front) -> None:
    """A key is refused from its expiry on, also where it is known already."""
    made = await create_key(front, "BOARD", expire_time=after(1.5))
    assert await clinics(front, *bearing(made.key)) == "OK"
    await comes_to(front, made.key, "CREDENTIALS_EXPIRED")
    assert datetime.now(UTC) >= made.api_key.expire_time.ToDatetime(UTC)
    assert await clinics(front, *bearing(made.key)) == "CREDENTIALS_EXPIRED"
    assert await outcome(create_key(front, "BOARD", expire_time=after(-1))) == "INVALID_FIELD"


async def test_revocation_reaches_every_worker(front: Front, conninfo: str, settings: Settings) -> None:
    """A key that one worker revokes is soon refused by another that knew it as valid; the other keys go on."""
    made, other = [await create_key(front, "BOARD") for _ in range(2)]
    async with serving(settings, conninfo) as (_, elsewhere):
        for key in (made, other):
            assert await clinics(elsewhere, *bearing(key.key)) == "OK"
        revoked = await revoke(front, made.api_key.id)
        assert revoked.HasField("revoke_time")
        assert await revoke(front, made.api_key.id) == revoked
        await comes_to(elsewhere, made.key, "CREDENTIALS_INVALID")
        assert await clinics(elsewhere, *bearing(other.key)) == "OK"
    assert made.api_key.id in await listed(front)
    assert made.api_key.id not in await listed(front, active_only=True)
    assert other.api_key.id in await listed(front, active_only=True)


async def test_known_keys_ask_nobody(front: Front) -> None:
    """A call with a key that the worker knows needs no look at the stored keys."""
    key = (await create_key(front, "SERVICE")).key
    assert await clinics(front, *bearing(key)) == "OK"
    with psycopg.connect(front.conninfo) as holder:
        holder.execute("lock table api_key in access exclusive mode")
        for _ in range(20):
            assert await clinics(front, *bearing(key)) == "OK"


async def test_looking_survives_an_outage(front: Front, conninfo: str, settings: Settings) -> None:
    """After the database has cut every connection, a worker still learns of revocations."""
    made = await create_key(front, "BOARD")
    assert await clinics(front, *bearing(made.key)) == "OK"
    front.sql(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and pid <> pg_backend_pid()"
    )
    async with serving(settings, conninfo) as (_, elsewhere):
        await revoke(elsewhere, made.api_key.id)
    await until(lambda: front.sql("select count(*) from access_change") != [(0,)])
    await comes_to(front, made.key, "CREDENTIALS_INVALID")


async def test_administrators_only(front: Front) -> None:
    """Keys are managed with an administrator's credentials alone, in the open mode too."""
    desk = bearing((await create_key(front, "STAFF", "SERVICE")).key)
    assert await outcome(create_key(front, "BOARD", by=())) == "CREDENTIALS_REQUIRED"
    assert await outcome(create_key(front, "BOARD", by=desk)) == "ROLE_REQUIRED"
    assert await outcome(access(front).ListApiKeys(access_pb2.ListApiKeysRequest())) == "CREDENTIALS_REQUIRED"
    request = access_pb2.RevokeApiKeyRequest(api_key_id=UNKNOWN)
    assert await outcome(access(front).RevokeApiKey(request, metadata=desk)) == "ROLE_REQUIRED"
    assert await outcome(access(front).RevokeApiKey(request, metadata=ADMIN)) == "API_KEY_NOT_FOUND"


async def test_an_administrator_of_some_clinics(front: Front) -> None:
    """An administrator of some clinics creates, sees and revokes only keys whose clinics are all his own."""
    mine, yours = [(await front.clinic()).id for _ in range(2)]
    here = bearing((await create_key(front, "ADMIN", clinic_ids=[mine])).key)
    elsewhere, everywhere, both = [
        (await create_key(front, "STAFF", clinic_ids=ids)).api_key.id for ids in ([yours], [], [mine, yours])
    ]
    own = (await create_key(front, "STAFF", by=here, clinic_ids=[mine])).api_key.id
    for ids in ([yours], [], [mine, yours]):
        assert await outcome(create_key(front, "STAFF", by=here, clinic_ids=ids)) == "CLINIC_NOT_YOURS"
    seen = await listed(front, here)
    assert own in seen
    assert not seen & {elsewhere, everywhere, both}
    assert {own, elsewhere, everywhere, both} <= await listed(front)
    for other in (elsewhere, everywhere, both):
        request = access_pb2.RevokeApiKeyRequest(api_key_id=other)
        assert await outcome(access(front).RevokeApiKey(request, metadata=here)) == "CLINIC_NOT_YOURS"
    assert (await revoke(front, own, by=here)).id == own


async def test_another_clinic_is_refused_before_what_is_taken(front: Front) -> None:
    """Whoever writes for another clinic is told so, and not that a code, a licence or an e-mail there is taken."""
    here, there = await front.doctor(license_number="CRM 1"), await front.doctor(license_number="CRM 2")
    by = bearing((await create_key(front, "ADMIN", clinic_ids=[here.clinic_id])).key)
    wanted = [
        doctor_pb2.Doctor(code=there.code, display_name="Dr X", clinic_id=there.clinic_id),
        doctor_pb2.Doctor(code="D-X", license_number="CRM 2", display_name="Dr X", clinic_id=there.clinic_id),
    ]
    for doctor in wanted:
        create = doctor_pb2.CreateDoctorRequest(doctor=doctor)
        error = await refusal(front.doctors.CreateDoctor(create, metadata=by))
        assert reason_of(error) == "CLINIC_NOT_YOURS"
        assert dict(details(error)["ErrorInfo"].metadata) == {"clinic_id": there.clinic_id}
        moved = doctor_pb2.UpdateDoctorRequest(
            doctor=doctor_pb2.Doctor(id=here.id, code=there.code, clinic_id=there.clinic_id)
        )
        assert await outcome(front.doctors.UpdateDoctor(moved, metadata=by)) == "CLINIC_NOT_YOURS"
    made = auth_pb2.User(email="tests@example.com", roles=[policy_pb2.ROLE_STAFF], clinic_ids=[there.clinic_id])
    for metadata, told in ((by, "CLINIC_NOT_YOURS"), (ADMIN, "EMAIL_TAKEN")):
        request = access_pb2.CreateUserRequest(user=made)
        assert await outcome(access(front).CreateUser(request, metadata=metadata)) == told


async def test_what_is_of_every_clinic_is_refused_before_the_message_is_read(front: Front) -> None:
    """An administrator of some clinics is told that it takes another one, whatever the message is."""
    by = bearing((await create_key(front, "ADMIN", clinic_ids=[(await front.clinic()).id])).key)
    for method in ("ClinicService/CreateClinic", "AuditService/ListAuditEvents"):
        for metadata, told in ((by, "ROLE_REQUIRED"), (ADMIN, "INVALID_FIELD")):
            call: Any = front.channel.unary_unary(f"/clinic.frontdesk.v1.{method}")
            error = await refusal(call(b"\xff", metadata=metadata))
            assert reason_of(error) == told
            if told == "ROLE_REQUIRED":
                assert dict(details(error)["ErrorInfo"].metadata) == {"method": method.partition("/")[2]}


async def test_users_of_another_clinic(front: Front) -> None:
    """An administrator of some clinics reads their users and patients; others' are refused, unknown ones not found."""
    mine, yours = [(await front.clinic()).id for _ in range(2)]
    by = bearing((await create_key(front, "ADMIN", clinic_ids=[mine])).key)
    for roles, clinic_ids, told in (
        (["STAFF"], [mine], "OK"),
        (["PATIENT"], [], "OK"),
        (["STAFF"], [yours], "CLINIC_NOT_YOURS"),
        (["STAFF"], [mine, yours], "CLINIC_NOT_YOURS"),
        (["STAFF"], [], "CLINIC_NOT_YOURS"),
        (["PATIENT", "STAFF"], [yours], "CLINIC_NOT_YOURS"),
    ):
        user_id, _ = user_of(user(front, *roles, clinic_ids=clinic_ids))
        request = access_pb2.GetUserRequest(user_id=user_id)
        assert await outcome(access(front).GetUser(request, metadata=by)) == told
        assert await outcome(access(front).GetUser(request, metadata=ADMIN)) == "OK"
    unknown = access_pb2.GetUserRequest(user_id=UNKNOWN)
    assert await outcome(access(front).GetUser(unknown, metadata=by)) == "USER_NOT_FOUND"


async def test_clinics_of_a_key_exist(front: Front) -> None:
    """A key for a clinic that does not exist is refused."""
    assert await outcome(create_key(front, "STAFF", clinic_ids=[UNKNOWN])) == "CLINIC_NOT_FOUND"


async def test_secrets_are_kept_nowhere(front: Front, capfd: pytest.CaptureFixture[str]) -> None:
    """The secret of a key is in no row and no line of the log, and a replay does not answer it again."""
    wanted = access_pb2.ApiKey(name="a program", roles=[policy_pb2.ROLE_SERVICE])
    request = access_pb2.CreateApiKeyRequest(api_key=wanted, idempotency_key="k")
    first = await access(front).CreateApiKey(request, metadata=ADMIN)
    secret = first.key[-43:]
    assert await clinics(front, *bearing(first.key)) == "OK"
    again = await access(front).CreateApiKey(request, metadata=ADMIN)
    assert (again.replayed, again.key, again.api_key) == (True, "", first.api_key)
    error = await refusal(front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=bearing(first.key[:-1])))
    assert secret[:20] not in repr(error)
    tables = front.sql("select tablename from pg_tables where schemaname = 'public'")
    for (table,) in tables:
        for (row,) in front.sql(f'select t::text from "{table}" t'):
            assert secret not in row, table
    said = capfd.readouterr()
    assert secret[:20] not in said.out + said.err


async def test_keys_of_idempotency_belong_to_an_identity(front: Front) -> None:
    """The same idempotency key of another identity is another key, also where both give the same caller's name."""
    first, second = [bearing((await create_key(front, "STAFF")).key) for _ in range(2)]
    request = patient_pb2.RegisterPatientRequest(
        patient=patient_pb2.Patient(given_name="Rosa", phone="+5511987654321"), idempotency_key="k"
    )
    label = ("frontdesk-caller", "kiosk")
    for identity in (first, second):
        assert not (await front.patients.RegisterPatient(request, metadata=(*identity, label))).replayed
    assert (await front.patients.RegisterPatient(request, metadata=first)).replayed


async def run(*arguments: str) -> tuple[int, str]:
    """The exit status and the output of a command."""
    command = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "frontdesk.cli", *arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    said, _ = await command.communicate()
    assert command.returncode is not None
    return command.returncode, said.decode()


async def test_keys_at_the_command_line(guarded: Front) -> None:
    """`frontdesk keys` creates, lists and revokes keys in the database of a running service."""
    at = ("--database-url", guarded.conninfo)
    create = ("keys", "create", "--name", "kiosk", "--role", "SERVICE", *at)
    status, said = await run(*create)
    key = said.strip()
    assert status == 0
    assert re.fullmatch("fdk_[-0-9a-f]{36}_[-_0-9A-Za-z]{43}", key)
    assert await clinics(guarded, *bearing(key)) == "OK"
    status, said = await run("keys", "list", *at)
    assert status == 0
    assert key[4:40] in said
    assert key[-43:] not in said
    assert (await run("keys", "revoke", key[4:40], *at))[0] == 0
    await comes_to(guarded, key, "CREDENTIALS_INVALID")
    assert (await run("keys", "revoke", UNKNOWN, *at))[0] == 1
    assert (await run(*create, "--role", "PATIENT"))[0] == 2


async def test_keys_of_the_embedded_database(tmp_path: Path) -> None:
    """`frontdesk keys` works with a data directory, whether a service runs on it or not."""
    at = ("--data-dir", str(tmp_path / "data"))
    status, key = await run("keys", "create", "--name", "kiosk", "--role", "BOARD", *at)
    assert status == 0
    service = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "frontdesk.cli", "serve", "--listen", "127.0.0.1:0", *at),
        env={**os.environ, "FRONTDESK_ACCESS": "required"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert service.stdout is not None
    line = (await service.stdout.readline()).decode()
    assert line.startswith("frontdesk (access: required) serves on 127.0.0.1:")
    port = int(line.rpartition(":")[2])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        front = Front(channel, "", port)
        assert await clinics(front) == "CREDENTIALS_REQUIRED"
        assert await clinics(front, *bearing(key.strip())) == "OK"
        assert (await run("keys", "revoke", key[4:40], *at))[0] == 0
        await comes_to(front, key.strip(), "CREDENTIALS_INVALID")
    service.terminate()
    await service.wait()
    assert key[4:40] in (await run("keys", "list", *at))[1]


async def test_calls_of_a_key_are_limited(front: Front, conninfo: str, settings: Settings) -> None:
    """Two workers together admit as many calls of a key a minute as it may make, and say when to retry the others."""
    created = await create_key(front, "STAFF", requests_per_minute=20)
    key = bearing(created.key)
    await early_in_a_minute()
    async with serving(settings, conninfo) as (_, other):
        both = (front, other)
        outcomes = await asyncio.gather(*(clinics(both[n % 2], *key) for n in range(60)))
        assert Counter(outcomes) == {"OK": 20, "RATE_LIMITED": 40}
        error = await refusal(other.clinics.ListClinics(clinic_pb2.ListClinicsRequest(), metadata=key))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        found = details(error)
        assert 0 < found["RetryInfo"].retry_delay.ToMilliseconds() <= 60_000
        assert found["QuotaFailure"].violations[0].subject == f"keys/{created.api_key.id}"
        pushback = dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]
        assert 0 < int(pushback) <= 60_000
        # The refusal comes before the role is judged, and other keys are not concerned.
        board = front.patients.ListPatients(patient_pb2.ListPatientsRequest(), metadata=key)
        assert await outcome(board) == "RATE_LIMITED"
        assert await clinics(front, *ADMIN) == "OK"
