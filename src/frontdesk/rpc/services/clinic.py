"""clinic.frontdesk.v1.ClinicService."""

from datetime import timedelta

from clinic.frontdesk.v1 import clinic_pb2 as pb
from frontdesk.core.clinic import Clinic, Clinics
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

to_clinic = converter(pb.Clinic, Clinic)

DEFAULT_VISIT_LENGTH = timedelta(minutes=12)

DEFAULT_CALLS = 3

DEFAULT_REMINDERS = [timedelta(hours=24)]
DEFAULT_OFFER_TTL = timedelta(minutes=30)


def _visit_length(clinic: pb.Clinic) -> dict[str, timedelta]:
    length = clinic.visit_length.ToTimedelta() if clinic.HasField("visit_length") else DEFAULT_VISIT_LENGTH
    return {"visit_length": length}


def _offer_ttl(clinic: pb.Clinic) -> dict[str, timedelta]:
    return {"offer_ttl": clinic.offer_ttl.ToTimedelta() if clinic.HasField("offer_ttl") else DEFAULT_OFFER_TTL}


_WRITABLE = writable(
    "name", "address", "city", "state", "postal_code", "country", "phone", "email", "time_zone", active=active_from,
    reminders=lambda clinic: {"reminders": [one.ToTimedelta() for one in clinic.reminders] or DEFAULT_REMINDERS},
    visit_length=_visit_length, offer_ttl=_offer_ttl,
    max_calls=lambda clinic: {"max_calls": clinic.max_calls if clinic.HasField("max_calls") else DEFAULT_CALLS},
)  # fmt: skip


class ClinicServicer:
    """Translates; `Clinics` decides."""

    service = pb.DESCRIPTOR.services_by_name["ClinicService"]

    def __init__(self, clinics: Clinics) -> None:
        self._clinics = clinics

    async def CreateClinic(self, request: pb.CreateClinicRequest, call: Call) -> pb.CreateClinicResponse:
        values = changes_from(request.clinic, EVERY_FIELD, _WRITABLE)
        change = await self._clinics.create(call.caller, values, key=key_of(request, call))
        return pb.CreateClinicResponse(clinic=to_clinic(change.result), replayed=change.replayed)

    async def GetClinic(self, request: pb.GetClinicRequest, call: Call) -> pb.GetClinicResponse:
        return pb.GetClinicResponse(clinic=to_clinic(await self._clinics.get(call.caller, request.clinic_id)))

    async def UpdateClinic(self, request: pb.UpdateClinicRequest, call: Call) -> pb.UpdateClinicResponse:
        changes = changes_from(request.clinic, request.update_mask, _WRITABLE)
        change = await self._clinics.update(
            call.caller, request.clinic.id, changes, version_from(request.etag), key=key_of(request, call)
        )
        return pb.UpdateClinicResponse(clinic=to_clinic(change.result), replayed=change.replayed)

    async def ListClinics(self, request: pb.ListClinicsRequest, call: Call) -> pb.ListClinicsResponse:
        found = await self._clinics.list(call.caller, await page_from(request, call), city=request.city)
        return pb.ListClinicsResponse(
            clinics=map(to_clinic, found.items), next_page_token=await page_token(request, call, found.next)
        )
