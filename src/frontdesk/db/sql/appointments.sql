-- The functions that decide keep one plan for every call (plan_cache_mode): planning anew each time was the largest cost
-- of a booking. A plan that is kept may have been made while the tables were empty, when reading a whole table looks
-- cheap, and it stays until the next ANALYZE; so they may not (enable_seqscan). All that they look for has an index.

-- What the booking functions answer. `outcome` is OK or the reason of a refusal; `subject` the id that the refusal is
-- about, `detail` its state or date. The rest is the change: the appointment as it is after it, its place in the line,
-- and the revisions of the doctor-days, with the one that a reschedule left.
do $do$
begin
    if to_regtype('decision') is null then
        create type decision as (
            outcome text, subject uuid, detail text, replayed boolean,
            revision bigint, vacated_revision bigint, vacated_doctor uuid, vacated_date date,
            "position" integer, patient_name text,
            appointment appointment
        );
    end if;
end
$do$;

-- A change that a caller asks for; what its verb has no use for is null.
do $do$
begin
    if to_regtype('request') is null then
        create type request as (
            verb text, method text, caller text, key text, fingerprint bytea,
            appointment uuid, version integer, patient uuid, slot uuid, doctor uuid, date date,
            reason text, notes text, text text, validate_only boolean
        );
    end if;
end
$do$;

-- What the caller's key did before: `outcome` is null where it did nothing yet, OK where it did this very request.
-- Look after the lock: a concurrent twin holds it until its own answer is stored.
create or replace function recall(
    p_caller text, p_method text, p_key text, p_fingerprint bytea, out outcome text, out first idempotency
) language plpgsql as $$
begin
    select * into first from idempotency where caller = p_caller and method = p_method and key = p_key;
    if not found then return; end if;
    outcome := case when first.fingerprint = p_fingerprint then 'OK' else 'IDEMPOTENCY_KEY_REUSED' end;
end
$$;

-- The answer that the key got before, of an appointment; null in `outcome` where it got none.
create or replace function replay(p_caller text, p_method text, p_key text, p_fingerprint bytea)
returns decision language plpgsql as $$
declare
    v_known record;
    v_first idempotency;
    v_answer decision;
begin
    v_known := recall(p_caller, p_method, p_key, p_fingerprint);
    v_answer.outcome := v_known.outcome;
    if v_known.outcome is distinct from 'OK' then return v_answer; end if;
    v_first := v_known.first;
    v_answer.replayed := true;
    v_answer.revision := v_first.revision;
    v_answer.vacated_revision := v_first.vacated_revision;
    select a into v_answer.appointment from appointment a where a.id = v_first.result_id;
    v_answer.appointment := jsonb_populate_record(v_answer.appointment, v_first.snapshot);
    return v_answer;
end
$$;

-- Store what a key did with an appointment, all of it that a later change may overwrite.
create or replace function remember(p_caller text, p_method text, p_key text, p_fingerprint bytea, p_answer decision)
returns void language sql as $$
    select remember_row(
        p_caller, p_method, p_key, p_fingerprint, (p_answer.appointment).id,
        to_jsonb(p_answer.appointment) - '{id,patient_id,reason,notes,cancel_reason,create_time}'::text[],
        p_answer.revision, p_answer.vacated_revision)
$$;

-- Count one change of a doctor-day, under its lock. The row is its counter: a sequence would leave gaps on rollback.
create or replace function count_change(
    p_doctor uuid, p_date date, p_tickets integer, p_now timestamptz, out revision bigint, out last_ticket integer
) language plpgsql as $$
begin
    insert into doctor_day as d (doctor_id, date, revision, last_ticket, update_time)
    values (p_doctor, p_date, 2, p_tickets, p_now)
    on conflict (doctor_id, date) do update
        set revision = d.revision + 1, last_ticket = d.last_ticket + p_tickets, update_time = p_now
    returning d.revision, d.last_ticket into count_change.revision, count_change.last_ticket;
end
$$;

