"""clinic.frontdesk.v1.ScheduleService."""

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from google.type.interval_pb2 import Interval

from clinic.frontdesk.v1 import schedule_pb2 as pb
from frontdesk.core.caller import ALL, OWN, Caller
from frontdesk.core.leave import Affected, Leave, Leaves, NewLeave
from frontdesk.core.schedule import Day, Hours, Schedule, ScheduleException, Schedules, Skipped, WeeklyRule
from frontdesk.errors import InvalidField
from frontdesk.rpc.convert import (
    converter,
    date_from,
    date_to,
    enum_numbers,
    instant_from,
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

MOST_DAYS = 366
"""The longest leave."""

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
_to_leave = converter(
    pb.Leave,
    Leave,
    days=lambda leave: (
        pb.DateRange(from_date=date_to(leave.from_date), to_date=date_to(leave.to_date)) if leave.from_date else None
    ),
    hours=lambda leave: Interval(start_time=leave.start_time, end_time=leave.end_time) if leave.start_time else None,
)
_to_day = converter(
    pb.DaySchedule,
    Day,
    leave=lambda day: day.leave and _to_leave(day.leave),
    exception=lambda day: day.exception and _to_exception(day.exception),
    hours=lambda day: map(_to_hours, day.hours),
    slots=lambda day: map(to_slot, day.slots),
)
_to_place = converter(pb.AffectedAppointment.Place, Affected)
_to_affected = converter(
    pb.AffectedAppointment,
    Affected,
    moved_to=lambda affected: None if affected.doctor_id is None else _to_place(affected),
)
_POLICIES = {number: name for name, number in enum_numbers(pb.Leave.Policy.DESCRIPTOR).items()}


class ScheduleServicer:
    """Translates; `Schedules` and `Leaves` decide."""

    service = pb.DESCRIPTOR.services_by_name["ScheduleService"]

    def __init__(self, schedules: Schedules, leaves: Leaves) -> None:
        self._schedules = schedules
        self._leaves = leaves

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
            call.caller,
            request.doctor_id,
            required_date(request, "from_date"),
            required_date(request, "to_date"),
            _insight(call),
        )
        return pb.GetDoctorScheduleResponse(days=map(_to_day, days))

    async def CreateLeave(self, request: pb.CreateLeaveRequest, call: Call) -> pb.CreateLeaveResponse:
        change = await self._leaves.create(
            call.caller,
            _leave_from(request.leave, "leave."),
            validate_only=request.validate_only,
            key=key_of(request, call),
        )
        leave, affected = change.result
        return pb.CreateLeaveResponse(
            leave=_to_leave(leave), affected=map(_to_affected, affected), replayed=change.replayed
        )

    async def GetLeave(self, request: pb.GetLeaveRequest, call: Call) -> pb.GetLeaveResponse:
        leave, affected = await self._leaves.get(call.caller, request.leave_id, _insight(call))
        return pb.GetLeaveResponse(leave=_to_leave(leave), affected=map(_to_affected, affected))

    async def ListLeaves(self, request: pb.ListLeavesRequest, call: Call) -> pb.ListLeavesResponse:
        found = await self._leaves.list(
            call.caller,
            await page_from(request, call),
            request.doctor_id,
            date_from(request, "from_date"),
            date_from(request, "to_date"),
            _insight(call),
        )
        return pb.ListLeavesResponse(
            leaves=map(_to_leave, found.items), next_page_token=await page_token(request, call, found.next)
        )

    async def CancelLeave(self, request: pb.CancelLeaveRequest, call: Call) -> pb.CancelLeaveResponse:
        change = await self._leaves.cancel(
            call.caller, request.leave_id, version_from(request.etag), key=key_of(request, call)
        )
        leave, affected = change.result
        return pb.CancelLeaveResponse(
            leave=_to_leave(leave), affected=map(_to_affected, affected), replayed=change.replayed
        )


def _insight(call: Call) -> Caller | None:
    """The caller as one who may know why somebody is away, and whose appointments that meets; None if no role may."""
    return call.identity.calling("insight into leave", {"DOCTOR": OWN, "STAFF": ALL, "ADMIN": ALL, "SERVICE": ALL})


def _leave_from(leave: pb.Leave, within: str) -> NewLeave:
    if not leave.doctor_id:
        raise InvalidField((within + "doctor_id", "is required"))
    days, hours = within + "days.", within + "hours."
    from_date = to_date = start = end = None
    match leave.WhichOneof("period"):
        case "days":
            from_date = required_date(leave.days, "from_date", days)
            to_date = required_date(leave.days, "to_date", days)
            if to_date < from_date:
                raise InvalidField((days + "to_date", "is before from_date"))
            if (to_date - from_date).days >= MOST_DAYS:
                raise InvalidField((days + "to_date", f"is more than {MOST_DAYS} dates from from_date on"))
        case "hours":
            start, end = instant_from(leave.hours, "start_time", hours), instant_from(leave.hours, "end_time", hours)
            if start is None or end is None:
                raise InvalidField((within + "hours", "start_time and end_time are required"))
            if end <= start:
                raise InvalidField((hours + "end_time", "is not after start_time"))
            if end - start > timedelta(days=MOST_DAYS):
                raise InvalidField((hours + "end_time", f"is more than {MOST_DAYS} days after start_time"))
        case _:
            raise InvalidField((within + "period", "days or hours are required"))
    policy = _POLICIES[leave.policy or pb.Leave.POLICY_KEEP]
    return NewLeave(leave.doctor_id, from_date, to_date, start, end, leave.reason, policy)


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
