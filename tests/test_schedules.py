"""A doctor's hours: weekly schedules, exceptions on a date, and the slots that follow from both.

The clock of most tests stands at 08:00 UTC on a Monday.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from google.type.dayofweek_pb2 import FRIDAY, MONDAY, SATURDAY, SUNDAY, THURSDAY, TUESDAY, WEDNESDAY, DayOfWeek
from google.type.timeofday_pb2 import TimeOfDay

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, doctor_pb2, queue_pb2, slot_pb2
from clinic.frontdesk.v1 import schedule_pb2 as pb
from frontdesk.jobs import horizon
from frontdesk.settings import Settings
from tests.clinic import Clock, Front, day, details, outcome, reason_of, refusal
from tests.hostile.methods import named
from tests.hostile.wire import serving, working
from tests.identities import bearing, create_key, user
from tests.waiting import until

NOW = "2027-01-04 08:00+00"
TODAY = date(2027, 1, 4)
Skip = pb.SkippedVisit
EVERY_DAY = (MONDAY, TUESDAY, WEDNESDAY, THURSDAY, FRIDAY, SATURDAY, SUNDAY)


@pytest.fixture
async def desk(at: Clock) -> AsyncIterator[Front]:
    """A front desk on Monday, 2027-01-04, at 08:00 UTC."""
    async with at(NOW) as front:
        yield front


def on(days: int) -> date:
    """The date so many days from the clock's today."""
    return TODAY + timedelta(days)


def time_of(text: str) -> TimeOfDay:
    """The time of day that is written HH:MM."""
    hour, minute = text.split(":")
    return TimeOfDay(hours=int(hour), minutes=int(minute))


def fields_of(start: str, end: str, minutes: float = 30, capacity: int = 0) -> dict[str, Any]:
    """The fields of hours."""
    length = timedelta(minutes=minutes)
    return {"start": time_of(start), "end": time_of(end), "visit_length": length, "capacity": capacity}


def rule(weekday: "DayOfWeek.ValueType", *args: Any) -> pb.WeeklyRule:
    """Hours of a weekday."""
    return pb.WeeklyRule(weekday=weekday, **fields_of(*args))


def daily(*args: Any) -> list[pb.WeeklyRule]:
    """The same hours every day."""
    return [rule(weekday, *args) for weekday in EVERY_DAY]


def hours(*args: Any) -> pb.Hours:
    """Hours of a date."""
    return pb.Hours(**fields_of(*args))


async def set_week(
    front: Front, doctor_id: str, rules: Sequence[pb.WeeklyRule], first: date, last: date | None = None, **fields: Any
) -> pb.SetWeeklyScheduleResponse:
    """Set the doctor's weekly hours."""
    return await front.schedules.SetWeeklySchedule(
        pb.SetWeeklyScheduleRequest(
            doctor_id=doctor_id,
            rules=rules,
            effective_from=day(first),
            effective_until=day(last) if last else None,
            **fields,
        )
    )


async def schedules(front: Front, doctor_id: str) -> list[pb.Schedule]:
    """The doctor's schedules."""
    listed = await front.schedules.ListWeeklySchedules(pb.ListWeeklySchedulesRequest(doctor_id=doctor_id))
    return list(listed.schedules)


async def set_day(
    front: Front, doctor_id: str, when: date, *held: pb.Hours, **fields: Any
) -> pb.SetScheduleExceptionResponse:
    """Set an exception: these hours, or closed if there are none."""
    fields.setdefault("closed", not held)
    return await front.schedules.SetScheduleException(
        pb.SetScheduleExceptionRequest(doctor_id=doctor_id, date=day(when), hours=held, **fields)
    )


async def reset_day(front: Front, doctor_id: str, when: date, **fields: Any) -> pb.DeleteScheduleExceptionResponse:
    """Delete an exception."""
    return await front.schedules.DeleteScheduleException(
        pb.DeleteScheduleExceptionRequest(doctor_id=doctor_id, date=day(when), **fields)
    )


async def generate(
    front: Front, doctor_id: str, first: date, last: date | None = None, **fields: Any
) -> pb.GenerateSlotsResponse:
    """Generate the slots of the dates."""
    return await front.schedules.GenerateSlots(
        pb.GenerateSlotsRequest(doctor_id=doctor_id, from_date=day(first), to_date=day(last or first), **fields)
    )


async def days(front: Front, doctor_id: str, first: date, last: date | None = None) -> list[pb.DaySchedule]:
    """The doctor's days."""
    answer = await front.schedules.GetDoctorSchedule(
        pb.GetDoctorScheduleRequest(doctor_id=doctor_id, from_date=day(first), to_date=day(last or first))
    )
    return list(answer.days)


def moment(stamp: Any, zone: str = "UTC") -> str:
    """How the clock of the zone shows an instant, with its offset if that is not 0."""
    shown = stamp.ToDatetime(ZoneInfo("UTC")).astimezone(ZoneInfo(zone))
    offset = shown.strftime("%z")
    return str(shown.strftime("%H:%M") + (offset if zone != "UTC" else ""))


def starts(slots: Sequence[slot_pb2.Slot], zone: str = "UTC") -> list[str]:
    """When the slots start."""
    return [moment(slot.start_time, zone) for slot in slots]


def spans(slots: Sequence[slot_pb2.Slot]) -> list[str]:
    """When the slots start and end, in UTC."""
    return [f"{moment(slot.start_time)}-{moment(slot.end_time)}" for slot in slots]


def skips(answer: pb.GenerateSlotsResponse) -> list[tuple[str, str]]:
    """The skipped visits: start and reason."""
    return [
        (
            f"{one.start_time.hours:02}:{one.start_time.minutes:02}" if one.HasField("start_time") else "",
            Skip.Reason.Name(one.reason).removeprefix("REASON_"),
        )
        for one in answer.skipped
    ]


# Weekly schedules


async def test_a_schedule_is_stored(desk: Front) -> None:
    """Hours come back by weekday and start, with a capacity of 1 if none is given; an end of 24:00 stays one."""
    doctor = await desk.doctor("UTC")
    given = [rule(TUESDAY, "14:00", "24:00", 60), rule(MONDAY, "13:00", "18:00", 30, 2), rule(MONDAY, "08:00", "12:00")]
    answer = await set_week(desk, doctor.id, given, TODAY)
    ordered = [given[2], given[1], given[0]]
    ordered[0].capacity = ordered[2].capacity = 1
    assert list(answer.schedule.rules) == ordered
    assert answer.schedule.rules[2].end == TimeOfDay(hours=24)
    assert answer.schedule.effective_from == day(TODAY)
    assert not answer.schedule.HasField("effective_until")
    assert answer.schedule.id
    assert answer.schedule.etag
    assert await schedules(desk, doctor.id) == [answer.schedule]


async def test_hours_that_touch(desk: Front) -> None:
    """Hours may begin when others of the weekday end, and at any time of another weekday."""
    doctor = await desk.doctor("UTC")
    given = [rule(MONDAY, "08:00", "12:00"), rule(MONDAY, "12:00", "13:00"), rule(TUESDAY, "08:00", "12:00")]
    assert len((await set_week(desk, doctor.id, given, TODAY)).schedule.rules) == 3


