-- What `decide` takes and answers. Both types are the service's own: they are created here once, and an upgrade adds
-- attributes at their end.

-- A slot to open.
do $do$
begin
    if to_regtype('new_slot') is null then
        create type new_slot as (doctor uuid, start_time timestamptz, end_time timestamptz, capacity integer);
    end if;
end
$do$;

-- What a restricted caller may reach (`Sight` in core/caller.py).
do $do$
begin
    if to_regtype('sight') is null then
        create type sight as (clinics uuid[], patient uuid, doctor uuid);
    end if;
end
$do$;

-- One change that a caller asks for. `verb` is the name of the RPC, which the idempotency key belongs to as well; `actor`,
-- `address` and `trace_id` are for the log. An attribute that the verb has no use for is null. `restricted`: only what `sight` reaches. `locate` fills in the
-- `from_` attributes, `locks`, and `wanted`: the patient's id as it was asked for, of a merged record its own.
do $do$
begin
    if to_regtype('request') is null then
        create type request as (
            verb text, caller text, actor text, address text, trace_id text, key text, fingerprint bytea, validate_only boolean, restricted boolean, sight sight,
            appointment uuid, version integer, patient uuid, slot uuid, doctor uuid, date date,
            reason text, notes text, room text,
            is_present boolean, max_patients integer, slots uuid[], new_slots new_slot[],
            capacity integer, start_time timestamptz, end_time timestamptz,
            from_doctor uuid, from_date date, from_patient uuid, from_dates date[],
            keep uuid, record jsonb, locks text[], wanted uuid, priority text,
            to_date date, hours jsonb, closed boolean, hold uuid, ttl interval,
            override_reason text, may_override boolean,
            entry uuid, waits jsonb, leaves boolean
        );
    end if;
end
$do$;

-- The answer. `outcome` is OK or the reason of a refusal, `subject` the id that the refusal is about, `details` more of
-- its metadata. The rest is the change: the appointment, day or slots after it; the revision of its doctor-day, and of
-- the one that a reschedule left; the place in the queue, and the names; the appointments that it concerns; the patient,
-- and the doctor-days that changed with the patient ([[doctor, date], …]); the schedule or its exception; the open slots
-- of hours that are no more; how many slots were generated, and why others were not; the hold; the entry of the waiting
-- list.
do $do$
begin
    if to_regtype('decision') is null then
        create type decision as (
            outcome text, subject uuid, details jsonb, replayed boolean,
            revision bigint, vacated_revision bigint, vacated_doctor uuid, vacated_date date,
            "position" integer, patient_name text, doctor_name text,
            appointment appointment, day doctor_day, slots slot[], affected uuid[],
            patient patient, already_registered boolean, days jsonb,
            schedule schedule, schedule_exception schedule_exception, stale uuid[], generated jsonb, hold hold,
            entry waitlist_entry
        );
    end if;
end
$do$;

create or replace function refused(p_reason text, p_subject uuid, p_details jsonb default null)
returns decision language plpgsql as $$
declare
    d decision;
begin
    d.outcome := p_reason;
    d.subject := p_subject;
    d.details := p_details;
    return d;
end
$$;
