"""clinic.frontdesk.v1.ScheduleService."""

from datetime import timedelta

from clinic.frontdesk.v1 import schedule_pb2 as pb
from frontdesk.core.schedule import Schedule, Schedules, WeeklyRule
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
)
from frontdesk.rpc.pipeline import Call

_to_rule = converter(
    pb.WeeklyRule,
    WeeklyRule,
    weekday=lambda rule: rule.weekday,
    start=lambda rule: minute_to(rule.start),
    end=lambda rule: minute_to(rule.end),
    visit_length=lambda rule: timedelta(minutes=rule.visit_length),
)
_to_schedule = converter(pb.Schedule, Schedule, rules=lambda schedule: map(_to_rule, schedule.rules))


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
            schedule=_to_schedule(change.result.schedule),
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


def _rule_from(rule: pb.WeeklyRule, within: str) -> WeeklyRule:
    return WeeklyRule(
        minute_from(rule, "start", within),
        minute_from(rule, "end", within),
        minutes_from(rule, "visit_length", within),
        rule.capacity or 1,
        rule.weekday,
    )
