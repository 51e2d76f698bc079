-- How a zone is set against UTC on the first of each month of some years that every version of the time zone database
-- knows alike, in seconds; null if PostgreSQL does not know the name. AT TIME ZONE reads some names, such as CET, as
-- abbreviations with one offset all year.
create or replace function zone_offsets(p_zone text) returns integer[] language plpgsql stable as $$
begin
    return array(
        select extract(epoch from (t at time zone p_zone) - (t at time zone 'UTC'))::integer
        from generate_series(timestamptz '2012-01-01 12:00+00', '2016-12-01 12:00+00', '1 month') t order by t);
exception when invalid_parameter_value then
    return null;
end
$$;

-- The civil date in the time zone of the doctor's clinic; null if there is no such doctor.
create or replace function clinic_today(p_doctor uuid) returns date language sql volatile as $$
    select (moment() at time zone c.time_zone)::date
    from doctor d join clinic c on c.id = d.clinic_id where d.id = p_doctor
$$;
