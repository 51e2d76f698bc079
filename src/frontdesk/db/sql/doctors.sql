do $do$
begin
    if to_regtype('availability_decision') is null then
        create type availability_decision as (
            outcome text, subject uuid, detail text, replayed boolean, revision bigint,
            is_present boolean, note text, max_patients integer, affected uuid[]
        );
    end if;
end
$do$;

-- Say whether a doctor is there on a date. What is booked stays booked; the answer names it.
create or replace function set_availability(
    p_caller text, p_key text, p_fingerprint bytea,
    p_doctor uuid, p_date date, p_is_present boolean, p_note text, p_max_patients integer
) returns availability_decision language plpgsql as $$
declare
    v_answer availability_decision;
    v_known record;
    v_first idempotency;
    v_now timestamptz;
begin
    perform lock_doctor_day(p_doctor, p_date);
    if p_key <> '' then
        v_known := recall(p_caller, 'SetDoctorAvailability', p_key, p_fingerprint);
        v_answer.outcome := v_known.outcome;
        if v_known.outcome = 'IDEMPOTENCY_KEY_REUSED' then return v_answer; end if;
        if v_known.outcome = 'OK' then
            v_first := v_known.first;
            -- The request is the same, so what it says is what it said.
            v_answer := ('OK', null, null, true, v_first.revision, p_is_present, p_note, p_max_patients,
                         (select coalesce(array_agg(id::uuid order by n), '{}')
                          from jsonb_array_elements_text(v_first.snapshot) with ordinality as ids (id, n)));
            return v_answer;
        end if;
    end if;

    v_answer.subject := p_doctor;
    perform from doctor where id = p_doctor;
    if not found then v_answer.outcome := 'DOCTOR_NOT_FOUND'; return v_answer; end if;

    v_now := moment();
    select c.revision into v_answer.revision from count_change(p_doctor, p_date, 0, v_now) c;
    update doctor_day set is_present = p_is_present, note = p_note, max_patients = p_max_patients
    where doctor_id = p_doctor and date = p_date;
    insert into event (doctor_id, date, revision, kind, create_time)
    values (p_doctor, p_date, v_answer.revision, 'AVAILABILITY', v_now);

    select coalesce(
        array_agg(id order by number)
        filter (where state in ('BOOKED', 'CHECKED_IN', 'IN_CONSULTATION') and not p_is_present), '{}')
    into v_answer.affected from appointment
    where doctor_id = p_doctor and date = p_date;
    v_answer.outcome := 'OK';
    v_answer.is_present := p_is_present;
    v_answer.note := p_note;
    v_answer.max_patients := p_max_patients;
    if p_key <> '' then
        perform remember_row(p_caller, 'SetDoctorAvailability', p_key, p_fingerprint, null,
                             to_jsonb(v_answer.affected), v_answer.revision, null);
    end if;
    return v_answer;
end
$$;
