-- Reading the sealed log as events. Positions have no gaps, so a stretch of them is found without counting rows.

-- Whether a row of the log with this type is an event. A row without a type is no change, and nobody is told of holds,
-- nor of what somebody does with notifications.
create or replace function is_event(p_type text) returns boolean language sql immutable parallel safe as $$
    select p_type is not null and p_type not like 'hold.%' and p_type not like 'notification.%'
       and p_type not like 'contact_preferences.%'
$$;

-- The position after which the kept log begins: that of the last row that retention has deleted.
create or replace function log_begins() returns bigint language sql stable as $$
    select case when s.position = 1 then 0 else s.position end from seal s order by s.position limit 1
$$;

-- The place before the oldest event that is not older than `p_keep_seconds`, or, without that, the end: then `waiting` has
-- the changes that were committed already and are still to be sealed, which come after that place and yet are not new.
--
-- Ids have the time in them, so the first row that is young enough is found by its id. It need not have the lowest
-- position of these, as rows are sealed some moments after their times: the lowest of a few is taken.
create or replace function event_place(p_keep_seconds float8, out "position" bigint, out chain bytea, out waiting uuid[])
    language plpgsql stable set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    v_begins bigint := coalesce(log_begins(), 0);
    v_last seal;
    v_first uuid;
begin
    select * into v_last from seal s order by s.position desc limit 1;
    if p_keep_seconds is null then
        event_place.position := v_last.position;
        event_place.chain := v_last.chain;
        -- Beyond that many, something has kept the log from being sealed for long.
        waiting := array(
            select l.id from log l
            where l.transaction >= coalesce(v_last.horizon, 0) and is_event(l.type)
              and (select s.position from seal s where s.id = l.id) is null
            limit 10000);
    else
        v_first := (encode(substring(int8send(
            (extract(epoch from greatest(moment() - make_interval(secs => p_keep_seconds), 'epoch')) * 1000)::bigint
        ) from 3), 'hex') || repeat('0', 20))::uuid;
        event_place.position := v_begins;
        if exists (select from log l where l.id < v_first) then
            select min((select s.position from seal s where s.id = l.id)) - 1 into event_place.position
            from (select id from log where id >= v_first order by id limit 100) l;
            -- Nothing is so young.
            if event_place.position is null then
                event_place.position := v_last.position;
            end if;
            event_place.position := greatest(event_place.position, v_begins);
        end if;
        select s.chain into event_place.chain from seal s where s.position = event_place.position;
    end if;
    event_place.position := coalesce(event_place.position, 0);
    event_place.chain := coalesce(event_place.chain, first_chain());
end
$$;

-- The events among the `p_rows` rows after a place, at most `p_size`, that pass the filter (null passes all). Each row has
-- the end up to which the log was read, and the last position; without events there is one row with these alone.
--
-- `standing` is null, or why there is no reading on from the place: LOST if the log has never had it, or has it no more
-- after a restore; TOO_OLD if retention has deleted what follows or, with `p_keep_seconds`, if the next event is older.
-- `p_piece` is the beginning of the chain at the place.
create or replace function read_stretch(
    p_after bigint, p_piece bytea, p_rows integer, p_size integer, p_keep_seconds float8, p_users boolean,
    p_types text[], p_clinics uuid[], p_clinic uuid, p_doctor uuid, p_patients uuid[]
) returns table (
    standing text, end_position bigint, end_chain bytea, last_position bigint,
    "position" bigint, chain bytea, id uuid, type text, "time" timestamptz, actor text, method text, resource text,
    clinic_id uuid, doctor_id uuid, patient_id uuid, appointment_id uuid, slot_id uuid, date date, revision bigint,
    queue_state text, data jsonb, ticket integer, call_count integer, priority text, check_in_time timestamptz,
    call_time timestamptz, start_visit_time timestamptz
) language plpgsql stable rows 100
    -- One row after the other, by the indexes: the limits may end it early.
    set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_hashjoin = off
    set enable_mergejoin = off set enable_sort = off set enable_bitmapscan = off as $$
#variable_conflict use_column
declare
    v_last seal;
    v_here bytea;
    v_count integer;
begin
    select * into v_last from seal s order by s.position desc limit 1;
    last_position := coalesce(v_last.position, 0);
    end_position := last_position;
    end_chain := coalesce(v_last.chain, first_chain());
    select s.chain into v_here from seal s where s.position = p_after;
    if p_after > last_position then
        standing := 'LOST';
    elsif p_after < log_begins() then
        standing := 'TOO_OLD';
    elsif substring(coalesce(v_here, first_chain()) for length(p_piece)) <> p_piece then
        standing := 'LOST';
    elsif p_keep_seconds is not null then
        select 'TOO_OLD' into standing
        from (select l.time from seal s join log l on l.id = s.id
              where s.position > p_after and s.position <= p_after + p_rows and is_event(l.type)
              order by s.position limit 1) next
        where next.time < moment() - make_interval(secs => p_keep_seconds);
    end if;
    if standing is not null then
        return next;
        return;
    end if;
    if p_after + p_rows < last_position then
        end_position := p_after + p_rows;
        select s.chain into end_chain from seal s where s.position = p_after + p_rows;
    end if;
    return query
        select standing, end_position, end_chain, last_position,
               s.position, s.chain, l.id, l.type, l.time, l.actor, l.method, l.resource, l.clinic_id, l.doctor_id,
               l.patient_id, l.appointment_id, l.slot_id, l.date, l.revision, l.queue_state, l.data, l.ticket,
               l.call_count, l.priority, l.check_in_time, l.call_time, l.start_visit_time
        from seal s join log l on l.id = s.id
        where s.position > p_after and s.position <= p_after + p_rows and is_event(l.type)
          and (p_users or l.type not like 'user.%' and l.type not like 'api\_key.%')
          and (p_types is null or l.type = any (p_types))
          and (p_clinics is null or l.clinic_id is null or l.clinic_id = any (p_clinics))
          and (p_clinic is null or l.clinic_id = p_clinic)
          and (p_doctor is null or l.doctor_id = p_doctor)
          and (p_patients is null or l.patient_id = any (p_patients)
               or l.type = 'patient.merged' and l.data ->> 'merged_patient_id' = any (p_patients::text[]))
        order by s.position
        limit p_size;
    get diagnostics v_count = row_count;
    if v_count = 0 then return next; end if;
end
$$;
