-- The time of every rule. An operator or a test may set another for a database or a session:
-- alter database clinic set frontdesk.now = '2026-11-20 08:00+00'.
create or replace function moment() returns timestamptz language sql volatile as $$
    select coalesce(nullif(current_setting('frontdesk.now', true), '')::timestamptz, clock_timestamp())
$$;

-- Time-ordered UUIDs (RFC 9562, version 7); PostgreSQL has its own from 18 on.
do $do$
begin
    if current_setting('server_version_num')::int >= 180000 then
        create or replace function new_id() returns uuid language sql volatile as 'select uuidv7()';
    else
        create or replace function new_id() returns uuid language sql volatile as $$
            select encode(
                set_bit(set_bit(
                    overlay(uuid_send(gen_random_uuid())
                            placing substring(int8send((extract(epoch from clock_timestamp()) * 1000)::bigint) from 3)
                            from 1 for 6),
                    52, 1), 53, 1),
                'hex')::uuid
        $$;
    end if;
end
$do$;

-- Lock doctor-days and patients to the end of the transaction: all at once, each once, ascending by the hashed key, so
-- that two transactions never wait for each other. Advisory and of the transaction, so that PgBouncer may share
-- connections by transaction.
--
-- Call it in a statement of its own and look at the rows in later ones: under READ COMMITTED each statement takes a
-- fresh snapshot, so what is read after the lock includes what was committed while we waited for it. Under any
-- stricter isolation it would not, and places would be sold twice; hence the assertion.
create or replace function lock_all(p_names text[]) returns void language plpgsql as $$
declare
    v_key bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'frontdesk decides under READ COMMITTED only' using errcode = 'invalid_transaction_state';
    end if;
    for v_key in select distinct hashtextextended(name, 0) from unnest(p_names) name order by 1 loop
        perform pg_advisory_xact_lock(v_key);
    end loop;
end
$$;

-- The day as a number: a date as text depends on the session's DateStyle, and all sessions must lock the same name.
create or replace function doctor_day_name(p_doctor uuid, p_date date) returns text language sql immutable as $$
    select 'doctor-day/' || p_doctor || '/' || (p_date - date '2000-01-01')
$$;

create or replace function lock_doctor_day(p_doctor uuid, p_date date) returns void language plpgsql as $$
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'frontdesk decides under READ COMMITTED only' using errcode = 'invalid_transaction_state';
    end if;
    perform pg_advisory_xact_lock(hashtextextended(doctor_day_name(p_doctor, p_date), 0));
end
$$;

-- Store what a key did. It is the last write of the transaction: a twin that holds another lock waits here, and then
-- starts again, to find this answer. Refusals are not stored.
create or replace function remember_row(
    p_caller text, p_method text, p_key text, p_fingerprint bytea,
    p_result uuid, p_snapshot jsonb, p_revision bigint, p_vacated_revision bigint
) returns void language plpgsql as $$
begin
    insert into idempotency (caller, method, key, fingerprint, result_id, snapshot, revision, vacated_revision)
    values (p_caller, p_method, p_key, p_fingerprint, p_result, p_snapshot, p_revision, p_vacated_revision)
    on conflict do nothing;
    if not found then
        raise exception 'the idempotency key was used meanwhile' using errcode = 'serialization_failure';
    end if;
end
$$;
