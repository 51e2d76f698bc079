"""`python -m benchmarks.clinic_month [--seed N]`: three doctors for a simulated month, through the API alone.

The clinic is in New York, and the month is 19 October to 17 November 2026, with the end of summer time on 1 November.
Its clock is a row of the run's own database. Rivera and Okafor have weekly hours with slots, and Okafor works in the
night before each Sunday as well, when one hour comes twice; Haas has no slots. There is a leave of days that moves what
was booked, a leave of hours, and a closed date. Every day patients book, move and cancel ahead. They come early, late
or never, or without an appointment; they are urgent, are parked, miss their call, leave, and go to another doctor. The
desk clicks wrongly and takes it back.

While it runs, each call of the next patient is compared with the rule of the order, and each undo with what was before.
At the end everything is read again and checked: capacity, numbers, slots, tickets, revisions, overlapping visits.
"""

import argparse
import asyncio
import heapq
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import psycopg
from google.protobuf import duration_pb2
from google.type import dayofweek_pb2, interval_pb2, timeofday_pb2
from google.type.date_pb2 import Date
from rich.console import Console
from rich.progress import Progress

from benchmarks.load import reason_of
from benchmarks.report import table
from benchmarks.stage import Stage
from clinic.frontdesk.v1 import (
    appointment_pb2,
    appointment_pb2_grpc,
    clinic_pb2,
    clinic_pb2_grpc,
    doctor_pb2,
    doctor_pb2_grpc,
    patient_pb2,
    patient_pb2_grpc,
    queue_pb2,
    queue_pb2_grpc,
    schedule_pb2,
    schedule_pb2_grpc,
    slot_pb2,
    slot_pb2_grpc,
)

ZONE = ZoneInfo("America/New_York")
FIRST, LAST = date(2026, 10, 19), date(2026, 11, 17)
SUMMER_TIME_ENDS = date(2026, 11, 1)
PATIENTS = 240
BOOKINGS_A_DAY = 60

_CLOCK = """
create table clock (now timestamptz not null);
insert into clock values ('2026-10-18 12:00+00');
create or replace function moment() returns timestamptz language sql volatile as 'select now from clock';
"""
_PRIORITIES = {
    queue_pb2.PRIORITY_URGENT: 0,
    queue_pb2.PRIORITY_PRIORITY: 1,
    queue_pb2.PRIORITY_NORMAL: 2,
}
_HELD = {
    appointment_pb2.Appointment.STATE_BOOKED,
    appointment_pb2.Appointment.STATE_CHECKED_IN,
    appointment_pb2.Appointment.STATE_IN_CONSULTATION,
    appointment_pb2.Appointment.STATE_COMPLETED,
}
_LIVE = _HELD - {appointment_pb2.Appointment.STATE_COMPLETED}

Act = Callable[[], Awaitable[None]]


@dataclass
class Doctor:
    """A doctor, and the model of the queue of the present day."""

    id: str
    name: str
    slots: bool
    capacity: int
    minutes: float
    """The median length of a consultation."""
    waiting: dict[str, tuple[int, int, datetime, int]] = field(default_factory=dict)
    """The place of each who waits, by appointment: class, return, first check-in, ticket."""
    busy: bool = False


class Broken(Exception):
    """An invariant does not hold."""


