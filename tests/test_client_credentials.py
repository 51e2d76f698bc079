"""The credentials of the clients and commands: API keys, and logins that go on by themselves."""

import asyncio
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing, closing
from typing import Any

import grpc
import psycopg
import pytest

from clinic.frontdesk.v1 import (
    access_pb2,
    appointment_pb2,
    auth_pb2,
    clinic_pb2,
    doctor_pb2,
    patient_pb2,
    policy_pb2,
    queue_pb2,
)
from frontdesk.client import FrontdeskClient, FrontdeskError, Login, SyncFrontdeskClient
from frontdesk.settings import Settings
from tests.clinic import Front
from tests.hostile.wire import serving
from tests.identities import ADMIN, ADMIN_KEY, PASSWORD, access, create_key
from tests.waiting import SOON

EMAIL = "tests@example.com"
"""Of the administrator that every test's database has."""
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}
ASK = clinic_pb2.ListClinicsRequest()


@pytest.fixture
async def locked(settings: Settings, conninfo: str) -> AsyncIterator[Front]:
    """A service whose calls need credentials."""
    async with serving(settings, conninfo, access="required") as (_, front):
        yield front


def target(front: Front) -> str:
    return f"127.0.0.1:{front.port}"


async def doctor_of(front: Front) -> str:
    """A new doctor."""
    doctor = doctor_pb2.Doctor(code="DR-KEY", display_name="D", max_patients_per_day=5)
    answer = await front.doctors.CreateDoctor(doctor_pb2.CreateDoctorRequest(doctor=doctor), metadata=ADMIN)
    return str(answer.doctor.id)


async def change_rights(front: Front, *roles: str) -> None:
    """Give the administrator of all tests these roles, so that present access tokens are refused as expired."""
    user = (await access(front).ListUsers(access_pb2.ListUsersRequest(email=EMAIL), metadata=ADMIN)).users[0]
    request = access_pb2.SetUserRolesRequest(user_id=user.id, roles=[policy_pb2.Role.Value(f"ROLE_{r}") for r in roles])
    await access(front).SetUserRoles(request, metadata=ADMIN)


def sessions(front: Front) -> Counter[str]:
    """How many sessions began, and how many refresh tokens were given."""
    with psycopg.connect(front.conninfo) as connection:
        row = connection.execute(
            "select (select count(*) from session), (select count(*) from refresh_token)"
        ).fetchone()
    assert row is not None
    return Counter(sessions=row[0], tokens=row[1])


async def test_api_keys(locked: Front) -> None:
    """Both clients send the API key with every call and stream, unless a call brings credentials of its own."""
    doctor_id = await doctor_of(locked)
    async with FrontdeskClient(target(locked), api_key=ADMIN_KEY) as desk:
        assert (await desk.clinics.ListClinics(ASK)).clinics
        async with aclosing(desk.watch_queue(doctor_id)) as queues:
            assert (await anext(queues)).doctor_id == doctor_id
        with pytest.raises(FrontdeskError) as refused:
            await desk.clinics.ListClinics(ASK, metadata=(("x-api-key", f"{ADMIN_KEY[:-1]}_"),))
        assert refused.value.reason == "CREDENTIALS_INVALID"
    async with FrontdeskClient(target(locked)) as desk:
        with pytest.raises(FrontdeskError) as refused:
            await desk.clinics.ListClinics(ASK)
        assert refused.value.reason == "CREDENTIALS_REQUIRED"

    def blocking() -> None:
        with SyncFrontdeskClient(target(locked), api_key=ADMIN_KEY) as desk:
            assert desk.clinics.ListClinics(ASK).clinics
            with closing(desk.watch_queue(doctor_id)) as queues:
                assert next(queues).doctor_id == doctor_id

    await asyncio.to_thread(blocking)