async def test_no_hours(desk: Front) -> None:
    """A schedule without rules means that the doctor has no hours."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    await set_week(desk, doctor.id, [], on(1))
    assert (await generate(desk, doctor.id, on(1), on(8))).created_count == 0


def _without(name: str) -> pb.WeeklyRule:
    given = {"weekday": MONDAY, **fields_of("09:00", "12:00")}
    del given[name]
    return pb.WeeklyRule(**given)


@pytest.mark.parametrize(
    ("rules", "path"),
    [
        ([rule(MONDAY, "09:00", "12:00"), rule(MONDAY, "11:59", "13:00")], "rules"),
        ([rule(MONDAY, "11:00", "13:00"), rule(TUESDAY, "09:00", "12:00"), rule(MONDAY, "09:00", "14:00")], "rules"),
        ([rule(MONDAY, "12:00", "09:00")], "rules.end"),
        ([rule(MONDAY, "12:00", "12:00")], "rules.end"),
        ([rule(MONDAY, "24:00", "24:00")], "rules.end"),
        ([pb.WeeklyRule(**fields_of("09:00", "12:00"))], "rules.weekday"),
        ([pb.WeeklyRule(weekday=8, **fields_of("09:00", "12:00"))], "rules.weekday"),
        ([rule(MONDAY, "09:00", "25:00")], "rules.end"),
        ([rule(MONDAY, "09:00", "24:01")], "rules.end"),
        ([rule(MONDAY, "09:60", "12:00")], "rules.start"),
        ([rule(MONDAY, "-1:00", "12:00")], "rules.start"),
        ([_without("weekday")], "rules.weekday"),
        ([_without("start")], "rules.start"),
        ([_without("end")], "rules.end"),
        ([_without("visit_length")], "rules.visit_length"),
        ([rule(MONDAY, "09:00", "12:00", 0)], "rules.visit_length"),
        ([rule(MONDAY, "09:00", "12:00", -30)], "rules.visit_length"),
        ([rule(MONDAY, "09:00", "12:00", 1.5)], "rules.visit_length"),
        ([rule(MONDAY, "09:00", "12:00", 181)], "rules.visit_length"),
        ([rule(MONDAY, "00:00", "24:00", 1441)], "rules.visit_length"),
        ([rule(MONDAY, "09:00", "12:00", 30, -1)], "rules.capacity"),
        ([rule(MONDAY, "09:00", "12:00", 30, 1001)], "rules.capacity"),
        ([rule(MONDAY, "09:00", "12:00")] * 169, "rules"),
    ],
)
async def test_bad_rules(front: Front, rules: list[pb.WeeklyRule], path: str) -> None:
    """Rules that overlap, end before they start, name no weekday, hold no visit or are no times of day are refused."""
    error = await refusal(set_week(front, (await front.doctor()).id, rules, date(2100, 1, 1)))
    assert reason_of(error) == "INVALID_FIELD"
    assert set(named(error)) == {path}


async def test_times_are_whole_minutes(front: Front) -> None:
    """A time of day with seconds or parts of one is refused."""
    doctor = await front.doctor()
    for odd in (TimeOfDay(hours=9, seconds=1), TimeOfDay(hours=9, nanos=1), TimeOfDay(hours=24, nanos=1)):
        for field in ("start", "end"):
            bad = rule(MONDAY, "08:00", "12:00")
            getattr(bad, field).CopyFrom(odd)
            error = await refusal(set_week(front, doctor.id, [bad], date(2100, 1, 1)))
            assert named(error) == [f"rules.{field}"]


async def test_dates_of_a_schedule(desk: Front) -> None:
    """A schedule begins on a date, which is required, and does not end before it."""
    doctor = await desk.doctor("UTC")
    missing = pb.SetWeeklyScheduleRequest(doctor_id=doctor.id)
    assert named(await refusal(desk.schedules.SetWeeklySchedule(missing))) == ["effective_from"]
    assert named(await refusal(set_week(desk, doctor.id, [], on(2), on(1)))) == ["effective_until"]
    assert await outcome(set_week(desk, doctor.id, [], on(2), on(2))) == "OK"


async def test_past_days_keep_their_hours(desk: Front) -> None:
    """A schedule may begin today in the clinic's time zone, and not before."""
    kiritimati, pago = await desk.doctor("Pacific/Kiritimati"), await desk.doctor("Pacific/Pago_Pago")
    assert await outcome(set_week(desk, kiritimati.id, [], TODAY)) == "OK"
    assert await outcome(set_week(desk, kiritimati.id, [], on(-1))) == "DATE_IN_PAST"
    # There it is still Sunday.
    assert await outcome(set_week(desk, pago.id, [], on(-1))) == "OK"
    error = await refusal(set_week(desk, pago.id, [], on(-2)))
    assert reason_of(error) == "DATE_IN_PAST"
    assert details(error)["ErrorInfo"].metadata == {"doctor_id": pago.id, "date": "2027-01-02"}


async def test_unknown_doctor(front: Front) -> None:
    """Every method of the service tells an unknown doctor."""
    unknown, when = "00000000-0000-4000-8000-000000000000", date(2100, 1, 1)
    for call in (
        set_week(front, unknown, [], when),
        schedules(front, unknown),
        set_day(front, unknown, when),
        reset_day(front, unknown, when),
        front.schedules.ListScheduleExceptions(pb.ListScheduleExceptionsRequest(doctor_id=unknown)),
        generate(front, unknown, when),
        days(front, unknown, when),
    ):
        assert await outcome(call) == "DOCTOR_NOT_FOUND"


