-- Sealing: each row of the log gets a position and a place in a chain of hashes, so that readers have one order, and
-- nobody can change, remove or insert a row unnoticed. No statement updates or deletes a row of `log` or `seal` but
-- retention.

-- The hash of a row. Of values in binary form, so it does not depend on settings of the session. A column that is added
-- later is appended in a case of its own, if it is not null: what was sealed keeps its hash.
create or replace function log_digest(l log) returns bytea language sql stable as $$
    select sha256(record_send(row(
        l.transaction, l.id, l.time, l.actor, l.method, l.type, l.resource, l.clinic_id, l.doctor_id, l.patient_id,
        l.patient_ids, l.appointment_id, l.slot_id, l.date, l.revision, l.data, l.outcome, l.count, l.address,
        l.trace_id, l.queue_state, l.ticket, l.room, l.call_count, l.check_in_time, l.call_time, l.start_visit_time,
        l.priority)))
$$;

-- The chain before the first position.
create or replace function first_chain() returns bytea language sql immutable parallel safe as $$
    select decode(repeat('00', 32), 'hex')
$$;

-- Seal what no transaction that still runs can precede. `sealed` is how many rows that were, or null if somebody else
-- seals just now. `waiting` says whether others are committed that an older transaction holds up, `age` since when, in
-- seconds.
--
-- The rows of a doctor-day are sealed in the order of their revisions. Their transactions need not be in that order: one
-- may have got its id before it got the lock, such as one that settles a leave and moves patients to another doctor-day.
-- If an earlier revision is above the horizon, then those after it wait for it, though they are below. The horizon that
-- is stored is not above them, so the next look finds them.
--
-- Ids of transactions begin anew in another cluster, where a dump was restored, or goes on from another number. So a
-- row is sealed or not by `seal`, and the horizon only says where to begin to look. After a change of clusters that is
-- the beginning, and the rows from transactions that are yet to come here are of the old one.
--
-- Few rows are new, which a kept plan does not know; so it may not read whole tables.
create or replace function seal_log(out sealed integer, out waiting boolean, out age float8) language plpgsql
    set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_hashjoin = off
    set enable_mergejoin = off as $$
declare
    v_cluster bigint;
    v_last seal;
    v_begins bigint;
    v_horizon bigint;
    v_next bigint;
    v_resume bigint;
    v_row record;
    v_position bigint;
    v_chain bytea;
    v_ids uuid[] := '{}';
    v_chains bytea[] := '{}';
begin
    if not pg_try_advisory_xact_lock(hashtextextended('frontdesk seal', 0)) then return; end if;
    sealed := 0;
    select system_identifier into v_cluster from pg_control_system();
    -- After the lock, so that this sees what the last one has sealed.
    select * into v_last from seal order by position desc limit 1;
    v_begins := case when v_last.cluster = v_cluster then v_last.horizon else 0 end;
    v_position := coalesce(v_last.position, 0);
    v_chain := coalesce(v_last.chain, first_chain());
    select pg_snapshot_xmin(s)::text::bigint, pg_snapshot_xmax(s)::text::bigint into v_horizon, v_next
    from pg_current_snapshot() s;
    v_resume := v_horizon;

    for v_row in
        select w.id, w.transaction, w.digest, bool_or(w.behind) over revisions as waits
        from (
            select l.id, l.transaction, l.doctor_id, l.date, l.revision, log_digest(l) as digest,
                   -- Whether the revision before is above the horizon. If it is below and waits itself, it is one of
                   -- these rows.
                   coalesce((select e.transaction >= v_horizon
                                    and e.transaction < (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint)
                             from log e
                             where e.doctor_id = l.doctor_id and e.date = l.date and e.revision = l.revision - 1
                               and e.revision > 0), false) as behind
            from log l
            where l.transaction >= v_begins
              and (l.transaction < v_horizon
                   or v_last.cluster is distinct from v_cluster
                      -- By the snapshot of this statement: the next id at its beginning.
                      and l.transaction >= (select pg_snapshot_xmax(pg_current_snapshot())::text::bigint))
              -- A subquery for each row, by the index. As a join the planner would read the whole of `seal` for each
              -- row: when it made the plan that is kept, `seal` was empty.
              and (select s.position from seal s where s.id = l.id) is null
        ) w
        window revisions as (
            partition by case when w.revision = 0 then w.id else w.doctor_id end,
                         case when w.revision = 0 then null else w.date end
            order by w.revision)
        -- Those that wait come first, since the horizon is stored with the others.
        order by bool_or(w.behind) over revisions desc, max(w.transaction) over revisions, w.revision, w.id
    loop
        if v_row.waits then
            v_resume := least(v_resume, v_row.transaction);
            continue;
        end if;
        v_chain := sha256(v_chain || v_row.digest);
        v_ids := v_ids || v_row.id;
        v_chains := v_chains || v_chain;
        sealed := sealed + 1;
        if sealed % 1000 = 0 then
            perform write_seals(v_position, v_ids, v_chains, v_resume, v_cluster);
            v_position := v_position + 1000;
            v_ids := '{}';
            v_chains := '{}';
        end if;
    end loop;
    if cardinality(v_ids) > 0 then
        perform write_seals(v_position, v_ids, v_chains, v_resume, v_cluster);
    end if;

    select extract(epoch from moment() - l.time) into age from log l
    where l.transaction >= v_horizon and l.transaction < v_next
      and (select s.position from seal s where s.id = l.id) is null
    order by l.transaction limit 1;
    waiting := found;
    age := greatest(coalesce(age, 0), 0);
end
$$;

create or replace function write_seals(
    p_after bigint, p_ids uuid[], p_chains bytea[], p_horizon bigint, p_cluster bigint
) returns void language sql as $$
    insert into seal (position, id, chain, horizon, cluster)
    select p_after + n, id, chain, p_horizon, p_cluster from unnest(p_ids, p_chains) with ordinality as w (id, chain, n)
$$;
