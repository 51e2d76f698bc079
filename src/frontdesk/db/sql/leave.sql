-- Leave: what it closes, which is derived from its row wherever it is asked for.

-- The leaves that close this place: a doctor-day, or a slot of it with these times. Leave of whole days closes the
-- doctor-day, leave of hours the slots that it touches; a place without times is closed by the former alone.
--
-- The planner puts the query in place of the call, since it is one statement in FROM. A slot keeps the dates of its
-- clinic when its doctor moves to another one; civil dates of two zones at one instant differ by one at most.
create or replace function leaves_over(p_doctor uuid, p_date date, p_start timestamptz, p_end timestamptz)
returns table (id uuid, whole_days boolean) language sql stable as $$
    select l.id, l.whole_days from leave l
    where l.doctor_id = p_doctor and l.to_date >= p_date - 1 and l.from_date <= p_date + 1 and l.state <> 'CANCELLED'
      and case when l.whole_days then p_date between l.from_date and l.to_date
               else l.start_time < p_end and p_start < l.end_time end
$$;

-- Does the leave meet this appointment: is it on one of its dates, or at its hours? Day bookings have no hours.
create or replace function meets(l leave, a appointment) returns boolean language sql immutable as $$
    select coalesce(
        a.doctor_id = l.doctor_id and is_live(a.state)
        and case when l.whole_days then a.date between l.from_date and l.to_date
                 else l.start_time < a.end_time and a.start_time < l.end_time end, false)
$$;

-- Write a leave down: from then on it closes what it takes. The appointments that it meets are settled afterwards.
--
-- Of whole days if `p_from` is given, else of the hours from `p_start` to `p_end`. Answers OK, or why not.
create or replace function create_leave(
    p_id uuid, p_doctor uuid, p_from date, p_to date, p_start timestamptz, p_end timestamptz, p_reason text,
    p_policy text, p_actor text, p_address text, p_trace_id text,
    out outcome text, out subject uuid
) language plpgsql as $$
declare
    v_now timestamptz := moment();
    v_today date;
    v record;
begin
    select d.clinic_id, c.time_zone into v from doctor d join clinic c on c.id = d.clinic_id where d.id = p_doctor;
    v_today := (v_now at time zone v.time_zone)::date;
    subject := p_doctor;
    if p_to < v_today or p_end <= v_now then outcome := 'DATE_IN_PAST'; return; end if;
    p_start := coalesce(p_start, p_from::timestamp at time zone v.time_zone);
    p_end := coalesce(p_end, (p_to + 1)::timestamp at time zone v.time_zone);
    -- Two that come at once wait here for each other, and the second finds the first in the next statement.
    perform lock_all(array['leaves/' || p_doctor]);
    select id into subject from leave
    where uuidrange(doctor_id, doctor_id, '[]') && uuidrange(p_doctor, p_doctor, '[]')
      and tstzrange(start_time, end_time) && tstzrange(p_start, p_end) and state <> 'CANCELLED'
    order by start_time limit 1;
    if found then outcome := 'LEAVE_OVERLAP'; return; end if;
    subject := p_id;
    insert into leave (id, doctor_id, clinic_id, whole_days, from_date, to_date, start_time, end_time, reason, policy,
                       next_date, actor, address, trace_id, create_time, update_time)
    select p_id, p_doctor, v.clinic_id, p_from is not null, x.first, x.last, p_start, p_end, p_reason, p_policy,
           -- A slot of another clinic, where the doctor once was, may have another date at this hour.
           greatest(v_today, x.first - (p_from is null)::integer), p_actor, p_address, p_trace_id, v_now, v_now
    from (select coalesce(p_from, (p_start at time zone v.time_zone)::date) as first,
                 coalesce(p_to, ((p_end - interval '1 microsecond') at time zone v.time_zone)::date) as last) x;
    outcome := 'OK';
end
$$;

-- Take one more lock without waiting for it; whether it was free. A transaction that has locks never waits for another
-- one, so those that settle leaves wait for nobody in a circle.
create or replace function try_lock(p_name text) returns boolean language sql volatile as $$
    select pg_try_advisory_xact_lock(hashtextextended(p_name, 0))
$$;

-- How many moves of this plan go to that doctor-day, or to that slot of it. Without a plan none: moves that were made
-- are seen in the appointments.
create or replace function planned(p_plan uuid, p_doctor uuid, p_date date, p_slot uuid)
returns table (count bigint) language sql stable as $$
    select count(*) from leave_outcome o
    where o.leave_id = p_plan and o.outcome = 'MOVED' and o.doctor_id = p_doctor and o.date = p_date
      and (p_slot is null or o.slot_id = p_slot)
