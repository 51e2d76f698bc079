-- The waiting list: who waits for a place, and which free place is offered to whom. An offer is a hold for the patient.
--
-- All changes of an entry are made under the lock of its patient. An offer is made under that of its doctor-day as well; it
-- is given up without, which only frees a place.

-- Whether the place is what the patient waits for. Of a day place the times are null.
create or replace function fits(
    e waitlist_entry, p_doctor uuid, p_clinic uuid, p_specialty_key text, p_zone text, p_date date,
    p_start timestamptz, p_end timestamptz
) returns boolean language sql stable as $$
    select (e.doctor_id = p_doctor
            or e.doctor_id is null and (e.clinic_id, e.specialty_key) = (p_clinic, p_specialty_key))
       and p_date between e.from_date and e.to_date
       and (e.weekdays = '{}' or extract(isodow from p_date)::integer = any (e.weekdays))
       and case when p_start is null then coalesce(e.earliest, e.latest) is null
                -- In minutes of the place's date: a slot that ends at midnight ends at 1,440.
                else extract(epoch from (p_start at time zone p_zone) - p_date) >= coalesce(e.earliest, 0) * 60
                     and extract(epoch from (p_end at time zone p_zone) - p_date) <= coalesce(e.latest, 1440) * 60 end
$$;

-- Whether the place is strictly earlier than the appointment that would be moved to it; true if there is none.
create or replace function is_earlier(e waitlist_entry, p_date date, p_start timestamptz) returns boolean
language sql stable as $$
    select e.appointment_id is null or exists (
        select from appointment a
        where a.id = e.appointment_id and a.state = 'BOOKED'
          and case when p_start is null or a.start_time is null then p_date < a.date else p_start < a.start_time end)
$$;

-- Whether the patient has let this place go by, and it was not taken and freed since.
create or replace function passed(p_entry uuid, p_doctor uuid, p_date date, p_slot uuid) returns boolean
language sql stable as $$
    select exists (
        select from waitlist_pass p
        where p.entry_id = p_entry and p.doctor_id = p_doctor and p.date = p_date and p.slot_id is not distinct from p_slot
          and not exists (
              select from log l
              where l.doctor_id = p.doctor_id and l.date = p.date and l.revision > p.revision and l.revision > 0
                and l.slot_id is not distinct from p.slot_id
                and (l.type in ('appointment.booked', 'appointment.moved_in', 'queue.transferred_in')
                     or l.type = 'appointment.undone' and l.data ->> 'undone' in ('CancelAppointment', 'MarkNoShow',
                                                                                  'LeaveQueue'))
                and exists (
                    select from log f
                    where f.doctor_id = l.doctor_id and f.date = l.date and f.revision > l.revision
                      -- A move within the doctor-day is told by its new slot alone.
                      and (f.type = 'appointment.moved_in' and f.slot_id is distinct from l.slot_id
                           or f.type in ('appointment.cancelled', 'appointment.no_show', 'appointment.moved_out',
                                         'queue.left', 'queue.transferred_out')
                              and f.slot_id is not distinct from l.slot_id))))
$$;

-- The latest instant to which a place may be offered: an hour before the visit, of a day place before the day begins.
create or replace function offer_ends(p_clinic uuid, p_date date, p_start timestamptz) returns timestamptz
language sql stable as $$
    select coalesce(p_start, p_date::timestamp at time zone c.time_zone) - interval '1 hour' from clinic c
    where c.id = p_clinic
$$;

-- Append one change of an entry to the log; `h` is its offer, null if the change is of none.
create or replace function append_of_entry(r request, p_type text, e waitlist_entry, h hold, p_now timestamptz)
returns void language plpgsql as $$
begin
    insert into log (id, time, actor, method, address, trace_id, type, resource, clinic_id, doctor_id, patient_id,
                     appointment_id, slot_id, date, data)
    values (log_id(p_now), p_now, r.actor, r.verb, coalesce(r.address, ''), coalesce(r.trace_id, ''), p_type,
            'waitlistEntries/' || e.id, e.clinic_id, coalesce(h.doctor_id, e.doctor_id), e.patient_id,
            coalesce(e.booked_appointment_id, e.appointment_id), h.slot_id, h.date,
            jsonb_strip_nulls(jsonb_build_object('state', e.state, 'expire_time', h.expire_time, 'hold_id', h.id)));
