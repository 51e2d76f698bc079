"""clinic.frontdesk.v1.PatientService."""

from datetime import date
from typing import Any

from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import patient_pb2 as pb
from frontdesk.core.patient import Patient, Patients
from frontdesk.errors import InvalidField
from frontdesk.rpc.convert import (
    EVERY_FIELD,
    active_from,
    changes_from,
    converter,
    key_of,
    page_from,
    page_token,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call


def _emergency_contact(patient: Patient) -> pb.EmergencyContact | None:
    if not (patient.emergency_name or patient.emergency_phone):
        return None
    return pb.EmergencyContact(name=patient.emergency_name, phone=patient.emergency_phone)


def _birth_date(patient: Patient) -> Date | None:
    """As much of the date as is known; the rest of it is 0."""
    if not patient.birth_date:
        return None
    return Date(**dict(zip(("year", "month", "day"), map(int, patient.birth_date.split("-")), strict=False)))


to_patient = converter(pb.Patient, Patient, emergency_contact=_emergency_contact, birth_date=_birth_date)


def _birth_column(patient: pb.Patient) -> dict[str, str]:
    if not patient.HasField("birth_date"):
        return {"birth_date": ""}
    given = patient.birth_date
    known = [part for part in (given.year, given.month, given.day) if part]
    try:
        text = date(given.year, given.month or 1, given.day or 1).isoformat()
        if given.day and not given.month:
            raise ValueError
    except ValueError:
        raise InvalidField(("patient.birth_date", "is not a date, a year and month, or a year")) from None
    return {"birth_date": text[: (4, 7, 10)[len(known) - 1]]}


def _emergency_columns(patient: pb.Patient) -> dict[str, str]:
    return {
        "emergency_name": patient.emergency_contact.name,
        "emergency_phone": patient.emergency_contact.phone,
    }


def _insurances(patient: pb.Patient) -> dict[str, Any]:
    return {"insurances": [{"country": i.country, "number": i.number} for i in patient.insurances]}


WRITABLE = writable(
    "given_name",
    "family_name",
    "phone",
    "email",
    "blood_group",
    birth_date=_birth_column,
    gender=lambda patient: {"gender": pb.Gender.Name(patient.gender).removeprefix("GENDER_")},
    allergies=lambda patient: {"allergies": list(patient.allergies)},
    emergency_contact=_emergency_columns,
    insurances=_insurances,
    active=active_from,
) | {
    "emergency_contact.name": lambda patient: {"emergency_name": patient.emergency_contact.name},
    "emergency_contact.phone": lambda patient: {"emergency_phone": patient.emergency_contact.phone},
}


def _saw(call: Call, patient: Patient) -> None:
    """Note that the call reads the record. A change of it is in the log without that."""
    call.saw([patient.id], resource=f"patients/{patient.id}")


class PatientServicer:
    """Translates; `Patients` decides."""

    service = pb.DESCRIPTOR.services_by_name["PatientService"]

    def __init__(self, patients: Patients) -> None:
        self._patients = patients

    async def RegisterPatient(self, request: pb.RegisterPatientRequest, call: Call) -> pb.RegisterPatientResponse:
        values = changes_from(request.patient, EVERY_FIELD, WRITABLE)
        change = await self._patients.register(call.caller, values, request.default_country, key=key_of(request, call))
        if change.replayed or change.result.already_registered:
            _saw(call, change.result.patient)
        return pb.RegisterPatientResponse(
            patient=to_patient(change.result.patient),
            already_registered=change.result.already_registered,
            replayed=change.replayed,
        )

    async def GetPatient(self, request: pb.GetPatientRequest, call: Call) -> pb.GetPatientResponse:
        found = await self._patients.get(call.caller, request.patient_id)
        _saw(call, found)
        return pb.GetPatientResponse(patient=to_patient(found))

    async def UpdatePatient(self, request: pb.UpdatePatientRequest, call: Call) -> pb.UpdatePatientResponse:
        changes = changes_from(request.patient, request.update_mask, WRITABLE)
        change = await self._patients.update(
            call.caller,
            request.patient.id,
            changes,
            version_from(request.etag),
            request.default_country,
            key=key_of(request, call),
        )
        if change.replayed or not changes:
            _saw(call, change.result)
        return pb.UpdatePatientResponse(patient=to_patient(change.result), replayed=change.replayed)

    async def MergePatients(self, request: pb.MergePatientsRequest, call: Call) -> pb.MergePatientsResponse:
        change = await self._patients.merge(
            call.caller, request.keep_patient_id, request.merge_patient_id, key=key_of(request, call)
        )
        if change.replayed:
            _saw(call, change.result)
        return pb.MergePatientsResponse(patient=to_patient(change.result), replayed=change.replayed)

    async def ListPatients(self, request: pb.ListPatientsRequest, call: Call) -> pb.ListPatientsResponse:
        insurance = request.insurance
        found = await self._patients.list(
            call.caller,
            await page_from(request, call),
            phone=request.phone,
            country=request.default_country,
            name_prefix=request.name_prefix,
            insurance={"country": insurance.country, "number": insurance.number}
            if request.HasField("insurance")
            else None,
        )
        if found.items:
            call.saw([patient.id for patient in found.items])
        return pb.ListPatientsResponse(
            patients=map(to_patient, found.items), next_page_token=await page_token(request, call, found.next)
        )
