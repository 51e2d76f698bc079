"""What patients and doctors may do: with what is their own, and with nothing else."""

from collections.abc import Callable
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from clinic.frontdesk.v1 import appointment_pb2, patient_pb2
from tests.clinic import Front, day, details, outcome, reason_of, refusal, soon, today, tomorrow
from tests.identities import Metadata, user

UNKNOWN = "01900000-0000-7000-8000-00000000ffff"
NOTES = "seen with both parents"


def get_patient(front: Front, patient_id: str, by: Metadata) -> Any:
    """A call of GetPatient."""
    return front.patients.GetPatient(patient_pb2.GetPatientRequest(patient_id=patient_id), metadata=by)


def update_patient(front: Front, by: Metadata, *paths: str, **fields: Any) -> Any:
    """A call of UpdatePatient."""
    request = patient_pb2.UpdatePatientRequest(
        patient=patient_pb2.Patient(**fields), update_mask=FieldMask(paths=paths)
    )
    return front.patients.UpdatePatient(request, metadata=by)


def update_appointment(front: Front, by: Metadata, *paths: str, key: str = "", **fields: Any) -> Any:
    """A call of UpdateAppointment."""
    request = appointment_pb2.UpdateAppointmentRequest(
        appointment=appointment_pb2.Appointment(**fields), update_mask=FieldMask(paths=paths), idempotency_key=key
    )
    return front.appointments.UpdateAppointment(request, metadata=by)


def book(front: Front, by: Metadata, patient_id: str, doctor_id: str, **fields: Any) -> Any:
    """A call of BookAppointment for tomorrow."""
    target = appointment_pb2.DoctorDay(doctor_id=doctor_id, date=day(tomorrow()))
    request = appointment_pb2.BookAppointmentRequest(patient_id=patient_id, doctor_day=target, **fields)
    return front.appointments.BookAppointment(request, metadata=by)


async def listed(front: Front, by: Metadata, **fields: Any) -> list[appointment_pb2.Appointment]:
    """The appointments of one page."""
    request = appointment_pb2.ListAppointmentsRequest(**fields)
    return [*(await front.appointments.ListAppointments(request, metadata=by)).appointments]


async def field_of(call: Any) -> tuple[str, str]:
    """The reason of a refusal, and the field that it names."""
    error = await refusal(call)
    return reason_of(error), details(error)["ErrorInfo"].metadata["field"]


async def test_records_of_patients(front: Front) -> None:
    """A patient reads the own record, a doctor those of his patients, past ones too; others answer as if unknown."""
    doctor, other = await front.doctor(), await front.doctor()
    mine, past, yours = await front.people(3)
    await front.book(mine.id, doctor.id)
    await front.cancel((await front.book(past.id, doctor.id)).appointment.id)
    await front.book(yours.id, other.id)
    me = user(front, "PATIENT", patient_id=mine.id)
    him = user(front, "DOCTOR", doctor_id=doctor.id)
    both = user(front, "DOCTOR", "PATIENT", doctor_id=other.id, patient_id=past.id)
    for by, seen in (
        (me, {mine.id}),
        (him, {mine.id, past.id}),
        (both, {past.id, yours.id}),
        (user(front, "PATIENT"), ()),
    ):
        for person in (mine, past, yours):
            if person.id in seen:
                assert (await get_patient(front, person.id, by)).patient == person
                continue
            error, unknown = [await refusal(get_patient(front, one, by)) for one in (person.id, UNKNOWN)]
            assert (error.code(), error.details()) == (unknown.code(), unknown.details())
            assert details(error)["ErrorInfo"].reason == details(unknown)["ErrorInfo"].reason == "PATIENT_NOT_FOUND"


async def test_a_merged_record_is_still_ones_own(front: Front) -> None:
    """A patient whose record was merged reads the kept one under both ids, and never sees notes."""
    doctor = await front.doctor()
    keep, merged = await front.people(2)
    booked = (await front.book(merged.id, doctor.id, notes=NOTES)).appointment
    me = user(front, "PATIENT", patient_id=merged.id)
    # A user of both: else the merged record's user would get the kept one, and need another token.
    user(front, "PATIENT", patient_id=keep.id)
    await front.patients.MergePatients(
        patient_pb2.MergePatientsRequest(keep_patient_id=keep.id, merge_patient_id=merged.id)
    )
    for one in (keep.id, merged.id):
        assert (await get_patient(front, one, me)).patient.id == keep.id
        assert [a.notes for a in await listed(front, me, patient_id=one)] == [""]
    request = appointment_pb2.GetAppointmentRequest(appointment_id=booked.id)
    assert (await front.appointments.GetAppointment(request, metadata=me)).appointment.notes == ""
    assert (await front.appointment(booked.id)).notes == NOTES


