-- What patients are told, when, and whether it is still true.
--
-- Plan times go by moment(), as everything that people see. Attempts, leases and their pauses go by the machine's clock:
-- a mail server that is away does not know the service's.

-- When a visit begins: a day booking with its date, in the clinic's time.
create or replace function visit_begin(a appointment) returns timestamptz language sql stable as $$
    select coalesce(a.start_time, (
        select a.date::timestamp at time zone c.time_zone from clinic c where c.id = a.clinic_id))
$$;

-- When the date of a visit ends, in the clinic's time.
create or replace function visit_day_end(a appointment) returns timestamptz language sql stable as $$
    select (a.date + 1)::timestamp at time zone c.time_zone from clinic c where c.id = a.clinic_id
$$;

-- Plan one notification on each of these channels, unless this cause has planned it already.
create or replace function plan_notification(
    a appointment, p_kind text, p_channels text[], p_plan_time timestamptz, p_sequence integer, p_cause uuid,
    p_position bigint default 0
) returns void language sql as $$
    insert into notification (cause, position, kind, channel, appointment_id, patient_id, clinic_id, doctor_id, date,
                              slot_id, sequence, plan_time)
    select p_cause, p_position, p_kind, channel, a.id, a.patient_id, a.clinic_id, a.doctor_id, a.date, a.slot_id,
           p_sequence, p_plan_time
    from unnest(p_channels) channel
    on conflict do nothing
$$;

-- Plan the reminders of a visit that is booked or moved at this time, except those whose time has passed by then.
create or replace function plan_reminders(
    a appointment, p_channels text[], p_time timestamptz, p_sequence integer, p_cause uuid, p_position bigint
) returns void language sql as $$
    select plan_notification(a, 'REMINDER', p_channels, r.at, p_sequence, p_cause, p_position)
    from clinic c
    cross join lateral (
        select distinct case when a.start_time is not null then a.start_time - before
                             else (a.date - 1 + time '18:00') at time zone c.time_zone end as at
        from unnest(c.reminders) before where before > interval '0') r
    where c.id = a.clinic_id and r.at > p_time
$$;

-- Whether the patient has been told of this visit on this channel, or may have been.
create or replace function was_told(p_appointment uuid, p_channel text) returns boolean language sql stable as $$
    select exists (select from notification n
                   where n.appointment_id = p_appointment and n.channel = p_channel
                     and n.kind in ('CONFIRMATION', 'RESCHEDULED', 'LEAVE_MOVED', 'REMINDER')
                     and (n.told or n.state = 'SENDING'))
$$;

-- Plan what these events of appointments call for, in their order. What was planned before and is not sent yet is not
-- true any more. The events of a doctor-day's log come here once, or again after its reader was set back; then nothing
-- is planned again, and nothing that later events have planned is given up.
create or replace function plan_notifications(p_events json, p_channels text[]) returns void language plpgsql
    set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    e record;
    a appointment;
    v_kind text;
    v_reminds boolean;
    v_sequence integer;
    v_channels text[];
begin
    for e in
        select * from json_to_recordset(p_events) as x (
            id uuid, "position" bigint, time timestamptz, type text, method text, undone text, appointment_id uuid,
            entry_id uuid, hold_id uuid, doctor_id uuid, date date, slot_id uuid)
    loop
        if e.type = 'waitlist.offered' then
            insert into notification (cause, position, kind, channel, hold_id, patient_id, clinic_id, doctor_id, date,
                                      slot_id, plan_time)
            select e.id, e.position, 'WAITLIST_OFFER', channel, h.id, w.patient_id, h.clinic_id, h.doctor_id, h.date,
                   h.slot_id, e.time
            from waitlist_entry w
            join hold h on h.id = w.hold_id and h.id = e.hold_id
            cross join unnest(p_channels) channel
            where w.id = e.entry_id and w.state = 'OFFERED'
            on conflict do nothing;
            continue;
        end if;
        v_kind := case
            when e.type = 'appointment.booked' then 'CONFIRMATION'
            when e.type = 'appointment.moved_in' and e.method = 'CreateLeave' then 'LEAVE_MOVED'
            when e.type = 'appointment.moved_in' then 'RESCHEDULED'
            when e.type = 'appointment.cancelled' then 'CANCELLATION'
            when e.undone = 'CancelAppointment' then 'CONFIRMATION' end;
        v_reminds := v_kind <> 'CANCELLATION' or e.undone = 'CheckIn';
        -- A sender that has one of these just now is waited for, and keeps it.
        update notification set state = 'SKIPPED', skip_reason = 'SUPERSEDED'
        where appointment_id = e.appointment_id and state = 'PLANNED' and position < e.position
          and (v_kind is not null or e.type = 'appointment.no_show' or kind = 'REMINDER');
        continue when v_kind is null and v_reminds is not true;

        select * into a from appointment where id = e.appointment_id;
        -- A walk-in has never been told, and a walk-in alone is here without ever having been planned for.
        continue when e.undone = 'CancelAppointment' and a.state <> 'BOOKED'
                      and not exists (select from notification n where n.appointment_id = a.id);
        select max(n.sequence) into v_sequence from notification n
        where n.appointment_id = a.id and n.position < e.position;
        v_sequence := case when v_kind is null then coalesce(v_sequence, 0)
                           when v_sequence is null then (v_kind <> 'CONFIRMATION')::integer
                           else v_sequence + 1 end;
        if v_reminds and a.state = 'BOOKED' and (a.doctor_id, a.date) = (e.doctor_id, e.date)
           and a.slot_id is not distinct from e.slot_id then
            perform plan_reminders(a, p_channels, e.time, v_sequence, e.id, e.position);
        end if;
        -- It tells of the place that the event has given; by now the visit may have another one.
        a.doctor_id := e.doctor_id;
        a.date := e.date;
        a.slot_id := e.slot_id;
        if v_kind is not null then
            v_channels := array(select c from unnest(p_channels) c where v_kind <> 'CANCELLATION' or was_told(a.id, c));
            perform plan_notification(a, v_kind, v_channels, e.time, v_sequence, e.id, e.position);
        end if;
    end loop;
