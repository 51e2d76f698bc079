"""Who may do what: every identity calls every RPC about what is its own, another's, another clinic's, and nobody's.

The methods and their policies come from the descriptors. The outcome of each cell follows from the policy and from the
facts below: of which kind the thing is that a method is about, and how its absence is told.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.message import Message

from clinic.frontdesk.v1 import (
    appointment_pb2,
    doctor_pb2,
    patient_pb2,
    policy_pb2,
    queue_pb2,
    waitlist_pb2,
)
from frontdesk.settings import Settings
from tests.clinic import Front, day, details, outcome, refusal, tomorrow
from tests.hostile.methods import METHODS, STREAMS, VALID, World, given_up, noon, path_of, waiting, world
from tests.hostile.wire import serving
from tests.identities import Metadata, bearing, create_key, user

OWN, OTHER, ELSEWHERE, NONE = "own", "other", "other clinic", "none"
"""Whose the thing is: the caller's; another doctor's and patient's of the same clinic; another clinic's; nobody's."""

PASSES = "passes"
"""Whatever the clinic's rules then say: no rule of access has refused the call."""
_ACCESS = {
    "CREDENTIALS_REQUIRED",
    "CREDENTIALS_INVALID",
    "CREDENTIALS_EXPIRED",
    "ROLE_REQUIRED",
    "CLINIC_NOT_YOURS",
    "PASSWORD_CHANGE_REQUIRED",
    "EMAIL_NOT_VERIFIED",
    "RATE_LIMITED",
}
_FAULTS = {"INTERNAL", "INVALID_FIELD", "DEADLINE_EXCEEDED", "DATABASE_UNAVAILABLE", "OVERLOADED"}


@dataclass(frozen=True)
class Fact:
    """What a method is about."""

    kind: str
    missing: tuple[str, ...] = ()
    """How it is told that the thing does not exist; empty if that is no refusal. The first tells what is hidden too."""
    told: bool = False
    """A doctor is told that another's day takes another role; else it is as if it did not exist."""
    request: Callable[[World], Message] | None = None
    """If the valid request of the hostile tests does not do."""
    passes: frozenset[str] = frozenset()
    """Outcomes that elsewhere would be faults."""


def _about(kind: str, *missing: str, told: bool = False, **more: Any) -> Fact:
    return Fact(kind, missing, told, **more)


def _queue(name: str, view: "queue_pb2.QueueView.ValueType") -> Callable[[World], Message]:
    kind = getattr(queue_pb2, f"{name}Request")

    def make(w: World) -> Message:
        made: Message = kind(doctor_id=w.doctor_id, date=day(tomorrow()), view=view)
        return made

    return make


def _new_doctor(w: World) -> Message:
    made = doctor_pb2.Doctor(code=uuid.uuid4().hex, display_name="Dr X", clinic_id=w.clinic_id)
    return doctor_pb2.CreateDoctorRequest(doctor=made)


def _same_twice(w: World) -> Message:
    return patient_pb2.MergePatientsRequest(keep_patient_id=w.patient_id, merge_patient_id=w.patient_id)


def _e_mail(w: World) -> Message:
    return patient_pb2.UpdatePatientRequest(patient=patient_pb2.Patient(id=w.patient_id, email="rosa@example.com"))


def _of_doctor(w: World) -> Message:
    return appointment_pb2.ListAppointmentsRequest(doctor_id=w.doctor_id)


def _for_doctor(w: World) -> Message:
    on = day(noon(100).date())
    return waitlist_pb2.JoinWaitlistRequest(patient_id=w.patient_id, doctor_id=w.doctor_id, from_date=on, to_date=on)


_SLOT = _about("doctor", "SLOT_NOT_FOUND", told=True)
_DAY = _about("doctor", "DOCTOR_NOT_FOUND", told=True)
_VISIT = _about("visit", "APPOINTMENT_NOT_FOUND")
_VERB = replace(_VISIT, told=True)
_ENTRY = _about("visit", "WAITLIST_ENTRY_NOT_FOUND")
_FREE = _about("free")
_USER = _about("clinic", "USER_NOT_FOUND")
_PROFILE = _about("profile")