async def test_a_patient_corrects_the_own_record(front: Front) -> None:
    """A patient changes the own record, but neither insurances nor whether it is active, by no mask."""
    mine, yours = await front.people(2)
    me = user(front, "PATIENT", patient_id=mine.id)
    insured = {"insurances": [patient_pb2.Insurance(country="PE", number="00123")]}
    changed = await update_patient(front, me, id=mine.id, email="rosa@example.com")
    assert changed.patient.email == "rosa@example.com"
    for paths, fields, name in (
        ((), insured, "insurances"),
        (("insurances",), {}, "insurances"),
        (("email", "active"), {"active": True}, "active"),
        ((), {"active": False}, "active"),
    ):
        assert await field_of(update_patient(front, me, *paths, id=mine.id, **fields)) == ("ROLE_REQUIRED", name)
    reason, name = await field_of(update_patient(front, me, "*", id=mine.id, given_name="R"))
    assert (reason, name in ("insurances", "active")) == ("ROLE_REQUIRED", True)
    assert await outcome(update_patient(front, me, id=yours.id, email="x@example.com")) == "PATIENT_NOT_FOUND"
    assert await outcome(update_patient(front, (), id=mine.id, active=False, **insured)) == "OK"


async def test_a_patient_writes_no_notes(front: Front) -> None:
    """A patient books and changes the own reason, but no notes; a doctor who is a patient elsewhere neither."""
    doctor, other = await front.doctor(), await front.doctor()
    for roles, more in (
        (["PATIENT"], {}),
        (["PATIENT", "DOCTOR"], {"doctor_id": other.id}),
        (["PATIENT", "STAFF"], {"clinic_ids": [other.clinic_id]}),
    ):
        mine = await front.patient()
        me = user(front, *roles, patient_id=mine.id, **more)
        assert await field_of(book(front, me, mine.id, doctor.id, notes=NOTES)) == ("ROLE_REQUIRED", "notes")
        booked = (await book(front, me, mine.id, doctor.id, reason="cough")).appointment
        assert (await update_appointment(front, me, id=booked.id, reason="fever")).appointment.reason == "fever"
        for paths, fields in (((), {"notes": NOTES}), (("notes",), {}), (("*",), {"reason": "cough"})):
            refused = update_appointment(front, me, *paths, id=booked.id, **fields)
            assert await field_of(refused) == ("ROLE_REQUIRED", "notes")
    him = user(front, "DOCTOR", doctor_id=doctor.id)
    person = await front.patient()
    booked = (await book(front, him, person.id, doctor.id, notes=NOTES)).appointment
    assert booked.notes == NOTES
    assert (await update_appointment(front, him, id=booked.id, notes="x")).appointment.notes == "x"


async def test_notes_never_reach_a_patient(front: Front) -> None:
    """No answer that a patient can get has notes: neither of a change nor of its replay, nor a list."""
    doctor = await front.doctor()
    mine = await front.patient()
    booked = (await front.book(mine.id, doctor.id, notes=NOTES)).appointment
    me = user(front, "PATIENT", patient_id=mine.id)
    get = appointment_pb2.GetAppointmentRequest(appointment_id=booked.id)
    answers: list[Any] = [await front.appointments.GetAppointment(get, metadata=me)]
    for _ in range(2):
        answers.append(await update_appointment(front, me, key="k", id=booked.id, reason="fever"))
    assert answers[-1].replayed
    move = appointment_pb2.RescheduleAppointmentRequest(
        appointment_id=booked.id, doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(tomorrow()))
    )
    answers.append(await front.appointments.RescheduleAppointment(move, metadata=me))
    cancel = appointment_pb2.CancelAppointmentRequest(appointment_id=booked.id, idempotency_key="k")
    for _ in range(2):
        answers.append(await front.appointments.CancelAppointment(cancel, metadata=me))
    assert [answer.appointment.notes for answer in answers] == [""] * 6
    assert [a.notes for a in await listed(front, me, patient_id=mine.id)] == [""]
    assert (await front.appointment(booked.id)).notes == NOTES