end
$$;

-- Why a notification is not sent, as things stand now; null if it is.
create or replace function skip_reason(n notification, a appointment, p_now timestamptz) returns text
language plpgsql stable as $$
begin
    if n.user_id is not null then
        return case
            when not exists (select from user_account u where u.id = n.user_id and u.active
                                and not (n.kind = 'EMAIL_VERIFICATION' and u.email_verified)) then 'SUPERSEDED'
            -- Whoever asked for it has asked again, or does not wait any more.
            when n.kind = 'PASSWORD_RESET' and p_now > n.plan_time + interval '1 hour' then 'TOO_LATE' end;
    end if;
    if n.hold_id is not null then
        return case
            when not exists (
                select from hold h join waitlist_entry w on w.hold_id = h.id and w.state = 'OFFERED'
                where h.id = n.hold_id and h.state = 'HELD') then 'SUPERSEDED'
            when exists (select from hold h where h.id = n.hold_id and h.expire_time <= p_now) then 'TOO_LATE' end;
    end if;
    if n.kind = 'CANCELLATION' then
        return case when a.state <> 'CANCELLED' or not was_told(a.id, n.channel) then 'SUPERSEDED'
                    when p_now >= visit_day_end(a) then 'TOO_LATE' end;
    end if;
    return case
        when (a.doctor_id, a.date) <> (n.doctor_id, n.date) or a.slot_id is distinct from n.slot_id
             or not case n.kind when 'REMINDER' then a.state = 'BOOKED' else holds_place(a.state) end then 'SUPERSEDED'
        when p_now >= case when n.kind = 'REMINDER' then visit_begin(a)
                           else coalesce(a.start_time, visit_day_end(a)) end then 'TOO_LATE'
        -- After a standstill one reminder is enough.
        when n.kind = 'REMINDER' and exists (
            select from notification o
            where o.appointment_id = n.appointment_id and o.channel = n.channel and o.kind = 'REMINDER'
              and o.state = 'PLANNED' and o.plan_time > n.plan_time and o.plan_time <= p_now) then 'SUPERSEDED' end;
end
$$;

-- Take notifications of a channel that are due, for a sender who has them for so many seconds, and skip those that are not
-- to be sent. Address, preferences and the visit are read here. Of an appointment one at a time, so that they arrive in
-- order. One that a sender has begun and not ended in its time is taken again: it was killed.
create or replace function claim_notifications(p_channel text, p_most integer, p_seconds float8)
returns table (
    id uuid, kind text, attempts integer, sequence integer, plan_time timestamptz, appointment_id uuid, patient_id uuid,
    user_id uuid, "to" text, language text, country text, name text, doctor text, clinic text, address text, city text,
    phone text, email text, time_zone text, date date, start_time timestamptz, end_time timestamptz,
    local_start timestamp, reminder boolean, until timestamp
) language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
#variable_conflict use_column
declare
    n notification;
    a appointment;
    p patient;
    c contact_preferences;
    v_now timestamptz := moment();
    v_clock timestamptz := clock_timestamp();
    v_skip text;
    v_to text;
    v_taken uuid[] := '{}';
    v_count integer := 0;