FACTS: dict[str, Fact] = {
    "CreateClinic": _about("installation"),
    "GetClinic": _about("public", "CLINIC_NOT_FOUND"),
    "UpdateClinic": _about("clinic", "CLINIC_NOT_FOUND"),
    "ListClinics": _FREE,
    "RegisterPatient": _FREE,
    "GetPatient": _about("patient", "PATIENT_NOT_FOUND"),
    "UpdatePatient": _about("patient", "PATIENT_NOT_FOUND", request=_e_mail),
    "MergePatients": _about("free", request=_same_twice, passes=frozenset({"INVALID_FIELD"})),
    "ListPatients": _FREE,
    "CreateDoctor": _about("clinic", "CLINIC_NOT_FOUND", request=_new_doctor),
    "GetDoctor": _about("public", "DOCTOR_NOT_FOUND"),
    "UpdateDoctor": _about("clinic", "DOCTOR_NOT_FOUND"),
    "ListDoctors": _FREE,
    "SetDoctorAvailability": _DAY,
    "ListDoctorAvailability": _about("public", "DOCTOR_NOT_FOUND"),
    "SetWeeklySchedule": _DAY,
    "ListWeeklySchedules": _about("public", "DOCTOR_NOT_FOUND"),
    "SetScheduleException": _DAY,
    "DeleteScheduleException": _DAY,
    "ListScheduleExceptions": _about("public", "DOCTOR_NOT_FOUND"),
    "GenerateSlots": _DAY,
    "GetDoctorSchedule": _about("public", "DOCTOR_NOT_FOUND"),
    "CreateLeave": _DAY,
    "GetLeave": _about("public", "LEAVE_NOT_FOUND"),
    "ListLeaves": _about("public", "DOCTOR_NOT_FOUND"),
    "CancelLeave": _about("doctor", "LEAVE_NOT_FOUND", told=True),
    "CreateSlot": _DAY,
    "BatchCreateSlots": _DAY,
    "GetSlot": _about("public", "SLOT_NOT_FOUND"),
    "ListSlots": _FREE,
    "UpdateSlot": _SLOT,
    "BlockSlots": _SLOT,
    "ReleaseSlots": _SLOT,
    "DeleteSlot": _SLOT,
    "BookAppointment": _about("visit", "PATIENT_NOT_FOUND", "DOCTOR_NOT_FOUND", told=True),
    "HoldPlace": _about("visit", "PATIENT_NOT_FOUND", "DOCTOR_NOT_FOUND", told=True),
    "ReleaseHold": _about("visit", "HOLD_NOT_FOUND"),
    "JoinWaitlist": _about("visit", "PATIENT_NOT_FOUND", "DOCTOR_NOT_FOUND", request=_for_doctor),
    "GetWaitlistEntry": _ENTRY,
    "ListWaitlist": _FREE,
    "LeaveWaitlist": _ENTRY,
    "OfferPlace": _ENTRY,
    "AcceptOffer": _ENTRY,
    "DeclineOffer": _ENTRY,
    "GetAppointment": _VISIT,
    "ListAppointments": _about("list", request=_of_doctor),
    "UpdateAppointment": _VISIT,
    "RescheduleAppointment": _VISIT,
    "CancelAppointment": _VISIT,
    "StartAppointment": _VERB,
    "CompleteAppointment": _VERB,
    "MarkNoShow": _VERB,
    "CheckIn": _VERB,
    "GetQueue": _DAY,
    "GetQueue/BOARD": _about("doctor", "DOCTOR_NOT_FOUND", request=_queue("GetQueue", queue_pb2.QUEUE_VIEW_BOARD)),
    "GetQueue/OWN": _about(
        "own line", "APPOINTMENT_NOT_FOUND", "DOCTOR_NOT_FOUND", request=_queue("GetQueue", queue_pb2.QUEUE_VIEW_OWN)
    ),
    "WatchQueue": _DAY,
    "WatchQueue/BOARD": _about("doctor", "DOCTOR_NOT_FOUND", request=_queue("WatchQueue", queue_pb2.QUEUE_VIEW_BOARD)),
    "WatchQueue/OWN": _about(
        "own line", "APPOINTMENT_NOT_FOUND", "DOCTOR_NOT_FOUND", request=_queue("WatchQueue", queue_pb2.QUEUE_VIEW_OWN)
    ),
    "CallNext": _DAY,
    "CallAgain": _VERB,
    "AddWalkIn": _about("doctor", "PATIENT_NOT_FOUND", "DOCTOR_NOT_FOUND", told=True),
    "TransferPatient": _VERB,
    "UndoTransition": _VERB,
    "SetPriority": _VERB,
    "ReturnToLine": _VERB,
    "ParkPatient": _VERB,
    "MarkMissed": _VERB,
    "LeaveQueue": _VERB,
    "ListAuditEvents": _about("installation"),
    **dict.fromkeys(("ListEvents", "WatchEvents"), _about("list")),
    "SendConfirmation": _VISIT,
    "GetNotification": _about("clinic", "NOTIFICATION_NOT_FOUND"),
    "ListNotifications": _FREE,
    "RedriveNotifications": _about("clinic", "NOTIFICATION_NOT_FOUND"),
    "SetContactPreferences": _about("patient", "PATIENT_NOT_FOUND"),
    "GetContactPreferences": _about("patient", "PATIENT_NOT_FOUND"),
    **dict.fromkeys(("RegisterUser", "Login", "VerifySecondFactor", "RefreshToken", "Logout"), _FREE),
    **dict.fromkeys(("VerifyEmail", "RequestPasswordReset", "ResetPassword"), _FREE),
    **dict.fromkeys(("GetProfile", "UpdateProfile", "ChangePassword"), _PROFILE),
    **dict.fromkeys(("EnrollSecondFactor", "ConfirmSecondFactor", "RemoveSecondFactor"), _PROFILE),
    "CreateUser": _about("clinic", "CLINIC_NOT_FOUND"),
    "GetUser": _USER,
    "ListUsers": _FREE,
    "UpdateUser": _USER,
    "SetUserRoles": _USER,
    "LinkPatient": _USER,
    "ResetSecondFactor": _USER,
    "CreateApiKey": _about("clinic", "CLINIC_NOT_FOUND"),
    "ListApiKeys": _FREE,
    "RevokeApiKey": _about("clinic", "API_KEY_NOT_FOUND"),
}
"""For every method, and every view of one that is not its default."""