-- Append the change to the doctor-day's history.
create or replace function append_event(
    p_appointment appointment, p_revision bigint, p_kind text, p_in_line boolean, p_now timestamptz
) returns void language plpgsql as $$
begin
    if p_in_line then
        insert into event (doctor_id, date, revision, kind, appointment_id, create_time, queue_state, ticket, room,
                           call_count, check_in_time, call_time, start_visit_time)
        values (p_appointment.doctor_id, p_appointment.date, p_revision, p_kind, p_appointment.id, p_now,
                p_appointment.queue_state, p_appointment.ticket, p_appointment.room, p_appointment.call_count,
                p_appointment.check_in_time, p_appointment.call_time, p_appointment.start_visit_time);
    else
        insert into event (doctor_id, date, revision, kind, appointment_id, create_time)
        values (p_appointment.doctor_id, p_appointment.date, p_revision, p_kind, p_appointment.id, p_now);
    end if;
end
$$;

-- Is there a place for this patient in that slot or doctor-day? Under the lock of the doctor-day and, for a slot, of the
-- patient. Answers OK with a place, or why not. `p_moving` is the appointment that would give its own place up.
create or replace function find_place(
    p_patient uuid, p_doctor uuid, p_date date, p_slot uuid, p_moving uuid, p_now timestamptz,
    out outcome text, out subject uuid, out detail text,
    out clinic_id uuid, out number integer, out start_time timestamptz, out end_time timestamptz
) language plpgsql as $$
declare
    v record;
    v_slot slot;
    v_taken integer;
    v_highest integer;
begin
    select p.active as patient_active, d.id as doctor_id, d.active as doctor_active, d.clinic_id,
           c.active as clinic_active, (p_now at time zone c.time_zone)::date as today,
           coalesce(day.is_present, true) as is_present,
           coalesce(day.max_patients, d.max_patients_per_day) as capacity
    into v
    from (select 1) one
    left join patient p on p.id = p_patient
    left join doctor d on d.id = p_doctor
    left join clinic c on c.id = d.clinic_id
    left join doctor_day day on day.doctor_id = p_doctor and day.date = p_date;

    subject := p_patient;
    if v.patient_active is null then outcome := 'PATIENT_NOT_FOUND'; return; end if;
    if not v.patient_active then outcome := 'PATIENT_INACTIVE'; return; end if;

    if p_slot is not null then
        select * into v_slot from slot where id = p_slot;
        subject := p_slot;
        if not found then outcome := 'SLOT_NOT_FOUND'; return; end if;
        if v_slot.state = 'BLOCKED' then outcome := 'SLOT_BLOCKED'; return; end if;
        if v_slot.start_time <= p_now then outcome := 'SLOT_IN_PAST'; return; end if;
        start_time := v_slot.start_time;
        end_time := v_slot.end_time;
    end if;

    subject := p_doctor;
    detail := p_date;
    if v.doctor_id is null then outcome := 'DOCTOR_NOT_FOUND'; return; end if;
    if not v.doctor_active then outcome := 'DOCTOR_INACTIVE'; return; end if;
    if not v.clinic_active then outcome := 'CLINIC_INACTIVE'; return; end if;
    if p_date < v.today then outcome := 'DATE_IN_PAST'; return; end if;
    if not v.is_present then outcome := 'DOCTOR_ABSENT'; return; end if;
    clinic_id := v.clinic_id;

    select id into subject from appointment a
    where a.patient_id = p_patient and a.doctor_id = p_doctor and a.date = p_date
      and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION') and a.id is distinct from p_moving;
    if found then outcome := 'DUPLICATE_BOOKING'; return; end if;

    if p_slot is not null then
        select id into subject from appointment a
        where uuidrange(a.patient_id, a.patient_id, '[]') && uuidrange(p_patient, p_patient, '[]')
          and tstzrange(a.start_time, a.end_time) && tstzrange(v_slot.start_time, v_slot.end_time)
          and a.start_time is not null and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION')
          and a.id is distinct from p_moving
        limit 1;
        if found then outcome := 'PATIENT_OVERLAP'; return; end if;

        select count(*) into v_taken from appointment a
        where a.slot_id = p_slot and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')
          and a.id is distinct from p_moving;
        if v_taken >= v_slot.capacity then outcome := 'SLOT_FULL'; subject := p_slot; return; end if;
    end if;

    select count(*), coalesce(max(a.number), 0) into v_taken, v_highest from appointment a
    where a.doctor_id = p_doctor and a.date = p_date
      and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')
      and a.id is distinct from p_moving;
    subject := p_doctor;
    if v_taken >= v.capacity then outcome := 'DAY_FULL'; return; end if;

    -- The lowest free number. Numbers are distinct, so as many as the highest means that there is no gap.
    number := v_taken + 1;
    if v_highest > v_taken then
        select min(n) into number
        from generate_series(1, v_taken + 1) n
        where not exists (
            select from appointment a
            where a.doctor_id = p_doctor and a.date = p_date and a.number = n
              and a.state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED')
              and a.id is distinct from p_moving);
    end if;
    outcome := 'OK';
