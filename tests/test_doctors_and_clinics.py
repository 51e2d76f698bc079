"""Clinics and doctors are stored, found and changed; a doctor's presence is set by date."""

from datetime import date, timedelta
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from clinic.frontdesk.v1 import clinic_pb2, doctor_pb2
from tests.clinic import Front, day, details, outcome, reason_of, refusal, today, tomorrow


async def test_clinics(front: Front) -> None:
    """A clinic needs a name and a real time zone; its country reads its phone; lists by city ignore letter case."""
    clinic = await front.clinic(city="São Paulo", country="BR", phone="(11) 3333-4444", postal_code="01000-000")
    assert clinic.phone == "+551133334444"
    await front.clinic(city="Lima", country="PE")
    found = await front.clinics.ListClinics(clinic_pb2.ListClinicsRequest(city="SÃO PAULO"))
    assert [c.id for c in found.clinics] == [clinic.id]
    everyone = await front.clinics.ListClinics(clinic_pb2.ListClinicsRequest())
    assert len(everyone.clinics) == 3, "the default clinic is there from the first migration"
    updated = await front.clinics.UpdateClinic(
        clinic_pb2.UpdateClinicRequest(
            clinic=clinic_pb2.Clinic(id=clinic.id, time_zone="America/Bahia"),
            update_mask=FieldMask(paths=["time_zone"]),
            etag=clinic.etag,
        )
    )
    assert updated.clinic.time_zone == "America/Bahia"
    assert updated.clinic.city == "São Paulo"
    for bad in ("Mars/Olympus", "", "GMT+25"):
        wrong = clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="X", time_zone=bad))
        assert await outcome(front.clinics.CreateClinic(wrong)) == "INVALID_FIELD"


async def test_a_doctor_of_no_named_clinic(front: Front) -> None:
    """A doctor without a clinic gets the default clinic, ten patients per day, and is active."""
    request = doctor_pb2.CreateDoctorRequest(doctor=doctor_pb2.Doctor(code="D1", display_name="Dr. One"))
    doctor = (await front.doctors.CreateDoctor(request)).doctor
    assert front.sql("select is_default from clinic where id = %s", doctor.clinic_id) == [(True,)]
    assert (doctor.max_patients_per_day, doctor.active) == (10, True)
    unknown = doctor_pb2.CreateDoctorRequest(
        doctor=doctor_pb2.Doctor(code="D2", display_name="X", clinic_id="0190a0b0-1111-7222-8333-444455556666")
    )
    assert await outcome(front.doctors.CreateDoctor(unknown)) == "CLINIC_NOT_FOUND"


async def test_codes_and_licences_are_unique(front: Front) -> None:
    """Two doctors cannot share a code or a licence number; the refusal names the doctor who has it."""
    one = await front.doctor(code="A", license_number="L-1")
    two = await front.doctor(code="B")
    await front.doctor(code="C")
    error = await refusal(front.doctor(code="A"))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, "CODE_TAKEN")
    assert details(error)["ResourceInfo"].resource_name == one.id
    taken = doctor_pb2.UpdateDoctorRequest(doctor=doctor_pb2.Doctor(id=two.id, license_number="L-1"))
    assert await outcome(front.doctors.UpdateDoctor(taken)) == "LICENSE_TAKEN"


async def test_find_doctors(front: Front) -> None:
    """Doctors are found by specialty, clinic and code."""
    clinic = await front.clinic()
    heart = await front.doctor(clinic_id=clinic.id, specialty="Cardiology", code="H")
    await front.doctor(clinic_id=clinic.id, specialty="Dermatology")
    await front.doctor(specialty="Cardiology")

    async def found(**fields: str) -> list[str]:
        answer = await front.doctors.ListDoctors(doctor_pb2.ListDoctorsRequest(**fields))  # type: ignore[arg-type]
        return [doctor.id for doctor in answer.doctors]

    assert len(await found()) == 3
    assert len(await found(specialty="cardiology")) == 2
    assert await found(specialty="cardiology", clinic_id=clinic.id) == [heart.id]
    assert await found(code="H") == [heart.id]
    assert await found(code="h") == []


async def test_availability(front: Front) -> None:
    """Availability is listed by date, with both bounds included, and each page continues after the last."""
    doctor = await front.doctor()
    start = today()
    for offset in (3, 1, 2, 5):
        await front.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(
                doctor_id=doctor.id, date=day(start + timedelta(days=offset)), is_present=False, note=f"day {offset}"
            )
        )
    # A booking creates a doctor-day, but does not set availability.
    (patient,) = await front.people(1)
    await front.book(patient.id, doctor.id, start + timedelta(days=4))

    async def listed(**fields: object) -> list[str]:
        request = doctor_pb2.ListDoctorAvailabilityRequest(doctor_id=doctor.id, page_size=2, **fields)  # type: ignore[arg-type]
        notes = []
        while True:
            page = await front.doctors.ListDoctorAvailability(request)
            notes += [said.note for said in page.availabilities]
            if not page.next_page_token:
                return notes
            request.page_token = page.next_page_token

    def at(offset: int) -> date:
        return start + timedelta(days=offset)

    assert await listed() == ["day 1", "day 2", "day 3", "day 5"]
    assert await listed(from_date=day(at(2)), to_date=day(at(3))) == ["day 2", "day 3"]


async def test_a_capacity_alone_keeps_the_doctor_present(front: Front) -> None:
    """is_present that is not given stays as it was; an etag of the date guards against another's change."""
    doctor = await front.doctor()

    async def say(**fields: Any) -> doctor_pb2.SetDoctorAvailabilityResponse:
        return await front.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), **fields)
        )

    said = (await say(max_patients=1, etag="0")).availability
    assert (said.is_present, said.max_patients, said.etag) == (True, 1, "1")
    await front.book((await front.patient()).id, doctor.id, tomorrow())
    assert await outcome(say(is_present=False, etag="0")) == "ETAG_MISMATCH"
    away = await say(is_present=False, etag="1", idempotency_key="away")
    assert (away.availability.is_present, len(away.affected_appointment_ids)) == (False, 1)
    still = await say(note="back on Monday")
    assert (still.availability.is_present, still.availability.etag, len(still.affected_appointment_ids)) == (
        False,
        "3",
        1,
    )
    replay = await say(is_present=False, etag="1", idempotency_key="away")
    assert (replay.replayed, replay.availability, replay.revision) == (True, away.availability, away.revision)
    listed = await front.doctors.ListDoctorAvailability(doctor_pb2.ListDoctorAvailabilityRequest(doctor_id=doctor.id))
    assert list(listed.availabilities) == [still.availability]
