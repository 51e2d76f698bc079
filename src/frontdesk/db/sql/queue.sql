-- The place of an entry in its queue, the smallest first: the class of the priority; in the class, those who came back
-- after a missed call at the end, in the order in which they came back; then the first check-in, then the ticket.
do $do$
begin
    if to_regtype('queue_place') is null then
        create type queue_place as (class integer, returned_revision bigint, check_in_time timestamptz, ticket integer);
    end if;
end
$do$;

create or replace function place_in_queue(a appointment) returns queue_place language sql immutable parallel safe as $$
    select row(array_position('{URGENT,PRIORITY,NORMAL}'::text[], a.priority), a.returned_revision, a.check_in_time,
               a.ticket)::queue_place
$$;

create or replace function refused_transition(a appointment) returns decision language plpgsql as $$
begin
    return refused('INVALID_TRANSITION', a.id, jsonb_build_object('state', a.state, 'queue_state', a.queue_state));
end
$$;

-- Make one transition of a visit and of its queue entry, by the table of `transitions`. `reason` is that of a
-- cancellation, `room` that of a call, and `patient` the guard of a check-in.
create or replace function change_visit(r request, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    t record;
    v_new appointment := p_old;
    v_now timestamptz := moment();
    v_change record;
begin
    if r.patient <> p_old.patient_id and current_patient(r.patient) is distinct from p_old.patient_id then
        return refused('PATIENT_MISMATCH', p_old.id);
    end if;
    if r.verb = 'CheckIn' and p_old.state in ('CHECKED_IN', 'IN_CONSULTATION') then
        return refused('ALREADY_CHECKED_IN', p_old.id);
    end if;

    select * into t from transitions() x
    where x.verb = r.verb and x.state = p_old.state and coalesce(p_old.queue_state, '') = any (x.queue_states);
    if not found then
        return refused_transition(p_old);
    end if;
    if r.verb in ('CheckIn', 'MarkNoShow') then
        declare
            v_today date;
        begin
            select (v_now at time zone c.time_zone)::date into v_today from clinic c where c.id = p_old.clinic_id;
            if r.verb = 'CheckIn' and v_today <> p_old.date then
                return refused('NOT_APPOINTMENT_DATE', p_old.id, jsonb_build_object('date', p_old.date));
            elsif r.verb = 'MarkNoShow' and (v_today < p_old.date or v_now < p_old.start_time) then
                return refused('TOO_EARLY', p_old.id, jsonb_build_object('date', p_old.date));
            end if;
        end;
    end if;

    v_new.state := t.new_state;
    v_new.queue_state := nullif(t.new_queue_state, '');
    case t.sets
        when 'check_in_time' then
            v_new.check_in_time := v_now;
            v_new.priority := coalesce(r.priority, p_old.priority);
        when 'priority' then v_new.priority := r.priority;
        when 'call_time' then
            v_new.call_time := v_now;
            v_new.call_count := p_old.call_count + 1;
            v_new.room := coalesce(nullif(r.room, ''), p_old.room);
        when 'start_visit_time' then v_new.start_visit_time := v_now;
        when 'complete_time' then v_new.complete_time := v_now;
        when 'cancel_time' then
            v_new.cancel_time := v_now;
            v_new.cancel_reason := r.reason;
        when 'no_show_time' then v_new.no_show_time := v_now;
        when 'leave_time' then v_new.leave_time := v_now;
        else null;
    end case;
    if t.leaves_room then v_new.room := ''; end if;

    v_change := record_change(r, t.type, v_new, v_new.queue_state is not null, v_now);
    v_new.ticket := v_change.ticket;
    if p_old.queue_state = 'MISSED' and v_new.queue_state = 'WAITING' then
        v_new.returned_revision := v_change.revision;
    end if;

    update appointment a
    set state = v_new.state, queue_state = v_new.queue_state, ticket = v_new.ticket,
        returned_revision = v_new.returned_revision, priority = v_new.priority, room = v_new.room,
        call_count = v_new.call_count,
        call_time = v_new.call_time, check_in_time = v_new.check_in_time, start_visit_time = v_new.start_visit_time,
        complete_time = v_new.complete_time, cancel_time = v_new.cancel_time, cancel_reason = v_new.cancel_reason,
        no_show_time = v_new.no_show_time, leave_time = v_new.leave_time,
        version = a.version + 1, update_time = v_now
    where a.id = p_old.id
    returning a into d.appointment;
    d.revision := v_change.revision;
    d.outcome := 'OK';
    return d;
end
$$;

-- Call the first waiting patient. Under the lock of the doctor-day, so two callers get two patients.
create or replace function call_next(r request) returns decision language plpgsql as $$
declare
    v_first appointment;
begin
    select * into v_first from appointment a
    where a.doctor_id = r.doctor and a.date = r.date and a.ticket is not null and a.queue_state = 'WAITING'
    order by place_in_queue(a) limit 1;
    if not found then
        perform from doctor where id = r.doctor;
        return refused(case when found then 'QUEUE_EMPTY' else 'DOCTOR_NOT_FOUND' end, r.doctor,
                       jsonb_build_object('date', r.date));
    end if;
    return change_visit(r, v_first);
end
$$;

-- The entry's present position, and the names of patient and doctor unless they are known, for the answer.
create or replace function as_answered(d decision) returns decision language plpgsql as $$
declare
    v_place queue_place;
begin
    if (d.appointment).queue_state = 'WAITING' then
        v_place := place_in_queue(d.appointment);
        select count(*) into d."position" from appointment a
        where a.doctor_id = (d.appointment).doctor_id and a.date = (d.appointment).date
          and a.ticket is not null and a.queue_state = 'WAITING'
          and place_in_queue(a) <= v_place;
    end if;
    if d.patient_name is null then
        select concat_ws(' ', p.given_name, nullif(p.family_name, '')), x.display_name into d.patient_name, d.doctor_name
        from patient p, doctor x where p.id = (d.appointment).patient_id and x.id = (d.appointment).doctor_id;
    end if;
    return d;
end
$$;

-- The seconds that the doctor's latest completed consultations took, as many as RECENT_VISITS in core/estimate.py: of the
-- year up to this date, the latest days first. No condition on `state`, which has an index of the whole service.
create or replace function recent_visits(p_doctor uuid, p_date date) returns float8[] language sql stable as $$
    select array(
        select extract(epoch from v.complete_time - v.start_visit_time)::float8
        from appointment v
        where v.doctor_id = p_doctor and v.complete_time is not null
          and v.date between (
              select min(l.date)
              from (select x.date from appointment x
                    where x.doctor_id = p_doctor and x.date between p_date - 365 and p_date
                      and x.complete_time is not null
                    order by x.date desc, coalesce(x.start_time, '-infinity') desc, x.id desc limit 30) l) and p_date
        order by v.complete_time desc limit 30)
$$;
