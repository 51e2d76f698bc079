"""The services, one file each: a servicer translates between the wire and the core, and decides nothing."""

from collections.abc import Sequence

from frontdesk.core import Core
from frontdesk.live.feed import Feed
from frontdesk.rpc.pipeline import Servicer
from frontdesk.rpc.services.appointment import AppointmentServicer
from frontdesk.rpc.services.clinic import ClinicServicer
from frontdesk.rpc.services.doctor import DoctorServicer
from frontdesk.rpc.services.patient import PatientServicer
from frontdesk.rpc.services.queue import QueueServicer
from frontdesk.rpc.services.slot import SlotServicer


def servicers(core: Core, feed: Feed, *, max_watchers: int) -> Sequence[Servicer]:
    """All services of the server. Health and reflection follow from this list."""
    return (
        ClinicServicer(core.clinics),
        PatientServicer(core.patients),
        DoctorServicer(core.doctors),
        SlotServicer(core.slots),
        AppointmentServicer(core.appointments),
        QueueServicer(core.queues, feed, max_watchers=max_watchers),
    )
