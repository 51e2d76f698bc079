"""Case 46: nothing of a patient and no secret of a user gets out, whoever calls which method, and however that ends.

The methods and the texts in their requests come from the descriptors. So a new method is covered, or fails the test.
"""

import asyncio
import itertools
import re
import subprocess
import sys
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from buf.validate import validate_pb2
from clinic.frontdesk.v1 import access_pb2, audit_pb2, audit_pb2_grpc, auth_pb2, clinic_pb2, patient_pb2, policy_pb2
from tests.clinic import Front, details, outcome, reason_of, refusal
from tests.hostile.methods import (
    METHODS,
    STREAMS,
    VALID,
    Place,
    World,
    is_id,
    is_taken,
    is_text,
    path_of,
    places,
    register,
    world,
)
from tests.hostile.wire import database_of
from tests.identities import (
    ADMIN,
    Metadata,
    access,
    auth,
    bearing,
    carrying,
    claims,
    create_key,
    signed,
    user,
    user_token,
)
from tests.receivers import MailBox, body
from tests.servers import Service
from tests.test_auth import login, refresh
from tests.test_email_codes import CODE
from tests.test_metrics import text
from tests.test_second_factor import Owner
from tests.test_traces import Collector
from tests.waiting import until, until_true

WORD = "Zzyzxquux"
PHONE = "+5511987654329"
NUMBER = "ZQX-77-4711"
PASSWORD = "zzyzxquux horse staple"
CANARIES = (WORD, "987654329", NUMBER)
"""All texts of a patient or user have one of them, in whatever letter case."""

CALLER = (("frontdesk-caller", "kiosk-of-nobody"),)
"""What a caller calls himself. The log has it."""

_NO_PERSON = {"etag", "time_zone", "room", "paths", "clinic.frontdesk.v1.ApiKey.name"}
"""Fields whose text is nothing of a person, by their name or full name; nor is that of those with a pattern."""

_INSURED = {"clinic.frontdesk.v1.Insurance.country": "BR", "clinic.frontdesk.v1.Insurance.number": NUMBER}
"""Some countries have numbers of a form that looks like others in a log."""

_ACCESS = {
    *("CREDENTIALS_REQUIRED", "CREDENTIALS_INVALID", "CREDENTIALS_EXPIRED", "ROLE_REQUIRED", "CLINIC_NOT_YOURS"),
    *("PASSWORD_CHANGE_REQUIRED", "EMAIL_NOT_VERIFIED", "RATE_LIMITED"),
}

_numbers = itertools.count(1)


def canary_for(place: Place) -> str | None:
    """The text that goes into this place; None if nothing of a person stands there."""
    rules = place.field.GetOptions().Extensions[validate_pb2.field]
    said = rules.repeated.items.string if place.field.is_repeated else rules.string
    if place.field.full_name in _INSURED:
        return _INSURED[place.field.full_name]
    if is_id(place.field) or said.pattern or getattr(said, "in") or not is_taken(place):
        return None
    if _NO_PERSON & {place.field.name, place.field.full_name}:
        return None
    if place.field.name == "phone":
        return PHONE
    if said.email:
        return f"{WORD}.{next(_numbers)}@example.org"
    return PASSWORD if "password" in place.field.name else WORD


def filled(name: str, w: World, end: str = "") -> Message:
    """The method's valid request with a canary in every text, and `end` after each."""
    request = VALID[name](w)
    for place in places(name, is_text):
        canary = canary_for(place)
        if canary is not None:
            request = place.put(request, canary + end)
    return request