end
$$;

-- Join the list.
create or replace function join_waitlist(r request) returns decision language plpgsql as $$
declare
    d decision;
    w waitlist_entry;
    a appointment;
    v record;
    v_other uuid;
    v_now timestamptz := moment();
begin
    w := jsonb_populate_record(null::waitlist_entry, r.waits);
    select p.active as patient_active, p.merged_into, x.active as doctor_active, c.active as clinic_active, c.id as clinic_id,
           (v_now at time zone c.time_zone)::date as today, x.id as doctor_id
    into v
    from (select 1) one
    left join patient p on p.id = r.patient
    left join doctor x on x.id = r.doctor
    left join clinic c on c.id = coalesce(x.clinic_id, w.clinic_id);
    if v.merged_into is not null then
        raise exception 'the patient was merged meanwhile' using errcode = 'serialization_failure';
    end if;
    if v.patient_active is null then return refused('PATIENT_NOT_FOUND', r.wanted); end if;
    if not v.patient_active then return refused('PATIENT_INACTIVE', r.patient); end if;
    if r.doctor is not null and v.doctor_id is null then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    if not v.doctor_active then return refused('DOCTOR_INACTIVE', r.doctor); end if;
    if v.clinic_id is null then return refused('CLINIC_NOT_FOUND', w.clinic_id); end if;
    if not v.clinic_active then return refused('CLINIC_INACTIVE', v.clinic_id); end if;
    if w.to_date < v.today then return refused('DATE_IN_PAST', null, jsonb_build_object('date', w.to_date)); end if;
    if w.appointment_id is not null then
        select * into a from appointment where id = w.appointment_id;
        if a.id is null or a.patient_id <> r.patient then
            return refused('APPOINTMENT_NOT_FOUND', w.appointment_id);
        end if;
        if a.state <> 'BOOKED' then return refused_transition(a); end if;
    end if;
    select e.id into v_other from waitlist_entry e
    where e.patient_id = r.patient and e.state in ('WAITING', 'OFFERED')
      and e.doctor_id is not distinct from r.doctor
      and (r.doctor is not null or (e.clinic_id, e.specialty_key) = (v.clinic_id, w.specialty_key))
      and daterange(e.from_date, e.to_date, '[]') && daterange(w.from_date, w.to_date, '[]') limit 1;
    if found then return refused('ALREADY_WAITING', v_other); end if;

    insert into waitlist_entry as e (patient_id, clinic_id, doctor_id, specialty, specialty_key, from_date, to_date,
                                     weekdays, earliest, latest, appointment_id, appointment_doctor, appointment_date,
                                     appointment_slot, priority, rank, create_time, update_time)
    values (r.patient, v.clinic_id, r.doctor, w.specialty, w.specialty_key, w.from_date, w.to_date, w.weekdays,
            w.earliest, w.latest, a.id, a.doctor_id, a.date, a.slot_id, r.priority,
            priority_class(r.priority), v_now, v_now)
    returning e into d.entry;
    perform append_of_entry(r, 'waitlist.joined', d.entry, null, v_now);
    d.outcome := 'OK';
    return d;
end
$$;

-- Write an entry down in another state.
create or replace function write_entry(e waitlist_entry, p_now timestamptz) returns waitlist_entry language plpgsql as $$
begin
    update waitlist_entry w
    set state = e.state, hold_id = e.hold_id, withdrawn = e.withdrawn, booked_appointment_id = e.booked_appointment_id,
        update_time = p_now
    where w.id = e.id
    returning w.* into e;
    return e;
