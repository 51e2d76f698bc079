-- Open slots: all or none. A refusal says which of them, counted from 0.
create or replace function create_slots(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_slots slot[] := '{}';
    v_slot slot;
    v_overlap uuid;
    v_now timestamptz := moment();
    v record;
begin
    for v in
        select w.n - 1 as n, w.doctor, w.start_time, w.end_time, w.capacity, x.clinic_id, x.active,
               (w.start_time at time zone c.time_zone)::date as date,
               -- Half-open: a slot may end at the clinic's midnight.
               ((w.end_time - interval '1 microsecond') at time zone c.time_zone)::date as last_date
        from unnest(r.new_slots) with ordinality as w (doctor, start_time, end_time, capacity, n)
        left join doctor x on x.id = w.doctor
        left join clinic c on c.id = x.clinic_id
        order by w.n
    loop
        d.subject := v.doctor;
        if v.active is null then d.outcome := 'DOCTOR_NOT_FOUND';
        elsif not v.active then d.outcome := 'DOCTOR_INACTIVE';
        elsif v.date <> v.last_date then d.outcome := 'OVER_MIDNIGHT';
        elsif v.date > date '9999-12-31' then d.outcome := 'AFTER_9999';
        elsif v.start_time <= v_now then d.outcome := 'SLOT_IN_PAST';
        else
            -- Sees the slots that this loop has made as well.
            select s.id into v_overlap from slot s
            where uuidrange(s.doctor_id, s.doctor_id, '[]') && uuidrange(v.doctor, v.doctor, '[]')
              and tstzrange(s.start_time, s.end_time) && tstzrange(v.start_time, v.end_time)
            limit 1;
            if found then
                d.outcome := 'SLOT_OVERLAP';
                -- One of this very batch has no id that anybody could ask for.
                d.subject := case
                    when not exists (select from unnest(v_slots) made where made.id = v_overlap) then v_overlap end;
            end if;
        end if;
        if d.outcome is not null then
            d.details := jsonb_build_object('index', v.n::text);
            -- All or none: this undoes the slots that the loop has made, and keeps the answer.
            raise exception using errcode = 'FD000';
        end if;
        insert into slot as s (doctor_id, clinic_id, date, start_time, end_time, capacity, create_time, update_time)
        values (v.doctor, v.clinic_id, v.date, v.start_time, v.end_time, v.capacity, v_now, v_now)
        returning * into v_slot;
        v_slots := v_slots || v_slot;
    end loop;
    d := null;
    d.slots := v_slots;
    d.outcome := 'OK';
    return d;
exception when sqlstate 'FD000' then
    return d;
end
$$;

-- Block or release slots: all or none. What is booked stays.
create or replace function set_slots_state(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_missing uuid;
    v_state text := case r.verb when 'BlockSlots' then 'BLOCKED' else 'OPEN' end;
begin
    select w.id into v_missing from unnest(r.slots) with ordinality w (id, n)
    where not exists (select from slot s where s.id = w.id) order by w.n limit 1;
    if found then return refused('SLOT_NOT_FOUND', v_missing); end if;

    update slot set state = v_state, block_reason = r.reason, version = version + 1, update_time = moment()
    where id = any (r.slots) and (state, block_reason) <> (v_state, r.reason);
    d.slots := array(select s from unnest(r.slots) with ordinality w (id, n) join slot s on s.id = w.id order by w.n);
    d.outcome := 'OK';
    return d;
end
$$;

-- Delete a slot that holds no booking.
create or replace function delete_slot(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_slot slot;
begin
    select * into v_slot from slot where id = r.slots[1];
    if not found then return refused('SLOT_NOT_FOUND', r.slots[1]); end if;
    if r.version <> v_slot.version then return refused('ETAG_MISMATCH', v_slot.id); end if;
    perform from appointment where slot_id = v_slot.id and holds_place(state);
    if found then return refused('SLOT_HAS_BOOKINGS', v_slot.id); end if;
    delete from slot where id = v_slot.id;
    d.outcome := 'OK';
    return d;
end
$$;
