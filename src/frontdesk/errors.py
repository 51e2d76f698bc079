"""All refusals: by the rules of the clinic, and by the limits of the server. Nothing here depends on gRPC.

The docstring of a refusal with a reason is the status text that callers read. Text and metadata reach logs and other
services, so they hold ids, dates and states, never a name or a phone.
"""

from collections.abc import Mapping
from typing import ClassVar

REFUSALS: dict[str, type["Refused"]] = {}
"""All refusals by reason. The SQL functions answer a reason in `outcome`."""


class Refused(Exception):
    """The service refused the call. It changed nothing, except perhaps before DeadlineExceeded."""

    reason: ClassVar[str] = ""
    resource: ClassVar[str] = ""
    """The kind of resource that `subject` is the id of."""

    def __init_subclass__(cls) -> None:
        if cls.reason:
            REFUSALS[cls.reason] = cls

    def __init__(
        self,
        subject: str | None = None,
        details: Mapping[str, object] | None = None,
        *,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(self.__doc__)
        self.subject = subject
        self.retry_after = retry_after
        """Seconds until a retry can succeed, if that is known."""
        self.details = details or {}
        """More metadata by name: dates, states, counts."""

    @property
    def metadata(self) -> dict[str, str]:
        """Details for programs, by name: ids, dates and states only."""
        found = {name: str(value) for name, value in self.details.items() if value is not None}
        if self.subject and self.resource:
            found[f"{self.resource}_id"] = self.subject
        return found


class InvalidField(Refused):
    """A field of the request is not valid."""

    reason = "INVALID_FIELD"

    def __init__(self, *violations: tuple[str, str]) -> None:
        super().__init__()
        self.violations = violations
        """Pairs of a field's path and the rule that it breaks. The text never repeats the value."""


class IdempotencyKeyReused(Refused):
    """The idempotency key was already used for a different request."""

    reason = "IDEMPOTENCY_KEY_REUSED"


class NotFound(Refused):
    """The resource does not exist."""


class ClinicNotFound(NotFound):
    """The clinic does not exist."""

    reason = "CLINIC_NOT_FOUND"
    resource = "clinic"


class PatientNotFound(NotFound):
    """The patient does not exist."""

    reason = "PATIENT_NOT_FOUND"
    resource = "patient"


class DoctorNotFound(NotFound):
    """The doctor does not exist."""

    reason = "DOCTOR_NOT_FOUND"
    resource = "doctor"


class SlotNotFound(NotFound):
    """The slot does not exist."""

    reason = "SLOT_NOT_FOUND"
    resource = "slot"


class ScheduleExceptionNotFound(NotFound):
    """The doctor has no schedule exception on this date."""

    reason = "SCHEDULE_EXCEPTION_NOT_FOUND"
    resource = "doctor"


class AppointmentNotFound(NotFound):
    """The appointment does not exist."""

    reason = "APPOINTMENT_NOT_FOUND"
    resource = "appointment"


class HoldNotFound(NotFound):
    """The hold does not exist."""

    reason = "HOLD_NOT_FOUND"
    resource = "hold"


class WaitlistEntryNotFound(NotFound):
    """The entry of the waiting list does not exist."""

    reason = "WAITLIST_ENTRY_NOT_FOUND"
    resource = "waitlist_entry"


class LeaveNotFound(NotFound):
    """The leave does not exist."""

    reason = "LEAVE_NOT_FOUND"
    resource = "leave"


class NotificationNotFound(NotFound):
    """The notification does not exist."""

    reason = "NOTIFICATION_NOT_FOUND"
    resource = "notification"


class ApiKeyNotFound(NotFound):
    """The API key does not exist."""

    reason = "API_KEY_NOT_FOUND"
    resource = "api_key"


class UserNotFound(NotFound):
    """The user does not exist."""

    reason = "USER_NOT_FOUND"
    resource = "user"


class Precondition(Refused):
    """The present state of a resource does not allow the change."""


class NoChannel(Precondition):
    """No channel is configured on which patients are told."""

    reason = "NO_CHANNEL"


class DayFull(Precondition):
    """This doctor has no free place on this date."""

    reason = "DAY_FULL"
    resource = "doctor"


class SlotFull(Precondition):
    """This slot has no free place."""

    reason = "SLOT_FULL"
    resource = "slot"


class SlotBlocked(Precondition):
    """This slot is blocked."""

    reason = "SLOT_BLOCKED"
    resource = "slot"


class DoctorAbsent(Precondition):
    """The doctor is absent on this date."""

    reason = "DOCTOR_ABSENT"
    resource = "doctor"


class DateInPast(Precondition):
    """This date is in the past in the clinic's time zone."""

    reason = "DATE_IN_PAST"
    resource = "doctor"


class SlotInPast(Precondition):
    """The slot's start time is not in the future."""

    reason = "SLOT_IN_PAST"
    resource = "slot"


class NotAppointmentDate(Precondition):
    """The appointment is not on today's date in the clinic's time zone."""

    reason = "NOT_APPOINTMENT_DATE"
    resource = "appointment"


class TooEarly(Precondition):
    """The appointment's date or start time has not come yet."""

    reason = "TOO_EARLY"
    resource = "appointment"


class PatientMismatch(Precondition):
    """The appointment belongs to another patient."""

    reason = "PATIENT_MISMATCH"
    resource = "appointment"


class InvalidTransition(Precondition):
    """The appointment's present state does not allow this change."""

    reason = "INVALID_TRANSITION"
    resource = "appointment"


class QueueEmpty(Precondition):
    """Nobody is waiting in this doctor's queue."""

    reason = "QUEUE_EMPTY"
    resource = "doctor"


class SlotHasBookings(Precondition):
    """Appointments or holds take places in this slot."""

    reason = "SLOT_HAS_BOOKINGS"
    resource = "slot"


class HoldMismatch(Precondition):
    """The hold is of another place or patient."""

    reason = "HOLD_MISMATCH"
    resource = "hold"


class HoldExpired(Precondition):
    """The hold has expired, was used or was released."""

    reason = "HOLD_EXPIRED"
    resource = "hold"


class NoOffer(Precondition):
    """No place is offered to the patient."""

    reason = "NO_OFFER"
    resource = "waitlist_entry"


class OfferExpired(Precondition):
    """The offer has run out."""

    reason = "OFFER_EXPIRED"
    resource = "waitlist_entry"


class TooLate(Precondition):
    """The visit begins too soon for an offer."""

    reason = "TOO_LATE"


class LeaveState(Precondition):
    """The leave has already been cancelled."""

    reason = "LEAVE_STATE"
    resource = "leave"


class PatientInactive(Precondition):
    """The patient's record is inactive."""

    reason = "PATIENT_INACTIVE"
    resource = "patient"


class DoctorInactive(Precondition):
    """The doctor's record is inactive."""

    reason = "DOCTOR_INACTIVE"
    resource = "doctor"


class ClinicInactive(Precondition):
    """The doctor's clinic is inactive."""

    reason = "CLINIC_INACTIVE"
    resource = "doctor"


class CallLimitReached(Precondition):
    """The patient has been called as often as the clinic allows."""

    reason = "CALL_LIMIT_REACHED"
    resource = "appointment"


class NothingToUndo(Precondition):
    """The appointment's last change cannot be taken back, or no longer."""

    reason = "NOTHING_TO_UNDO"
    resource = "appointment"


class NotToday(Precondition):
    """The appointment is not on today's date in the clinic's time zone, so nobody takes over its patient."""

    reason = "NOT_TODAY"
    resource = "appointment"


class OtherClinic(Precondition):
    """This doctor works at another clinic."""

    reason = "OTHER_CLINIC"
    resource = "doctor"


class TimeZoneInUse(Precondition):
    """Slots or live appointments ahead depend on the clinic's time zone."""

    reason = "TIME_ZONE_IN_USE"
    resource = "clinic"


class SamePatient(Precondition):
    """Both ids stand for the same patient."""

    reason = "SAME_PATIENT"
    resource = "patient"


class LastAdmin(Precondition):
    """Nobody else is an active administrator of all clinics."""

    reason = "LAST_ADMIN"
    resource = "user"


class SecondFactorState(Precondition):
    """The user's second factor is not in the state for this."""

    reason = "SECOND_FACTOR_STATE"
    resource = "user"


class AlreadyExists(Refused):
    """An existing resource conflicts with the request."""


class DuplicateBooking(AlreadyExists):
    """The patient already has a live appointment or hold with this doctor on this date."""

    reason = "DUPLICATE_BOOKING"
    resource = "appointment"


class PatientOverlap(AlreadyExists):
    """The patient already has a live appointment at this time."""

    reason = "PATIENT_OVERLAP"
    resource = "appointment"


class AlreadyCheckedIn(AlreadyExists):
    """The patient is already checked in."""

    reason = "ALREADY_CHECKED_IN"
    resource = "appointment"


class SlotOverlap(AlreadyExists):
    """The doctor already has a slot at this time."""

    reason = "SLOT_OVERLAP"
    resource = "slot"


class LeaveOverlap(AlreadyExists):
    """The doctor already has a leave at this time."""

    reason = "LEAVE_OVERLAP"
    resource = "leave"


class AlreadyWaiting(AlreadyExists):
    """The patient already waits for this on some of these dates."""

    reason = "ALREADY_WAITING"
    resource = "waitlist_entry"


class CodeTaken(AlreadyExists):
    """Another doctor already has this code."""

    reason = "CODE_TAKEN"
    resource = "doctor"


class LicenseTaken(AlreadyExists):
    """Another doctor already has this licence number."""

    reason = "LICENSE_TAKEN"
    resource = "doctor"


class PatientAmbiguous(AlreadyExists):
    """This person may be one of several patients; a birth date would tell."""

    reason = "PATIENT_AMBIGUOUS"
    resource = "patient"


class PatientExists(AlreadyExists):
    """This person already has another patient record."""

    reason = "PATIENT_EXISTS"
    resource = "patient"


class EmailTaken(AlreadyExists):
    """Another user has this e-mail."""

    reason = "EMAIL_TAKEN"


class PatientLinked(AlreadyExists):
    """The user is linked to another patient, or the patient to another user."""

    reason = "PATIENT_LINKED"
    resource = "user"


class Unauthenticated(Refused):
    """The call has no usable credentials."""


class CredentialsRequired(Unauthenticated):
    """The method needs credentials."""

    reason = "CREDENTIALS_REQUIRED"


class CredentialsInvalid(Unauthenticated):
    """The credentials are not valid, or no longer."""

    reason = "CREDENTIALS_INVALID"
    counts = True
    """Whether it counts against its address: it does not if the service cannot judge the credentials."""


class CredentialsExpired(Unauthenticated):
    """The credentials have expired, or their rights have changed; refresh them and repeat the call."""

    reason = "CREDENTIALS_EXPIRED"


class BadLogin(Unauthenticated):
    """The e-mail, the password or the code is wrong, or the user is not active."""

    reason = "BAD_LOGIN"


class RefreshReused(Unauthenticated):
    """The refresh token was used before, so its session has ended."""

    reason = "REFRESH_REUSED"


class PermissionDenied(Refused):
    """The caller may not do this."""


class RoleRequired(PermissionDenied):
    """No role of the caller allows this."""

    reason = "ROLE_REQUIRED"


class PasswordChangeRequired(PermissionDenied):
    """The one-time password must be changed first."""

    reason = "PASSWORD_CHANGE_REQUIRED"


class EmailNotVerified(PermissionDenied):
    """The user's e-mail must be verified first."""

    reason = "EMAIL_NOT_VERIFIED"


class ClinicNotYours(PermissionDenied):
    """It belongs to a clinic that is not the caller's."""

    reason = "CLINIC_NOT_YOURS"
    resource = "clinic"


class EtagMismatch(Refused):
    """The resource has changed since this etag was read."""

    reason = "ETAG_MISMATCH"
    resource = "resource"


class Conflict(Refused):
    """The database reported a conflict with other work on every attempt."""

    reason = "CONFLICT"


class CursorGone(Refused):
    """No events can be read on from this cursor."""


class CursorLost(CursorGone):
    """The log does not lead to this cursor: it was restored from a backup."""

    reason = "CURSOR_LOST"


class CursorTooOld(CursorGone):
    """What follows this cursor is no longer kept."""

    reason = "CURSOR_TOO_OLD"


class Unavailable(Refused):
    """The service cannot answer at present."""


class DatabaseUnavailable(Unavailable):
    """The database is unreachable, read-only or has no free connection."""

    reason = "DATABASE_UNAVAILABLE"


class Overloaded(Unavailable):
    """The server has reached its limit of calls in progress."""

    reason = "OVERLOADED"


class Draining(Unavailable):
    """The server is shutting down."""

    reason = "DRAINING"


class Exhausted(Refused):
    """A limit is reached: the server's, or that of the `subject`."""


class RateLimited(Exhausted):
    """The caller has used up its calls of this minute."""

    reason = "RATE_LIMITED"
    of_refusals = False
    """Whether refused credentials have used them up."""
    flood = False
    """Whether the caller goes on although many calls of this minute were refused."""


class LoginThrottled(Exhausted):
    """Too many failed logins of this e-mail."""

    reason = "LOGIN_THROTTLED"


class TooManyWatchers(Exhausted):
    """The server, or this caller, has reached the limit of watchers."""

    reason = "TOO_MANY_WATCHERS"


class WatcherTooSlow(Exhausted):
    """The watcher left a message unread for too long."""

    reason = "WATCHER_TOO_SLOW"


class DeadlineExceeded(Refused):
    """The caller's deadline or the server's own limit has passed; the change may or may not have been made."""

    reason = "DEADLINE_EXCEEDED"
