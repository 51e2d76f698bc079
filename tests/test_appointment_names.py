"""An appointment's answer has the names of patient and doctor, so that a screen needs no call for each row."""

from typing import Any

import pytest

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import doctor_pb2, patient_pb2, queue_pb2
from frontdesk.settings import Settings
from tests.clinic import Front, day, soon, today, tomorrow
from tests.hostile.wire import serving
from tests.identities import user

ANA, DOCTOR = "Ana Lima", "Dr Silva"


def names(appointment: pb.Appointment) -> tuple[str, str]:
    return appointment.patient_name, appointment.doctor_name


async def listed(front: Front, **filters: Any) -> list[tuple[str, str]]:
    answer = await front.appointments.ListAppointments(pb.ListAppointmentsRequest(**filters))
    return [names(found) for found in answer.appointments]


async def test_every_verb_answers_the_names(front: Front) -> None:
    """Booking, a dry run, and each later verb answer both names; a patient without a family name has the given one."""
    doctor = await front.doctor(display_name=DOCTOR)
    ana = await front.patient(given_name="Ana", family_name="Lima")
    slot = await front.slot(doctor.id, soon())
    assert names((await front.book(ana.id, doctor.id, validate_only=True)).appointment) == (ANA, DOCTOR)
    visit = (await front.book_slot(ana.id, slot.id)).appointment
    assert names(visit) == (ANA, DOCTOR)
    moved = pb.RescheduleAppointmentRequest(
        appointment_id=visit.id, doctor_day=pb.DoctorDay(doctor_id=doctor.id, date=day(today()))
    )
    assert names((await front.appointments.RescheduleAppointment(moved)).appointment) == (ANA, DOCTOR)
    changed = pb.UpdateAppointmentRequest(appointment=pb.Appointment(id=visit.id, reason="cough"))
    assert names((await front.appointments.UpdateAppointment(changed)).appointment) == (ANA, DOCTOR)
    arrived = await front.check_in(visit.id)
    assert (names(arrived.appointment), arrived.entry.patient_name) == ((ANA, DOCTOR), ANA)
    parked = await front.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=visit.id))
    assert names(parked.appointment) == (ANA, DOCTOR)
    assert names((await front.cancel(visit.id)).appointment) == (ANA, DOCTOR)
    assert names(await front.appointment(visit.id)) == (ANA, DOCTOR)
    alone = await front.patient(given_name="Ana")
    assert names((await front.book(alone.id, doctor.id)).appointment) == ("Ana", DOCTOR)


@pytest.mark.parametrize("by", ["patient_id", "doctor_id", "clinic_id", "dates"])
async def test_lists_have_the_names(front: Front, by: str) -> None:
    """A list has the names in each row, whatever it is asked by."""
    doctor = await front.doctor(display_name=DOCTOR)
    ana, eva = [await front.patient(given_name=name, family_name="Lima") for name in ("Ana", "Eva")]
    for patient in (ana, eva):
        await front.book(patient.id, doctor.id)
    wanted: dict[str, Any] = {
        "patient_id": {"patient_id": eva.id},
        "doctor_id": {"doctor_id": doctor.id},
        "clinic_id": {"clinic_id": doctor.clinic_id},
        "dates": {"from_date": day(today()), "to_date": day(tomorrow())},
    }[by]
    expected = [("Eva Lima", DOCTOR)] if by == "patient_id" else [(ANA, DOCTOR), ("Eva Lima", DOCTOR)]
    assert await listed(front, **wanted) == expected


async def test_names_are_the_present_ones(front: Front) -> None:
    """After a correction or a merge every answer has the present name, a replay too."""
    doctor = await front.doctor(display_name=DOCTOR)
    kept = await front.patient(given_name="Ana", family_name="Lima")
    merged = await front.patient(given_name="Anna", family_name="Lima")
    first = await front.book(merged.id, doctor.id, idempotency_key="k")
    assert names(first.appointment) == ("Anna Lima", DOCTOR)
    request = patient_pb2.MergePatientsRequest(keep_patient_id=kept.id, merge_patient_id=merged.id)
    await front.patients.MergePatients(request)
    again = await front.book(merged.id, doctor.id, idempotency_key="k")
    assert (again.replayed, names(again.appointment)) == (True, (ANA, DOCTOR))
    renamed = doctor_pb2.Doctor(id=doctor.id, display_name="Dr Souza")
    await front.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=renamed))
    corrected = patient_pb2.Patient(id=kept.id, family_name="Lemos")
    await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=corrected))
    assert names(await front.appointment(first.appointment.id)) == ("Ana Lemos", "Dr Souza")
    assert await listed(front, patient_id=merged.id) == [("Ana Lemos", "Dr Souza")]
    assert names((await front.cancel(first.appointment.id)).appointment) == ("Ana Lemos", "Dr Souza")
    # The key remembers none.
    assert "Lima" not in str(front.sql("select snapshot from idempotency"))


async def test_a_patient_sees_his_own(front: Front, settings: Settings) -> None:
    """A patient sees the names of his own appointments, and nobody else's."""
    doctor = await front.doctor(display_name=DOCTOR)
    ana, eva = [await front.patient(given_name=name, family_name="Lima") for name in ("Ana", "Eva")]
    for patient in (ana, eva):
        await front.book(patient.id, doctor.id)
    async with serving(settings, front.conninfo, access="required") as (_, desk):
        me = user(desk, "PATIENT", patient_id=ana.id)
        answer = await desk.appointments.ListAppointments(pb.ListAppointmentsRequest(doctor_id=doctor.id), metadata=me)
    assert [names(found) for found in answer.appointments] == [(ANA, DOCTOR)]
