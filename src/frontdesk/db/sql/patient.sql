-- Patients: registered once, found by any word of their names, corrected, and two records of one person made one.
--
-- `decide` takes the locks that `locate_patient` names: of each phone, so that two registrations of one person find each
-- other; of each record; and of the doctor-days whose queue or appointments change with it.

-- The record that an id stands for now: after a merge, the one that was kept. Null if there is no such patient.
create or replace function current_patient(p_id uuid) returns uuid language sql stable as $$
    select coalesce(p.merged_into, p.id) from patient p where p.id = p_id
$$;

-- All ids that stand for the same record as this one.
create or replace function same_record(p_id uuid) returns uuid[] language sql stable as $$
    select array(select current_patient(p_id) union select p.id from patient p where p.merged_into = current_patient(p_id))
$$;

-- Find the records of a request about a patient, and name its locks. A corrected name shows in the queues in which the
-- patient stands; the lock of the day of every live appointment keeps the patient from coming to another one meanwhile.
create or replace function locate_patient(r request) returns request language plpgsql as $$
declare
    v_renamed boolean := r.record ?| array['given_name', 'family_name'];
begin
    r.patient := coalesce(current_patient(r.patient), r.patient);
    r.keep := coalesce(current_patient(r.keep), r.keep);
    r.locks := array(
        select 'patient/' || id from unnest(array[r.patient, r.keep]) id where id is not null
        union
        select 'phone/' || phone from patient
        where id in (r.patient, r.keep) and phone <> ''
          and (r.keep is not null or v_renamed or r.record ?| array['phone', 'birth_date'])
        union
        select 'phone/' || (r.record ->> 'phone') where r.record ->> 'phone' <> ''
        union
        select doctor_day_name(a.doctor_id, a.date) from appointment a
        where a.patient_id = r.patient and is_live(a.state) and (r.keep is not null or v_renamed));
    return r;
end
$$;

-- The records of this person: with this phone and name, now or before a merge, and a birth date that does not contradict
-- `p_birth_date`. Ask under the lock of the phone. Without a phone nobody is taken for somebody else.
create or replace function same_person(p_phone text, p_name_key text, p_birth_date text, p_but uuid)
returns uuid[] language sql stable as $$
    select coalesce(array_agg(distinct k.id order by k.id), '{}')
    from (select p.id from patient p
          where p.phone = p_phone and p.phone <> '' and p.name_key = p_name_key and p.merged_into is null
          union all
          select p.merged_into from patient p
          where p.phone = p_phone and p.phone <> '' and p.name_key = p_name_key and p.merged_into is not null) found
    join patient k on k.id = found.id
    where k.id is distinct from p_but
      and (starts_with(k.birth_date, p_birth_date) or starts_with(p_birth_date, k.birth_date))
$$;

-- What is wrong with a birth date; null if nothing is. Today is the latest date of any time zone, because a patient
-- belongs to no clinic.
create or replace function birth_date_refused(p_birth_date text) returns decision language plpgsql as $$
declare
    v_today date := moment() at time zone interval '14 hours';
    v_first date := v_today - interval '130 years';
    v_length integer := length(p_birth_date);
begin
    if p_birth_date = '' then
        return null;
    elsif p_birth_date > left(to_char(v_today, 'YYYY-MM-DD'), v_length) collate "C" then
        return refused('BIRTH_DATE_IN_FUTURE', null);
    elsif p_birth_date < left(to_char(v_first, 'YYYY-MM-DD'), v_length) collate "C" then
        return refused('BIRTH_DATE_TOO_EARLY', null);
    end if;
    return null;
end
$$;

