-- The refusal of a place on that date, as `find_place` has found it.
create or replace function refused_place(r request, p_outcome text, p_subject uuid, p_details jsonb, p_date date)
returns decision language plpgsql as $$
begin
    if p_outcome in ('DUPLICATE_BOOKING', 'PATIENT_OVERLAP') then
        return refused_for(r, p_outcome, p_subject, p_date);
    end if;
    return refused(p_outcome, p_subject, jsonb_build_object('date', p_date) || coalesce(p_details, '{}'));
end
$$;

-- Book a place of a slot or of a doctor-day.
create or replace function book(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_place record;
    v_override boolean := false;
    v_now timestamptz := moment();
begin
    if r.override_reason <> '' then
        v_override := may_override(r, (select x.clinic_id from doctor x where x.id = r.doctor));
    end if;
    v_place := find_place(r.patient, r.doctor, r.date, r.slot, null, v_now, p_hold => r.hold,
                          p_override => v_override);
    if v_place.outcome <> 'OK' then
        return refused_place(r, v_place.outcome, v_place.subject, v_place.details, r.date);
    end if;
    d.outcome := 'OK';
    d.patient_name := v_place.patient_name;
    d.doctor_name := v_place.doctor_name;
    r.hold := v_place.hold;

    if r.validate_only then
        d.appointment := jsonb_populate_record(null::appointment, jsonb_build_object(
            'patient_id', r.patient, 'doctor_id', r.doctor, 'clinic_id', v_place.clinic_id, 'date', r.date,
            'number', v_place.number, 'slot_id', r.slot, 'start_time', v_place.start_time, 'end_time', v_place.end_time,
            'state', 'BOOKED', 'reason', r.reason, 'notes', r.notes, 'cancel_reason', '', 'room', '', 'call_count', 0,
            'priority', 'NORMAL', 'override_reason', ''));
        return d;
    end if;

    insert into appointment as a (patient_id, doctor_id, clinic_id, date, number, slot_id, start_time, end_time, state,
                                  reason, notes, override_reason, create_time, update_time)
    values (r.patient, r.doctor, v_place.clinic_id, r.date, v_place.number, r.slot, v_place.start_time,
            v_place.end_time, 'BOOKED', r.reason, r.notes,
            case when v_place.over_capacity then r.override_reason else '' end, v_now, v_now)
    returning a into d.appointment;
    d.revision := (record_change(r, 'appointment.booked', d.appointment, false, v_now)).revision;
    if r.hold is not null then update hold set state = 'USED' where id = r.hold; end if;
    if exists (select from waitlist_entry e where e.patient_id = r.patient and e.state in ('WAITING', 'OFFERED')) then
        perform end_waiting(r, d.appointment, v_now);
    end if;
    return d;
end
$$;

-- Move a BOOKED appointment to another slot or doctor-day. The old place is given up in the same transaction that gets
-- the new one, or not at all.
create or replace function reschedule(r request, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    v_place record;
    v_now timestamptz := moment();
begin
    if p_old.state <> 'BOOKED' then
        return refused_transition(p_old);
    end if;
    v_place := find_place(p_old.patient_id, r.doctor, r.date, r.slot, p_old, v_now, p_hold => r.hold);
    if v_place.outcome <> 'OK' then
        return refused_place(r, v_place.outcome, v_place.subject, v_place.details, r.date);
    end if;

    d.patient_name := v_place.patient_name;
    d.doctor_name := v_place.doctor_name;
    r.hold := v_place.hold;
    update appointment as a
    set doctor_id = r.doctor, clinic_id = v_place.clinic_id, date = r.date, number = v_place.number, slot_id = r.slot,
        start_time = v_place.start_time, end_time = v_place.end_time, undo = null,
        -- On another doctor-day the place is one below the capacity.
        override_reason = case when (a.doctor_id, a.date) = (r.doctor, r.date) then a.override_reason else '' end,
        version = a.version + 1, update_time = v_now
    where a.id = p_old.id
    returning a into d.appointment;

    if (p_old.doctor_id, p_old.date) <> (r.doctor, r.date) then
        d.vacated_revision := (record_change(r, 'appointment.moved_out', p_old, false, v_now)).revision;
    end if;
    d.revision := (record_change(r, 'appointment.moved_in', d.appointment, false, v_now)).revision;
    d.vacated_revision := coalesce(d.vacated_revision, d.revision);
    d.vacated_doctor := p_old.doctor_id;
    d.vacated_date := p_old.date;
    if r.hold is not null then update hold set state = 'USED' where id = r.hold; end if;
    if exists (
        select from waitlist_entry e where e.patient_id = p_old.patient_id and e.state in ('WAITING', 'OFFERED')) then
        perform end_waiting(r, d.appointment, v_now);
    end if;
    d.outcome := 'OK';
    return d;
end
$$;

-- Change reason and notes; null keeps one.
create or replace function update_appointment(r request, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
begin
    update appointment as a
    set reason = coalesce(r.reason, a.reason), notes = coalesce(r.notes, a.notes), version = a.version + 1,
        update_time = v_now
    where a.id = p_old.id
    returning a into d.appointment;
    d.revision := (record_change(r, 'appointment.updated', d.appointment, false, v_now)).revision;
    d.outcome := 'OK';
    return d;
end
$$;
