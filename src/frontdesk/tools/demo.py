"""A small clinic to look at: fills the service through its own API.

A second run adds nothing: it finds the records again, and every step has an idempotency key for its date.
"""

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar
from zoneinfo import ZoneInfo

from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import (
    appointment_pb2,
    clinic_pb2,
    doctor_pb2,
    patient_pb2,
    queue_pb2,
    slot_pb2,
)
from frontdesk.client import FrontdeskError, SyncFrontdeskClient

CALLER = "frontdesk-demo"
"""The caller of the demo's idempotency keys; give it to the client."""

_ZONE = ZoneInfo("America/Sao_Paulo")
_CLINIC = clinic_pb2.Clinic(
    name="Clínica Jardim",
    address="Rua das Laranjeiras, 100",
    city="São Paulo",
    state="SP",
    country="BR",
    time_zone=_ZONE.key,
)
_DOCTORS = (
    doctor_pb2.Doctor(code="DR-SILVA", display_name="Dr. Helena Silva", specialty="Cardiology", experience_years=18),
    doctor_pb2.Doctor(code="DR-COSTA", display_name="Dr. Paulo Costa", specialty="Pediatrics", experience_years=9),
    doctor_pb2.Doctor(code="DR-ROCHA", display_name="Dr. Marina Rocha", specialty="Dermatology", experience_years=5),
)
# All made up.
_PATIENTS = (
    "Ana Lima", "Bruno Alves", "Carla Dias", "Diego Nunes", "Elisa Moraes", "Fábio Reis", "Gabriela Pinto",
    "Hugo Barros", "Inês Castro", "João Freitas", "Karina Lopes", "Lucas Teixeira", "Márcia Ramos", "Nelson Duarte",
    "Olívia Campos", "Pedro Vieira", "Quitéria Melo", "Rafael Borges", "Sônia Prado", "Tiago Cunha",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Day:
    """The plan of a doctor's day that is booked by day: who books, how many come, and who is called."""

    doctor: int
    patients: slice
    come: int
    called_to: tuple[str, ...]
    started: int


_DAYS = (
    _Day(0, slice(0, 9), come=7, called_to=("Room 1", "Room 2"), started=1),
    _Day(1, slice(9, 15), come=4, called_to=("Room 3",), started=0),
)
_SLOT_DOCTOR, _SLOT_PATIENTS = 2, slice(15, 20)
_FIRST_SLOT, _LAST_SLOT, _SLOT_LENGTH = 8 * 60, 18 * 60, 30
"""Minutes of the day."""

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class DoctorToday:
    """One row of the demo's table."""

    doctor: doctor_pb2.Doctor
    queue: queue_pb2.Queue
    slots_on: datetime.date | None
    """The date of the doctor's slots; None if patients are booked by day."""


def fill(client: SyncFrontdeskClient, now: datetime.datetime) -> list[DoctorToday]:
    """Create a clinic, its doctors, their patients and a morning's work on the day of `now`; each doctor's day then.

    If somebody else has changed a record so that a step is refused, it leaves the record as it is. Raises
    FrontdeskError if the service cannot be reached.
    """
    today = now.astimezone(_ZONE).date()
    clinic_id = _clinic(client)
    doctors = [_doctor(client, doctor, clinic_id) for doctor in _DOCTORS]
    patients = [_patient(client, number, name) for number, name in enumerate(_PATIENTS)]
    for plan in _DAYS:
        _work(client, plan, doctors[plan.doctor].id, patients[plan.patients], today)
    slots_on = _book_slots(client, doctors[_SLOT_DOCTOR].id, patients[_SLOT_PATIENTS], now)
    return [
        DoctorToday(
            doctor,
            client.queues.GetQueue(queue_pb2.GetQueueRequest(doctor_id=doctor.id, date=_date(today))).queue,
            slots_on if number == _SLOT_DOCTOR else None,
        )
        for number, doctor in enumerate(doctors)
    ]


def _clinic(client: SyncFrontdeskClient) -> str:
    request = clinic_pb2.ListClinicsRequest(city=_CLINIC.city, page_size=100)
    while True:
        page = client.clinics.ListClinics(request)
        for clinic in page.clinics:
            if clinic.name == _CLINIC.name:
                return clinic.id
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    # The key is for a second run at the same moment.
    create = clinic_pb2.CreateClinicRequest(clinic=_CLINIC, idempotency_key="demo/clinic")
    return client.clinics.CreateClinic(create).clinic.id


def _doctor(client: SyncFrontdeskClient, wanted: doctor_pb2.Doctor, clinic_id: str) -> doctor_pb2.Doctor:
    found = client.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest(code=wanted.code)).doctors
    if found:
        return found[0]
    doctor = doctor_pb2.Doctor(clinic_id=clinic_id)
    doctor.MergeFrom(wanted)
    key = f"demo/{wanted.code}/{clinic_id}"
    return client.doctors.CreateDoctor(doctor_pb2.CreateDoctorRequest(doctor=doctor, idempotency_key=key)).doctor


