-- Is there a place for this patient in that slot or doctor-day? Ask under the locks of the doctor-day and of
-- the patient. Answers OK with a place, or why not. `p_moving` is the appointment that would give up its own place; a
-- move within its doctor-day or slot takes no further place of it. `details` is more of a refusal's metadata.
--
-- A live hold takes a place as a booking does, but not from one who has a hold himself: `p_hold`, or an offer of this place
-- that the waiting list has made to the patient. `hold` is the one that the booking uses up. `p_patient` may be null if the
-- place is not for anybody yet.
--
-- `p_again`: `p_moving` takes back the place that it had here, with its number if that is free. Then only the count and
-- the patient's other appointments matter. `p_override`: on a full doctor-day there is a place above its capacity.
create or replace function find_place(
    p_patient uuid, p_doctor uuid, p_date date, p_slot uuid, p_moving appointment, p_now timestamptz,
    p_hold uuid default null, p_again boolean default false, p_override boolean default false,
    out outcome text, out subject uuid, out details jsonb,
    out clinic_id uuid, out number integer, out start_time timestamptz, out end_time timestamptz,
    out patient_name text, out doctor_name text, out over_capacity boolean, out hold uuid
) language plpgsql as $$
declare
    v record;
    v_slot slot;
    v_hold record;
    v_taken integer;
    v_held integer := 0;
    v_highest integer;
    v_first integer := 1;
    -- Whether `p_moving` has a place of this doctor-day, or of this slot, already.
    v_in_day boolean := holds_place(p_moving.state) and (p_moving.doctor_id, p_moving.date) = (p_doctor, p_date);
    v_in_slot boolean := holds_place(p_moving.state) and p_moving.slot_id = p_slot;
