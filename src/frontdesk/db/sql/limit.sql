-- The part of these calls that one worker takes at once.
create or replace function part_of(p_calls integer) returns integer language sql immutable
    return case when p_calls > 0 then greatest(1, p_calls / 20) else 0 end;

-- Take a part of a subject's quota of the present minute of the real clock, for a worker that then admits so many calls
-- without asking again. `granted` is 0 when the quota is used up, which `used_up` says for the next call too. `seconds`
-- is what is left of the minute.
--
-- The part is a twentieth of what is left, so one who makes few calls costs few round trips, and the parts are small
-- when they could be lost: what a worker has and does not use is lost with the minute.
create or replace function lease(
    p_subject text, p_limit integer, out granted integer, out used_up boolean, out seconds float8
) language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_minute timestamptz := date_trunc('minute', v_now);
begin
    insert into rate_window as w (subject, minute, used, granted)
    values (p_subject, v_minute, part_of(p_limit), part_of(p_limit))
    on conflict (subject) do update
        -- On the right stand the old values. Those of an earlier minute begin anew, and of one that is far ahead, since
        -- the clock was set back. The next minute's are there if this call has waited for the row since before it began.
        set (minute, used, granted) = (
            select case when present then w.minute else v_minute end, used + part_of(p_limit - used),
                   part_of(p_limit - used)
            from (select present, case when present then w.used else 0 end
                  from (select w.minute in (v_minute, v_minute + interval '1 minute')) as is_of (present)
                 ) as before (present, used))
    returning w.granted, w.used >= p_limit into lease.granted, lease.used_up;
    seconds := extract(epoch from v_minute + interval '1 minute' - v_now);
end
$$;
