"""All methods of the service, from its descriptors; a valid request for each; and ways to make requests invalid."""

import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from google.type.date_pb2 import Date
from google.type.dayofweek_pb2 import MONDAY
from google.type.timeofday_pb2 import TimeOfDay
from grpc_tools import protoc  # type: ignore[import-untyped]

from clinic.frontdesk.v1 import (
    access_pb2,
    appointment_pb2,
    audit_pb2,
    auth_pb2,
    clinic_pb2,
    doctor_pb2,
    error_reason_pb2,
    event_pb2,
    notification_pb2,
    patient_pb2,
    policy_pb2,
    queue_pb2,
    schedule_pb2,
    slot_pb2,
    waitlist_pb2,
)
from tests.clinic import Front, day, details, today, tomorrow
from tests.identities import ADMIN, PASSWORD, Metadata, auth, create_key, user_token

_FILES = (
    clinic_pb2, patient_pb2, doctor_pb2, schedule_pb2, slot_pb2, appointment_pb2, queue_pb2, auth_pb2, access_pb2,
    audit_pb2, event_pb2, notification_pb2, waitlist_pb2,
)  # fmt: skip

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in _FILES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""By name; names are unique over all services."""

STREAMS = {name for name, method in METHODS.items() if method.server_streaming}
UNARY = sorted(METHODS.keys() - STREAMS)
MUTATIONS = sorted(name for name, method in METHODS.items() if "idempotency_key" in method.input_type.fields_by_name)
LISTS = sorted(name for name, method in METHODS.items() if "page_token" in method.input_type.fields_by_name)
UPDATES = sorted(name for name, method in METHODS.items() if "update_mask" in method.input_type.fields_by_name)

REASONS = {
    name.removeprefix("ERROR_REASON_")
    for name, number in error_reason_pb2.ErrorReason.items()
    if number != error_reason_pb2.ERROR_REASON_UNSPECIFIED
}

DATE = "google.type.Date"
TIMESTAMP = "google.protobuf.Timestamp"


def path_of(name: str) -> str:
    """The method's path on the wire."""
    method = METHODS[name]
    return f"/{method.containing_service.full_name}/{method.name}"


def request_class(name: str) -> Any:
    """The class of the method's request."""
    return message_factory.GetMessageClass(METHODS[name].input_type)


def credentials_for(name: str) -> Metadata:
    """The metadata that the method needs on a server with open access."""
    if not METHODS[name].GetOptions().Extensions[policy_pb2.policy].always:
        return ()
    return user_token() if METHODS[name].containing_service.name == "AuthService" else ADMIN


def raw(front: Front, name: str) -> Callable[..., Any]:
    """The method as a function of bytes that returns a message; for a stream, its first message."""
    response = message_factory.GetMessageClass(METHODS[name].output_type)
    if name not in STREAMS:
        unary: Any = front.channel.unary_unary(path_of(name), response_deserializer=response.FromString)

        def made(request: bytes, *, metadata: Metadata = (), **options: Any) -> Any:
            given = any(key in ("authorization", "x-api-key") for key, _ in metadata)
            return unary(request, metadata=metadata if given else (*credentials_for(name), *metadata), **options)

        return made
    stream: Any = front.channel.unary_stream(path_of(name), response_deserializer=response.FromString)

    async def first(request: bytes, **options: Any) -> Any:
        call = stream(request, **options)
        found = await call.read()
        if found is grpc.aio.EOF:
            raise AssertionError("the stream ended without a message")
        call.cancel()
        return found

    return first


async def call(front: Front, name: str, request: Message, **options: Any) -> Any:
    """Call a method by its name, and return its answer; for a stream, its first message."""
    options.setdefault("timeout", 20)
    return await raw(front, name)(request.SerializeToString(), **options)


# Fields


