-- Say whether a doctor is there on a date. What is booked stays booked; the answer names it.
create or replace function set_availability(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_old doctor_day;
begin
    perform from doctor where id = r.doctor;
    if not found then return refused('DOCTOR_NOT_FOUND', r.doctor); end if;
    select * into v_old from doctor_day where doctor_id = r.doctor and date = r.date;
    if r.version <> coalesce(v_old.availability_version, 0) then return refused('ETAG_MISMATCH', r.doctor); end if;

    d.revision := (record_change(
        r, 'doctor_day.availability_set', null, false, moment(),
        jsonb_strip_nulls(jsonb_build_object('is_present', r.is_present, 'max_patients', r.max_patients)))).revision;
    update doctor_day x
    set is_present = coalesce(r.is_present, x.is_present, true), note = r.notes, max_patients = r.max_patients,
        availability_version = x.availability_version + 1
    where x.doctor_id = r.doctor and x.date = r.date
    returning x into d.day;
    if not v_old.is_present and (d.day).is_present then
        perform generate_again(r.doctor, daterange(r.date, r.date, '[]'));
    end if;
    d.affected := array(
        select id from appointment
        where doctor_id = r.doctor and date = r.date and is_live(state) and not (d.day).is_present order by number);
    d.outcome := 'OK';
    return d;
end
$$;
