"""The calls that tests make to a clinic: stubs of every service, and the steps with which many tests begin."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
from google.rpc import error_details_pb2
from google.type.date_pb2 import Date
from grpc_status.rpc_status import from_call

from clinic.frontdesk.v1 import (
    appointment_pb2,
    appointment_pb2_grpc,
    clinic_pb2,
    clinic_pb2_grpc,
    doctor_pb2,
    doctor_pb2_grpc,
    event_pb2_grpc,
    patient_pb2,
    patient_pb2_grpc,
    queue_pb2,
    queue_pb2_grpc,
    schedule_pb2,
    schedule_pb2_grpc,
    slot_pb2,
    slot_pb2_grpc,
    waitlist_pb2_grpc,
)

_numbers = itertools.count(1)
ZONE = "America/Sao_Paulo"


def day(value: date) -> Date:
    """The date as a message."""
    return Date(year=value.year, month=value.month, day=value.day)


def today(zone: str = ZONE) -> date:
    """Today in this zone."""
    return datetime.now(ZoneInfo(zone)).date()


def tomorrow(zone: str = ZONE) -> date:
    """Tomorrow in this zone."""
    return today(zone) + timedelta(days=1)


def soon(hours: float = 1) -> datetime:
    """An instant tomorrow in this zone: 08:00 and `hours` more, early enough for slots before the clinic's midnight."""
    return datetime.combine(tomorrow(), time(8), ZoneInfo(ZONE)) + timedelta(hours=hours)


def details(error: grpc.RpcError) -> dict[str, Any]:
    """The details of a refusal, by the name of their type."""
    status = from_call(error)
    found: dict[str, Any] = {}
    for packed in status.details if status else ():
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.ResourceInfo,
            error_details_pb2.PreconditionFailure,
            error_details_pb2.QuotaFailure,
            error_details_pb2.RetryInfo,
        ):
            message = kind()
            if packed.Unpack(message):
                found[kind.__name__] = message
    return found


def reason_of(error: grpc.RpcError) -> str:
    """The reason in a refusal's ErrorInfo."""
    return str(details(error)["ErrorInfo"].reason)


def without_estimates(queue: queue_pb2.Queue) -> queue_pb2.Queue:
    """The part of a queue that its revision tells."""
    bare = queue_pb2.Queue()
    bare.CopyFrom(queue)
    bare.ClearField("next_estimate")
    for entry in bare.entries:
        entry.ClearField("estimate")
    return bare