async def test_a_schedule_to_the_last_date(desk: Front) -> None:
    """A schedule that ends with the year 9999 replaces one without an end: nothing begins after it."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, [], on(1))
    answer = await set_week(desk, doctor.id, daily("09:00", "10:00"), on(1), date(9999, 12, 31))
    assert await schedules(desk, doctor.id) == [answer.schedule]


async def test_past_hours_are_still_shown(at: Clock) -> None:
    """After new hours the past dates have the hours that held on them."""
    async with at(NOW) as desk:
        doctor = await desk.doctor("UTC")
        await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    async with at("2027-01-06 08:00+00") as desk:
        await set_week(desk, doctor.id, daily("14:00", "15:00"), on(2))
        found = await days(desk, doctor.id, TODAY, on(3))
        assert [one.hours[0].start.hours for one in found] == [9, 9, 14, 14]


async def test_pages_of_schedules(desk: Front) -> None:
    """Schedules are listed by their first date, page by page."""
    doctor = await desk.doctor("UTC")
    for n in (6, 2, 4, 0):
        await set_week(desk, doctor.id, [], on(n), on(n + 1))
    request = pb.ListWeeklySchedulesRequest(doctor_id=doctor.id, page_size=3)
    first = await desk.schedules.ListWeeklySchedules(request)
    request.page_token = first.next_page_token
    rest = await desk.schedules.ListWeeklySchedules(request)
    pages = [[one.effective_from for one in page.schedules] for page in (first, rest)]
    assert pages == [[day(on(n)) for n in (0, 2, 4)], [day(on(6))]]
    assert not rest.next_page_token


async def test_who_may_set_hours(desk: Front) -> None:
    """The desk, services and the doctor set hours and leave, and generate slots; everybody with credentials reads."""
    doctor = await desk.doctor("UTC")
    colleague = await desk.doctor(clinic_id=doctor.clinic_id)
    away = (await desk.leave(doctor.id, on(40))).leave
    of: dict[str, Any] = {"doctor_id": doctor.id}
    dates: dict[str, Any] = {"from_date": day(on(1)), "to_date": day(on(1))}
    writes: dict[str, Any] = {
        "SetWeeklySchedule": pb.SetWeeklyScheduleRequest(**of, effective_from=day(on(1))),
        "SetScheduleException": pb.SetScheduleExceptionRequest(**of, date=day(on(1)), closed=True),
        "DeleteScheduleException": pb.DeleteScheduleExceptionRequest(**of, date=day(on(1))),
        "GenerateSlots": pb.GenerateSlotsRequest(**of, **dates),
        "CreateLeave": pb.CreateLeaveRequest(leave=pb.Leave(**of, days=pb.DateRange(**dates)), validate_only=True),
    }
    cancel = pb.CancelLeaveRequest(leave_id=away.id, etag="0")
    reads: dict[str, Any] = {
        "ListWeeklySchedules": pb.ListWeeklySchedulesRequest(**of),
        "ListScheduleExceptions": pb.ListScheduleExceptionsRequest(**of),
        "GetDoctorSchedule": pb.GetDoctorScheduleRequest(**of, **dates),
        "GetLeave": pb.GetLeaveRequest(leave_id=away.id),
        "ListLeaves": pb.ListLeavesRequest(**of),
    }
    for by, expected in (
        (user(desk, "STAFF", clinic_ids=[doctor.clinic_id]), "OK"),
        (user(desk, "ADMIN"), "OK"),
        (bearing((await create_key(desk, "SERVICE")).key), "OK"),
        (user(desk, "DOCTOR", doctor_id=doctor.id), "OK"),
        (user(desk, "DOCTOR", doctor_id=colleague.id), "ROLE_REQUIRED"),
        (user(desk, "STAFF", clinic_ids=[(await desk.clinic()).id]), "CLINIC_NOT_YOURS"),
        (user(desk, "PATIENT", patient_id=(await desk.patient()).id), "ROLE_REQUIRED"),
        (bearing((await create_key(desk, "BOARD")).key), "ROLE_REQUIRED"),
    ):
        for name, request in writes.items():
            assert await outcome(getattr(desk.schedules, name)(request, metadata=by)) == expected, name
        ended = "ETAG_MISMATCH" if expected == "OK" else expected
        assert await outcome(desk.schedules.CancelLeave(cancel, metadata=by)) == ended
        for name, request in reads.items():
            assert await outcome(getattr(desk.schedules, name)(request, metadata=by)) == "OK", name


@pytest.mark.parametrize(
    ("before", "new", "after"),
    [
        # Begins inside and has no end: what reaches in is cut.
        ([(0, None)], (10, None), [(0, 9), (10, None)]),
        # Nothing resumes after the end of the new one.
        ([(0, None)], (10, 19), [(0, 9), (10, 19)]),
        ([(0, 30)], (10, 19), [(0, 9), (10, 19)]),
        # What lies inside is replaced, to the day.
        ([(5, 9), (10, 19), (20, 24)], (10, 19), [(5, 9), (10, 19), (20, 24)]),
        ([(10, 12), (14, 19)], (10, 19), [(10, 19)]),
        # What reaches in from the end begins later.
        ([(15, 30)], (10, 19), [(10, 19), (20, 30)]),
        ([(19, None)], (10, 19), [(10, 19), (20, None)]),
        ([(10, None)], (10, 19), [(10, 19), (20, None)]),
        # Both sides at once.
        ([(0, 12), (13, 16), (17, None)], (10, 19), [(0, 9), (10, 19), (20, None)]),
        # Without an end it runs to the day before the next.
        ([(20, 29), (40, None)], (10, None), [(10, 19), (20, 29), (40, None)]),
        ([(10, 14), (20, None)], (10, None), [(10, 19), (20, None)]),
        ([(10, None)], (10, None), [(10, None)]),
        # Neighbours are left alone.
        ([(0, 9), (20, None)], (10, 19), [(0, 9), (10, 19), (20, None)]),
    ],
)
async def test_schedules_give_way(
    desk: Front,
    before: list[tuple[int, int | None]],
    new: tuple[int, int | None],
    after: list[tuple[int, int | None]],
) -> None:
    """A new schedule replaces what lies inside its dates, cuts what reaches in, and ends before the next one."""

    def dates(first: int, last: int | None) -> tuple[date, date | None]:
        return on(first), None if last is None else on(last)

    doctor = await desk.doctor("UTC")
    for one in before:
        await set_week(desk, doctor.id, [], *dates(*one))
    etags = {schedule.id: schedule.etag for schedule in await schedules(desk, doctor.id)}
    answer = await set_week(desk, doctor.id, daily("09:00", "10:00"), *dates(*new))
    found = await schedules(desk, doctor.id)
    assert [
        (
            (date(s.effective_from.year, s.effective_from.month, s.effective_from.day) - TODAY).days,
            (date(s.effective_until.year, s.effective_until.month, s.effective_until.day) - TODAY).days
            if s.HasField("effective_until")
            else None,
        )
        for s in found
    ] == after
    assert [s for s in found if s.rules] == [answer.schedule]
    # Those that were cut have another etag, the others their own.
    whole = {dates(*one)[0] for one in before if one in after}
    for s in found:
        if s.id in etags:
            first = date(s.effective_from.year, s.effective_from.month, s.effective_from.day)
            assert (s.etag == etags[s.id]) == (first in whole)


async def test_schedules_at_once(desk: Front) -> None:
    """Whatever is set at once, schedules of one doctor do not overlap."""
    doctor = await desk.doctor("UTC")
    dates = [(on(first), on(first + length)) for first, length in itertools.product(range(0, 20, 4), (2, 6, 11))]
    assert {await one for one in asyncio.as_completed([outcome(set_week(desk, doctor.id, [], *d)) for d in dates])} == {
        "OK"
    }
    ((overlapping,),) = desk.sql(
        "select count(*) from schedule a join schedule b on a.id < b.id and daterange(a.effective_from,"
        " a.effective_until, '[]') && daterange(b.effective_from, b.effective_until, '[]')"
    )
    assert overlapping == 0


async def test_stale_slots(desk: Front) -> None:
    """New hours name the open slots that the old ones had and they lack: none that is blocked or was made by hand."""
    doctor, other = await desk.doctor("UTC"), await desk.doctor("UTC")
    for one in (doctor, other):
        await set_week(desk, one.id, daily("09:00", "12:00", 60), TODAY)
        await generate(desk, one.id, TODAY, on(3))
    slots = (await generate(desk, doctor.id, TODAY, on(3))).slots
    by_start = {(slot.date.day, moment(slot.start_time)): slot.id for slot in slots}
    await desk.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[by_start[5, "09:00"]]))
    evening = await desk.slot(doctor.id, datetime(2027, 1, 5, 20, tzinfo=ZoneInfo("UTC")))
    answer = await set_week(desk, doctor.id, daily("10:00", "12:00", 60), on(1))
    assert list(answer.stale_slot_ids) == [by_start[6, "09:00"], by_start[7, "09:00"]]
    person = await desk.patient()
    assert await outcome(desk.book_slot(person.id, by_start[6, "09:00"])) == "OK"
    assert await outcome(desk.book_slot((await desk.patient()).id, evening.id)) == "OK"
    # Those of the days after it too, on which nothing resumes.
    answer = await set_week(desk, doctor.id, daily("10:00", "12:00", 120), on(2), on(2))
    assert list(answer.stale_slot_ids) == [by_start[n, at] for n in (6, 7) for at in ("10:00", "11:00")]


async def test_stale_slots_are_many(desk: Front) -> None:
    """New hours of a doctor who has thousands of slots are set within the time of a call, and name all of them."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("00:00", "24:00", 10), TODAY)
    slots = (await generate(desk, doctor.id, on(1), on(30))).slots
    assert len(slots) == 4320
    assert list((await set_week(desk, doctor.id, [], on(1))).stale_slot_ids) == [slot.id for slot in slots]


async def test_started_slots_are_not_stale(at: Clock) -> None:
    """A slot that has started cannot be booked any more, so new hours do not name it."""
    async with at(NOW) as desk:
        doctor = await desk.doctor("UTC")
        await set_week(desk, doctor.id, daily("09:00", "12:00", 60), TODAY)
        slots = (await generate(desk, doctor.id, TODAY)).slots
    async with at("2027-01-04 10:00+00") as desk:
        assert list((await set_week(desk, doctor.id, [], TODAY)).stale_slot_ids) == [slots[2].id]


# Exceptions


async def test_exactly_one_of_closed_and_hours(front: Front) -> None:
    """An exception closes the date or has hours: not both, and not neither."""
    doctor, when = await front.doctor(), date(2100, 1, 1)
    both = await refusal(set_day(front, doctor.id, when, hours("09:00", "12:00"), closed=True))
    neither = await refusal(set_day(front, doctor.id, when, closed=False))
    assert named(both) == named(neither) == ["hours"]


@pytest.mark.parametrize(
    ("held", "path"),
    [
        ([hours("09:00", "12:00"), hours("11:59", "13:00")], "hours"),
        ([hours("12:00", "09:00")], "hours.end"),
        ([hours("09:00", "25:00")], "hours.end"),
        ([hours("09:00", "12:00", 0)], "hours.visit_length"),
        ([hours("09:00", "12:00", 181)], "hours.visit_length"),
        ([hours("09:00", "12:00", 30, 1001)], "hours.capacity"),
        ([hours("09:00", "12:00")] * 49, "hours"),
    ],
)
async def test_bad_hours(front: Front, held: list[pb.Hours], path: str) -> None:
    """The hours of an exception follow the rules of weekly ones."""
    error = await refusal(set_day(front, (await front.doctor()).id, date(2100, 1, 1), *held))
    assert set(named(error)) == {path}


