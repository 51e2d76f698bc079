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
-- `leaves_room` clears it. UndoTransition takes back what is `undoable`; every other verb puts an end to that.
create or replace function transitions() returns table (
    verb text, state text, queue_states text[], new_state text, new_queue_state text, type text, sets text,
    leaves_room boolean, undoable boolean
) language sql immutable parallel safe as $$
    values
    ('CheckIn', 'BOOKED', '{""}'::text[],
        'CHECKED_IN', 'WAITING', 'queue.checked_in', 'check_in_time', false, true),
    ('AddWalkIn', 'BOOKED', '{""}',
        'CHECKED_IN', 'WAITING', 'queue.checked_in', 'check_in_time', false, true),
    ('SetPriority', 'CHECKED_IN', '{WAITING}',
        'CHECKED_IN', 'WAITING', 'queue.priority_set', 'priority', false, false),
    ('SetPriority', 'CHECKED_IN', '{CALLED}',
        'CHECKED_IN', 'CALLED', 'queue.priority_set', 'priority', false, false),
    ('SetPriority', 'CHECKED_IN', '{PARKED}',
        'CHECKED_IN', 'PARKED', 'queue.priority_set', 'priority', false, false),
    ('SetPriority', 'CHECKED_IN', '{MISSED}',
        'CHECKED_IN', 'MISSED', 'queue.priority_set', 'priority', false, false),
    ('CallNext', 'CHECKED_IN', '{WAITING}',
        'CHECKED_IN', 'CALLED', 'queue.called', 'call_time', false, false),
    ('CallAgain', 'CHECKED_IN', '{CALLED}',
        'CHECKED_IN', 'CALLED', 'queue.called_again', 'call_time', false, false),
    ('ReturnToLine', 'CHECKED_IN', '{CALLED,PARKED,MISSED}',
        'CHECKED_IN', 'WAITING', 'queue.returned', '', true, false),
    ('ParkPatient', 'CHECKED_IN', '{WAITING,CALLED}',
        'CHECKED_IN', 'PARKED', 'queue.parked', '', true, true),
    ('TransferPatient', 'CHECKED_IN', '{WAITING,CALLED,PARKED}',
        'CHECKED_IN', 'WAITING', 'queue.transferred_in', '', true, false),
    ('MarkMissed', 'CHECKED_IN', '{CALLED}',
        'CHECKED_IN', 'MISSED', 'queue.missed', '', false, true),
    ('LeaveQueue', 'CHECKED_IN', '{WAITING,CALLED,PARKED,MISSED}',
        'LEFT', 'LEFT', 'queue.left', 'leave_time', false, true),
    ('StartAppointment', 'CHECKED_IN', '{WAITING,CALLED}',
        'IN_CONSULTATION', 'IN_CONSULTATION', 'queue.started', 'start_visit_time', false, true),
    ('CompleteAppointment', 'IN_CONSULTATION', '{IN_CONSULTATION}',
        'COMPLETED', 'DONE', 'queue.completed', 'complete_time', false, true),
    ('CancelAppointment', 'BOOKED', '{""}',
        'CANCELLED', '', 'appointment.cancelled', 'cancel_time', false, true),
    -- A leave is no wrong click.
    ('CreateLeave', 'BOOKED', '{""}',
        'CANCELLED', '', 'appointment.cancelled', 'cancel_time', false, false),
    ('CancelAppointment', 'CHECKED_IN', '{WAITING,CALLED,PARKED,MISSED}',
        'CANCELLED', 'LEFT', 'appointment.cancelled', 'cancel_time', false, true),
    ('MarkNoShow', 'BOOKED', '{""}',
        'NO_SHOW', '', 'appointment.no_show', 'no_show_time', false, true)
$$;
