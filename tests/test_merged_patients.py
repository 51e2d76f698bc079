"""Two records of one person become one, and a corrected name reaches every board."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import appointment_pb2, queue_pb2
from clinic.frontdesk.v1 import patient_pb2 as pb
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, reason_of, refusal, soon, today, tomorrow
from tests.hostile.methods import call, request_class
from tests.hostile.wire import serving

NOBODY = "0190a0b0-1111-7222-8333-444455556666"


async def merge(front: Front, keep: str, other: str, key: str = "") -> pb.MergePatientsResponse:
    request = pb.MergePatientsRequest(keep_patient_id=keep, merge_patient_id=other, idempotency_key=key)
    return await front.patients.MergePatients(request)


async def get(front: Front, patient_id: str) -> pb.Patient:
    return (await front.patients.GetPatient(pb.GetPatientRequest(patient_id=patient_id))).patient


async def update(front: Front, patient_id: str, **fields: Any) -> pb.Patient:
    request = pb.UpdatePatientRequest(patient=pb.Patient(id=patient_id, **fields))
    return (await front.patients.UpdatePatient(request)).patient


async def appointments(front: Front, patient_id: str) -> list[str]:
    request = appointment_pb2.ListAppointmentsRequest(patient_id=patient_id)
    answer = await front.appointments.ListAppointments(request)
    assert {each.patient_id for each in answer.appointments} <= {(await get(front, patient_id)).id}
    return sorted(each.id for each in answer.appointments)


@asynccontextmanager
async def watching(front: Front, doctor_id: str) -> AsyncIterator[Any]:
    """A stream of the doctor's queue of today, after its first message."""
    stream = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor_id))
    await stream.read()
    try:
        yield stream
    finally:
        stream.cancel()


async def update_to(stream: Any, revision: int) -> queue_pb2.WatchQueueResponse:
    """The message of the stream that reaches this revision."""
    async with asyncio.timeout(20):
        while (message := await stream.read()).revision < revision:
            pass
    assert message.revision == revision
    return message  # type: ignore[no-any-return]


async def test_a_corrected_name_is_a_revision(front: Front, conninfo: str, settings: Settings) -> None:
    """The boards of two workers show one name at one revision, and it is the one that GetQueue answers."""
    doctor, other = await front.doctor(), await front.doctor()
    waiting = await front.arrive(doctor.id, given_name="Jon", family_name="Doe")
    patient_id = waiting.appointment.patient_id
    seen = await front.check_in((await front.book(patient_id, other.id)).appointment.id)
    await front.call_next(other.id)
    await front.book(patient_id, (later := await front.doctor()).id, tomorrow())
    expected = await front.doctor()
    await front.book(patient_id, expected.id)
    async with (
        serving(settings, conninfo) as (_, beside),
        watching(front, doctor.id) as one,
        watching(beside, doctor.id) as two,
        watching(beside, other.id) as three,
    ):
        changed = await update(front, patient_id, given_name="John")
        assert changed.given_name == "John"
        for stream, day, before in ((one, doctor, waiting), (two, doctor, waiting), (three, other, seen)):
            queue = await front.queue(day.id)
            assert [entry.patient_name for entry in queue.entries] == ["John Doe"]
            message = await update_to(stream, queue.revision)
            assert message.update.queue == queue
            (change,) = message.update.changes
            assert (change.kind, change.appointment_id) == (
                queue_pb2.QueueChange.KIND_UPDATED,
                before.appointment.id,
            )
            assert change.entry == queue.entries[0]
    # Who waits for the patient today is told as well; another day is not touched.
    assert (await front.queue(expected.id)).revision == 3
    assert front.sql("select type, queue_state from log where doctor_id = %s and revision = 3", expected.id) == [
        ("appointment.updated", None)
    ]
    assert (await front.queue(later.id, tomorrow())).revision == 2