$$;

-- The next place with room for one more: a slot if the moving appointment has one, else a doctor-day. In the order of
-- date, start and doctor code, after the given ones, up to `p_last`; nothing if there is none. It only passes over what
-- is closed or full, and `find_place` decides: a place may be found here and refused there.
create or replace function next_place(
    p_doctors uuid[], p_clinic uuid, a appointment, p_date date, p_start timestamptz, p_code text, p_last date,
    p_plan uuid,
    out doctor uuid, out date date, out slot uuid, out start_time timestamptz, out end_time timestamptz, out code text
) language plpgsql
    -- To a planner without statistics it looks as cheap to read every later slot and to sort them.
    set enable_bitmapscan = off set enable_hashjoin = off as $$
declare
    v_now timestamptz := moment();
begin
    if a.slot_id is not null then
        select x.doctor_id, x.date, x.id, x.start_time, x.end_time, d.code
        into doctor, date, slot, start_time, end_time, code
        from unnest(p_doctors) w (id) join doctor d on d.id = w.id
        -- The first of each doctor, found in the order of the index.
        cross join lateral (
            select s.* from slot s left join doctor_day y on y.doctor_id = s.doctor_id and y.date = s.date
            where s.doctor_id = d.id and s.start_time >= p_start
              and (s.start_time > p_start or d.code collate "C" > p_code)
              and s.date <= p_last and (p_clinic is null or s.clinic_id = p_clinic)
              and s.state = 'OPEN' and coalesce(y.is_present, true)
              and not exists (select from leaves_over(s.doctor_id, s.date, s.start_time, s.end_time))
              and not exists (select from schedule_exception e
                              where e.doctor_id = s.doctor_id and e.date = s.date and e.closed)
              and s.capacity > (select count(*) from appointment o where o.slot_id = s.id and holds_place(o.state))
                  + (select count(*) from live_holds(s.doctor_id, s.date, v_now) h where h.slot_id = s.id)
                  + (select p.count from planned(p_plan, s.doctor_id, s.date, s.id) p)
              and ((s.doctor_id, s.date) = (a.doctor_id, a.date)
                   or coalesce(y.max_patients, d.max_patients_per_day)
                      > (select count(*) from appointment o
                         where o.doctor_id = s.doctor_id and o.date = s.date and holds_place(o.state))
                      + (select count(*) from live_holds(s.doctor_id, s.date, v_now))
                      + (select p.count from planned(p_plan, s.doctor_id, s.date, null) p))
            order by s.start_time limit 1) x
        order by x.start_time, d.code collate "C" limit 1;
        return;
    end if;
    -- A date after the other, because most searches end at the first.
    date := p_date;
    while date <= p_last loop
        select d.id, d.code into doctor, code
        from doctor d left join doctor_day y on y.doctor_id = d.id and y.date = next_place.date
        where d.id = any (p_doctors) and (next_place.date > p_date or d.code collate "C" > p_code)
          and coalesce(y.is_present, true)
          and not exists (select from leaves_over(d.id, next_place.date, null, null))
          and not exists (select from schedule_exception e
                          where e.doctor_id = d.id and e.date = next_place.date and e.closed)
          and coalesce(y.max_patients, d.max_patients_per_day)
              > (select count(*) from appointment o
                 where o.doctor_id = d.id and o.date = next_place.date and holds_place(o.state))
              + (select count(*) from live_holds(d.id, next_place.date, v_now))
              + (select p.count from planned(p_plan, d.id, next_place.date, null) p)
        order by d.code collate "C" limit 1;
        if found then return; end if;
        date := date + 1;
    end loop;
    date := null;
end
$$;

-- Settle these appointments, which the leave meets, by its policy and in their order, each as a whole. Under the locks of
-- their doctor-days; those of patients and of new places are taken here if they are free. If one is not, it stops, and
-- `wanted` names the locks to begin with the next time. `doctors` and `dates` are the doctor-days that were changed,
-- `settled` how many appointments of the leave are settled now.
--
-- With `p_plan` nothing is moved, cancelled or locked, only the outcomes are written: each appointment looks for a place
-- beside the live appointments and the moves that are planned before it. The caller rolls them back.
create or replace function settle_appointments(
    l leave, p_ids uuid[], p_plan boolean, out wanted text[], out doctors uuid[], out dates date[], out settled integer
) language plpgsql as $$
declare
    a appointment;
    r request;
    d decision;
    v_plan uuid := case when p_plan then l.id end;
    v_same boolean := l.policy = 'MOVE_SAME_DOCTOR';
    v_id uuid;
    v_outcome text;
    v_refusal text;
    v_place record;
    v_colleagues uuid[];
    -- Of the appointment before, and the first place that had room for it: none before has room for the next one.
    v_date date;
    v_clinic uuid;
    v_room_date date;
    v_room_start timestamptz;
    v_from_date date;
    v_from_start timestamptz;
    v_from_code text;
    v_now timestamptz := moment();