class Ears:
    """Hear what callers and operators are told."""

    def __init__(self) -> None:
        self._heard: list[tuple[str, str]] = []
        self._requests: dict[tuple[World, str], dict[str, Message]] = {}
        self.outcomes: dict[str, set[str]] = defaultdict(set)
        """Of the calls of each method."""
        self.secrets: set[str] = set()
        """What the service has told its users alone."""

    def hear(self, where: str, said: object) -> None:
        """Something that must have no canary and no secret."""
        self._heard.append((where, str(said).lower()))

    def faults(self) -> list[str]:
        """Where a canary or a secret was heard, and which one."""
        wanted = sorted({canary.lower() for canary in (*CANARIES, *self.secrets)})
        assert all(len(canary) > 7 for canary in wanted)
        pattern = re.compile("|".join(map(re.escape, wanted)))
        found = ((where, pattern.search(said)) for where, said in self._heard)
        return sorted({f"{where}: {match[0]}" for where, match in found if match})

    async def call(
        self, front: Front, name: str, request: Message, metadata: Metadata = (), timeout: float = 30
    ) -> None:
        """Call the method; of a stream, read its first message. What comes beside an answer is heard."""
        stream = name in STREAMS
        method: Any = (front.channel.unary_stream if stream else front.channel.unary_unary)(path_of(name))
        call = method(request.SerializeToString(), metadata=metadata, timeout=timeout)
        try:
            await (call.read() if stream else call)
        except grpc.aio.AioRpcError as error:
            # What gRPC itself says, such as that the time is over, has no reason.
            said = reason_of(error) if details(error) else error.code().name
            self.hear(name, (error.details(), error.initial_metadata(), error.trailing_metadata(), details(error)))
        else:
            said = "OK"
            if not stream:
                self.hear(name, (await call.initial_metadata(), await call.trailing_metadata()))
        call.cancel()
        self.outcomes[name].add(said)

    async def everything(
        self, front: Front, w: World, metadata: Metadata, *, end: str = "", timeout: float = 30
    ) -> None:
        """Call every method about this world."""
        requests = self._requests.get((w, end)) or {name: filled(name, w, end) for name in METHODS}
        self._requests[w, end] = requests
        calls = (self.call(front, name, request, metadata, timeout) for name, request in requests.items())
        await asyncio.gather(*calls)

    @property
    def reasons(self) -> set[str]:
        """How any call has ended."""
        return set().union(*self.outcomes.values())


NOBODYS = World(**{field.name: str(uuid.uuid4()) for field in fields(World)})


async def identities(ears: Ears, front: Front, here: World, elsewhere: World) -> Sequence[Metadata]:
    """The credentials of every kind of identity; `front` lets us create them."""

    async def key(*roles: str, **fields: Any) -> Metadata:
        made = await create_key(front, *roles, **fields)
        ears.secrets.add(made.key)
        return bearing(made.key)

    made = await key("SERVICE")
    found = [
        (),
        bearing(f"{made[0][1][:-1]}{WORD}"),
        carrying(WORD),
        (*made, *made),
        carrying(signed(claims(exp=int(time.time()) - 1))),
        made,
        await key("STAFF", clinic_ids=[elsewhere.clinic_id]),
        await key("BOARD"),
        await key("SERVICE", requests_per_minute=1),
        user(front, "ADMIN"),
        user(front, "STAFF", clinic_ids=[here.clinic_id]),
        user(front, "DOCTOR", doctor_id=here.doctor_id),
        user(front, "DOCTOR", doctor_id=elsewhere.doctor_id),
        user(front, "PATIENT", patient_id=here.patient_id),
        user(front, "PATIENT", patient_id=elsewhere.patient_id),
    ]
    wanted = auth_pb2.User(email=f"{WORD}.one@example.org", name=WORD, roles=[policy_pb2.ROLE_STAFF])
    created = await access(front).CreateUser(access_pb2.CreateUserRequest(user=wanted), metadata=ADMIN)
    unverified = await register(front, email=f"{WORD}.two@example.org", password=PASSWORD)
    front.sql("update user_account set email_verified = false where id = %s", unverified.user.id)
    for session in (await login(front, wanted.email, created.one_time_password), unverified.session):
        ears.secrets |= {session.access_token, session.refresh_token}
        found.append(carrying(session.access_token))
    ears.secrets |= {value.partition(" ")[2] or value for metadata in found for _, value in metadata}
    ears.secrets.add(created.one_time_password)
    return found