begin
    if p_slot is not null then
        select * into v_slot from slot where id = p_slot;
        if p_again and (v_slot.start_time, v_slot.end_time) <> (p_moving.start_time, p_moving.end_time) then
            -- The slot is at another time now, so the place is gone.
            v_slot := null;
        end if;
        if v_slot.date <> p_date then
            raise exception 'the slot was moved meanwhile' using errcode = 'serialization_failure';
        end if;
    end if;
    -- A slot belongs to its clinic, also when its doctor has moved to another one.
    select p.active as patient_active, p.merged_into,
           concat_ws(' ', p.given_name, nullif(p.family_name, '')) as patient_name,
           d.display_name, d.id as doctor_id, d.active as doctor_active,
           c.id as clinic_id, c.active as clinic_active, (p_now at time zone c.time_zone)::date as today,
           coalesce(day.is_present, true) as is_present,
           -- True if a leave takes the whole day, false if one takes hours that the slot touches, else null.
           (select bool_or(l.whole_days) from leaves_over(p_doctor, p_date, v_slot.start_time, v_slot.end_time) l)
               as on_leave,
           (select e.closed from schedule_exception e where e.doctor_id = p_doctor and e.date = p_date) as closed,
           (select count(*) from live_holds(p_doctor, p_date, p_now)) as held,
           coalesce(day.max_patients, d.max_patients_per_day) as capacity
    into v
    from (select 1) one
    left join patient p on p.id = p_patient
    left join doctor d on d.id = p_doctor
    left join clinic c on c.id = coalesce(v_slot.clinic_id, d.clinic_id)
    left join doctor_day day on day.doctor_id = p_doctor and day.date = p_date;

    subject := p_patient;
    if v.merged_into is not null then
        raise exception 'the patient was merged meanwhile' using errcode = 'serialization_failure';
    end if;
    if p_hold is not null then
        v_hold := hold_refusal(p_hold, p_patient, p_doctor, p_date, p_slot, p_now);
        if v_hold.reason is not null then
            outcome := v_hold.reason;
            subject := p_hold;
            details := jsonb_build_object('state', v_hold.state);
            return;
        end if;
        v.held := 0;
        hold := p_hold;
    elsif v.held > 0 and p_patient is not null then
        select h.id into hold from live_holds(p_doctor, p_date, p_now) h
        where h.patient_id = p_patient and h.slot_id is not distinct from p_slot
          and (select o.entry_id from hold o where o.id = h.id) is not null limit 1;
        if found then v.held := 0; end if;
    end if;
    if p_patient is not null then
        if v.patient_active is null then outcome := 'PATIENT_NOT_FOUND'; return; end if;
        if not (v.patient_active or p_again) then outcome := 'PATIENT_INACTIVE'; return; end if;
    end if;

    if p_slot is not null then
        subject := p_slot;
        if v_slot.id is null then outcome := 'SLOT_NOT_FOUND'; return; end if;
        if not p_again then
            if v_slot.state = 'BLOCKED' or not v.on_leave then outcome := 'SLOT_BLOCKED'; return; end if;
            if v_slot.start_time <= p_now then outcome := 'SLOT_IN_PAST'; return; end if;
        end if;
        start_time := v_slot.start_time;
        end_time := v_slot.end_time;
    end if;

    subject := p_doctor;
    if v.doctor_id is null then outcome := 'DOCTOR_NOT_FOUND'; return; end if;
    if not p_again then
        if not v.doctor_active then outcome := 'DOCTOR_INACTIVE'; return; end if;
        if not v.clinic_active then outcome := 'CLINIC_INACTIVE'; return; end if;
        if p_date < v.today then outcome := 'DATE_IN_PAST'; return; end if;
        if not v.is_present or v.on_leave or v.closed then
            outcome := 'DOCTOR_ABSENT';
            details := jsonb_build_object('cause', case
                when not v.is_present then 'AVAILABILITY' when v.on_leave then 'LEAVE' else 'EXCEPTION' end);
            return;
        end if;
    end if;
    clinic_id := v.clinic_id;
    patient_name := v.patient_name;
    doctor_name := v.display_name;

    select id into subject from appointment a
    where a.patient_id = p_patient and a.doctor_id = p_doctor and a.date = p_date
      and is_live(a.state) and a.id is distinct from p_moving.id;
    if found then outcome := 'DUPLICATE_BOOKING'; return; end if;

    if p_slot is not null then
        select id into subject from appointment a
        where p_patient is not null
          and uuidrange(a.patient_id, a.patient_id, '[]') && uuidrange(p_patient, p_patient, '[]')
          and tstzrange(a.start_time, a.end_time) && tstzrange(v_slot.start_time, v_slot.end_time)
          and a.start_time is not null and is_live(a.state) and a.id is distinct from p_moving.id
        limit 1;
        if found then outcome := 'PATIENT_OVERLAP'; return; end if;

        select count(*) into v_taken from appointment a
        where a.slot_id = p_slot and holds_place(a.state) and a.id is distinct from p_moving.id;
        if v.held > 0 then
            select count(*) into v_held from live_holds(p_doctor, p_date, p_now) h where h.slot_id = p_slot;
        end if;
        subject := p_slot;
        if v_taken + v_held >= v_slot.capacity and v_in_slot is not true then
            outcome := 'SLOT_FULL';
            if v_taken < v_slot.capacity then details := held_details(p_doctor, p_date, p_slot, p_now); end if;
            return;
        end if;
    end if;

    select count(*), coalesce(max(a.number), 0) into v_taken, v_highest from appointment a
    where a.doctor_id = p_doctor and a.date = p_date and holds_place(a.state) and a.id is distinct from p_moving.id;
    subject := p_doctor;
    over_capacity := v_taken + v.held >= v.capacity and v_in_day is not true;
    if over_capacity then
        if not p_override then
            outcome := 'DAY_FULL';
            if v_taken < v.capacity then details := held_details(p_doctor, p_date, null, p_now); end if;
            return;
        end if;
        v_first := v.capacity + 1;
    end if;

    -- The lowest free number. Numbers are distinct, so as many as the highest means that there is no gap.
    number := v_taken + 1;
    if v_highest > v_taken or v_first > 1 or p_again then
        select n into number
        from generate_series(v_first, case when p_again then greatest(v_highest, v.capacity, p_moving.number)
                                           when v_first > 1 then greatest(v_highest, v.capacity)
                                           else v_taken end + 1) n
        where not exists (
            select from appointment a
            where a.doctor_id = p_doctor and a.date = p_date and a.number = n
              and holds_place(a.state) and a.id is distinct from p_moving.id)
        order by p_again and n = p_moving.number desc, n limit 1;
    end if;
    outcome := 'OK';
end
$$;
