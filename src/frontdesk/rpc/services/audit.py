"""clinic.frontdesk.v1.AuditService."""

from clinic.frontdesk.v1 import audit_pb2 as pb
from frontdesk.core.audit import Audit, AuditEvent, AuditFilter
from frontdesk.rpc.convert import converter, id_or_none, instant_from, page_from, page_token
from frontdesk.rpc.pipeline import Call

to_audit_event = converter(pb.AuditEvent, AuditEvent)


class AuditServicer:
    """Translates; `Audit` decides."""

    service = pb.DESCRIPTOR.services_by_name["AuditService"]

    def __init__(self, audit: Audit) -> None:
        self._audit = audit

    async def ListAuditEvents(self, request: pb.ListAuditEventsRequest, call: Call) -> pb.ListAuditEventsResponse:
        found = await self._audit.list(
            call.caller,
            await page_from(request, call),
            AuditFilter(
                id_or_none(request.patient_id),
                request.actor or None,
                request.resource or None,
                request.method or None,
                instant_from(request, "time_from"),
                instant_from(request, "time_to"),
            ),
        )
        return pb.ListAuditEventsResponse(
            audit_events=map(to_audit_event, found.items),
            next_page_token=await page_token(request, call, found.next),
        )