async def test_what_is_no_new_name_is_no_revision(front: Front) -> None:
    """Another change of the record, the same name again and a refused change leave the queue as it is."""
    doctor = await front.doctor()
    entry = await front.arrive(doctor.id, given_name="Jon")
    patient_id = entry.appointment.patient_id
    await update(front, patient_id, email="jon@example.org")
    await update(front, patient_id, given_name="Jon")
    stale = pb.UpdatePatientRequest(patient=pb.Patient(id=patient_id, given_name="John"), etag="99")
    assert await outcome(front.patients.UpdatePatient(stale)) == "ETAG_MISMATCH"
    assert (await front.queue(doctor.id)).revision == entry.revision
    # A spelling that compares alike is shown as well.
    await update(front, patient_id, given_name="JON")
    assert (await front.queue(doctor.id)).entries[0].patient_name == "JON"
    left = queue_pb2.LeaveQueueRequest(appointment_id=entry.appointment.id)
    gone = await front.queues.LeaveQueue(left)
    await update(front, patient_id, given_name="John")
    assert (await front.queue(doctor.id)).revision == gone.revision


async def test_a_name_changes_once_for_a_key(front: Front) -> None:
    """A replayed correction makes no second revision."""
    doctor = await front.doctor()
    entry = await front.arrive(doctor.id, given_name="Jon")
    request = pb.UpdatePatientRequest(
        patient=pb.Patient(id=entry.appointment.patient_id, given_name="John"), idempotency_key="k"
    )
    answers = await asyncio.gather(*(front.patients.UpdatePatient(request) for _ in range(20)))
    assert Counter(answer.replayed for answer in answers) == {True: 19, False: 1}
    assert (await front.queue(doctor.id)).revision == entry.revision + 1


async def test_a_name_that_changes_while_the_queue_moves(front: Front) -> None:
    """The last change of an entry that watchers are told of is what it is, whatever happened at the same time."""
    doctor = await front.doctor(max_patients_per_day=100)
    for n in range(12):
        entry = await front.arrive(doctor.id)
        patient_id, appointment_id = entry.appointment.patient_id, entry.appointment.id
        other = await front.patient()
        for verb in ("ParkPatient", "ReturnToLine", "StartAppointment", "CompleteAppointment"):
            calls = [call(front, verb, request_class(verb)(appointment_id=appointment_id))]
            calls += [update(front, patient_id, given_name=f"{n} {verb} {m}") for m in range(6)]
            if verb == "ReturnToLine":
                calls.append(merge(front, other.id, patient_id))
            await asyncio.gather(*calls)
            told = front.sql(
                "select queue_state from log where revision > 0 and appointment_id = %s order by revision desc limit 1",
                appointment_id,
            )
            assert told == front.sql("select queue_state from appointment where id = %s", appointment_id)
    revisions = front.sql("select revision from log where revision > 0 and doctor_id = %s order by 1", doctor.id)
    assert revisions == [(revision,) for revision in range(2, len(revisions) + 2)]
    assert (await front.queue(doctor.id)).revision == len(revisions) + 1


async def test_a_name_that_changes_during_check_in(front: Front, conninfo: str, settings: Settings) -> None:
    """Whoever watches, a revision shows one queue, also if the patient comes while the name is corrected."""
    doctor = await front.doctor(max_patients_per_day=200)
    shown: dict[int, list[queue_pb2.Queue]] = {}
    people = await front.people(40)
    booked = [(await front.book(person.id, doctor.id)).appointment.id for person in people]

    async def watch(desk: Front) -> None:
        seen = 0
        async with watching(desk, doctor.id) as stream:
            while seen < last:
                message = await stream.read()
                seen = message.revision
                shown.setdefault(seen, []).append(message.update.queue)

    last = 2**63
    async with serving(settings, conninfo) as (_, beside):
        watches = [asyncio.create_task(watch(desk)) for desk in (front, beside)]
        for person, appointment_id in zip(people, booked, strict=True):
            renamed = [update(desk, person.id, family_name=f"Of {n}") for n, desk in enumerate((front, beside))]
            await asyncio.gather(front.check_in(appointment_id), *renamed)
            queue = await front.queue(doctor.id)
            shown.setdefault(queue.revision, []).append(queue)
        last = (await front.queue(doctor.id)).revision + 1
        await update(front, people[0].id, family_name="Of all")
        await asyncio.wait_for(asyncio.gather(*watches), 20)
    assert [revision for revision, queues in shown.items() if any(queue != queues[0] for queue in queues)] == []


