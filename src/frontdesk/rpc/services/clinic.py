"""clinic.frontdesk.v1.ClinicService."""

from clinic.frontdesk.v1 import clinic_pb2 as pb
from frontdesk.core.clinic import Clinic, Clinics
from frontdesk.rpc.convert import (
    EVERY_FIELD,
    IDS,
    active_from,
    changes_from,
    converter,
    intent_of,
    page_from,
    page_token,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call

to_clinic = converter(pb.Clinic, Clinic)

_WRITABLE = writable(
    "name", "address", "city", "state", "postal_code", "country", "phone", "email", "time_zone", active=active_from
)


class ClinicServicer:
    """Translates; `Clinics` decides."""

    service = pb.DESCRIPTOR.services_by_name["ClinicService"]

    def __init__(self, clinics: Clinics) -> None:
        self._clinics = clinics

    async def CreateClinic(self, request: pb.CreateClinicRequest, call: Call) -> pb.CreateClinicResponse:
        values = changes_from(request.clinic, EVERY_FIELD, _WRITABLE)
        clinic, replayed = await self._clinics.create(intent_of(request, call), values)
        return pb.CreateClinicResponse(clinic=to_clinic(clinic), replayed=replayed)

    async def GetClinic(self, request: pb.GetClinicRequest, call: Call) -> pb.GetClinicResponse:
        return pb.GetClinicResponse(clinic=to_clinic(await self._clinics.get(request.clinic_id)))

    async def UpdateClinic(self, request: pb.UpdateClinicRequest, call: Call) -> pb.UpdateClinicResponse:
        changes = changes_from(request.clinic, request.update_mask, _WRITABLE)
        clinic, replayed = await self._clinics.update(
            intent_of(request, call), request.clinic.id, changes, version_from(request.etag)
        )
        return pb.UpdateClinicResponse(clinic=to_clinic(clinic), replayed=replayed)

    async def ListClinics(self, request: pb.ListClinicsRequest, call: Call) -> pb.ListClinicsResponse:
        found = await self._clinics.list(page_from(request, *IDS), city=request.city)
        return pb.ListClinicsResponse(
            clinics=map(to_clinic, found.items), next_page_token=page_token(request, found.next)
        )
