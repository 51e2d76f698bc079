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
