-- The place of an entry in its queue, the smallest first: the class of the priority; in the class, those who came back
-- after a missed call at the end, in the order in which they came back; then the first check-in, then the ticket.
do $do$
begin
    if to_regtype('queue_place') is null then
        create type queue_place as (class integer, returned_revision bigint, check_in_time timestamptz, ticket integer);
    end if;
end
$do$;

-- The class of a priority: the lower is called first.
create or replace function priority_class(p_priority text) returns integer language sql immutable parallel safe as $$
    select array_position('{URGENT,PRIORITY,NORMAL}'::text[], p_priority)
$$;

create or replace function place_in_queue(a appointment) returns queue_place language sql immutable parallel safe as $$
    select row(priority_class(a.priority), a.returned_revision, a.check_in_time,
               a.ticket)::queue_place
$$;

create or replace function refused_transition(a appointment) returns decision language plpgsql as $$
begin
    return refused('INVALID_TRANSITION', a.id, jsonb_build_object('state', a.state, 'queue_state', a.queue_state));
end
$$;

-- Write a visit as a change leaves it: its next version.
create or replace function write_visit(p_new appointment, p_now timestamptz) returns appointment language plpgsql as $$
declare
    v_written appointment;
begin
    update appointment a
    set doctor_id = p_new.doctor_id, number = p_new.number, slot_id = p_new.slot_id, start_time = p_new.start_time,
        end_time = p_new.end_time, override_reason = p_new.override_reason, state = p_new.state,
        queue_state = p_new.queue_state, ticket = p_new.ticket, returned_revision = p_new.returned_revision,
        priority = p_new.priority, room = p_new.room, call_count = p_new.call_count, calls = p_new.calls,
        call_time = p_new.call_time, check_in_time = p_new.check_in_time, start_visit_time = p_new.start_visit_time,
        complete_time = p_new.complete_time, cancel_time = p_new.cancel_time, cancel_reason = p_new.cancel_reason,
        no_show_time = p_new.no_show_time, leave_time = p_new.leave_time, undo = p_new.undo,
        version = a.version + 1, update_time = p_now
    where a.id = p_new.id
    returning * into v_written;
    return v_written;
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
    elsif r.verb = 'CallAgain' then
        declare
            v_most integer;
        begin
            select max_calls into v_most from clinic where id = p_old.clinic_id;
            if v_most > 0 and p_old.calls >= v_most then
                return refused('CALL_LIMIT_REACHED', p_old.id, jsonb_build_object('max_calls', v_most));
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
            v_new.calls := case r.verb when 'CallNext' then 1 else p_old.calls + 1 end;
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
    v_new.undo := case when t.undoable then with_step(p_old, r.verb, v_now) end;

    v_change := record_change(r, t.type, v_new, v_new.queue_state is not null, v_now);
    v_new.ticket := v_change.ticket;
    if p_old.queue_state = 'MISSED' and v_new.queue_state = 'WAITING' then
        v_new.returned_revision := v_change.revision;
    end if;
    d.appointment := write_visit(v_new, v_now);
    d.revision := v_change.revision;
    d.outcome := 'OK';
    return d;
end
$$;

-- Call the first waiting patient. Under the lock of the doctor-day, so two callers get two patients.
--
-- Passes over a patient who is called or in consultation in another queue of the date. The lock says nothing of that
-- queue, so of a patient with another visit on the date the lock is needed too. We have locks already, so we do not wait
-- for it.
create or replace function call_next(r request) returns decision language plpgsql as $$
declare
    v_first record;
    v_busy uuid[] := '{}';
begin
    loop
        select a as visit,
               exists (select from appointment o
                       where o.patient_id = a.patient_id and is_live(o.state) and o.date = a.date and o.id <> a.id)
                   as elsewhere
        into v_first
        from appointment a
        where a.doctor_id = r.doctor and a.date = r.date and a.ticket is not null and a.queue_state = 'WAITING'
          and a.id <> all (v_busy)
        order by place_in_queue(a) limit 1;
        if not found then
            perform from doctor where id = r.doctor;
            return refused(case when found then 'QUEUE_EMPTY' else 'DOCTOR_NOT_FOUND' end, r.doctor,
                           jsonb_build_object('date', r.date));
        end if;
        exit when not v_first.elsewhere;
        if not try_lock('patient/' || (v_first.visit).patient_id) then
            raise exception 'the patient is being called elsewhere' using errcode = 'serialization_failure';
        end if;
        -- Its own statement, so it sees what was committed before we got the lock.
        perform from appointment o
        where o.patient_id = (v_first.visit).patient_id and is_live(o.state) and o.date = (v_first.visit).date
          and o.id <> (v_first.visit).id and o.queue_state in ('CALLED', 'IN_CONSULTATION');
        exit when not found;
        v_busy := v_busy || (v_first.visit).id;
    end loop;
    return change_visit(r, v_first.visit);