async def test_a_second_exception_replaces(desk: Front) -> None:
    """The hours of a date are those of its exception, which a second one replaces, and the weekly ones after it."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    first = (await set_day(desk, doctor.id, on(1))).exception
    assert (first.closed, list(first.hours), first.date) == (True, [], day(on(1)))
    second = (await set_day(desk, doctor.id, on(1), hours("14:00", "15:00"), hours("11:00", "12:00"))).exception
    assert not second.closed
    assert [one.start.hours for one in second.hours] == [11, 14]
    assert second.create_time == first.create_time
    assert starts((await generate(desk, doctor.id, on(1), validate_only=True)).slots) == [
        "11:00",
        "11:30",
        "14:00",
        "14:30",
    ]
    await reset_day(desk, doctor.id, on(1))
    assert starts((await generate(desk, doctor.id, on(1), validate_only=True)).slots) == ["09:00", "09:30"]


async def test_a_closed_date(desk: Front) -> None:
    """A closed date takes no booking of the day or of a slot, also not by a move, until the exception is deleted."""
    doctor, people = await desk.doctor("UTC"), await desk.people(4)
    await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    slots = (await generate(desk, doctor.id, on(1))).slots
    staying = await desk.book(people[0].id, doctor.id, on(1))
    elsewhere = await desk.book(people[3].id, doctor.id, on(2))
    answer = await set_day(desk, doctor.id, on(1))
    assert list(answer.affected_appointment_ids) == [staying.appointment.id]

    def free() -> slot_pb2.ListSlotsRequest:
        return slot_pb2.ListSlotsRequest(doctor_id=doctor.id, available_only=True)

    move = appointment_pb2.RescheduleAppointmentRequest(appointment_id=elsewhere.appointment.id, slot_id=slots[0].id)
    for call in (
        desk.book(people[1].id, doctor.id, on(1)),
        desk.book_slot(people[1].id, slots[0].id),
        desk.book(people[1].id, doctor.id, on(1), validate_only=True),
        desk.appointments.RescheduleAppointment(move),
    ):
        error = await refusal(call)
        assert reason_of(error) == "DOCTOR_ABSENT"
        assert details(error)["ErrorInfo"].metadata["cause"] == "EXCEPTION"
    assert not (await desk.slots.ListSlots(free())).slots
    assert (await desk.appointment(staying.appointment.id)).state == appointment_pb2.Appointment.STATE_BOOKED
    assert await outcome(desk.book(people[1].id, doctor.id, on(2))) == "OK"
    await reset_day(desk, doctor.id, on(1))
    assert len((await desk.slots.ListSlots(free())).slots) == 2
    assert await outcome(desk.book_slot(people[1].id, slots[0].id)) == "OK"


async def test_absence_comes_before_an_exception(desk: Front) -> None:
    """If the doctor is absent and the date closed, the absence is the cause."""
    doctor, person = await desk.doctor("UTC"), await desk.patient()
    await set_day(desk, doctor.id, on(1))
    await desk.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(on(1)), is_present=False)
    )
    error = await refusal(desk.book(person.id, doctor.id, on(1)))
    assert details(error)["ErrorInfo"].metadata["cause"] == "AVAILABILITY"


async def test_hours_refuse_nothing(desk: Front) -> None:
    """Other hours on a date refuse no booking, of the day or of a slot outside them."""
    doctor, people = await desk.doctor("UTC"), await desk.people(2)
    await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    slots = (await generate(desk, doctor.id, on(1))).slots
    answer = await set_day(desk, doctor.id, on(1), hours("14:00", "15:00"))
    assert list(answer.stale_slot_ids) == [slot.id for slot in slots]
    assert await outcome(desk.book_slot(people[0].id, slots[0].id)) == "OK"
    assert await outcome(desk.book(people[1].id, doctor.id, on(1))) == "OK"


async def test_what_refuses_no_place_of_the_day(desk: Front) -> None:
    """Beside other hours, and during leave of hours, the day takes walk-ins, holds and patients of other doctors."""
    doctor = await desk.doctor("UTC")
    other = await desk.doctor(clinic_id=doctor.clinic_id)
    await set_day(desk, doctor.id, TODAY, hours("20:00", "21:00"))
    utc = ZoneInfo("UTC")
    await desk.leave(doctor.id, datetime(2027, 1, 4, 7, tzinfo=utc), datetime(2027, 1, 4, 19, tzinfo=utc))
    walked = queue_pb2.AddWalkInRequest(doctor_id=doctor.id, patient_id=(await desk.patient()).id)
    assert await outcome(desk.queues.AddWalkIn(walked)) == "OK"
    assert await outcome(desk.hold(doctor.id, TODAY)) == "OK"
    booked = await desk.book((await desk.patient()).id, other.id, TODAY)
    visit = (await desk.check_in(booked.appointment.id)).appointment.id
    transfer = queue_pb2.TransferPatientRequest(appointment_id=visit, to_doctor_id=doctor.id)
    assert await outcome(desk.queues.TransferPatient(transfer)) == "OK"


async def test_hours_and_leave_make_no_revision(desk: Front) -> None:
    """A schedule, an exception and a leave without appointments are no change of the doctor-day."""
    doctor = await desk.doctor("UTC")
    await desk.book((await desk.patient()).id, doctor.id, TODAY)
    before = await desk.standing(doctor.id)
    await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    await set_day(desk, doctor.id, TODAY)
    await reset_day(desk, doctor.id, TODAY)
    away = (await desk.leave(doctor.id, TODAY)).leave
    await desk.schedules.CancelLeave(pb.CancelLeaveRequest(leave_id=away.id))
    assert await desk.standing(doctor.id) == before


async def test_who_is_affected(desk: Front) -> None:
    """Closed concerns every live appointment of the date; hours those whose slot lies outside. None is cancelled."""
    doctor, people = await desk.doctor("UTC", max_patients_per_day=20), await desk.people(7)
    await set_week(desk, doctor.id, daily("09:00", "12:00", 60), TODAY)
    slots = (await generate(desk, doctor.id, on(1))).slots
    early, middle, late = [
        (await desk.book_slot(person.id, slot.id)).appointment.id for person, slot in zip(people, slots, strict=False)
    ]
    whole_day = (await desk.book(people[3].id, doctor.id, on(1))).appointment.id
    cancelled = (await desk.book(people[4].id, doctor.id, on(1))).appointment.id
    await desk.cancel(cancelled)
    await desk.book(people[5].id, doctor.id, on(2))
    # One half hour short at the start; 10:00 to 11:00 lies in two hours that touch.
    narrow = await set_day(desk, doctor.id, on(1), hours("09:30", "10:30"), hours("10:30", "12:00"))
    assert list(narrow.affected_appointment_ids) == [early]
    apart = await set_day(desk, doctor.id, on(1), hours("09:00", "10:30"), hours("10:45", "12:00"))
    assert list(apart.affected_appointment_ids) == [middle]
    wide = await set_day(desk, doctor.id, on(1), hours("00:00", "24:00"))
    assert not wide.affected_appointment_ids
    closed = await set_day(desk, doctor.id, on(1))
    assert list(closed.affected_appointment_ids) == [early, middle, late, whole_day]
    for appointment_id in (early, middle, late, whole_day):
        assert (await desk.appointment(appointment_id)).state == appointment_pb2.Appointment.STATE_BOOKED


async def test_exceptions_of_past_dates(desk: Front) -> None:
    """An exception of a date before the clinic's today is neither set nor deleted."""
    doctor = await desk.doctor("Pacific/Kiritimati")
    for call in (set_day(desk, doctor.id, on(-1)), reset_day(desk, doctor.id, on(-1))):
        assert await outcome(call) == "DATE_IN_PAST"
    for call in (set_day(desk, doctor.id, TODAY), reset_day(desk, doctor.id, TODAY)):
        assert await outcome(call) == "OK"


async def test_an_exception_that_is_not_there(desk: Front) -> None:
    """Deleting an exception twice is refused."""
    doctor = await desk.doctor("UTC")
    await set_day(desk, doctor.id, on(1), hours("09:00", "10:00"))
    slots = (await generate(desk, doctor.id, on(1))).slots
    assert list((await reset_day(desk, doctor.id, on(1))).stale_slot_ids) == [slot.id for slot in slots]
    error = await refusal(reset_day(desk, doctor.id, on(1)))
    assert reason_of(error) == "SCHEDULE_EXCEPTION_NOT_FOUND"
    assert details(error)["ErrorInfo"].metadata == {"doctor_id": doctor.id, "date": str(on(1))}


async def test_etags_of_exceptions(desk: Front) -> None:
    """An exception is set or deleted under its etag alone, if one is given; 0 stands for none."""
    doctor = await desk.doctor("UTC")
    assert await outcome(set_day(desk, doctor.id, on(1), etag="1")) == "ETAG_MISMATCH"
    first = (await set_day(desk, doctor.id, on(1), etag="0")).exception.etag
    second = (await set_day(desk, doctor.id, on(1), etag=first)).exception.etag
    assert await outcome(set_day(desk, doctor.id, on(1), etag=first)) == "ETAG_MISMATCH"
    assert await outcome(reset_day(desk, doctor.id, on(1), etag=first)) == "ETAG_MISMATCH"
    assert await outcome(reset_day(desk, doctor.id, on(1), etag=second)) == "OK"


async def test_list_exceptions(desk: Front) -> None:
    """Exceptions are listed by date, within dates that are inclusive, page by page."""
    doctor = await desk.doctor("UTC")
    for n in (3, 1, 2):
        await set_day(desk, doctor.id, on(n))

    async def listed(**fields: Any) -> pb.ListScheduleExceptionsResponse:
        return await desk.schedules.ListScheduleExceptions(
            pb.ListScheduleExceptionsRequest(doctor_id=doctor.id, **fields)
        )

    assert [one.date for one in (await listed()).exceptions] == [day(on(n)) for n in (1, 2, 3)]
    some = await listed(from_date=day(on(2)), to_date=day(on(2)))
    assert [one.date for one in some.exceptions] == [day(on(2))]
    first = await listed(page_size=2)
    rest = await listed(page_size=2, page_token=first.next_page_token)
    assert [one.date for one in rest.exceptions] == [day(on(3))]
    assert not rest.next_page_token
    assert named(await refusal(listed(from_date=day(on(2)), to_date=day(on(1))))) == ["to_date"]


