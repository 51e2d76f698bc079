-- The log: each change is written into it by the transaction that makes the change.

-- The id of a row of the log: a UUID of version 7 with this time, so that ids sort by time.
do $do$
begin
    if current_setting('server_version_num')::int >= 180000 then
        create or replace function log_id(p_time timestamptz) returns uuid language sql volatile as
            'select uuidv7(p_time - clock_timestamp())';
    else
        create or replace function log_id(p_time timestamptz) returns uuid language sql volatile as $$
            select encode(overlay(uuid_send(new_id())
                                  placing substring(int8send((extract(epoch from p_time) * 1000)::bigint) from 3)
                                  from 1 for 6), 'hex')::uuid
        $$;
    end if;
end
$do$;

-- How WatchQueue calls a change of this type.
create or replace function change_kind(p_type text) returns text language sql immutable parallel safe as $$
    select case p_type when 'doctor_day.availability_set' then 'AVAILABILITY' else upper(split_part(p_type, '.', 2)) end
$$;

-- Record one change of a doctor-day, under its lock: count its revision, and append it to the log.
--
-- `a` is the appointment as the change leaves it; null if the change is of the request's doctor-day itself. Its queue
-- entry is recorded if the change touches the queue. `p_data` is told beside the appointment. Who comes to the queue, by
-- check-in or transfer, draws the next ticket. Both counters stand in the doctor-day's row: a sequence would leave gaps on
-- rollback.
create or replace function record_change(
    r request, p_type text, a appointment, p_touches_queue boolean, p_now timestamptz, p_data jsonb default null,
    out revision bigint, out ticket integer
) language plpgsql as $$
declare
    v_doctor uuid := coalesce(a.doctor_id, r.doctor);
    v_date date := coalesce(a.date, r.date);
    v_draws boolean := p_type in ('queue.checked_in', 'queue.transferred_in');
    v_entry appointment;
begin
    if p_touches_queue then v_entry := a; end if;
    insert into doctor_day as d (doctor_id, date, revision, last_ticket, update_time)
    values (v_doctor, v_date, 2, v_draws::integer, p_now)
    on conflict (doctor_id, date) do update
        set revision = d.revision + 1, last_ticket = d.last_ticket + excluded.last_ticket, update_time = p_now
    returning d.revision, case when v_draws then d.last_ticket else v_entry.ticket end
    into record_change.revision, record_change.ticket;

    insert into log (id, time, actor, method, address, trace_id, type, resource, clinic_id, doctor_id, patient_id,
                     appointment_id, slot_id, date, revision, data, queue_state, ticket, room, call_count,
                     check_in_time, call_time, start_visit_time, priority)
    values (log_id(p_now), p_now, r.actor, r.verb, coalesce(r.address, ''), coalesce(r.trace_id, ''), p_type,
            coalesce('appointments/' || a.id, 'doctorDays/' || v_doctor || '/' || v_date),
            coalesce(a.clinic_id, (select d.clinic_id from doctor d where d.id = v_doctor)), v_doctor, a.patient_id,
            a.id, a.slot_id, v_date, record_change.revision,
            case when a.id is null then p_data
                 when r.hold is not null then
                     jsonb_strip_nulls(jsonb_build_object('state', a.state, 'number', a.number, 'start_time', a.start_time,
                                                          'end_time', a.end_time, 'hold_id', r.hold))
                 when a.override_reason <> '' and p_type in ('appointment.booked', 'queue.transferred_in') then
                     jsonb_build_object('state', a.state, 'number', a.number, 'over_capacity', true)
                 when p_data is not null then
                     jsonb_strip_nulls(jsonb_build_object('state', a.state, 'number', a.number, 'start_time', a.start_time,
                                                          'end_time', a.end_time)) || p_data
                 when a.start_time is null then jsonb_build_object('state', a.state, 'number', a.number)
                 else jsonb_build_object('state', a.state, 'number', a.number, 'start_time', a.start_time,
                                         'end_time', a.end_time) end,
            v_entry.queue_state, record_change.ticket, v_entry.room, v_entry.call_count, v_entry.check_in_time,
            v_entry.call_time, v_entry.start_visit_time, v_entry.priority);
end
$$;

-- Append one change to the log that is no change of a doctor-day: of a patient or of a slot.
create or replace function append_change(r request, p_type text, p_patient uuid, s slot, p_now timestamptz, p_data jsonb)
returns void language plpgsql as $$
begin
    insert into log (id, time, actor, method, address, trace_id, type, resource, patient_id, clinic_id, doctor_id,
                     slot_id, date, data)
    values (log_id(p_now), p_now, r.actor, r.verb, coalesce(r.address, ''), coalesce(r.trace_id, ''), p_type,
            coalesce('patients/' || p_patient, 'slots/' || s.id), p_patient, s.clinic_id, s.doctor_id, s.id, s.date,
            p_data);
end
$$;

-- Append one change of a hold to the log. Its use is told by the change of the appointment that used it.
create or replace function append_of_hold(r request, p_type text, h hold, p_now timestamptz)
returns void language plpgsql as $$
begin
    insert into log (id, time, actor, method, address, trace_id, type, resource, patient_id, clinic_id, doctor_id,
                     slot_id, date, data)
    values (log_id(p_now), p_now, r.actor, r.verb, coalesce(r.address, ''), coalesce(r.trace_id, ''), p_type,
            'holds/' || h.id, h.patient_id, h.clinic_id, h.doctor_id, h.slot_id, h.date,
            jsonb_build_object('expire_time', h.expire_time));
end
$$;

-- Append one change to the log that is of a doctor, on or from a date, and is no change of the doctor-day: of his hours.
create or replace function append_of_doctor(
    r request, p_type text, p_resource text, p_date date, p_now timestamptz, p_data jsonb
) returns void language plpgsql as $$
begin
    insert into log (id, time, actor, method, address, trace_id, type, resource, clinic_id, doctor_id, date, data)
    select log_id(p_now), p_now, r.actor, r.verb, coalesce(r.address, ''), coalesce(r.trace_id, ''), p_type, p_resource,
           x.clinic_id, x.id, p_date, p_data
    from doctor x where x.id = r.doctor;
end
$$;
