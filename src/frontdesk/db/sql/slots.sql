-- What the functions of slots answer: the slots as they made or changed them, in the order of the request. That is also
-- what is stored for a replay, since a slot may be changed or deleted afterwards.
do $do$
begin
    if to_regtype('slots_decision') is null then
        create type slots_decision as (outcome text, subject uuid, detail text, replayed boolean, slots slot[]);
    end if;
end
$do$;

create or replace function replay_slots(p_caller text, p_method text, p_key text, p_fingerprint bytea)
returns slots_decision language plpgsql as $$
declare
    v_known record;
    v_first idempotency;
    v_answer slots_decision;
begin
    v_known := recall(p_caller, p_method, p_key, p_fingerprint);
    v_answer.outcome := v_known.outcome;
    if v_known.outcome = 'OK' then
        v_first := v_known.first;
        v_answer.replayed := true;
        v_answer.slots := array(select s from jsonb_populate_recordset(null::slot, v_first.snapshot) s);
    end if;
    return v_answer;
end
$$;

-- Open slots: all or none. A refusal's `detail` says which of them, counted from 0.
create or replace function create_slots(
    p_caller text, p_method text, p_key text, p_fingerprint bytea,
    p_doctors uuid[], p_starts timestamptz[], p_ends timestamptz[], p_capacities integer[]
) returns slots_decision language plpgsql as $$
declare
    v_answer slots_decision;
    v_slots slot[] := '{}';
    v_slot slot;
    v_id uuid;
    v_now timestamptz;
    v record;
begin
    perform lock_all(array(
        select doctor_day_name(d.id, (w.start_time at time zone c.time_zone)::date)
        from unnest(p_doctors, p_starts) as w (doctor_id, start_time)
        join doctor d on d.id = w.doctor_id join clinic c on c.id = d.clinic_id));
    if p_key <> '' then
        v_answer := replay_slots(p_caller, p_method, p_key, p_fingerprint);
        if v_answer.outcome is not null then return v_answer; end if;
    end if;

    v_now := moment();
    for v in
        select w.n - 1 as n, w.doctor_id, w.start_time, w.end_time, w.capacity, d.clinic_id, d.active,
               (w.start_time at time zone c.time_zone)::date as date,
               -- Half-open: a slot may end at the clinic's midnight.
               ((w.end_time - interval '1 microsecond') at time zone c.time_zone)::date as last_date
        from unnest(p_doctors, p_starts, p_ends, p_capacities) with ordinality
            as w (doctor_id, start_time, end_time, capacity, n)
        left join doctor d on d.id = w.doctor_id
        left join clinic c on c.id = d.clinic_id
        order by w.n
    loop
        v_answer.detail := v.n;
        v_answer.subject := v.doctor_id;
        if v.active is null then v_answer.outcome := 'DOCTOR_NOT_FOUND';
        elsif not v.active then v_answer.outcome := 'DOCTOR_INACTIVE';
        elsif v.date <> v.last_date then v_answer.outcome := 'OVER_MIDNIGHT';
        elsif v.date > date '9999-12-31' then v_answer.outcome := 'AFTER_9999';
        elsif v.start_time <= v_now then v_answer.outcome := 'SLOT_IN_PAST';
        else
            -- Sees the slots that this loop has made as well.
            select s.id into v_id from slot s
            where uuidrange(s.doctor_id, s.doctor_id, '[]') && uuidrange(v.doctor_id, v.doctor_id, '[]')
              and tstzrange(s.start_time, s.end_time) && tstzrange(v.start_time, v.end_time)
            limit 1;
            if found then
                v_answer.outcome := 'SLOT_OVERLAP';
                -- One of this very batch has no id that anybody could ask for.
                v_answer.subject := case
                    when not exists (select from unnest(v_slots) made where made.id = v_id) then v_id end;
            end if;
        end if;
        if v_answer.outcome is not null then
            -- All or none: what the loop has made goes again, and the answer stays.
            raise exception using errcode = 'FD000';
        end if;
        insert into slot (doctor_id, clinic_id, date, start_time, end_time, capacity, create_time, update_time)
        values (v.doctor_id, v.clinic_id, v.date, v.start_time, v.end_time, v.capacity, v_now, v_now)
        returning * into v_slot;
        v_slots := v_slots || v_slot;
    end loop;

    if p_key <> '' then
        perform remember_row(p_caller, p_method, p_key, p_fingerprint, null, to_jsonb(v_slots), null, null);
    end if;
    v_answer := ('OK', null, null, false, v_slots);
    return v_answer;
exception when sqlstate 'FD000' then
    return v_answer;
end
$$;

-- Lock the doctor-days of slots; afterwards nobody books, blocks or deletes them.
create or replace function lock_slots(p_slots uuid[]) returns void language plpgsql as $$
begin
    perform lock_all(array(select doctor_day_name(doctor_id, date) from slot where id = any (p_slots)));
end
$$;

-- Block (p_state BLOCKED) or release (OPEN) slots: all or none. What is booked stays.
create or replace function set_slots_state(
    p_caller text, p_method text, p_key text, p_fingerprint bytea, p_slots uuid[], p_state text, p_reason text
) returns slots_decision language plpgsql as $$
declare
    v_answer slots_decision;
    v_now timestamptz;
begin
    perform lock_slots(p_slots);
    if p_key <> '' then
        v_answer := replay_slots(p_caller, p_method, p_key, p_fingerprint);
        if v_answer.outcome is not null then return v_answer; end if;
    end if;
    select w.id into v_answer.subject from unnest(p_slots) with ordinality w (id, n)
    where not exists (select from slot s where s.id = w.id) order by w.n limit 1;
    if found then v_answer.outcome := 'SLOT_NOT_FOUND'; return v_answer; end if;

    v_now := moment();
    update slot set state = p_state, block_reason = p_reason, version = version + 1, update_time = v_now
    where id = any (p_slots) and (state, block_reason) <> (p_state, p_reason);
    v_answer := ('OK', null, null, false,
                 array(select s from unnest(p_slots) with ordinality w (id, n) join slot s on s.id = w.id order by w.n));
    if p_key <> '' then
        perform remember_row(p_caller, p_method, p_key, p_fingerprint, null, to_jsonb(v_answer.slots), null, null);
    end if;
    return v_answer;
end
$$;

-- Remove a slot that holds no live booking.
create or replace function delete_slot(p_caller text, p_key text, p_fingerprint bytea, p_slot uuid, p_version integer)
returns slots_decision language plpgsql as $$
declare
    v_answer slots_decision;
    v_version integer;
begin
    perform lock_slots(array[p_slot]);
    if p_key <> '' then
        v_answer := replay_slots(p_caller, 'DeleteSlot', p_key, p_fingerprint);
        if v_answer.outcome is not null then return v_answer; end if;
    end if;
    v_answer.subject := p_slot;
    select version into v_version from slot where id = p_slot;
    if not found then v_answer.outcome := 'SLOT_NOT_FOUND'; return v_answer; end if;
    if p_version <> v_version then v_answer.outcome := 'ETAG_MISMATCH'; return v_answer; end if;
    perform from appointment
    where slot_id = p_slot and state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED');
    if found then v_answer.outcome := 'SLOT_HAS_BOOKINGS'; return v_answer; end if;
    delete from slot where id = p_slot;
    v_answer := ('OK', null, null, false, '{}');
    if p_key <> '' then
        perform remember_row(p_caller, 'DeleteSlot', p_key, p_fingerprint, null, '[]', null, null);
    end if;
    return v_answer;
end
$$;