async def test_lists_are_narrowed(front: Front) -> None:
    """A list shows a patient's own, a doctor's own, a desk's clinics; the desk is told of another clinic or doctor."""
    here, there = await front.doctor(), await front.doctor()
    mine, yours = await front.people(2)
    booked = {
        (person.id, doctor.id): (await front.book(person.id, doctor.id)).appointment.id
        for person in (mine, yours)
        for doctor in (here, there)
    }
    dates = {"from_date": day(today()), "to_date": day(today())}
    cases: list[tuple[Metadata, Callable[[str, str], bool]]] = [
        (user(front, "PATIENT", patient_id=mine.id), lambda person, doctor: person == mine.id),
        (user(front, "DOCTOR", doctor_id=here.id), lambda person, doctor: doctor == here.id),
        (user(front, "STAFF", clinic_ids=[here.clinic_id]), lambda person, doctor: doctor == here.id),
        (
            user(front, "STAFF", "PATIENT", clinic_ids=[here.clinic_id], patient_id=yours.id),
            lambda person, doctor: doctor == here.id or person == yours.id,
        ),
    ]
    for by, sees in cases:
        own = {booked[pair] for pair in booked if sees(*pair)}
        assert {a.id for a in await listed(front, by, **dates)} == own
        for person in (mine.id, yours.id):
            of_person = {booked[person, doctor.id] for doctor in (here, there)}
            assert {a.id for a in await listed(front, by, patient_id=person)} == own & of_person
    desk = user(front, "STAFF", clinic_ids=[here.clinic_id])
    for fields in ({"clinic_id": there.clinic_id}, {"doctor_id": there.id}):
        assert await outcome(listed(front, desk, **fields)) == "CLINIC_NOT_YOURS"
    for fields in ({"clinic_id": here.clinic_id.upper()}, {"doctor_id": here.id.upper()}):
        assert len(await listed(front, desk, **fields)) == 2


@pytest.mark.parametrize("name", ["StartAppointment", "CompleteAppointment", "MarkNoShow"])
async def test_another_doctors_day(front: Front, name: str) -> None:
    """A doctor is told that another's visit takes another role; a patient may not even ask."""
    doctor, other = await front.doctor(), await front.doctor()
    arrived = await front.arrive(doctor.id)
    request = getattr(appointment_pb2, f"{name}Request")(appointment_id=arrived.appointment.id)
    method = getattr(front.appointments, name)
    for by in (
        user(front, "DOCTOR", doctor_id=other.id),
        user(front, "PATIENT", patient_id=arrived.entry.patient_id),
    ):
        error = await refusal(method(request, metadata=by))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.PERMISSION_DENIED, "ROLE_REQUIRED")


async def test_who_else_is_a_patient(front: Front) -> None:
    """A patient who takes another one's name and phone is told that there is a record, but not which; the desk is."""
    mine, yours = await front.people(2)
    me = user(front, "PATIENT", patient_id=mine.id)
    for by, told in ((me, ""), ((), yours.id)):
        error = await refusal(update_patient(front, by, id=mine.id, given_name=yours.given_name, phone=yours.phone))
        said = details(error)
        assert reason_of(error) == "PATIENT_EXISTS"
        assert said["ResourceInfo"].resource_name == told
        assert dict(said["ErrorInfo"].metadata) == ({"patient_id": told} if told else {})


async def test_notes_are_refused_before_rows(front: Front) -> None:
    """A patient who writes notes is refused for that, whatever the request is about."""
    mine, yours = await front.people(2)
    doctor = await front.doctor()
    booked = (await front.book(yours.id, doctor.id)).appointment
    me = user(front, "PATIENT", patient_id=mine.id)
    for patient_id in (yours.id, UNKNOWN):
        for doctor_id in (doctor.id, UNKNOWN):
            refused = book(front, me, patient_id, doctor_id, notes=NOTES)
            assert await field_of(refused) == ("ROLE_REQUIRED", "notes")
    for appointment_id in (booked.id, UNKNOWN):
        refused = update_appointment(front, me, id=appointment_id, notes=NOTES)
        assert await field_of(refused) == ("ROLE_REQUIRED", "notes")


async def test_an_unknown_appointment_is_not_moved(front: Front) -> None:
    """Whoever moves an unknown appointment is told that there is none, whosever the new day is."""
    here, there = await front.doctor(), await front.doctor()
    mine = await front.patient()
    day_there = appointment_pb2.DoctorDay(doctor_id=there.id, date=day(tomorrow()))
    move = appointment_pb2.RescheduleAppointmentRequest(appointment_id=UNKNOWN, doctor_day=day_there)
    for by in (
        user(front, "PATIENT", patient_id=mine.id),
        user(front, "DOCTOR", doctor_id=here.id),
        user(front, "STAFF", clinic_ids=[here.clinic_id]),
    ):
        call = front.appointments.RescheduleAppointment(move, metadata=by)
        assert await outcome(call) == "APPOINTMENT_NOT_FOUND"


async def test_a_held_lock_tells_nothing(front: Front) -> None:
    """Another's appointment is refused while its doctor-day is locked, as an unknown one is."""
    doctor = await front.doctor()
    mine, yours = await front.people(2)
    booked = (await front.book(yours.id, doctor.id)).appointment
    me = user(front, "PATIENT", patient_id=mine.id)
    staff = user(front, "STAFF", clinic_ids=[(await front.clinic()).id])
    with psycopg.connect(front.conninfo) as holder:
        holder.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, today()))
        for by, told in ((me, "APPOINTMENT_NOT_FOUND"), (staff, "CLINIC_NOT_YOURS")):
            cancel = appointment_pb2.CancelAppointmentRequest(appointment_id=booked.id)
            assert await outcome(front.appointments.CancelAppointment(cancel, metadata=by, timeout=30)) == told
        waits = update_patient(front, me, id=yours.id, given_name="R")
        assert await outcome(waits) == "PATIENT_NOT_FOUND"


