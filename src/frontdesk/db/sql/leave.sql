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
