"""Clients of the service: `FrontdeskClient` for asyncio, `SyncFrontdeskClient` for everybody else.

    async with FrontdeskClient("127.0.0.1:50051", caller="kiosk") as desk:
        answer = await desk.appointments.BookAppointment(request)
        async for queue in desk.watch_queue(doctor_id):
            ...

Both offer the generated stubs of every service (`clinics`, `patients`, `doctors`, `slots`, `appointments`, `queues`,
`events`, `auth`, `access`) and add what every careful caller would write: a deadline, the caller's name, credentials
(`api_key`, or a `Login` that is refreshed in time), gRPC's retries (`SERVICE_CONFIG`), an idempotency key if the
request has none, so that no retry acts twice, `FrontdeskError` for each refusal, and watches that go on after
interruptions.
"""

from frontdesk.client.aio import FrontdeskClient
from frontdesk.client.channel import CHANNEL_OPTIONS, SERVICE_CONFIG
from frontdesk.client.defaults import DEFAULT_TIMEOUT
from frontdesk.client.errors import FieldViolation, FrontdeskError
from frontdesk.client.login import Login
from frontdesk.client.sync import SyncFrontdeskClient
from frontdesk.client.watch import HEARTBEAT_SECONDS, OnConnection, Update

__all__ = [
    "CHANNEL_OPTIONS",
    "DEFAULT_TIMEOUT",
    "HEARTBEAT_SECONDS",
    "SERVICE_CONFIG",
    "FieldViolation",
    "FrontdeskClient",
    "FrontdeskError",
    "Login",
    "OnConnection",
    "SyncFrontdeskClient",
    "Update",
]