async def outcome(call: Awaitable[Any]) -> str:
    """OK, or the reason of the refusal."""
    try:
        await call
    except grpc.RpcError as error:
        return reason_of(error)
    return "OK"


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    """The error of a call that must be refused."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"not refused: {answer}")


@dataclass
class Front:
    """A front desk: a client of one server, and its database."""

    channel: grpc.aio.Channel
    conninfo: str
    port: int

    def __post_init__(self) -> None:
        self.clinics = clinic_pb2_grpc.ClinicServiceStub(self.channel)
        self.patients = patient_pb2_grpc.PatientServiceStub(self.channel)
        self.doctors = doctor_pb2_grpc.DoctorServiceStub(self.channel)
        self.schedules = schedule_pb2_grpc.ScheduleServiceStub(self.channel)
        self.slots = slot_pb2_grpc.SlotServiceStub(self.channel)
        self.appointments = appointment_pb2_grpc.AppointmentServiceStub(self.channel)
        self.queues = queue_pb2_grpc.QueueServiceStub(self.channel)
        self.events = event_pb2_grpc.EventServiceStub(self.channel)
        self.waitlist = waitlist_pb2_grpc.WaitlistServiceStub(self.channel)

    def sql(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        """The rows of a query on the test's database."""
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            cursor = connection.execute(query, params or None)
            return cursor.fetchall() if cursor.description else []

    async def clinic(self, zone: str = ZONE, **fields: Any) -> clinic_pb2.Clinic:
        """A new clinic in this zone."""
        wanted = clinic_pb2.Clinic(name="Clinic", time_zone=zone, **fields)
        return (await self.clinics.CreateClinic(clinic_pb2.CreateClinicRequest(clinic=wanted))).clinic

    async def doctor(self, zone: str = ZONE, **fields: Any) -> doctor_pb2.Doctor:
        """A new doctor, of a new clinic in this zone unless one is given."""
        fields.setdefault("code", f"D-{next(_numbers)}")
        fields.setdefault("display_name", "Doctor")
        if "clinic_id" not in fields:
            fields["clinic_id"] = (await self.clinic(zone)).id
        wanted = doctor_pb2.Doctor(**fields)
        return (await self.doctors.CreateDoctor(doctor_pb2.CreateDoctorRequest(doctor=wanted))).doctor

    async def patient(self, **fields: Any) -> patient_pb2.Patient:
        """A new patient."""
        fields.setdefault("given_name", f"Patient {next(_numbers)}")
        fields.setdefault("phone", "+5511987654321")
        wanted = patient_pb2.Patient(**fields)
        return (await self.patients.RegisterPatient(patient_pb2.RegisterPatientRequest(patient=wanted))).patient

    async def people(self, count: int) -> Sequence[patient_pb2.Patient]:
        """`count` new patients."""
        return await asyncio.gather(*(self.patient() for _ in range(count)))

    async def book(
        self, patient_id: str, doctor_id: str, on: date | None = None, **fields: Any
    ) -> appointment_pb2.BookAppointmentResponse:
        """Book this doctor's day, by default today's."""
        target = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=day(on or today()))
        return await self.appointments.BookAppointment(
            appointment_pb2.BookAppointmentRequest(patient_id=patient_id, doctor_day=target, **fields)
        )

    async def book_slot(self, patient_id: str, slot_id: str, **fields: Any) -> appointment_pb2.BookAppointmentResponse:
        """Book a place in this slot."""
        return await self.appointments.BookAppointment(
            appointment_pb2.BookAppointmentRequest(patient_id=patient_id, slot_id=slot_id, **fields)
        )

    async def hold(self, doctor_id: str, on: date | None = None, **fields: Any) -> appointment_pb2.Hold:
        """Hold a place of this doctor's day, by default today's."""
        target = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=day(on or today()))
        request = appointment_pb2.HoldPlaceRequest(doctor_day=target, **fields)
        return (await self.appointments.HoldPlace(request)).hold

    async def hold_slot(self, slot_id: str, **fields: Any) -> appointment_pb2.Hold:
        """Hold a place in this slot."""
        request = appointment_pb2.HoldPlaceRequest(slot_id=slot_id, **fields)
        return (await self.appointments.HoldPlace(request)).hold

    async def appointment(self, appointment_id: str) -> appointment_pb2.Appointment:
        """The appointment as it is now."""
        request = appointment_pb2.GetAppointmentRequest(appointment_id=appointment_id)
        return (await self.appointments.GetAppointment(request)).appointment

    async def cancel(self, appointment_id: str, why: str = "") -> appointment_pb2.CancelAppointmentResponse:
        """Cancel the appointment."""
        return await self.appointments.CancelAppointment(
            appointment_pb2.CancelAppointmentRequest(appointment_id=appointment_id, cancel_reason=why)
        )

    async def call_next(self, doctor_id: str, room: str = "") -> queue_pb2.CallNextResponse:
        """Call the first waiting patient."""
        return await self.queues.CallNext(queue_pb2.CallNextRequest(doctor_id=doctor_id, room=room))

    async def check_in(self, appointment_id: str, **fields: Any) -> queue_pb2.CheckInResponse:
        """Check the patient in."""
        return await self.queues.CheckIn(queue_pb2.CheckInRequest(appointment_id=appointment_id, **fields))

    async def arrive(self, doctor_id: str, **fields: Any) -> queue_pb2.CheckInResponse:
        """A new patient, booked today and checked in."""
        person = await self.patient(**fields)
        booked = await self.book(person.id, doctor_id)
        return await self.check_in(booked.appointment.id)

    async def queue(self, doctor_id: str, on: date | None = None) -> queue_pb2.Queue:
        """The queue as it is now."""
        request = queue_pb2.GetQueueRequest(doctor_id=doctor_id, date=day(on) if on else None)
        return (await self.queues.GetQueue(request)).queue

    async def leave(
        self, doctor_id: str, first: date | datetime, last: date | datetime | None = None, **fields: Any
    ) -> schedule_pb2.CreateLeaveResponse:
        """Leave of this doctor: of the hours between two instants, or of whole days, by default one."""
        wanted = schedule_pb2.Leave(doctor_id=doctor_id, reason="holidays")
        if isinstance(first, datetime) and isinstance(last, datetime):
            wanted.hours.start_time.FromDatetime(first)
            wanted.hours.end_time.FromDatetime(last)
        else:
            wanted.days.from_date.CopyFrom(day(first))
            wanted.days.to_date.CopyFrom(day(last or first))
        if "policy" in fields:
            wanted.policy = fields.pop("policy")
        return await self.schedules.CreateLeave(schedule_pb2.CreateLeaveRequest(leave=wanted, **fields))

    async def absent(self, doctor_id: str, cause: str) -> None:
        """Close this doctor's today: AVAILABILITY, EXCEPTION or LEAVE, as the cause of DOCTOR_ABSENT is then."""
        on = day(today())
        if cause == "AVAILABILITY":
            await self.doctors.SetDoctorAvailability(
                doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor_id, date=on, is_present=False)
            )
        elif cause == "EXCEPTION":
            await self.schedules.SetScheduleException(
                schedule_pb2.SetScheduleExceptionRequest(doctor_id=doctor_id, date=on, closed=True)
            )
        else:
            await self.leave(doctor_id, today())

    async def standing(self, doctor_id: str) -> queue_pb2.Queue:
        """The queue as it is now, without the estimates, which may differ between two reads of one revision."""
        return without_estimates(await self.queue(doctor_id))

    async def slot(self, doctor_id: str, start: datetime, minutes: int = 30, capacity: int = 1) -> slot_pb2.Slot:
        """A new slot of this doctor."""
        wanted = slot_pb2.Slot(doctor_id=doctor_id, capacity=capacity)
        wanted.start_time.FromDatetime(start)
        wanted.end_time.FromDatetime(start + timedelta(minutes=minutes))
        return (await self.slots.CreateSlot(slot_pb2.CreateSlotRequest(slot=wanted))).slot


CAUSES = ("AVAILABILITY", "EXCEPTION", "LEAVE")
"""The causes of DOCTOR_ABSENT."""

Clock = Callable[[str], AbstractAsyncContextManager[Front]]
"""Opens a front desk whose clock stands still at an instant."""