end
$$;

-- Book a place of a slot (p_slot) or of a doctor-day (p_doctor, p_date).
create or replace function book_appointment(
    p_caller text, p_key text, p_fingerprint bytea,
    p_patient uuid, p_slot uuid, p_doctor uuid, p_date date, p_reason text, p_notes text, p_validate_only boolean
) returns decision language plpgsql as $$
declare
    v_answer decision;
    v_place record;
    v_now timestamptz;
begin
    if p_slot is not null then
        -- A slot's doctor and date never change, so they may be read before the lock.
        select doctor_id, date into p_doctor, p_date from slot where id = p_slot;
        perform lock_all(array[doctor_day_name(p_doctor, p_date), 'patient/' || p_patient]);
    else
        perform lock_doctor_day(p_doctor, p_date);
    end if;

    if p_key <> '' then
        v_answer := replay(p_caller, 'BookAppointment', p_key, p_fingerprint);
        if v_answer.outcome is not null then return v_answer; end if;
    end if;

    v_now := moment();
    v_place := find_place(p_patient, p_doctor, p_date, p_slot, null, v_now);
    v_answer.outcome := v_place.outcome;
    if v_place.outcome <> 'OK' then
        v_answer.subject := v_place.subject;
        v_answer.detail := v_place.detail;
        return v_answer;
    end if;

    if p_validate_only then
        v_answer.appointment := jsonb_populate_record(null::appointment, jsonb_build_object(
            'patient_id', p_patient, 'doctor_id', p_doctor, 'clinic_id', v_place.clinic_id, 'date', p_date,
            'number', v_place.number, 'slot_id', p_slot, 'start_time', v_place.start_time, 'end_time', v_place.end_time,
            'state', 'BOOKED', 'reason', p_reason, 'notes', p_notes, 'cancel_reason', '', 'room', '', 'call_count', 0));
        return v_answer;
    end if;

    insert into appointment as a (patient_id, doctor_id, clinic_id, date, number, slot_id, start_time, end_time, state,
                                  reason, notes, create_time, update_time)
    values (p_patient, p_doctor, v_place.clinic_id, p_date, v_place.number, p_slot, v_place.start_time,
            v_place.end_time, 'BOOKED', p_reason, p_notes, v_now, v_now)
    returning a into v_answer.appointment;
    select c.revision into v_answer.revision from count_change(p_doctor, p_date, 0, v_now) c;
    perform append_event(v_answer.appointment, v_answer.revision, 'BOOKED', false, v_now);
    if p_key <> '' then
        perform remember(p_caller, 'BookAppointment', p_key, p_fingerprint, v_answer);
    end if;
    return v_answer;
end
$$;

-- Move a BOOKED appointment to another slot or doctor-day. The old place is given up in the same transaction as the new
-- one is got, or not at all.
create or replace function reschedule_appointment(
    p_caller text, p_key text, p_fingerprint bytea,
    p_appointment uuid, p_version integer, p_slot uuid, p_doctor uuid, p_date date
) returns decision language plpgsql as $$
declare
    v_answer decision;
    v_old appointment;
    v_read appointment;
    v_place record;
    v_now timestamptz;