@dataclass(frozen=True)
class Who:
    """An identity, and the server that it calls."""

    name: str
    front: Front
    metadata: Metadata = ()
    roles: frozenset[str] = frozenset()
    clinic_ids: tuple[str, ...] = ()
    doctor_id: str | None = None
    patient_id: str | None = None
    user: bool = False
    unrestricted: bool = False


def policies() -> Iterator[tuple[str, str, Any]]:
    """The name of every row, its method, and what the proto says of it."""
    for name, method in METHODS.items():
        said = method.GetOptions().Extensions[policy_pb2.policy]
        yield name, name, said
        for field, of_view in said.ListFields():
            if field.name.startswith("view_"):
                yield f"{name}/{field.name.removeprefix('view_').upper()}", name, of_view


def scopes_of(said: Any, who: Who) -> Mapping[str, str]:
    """What the policy gives to the roles of the identity."""
    every = {
        field.name.upper(): policy_pb2.Policy.Scope.Name(value).removeprefix("SCOPE_")
        for field, value in said.ListFields()
        if field.enum_type is not None
    }
    return {role: scope for role, scope in every.items() if role in who.roles}


def expected(who: Who, said: Any, fact: Fact, target: str, w: World) -> str | frozenset[str]:
    """What the cell must be: PASSES, or one of these refusals."""
    if said.without_credentials:
        return PASSES
    if not who.roles:
        if said.always or not who.unrestricted:
            return frozenset({"CREDENTIALS_REQUIRED"})
        return frozenset(fact.missing) if target == NONE and fact.missing else PASSES
    scopes = scopes_of(said, who)
    if not scopes:
        return frozenset({"ROLE_REQUIRED"})
    if said.every_clinic and who.clinic_ids:
        return frozenset({"ROLE_REQUIRED"})
    match fact.kind:
        case "free" | "installation":
            return PASSES
        case "profile":
            return PASSES if who.user else frozenset({"ROLE_REQUIRED"})
    if target == NONE:
        return frozenset(fact.missing) or PASSES
    desk = "ALL" in scopes.values()
    if fact.kind == "public" or reaches(who, scopes, fact, target, w):
        return PASSES
    if desk:
        return frozenset({"CLINIC_NOT_YOURS"})
    if fact.told and "DOCTOR" in scopes:
        return frozenset({"ROLE_REQUIRED"})
    return PASSES if fact.kind == "list" else frozenset(fact.missing[:1])