def _patient(client: SyncFrontdeskClient, number: int, name: str) -> str:
    given, _, family = name.partition(" ")
    patient = patient_pb2.Patient(given_name=given, family_name=family, phone=f"+5511 98765-10{number:02}")
    request = patient_pb2.RegisterPatientRequest(patient=patient, idempotency_key=f"demo/{patient.phone}")
    return client.patients.RegisterPatient(request).patient.id


def _work(
    client: SyncFrontdeskClient, plan: _Day, doctor_id: str, patients: Sequence[str], today: datetime.date
) -> None:
    key = f"demo/{today}/{doctor_id}"
    day = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=_date(today))
    booked = []
    for patient_id in patients:
        booking = appointment_pb2.BookAppointmentRequest(
            patient_id=patient_id, doctor_day=day, reason="Check-up", idempotency_key=f"{key}/{patient_id}"
        )
        answer = _unless_refused(client.appointments.BookAppointment, booking)
        if answer is not None:
            booked.append(answer.appointment.id)
    for appointment_id in booked[: plan.come]:
        arrival = queue_pb2.CheckInRequest(appointment_id=appointment_id, idempotency_key=f"{key}/{appointment_id}")
        _unless_refused(client.queues.CheckIn, arrival)
    called = []
    for room in plan.called_to:
        call = queue_pb2.CallNextRequest(doctor_id=doctor_id, date=day.date, room=room, idempotency_key=f"{key}/{room}")
        answered = _unless_refused(client.queues.CallNext, call)
        if answered is not None:
            called.append(answered.entry.appointment_id)
    for appointment_id in called[: plan.started]:
        start = appointment_pb2.StartAppointmentRequest(
            appointment_id=appointment_id, idempotency_key=f"{key}/{appointment_id}"
        )
        _unless_refused(client.appointments.StartAppointment, start)


def _book_slots(
    client: SyncFrontdeskClient, doctor_id: str, patients: Sequence[str], now: datetime.datetime
) -> datetime.date:
    """Book every other slot, of today or else of tomorrow if today has too little time left; the date."""
    day = now.astimezone(_ZONE).date()
    slots = _slots(client, doctor_id, day)
    if not slots:
        wanted = _free_times(doctor_id, day, now)
        if len(wanted) < 2 * len(patients):
            day += datetime.timedelta(days=1)
            slots = _slots(client, doctor_id, day)
            wanted = _free_times(doctor_id, day, now)
    if not slots:
        request = slot_pb2.BatchCreateSlotsRequest(slots=wanted)
        slots = list(client.slots.BatchCreateSlots(request).slots)
    for patient_id, slot in zip(patients, slots[::2], strict=False):
        booking = appointment_pb2.BookAppointmentRequest(
            patient_id=patient_id, slot_id=slot.id, idempotency_key=f"demo/{slot.id}/{patient_id}"
        )
        _unless_refused(client.appointments.BookAppointment, booking)
    return day


def _slots(client: SyncFrontdeskClient, doctor_id: str, day: datetime.date) -> list[slot_pb2.Slot]:
    request = slot_pb2.ListSlotsRequest(doctor_id=doctor_id, page_size=100)
    request.start_time_from.FromDatetime(_moment(day, 0))
    request.start_time_to.FromDatetime(_moment(day, 24 * 60))
    return list(client.slots.ListSlots(request).slots)


def _free_times(doctor_id: str, day: datetime.date, now: datetime.datetime) -> list[slot_pb2.Slot]:
    times = []
    for minute in range(_FIRST_SLOT, _LAST_SLOT, _SLOT_LENGTH):
        # With a margin, so that the slot has not begun when the request arrives.
        if _moment(day, minute) > now + datetime.timedelta(minutes=5):
            slot = slot_pb2.Slot(doctor_id=doctor_id)
            slot.start_time.FromDatetime(_moment(day, minute))
            slot.end_time.FromDatetime(_moment(day, minute + _SLOT_LENGTH))
            times.append(slot)
    return times


def _moment(day: datetime.date, minute: int) -> datetime.datetime:
    midnight = datetime.datetime.combine(day, datetime.time(), _ZONE)
    return (midnight + datetime.timedelta(minutes=minute)).astimezone(datetime.UTC)


def _date(day: datetime.date) -> Date:
    return Date(year=day.year, month=day.month, day=day.day)


def _unless_refused(call: Callable[..., R], request: object) -> R | None:
    try:
        return call(request)
    except FrontdeskError as error:
        if error.code.name in ("FAILED_PRECONDITION", "ALREADY_EXISTS"):
            return None
        raise