# Generation


async def test_the_slots_of_a_week(desk: Front) -> None:
    """Visits follow one another from the start; a break is the gap between hours; what holds no visit stays empty."""
    doctor = await desk.doctor("UTC")
    rules = [
        rule(MONDAY, "09:00", "10:40", 25),
        rule(MONDAY, "13:00", "14:00", 45, 3),
        rule(SUNDAY, "22:30", "24:00", 45),
    ]
    await set_week(desk, doctor.id, rules, TODAY)
    answer = await generate(desk, doctor.id, TODAY, on(6))
    monday = ["09:00-09:25", "09:25-09:50", "09:50-10:15", "10:15-10:40", "13:00-13:45"]
    assert spans(answer.slots) == [*monday, "22:30-23:15", "23:15-00:00"]
    assert [slot.capacity for slot in answer.slots] == [1, 1, 1, 1, 3, 1, 1]
    assert {slot.date.day for slot in answer.slots} == {4, 10}
    assert (answer.created_count, answer.kept_count, answer.skipped_count) == (7, 0, 0)
    listed = await desk.slots.ListSlots(slot_pb2.ListSlotsRequest(doctor_id=doctor.id))
    assert listed.slots == answer.slots
    assert all(slot.available_count == slot.capacity for slot in answer.slots)


async def test_only_days_of_the_schedule(desk: Front) -> None:
    """A schedule has hours from its first date to its last, both included."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "10:00", 60), on(2), on(4))
    answer = await generate(desk, doctor.id, TODAY, on(9))
    assert [slot.date for slot in answer.slots] == [day(on(n)) for n in (2, 3, 4)]


async def test_generation_is_repeatable(desk: Front) -> None:
    """A second call keeps what is there, also a slot of exactly the visit's interval that was made by hand."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
    by_hand = await desk.slot(doctor.id, datetime(2027, 1, 5, 10, tzinfo=ZoneInfo("UTC")), 60, capacity=7)
    first = await generate(desk, doctor.id, on(1), on(2))
    assert (first.created_count, first.kept_count) == (3, 1)
    assert by_hand in first.slots
    second = await generate(desk, doctor.id, on(1), on(2))
    assert (second.created_count, second.kept_count, second.slots) == (0, 4, first.slots)


async def test_generations_at_once(desk: Front) -> None:
    """Of calls at once each answers every slot, and each slot is created by one of them."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "17:00", 15), TODAY)
    answers = await asyncio.gather(*(generate(desk, doctor.id, TODAY, on(9)) for _ in range(6)))
    assert sum(answer.created_count for answer in answers) == 320
    assert {answer.created_count + answer.kept_count for answer in answers} == {320}
    assert all(answer.slots == answers[0].slots for answer in answers)


async def test_generation_and_slots_by_hand_at_once(desk: Front) -> None:
    """Slots that are made by hand, moved and deleted during a generation meet no failure and no overlap."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "17:00", 30), TODAY)
    noon = datetime(2027, 1, 5, 12, 10, tzinfo=ZoneInfo("UTC"))
    first = await desk.slot(doctor.id, noon)

    async def by_hand(n: int) -> str:
        if n == 0:
            return await outcome(desk.slots.DeleteSlot(slot_pb2.DeleteSlotRequest(slot_id=first.id)))
        return await outcome(desk.slot(doctor.id, noon + timedelta(days=n)))

    outcomes = await asyncio.gather(
        *(outcome(generate(desk, doctor.id, on(1), on(9))) for _ in range(4)), *(by_hand(n) for n in range(8))
    )
    assert set(outcomes) <= {"OK", "SLOT_OVERLAP"}
    assert outcomes[:5] == ["OK"] * 5


async def test_why_a_visit_is_skipped(desk: Front) -> None:
    """A skipped visit has the first reason that applies; a closed date is one row; other dates are not concerned."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("07:00", "09:00", 60), TODAY)
    await desk.slot(doctor.id, datetime(2027, 1, 5, 7, 30, tzinfo=ZoneInfo("UTC")), 60)
    await set_day(desk, doctor.id, on(2))
    for when in (on(2), on(3)):
        await desk.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(when), is_present=False)
        )
    answer = await generate(desk, doctor.id, TODAY, on(4))
    assert skips(answer) == [
        ("07:00", "IN_PAST"),
        # At 08:00 sharp it is not in the future.
        ("08:00", "IN_PAST"),
        ("07:00", "OVERLAPS_SLOT"),
        ("08:00", "OVERLAPS_SLOT"),
        ("", "DAY_CLOSED"),
        ("07:00", "DOCTOR_ABSENT"),
        ("08:00", "DOCTOR_ABSENT"),
    ]
    assert [one.date for one in answer.skipped] == [day(on(n)) for n in (0, 0, 1, 1, 2, 3, 3)]
    assert (answer.created_count, answer.skipped_count) == (2, 7)


async def test_the_first_reason_that_applies(at: Clock) -> None:
    """Leave comes before a time that does not exist, that before the past, and the past before another slot."""
    first, last = date(2027, 3, 28), date(2027, 3, 29)
    async with at("2027-03-20 08:00+00") as desk:
        doctor = await desk.doctor("Europe/London")
        await set_week(desk, doctor.id, daily("02:00", "03:00", 60), date(2027, 3, 20))
        assert (await generate(desk, doctor.id, last)).created_count == 1
        # On the 28th 01:00 to 02:00 does not exist; on the 29th all overlap the slot from 02:00 to 03:00.
        await set_week(desk, doctor.id, daily("01:15", "03:15", 60), date(2027, 3, 20))
        away = (await desk.leave(doctor.id, first, last)).leave
        on_leave = skips(await generate(desk, doctor.id, first, last))
        assert on_leave == [(start, "ON_LEAVE") for start in ("01:15", "02:15", "01:15", "02:15")]
        await desk.schedules.CancelLeave(pb.CancelLeaveRequest(leave_id=away.id))
        assert skips(await generate(desk, doctor.id, last)) == [
            ("01:15", "OVERLAPS_SLOT"), ("02:15", "OVERLAPS_SLOT"),
        ]  # fmt: skip
    async with at("2027-03-30 08:00+00") as desk:
        assert skips(await generate(desk, doctor.id, first, last)) == [
            ("01:15", "TIME_DOES_NOT_EXIST"), ("02:15", "IN_PAST"), ("01:15", "IN_PAST"), ("02:15", "IN_PAST"),
        ]  # fmt: skip


async def test_skipped_visits_are_in_order(desk: Front) -> None:
    """Skipped visits come by date, then start, those that the clock does not show too."""
    doctor = await desk.doctor("Europe/London")
    when = date(2027, 3, 28)
    await set_week(desk, doctor.id, daily("00:00", "03:15", 45), TODAY)
    await desk.leave(doctor.id, when)
    assert [start for start, _ in skips(await generate(desk, doctor.id, when))] == ["00:00", "00:45", "01:30", "02:15"]


async def test_visits_during_leave(desk: Front) -> None:
    """Leave of whole days skips visits, after absence; leave of hours lets the slots be made, which answer BLOCKED."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
    utc = ZoneInfo("UTC")
    await desk.leave(doctor.id, on(1), on(2))
    await desk.leave(doctor.id, datetime(2027, 1, 7, 10, 30, tzinfo=utc), datetime(2027, 1, 7, 12, tzinfo=utc))
    await desk.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(on(2)), is_present=False)
    )
    answer = await generate(desk, doctor.id, on(1), on(3))
    assert [reason for _, reason in skips(answer)] == ["ON_LEAVE"] * 2 + ["DOCTOR_ABSENT"] * 2
    assert starts(answer.slots) == ["09:00", "10:00"]
    assert [slot.state for slot in answer.slots] == [slot_pb2.Slot.STATE_OPEN, slot_pb2.Slot.STATE_BLOCKED]


async def test_what_is_there_is_kept(at: Clock) -> None:
    """A visit that has its slot is kept, though the day is past or the doctor absent by now; nothing is deleted."""
    async with at(NOW) as desk:
        doctor = await desk.doctor("UTC")
        await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
        made = await generate(desk, doctor.id, TODAY)
        await set_week(desk, doctor.id, daily("09:00", "12:00", 60), TODAY)
        await desk.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(TODAY), is_present=False)
        )
    async with at("2027-01-06 08:00+00") as desk:
        answer = await generate(desk, doctor.id, TODAY)
        assert (answer.kept_count, answer.slots) == (2, made.slots)
        assert skips(answer) == [("11:00", "DOCTOR_ABSENT")]