class Month:
    """The run: the clinic, its clock, and what has been counted and found."""

    def __init__(self, channel: grpc.aio.Channel, clock: psycopg.Connection, seed: int) -> None:
        self._clock = clock
        self.chance = random.Random(seed)
        self.now = datetime(2026, 10, 18, 12, tzinfo=UTC)
        self.clinics = clinic_pb2_grpc.ClinicServiceStub(channel)
        self.patients = patient_pb2_grpc.PatientServiceStub(channel)
        self.doctors = doctor_pb2_grpc.DoctorServiceStub(channel)
        self.schedules = schedule_pb2_grpc.ScheduleServiceStub(channel)
        self.slots = slot_pb2_grpc.SlotServiceStub(channel)
        self.appointments = appointment_pb2_grpc.AppointmentServiceStub(channel)
        self.queues = queue_pb2_grpc.QueueServiceStub(channel)
        self.staff: list[Doctor] = []
        self.people: list[str] = []
        self.calls: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.checks: Counter[str] = Counter()
        self.reason = ""
        """Of the latest refusal."""
        self.returns = 0
        self.patient_of: dict[str, str] = {}
        self.with_doctor: dict[str, str] = {}
        """The doctor to whom a patient is called, or with whom he is."""
        self.overrides = 0
        self._events: list[tuple[datetime, int, Act]] = []
        self._count = 0

    def set_clock(self, now: datetime) -> None:
        """Let it be that time."""
        self.now = now
        self._clock.execute("update clock set now = %s", (now,))

    async def call(self, method: Any, request: Any) -> Any:
        """The answer, or None if the call was refused; both are counted."""
        name = type(request).__name__.removesuffix("Request")
        try:
            answer = await method(request)
        except grpc.aio.AioRpcError as error:
            reason = reason_of(error)
            if not reason or error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                raise
            self.reason = reason
            self.refused[f"{name}: {reason}"] += 1
            return None
        self.calls[name] += 1
        return answer

    def check(self, what: str, holds: bool, more: str = "") -> None:
        """Count a check; raises Broken if it fails."""
        self.checks[what] += 1
        if not holds:
            raise Broken(f"{what}: {more} at {self.now.isoformat()}")

    # The days

    async def open(self) -> None:
        """The clinic, its doctors, patients, hours and slots."""
        clinic = (
            await self.call(
                self.clinics.CreateClinic,
                clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="Month", time_zone=str(ZONE))),
            )
        ).clinic
        for name, slots, capacity, minutes in (
            ("Rivera", True, 25, 12.0),
            ("Okafor", True, 20, 17.0),
            ("Haas", False, 12, 14.0),
        ):
            wanted = doctor_pb2.Doctor(
                code=name, display_name=f"Dr. {name}", clinic_id=clinic.id, specialty="General",
                max_patients_per_day=capacity,
            )  # fmt: skip
            made = await self.call(self.doctors.CreateDoctor, doctor_pb2.CreateDoctorRequest(doctor=wanted))
            self.staff.append(Doctor(made.doctor.id, name, slots, capacity, minutes))
        for number in range(PATIENTS):
            person = patient_pb2.Patient(given_name=f"Patient {number}")
            made = await self.call(self.patients.RegisterPatient, patient_pb2.RegisterPatientRequest(patient=person))
            self.people.append(made.patient.id)
        rivera, okafor, _ = self.staff
        await self._hours(rivera, [(9, 13, 15), (14, 17, 15)], nights=False)
        await self._hours(okafor, [(8, 12, 20)], nights=True)
        closed = schedule_pb2.SetScheduleExceptionRequest(
            doctor_id=okafor.id, date=_day(date(2026, 11, 11)), closed=True
        )
        await self.call(self.schedules.SetScheduleException, closed)
        for doctor in (rivera, okafor):
            request = schedule_pb2.GenerateSlotsRequest(doctor_id=doctor.id, from_date=_day(FIRST), to_date=_day(LAST))
            made = await self.call(self.schedules.GenerateSlots, request)
            again = await self.call(self.schedules.GenerateSlots, request)
            self.check("a second generation creates nothing", again.created_count == 0)
            self.check(
                "and keeps all", again.kept_count == made.created_count, f"{again.kept_count} of {made.created_count}"
            )
        nights = [
            len(await self._slots(okafor, day)) for day in (date(2026, 10, 25), SUMMER_TIME_ENDS, date(2026, 11, 8))
        ]
        self.check("the hour that comes twice has its slots twice", nights == [12, 15, 12], str(nights))

    async def _hours(self, doctor: Doctor, hours: list[tuple[int, int, int]], *, nights: bool) -> None:
        rules = [
            schedule_pb2.WeeklyRule(
                weekday=weekday, start=timeofday_pb2.TimeOfDay(hours=start), end=timeofday_pb2.TimeOfDay(hours=end),
                visit_length=duration_pb2.Duration(seconds=60 * minutes), capacity=1,
            )
            for weekday in range(dayofweek_pb2.MONDAY, dayofweek_pb2.FRIDAY + 1)
            for start, end, minutes in hours
        ]  # fmt: skip
        if nights:
            rules.append(
                schedule_pb2.WeeklyRule(
                    weekday=dayofweek_pb2.SUNDAY, start=timeofday_pb2.TimeOfDay(hours=0),
                    end=timeofday_pb2.TimeOfDay(hours=4), visit_length=duration_pb2.Duration(seconds=1200), capacity=1,
                )
            )  # fmt: skip
        request = schedule_pb2.SetWeeklyScheduleRequest(doctor_id=doctor.id, rules=rules, effective_from=_day(FIRST))
        await self.call(self.schedules.SetWeeklySchedule, request)

    async def _slots(self, doctor: Doctor, on: date) -> list[slot_pb2.Slot]:
        request = slot_pb2.ListSlotsRequest(doctor_id=doctor.id, page_size=100)
        request.start_time_from.FromDatetime(_at(on, 0))
        request.start_time_to.FromDatetime(_at(on + timedelta(days=1), 0))
        return [*(await self.slots.ListSlots(request)).slots]

    async def play(self, on: date) -> None:
        """One day: what is booked ahead, the day itself, and its evening."""
        self.set_clock(_at(on, 0, 1))
        self._events = []
        for doctor in self.staff:
            doctor.waiting, doctor.busy = {}, False
        self.with_doctor = {}
        watches = [_Watch(self, doctor, on) for doctor in self.staff]
        for watch in watches:
            await watch.begin()
        for _ in range(BOOKINGS_A_DAY):
            self._plan(_at(on, 0, 2) + timedelta(minutes=self.chance.uniform(0, 1200)), self._book_ahead)
        if on == date(2026, 10, 27):
            self._plan(_at(on, 7), self._leave_of_days)
            self._plan(_at(on, 7, 30), self._leave_of_hours)
        self._plan(_at(on, 0, 3), lambda: self._expect_patients(on))
        if on.weekday() < 5:
            for _ in range(self.chance.randint(6, 14)):
                self._plan(_at(on, 8) + timedelta(minutes=self.chance.uniform(0, 480)), self._walk_in)
        self._plan(_at(on, 20), lambda: self._evening(on))
        while self._events:
            at, _, act = heapq.heappop(self._events)
            self.set_clock(max(at, self.now))
            await act()
        for watch in watches:
            await watch.end()

    def _plan(self, at: datetime, act: Act) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, act))

    def _later(self, minutes: float, act: Act) -> None:
        self._plan(self.now + timedelta(minutes=minutes), act)

    # Ahead of the day

    async def _book_ahead(self) -> None:
        doctor = self.chance.choice(self.staff)
        today = self.now.astimezone(ZONE).date()
        on = today + timedelta(days=self.chance.randint(0, 9))
        if on > LAST:
            return
        request = appointment_pb2.BookAppointmentRequest(patient_id=self.chance.choice(self.people))
        if doctor.slots:
            free = [slot for slot in await self._slots(doctor, on) if slot.available_count]
            if not free:
                return
            request.slot_id = self.chance.choice(free).id
        else:
            request.doctor_day.CopyFrom(appointment_pb2.DoctorDay(doctor_id=doctor.id, date=_day(on)))
        made = await self.call(self.appointments.BookAppointment, request)
        if made is None or on == today:
            return
        if self.chance.random() < 0.15:
            self._later(self.chance.uniform(1, 60), lambda: self._cancel(made.appointment.id))
        elif self.chance.random() < 0.15 and not doctor.slots:
            self._later(self.chance.uniform(1, 60), lambda: self._move(doctor, made.appointment.id, on))

    async def _cancel(self, appointment_id: str) -> None:
        before = await self._get(appointment_id)
        request = appointment_pb2.CancelAppointmentRequest(appointment_id=appointment_id, cancel_reason="cannot come")
        done = await self.call(self.appointments.CancelAppointment, request)
        if done is not None and self.chance.random() < 0.3:
            await self._undo(done.appointment, before)

    async def _move(self, doctor: Doctor, appointment_id: str, on: date) -> None:
        to = min(on + timedelta(days=1), LAST)
        request = appointment_pb2.RescheduleAppointmentRequest(appointment_id=appointment_id)
        request.doctor_day.CopyFrom(appointment_pb2.DoctorDay(doctor_id=doctor.id, date=_day(to)))
        await self.call(self.appointments.RescheduleAppointment, request)

    async def _leave_of_days(self) -> None:
        rivera = self.staff[0]
        leave = schedule_pb2.Leave(
            doctor_id=rivera.id, reason="a course", policy=schedule_pb2.Leave.POLICY_MOVE_SAME_SPECIALTY
        )
        leave.days.from_date.CopyFrom(_day(date(2026, 11, 4)))
        leave.days.to_date.CopyFrom(_day(date(2026, 11, 5)))
        made = await self.call(self.schedules.CreateLeave, schedule_pb2.CreateLeaveRequest(leave=leave))
        self.check("a leave is applied", made.leave.state == schedule_pb2.Leave.STATE_APPLIED)
        for one in made.affected:
            now = await self._get(one.appointment_id)
            moved = one.outcome == schedule_pb2.AffectedAppointment.OUTCOME_MOVED
            self.check("a leave moves what it says", moved == (now.doctor_id != rivera.id))

    async def _leave_of_hours(self) -> None:
        okafor = self.staff[1]
        hours = interval_pb2.Interval()
        hours.start_time.FromDatetime(_at(date(2026, 10, 30), 8))
        hours.end_time.FromDatetime(_at(date(2026, 10, 30), 10))
        leave = schedule_pb2.Leave(doctor_id=okafor.id, hours=hours, policy=schedule_pb2.Leave.POLICY_CANCEL)
        await self.call(self.schedules.CreateLeave, schedule_pb2.CreateLeaveRequest(leave=leave))
        blocked = [
            slot for slot in await self._slots(okafor, date(2026, 10, 30)) if slot.state == slot_pb2.Slot.STATE_BLOCKED
        ]
        self.check("a leave of hours blocks its slots", len(blocked) == 6, str(len(blocked)))

    # The day

    async def _expect_patients(self, on: date) -> None:
        for doctor in self.staff:
            for visit in await self._list(doctor, on):
                if visit.state != appointment_pb2.Appointment.STATE_BOOKED or self.chance.random() < 0.13:
                    continue
                start = visit.start_time.ToDatetime(UTC) if visit.HasField("start_time") else None
                if start is None:
                    start = _at(on, 9) + timedelta(minutes=self.chance.uniform(0, 300))
                at = max(start + timedelta(minutes=self.chance.gauss(-6, 9)), _at(on, 0, 4))
                self._plan(at, self._arrival(doctor, visit.id))

    def _arrival(self, doctor: Doctor, appointment_id: str) -> Act:
        return lambda: self._arrive(doctor, appointment_id)

    async def _arrive(self, doctor: Doctor, appointment_id: str, *, again: bool = False) -> None:
        before = await self._get(appointment_id)
        priority = self._priority()
        request = queue_pb2.CheckInRequest(appointment_id=appointment_id, priority=priority)
        done = await self.call(self.queues.CheckIn, request)
        if done is None:
            return
        if not again and self.chance.random() < 0.06:
            # The wrong patient: take it back, and check in whoever has come after all.
            await self._undo(done.appointment, before)
            self._later(self.chance.uniform(1, 9), lambda: self._arrive(doctor, appointment_id, again=True))
            return
        await self._joined(doctor, done.entry)

    async def _walk_in(self) -> None:
        doctor = self.chance.choice(self.staff)
        request = queue_pb2.AddWalkInRequest(
            doctor_id=doctor.id,
            patient_id=self.chance.choice(self.people),
            priority=self._priority(),
            reason="a walk-in",
        )
        if self.chance.random() < 0.5:
            request.override_reason = "in pain"
        done = await self.call(self.queues.AddWalkIn, request)
        if done is None:
            return
        await self._joined(doctor, done.entry)

    def _priority(self) -> Any:
        return self.chance.choices([*_PRIORITIES], weights=(6, 14, 80))[0]

    async def _joined(self, doctor: Doctor, entry: queue_pb2.QueueEntry) -> None:
        self.patient_of[entry.appointment_id] = entry.patient_id
        first = entry.check_in_time.ToDatetime(UTC)
        doctor.waiting[entry.appointment_id] = (_PRIORITIES[entry.priority], 0, first, entry.ticket)
        chance = self.chance.random()
        minutes = self.chance.uniform(2, 25)
        if chance < 0.05:
            self._later(minutes, lambda: self._park(doctor, entry.appointment_id))
        elif chance < 0.08:
            self._later(minutes, lambda: self._walk_out(doctor, entry.appointment_id))
        elif chance < 0.12:
            self._later(minutes, lambda: self._raise(doctor, entry.appointment_id))
        elif chance < 0.17:
            self._later(minutes, lambda: self._transfer(doctor, entry.appointment_id))
        await self._call_next(doctor)

    async def _call_next(self, doctor: Doctor) -> None:
        if doctor.busy:
            return
        done = await self.call(self.queues.CallNext, queue_pb2.CallNextRequest(doctor_id=doctor.id, room="1"))
        if done is None:
            self.check("the queue is empty if the service says so", not self._callable(doctor))
            return
        called = done.entry.appointment_id
        expected = self._callable(doctor)
        self.check(
            "the next is who the rule says", bool(expected) and called == expected[0], f"ticket {done.entry.ticket}"
        )
        place = doctor.waiting.pop(called)
        doctor.busy = True
        self.with_doctor[done.entry.patient_id] = doctor.id
        if self.chance.random() < 0.08:
            await self.call(self.queues.CallAgain, queue_pb2.CallAgainRequest(appointment_id=called))
            self._later(4, lambda: self._missed(doctor, called, place))
        else:
            self._later(self.chance.uniform(0.2, 1.5), lambda: self._start(doctor, called))

    def _callable(self, doctor: Doctor) -> list[str]:
        """Who waits, in the order of the rule, but for those who are with another doctor now."""
        here = [one for one in doctor.waiting if self.with_doctor.get(self.patient_of[one], doctor.id) == doctor.id]
        return sorted(here, key=doctor.waiting.__getitem__)

    async def _missed(self, doctor: Doctor, appointment_id: str, place: tuple[int, int, datetime, int]) -> None:
        doctor.busy = False
        before = await self._get(appointment_id)
        done = await self.call(self.queues.MarkMissed, queue_pb2.MarkMissedRequest(appointment_id=appointment_id))
        if self.chance.random() < 0.2:
            await self._undo(done.appointment, before)
            doctor.busy = True
            self._later(1, lambda: self._start(doctor, appointment_id))
            return
        del self.with_doctor[before.patient_id]
        self._later(self.chance.uniform(3, 20), lambda: self._return(doctor, appointment_id, place))
        await self._call_everywhere()

    async def _return(self, doctor: Doctor, appointment_id: str, place: tuple[int, int, datetime, int]) -> None:
        done = await self.call(self.queues.ReturnToLine, queue_pb2.ReturnToLineRequest(appointment_id=appointment_id))
        if done is None:
            return
        self.returns += 1
        doctor.waiting[appointment_id] = (place[0], self.returns, *place[2:])
        await self._call_next(doctor)

    async def _start(self, doctor: Doctor, appointment_id: str) -> None:
        request = appointment_pb2.StartAppointmentRequest(appointment_id=appointment_id)
        await self.call(self.appointments.StartAppointment, request)
        minutes = doctor.minutes * math.exp(self.chance.gauss(0, 0.4))
        self._later(minutes, lambda: self._complete(doctor, appointment_id))

    async def _complete(self, doctor: Doctor, appointment_id: str) -> None:
        before = await self._get(appointment_id)
        request = appointment_pb2.CompleteAppointmentRequest(appointment_id=appointment_id)
        done = await self.call(self.appointments.CompleteAppointment, request)
        if self.chance.random() < 0.05:
            await self._undo(done.appointment, before)
            await self.call(self.appointments.CompleteAppointment, request)
        doctor.busy = False
        del self.with_doctor[before.patient_id]
        await self._call_everywhere()

    async def _call_everywhere(self) -> None:
        """Somebody is free: the doctor, and the patient, for whom another one may wait."""
        for doctor in self.staff:
            await self._call_next(doctor)

    async def _park(self, doctor: Doctor, appointment_id: str) -> None:
        place = doctor.waiting.get(appointment_id)
        if place is None:
            return
        before = await self._get(appointment_id)
        done = await self.call(self.queues.ParkPatient, queue_pb2.ParkPatientRequest(appointment_id=appointment_id))
        if self.chance.random() < 0.3:
            await self._undo(done.appointment, before)
            return
        del doctor.waiting[appointment_id]
        self._later(self.chance.uniform(5, 30), lambda: self._back(doctor, appointment_id, place))

    async def _back(self, doctor: Doctor, appointment_id: str, place: tuple[int, int, datetime, int]) -> None:
        request = queue_pb2.ReturnToLineRequest(appointment_id=appointment_id)
        if await self.call(self.queues.ReturnToLine, request) is not None:
            doctor.waiting[appointment_id] = place
            await self._call_next(doctor)

    async def _walk_out(self, doctor: Doctor, appointment_id: str) -> None:
        if appointment_id not in doctor.waiting:
            return
        before = await self._get(appointment_id)
        done = await self.call(self.queues.LeaveQueue, queue_pb2.LeaveQueueRequest(appointment_id=appointment_id))
        if self.chance.random() < 0.3 and await self._undo(done.appointment, before):
            return
        del doctor.waiting[appointment_id]

    async def _raise(self, doctor: Doctor, appointment_id: str) -> None:
        if appointment_id not in doctor.waiting:
            return
        priority = self._priority()
        request = queue_pb2.SetPriorityRequest(appointment_id=appointment_id, priority=priority)
        await self.call(self.queues.SetPriority, request)
        doctor.waiting[appointment_id] = (_PRIORITIES[priority], *doctor.waiting[appointment_id][1:])

    async def _transfer(self, doctor: Doctor, appointment_id: str) -> None:
        place = doctor.waiting.get(appointment_id)
        if place is None:
            return
        to = self.chance.choice([other for other in self.staff if other is not doctor])
        request = queue_pb2.TransferPatientRequest(appointment_id=appointment_id, to_doctor_id=to.id)
        if self.chance.random() < 0.5:
            request.override_reason = "nobody else is there"
        done = await self.call(self.queues.TransferPatient, request)
        if done is None:
            return
        del doctor.waiting[appointment_id]
        # He came back, if he did, in another queue; here he waits by his first check-in.
        to.waiting[appointment_id] = (place[0], 0, place[2], done.entry.ticket)
        await self._call_next(to)

    async def _evening(self, on: date) -> None:
        for doctor in self.staff:
            for visit in await self._list(doctor, on):
                if visit.state != appointment_pb2.Appointment.STATE_BOOKED:
                    continue
                request = appointment_pb2.MarkNoShowRequest(appointment_id=visit.id)
                done = await self.call(self.appointments.MarkNoShow, request)
                if done is not None and self.chance.random() < 0.1:
                    await self._undo(done.appointment, visit)
                    await self.call(self.appointments.MarkNoShow, request)

    # The checks

    async def _get(self, appointment_id: str) -> appointment_pb2.Appointment:
        request = appointment_pb2.GetAppointmentRequest(appointment_id=appointment_id)
        found: appointment_pb2.Appointment = (await self.appointments.GetAppointment(request)).appointment
        return found

    async def _list(self, doctor: Doctor, on: date) -> list[appointment_pb2.Appointment]:
        request = appointment_pb2.ListAppointmentsRequest(
            doctor_id=doctor.id, from_date=_day(on), to_date=_day(on), page_size=100
        )
        found: list[appointment_pb2.Appointment] = []
        while True:
            page = await self.appointments.ListAppointments(request)
            found += page.appointments
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def _undo(self, after: appointment_pb2.Appointment, before: appointment_pb2.Appointment) -> bool:
        """Take the last verb back, and compare; whether it was possible."""
        request = appointment_pb2.UndoTransitionRequest(appointment_id=after.id, etag=after.etag)
        done = await self.call(self.appointments.UndoTransition, request)
        if done is None:
            # Somebody has taken the place meanwhile; overrides may have.
            gave_up = after.state in (
                appointment_pb2.Appointment.STATE_CANCELLED,
                appointment_pb2.Appointment.STATE_NO_SHOW,
                appointment_pb2.Appointment.STATE_LEFT,
            )
            places = {"DAY_FULL", "SLOT_FULL", "DUPLICATE_BOOKING", "PATIENT_OVERLAP"}
            self.check("an undo is possible while the place is free", gave_up and self.reason in places, self.reason)
            return False
        restored = appointment_pb2.Appointment()
        restored.CopyFrom(done.appointment)
        for one in (restored, before):
            one.ClearField("etag")
            one.ClearField("update_time")
        self.check("an undo restores exactly", restored == before)
        return True

    async def settle(self) -> None:
        """Everything that the month has left, read again."""
        visits: dict[str, list[tuple[datetime, datetime]]] = {}
        on = FIRST
        while on <= LAST:
            for doctor in self.staff:
                found = await self._list(doctor, on)
                placed = [visit for visit in found if visit.state in _HELD]
                within = [visit for visit in placed if not visit.override_reason]
                self.check(
                    "never over the capacity but by recorded overrides", len(within) <= doctor.capacity, doctor.name
                )
                numbers = [visit.number for visit in placed]
                self.check("numbers are unique", len({*numbers}) == len(numbers), doctor.name)
                slots = Counter(visit.slot_id for visit in placed if visit.slot_id)
                self.check("no slot is sold twice", all(count == 1 for count in slots.values()), doctor.name)
                live = Counter(visit.patient_id for visit in placed if visit.state in _LIVE)
                self.check("one live visit a patient and doctor-day", all(count == 1 for count in live.values()))
                for visit in placed:
                    if visit.HasField("start_time"):
                        span = (visit.start_time.ToDatetime(UTC), visit.end_time.ToDatetime(UTC))
                        visits.setdefault(visit.patient_id, []).append(span)
                self.overrides += len(placed) - len(within)
            on += timedelta(days=1)
        for spans in visits.values():
            spans.sort()
            apart = all(first[1] <= second[0] for first, second in pairwise(spans))
            self.check("no two visits of a patient at one time", apart)


