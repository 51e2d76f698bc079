-- Record one change of a doctor-day, under its lock: count its revision, and append it to the history.
--
-- `p_entry` is the queue entry as the change leaves it; null if the change does not touch the queue. A check-in draws the
-- next ticket. Both counters stand in the doctor-day's row: a sequence would leave gaps on rollback.
create or replace function record_change(
    p_doctor uuid, p_date date, p_kind text, p_appointment uuid, p_entry appointment, p_now timestamptz,
    out revision bigint, out ticket integer
) language plpgsql as $$
begin
    insert into doctor_day as d (doctor_id, date, revision, last_ticket, update_time)
    values (p_doctor, p_date, 2, (p_kind = 'CHECKED_IN')::integer, p_now)
    on conflict (doctor_id, date) do update
        set revision = d.revision + 1, last_ticket = d.last_ticket + excluded.last_ticket, update_time = p_now
    returning d.revision, case when p_kind = 'CHECKED_IN' then d.last_ticket else p_entry.ticket end
    into record_change.revision, record_change.ticket;

    insert into event (doctor_id, date, revision, kind, appointment_id, create_time, queue_state, ticket, room,
                       call_count, check_in_time, call_time, start_visit_time)
    values (p_doctor, p_date, record_change.revision, p_kind, p_appointment, p_now, p_entry.queue_state,
            record_change.ticket, p_entry.room, p_entry.call_count, p_entry.check_in_time, p_entry.call_time,
            p_entry.start_visit_time);
end
$$;
