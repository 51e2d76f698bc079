-- Undo of a wrong click. A visit has its latest undoable verbs in `undo`, the last first: each with its time, and with what
-- it replaced that the table of `transitions` does not tell.

-- The undoable verbs of a visit after one more.
create or replace function with_step(p_old appointment, p_verb text, p_time timestamptz) returns jsonb
language sql stable as $$
    select jsonb_build_object('verb', p_verb, 'time', p_time, 'queue_state', p_old.queue_state, 'room', p_old.room)
           || coalesce(p_old.undo, '[]'::jsonb)
$$;

-- Take back a visit's last verb, if that is not long ago: the visit and its queue entry are again as they were before. A
-- place that was freed is taken again, if it is still there. A check-in's ticket stays spent.
create or replace function undo(r request, p_old appointment) returns decision language plpgsql as $$
declare
    d decision;
    t record;
    v_step jsonb := p_old.undo -> 0;
    v_new appointment := p_old;
    v_told appointment;
    v_now timestamptz := moment();
    v_place record;
    v_hold uuid;
begin
    if v_step is null or v_now - (v_step ->> 'time')::timestamptz > interval '15 minutes' or (
        select (v_now at time zone c.time_zone)::date <> ((v_step ->> 'time')::timestamptz at time zone c.time_zone)::date
        from clinic c where c.id = p_old.clinic_id
    ) then
        return refused('NOTHING_TO_UNDO', p_old.id,
                       jsonb_build_object('state', p_old.state, 'queue_state', p_old.queue_state));
    end if;
    select * into t from transitions() x
    where x.verb = v_step ->> 'verb' and coalesce(v_step ->> 'queue_state', '') = any (x.queue_states);

    v_new.state := t.state;
    v_new.queue_state := v_step ->> 'queue_state';
    v_new.room := v_step ->> 'room';
    v_new.undo := nullif(p_old.undo - 0, '[]');
    case t.sets
        when 'check_in_time' then
            v_new.check_in_time := null;
            v_new.priority := 'NORMAL';
            v_new.ticket := null;
        when 'start_visit_time' then v_new.start_visit_time := null;
        when 'complete_time' then v_new.complete_time := null;
        when 'cancel_time' then
            v_new.cancel_time := null;
            v_new.cancel_reason := '';
        when 'no_show_time' then v_new.no_show_time := null;
        when 'leave_time' then v_new.leave_time := null;
        else null;
    end case;
    if not is_live(p_old.state) then
        v_place := find_place(p_old.patient_id, p_old.doctor_id, p_old.date, p_old.slot_id, p_old, v_now, p_again => true);
        if v_place.outcome <> 'OK' then
            return refused_place(r, v_place.outcome, v_place.subject, v_place.details, p_old.date);
        end if;
        v_new.number := v_place.number;
        v_hold := v_place.hold;
        if v_hold is not null then update hold set state = 'USED' where id = v_hold; end if;
    end if;

    v_told := v_new;
    if v_new.queue_state is null and p_old.queue_state is not null then
        -- The entry leaves the queue with the ticket that it had.
        v_told := p_old;
        v_told.state := v_new.state;
        v_told.queue_state := 'LEFT';
    end if;
    d.revision := (record_change(r, 'appointment.undone', v_told, v_told.queue_state is not null, v_now,
                                 jsonb_build_object('undone', t.verb))).revision;
    d.appointment := write_visit(v_new, v_now);
    if v_hold is not null then
        -- The waiting list had offered him his own place.
        r.hold := v_hold;
        perform end_waiting(r, d.appointment, v_now);
    end if;
    d.outcome := 'OK';
    return d;
end
$$;
