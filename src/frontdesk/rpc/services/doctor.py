"""clinic.frontdesk.v1.DoctorService."""

from clinic.frontdesk.v1 import doctor_pb2 as pb
from frontdesk.core.doctor import Availability, Doctor, Doctors
from frontdesk.rpc.convert import (
    EVERY_FIELD,
    active_from,
    changes_from,
    converter,
    date_from,
    key_of,
    page_from,
    page_token,
    required_date,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call

DEFAULT_MAX_PATIENTS_PER_DAY = 10

to_doctor = converter(pb.Doctor, Doctor)
_to_availability = converter(pb.DoctorAvailability, Availability)

_WRITABLE = writable(
    "code",
    "display_name",
    "specialty",
    "license_number",
    "qualifications",
    "experience_years",
    "clinic_id",
    max_patients_per_day=lambda doctor: {
        "max_patients_per_day": doctor.max_patients_per_day or DEFAULT_MAX_PATIENTS_PER_DAY
    },
    active=active_from,
)


class DoctorServicer:
    """Translates; `Doctors` decides."""

    service = pb.DESCRIPTOR.services_by_name["DoctorService"]

    def __init__(self, doctors: Doctors) -> None:
        self._doctors = doctors

    async def CreateDoctor(self, request: pb.CreateDoctorRequest, call: Call) -> pb.CreateDoctorResponse:
        values = changes_from(request.doctor, EVERY_FIELD, _WRITABLE)
        change = await self._doctors.create(call.caller, values, key=key_of(request, call))
        return pb.CreateDoctorResponse(doctor=to_doctor(change.result), replayed=change.replayed)

    async def GetDoctor(self, request: pb.GetDoctorRequest, call: Call) -> pb.GetDoctorResponse:
        return pb.GetDoctorResponse(doctor=to_doctor(await self._doctors.get(call.caller, request.doctor_id)))

    async def UpdateDoctor(self, request: pb.UpdateDoctorRequest, call: Call) -> pb.UpdateDoctorResponse:
        changes = changes_from(request.doctor, request.update_mask, _WRITABLE)
        change = await self._doctors.update(
            call.caller, request.doctor.id, changes, version_from(request.etag), key=key_of(request, call)
        )
        return pb.UpdateDoctorResponse(doctor=to_doctor(change.result), replayed=change.replayed)

    async def ListDoctors(self, request: pb.ListDoctorsRequest, call: Call) -> pb.ListDoctorsResponse:
        found = await self._doctors.list(
            call.caller,
            await page_from(request, call),
            specialty=request.specialty,
            clinic_id=request.clinic_id,
            code=request.code,
        )
        return pb.ListDoctorsResponse(
            doctors=map(to_doctor, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def SetDoctorAvailability(
        self, request: pb.SetDoctorAvailabilityRequest, call: Call
    ) -> pb.SetDoctorAvailabilityResponse:
        wanted = Availability(
            request.doctor_id,
            required_date(request, "date"),
            request.is_present if request.HasField("is_present") else None,
            request.note,
            request.max_patients if request.HasField("max_patients") else None,
            version_from(request.etag),
        )
        change = await self._doctors.set_availability(call.caller, wanted, key=key_of(request, call))
        return pb.SetDoctorAvailabilityResponse(
            availability=_to_availability(change.result),
            affected_appointment_ids=change.affected,
            revision=change.revision,
            replayed=change.replayed,
        )

    async def ListDoctorAvailability(
        self, request: pb.ListDoctorAvailabilityRequest, call: Call
    ) -> pb.ListDoctorAvailabilityResponse:
        found = await self._doctors.list_availability(
            call.caller,
            await page_from(request, call),
            request.doctor_id,
            date_from(request, "from_date"),
            date_from(request, "to_date"),
        )
        return pb.ListDoctorAvailabilityResponse(
            availabilities=map(_to_availability, found.items),
            next_page_token=await page_token(request, call, found.next),
        )
