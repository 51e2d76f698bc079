"""The services, one file each: a servicer translates between the wire and the core, and decides nothing."""

from collections.abc import Sequence

from frontdesk.core.access import ApiKeys, Users
from frontdesk.core.appointment import Appointments
from frontdesk.core.audit import Audit
from frontdesk.core.auth import Auth
from frontdesk.core.clinic import Clinics
from frontdesk.core.doctor import Doctors
from frontdesk.core.event import Events
from frontdesk.core.hold import Holds
from frontdesk.core.leave import Leaves
from frontdesk.core.notification import EMAIL, Notifications
from frontdesk.core.password import Passwords
from frontdesk.core.patient import Patients
from frontdesk.core.queue import Queues
from frontdesk.core.schedule import Schedules
from frontdesk.core.slot import Slots
from frontdesk.core.token import Tokens
from frontdesk.core.user_session import Sessions
from frontdesk.core.waitlist import Waitlist
from frontdesk.db.database import Database
from frontdesk.live.feed import Feed
from frontdesk.live.tail import Tail
from frontdesk.live.watcher import Watchers
from frontdesk.rpc.pipeline import Servicer
from frontdesk.rpc.services.access import AccessServicer
from frontdesk.rpc.services.appointment import AppointmentServicer
from frontdesk.rpc.services.audit import AuditServicer
from frontdesk.rpc.services.auth import AuthServicer
from frontdesk.rpc.services.clinic import ClinicServicer
from frontdesk.rpc.services.doctor import DoctorServicer
from frontdesk.rpc.services.event import EventServicer
from frontdesk.rpc.services.notification import NotificationServicer
from frontdesk.rpc.services.patient import PatientServicer
from frontdesk.rpc.services.queue import QueueServicer
from frontdesk.rpc.services.schedule import ScheduleServicer
from frontdesk.rpc.services.slot import SlotServicer
from frontdesk.rpc.services.waitlist import WaitlistServicer


def servicers(
    db: Database,
    feed: Feed,
    events: Events,
    tail: Tail,
    watchers: Watchers,
    passwords: Passwords,
    tokens: Tokens,
    *,
    channels: Sequence[str],
) -> Sequence[Servicer]:
    """All services of the server, each with its part of the core. Health and reflection follow from this list.

    `channels` are those on which patients are told.
    """
    appointments = Appointments(db, feed.changed)
    patients = Patients(db, feed.changed)
    sessions = Sessions(db, tokens)
    return (
        ClinicServicer(Clinics(db)),
        PatientServicer(patients),
        DoctorServicer(Doctors(db, feed.changed)),
        ScheduleServicer(Schedules(db), Leaves(db, feed.changed)),
        SlotServicer(Slots(db)),
        AppointmentServicer(appointments, Holds(db)),
        QueueServicer(Queues(db, appointments, feed.paces), feed, watchers),
        EventServicer(events, tail, watchers),
        WaitlistServicer(Waitlist(db, appointments)),
        AuthServicer(Auth(db, passwords, sessions, patients, mails=EMAIL in channels), sessions),
        AccessServicer(Users(db, passwords), ApiKeys(db)),
        AuditServicer(Audit(db)),
        NotificationServicer(Notifications(db, channels)),
    )
