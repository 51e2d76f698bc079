-- Holds: places of a doctor-day, and of a slot of it, that are kept for somebody until they expire, are used or released.
-- A hold has no number, and is no change of the doctor-day: it counts no revision.

-- The live holds of a doctor-day; those of its slots are among them. What expires counts for nothing from that instant
-- on, so nobody has to sweep. The planner puts the query in place of the call, since it is one statement in FROM.
create or replace function live_holds(p_doctor uuid, p_date date, p_now timestamptz)
returns table (id uuid, slot_id uuid, patient_id uuid, expire_time timestamptz) language sql stable as $$
    select h.id, h.slot_id, h.patient_id, h.expire_time from hold h
    where h.doctor_id = p_doctor and h.date = p_date and h.state = 'HELD' and h.expire_time > p_now
$$;

-- What a refusal says of the holds in which the places of a doctor-day, or of its slot, are kept: how many they are, and
-- after how many seconds the first expires.
create or replace function held_details(p_doctor uuid, p_date date, p_slot uuid, p_now timestamptz) returns jsonb
language sql stable as $$
    select jsonb_build_object('held', count(*),
                              'retry_after', ceil(extract(epoch from min(h.expire_time) - p_now))::integer)
    from live_holds(p_doctor, p_date, p_now) h where p_slot is null or h.slot_id = p_slot
$$;

-- Why this hold cannot be used for that place by that patient; null if it can. `state` is how it has ended. Ask under the
-- lock of the doctor-day: the use and the expiry of a hold are judged by one moment.
create or replace function hold_refusal(
    p_hold uuid, p_patient uuid, p_doctor uuid, p_date date, p_slot uuid, p_now timestamptz,
    out reason text, out state text
) language plpgsql as $$
declare
    h hold;
begin
    select * into h from hold where id = p_hold;
    if not found then
        reason := 'HOLD_NOT_FOUND';
    elsif (h.doctor_id, h.date, h.slot_id) is distinct from (p_doctor, p_date, p_slot)
          -- A hold that had ended before its patient was merged still has the former id.
          or h.patient_id <> p_patient and current_patient(h.patient_id) is distinct from p_patient then
        reason := 'HOLD_MISMATCH';
    elsif h.state <> 'HELD' or h.expire_time <= p_now then
        reason := 'HOLD_EXPIRED';
        state := case h.state when 'HELD' then 'EXPIRED' else h.state end;
    end if;
end
$$;

-- Release a hold, if it is live. Two that would end it wait for each other at its row.
create or replace function end_hold(r request, p_hold uuid, p_now timestamptz) returns void language plpgsql as $$
declare
    h hold;
begin
    update hold x set state = 'RELEASED'
    where x.id = p_hold and x.state = 'HELD' and x.expire_time > p_now
    returning x.* into h;
    if found then
        perform append_of_hold(r, 'hold.released', h, p_now);
    end if;
end
$$;

-- Keep a place. With a patient, the refusals of a booking are made at once.
create or replace function hold_place(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_place record;
    v_other uuid;
    v_now timestamptz := moment();
begin
    v_place := find_place(r.patient, r.doctor, r.date, r.slot, null, v_now);
    if r.patient is not null and v_place.outcome in ('OK', 'PATIENT_OVERLAP', 'SLOT_FULL', 'DAY_FULL') then
        -- A patient's second hold is one too many whether or not there is room for it.
        select h.id into v_other from live_holds(r.doctor, r.date, v_now) h where h.patient_id = r.patient limit 1;
        if found then
            return refused('DUPLICATE_BOOKING', null, jsonb_build_object('date', r.date, 'hold_id', v_other));
        end if;
    end if;
    if v_place.outcome <> 'OK' then
        return refused_place(r, v_place.outcome, v_place.subject, v_place.details, r.date);
    end if;
    insert into hold as h (doctor_id, clinic_id, date, slot_id, patient_id, expire_time, create_time)
    values (r.doctor, v_place.clinic_id, r.date, r.slot, r.patient, v_now + r.ttl, v_now)
    returning h into d.hold;
    perform append_of_hold(r, 'hold.placed', d.hold, v_now);
    d.outcome := 'OK';
    return d;
end
$$;

-- Give up a hold. Of one that has ended nothing is left to give up.
create or replace function release_hold(r request) returns decision language plpgsql as $$
declare
    d decision;
begin
    perform from hold where id = r.hold;
    if not found then return refused('HOLD_NOT_FOUND', r.hold); end if;
    perform end_hold(r, r.hold, moment());
    d.outcome := 'OK';
    return d;
end
$$;

-- Give the live holds of a merged patient to the kept one. A patient has one of a doctor-day, so a second is released.
create or replace function merge_holds(r request, p_merged uuid, p_kept uuid, p_now timestamptz) returns void
language plpgsql as $$
declare
    h record;
begin
    for h in
        select x.id, exists (select from live_holds(x.doctor_id, x.date, p_now) k where k.patient_id = p_kept) as second
        from hold x
        where x.patient_id = p_merged and x.state = 'HELD' and x.expire_time > p_now
    loop
        update hold set patient_id = p_kept where id = h.id;
        if h.second then perform end_hold(r, h.id, p_now); end if;
    end loop;
end
$$;
