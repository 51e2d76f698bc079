"""The tables, as SQLAlchemy Core knows them: what the migrations build and what the reads are written with.

Every constraint is named, because `frontdesk.db.database` maps names to refusals. Texts are never null: empty means not
given. The states are texts with a CHECK, so that a person at `psql` can read them.
"""

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Date,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    func,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import DATEMULTIRANGE, JSONB, ExcludeConstraint

HOLDING = text("holds_place(appointment.state)")
"""The visits that hold a place of their doctor-day and slot (`sql/state.sql`)."""

VISIT_STATES = ("BOOKED", "CHECKED_IN", "IN_CONSULTATION", "COMPLETED", "CANCELLED", "NO_SHOW", "LEFT")
VISIT_AND_QUEUE = (
    "BOOKED/",
    "CHECKED_IN/WAITING",
    "CHECKED_IN/CALLED",
    "CHECKED_IN/PARKED",
    "CHECKED_IN/MISSED",
    "IN_CONSULTATION/IN_CONSULTATION",
    "COMPLETED/DONE",
    "CANCELLED/",
    "CANCELLED/LEFT",
    "NO_SHOW/",
    "LEFT/LEFT",
)
"""The states that a visit and its queue entry have together: BOOKED, and those that `sql/state.sql` leads to."""

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)


def _id() -> Column[object]:
    return Column("id", Uuid, primary_key=True, server_default=text("new_id()"))


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False, server_default="")


def _instant(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True))


