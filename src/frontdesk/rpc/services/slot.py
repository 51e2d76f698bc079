"""clinic.frontdesk.v1.SlotService."""

from clinic.frontdesk.v1 import slot_pb2 as pb
from frontdesk.core.slot import NewSlot, Slot, SlotFilter, Slots
from frontdesk.errors import InvalidField
from frontdesk.rpc.convert import (
    Columns,
    changes_from,
    converter,
    id_or_none,
    instant_from,
    key_of,
    page_from,
    page_token,
    required_instant,
    version_from,
    writable,
)
from frontdesk.rpc.pipeline import Call

to_slot = converter(
    pb.Slot, Slot, available_count=lambda slot: max(slot.capacity - slot.booked_count - slot.held_count, 0)
)


def _instant_column(name: str) -> Columns:
    return lambda slot: {name: required_instant(slot, name, "slot.")}


_WRITABLE = writable(
    capacity=lambda slot: {"capacity": slot.capacity or 1},
    start_time=_instant_column("start_time"),
    end_time=_instant_column("end_time"),
)


class SlotServicer:
    """Translates; `Slots` decides."""

    service = pb.DESCRIPTOR.services_by_name["SlotService"]

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    async def CreateSlot(self, request: pb.CreateSlotRequest, call: Call) -> pb.CreateSlotResponse:
        wanted = [_wanted(request.slot, "slot")]
        change = await self._slots.create(call.caller, wanted, path="slot", key=key_of(request, call))
        return pb.CreateSlotResponse(slot=to_slot(change.result[0]), replayed=change.replayed)

    async def BatchCreateSlots(self, request: pb.BatchCreateSlotsRequest, call: Call) -> pb.BatchCreateSlotsResponse:
        wanted = [_wanted(slot, f"slots[{index}]") for index, slot in enumerate(request.slots)]
        change = await self._slots.create(call.caller, wanted, path="slots[{}]", key=key_of(request, call))
        return pb.BatchCreateSlotsResponse(slots=map(to_slot, change.result), replayed=change.replayed)

    async def GetSlot(self, request: pb.GetSlotRequest, call: Call) -> pb.GetSlotResponse:
        return pb.GetSlotResponse(slot=to_slot(await self._slots.get(call.caller, request.slot_id)))

    async def ListSlots(self, request: pb.ListSlotsRequest, call: Call) -> pb.ListSlotsResponse:
        found = await self._slots.list(
            call.caller,
            await page_from(request, call),
            SlotFilter(
                id_or_none(request.doctor_id),
                id_or_none(request.clinic_id),
                request.specialty or None,
                instant_from(request, "start_time_from"),
                instant_from(request, "start_time_to"),
                request.available_only,
            ),
        )
        return pb.ListSlotsResponse(
            slots=map(to_slot, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def UpdateSlot(self, request: pb.UpdateSlotRequest, call: Call) -> pb.UpdateSlotResponse:
        changes = changes_from(request.slot, request.update_mask, _WRITABLE)
        change = await self._slots.update(
            call.caller, request.slot.id, changes, version_from(request.etag), key=key_of(request, call)
        )
        return pb.UpdateSlotResponse(slot=to_slot(change.result[0]), replayed=change.replayed)

    async def BlockSlots(self, request: pb.BlockSlotsRequest, call: Call) -> pb.BlockSlotsResponse:
        ids = list(request.slot_ids)
        change = await self._slots.block(call.caller, ids, request.block_reason, key=key_of(request, call))
        return pb.BlockSlotsResponse(
            slots=map(to_slot, change.result), replayed=change.replayed, affected_appointment_ids=change.affected
        )

    async def ReleaseSlots(self, request: pb.ReleaseSlotsRequest, call: Call) -> pb.ReleaseSlotsResponse:
        ids = list(request.slot_ids)
        change = await self._slots.release(call.caller, ids, key=key_of(request, call))
        return pb.ReleaseSlotsResponse(slots=map(to_slot, change.result), replayed=change.replayed)

    async def DeleteSlot(self, request: pb.DeleteSlotRequest, call: Call) -> pb.DeleteSlotResponse:
        change = await self._slots.delete(
            call.caller, request.slot_id, version_from(request.etag), key=key_of(request, call)
        )
        return pb.DeleteSlotResponse(replayed=change.replayed)


def _wanted(slot: pb.Slot, path: str) -> NewSlot:
    start, end = instant_from(slot, "start_time", f"{path}."), instant_from(slot, "end_time", f"{path}.")
    if not slot.doctor_id or start is None or end is None:
        raise InvalidField((path, "doctor_id, start_time and end_time are required"))
    if end <= start:
        raise InvalidField((f"{path}.end_time", "is not after start_time"))
    return NewSlot(slot.doctor_id, start, end, slot.capacity or 1)
