"""clinic.frontdesk.v1.AppointmentService."""

from collections.abc import Callable
from typing import Any, TypeVar

from clinic.frontdesk.v1 import appointment_pb2 as pb
from frontdesk.core.appointment import Appointment, AppointmentFilter, Appointments, Target
from frontdesk.rpc.convert import (
    DATES_AND_IDS,
    changes_from,
    converter,
    date_from,
    enum_numbers,
    id_or_none,
    intent_of,
    page_from,
    page_token,
    required_date,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call

R = TypeVar("R")

to_appointment = converter(pb.Appointment, Appointment)

_WRITABLE = writable("reason", "notes")
_STATES = {number: name for name, number in enum_numbers(pb.Appointment.State.DESCRIPTOR).items()}


class AppointmentServicer:
    """Translates; `Appointments` decides."""

    service = pb.DESCRIPTOR.services_by_name["AppointmentService"]

    def __init__(self, appointments: Appointments) -> None:
        self._appointments = appointments

    async def BookAppointment(self, request: pb.BookAppointmentRequest, call: Call) -> pb.BookAppointmentResponse:
        decision = await self._appointments.book(
            intent_of(request, call),
            request.patient_id,
            _target(request),
            reason=request.reason,
            notes=request.notes,
            validate_only=request.validate_only,
        )
        return pb.BookAppointmentResponse(
            appointment=to_appointment(decision.appointment), revision=decision.revision, replayed=decision.replayed
        )

    async def GetAppointment(self, request: pb.GetAppointmentRequest, call: Call) -> pb.GetAppointmentResponse:
        found = await self._appointments.get(request.appointment_id)
        return pb.GetAppointmentResponse(appointment=to_appointment(found))

    async def ListAppointments(self, request: pb.ListAppointmentsRequest, call: Call) -> pb.ListAppointmentsResponse:
        found = await self._appointments.list(
            page_from(request, *DATES_AND_IDS),
            AppointmentFilter(
                id_or_none(request.patient_id),
                id_or_none(request.doctor_id),
                id_or_none(request.clinic_id),
                tuple(_STATES[state] for state in request.states),
                date_from(request, "from_date"),
                date_from(request, "to_date"),
                request.order == pb.ListAppointmentsRequest.ORDER_DATE_DESC,
            ),
        )
        return pb.ListAppointmentsResponse(
            appointments=map(to_appointment, found.items), next_page_token=page_token(request, found.next)
        )

    async def UpdateAppointment(self, request: pb.UpdateAppointmentRequest, call: Call) -> pb.UpdateAppointmentResponse:
        changes = changes_from(request.appointment, request.update_mask, _WRITABLE)
        decision = await self._appointments.update(
            intent_of(request, call),
            request.appointment.id,
            version_from(request.etag),
            reason=changes.get("reason"),
            notes=changes.get("notes"),
        )
        return pb.UpdateAppointmentResponse(
            appointment=to_appointment(decision.appointment), revision=decision.revision, replayed=decision.replayed
        )

    async def RescheduleAppointment(
        self, request: pb.RescheduleAppointmentRequest, call: Call
    ) -> pb.RescheduleAppointmentResponse:
        decision = await self._appointments.reschedule(
            intent_of(request, call), request.appointment_id, _target(request), version_from(request.etag)
        )
        return pb.RescheduleAppointmentResponse(
            appointment=to_appointment(decision.appointment),
            revision=decision.revision,
            vacated_revision=decision.vacated_revision or 0,
            replayed=decision.replayed,
        )

    async def CancelAppointment(self, request: pb.CancelAppointmentRequest, call: Call) -> pb.CancelAppointmentResponse:
        return await self._change(request, call, "Cancel", pb.CancelAppointmentResponse, text=request.cancel_reason)

    async def StartAppointment(self, request: pb.StartAppointmentRequest, call: Call) -> pb.StartAppointmentResponse:
        return await self._change(request, call, "Start", pb.StartAppointmentResponse)

    async def CompleteAppointment(
        self, request: pb.CompleteAppointmentRequest, call: Call
    ) -> pb.CompleteAppointmentResponse:
        return await self._change(request, call, "Complete", pb.CompleteAppointmentResponse)

    async def MarkNoShow(self, request: pb.MarkNoShowRequest, call: Call) -> pb.MarkNoShowResponse:
        return await self._change(request, call, "NoShow", pb.MarkNoShowResponse)

    async def _change(self, request: Any, call: Call, verb: str, response: Callable[..., R], text: str = "") -> R:
        decision = await self._appointments.change(
            intent_of(request, call),
            type(request).__name__.removesuffix("Request"),
            verb,
            request.appointment_id,
            version=version_from(request.etag),
            text=text,
        )
        return response(
            appointment=to_appointment(decision.appointment), revision=decision.revision, replayed=decision.replayed
        )


def _target(request: pb.BookAppointmentRequest | pb.RescheduleAppointmentRequest) -> Target:
    if request.WhichOneof("target") == "slot_id":
        return Target(slot_id=request.slot_id.lower())
    day = request.doctor_day
    return Target(doctor_id=day.doctor_id.lower(), on=required_date(day, "date", "doctor_day."))