async def test_validate_only(desk: Front) -> None:
    """validate_only answers what would be created, creates nothing and leaves the key unused."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
    by_hand = await desk.slot(doctor.id, datetime(2027, 1, 5, 10, tzinfo=ZoneInfo("UTC")), 60)
    answer = await generate(desk, doctor.id, on(1), validate_only=True, idempotency_key="k")
    assert (answer.created_count, answer.kept_count) == (1, 1)
    assert [slot.id for slot in answer.slots] == ["", by_hand.id]
    assert spans(answer.slots) == ["09:00-10:00", "10:00-11:00"]
    assert desk.sql("select count(*) from slot") == [(1,)]
    again = await generate(desk, doctor.id, on(1), idempotency_key="k")
    assert (again.created_count, again.replayed) == (1, False)


async def test_ranges_of_generation(desk: Front) -> None:
    """A call generates 1 to 366 dates, which both are required, and none that reaches into the year 10000."""
    doctor = await desk.doctor("UTC")
    assert await outcome(generate(desk, doctor.id, TODAY, on(365))) == "OK"
    for first, last in ((TODAY, on(366)), (on(1), TODAY), (date(9999, 12, 31), date(9999, 12, 31))):
        assert named(await refusal(generate(desk, doctor.id, first, last))) == ["to_date"]
    bare = pb.GenerateSlotsRequest(doctor_id=doctor.id)
    assert named(await refusal(desk.schedules.GenerateSlots(bare))) == ["from_date"]
    assert await outcome(generate(desk, doctor.id, date(9999, 12, 30))) == "OK"
    assert await outcome(generate(desk, doctor.id, date(1, 1, 1))) == "OK"


async def test_most_visits(desk: Front) -> None:
    """A call makes 5,000 visits; one more is refused, and nothing is created."""
    doctor = await desk.doctor("UTC")
    # 1,250 a day.
    await set_week(desk, doctor.id, daily("00:00", "20:50", 1), TODAY)
    await set_day(desk, doctor.id, on(5), hours("00:00", "00:01", 1))
    error = await refusal(generate(desk, doctor.id, on(1), on(5)))
    assert named(error) == ["to_date"]
    assert desk.sql("select count(*) from slot") == [(0,)]
    answer = await generate(desk, doctor.id, on(1), on(4))
    assert (answer.created_count, len(answer.slots)) == (5000, 5000)


async def test_most_skipped(desk: Front) -> None:
    """The response lists the first 1,000 skipped visits, and counts all."""
    doctor = await desk.doctor("UTC")
    await set_week(desk, doctor.id, daily("00:00", "20:50", 1), on(-0))
    await desk.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(on(1)), is_present=False)
    )
    answer = await generate(desk, doctor.id, on(1))
    assert (answer.skipped_count, len(answer.skipped), answer.created_count) == (1250, 1000, 0)
    assert skips(answer)[-1] == ("16:39", "DOCTOR_ABSENT")


async def test_an_inactive_doctor_gets_no_slots(desk: Front) -> None:
    """An inactive doctor's hours can be set; slots are not generated."""
    doctor = await desk.doctor("UTC", active=False)
    assert await outcome(set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)) == "OK"
    assert await outcome(generate(desk, doctor.id, on(1))) == "DOCTOR_INACTIVE"


# Changes of the clock


@pytest.mark.parametrize(
    ("zone", "when", "held", "expected", "skipped"),
    [
        # London, forward at 01:00: the hour from 01:00 to 02:00 does not exist.
        (
            "Europe/London", date(2027, 3, 28), ("00:00", "04:00", 60),
            ["00:00+0000", "02:00+0100", "03:00+0100"], [("01:00", "TIME_DOES_NOT_EXIST")],
        ),
        # London, back at 02:00: the hour from 01:00 to 02:00 comes twice.
        (
            "Europe/London", date(2027, 10, 31), ("00:00", "03:00", 30),
            ["00:00+0100", "00:30+0100", "01:00+0100", "01:30+0100", "01:00+0000", "01:30+0000", "02:00+0000",
             "02:30+0000"], [],
        ),
        # A visit lasts as long as ever: 00:30 to 02:30 by the clock are one hour, so 01:30 would begin during it.
        (
            "Europe/London", date(2027, 10, 31), ("00:30", "03:30", 60),
            ["00:30+0100", "01:30+0100", "01:30+0000", "02:30+0000"], [],
        ),
        (
            "Europe/London", date(2027, 10, 31), ("00:15", "03:00", 45),
            ["00:15+0100", "01:00+0100", "01:45+0100", "01:45+0000"], [("01:00", "OVERLAPS_SLOT")],
        ),
        # From 00:00 two hours last until 03:00 by the clock.
        (
            "Europe/London", date(2027, 3, 28), ("00:00", "06:00", 120),
            ["00:00+0000", "04:00+0100"], [("02:00", "OVERLAPS_SLOT")],
        ),
        # A visit of a whole day does not fit into one of 23 hours, and fits into one of 25.
        ("Europe/London", date(2027, 3, 28), ("00:00", "24:00", 1440), [], [("00:00", "TIME_DOES_NOT_EXIST")]),
        ("Europe/London", date(2027, 10, 31), ("00:00", "24:00", 1440), ["00:00+0100"], []),
        # Lord Howe, forward by 30 min at 02:00.
        (
            "Australia/Lord_Howe", date(2027, 10, 3), ("01:00", "04:00", 30),
            ["01:00+1030", "01:30+1030", "02:30+1100", "03:00+1100", "03:30+1100"],
            [("02:00", "TIME_DOES_NOT_EXIST")],
        ),
        # Lord Howe, back by 30 min at 02:00: 01:30 comes twice.
        (
            "Australia/Lord_Howe", date(2027, 4, 4), ("01:00", "03:00", 30),
            ["01:00+1100", "01:30+1100", "01:30+1030", "02:00+1030", "02:30+1030"], [],
        ),
        (
            "Australia/Lord_Howe", date(2027, 4, 4), ("00:30", "03:00", 60),
            ["00:30+1100", "01:30+1100"], [("01:30", "OVERLAPS_SLOT")],
        ),
        # Cairo, forward at the midnight that begins the day.
        (
            "Africa/Cairo", date(2027, 4, 30), ("00:00", "03:00", 30),
            ["01:00+0300", "01:30+0300", "02:00+0300", "02:30+0300"],
            [("00:00", "TIME_DOES_NOT_EXIST"), ("00:30", "TIME_DOES_NOT_EXIST")],
        ),
        ("Africa/Cairo", date(2027, 4, 29), ("23:00", "24:00", 30), ["23:00+0200", "23:30+0200"], []),
        # Cairo, back at the midnight that ends the day: its last hour comes twice.
        (
            "Africa/Cairo", date(2027, 10, 28), ("22:00", "24:00", 60),
            ["22:00+0300", "23:00+0300", "23:00+0200"], [],
        ),
        # Santiago, forward at 24:00 of Saturday.
        (
            "America/Santiago", date(2027, 9, 5), ("00:00", "02:00", 60),
            ["01:00-0300"], [("00:00", "TIME_DOES_NOT_EXIST")],
        ),
        ("America/Santiago", date(2027, 9, 4), ("22:00", "24:00", 60), ["22:00-0400", "23:00-0400"], []),
        # Santiago, back at 24:00 of Saturday.
        (
            "America/Santiago", date(2027, 4, 3), ("22:00", "24:00", 60),
            ["22:00-0300", "23:00-0300", "23:00-0400"], [],
        ),
        ("America/Santiago", date(2027, 4, 4), ("00:00", "02:00", 60), ["00:00-0400", "01:00-0400"], []),
    ],
)  # fmt: skip
async def test_when_the_clock_is_changed(
    desk: Front, zone: str, when: date, held: tuple[str, str, int], expected: list[str], skipped: list[tuple[str, str]]
) -> None:
    """A start that does not exist is skipped, one that comes twice makes two slots, and each lasts as long as ever."""
    doctor = await desk.doctor(zone)
    await set_week(desk, doctor.id, daily(*held), TODAY)
    answer = await generate(desk, doctor.id, when)
    assert starts(answer.slots, zone) == expected
    assert skips(answer) == skipped
    for slot in answer.slots:
        assert slot.end_time.ToSeconds() - slot.start_time.ToSeconds() == held[2] * 60
        assert slot.date == day(when)
    again = await generate(desk, doctor.id, when)
    assert (again.created_count, again.kept_count) == (0, len(expected))


