"""Everything of the first release: clinics, patients, doctors, days, slots, appointments, the log, keys, access."""

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None


def upgrade() -> None:
    # A range of ids lets GiST compare them for equality; btree_gist, which does the same, is an extension that not
    # every server has.
    op.execute("create type uuidrange as range (subtype = uuid)")

    op.create_table(
        "user_account",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("email", sa.Text(), nullable=False),
        sa.Column("email_key", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), server_default="", nullable=False),
        sa.Column("phone", sa.Text(), server_default="", nullable=False),
        sa.Column("address", sa.Text(), server_default="", nullable=False),
        sa.Column("roles", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("doctor_id", sa.Uuid(), nullable=True),
        sa.Column("clinic_ids", postgresql.ARRAY(sa.Uuid()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("email_verified", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("second_factor", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("password_expire_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_login_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.CheckConstraint(
            "roles <@ '{PATIENT,DOCTOR,STAFF,ADMIN}'::text[] and roles <> '{}'", name="user_account_roles_check"
        ),
        sa.CheckConstraint("(doctor_id is not null) = ('DOCTOR' = any (roles))", name="user_account_doctor_check"),
        sa.PrimaryKeyConstraint("id", name="user_account_pkey"),
        sa.UniqueConstraint("email_key", name="user_account_email_key_key"),
    )
    op.create_index(
        "user_account_patient_id_key",
        "user_account",
        ["patient_id"],
        unique=True,
        postgresql_where=sa.text("patient_id is not null"),
    )
    op.create_table(
        "session",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("generation", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("refresh_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name="session_user_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="session_pkey"),
    )
    op.create_index(
        "session_user_id_idx", "session", ["user_id"], unique=False, postgresql_where=sa.text("end_time is null")
    )
    op.create_index("session_refresh_time_idx", "session", ["refresh_time"], unique=False)
    op.create_table(
        "refresh_token",
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("session_id", sa.Uuid(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_id"], ["session.id"], name="refresh_token_session_id_fkey", ondelete="cascade"
        ),
        sa.PrimaryKeyConstraint("hash", name="refresh_token_pkey"),
    )
    op.create_index("refresh_token_session_id_idx", "refresh_token", ["session_id"], unique=False)
    op.create_table(
        "login_attempt",
        sa.Column("subject", sa.LargeBinary(), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("last_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("wait_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("subject", name="login_attempt_pkey"),
    )
    op.create_table(
        "second_factor",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("last_window", sa.BigInteger(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name="second_factor_user_id_fkey"),
        sa.PrimaryKeyConstraint("user_id", name="second_factor_pkey"),
    )
    op.create_table(
        "recovery_code",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name="recovery_code_user_id_fkey"),
        sa.PrimaryKeyConstraint("user_id", "hash", name="recovery_code_pkey"),
    )
    op.create_table(
        "login_challenge",
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("attempts", postgresql.ARRAY(sa.LargeBinary()), nullable=False),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name="login_challenge_user_id_fkey"),
        sa.PrimaryKeyConstraint("hash", name="login_challenge_pkey"),
    )
    op.create_index("login_challenge_user_id_idx", "login_challenge", ["user_id"], unique=False)
    op.create_table(
        "signing_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("public_key", sa.LargeBinary(), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="signing_key_pkey"),
    )
    op.create_table(
        "access_change",
        sa.Column(
            "transaction",
            sa.BigInteger(),
            server_default=sa.text("(pg_current_xact_id()::text)::bigint"),
            nullable=False,
        ),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.PrimaryKeyConstraint("transaction", "subject", name="access_change_pkey"),
    )
    op.create_table(
        "api_key",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("secret_hash", sa.LargeBinary(), nullable=False),
        sa.Column("roles", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("clinic_ids", postgresql.ARRAY(sa.Uuid()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoke_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("requests_per_minute", sa.Integer(), server_default="100", nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.CheckConstraint(
            "roles <@ '{SERVICE,STAFF,BOARD,ADMIN}'::text[] and roles <> '{}'", name="api_key_roles_check"
        ),
        sa.CheckConstraint("requests_per_minute between 1 and 100000", name="api_key_requests_per_minute_check"),
        sa.PrimaryKeyConstraint("id", name="api_key_pkey"),
    )
    op.create_table(
        "appointment",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("clinic_id", sa.Uuid(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("slot_id", sa.Uuid(), nullable=True),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("notes", sa.Text(), server_default="", nullable=False),
        sa.Column("cancel_reason", sa.Text(), server_default="", nullable=False),
        sa.Column("check_in_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("start_visit_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("complete_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("no_show_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("leave_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ticket", sa.Integer(), nullable=True),
        sa.Column("returned_revision", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("queue_state", sa.Text(), nullable=True),
        sa.Column("room", sa.Text(), server_default="", nullable=False),
        sa.Column("call_count", sa.Integer(), server_default="0", nullable=False),
        sa.Column("calls", sa.Integer(), server_default="0", nullable=False),
        sa.Column("call_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("priority", sa.Text(), server_default="NORMAL", nullable=False),
        sa.Column("override_reason", sa.Text(), server_default="", nullable=False),
        sa.Column("undo", postgresql.JSONB(), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        postgresql.ExcludeConstraint(
            (sa.text("uuidrange(patient_id, patient_id, '[]')"), "&&"),
            (sa.text("tstzrange(start_time, end_time)"), "&&"),
            where=sa.text("start_time is not null and is_live(state)"),
            using="gist",
            name="appointment_patient_overlap",
        ),
        sa.CheckConstraint(
            "state || '/' || coalesce(queue_state, '') = any ('{BOOKED/,CHECKED_IN/WAITING,CHECKED_IN/CALLED,"
            "CHECKED_IN/PARKED,CHECKED_IN/MISSED,IN_CONSULTATION/IN_CONSULTATION,COMPLETED/DONE,CANCELLED/,"
            "CANCELLED/LEFT,NO_SHOW/,LEFT/LEFT}'::text[])",
            name="appointment_visit_and_queue_check",
        ),
        sa.CheckConstraint(
            "(slot_id is null or start_time is not null) and (start_time is null) = (end_time is null)",
            name="appointment_slot_check",
        ),
        sa.CheckConstraint(
            "(ticket is null) = (queue_state is null) and priority in ('URGENT', 'PRIORITY', 'NORMAL')",
            name="appointment_queue_entry_check",
        ),
        sa.CheckConstraint("number >= 1", name="appointment_number_check"),
        sa.PrimaryKeyConstraint("id", name="appointment_pkey"),
    )
    sort_key = ("date", sa.literal_column("coalesce(start_time, '-infinity'::timestamp with time zone)"), "id")
    op.create_index("appointment_clinic_idx", "appointment", ["clinic_id", "state", *sort_key], unique=False)
    op.create_index("appointment_date_idx", "appointment", ["state", *sort_key], unique=False)
    op.create_index("appointment_doctor_idx", "appointment", ["doctor_id", *sort_key], unique=False)
    op.create_index(
        "appointment_number_key",
        "appointment",
        ["doctor_id", "date", "number"],
        unique=True,
        postgresql_where=sa.text("holds_place(state)"),
    )
    op.create_index(
        "appointment_patient_day_key",
        "appointment",
        ["patient_id", "doctor_id", "date"],
        unique=True,
        postgresql_where=sa.text("is_live(state)"),
    )
    op.create_index("appointment_patient_idx", "appointment", ["patient_id", *sort_key], unique=False)
    op.create_index(
        "appointment_slot_idx",
        "appointment",
        ["slot_id"],
        unique=False,
        postgresql_where=sa.text("slot_id is not null"),
    )
    op.create_index(
        "appointment_ticket_key",
        "appointment",
        ["doctor_id", "date", "ticket"],
        unique=True,
        postgresql_where=sa.text("ticket is not null"),
    )
    op.create_table(
        "clinic",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), server_default="", nullable=False),
        sa.Column("city", sa.Text(), server_default="", nullable=False),
        sa.Column("city_key", sa.Text(), server_default="", nullable=False),
        sa.Column("state", sa.Text(), server_default="", nullable=False),
        sa.Column("postal_code", sa.Text(), server_default="", nullable=False),
        sa.Column("country", sa.Text(), server_default="", nullable=False),
        sa.Column("phone", sa.Text(), server_default="", nullable=False),
        sa.Column("email", sa.Text(), server_default="", nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("visit_length", sa.Interval(), server_default="00:12:00", nullable=False),
        sa.Column("is_default", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("max_calls", sa.Integer(), server_default="3", nullable=False),
        sa.Column("reminders", postgresql.ARRAY(sa.Interval()), server_default=sa.text("'{24:00:00}'"), nullable=False),
        sa.Column("offer_ttl", sa.Interval(), server_default="00:30:00", nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.CheckConstraint("max_calls between 0 and 1000", name="clinic_max_calls_check"),
        sa.PrimaryKeyConstraint("id", name="clinic_pkey"),
    )
    op.create_index("clinic_city_idx", "clinic", ["city_key", "id"], unique=False)
    op.create_index("clinic_default_key", "clinic", ["is_default"], unique=True, postgresql_where="is_default")
    op.create_table(
        "doctor_day",
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("last_ticket", sa.Integer(), server_default="0", nullable=False),
        sa.Column("is_present", sa.Boolean(), nullable=True),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("max_patients", sa.Integer(), nullable=True),
        sa.Column("availability_version", sa.Integer(), server_default="0", nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("last_ticket >= 0", name="doctor_day_last_ticket_check"),
        sa.CheckConstraint("max_patients between 0 and 1000", name="doctor_day_max_patients_check"),
        sa.CheckConstraint("revision >= 2", name="doctor_day_revision_check"),
        sa.PrimaryKeyConstraint("doctor_id", "date", name="doctor_day_pkey"),
        postgresql_with={"fillfactor": "70"},
    )
    op.create_table(
        "log",
        sa.Column(
            "transaction",
            sa.BigInteger(),
            server_default=sa.text("(pg_current_xact_id()::text)::bigint"),
            nullable=False,
        ),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=True),
        sa.Column("resource", sa.Text(), nullable=True),
        sa.Column("clinic_id", sa.Uuid(), nullable=True),
        sa.Column("doctor_id", sa.Uuid(), nullable=True),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("patient_ids", postgresql.ARRAY(sa.Uuid()), nullable=True),
        sa.Column("appointment_id", sa.Uuid(), nullable=True),
        sa.Column("slot_id", sa.Uuid(), nullable=True),
        sa.Column("date", sa.Date(), nullable=True),
        sa.Column("revision", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("data", postgresql.JSONB(), nullable=True),
        sa.Column("outcome", sa.Text(), server_default="OK", nullable=False),
        sa.Column("count", sa.Integer(), server_default="1", nullable=False),
        sa.Column("address", sa.Text(), server_default="", nullable=False),
        sa.Column("trace_id", sa.Text(), server_default="", nullable=False),
        sa.Column("queue_state", sa.Text(), nullable=True),
        sa.Column("ticket", sa.Integer(), nullable=True),
        sa.Column("room", sa.Text(), nullable=True),
        sa.Column("call_count", sa.Integer(), nullable=True),
        sa.Column("check_in_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("call_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("start_visit_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("priority", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="log_pkey"),
    )
    op.create_index("log_patient_idx", "log", ["patient_id", "id"], postgresql_where=sa.text("patient_id is not null"))
    op.create_index(
        "log_patients_idx",
        "log",
        ["patient_ids"],
        postgresql_using="gin",
        postgresql_where=sa.text("patient_ids is not null"),
    )
    op.create_index(
        "log_revision_key",
        "log",
        ["doctor_id", "date", "revision"],
        unique=True,
        postgresql_where=sa.text("revision > 0"),
    )
    op.create_index("log_actor_idx", "log", ["actor", "id"])
    op.create_index("log_method_idx", "log", ["method", "id"])
    op.create_index("log_resource_idx", "log", ["resource", "id"], postgresql_where=sa.text("revision = 0"))
    op.create_index("log_transaction_idx", "log", ["transaction"])
    op.create_table(
        "idempotency",
        sa.Column("caller", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("result_id", sa.Uuid(), nullable=True),
        sa.Column("snapshot", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=True),
        sa.Column("vacated_revision", sa.BigInteger(), nullable=True),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.PrimaryKeyConstraint("caller", "method", "key", name="idempotency_pkey"),
    )
    op.create_index(
        "idempotency_create_time_idx", "idempotency", ["create_time"], unique=False, postgresql_using="brin"
    )
    op.create_table(
        "installation",
        sa.Column("one_row", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("functions", sa.Text(), nullable=False),
        sa.Column("schema", sa.Integer(), nullable=False),
        sa.Column("serves_from", sa.Integer(), nullable=False),
        sa.CheckConstraint("one_row", name="installation_one_row_check"),
        sa.PrimaryKeyConstraint("one_row", name="installation_pkey"),
    )
    op.create_table(
        "secret",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="secret_pkey"),
    )
    op.create_table(
        "patient",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("given_name", sa.Text(), nullable=False),
        sa.Column("family_name", sa.Text(), server_default="", nullable=False),
        sa.Column("given_key", sa.Text(), server_default="", nullable=False),
        sa.Column("family_key", sa.Text(), server_default="", nullable=False),
        sa.Column("name_key", sa.Text(), nullable=False),
        sa.Column("phone", sa.Text(), server_default="", nullable=False),
        sa.Column("birth_date", sa.Text(), server_default="", nullable=False),
        sa.Column("gender", sa.Text(), server_default="UNSPECIFIED", nullable=False),
        sa.Column("email", sa.Text(), server_default="", nullable=False),
        sa.Column("blood_group", sa.Text(), server_default="", nullable=False),
        sa.Column("allergies", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("emergency_name", sa.Text(), server_default="", nullable=False),
        sa.Column("emergency_phone", sa.Text(), server_default="", nullable=False),
        sa.Column(
            "insurances", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'[]'"), nullable=False
        ),
        sa.Column("insurance_keys", sa.ARRAY(sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("merged_into", sa.Uuid(), nullable=True),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.CheckConstraint("birth_date ~ '^([0-9]{4}(-[0-9]{2}(-[0-9]{2})?)?)?$'", name="patient_birth_date_check"),
        sa.PrimaryKeyConstraint("id", name="patient_pkey"),
    )
    op.create_index("patient_insurance_keys_idx", "patient", ["insurance_keys"], unique=False, postgresql_using="gin")
    op.create_index(
        "patient_merged_into_idx",
        "patient",
        ["merged_into"],
        unique=False,
        postgresql_where=sa.text("merged_into is not null"),
    )
    op.create_index(
        "patient_merged_person_idx",
        "patient",
        ["phone", "name_key"],
        unique=False,
        postgresql_where=sa.text("merged_into is not null"),
    )
    op.create_index(
        "patient_person_key",
        "patient",
        ["phone", "name_key", "birth_date"],
        unique=True,
        postgresql_where=sa.text("phone <> '' and merged_into is null"),
    )
    op.create_table(
        "log_reader",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("holder", sa.Uuid(), nullable=True),
        sa.Column("held_until", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name="log_reader_pkey"),
    )
    op.create_table(
        "relay_refusal",
        sa.Column("relay", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("again", sa.Boolean(), server_default="false", nullable=False),
        sa.PrimaryKeyConstraint("relay", "position", name="relay_refusal_pkey"),
    )
    op.create_index(
        "relay_refusal_again_idx",
        "relay_refusal",
        ["relay", "position"],
        unique=False,
        postgresql_where=sa.text("again"),
    )
    op.create_table(
        "patient_word",
        sa.Column("word", sa.Text(collation="C"), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.PrimaryKeyConstraint("word", "patient_id", name="patient_word_pkey"),
    )
    op.create_index("patient_word_patient_idx", "patient_word", ["patient_id", "word"], unique=False)
    op.create_table(
        "rate_window",
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used", sa.Integer(), nullable=False),
        sa.Column("granted", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("subject", name="rate_window_pkey"),
    )
    op.create_table(
        "seal",
        sa.Column("position", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("chain", sa.LargeBinary(), nullable=False),
        sa.Column("horizon", sa.BigInteger(), nullable=False),
        sa.Column("cluster", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("position", name="seal_pkey"),
        sa.UniqueConstraint("id", name="seal_id_key"),
    )
    op.create_table(
        "schedule",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("effective_from", sa.Date(), nullable=False),
        sa.Column("effective_until", sa.Date(), nullable=True),
        sa.Column("rules", postgresql.JSONB(), nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        postgresql.ExcludeConstraint(
            (sa.text("uuidrange(doctor_id, doctor_id, '[]')"), "&&"),
            (sa.text("daterange(effective_from, effective_until, '[]')"), "&&"),
            using="gist",
            name="schedule_doctor_overlap",
        ),
        sa.CheckConstraint("effective_from <= effective_until", name="schedule_dates_check"),
        sa.PrimaryKeyConstraint("id", name="schedule_pkey"),
    )
    op.create_index("schedule_doctor_key", "schedule", ["doctor_id", "effective_from"], unique=True)
    op.create_table(
        "schedule_exception",
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("closed", sa.Boolean(), nullable=False),
        sa.Column("hours", postgresql.JSONB(), nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.CheckConstraint("closed = (hours = '[]')", name="schedule_exception_hours_check"),
        sa.PrimaryKeyConstraint("doctor_id", "date", name="schedule_exception_pkey"),
    )
    op.create_table(
        "slot_horizon",
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("generated", postgresql.DATEMULTIRANGE(), server_default=sa.text("'{}'"), nullable=False),
        sa.PrimaryKeyConstraint("doctor_id", name="slot_horizon_pkey"),
    )
    op.create_table(
        "slot",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("clinic_id", sa.Uuid(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("capacity", sa.Integer(), server_default="1", nullable=False),
        sa.Column("state", sa.Text(), server_default="OPEN", nullable=False),
        sa.Column("block_reason", sa.Text(), server_default="", nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        postgresql.ExcludeConstraint(
            (sa.text("uuidrange(doctor_id, doctor_id, '[]')"), "&&"),
            (sa.text("tstzrange(start_time, end_time)"), "&&"),
            using="gist",
            name="slot_doctor_overlap",
        ),
        sa.CheckConstraint("state in ('OPEN', 'BLOCKED')", name="slot_state_check"),
        sa.CheckConstraint("capacity between 1 and 1000", name="slot_capacity_check"),
        sa.CheckConstraint("start_time < end_time", name="slot_interval_check"),
        sa.PrimaryKeyConstraint("id", name="slot_pkey"),
    )
    op.create_index("slot_clinic_idx", "slot", ["clinic_id", "start_time", "id"], unique=False)
    op.create_index("slot_doctor_idx", "slot", ["doctor_id", "start_time", "id"], unique=False)
    op.create_index("slot_start_idx", "slot", ["start_time", "id"], unique=False)
    op.create_table(
        "doctor",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("display_name", sa.Text(), nullable=False),
        sa.Column("specialty", sa.Text(), server_default="", nullable=False),
        sa.Column("specialty_key", sa.Text(), server_default="", nullable=False),
        sa.Column("license_number", sa.Text(), server_default="", nullable=False),
        sa.Column("qualifications", sa.Text(), server_default="", nullable=False),
        sa.Column("experience_years", sa.Integer(), server_default="0", nullable=False),
        sa.Column("clinic_id", sa.Uuid(), nullable=False),
        sa.Column("max_patients_per_day", sa.Integer(), server_default="10", nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.CheckConstraint("max_patients_per_day between 1 and 1000", name="doctor_max_patients_per_day_check"),
        sa.ForeignKeyConstraint(["clinic_id"], ["clinic.id"], name="doctor_clinic_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="doctor_pkey"),
        sa.UniqueConstraint("code", name="doctor_code_key"),
    )
    op.create_index("doctor_clinic_idx", "doctor", ["clinic_id", "id"], unique=False)
    op.create_index(
        "doctor_license_number_key",
        "doctor",
        ["license_number"],
        unique=True,
        postgresql_where=sa.text("license_number <> ''"),
    )
    op.create_index("doctor_specialty_idx", "doctor", ["specialty_key", "id"], unique=False)

    op.create_table(
        "leave",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("clinic_id", sa.Uuid(), nullable=False),
        sa.Column("whole_days", sa.Boolean(), nullable=False),
        sa.Column("from_date", sa.Date(), nullable=False),
        sa.Column("to_date", sa.Date(), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="APPLYING", nullable=False),
        sa.Column("next_date", sa.Date(), nullable=False),
        sa.Column("settled", sa.Integer(), server_default="0", nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), server_default="", nullable=False),
        sa.Column("trace_id", sa.Text(), server_default="", nullable=False),
        sa.Column("version", sa.Integer(), server_default="1", nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        postgresql.ExcludeConstraint(
            (sa.text("uuidrange(doctor_id, doctor_id, '[]')"), "&&"),
            (sa.text("tstzrange(start_time, end_time)"), "&&"),
            using="gist",
            where=sa.text("state <> 'CANCELLED'"),
            name="leave_doctor_overlap",
        ),
        sa.CheckConstraint("from_date <= to_date and start_time < end_time", name="leave_interval_check"),
        sa.CheckConstraint(
            "policy in ('KEEP', 'CANCEL', 'MOVE_SAME_DOCTOR', 'MOVE_SAME_SPECIALTY')", name="leave_policy_check"
        ),
        sa.CheckConstraint("state in ('APPLYING', 'APPLIED', 'CANCELLED')", name="leave_state_check"),
        sa.PrimaryKeyConstraint("id", name="leave_pkey"),
    )
    op.create_index("leave_doctor_idx", "leave", ["doctor_id", "to_date"], unique=False)
    op.create_index("leave_applying_idx", "leave", ["id"], unique=False, postgresql_where=sa.text("state = 'APPLYING'"))
    op.create_table(
        "leave_outcome",
        sa.Column("leave_id", sa.Uuid(), nullable=False),
        sa.Column("appointment_id", sa.Uuid(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=True),
        sa.Column("date", sa.Date(), nullable=True),
        sa.Column("slot_id", sa.Uuid(), nullable=True),
        sa.CheckConstraint(
            "outcome in ('KEPT', 'CANCELLED', 'MOVED', 'NOT_MOVED')", name="leave_outcome_outcome_check"
        ),
        sa.CheckConstraint(
            "(outcome = 'MOVED') = (doctor_id is not null and date is not null)", name="leave_outcome_moved_check"
        ),
        sa.PrimaryKeyConstraint("leave_id", "appointment_id", name="leave_outcome_pkey"),
    )
    op.create_index(
        "leave_outcome_place_idx",
        "leave_outcome",
        ["doctor_id", "date", "leave_id"],
        unique=False,
        postgresql_where=sa.text("outcome = 'MOVED'"),
    )

    op.create_table(
        "hold",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("clinic_id", sa.Uuid(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("slot_id", sa.Uuid(), nullable=True),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("entry_id", sa.Uuid(), nullable=True),
        sa.Column("state", sa.Text(), server_default="HELD", nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("state in ('HELD', 'USED', 'RELEASED')", name="hold_state_check"),
        sa.CheckConstraint("create_time < expire_time", name="hold_interval_check"),
        sa.PrimaryKeyConstraint("id", name="hold_pkey"),
    )
    op.create_index(
        "hold_live_idx",
        "hold",
        ["doctor_id", "date", "expire_time"],
        unique=False,
        postgresql_where=sa.text("state = 'HELD'"),
    )
    op.create_index(
        "hold_patient_idx",
        "hold",
        ["patient_id"],
        unique=False,
        postgresql_where=sa.text("state = 'HELD' and patient_id is not null"),
    )
    op.create_index("hold_expire_time_idx", "hold", ["expire_time"], unique=False, postgresql_using="brin")
    op.create_table(
        "waitlist_entry",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("clinic_id", sa.Uuid(), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=True),
        sa.Column("specialty", sa.Text(), server_default="", nullable=False),
        sa.Column("specialty_key", sa.Text(), server_default="", nullable=False),
        sa.Column("from_date", sa.Date(), nullable=False),
        sa.Column("to_date", sa.Date(), nullable=False),
        sa.Column("weekdays", sa.ARRAY(sa.Integer()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("earliest", sa.Integer(), nullable=True),
        sa.Column("latest", sa.Integer(), nullable=True),
        sa.Column("appointment_id", sa.Uuid(), nullable=True),
        sa.Column("appointment_doctor", sa.Uuid(), nullable=True),
        sa.Column("appointment_date", sa.Date(), nullable=True),
        sa.Column("appointment_slot", sa.Uuid(), nullable=True),
        sa.Column("priority", sa.Text(), server_default="NORMAL", nullable=False),
        sa.Column("rank", sa.Integer(), server_default="3", nullable=False),
        sa.Column("state", sa.Text(), server_default="WAITING", nullable=False),
        sa.Column("hold_id", sa.Uuid(), nullable=True),
        sa.Column("withdrawn", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("booked_appointment_id", sa.Uuid(), nullable=True),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint(
            "state in ('WAITING', 'OFFERED', 'BOOKED', 'LEFT', 'EXPIRED')", name="waitlist_entry_state_check"
        ),
        sa.CheckConstraint("(doctor_id is null) = (specialty_key <> '')", name="waitlist_entry_target_check"),
        sa.CheckConstraint("from_date <= to_date", name="waitlist_entry_dates_check"),
        sa.PrimaryKeyConstraint("id", name="waitlist_entry_pkey"),
    )
    for name, columns, where in (
        (
            "waitlist_doctor_idx",
            ["doctor_id", "rank", "create_time", "id", "from_date", "to_date"],
            "state = 'WAITING'",
        ),
        (
            "waitlist_specialty_idx",
            ["clinic_id", "specialty_key", "rank", "create_time", "id", "from_date", "to_date"],
            "state = 'WAITING' and doctor_id is null",
        ),
        ("waitlist_to_date_idx", ["to_date"], "state in ('WAITING', 'OFFERED')"),
        (
            "waitlist_appointment_idx",
            ["appointment_id"],
            "state in ('WAITING', 'OFFERED') and appointment_id is not null",
        ),
        ("waitlist_offered_idx", ["id"], "state = 'OFFERED'"),
    ):
        op.create_index(name, "waitlist_entry", columns, unique=False, postgresql_where=sa.text(where))
    op.create_index("waitlist_clinic_idx", "waitlist_entry", ["clinic_id", "id"], unique=False)
    op.create_index("waitlist_patient_idx", "waitlist_entry", ["patient_id", "id"], unique=False)
    op.create_index("waitlist_doctor_list_idx", "waitlist_entry", ["doctor_id", "id"], unique=False)
    op.create_table(
        "waitlist_pass",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("entry_id", sa.Uuid(), nullable=False),
        sa.Column("doctor_id", sa.Uuid(), nullable=False),
        sa.Column("date", sa.Date(), nullable=False),
        sa.Column("slot_id", sa.Uuid(), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="waitlist_pass_pkey"),
    )
    op.create_index("waitlist_pass_entry_idx", "waitlist_pass", ["entry_id"], unique=False)

    op.create_table(
        "notification",
        sa.Column("id", sa.Uuid(), server_default=sa.text("new_id()"), nullable=False),
        sa.Column("cause", sa.Uuid(), nullable=False),
        sa.Column("position", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="PLANNED", nullable=False),
        sa.Column("skip_reason", sa.Text(), server_default="", nullable=False),
        sa.Column("appointment_id", sa.Uuid(), nullable=True),
        sa.Column("patient_id", sa.Uuid(), nullable=True),
        sa.Column("clinic_id", sa.Uuid(), nullable=True),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("hold_id", sa.Uuid(), nullable=True),
        sa.Column("doctor_id", sa.Uuid(), nullable=True),
        sa.Column("date", sa.Date(), nullable=True),
        sa.Column("slot_id", sa.Uuid(), nullable=True),
        sa.Column("sequence", sa.Integer(), server_default="0", nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failure", sa.Text(), server_default="", nullable=False),
        sa.Column("plan_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("send_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("try_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("due_since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("told", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.CheckConstraint(
            "state in ('PLANNED', 'SENDING', 'SENT', 'SKIPPED', 'DEAD')"
            " and (state = 'SKIPPED') = (skip_reason <> '')"
            " and channel in ('EMAIL', 'WEBHOOK')",
            name="notification_state_check",
        ),
        sa.CheckConstraint("num_nonnulls(user_id, appointment_id, hold_id) = 1", name="notification_about_check"),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name="notification_user_id_fkey"),
        sa.PrimaryKeyConstraint("id", name="notification_pkey"),
    )
    op.create_index("notification_cause_key", "notification", ["cause", "channel", "kind", "plan_time"], unique=True)
    op.create_index(
        "notification_due_idx",
        "notification",
        ["channel", "plan_time", "id"],
        unique=False,
        postgresql_where=sa.text("state in ('PLANNED', 'SENDING')"),
    )
    op.create_index("notification_appointment_idx", "notification", ["appointment_id", "id"], unique=False)
    op.create_index("notification_patient_idx", "notification", ["patient_id", "id"], unique=False)
    op.create_index(
        "notification_dead_idx",
        "notification",
        ["plan_time"],
        unique=False,
        postgresql_where=sa.text("state = 'DEAD'"),
    )
    op.create_index(
        "notification_user_idx",
        "notification",
        ["user_id"],
        unique=False,
        postgresql_where=sa.text("user_id is not null"),
    )
    op.create_table(
        "contact_preferences",
        sa.Column("patient_id", sa.Uuid(), nullable=False),
        sa.Column("channels", postgresql.ARRAY(sa.Text()), nullable=False),
        sa.Column("language", sa.Text(), server_default="", nullable=False),
        sa.Column("reminders", sa.Boolean(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("update_time", sa.DateTime(timezone=True), server_default=sa.text("moment()"), nullable=False),
        sa.PrimaryKeyConstraint("patient_id", name="contact_preferences_pkey"),
    )
    op.create_table(
        "email_code",
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["user_id"], ["user_account.id"], name="email_code_user_id_fkey"),
        sa.PrimaryKeyConstraint("hash", name="email_code_pkey"),
    )
    op.create_index("email_code_user_id_idx", "email_code", ["user_id"], unique=False)
    # Nobody is told of what was changed before there were notifications.
    op.execute("insert into log_reader (name, position) select 'notifications', coalesce(max(position), 0) from seal")

    op.execute(
        sa.text("insert into clinic (name, time_zone, is_default) values ('Default clinic', :zone, true)").bindparams(
            zone=context.config.attributes["default_time_zone"]
        )
    )