async def test_lists_of_another_clinic(front: Front) -> None:
    """Everybody with clinics is told of another one's clinic, doctor or slot, unless something of his own is there."""
    here, there, mine = await front.doctor(), await front.doctor(), await front.doctor()
    person = await front.patient()
    slot = await front.slot(there.id, soon())
    of_mine = await front.slot(mine.id, soon())
    desk: dict[str, Any] = {"clinic_ids": [here.clinic_id]}
    everybody = [
        user(front, "STAFF", **desk),
        user(front, "STAFF", "DOCTOR", doctor_id=mine.id, **desk),
        user(front, "STAFF", "PATIENT", patient_id=person.id, **desk),
    ]
    for by in everybody:
        for fields in ({"clinic_id": there.clinic_id}, {"doctor_id": there.id}, {"slot_id": slot.id}):
            error = await refusal(listed(front, by, **fields))
            assert reason_of(error) == "CLINIC_NOT_YOURS"
            assert details(error)["ErrorInfo"].metadata["clinic_id"] == there.clinic_id
        for fields in ({"clinic_id": UNKNOWN}, {"doctor_id": UNKNOWN}, {"slot_id": UNKNOWN}):
            assert await listed(front, by, **fields) == await listed(front, (), **fields) == []
        assert await listed(front, by, clinic_id=here.clinic_id) == []
    own: list[dict[str, str]] = [{"clinic_id": mine.clinic_id}, {"doctor_id": mine.id}, {"slot_id": of_mine.id}]
    for fields in own:
        found = [await outcome(listed(front, by, **fields)) for by in everybody]
        assert found == ["CLINIC_NOT_YOURS", "OK", "CLINIC_NOT_YOURS"]
    await front.book(person.id, there.id)
    for fields in ({"clinic_id": there.clinic_id}, {"doctor_id": there.id}):
        later = {**fields, "from_date": day(tomorrow())}
        assert len(await listed(front, everybody[2], **fields)) == 1
        assert await listed(front, everybody[2], **later) == []
    for by in (user(front, "PATIENT", patient_id=(await front.patient()).id), user(front, "DOCTOR", doctor_id=here.id)):
        assert await listed(front, by, slot_id=slot.id) == []


async def test_visits_elsewhere_are_not_named(front: Front) -> None:
    """A desk or doctor whose booking meets a visit out of sight is told so without its id; who may see it is told."""
    here, there = await front.doctor(), await front.doctor()
    mine, again = await front.people(2)
    slots = {doctor.id: await front.slot(doctor.id, soon()) for doctor in (here, there)}

    def request(patient_id: str) -> appointment_pb2.BookAppointmentRequest:
        return appointment_pb2.BookAppointmentRequest(patient_id=patient_id, slot_id=slots[here.id].id)

    in_slot = appointment_pb2.BookAppointmentRequest(patient_id=mine.id, slot_id=slots[there.id].id)
    away = (await front.appointments.BookAppointment(in_slot)).appointment
    for by, told in (
        (user(front, "STAFF", clinic_ids=[here.clinic_id]), False),
        (user(front, "DOCTOR", doctor_id=here.id), False),
        (user(front, "STAFF", clinic_ids=[here.clinic_id, there.clinic_id]), True),
        (user(front, "PATIENT", patient_id=mine.id), True),
        ((), True),
    ):
        said = details(await refusal(front.appointments.BookAppointment(request(mine.id), metadata=by)))
        assert said["ErrorInfo"].reason == "PATIENT_OVERLAP"
        assert said["ResourceInfo"].resource_name == (away.id if told else "")
        assert set(said["ErrorInfo"].metadata) == ({"appointment_id", "date"} if told else set())
    await front.appointments.BookAppointment(request(again.id))
    merge = patient_pb2.MergePatientsRequest(keep_patient_id=mine.id, merge_patient_id=again.id)
    for by, told in ((user(front, "STAFF", clinic_ids=[here.clinic_id]), False), ((), True)):
        said = details(await refusal(front.patients.MergePatients(merge, metadata=by)))
        assert said["ErrorInfo"].reason == "PATIENT_OVERLAP"
        assert said["ResourceInfo"].resource_name == (away.id if told else "")
        assert set(said["ErrorInfo"].metadata) == ({"appointment_id", "date"} if told else set())