end
$$;

-- Offer this place to an entry, under the locks of both. The caller has found that there is one.
create or replace function make_offer(
    r request, e waitlist_entry, p_clinic uuid, p_doctor uuid, p_date date, p_slot uuid, p_until timestamptz,
    p_now timestamptz
) returns waitlist_entry language plpgsql as $$
declare
    h hold;
begin
    insert into hold as x (doctor_id, clinic_id, date, slot_id, patient_id, entry_id, expire_time, create_time)
    values (p_doctor, p_clinic, p_date, p_slot, e.patient_id, e.id, p_until, p_now)
    returning x.* into h;
    e.state := 'OFFERED';
    e.hold_id := h.id;
    e.withdrawn := false;
    e := write_entry(e, p_now);
    perform append_of_entry(r, 'waitlist.offered', e, h, p_now);
    return e;
end
$$;

-- End the present offer of an entry, which waits again. `p_passes`: the place is not offered to the patient again until
-- it was taken and freed.
create or replace function end_offer(
    r request, p_type text, e waitlist_entry, p_passes boolean, p_now timestamptz
) returns waitlist_entry language plpgsql as $$
declare
    h hold;
begin
    select * into h from hold where id = e.hold_id;
    if h.state = 'HELD' and h.expire_time > p_now then update hold set state = 'RELEASED' where id = h.id; end if;
    if p_passes then
        insert into waitlist_pass (entry_id, doctor_id, date, slot_id, revision)
        select e.id, h.doctor_id, h.date, h.slot_id, coalesce(max(x.revision), 1)
        from doctor_day x where x.doctor_id = h.doctor_id and x.date = h.date;
    end if;
    e.state := 'WAITING';
    e.withdrawn := not p_passes;
    e := write_entry(e, p_now);
    perform append_of_entry(r, p_type, e, h, p_now);
    return e;
end
$$;

-- Leave the list for good: `p_state` is LEFT, BOOKED or EXPIRED. A live offer is given up, and its place told, so that
-- it is looked at; or it was used.
create or replace function end_entry(
    r request, e waitlist_entry, p_state text, p_appointment uuid, p_now timestamptz
) returns waitlist_entry language plpgsql as $$
declare
    h hold;
begin
    update hold x set state = 'RELEASED' where x.id = e.hold_id and x.state = 'HELD' and x.expire_time > p_now
    returning x.* into h;
    e.state := p_state;
    e.booked_appointment_id := p_appointment;
    e := write_entry(e, p_now);
    perform append_of_entry(
        r, 'waitlist.' || case p_state when 'BOOKED' then 'accepted' else lower(p_state) end, e, h, p_now);
    return e;
end
$$;

create or replace function leave_waitlist(r request, e waitlist_entry) returns decision language plpgsql as $$
declare
    d decision;
begin
    if e.state not in ('WAITING', 'OFFERED') then return refused_entry(e); end if;
    d.entry := end_entry(r, e, 'LEFT', null, moment());
    d.outcome := 'OK';
    return d;
end
$$;

create or replace function refused_entry(e waitlist_entry) returns decision language sql stable as $$
    select refused('INVALID_TRANSITION', null, jsonb_build_object('waitlist_entry_id', e.id, 'state', e.state))
$$;

-- Offer a place that the desk has chosen. It need not be what the patient asked for, but he must be able to book it. A
-- present offer is withdrawn.
create or replace function offer_place(r request, e waitlist_entry) returns decision language plpgsql as $$
declare
    d decision;
    v_place record;
    v_ends timestamptz;
    v_ttl interval;
    v_other uuid;
    v_last hold;
    v_now timestamptz := moment();