async def test_everything_moves_to_the_kept_record(front: Front) -> None:
    """Appointments and history move; the merged id answers with the kept record wherever an id is taken."""
    doctor = await front.doctor()
    kept = await front.patient(given_name="Ana", family_name="Lima")
    merged = await front.patient(given_name="Anna", family_name="Lima", email="ana@example.org")
    mine = (await front.book(kept.id, doctor.id, tomorrow())).appointment
    past = (await front.book(merged.id, doctor.id)).appointment
    await front.cancel(past.id)
    live = (await front.book(merged.id, doctor.id)).appointment
    answer = await merge(front, kept.id, merged.id)
    assert not answer.replayed
    assert answer.patient.id == kept.id
    assert (answer.patient.given_name, answer.patient.email) == ("Ana", "ana@example.org")
    assert answer.patient.etag not in (kept.etag, merged.etag)

    assert await get(front, merged.id) == await get(front, kept.id) == answer.patient
    everything = sorted((mine.id, past.id, live.id))
    assert await appointments(front, kept.id) == await appointments(front, merged.id) == everything
    moved = await front.appointment(live.id)
    assert (moved.patient_id, moved.number, moved.etag != live.etag) == (kept.id, live.number, True)
    # The merged id is never listed, and works on.
    found = await front.patients.ListPatients(pb.ListPatientsRequest(phone=kept.phone))
    assert [each.id for each in found.patients] == [kept.id]
    for text in ("anna", "lima"):
        found = await front.patients.ListPatients(pb.ListPatientsRequest(name_prefix=text))
        assert [each.id for each in found.patients] == ([] if text == "anna" else [kept.id])
    booked = (await front.book(merged.id, (await front.doctor()).id)).appointment
    assert booked.patient_id == kept.id
    assert await outcome(front.book(merged.id, doctor.id)) == "DUPLICATE_BOOKING"
    checked_in = await front.check_in(live.id, patient_id=merged.id)
    assert (checked_in.entry.patient_id, checked_in.entry.patient_name) == (kept.id, "Ana Lima")
    stranger = await front.patient()
    assert await outcome(front.check_in(booked.id, patient_id=stranger.id)) == "PATIENT_MISMATCH"
    renamed = await update(front, merged.id, family_name="Lima Sá")
    assert (renamed.id, renamed.given_name, renamed.family_name) == (kept.id, "Ana", "Lima Sá")
    assert (await front.queue(doctor.id)).entries[0].patient_name == "Ana Lima Sá"


async def test_the_merged_name_is_remembered(front: Front) -> None:
    """Who registers under the merged record's name and phone is the kept person, unless the birth date contradicts."""
    kept = await front.patient(given_name="Ana", phone="+5511987654321")
    merged = await front.patient(given_name="Anna", phone="+442079460958", birth_date=Date(year=1980, month=5, day=5))
    answer = await merge(front, kept.id, merged.id)
    assert answer.patient.birth_date == Date(year=1980, month=5, day=5)

    async def registered(**fields: Any) -> str:
        return (await front.patient(given_name="anna", phone="+442079460958", **fields)).id

    assert await registered() == await registered(birth_date=Date(year=1980)) == kept.id
    other = await registered(birth_date=Date(year=1999))
    assert other not in (kept.id, merged.id)
    assert await outcome(registered()) == "PATIENT_AMBIGUOUS"
    assert await outcome(update(front, other, birth_date=Date(year=1980))) == "PATIENT_EXISTS"


