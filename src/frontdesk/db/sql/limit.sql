-- Take a part of a subject's quota of the present minute of the real clock, for a worker that then admits so many calls
-- without asking again. `granted` is 0 when the quota is used up. `seconds` is what is left of the minute.
create or replace function lease(p_subject text, p_limit integer, p_block integer, out granted integer, out seconds float8)
language plpgsql as $$
declare
    v_now timestamptz := clock_timestamp();
    v_minute timestamptz := date_trunc('minute', v_now);
begin
    insert into rate_window as w (subject, minute, used, granted)
    values (p_subject, v_minute, least(p_block, p_limit), least(p_block, p_limit))
    on conflict (subject) do update
        -- The old values stand on the right; a row of an earlier minute begins anew.
        set minute = v_minute,
            used = case when w.minute = v_minute then least(w.used + p_block, greatest(p_limit, w.used))
                        else least(p_block, p_limit) end,
            granted = case when w.minute = v_minute then least(p_block, greatest(p_limit - w.used, 0))
                           else least(p_block, p_limit) end
    returning w.granted into lease.granted;
    seconds := extract(epoch from v_minute + interval '1 minute' - v_now);
end
$$;