async def lives(ears: Ears, front: Front) -> None:
    """A user's whole life: registers, logs in with and without a second factor, refreshes, errs, logs out."""
    mail = f"{WORD}.life@example.org"
    person = patient_pb2.Patient(given_name=WORD, phone=PHONE, email=mail)
    made = await register(front, email=mail, password=PASSWORD, patient=person, idempotency_key="life")
    assert (await register(front, email=mail, password=PASSWORD, patient=person, idempotency_key="life")).replayed
    owner = Owner(front, made.session)
    session = await refresh(front, (await refresh(front, made.session.refresh_token)).refresh_token)
    other = await login(front, mail, PASSWORD)
    uri = (await owner.enroll()).otpauth_uri
    codes = (await owner.confirm(owner.code())).recovery_codes
    begun = await auth(front).Login(auth_pb2.LoginRequest(email=mail, password=PASSWORD))
    verify = auth_pb2.VerifySecondFactorRequest(challenge=begun.second_factor.challenge, code=codes[0])
    verified = (await auth(front).VerifySecondFactor(verify)).session
    ears.secrets |= {uri.partition("secret=")[2].partition("&")[0], begun.second_factor.challenge, *codes}
    for one in (made.session, session, other, verified):
        ears.secrets |= {one.access_token, one.refresh_token, one.access_token.rpartition(".")[2]}
    mine = carrying(verified.access_token)
    for name, request, metadata in (
        ("RefreshToken", auth_pb2.RefreshTokenRequest(refresh_token=made.session.refresh_token), ()),
        ("Logout", auth_pb2.LogoutRequest(refresh_token=other.refresh_token), ()),
        ("VerifySecondFactor", verify, ()),
        ("GetProfile", auth_pb2.GetProfileRequest(), mine),
        ("UpdateProfile", auth_pb2.UpdateProfileRequest(user=auth_pb2.User(address=WORD, phone=PHONE)), mine),
        ("RemoveSecondFactor", auth_pb2.RemoveSecondFactorRequest(password=PASSWORD, code=codes[0]), mine),
        ("RemoveSecondFactor", auth_pb2.RemoveSecondFactorRequest(password=PASSWORD, code=codes[1]), mine),
        ("ChangePassword", auth_pb2.ChangePasswordRequest(old_password=WORD, new_password=f"{PASSWORD} 2"), mine),
        (
            "ChangePassword",
            auth_pb2.ChangePasswordRequest(old_password=PASSWORD, new_password=f"{PASSWORD} 2"),
            mine,
        ),
        ("Logout", auth_pb2.LogoutRequest(refresh_token=verified.refresh_token, everywhere=True), ()),
        ("RegisterUser", auth_pb2.RegisterUserRequest(email=mail, password=PASSWORD, patient=person), ()),
        *[("Login", auth_pb2.LoginRequest(email=mail, password=f"{WORD} {n}"), ()) for n in range(6)],
    ):
        await ears.call(front, name, request, metadata)


async def a_day(front: Front, doctor_id: str) -> None:
    """A queue of today, of patients who have canaries in every text."""
    for n in range(2):
        person = await front.patient(
            given_name=f"{WORD} {n}", phone=PHONE, email=f"{WORD}@example.org", allergies=[WORD]
        )
        booked = await front.book(person.id, doctor_id, reason=WORD, notes=WORD)
        await front.check_in(booked.appointment.id)


def tables(front: Front) -> list[str]:
    """The service's tables but that of quotas, without which no call would get any further."""
    names = front.sql("select tablename from pg_tables where schemaname = 'public' and tablename <> 'rate_window'")
    return [f'"{name}"' for (name,) in names]


def spill(front: Front) -> None:
    """Bugs that put rows into the texts of exceptions, in every table."""
    front.sql(
        "create function spill() returns trigger language plpgsql as $$ begin"
        f" raise exception 'row % {WORD}', new using detail = '{PHONE}', hint = '{NUMBER}'; end $$"
    )
    for table in tables(front):
        front.sql(f"create trigger spill before insert or update on {table} for each row execute function spill()")
    # PostgreSQL's own text, from a check constraint that quotes the row.
    front.sql("alter table appointment add constraint no_notes check (notes = '') not valid")


