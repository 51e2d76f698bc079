"""clinic.frontdesk.v1.ScheduleService."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from clinic.frontdesk.v1 import schedule_pb2 as pb
from frontdesk.core.schedule import Day, Hours, Schedule, ScheduleException, Schedules, Skipped, WeeklyRule
from frontdesk.rpc.convert import (
    converter,
    date_from,
    key_of,
    minute_from,
    minute_to,
    minutes_from,
    page_from,
    page_token,
    required_date,
    version_from,
)
from frontdesk.rpc.pipeline import Call
from frontdesk.rpc.services.slot import to_slot

_TIMES: Mapping[str, Callable[[Any], Any]] = {
    "start": lambda hours: minute_to(hours.start),
    "end": lambda hours: minute_to(hours.end),
    "visit_length": lambda hours: timedelta(minutes=hours.visit_length),
}
_to_hours = converter(pb.Hours, Hours, **_TIMES)
_to_rule = converter(pb.WeeklyRule, WeeklyRule, weekday=lambda rule: rule.weekday, **_TIMES)
_to_schedule = converter(pb.Schedule, Schedule, rules=lambda schedule: map(_to_rule, schedule.rules))
_to_exception = converter(
    pb.ScheduleException, ScheduleException, hours=lambda exception: map(_to_hours, exception.hours)
)
_to_skipped = converter(
    pb.SkippedVisit, Skipped, start_time=lambda visit: None if visit.start is None else minute_to(visit.start)
)
_to_day = converter(
    pb.DaySchedule,
    Day,
    exception=lambda day: day.exception and _to_exception(day.exception),
    hours=lambda day: map(_to_hours, day.hours),
    slots=lambda day: map(to_slot, day.slots),
)


class ScheduleServicer:
    """Translates; `Schedules` decides."""

    service = pb.DESCRIPTOR.services_by_name["ScheduleService"]

    def __init__(self, schedules: Schedules) -> None:
        self._schedules = schedules

    async def SetWeeklySchedule(self, request: pb.SetWeeklyScheduleRequest, call: Call) -> pb.SetWeeklyScheduleResponse:
        change = await self._schedules.set_weekly(
            call.caller,
            request.doctor_id,
            [_rule_from(rule, f"rules[{n}].") for n, rule in enumerate(request.rules)],
            required_date(request, "effective_from"),
            date_from(request, "effective_until"),
            key=key_of(request, call),
        )
        return pb.SetWeeklyScheduleResponse(
            schedule=_to_schedule(change.result.now),
            stale_slot_ids=change.result.stale_slot_ids,
            replayed=change.replayed,
        )

    async def ListWeeklySchedules(
        self, request: pb.ListWeeklySchedulesRequest, call: Call
    ) -> pb.ListWeeklySchedulesResponse:
        found = await self._schedules.list_weekly(call.caller, await page_from(request, call), request.doctor_id)
        return pb.ListWeeklySchedulesResponse(
            schedules=map(_to_schedule, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def SetScheduleException(
        self, request: pb.SetScheduleExceptionRequest, call: Call
    ) -> pb.SetScheduleExceptionResponse:
        change = await self._schedules.set_exception(
            call.caller,
            request.doctor_id,
            required_date(request, "date"),
            None if request.closed else [Hours(*_times(one, f"hours[{n}].")) for n, one in enumerate(request.hours)],
            version_from(request.etag),
            key=key_of(request, call),
        )
        return pb.SetScheduleExceptionResponse(
            exception=_to_exception(change.result.now),
            affected_appointment_ids=change.affected,
            stale_slot_ids=change.result.stale_slot_ids,
            replayed=change.replayed,
        )

    async def DeleteScheduleException(
        self, request: pb.DeleteScheduleExceptionRequest, call: Call
    ) -> pb.DeleteScheduleExceptionResponse:
        change = await self._schedules.delete_exception(
            call.caller,
            request.doctor_id,
            required_date(request, "date"),
            version_from(request.etag),
            key=key_of(request, call),
        )
        return pb.DeleteScheduleExceptionResponse(stale_slot_ids=change.result.stale_slot_ids, replayed=change.replayed)

    async def ListScheduleExceptions(
        self, request: pb.ListScheduleExceptionsRequest, call: Call
    ) -> pb.ListScheduleExceptionsResponse:
        found = await self._schedules.list_exceptions(
            call.caller,
            await page_from(request, call),
            request.doctor_id,
            date_from(request, "from_date"),
            date_from(request, "to_date"),
        )
        return pb.ListScheduleExceptionsResponse(
            exceptions=map(_to_exception, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def GenerateSlots(self, request: pb.GenerateSlotsRequest, call: Call) -> pb.GenerateSlotsResponse:
        change = await self._schedules.generate(
            call.caller,
            request.doctor_id,
            required_date(request, "from_date"),
            required_date(request, "to_date"),
            validate_only=request.validate_only,
            key=key_of(request, call),
        )
        made = change.result
        return pb.GenerateSlotsResponse(
            created_count=made.created_count,
            kept_count=made.kept_count,
            slots=map(to_slot, made.slots),
            skipped_count=made.skipped_count,
            skipped=map(_to_skipped, made.skipped),
            replayed=change.replayed,
        )

    async def GetDoctorSchedule(self, request: pb.GetDoctorScheduleRequest, call: Call) -> pb.GetDoctorScheduleResponse:
        days = await self._schedules.days(
            call.caller, request.doctor_id, required_date(request, "from_date"), required_date(request, "to_date")
        )
        return pb.GetDoctorScheduleResponse(days=map(_to_day, days))


def _rule_from(rule: pb.WeeklyRule, within: str) -> WeeklyRule:
    return WeeklyRule(*_times(rule, within), rule.weekday)


def _times(hours: pb.WeeklyRule | pb.Hours, within: str) -> tuple[int, int, int, int]:
    """The start, the end, the length of a visit and the capacity."""
    return (
        minute_from(hours, "start", within),
        minute_from(hours, "end", within),
        minutes_from(hours, "visit_length", within),
        hours.capacity or 1,
    )