async def test_what_the_kept_record_lacks(front: Front) -> None:
    """The kept record keeps what it has and takes what it lacks."""
    insured = [pb.Insurance(country="PE", number="00123"), pb.Insurance(country="BR", number="7-7")]
    kept = await front.patient(
        given_name="Ana",
        phone="",
        birth_date=Date(year=1980),
        allergies=["nuts"],
        insurances=insured[:1],
        blood_group="A+",
    )
    merged = await front.patient(
        given_name="Anna",
        birth_date=Date(year=1980, month=5),
        gender=pb.GENDER_FEMALE,
        blood_group="O-",
        allergies=["nuts", "dust"],
        emergency_contact=pb.EmergencyContact(name="Luis"),
        insurances=[pb.Insurance(country="PE", number="99999"), insured[1]],
    )
    made = (await merge(front, kept.id, merged.id)).patient
    assert (made.given_name, made.phone, made.gender, made.blood_group) == (
        "Ana", merged.phone, pb.GENDER_FEMALE, "A+",
    )  # fmt: skip
    assert made.birth_date == Date(year=1980, month=5)
    assert (list(made.allergies), list(made.insurances)) == (["nuts", "dust"], insured)
    assert made.emergency_contact == merged.emergency_contact
    found = await front.patients.ListPatients(pb.ListPatientsRequest(insurance=pb.Insurance(country="BR", number="77")))
    assert list(found.patients) == [made]


async def test_a_phone_that_would_make_a_second_record_is_not_taken(front: Front) -> None:
    """The kept record does not take a phone under which its name is another patient's."""
    third = await front.patient(given_name="Ana", birth_date=Date(year=1999))
    kept = await front.patient(given_name="Ana", phone="")
    merged = await front.patient(given_name="Anna")
    assert merged.phone == third.phone
    assert (await merge(front, kept.id, merged.id)).patient.phone == ""


async def test_chains(front: Front) -> None:
    """A merged record that is merged again is followed, however long the chain is; none becomes two."""
    a, b, c, d = [each.id for each in await front.people(4)]
    doctor = await front.doctor()
    booked = (await front.book(a, doctor.id)).appointment
    assert (await merge(front, b, a)).patient.id == b
    # Of a merged record, the kept one is merged.
    assert (await merge(front, c, a)).patient.id == c
    assert (await merge(front, b, d)).patient.id == c
    for each in (a, b, c, d):
        assert (await get(front, each)).id == c
        assert await appointments(front, each) == [booked.id]
    assert front.sql("select count(*) from patient where merged_into = %s", c) == [(3,)]
    assert front.sql("select count(*) from patient_word where patient_id <> %s", c) == [(0,)]


async def test_a_record_is_not_merged_into_itself(front: Front) -> None:
    """One id twice is no request; two ids of one record are refused; unknown ids are not found."""
    a, b = [each.id for each in await front.people(2)]
    error = await refusal(merge(front, a, a))
    assert details(error)["BadRequest"].field_violations[0].field == "merge_patient_id"
    assert await outcome(merge(front, a, a.upper())) == "INVALID_FIELD"
    await merge(front, a, b)
    for keep, other in ((a, b), (b, a)):
        error = await refusal(merge(front, keep, other))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "SAME_PATIENT")
        assert details(error)["ErrorInfo"].metadata["patient_id"] == a
    for keep, other in ((a, NOBODY), (NOBODY, a)):
        error = await refusal(merge(front, keep, other))
        assert (error.code(), details(error)["ResourceInfo"].resource_name) == (grpc.StatusCode.NOT_FOUND, NOBODY)


