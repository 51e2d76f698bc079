-- Why a doctor cannot have a slot at that time; null if he can. `p_slot` is the slot that would move there.
create or replace function slot_refusal(
    p_doctor uuid, p_clinic uuid, p_start timestamptz, p_end timestamptz, p_slot uuid, p_now timestamptz
) returns decision language plpgsql as $$
declare
    v_zone text;
    v_date date;
    v_overlap uuid;
begin
    select time_zone into v_zone from clinic where id = p_clinic;
    v_date := (p_start at time zone v_zone)::date;
    -- Half-open: a slot may end at the clinic's midnight.
    if v_date <> ((p_end - interval '1 microsecond') at time zone v_zone)::date then
        return refused('OVER_MIDNIGHT', p_doctor);
    end if;
    if v_date > date '9999-12-31' then return refused('AFTER_9999', p_doctor); end if;
    if p_start <= p_now then
        -- A new slot has no id.
        return refused('SLOT_IN_PAST', p_slot, jsonb_build_object('doctor_id', p_doctor));
    end if;
    select s.id into v_overlap from slot s
    where uuidrange(s.doctor_id, s.doctor_id, '[]') && uuidrange(p_doctor, p_doctor, '[]')
      and tstzrange(s.start_time, s.end_time) && tstzrange(p_start, p_end) and s.id is distinct from p_slot
    limit 1;
    if found then return refused('SLOT_OVERLAP', v_overlap); end if;
    return null;
end
$$;

-- What the log says of a slot.
create or replace function slot_data(s slot) returns jsonb language sql stable as $$
    select jsonb_build_object('state', s.state, 'capacity', s.capacity, 'start_time', s.start_time, 'end_time', s.end_time)
$$;