begin
    -- Two who claim at once could each take one of an appointment.
    perform pg_advisory_xact_lock(hashtextextended('frontdesk claim ' || p_channel, 0));
    for n in
        select * from notification x
        where x.channel = p_channel and x.state in ('PLANNED', 'SENDING') and x.plan_time <= v_now
          and (x.try_time is null or x.try_time <= v_clock)
        order by x.plan_time, x.id limit 10 * p_most + 100
        for update skip locked
    loop
        exit when v_count >= p_most;
        if n.appointment_id is not null then
            continue when n.appointment_id = any (v_taken) or exists (
                select from notification o
                where o.appointment_id = n.appointment_id and o.channel = n.channel and o.state = 'SENDING'
                  and o.id <> n.id);
            select * into a from appointment x where x.id = n.appointment_id;
        end if;
        if n.user_id is null then
            select * into p from patient x
            where x.id = (select current_patient(case when n.hold_id is null then a.patient_id else n.patient_id end));
            select * into c from contact_preferences x where x.patient_id = any (same_record(p.id))
            order by x.patient_id = p.id desc, x.update_time desc limit 1;
        end if;
        v_skip := skip_reason(n, a, v_now);
        if n.state = 'SENDING' then
            -- Its sender was killed, maybe after it had sent it.
            update notification x set told = true where x.id = n.id;
        end if;
        if v_skip is null and n.user_id is null then
            v_to := case p_channel when 'EMAIL' then p.email else p.phone end;
            v_skip := case
                when not coalesce(p_channel = any (c.channels), true)
                     or n.kind = 'REMINDER' and not coalesce(c.reminders, true) then 'OPTED_OUT'
                when v_to = '' then 'NO_ADDRESS' end;
        end if;
        if v_skip is not null then
            update notification x set state = 'SKIPPED', skip_reason = v_skip, try_time = null where x.id = n.id;
            continue;
        end if;
        update notification x
        set state = 'SENDING', attempts = x.attempts + 1, due_since = coalesce(x.due_since, v_clock),
            try_time = v_clock + make_interval(secs => p_seconds)
        where x.id = n.id;
        v_count := v_count + 1;
        if n.user_id is not null then
            return query
                select n.id, n.kind, n.attempts + 1, 0, n.plan_time, null::uuid, n.patient_id, n.user_id, u.email,
                       coalesce(l.language, ''), coalesce(l.country, ''), u.name, '', '', '', '', '', '', 'UTC',
                       null::date, null::timestamptz, null::timestamptz, null::timestamp, false, null::timestamp
                from user_account u
                -- Of the clinic where the user's patient was last; else the default one.
                left join lateral (
                    select k.country, (select f.language from contact_preferences f where f.patient_id = u.patient_id)
                    from clinic k
                    where k.id = coalesce((select o.clinic_id from appointment o where o.patient_id = u.patient_id
                                           order by o.date desc limit 1),
                                          (select d.id from clinic d where d.is_default))) l on true
                where u.id = n.user_id;
        elsif n.hold_id is not null then
            return query
                select n.id, n.kind, n.attempts + 1, 0, n.plan_time, null::uuid, p.id, null::uuid, v_to,
                       coalesce(c.language, ''), k.country, concat_ws(' ', p.given_name, nullif(p.family_name, '')),
                       d.display_name, k.name, k.address, k.city, k.phone, k.email, k.time_zone, h.date, s.start_time,
                       s.end_time, s.start_time at time zone k.time_zone, false, h.expire_time at time zone k.time_zone
                from hold h join clinic k on k.id = h.clinic_id join doctor d on d.id = h.doctor_id
                left join slot s on s.id = h.slot_id
                where h.id = n.hold_id;
        else
            v_taken := v_taken || n.appointment_id;
            return query
                select n.id, n.kind, n.attempts + 1, n.sequence, n.plan_time, a.id, p.id, null::uuid, v_to,
                       coalesce(c.language, ''), k.country, concat_ws(' ', p.given_name, nullif(p.family_name, '')),
                       d.display_name, k.name, k.address, k.city, k.phone, k.email, k.time_zone, a.date, a.start_time,
                       a.end_time, a.start_time at time zone k.time_zone, n.kind = 'REMINDER', null::timestamp
                from clinic k, doctor d where k.id = a.clinic_id and d.id = a.doctor_id;
        end if;
    end loop;
end
$$;

-- It was sent.
create or replace function notification_sent(p_id uuid) returns void language sql as $$
    update notification
    set state = 'SENT', told = true, send_time = coalesce(send_time, moment()), try_time = null, failure = ''
    where id = p_id and state <> 'SENT'
$$;

-- This attempt has failed, with a code. Tried again after so many seconds; given up if it is refused for good, or was tried
-- for too long. `p_perhaps`: it may have been sent for all that. True if it was given up. Nothing is done if somebody else
-- has it by now.
create or replace function notification_failed(
    p_id uuid, p_attempts integer, p_failure text, p_for_good boolean, p_perhaps boolean, p_again float8,
    p_patience float8
) returns boolean language sql as $$
    update notification
    set state = case when p_for_good or due_since < clock_timestamp() - make_interval(secs => p_patience) then 'DEAD'
                     else 'PLANNED' end,
        failure = p_failure, told = told or p_perhaps,
        try_time = clock_timestamp() + make_interval(secs => p_again)
    where id = p_id and attempts = p_attempts and state = 'SENDING'
    returning state = 'DEAD'
$$;

-- The channel cannot be reached: for all that wait the time has begun after which they are given up. How many were.
create or replace function give_up_notifications(p_channel text, p_failure text, p_patience float8) returns integer
language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    v_now timestamptz := moment();
    v_count integer;
begin
    update notification set due_since = clock_timestamp()
    where channel = p_channel and state = 'PLANNED' and plan_time <= v_now and due_since is null;
    update notification set state = 'DEAD', failure = p_failure
    where channel = p_channel and state = 'PLANNED' and plan_time <= v_now
      and due_since < clock_timestamp() - make_interval(secs => p_patience);
    get diagnostics v_count = row_count;
    return v_count;
end
$$;
