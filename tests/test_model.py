"""A small model of the clinic beside the real service: after any actions in any order, both agree.

`make soak` runs many more examples than `make test`.
"""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.duration_pb2 import Duration
from google.type.date_pb2 import Date
from google.type.interval_pb2 import Interval
from google.type.timeofday_pb2 import TimeOfDay
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from clinic.frontdesk.v1 import appointment_pb2 as pb
from clinic.frontdesk.v1 import clinic_pb2, doctor_pb2, patient_pb2, queue_pb2, schedule_pb2, slot_pb2
from frontdesk.client import FrontdeskError, SyncFrontdeskClient
from frontdesk.process.worker import Worker
from frontdesk.settings import Settings

NOW = datetime(2030, 5, 6, 9, tzinfo=UTC)
TODAY = Date(year=2030, month=5, day=6)
HOLDING = {"BOOKED", "CHECKED_IN", "IN_CONSULTATION", "COMPLETED"}
LIVE = {"BOOKED", "CHECKED_IN", "IN_CONSULTATION"}
IN_LINE = ("WAITING", "CALLED", "IN_CONSULTATION", "PARKED", "MISSED")


@dataclass
class Clinic:
    """A running service with a stopped clock, and access to its database."""

    client: SyncFrontdeskClient
    conninfo: str

    def sql(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            return connection.execute(query, params).fetchall()


@pytest.fixture
def clinic(conninfo: str, settings: Settings) -> Iterator[Clinic]:
    """A real server in its own thread, because Hypothesis is synchronous."""
    with psycopg.connect(conninfo, autocommit=True) as admin:
        admin.execute(f"alter database {admin.info.dbname} set frontdesk.now = '{NOW.isoformat()}'")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Worker, int]:
        worker = Worker(settings, conninfo)
        return worker, await worker.start("127.0.0.1:0")

    worker, port = asyncio.run_coroutine_threadsafe(start(), loop).result()
    with SyncFrontdeskClient(f"127.0.0.1:{port}") as client:
        yield Clinic(client, conninfo)
    asyncio.run_coroutine_threadsafe(worker.stop(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@dataclass
class Visit:
    """An appointment in the model."""

    id: str
    patient: int
    doctor: int
    number: int
    slot: int | None
    state: str = "BOOKED"
    line: str | None = None
    ticket: int = 0
    priority: int = 3
    """The number in the contract: the smaller, the earlier."""
    returned: int = 0
    """The revision of the return after a missed call."""
    calls: int = 0
    """Since the last CallNext, which counts."""
    over: bool = False
    """Above the capacity, by an override."""
    steps: list["Step"] = field(default_factory=list)
    """The verbs that can be taken back, the last one at the end."""

    def before(self, shown: pb.Appointment) -> "Step":
        """What an undo leads back to, if the visit is shown so."""
        return Step(shown, self.state, self.line, self.ticket, self.priority)


@dataclass
class Step:
    """A visit before a verb: as it was shown, and what the model knew."""

    shown: pb.Appointment
    state: str
    line: str | None
    ticket: int
    priority: int


@dataclass
class Held:
    """A hold in the model."""

    id: str
    patient: int | None
    doctor: int
    slot: int | None
    state: str = "HELD"


@dataclass
class Leave:
    """A leave in the model, in minutes of the day; the whole day has no start."""

    id: str
    start: int | None
    end: int | None

    def touches(self, slot: int | None) -> bool:
        """Whether it blocks this slot, or closes the day if that is None."""
        if self.start is None or self.end is None:
            return slot is None
        return slot is not None and self.start < minute_of(slot) + 30 and minute_of(slot) < self.end


@dataclass
class Day:
    """A doctor's day in the model."""

    revision: int = 1
    last_ticket: int = 0
    present: bool = True
    exception: str = ""
    """CLOSED, HOURS (those of the slot at 10:00) or none."""
    kinds: list[str] = field(default_factory=list)
    leaves: list[Leave] = field(default_factory=list)


def minute_of(slot: int) -> int:
    """The minute of the day at which this slot starts."""
    return SLOTS[slot][1] * 60 + SLOTS[slot][2]


TEN_O_CLOCK = schedule_pb2.Hours(
    start=TimeOfDay(hours=10),
    end=TimeOfDay(hours=10, minutes=30),
    visit_length=Duration(seconds=1800),
)
BIRTH_DATES = ["", "1980", "1980-05", "1980-05-06", "1980-05-07", "1981-01-01"]
CAPACITY = 3
SLOTS = [(0, 10, 0, 1), (0, 10, 30, 2), (1, 10, 15, 1), (1, 11, 0, 2)]
"""The doctor, hour, minute and capacity of each slot of half an hour."""


def machine(clinic: Clinic) -> type[RuleBasedStateMachine]:
    """The rules, for this running service."""
    client = clinic.client

    class Front(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            c = client.clinics.CreateClinic(
                clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="Model", time_zone="UTC"))
            ).clinic
            key = c.id[-12:] + c.id[:8]
            self.doctors = [
                client.doctors.CreateDoctor(
                    doctor_pb2.CreateDoctorRequest(
                        doctor=doctor_pb2.Doctor(
                            code=f"{key}{n}",
                            display_name="D",
                            specialty="S",
                            clinic_id=c.id,
                            max_patients_per_day=CAPACITY,
                        )
                    )
                ).doctor.id
                for n in range(2)
            ]
            self.patients = [
                client.patients.RegisterPatient(
                    patient_pb2.RegisterPatientRequest(
                        patient=patient_pb2.Patient(given_name=f"{key} {n}", phone="+5511987654321")
                    )
                ).patient.id
                for n in range(6)
            ]
            self.key = key
            self.records = list(range(6))
            """By patient the one whose record is kept."""
            self.names = [f"{key} {n}" for n in range(6)]
            self.people: list[tuple[str, str]] = []
            """Id and birth date of those who share one name and phone."""
            wanted = []
            for doctor, hour, minute, capacity in SLOTS:
                slot = slot_pb2.Slot(doctor_id=self.doctors[doctor], capacity=capacity)
                start = NOW.replace(hour=hour, minute=minute)
                slot.start_time.FromDatetime(start)
                slot.end_time.FromSeconds(int(start.timestamp()) + 1800)
                wanted.append(slot)
            made = client.slots.BatchCreateSlots(slot_pb2.BatchCreateSlotsRequest(slots=wanted))
            self.slots = [slot.id for slot in made.slots]
            self.days = [Day(), Day()]
            self.visits: list[Visit] = []
            self.holds: list[Held] = []

        # The model's rules for a place

        def place(
            self,
            patient: int | None,
            doctor: int,
            slot: int | None,
            moving: Visit | None = None,
            hold: Held | None = None,
            *,
            again: bool = False,
            override: bool = False,
        ) -> str | int:
            """The number that will be given, or the reason of the refusal; `again`: by an undo."""
            others = [visit for visit in self.visits if visit is not moving]
            if hold is not None:
                if (hold.doctor, hold.slot) != (doctor, slot) or hold.patient not in (None, patient):
                    return "HOLD_MISMATCH"
                if hold.state != "HELD":
                    return "HOLD_EXPIRED"
            live = [] if hold is not None else [h for h in self.holds if h.state == "HELD" and h.doctor == doctor]
            stays = moving is not None and moving.state in HOLDING and moving.doctor == doctor
            day = self.days[doctor]
            if not again:
                if slot is not None and any(leave.touches(slot) for leave in day.leaves):
                    return "SLOT_BLOCKED"
                if not day.present or day.exception == "CLOSED" or any(leave.touches(None) for leave in day.leaves):
                    return "DOCTOR_ABSENT"
            if any(v.patient == patient and v.doctor == doctor and v.state in LIVE for v in others):
                return "DUPLICATE_BOOKING"
            if slot is not None:
                start = SLOTS[slot][1] * 60 + SLOTS[slot][2]
                for visit in others:
                    if visit.patient == patient and visit.slot is not None and visit.state in LIVE:
                        other = SLOTS[visit.slot][1] * 60 + SLOTS[visit.slot][2]
                        if abs(other - start) < 30:
                            return "PATIENT_OVERLAP"
                stays_in_slot = stays and moving is not None and moving.slot == slot
                taken_there = sum(v.slot == slot and v.state in HOLDING for v in others)
                if taken_there + sum(h.slot == slot for h in live) >= SLOTS[slot][3] and not stays_in_slot:
                    return "SLOT_FULL"
            taken = {v.number for v in others if v.doctor == doctor and v.state in HOLDING}
            full = len(taken) + len(live) >= CAPACITY and not stays
            if full and not override:
                return "DAY_FULL"
            if again and moving is not None and moving.number not in taken:
                return moving.number
            first = CAPACITY + 1 if full else 1
            return next(n for n in itertools.count(first) if n not in taken)

        def changed(self, doctor: int, kind: str) -> int:
            self.days[doctor].revision += 1
            self.days[doctor].kinds.append(kind)
            return self.days[doctor].revision

        # Actions

        @rule(patient=st.integers(0, 5), doctor=st.integers(0, 1), dry=st.booleans())
        def book_day(self, patient: int, doctor: int, dry: bool) -> None:
            request = pb.BookAppointmentRequest(
                patient_id=self.patients[patient],
                doctor_day=pb.DoctorDay(doctor_id=self.doctors[doctor], date=TODAY),
                validate_only=dry,
            )
            self.booked(request, patient, doctor, None)

        @precondition(lambda self: self.holds)
        @rule(data=st.data(), patient=st.none() | st.integers(0, 5), dry=st.booleans(), elsewhere=st.booleans())
        def book_with_a_hold(self, data: st.DataObject, patient: int | None, dry: bool, elsewhere: bool) -> None:
            hold = data.draw(st.sampled_from(self.holds[-6:]))
            if patient is None:
                patient = 0 if hold.patient is None else hold.patient
            doctor, slot = hold.doctor, hold.slot
            if elsewhere:
                doctor, slot = 1 - doctor, None
            request = pb.BookAppointmentRequest(patient_id=self.patients[patient], validate_only=dry, hold_id=hold.id)
            self.aim(request, doctor, slot)
            self.booked(request, patient, doctor, slot, hold)

        @rule(patient=st.none() | st.integers(0, 5), doctor=st.integers(0, 1), slot=st.none() | st.integers(0, 3))
        def hold(self, patient: int | None, doctor: int, slot: int | None) -> None:
            doctor = doctor if slot is None else SLOTS[slot][0]
            request = pb.HoldPlaceRequest(patient_id="" if patient is None else self.patients[patient])
            self.aim(request, doctor, slot)
            patient = None if patient is None else self.records[patient]
            expected = self.place(patient, doctor, slot)
            twice = any(h.patient == patient and h.doctor == doctor and h.state == "HELD" for h in self.holds)
            if patient is not None and twice and expected not in ("DOCTOR_ABSENT", "SLOT_BLOCKED"):
                expected = "DUPLICATE_BOOKING"
            answer, reason = attempt(lambda: client.appointments.HoldPlace(request))
            if answer is None:
                assert reason == expected
                return
            assert isinstance(expected, int)
            self.holds.append(Held(answer.hold.id, patient, doctor, slot))

        @precondition(lambda self: self.holds)
        @rule(data=st.data(), release=st.booleans())
        def end_hold(self, data: st.DataObject, release: bool) -> None:
            hold = data.draw(st.sampled_from(self.holds[-6:]))
            if release:
                client.appointments.ReleaseHold(pb.ReleaseHoldRequest(hold_id=hold.id))
            else:
                # The clock stands, so the hold is moved to where it has run out.
                clinic.sql(
                    "update hold set create_time = create_time - interval '1 day', expire_time = moment()"
                    " where id = %s and state = 'HELD' returning id",
                    hold.id,
                )
            if hold.state == "HELD":
                hold.state = "ENDED"

        def aim(self, request: Any, doctor: int, slot: int | None) -> None:
            if slot is None:
                request.doctor_day.CopyFrom(pb.DoctorDay(doctor_id=self.doctors[doctor], date=TODAY))
            else:
                request.slot_id = self.slots[slot]

        @rule(patient=st.integers(0, 5), slot=st.integers(0, 3))
        def book_slot(self, patient: int, slot: int) -> None:
            request = pb.BookAppointmentRequest(patient_id=self.patients[patient], slot_id=self.slots[slot])
            self.booked(request, patient, SLOTS[slot][0], slot)

        def booked(
            self,
            request: pb.BookAppointmentRequest,
            patient: int,
            doctor: int,
            slot: int | None,
            hold: Held | None = None,
        ) -> None:
            patient = self.records[patient]
            expected = self.place(patient, doctor, slot, hold=hold)
            answer, reason = attempt(lambda: client.appointments.BookAppointment(request))
            if answer is None:
                assert reason == expected
                return
            assert answer.appointment.number == expected
            if not request.validate_only:
                assert answer.revision == self.changed(doctor, "BOOKED")
                self.visits.append(Visit(answer.appointment.id, patient, doctor, answer.appointment.number, slot))
                if hold is not None:
                    hold.state = "ENDED"

        @precondition(lambda self: self.visits)
        @rule(data=st.data(), doctor=st.integers(0, 1), slot=st.none() | st.integers(0, 3))
        def reschedule(self, data: st.DataObject, doctor: int, slot: int | None) -> None:
            visit = data.draw(st.sampled_from(self.visits))
            request = pb.RescheduleAppointmentRequest(appointment_id=visit.id)
            if slot is None:
                request.doctor_day.CopyFrom(pb.DoctorDay(doctor_id=self.doctors[doctor], date=TODAY))
            else:
                doctor = SLOTS[slot][0]
                request.slot_id = self.slots[slot]
            expected: str | int = "INVALID_TRANSITION"
            if visit.state == "BOOKED":
                expected = self.place(visit.patient, doctor, slot, visit)
            answer, reason = attempt(lambda: client.appointments.RescheduleAppointment(request))
            if answer is None:
                assert reason == expected
                return
            assert answer.appointment.number == expected
            if visit.doctor != doctor:
                assert answer.vacated_revision == self.changed(visit.doctor, "MOVED_OUT")
            assert answer.revision == self.changed(doctor, "MOVED_IN")
            visit.over = visit.over and visit.doctor == doctor
            visit.doctor, visit.slot, visit.number = doctor, slot, answer.appointment.number
            visit.steps = []

        @rule(
            patient=st.integers(0, 5), doctor=st.integers(0, 1), priority=st.integers(0, 3), override=st.booleans(),
        )  # fmt: skip
        def walk_in(self, patient: int, doctor: int, priority: Any, override: bool) -> None:
            record = self.records[patient]
            expected = self.place(record, doctor, None, override=override)
            over = self.place(record, doctor, None) == "DAY_FULL"
            request = queue_pb2.AddWalkInRequest(
                patient_id=self.patients[patient], doctor_id=self.doctors[doctor], priority=priority,
                override_reason="fainted" if override else "",
            )  # fmt: skip
            answer, reason = attempt(lambda: client.queues.AddWalkIn(request))
            if answer is None:
                assert reason == expected
                return
            assert answer.appointment.number == expected
            booked = self.changed(doctor, "BOOKED")
            assert answer.revision == self.changed(doctor, "CHECKED_IN") == booked + 1
            visit = Visit(answer.appointment.id, record, doctor, answer.appointment.number, None, over=over)
            shown = pb.Appointment()
            shown.CopyFrom(answer.appointment)
            shown.state = pb.Appointment.STATE_BOOKED
            shown.ClearField("check_in_time")
            visit.steps = [visit.before(shown)]
            visit.state, visit.line, visit.ticket = "CHECKED_IN", "WAITING", self.next_ticket(doctor)
            visit.priority = priority or 3
            self.visits.append(visit)

        def next_ticket(self, doctor: int) -> int:
            self.days[doctor].last_ticket += 1
            return self.days[doctor].last_ticket

        @precondition(lambda self: self.visits)
        @rule(data=st.data(), to=st.integers(0, 1), override=st.booleans())
        def transfer(self, data: st.DataObject, to: int, override: bool) -> None:
            visit = data.draw(st.sampled_from(self.visits[-6:]))
            request = queue_pb2.TransferPatientRequest(
                appointment_id=visit.id, to_doctor_id=self.doctors[to], override_reason="ill" if override else ""
            )
            over = False
            if visit.line not in ("WAITING", "CALLED", "PARKED"):
                expected: str | int = "INVALID_TRANSITION"
            elif visit.doctor == to:
                expected = "INVALID_FIELD"
            else:
                expected = self.place(visit.patient, to, None, visit, override=override)
                over = self.place(visit.patient, to, None, visit) == "DAY_FULL"
            answer, reason = attempt(lambda: client.queues.TransferPatient(request))
            if answer is None:
                assert reason == expected
                return
            assert answer.appointment.number == expected
            assert answer.vacated_revision == self.changed(visit.doctor, "TRANSFERRED_OUT")
            assert answer.revision == self.changed(to, "TRANSFERRED_IN")
            visit.doctor, visit.slot, visit.number, visit.over = to, None, answer.appointment.number, over
            visit.line, visit.ticket, visit.returned, visit.calls = "WAITING", self.next_ticket(to), 0, 0
            visit.steps = []

        @precondition(lambda self: self.visits)
        @rule(data=st.data())
        def undo(self, data: st.DataObject) -> None:
            visit = data.draw(st.sampled_from([v for v in self.visits if v.steps] or self.visits))
            expected: str | int = visit.number
            if not visit.steps:
                expected = "NOTHING_TO_UNDO"
            elif visit.state not in LIVE:
                expected = self.place(visit.patient, visit.doctor, visit.slot, visit, again=True)
            request = pb.UndoTransitionRequest(appointment_id=visit.id, etag=self.shown(visit).etag)
            answer, reason = attempt(lambda: client.appointments.UndoTransition(request))
            if answer is None:
                assert reason == expected
                return
            assert answer.appointment.number == expected
            assert answer.revision == self.changed(visit.doctor, "UNDONE")
            step = visit.steps.pop()
            for changes in ("etag", "update_time", "number", "patient_id", "patient_name"):
                step.shown.ClearField(changes)
                answer.appointment.ClearField(changes)
            assert answer.appointment == step.shown
            visit.number = int(expected)
            visit.state, visit.line, visit.ticket, visit.priority = step.state, step.line, step.ticket, step.priority

        def shown(self, visit: Visit) -> pb.Appointment:
            return client.appointments.GetAppointment(pb.GetAppointmentRequest(appointment_id=visit.id)).appointment

        @rule(doctor=st.integers(0, 1))
        def call_next(self, doctor: int) -> None:
            busy = {v.patient for v in self.visits if v.doctor != doctor and v.line in ("CALLED", "IN_CONSULTATION")}
            line = [visit for visit in self.line(doctor) if visit.patient not in busy]
            request = queue_pb2.CallNextRequest(doctor_id=self.doctors[doctor], room="1")
            answer, reason = attempt(lambda: client.queues.CallNext(request))
            if not line:
                assert reason == "QUEUE_EMPTY"
                return
            assert answer is not None
            assert answer.entry.appointment_id == line[0].id
            assert answer.revision == self.changed(doctor, "CALLED")
            line[0].line, line[0].calls, line[0].steps = "CALLED", 1, []

        @rule(doctor=st.integers(0, 1), present=st.booleans())
        def set_presence(self, doctor: int, present: bool) -> None:
            answer = client.doctors.SetDoctorAvailability(
                doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=self.doctors[doctor], date=TODAY, is_present=present)
            )
            live = sorted((v for v in self.visits if v.doctor == doctor and v.state in LIVE), key=lambda v: v.number)
            assert list(answer.affected_appointment_ids) == ([] if present else [v.id for v in live])
            assert answer.revision == self.changed(doctor, "AVAILABILITY")
            self.days[doctor].present = present

        @rule(doctor=st.integers(0, 1), exception=st.sampled_from(["CLOSED", "HOURS", ""]))
        def except_the_day(self, doctor: int, exception: str) -> None:
            named = {"doctor_id": self.doctors[doctor], "date": TODAY}
            before, self.days[doctor].exception = self.days[doctor].exception, exception
            if not exception:
                delete = schedule_pb2.DeleteScheduleExceptionRequest(**named)
                _, reason = attempt(lambda: client.schedules.DeleteScheduleException(delete))
                assert reason == ("OK" if before else "SCHEDULE_EXCEPTION_NOT_FOUND")
                return
            held = [] if exception == "CLOSED" else [TEN_O_CLOCK]
            request = schedule_pb2.SetScheduleExceptionRequest(**named, closed=not held, hours=held)
            answer = client.schedules.SetScheduleException(request)
            affected = {
                v.id
                for v in self.visits
                if v.doctor == doctor
                and v.state in LIVE
                and (not held or (v.slot is not None and SLOTS[v.slot][1:3] != (10, 0)))
            }
            assert set(answer.affected_appointment_ids) == affected

        @rule(doctor=st.integers(0, 1), policy=st.sampled_from(["KEEP", "CANCEL"]))
        def leave_for_the_day(self, doctor: int, policy: str) -> None:
            days = schedule_pb2.DateRange(from_date=TODAY, to_date=TODAY)
            self.leave(doctor, policy, None, None, days=days)

        @rule(
            doctor=st.integers(0, 1),
            # To another doctor's, or to another slot of the same one: there are no slots on other days.
            policy=st.sampled_from(["KEEP", "CANCEL", "MOVE_SAME_DOCTOR", "MOVE_SAME_SPECIALTY"]),
            start=st.sampled_from([600, 615, 630]),
        )
        def leave_for_hours(self, doctor: int, policy: str, start: int) -> None:
            hours = Interval()
            hours.start_time.FromDatetime(NOW.replace(hour=start // 60, minute=start % 60))
            hours.end_time.FromDatetime(NOW.replace(hour=(start + 30) // 60, minute=(start + 30) % 60))
            self.leave(doctor, policy, start, start + 30, hours=hours)

        def leave(self, doctor: int, policy: str, start: int | None, end: int | None, **period: Any) -> None:
            wanted = schedule_pb2.Leave(doctor_id=self.doctors[doctor], **period)
            wanted.policy = schedule_pb2.Leave.Policy.Value(f"POLICY_{policy}")
            trial = schedule_pb2.CreateLeaveRequest(leave=wanted, validate_only=True)
            planned, _ = attempt(lambda: client.schedules.CreateLeave(trial))
            answer, reason = attempt(
                lambda: client.schedules.CreateLeave(schedule_pb2.CreateLeaveRequest(leave=wanted))
            )
            others = self.days[doctor].leaves
            if any(
                None in (start, end, other.start, other.end) or (other.start < end and start < other.end)  # type: ignore[operator]
                for other in others
            ):
                assert reason == "LEAVE_OVERLAP"
                return
            assert answer is not None, reason
            assert list(planned.affected) == list(answer.affected)
            made = Leave(answer.leave.id, start, end)
            others.append(made)
            met = [
                v
                for v in self.visits
                if v.doctor == doctor
                and v.state in LIVE
                and (start is None or (v.slot is not None and made.touches(v.slot)))
            ]
            outcomes = []
            for visit in sorted(met, key=lambda v: (-1 if v.slot is None else minute_of(v.slot), v.number)):
                outcomes.append((visit.id, self.settle(visit, policy)))
            names = schedule_pb2.AffectedAppointment.Outcome
            assert [(a.appointment_id, names.Name(a.outcome)) for a in answer.affected] == [
                (visit, f"OUTCOME_{outcome}") for visit, outcome in outcomes
            ]

        def settle(self, visit: Visit, policy: str) -> str:
            if visit.state != "BOOKED" or policy == "KEEP":
                return "KEPT"
            if policy == "CANCEL":
                visit.state, visit.steps = "CANCELLED", []
                self.changed(visit.doctor, "CANCELLED")
                return "CANCELLED"
            assert visit.slot is not None
            for slot in sorted(range(len(SLOTS)), key=minute_of):
                same = SLOTS[slot][0] == visit.doctor
                if same != (policy == "MOVE_SAME_DOCTOR") or (same and minute_of(slot) <= minute_of(visit.slot)):
                    continue
                number = self.place(visit.patient, SLOTS[slot][0], slot, visit)
                if isinstance(number, int):
                    if not same:
                        self.changed(visit.doctor, "MOVED_OUT")
                    self.changed(SLOTS[slot][0], "MOVED_IN")
                    visit.over, visit.steps = visit.over and same, []
                    visit.doctor, visit.slot, visit.number = SLOTS[slot][0], slot, number
                    return "MOVED"
            return "NOT_MOVED"

        @precondition(lambda self: any(day.leaves for day in self.days))
        @rule(data=st.data())
        def cancel_leave(self, data: st.DataObject) -> None:
            leave = data.draw(st.sampled_from([leave for day in self.days for leave in day.leaves]))
            request = schedule_pb2.CancelLeaveRequest(leave_id=leave.id)
            client.schedules.CancelLeave(request)
            _, reason = attempt(lambda: client.schedules.CancelLeave(request))
            assert reason == "LEAVE_STATE"
            for day in self.days:
                day.leaves = [other for other in day.leaves if other is not leave]

        @precondition(lambda self: self.visits)
        @rule(data=st.data(), verb=st.sampled_from(sorted(VERBS)))
        def verb(self, data: st.DataObject, verb: str) -> None:
            # Mostly a recent one, so that visits get to their end.
            visit = data.draw(st.sampled_from(self.visits[-6:]))
            call, allowed, after = VERBS[verb]
            at = visit.line if visit.state == "CHECKED_IN" else visit.state
            before = visit.before(self.shown(visit))
            answer, reason = attempt(lambda: call(client, visit.id))
            if at not in allowed:
                already = verb == "CheckIn" and visit.state in ("CHECKED_IN", "IN_CONSULTATION")
                too_early = verb == "MarkNoShow" and visit.state == "BOOKED"
                assert not too_early
                assert reason == ("ALREADY_CHECKED_IN" if already else "INVALID_TRANSITION")
                return
            if verb == "CallAgain" and visit.calls == 3:
                assert reason == "CALL_LIMIT_REACHED"
                return
            if verb == "MarkNoShow" and visit.slot is not None:
                assert reason == "TOO_EARLY"
                return
            assert answer is not None, reason
            state, line, kind = after
            assert answer.revision == self.changed(visit.doctor, kind)
            day = self.days[visit.doctor]
            if verb == "CheckIn":
                visit.ticket = self.next_ticket(visit.doctor)
            if verb == "CallAgain":
                visit.calls += 1
            visit.steps = [*visit.steps, before] if verb in UNDOABLE else []
            if line == "WAITING" and visit.line == "MISSED":
                visit.returned = day.revision
            visit.state = state or visit.state
            visit.line = "LEFT" if verb == "CancelAppointment" and visit.line else line
            if verb == "CancelAppointment" and not visit.ticket:
                visit.line = None

        @precondition(lambda self: self.visits)
        @rule(data=st.data(), priority=st.integers(1, 3))
        def set_priority(self, data: st.DataObject, priority: queue_pb2.Priority.ValueType) -> None:
            visit = data.draw(st.sampled_from(self.visits[-6:]))
            request = queue_pb2.SetPriorityRequest(appointment_id=visit.id, priority=priority)
            answer, reason = attempt(lambda: client.queues.SetPriority(request))
            if visit.line not in ANY_LINE:
                assert reason == "INVALID_TRANSITION"
                return
            assert answer is not None, reason
            assert answer.revision == self.changed(visit.doctor, "PRIORITY_SET")
            visit.priority = priority
            visit.steps = []

        @rule(keep=st.integers(0, 5), other=st.integers(4, 5))
        def merge(self, keep: int, other: int) -> None:
            request = patient_pb2.MergePatientsRequest(
                keep_patient_id=self.patients[keep], merge_patient_id=self.patients[other]
            )
            answer, reason = attempt(lambda: client.patients.MergePatients(request))
            kept, merged = self.records[keep], self.records[other]
            if keep == other:
                assert reason == "INVALID_FIELD"
                return
            if kept == merged:
                assert reason == "SAME_PATIENT"
                return
            theirs, ours = (
                [v for v in self.visits if v.patient == patient and v.state in LIVE] for patient in (merged, kept)
            )
            if {v.doctor for v in theirs} & {v.doctor for v in ours}:
                assert reason == "DUPLICATE_BOOKING"
                return
            starts = [
                [SLOTS[v.slot][1] * 60 + SLOTS[v.slot][2] for v in each if v.slot is not None]
                for each in (theirs, ours)
            ]
            if any(abs(one - other) < 30 for one in starts[0] for other in starts[1]):
                assert reason == "PATIENT_OVERLAP"
                return
            assert answer is not None, reason
            assert answer.patient.id == self.patients[kept]
            for visit in theirs:
                self.changed(visit.doctor, "UPDATED")
            for visit in self.visits:
                visit.patient = kept if visit.patient == merged else visit.patient
            self.records = [kept if record == merged else record for record in self.records]
            for hold in [h for h in self.holds if h.patient == merged]:
                hold.patient = kept
                twice = any(
                    h is not hold and h.state == "HELD" and h.patient == kept and h.doctor == hold.doctor
                    for h in self.holds
                )
                if hold.state == "HELD" and twice:
                    hold.state = "ENDED"

        @rule(patient=st.integers(0, 5), name=st.sampled_from(["Ana", "ANA", "Eva"]))
        def correct_the_name(self, patient: int, name: str) -> None:
            name = f"{name} {self.key} {self.records[patient]}"
            changed = patient_pb2.Patient(id=self.patients[patient], given_name=name)
            client.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))
            record = self.records[patient]
            if self.names[record] != name:
                self.names[record] = name
                for visit in self.visits:
                    if visit.patient == record and visit.state in LIVE:
                        self.changed(visit.doctor, "UPDATED")

        @rule(name=st.sampled_from(["João", "JOAO", "joa\u0303o\u200b"]), born=st.sampled_from(BIRTH_DATES))
        def register(self, name: str, born: str) -> None:
            person = patient_pb2.Patient(given_name=f"{name} {self.key}", phone="+442079460958")
            for part, value in zip(("year", "month", "day"), born.split("-"), strict=False):
                setattr(person.birth_date, part, int(value or 0))
            if not born:
                person.ClearField("birth_date")
            request = patient_pb2.RegisterPatientRequest(patient=person)
            answer, reason = attempt(lambda: client.patients.RegisterPatient(request))
            found = [n for n, (_, known) in enumerate(self.people) if known.startswith(born) or born.startswith(known)]
            if len(found) > 1:
                assert reason == "PATIENT_AMBIGUOUS"
                return
            assert answer is not None, reason
            assert answer.already_registered == bool(found)
            if not found:
                assert answer.patient.id not in [person_id for person_id, _ in self.people]
                self.people.append((answer.patient.id, born))
            else:
                person_id, known = self.people[found[0]]
                assert answer.patient.id == person_id
                self.people[found[0]] = (person_id, max(known, born, key=len))
            date = answer.patient.birth_date
            shown = "-".join(f"{part:02}" for part in (date.year, date.month, date.day) if part)
            assert shown == dict(self.people)[answer.patient.id]

        # Invariants

        def line(self, doctor: int) -> list[Visit]:
            waiting = [v for v in self.visits if v.doctor == doctor and v.line == "WAITING"]
            # The clock stands, so all have checked in at one time.
            return sorted(waiting, key=lambda v: (v.priority, v.returned, v.ticket))

        @invariant()
        def no_place_is_sold_twice(self) -> None:
            for slot, (_, _, _, capacity) in enumerate(SLOTS):
                shown = client.slots.GetSlot(slot_pb2.GetSlotRequest(slot_id=self.slots[slot])).slot
                assert shown.held_count == sum(h.slot == slot and h.state == "HELD" for h in self.holds)
                assert shown.booked_count == sum(v.slot == slot and v.state in HOLDING for v in self.visits) <= capacity
                assert shown.available_count == max(capacity - shown.booked_count - shown.held_count, 0)

        @invariant()
        def the_queues_agree(self) -> None:
            for doctor, day in enumerate(self.days):
                queue = client.queues.GetQueue(queue_pb2.GetQueueRequest(doctor_id=self.doctors[doctor])).queue
                assert queue.revision == day.revision
                mine = [v for v in self.visits if v.doctor == doctor]
                assert queue.expected_count == sum(v.state == "BOOKED" for v in mine)
                expected = self.line(doctor)
                for state in IN_LINE[1:]:
                    expected += sorted((v for v in mine if v.line == state), key=lambda v: v.ticket)
                names = queue_pb2.QueueEntry.State
                shown = [
                    (e.appointment_id, e.ticket, names.Name(e.state), e.patient_id, e.patient_name, e.priority)
                    for e in queue.entries
                ]
                assert shown == [
                    (v.id, v.ticket, f"STATE_{v.line}", self.patients[v.patient], self.names[v.patient], v.priority)
                    for v in expected
                ]
                waiting = len(self.line(doctor))
                assert [e.position for e in queue.entries] == [
                    *range(1, waiting + 1),
                    *[0] * (len(expected) - waiting),
                ]

        @invariant()
        def the_days_agree(self) -> None:
            for doctor, day in enumerate(self.days):
                request = schedule_pb2.GetDoctorScheduleRequest(
                    doctor_id=self.doctors[doctor], from_date=TODAY, to_date=TODAY
                )
                (found,) = client.schedules.GetDoctorSchedule(request).days
                booked = sum(v.doctor == doctor and v.state in HOLDING for v in self.visits)
                held = sum(h.doctor == doctor and h.state == "HELD" for h in self.holds)
                open_ = day.present and day.exception != "CLOSED" and not any(x.touches(None) for x in day.leaves)
                assert (found.present, found.HasField("exception")) == (day.present, bool(day.exception))
                free = max(CAPACITY - booked - held, 0) if open_ else 0
                assert (found.booked_count, found.held_count, found.free_count) == (booked, held, free)
                for slot in found.slots:
                    blocked = any(x.touches(self.slots.index(slot.id)) for x in day.leaves)
                    assert slot.state == (slot_pb2.Slot.STATE_BLOCKED if blocked else slot_pb2.Slot.STATE_OPEN)
                    taken = [v for v in self.visits if v.state in HOLDING and v.slot == self.slots.index(slot.id)]
                    assert slot.booked_count == len(taken)

        def teardown(self) -> None:
            for doctor, day in enumerate(self.days):
                self.the_history_replays(self.doctors[doctor], doctor, day)
            for patient, record in enumerate(self.records):
                known = client.patients.GetPatient(
                    patient_pb2.GetPatientRequest(patient_id=self.patients[patient])
                ).patient
                assert (known.id, known.given_name) == (self.patients[record], self.names[record])
            for visit in self.visits:
                got = client.appointments.GetAppointment(pb.GetAppointmentRequest(appointment_id=visit.id)).appointment
                assert pb.Appointment.State.Name(got.state) == f"STATE_{visit.state}"
                assert got.patient_id == self.patients[visit.patient]
                assert bool(got.override_reason) == visit.over
                assert (got.number, got.slot_id) == (
                    visit.number,
                    "" if visit.slot is None else self.slots[visit.slot],
                )

        def the_history_replays(self, doctor_id: str, doctor: int, day: Day) -> None:
            events = clinic.sql(
                "select revision, change_kind(type), appointment_id::text, queue_state, ticket from log"
                " where revision > 0 and doctor_id = %s order by revision",
                doctor_id,
            )
            assert [revision for revision, *_ in events] == list(range(2, day.revision + 1))
            assert [kind for _, kind, *_ in events] == day.kinds
            line: dict[str, str] = {}
            tickets = []
            expected: set[str] = set()
            for _, kind, appointment_id, state, ticket in events:
                if kind in ("BOOKED", "MOVED_IN") or (kind == "UNDONE" and state in (None, "LEFT")):
                    expected.add(appointment_id)
                elif kind in ("CANCELLED", "MOVED_OUT", "NO_SHOW", "CHECKED_IN"):
                    expected.discard(appointment_id)
                if kind in ("CHECKED_IN", "TRANSFERRED_IN"):
                    tickets.append(ticket)
                if state == "TRANSFERRED" or (kind == "UNDONE" and state == "LEFT"):
                    del line[appointment_id]
                elif state is not None:
                    line[appointment_id] = state
            assert tickets == list(range(1, day.last_ticket + 1))
            mine = [v for v in self.visits if v.doctor == doctor]
            assert expected == {v.id for v in mine if v.state == "BOOKED"}
            assert line == {v.id: v.line for v in mine if v.line is not None}

    return Front


def attempt(call: Any) -> tuple[Any, str]:
    """The answer, or the reason of the refusal."""
    try:
        return call(), "OK"
    except FrontdeskError as error:
        if error.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            raise
        return None, error.reason


UNDOABLE = {
    "CheckIn", "StartAppointment", "CompleteAppointment", "MarkNoShow", "LeaveQueue", "MarkMissed", "ParkPatient",
    "CancelAppointment",
}  # fmt: skip
ANY_LINE = {"WAITING", "CALLED", "PARKED", "MISSED"}
VERBS: dict[str, tuple[Any, set[str], tuple[str, str | None, str]]] = {
    "CheckIn": (
        lambda c, i: c.queues.CheckIn(queue_pb2.CheckInRequest(appointment_id=i)),
        {"BOOKED"}, ("CHECKED_IN", "WAITING", "CHECKED_IN"),
    ),
    "StartAppointment": (
        lambda c, i: c.appointments.StartAppointment(pb.StartAppointmentRequest(appointment_id=i)),
        {"WAITING", "CALLED"}, ("IN_CONSULTATION", "IN_CONSULTATION", "STARTED"),
    ),
    "CompleteAppointment": (
        lambda c, i: c.appointments.CompleteAppointment(pb.CompleteAppointmentRequest(appointment_id=i)),
        {"IN_CONSULTATION"}, ("COMPLETED", "DONE", "COMPLETED"),
    ),
    "CancelAppointment": (
        lambda c, i: c.appointments.CancelAppointment(pb.CancelAppointmentRequest(appointment_id=i)),
        {"BOOKED"} | ANY_LINE, ("CANCELLED", "LEFT", "CANCELLED"),
    ),
    "MarkNoShow": (
        lambda c, i: c.appointments.MarkNoShow(pb.MarkNoShowRequest(appointment_id=i)),
        {"BOOKED"}, ("NO_SHOW", None, "NO_SHOW"),
    ),
    "CallAgain": (
        lambda c, i: c.queues.CallAgain(queue_pb2.CallAgainRequest(appointment_id=i)),
        {"CALLED"}, ("", "CALLED", "CALLED_AGAIN"),
    ),
    "ReturnToLine": (
        lambda c, i: c.queues.ReturnToLine(queue_pb2.ReturnToLineRequest(appointment_id=i)),
        {"CALLED", "PARKED", "MISSED"}, ("", "WAITING", "RETURNED"),
    ),
    "ParkPatient": (
        lambda c, i: c.queues.ParkPatient(queue_pb2.ParkPatientRequest(appointment_id=i)),
        {"WAITING", "CALLED"}, ("", "PARKED", "PARKED"),
    ),
    "MarkMissed": (
        lambda c, i: c.queues.MarkMissed(queue_pb2.MarkMissedRequest(appointment_id=i)),
        {"CALLED"}, ("", "MISSED", "MISSED"),
    ),
    "LeaveQueue": (
        lambda c, i: c.queues.LeaveQueue(queue_pb2.LeaveQueueRequest(appointment_id=i)),
        ANY_LINE, ("LEFT", "LEFT", "LEFT"),
    ),
}  # fmt: skip
"""For each verb its call, the states that allow it, and the resulting visit state, queue state and event."""


def test_the_service_agrees_with_the_model(clinic: Clinic) -> None:
    """Over capacity by overrides alone, unique numbers, tickets and revisions without gaps, an undo restores exactly,
    history = present, the same refusals.
    """
    run_state_machine_as_test(machine(clinic))
