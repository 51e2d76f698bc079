-- Delete the oldest rows of the log, as far as they are older than `p_keep_seconds` and than a year, at most `p_most`;
-- how many were deleted. The seal of the last of them stays, as the checkpoint from which the chain goes on, and a row
-- of the log says so.
--
-- The service's own role may neither update nor delete the log: this runs with the rights of the owner. So it has a
-- search path of its own, and goes by the true clock where a caller may have set another.
create or replace function delete_old_log(p_keep_seconds float8, p_most integer) returns integer language plpgsql
    security definer as $$
declare
    v_before timestamptz :=
        least(moment() - make_interval(secs => p_keep_seconds), clock_timestamp() - interval '365 days');
    v_last record;
    v_deleted integer;
begin
    if not pg_try_advisory_xact_lock(hashtextextended('frontdesk retention', 0)) then return 0; end if;
    with oldest as materialized (
        select s.position, s.chain, l.time from seal s left join log l on l.id = s.id order by s.position limit p_most + 1)
    select position, encode(chain, 'hex') as chain into v_last from oldest
    where position < coalesce((select min(o.position) from oldest o where o.time >= v_before), 9223372036854775807)
      and time is not null
    order by position desc limit 1;
    if not found then return 0; end if;
    delete from log where id in (select s.id from seal s where s.position <= v_last.position);
    get diagnostics v_deleted = row_count;
    delete from seal where position < v_last.position;
    insert into log (id, time, actor, method, count, data)
    values (log_id(moment()), moment(), 'system', 'Retention', v_deleted,
            jsonb_build_object('position', v_last.position, 'chain', v_last.chain));
    return v_deleted;
end
$$;

do $do$
begin
    execute format('alter function delete_old_log(float8, integer) set search_path = %I, pg_temp', current_schema());
end
$do$;
