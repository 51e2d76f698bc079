-- Say whether a doctor is there on a date. What is booked stays booked; the answer names it.
create or replace function set_availability(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_now timestamptz := moment();
begin
    perform from doctor where id = r.doctor;
    if not found then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;

    d.revision := (record_change(r.doctor, r.date, 'AVAILABILITY', null, null, v_now)).revision;
    update doctor_day x set is_present = r.is_present, note = r.notes, max_patients = r.max_patients
    where x.doctor_id = r.doctor and x.date = r.date
    returning x into d.day;
    d.affected := array(
        select id from appointment
        where doctor_id = r.doctor and date = r.date and is_live(state) and not r.is_present order by number);
    d.outcome := 'OK';
    return d;
end
$$;