@dataclass(frozen=True)
class Place:
    """A place in a request: the fields that lead to a value, outermost first."""

    steps: tuple[FieldDescriptor, ...]

    @property
    def field(self) -> FieldDescriptor:
        return self.steps[-1]

    @property
    def path(self) -> str:
        """The path in the form in which a violation names it, without indices."""
        return ".".join(step.name for step in self.steps)

    def put(self, request: Message, value: Any) -> Message:
        """A copy of the request with this value in the place; a list gets it as one more element."""
        changed = type(request)()
        changed.CopyFrom(request)
        holder: Any = changed
        for step in self.steps[:-1]:
            inner = getattr(holder, step.name)
            if step.is_repeated:
                inner = inner[-1] if len(inner) else inner.add()
            holder = inner
        if isinstance(value, Message):
            target = getattr(holder, self.field.name)
            (target.add() if self.field.is_repeated else target).CopyFrom(value)
        elif self.field.is_repeated:
            getattr(holder, self.field.name).append(value)
        else:
            setattr(holder, self.field.name, value)
        return changed


def places(name: str, wanted: Callable[[FieldDescriptor], bool]) -> list[Place]:
    """Every place in the method's request, at any depth, whose field is wanted."""

    def walk(descriptor: Any, above: tuple[FieldDescriptor, ...]) -> Iterator[Place]:
        for field in descriptor.fields:
            steps = (*above, field)
            if wanted(field):
                yield Place(steps)
            if field.message_type is not None and field.message_type.full_name not in (DATE, TIMESTAMP):
                yield from walk(field.message_type, steps)

    return list(walk(METHODS[name].input_type, ()))


def is_text(field: FieldDescriptor) -> bool:
    """Whether the field is a string."""
    return bool(field.type == FieldDescriptor.TYPE_STRING)


def is_enum(field: FieldDescriptor) -> bool:
    """Whether the field is an enum."""
    return field.enum_type is not None


def is_id(field: FieldDescriptor) -> bool:
    """Whether the field is the id of a resource."""
    return is_text(field) and (field.name in ("id", "ids", "slot_ids", "clinic_ids") or field.name.endswith("_id"))


def is_a(full_name: str) -> Callable[[FieldDescriptor], bool]:
    """A test whether a field is of the message `full_name`."""
    return lambda field: field.message_type is not None and field.message_type.full_name == full_name


@cache
def _comments() -> Mapping[str, str]:
    """The contract's comment above each field, by the field's full name."""
    root = Path(__file__).parents[2] / "protos"
    with tempfile.NamedTemporaryFile() as out:
        sources = sorted(str(path) for path in (root / "clinic").rglob("*.proto"))
        wells = str(files("grpc_tools") / "_proto")
        arguments = [f"-I{root}", f"-I{wells}", "--include_source_info", f"--descriptor_set_out={out.name}", *sources]
        assert protoc.main(["protoc", *arguments]) == 0
        described = descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes())
    found = {}
    for file in described.file:
        for location in file.source_code_info.location:
            path = list(location.path)
            if len(path) == 4 and path[0] == 4 and path[2] == 2:
                message = file.message_type[path[1]]
                found[f"{file.package}.{message.name}.{message.field[path[3]].name}"] = location.leading_comments
    return found


def is_output_only(field: FieldDescriptor) -> bool:
    """Whether the contract's comment begins with "Output only": then the value in a request is ignored."""
    return _comments()[field.full_name].strip().startswith("Output only")


def is_taken(place: Place) -> bool:
    """Whether the service takes a value from there: neither the field nor what it is in is output only."""
    ours = (step for step in place.steps if step.containing_type and step.containing_type.full_name.count(".") == 3)
    return not any(is_output_only(step) for step in ours)


# Valid requests


@dataclass(frozen=True)
class World:
    """One resource of each kind, for requests to name."""

    clinic_id: str
    doctor_id: str
    patient_id: str
    slot_id: str
    appointment_id: str
    other_patient_id: str
    """A patient who is merged into the other by a valid request."""
    api_key_id: str
    user_id: str
    refresh_token: str
    hold_id: str
    leave_id: str
    notification_id: str
    """One that was given up."""
    entry_id: str
    """Of the waiting list; a place is offered."""


