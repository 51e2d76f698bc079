"""Doctors go on leave and change their hours, while others book.

Each change is made with one key until it is answered, and noted in the history with the time of question and answer.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.type.interval_pb2 import Interval
from google.type.timeofday_pb2 import TimeOfDay

from clinic.frontdesk.v1 import schedule_pb2 as pb
from tests.clinic import Front, day, reason_of
from tests.history.callers import Callers
from tests.history.check import BAD_CREDENTIALS, NOT_ALLOWED, Closing, Edit, History
from tests.history.world import HORIZON_DAYS

_POLICIES = ("KEEP", "CANCEL", "MOVE_SAME_DOCTOR", "MOVE_SAME_SPECIALTY")
_UNANSWERED = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "UNKNOWN")
_GIVE_UP_SECONDS = 25.0
_HALF_HOUR = timedelta(minutes=30)


class Away:
    """The absences and hours of the doctors of a chapter. `evening` is when today's first slot begins."""

    def __init__(
        self, name: str, history: History, fronts: Sequence[Front], callers: Callers, evening: datetime, slots: int,
        learn: Callable[[pb.AffectedAppointment], None],
    ) -> None:  # fmt: skip
        self._name = name
        self._history = history
        self._fronts = fronts
        self._callers = callers
        self._evening = evening
        self._slots = slots
        self._learn = learn
        self._keys = 0
        self._gone: set[str] = set()
        """Doctors who are on leave just now."""
        self._closed: set[str] = set()
        """Doctors of whom a date is closed just now."""

    async def act(self, doctor: str, today: date, mine: random.Random) -> None:
        """Let the doctor be away for a moment, or change the hours."""
        dice = mine.random()
        if dice < 0.6:
            # Now and then somebody asks for a second leave.
            if doctor not in self._gone or mine.random() < 0.2:
                await self._leave(doctor, today, mine)
        elif dice < 0.7:
            if doctor not in self._closed:
                await self._close(doctor, today + timedelta(days=mine.random() < 0.7), mine)
        elif dice < 0.85:
            await self._set_hours(doctor, today, mine)
        else:
            await self._generate(doctor, today, mine)

    async def _leave(self, doctor: str, today: date, mine: random.Random) -> None:
        wanted = pb.Leave(doctor_id=doctor, reason="ill")
        wanted.policy = pb.Leave.Policy.Value(f"POLICY_{mine.choice(_POLICIES)}")
        if mine.random() < 0.5:
            first = mine.choice((0, 1, 1))
            dates = [today + timedelta(days=n) for n in range(first, mine.randint(first, 1) + 1)]
            wanted.days.CopyFrom(pb.DateRange(from_date=day(dates[0]), to_date=day(dates[-1])))
            closing = Closing(doctor, tuple(map(str, dates)))
        else:
            start = self._evening + timedelta(days=mine.random() < 0.5) + mine.randrange(self._slots) * _HALF_HOUR
            end = start + mine.randint(1, 4) * _HALF_HOUR
            hours = Interval()
            hours.start_time.FromDatetime(start)
            hours.end_time.FromDatetime(end)
            wanted.hours.CopyFrom(hours)
            closing = Closing(doctor, (), start.timestamp(), end.timestamp())
        self._gone.add(doctor)
        # Now and then two ask for it at once.
        same = [closing, replace(closing)] if mine.random() < 0.2 else [closing]
        self._history.closings += same
        wishes = [self._create(one, pb.CreateLeaveRequest(leave=wanted), mine) for one in same]
        hasty = self._cut_short(doctor, mine) if mine.random() < 0.4 else asyncio.sleep(0)
        await asyncio.gather(*wishes, hasty)
        for one in same:
            if one.id and one.id not in self._history.cancelled:
                await asyncio.sleep(mine.uniform(0.1, 1.5))
                await self._cancel(one.id, doctor, mine)
        self._gone.discard(doctor)

    async def _create(self, closing: Closing, request: pb.CreateLeaveRequest, mine: random.Random) -> None:
        closing.asked = time.monotonic()
        answer = await self._made("CreateLeave", request, closing.doctor, mine)
        if isinstance(answer, str):
            if answer:
                # Refused, so it closes nothing.
                self._history.closings = [one for one in self._history.closings if one is not closing]
            return
        closing.answered, closing.id = time.monotonic(), answer.leave.id
        closing.applied = answer.leave.state != pb.Leave.STATE_APPLYING
        self._history.tally["leaves"] += 1
        for one in answer.affected:
            self._history.tally[f"leave {pb.AffectedAppointment.Outcome.Name(one.outcome)[8:]}"] += 1
            self._learn(one)

    async def _cut_short(self, doctor: str, mine: random.Random) -> None:
        """Cancel a leave as soon as somebody sees it, perhaps before it is applied."""
        for _ in range(20):
            await asyncio.sleep(mine.uniform(0, 0.02))
            answer = await self._made("ListLeaves", pb.ListLeavesRequest(doctor_id=doctor), doctor, mine, once=True)
            seen = [] if isinstance(answer, str) else answer.leaves
            for leave in seen:
                if leave.state != pb.Leave.STATE_CANCELLED:
                    await self._cancel(leave.id, doctor, mine)
                    return

    async def _cancel(self, leave_id: str, doctor: str, mine: random.Random) -> None:
        for closing in self._history.closings:
            # Of one that was not answered yet nobody knows whether it is this one.
            if closing.id == leave_id or (closing.doctor == doctor and closing.of_leave and not closing.id):
                closing.opening = min(closing.opening, time.monotonic())
        answer = await self._made("CancelLeave", pb.CancelLeaveRequest(leave_id=leave_id), doctor, mine)
        if not isinstance(answer, str):
            self._history.cancelled.setdefault(leave_id, time.monotonic())
            self._history.tally["leaves cancelled"] += 1

    async def _close(self, doctor: str, on: date, mine: random.Random) -> None:
        """Close a date, and open it again."""
        self._closed.add(doctor)
        closing = Closing(doctor, (str(on),), asked=time.monotonic(), of_leave=False)
        self._history.closings.append(closing)
        request = pb.SetScheduleExceptionRequest(doctor_id=doctor, date=day(on), closed=True)
        answer = await self._made("SetScheduleException", request, doctor, mine)
        if not isinstance(answer, str):
            closing.answered = time.monotonic()
            await asyncio.sleep(mine.uniform(0.1, 1.5))
        closing.opening = time.monotonic()
        delete = pb.DeleteScheduleExceptionRequest(doctor_id=doctor, date=day(on))
        answer = await self._made("DeleteScheduleException", delete, doctor, mine)
        # If it was not there, nothing is closed either.
        if answer != "":
            closing.opened = time.monotonic()
            self._closed.discard(doctor)

    async def _set_hours(self, doctor: str, today: date, mine: random.Random) -> None:
        first, hours = today + timedelta(days=mine.randrange(HORIZON_DAYS)), []
        length, start = mine.choice((30, 60)), mine.choice((8, 9))
        for weekday in range(1, 8):
            rule = pb.WeeklyRule(weekday=weekday, start=TimeOfDay(hours=start), end=TimeOfDay(hours=start + 2))
            rule.visit_length.CopyFrom(Duration(seconds=length * 60))
            rule.capacity = 2
            hours.append(rule)
        request = pb.SetWeeklyScheduleRequest(doctor_id=doctor, rules=hours, effective_from=day(first))
        if mine.random() < 0.5:
            request.effective_until.CopyFrom(day(first + timedelta(days=mine.randrange(3))))
        if mine.random() < 0.5:
            # The job in the background does it.
            await self._edit("SetWeeklySchedule", request, doctor, mine)
            return
        await asyncio.gather(
            self._edit("SetWeeklySchedule", request, doctor, mine), self._generate(doctor, today, mine)
        )
        await self._generate(doctor, today, mine)

    async def _generate(self, doctor: str, today: date, mine: random.Random) -> None:
        """Generate the same dates again and again, some at once."""
        until = today + timedelta(days=HORIZON_DAYS - 1)
        request = pb.GenerateSlotsRequest(doctor_id=doctor, from_date=day(today), to_date=day(until))
        for _ in range(2):
            wishes = []
            for _ in range(mine.choice((1, 2))):
                again = pb.GenerateSlotsRequest()
                again.CopyFrom(request)
                wishes.append(self._edit("GenerateSlots", again, doctor, mine))
            await asyncio.gather(*wishes)

    async def _edit(self, method: str, request: Any, doctor: str, mine: random.Random) -> None:
        edit = Edit(doctor, method, time.monotonic())
        self._history.edits.append(edit)
        answer = await self._made(method, request, doctor, mine)
        if isinstance(answer, str):
            return
        edit.answered, edit.replayed = time.monotonic(), answer.replayed
        self._history.tally[method] += 1
        if method == "GenerateSlots":
            edit.created = answer.created_count
            self._history.tally["slots generated"] += edit.created * (not edit.replayed)

    async def _made(self, method: str, request: Any, doctor: str, mine: random.Random, *, once: bool = False) -> Any:
        """The answer; else the reason of the refusal, or "" if it got no answer."""
        caller = self._callers.desk(mine)
        if doctor in self._callers.doctors and mine.random() < 0.3:
            caller = self._callers.doctors[doctor]
        self._keys += 1
        if not once:
            # No key of an operation begins so.
            request.idempotency_key = f"{self._name}/{self._keys}"
        end = time.monotonic() + _GIVE_UP_SECONDS
        while time.monotonic() < end:
            metadata, _ = caller.credentials()
            try:
                service = mine.choice(self._fronts).schedules
                return await getattr(service, method)(request, timeout=8, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                if code == "INTERNAL":
                    self._history.broken.append(f"{method} {request.idempotency_key}: {error.details()}")
                    return ""
                if code not in _UNANSWERED:
                    reason = reason_of(error)
                    if reason in NOT_ALLOWED:
                        # The caller has lost the role meanwhile; an earlier attempt may have acted.
                        return ""
                    if reason not in BAD_CREDENTIALS:
                        return reason
                    if caller.successor is not None:
                        caller = caller.successor
                    elif not caller.renew():
                        return ""
                if once:
                    return ""
            await asyncio.sleep(mine.uniform(0.02, 0.2))
        return ""