begin
    select * into v_read from appointment where id = p_appointment;
    if p_slot is not null then
        select doctor_id, date into p_doctor, p_date from slot where id = p_slot;
    end if;
    perform lock_all(array_remove(array[
        doctor_day_name(v_read.doctor_id, v_read.date), doctor_day_name(p_doctor, p_date),
        'patient/' || v_read.patient_id], null));

    if p_key <> '' then
        v_answer := replay(p_caller, 'RescheduleAppointment', p_key, p_fingerprint);
        if v_answer.outcome is not null then return v_answer; end if;
    end if;

    v_answer.subject := p_appointment;
    select * into v_old from appointment where id = p_appointment;
    if not found then v_answer.outcome := 'APPOINTMENT_NOT_FOUND'; return v_answer; end if;
    if (v_old.doctor_id, v_old.date) <> (v_read.doctor_id, v_read.date) then
        raise exception 'the appointment was moved meanwhile' using errcode = 'serialization_failure';
    end if;
    if p_version is distinct from v_old.version and p_version is not null then
        v_answer.outcome := 'ETAG_MISMATCH';
        return v_answer;
    end if;
    if v_old.state <> 'BOOKED' then
        v_answer.outcome := 'INVALID_TRANSITION';
        v_answer.detail := v_old.state;
        return v_answer;
    end if;

    v_now := moment();
    v_place := find_place(v_old.patient_id, p_doctor, p_date, p_slot, p_appointment, v_now);
    v_answer.outcome := v_place.outcome;
    if v_place.outcome <> 'OK' then
        v_answer.subject := v_place.subject;
        v_answer.detail := v_place.detail;
        return v_answer;
    end if;

    update appointment as a
    set doctor_id = p_doctor, clinic_id = v_place.clinic_id, date = p_date, number = v_place.number, slot_id = p_slot,
        start_time = v_place.start_time, end_time = v_place.end_time, version = a.version + 1, update_time = v_now
    where a.id = p_appointment
    returning a into v_answer.appointment;

    if (v_old.doctor_id, v_old.date) <> (p_doctor, p_date) then
        select c.revision into v_answer.vacated_revision from count_change(v_old.doctor_id, v_old.date, 0, v_now) c;
        perform append_event(v_old, v_answer.vacated_revision, 'MOVED_OUT', false, v_now);
    end if;
    select c.revision into v_answer.revision from count_change(p_doctor, p_date, 0, v_now) c;
    perform append_event(v_answer.appointment, v_answer.revision, 'MOVED_IN', false, v_now);
    v_answer.vacated_revision := coalesce(v_answer.vacated_revision, v_answer.revision);
    v_answer.vacated_doctor := v_old.doctor_id;
    v_answer.vacated_date := v_old.date;
    if p_key <> '' then
        perform remember(p_caller, 'RescheduleAppointment', p_key, p_fingerprint, v_answer);
    end if;
    return v_answer;
end
$$;

-- Change reason and notes; null keeps one.
create or replace function update_appointment(
    p_caller text, p_key text, p_fingerprint bytea, p_appointment uuid, p_version integer, p_reason text, p_notes text
) returns decision language plpgsql as $$
declare
    v_answer decision;
    v_now timestamptz;
begin
    v_answer := lock_appointment(p_caller, 'UpdateAppointment', p_key, p_fingerprint, p_appointment, p_version);
    if v_answer.outcome is not null then return v_answer; end if;
    v_now := moment();
    v_answer.outcome := 'OK';
    update appointment as a
    set reason = coalesce(p_reason, a.reason), notes = coalesce(p_notes, a.notes), version = a.version + 1,
        update_time = v_now
    where a.id = p_appointment
    returning a into v_answer.appointment;
    select c.revision into v_answer.revision
    from count_change((v_answer.appointment).doctor_id, (v_answer.appointment).date, 0, v_now) c;
    perform append_event(v_answer.appointment, v_answer.revision, 'UPDATED', false, v_now);
    if p_key <> '' then
        perform remember(p_caller, 'UpdateAppointment', p_key, p_fingerprint, v_answer);
    end if;
    return v_answer;
end
$$;

-- Lock the doctor-day of an appointment and read the appointment under the lock. `outcome` is null where the caller
-- may go on, with the row in `appointment`; else it is the answer: a replay or a refusal.
create or replace function lock_appointment(
    p_caller text, p_method text, p_key text, p_fingerprint bytea, p_appointment uuid, p_version integer
) returns decision language plpgsql as $$
declare
    v_answer decision;
    v_doctor uuid;
    v_date date;
begin
    select doctor_id, date into v_doctor, v_date from appointment where id = p_appointment;
    if not found then
        v_answer.outcome := 'APPOINTMENT_NOT_FOUND';
        v_answer.subject := p_appointment;
        return v_answer;
    end if;
    perform lock_doctor_day(v_doctor, v_date);

    if p_key <> '' then
        v_answer := replay(p_caller, p_method, p_key, p_fingerprint);
        if v_answer.outcome is not null then return v_answer; end if;
    end if;

    -- What was read before the lock may have been moved while we waited.
    select a into v_answer.appointment from appointment a where a.id = p_appointment;
    if ((v_answer.appointment).doctor_id, (v_answer.appointment).date) <> (v_doctor, v_date) then
        raise exception 'the appointment was moved meanwhile' using errcode = 'serialization_failure';
    end if;
    v_answer.subject := p_appointment;
    if p_version is not null and p_version <> (v_answer.appointment).version then
        v_answer.outcome := 'ETAG_MISMATCH';
    end if;
    return v_answer;
