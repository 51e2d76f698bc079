-- The locks of a decision: doctor-days, and patients, whose visits must not overlap and whose records may be merged.

-- The day as a number: a date as text depends on the session's DateStyle, and all sessions must lock the same name.
create or replace function doctor_day_name(p_doctor uuid, p_date date) returns text language sql immutable
    return 'doctor-day/' || p_doctor || '/' || (p_date - date '2000-01-01');

-- Of a doctor's hours, and of which slots he has.
create or replace function schedule_name(p_doctor uuid) returns text language sql immutable
    return 'schedule/' || p_doctor;

-- Lock to the end of the transaction: everything at once, each once, ascending by the hashed key, so that two
-- transactions never wait for each other. Advisory and of the transaction, so that PgBouncer may share connections by
-- transaction.
--
-- Call it in a statement of its own and read the rows in later ones: under READ COMMITTED each statement takes a fresh
-- snapshot, so a read after the lock sees what was committed while we waited for it. Under any stricter isolation it
-- would not, and places would be sold twice; hence the assertion.
create or replace function lock_all(p_names text[]) returns void language plpgsql as $$
declare
    v_key bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'frontdesk decides under READ COMMITTED only' using errcode = 'invalid_transaction_state';
    end if;
    if cardinality(p_names) = 1 then
        -- Most requests: nothing to sort.
        perform pg_advisory_xact_lock(hashtextextended(p_names[1], 0));
        return;
    end if;
    for v_key in select distinct hashtextextended(name, 0) from unnest(p_names) name order by 1 loop
        perform pg_advisory_xact_lock(v_key);
    end loop;
end
$$;

-- Lock one more name to the end of the transaction, unless somebody else has it: whoever holds locks may not wait.
create or replace function try_lock(p_name text) returns boolean language sql volatile as $$
    select pg_try_advisory_xact_lock(hashtextextended(p_name, 0))
$$;

-- Find the doctor-days of a request: the one that it asks for, and the one that its appointment is on now.
--
-- An appointment and a slot may be moved before we hold their locks; whoever decides about them checks that afterwards.
create or replace function locate(r request) returns request language plpgsql as $$
begin
    if r.verb = 'HoldPlace' and r.patient is null and own_only(r) then
        -- A patient holds for himself.
        r.patient := (r.sight).patient;
    end if;
    if r.entry is not null then
        -- For AcceptOffer also its appointment, and the place that is offered.
        select e.patient_id, case r.verb when 'AcceptOffer' then e.appointment_id end,
               coalesce(r.slot, case r.verb when 'AcceptOffer' then h.slot_id end),
               coalesce(r.doctor, case r.verb when 'AcceptOffer' then h.doctor_id end),
               coalesce(r.date, case r.verb when 'AcceptOffer' then h.date end)
        into r.patient, r.appointment, r.slot, r.doctor, r.date
        from waitlist_entry e left join hold h on h.id = e.hold_id where e.id = r.entry;
    end if;
    r.wanted := coalesce(r.wanted, r.patient);
    if r.record is not null or r.keep is not null then
        return locate_patient(r);
    end if;
    if r.verb in ('BookAppointment', 'HoldPlace', 'AddWalkIn', 'JoinWaitlist') then
        r.patient := coalesce((select p.merged_into from patient p where p.id = r.patient), r.patient);
    end if;
    if r.slot is not null and r.verb <> 'AcceptOffer' then
        select doctor_id, date into r.doctor, r.date from slot where id = r.slot;
    elsif r.slot is null and r.doctor is not null and r.date is null and r.waits is null then
        r.date := clinic_today(r.doctor);
    end if;
    if r.appointment is not null then
        select doctor_id, date, patient_id into r.from_doctor, r.from_date, r.from_patient
        from appointment where id = r.appointment;
        if r.verb = 'TransferPatient' then r.date := r.from_date; end if;
    end if;
    if r.verb = 'ReleaseHold' then
        select doctor_id, date into r.from_doctor, r.from_date from hold where id = r.hold;
    end if;
    if r.slots is not null then
        r.from_dates := slot_dates(r.slots);
    end if;
    return r;
end
$$;

create or replace function slot_dates(p_slots uuid[]) returns date[] language sql stable as $$
    select array(select date from slot where id = any (p_slots) order by id)
$$;

-- Keep these clinics' time zones as they are to the end of the transaction: UpdateClinic locks the row. Before the
-- advisory locks, of which UpdateClinic takes none.
create or replace function keep_zones(p_clinics uuid[]) returns void language sql as $$
    select from clinic where id = any (p_clinics) order by id for share
$$;

-- The names that a located request locks.
create or replace function lock_names(r request) returns text[] language plpgsql as $$
declare
    v_names text[] := array[doctor_day_name(r.doctor, r.date), doctor_day_name(r.from_doctor, r.from_date)];
begin
    if r.locks is not null then
        return r.locks;
    end if;
    if r.verb in ('SetWeeklySchedule', 'GenerateSlots') then
        perform keep_zones(array(select clinic_id from doctor where id = r.doctor));
        return array[schedule_name(r.doctor)];
    end if;
    if r.verb in ('BookAppointment', 'RescheduleAppointment', 'HoldPlace', 'AddWalkIn', 'TransferPatient',
                  'UndoTransition', 'JoinWaitlist', 'LeaveWaitlist', 'OfferPlace', 'AcceptOffer', 'DeclineOffer') then
        v_names := v_names || ('patient/' || coalesce(r.from_patient, r.patient));
    elsif r.verb in ('SetScheduleException', 'DeleteScheduleException', 'SetDoctorAvailability') then
        v_names := v_names || schedule_name(r.doctor);
    elsif r.slots is not null then
        if r.start_time is not null then
            perform keep_zones(array(select clinic_id from slot where id = any (r.slots)));
        end if;
        v_names := v_names || array(select doctor_day_name(doctor_id, date) from slot where id = any (r.slots))
            || array(select schedule_name(doctor_id) from slot
                     where id = any (r.slots) and r.verb in ('UpdateSlot', 'DeleteSlot'))
            || array(select doctor_day_name(s.doctor_id, (r.start_time at time zone c.time_zone)::date)
                     from slot s join clinic c on c.id = s.clinic_id
                     where r.start_time is not null and s.id = any (r.slots));
    elsif r.new_slots is not null then
        perform keep_zones(array(select d.clinic_id from unnest(r.new_slots) w join doctor d on d.id = w.doctor));
        v_names := v_names || array(select schedule_name(doctor) from unnest(r.new_slots)) || array(
            select doctor_day_name(d.id, (w.start_time at time zone c.time_zone)::date)
            from unnest(r.new_slots) w join doctor d on d.id = w.doctor join clinic c on c.id = d.clinic_id);
    end if;
    return array_remove(v_names, null);
end
$$;