def given_up(front: Front, appointment_id: str) -> str:
    """A notification of this appointment on each channel, as if nobody could have been told; the id of one."""
    ((found,), _) = front.sql(
        "insert into notification (cause, kind, channel, state, appointment_id, patient_id, clinic_id, doctor_id, date,"
        " slot_id, plan_time)"
        " select new_id(), 'CONFIRMATION', channel, 'DEAD', id, patient_id, clinic_id, doctor_id, date, slot_id,"
        " moment() from appointment, unnest(array['EMAIL', 'WEBHOOK']) channel where id = %s returning id::text",
        appointment_id,
    )
    return str(found)


async def waiting(front: Front, patient_id: str, doctor_id: str, date: date | None = None) -> str:
    """An entry of the waiting list to which a place is offered; its id."""
    on = day(date or noon(60).date())
    wish = waitlist_pb2.JoinWaitlistRequest(patient_id=patient_id, doctor_id=doctor_id, from_date=on, to_date=on)
    entry = (await front.waitlist.JoinWaitlist(wish)).entry
    place = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=on)
    await front.waitlist.OfferPlace(waitlist_pb2.OfferPlaceRequest(entry_id=entry.id, doctor_day=place))
    return entry.id


async def register(front: Front, **fields: Any) -> auth_pb2.RegisterUserResponse:
    """A new user."""
    given = {"email": f"{uuid.uuid4().hex}@example.com", "password": PASSWORD, "patient": _patient(), **fields}
    answer: auth_pb2.RegisterUserResponse = await auth(front).RegisterUser(auth_pb2.RegisterUserRequest(**given))
    return answer


async def world(front: Front) -> World:
    """A new clinic with a doctor, a slot, a patient and a booking."""
    clinic = await front.clinic()
    doctor = await front.doctor(clinic_id=clinic.id, specialty="Cardiology")
    patient = await front.patient()
    slot = await front.slot(doctor.id, noon(2))
    booked = await front.book(patient.id, doctor.id, tomorrow())
    other = await front.patient()
    key = await create_key(front, "BOARD")
    user = await register(front)
    held = await front.hold(doctor.id, noon(5).date(), patient_id=patient.id)
    leave = await front.leave(doctor.id, today() + timedelta(days=50))
    return World(
        clinic.id,
        doctor.id,
        patient.id,
        slot.id,
        booked.appointment.id,
        other.id,
        key.api_key.id,
        user.user.id,
        user.session.refresh_token,
        held.id,
        leave.leave.id,
        given_up(front, booked.appointment.id),
        await waiting(front, patient.id, doctor.id),
    )


def noon(days: int) -> datetime:
    """Noon in UTC, `days` days from today."""
    return datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0) + timedelta(days=days)


def slot_at(doctor_id: str, start: datetime, minutes: int = 30) -> slot_pb2.Slot:
    """A slot to create."""
    made = slot_pb2.Slot(doctor_id=doctor_id)
    made.start_time.FromDatetime(start)
    made.end_time.FromDatetime(start + timedelta(minutes=minutes))
    return made


def hours_at(start: int, end: int, minutes: int = 30, capacity: int = 1) -> dict[str, Any]:
    """The fields of hours from one hour of the day to another, with visits of so many minutes."""
    return {
        "start": TimeOfDay(hours=start),
        "end": TimeOfDay(hours=end),
        "visit_length": timedelta(minutes=minutes),
        "capacity": capacity,
    }


def _insured() -> patient_pb2.Insurance:
    return patient_pb2.Insurance(country="PE", number="00123")


def _patient(**fields: Any) -> patient_pb2.Patient:
    return patient_pb2.Patient(
        given_name="Rosa",
        family_name="Alves",
        phone="+5511987654321",
        birth_date=Date(year=1980, month=2, day=29),
        allergies=["penicillin"],
        emergency_contact=patient_pb2.EmergencyContact(name="Ana", phone="+5511987654322"),
        insurances=[_insured()],
        **fields,
    )


def _doctor_day(w: World) -> appointment_pb2.DoctorDay:
    return appointment_pb2.DoctorDay(doctor_id=w.doctor_id, date=day(tomorrow()))


def _clinic(**fields: Any) -> clinic_pb2.Clinic:
    return clinic_pb2.Clinic(name="Clinic", time_zone="America/Lima", country="PE", phone="+5116101234", **fields)