end
$$;

-- The verbs of a visit and of the line: each is one transition, one revision, one event.
--
--   verb        visit state                      line                                 kind
--   CheckIn     BOOKED -> CHECKED_IN             -> WAITING, the next ticket          CHECKED_IN
--   Start       CHECKED_IN -> IN_CONSULTATION    WAITING, CALLED -> IN_CONSULTATION   STARTED
--   Complete    IN_CONSULTATION -> COMPLETED     -> DONE                              COMPLETED
--   Cancel      BOOKED, CHECKED_IN -> CANCELLED  any -> LEFT                          CANCELLED
--   NoShow      BOOKED -> NO_SHOW                                                     NO_SHOW
--   CallAgain   CHECKED_IN                       CALLED -> CALLED                     CALLED_AGAIN
--   Return      CHECKED_IN                       CALLED, PARKED, MISSED -> WAITING    RETURNED
--   Park        CHECKED_IN                       WAITING, CALLED -> PARKED            PARKED
--   Miss        CHECKED_IN                       CALLED -> MISSED                     MISSED
--   Leave       CHECKED_IN -> LEFT               any -> LEFT                          LEFT
--
-- `p_text` is Cancel's reason and CallAgain's room; `p_patient` is CheckIn's guard.
create or replace function change_visit(
    p_caller text, p_method text, p_key text, p_fingerprint bytea,
    p_verb text, p_appointment uuid, p_version integer, p_text text, p_patient uuid
) returns decision language plpgsql as $$
declare
    v_answer decision;
    v_old appointment;
    v_new appointment;
    v_now timestamptz;
    v_allowed boolean;
    v_kind text;
    v_change record;