begin
    doctors := '{}';
    dates := '{}';
    r.verb := 'CreateLeave';
    r.actor := l.actor;
    r.address := l.address;
    r.trace_id := l.trace_id;
    r.reason := '';
    settled := l.settled;
    foreach v_id in array p_ids loop
        select * into a from appointment where id = v_id;
        if not meets(l, a) then continue; end if;
        if a.state = 'BOOKED' and l.policy like 'MOVE%' and not p_plan then
            wanted := array['patient/' || a.patient_id];
            if not try_lock(wanted[1]) then return; end if;
            select * into a from appointment where id = v_id;
            -- Merged while we had no lock: the patient is another one now.
            if wanted <> array['patient/' || a.patient_id] then return; end if;
            wanted := null;
        end if;
        v_place := null;
        d := null;
        if a.state <> 'BOOKED' or l.policy = 'KEEP' then
            v_outcome := 'KEPT';
        elsif l.policy = 'CANCEL' then
            v_outcome := 'CANCELLED';
            if not p_plan then d := change_visit(r, a); end if;
        else
            if (a.date, a.clinic_id) is distinct from (v_date, v_clinic) then
                v_date := a.date;
                v_clinic := a.clinic_id;
                v_room_date := null;
                v_room_start := null;
                -- Who is inactive would be refused at each of his places.
                v_colleagues := case when v_same then array(
                    select x.id from doctor x where x.id = l.doctor_id and x.active) else array(
                    select x.id from doctor me join doctor x on x.specialty_key = me.specialty_key
                    where me.id = l.doctor_id and me.specialty_key <> '' and x.id <> me.id and x.active
                      and x.clinic_id = a.clinic_id) end;
            end if;
            -- Its own doctor has no earlier place for it; of others every one from its own date on.
            v_from_date := greatest(a.date + v_same::integer, v_room_date);
            v_from_start := case when v_same then a.start_time else (
                select a.date::timestamp at time zone c.time_zone from clinic c where c.id = a.clinic_id) end;
            v_from_start := greatest(v_from_start, v_now, v_room_start);
            v_from_code := '';
            v_outcome := 'NOT_MOVED';
            loop
                v_place := next_place(
                    v_colleagues, case when not v_same then a.clinic_id end, a, v_from_date, v_from_start, v_from_code,
                    least(a.date + 60, '9999-12-31'), v_plan);
                if v_from_code <> '' then null;
                elsif a.slot_id is null then v_room_date := coalesce(v_place.date, 'infinity');
                else v_room_start := coalesce(v_place.start_time, 'infinity');
                end if;
                exit when v_place.doctor is null;
                if p_plan then
                    v_refusal := (find_place(
                        a.patient_id, v_place.doctor, v_place.date, v_place.slot, a, v_now)).outcome;
                    if v_refusal = 'OK' and exists (
                        -- From the patient's few appointments to their moves: the other way leads through all moves.
                        select from appointment mine
                        cross join lateral (
                            select o.* from leave_outcome o
                            where o.leave_id = l.id and o.appointment_id = mine.id offset 0) o
                        left join slot s on s.id = o.slot_id
                        where mine.patient_id = a.patient_id and is_live(mine.state)
                          and ((o.doctor_id, o.date) = (v_place.doctor, v_place.date)
                               or s.start_time < v_place.end_time and v_place.start_time < s.end_time)) then
                        v_refusal := 'DUPLICATE_BOOKING';
                    end if;
                else
                    if not try_lock(doctor_day_name(v_place.doctor, v_place.date)) then
                        wanted := array[
                            'patient/' || a.patient_id, doctor_day_name(v_place.doctor, v_place.date)];
                        return;
                    end if;
                    r.doctor := v_place.doctor;
                    r.date := v_place.date;
                    r.slot := v_place.slot;
                    d := reschedule(r, a);
                    v_refusal := d.outcome;
                end if;
                if v_refusal = 'OK' then v_outcome := 'MOVED'; end if;
                -- A patient who may not come at all is refused everywhere.
                exit when v_refusal in ('OK', 'PATIENT_INACTIVE');
                v_from_date := v_place.date;
                v_from_start := v_place.start_time;
                v_from_code := v_place.code;
            end loop;
        end if;
        settled := settled + 1;
        if v_outcome = 'MOVED' then
            insert into leave_outcome (leave_id, position, appointment_id, outcome, doctor_id, date, slot_id)
            values (l.id, settled, a.id, v_outcome, v_place.doctor, v_place.date, v_place.slot);
        else
            insert into leave_outcome (leave_id, position, appointment_id, outcome)
            values (l.id, settled, a.id, v_outcome);
        end if;
        if d.outcome = 'OK' then
            doctors := doctors || array[a.doctor_id, (d.appointment).doctor_id];
            dates := dates || array[a.date, (d.appointment).date];
        end if;
    end loop;
