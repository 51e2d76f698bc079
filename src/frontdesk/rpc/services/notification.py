"""clinic.frontdesk.v1.NotificationService."""

from typing import Any

from clinic.frontdesk.v1 import notification_pb2 as pb
from frontdesk.core.notification import ContactPreferences, Notification, NotificationFilter, Notifications
from frontdesk.rpc.convert import (
    converter,
    enum_numbers,
    id_or_none,
    instant_from,
    key_of,
    page_from,
    page_token,
    version_from,
)
from frontdesk.rpc.pipeline import Call

_CHANNELS = enum_numbers(pb.Notification.Channel.DESCRIPTOR)
_CHANNEL_NAMES = {number: name for name, number in _CHANNELS.items()}
_STATES = {number: name for name, number in enum_numbers(pb.Notification.State.DESCRIPTOR).items()}
_KINDS = {number: name for name, number in enum_numbers(pb.Notification.Kind.DESCRIPTOR).items()}
_SKIP_REASONS = enum_numbers(pb.Notification.SkipReason.DESCRIPTOR)

to_notification = converter(
    pb.Notification, Notification, skip_reason=lambda one: _SKIP_REASONS.get(one.skip_reason, 0)
)
to_preferences = converter(
    pb.ContactPreferences,
    ContactPreferences,
    channels=lambda preferences: sorted(_CHANNELS[name] for name in preferences.channels),
)


def _wanted(request: Any) -> NotificationFilter:
    """The filters that the request has."""
    listing = isinstance(request, pb.ListNotificationsRequest)
    return NotificationFilter(
        id_or_none(request.appointment_id) if listing else None,
        id_or_none(request.patient_id) if listing else None,
        _STATES[request.state] if request.HasField("state") else None,
        _KINDS[request.kind] if listing and request.HasField("kind") else None,
        instant_from(request, "time_from"),
        instant_from(request, "time_to"),
    )


class NotificationServicer:
    """Translates; `Notifications` decides."""

    service = pb.DESCRIPTOR.services_by_name["NotificationService"]

    def __init__(self, notifications: Notifications) -> None:
        self._notifications = notifications

    async def SendConfirmation(self, request: pb.SendConfirmationRequest, call: Call) -> pb.SendConfirmationResponse:
        change = await self._notifications.send_confirmation(
            call.caller, request.appointment_id, key=key_of(request, call)
        )
        planned = list(map(to_notification, change.result))
        return pb.SendConfirmationResponse(notification=planned[0], notifications=planned, replayed=change.replayed)

    async def GetNotification(self, request: pb.GetNotificationRequest, call: Call) -> pb.GetNotificationResponse:
        found = await self._notifications.get(call.caller, request.notification_id)
        return pb.GetNotificationResponse(notification=to_notification(found))

    async def ListNotifications(self, request: pb.ListNotificationsRequest, call: Call) -> pb.ListNotificationsResponse:
        found = await self._notifications.list(call.caller, await page_from(request, call), _wanted(request))
        return pb.ListNotificationsResponse(
            notifications=map(to_notification, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def RedriveNotifications(
        self, request: pb.RedriveNotificationsRequest, call: Call
    ) -> pb.RedriveNotificationsResponse:
        wanted = _wanted(request)
        change = await self._notifications.redrive(call.caller, list(request.ids), wanted, key=key_of(request, call))
        return pb.RedriveNotificationsResponse(count=change.result, replayed=change.replayed)

    async def SetContactPreferences(
        self, request: pb.SetContactPreferencesRequest, call: Call
    ) -> pb.SetContactPreferencesResponse:
        change = await self._notifications.set_preferences(
            call.caller,
            request.patient_id,
            [_CHANNEL_NAMES[number] for number in request.channels],
            request.language,
            request.reminders if request.HasField("reminders") else True,
            version_from(request.etag),
            key=key_of(request, call),
        )
        return pb.SetContactPreferencesResponse(
            contact_preferences=to_preferences(change.result), replayed=change.replayed
        )

    async def GetContactPreferences(
        self, request: pb.GetContactPreferencesRequest, call: Call
    ) -> pb.GetContactPreferencesResponse:
        found = await self._notifications.preferences(call.caller, request.patient_id)
        return pb.GetContactPreferencesResponse(contact_preferences=to_preferences(found))