class _Watch:
    """Follows one doctor-day for the whole day, and checks what it is told."""

    def __init__(self, month: Month, doctor: Doctor, on: date) -> None:
        self._month = month
        self._doctor = doctor
        self._on = on
        self._stream: Any = None
        self._revision = 0
        self._ticket = 0

    async def begin(self) -> None:
        """The queue as the day begins."""
        request = queue_pb2.WatchQueueRequest(doctor_id=self._doctor.id, date=_day(self._on))
        self._stream = self._month.queues.WatchQueue(request)
        self._revision = (await self._stream.read()).update.queue.revision

    async def end(self) -> None:
        """Read what the day brought, up to its present revision."""
        now = await self._month.queues.GetQueue(
            queue_pb2.GetQueueRequest(doctor_id=self._doctor.id, date=_day(self._on))
        )
        while self._revision < now.queue.revision:
            message = await self._stream.read()
            for change in message.update.changes:
                self._month.check("revisions have no gap", change.revision == self._revision + 1)
                self._revision = change.revision
                if change.kind in (queue_pb2.QueueChange.KIND_CHECKED_IN, queue_pb2.QueueChange.KIND_TRANSFERRED_IN):
                    self._ticket += 1
                    self._month.check("tickets have no gap", change.entry.ticket == self._ticket)
        self._stream.cancel()
        self._month.check(
            "nobody is left in the queue", not now.queue.entries, f"{len(now.queue.entries)} of {self._doctor.name}"
        )