@pytest.mark.parametrize(
    ("zone", "changed"),
    [
        ("Europe/London", (date(2027, 3, 28), date(2027, 10, 31))),
        ("Australia/Lord_Howe", (date(2027, 4, 4), date(2027, 10, 3))),
        ("Africa/Cairo", (date(2027, 4, 30), date(2027, 10, 28))),
        ("America/Santiago", (date(2027, 4, 3), date(2027, 9, 5))),
    ],
)
async def test_the_afternoon_is_the_same(desk: Front, zone: str, changed: tuple[date, date]) -> None:
    """13:00 to 18:00 by the clock has the same visits on days on which the clock is changed."""
    doctor = await desk.doctor(zone)
    await set_week(desk, doctor.id, daily("13:00", "18:00", 30), TODAY)
    usual = [time[:5] for time in starts((await generate(desk, doctor.id, on(1))).slots, zone)]
    assert len(usual) == 10
    for when in changed:
        answer = await generate(desk, doctor.id, when)
        assert [time[:5] for time in starts(answer.slots, zone)] == usual
        assert not answer.skipped


async def test_a_new_time_zone_during_generation(desk: Front) -> None:
    """Every slot lies on its date in the clinic's zone, also if the zone is changed while slots are generated."""
    clinic = await desk.clinic("UTC")
    doctors = [await desk.doctor(clinic_id=clinic.id) for _ in range(4)]
    for doctor in doctors:
        await set_week(desk, doctor.id, daily("00:00", "24:00", 60), TODAY)

    async def move(zone: str) -> str:
        changed = clinic_pb2.Clinic(id=clinic.id, time_zone=zone)
        return await outcome(desk.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=changed)))

    outcomes = await asyncio.gather(
        move("Asia/Tokyo"), *(outcome(generate(desk, d.id, on(1), on(5))) for d in doctors), move("America/Lima")
    )
    assert set(outcomes) <= {"OK", "TIME_ZONE_IN_USE"}
    assert desk.sql(
        "select count(*) filter (where (s.start_time at time zone c.time_zone)::date <> s.date), count(*) > 0"
        " from slot s join clinic c on c.id = s.clinic_id"
    ) == [(0, True)]


# The horizon


def slots_by_date(front: Front, doctor_id: str) -> Counter[date]:
    """How many slots the doctor has on each date."""
    return Counter(dict(front.sql("select date, count(*) from slot where doctor_id = %s group by date", doctor_id)))


async def test_the_horizon(at: Clock, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service generates the next days of doctors with a schedule: after a change, and each day one more."""
    monkeypatch.setattr(horizon, "PAUSE_SECONDS", 0.02)
    async with at(NOW) as desk:
        doctor, other = await desk.doctor("UTC"), await desk.doctor("UTC")
        await set_day(desk, other.id, on(1), hours("09:00", "10:00"))
    async with serving(settings, conninfo, background="on", slot_horizon_days=4) as (_, desk):
        await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
        await until(lambda: slots_by_date(desk, doctor.id) == Counter({on(n): 2 for n in range(4)}))
        await set_day(desk, doctor.id, on(3), hours("09:00", "13:00", 60))
        await until(lambda: slots_by_date(desk, doctor.id)[on(3)] == 4)
        # A doctor who never had a schedule is left to the callers.
        assert not slots_by_date(desk, other.id)
        assert desk.sql("select distinct actor from log where type = 'slot.created'") == [("system",)]
    async with (
        at("2027-01-05 00:00+00"),
        serving(settings, conninfo, background="on", slot_horizon_days=4) as (_, desk),
    ):
        await until(lambda: slots_by_date(desk, doctor.id)[on(4)] == 2)
        assert on(5) not in slots_by_date(desk, doctor.id)


async def test_the_horizon_follows_what_kept_visits_out(
    at: Clock, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Visits for which there was no room are generated once there is: an old slot is deleted, or the doctor is back.

    A slot of the present hours that somebody has deleted stays deleted.
    """
    monkeypatch.setattr(horizon, "PAUSE_SECONDS", 0.02)
    async with at(NOW) as desk:
        doctor = await desk.doctor("UTC")
        await set_week(desk, doctor.id, daily("09:00", "11:00", 60), on(1))
        old = (await generate(desk, doctor.id, on(1), on(2))).slots
        stale = (await set_week(desk, doctor.id, daily("09:30", "11:30", 60), on(1))).stale_slot_ids
        assert list(stale) == [slot.id for slot in old]

    async def say(front: Front, present: bool) -> None:
        await front.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(on(3)), is_present=present)
        )

    async with serving(settings, conninfo, background="on", slot_horizon_days=4) as (_, desk):
        await say(desk, False)
        await until(lambda: desk.sql("select generated @> %s::date from slot_horizon", on(3)) == [(True,)])
        assert slots_by_date(desk, doctor.id) == {on(1): 2, on(2): 2}
        await say(desk, True)
        await until(lambda: slots_by_date(desk, doctor.id)[on(3)] == 2)
        for slot in old[:2]:
            await desk.slots.DeleteSlot(slot_pb2.DeleteSlotRequest(slot_id=slot.id))
        await until(lambda: slots_by_date(desk, doctor.id)[on(1)] == 2)
        listed = (await desk.slots.ListSlots(slot_pb2.ListSlotsRequest(doctor_id=doctor.id))).slots
        assert starts(listed)[:2] == ["09:30", "10:30"]
        await desk.slots.DeleteSlot(slot_pb2.DeleteSlotRequest(slot_id=listed[0].id))
        # The job has looked at everything since: it has done what was asked for later.
        await set_day(desk, doctor.id, on(2), hours("20:00", "21:00", 60))
        await until(lambda: slots_by_date(desk, doctor.id)[on(2)] == 3)
        assert slots_by_date(desk, doctor.id)[on(1)] == 1


async def test_the_horizon_after_leave(
    at: Clock, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dates of a leave are generated once it is cancelled."""
    monkeypatch.setattr(horizon, "PAUSE_SECONDS", 0.02)
    async with at(NOW) as desk:
        doctor = await desk.doctor("UTC")
        await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
        away = (await desk.leave(doctor.id, on(1), on(2))).leave
    async with serving(settings, conninfo, background="on", slot_horizon_days=4) as (_, desk):
        await until(lambda: slots_by_date(desk, doctor.id) == Counter({TODAY: 2, on(3): 2}))
        await desk.schedules.CancelLeave(pb.CancelLeaveRequest(leave_id=away.id))
        await until(lambda: slots_by_date(desk, doctor.id) == Counter({on(n): 2 for n in range(4)}))


async def test_the_horizon_of_a_doctor_who_moves(
    at: Clock, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hours of a doctor who moves to another clinic are those of its clock: its visits are generated as well."""
    monkeypatch.setattr(horizon, "PAUSE_SECONDS", 0.02)
    async with at(NOW), serving(settings, conninfo, background="on", slot_horizon_days=4) as (_, desk):
        doctor, tokyo = await desk.doctor("UTC"), await desk.clinic("Asia/Tokyo")
        await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
        await until(lambda: desk.sql("select count(*) from slot") == [(8,)])
        moved = doctor_pb2.Doctor(id=doctor.id, clinic_id=tokyo.id)
        await desk.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=moved))
        of_tokyo = "select min(start_time at time zone 'Asia/Tokyo')::time from slot where clinic_id = %s"
        await until(lambda: str(desk.sql(of_tokyo, tokyo.id)[0][0]) == "09:00:00")