begin
    if e.state not in ('WAITING', 'OFFERED') then return refused_entry(e); end if;
    v_place := find_place(
        e.patient_id, r.doctor, r.date, r.slot, (select a from appointment a where a.id = e.appointment_id), v_now);
    if v_place.outcome <> 'OK' then
        return refused_place(r, v_place.outcome, v_place.subject, v_place.details, r.date);
    end if;
    select h.id into v_other from live_holds(r.doctor, r.date, v_now) h
    where h.patient_id = e.patient_id and h.id is distinct from e.hold_id limit 1;
    if found then
        return refused('DUPLICATE_BOOKING', null, jsonb_build_object('date', r.date, 'hold_id', v_other));
    end if;
    v_ends := offer_ends(v_place.clinic_id, r.date, v_place.start_time);
    if v_ends <= v_now then
        return refused('TOO_LATE', null, jsonb_build_object('date', r.date, 'start_time', v_place.start_time));
    end if;
    select c.offer_ttl into v_ttl from clinic c where c.id = v_place.clinic_id;
    if e.state = 'OFFERED' then
        select * into v_last from hold where id = e.hold_id;
        e := end_offer(r, 'waitlist.offer_expired', e,
                       no_offer(e, v_last, v_now) is not distinct from 'OFFER_EXPIRED', v_now);
    end if;
    d.entry := make_offer(r, e, v_place.clinic_id, r.doctor, r.date, r.slot,
                          least(v_now + coalesce(r.ttl, v_ttl), v_ends), v_now);
    select h into d.hold from hold h where h.id = (d.entry).hold_id;
    d.outcome := 'OK';
    return d;
end
$$;

-- Why there is no offer to accept or decline; null if there is one.
create or replace function no_offer(e waitlist_entry, h hold, p_now timestamptz) returns text language sql immutable as $$
    select case when h.state = 'HELD' and h.expire_time <= p_now then 'OFFER_EXPIRED'
                when e.state <> 'OFFERED' or h.state is distinct from 'HELD' then 'NO_OFFER' end
$$;

