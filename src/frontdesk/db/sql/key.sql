-- Idempotency keys: what a caller's key did, so that it is never done twice.

-- The answer that the key got before; `outcome` is null if it did nothing yet.
--
-- Ask under the lock: a concurrent twin holds it until its own answer is stored. Ask before anything is refused: a retry
-- after midnight is still a replay.
create or replace function recall(r request) returns decision language plpgsql as $$
declare
    v_first idempotency;
    d decision;
begin
    select * into v_first from idempotency where caller = r.caller and method = r.verb and key = r.key;
    if not found then return d; end if;
    if v_first.fingerprint <> r.fingerprint then return refused('IDEMPOTENCY_KEY_REUSED', null); end if;
    if v_first.result_id is not null then
        select a into d.appointment from appointment a where a.id = v_first.result_id;
        d.appointment := jsonb_populate_record(d.appointment, v_first.snapshot);
    else
        d := jsonb_populate_record(d, v_first.snapshot);
        select p into d.patient from patient p where p.id = current_patient((d.patient).id);
    end if;
    d.outcome := 'OK';
    d.replayed := true;
    d.revision := v_first.revision;
    d.vacated_revision := v_first.vacated_revision;
    return d;
end
$$;

-- Store what the key did: of an appointment all that a later change may overwrite, and no text of the patient; of slots,
-- days, schedules and holds everything, since a slot may be deleted; of a patient the id.
--
-- It is the last write of the transaction: a twin that holds another lock waits here, then starts again, and finds this
-- answer. Refusals are not stored.
create or replace function remember(r request, d decision) returns void language plpgsql as $$
begin
    insert into idempotency (caller, method, key, fingerprint, result_id, snapshot, revision, vacated_revision)
    values (r.caller, r.verb, r.key, r.fingerprint, (d.appointment).id,
            case
                when (d.appointment).id is not null
                then to_jsonb(d.appointment)
                     - '{id,patient_id,reason,notes,cancel_reason,override_reason,undo,create_time}'::text[]
                when (d.patient).id is not null
                then jsonb_build_object('patient', jsonb_build_object('id', (d.patient).id),
                                        'already_registered', d.already_registered)
                else jsonb_build_object('day', d.day, 'slots', d.slots, 'affected', d.affected,
                                        'schedule', d.schedule, 'schedule_exception', d.schedule_exception,
                                        'stale', d.stale, 'generated', d.generated, 'hold', d.hold,
                                        'entry', d.entry) end,
            d.revision, d.vacated_revision)
    on conflict do nothing;
    if not found then
        raise exception 'the idempotency key was used meanwhile' using errcode = 'serialization_failure';
    end if;
end
$$;
