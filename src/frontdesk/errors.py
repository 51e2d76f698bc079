"""What the clinic may refuse, and what the server may have to say about itself. Knows nothing of gRPC.

A refusal carries ids, dates and states, never a name or a phone: its text and metadata reach logs and other services.
"""

from typing import ClassVar

REFUSALS: dict[str, type["Refused"]] = {}
"""Every refusal by its reason: what the SQL functions answer in `outcome`."""


class Refused(Exception):
    """The call was understood and nothing was changed."""

    reason: ClassVar[str] = ""
    resource: ClassVar[str] = ""
    """What kind of thing `subject` is the id of."""

    def __init_subclass__(cls) -> None:
        if cls.reason:
            REFUSALS[cls.reason] = cls

    def __init__(self, subject: str | None = None, detail: str | None = None) -> None:
        super().__init__(self.__doc__)
        self.subject = subject
        self.detail = detail

    @property
    def metadata(self) -> dict[str, str]:
        """What a program may want to know, by name; ids, dates and states only."""
        found = {}
        if self.subject:
            found[f"{self.resource}_id"] = self.subject
        if self.detail:
            found[self.detail_name] = self.detail
        return found

    detail_name: ClassVar[str] = "date"


class InvalidField(Refused):
    """A field of the request cannot be used."""

    reason = "INVALID_FIELD"

    def __init__(self, *violations: tuple[str, str]) -> None:
        super().__init__()
        self.violations = violations
        """Pairs of a field's path and what is wrong with it; the text never repeats the value."""


class IdempotencyKeyReused(Refused):
    """The idempotency key was used for another request."""

    reason = "IDEMPOTENCY_KEY_REUSED"


class NotFound(Refused):
    """There is no such resource."""


class ClinicNotFound(NotFound):
    """There is no such clinic."""

    reason = "CLINIC_NOT_FOUND"
    resource = "clinic"


class PatientNotFound(NotFound):
    """There is no such patient."""

    reason = "PATIENT_NOT_FOUND"
    resource = "patient"


class DoctorNotFound(NotFound):
    """There is no such doctor."""

    reason = "DOCTOR_NOT_FOUND"
    resource = "doctor"


class SlotNotFound(NotFound):
    """There is no such slot."""

    reason = "SLOT_NOT_FOUND"
    resource = "slot"


class AppointmentNotFound(NotFound):
    """There is no such appointment."""

    reason = "APPOINTMENT_NOT_FOUND"
    resource = "appointment"


class Precondition(Refused):
    """The clinic's state does not allow it."""


class DayFull(Precondition):
    """Every place of this doctor's day is taken."""

    reason = "DAY_FULL"
    resource = "doctor"


class SlotFull(Precondition):
    """Every place of this slot is taken."""

    reason = "SLOT_FULL"
    resource = "slot"


class SlotBlocked(Precondition):
    """The slot is blocked."""

    reason = "SLOT_BLOCKED"
    resource = "slot"


class DoctorAbsent(Precondition):
    """The doctor is not there on that date."""

    reason = "DOCTOR_ABSENT"
    resource = "doctor"


class DateInPast(Precondition):
    """The date is over in the clinic's time zone."""

    reason = "DATE_IN_PAST"
    resource = "doctor"


class SlotInPast(Precondition):
    """The slot has begun."""

    reason = "SLOT_IN_PAST"
    resource = "slot"


class NotAppointmentDate(Precondition):
    """Today, in the clinic's time zone, is not the date of the appointment."""

    reason = "NOT_APPOINTMENT_DATE"
    resource = "appointment"


class TooEarly(Precondition):
    """The appointment's date or start time has not come."""

    reason = "TOO_EARLY"
    resource = "appointment"


class PatientMismatch(Precondition):
    """The appointment is another patient's."""

    reason = "PATIENT_MISMATCH"
    resource = "appointment"


class InvalidTransition(Precondition):
    """The appointment's present state does not allow it."""

    reason = "INVALID_TRANSITION"
    resource = "appointment"
    detail_name = "state"


class QueueEmpty(Precondition):
    """Nobody waits in this doctor's line."""

    reason = "QUEUE_EMPTY"
    resource = "doctor"


class SlotHasBookings(Precondition):
    """The slot holds live bookings."""

    reason = "SLOT_HAS_BOOKINGS"
    resource = "slot"


class PatientInactive(Precondition):
    """The patient's record is inactive."""

    reason = "PATIENT_INACTIVE"
    resource = "patient"


class DoctorInactive(Precondition):
    """The doctor's record is inactive."""

    reason = "DOCTOR_INACTIVE"
    resource = "doctor"


class ClinicInactive(Precondition):
    """The clinic of the doctor is inactive."""

    reason = "CLINIC_INACTIVE"
    resource = "doctor"


class AlreadyExists(Refused):
    """What is asked for exists, or stands in the way."""


class DuplicateBooking(AlreadyExists):
    """The patient has a live appointment on that doctor's day."""

    reason = "DUPLICATE_BOOKING"
    resource = "appointment"


class PatientOverlap(AlreadyExists):
    """The patient has a live appointment at that time."""

    reason = "PATIENT_OVERLAP"
    resource = "appointment"


class AlreadyCheckedIn(AlreadyExists):
    """The patient is checked in already."""

    reason = "ALREADY_CHECKED_IN"
    resource = "appointment"


class SlotOverlap(AlreadyExists):
    """The doctor has a slot at that time."""

    reason = "SLOT_OVERLAP"
    resource = "slot"
    detail_name = "index"


class CodeTaken(AlreadyExists):
    """Another doctor has that code."""

    reason = "CODE_TAKEN"
    resource = "doctor"


class LicenseTaken(AlreadyExists):
    """Another doctor has that licence number."""

    reason = "LICENSE_TAKEN"
    resource = "doctor"


class PatientExists(AlreadyExists):
    """Another record is the same person."""

    reason = "PATIENT_EXISTS"
    resource = "patient"


class EtagMismatch(Refused):
    """The resource has changed since its etag was read."""

    reason = "ETAG_MISMATCH"
    resource = "resource"


class Conflict(Refused):
    """The database gave up on a conflict with other work, several times."""

    reason = "CONFLICT"


class Unavailable(Refused):
    """The service cannot work at present."""


class DatabaseUnavailable(Unavailable):
    """The database is away, read-only or has no connection free."""

    reason = "DATABASE_UNAVAILABLE"


class Overloaded(Unavailable):
    """The server works on as many calls as it may."""

    reason = "OVERLOADED"


class Draining(Unavailable):
    """The server is being stopped."""

    reason = "DRAINING"


class Exhausted(Refused):
    """A limit of the server is reached."""


class TooManyWatchers(Exhausted):
    """The server streams to as many watchers as it may."""

    reason = "TOO_MANY_WATCHERS"


class WatcherTooSlow(Exhausted):
    """The watcher has not read for too long."""

    reason = "WATCHER_TOO_SLOW"


class DeadlineExceeded(Refused):
    """The caller's deadline or the server's own limit has passed; the change may or may not have been made."""

    reason = "DEADLINE_EXCEEDED"
