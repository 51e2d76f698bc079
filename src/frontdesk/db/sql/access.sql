-- The rows that a restricted caller may reach (`Sight` in core/caller.py): everything in his clinics, what is his own as
-- a patient, or what is his own as a doctor.

-- The refusal of a patient who writes notes or sets a priority, which are the clinic's; null if he does neither.
create or replace function clinics_own_refused(r request) returns decision language plpgsql as $$
begin
    if r.verb in ('CheckIn', 'JoinWaitlist') and r.priority <> 'NORMAL' then
        return refused('ROLE_REQUIRED', null, jsonb_build_object('method', r.verb, 'field', 'priority'));
    end if;
    if r.verb = 'BookAppointment' and r.notes <> '' or r.verb = 'UpdateAppointment' and r.notes is not null then
        return refused('ROLE_REQUIRED', null, jsonb_build_object('method', r.verb, 'field', 'notes'));
    end if;
    return null;
end
$$;

-- The refusal of somebody who reaches for something of this clinic, doctor and patient; null if he may. Staff are told
-- that it is another clinic's. A patient is told what an unknown id is told, `p_missing` of `p_subject`, and so is a
-- doctor, unless that is null: then he is told that it takes another role.
create or replace function out_of_sight(
    r request, p_clinic uuid, p_doctor uuid, p_patient uuid, p_missing text, p_subject uuid
) returns decision language plpgsql as $$
declare
    s sight := r.sight;
begin
    if p_clinic = any (s.clinics) or p_doctor = s.doctor then return null; end if;
    if p_patient = s.patient then return clinics_own_refused(r); end if;
    if s.clinics is not null then return refused('CLINIC_NOT_YOURS', p_clinic); end if;
    if p_missing is null then return refused('ROLE_REQUIRED', null, jsonb_build_object('method', r.verb)); end if;
    return refused(p_missing, p_subject);
end
$$;

-- Whether a restricted caller reaches only what is his own as a patient.
create or replace function own_only(r request) returns boolean language sql immutable
    return r.restricted and (r.sight).clinics is null and (r.sight).doctor is null;

-- The refusal of a request by a restricted caller who may not reach what it is about; null if he may. What does not
-- exist is left to the act, but for the appointment of the request, which is `p_old`.
create or replace function access_refusal(r request, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    v record;
    v_own_only boolean := own_only(r);
    h hold;
    e waitlist_entry;
begin
    if v_own_only then
        -- Whatever it is about.
        d := clinics_own_refused(r);
        if d.outcome is not null then return d; end if;
    end if;
    if r.appointment is not null and p_old.id is null then
        return refused('APPOINTMENT_NOT_FOUND', r.appointment);
    end if;
    if (r.sight).patient is not null then
        r.sight := ((r.sight).clinics, coalesce(current_patient((r.sight).patient), (r.sight).patient), (r.sight).doctor);
    end if;
    if r.verb in ('BookAppointment', 'HoldPlace', 'UpdatePatient', 'JoinWaitlist') and v_own_only
       and r.patient is distinct from (r.sight).patient then
        return refused('PATIENT_NOT_FOUND', r.wanted);
    end if;
    if p_old.id is not null then
        d := out_of_sight(
            r, p_old.clinic_id, p_old.doctor_id, p_old.patient_id,
            case when (r.sight).doctor is null or r.verb in (
                'RescheduleAppointment', 'CancelAppointment', 'UpdateAppointment') then 'APPOINTMENT_NOT_FOUND' end,
            p_old.id);
        if d.outcome is not null then return d; end if;
    end if;
    if r.entry is not null then
        select * into e from waitlist_entry where id = r.entry;
        if not found then return refused('WAITLIST_ENTRY_NOT_FOUND', r.entry); end if;
        -- An entry for a specialty is a doctor's own if it is his clinic's and specialty.
        d := out_of_sight(
            r, e.clinic_id, coalesce(e.doctor_id, (
                select x.id from doctor x
                where x.id = r.doctor and (x.clinic_id, x.specialty_key) = (e.clinic_id, e.specialty_key))),
            e.patient_id, 'WAITLIST_ENTRY_NOT_FOUND', r.entry);
        if d.outcome is not null then return d; end if;
    end if;
    if r.waits ->> 'appointment_id' is not null then
        select * into p_old from appointment where id = (r.waits ->> 'appointment_id')::uuid;
        if found then
            d := out_of_sight(r, p_old.clinic_id, p_old.doctor_id, p_old.patient_id, 'APPOINTMENT_NOT_FOUND', p_old.id);
            if d.outcome is not null then return d; end if;
        end if;
        p_old := null;
    end if;
    if r.verb = 'ReleaseHold' then
        select * into h from hold where id = r.hold;
        if not found then return refused('HOLD_NOT_FOUND', r.hold); end if;
        return out_of_sight(r, h.clinic_id, h.doctor_id, h.patient_id, 'HOLD_NOT_FOUND', r.hold);
    end if;
    -- The doctor-day or slot that is asked for.
    for v in
        select coalesce(s.clinic_id, x.clinic_id) as clinic_id, x.id as doctor_id
        from doctor x left join slot s on s.id = r.slot
        -- A patient may be handed over to a doctor whose days are not the caller's; `transfer` knows to whom.
        where x.id = r.doctor and r.verb <> 'TransferPatient'
        union all
        select s.clinic_id, s.doctor_id from slot s where s.id = any (r.slots)
        union all
        select x.clinic_id, x.id from unnest(r.new_slots) w join doctor x on x.id = w.doctor
        union all
        select c.id, null from clinic c where c.id = (r.waits ->> 'clinic_id')::uuid
    loop
        d := out_of_sight(
            r, v.clinic_id, v.doctor_id, coalesce(p_old.patient_id, r.patient),
            case when (r.sight).doctor is null then 'PATIENT_NOT_FOUND' end, r.wanted);
        if d.outcome is not null then return d; end if;
    end loop;
    return null;
end
$$;

-- Whether the caller's reason lets a visit at this clinic have a place above the capacity.
create or replace function may_override(r request, p_clinic uuid) returns boolean language sql immutable as $$
    select coalesce(r.override_reason <> '' and r.may_override
                    and (r.restricted is not true or p_clinic = any ((r.sight).clinics)), false)
$$;

-- Whether the caller may know who is a patient: the desk may.
create or replace function knows_patients(r request) returns boolean language sql immutable
    return r.restricted is not true or (r.sight).clinics is not null;

-- The refusal because the patient has another appointment, on that date. A caller who may not see it is not told which.
create or replace function refused_for(r request, p_reason text, p_appointment uuid, p_date date) returns decision
language plpgsql as $$
begin
    if r.restricted and not exists (
        select from appointment a
        where a.id = p_appointment
          and (a.clinic_id = any ((r.sight).clinics) or a.doctor_id = (r.sight).doctor
               or a.patient_id = current_patient((r.sight).patient))) then
        return refused(p_reason, null);
    end if;
    return refused(p_reason, p_appointment, jsonb_build_object('date', p_date));
end
$$;