end
$$;

-- Book a place for a patient who is here, and check the patient in: two revisions, which others see together.
create or replace function add_walk_in(r request) returns decision language plpgsql as $$
declare
    d decision;
begin
    if r.date <> clinic_today(r.doctor) then
        raise exception 'the day has ended meanwhile' using errcode = 'serialization_failure';
    end if;
    d := book(r);
    if d.outcome <> 'OK' then return d; end if;
    return change_visit(r, d.appointment);
end
$$;

-- Hand a patient over to another doctor's queue of today: to a place and a new ticket there, or not at all.
create or replace function transfer(r request, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    t record;
    v record;
    v_place record;
    v_left appointment := p_old;
    v_new appointment := p_old;
    v_now timestamptz := moment();
    v_change record;
begin
    select * into t from transitions() x
    where x.verb = r.verb and x.state = p_old.state and p_old.queue_state = any (x.queue_states);
    if not found then
        return refused_transition(p_old);
    end if;
    if r.doctor = p_old.doctor_id then
        return refused('INVALID_FIELD', null,
                       jsonb_build_object('field', 'to_doctor_id', 'rule', 'is the doctor of the appointment'));
    end if;
    select (v_now at time zone c.time_zone)::date as today, (select x.clinic_id from doctor x where x.id = r.doctor)
               as clinic_id
    into v from clinic c where c.id = p_old.clinic_id;
    if p_old.date <> v.today then return refused('NOT_TODAY', p_old.id, jsonb_build_object('date', p_old.date)); end if;
    if v.clinic_id <> p_old.clinic_id then return refused('OTHER_CLINIC', r.doctor); end if;
    v_place := find_place(p_old.patient_id, r.doctor, r.date, null, p_old, v_now,
                          p_override => may_override(r, p_old.clinic_id));
    if v_place.outcome <> 'OK' then
        return refused_place(r, v_place.outcome, v_place.subject, v_place.details, r.date);
    end if;

    v_left.queue_state := 'TRANSFERRED';
    d.vacated_revision := (record_change(r, 'queue.transferred_out', v_left, true, v_now)).revision;
    d.vacated_doctor := p_old.doctor_id;
    d.vacated_date := p_old.date;

    v_new.doctor_id := r.doctor;
    v_new.number := v_place.number;
    v_new.slot_id := null;
    v_new.start_time := null;
    v_new.end_time := null;
    v_new.override_reason := case when v_place.over_capacity then r.override_reason else '' end;
    v_new.queue_state := t.new_queue_state;
    v_new.returned_revision := 0;
    v_new.room := '';
    v_new.call_count := 0;
    v_new.calls := 0;
    v_new.call_time := null;
    v_new.undo := null;
    v_change := record_change(r, t.type, v_new, true, v_now);
    v_new.ticket := v_change.ticket;
    d.appointment := write_visit(v_new, v_now);
    d.revision := v_change.revision;
    d.outcome := 'OK';
    return d;
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

-- The seconds that the doctor's latest completed consultations took, at most `p_most`: of the year up to this date, the
-- latest days first. No condition on `state`, which has an index of the whole service.
create or replace function recent_visits(p_doctor uuid, p_date date, p_most integer) returns float8[]
    language sql stable as $$
    select array(
        select extract(epoch from v.complete_time - v.start_visit_time)::float8
        from appointment v
        where v.doctor_id = p_doctor and v.complete_time is not null
          and v.date between (
              select min(l.date)
              from (select x.date from appointment x
                    where x.doctor_id = p_doctor and x.date between p_date - 365 and p_date
                      and x.complete_time is not null
                    order by x.date desc, coalesce(x.start_time, '-infinity') desc, x.id desc limit p_most) l) and p_date
        order by v.complete_time desc limit p_most)
$$;