-- Each word of a name, and each part of it after a hyphen or an apostrophe. 64 characters are enough to find somebody
-- by, and fit into an index.
create or replace function name_words(p_name_key text) returns setof text language sql immutable as $$
    select distinct left(substr(word, n), 64)
    from regexp_split_to_table(p_name_key, '[ ,]+') word, generate_series(1, length(word)) n
    where n = 1 or substr(word, n - 1, 1) in ('-', '''')
$$;

create or replace function write_words(p_patient uuid, p_name_key text) returns void language sql as $$
    delete from patient_word where patient_id = p_patient;
    insert into patient_word (word, patient_id) select w, p_patient from name_words(p_name_key) w;
$$;

-- Find the record of a person, or create it. A found record stays as it is, but takes a birth date that says more.
create or replace function register_patient(r request) returns decision language plpgsql as $$
declare
    v_new patient := jsonb_populate_record(null::patient, r.record);
    d decision := birth_date_refused(v_new.birth_date);
    v_found uuid[];
    v_now timestamptz := moment();
begin
    if d.outcome is not null then return d; end if;
    v_new.name_key := concat_ws(' ', v_new.given_key, nullif(v_new.family_key, ''));
    v_found := same_person(v_new.phone, v_new.name_key, v_new.birth_date, null);
    if cardinality(v_found) > 1 then
        return refused('PATIENT_AMBIGUOUS', null,
                       case when knows_patients(r) then
                           jsonb_build_object('patient_ids', array_to_string(v_found[1:20], ',')) end);
    end if;

    d.already_registered := cardinality(v_found) = 1;
    if d.already_registered then
        update patient p set birth_date = v_new.birth_date, version = p.version + 1, update_time = v_now
        where p.id = v_found[1] and p.merged_into is null
          and p.birth_date <> v_new.birth_date and starts_with(v_new.birth_date, p.birth_date);
        if found then
            perform append_change(r, 'patient.updated', v_found[1], null, v_now, '{"fields": "birth_date"}');
        end if;
        select p into d.patient from patient p where p.id = v_found[1];
        if (d.patient).merged_into is not null or not starts_with((d.patient).birth_date, v_new.birth_date)
           and not starts_with(v_new.birth_date, (d.patient).birth_date) then
            -- By somebody who holds the lock of another phone that leads to this record.
            raise exception 'the patient was changed meanwhile' using errcode = 'serialization_failure';
        end if;
    else
        insert into patient as p (given_name, family_name, given_key, family_key, name_key, phone, birth_date, gender,
                                  email, blood_group, allergies, emergency_name, emergency_phone, insurances,
                                  insurance_keys, active, create_time, update_time)
        values (v_new.given_name, v_new.family_name, v_new.given_key, v_new.family_key, v_new.name_key, v_new.phone,
                v_new.birth_date, v_new.gender, v_new.email, v_new.blood_group, v_new.allergies, v_new.emergency_name,
                v_new.emergency_phone, v_new.insurances, v_new.insurance_keys, v_new.active, v_now, v_now)
        returning p into d.patient;
        perform write_words((d.patient).id, v_new.name_key);
        perform append_change(r, 'patient.registered', (d.patient).id, null, v_now, null);
    end if;
    d.outcome := 'OK';
    return d;
end
$$;

-- Record that the patient of an appointment is shown otherwise from now on.
create or replace function with_change_of(r request, d decision, a appointment, p_now timestamptz) returns decision
language plpgsql as $$
begin
    perform record_change(r, 'appointment.updated', a, a.ticket is not null, p_now);
    d.days := coalesce(d.days, '[]') || jsonb_build_array(jsonb_build_array(a.doctor_id, a.date));
    return d;
end
$$;

-- Change the columns of `record`. A new name is a revision of each doctor-day in whose queue the patient stands, or is
-- expected today: watchers show the name.
create or replace function update_patient(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_old patient;
    v_new patient;
    v_others uuid[];
    a appointment;
    v_now timestamptz := moment();
begin
    -- A registration may write the birth date without our locks.
    select * into v_old from patient where id = r.patient for update;
    if not found then return refused('PATIENT_NOT_FOUND', r.patient); end if;
    if r.version <> v_old.version then return refused('ETAG_MISMATCH', v_old.id); end if;
    if r.record = '{}' then
        d.patient := v_old;
        d.outcome := 'OK';
        return d;
    end if;

    v_new := jsonb_populate_record(v_old, r.record);
    if v_new.birth_date <> v_old.birth_date then
        d := birth_date_refused(v_new.birth_date);
        if d.outcome is not null then return d; end if;
    end if;
    if (v_new.given_key, v_new.family_key) <> (v_old.given_key, v_old.family_key) then
        v_new.name_key := concat_ws(' ', v_new.given_key, nullif(v_new.family_key, ''));
    end if;
    if (v_new.name_key, v_new.phone, v_new.birth_date) <> (v_old.name_key, v_old.phone, v_old.birth_date) then
        v_others := same_person(v_new.phone, v_new.name_key, v_new.birth_date, v_old.id);
        if cardinality(v_others) > 0 then
            return refused('PATIENT_EXISTS', case when knows_patients(r) then v_others[1] end);
        end if;
    end if;

    update patient p
    set given_name = v_new.given_name, family_name = v_new.family_name, given_key = v_new.given_key,
        family_key = v_new.family_key, name_key = v_new.name_key, phone = v_new.phone, birth_date = v_new.birth_date,
        gender = v_new.gender, email = v_new.email, blood_group = v_new.blood_group, allergies = v_new.allergies,
        emergency_name = v_new.emergency_name, emergency_phone = v_new.emergency_phone,
        insurances = v_new.insurances, insurance_keys = v_new.insurance_keys, active = v_new.active,
        version = p.version + 1, update_time = v_now
    where p.id = v_old.id
    returning p into d.patient;
    perform append_change(r, 'patient.updated', v_old.id, null, v_now,
                          jsonb_build_object('fields', (select string_agg(k, ',' order by k) from jsonb_object_keys(r.record) k
                                                        where k not like '%\_key' and k not like '%\_keys')));
    if v_new.name_key <> v_old.name_key then
        perform write_words(v_old.id, v_new.name_key);
    end if;
    if (v_new.given_name, v_new.family_name) <> (v_old.given_name, v_old.family_name) then
        for a in
            select x.* from appointment x join clinic c on c.id = x.clinic_id
            where x.patient_id = v_old.id and is_live(x.state)
              and (x.ticket is not null or x.date = (v_now at time zone c.time_zone)::date)
        loop
            d := with_change_of(r, d, a, v_now);
        end loop;
    end if;
    d.outcome := 'OK';
    return d;
end
$$;

-- Make two records of one person one: `keep` gets the appointments of `patient`, and what it does not know itself. The
-- merged record stays as another name of the kept one.
create or replace function merge_patients(r request) returns decision language plpgsql as $$
declare
    d decision;
    v_kept patient;
    v_merged patient;
    v_clash record;
    a appointment;
    v_now timestamptz := moment();
begin
    perform from patient where id in (r.keep, r.patient) order by id for update;
    select * into v_kept from patient where id = r.keep;
    if not found then return refused('PATIENT_NOT_FOUND', r.keep); end if;
    select * into v_merged from patient where id = r.patient;
    if not found then return refused('PATIENT_NOT_FOUND', r.patient); end if;
    if v_kept.id = v_merged.id then return refused('SAME_PATIENT', v_kept.id); end if;

    select k.id, k.date, (k.doctor_id, k.date) = (m.doctor_id, m.date) as same_day into v_clash
    from appointment m
    join appointment k on k.patient_id = v_kept.id and is_live(k.state)
     and ((k.doctor_id, k.date) = (m.doctor_id, m.date)
          or k.start_time is not null and m.start_time is not null
             and tstzrange(k.start_time, k.end_time) && tstzrange(m.start_time, m.end_time))
    where m.patient_id = v_merged.id and is_live(m.state)
    order by same_day desc, k.date, k.id limit 1;
    if found then
        return refused_for(r, case when v_clash.same_day then 'DUPLICATE_BOOKING' else 'PATIENT_OVERLAP' end,
                           v_clash.id, v_clash.date);
    end if;

    for a in
        update appointment x set patient_id = v_kept.id, version = x.version + 1, update_time = v_now
        where x.patient_id = v_merged.id returning x.*
    loop
        if is_live(a.state) then
            d := with_change_of(r, d, a, v_now);
        end if;
    end loop;

    perform merge_holds(r, v_merged.id, v_kept.id, v_now);

    update patient set merged_into = v_kept.id, version = version + 1, update_time = v_now
    where id = v_merged.id or merged_into = v_merged.id;
    -- If both have a user, each keeps his: the merged record's id stands for the kept one.
    with moved as (
        update user_account u set patient_id = v_kept.id, version = u.version + 1, update_time = v_now
        where u.patient_id = v_merged.id
          and not exists (select from user_account o where o.patient_id = v_kept.id)
        returning u.id),
    logged as (
        insert into log (id, time, actor, method, address, trace_id, type, resource, patient_id, data)
        select log_id(v_now), v_now, r.actor, r.verb, coalesce(r.address, ''), coalesce(r.trace_id, ''),
               'user.patient_linked', 'users/' || id, v_kept.id, '{"fields": "patient_id"}' from moved)
    insert into access_change (subject) select 'users/' || id from moved on conflict do nothing;
    perform write_words(v_merged.id, '');
    update patient k
    set phone = case when k.phone = '' and not exists (
                    select from patient o
                    where o.phone = v_merged.phone and o.phone <> '' and o.name_key = k.name_key and o.merged_into is null)
                then v_merged.phone else k.phone end,
        birth_date = case when starts_with(v_merged.birth_date, k.birth_date) then v_merged.birth_date
                     else k.birth_date end,
        gender = case when k.gender in ('UNSPECIFIED', 'UNKNOWN') then v_merged.gender else k.gender end,
        email = coalesce(nullif(k.email, ''), v_merged.email),
        blood_group = coalesce(nullif(k.blood_group, ''), v_merged.blood_group),
        allergies = k.allergies || array(select x from unnest(v_merged.allergies) x where x <> all (k.allergies)),
        emergency_name = case when k.emergency_name || k.emergency_phone = '' then v_merged.emergency_name
                         else k.emergency_name end,
        emergency_phone = case when k.emergency_name || k.emergency_phone = '' then v_merged.emergency_phone
                          else k.emergency_phone end,
        insurances = k.insurances || added.insurances,
        insurance_keys = k.insurance_keys || added.keys,
        -- Past both, so that no etag of either record is one of this.
        version = greatest(k.version, v_merged.version) + 1,
        update_time = v_now
    from (select coalesce(jsonb_agg(i) filter (where i is not null), '[]') as insurances,
                 array(select key from unnest(v_merged.insurance_keys) key
                       where not exists (select from unnest(v_kept.insurance_keys) o where left(o, 2) = left(key, 2)))
                 as keys
          from jsonb_array_elements(v_merged.insurances) i
          where not exists (select from jsonb_array_elements(v_kept.insurances) o where o ->> 'country' = i ->> 'country')
         ) added
    where k.id = v_kept.id
    returning k into d.patient;
    perform merge_waitlist(r, v_merged.id, v_kept.id, v_now);
    perform append_change(r, 'patient.merged', v_kept.id, null, v_now,
                          jsonb_build_object('merged_patient_id', v_merged.id));
    d.outcome := 'OK';
    return d;
end
$$;

-- Whether each of these words begins a word of the patient's name.
create or replace function has_words(p_patient uuid, p_words text[]) returns boolean language sql stable as $$
    select not exists (
        select from unnest(p_words) q
        where not exists (
            select from patient_word w
            where w.patient_id = p_patient and w.word >= q collate "C" and w.word < q || U&'\+10FFFF' collate "C"))
$$;

-- The patients who have all these words, of which none begins another: by the word of theirs that the rarest one begins,
-- then by id, each patient once. The next page begins after a word and an id.
--
-- In the order of the index, so the cost is that of a page however many patients there are. Several words are looked for
-- among the patients of the rarest one.
create or replace function search_patients(p_words text[], p_after_word text, p_after_id uuid, p_size integer)
returns table (word text, patient patient) language plpgsql stable rows 50
    set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    v_words text[] := p_words;
    v_first text collate "C";
    v_last text collate "C";
    v_second text collate "C";
    v_second_last text collate "C";
begin
    if cardinality(p_words) > 1 then
        v_words := array(
            select q from unnest(p_words) q
            -- A later page goes on with the word that the first one began with.
            order by starts_with(p_after_word, q) desc,
                     (select count(*) from (select from patient_word w
                                            where w.word >= q collate "C" and w.word < q || U&'\+10FFFF' collate "C"
                                            limit 5000) few),
                     q);
    end if;
    v_first := v_words[1];
    v_last := v_first || U&'\+10FFFF';
    v_second := coalesce(v_words[2], v_first);
    v_second_last := v_second || U&'\+10FFFF';
    return query
        select w.word, p from patient_word w join patient p on p.id = w.patient_id
        where (w.word, w.patient_id) > (coalesce(p_after_word collate "C", v_first),
                                        coalesce(p_after_id, '00000000-0000-0000-0000-000000000000'))
          and w.word < v_last
          and not exists (
              select from patient_word o where o.patient_id = w.patient_id and o.word >= v_first and o.word < w.word)
          -- Most patients without all of the words lack the second one, and this is the cheaper way to see it.
          and exists (
              select from patient_word o
              where o.patient_id = w.patient_id and o.word >= v_second and o.word < v_second_last offset 0)
          and (cardinality(v_words) <= 2 or has_words(w.patient_id, v_words[3:]))
        order by w.word, w.patient_id limit p_size;
end
$$;