def _versioned() -> tuple[Column[object], ...]:
    """The etag's number and the times, on every resource that can be changed."""
    return (
        Column("version", Integer, nullable=False, server_default="1"),
        Column("create_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
        Column("update_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
    )


# The schema's number, the oldest release that it serves, and which text of db/sql/ is made: what a server goes by.
installation = Table(
    "installation",
    metadata,
    Column("one_row", Boolean, primary_key=True, server_default=text("true")),
    Column("functions", Text, nullable=False),
    Column("schema", Integer, nullable=False),
    Column("serves_from", Integer, nullable=False),
    CheckConstraint("one_row", name="one_row"),
)

# Keys that the replicas share. The one of page tokens is made when it is first needed.
secret = Table(
    "secret",
    metadata,
    Column("name", Text, nullable=False),
    Column("value", LargeBinary, nullable=False),
    PrimaryKeyConstraint("name"),
)

clinic = Table(
    "clinic",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    _text("address"),
    _text("city"),
    # In the form in which it is compared; so is `specialty_key` of doctors.
    _text("city_key"),
    _text("state"),
    _text("postal_code"),
    _text("country"),
    _text("phone"),
    _text("email"),
    Column("time_zone", Text, nullable=False),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    # Of a consultation without a slot, as far as nothing else is known.
    Column("visit_length", Interval, nullable=False, server_default="00:12:00"),
    # The clinic of doctors that name none.
    Column("is_default", Boolean, nullable=False, server_default=text("false")),
    # How often a patient is called before somebody else must be; 0 means no limit.
    Column("max_calls", Integer, nullable=False, server_default="3"),
    # How long before a visit its patient is reminded; 0 alone means never.
    Column("reminders", ARRAY(Interval), nullable=False, server_default=text("'{24:00:00}'")),
    # How long a free place is kept for somebody of the waiting list.
    Column("offer_ttl", Interval, nullable=False, server_default="00:30:00"),
    *_versioned(),
    CheckConstraint("max_calls between 0 and 1000", name="max_calls"),
)
Index("clinic_city_idx", clinic.c.city_key, clinic.c.id)
Index("clinic_default_key", clinic.c.is_default, unique=True, postgresql_where=clinic.c.is_default)

patient = Table(
    "patient",
    metadata,
    _id(),
    Column("given_name", Text, nullable=False),
    _text("family_name"),
    # The names in the form in which they are compared (`core.names.folded`); `name_key` is both, with a blank between.
    _text("given_key"),
    _text("family_key"),
    Column("name_key", Text, nullable=False),
    _text("phone"),
    # As much as is known, in ISO 8601: 1980-05-05, 1980-05, 1980 or nothing. Of two that do not contradict each other,
    # one begins with the other.
    _text("birth_date"),
    Column("gender", Text, nullable=False, server_default="UNSPECIFIED"),
    _text("email"),
    _text("blood_group"),
    Column("allergies", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    _text("emergency_name"),
    _text("emergency_phone"),
    # [{"country": "PE", "number": "00123"}]
    Column("insurances", JSONB, nullable=False, server_default=text("'[]'")),
    # The insured numbers in the form in which they are sought, with their countries: {PE00123}.
    Column("insurance_keys", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    # The record that MergePatients kept instead of this one. Never itself a merged one: no chain has two links.
    Column("merged_into", Uuid),
    *_versioned(),
    CheckConstraint("birth_date ~ '^([0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?)?$'", name="birth_date"),
)
# Behind the check that `register_patient` and `update_patient` make under the lock of the phone.
Index(
    "patient_person_key",
    patient.c.phone,
    patient.c.name_key,
    patient.c.birth_date,
    unique=True,
    postgresql_where=text("phone <> '' and merged_into is null"),
)
# By which the person of a merged record is found again.
Index(
    "patient_merged_person_idx",
    patient.c.phone,
    patient.c.name_key,
    postgresql_where=text("merged_into is not null"),
)
Index("patient_merged_into_idx", patient.c.merged_into, postgresql_where=text("merged_into is not null"))
Index("patient_insurance_keys_idx", patient.c.insurance_keys, postgresql_using="gin")

# The words of the names by which patients are sought (`sql/patient.sql`, name_words). Merged records have none.
patient_word = Table(
    "patient_word",
    metadata,
    # By code point, so that a range of it is a prefix whatever the locale of the database is.
    Column("word", Text(collation="C"), nullable=False),
    Column("patient_id", Uuid, nullable=False),
    PrimaryKeyConstraint("word", "patient_id"),
)
Index("patient_word_patient_idx", patient_word.c.patient_id, patient_word.c.word)

doctor = Table(
    "doctor",
    metadata,
    _id(),
    Column("code", Text, nullable=False, unique=True),
    Column("display_name", Text, nullable=False),
    _text("specialty"),
    _text("specialty_key"),
    _text("license_number"),
    _text("qualifications"),
    Column("experience_years", Integer, nullable=False, server_default="0"),
    Column("clinic_id", Uuid, ForeignKey("clinic.id"), nullable=False),
    Column("max_patients_per_day", Integer, nullable=False, server_default="10"),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    *_versioned(),
    CheckConstraint("max_patients_per_day between 1 and 1000", name="max_patients_per_day"),
)
Index("doctor_license_number_key", doctor.c.license_number, unique=True, postgresql_where=text("license_number <> ''"))
Index("doctor_clinic_idx", doctor.c.clinic_id, doctor.c.id)
Index("doctor_specialty_idx", doctor.c.specialty_key, doctor.c.id)

# What is known of a doctor-day beyond its appointments. No row means: nothing has happened, revision 1.
doctor_day = Table(
    "doctor_day",
    metadata,
    Column("doctor_id", Uuid, nullable=False),
    Column("date", Date, nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("last_ticket", Integer, nullable=False, server_default="0"),
    # Null until SetDoctorAvailability has spoken; no record means present.
    Column("is_present", Boolean),
    _text("note"),
    Column("max_patients", Integer),
    # Counts SetDoctorAvailability: the etag of what it has set.
    Column("availability_version", Integer, nullable=False, server_default="0"),
    Column("update_time", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("doctor_id", "date"),
    CheckConstraint("revision >= 2", name="revision"),
    CheckConstraint("last_ticket >= 0", name="last_ticket"),
    CheckConstraint("max_patients between 0 and 1000", name="max_patients"),
    # Every change of the day updates its row; room in the page lets that be a HOT update.
    postgresql_with={"fillfactor": "70"},
)

slot = Table(
    "slot",
    metadata,
    _id(),
    Column("doctor_id", Uuid, nullable=False),
    Column("clinic_id", Uuid, nullable=False),
    Column("date", Date, nullable=False),
    Column("start_time", DateTime(timezone=True), nullable=False),
    Column("end_time", DateTime(timezone=True), nullable=False),
    Column("capacity", Integer, nullable=False, server_default="1"),
    Column("state", Text, nullable=False, server_default="OPEN"),
    _text("block_reason"),
    *_versioned(),
    CheckConstraint("state in ('OPEN', 'BLOCKED')", name="state"),
    CheckConstraint("start_time < end_time", name="interval"),
    CheckConstraint("capacity between 1 and 1000", name="capacity"),
    ExcludeConstraint(
        (text("uuidrange(doctor_id, doctor_id, '[]')"), "&&"),
        (text("tstzrange(start_time, end_time)"), "&&"),
        using="gist",
        name="slot_doctor_overlap",
    ),
)
Index("slot_doctor_idx", slot.c.doctor_id, slot.c.start_time, slot.c.id)
Index("slot_clinic_idx", slot.c.clinic_id, slot.c.start_time, slot.c.id)
Index("slot_start_idx", slot.c.start_time, slot.c.id)

# The hours that a doctor holds week by week. Those of one doctor never overlap in time.
schedule = Table(
    "schedule",
    metadata,
    _id(),
    Column("doctor_id", Uuid, nullable=False),
    Column("effective_from", Date, nullable=False),
    # Inclusive; null means that there is no end.
    Column("effective_until", Date),
    # [{"weekday": 1, "start": 540, "end": 780, "visit_length": 15, "capacity": 1}], in minutes of the clinic's day, by
    # weekday (1 is Monday) and start.
    Column("rules", JSONB, nullable=False),
    *_versioned(),
    CheckConstraint("effective_from <= effective_until", name="dates"),
    ExcludeConstraint(
        (text("uuidrange(doctor_id, doctor_id, '[]')"), "&&"),
        (text("daterange(effective_from, effective_until, '[]')"), "&&"),
        using="gist",
        name="schedule_doctor_overlap",
    ),
)
Index("schedule_doctor_key", schedule.c.doctor_id, schedule.c.effective_from, unique=True)

# What holds on one date in place of the weekly hours.
schedule_exception = Table(
    "schedule_exception",
    metadata,
    Column("doctor_id", Uuid, nullable=False),
    Column("date", Date, nullable=False),
    Column("closed", Boolean, nullable=False),
    # As the rules of a schedule, without a weekday; empty if closed.
    Column("hours", JSONB, nullable=False),
    *_versioned(),
    PrimaryKeyConstraint("doctor_id", "date"),
    CheckConstraint("closed = (hours = '[]')", name="hours"),
)

# The dates for which a doctor's slots have been generated since his hours last changed. A row for each doctor who has
# ever had a schedule.
slot_horizon = Table(
    "slot_horizon",
    metadata,
    Column("doctor_id", Uuid, primary_key=True),
    Column("generated", DATEMULTIRANGE, nullable=False, server_default=text("'{}'")),
)

# The times for which a doctor is away: whole dates, or an interval. How it acts on a place is derived from these rows
# (`sql/leave.sql`), never stored with slots or days.
leave = Table(
    "leave",
    metadata,
    _id(),
    Column("doctor_id", Uuid, nullable=False),
    # The doctor's when the leave was made; its zone gave dates or instants.
    Column("clinic_id", Uuid, nullable=False),
    # Both forms have dates and instants: the dates that the interval touches, or the instants between which the dates
    # lie. The dates are inclusive, the end is not.
    Column("whole_days", Boolean, nullable=False),
    Column("from_date", Date, nullable=False),
    Column("to_date", Date, nullable=False),
    Column("start_time", DateTime(timezone=True), nullable=False),
    Column("end_time", DateTime(timezone=True), nullable=False),
    _text("reason"),
    Column("policy", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="APPLYING"),
    # While it is applied: every appointment of an earlier date is settled; and how many are.
    Column("next_date", Date, nullable=False),
    Column("settled", Integer, nullable=False, server_default="0"),
    # Whose change each settled appointment is, as the log names it.
    Column("actor", Text, nullable=False),
    _text("address"),
    _text("trace_id"),
    *_versioned(),
    CheckConstraint("from_date <= to_date and start_time < end_time", name="interval"),
    CheckConstraint("policy in ('KEEP', 'CANCEL', 'MOVE_SAME_DOCTOR', 'MOVE_SAME_SPECIALTY')", name="policy"),
    CheckConstraint("state in ('APPLYING', 'APPLIED', 'CANCELLED')", name="state"),
    ExcludeConstraint(
        (text("uuidrange(doctor_id, doctor_id, '[]')"), "&&"),
        (text("tstzrange(start_time, end_time)"), "&&"),
        using="gist",
        where=text("state <> 'CANCELLED'"),
        name="leave_doctor_overlap",
    ),
)
Index("leave_doctor_idx", leave.c.doctor_id, leave.c.to_date)
Index("leave_applying_idx", leave.c.id, postgresql_where=text("state = 'APPLYING'"))

# What became of each live appointment that a leave met: once for each, however often the work is taken up again.
leave_outcome = Table(
    "leave_outcome",
    metadata,
    Column("leave_id", Uuid, nullable=False),
    Column("appointment_id", Uuid, nullable=False),
    # In which order they were settled, from 1.
    Column("position", Integer, nullable=False),
    Column("outcome", Text, nullable=False),
    # To where it was moved.
    Column("doctor_id", Uuid),
    Column("date", Date),
    Column("slot_id", Uuid),
    PrimaryKeyConstraint("leave_id", "appointment_id"),
    CheckConstraint("outcome in ('KEPT', 'CANCELLED', 'MOVED', 'NOT_MOVED')", name="outcome"),
    CheckConstraint("(outcome = 'MOVED') = (doctor_id is not null and date is not null)", name="moved"),
)
Index(
    "leave_outcome_place_idx",
    leave_outcome.c.doctor_id,
    leave_outcome.c.date,
    # Last, so that nobody looks for one appointment's outcome here.
    leave_outcome.c.leave_id,
    postgresql_where=text("outcome = 'MOVED'"),
)

# Places that are kept for somebody for some minutes (`sql/hold.sql`). Whether one that is HELD has expired is for the
# clock to say. Its doctor-day is that of its slot, which is not moved while it is held.
hold = Table(
    "hold",
    metadata,
    _id(),
    Column("doctor_id", Uuid, nullable=False),
    Column("clinic_id", Uuid, nullable=False),
    Column("date", Date, nullable=False),
    Column("slot_id", Uuid),
    Column("patient_id", Uuid),
    # Of the waiting list, whose offer this is.
    Column("entry_id", Uuid),
    Column("state", Text, nullable=False, server_default="HELD"),
    Column("expire_time", DateTime(timezone=True), nullable=False),
    Column("create_time", DateTime(timezone=True), nullable=False),
    CheckConstraint("state in ('HELD', 'USED', 'RELEASED')", name="state"),
    CheckConstraint("create_time < expire_time", name="interval"),
)
Index("hold_live_idx", hold.c.doctor_id, hold.c.date, hold.c.expire_time, postgresql_where=text("state = 'HELD'"))
Index("hold_patient_idx", hold.c.patient_id, postgresql_where=text("state = 'HELD' and patient_id is not null"))
Index("hold_expire_time_idx", hold.c.expire_time, postgresql_using="brin")

# Who waits for a place: at a doctor, or at any of a specialty in a clinic.
waitlist_entry = Table(
    "waitlist_entry",
    metadata,
    _id(),
    Column("patient_id", Uuid, nullable=False),
    # Of the doctor, if it is for one.
    Column("clinic_id", Uuid, nullable=False),
    Column("doctor_id", Uuid),
    _text("specialty"),
    # In the form in which it is compared.
    _text("specialty_key"),
    Column("from_date", Date, nullable=False),
    Column("to_date", Date, nullable=False),
    # 1 is Monday; empty means every day.
    Column("weekdays", ARRAY(Integer), nullable=False, server_default=text("'{}'")),
    # Minutes of the clinic's day, between which a slot must lie.
    Column("earliest", Integer),
    Column("latest", Integer),
    # The later appointment that is moved to the place, and where it was when the patient joined.
    Column("appointment_id", Uuid),
    Column("appointment_doctor", Uuid),
    Column("appointment_date", Date),
    Column("appointment_slot", Uuid),
    Column("priority", Text, nullable=False, server_default="NORMAL"),
    # 1 to 3, for the order.
    Column("rank", Integer, nullable=False, server_default="3"),
    Column("state", Text, nullable=False, server_default="WAITING"),
    # Of the last offer.
    Column("hold_id", Uuid),
    # Whether the last offer ended because its place was closed.
    Column("withdrawn", Boolean, nullable=False, server_default=text("false")),
    Column("booked_appointment_id", Uuid),
    Column("create_time", DateTime(timezone=True), nullable=False),
    Column("update_time", DateTime(timezone=True), nullable=False),
    CheckConstraint("state in ('WAITING', 'OFFERED', 'BOOKED', 'LEFT', 'EXPIRED')", name="state"),
    CheckConstraint("(doctor_id is null) = (specialty_key <> '')", name="target"),
    CheckConstraint("from_date <= to_date", name="dates"),
)
_order = (waitlist_entry.c.rank, waitlist_entry.c.create_time, waitlist_entry.c.id)
_live_entry = text("state in ('WAITING', 'OFFERED')")
# The dates come last: those of other dates are passed over in the index.
_dates = (waitlist_entry.c.from_date, waitlist_entry.c.to_date)
Index("waitlist_doctor_idx", waitlist_entry.c.doctor_id, *_order, *_dates, postgresql_where=text("state = 'WAITING'"))
Index(
    "waitlist_specialty_idx",
    waitlist_entry.c.clinic_id,
    waitlist_entry.c.specialty_key,
    *_order,
    *_dates,
    postgresql_where=text("state = 'WAITING' and doctor_id is null"),
)
Index("waitlist_patient_idx", waitlist_entry.c.patient_id, waitlist_entry.c.id)
Index("waitlist_doctor_list_idx", waitlist_entry.c.doctor_id, waitlist_entry.c.id)
Index("waitlist_to_date_idx", waitlist_entry.c.to_date, postgresql_where=_live_entry)
Index(
    "waitlist_appointment_idx",
    waitlist_entry.c.appointment_id,
    postgresql_where=text("state in ('WAITING', 'OFFERED') and appointment_id is not null"),
)
Index("waitlist_offered_idx", waitlist_entry.c.id, postgresql_where=text("state = 'OFFERED'"))
Index("waitlist_clinic_idx", waitlist_entry.c.clinic_id, waitlist_entry.c.id)

# Places that a patient who waits has let go by, and the revision of the doctor-day then.
waitlist_pass = Table(
    "waitlist_pass",
    metadata,
    _id(),
    Column("entry_id", Uuid, nullable=False),
    Column("doctor_id", Uuid, nullable=False),
    Column("date", Date, nullable=False),
    Column("slot_id", Uuid),
    Column("revision", BigInteger, nullable=False),
)
Index("waitlist_pass_entry_idx", waitlist_pass.c.entry_id)

# A booking, the visit and its queue entry: one row, because they change together.
appointment = Table(
    "appointment",
    metadata,
    _id(),
    Column("patient_id", Uuid, nullable=False),
    Column("doctor_id", Uuid, nullable=False),
    Column("clinic_id", Uuid, nullable=False),
    Column("date", Date, nullable=False),
    Column("number", Integer, nullable=False),
    Column("slot_id", Uuid),
    _instant("start_time"),
    _instant("end_time"),
    Column("state", Text, nullable=False),
    _text("reason"),
    _text("notes"),
    _text("cancel_reason"),
    _instant("check_in_time"),
    _instant("start_visit_time"),
    _instant("complete_time"),
    _instant("cancel_time"),
    _instant("no_show_time"),
    _instant("leave_time"),
    # From here to call_time: the queue entry, from check-in on.
    Column("ticket", Integer),
    # Of the return after a missed call; 0 if there was none.
    Column("returned_revision", BigInteger, nullable=False, server_default="0"),
    Column("queue_state", Text),
    _text("room"),
    Column("call_count", Integer, nullable=False, server_default="0"),
    # Those since the last CallNext, which counts as one.
    Column("calls", Integer, nullable=False, server_default="0"),
    _instant("call_time"),
    Column("priority", Text, nullable=False, server_default="NORMAL"),
    # Why the appointment has a place above the capacity; empty if it has none.
    _text("override_reason"),
    # The latest verbs that UndoTransition may take back, the last first; null if there are none (`sql/undo.sql`).
    Column("undo", JSONB),
    *_versioned(),
    # Of each state and of both together, in one check: PostgreSQL prepares every check anew for every insert.
    CheckConstraint(
        f"state || '/' || coalesce(queue_state, '') = any ('{{{','.join(VISIT_AND_QUEUE)}}}'::text[])",
        name="visit_and_queue",
    ),
    # Without an upper limit: overrides go above the capacity.
    CheckConstraint("number >= 1", name="number"),
    CheckConstraint(
        "(slot_id is null or start_time is not null) and (start_time is null) = (end_time is null)", name="slot"
    ),
    CheckConstraint(
        "(ticket is null) = (queue_state is null) and priority in ('URGENT', 'PRIORITY', 'NORMAL')", name="queue_entry"
    ),
    ExcludeConstraint(
        (text("uuidrange(patient_id, patient_id, '[]')"), "&&"),
        (text("tstzrange(start_time, end_time)"), "&&"),
        using="gist",
        where=text("start_time is not null and is_live(state)"),
        name="appointment_patient_overlap",
    ),
)
Index(
    "appointment_number_key",
    appointment.c.doctor_id,
    appointment.c.date,
    appointment.c.number,
    unique=True,
    postgresql_where=text("holds_place(state)"),
)
Index(
    "appointment_ticket_key",
    appointment.c.doctor_id,
    appointment.c.date,
    appointment.c.ticket,
    unique=True,
    postgresql_where=text("ticket is not null"),
)
Index(
    "appointment_patient_day_key",
    appointment.c.patient_id,
    appointment.c.doctor_id,
    appointment.c.date,
    unique=True,
    postgresql_where=text("is_live(state)"),
)
Index("appointment_slot_idx", appointment.c.slot_id, postgresql_where=text("slot_id is not null"))

FIRST: ColumnElement[Any] = literal_column("'-infinity'::timestamp with time zone")
"""Sorts the appointments of a date that have no start time."""

# The lists. Those of a clinic and of dates alone are long, so the state leads: a list merges one scan a state.
_sort_key = (appointment.c.date, func.coalesce(appointment.c.start_time, FIRST), appointment.c.id)
Index("appointment_patient_idx", appointment.c.patient_id, *_sort_key)
Index("appointment_doctor_idx", appointment.c.doctor_id, *_sort_key)
Index("appointment_clinic_idx", appointment.c.clinic_id, appointment.c.state, *_sort_key)
Index("appointment_date_idx", appointment.c.state, *_sort_key)

# Every change, reading of a patient's record and refused access: what the audit shows and events are made of. Rows are
# only added. Of a patient it has ids alone: no name, phone, e-mail or text.
log = Table(
    "log",
    metadata,
    # Of this cluster when the row was written, so after a restore it may be one of another: `seal_log` reckons with it.
    Column("transaction", BigInteger, nullable=False, server_default=text("(pg_current_xact_id()::text)::bigint")),
    # A UUID of version 7 that has `time` in it, so that its order is that of time.
    Column("id", Uuid, nullable=False),
    Column("time", DateTime(timezone=True), nullable=False),
    # users/ID, keys/ID, services/NAME or anonymous.
    Column("actor", Text, nullable=False),
    Column("method", Text, nullable=False),
    # The event, such as appointment.booked; null if the row is no change.
    Column("type", Text),
    # appointments/ID, doctorDays/DOCTOR/DATE, patients/ID …; null if it is not about one thing.
    Column("resource", Text),
    Column("clinic_id", Uuid),
    Column("doctor_id", Uuid),
    Column("patient_id", Uuid),
    # Of a list that was read; `patient_id` if it is one patient.
    Column("patient_ids", ARRAY(Uuid)),
    Column("appointment_id", Uuid),
    Column("slot_id", Uuid),
    Column("date", Date),
    # Of the doctor-day that was changed; 0 if none was.
    Column("revision", BigInteger, nullable=False, server_default="0"),
    # States, times and ids, by name, all as text.
    Column("data", JSONB),
    # OK, or the reason of the refusal.
    Column("outcome", Text, nullable=False, server_default="OK"),
    # The records that were read, or how often the same was refused.
    Column("count", Integer, nullable=False, server_default="1"),
    _text("address"),
    _text("trace_id"),
    # The queue entry as the change left it, for WatchQueue; null if the change does not touch the queue.
    Column("queue_state", Text),
    Column("ticket", Integer),
    Column("room", Text),
    Column("call_count", Integer),
    _instant("check_in_time"),
    _instant("call_time"),
    _instant("start_visit_time"),
    Column("priority", Text),
    PrimaryKeyConstraint("id"),
)
Index("log_transaction_idx", log.c.transaction)
Index(
    "log_revision_key", log.c.doctor_id, log.c.date, log.c.revision, unique=True, postgresql_where=text("revision > 0")
)
Index("log_patient_idx", log.c.patient_id, log.c.id, postgresql_where=text("patient_id is not null"))
Index("log_actor_idx", log.c.actor, log.c.id)
Index("log_method_idx", log.c.method, log.c.id)
Index("log_resource_idx", log.c.resource, log.c.id, postgresql_where=text("revision = 0"))
Index("log_patients_idx", log.c.patient_ids, postgresql_using="gin", postgresql_where=text("patient_ids is not null"))

# The rows of the log in the order that all readers see, chained by hashes (`sql/seal.sql`).
seal = Table(
    "seal",
    metadata,
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("id", Uuid, nullable=False, unique=True),
    # SHA-256 of the chain before and of the row's hash.
    Column("chain", LargeBinary, nullable=False),
    # Every row of an earlier transaction of this cluster is sealed.
    Column("horizon", BigInteger, nullable=False),
    Column("cluster", BigInteger, nullable=False),
)

# How far those have come who do something with each event: relays, and the planning of notifications.
log_reader = Table(
    "log_reader",
    metadata,
    Column("name", Text, primary_key=True),
    # Everything up to this position of the sealed log is done.
    Column("position", BigInteger, nullable=False),
    Column("update_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
    # Of a reader that works outside of transactions: the process that does so alone until then, by the real clock.
    Column("holder", Uuid),
    _instant("held_until"),
)

# The events that a broker has refused for good, until they are sent again and taken.
relay_refusal = Table(
    "relay_refusal",
    metadata,
    Column("relay", Text, nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("event_id", Uuid, nullable=False),
    # As the broker's consumers would know them.
    Column("type", Text, nullable=False),
    Column("resource", Text, nullable=False),
    # The broker's code.
    Column("reason", Text, nullable=False),
    # Whether the relay is to try again.
    Column("again", Boolean, nullable=False, server_default="false"),
    PrimaryKeyConstraint("relay", "position"),
)
Index("relay_refusal_again_idx", relay_refusal.c.relay, relay_refusal.c.position, postgresql_where=text("again"))

# What patients and users are told, each on one channel (`sql/notification.sql`): what is shown, and at once the state
# of the job that sends it. Neither an address nor a text.
notification = Table(
    "notification",
    metadata,
    _id(),
    # What made it: the id of an event, or of a request's answer.
    Column("cause", Uuid, nullable=False),
    # Of that event in the sealed log; 0 for requests.
    Column("position", BigInteger, nullable=False, server_default="0"),
    Column("kind", Text, nullable=False),
    Column("channel", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="PLANNED"),
    _text("skip_reason"),
    Column("appointment_id", Uuid),
    Column("patient_id", Uuid),
    Column("clinic_id", Uuid),
    Column("user_id", Uuid, ForeignKey("user_account.id")),
    # The offer of the waiting list that it tells of.
    Column("hold_id", Uuid),
    # The place that it tells of. If the appointment has another one by then, it is not sent.
    Column("doctor_id", Uuid),
    Column("date", Date),
    Column("slot_id", Uuid),
    # How many changes came before it: SEQUENCE of iCalendar.
    Column("sequence", Integer, nullable=False, server_default="0"),
    Column("attempts", Integer, nullable=False, server_default="0"),
    _text("failure"),
    # By the service's clock, as everything that people see.
    Column("plan_time", DateTime(timezone=True), nullable=False),
    _instant("send_time"),
    # By the machine's clock, because what is outside does not know the service's: not before this; while it is sent,
    # until when its sender has it.
    _instant("try_time"),
    # Since when it could have been sent, had all gone well.
    _instant("due_since"),
    # It has reached somebody, or may have.
    Column("told", Boolean, nullable=False, server_default=text("false")),
    CheckConstraint(
        "state in ('PLANNED', 'SENDING', 'SENT', 'SKIPPED', 'DEAD')"
        " and (state = 'SKIPPED') = (skip_reason <> '')"
        " and channel in ('EMAIL', 'WEBHOOK')",
        name="state",
    ),
    CheckConstraint("num_nonnulls(user_id, appointment_id, hold_id) = 1", name="about"),
)
# Nothing is planned twice, whatever becomes of the reader's position.
Index(
    "notification_cause_key",
    notification.c.cause,
    notification.c.channel,
    notification.c.kind,
    notification.c.plan_time,
    unique=True,
)
Index(
    "notification_due_idx",
    notification.c.channel,
    notification.c.plan_time,
    notification.c.id,
    postgresql_where=text("state in ('PLANNED', 'SENDING')"),
)
Index("notification_appointment_idx", notification.c.appointment_id, notification.c.id)
Index("notification_patient_idx", notification.c.patient_id, notification.c.id)
Index("notification_dead_idx", notification.c.plan_time, postgresql_where=text("state = 'DEAD'"))
Index("notification_user_idx", notification.c.user_id, postgresql_where=text("user_id is not null"))

# How a patient wants to be told; without a row, by the defaults.
contact_preferences = Table(
    "contact_preferences",
    metadata,
    Column("patient_id", Uuid, primary_key=True),
    Column("channels", ARRAY(Text), nullable=False),
    _text("language"),
    Column("reminders", Boolean, nullable=False),
    # The first that is set is 2: the defaults are 1.
    Column("version", Integer, nullable=False),
    Column("update_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
)

# How many calls of a subject the workers have leased in its latest minute.
rate_window = Table(
    "rate_window",
    metadata,
    Column("subject", Text, primary_key=True),
    Column("minute", DateTime(timezone=True), nullable=False),
    Column("used", Integer, nullable=False),
    # By the latest lease.
    Column("granted", Integer, nullable=False),
)

# What a caller's key did, so that it is never done twice. Ids, states and a hash of the request; no patient data.
idempotency = Table(
    "idempotency",
    metadata,
    Column("caller", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("result_id", Uuid),
    # The columns of the result that may change later, as they were.
    Column("snapshot", JSONB),
    Column("revision", BigInteger),
    Column("vacated_revision", BigInteger),
    Column("create_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
    PrimaryKeyConstraint("caller", "method", "key"),
)
Index("idempotency_create_time_idx", idempotency.c.create_time, postgresql_using="brin")

# The credentials of programs. The secret is not here, only its hash.
api_key = Table(
    "api_key",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    # SHA-256 of the secret, which is as long as the hash: no salt, no slow hash.
    Column("secret_hash", LargeBinary, nullable=False),
    Column("roles", ARRAY(Text), nullable=False),
    # Empty means every clinic.
    Column("clinic_ids", ARRAY(Uuid), nullable=False, server_default=text("'{}'")),
    _instant("expire_time"),
    _instant("revoke_time"),
    Column("requests_per_minute", Integer, nullable=False, server_default="100"),
    *_versioned(),
    CheckConstraint("roles <@ '{SERVICE,STAFF,BOARD,ADMIN}'::text[] and roles <> '{}'", name="roles"),
    CheckConstraint("requests_per_minute between 1 and 100000", name="requests_per_minute"),
)

# Whose credentials or rights have changed (keys/ID): what each worker asks for every second, to forget what it has
# cached. The transaction's id orders them: a reader goes on from the oldest transaction that still ran when it looked.
access_change = Table(
    "access_change",
    metadata,
    Column("transaction", BigInteger, nullable=False, server_default=text("(pg_current_xact_id()::text)::bigint")),
    Column("subject", Text, nullable=False),
    Column("create_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
    PrimaryKeyConstraint("transaction", "subject"),
)

# People who log in.
user_account = Table(
    "user_account",
    metadata,
    _id(),
    Column("email", Text, nullable=False),
    # The e-mail in the form in which it is compared.
    Column("email_key", Text, nullable=False, unique=True),
    _text("name"),
    _text("phone"),
    _text("address"),
    Column("roles", ARRAY(Text), nullable=False),
    Column("patient_id", Uuid),
    Column("doctor_id", Uuid),
    # Where STAFF and ADMIN hold; empty means every clinic.
    Column("clinic_ids", ARRAY(Uuid), nullable=False, server_default=text("'{}'")),
    Column("email_verified", Boolean, nullable=False, server_default=text("true")),
    Column("second_factor", Boolean, nullable=False, server_default=text("false")),
    Column("active", Boolean, nullable=False, server_default=text("true")),
    # Argon2id, with its salt and parameters.
    Column("password_hash", Text, nullable=False),
    # Of a one-time password; null means that the user has chosen the password.
    _instant("password_expire_time"),
    _instant("last_login_time"),
    *_versioned(),
    CheckConstraint("roles <@ '{PATIENT,DOCTOR,STAFF,ADMIN}'::text[] and roles <> '{}'", name="roles"),
    CheckConstraint("(doctor_id is not null) = ('DOCTOR' = any (roles))", name="doctor"),
)
Index(
    "user_account_patient_id_key",
    user_account.c.patient_id,
    unique=True,
    postgresql_where=text("patient_id is not null"),
)

# Logins, each with all the tokens that follow from it.
session = Table(
    "session",
    metadata,
    _id(),
    Column("user_id", Uuid, ForeignKey("user_account.id"), nullable=False),
    # How often it was refreshed: only tokens of this generation are good.
    Column("generation", Integer, nullable=False, server_default="1"),
    Column("create_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
    Column("refresh_time", DateTime(timezone=True), nullable=False, server_default=text("moment()")),
    _instant("end_time"),
)
Index("session_user_id_idx", session.c.user_id, postgresql_where=text("end_time is null"))
Index("session_refresh_time_idx", session.c.refresh_time)

# Every refresh token of a session, used ones too: that is how a stolen one is noticed.
refresh_token = Table(
    "refresh_token",
    metadata,
    # SHA-256 of the token, which has 256 random bits.
    Column("hash", LargeBinary, nullable=False),
    Column("session_id", Uuid, ForeignKey("session.id", ondelete="cascade"), nullable=False),
    Column("generation", Integer, nullable=False),
    PrimaryKeyConstraint("hash"),
)
Index("refresh_token_session_id_idx", refresh_token.c.session_id)

# Attempts to log in since the last success, by a hash of the e-mail, or of e-mail and address.
login_attempt = Table(
    "login_attempt",
    metadata,
    Column("subject", LargeBinary, nullable=False),
    Column("count", Integer, nullable=False),
    Column("last_time", DateTime(timezone=True), nullable=False),
    # No attempt before this.
    _instant("wait_until"),
    PrimaryKeyConstraint("subject"),
)

# What a user proves beside the password. The secret is stored as it is, because checking a code needs it.
second_factor = Table(
    "second_factor",
    metadata,
    Column("user_id", Uuid, ForeignKey("user_account.id"), primary_key=True),
    Column("secret", Text, nullable=False),
    # The 30 s, counted since 1970, of the latest code that was used: a code is good once.
    Column("last_window", BigInteger, nullable=False, server_default="0"),
)

# Recovery codes that are not used up, as SHA-256.
recovery_code = Table(
    "recovery_code",
    metadata,
    Column("user_id", Uuid, ForeignKey("user_account.id"), nullable=False),
    Column("hash", LargeBinary, nullable=False),
    PrimaryKeyConstraint("user_id", "hash"),
)

# Logins with the right password that wait for a code, by SHA-256 of the challenge.
login_challenge = Table(
    "login_challenge",
    metadata,
    Column("hash", LargeBinary, nullable=False),
    Column("user_id", Uuid, ForeignKey("user_account.id"), nullable=False),
    # The rows of login_attempt that the right code deletes.
    Column("attempts", ARRAY(LargeBinary), nullable=False),
    Column("tries", Integer, nullable=False, server_default="0"),
    Column("expire_time", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("hash"),
)
Index("login_challenge_user_id_idx", login_challenge.c.user_id)

# Codes that were sent by mail, as SHA-256: for a new password, or to show that the e-mail is the user's. Made when the
# mail is sent, so that no code waits in a table.
email_code = Table(
    "email_code",
    metadata,
    Column("hash", LargeBinary, nullable=False),
    Column("user_id", Uuid, ForeignKey("user_account.id"), nullable=False),
    # The kind of the notification that had it.
    Column("kind", Text, nullable=False),
    Column("expire_time", DateTime(timezone=True), nullable=False),
    PrimaryKeyConstraint("hash"),
)
Index("email_code_user_id_idx", email_code.c.user_id)

# The public halves of the keys with which the processes sign access tokens.
signing_key = Table(
    "signing_key",
    metadata,
    Column("id", Text, primary_key=True),
    Column("public_key", LargeBinary, nullable=False),
    Column("expire_time", DateTime(timezone=True), nullable=False),
)