async def test_bookings_that_collide(front: Front) -> None:
    """Live bookings of both on one doctor-day, or at one time, refuse the merge, and nothing moves."""
    doctor, other = await front.doctor(), await front.doctor()
    a, b = await front.people(2)
    free = (await front.book(b.id, other.id, tomorrow() + timedelta(days=1))).appointment
    mine = (await front.book_slot(a.id, (await front.slot(doctor.id, soon())).id)).appointment
    theirs = (await front.book_slot(b.id, (await front.slot(other.id, soon(1.25))).id)).appointment

    async def refused(reason: str, about: str) -> None:
        error = await refusal(merge(front, a.id, b.id, "k"))
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.ALREADY_EXISTS, reason)
        assert details(error)["ResourceInfo"].resource_name == about
        for patient in (a, b):
            assert await get(front, patient.id) == patient
        assert await appointments(front, b.id) == sorted((free.id, theirs.id))
        assert (await front.queue(other.id, tomorrow() + timedelta(days=1))).revision == 2

    await refused("PATIENT_OVERLAP", mine.id)
    await front.cancel(theirs.id)
    theirs = (await front.book(b.id, doctor.id, tomorrow())).appointment
    await front.cancel((await front.book_slot(a.id, (await front.slot(other.id, soon(3))).id)).appointment.id)
    error = await refusal(merge(front, a.id, b.id))
    assert (reason_of(error), details(error)["ResourceInfo"].resource_name) == ("DUPLICATE_BOOKING", mine.id)
    await front.cancel(mine.id)
    # A visit that has ended collides with nothing; the key of the refusals may act now.
    assert (await merge(front, a.id, b.id, "k")).patient.id == a.id
    assert len(await appointments(front, a.id)) == 5
    assert (await front.appointment(free.id)).patient_id == a.id
    assert (await front.queue(other.id, tomorrow() + timedelta(days=1))).revision == 3


async def test_watchers_see_the_merge(front: Front, conninfo: str, settings: Settings) -> None:
    """Each live appointment that moves is a revision of its doctor-day; boards of all workers show the kept person."""
    doctor = await front.doctor()
    ahead = await front.doctor()
    kept = await front.patient(given_name="Ana")
    entry = await front.arrive(doctor.id, given_name="Anna")
    merged_id = entry.appointment.patient_id
    later = (await front.book(merged_id, ahead.id)).appointment
    async with (
        serving(settings, conninfo) as (_, beside),
        watching(front, doctor.id) as one,
        watching(beside, doctor.id) as two,
        watching(beside, ahead.id) as three,
    ):
        await merge(front, kept.id, merged_id)
        queue = await front.queue(doctor.id)
        assert queue.revision == entry.revision + 1
        assert [(each.patient_id, each.patient_name) for each in queue.entries] == [(kept.id, "Ana")]
        for stream in (one, two):
            message = await update_to(stream, queue.revision)
            assert message.update.queue == queue
            assert message.update.changes[0].entry == queue.entries[0]
        message = await update_to(three, 3)
        (change,) = message.update.changes
        assert (change.kind, change.appointment_id) == (queue_pb2.QueueChange.KIND_UPDATED, later.id)
        assert not change.HasField("entry")


async def test_a_merge_is_made_once(front: Front) -> None:
    """Twins of a merge act once and answer alike, also when the kept record was merged later."""
    a, b, c = [each.id for each in await front.people(3)]
    answers = await asyncio.gather(*(merge(front, a, b, "k") for _ in range(30)))
    assert Counter(answer.replayed for answer in answers) == {True: 29, False: 1}
    assert len({answer.patient.etag for answer in answers}) == 1
    assert await outcome(merge(front, a, c, "k")) == "IDEMPOTENCY_KEY_REUSED"
    await merge(front, c, a)
    replay = await merge(front, a, b, "k")
    assert (replay.replayed, replay.patient.id) == (True, c)