def reaches(who: Who, scopes: Mapping[str, str], fact: Fact, target: str, w: World) -> bool:
    """Whether the thing is within the identity's reach."""
    if scopes.get("PATIENT") == "ALL":
        return True
    if "ALL" in scopes.values() and (fact.kind == "patient" or not who.clinic_ids or w.clinic_id in who.clinic_ids):
        return True
    # The patient of each world has an appointment with its doctor.
    if "DOCTOR" in scopes and fact.kind in ("doctor", "visit", "patient") and w.doctor_id == who.doctor_id:
        return True
    own = fact.kind in ("visit", "patient", "own line") and w.patient_id == who.patient_id
    return "PATIENT" in scopes and own


def guarded(request: Message) -> Message:
    """The request so that it changes nothing: with an etag that is stale, or to validate only."""
    for name, value in (("etag", "0"), ("validate_only", True)):
        if name in request.DESCRIPTOR.fields_by_name:
            setattr(request, name, value)
    return request


async def made(who: Who, method: str, request: Message) -> str:
    """The outcome of the call; of a stream, that of its first message."""
    raw = request.SerializeToString()
    if method not in STREAMS:
        unary: Any = who.front.channel.unary_unary(path_of(method))
        return await outcome(unary(raw, metadata=who.metadata, timeout=30))
    streams: Any = who.front.channel.unary_stream(path_of(method))
    stream = streams(raw, metadata=who.metadata, timeout=30)
    found = await outcome(stream.read())
    stream.cancel()
    return found


def test_every_method_has_a_row() -> None:
    """A new method, or a new view, says here what it is about."""
    assert {name for name, _, _ in policies()} == FACTS.keys()


async def _world(front: Front) -> World:
    """A world whose API key and user are of its clinic."""
    made = await world(front)
    front.sql(
        "update user_account set roles = '{STAFF}', clinic_ids = array[%s::uuid] where id = %s",
        made.clinic_id,
        made.user_id,
    )
    key = await create_key(front, "BOARD", clinic_ids=[made.clinic_id])
    return replace(made, api_key_id=key.api_key.id)


@pytest.fixture
async def worlds(front: Front) -> Mapping[str, World]:
    """A world for each target."""
    own, elsewhere = [await _world(front) for _ in range(2)]
    doctor = await front.doctor(clinic_id=own.clinic_id, specialty="Cardiology")
    person = await front.patient()
    visit = (await front.book(person.id, doctor.id, tomorrow())).appointment.id
    other = replace(
        own,
        doctor_id=doctor.id,
        patient_id=person.id,
        slot_id=(await front.slot(doctor.id, noon(2))).id,
        appointment_id=visit,
        notification_id=given_up(front, visit),
        entry_id=await waiting(front, person.id, doctor.id),
        hold_id=(await front.hold(doctor.id, noon(5).date(), patient_id=person.id)).id,
        leave_id=(await front.leave(doctor.id, tomorrow() + timedelta(days=50))).leave.id,
    )
    nobodys = World(**{field.name: str(uuid.uuid4()) for field in fields(World)})
    return {OWN: own, OTHER: other, ELSEWHERE: elsewhere, NONE: nobodys}


@pytest.fixture
async def everybody(
    front: Front, worlds: Mapping[str, World], conninfo: str, settings: Settings, tmp_path: Path
) -> AsyncIterator[list[Who]]:
    """Every identity: without credentials, with a certificate, an API key, a token."""
    own, other = worlds[OWN], worlds[OTHER]
    here = (own.clinic_id,)
    async with AsyncExitStack() as stack:
        _, required = await stack.enter_async_context(serving(settings, conninfo, access="required"))
        certified = await stack.enter_async_context(_certified(settings, conninfo, tmp_path))
        found = [
            Who("nobody, open", front, unrestricted=True),
            Who("nobody, required", required),
            Who("certificate", certified, roles=frozenset({"SERVICE"})),
        ]
        for role, clinics in (
            ("SERVICE", ()), ("SERVICE", here), ("STAFF", here), ("ADMIN", ()), ("ADMIN", here), ("BOARD", ()),
            ("BOARD", here),
        ):  # fmt: skip
            key = await create_key(front, role, clinic_ids=list(clinics))
            found.append(Who(f"key {role} {clinics}", required, bearing(key.key), frozenset({role}), clinics))
        for roles, of in (
            (("STAFF",), {"clinic_ids": here}),
            (("ADMIN",), {"clinic_ids": here}),
            (("DOCTOR",), {"doctor_id": own.doctor_id}),
            (("DOCTOR",), {"doctor_id": own.doctor_id, "clinic_ids": here}),
            (("PATIENT",), {"patient_id": own.patient_id}),
            (("PATIENT",), {}),
            (("DOCTOR", "PATIENT"), {"doctor_id": own.doctor_id, "patient_id": other.patient_id}),
        ):
            given: dict[str, Any] = dict(of)
            name = f"user {roles} {sorted(given)}"
            found.append(Who(name, required, user(front, *roles, **given), frozenset(roles), user=True, **given))
        yield found


