"""clinic.frontdesk.v1.AppointmentService."""

from collections.abc import Callable
from typing import Any, TypeVar

from clinic.frontdesk.v1 import appointment_pb2 as pb
from frontdesk.core.appointment import Appointment, AppointmentFilter, Appointments
from frontdesk.core.decision import Target
from frontdesk.core.hold import DEFAULT_TTL, Hold, Holds
from frontdesk.db.change import Change
from frontdesk.rpc.convert import (
    changes_from,
    converter,
    date_from,
    date_to,
    enum_numbers,
    id_or_none,
    key_of,
    length_from,
    page_from,
    page_token,
    required_date,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call

R = TypeVar("R")

to_appointment = converter(pb.Appointment, Appointment)
to_hold = converter(pb.Hold, Hold, doctor_day=lambda hold: None if hold.slot_id else _doctor_day(hold))

_WRITABLE = writable("reason", "notes")
_STATES = {number: name for name, number in enum_numbers(pb.Appointment.State.DESCRIPTOR).items()}


class AppointmentServicer:
    """Translates; `Appointments` decides."""

    service = pb.DESCRIPTOR.services_by_name["AppointmentService"]

    def __init__(self, appointments: Appointments, holds: Holds) -> None:
        self._appointments = appointments
        self._holds = holds

    async def BookAppointment(self, request: pb.BookAppointmentRequest, call: Call) -> pb.BookAppointmentResponse:
        change = await self._appointments.book(
            call.caller,
            request.patient_id,
            _target(request),
            reason=request.reason,
            notes=request.notes,
            validate_only=request.validate_only,
            hold_id=id_or_none(request.hold_id),
            key=key_of(request, call),
        )
        return _answer(change, call, pb.BookAppointmentResponse)

    async def HoldPlace(self, request: pb.HoldPlaceRequest, call: Call) -> pb.HoldPlaceResponse:
        change = await self._holds.place(
            call.caller,
            id_or_none(request.patient_id),
            _target(request),
            length_from(request, "ttl") or DEFAULT_TTL,
            key=key_of(request, call),
        )
        return pb.HoldPlaceResponse(hold=to_hold(change.result), replayed=change.replayed)

    async def ReleaseHold(self, request: pb.ReleaseHoldRequest, call: Call) -> pb.ReleaseHoldResponse:
        change = await self._holds.release(call.caller, request.hold_id, key=key_of(request, call))
        return pb.ReleaseHoldResponse(replayed=change.replayed)

    async def GetAppointment(self, request: pb.GetAppointmentRequest, call: Call) -> pb.GetAppointmentResponse:
        found = await self._appointments.get(call.caller, request.appointment_id)
        saw(call, found)
        return pb.GetAppointmentResponse(appointment=to_appointment(found))

    async def ListAppointments(self, request: pb.ListAppointmentsRequest, call: Call) -> pb.ListAppointmentsResponse:
        found = await self._appointments.list(
            call.caller,
            await page_from(request, call),
            AppointmentFilter(
                id_or_none(request.patient_id),
                id_or_none(request.doctor_id),
                id_or_none(request.clinic_id),
                id_or_none(request.slot_id),
                tuple(_STATES[state] for state in request.states),
                date_from(request, "from_date"),
                date_from(request, "to_date"),
                request.order == pb.ListAppointmentsRequest.ORDER_DATE_DESC,
            ),
        )
        if found.items:
            call.saw([appointment.patient_id for appointment in found.items])
        return pb.ListAppointmentsResponse(
            appointments=map(to_appointment, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def UpdateAppointment(self, request: pb.UpdateAppointmentRequest, call: Call) -> pb.UpdateAppointmentResponse:
        changes = changes_from(request.appointment, request.update_mask, _WRITABLE)
        change = await self._appointments.update(
            call.caller,
            request.appointment.id,
            version_from(request.etag),
            reason=changes.get("reason"),
            notes=changes.get("notes"),
            key=key_of(request, call),
        )
        return _answer(change, call, pb.UpdateAppointmentResponse)

    async def RescheduleAppointment(
        self, request: pb.RescheduleAppointmentRequest, call: Call
    ) -> pb.RescheduleAppointmentResponse:
        change = await self._appointments.reschedule(
            call.caller,
            request.appointment_id,
            _target(request),
            version_from(request.etag),
            hold_id=id_or_none(request.hold_id),
            key=key_of(request, call),
        )
        return _answer(change, call, pb.RescheduleAppointmentResponse, vacated_revision=change.vacated_revision)

    async def CancelAppointment(self, request: pb.CancelAppointmentRequest, call: Call) -> pb.CancelAppointmentResponse:
        return await self._change(request, call, pb.CancelAppointmentResponse, reason=request.cancel_reason)

    async def StartAppointment(self, request: pb.StartAppointmentRequest, call: Call) -> pb.StartAppointmentResponse:
        return await self._change(request, call, pb.StartAppointmentResponse)

    async def CompleteAppointment(
        self, request: pb.CompleteAppointmentRequest, call: Call
    ) -> pb.CompleteAppointmentResponse:
        return await self._change(request, call, pb.CompleteAppointmentResponse)

    async def MarkNoShow(self, request: pb.MarkNoShowRequest, call: Call) -> pb.MarkNoShowResponse:
        return await self._change(request, call, pb.MarkNoShowResponse)

    async def UndoTransition(self, request: pb.UndoTransitionRequest, call: Call) -> pb.UndoTransitionResponse:
        change = await self._appointments.undo(
            call.caller, request.appointment_id, version_from(request.etag), key=key_of(request, call)
        )
        return _answer(change, call, pb.UndoTransitionResponse)

    async def _change(self, request: Any, call: Call, response: Callable[..., R], reason: str = "") -> R:
        change = await self._appointments.change(
            call.caller, request.appointment_id, version_from(request.etag), reason=reason, key=key_of(request, call)
        )
        return _answer(change, call, response)


def saw(call: Call, found: Appointment) -> None:
    """Note that the call reads an appointment."""
    call.saw(
        [found.patient_id],
        resource=f"appointments/{found.id}",
        clinic_id=found.clinic_id,
        doctor_id=found.doctor_id,
        appointment_id=found.id,
        date=found.date,
    )


def _answer(change: Change[Appointment], call: Call, response: Callable[..., R], **more: Any) -> R:
    if change.replayed:
        # A change is in the log; a replay shows it once more.
        saw(call, change.result)
    return response(
        appointment=to_appointment(change.result), revision=change.revision, replayed=change.replayed, **more
    )


def _doctor_day(hold: Hold) -> pb.DoctorDay:
    return pb.DoctorDay(doctor_id=hold.doctor_id, date=date_to(hold.date))


def _target(request: pb.BookAppointmentRequest | pb.RescheduleAppointmentRequest | pb.HoldPlaceRequest) -> Target:
    if request.WhichOneof("target") == "slot_id":
        return Target(slot_id=request.slot_id)
    day = request.doctor_day
    return Target(doctor_id=day.doctor_id, on=required_date(day, "date", "doctor_day."))