def _api_key(**fields: Any) -> access_pb2.ApiKey:
    return access_pb2.ApiKey(name="kiosk", roles=[policy_pb2.ROLE_SERVICE], requests_per_minute=5, **fields)


def _of_appointment(name: str) -> Callable[[World], Message]:
    def make(w: World) -> Message:
        made: Message = request_class(name)(appointment_id=w.appointment_id)
        return made

    return make


VALID: dict[str, Callable[[World], Message]] = {
    "CreateClinic": lambda w: clinic_pb2.CreateClinicRequest(clinic=_clinic()),
    "GetClinic": lambda w: clinic_pb2.GetClinicRequest(clinic_id=w.clinic_id),
    "UpdateClinic": lambda w: clinic_pb2.UpdateClinicRequest(clinic=_clinic(id=w.clinic_id)),
    "ListClinics": lambda w: clinic_pb2.ListClinicsRequest(),
    "RegisterPatient": lambda w: patient_pb2.RegisterPatientRequest(patient=_patient()),
    "GetPatient": lambda w: patient_pb2.GetPatientRequest(patient_id=w.patient_id),
    "UpdatePatient": lambda w: patient_pb2.UpdatePatientRequest(patient=_patient(id=w.patient_id)),
    "MergePatients": lambda w: patient_pb2.MergePatientsRequest(
        keep_patient_id=w.patient_id, merge_patient_id=w.other_patient_id
    ),
    "ListPatients": lambda w: patient_pb2.ListPatientsRequest(name_prefix="R", insurance=_insured()),
    "CreateDoctor": lambda w: doctor_pb2.CreateDoctorRequest(doctor=doctor_pb2.Doctor(code="X", display_name="Dr X")),
    "GetDoctor": lambda w: doctor_pb2.GetDoctorRequest(doctor_id=w.doctor_id),
    "UpdateDoctor": lambda w: doctor_pb2.UpdateDoctorRequest(
        doctor=doctor_pb2.Doctor(id=w.doctor_id, code="Y", display_name="Dr Y", specialty="Cardiology")
    ),
    "ListDoctors": lambda w: doctor_pb2.ListDoctorsRequest(),
    "SetDoctorAvailability": lambda w: doctor_pb2.SetDoctorAvailabilityRequest(
        doctor_id=w.doctor_id, date=day(tomorrow()), is_present=True
    ),
    "ListDoctorAvailability": lambda w: doctor_pb2.ListDoctorAvailabilityRequest(doctor_id=w.doctor_id),
    "SetWeeklySchedule": lambda w: schedule_pb2.SetWeeklyScheduleRequest(
        doctor_id=w.doctor_id,
        effective_from=day(tomorrow()),
        rules=[schedule_pb2.WeeklyRule(weekday=MONDAY, **hours_at(9, 12))],
    ),
    "CreateLeave": lambda w: schedule_pb2.CreateLeaveRequest(
        leave=schedule_pb2.Leave(
            doctor_id=w.doctor_id,
            days=schedule_pb2.DateRange(
                from_date=day(today() + timedelta(days=40)), to_date=day(today() + timedelta(days=41))
            ),
        )
    ),
    "GetLeave": lambda w: schedule_pb2.GetLeaveRequest(leave_id=w.leave_id),
    "ListLeaves": lambda w: schedule_pb2.ListLeavesRequest(doctor_id=w.doctor_id),
    "CancelLeave": lambda w: schedule_pb2.CancelLeaveRequest(leave_id=w.leave_id),
    "ListWeeklySchedules": lambda w: schedule_pb2.ListWeeklySchedulesRequest(doctor_id=w.doctor_id),
    "SetScheduleException": lambda w: schedule_pb2.SetScheduleExceptionRequest(
        doctor_id=w.doctor_id, date=day(tomorrow()), hours=[schedule_pb2.Hours(**hours_at(9, 12))]
    ),
    "DeleteScheduleException": lambda w: schedule_pb2.DeleteScheduleExceptionRequest(
        doctor_id=w.doctor_id, date=day(tomorrow())
    ),
    "ListScheduleExceptions": lambda w: schedule_pb2.ListScheduleExceptionsRequest(doctor_id=w.doctor_id),
    "GenerateSlots": lambda w: schedule_pb2.GenerateSlotsRequest(
        doctor_id=w.doctor_id, from_date=day(tomorrow()), to_date=day(tomorrow())
    ),
    "GetDoctorSchedule": lambda w: schedule_pb2.GetDoctorScheduleRequest(
        doctor_id=w.doctor_id, from_date=day(tomorrow()), to_date=day(tomorrow())
    ),
    "CreateSlot": lambda w: slot_pb2.CreateSlotRequest(slot=slot_at(w.doctor_id, noon(3))),
    "BatchCreateSlots": lambda w: slot_pb2.BatchCreateSlotsRequest(slots=[slot_at(w.doctor_id, noon(4))]),
    "GetSlot": lambda w: slot_pb2.GetSlotRequest(slot_id=w.slot_id),
    "ListSlots": lambda w: slot_pb2.ListSlotsRequest(doctor_id=w.doctor_id),
    "UpdateSlot": lambda w: slot_pb2.UpdateSlotRequest(slot=slot_pb2.Slot(id=w.slot_id, capacity=2)),
    "BlockSlots": lambda w: slot_pb2.BlockSlotsRequest(slot_ids=[w.slot_id]),
    "ReleaseSlots": lambda w: slot_pb2.ReleaseSlotsRequest(slot_ids=[w.slot_id]),
    "DeleteSlot": lambda w: slot_pb2.DeleteSlotRequest(slot_id=w.slot_id),
    "BookAppointment": lambda w: appointment_pb2.BookAppointmentRequest(
        patient_id=w.patient_id, doctor_day=_doctor_day(w)
    ),
    "HoldPlace": lambda w: appointment_pb2.HoldPlaceRequest(patient_id=w.patient_id, doctor_day=_doctor_day(w)),
    "ReleaseHold": lambda w: appointment_pb2.ReleaseHoldRequest(hold_id=w.hold_id),
    "GetAppointment": _of_appointment("GetAppointment"),
    "ListAppointments": lambda w: appointment_pb2.ListAppointmentsRequest(doctor_id=w.doctor_id),
    "UpdateAppointment": lambda w: appointment_pb2.UpdateAppointmentRequest(
        appointment=appointment_pb2.Appointment(id=w.appointment_id, reason="cough")
    ),
    "RescheduleAppointment": lambda w: appointment_pb2.RescheduleAppointmentRequest(
        appointment_id=w.appointment_id, doctor_day=_doctor_day(w)
    ),
    "CancelAppointment": _of_appointment("CancelAppointment"),
    "StartAppointment": _of_appointment("StartAppointment"),
    "CompleteAppointment": _of_appointment("CompleteAppointment"),
    "MarkNoShow": _of_appointment("MarkNoShow"),
    "CheckIn": _of_appointment("CheckIn"),
    "GetQueue": lambda w: queue_pb2.GetQueueRequest(doctor_id=w.doctor_id, date=day(today())),
    "WatchQueue": lambda w: queue_pb2.WatchQueueRequest(doctor_id=w.doctor_id, date=day(today())),
    "CallNext": lambda w: queue_pb2.CallNextRequest(doctor_id=w.doctor_id, date=day(today())),
    "CallAgain": _of_appointment("CallAgain"),
    "AddWalkIn": lambda w: queue_pb2.AddWalkInRequest(doctor_id=w.doctor_id, patient_id=w.patient_id, reason="cough"),
    "TransferPatient": lambda w: queue_pb2.TransferPatientRequest(
        appointment_id=w.appointment_id, to_doctor_id=w.doctor_id
    ),
    "UndoTransition": lambda w: appointment_pb2.UndoTransitionRequest(appointment_id=w.appointment_id, etag="1"),
    "SetPriority": lambda w: queue_pb2.SetPriorityRequest(
        appointment_id=w.appointment_id, priority=queue_pb2.PRIORITY_URGENT
    ),
    "ReturnToLine": _of_appointment("ReturnToLine"),
    "ParkPatient": _of_appointment("ParkPatient"),
    "MarkMissed": _of_appointment("MarkMissed"),
    "LeaveQueue": _of_appointment("LeaveQueue"),
    "ListAuditEvents": lambda w: audit_pb2.ListAuditEventsRequest(),
    "ListEvents": lambda w: event_pb2.ListEventsRequest(doctor_id=w.doctor_id),
    "WatchEvents": lambda w: event_pb2.WatchEventsRequest(doctor_id=w.doctor_id),
    "SendConfirmation": _of_appointment("SendConfirmation"),
    "GetNotification": lambda w: notification_pb2.GetNotificationRequest(notification_id=w.notification_id),
    "ListNotifications": lambda w: notification_pb2.ListNotificationsRequest(),
    "RedriveNotifications": lambda w: notification_pb2.RedriveNotificationsRequest(ids=[w.notification_id]),
    "SetContactPreferences": lambda w: notification_pb2.SetContactPreferencesRequest(
        patient_id=w.patient_id, channels=[notification_pb2.Notification.CHANNEL_EMAIL], language="es-PE"
    ),
    "JoinWaitlist": lambda w: waitlist_pb2.JoinWaitlistRequest(
        patient_id=w.patient_id,
        specialty=waitlist_pb2.Specialty(clinic_id=w.clinic_id, specialty="Cardiology"),
        from_date=day(noon(100).date()),
        to_date=day(noon(101).date()),
        weekdays=[MONDAY],
        earliest=TimeOfDay(hours=8),
        latest=TimeOfDay(hours=12),
    ),
    "GetWaitlistEntry": lambda w: waitlist_pb2.GetWaitlistEntryRequest(entry_id=w.entry_id),
    "ListWaitlist": lambda w: waitlist_pb2.ListWaitlistRequest(states=[waitlist_pb2.WaitlistEntry.STATE_WAITING]),
    "LeaveWaitlist": lambda w: waitlist_pb2.LeaveWaitlistRequest(entry_id=w.entry_id),
    "OfferPlace": lambda w: waitlist_pb2.OfferPlaceRequest(
        entry_id=w.entry_id,
        doctor_day=appointment_pb2.DoctorDay(doctor_id=w.doctor_id, date=day(noon(61).date())),
    ),
    "AcceptOffer": lambda w: waitlist_pb2.AcceptOfferRequest(entry_id=w.entry_id),
    "DeclineOffer": lambda w: waitlist_pb2.DeclineOfferRequest(entry_id=w.entry_id),
    "GetContactPreferences": lambda w: notification_pb2.GetContactPreferencesRequest(patient_id=w.patient_id),
    "CreateApiKey": lambda w: access_pb2.CreateApiKeyRequest(api_key=_api_key(clinic_ids=[w.clinic_id])),
    "ListApiKeys": lambda w: access_pb2.ListApiKeysRequest(),
    "RevokeApiKey": lambda w: access_pb2.RevokeApiKeyRequest(api_key_id=w.api_key_id),
    "CreateUser": lambda w: access_pb2.CreateUserRequest(
        user=auth_pb2.User(
            email=f"{uuid.uuid4().hex}@example.com", name="Ana", roles=[policy_pb2.ROLE_STAFF], clinic_ids=[w.clinic_id]
        )
    ),
    "GetUser": lambda w: access_pb2.GetUserRequest(user_id=w.user_id),
    "ListUsers": lambda w: access_pb2.ListUsersRequest(),
    "UpdateUser": lambda w: access_pb2.UpdateUserRequest(user=auth_pb2.User(id=w.user_id, name="Ana")),
    "SetUserRoles": lambda w: access_pb2.SetUserRolesRequest(
        user_id=w.user_id, roles=[policy_pb2.ROLE_DOCTOR], doctor_id=w.doctor_id, clinic_ids=[w.clinic_id]
    ),
    "LinkPatient": lambda w: access_pb2.LinkPatientRequest(user_id=w.user_id, patient_id=w.patient_id),
    "RegisterUser": lambda w: auth_pb2.RegisterUserRequest(
        email=f"{uuid.uuid4().hex}@example.com", password=PASSWORD, patient=_patient()
    ),
    "Login": lambda w: auth_pb2.LoginRequest(email="nobody@example.com", password=PASSWORD),
    "VerifySecondFactor": lambda w: auth_pb2.VerifySecondFactorRequest(challenge="unknown", code="123456"),
    "VerifyEmail": lambda w: auth_pb2.VerifyEmailRequest(code="7KQ4M-2XWPA-93HTN-DRF6B"),
    "RequestPasswordReset": lambda w: auth_pb2.RequestPasswordResetRequest(email="nobody@example.com"),
    "ResetPassword": lambda w: auth_pb2.ResetPasswordRequest(code="7KQ4M-2XWPA-93HTN-DRF6B", password=PASSWORD),
    "EnrollSecondFactor": lambda w: auth_pb2.EnrollSecondFactorRequest(),
    "ConfirmSecondFactor": lambda w: auth_pb2.ConfirmSecondFactorRequest(code="123456"),
    "RemoveSecondFactor": lambda w: auth_pb2.RemoveSecondFactorRequest(password="wrong one", code="123456"),
    "ResetSecondFactor": lambda w: access_pb2.ResetSecondFactorRequest(user_id=w.user_id),
    "RefreshToken": lambda w: auth_pb2.RefreshTokenRequest(refresh_token=w.refresh_token),
    "Logout": lambda w: auth_pb2.LogoutRequest(refresh_token=w.refresh_token),
    "GetProfile": lambda w: auth_pb2.GetProfileRequest(),
    "UpdateProfile": lambda w: auth_pb2.UpdateProfileRequest(user=auth_pb2.User(name="Ana")),
    "ChangePassword": lambda w: auth_pb2.ChangePasswordRequest(old_password="wrong one", new_password=PASSWORD),
}
"""For every method a request that breaks no rule."""