begin
    v_answer := lock_appointment(p_caller, p_method, p_key, p_fingerprint, p_appointment, p_version);
    if v_answer.outcome is not null then
        if v_answer.replayed then v_answer := with_place_in_line(v_answer); end if;
        return v_answer;
    end if;
    v_now := moment();
    v_old := v_answer.appointment;
    v_new := v_old;
    v_answer.appointment := null;

    if p_patient <> v_old.patient_id then
        v_answer.outcome := 'PATIENT_MISMATCH';
        return v_answer;
    end if;

    case p_verb
        when 'CheckIn' then
            v_allowed := v_old.state = 'BOOKED';
            v_kind := 'CHECKED_IN';
            v_new.state := 'CHECKED_IN';
            v_new.queue_state := 'WAITING';
            v_new.check_in_time := v_now;
            if v_old.state in ('CHECKED_IN', 'IN_CONSULTATION') then
                v_answer.outcome := 'ALREADY_CHECKED_IN';
                return v_answer;
            end if;
        when 'Start' then
            v_allowed := v_old.queue_state in ('WAITING', 'CALLED');
            v_kind := 'STARTED';
            v_new.state := 'IN_CONSULTATION';
            v_new.queue_state := 'IN_CONSULTATION';
            v_new.start_visit_time := v_now;
        when 'Complete' then
            v_allowed := v_old.state = 'IN_CONSULTATION';
            v_kind := 'COMPLETED';
            v_new.state := 'COMPLETED';
            v_new.queue_state := 'DONE';
            v_new.complete_time := v_now;
        when 'Cancel' then
            v_allowed := v_old.state in ('BOOKED', 'CHECKED_IN');
            v_kind := 'CANCELLED';
            v_new.state := 'CANCELLED';
            if v_old.queue_state is not null then v_new.queue_state := 'LEFT'; end if;
            v_new.cancel_time := v_now;
            v_new.cancel_reason := p_text;
        when 'NoShow' then
            v_allowed := v_old.state = 'BOOKED';
            v_kind := 'NO_SHOW';
            v_new.state := 'NO_SHOW';
            v_new.no_show_time := v_now;
        when 'CallAgain' then
            v_allowed := v_old.queue_state = 'CALLED';
            v_kind := 'CALLED_AGAIN';
            v_new.call_count := v_old.call_count + 1;
            v_new.call_time := v_now;
            v_new.room := coalesce(nullif(p_text, ''), v_old.room);
        when 'Return' then
            v_allowed := v_old.queue_state in ('CALLED', 'PARKED', 'MISSED');
            v_kind := 'RETURNED';
            v_new.queue_state := 'WAITING';
            v_new.room := '';
        when 'Park' then
            v_allowed := v_old.queue_state in ('WAITING', 'CALLED');
            v_kind := 'PARKED';
            v_new.queue_state := 'PARKED';
            v_new.room := '';
        when 'Miss' then
            v_allowed := v_old.queue_state = 'CALLED';
            v_kind := 'MISSED';
            v_new.queue_state := 'MISSED';
        when 'Leave' then
            v_allowed := v_old.state = 'CHECKED_IN';
            v_kind := 'LEFT';
            v_new.state := 'LEFT';
            v_new.queue_state := 'LEFT';
            v_new.leave_time := v_now;
    end case;
    if not coalesce(v_allowed, false) then
        v_answer.outcome := 'INVALID_TRANSITION';
        v_answer.detail := case when v_old.state = 'CHECKED_IN' then v_old.queue_state else v_old.state end;
        return v_answer;
    end if;

    if p_verb in ('CheckIn', 'NoShow') then
        declare
            v_today date;
        begin
            select (v_now at time zone c.time_zone)::date into v_today from clinic c where c.id = v_old.clinic_id;
            if p_verb = 'CheckIn' and v_today <> v_old.date then
                v_answer.outcome := 'NOT_APPOINTMENT_DATE';
            elsif p_verb = 'NoShow' and (v_today < v_old.date or v_now < v_old.start_time) then
                v_answer.outcome := 'TOO_EARLY';
            end if;
            if v_answer.outcome is not null then
                v_answer.detail := v_old.date;
                return v_answer;
            end if;
        end;
    end if;

    v_change := count_change(v_old.doctor_id, v_old.date, (p_verb = 'CheckIn')::integer, v_now);
    if p_verb = 'CheckIn' then
        v_new.ticket := v_change.last_ticket;
    end if;
    if v_new.queue_state = 'WAITING' then
        -- Behind everyone who has a ticket now and before everyone who will; one returned later comes after.
        v_new.line_order := case when v_old.queue_state = 'MISSED'
            then (v_change.last_ticket::bigint << 32) + v_change.revision
            else v_new.ticket::bigint << 32 end;
    end if;

    update appointment a
    set state = v_new.state, queue_state = v_new.queue_state, ticket = v_new.ticket, line_order = v_new.line_order,
        room = v_new.room, call_count = v_new.call_count, call_time = v_new.call_time,
        check_in_time = v_new.check_in_time, start_visit_time = v_new.start_visit_time,
        complete_time = v_new.complete_time, cancel_time = v_new.cancel_time, cancel_reason = v_new.cancel_reason,
        no_show_time = v_new.no_show_time, leave_time = v_new.leave_time,
        version = a.version + 1, update_time = v_now
    where a.id = p_appointment
    returning a into v_answer.appointment;
    v_answer.outcome := 'OK';
    v_answer.revision := v_change.revision;
    perform append_event(v_answer.appointment, v_answer.revision, v_kind, v_new.queue_state is not null, v_now);
    if p_key <> '' then
        perform remember(p_caller, p_method, p_key, p_fingerprint, v_answer);
    end if;
    return with_place_in_line(v_answer);
end
$$;

-- Call the first waiting patient. Under the lock of the doctor-day, so two callers get two patients.
create or replace function call_next(
    p_caller text, p_key text, p_fingerprint bytea, p_doctor uuid, p_date date, p_room text
) returns decision language plpgsql as $$
declare
    v_answer decision;
    v_now timestamptz;
    v_first uuid;
