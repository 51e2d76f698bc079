-- The frame of every decision: lock, recall the key, look again, act, remember, answer.
--
-- Several callers may ask at once, each answered as if it had come alone, in the same order: the worker sends together
-- what arrived while it waited for the last answer, so that one round trip, one commit and one flush serve all of them.
-- All locks of all requests are taken first, by the one plan that everybody keeps: taken request by request, two batches
-- could wait for each other.
--
-- The functions that decide keep one plan for every call (plan_cache_mode): planning anew each time was the largest cost
-- of a booking. A kept plan may have been made while the tables were empty, when reading a whole table looks cheap, and
-- it stays until the next ANALYZE; so they may not (enable_seqscan). Everything that they look for has an index.
create or replace function decide(p_requests json) returns setof decision language plpgsql
    set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare
    v_requests request[];
    v_refused decision[];
    r request;
    v_old appointment;
    v_entry waitlist_entry;
    v_locks text[] := '{}';
    d decision;
begin
    v_requests := array(select locate(q) from json_populate_recordset(null::request, p_requests) q);
    if cardinality(v_requests) > 1 then
        -- Nobody waits long because another one's doctor-day is held: the worker asks again for each alone.
        perform set_config('lock_timeout', '100ms', true);
    end if;
    for n in 1 .. cardinality(v_requests) loop
        r := v_requests[n];
        if r.restricted then
            -- Else somebody could tell by the wait for a lock that there is such a thing.
            v_refused[n] := access_refusal(r, (select a from appointment a where a.id = r.appointment));
        end if;
        if (v_refused[n]).outcome is null then
            v_locks := v_locks || lock_names(r);
        end if;
    end loop;
    perform lock_all(v_locks);

    for n in 1 .. cardinality(v_requests) loop
        r := v_requests[n];
        d := v_refused[n];
        if d.outcome is not null then
            return next d;
            continue;
        end if;
        v_old := null;
        if r.appointment is not null then
            -- Its own statement, so it sees what was committed while we waited for the lock.
            select * into v_old from appointment where id = r.appointment;
        end if;
        if r.entry is not null then
            select * into v_entry from waitlist_entry where id = r.entry;
            if v_entry.patient_id is distinct from r.patient then
                raise exception 'the patient was merged meanwhile' using errcode = 'serialization_failure';
            end if;
        end if;
        if r.locks is not null then
            v_locks := r.locks;
            r := locate(r);
            if not r.locks <@ v_locks then
                raise exception 'the patient was changed meanwhile' using errcode = 'serialization_failure';
            end if;
        end if;
        if r.restricted then
            -- Again, of what is true under the locks. Before the key: a replay too is only for those who may see it.
            d := access_refusal(r, v_old);
        end if;
        if d.outcome is null and r.key <> '' then
            d := recall(r);
        end if;
        if d.outcome is null and r.appointment is not null then
            if v_old.id is null then
                d := refused('APPOINTMENT_NOT_FOUND', r.appointment);
            elsif (v_old.doctor_id, v_old.date, v_old.patient_id) <> (r.from_doctor, r.from_date, r.from_patient) then
                raise exception 'the appointment was moved meanwhile' using errcode = 'serialization_failure';
            elsif r.version <> v_old.version then
                d := refused('ETAG_MISMATCH', v_old.id);
            end if;
        end if;
        if d.outcome is null and r.entry is not null and v_entry.id is null then
            d := refused('WAITLIST_ENTRY_NOT_FOUND', r.entry);
        end if;
        if d.outcome is null then
            d := case r.verb
                when 'BookAppointment' then book(r)
                when 'RescheduleAppointment' then reschedule(r, v_old)
                when 'HoldPlace' then hold_place(r)
                when 'ReleaseHold' then release_hold(r)
                when 'JoinWaitlist' then join_waitlist(r)
                when 'LeaveWaitlist' then leave_waitlist(r, v_entry)
                when 'OfferPlace' then offer_place(r, v_entry)
                when 'AcceptOffer' then accept_offer(r, v_entry, v_old)
                when 'DeclineOffer' then decline_offer(r, v_entry)
                when 'UpdateAppointment' then update_appointment(r, v_old)
                when 'CallNext' then call_next(r)
                when 'AddWalkIn' then add_walk_in(r)
                when 'TransferPatient' then transfer(r, v_old)
                when 'UndoTransition' then undo(r, v_old)
                when 'SetDoctorAvailability' then set_availability(r)
                when 'SetWeeklySchedule' then set_schedule(r)
                when 'SetScheduleException' then set_exception(r)
                when 'DeleteScheduleException' then delete_exception(r)
                when 'GenerateSlots' then generate_slots(r)
                when 'CreateSlot' then create_slots(r)
                when 'BatchCreateSlots' then create_slots(r)
                when 'UpdateSlot' then update_slot(r)
                when 'BlockSlots' then set_slots_state(r)
                when 'ReleaseSlots' then set_slots_state(r)
                when 'DeleteSlot' then delete_slot(r)
                when 'RegisterPatient' then register_patient(r)
                when 'UpdatePatient' then update_patient(r)
                when 'MergePatients' then merge_patients(r)
                else change_visit(r, v_old)
            end;
            if r.key <> '' and d.outcome = 'OK' and r.validate_only is not true then
                perform remember(r, d);
            end if;
        end if;
        if (d.appointment).queue_state is not null
           or d.patient_name is null and (d.appointment).patient_id is not null then
            d := as_answered(d);
        end if;
        return next d;
    end loop;
end
$$;
