"""Bad input, faults and attacks, over the wire against real servers. Each case lists the tests of its answer.

 1 garbage, truncation, bad UTF-8, deep nesting: test_garbage test_truncated_requests test_text_that_is_not_utf8
 2 messages over the limit: test_messages_over_the_limit test_a_message_at_the_limit test_compression_that_is_none
 3 metadata over the limit: test_metadata_over_the_limit test_metadata_that_unpacks
 4 calls without their message: test_calls_without_a_message test_age_ends_calls_without_a_message
 5 deadlines: test_deadlines_that_are_none test_the_servers_own_limit
 6 unknown methods: test_unknown_methods test_streams_called_as_unary_calls
 7 pings and resets: test_ping_flood test_rapid_resets test_garbage_instead_of_http2
 8 admission: test_admission test_too_many_watchers
 9 NUL: test_nul_in_every_string
10 long text, odd characters: test_text_that_is_too_long test_one_character_too_many test_names_are_lines
   test_control_and_bidirectional_characters test_lists_of_a_megabyte test_one_element_too_many
   test_fields_without_end test_at_most_twenty_violations
11 insured numbers: test_insured_numbers
12 countries and enums: test_countries test_enums
13 timestamps: test_impossible_timestamps test_the_last_hours_of_the_year_9999
14 dates and slots: test_impossible_dates test_slots_end_on_their_day test_dates_at_the_ends_of_the_calendar
15 pages: test_negative_page_sizes test_forged_page_tokens test_page_tokens_of_another_filter
   test_page_tokens_of_another_identity
16 field masks: test_masks
17 ids: test_malformed_ids
18 phones: test_phones test_phone_of_another_country
19 zones: test_zones
20 idempotency keys: test_idempotency_keys
21 the same key, the same request: test_replays
22 the same key, another request: test_replays
23 the same key, another caller or method: test_twins
24 fifty twins: test_twins test_twins_whose_day_is_full
25 a retry after a refusal: test_refusals_are_not_stored test_a_trial_takes_no_key
26 killed between commit and answer: test_killed_between_commit_and_answer
27 the last places: test_the_last_places test_the_last_places_of_slots
28 a freed number: test_a_freed_number
29 two cancel: test_two_cancel
30 opposing reschedules: test_opposing_reschedules test_everyone_does_everything_at_once
31 a failed reschedule: test_a_failed_reschedule
32 a patient in two places: test_one_patient_in_two_places test_one_patient_in_two_places_at_once
33 two call the next: test_two_call_the_next
34 two hundred check in: test_two_hundred_check_in
35 the day of the clinic: test_today_is_the_clinics test_today_elsewhere test_a_day_late
36 clocks put forward and back: test_the_hour_that_comes_twice test_the_hour_that_does_not_come
37 an evening clinic: test_an_evening_clinic
38 an absent doctor: test_an_absent_doctor
39 a lowered maximum: test_a_lowered_maximum
40 leave over bookings: test_an_absent_doctor
41 a database that goes and comes: test_cut_connections test_a_real_restart test_a_database_that_is_away
   test_too_many_connections test_an_empty_pool test_a_restart_loses_nothing
42 a read-only primary: test_a_read_only_primary
43 conflicts: test_conflicts_are_retried test_conflicts_without_end test_a_real_deadlock
44 statements past the deadline: test_the_servers_own_limit test_the_callers_deadline
   test_the_limit_holds_for_those_who_wait_for_a_connection
45 backstops: test_backstops
46 the unforeseen: test_no_canary_gets_out test_what_is_said_is_heard
47 restless watchers: test_every_replay_equals_the_database test_two_servers_tell_the_same
48 readers that do not read: test_readers_that_never_read_take_a_bounded_memory test_a_reader_that_does_not_read
   test_a_watcher_too_slow test_idle_streams_take_little_memory
49 a stop with watchers: test_sigterm_tells_everyone test_a_stop_tells_everyone test_a_stream_that_has_come_of_age
   test_calls_in_flight_end_before_a_stop
50 all come back at once: test_everyone_comes_back_at_once

`python -m tests.hostile.beside` measures the effect of attackers on other clients. tests/fuzz has generated requests.
"""