begin
    if p_date is null then
        p_date := clinic_today(p_doctor);
    end if;
    perform lock_doctor_day(p_doctor, p_date);
    if p_key <> '' then
        v_answer := replay(p_caller, 'CallNext', p_key, p_fingerprint);
        if v_answer.outcome is not null then return with_place_in_line(v_answer); end if;
    end if;

    v_answer.subject := p_doctor;
    select id into v_first from appointment
    where doctor_id = p_doctor and date = p_date and ticket is not null and queue_state = 'WAITING'
    order by line_order limit 1;
    if not found then
        perform from doctor where id = p_doctor;
        v_answer.outcome := case when found then 'QUEUE_EMPTY' else 'DOCTOR_NOT_FOUND' end;
        v_answer.detail := p_date;
        return v_answer;
    end if;

    v_now := moment();
    update appointment a
    set queue_state = 'CALLED', room = p_room, call_count = a.call_count + 1, call_time = v_now,
        version = a.version + 1, update_time = v_now
    where a.id = v_first
    returning a into v_answer.appointment;
    v_answer.outcome := 'OK';
    select c.revision into v_answer.revision from count_change(p_doctor, p_date, 0, v_now) c;
    perform append_event(v_answer.appointment, v_answer.revision, 'CALLED', true, v_now);
    if p_key <> '' then
        perform remember(p_caller, 'CallNext', p_key, p_fingerprint, v_answer);
    end if;
    return with_place_in_line(v_answer);
end
$$;

-- The entry's present position and the patient's name, for the answer.
create or replace function with_place_in_line(p_answer decision) returns decision language plpgsql as $$
begin
    if (p_answer.appointment).queue_state = 'WAITING' then
        select count(*) into p_answer."position" from appointment a
        where a.doctor_id = (p_answer.appointment).doctor_id and a.date = (p_answer.appointment).date
          and a.ticket is not null and a.queue_state = 'WAITING'
          and a.line_order <= (p_answer.appointment).line_order;
    end if;
    if (p_answer.appointment).queue_state is not null then
        select concat_ws(' ', p.given_name, nullif(p.family_name, '')) into p_answer.patient_name
        from patient p where p.id = (p_answer.appointment).patient_id;
    end if;
    return p_answer;
end
$$;

-- The civil date in the time zone of the doctor's clinic; null where there is no such doctor.
create or replace function clinic_today(p_doctor uuid) returns date language sql volatile as $$
    select (moment() at time zone c.time_zone)::date
    from doctor d join clinic c on c.id = d.clinic_id where d.id = p_doctor
$$;

-- Decide what several callers ask for at once, each as if it came alone, and answer in the same order. The worker sends
-- together what arrived while it waited for the last answer: one round trip, one commit and one flush for all of them.
--
-- With one request each function takes its own locks. With several all are taken here first, in the order that every
-- transaction keeps: taken one request after another, two batches could wait for each other.
create or replace function decide(p_requests json) returns setof decision language plpgsql
    set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    r request;
begin
    if json_array_length(p_requests) > 1 then
        -- Nobody waits long because another one's doctor-day is held: the worker asks again for each alone.
        perform set_config('lock_timeout', '100ms', true);
        perform lock_all(array(
            select name
            from json_populate_recordset(null::request, p_requests) q
            left join slot s on s.id = q.slot
            left join appointment a on a.id = q.appointment
            cross join lateral (values
                (doctor_day_name(coalesce(s.doctor_id, q.doctor), coalesce(s.date, q.date, clinic_today(q.doctor)))),
                (doctor_day_name(a.doctor_id, a.date)),
                (case when q.verb = 'Book' and q.slot is not null or q.verb = 'Reschedule'
                      then 'patient/' || coalesce(a.patient_id, q.patient) end)) names (name)
            where name is not null));
    end if;
    for r in select * from json_populate_recordset(null::request, p_requests) loop
        return next case r.verb
            when 'Book' then book_appointment(
                r.caller, r.key, r.fingerprint, r.patient, r.slot, r.doctor, r.date, r.reason, r.notes, r.validate_only)
            when 'Reschedule' then reschedule_appointment(
                r.caller, r.key, r.fingerprint, r.appointment, r.version, r.slot, r.doctor, r.date)
            when 'Update' then update_appointment(
                r.caller, r.key, r.fingerprint, r.appointment, r.version, r.reason, r.notes)
            when 'CallNext' then call_next(r.caller, r.key, r.fingerprint, r.doctor, r.date, r.text)
            else change_visit(
                r.caller, r.method, r.key, r.fingerprint, r.verb, r.appointment, r.version, r.text, r.patient)
            end;
    end loop;
end
$$;
