"""The clinic's rules, one file a noun. Knows nothing of gRPC."""

from frontdesk.core.appointment import Appointments
from frontdesk.core.clinic import Clinics
from frontdesk.core.decision import Changed
from frontdesk.core.doctor import Doctors
from frontdesk.core.patient import Patients
from frontdesk.core.queue import Queues
from frontdesk.core.slot import Slots
from frontdesk.db.database import Database


class Core:
    """Everything that the services call, on one database."""

    def __init__(self, db: Database, changed: Changed) -> None:
        self.clinics = Clinics(db)
        self.patients = Patients(db)
        self.doctors = Doctors(db, changed)
        self.slots = Slots(db)
        self.appointments = Appointments(db, changed)
        self.queues = Queues(db, self.appointments)