def mend(front: Front) -> None:
    """Do without those bugs."""
    front.sql("drop function spill cascade")
    front.sql("alter table appointment drop constraint no_notes")


async def while_all_waits(ears: Ears, front: Front, here: World, who: Metadata) -> None:
    """Calls whose time is over, and calls that are cancelled, while the database makes them wait."""
    async with await psycopg.AsyncConnection.connect(front.conninfo) as other:
        # The caller's key can be judged anew, else all would wait for that together.
        locked = [table for table in tables(front) if table not in ('"api_key"', '"access_change"')]
        await other.execute(f"lock table {', '.join(locked)} in access exclusive mode".encode())
        await ears.everything(front, here, who, timeout=0.5)
        cancelled = [asyncio.create_task(ears.call(front, name, filled(name, here), who)) for name in METHODS]
        waiting = "select 1 from pg_locks where not granted"
        await until(lambda: len(front.sql(waiting)) > 3)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)


async def without_the_database(
    ears: Ears, front: Front, here: World, who: Metadata, admin: psycopg.Connection[Any]
) -> None:
    """Calls while the database is away, until it is back."""
    name = database_of(front)
    admin.execute(f"alter database {name} allow_connections false")
    admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,))
    await ears.everything(front, here, who)
    admin.execute(f"alter database {name} allow_connections true")

    async def works() -> bool:
        request = clinic_pb2.GetClinicRequest(clinic_id=here.clinic_id)
        return await outcome(front.clinics.GetClinic(request, metadata=who)) == "OK"

    await until_true(works)


async def with_wrong_code(ears: Ears, front: Front, here: World, who: Metadata) -> None:
    """Calls that fail for a reason that nobody has foreseen, when they write and when they look at the clock."""
    spill(front)
    await ears.everything(front, here, who)
    mend(front)
    ((clock,),) = front.sql("select pg_get_functiondef('moment'::regproc)")
    front.sql(
        "create or replace function moment() returns timestamptz language plpgsql volatile as $$ begin"
        f" raise exception '{WORD} {PHONE}' using detail = '{NUMBER}'; end $$"
    )
    await ears.everything(front, here, who)
    front.sql(clock)


async def operate(ears: Ears, service: Service) -> None:
    """Run the commands of operators; all they say is heard, but for the secrets that they are asked for."""

    async def run(*arguments: str) -> str:
        command = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "frontdesk.cli", *arguments),
            env=service.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await command.communicate()
        ears.hear(f"{arguments[:2]}, errors", err.decode())
        return out.decode()

    new = ("admin", "create", "--email", f"{WORD}.admin@example.org", "--name", WORD)
    ears.secrets.add((await run(*new)).strip())
    ears.secrets.add((await run("keys", "create", "--name", "kiosk", "--role", "STAFF")).strip())
    target = f"127.0.0.1:{service.port}"
    for arguments in (
        new,
        ("admin", "create", "--email", WORD),
        ("keys", "create", "--name", "kiosk", "--role", WORD, "--api-key", f"fdk_{WORD}"),
        ("keys", "list"),
        ("keys", "revoke", NOBODYS.api_key_id),
        ("audit", "head"),
        ("audit", "verify"),
        ("maintain",),
        ("health", "--target", target),
    ):
        ears.hear(str(arguments[:2]), await run(*arguments))


@asynccontextmanager
async def measured(
    mode: str, conninfo: str, directory: Path, monkeypatch: pytest.MonkeyPatch, box: MailBox
) -> AsyncIterator[tuple[Service, Collector]]:
    """A service that tells as much as it can, and those it tells it to."""
    collector = Collector()
    for name, value in {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "FRONTDESK_METRICS_LISTEN": "127.0.0.1:0",
        "FRONTDESK_SMTP_URL": f"smtp://127.0.0.1:{box.port}",
        "FRONTDESK_MAIL_FROM": "desk@clinic.test",
        "FRONTDESK_USER_REQUESTS_PER_MINUTE": "100000",
        "FRONTDESK_ADDRESS_REQUESTS_PER_MINUTE": "100000",
    }.items():
        monkeypatch.setenv(name, value)
    service = Service(directory / "log", conninfo, access=mode, traces="on", log_level="debug")
    try:
        yield service, collector
    finally:
        await asyncio.to_thread(service.stop)
        collector.close()


