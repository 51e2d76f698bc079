-- The two sets of visit states that rules refer to. Indexes and constraints use them too, so a change of either needs
-- these built anew. Simple enough that the planner puts the expression in place of the call.

-- The visit holds a place of its doctor-day and of its slot.
create or replace function holds_place(p_state text) returns boolean language sql immutable parallel safe
    return p_state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION', 'COMPLETED');

-- The visit has not ended: a patient has one such on a doctor-day, and none at the time of another.
create or replace function is_live(p_state text) returns boolean language sql immutable parallel safe
    return p_state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION');

-- Every transition of a visit and of its queue entry. Each is one revision of the doctor-day and one event.
--
-- A verb is the name of its RPC. It is allowed from `state`, with the queue entry in one of `queue_states` ('' = the
-- patient is not in the queue), and leaves `new_state` and `new_queue_state`. `type` is how the event is called,
-- `sets` the column that it sets. A check-in also sets the priority; a call counts in `call_count` and gives a room, and
-- `leaves_room` clears it.
create or replace function transitions() returns table (
    verb text, state text, queue_states text[], new_state text, new_queue_state text, type text, sets text,
    leaves_room boolean
) language sql immutable parallel safe as $$
    values
    ('CheckIn', 'BOOKED', '{""}'::text[],
        'CHECKED_IN', 'WAITING', 'queue.checked_in', 'check_in_time', false),
    ('SetPriority', 'CHECKED_IN', '{WAITING}',
        'CHECKED_IN', 'WAITING', 'queue.priority_set', 'priority', false),
    ('SetPriority', 'CHECKED_IN', '{CALLED}',
        'CHECKED_IN', 'CALLED', 'queue.priority_set', 'priority', false),
    ('SetPriority', 'CHECKED_IN', '{PARKED}',
        'CHECKED_IN', 'PARKED', 'queue.priority_set', 'priority', false),
    ('SetPriority', 'CHECKED_IN', '{MISSED}',
        'CHECKED_IN', 'MISSED', 'queue.priority_set', 'priority', false),
    ('CallNext', 'CHECKED_IN', '{WAITING}',
        'CHECKED_IN', 'CALLED', 'queue.called', 'call_time', false),
    ('CallAgain', 'CHECKED_IN', '{CALLED}',
        'CHECKED_IN', 'CALLED', 'queue.called_again', 'call_time', false),
    ('ReturnToLine', 'CHECKED_IN', '{CALLED,PARKED,MISSED}',
        'CHECKED_IN', 'WAITING', 'queue.returned', '', true),
    ('ParkPatient', 'CHECKED_IN', '{WAITING,CALLED}',
        'CHECKED_IN', 'PARKED', 'queue.parked', '', true),
    ('MarkMissed', 'CHECKED_IN', '{CALLED}',
        'CHECKED_IN', 'MISSED', 'queue.missed', '', false),
    ('LeaveQueue', 'CHECKED_IN', '{WAITING,CALLED,PARKED,MISSED}',
        'LEFT', 'LEFT', 'queue.left', 'leave_time', false),
    ('StartAppointment', 'CHECKED_IN', '{WAITING,CALLED}',
        'IN_CONSULTATION', 'IN_CONSULTATION', 'queue.started', 'start_visit_time', false),
    ('CompleteAppointment', 'IN_CONSULTATION', '{IN_CONSULTATION}',
        'COMPLETED', 'DONE', 'queue.completed', 'complete_time', false),
    ('CancelAppointment', 'BOOKED', '{""}',
        'CANCELLED', '', 'appointment.cancelled', 'cancel_time', false),
    ('CreateLeave', 'BOOKED', '{""}',
        'CANCELLED', '', 'appointment.cancelled', 'cancel_time', false),
    ('CancelAppointment', 'CHECKED_IN', '{WAITING,CALLED,PARKED,MISSED}',
        'CANCELLED', 'LEFT', 'appointment.cancelled', 'cancel_time', false),
    ('MarkNoShow', 'BOOKED', '{""}',
        'NO_SHOW', '', 'appointment.no_show', 'no_show_time', false)
$$;