-- Open slots: all or none. A refusal says which of them, counted from 0.
create or replace function create_slots(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_slots slot[] := '{}';
    v_slot slot;
    v_now timestamptz := moment();
    v record;
begin
    for v in
        select w.n - 1 as n, w.doctor, w.start_time, w.end_time, w.capacity, x.clinic_id, x.active, c.time_zone
        from unnest(r.new_slots) with ordinality as w (doctor, start_time, end_time, capacity, n)
        left join doctor x on x.id = w.doctor
        left join clinic c on c.id = x.clinic_id
        order by w.n
    loop
        if v.active is null then d := refused('DOCTOR_NOT_FOUND', v.doctor);
        elsif not v.active then d := refused('DOCTOR_INACTIVE', v.doctor);
        else
            -- Sees the slots that this loop has made as well.
            d := slot_refusal(v.doctor, v.clinic_id, v.start_time, v.end_time, null, v_now);
        end if;
        if d.outcome is not null then
            if d.outcome = 'SLOT_OVERLAP' and exists (select from unnest(v_slots) made where made.id = d.subject) then
                -- One of this very batch has no id that anybody could ask for.
                d.subject := null;
            end if;
            d.details := coalesce(d.details, '{}') || jsonb_build_object('index', v.n);
            -- All or none: this undoes the slots that the loop has made, and keeps the answer.
            raise exception using errcode = 'FD000';
        end if;
        insert into slot as s (doctor_id, clinic_id, date, start_time, end_time, capacity, create_time, update_time)
        values (v.doctor, v.clinic_id, (v.start_time at time zone v.time_zone)::date, v.start_time, v.end_time,
                v.capacity, v_now, v_now)
        returning * into v_slot;
        v_slots := v_slots || v_slot;
        perform append_change(r, 'slot.created', null, v_slot, v_now, slot_data(v_slot));
    end loop;
    d := null;
    d.slots := v_slots;
    d.outcome := 'OK';
    return d;
exception when sqlstate 'FD000' then
    return d;
end
$$;

-- The refusal of a request about slots of which one does not exist; null if all do. Call it under the lock.
create or replace function missing_slot(r request) returns decision language plpgsql as $$
declare
    v record;
begin
    if slot_dates(r.slots) <> r.from_dates then
        raise exception 'a slot was moved meanwhile' using errcode = 'serialization_failure';
    end if;
    select w.id, w.n - 1 as n into v from unnest(r.slots) with ordinality w (id, n)
    where not exists (select from slot s where s.id = w.id) order by w.n limit 1;
    if found then return refused('SLOT_NOT_FOUND', v.id, jsonb_build_object('index', v.n)); end if;
    return null;
end
$$;

-- Block or release slots: all or none. What is booked stays; the answer names it.
create or replace function set_slots_state(r request) returns decision language plpgsql as $$
declare
    d decision := missing_slot(r);
    v_state text := case r.verb when 'BlockSlots' then 'BLOCKED' else 'OPEN' end;
    v_type text := case r.verb when 'BlockSlots' then 'slot.blocked' else 'slot.released' end;
    v_slot slot;
    v_now timestamptz := moment();
begin
    if d.outcome is not null then return d; end if;
    for v_slot in
        update slot set state = v_state, block_reason = r.reason, version = version + 1, update_time = v_now
        where id = any (r.slots) and (state, block_reason) <> (v_state, r.reason) returning *
    loop
        perform append_change(r, v_type, null, v_slot, v_now, slot_data(v_slot));
    end loop;
    d.slots := array(select s from unnest(r.slots) with ordinality w (id, n) join slot s on s.id = w.id order by w.n);
    d.affected := array(
        select a.id from appointment a
        where a.slot_id = any (r.slots) and is_live(a.state) and v_state = 'BLOCKED'
        order by a.start_time, a.number, a.id);
    d.outcome := 'OK';
    return d;
end
$$;

-- Change a slot's capacity or times; null keeps one.
create or replace function update_slot(r request) returns decision language plpgsql as $$
declare
    d decision := missing_slot(r);
    v_old slot;
    v_booked integer;
    v_held integer;
    v_now timestamptz := moment();
begin
    if d.outcome is not null then return d; end if;
    select * into v_old from slot where id = r.slots[1];
    if r.version <> v_old.version then return refused('ETAG_MISMATCH', v_old.id); end if;
    r.start_time := coalesce(r.start_time, v_old.start_time);
    r.end_time := coalesce(r.end_time, v_old.end_time);
    select count(*) into v_booked from appointment where slot_id = v_old.id and holds_place(state);
    select count(*) into v_held from live_holds(v_old.doctor_id, v_old.date, v_now) h where h.slot_id = v_old.id;
    if r.capacity < v_booked + v_held
       or v_booked + v_held > 0 and (r.start_time, r.end_time) <> (v_old.start_time, v_old.end_time) then
        return refused('SLOT_HAS_BOOKINGS', v_old.id,
                       jsonb_build_object('booked_count', v_booked, 'held', nullif(v_held, 0)));
    end if;
    if (r.start_time, r.end_time) <> (v_old.start_time, v_old.end_time) then
        if r.end_time <= r.start_time then return refused('END_NOT_AFTER_START', v_old.id); end if;
        d := slot_refusal(v_old.doctor_id, v_old.clinic_id, r.start_time, r.end_time, v_old.id, v_now);
        if d.outcome is not null then return d; end if;
        perform give_way(v_old);
    end if;
    with changed as (
        update slot s
        set capacity = coalesce(r.capacity, s.capacity), start_time = r.start_time, end_time = r.end_time,
            date = (r.start_time at time zone c.time_zone)::date, version = s.version + 1, update_time = v_now
        from clinic c
        where s.id = v_old.id and c.id = s.clinic_id
        returning s)
    select array_agg(s) into d.slots from changed;
    perform append_change(r, 'slot.updated', null, d.slots[1], v_now, slot_data(d.slots[1]));
    d.outcome := 'OK';
    return d;
end
$$;

-- Delete a slot of which no place is booked or held.
create or replace function delete_slot(r request) returns decision language plpgsql as $$
declare
    d decision := missing_slot(r);
    v_slot slot;
    v_held integer;
    v_now timestamptz := moment();
begin
    if d.outcome is not null then return d; end if;
    select * into v_slot from slot where id = r.slots[1];
    if r.version <> v_slot.version then return refused('ETAG_MISMATCH', v_slot.id); end if;
    select count(*) into v_held from live_holds(v_slot.doctor_id, v_slot.date, v_now) h where h.slot_id = v_slot.id;
    perform from appointment where slot_id = v_slot.id and holds_place(state);
    if found or v_held > 0 then
        return refused('SLOT_HAS_BOOKINGS', v_slot.id, jsonb_build_object('held', nullif(v_held, 0)));
    end if;
    perform give_way(v_slot);
    delete from slot where id = v_slot.id;
    perform append_change(r, 'slot.deleted', null, v_slot, v_now, slot_data(v_slot));
    d.outcome := 'OK';
    return d;
end
$$;