async def test_one_replica_generates(
    at: Clock, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas generate each slot once, in small parts; an inactive doctor gets none."""
    monkeypatch.setattr(horizon, "PAUSE_SECONDS", 0.02)
    async with at(NOW) as desk:
        doctors = [await desk.doctor("UTC", active=n > 0) for n in range(4)]
        for doctor in doctors:
            await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
    async with (
        serving(settings, conninfo, background="on", slot_horizon_days=10) as (_, desk),
        serving(settings, conninfo, background="on", slot_horizon_days=10),
    ):
        await until(lambda: desk.sql("select count(*) from slot") == [(60,)])
        assert not slots_by_date(desk, doctors[0].id)
    assert desk.sql("select count(*), count(distinct slot_id) from log where type = 'slot.created'") == [(60, 60)]
    assert desk.sql(
        "select max(n) from (select count(*) as n from log where type = 'slot.created' group by transaction) t"
    ) == [(6,)]


async def test_the_horizon_is_off(
    at: Clock, conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a horizon of 0 days the service generates nothing by itself."""
    monkeypatch.setattr(horizon, "PAUSE_SECONDS", 0.01)

    async def never(*_: Any) -> None:
        raise AssertionError("the job was started")

    monkeypatch.setattr("frontdesk.process.background.keep_ahead", never)
    async with at(NOW) as desk, working(settings, conninfo):
        doctor = await desk.doctor("UTC")
        await set_week(desk, doctor.id, daily("09:00", "11:00", 60), TODAY)
        assert not slots_by_date(desk, doctor.id)


# A doctor's days


async def test_the_days_of_a_doctor(desk: Front) -> None:
    """Each date has its hours after the exception, its slots, and the free places of the doctor-day."""
    doctor, people = await desk.doctor("UTC", max_patients_per_day=3), await desk.people(3)
    await set_week(desk, doctor.id, [rule(TUESDAY, "09:00", "10:00", 30, 2), rule(WEDNESDAY, "09:00", "10:00")], TODAY)
    await set_day(desk, doctor.id, on(2), hours("14:00", "15:00", 60))
    slots = (await generate(desk, doctor.id, on(1), on(2))).slots
    booked = await desk.book_slot(people[0].id, slots[0].id)
    await desk.book(people[1].id, doctor.id, on(1))
    await desk.doctors.SetDoctorAvailability(
        doctor_pb2.SetDoctorAvailabilityRequest(
            doctor_id=doctor.id, date=day(on(3)), is_present=True, note="until noon", max_patients=5
        )
    )
    found = await days(desk, doctor.id, TODAY, on(3))
    assert [one.date for one in found] == [day(on(n)) for n in range(4)]
    assert [list(one.hours) for one in found] == [
        [],
        [hours("09:00", "10:00", 30, 2)],
        [hours("14:00", "15:00", 60, 1)],
        [],
    ]
    assert [one.HasField("exception") for one in found] == [False, False, True, False]
    assert list(found[2].exception.hours) == list(found[2].hours)
    assert [(one.capacity, one.booked_count, one.held_count, one.free_count) for one in found] == [
        (3, 0, 0, 3), (3, 2, 0, 1), (3, 0, 0, 3), (5, 0, 0, 5),
    ]  # fmt: skip
    assert [starts(one.slots) for one in found] == [[], ["09:00", "09:30"], ["14:00"], []]
    assert [slot.booked_count for slot in found[1].slots] == [1, 0]
    assert (found[3].present, found[3].note) == (True, "until noon")
    await desk.cancel(booked.appointment.id)
    ((again),) = await days(desk, doctor.id, on(1))
    assert (again.booked_count, again.free_count) == (1, 2)


async def test_held_places(desk: Front) -> None:
    """A live hold takes a free place of its date, and of its slot, until it is released."""
    doctor = await desk.doctor("UTC", max_patients_per_day=3)
    await set_week(desk, doctor.id, daily("09:00", "10:00", 30, 2), TODAY)
    slots = (await generate(desk, doctor.id, on(1))).slots
    held = [await desk.hold_slot(slots[0].id), await desk.hold(doctor.id, on(1)), await desk.hold(doctor.id, on(2))]
    found = await days(desk, doctor.id, TODAY, on(2))
    assert [(one.held_count, one.free_count) for one in found] == [(0, 3), (2, 1), (1, 2)]
    assert [(slot.held_count, slot.available_count) for slot in found[1].slots] == [(1, 1), (0, 2)]
    await desk.appointments.ReleaseHold(appointment_pb2.ReleaseHoldRequest(hold_id=held[0].id))
    ((again),) = await days(desk, doctor.id, on(1))
    assert (again.held_count, again.free_count, again.slots[0].held_count) == (1, 2, 0)


async def test_holds_of_a_closed_date(desk: Front) -> None:
    """A closed date refuses a new hold, and the use of one that was made before."""
    doctor, person = await desk.doctor("UTC"), await desk.patient()
    held = await desk.hold(doctor.id, on(1))
    await set_day(desk, doctor.id, on(1))
    for call in (desk.hold(doctor.id, on(1)), desk.book(person.id, doctor.id, on(1), hold_id=held.id)):
        error = await refusal(call)
        assert reason_of(error) == "DOCTOR_ABSENT"
        assert details(error)["ErrorInfo"].metadata["cause"] == "EXCEPTION"


async def test_leave_of_a_date(desk: Front) -> None:
    """A date shows its leave: leave of whole days takes its free places, leave of hours blocks slots alone."""
    doctor = await desk.doctor("UTC", max_patients_per_day=3)
    await set_week(desk, doctor.id, daily("09:00", "10:00"), TODAY)
    await generate(desk, doctor.id, TODAY, on(3))
    away = (await desk.leave(doctor.id, on(1), on(2))).leave
    utc = ZoneInfo("UTC")
    late = (
        await desk.leave(doctor.id, datetime(2027, 1, 7, 9, 30, tzinfo=utc), datetime(2027, 1, 7, 20, tzinfo=utc))
    ).leave
    found = await days(desk, doctor.id, TODAY, on(3))
    assert [one.leave.id for one in found] == ["", away.id, away.id, late.id]
    assert found[1].leave == (await desk.schedules.GetLeave(pb.GetLeaveRequest(leave_id=away.id))).leave
    assert [one.free_count for one in found] == [3, 0, 0, 3]
    assert [slot.state for slot in found[3].slots] == [slot_pb2.Slot.STATE_OPEN, slot_pb2.Slot.STATE_BLOCKED]
    await desk.schedules.CancelLeave(pb.CancelLeaveRequest(leave_id=away.id))
    assert not (await days(desk, doctor.id, on(1)))[0].HasField("leave")


async def test_who_knows_why(at: Clock, conninfo: str, settings: Settings) -> None:
    """The doctor himself, staff and services see the reason of a leave among the days; others that there is one."""
    async with at(NOW) as desk:
        doctor, other = await desk.doctor("UTC"), await desk.doctor("UTC")
        person = await desk.patient()
        await desk.leave(doctor.id, on(1))
    async with serving(settings, conninfo, access="required") as (_, desk):
        ask = pb.GetDoctorScheduleRequest(doctor_id=doctor.id, from_date=day(on(1)), to_date=day(on(1)))
        seen = []
        for metadata in (
            user(desk, "DOCTOR", doctor_id=doctor.id),
            user(desk, "STAFF", clinic_ids=(doctor.clinic_id,)),
            bearing((await create_key(desk, "SERVICE")).key),
            user(desk, "DOCTOR", doctor_id=other.id),
            user(desk, "STAFF", clinic_ids=(other.clinic_id,)),
            user(desk, "PATIENT", patient_id=person.id),
            bearing((await create_key(desk, "BOARD")).key),
        ):
            found = (await desk.schedules.GetDoctorSchedule(ask, metadata=metadata)).days[0]
            assert found.leave.id
            seen.append(found.leave.reason)
        assert seen == ["holidays"] * 3 + [""] * 4


async def test_no_free_places(desk: Front) -> None:
    """No place is free if the date is closed, the doctor absent, or more are booked than the day has places."""
    doctor, people = await desk.doctor("UTC", max_patients_per_day=3), await desk.people(2)
    await set_day(desk, doctor.id, on(1))
    for person in people:
        await desk.book(person.id, doctor.id, on(3))
    for when, fields in ((on(2), {"is_present": False}), (on(3), {"is_present": True, "max_patients": 1})):
        await desk.doctors.SetDoctorAvailability(
            doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(when), **fields)
        )
    found = await days(desk, doctor.id, on(1), on(3))
    assert [(one.present, one.exception.closed, one.free_count) for one in found] == [
        (True, True, 0), (False, False, 0), (True, False, 0),
    ]  # fmt: skip
    assert [one.capacity for one in found] == [3, 3, 1]


async def test_ranges_of_days(desk: Front) -> None:
    """A call gets 1 to 31 dates, past ones too; both ends are required."""
    doctor = await desk.doctor("UTC")
    assert len(await days(desk, doctor.id, on(-10), on(20))) == 31
    assert len(await days(desk, doctor.id, date(1, 1, 1))) == len(await days(desk, doctor.id, date(9999, 12, 31))) == 1
    for first, last in ((TODAY, on(31)), (on(1), TODAY)):
        assert named(await refusal(days(desk, doctor.id, first, last))) == ["to_date"]
    bare = pb.GetDoctorScheduleRequest(doctor_id=doctor.id, from_date=day(TODAY))
    assert named(await refusal(desk.schedules.GetDoctorSchedule(bare))) == ["to_date"]


async def test_slots_of_another_clinic(desk: Front) -> None:
    """A doctor who has moved keeps the slots at the old clinic, on the dates of its time zone."""
    here, there = await desk.clinic("Pacific/Auckland"), await desk.clinic("Pacific/Pago_Pago")
    doctor = await desk.doctor(clinic_id=here.id)
    slot = await desk.slot(doctor.id, datetime(2027, 1, 9, 11, 30, tzinfo=ZoneInfo("UTC")))
    assert slot.date == day(date(2027, 1, 10))
    moved = doctor_pb2.Doctor(id=doctor.id, clinic_id=there.id)
    await desk.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=moved))
    found = await days(desk, doctor.id, date(2027, 1, 8), date(2027, 1, 11))
    assert [[one.id for one in each.slots] for each in found] == [[], [], [slot.id], []]
