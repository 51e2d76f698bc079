-- The hours of doctors: weekly schedules, exceptions on a date, and the slots that follow. Whoever changes hours, or which
-- slots a doctor has, holds the lock of his schedule (`lock_names`). Bookings do not take it.

-- A doctor's hours on a date, by start, as schedules store them: those of the date's exception, else of the schedule.
create or replace function hours_on(p_doctor uuid, p_date date) returns jsonb language sql stable as $$
    select coalesce(
        (select e.hours from schedule_exception e where e.doctor_id = p_doctor and e.date = p_date),
        (select jsonb_agg(rule order by n)
         from (select * from schedule where doctor_id = p_doctor and effective_from <= p_date
               order by effective_from desc limit 1) s,
              jsonb_array_elements(s.rules) with ordinality w (rule, n)
         where coalesce(s.effective_until >= p_date, true)
           and (rule ->> 'weekday')::integer = extract(isodow from p_date)),
        '[]')
$$;

-- Whether hours have a visit that starts in this minute of the day and lasts so long.
create or replace function has_visit(p_hours jsonb, p_minute numeric, p_length interval) returns boolean
language sql immutable as $$
    select exists (
        select from jsonb_to_recordset(p_hours) as h ("start" integer, "end" integer, visit_length integer)
        where p_minute >= h.start and p_minute + h.visit_length <= h.end and mod(p_minute - h.start, h.visit_length) = 0
          and p_length = make_interval(mins => h.visit_length))
$$;

-- The minute of the day that the zone's clock shows; the seconds are its fraction. 1,440 and more on the next day.
create or replace function minute_of(p_time timestamptz, p_date date, p_zone text) returns numeric
language sql stable as $$
    select extract(epoch from (p_time at time zone p_zone) - p_date) / 60
$$;

-- The slots of a doctor that have not started, from one date to another (null: without end), and that his hours now have:
-- each is exactly one visit of them.
create or replace function slots_of_hours(p_doctor uuid, p_from date, p_to date, p_now timestamptz) returns uuid[]
language sql stable as $$
    with found as materialized (
        select s.id, s.date, s.start_time, s.end_time, c.time_zone
        from doctor d join clinic c on c.id = d.clinic_id join slot s on s.doctor_id = d.id and s.clinic_id = c.id
        where d.id = p_doctor and s.start_time > p_now and s.date >= p_from and s.date <= coalesce(p_to, 'infinity')
    ), day as materialized (
        select f.date, hours_on(p_doctor, f.date) as hours from (select distinct date from found) f
    )
    select coalesce(array_agg(f.id order by f.start_time), '{}')
    from found f join day using (date)
    where has_visit(day.hours, minute_of(f.start_time, f.date, f.time_zone), f.end_time - f.start_time)
$$;

-- Those of the slots of the hours before that are open, and that the present hours of these dates lack.
create or replace function stale_slots(p_before uuid[], p_doctor uuid, p_from date, p_to date, p_now timestamptz)
returns uuid[] language sql stable as $$
    select coalesce(array_agg(s.id order by s.start_time), '{}')
    -- Not a condition on each slot, which would ask for all of them again for each one.
    from (select unnest(p_before) except select unnest(slots_of_hours(p_doctor, p_from, p_to, p_now))) gone (id)
    join slot s using (id)
    where s.state = 'OPEN'
$$;

-- Have the slots of these dates generated again, because the doctor's hours, or what keeps them from being held, have
-- changed. Does nothing for a doctor who never had a schedule.
create or replace function generate_again(p_doctor uuid, p_dates daterange) returns void language sql as $$
    update slot_horizon set generated = generated - datemultirange(p_dates) where doctor_id = p_doctor
$$;

-- A slot is to be deleted or moved. If it is no visit of the hours, one may have been skipped for it, and is generated now;
-- a visit of the hours that somebody takes away is not generated again.
create or replace function give_way(s slot) returns void language plpgsql as $$
begin
    if s.id <> all (slots_of_hours(s.doctor_id, s.date, s.date, '-infinity')) then
        perform generate_again(s.doctor_id, daterange(s.date, s.date, '[]'));
    end if;
end
$$;