def _day(value: date) -> Date:
    return Date(year=value.year, month=value.month, day=value.day)


def _at(on: date, hour: int, minute: int = 0) -> datetime:
    return datetime.combine(on, time(hour, minute), ZONE).astimezone(UTC)


async def _run(stage: Stage, seed: int, console: Console) -> Month:
    conninfo = stage.database("month")
    with psycopg.connect(conninfo, autocommit=True) as clock:
        clock.execute(_CLOCK)
        with stage.serve(conninfo, log_level="warning", pool_size=4) as server:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
                month = Month(channel, clock, seed)
                with Progress(console=console) as progress:
                    days = [FIRST + timedelta(days=n) for n in range((LAST - FIRST).days + 1)]
                    task = progress.add_task("days", total=len(days))
                    await month.open()
                    for on in days:
                        await month.play(on)
                        progress.advance(task)
                await month.settle()
                return month


def main() -> int:
    """Play the month. The exit status is 1 if an invariant is broken."""
    parser = argparse.ArgumentParser(description="Play a month of a clinic with three doctors, and check it.")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    console = Console()
    with Stage() as stage:
        try:
            month = asyncio.run(_run(stage, arguments.seed, console))
        except Broken as broken:
            console.print(f"broken: {broken}")
            return 1
    for title, counts in (("Calls", month.calls), ("Refused", month.refused), ("Checked", month.checks)):
        shown = table(title, "what", "times")
        for name, count in counts.most_common():
            shown.add_row(name, f"{count:,}")
        console.print(shown)
    console.print(f"overrides: {month.overrides}; every check held")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