@pytest.mark.parametrize("mode", ["open", "required"])
async def test_no_canary_gets_out(
    mode: str, front: Front, postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a patient, and no secret, is in a status, trailer, log, metric, trace, audit, or command's output."""
    ears = Ears()
    here, elsewhere = await world(front), await world(front)
    await a_day(front, here.doctor_id)
    everybody = [(), CALLER, user_token()] if mode == "open" else await identities(ears, front, here, elsewhere)
    with psycopg.connect(postgres, autocommit=True) as admin:
        async with (
            MailBox() as box,
            measured(mode, front.conninfo, tmp_path, monkeypatch, box) as (service, collector),
        ):
            box.refuse = lambda address: None if "life" in address else "550 nobody here"
            async with grpc.aio.insecure_channel(f"127.0.0.1:{service.port}") as channel:
                desk = Front(channel, front.conninfo, service.port)
                await lives(ears, desk)
                for who in (*everybody, ADMIN):
                    await ears.everything(desk, here, who)
                    await ears.everything(desk, here, who, end="\0")
                await ears.everything(desk, NOBODYS, ADMIN)
                unknown: Any = channel.unary_unary(f"/{WORD}/{WORD}")
                await refusal(unknown(b"", metadata=ADMIN))
                if mode == "required":
                    await while_all_waits(ears, desk, here, ADMIN)
                    await with_wrong_code(ears, desk, here, ADMIN)
                    await without_the_database(ears, desk, here, ADMIN, admin)
                health: Any = health_pb2_grpc.HealthStub(channel)
                checking = health.Check(health_pb2.HealthCheckRequest())
                ears.hear("health", (await checking, await checking.trailing_metadata()))
                audit: Any = audit_pb2_grpc.AuditServiceStub(channel)
                request = audit_pb2.ListAuditEventsRequest(page_size=100)
                ears.hear("ListAuditEvents", await audit.ListAuditEvents(request, metadata=ADMIN))
            if mode == "required":
                await operate(ears, service)
            page = await asyncio.to_thread(text, service)
        mails = [body(mail, "plain") for mail in box.mails]
        assert mails
        ears.secrets |= {line for mail in mails for line in mail.splitlines() if CODE.fullmatch(line)}
    log = service.log.read_text()
    assert "notification_unsent" in log
    ears.hear("log", log)
    ears.hear("metrics", page)
    ears.hear("traces", collector.requests)
    for table in ("log", "seal", "rate_window", "access_change"):
        for (row,) in front.sql(f"select to_jsonb(t)::text from {table} t"):
            ears.hear(table, row)
    assert ears.faults() == []

    # It has listened.
    for name in METHODS:
        beyond = ears.outcomes[name] - _ACCESS - {"INVALID_FIELD", "INTERNAL", "DATABASE_UNAVAILABLE"}
        assert beyond, f"{name} has got no further than to a refusal of access"
        assert f"/{name}" in log
    wanted = {"INVALID_FIELD", "EMAIL_TAKEN", "BAD_LOGIN", "LOGIN_THROTTLED", "REFRESH_REUSED"}
    if mode == "required":
        wanted |= _ACCESS | {"INTERNAL", "DATABASE_UNAVAILABLE", "DEADLINE_EXCEEDED"}
    assert wanted <= ears.reasons, wanted - ears.reasons
    assert "EMAIL_TAKEN" in page
    assert "kiosk-of-nobody" not in page
    assert collector.requests


def test_what_is_said_is_heard() -> None:
    """The test above finds canaries and secrets, in any letter case."""
    ears = Ears()
    ears.secrets.add("a secret of somebody")
    for said in ("ROW ZZYZXQUUX", b"A Secret of Somebody", {"phone": PHONE}, "nothing"):
        ears.hear("here", said)
    assert ears.faults() == ["here: 987654329", "here: a secret of somebody", "here: zzyzxquux"]