-- Take the offered place: book it, or move the entry's appointment to it.
create or replace function accept_offer(r request, e waitlist_entry, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    h hold;
    v_place record;
    v_refusal text;
    v_now timestamptz := moment();
begin
    select * into h from hold where id = e.hold_id;
    if (h.doctor_id, h.date, h.slot_id, e.patient_id) is distinct from (r.doctor, r.date, r.slot, r.patient) then
        raise exception 'the offer was changed meanwhile' using errcode = 'serialization_failure';
    end if;
    v_refusal := no_offer(e, h, v_now);
    if v_refusal is null and p_old.state = 'BOOKED' and not is_unmoved(e) then
        -- The entry is about to be LEFT.
        v_refusal := 'NO_OFFER';
    end if;
    if v_refusal is not null then
        if v_refusal = 'NO_OFFER' and e.state = 'WAITING' and e.withdrawn and h.id is not null
           and coalesce((select s.date from slot s where s.id = h.slot_id), h.date) = h.date then
            v_place := find_place(e.patient_id, h.doctor_id, h.date, h.slot_id, p_old, v_now);
            if v_place.outcome <> 'OK' then
                return refused_place(r, v_place.outcome, v_place.subject, v_place.details, h.date);
            end if;
        end if;
        return refused(v_refusal, e.id, jsonb_build_object('state', e.state));
    end if;
    r.hold := h.id;
    if e.appointment_id is null then
        r.reason := '';
        r.notes := '';
        d := book(r);
    else
        d := reschedule(r, p_old);
    end if;
    return d;
end
$$;

create or replace function decline_offer(r request, e waitlist_entry) returns decision language plpgsql as $$
declare
    d decision;
    h hold;
    v_refusal text;
    v_now timestamptz := moment();
begin
    select * into h from hold where id = e.hold_id;
    v_refusal := no_offer(e, h, v_now);
    if v_refusal is not null then return refused(v_refusal, e.id, jsonb_build_object('state', e.state)); end if;
    d.entry := end_offer(r, 'waitlist.declined', e, true, v_now);
    if r.leaves then d.entry := end_entry(r, d.entry, 'LEFT', null, v_now); end if;
    d.outcome := 'OK';
    return d;
end
$$;

-- A booking of a patient who waits: it ends his entries that it fits, and the one whose offer it has used.
create or replace function end_waiting(r request, a appointment, p_now timestamptz) returns void language plpgsql as $$
declare
    e waitlist_entry;
    x record;
begin
    select d.specialty_key, c.time_zone into x from doctor d, clinic c where d.id = a.doctor_id and c.id = a.clinic_id;
    for e in
        select * from waitlist_entry w where w.patient_id = a.patient_id and w.state in ('WAITING', 'OFFERED')
    loop
        if e.hold_id = r.hold
           or fits(e, a.doctor_id, a.clinic_id, x.specialty_key, x.time_zone, a.date, a.start_time, a.end_time)
              and is_earlier(e, a.date, a.start_time) then
            perform end_entry(r, e, 'BOOKED', a.id, p_now);
        end if;
    end loop;
end
$$;

-- A merged patient's entries go on as the kept one's, but for those that wait for the same.
create or replace function merge_waitlist(r request, p_merged uuid, p_kept uuid, p_now timestamptz) returns void
language plpgsql as $$
declare
    e waitlist_entry;
begin
    for e in select * from waitlist_entry w where w.patient_id = p_merged and w.state in ('WAITING', 'OFFERED') loop
        if exists (
            select from waitlist_entry k
            where k.patient_id = p_kept and k.state in ('WAITING', 'OFFERED')
              and (k.doctor_id, k.clinic_id, k.specialty_key) is not distinct from
                  (e.doctor_id, e.clinic_id, e.specialty_key)
              and daterange(k.from_date, k.to_date, '[]') && daterange(e.from_date, e.to_date, '[]')) then
            perform end_entry(r, e, 'LEFT', null, p_now);
        end if;
    end loop;
    update waitlist_entry set patient_id = p_kept where patient_id = p_merged;
end
$$;

-- Offer this place to the first who waits for it and can have it, under the lock of its doctor-day. Answers OFFERED; NONE
-- if there is nobody; BUSY if the first is being booked or changed just now.
create or replace function offer_to_first(
    r request, x doctor, p_clinic uuid, p_date date, p_slot uuid, p_start timestamptz, p_end timestamptz,
    p_now timestamptz
) returns text language plpgsql as $$
declare
    e waitlist_entry;
    a appointment;
    c record;
    v_place record;
    v_ends timestamptz := offer_ends(p_clinic, p_date, p_start);
    v_rank integer := 0;
    v_time timestamptz := '-infinity';
    v_id uuid := '00000000-0000-0000-0000-000000000000';
    v_found integer;
begin
    if v_ends <= p_now then return 'NONE'; end if;
    select time_zone, offer_ttl into c from clinic where id = p_clinic;
    -- A few at a time: each branch reads an index in the order of the list, and most searches end with the first.
    loop
        v_found := 0;
        for e in
            select * from (
                (select o.* from waitlist_entry o
                 where o.state = 'WAITING' and o.doctor_id = x.id
                   and (o.rank, o.create_time, o.id) > (v_rank, v_time, v_id)
                   and fits(o, x.id, p_clinic, x.specialty_key, c.time_zone, p_date, p_start, p_end)
                 order by o.rank, o.create_time, o.id limit 20)
                union all
                (select o.* from waitlist_entry o
                 where o.state = 'WAITING' and o.doctor_id is null and o.clinic_id = p_clinic
                   and o.specialty_key = x.specialty_key
                   and (o.rank, o.create_time, o.id) > (v_rank, v_time, v_id)
                   and fits(o, x.id, p_clinic, x.specialty_key, c.time_zone, p_date, p_start, p_end)
                 order by o.rank, o.create_time, o.id limit 20)) w
            order by w.rank, w.create_time, w.id limit 20
        loop
            v_found := v_found + 1;
            v_rank := e.rank;
            v_time := e.create_time;
            v_id := e.id;
            continue when not is_earlier(e, p_date, p_start) or passed(e.id, x.id, p_date, p_slot);
            -- Without a lock first: those who cannot have it may be many. What keeps one from it leaves an event when it
            -- goes.
            select * into a from appointment where id = e.appointment_id;
            continue when (find_place(e.patient_id, x.id, p_date, p_slot, a, p_now)).outcome <> 'OK';
            -- Whoever holds locks may not wait for more. Nobody else may have the place instead.
            if not try_lock('patient/' || e.patient_id) then return 'BUSY'; end if;
            -- Their own statements, so they see what was committed before we got the lock.
            select * into e from waitlist_entry where id = e.id and state = 'WAITING' and patient_id = e.patient_id;
            continue when not found;
            select * into a from appointment where id = e.appointment_id;
            v_place := find_place(e.patient_id, x.id, p_date, p_slot, a, p_now);
            continue when v_place.outcome <> 'OK' or not is_earlier(e, p_date, p_start) or not is_unmoved(e) or exists (
                select from live_holds(x.id, p_date, p_now) h where h.patient_id = e.patient_id);
            perform make_offer(r, e, p_clinic, x.id, p_date, p_slot, least(p_now + c.offer_ttl, v_ends), p_now);
            return 'OFFERED';
        end loop;
        exit when v_found < 20;
    end loop;
    return 'NONE';
end
$$;

-- Places of a slot, or of a doctor-day, that neither an appointment nor a live hold takes.
create or replace function places_left(p_doctor uuid, p_date date, p_slot uuid, p_capacity integer, p_now timestamptz)
returns integer language sql stable as $$
    select p_capacity
           - (select count(*) from appointment a
              where a.doctor_id = p_doctor and a.date = p_date and holds_place(a.state)
                and (p_slot is null or a.slot_id = p_slot))::integer
           - (select count(*) from live_holds(p_doctor, p_date, p_now) h where p_slot is null or h.slot_id = p_slot)::integer
$$;

-- Offer the free places of a doctor-day. `busy` says that it must be tried again soon.
create or replace function offer_places(p_doctor uuid, p_date date, out offered integer, out busy boolean)
language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off set lock_timeout = '500ms' as $$
declare
    r request;
    x doctor;
    s slot;
    v_has_slots boolean := false;
    v_now timestamptz;
    v_said text;
begin
    offered := 0;
    busy := false;
    select * into x from doctor where id = p_doctor and active;
    if not found or not exists (
        select from waitlist_entry e
        where e.state = 'WAITING' and e.doctor_id = p_doctor and p_date between e.from_date and e.to_date
        union all
        select from waitlist_entry e
        where e.state = 'WAITING' and e.doctor_id is null and e.specialty_key = x.specialty_key
          and p_date between e.from_date and e.to_date
          and e.clinic_id = any (x.clinic_id || array(
              select y.clinic_id from slot y where y.doctor_id = p_doctor and y.date = p_date))) then
        return;
    end if;
    r.verb := 'OfferPlace';
    r.actor := 'system';
    perform lock_all(array[doctor_day_name(p_doctor, p_date)]);
    v_now := moment();
    for s in
        select * from slot y where y.doctor_id = p_doctor and y.date = p_date and y.state = 'OPEN' order by y.start_time
    loop
        v_has_slots := true;
        while (find_place(null, p_doctor, p_date, s.id, null, v_now)).outcome = 'OK' loop
            v_said := offer_to_first(r, x, s.clinic_id, p_date, s.id, s.start_time, s.end_time, v_now);
            exit when v_said <> 'OFFERED';
            offered := offered + 1;
        end loop;
        busy := busy or v_said = 'BUSY';
    end loop;
    if v_has_slots then return; end if;
    while (find_place(null, p_doctor, p_date, null, null, v_now)).outcome = 'OK' loop
        v_said := offer_to_first(r, x, x.clinic_id, p_date, null, null, null, v_now);
        exit when v_said <> 'OFFERED';
        offered := offered + 1;
    end loop;
    busy := coalesce(v_said = 'BUSY', false);
end
$$;

-- The doctor-days where a place is free that somebody who waits could be offered: those of an entry, or of all who wait
-- for a doctor, if `p_entry` is null.
create or replace function free_days(p_entry uuid, p_doctor uuid) returns table (doctor_id uuid, date date)
language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    e waitlist_entry;
    v_doctors uuid[];
    v_last date;
    v_now timestamptz := moment();
begin
    if p_entry is not null then
        select * into e from waitlist_entry w where w.id = p_entry and w.state = 'WAITING';
        if not found then return; end if;
        v_last := e.to_date;
        v_doctors := case when e.doctor_id is not null then array[e.doctor_id] else array(
            select x.id from doctor x
            where x.clinic_id = e.clinic_id and x.specialty_key = e.specialty_key and x.active) end;
    else
        v_doctors := array[p_doctor];
        select greatest(
            (select max(w.to_date) from waitlist_entry w where w.state = 'WAITING' and w.doctor_id = p_doctor),
            (select max(w.to_date) from waitlist_entry w join doctor x on x.id = p_doctor
             where w.state = 'WAITING' and w.doctor_id is null and w.clinic_id = x.clinic_id
               and w.specialty_key = x.specialty_key)) into v_last;
        if v_last is null then return; end if;
    end if;
    return query
    select f.doctor_id, f.date from (
        select s.doctor_id, s.date
        from unnest(v_doctors) v
        join lateral (
            select * from slot y
            where y.doctor_id = v and y.start_time >= v_now + interval '1 hour' and y.date <= v_last
              and y.state = 'OPEN' offset 0) s on true
        join lateral (select * from doctor y where y.id = s.doctor_id offset 0) x on true
        join lateral (select * from clinic y where y.id = s.clinic_id offset 0) c on true
        where (e.id is null or fits(e, x.id, s.clinic_id, x.specialty_key, c.time_zone, s.date, s.start_time, s.end_time)
                               and is_earlier(e, s.date, s.start_time) and not passed(e.id, x.id, s.date, s.id))
          and places_left(s.doctor_id, s.date, s.id, s.capacity, v_now) > 0
        union
        select v, day.date
        from unnest(v_doctors) v
        join lateral (select * from doctor y where y.id = v offset 0) x on true
        join lateral (select * from clinic y where y.id = x.clinic_id offset 0) c on true
        -- Only dates that somebody waits for.
        cross join lateral unnest(case when e.id is not null then datemultirange(daterange(e.from_date, e.to_date, '[]'))
            else coalesce((select range_agg(daterange(w.from_date, w.to_date, '[]')) from waitlist_entry w
                           where w.state = 'WAITING' and w.doctor_id = v), '{}')
                 + coalesce((select range_agg(daterange(w.from_date, w.to_date, '[]')) from waitlist_entry w
                             where w.state = 'WAITING' and w.doctor_id is null and w.clinic_id = x.clinic_id
                               and w.specialty_key = x.specialty_key), '{}') end) m
        cross join lateral (
            select g::date as date
            from generate_series(greatest(lower(m), (v_now at time zone c.time_zone)::date + 1), upper(m) - 1,
                                 interval '1 day') g limit 1000) day
        left join doctor_day dd on dd.doctor_id = v and dd.date = day.date
        where (e.id is null or fits(e, x.id, x.clinic_id, x.specialty_key, c.time_zone, day.date, null, null)
                               and is_earlier(e, day.date, null) and not passed(e.id, v, day.date, null))
          and coalesce(dd.is_present, true)
          and not exists (
              select from slot y where y.doctor_id = v and y.date = day.date and y.state = 'OPEN')
          and places_left(v, day.date, null, coalesce(dd.max_patients, x.max_patients_per_day), v_now) > 0) f
    order by f.date, f.doctor_id limit 1000;
end
$$;

-- Whether an offered place could still be booked, but for who may have it.
create or replace function stands(h hold) returns boolean language sql stable as $$
    select d.active and c.active and coalesce(y.is_present, true)
           and not exists (select from leaves_over(h.doctor_id, h.date, s.start_time, s.end_time))
           and not exists (
               select from schedule_exception e where e.doctor_id = h.doctor_id and e.date = h.date and e.closed)
           and (h.slot_id is null or s.state = 'OPEN' and s.date = h.date)
    from doctor d
    join clinic c on c.id = h.clinic_id
    left join slot s on s.id = h.slot_id
    left join doctor_day y on y.doctor_id = h.doctor_id and y.date = h.date
    where d.id = h.doctor_id
$$;

-- Whether the appointment that an entry would move is still where it was when the patient joined.
create or replace function is_unmoved(e waitlist_entry) returns boolean language sql stable as $$
    select e.appointment_id is null or exists (
        select from appointment a
        where a.id = e.appointment_id and a.state = 'BOOKED'
          and (a.doctor_id, a.date, a.slot_id) is not distinct from
              (e.appointment_doctor, e.appointment_date, e.appointment_slot))
$$;

-- The entries that must change because of the time, or because the place that is offered was closed. In any order, so that
-- some that cannot be settled keep nobody.
create or replace function unsettled_entries(p_most integer) returns setof uuid
language sql volatile set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
    select id from (
        select e.id from waitlist_entry e
        where e.state in ('WAITING', 'OFFERED') and e.to_date < (select (moment() + interval '14 hours')::date)
          and e.to_date < (select (moment() at time zone c.time_zone)::date from clinic c where c.id = e.clinic_id)
        union
        select e.id from waitlist_entry e
        where e.state = 'OFFERED' and coalesce(
            (select h.state <> 'HELD' or h.expire_time <= moment() or stands(h) is not true
             from hold h where h.id = e.hold_id), true)) unsettled
    order by random() limit p_most
$$;

-- Settle one of them; the doctor-day whose place it gives up, if it does.
create or replace function settle_entry(p_entry uuid, out doctor_id uuid, out date date)
language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off set lock_timeout = '500ms' as $$
declare
    r request;
    e waitlist_entry;
    h hold;
    v_locked text[];
    v_now timestamptz;
begin
    r.verb := 'OfferPlace';
    r.actor := 'system';
    select * into e from waitlist_entry where id = p_entry;
    select * into h from hold where id = e.hold_id;
    v_locked := array_remove(array['patient/' || e.patient_id, doctor_day_name(h.doctor_id, h.date)], null);
    perform lock_all(v_locked);
    v_now := moment();
    select * into e from waitlist_entry where id = p_entry and patient_id = e.patient_id and state in ('WAITING', 'OFFERED')
        and hold_id is not distinct from e.hold_id;
    if not found then return; end if;
    select * into h from hold where id = e.hold_id;
    if e.state = 'OFFERED' then
        doctor_id := h.doctor_id;
        date := h.date;
    end if;
    if not is_unmoved(e) then
        perform end_entry(r, e, 'LEFT', null, v_now);
    elsif e.to_date < (select (v_now at time zone c.time_zone)::date from clinic c where c.id = e.clinic_id) then
        perform end_entry(r, e, 'EXPIRED', null, v_now);
    elsif e.state = 'OFFERED' and h.state = 'HELD' and h.expire_time <= v_now then
        perform end_offer(r, 'waitlist.offer_expired', e, true, v_now);
    elsif e.state = 'OFFERED' and (h.state is distinct from 'HELD' or stands(h) is not true) then
        perform end_offer(r, 'waitlist.offer_expired', e, false, v_now);
    end if;
end
$$;