@pytest.mark.parametrize("client", [FrontdeskClient, SyncFrontdeskClient])
async def test_unusable_credentials(client: Any) -> None:
    """What cannot be credentials is refused at once, and not quoted."""
    for wrong in ("", "with blank", "line\nbreak", "é", "x" * 201):
        with pytest.raises(ValueError, match="api_key does not look like an API key") as refused:
            client("127.0.0.1:1", api_key=wrong)
        assert not wrong or wrong not in str(refused.value)
    with pytest.raises(ValueError, match="not both"):
        client("127.0.0.1:1", api_key=ADMIN_KEY, login=Login(EMAIL, PASSWORD))
    for email, password in (("", ""), (EMAIL, ""), ("", PASSWORD)):
        with pytest.raises(ValueError, match="a login needs"):
            Login(email, password)


async def test_a_login(locked: Front) -> None:
    """A client logs in before its first call, once for all calls that wait, and refreshes when it is time."""
    before = sessions(locked)
    stored: list[str] = []
    login = Login(EMAIL, PASSWORD, on_refresh=stored.append)
    async with FrontdeskClient(target(locked), login=login) as desk:
        await asyncio.gather(*(desk.clinics.ListClinics(ASK) for _ in range(20)))
        assert sessions(locked) - before == Counter(sessions=1, tokens=1)
        login.expire()
        await asyncio.gather(*(desk.clinics.ListClinics(ASK) for _ in range(20)))
        assert sessions(locked) - before == Counter(sessions=1, tokens=2)
        assert (await desk.auth.GetProfile(auth_pb2.GetProfileRequest())).user.email == EMAIL
    assert len(set(stored)) == 2
    async with FrontdeskClient(target(locked), login=Login(refresh_token=stored[-1])) as desk:
        assert (await desk.clinics.ListClinics(ASK)).clinics
    assert sessions(locked) - before == Counter(sessions=1, tokens=3)


