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

-- The open slots of a doctor that have not started, from one date to another (null: without end), and that his hours now
-- have: each is exactly one visit of them.
create or replace function slots_of_hours(p_doctor uuid, p_from date, p_to date, p_now timestamptz) returns uuid[]
language sql stable as $$
    with open as materialized (
        select s.id, s.date, s.start_time, s.end_time,
               extract(epoch from (s.start_time at time zone c.time_zone) - s.date) / 60 as minute
        from doctor d join clinic c on c.id = d.clinic_id join slot s on s.doctor_id = d.id and s.clinic_id = c.id
        where d.id = p_doctor and s.start_time > p_now and s.state = 'OPEN' and s.date >= p_from
          and s.date <= coalesce(p_to, 'infinity')
    ), day as materialized (
        select o.date, hours_on(p_doctor, o.date) as hours from (select distinct date from open) o
    )
    select coalesce(array_agg(o.id order by o.start_time), '{}')
    from open o join day using (date)
    where exists (
        select from jsonb_to_recordset(day.hours) as h ("start" integer, "end" integer, visit_length integer)
        where o.minute >= h.start and o.minute + h.visit_length <= h.end and mod(o.minute - h.start, h.visit_length) = 0
          and o.end_time - o.start_time = make_interval(mins => h.visit_length))
$$;

-- The elements of the first that the second lacks, in their order.
create or replace function without(p_all uuid[], p_others uuid[]) returns uuid[] language sql immutable as $$
    select coalesce(array_agg(one order by n), '{}') from unnest(p_all) with ordinality w (one, n)
    where one <> all (p_others)
$$;

-- Have the slots of these dates generated again, because the doctor's hours, or what keeps them from being held, have
-- changed. Does nothing for a doctor who never had a schedule.
create or replace function generate_again(p_doctor uuid, p_dates daterange) returns void language sql as $$
    update slot_horizon set generated = generated - datemultirange(p_dates) where doctor_id = p_doctor
$$;

-- Set a doctor's weekly hours (`hours`) from `date` to `to_date`: the schedules inside are replaced, those that reach in
-- are cut, and nothing resumes afterwards.
create or replace function set_schedule(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
    v_today date := clinic_today(r.doctor);
    v_until date := r.to_date;
    v_old uuid[];
begin
    if v_today is null then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    if r.date < v_today then return refused('DATE_IN_PAST', r.doctor, jsonb_build_object('date', r.date)); end if;
    if v_until is null then
        select min(effective_from) - 1 into v_until from schedule where doctor_id = r.doctor and effective_from > r.date;
    end if;
    v_old := slots_of_hours(r.doctor, r.date, null, v_now);

    delete from schedule
    where doctor_id = r.doctor and daterange(effective_from, effective_until, '[]') <@ daterange(r.date, v_until, '[]');
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
    d.stale := without(v_old, slots_of_hours(r.doctor, r.date, null, v_now));
    d.outcome := 'OK';
    return d;
end
$$;