async def test_opposing_merges_lose_nobody(front: Front) -> None:
    """Merges in all directions at once end with one record that has everybody's appointments."""
    doctors = [await front.doctor(max_patients_per_day=50) for _ in range(6)]
    people = [each.id for each in await front.people(6)]
    booked = [
        (await front.book(person, doctor.id)).appointment.id for person, doctor in zip(people, doctors, strict=True)
    ]
    pairs = [(a, b) for a in people for b in people if a != b]
    answers = Counter(await asyncio.gather(*(outcome(merge(front, keep, other)) for keep, other in pairs)))
    assert answers.keys() <= {"OK", "SAME_PATIENT", "CONFLICT"}
    roots = {(await get(front, person)).id for person in people}
    while len(roots) > 1:
        await merge(front, *sorted(roots)[:2])
        roots = {(await get(front, person)).id for person in people}
    assert front.sql("select count(*) from patient where merged_into is null") == [(1,)]
    for person in people:
        assert await appointments(front, person) == sorted(booked)
    for doctor in doctors:
        events = front.sql("select revision from log where revision > 0 and doctor_id = %s order by 1", doctor.id)
        assert [revision for (revision,) in events] == list(range(2, len(events) + 2))


async def test_two_who_merge_each_other(front: Front) -> None:
    """Of two opposing merges one acts, and the other finds that it is done."""
    for _ in range(10):
        a, b = [each.id for each in await front.people(2)]
        answers = await asyncio.gather(outcome(merge(front, a, b)), outcome(merge(front, b, a)))
        assert sorted(answers) == ["OK", "SAME_PATIENT"]
        assert (await get(front, a)).id == (await get(front, b)).id


async def test_bookings_while_records_are_merged(front: Front) -> None:
    """No booking, check-in, correction or registration is lost beside a merge: all of them are the kept patient's."""
    doctors = [await front.doctor() for _ in range(12)]
    for hour in range(4):
        a, b = await front.people(2)
        early = [(await front.book(b.id, doctor.id, tomorrow())).appointment.id for doctor in doctors[:3]]
        ahead = [await front.slot(doctor.id, soon(2 + hour + 0.01 * n)) for n, doctor in enumerate(doctors)]
        today_booked = (await front.book(b.id, doctors[0].id)).appointment.id
        calls: list[Awaitable[str]] = [outcome(merge(front, a.id, b.id))]
        calls += [outcome(front.book(b.id, doctor.id)) for doctor in doctors[3:]]
        calls += [outcome(front.book_slot(b.id, ahead[n].id)) for n in (3, 7, 11)]
        calls += [outcome(front.check_in(today_booked, patient_id=b.id)), outcome(front.cancel(early[0]))]
        calls += [outcome(update(front, b.id, family_name="New")), outcome(front.patient(given_name=b.given_name))]
        answers = await asyncio.gather(*calls)
        assert set(answers) <= {"OK", "PATIENT_OVERLAP"}, answers
        assert front.sql("select count(*) from appointment where patient_id = %s", b.id) == [(0,)]
        assert len(await appointments(front, b.id)) == len(await appointments(front, a.id)) >= 12
        for doctor in doctors[3:]:
            await front.cancel(front.sql(
                "select id::text from appointment where doctor_id = %s and date = %s and state = 'BOOKED'",
                doctor.id, today(),
            )[0][0])  # fmt: skip


async def test_collisions_that_begin_beside_a_merge(front: Front) -> None:
    """A booking for one record and the merge with the other never leave two live bookings on a doctor-day."""
    for _ in range(10):
        doctor = await front.doctor()
        a, b = [each.id for each in await front.people(2)]
        await front.book(b, doctor.id)
        booking, merging = await asyncio.gather(outcome(front.book(a, doctor.id)), outcome(merge(front, a, b)))
        assert (booking, merging) in (("OK", "DUPLICATE_BOOKING"), ("DUPLICATE_BOOKING", "OK"))