# Refusals


MOST_BYTES_OF_DETAILS = 8 * 1024


def manners(error: grpc.aio.AioRpcError, *canaries: str) -> list[str]:
    """The faults in the form of a refusal; empty if it is correct."""
    wrong = []
    found = details(error)
    info = found.get("ErrorInfo", error_details_pb2.ErrorInfo())
    if info.domain != "frontdesk.clinic":
        wrong.append(f"domain {info.domain!r}")
    if info.reason not in REASONS:
        wrong.append(f"reason {info.reason!r}")
    violations = found.get("BadRequest", error_details_pb2.BadRequest()).field_violations
    if len(violations) > 20:
        wrong.append(f"{len(violations)} violations")
    if info.reason == "INVALID_FIELD" and not violations:
        wrong.append("no violation")
    trailers: dict[str, Any] = dict(error.trailing_metadata() or ())
    if len(trailers.get("grpc-status-details-bin", b"")) >= MOST_BYTES_OF_DETAILS:
        wrong.append("too many bytes of details")
    everything = repr((error.code(), error.details(), trailers, found))
    wrong += [f"repeats {canary!r}" for canary in canaries if canary in everything]
    return wrong


def named(error: grpc.aio.AioRpcError) -> Sequence[str]:
    """The fields that a refusal names, without indices."""
    violations = details(error).get("BadRequest", error_details_pb2.BadRequest()).field_violations
    return [".".join(part.split("[")[0] for part in violation.field.split(".")) for violation in violations]


async def refused_field(
    front: Front,
    name: str,
    request: Message,
    path: str,
    *canaries: str,
    shown: object = "",
    metadata: Metadata = (),
) -> list[str]:
    """The faults in the method's answer to a request whose field at `path` is not valid."""
    where = f"{name}.{path} {shown!r:.30}"
    try:
        await call(front, name, request, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        wrong = [f"{where}: {problem}" for problem in manners(error, *canaries)]
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            wrong.append(f"{where}: {error.code().name} {error.details()}")
        elif not any(found == path or path.startswith(found + ".") for found in named(error) if found):
            wrong.append(f"{where}: names {named(error)}")
        return wrong
    return [f"{where}: accepted"]