class _certified:
    """A client with a certificate, and the server that asks for it."""

    def __init__(self, settings: Settings, conninfo: str, directory: Path) -> None:
        authority = trustme.CA()
        server, own = authority.issue_cert("localhost", "127.0.0.1"), authority.issue_cert("kiosk.example")
        server.private_key_pem.write_to_path(directory / "key.pem")
        server.cert_chain_pems[0].write_to_path(directory / "cert.pem")
        authority.cert_pem.write_to_path(directory / "ca.pem")
        self._conninfo = conninfo
        self._stack = AsyncExitStack()
        self._server = serving(
            settings,
            conninfo,
            access="required",
            tls_cert=directory / "cert.pem",
            tls_key=directory / "key.pem",
            tls_client_ca=directory / "ca.pem",
        )
        self._credentials = grpc.ssl_channel_credentials(
            authority.cert_pem.bytes(), own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
        )

    async def __aenter__(self) -> Front:
        _, plain = await self._stack.enter_async_context(self._server)
        channel = grpc.aio.secure_channel(f"localhost:{plain.port}", self._credentials)
        return Front(await self._stack.enter_async_context(channel), self._conninfo, plain.port)

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()


async def test_what_is_hidden_is_told_as_what_is_unknown(
    front: Front, everybody: list[Who], worlds: Mapping[str, World]
) -> None:
    """Whoever sees only his own is told of another's record, merged or not, what he is told of an unknown id."""
    merged = await front.patient()
    elsewhere = worlds[ELSEWHERE]
    merging = patient_pb2.MergePatientsRequest(keep_patient_id=elsewhere.patient_id, merge_patient_id=merged.id)
    await front.patients.MergePatients(merging)
    unknown = {name: getattr(worlds[NONE], name) for name in ("patient_id", "appointment_id", "hold_id", "entry_id")}
    compared = 0
    for row, method, said in policies():
        fact = FACTS[row]
        if method in STREAMS or not fact.missing:
            continue
        for who in everybody:
            for w in (worlds[OTHER], elsewhere, replace(elsewhere, patient_id=merged.id)):
                if expected(who, said, fact, OTHER, w) != frozenset(fact.missing[:1]):
                    continue
                told = []
                for one in (w, replace(w, **unknown)):
                    raw = guarded((fact.request or VALID[method])(one)).SerializeToString()
                    unary: Any = who.front.channel.unary_unary(path_of(method))
                    error = await refusal(unary(raw, metadata=who.metadata))
                    text = f"{error.code()} {error.details()} {details(error)}"
                    for name in unknown:
                        text = text.replace(getattr(one, name), name)
                    told.append(text)
                assert told[0] == told[1], f"{who.name}: {row}"
                compared += 1
    assert compared > 20


async def test_the_matrix(everybody: list[Who], worlds: Mapping[str, World]) -> None:
    """Every identity is let through, refused, or told that there is no such thing, as the policy says."""
    turn = asyncio.Semaphore(16)
    wrong: list[str] = []
    cells = 0

    async def cell(who: Who, row: str, method: str, said: Any, target: str) -> None:
        w, fact = worlds[target], FACTS[row]
        wanted = expected(who, said, fact, target, w)
        async with turn:
            found = await made(who, method, guarded((fact.request or VALID[method])(w)))
        if wanted == PASSES:
            # Methods without credentials judge those in the message.
            refusals = (
                {"CREDENTIALS_REQUIRED", "ROLE_REQUIRED", "RATE_LIMITED"} if said.without_credentials else _ACCESS
            )
            faults = _FAULTS - fact.passes
            good = found not in refusals and found not in faults and (target == NONE or found not in fact.missing)
        else:
            good = found in wanted
        if not good:
            wrong.append(f"{who.name}: {row} of {target}: {found}, not {wanted}")

    async with asyncio.TaskGroup() as group:
        for row, method, said in policies():
            whose = (OWN,) if FACTS[row].kind in ("free", "profile", "installation") else worlds
            for who in everybody:
                for target in whose:
                    group.create_task(cell(who, row, method, said, target))
                    cells += 1
    assert not wrong, "\n".join(sorted(wrong))
    assert cells > 2_000