async def test_a_login_of_threads(locked: Front) -> None:
    """A synchronous client's threads share one login."""
    login = Login(EMAIL, PASSWORD)
    tokens: set[str] = set()

    def call(desk: SyncFrontdeskClient) -> None:
        assert desk.clinics.ListClinics(ASK).clinics
        assert desk.clinics.ListClinics.future(ASK).result().clinics
        tokens.add(login.access_token)

    def blocking() -> None:
        with SyncFrontdeskClient(target(locked), login=login) as desk:
            threads = [threading.Thread(target=call, args=(desk,)) for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(tokens) == 1
            login.expire()
            call(desk)
            assert len(tokens) == 2

    await asyncio.to_thread(blocking)


async def test_rights_that_change(locked: Front) -> None:
    """When the user's rights change, a call is repeated with a fresh token, and its change is made once."""
    async with FrontdeskClient(target(locked), login=Login(EMAIL, PASSWORD)) as desk:
        await desk.clinics.ListClinics(ASK)
        await change_rights(locked, "ADMIN", "STAFF")
        async with asyncio.timeout(SOON):
            first = desk._renewal.login.access_token  # type: ignore[union-attr]
            while desk._renewal.login.access_token == first:  # type: ignore[union-attr]
                clinic = clinic_pb2.Clinic(name="Again", time_zone="UTC")
                await desk.clinics.CreateClinic(
                    clinic_pb2.CreateClinicRequest(clinic=clinic, idempotency_key="one-clinic")
                )
                await asyncio.sleep(0.05)
        names = [clinic.name for clinic in (await desk.clinics.ListClinics(ASK)).clinics]
        assert names.count("Again") == 1


async def test_a_wrong_password(locked: Front) -> None:
    """The refusal of a login is that of the call that needed it, and ends a watch."""
    async with FrontdeskClient(target(locked), login=Login(EMAIL, "wrong password")) as desk:
        for wanted in ("BAD_LOGIN", "BAD_LOGIN"):
            with pytest.raises(FrontdeskError) as refused:
                await desk.clinics.ListClinics(ASK)
            assert refused.value.reason == wanted
        with pytest.raises(FrontdeskError) as refused:
            async with aclosing(desk.watch_queue("01900000-0000-7000-8000-00000000ffff")) as queues:
                await anext(queues)
        assert refused.value.reason == "BAD_LOGIN"


async def test_a_session_that_is_over(locked: Front) -> None:
    """When the session was ended elsewhere, the password begins another one; without a password the call is refused."""
    tokens: list[str] = []
    login = Login(EMAIL, PASSWORD, on_refresh=tokens.append)
    async with FrontdeskClient(target(locked), login=login) as desk:
        await desk.clinics.ListClinics(ASK)
        await desk.auth.Logout(auth_pb2.LogoutRequest(refresh_token=tokens[-1]))
        login.expire()
        assert (await desk.clinics.ListClinics(ASK)).clinics
        await desk.auth.Logout(auth_pb2.LogoutRequest(refresh_token=tokens[-1]))
    async with FrontdeskClient(target(locked), login=Login(refresh_token=tokens[-1])) as desk:
        with pytest.raises(FrontdeskError) as refused:
            await desk.clinics.ListClinics(ASK)
        assert refused.value.code is grpc.StatusCode.UNAUTHENTICATED


def frontdesk(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "frontdesk.cli", *arguments],
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


async def test_a_screen_in_the_waiting_room(locked: Front) -> None:
    """With a key of the role BOARD, `frontdesk watch --board` shows tickets and no names, and without it nothing."""
    doctor_id = await doctor_of(locked)
    key = (await create_key(locked, "BOARD")).key
    async with FrontdeskClient(target(locked), api_key=ADMIN_KEY) as desk:
        person = patient_pb2.Patient(given_name="Zyxw", family_name="Vuts", phone="+5511955501234")
        patient = (await desk.patients.RegisterPatient(patient_pb2.RegisterPatientRequest(patient=person))).patient
        today = (await desk.queues.GetQueue(queue_pb2.GetQueueRequest(doctor_id=doctor_id))).queue.date
        day = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=today)
        booking = appointment_pb2.BookAppointmentRequest(patient_id=patient.id, doctor_day=day)
        booked = (await desk.appointments.BookAppointment(booking)).appointment
        await desk.queues.CheckIn(queue_pb2.CheckInRequest(appointment_id=booked.id))
    command = [sys.executable, "-m", "frontdesk.cli", "watch", "--target", target(locked), "--doctor", "DR-KEY"]
    watch = await asyncio.create_subprocess_exec(
        *command, "--board", env={**CLEAN, "FRONTDESK_API_KEY": key}, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert watch.stdout is not None
        async with asyncio.timeout(60):
            said = (await watch.stdout.readline()).decode()
    finally:
        watch.kill()
        await watch.wait()
    assert said.endswith("waiting: 1\n")
    refused = await asyncio.to_thread(
        frontdesk, "watch", "--target", target(locked), "--doctor", "DR-KEY", FRONTDESK_API_KEY=key
    )
    assert refused.returncode == 1
    assert "ROLE_REQUIRED" in refused.stderr


async def test_the_commands(locked: Front) -> None:
    """demo, watch and conformance take an API key as an option or from the environment, and say if it is missing."""
    at = ("--target", target(locked))
    refused = await asyncio.to_thread(frontdesk, "demo", *at)
    assert refused.returncode == 1
    assert "CREDENTIALS_REQUIRED" in refused.stderr
    done = await asyncio.to_thread(frontdesk, "demo", *at, "--api-key", ADMIN_KEY)
    assert done.returncode == 0, done.stderr
    only = ("--only", "starts-empty")
    done = await asyncio.to_thread(frontdesk, "conformance", *at, *only, FRONTDESK_API_KEY=ADMIN_KEY)
    assert done.returncode == 0, done.stderr
    done = await asyncio.to_thread(frontdesk, "conformance", *at, *only)
    assert done.returncode == 1
    for wrong in ("fdk_no key", "fdk_\x7f"):
        for given in ({"FRONTDESK_API_KEY": wrong}, {}):
            argument = () if given else ("--api-key", wrong)
            refused = await asyncio.to_thread(frontdesk, "watch", "--doctor", "D", *at, *argument, **given)
            assert refused.returncode == 2
            assert "does not look like an API key" in refused.stderr
            assert "fdk_" not in refused.stderr
    refused = await asyncio.to_thread(frontdesk, "watch", "--doctor", "D", ADMIN_KEY)
    assert "fdk_" not in refused.stderr
    refused = await asyncio.to_thread(frontdesk, "serve", "--demo", FRONTDESK_ACCESS="required")
    assert (refused.returncode, "FRONTDESK_API_KEY" in refused.stderr) == (2, True)