-- Set a doctor's weekly hours (`hours`) from `date` to `to_date`: the schedules inside are replaced, those that reach in
-- are cut, and nothing resumes afterwards.
create or replace function set_schedule(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
    v_today date := clinic_today(r.doctor);
    v_until date := r.to_date;
    v_before uuid[];
begin
    if v_today is null then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    if r.date < v_today then return refused('DATE_IN_PAST', r.doctor, jsonb_build_object('date', r.date)); end if;
    if v_until is null then
        select min(effective_from) - 1 into v_until from schedule where doctor_id = r.doctor and effective_from > r.date;
    end if;
    v_before := slots_of_hours(r.doctor, r.date, null, v_now);

    delete from schedule
    -- No date comes after the year 9999, so one without end lies inside one that ends with it.
    where doctor_id = r.doctor
      and daterange(effective_from, coalesce(effective_until, '9999-12-31'), '[]') <@ daterange(r.date, v_until, '[]');
    -- What begins before loses all from here on, also what would come after the new one.
    update schedule set effective_until = r.date - 1, version = version + 1, update_time = v_now
    where doctor_id = r.doctor and effective_from < r.date and coalesce(effective_until >= r.date, true);
    update schedule set effective_from = v_until + 1, version = version + 1, update_time = v_now
    where doctor_id = r.doctor and effective_from between r.date and v_until;
    insert into schedule as s (doctor_id, effective_from, effective_until, rules, create_time, update_time)
    values (r.doctor, r.date, v_until, r.hours, v_now, v_now)
    returning s into d.schedule;

    insert into slot_horizon (doctor_id) values (r.doctor) on conflict do nothing;
    perform generate_again(r.doctor, daterange(r.date, null));
    perform append_of_doctor(
        r, 'schedule.set', 'schedules/' || (d.schedule).id, r.date, v_now,
        jsonb_build_object('effective_from', r.date, 'effective_until', v_until,
                           'rules', jsonb_array_length(r.hours)));
    d.stale := stale_slots(v_before, r.doctor, r.date, null, v_now);
    d.outcome := 'OK';
    return d;
end
$$;

-- Set what holds on `date` in place of the weekly hours. It cancels nothing; the answer names whom it concerns.
create or replace function set_exception(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
    v_today date := clinic_today(r.doctor);
    v_version integer;
    v_before uuid[];
begin
    if v_today is null then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    if r.date < v_today then return refused('DATE_IN_PAST', r.doctor, jsonb_build_object('date', r.date)); end if;
    select version into v_version from schedule_exception where doctor_id = r.doctor and date = r.date;
    if r.version <> coalesce(v_version, 0) then return refused('ETAG_MISMATCH', r.doctor); end if;
    v_before := slots_of_hours(r.doctor, r.date, r.date, v_now);

    insert into schedule_exception as e (doctor_id, date, closed, hours, create_time, update_time)
    values (r.doctor, r.date, r.closed, r.hours, v_now, v_now)
    on conflict (doctor_id, date) do update
        set closed = excluded.closed, hours = excluded.hours, version = e.version + 1, update_time = v_now
    returning e into d.schedule_exception;

    perform generate_again(r.doctor, daterange(r.date, r.date, '[]'));
    perform append_of_doctor(
        r, 'schedule.exception_set', 'scheduleExceptions/' || r.doctor || '/' || r.date, r.date, v_now,
        jsonb_build_object('closed', r.closed, 'hours', jsonb_array_length(r.hours)));
    d.affected := array(
        select a.id
        from appointment a join doctor x on x.id = r.doctor join clinic c on c.id = x.clinic_id,
             lateral (select minute_of(a.start_time, r.date, c.time_zone) as starts,
                             minute_of(a.end_time, r.date, c.time_zone) as ends) minute
        where a.doctor_id = r.doctor and a.date = r.date and is_live(a.state)
          and (r.closed
               or a.start_time is not null and not has_visit(r.hours, starts, a.end_time - a.start_time)
                  and not (select range_agg(int4range(h.start, h.end))
                           from jsonb_to_recordset(r.hours) as h ("start" integer, "end" integer))
                          -- When the clock is set back, a slot may end at an earlier time of day than it starts.
                          @> int4range(floor(starts)::integer, ceil(greatest(ends, starts + 1))::integer))
        order by a.start_time, a.number);
    d.stale := stale_slots(v_before, r.doctor, r.date, r.date, v_now);
    d.outcome := 'OK';
    return d;
end
$$;

-- Delete the exception of a date.
create or replace function delete_exception(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
    v_today date := clinic_today(r.doctor);
    v_old schedule_exception;
    v_before uuid[];
begin
    if v_today is null then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    if r.date < v_today then return refused('DATE_IN_PAST', r.doctor, jsonb_build_object('date', r.date)); end if;
    select * into v_old from schedule_exception where doctor_id = r.doctor and date = r.date;
    if not found then
        return refused('SCHEDULE_EXCEPTION_NOT_FOUND', r.doctor, jsonb_build_object('date', r.date));
    end if;
    if r.version <> v_old.version then return refused('ETAG_MISMATCH', r.doctor); end if;
    v_before := slots_of_hours(r.doctor, r.date, r.date, v_now);

    delete from schedule_exception where doctor_id = r.doctor and date = r.date;
    d.schedule_exception := v_old;
    perform generate_again(r.doctor, daterange(r.date, r.date, '[]'));
    perform append_of_doctor(
        r, 'schedule.exception_deleted', 'scheduleExceptions/' || r.doctor || '/' || r.date, r.date, v_now, null);
    d.stale := stale_slots(v_before, r.doctor, r.date, r.date, v_now);
    d.outcome := 'OK';
    return d;
end
$$;

-- The instants at which the zone's clock shows this time: none if it is set forward over it, two if it is set back over it.
create or replace function instants_of(p_local timestamp, p_zone text) returns setof timestamptz
language sql stable as $$
    select distinct instant
    -- With the offset before and that after a change of the clock. A zone is less than a day from UTC.
    from (values (interval '-24 hours'), (interval '24 hours')) w (away),
         lateral (select p_local at time zone 'UTC' + away as near) n,
         lateral (select (p_local - ((near at time zone p_zone) - (near at time zone 'UTC'))) at time zone 'UTC'
                         as instant) i
    where instant at time zone p_zone = p_local
$$;

-- The visits of a doctor's hours on a date. `start` is the minute of the day.
create or replace function visits_on(p_doctor uuid, p_date date)
returns table (start integer, visit_length integer, capacity integer) language sql stable as $$
    select v.start, h.visit_length, h.capacity
    from jsonb_to_recordset(hours_on(p_doctor, p_date))
             as h ("start" integer, "end" integer, visit_length integer, capacity integer),
         generate_series(h.start, h.end - h.visit_length, h.visit_length) v (start)
$$;

-- Create the slots of the doctor's hours from `date` to `to_date`: all that are not there. Visits are laid in the order of
-- instants, those of one date after another.
create or replace function generate_slots(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
    v_doctor record;
    v record;
    v_new slot[] := '{}';
    v_slot slot;
    v_kept uuid[] := '{}';
    v_ended timestamptz := '-infinity';
    v_reason text;
    v_skipped_count integer := 0;
    v_skipped jsonb[] := '{}';
begin
    select x.id, x.active, c.id as clinic_id, c.time_zone into v_doctor
    from doctor x join clinic c on c.id = x.clinic_id where x.id = r.doctor;
    if not found then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    if not v_doctor.active then return refused('DOCTOR_INACTIVE', r.doctor); end if;
    if (select count(*) > 5000 from generate_series(0, r.to_date - r.date) n, visits_on(r.doctor, r.date + n)) then
        return refused('TOO_MANY_VISITS', r.doctor);
    end if;

    for v in
        select day.date, day.closed, day.absent, day.on_leave, visit.start, visit.capacity, instant, ends,
               before.id, before.start_time, before.end_time
        from (select r.date + n as date from generate_series(0, r.to_date - r.date) n) dates
        cross join lateral (
            select dates.date,
                   exists (select from schedule_exception e
                           where e.doctor_id = r.doctor and e.date = dates.date and e.closed) as closed,
                   exists (select from doctor_day x
                           where x.doctor_id = r.doctor and x.date = dates.date and not x.is_present) as absent,
                   exists (select from leaves_over(r.doctor, dates.date, null, null) l where l.whole_days) as on_leave
        ) day
        left join lateral visits_on(r.doctor, day.date) visit on true
        left join lateral instants_of(day.date + make_interval(mins => visit.start), v_doctor.time_zone) instant on true
        left join lateral (select instant + make_interval(mins => visit.visit_length) as ends) e on true
        -- Slots of a doctor do not overlap, so no other one can reach into the visit, or be the visit's own.
        left join lateral (
            select s.id, s.start_time, s.end_time from slot s where s.doctor_id = r.doctor and s.start_time < ends
            order by s.start_time desc limit 1) before on true
        where day.closed or visit.start is not null
        order by day.date, coalesce(instant, (day.date + make_interval(mins => visit.start)) at time zone
                                             v_doctor.time_zone), visit.start
    loop
        if (v.start_time, v.end_time) = (v.instant, v.ends) then
            v_kept := v_kept || v.id;
            v_ended := v.ends;
            continue;
        end if;
        v_reason := case
            when v.closed then 'DAY_CLOSED'
            when v.absent then 'DOCTOR_ABSENT'
            when v.on_leave then 'ON_LEAVE'
            when v.instant is null
                 or ((v.ends - interval '1 microsecond') at time zone v_doctor.time_zone)::date <> v.date
            then 'TIME_DOES_NOT_EXIST'
            when v.instant <= v_now then 'IN_PAST'
            when v.end_time > v.instant or v_ended > v.instant then 'OVERLAPS_SLOT'
        end;
        if v_reason is not null then
            v_skipped_count := v_skipped_count + 1;
            if v_skipped_count <= 1000 then
                v_skipped := v_skipped || jsonb_build_object('date', v.date, 'start', v.start, 'reason', v_reason);
            end if;
            continue;
        end if;
        v_slot.doctor_id := r.doctor;
        v_slot.clinic_id := v_doctor.clinic_id;
        v_slot.date := v.date;
        v_slot.start_time := v.instant;
        v_slot.end_time := v.ends;
        v_slot.capacity := v.capacity;
        v_slot.state := 'OPEN';
        v_slot.block_reason := '';
        if r.validate_only is not true then
            v_slot.id := new_id();
            v_slot.version := 1;
            v_slot.create_time := v_now;
            v_slot.update_time := v_now;
        end if;
        v_new := v_new || v_slot;
        v_ended := v.ends;
    end loop;

    if r.validate_only is not true then
        insert into slot (id, doctor_id, clinic_id, date, start_time, end_time, capacity, state, block_reason, version,
                          create_time, update_time)
        select s.id, s.doctor_id, s.clinic_id, s.date, s.start_time, s.end_time, s.capacity, s.state, s.block_reason,
               s.version, s.create_time, s.update_time
        from unnest(v_new) s;
        perform append_change(r, 'slot.created', null, s, v_now, slot_data(s)) from unnest(v_new) s;
        update slot_horizon
        set generated = generated * datemultirange(daterange((v_now at time zone v_doctor.time_zone)::date, null))
                        + datemultirange(daterange(r.date, r.to_date, '[]'))
        where doctor_id = r.doctor;
    end if;
    d.slots := array(
        select s from (select s from unnest(v_new) s union all select s from slot s where s.id = any (v_kept)) w (s)
        order by (s).start_time);
    d.generated := jsonb_build_object(
        'created_count', cardinality(v_new), 'kept_count', cardinality(v_kept), 'skipped_count', v_skipped_count,
        -- A start that does not exist has no place among the instants.
        'skipped', coalesce((
            select jsonb_agg(x order by x ->> 'date', (x ->> 'start')::integer) from unnest(v_skipped) x), '[]'));
    d.outcome := 'OK';
    return d;
end
$$;

-- Keep the slots of the next `p_days` days generated, for doctors with a schedule: does a part of one doctor's days, and
-- answers whether there was something to do. One process at a time: false also if another one is at it.
create or replace function generate_ahead(p_days integer) returns boolean language plpgsql as $$
declare
    r request;
    v record;
begin
    if not pg_try_advisory_xact_lock(hashtextextended('frontdesk slot horizon', 0)) then return false; end if;
    select d.id, d.clinic_id, (select x from unnest(due) x order by x limit 1) as dates into v
    from slot_horizon h join doctor d on d.id = h.doctor_id join clinic c on c.id = d.clinic_id,
         lateral (select (moment() at time zone c.time_zone)::date as today) t,
         lateral (select datemultirange(daterange(today, today + p_days)) - h.generated as due) w
    where d.active and c.active and not isempty(due)
    -- Should one doctor's days fail, the others' do not wait for it.
    order by random() limit 1;
    if not found then return false; end if;
    r.verb := 'GenerateSlots';
    r.actor := 'system';
    r.doctor := v.id;
    r.date := lower(v.dates);
    -- Three days of visits of a minute are fewer than what one call makes.
    r.to_date := least(upper(v.dates), r.date + 3) - 1;
    perform lock_all(lock_names(r));
    perform generate_slots(r);
    return true;
end
$$;
