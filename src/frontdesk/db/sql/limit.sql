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
        -- On the right stand the old values. Those of an earlier minute begin anew, and of one that is far ahead, since
        -- the clock was set back. The next minute's are there if this call has waited for the row since before it began.
        set (minute, used, granted) = (
            select case when present then w.minute else v_minute end,
                   case when present then least(w.used + p_block, greatest(p_limit, w.used))
                        else least(p_block, p_limit) end,
                   case when present then least(p_block, greatest(p_limit - w.used, 0)) else least(p_block, p_limit) end
            from (select w.minute in (v_minute, v_minute + interval '1 minute')) as is_of (present))
    returning w.granted into lease.granted;
    seconds := extract(epoch from v_minute + interval '1 minute' - v_now);
end
$$;