end
$$;

-- Settle the next few appointments that a leave meets: one short transaction of many, whoever makes it. `outcome` is
-- BUSY if somebody else settles this leave just now, ENDED if there is nothing to do any more, APPLIED if this was the
-- end of it, else MORE. `wanted` are the locks with which an earlier batch has stopped.
--
-- The leave was committed before, so a booking that begins now is refused. One that began earlier may not have seen it,
-- and has the lock of its doctor-day until it has ended: so the lock of each date is taken, also where nobody is booked.
create or replace function settle_leave(
    p_leave uuid, p_most integer, p_wanted text[],
    out outcome text, out wanted text[], out doctors uuid[], out dates date[]
) language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off
    -- While it waits for one date's lock it has those of others.
    set lock_timeout = '500ms' as $$
declare
    l leave;
    v_last date;
    v_until date;
    v_date date;
    v_ids uuid[] := '{}';
    v_settled record;
begin
    outcome := 'BUSY';
    if not try_lock('leave/' || p_leave) then return; end if;
    select * into l from leave where id = p_leave;
    outcome := 'ENDED';
    if l.state is distinct from 'APPLYING' then return; end if;
    v_last := l.to_date + (not l.whole_days)::integer;
    v_until := least(l.next_date + 6, v_last);
    perform lock_all(p_wanted || array(
        select doctor_day_name(l.doctor_id, l.next_date + n) from generate_series(0, v_until - l.next_date) n));
    -- CancelLeave waits for this batch, but not for its locks.
    select * into l from leave where id = p_leave for update;
    if l.state <> 'APPLYING' then return; end if;

    select a.date into v_date from appointment a
    where a.doctor_id = l.doctor_id and a.date between l.next_date and v_until and is_live(a.state) and meets(l, a)
      and not exists (select from leave_outcome o where o.leave_id = l.id and o.appointment_id = a.id)
    order by a.date limit 1;
    if found then
        v_ids := array(
            select a.id from appointment a
            where a.doctor_id = l.doctor_id and a.date = v_date and is_live(a.state) and meets(l, a)
              and not exists (select from leave_outcome o where o.leave_id = l.id and o.appointment_id = a.id)
            order by coalesce(a.start_time, '-infinity'), a.number limit p_most);
        v_settled := settle_appointments(l, v_ids, false);
        wanted := v_settled.wanted;
        doctors := v_settled.doctors;
        dates := v_settled.dates;
        l.settled := v_settled.settled;
    end if;
    v_date := coalesce(v_date, v_until + 1);
    outcome := case when v_date > v_last then 'APPLIED' else 'MORE' end;
    update leave
    set next_date = v_date, settled = l.settled, state = case outcome when 'APPLIED' then 'APPLIED' else state end,
        version = version + (outcome = 'APPLIED')::integer,
        update_time = case outcome when 'APPLIED' then moment() else update_time end
    where id = p_leave;
end
$$;

-- What would become of the appointments that a leave meets: writes the outcomes and moves nobody. In the transaction that
-- has created the leave, and that is rolled back.
create or replace function plan_leave(p_leave uuid) returns void
language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    l leave;
begin
    select * into l from leave where id = p_leave;
    update leave set settled = (settle_appointments(
        l,
        array(select a.id from appointment a
              where a.doctor_id = l.doctor_id and is_live(a.state) and meets(l, a)
                and a.date between l.next_date and l.to_date + (not l.whole_days)::integer
              order by a.date, coalesce(a.start_time, '-infinity'), a.number),
        true)).settled
    where id = l.id;
end
$$;
