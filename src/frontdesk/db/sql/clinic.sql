-- The civil date in the time zone of the doctor's clinic; null if there is no such doctor.
create or replace function clinic_today(p_doctor uuid) returns date language sql volatile as $$
    select (moment() at time zone c.time_zone)::date
    from doctor d join clinic c on c.id = d.clinic_id where d.id = p_doctor
$$;
