"""clinic.frontdesk.v1.WaitlistService."""

from collections.abc import Callable
from typing import TypeVar

from google.type import timeofday_pb2

from clinic.frontdesk.v1 import appointment_pb2
from clinic.frontdesk.v1 import waitlist_pb2 as pb
from frontdesk.core.decision import Target
from frontdesk.core.formats import require_order
from frontdesk.core.waitlist import Offer, Waitlist, WaitlistEntry, WaitlistFilter, Wish
from frontdesk.db.change import Change
from frontdesk.errors import InvalidField
from frontdesk.rpc.convert import (
    converter,
    date_to,
    enum_numbers,
    id_or_none,
    key_of,
    length_from,
    minute_from,
    minute_to,
    page_from,
    page_token,
    required_date,
)
from frontdesk.rpc.pipeline import Call
from frontdesk.rpc.services.appointment import saw as saw_appointment
from frontdesk.rpc.services.appointment import to_appointment
from frontdesk.rpc.services.queue import priority_from

R = TypeVar("R")

MOST_DAYS = 366
_STATES = {number: name for name, number in enum_numbers(pb.WaitlistEntry.State.DESCRIPTOR).items()}


def _minute(minute: int | None) -> timeofday_pb2.TimeOfDay | None:
    return None if minute is None else minute_to(minute)


def _specialty(entry: WaitlistEntry) -> pb.Specialty | None:
    return None if entry.doctor_id else pb.Specialty(clinic_id=entry.clinic_id, specialty=entry.specialty)


def _offer(entry: WaitlistEntry) -> pb.Offer | None:
    return None if entry.offer is None else _to_offer(entry.offer)


def _doctor_day(offer: Offer) -> appointment_pb2.DoctorDay | None:
    return None if offer.slot_id else appointment_pb2.DoctorDay(doctor_id=offer.doctor_id, date=date_to(offer.date))


_to_offer = converter(pb.Offer, Offer, doctor_day=_doctor_day)
to_entry = converter(
    pb.WaitlistEntry,
    WaitlistEntry,
    specialty=_specialty,
    earliest=lambda entry: _minute(entry.earliest),
    latest=lambda entry: _minute(entry.latest),
    weekdays=lambda entry: entry.weekdays,
    offer=_offer,
)


class WaitlistServicer:
    """Translates; `Waitlist` decides."""

    service = pb.DESCRIPTOR.services_by_name["WaitlistService"]

    def __init__(self, waitlist: Waitlist) -> None:
        self._waitlist = waitlist

    async def JoinWaitlist(self, request: pb.JoinWaitlistRequest, call: Call) -> pb.JoinWaitlistResponse:
        change = await self._waitlist.join(
            call.caller,
            request.patient_id,
            _wish(request),
            priority_from(request) or "NORMAL",
            key=key_of(request, call),
        )
        return _answer(change, call, pb.JoinWaitlistResponse)

    async def GetWaitlistEntry(self, request: pb.GetWaitlistEntryRequest, call: Call) -> pb.GetWaitlistEntryResponse:
        found = await self._waitlist.get(call.caller, request.entry_id)
        _saw(call, found)
        return pb.GetWaitlistEntryResponse(entry=to_entry(found))

    async def ListWaitlist(self, request: pb.ListWaitlistRequest, call: Call) -> pb.ListWaitlistResponse:
        found = await self._waitlist.list(
            call.caller,
            await page_from(request, call),
            WaitlistFilter(
                id_or_none(request.patient_id),
                id_or_none(request.doctor_id),
                id_or_none(request.clinic_id),
                tuple(_STATES[state] for state in request.states),
            ),
        )
        if found.items:
            call.saw([entry.patient_id for entry in found.items])
        return pb.ListWaitlistResponse(
            entries=map(to_entry, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def LeaveWaitlist(self, request: pb.LeaveWaitlistRequest, call: Call) -> pb.LeaveWaitlistResponse:
        change = await self._waitlist.leave(call.caller, request.entry_id, key=key_of(request, call))
        return _answer(change, call, pb.LeaveWaitlistResponse)

    async def OfferPlace(self, request: pb.OfferPlaceRequest, call: Call) -> pb.OfferPlaceResponse:
        day = request.doctor_day
        target = (
            Target(slot_id=request.slot_id)
            if request.WhichOneof("target") == "slot_id"
            else Target(doctor_id=day.doctor_id, on=required_date(day, "date", "doctor_day."))
        )
        change = await self._waitlist.offer(
            call.caller, request.entry_id, target, length_from(request, "ttl"), key=key_of(request, call)
        )
        return _answer(change, call, pb.OfferPlaceResponse)

    async def AcceptOffer(self, request: pb.AcceptOfferRequest, call: Call) -> pb.AcceptOfferResponse:
        entry, change = await self._waitlist.accept(call.caller, request.entry_id, key=key_of(request, call))
        if change.replayed:
            saw_appointment(call, change.result)
        return pb.AcceptOfferResponse(
            entry=to_entry(entry),
            appointment=to_appointment(change.result),
            revision=change.revision,
            vacated_revision=change.vacated_revision,
            replayed=change.replayed,
        )

    async def DeclineOffer(self, request: pb.DeclineOfferRequest, call: Call) -> pb.DeclineOfferResponse:
        change = await self._waitlist.decline(
            call.caller, request.entry_id, leave=request.leave, key=key_of(request, call)
        )
        return _answer(change, call, pb.DeclineOfferResponse)


def _saw(call: Call, entry: WaitlistEntry) -> None:
    call.saw(
        [entry.patient_id],
        resource=f"waitlistEntries/{entry.id}",
        clinic_id=entry.clinic_id,
        doctor_id=entry.doctor_id,
    )


def _answer(change: Change[WaitlistEntry], call: Call, response: Callable[..., R]) -> R:
    if change.replayed:
        # A change is in the log; a replay shows it once more.
        _saw(call, change.result)
    return response(entry=to_entry(change.result), replayed=change.replayed)


def _wish(request: pb.JoinWaitlistRequest) -> Wish:
    """Raises InvalidField."""
    from_date, to_date = required_date(request, "from_date"), required_date(request, "to_date")
    require_order(from_date, to_date)
    if (to_date - from_date).days >= MOST_DAYS:
        raise InvalidField(("to_date", f"at most {MOST_DAYS} days after from_date"))
    earliest, latest = (
        minute_from(request, name) if request.HasField(name) else None for name in ("earliest", "latest")
    )
    if (latest if latest is not None else 1440) <= (earliest or 0):
        raise InvalidField(("latest", "is not after earliest"))
    for_doctor = request.WhichOneof("target") == "doctor_id"
    return Wish(
        request.doctor_id if for_doctor else None,
        None if for_doctor else request.specialty.clinic_id,
        "" if for_doctor else request.specialty.specialty,
        from_date,
        to_date,
        sorted(request.weekdays),
        earliest,
        latest,
        id_or_none(request.appointment_id),
    )
