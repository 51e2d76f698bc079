"""Cases 21 to 26: a change that is requested twice happens once, whatever the change."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.message import Message
from google.type.dayofweek_pb2 import MONDAY, TUESDAY, WEDNESDAY, DayOfWeek

from clinic.frontdesk.v1 import (
    access_pb2,
    appointment_pb2,
    auth_pb2,
    clinic_pb2,
    doctor_pb2,
    notification_pb2,
    patient_pb2,
    policy_pb2,
    queue_pb2,
    schedule_pb2,
    slot_pb2,
    waitlist_pb2,
)
from frontdesk.settings import Settings
from tests.clinic import Front, day, outcome, reason_of, refusal, today, tomorrow
from tests.hostile.methods import (
    MUTATIONS,
    call,
    credentials_for,
    given_up,
    hours_at,
    manners,
    noon,
    register,
    request_class,
    slot_at,
    waiting,
)
from tests.hostile.wire import Line, serving
from tests.identities import bearing, create_key
from tests.waiting import until

KEY = "the same intention"

Step = Callable[[], Awaitable[Any]]


async def _nothing() -> None:
    pass


@dataclass
class Scenario:
    """A change that can be made now, another request to the same method, and a later step."""

    request: Message
    other: Message
    later: Step = _nothing
    """Changes the state, so that the first change could not be made again."""
    same: Callable[[Any], Any] = field(default=lambda answer: answer)
    """The part of the answer that stays the same after `later`."""


async def _appointment(front: Front, *steps: str, **fields: Any) -> tuple[str, str]:
    """A booking for today after these steps, and its doctor."""
    doctor = await front.doctor()
    patient = await front.patient()
    booked = await front.book(patient.id, doctor.id, today(), **fields)
    for step in steps:
        if step == "CallNext":
            await call(front, step, queue_pb2.CallNextRequest(doctor_id=doctor.id))
        else:
            await call(front, step, request_class(step)(appointment_id=booked.appointment.id))
    return booked.appointment.id, doctor.id


def _visit(name: str, *before: str, later: str) -> Callable[[Front], Awaitable[Scenario]]:
    """A verb on an appointment that has gone through the steps in `before`."""

    async def make(front: Front) -> Scenario:
        appointment, _ = await _appointment(front, *before)
        other, _ = await _appointment(front, *before)
        request = request_class(name)

        async def move_on() -> None:
            await call(front, later, request_class(later)(appointment_id=appointment))

        return Scenario(request(appointment_id=appointment), request(appointment_id=other), move_on, _without_position)

    return make


def _without_position(answer: Any) -> Any:
    # A replay answers the present position.
    if hasattr(answer, "entry"):
        answer.entry.ClearField("position")
    return answer


def _only(*names: str) -> Callable[[Any], Any]:
    """Only these fields of the answered resource, because a replay answers records as they are now."""

    def pick(answer: Any) -> Any:
        resource = getattr(answer, answer.DESCRIPTOR.fields[0].name)
        return [[getattr(one, name) for name in names] for one in ([resource] if hasattr(resource, "id") else resource)]

    return pick


async def _create_clinic(front: Front) -> Scenario:
    made = clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="A", time_zone="America/Lima"))
    other = clinic_pb2.CreateClinicRequest(clinic=clinic_pb2.Clinic(name="B", time_zone="America/Lima"))

    async def later() -> None:
        ((clinic,),) = front.sql("select id::text from clinic where name = 'A'")
        changed = clinic_pb2.Clinic(id=clinic, name="C")
        await front.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=changed))

    return Scenario(made, other, later, _only("id"))


async def _update_clinic(front: Front) -> Scenario:
    clinic = await front.clinic()

    def named(name: str) -> clinic_pb2.UpdateClinicRequest:
        return clinic_pb2.UpdateClinicRequest(clinic=clinic_pb2.Clinic(id=clinic.id, name=name), etag=clinic.etag)

    async def later() -> None:
        changed = clinic_pb2.Clinic(id=clinic.id, name="C")
        await front.clinics.UpdateClinic(clinic_pb2.UpdateClinicRequest(clinic=changed))

    return Scenario(named("A"), named("B"), later, _only("id"))


async def _register_patient(front: Front) -> Scenario:
    def named(name: str) -> patient_pb2.RegisterPatientRequest:
        return patient_pb2.RegisterPatientRequest(patient=patient_pb2.Patient(given_name=name, phone="+5511987654321"))

    async def later() -> None:
        ((patient,),) = front.sql("select id::text from patient where given_name = 'Rosa'")
        changed = patient_pb2.Patient(id=patient, given_name="Rosinha")
        await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))

    return Scenario(named("Rosa"), named("Ana"), later, lambda answer: (answer.patient.id, answer.already_registered))


async def _update_patient(front: Front) -> Scenario:
    patient = await front.patient()

    def named(name: str) -> patient_pb2.UpdatePatientRequest:
        changed = patient_pb2.Patient(id=patient.id, given_name=name)
        return patient_pb2.UpdatePatientRequest(patient=changed, etag=patient.etag)

    async def later() -> None:
        changed = patient_pb2.Patient(id=patient.id, given_name="Rosinha")
        await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))

    return Scenario(named("Rosa"), named("Ana"), later, _only("id"))


async def _merge_patients(front: Front) -> Scenario:
    kept, merged, other = [patient.id for patient in await front.people(3)]

    def of(patient_id: str) -> patient_pb2.MergePatientsRequest:
        return patient_pb2.MergePatientsRequest(keep_patient_id=kept, merge_patient_id=patient_id)

    async def later() -> None:
        changed = patient_pb2.Patient(id=merged, given_name="Rosinha")
        await front.patients.UpdatePatient(patient_pb2.UpdatePatientRequest(patient=changed))

    return Scenario(of(merged), of(other), later, _only("id"))


async def _create_doctor(front: Front) -> Scenario:
    def coded(code: str) -> doctor_pb2.CreateDoctorRequest:
        return doctor_pb2.CreateDoctorRequest(doctor=doctor_pb2.Doctor(code=code, display_name="Dr"))

    async def later() -> None:
        ((doctor,),) = front.sql("select id::text from doctor where code = 'A'")
        changed = doctor_pb2.Doctor(id=doctor, code="C")
        await front.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=changed))

    return Scenario(coded("A"), coded("B"), later, _only("id"))


async def _update_doctor(front: Front) -> Scenario:
    doctor = await front.doctor()

    def named(name: str) -> doctor_pb2.UpdateDoctorRequest:
        changed = doctor_pb2.Doctor(id=doctor.id, display_name=name)
        return doctor_pb2.UpdateDoctorRequest(doctor=changed, etag=doctor.etag)

    async def later() -> None:
        changed = doctor_pb2.Doctor(id=doctor.id, display_name="C")
        await front.doctors.UpdateDoctor(doctor_pb2.UpdateDoctorRequest(doctor=changed))

    return Scenario(named("A"), named("B"), later, _only("id"))


async def _set_availability(front: Front) -> Scenario:
    doctor = await front.doctor()
    booked = await front.book((await front.patient()).id, doctor.id, tomorrow())

    def said(note: str) -> doctor_pb2.SetDoctorAvailabilityRequest:
        return doctor_pb2.SetDoctorAvailabilityRequest(
            doctor_id=doctor.id, date=day(tomorrow()), is_present=False, note=note
        )

    async def later() -> None:
        back = doctor_pb2.SetDoctorAvailabilityRequest(doctor_id=doctor.id, date=day(tomorrow()), is_present=True)
        await front.doctors.SetDoctorAvailability(back)
        cancel = appointment_pb2.CancelAppointmentRequest(appointment_id=booked.appointment.id)
        await front.appointments.CancelAppointment(cancel)

    return Scenario(said("ill"), said("away"), later)


async def _set_weekly_schedule(front: Front) -> Scenario:
    doctor = await front.doctor()

    def on(weekday: "DayOfWeek.ValueType") -> schedule_pb2.SetWeeklyScheduleRequest:
        rule = schedule_pb2.WeeklyRule(weekday=weekday, **hours_at(9, 12))
        return schedule_pb2.SetWeeklyScheduleRequest(doctor_id=doctor.id, effective_from=day(tomorrow()), rules=[rule])

    async def later() -> None:
        await front.schedules.SetWeeklySchedule(on(WEDNESDAY))

    return Scenario(on(MONDAY), on(TUESDAY), later)


def _except(doctor_id: str, **fields: Any) -> schedule_pb2.SetScheduleExceptionRequest:
    return schedule_pb2.SetScheduleExceptionRequest(doctor_id=doctor_id, date=day(tomorrow()), **fields)


async def _set_schedule_exception(front: Front) -> Scenario:
    doctor, patient = await front.doctor(), await front.patient()
    await front.book(patient.id, doctor.id, tomorrow())

    async def later() -> None:
        await front.schedules.SetScheduleException(_except(doctor.id, hours=[schedule_pb2.Hours(**hours_at(14, 15))]))

    first = _except(doctor.id, closed=True)
    return Scenario(first, _except(doctor.id, hours=[schedule_pb2.Hours(**hours_at(9, 12))]), later)


async def _delete_schedule_exception(front: Front) -> Scenario:
    doctor, other = await front.doctor(), await front.doctor()
    for one in (doctor, other):
        await front.schedules.SetScheduleException(_except(one.id, closed=True))

    def of(doctor_id: str) -> schedule_pb2.DeleteScheduleExceptionRequest:
        return schedule_pb2.DeleteScheduleExceptionRequest(doctor_id=doctor_id, date=day(tomorrow()))

    async def later() -> None:
        await front.schedules.SetScheduleException(_except(doctor.id, closed=True))

    return Scenario(of(doctor.id), of(other.id), later)


async def _generate_slots(front: Front) -> Scenario:
    doctor = await front.doctor()
    await front.schedules.SetScheduleException(_except(doctor.id, hours=[schedule_pb2.Hours(**hours_at(9, 12))]))

    def until(days: int) -> schedule_pb2.GenerateSlotsRequest:
        return schedule_pb2.GenerateSlotsRequest(
            doctor_id=doctor.id, from_date=day(tomorrow()), to_date=day(tomorrow() + timedelta(days))
        )

    return Scenario(until(0), until(1), lambda: _delete_slots_of(front, doctor.id))


async def _create_leave(front: Front) -> Scenario:
    doctor = await front.doctor()

    def on(offset: int) -> schedule_pb2.CreateLeaveRequest:
        date = day(tomorrow() + timedelta(days=offset))
        days = schedule_pb2.DateRange(from_date=date, to_date=date)
        return schedule_pb2.CreateLeaveRequest(leave=schedule_pb2.Leave(doctor_id=doctor.id, days=days))

    async def later() -> None:
        listed = await front.schedules.ListLeaves(schedule_pb2.ListLeavesRequest(doctor_id=doctor.id))
        await front.schedules.CancelLeave(schedule_pb2.CancelLeaveRequest(leave_id=listed.leaves[0].id))

    return Scenario(on(0), on(1), later, _only("id", "state"))


async def _cancel_leave(front: Front) -> Scenario:
    doctor = await front.doctor()
    one, other = [(await front.leave(doctor.id, tomorrow() + timedelta(days=n))).leave for n in range(2)]

    async def later() -> None:
        await front.leave(doctor.id, tomorrow())

    return Scenario(
        schedule_pb2.CancelLeaveRequest(leave_id=one.id), schedule_pb2.CancelLeaveRequest(leave_id=other.id), later
    )


async def _delete_slots_of(front: Front, doctor_id: str) -> None:
    for (slot_id,) in front.sql("select id::text from slot where doctor_id = %s", doctor_id):
        await front.slots.DeleteSlot(slot_pb2.DeleteSlotRequest(slot_id=slot_id))


async def _create_slot(front: Front) -> Scenario:
    doctor = await front.doctor()

    def at(days: int) -> slot_pb2.CreateSlotRequest:
        return slot_pb2.CreateSlotRequest(slot=slot_at(doctor.id, noon(days)))

    return Scenario(at(2), at(3), lambda: _delete_slots_of(front, doctor.id), _only("id"))


async def _batch_create_slots(front: Front) -> Scenario:
    doctor = await front.doctor()

    def at(*days: int) -> slot_pb2.BatchCreateSlotsRequest:
        return slot_pb2.BatchCreateSlotsRequest(slots=[slot_at(doctor.id, noon(n)) for n in days])

    return Scenario(at(2, 3), at(4, 5), lambda: _delete_slots_of(front, doctor.id), _only("id"))


async def _update_slot(front: Front) -> Scenario:
    slot = await front.slot((await front.doctor()).id, noon(2))

    def to(capacity: int) -> slot_pb2.UpdateSlotRequest:
        return slot_pb2.UpdateSlotRequest(slot=slot_pb2.Slot(id=slot.id, capacity=capacity))

    async def later() -> None:
        await front.slots.UpdateSlot(to(5))

    return Scenario(to(2), to(3), later, _only("id", "capacity"))


async def _block_slots(front: Front) -> Scenario:
    slot = await front.slot((await front.doctor()).id, noon(2))

    def because(reason: str) -> slot_pb2.BlockSlotsRequest:
        return slot_pb2.BlockSlotsRequest(slot_ids=[slot.id], block_reason=reason)

    async def later() -> None:
        await front.slots.ReleaseSlots(slot_pb2.ReleaseSlotsRequest(slot_ids=[slot.id]))

    return Scenario(because("ill"), because("away"), later, _only("id", "state"))


async def _release_slots(front: Front) -> Scenario:
    doctor = await front.doctor()
    slots = [await front.slot(doctor.id, noon(n)) for n in (2, 3)]
    await front.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id for slot in slots]))

    async def later() -> None:
        await front.slots.BlockSlots(slot_pb2.BlockSlotsRequest(slot_ids=[slot.id for slot in slots]))

    first, second = (slot_pb2.ReleaseSlotsRequest(slot_ids=[slot.id]) for slot in slots)
    return Scenario(first, second, later, _only("id", "state"))


async def _delete_slot(front: Front) -> Scenario:
    doctor = await front.doctor()
    first, second = [slot_pb2.DeleteSlotRequest(slot_id=(await front.slot(doctor.id, noon(n))).id) for n in (2, 3)]
    return Scenario(first, second)


async def _book(front: Front) -> Scenario:
    doctor, patient = await front.doctor(), await front.patient()
    target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))

    def because(reason: str) -> appointment_pb2.BookAppointmentRequest:
        return appointment_pb2.BookAppointmentRequest(patient_id=patient.id, doctor_day=target, reason=reason)

    async def later() -> None:
        ((appointment,),) = front.sql("select id::text from appointment where doctor_id = %s", doctor.id)
        moved = appointment_pb2.RescheduleAppointmentRequest(
            appointment_id=appointment,
            doctor_day=appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(tomorrow())),
        )
        await front.appointments.RescheduleAppointment(moved)
        cancel = appointment_pb2.CancelAppointmentRequest(appointment_id=appointment)
        await front.appointments.CancelAppointment(cancel)

    return Scenario(because("cough"), because("fever"), later)


async def _hold_place(front: Front) -> Scenario:
    doctor, patient = await front.doctor(), await front.patient()
    slots = [await front.slot(doctor.id, noon(days)) for days in (2, 3)]

    async def later() -> None:
        for (hold,) in front.sql("select id::text from hold where doctor_id = %s", doctor.id):
            await front.appointments.ReleaseHold(appointment_pb2.ReleaseHoldRequest(hold_id=hold))
        await front.book_slot((await front.patient()).id, slots[0].id)

    first, other = (appointment_pb2.HoldPlaceRequest(slot_id=slot.id, patient_id=patient.id) for slot in slots)
    return Scenario(first, other, later)


async def _release_hold(front: Front) -> Scenario:
    doctor = await front.doctor()
    first, other = [
        await front.hold_slot((await front.slot(doctor.id, noon(n))).id, patient_id=(await front.patient()).id)
        for n in (2, 3)
    ]
    request = appointment_pb2.ReleaseHoldRequest
    return Scenario(request(hold_id=first.id), request(hold_id=other.id))


async def _join_waitlist(front: Front) -> Scenario:
    doctor, patient = await front.doctor(), await front.patient()

    def wish(days: int) -> waitlist_pb2.JoinWaitlistRequest:
        on = day(noon(days).date())
        return waitlist_pb2.JoinWaitlistRequest(patient_id=patient.id, doctor_id=doctor.id, from_date=on, to_date=on)

    async def later() -> None:
        for (entry,) in front.sql("select id::text from waitlist_entry where patient_id = %s", patient.id):
            await front.waitlist.LeaveWaitlist(waitlist_pb2.LeaveWaitlistRequest(entry_id=entry))

    return Scenario(wish(5), wish(6), later)


async def _two_offers(front: Front) -> tuple[str, str]:
    first, other = [await waiting(front, (await front.patient()).id, (await front.doctor()).id) for _ in range(2)]
    return first, other


async def _leave_waitlist(front: Front) -> Scenario:
    first, other = await _two_offers(front)
    request = waitlist_pb2.LeaveWaitlistRequest
    return Scenario(request(entry_id=first), request(entry_id=other))


async def _offer_place(front: Front) -> Scenario:
    doctor = await front.doctor()
    on = day(noon(60).date())
    first, other = [
        (
            await front.waitlist.JoinWaitlist(
                waitlist_pb2.JoinWaitlistRequest(
                    patient_id=(await front.patient()).id, doctor_id=doctor.id, from_date=on, to_date=on
                )
            )
        ).entry.id
        for _ in range(2)
    ]
    place = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(noon(9).date()))

    async def later() -> None:
        await front.waitlist.AcceptOffer(waitlist_pb2.AcceptOfferRequest(entry_id=first))

    request = waitlist_pb2.OfferPlaceRequest
    return Scenario(request(entry_id=first, doctor_day=place), request(entry_id=other, doctor_day=place), later)


async def _accept_offer(front: Front) -> Scenario:
    first, other = await _two_offers(front)
    request = waitlist_pb2.AcceptOfferRequest
    return Scenario(request(entry_id=first), request(entry_id=other), same=lambda answer: answer.appointment.id)


async def _decline_offer(front: Front) -> Scenario:
    first, other = await _two_offers(front)
    request = waitlist_pb2.DeclineOfferRequest
    return Scenario(request(entry_id=first), request(entry_id=other))


async def _update_appointment(front: Front) -> Scenario:
    appointment, _ = await _appointment(front)

    def because(reason: str) -> appointment_pb2.UpdateAppointmentRequest:
        changed = appointment_pb2.Appointment(id=appointment, reason=reason)
        return appointment_pb2.UpdateAppointmentRequest(appointment=changed)

    async def later() -> None:
        await front.check_in(appointment)

    return Scenario(because("cough"), because("fever"), later)


async def _reschedule(front: Front) -> Scenario:
    appointment, doctor = await _appointment(front)

    def to(days: int) -> appointment_pb2.RescheduleAppointmentRequest:
        target = appointment_pb2.DoctorDay(doctor_id=doctor, date=day(noon(days).date()))
        return appointment_pb2.RescheduleAppointmentRequest(appointment_id=appointment, doctor_day=target)

    async def later() -> None:
        await front.appointments.RescheduleAppointment(to(5))

    return Scenario(to(3), to(4), later)


async def _call_next(front: Front) -> Scenario:
    appointment, doctor = await _appointment(front, "CheckIn")
    second = await front.book((await front.patient()).id, doctor)
    await front.check_in(second.appointment.id)

    def to(room: str) -> queue_pb2.CallNextRequest:
        return queue_pb2.CallNextRequest(doctor_id=doctor, room=room)

    async def later() -> None:
        await call(front, "StartAppointment", appointment_pb2.StartAppointmentRequest(appointment_id=appointment))

    return Scenario(to("1"), to("2"), later)


async def _add_walk_in(front: Front) -> Scenario:
    doctor, patient = await front.doctor(), await front.patient()

    def because(reason: str) -> queue_pb2.AddWalkInRequest:
        return queue_pb2.AddWalkInRequest(doctor_id=doctor.id, patient_id=patient.id, reason=reason)

    async def later() -> None:
        ((appointment,),) = front.sql("select id::text from appointment where doctor_id = %s", doctor.id)
        await call(front, "LeaveQueue", queue_pb2.LeaveQueueRequest(appointment_id=appointment))

    return Scenario(because("cough"), because("fever"), later, _without_position)


async def _transfer_patient(front: Front) -> Scenario:
    appointment, doctor = await _appointment(front, "CheckIn")
    clinic_id = (await front.doctors.GetDoctor(doctor_pb2.GetDoctorRequest(doctor_id=doctor))).doctor.clinic_id
    others = [await front.doctor(clinic_id=clinic_id) for _ in range(2)]

    def to(other: doctor_pb2.Doctor) -> queue_pb2.TransferPatientRequest:
        return queue_pb2.TransferPatientRequest(appointment_id=appointment, to_doctor_id=other.id)

    async def later() -> None:
        await call(front, "StartAppointment", appointment_pb2.StartAppointmentRequest(appointment_id=appointment))

    return Scenario(to(others[0]), to(others[1]), later, _without_position)


async def _undo_transition(front: Front) -> Scenario:
    appointments = [(await _appointment(front, "CheckIn"))[0] for _ in range(2)]

    async def of(appointment: str) -> appointment_pb2.UndoTransitionRequest:
        etag = (await front.appointment(appointment)).etag
        return appointment_pb2.UndoTransitionRequest(appointment_id=appointment, etag=etag)

    async def later() -> None:
        await front.check_in(appointments[0])

    return Scenario(await of(appointments[0]), await of(appointments[1]), later)


async def _set_priority(front: Front) -> Scenario:
    appointment, _ = await _appointment(front, "CheckIn")

    def to(priority: queue_pb2.Priority.ValueType) -> queue_pb2.SetPriorityRequest:
        return queue_pb2.SetPriorityRequest(appointment_id=appointment, priority=priority)

    async def later() -> None:
        await call(front, "SetPriority", to(queue_pb2.PRIORITY_NORMAL))

    return Scenario(to(queue_pb2.PRIORITY_URGENT), to(queue_pb2.PRIORITY_PRIORITY), later, _without_position)


async def _create_api_key(front: Front) -> Scenario:
    def named(name: str) -> access_pb2.CreateApiKeyRequest:
        wanted = access_pb2.ApiKey(name=name, roles=[policy_pb2.ROLE_BOARD])
        return access_pb2.CreateApiKeyRequest(api_key=wanted)

    async def later() -> None:
        ((made,),) = front.sql("select id::text from api_key where name = 'A'")
        await call(front, "RevokeApiKey", access_pb2.RevokeApiKeyRequest(api_key_id=made))

    return Scenario(named("A"), named("B"), later, _only("id"))


async def _revoke_api_key(front: Front) -> Scenario:
    first, second = [(await create_key(front, "BOARD")).api_key.id for _ in range(2)]
    return Scenario(access_pb2.RevokeApiKeyRequest(api_key_id=first), access_pb2.RevokeApiKeyRequest(api_key_id=second))


async def _create_user(front: Front) -> Scenario:
    def named(email: str) -> access_pb2.CreateUserRequest:
        return access_pb2.CreateUserRequest(user=auth_pb2.User(email=email, roles=[policy_pb2.ROLE_STAFF]))

    mine, other = (f"{uuid.uuid4().hex}@example.com" for _ in range(2))

    async def later() -> None:
        ((made,),) = front.sql("select id::text from user_account where email = %s", mine)
        await call(front, "UpdateUser", access_pb2.UpdateUserRequest(user=auth_pb2.User(id=made, name="C")))

    return Scenario(named(mine), named(other), later, _only("id"))


async def _update_user(front: Front) -> Scenario:
    user = (await register(front)).user

    def named(name: str) -> access_pb2.UpdateUserRequest:
        return access_pb2.UpdateUserRequest(user=auth_pb2.User(id=user.id, name=name), etag=user.etag)

    async def later() -> None:
        await call(front, "UpdateUser", access_pb2.UpdateUserRequest(user=auth_pb2.User(id=user.id, name="C")))

    return Scenario(named("A"), named("B"), later, _only("id"))


async def _set_user_roles(front: Front) -> Scenario:
    user = (await register(front)).user

    def to(role: policy_pb2.Role.ValueType) -> access_pb2.SetUserRolesRequest:
        return access_pb2.SetUserRolesRequest(user_id=user.id, roles=[role])

    async def later() -> None:
        await call(front, "SetUserRoles", to(policy_pb2.ROLE_PATIENT))

    return Scenario(to(policy_pb2.ROLE_STAFF), to(policy_pb2.ROLE_ADMIN), later, _only("id"))


async def _link_patient(front: Front) -> Scenario:
    await front.patient(given_name="Rosa", family_name="Alves")
    user = (await register(front)).user
    assert not user.patient_id
    first, second = await front.people(2)

    def to(patient: patient_pb2.Patient) -> access_pb2.LinkPatientRequest:
        return access_pb2.LinkPatientRequest(user_id=user.id, patient_id=patient.id)

    return Scenario(to(first), to(second), same=_only("id"))


async def _register_user(front: Front) -> Scenario:
    def named(email: str) -> auth_pb2.RegisterUserRequest:
        # Each is a person who is not on file.
        patient = patient_pb2.Patient(given_name=email.partition("@")[0], phone="+5511987654321")
        return auth_pb2.RegisterUserRequest(email=email, password="correct horse battery", patient=patient)

    mine, other = (f"{uuid.uuid4().hex}@example.com" for _ in range(2))

    async def later() -> None:
        ((made,),) = front.sql("select id::text from user_account where email = %s", mine)
        await call(front, "UpdateUser", access_pb2.UpdateUserRequest(user=auth_pb2.User(id=made, name="C")))

    return Scenario(named(mine), named(other), later, _only("id"))


async def _logout(front: Front) -> Scenario:
    first, second = [(await register(front)).session.refresh_token for _ in range(2)]
    return Scenario(auth_pb2.LogoutRequest(refresh_token=first), auth_pb2.LogoutRequest(refresh_token=second))


async def _update_profile(front: Front) -> Scenario:
    def named(name: str) -> auth_pb2.UpdateProfileRequest:
        return auth_pb2.UpdateProfileRequest(user=auth_pb2.User(name=name))

    async def later() -> None:
        await call(front, "UpdateProfile", named("C"))

    return Scenario(named("A"), named("B"), later, _only("id"))


async def _reset_second_factor(front: Front) -> Scenario:
    first, second = [(await register(front)).user.id for _ in range(2)]
    front.sql("update user_account set second_factor = true where id = any (%s::uuid[])", [first, second])
    return Scenario(
        access_pb2.ResetSecondFactorRequest(user_id=first), access_pb2.ResetSecondFactorRequest(user_id=second)
    )


async def _redrive(front: Front) -> Scenario:
    visit, _ = await _appointment(front)
    first, second = [notification_pb2.RedriveNotificationsRequest(ids=[given_up(front, visit)]) for _ in range(2)]
    return Scenario(first, second)


async def _set_contact_preferences(front: Front) -> Scenario:
    person = await front.patient()

    def spoken(language: str) -> notification_pb2.SetContactPreferencesRequest:
        return notification_pb2.SetContactPreferencesRequest(patient_id=person.id, language=language)

    async def later() -> None:
        await call(front, "SetContactPreferences", spoken("en"))

    return Scenario(spoken("es"), spoken("pt"), later, lambda answer: answer.contact_preferences.patient_id)


SCENARIOS: dict[str, Callable[[Front], Awaitable[Scenario]]] = {
    "CreateClinic": _create_clinic,
    "UpdateClinic": _update_clinic,
    "RegisterPatient": _register_patient,
    "UpdatePatient": _update_patient,
    "MergePatients": _merge_patients,
    "CreateDoctor": _create_doctor,
    "UpdateDoctor": _update_doctor,
    "SetDoctorAvailability": _set_availability,
    "SetWeeklySchedule": _set_weekly_schedule,
    "SetScheduleException": _set_schedule_exception,
    "DeleteScheduleException": _delete_schedule_exception,
    "GenerateSlots": _generate_slots,
    "CreateLeave": _create_leave,
    "CancelLeave": _cancel_leave,
    "CreateSlot": _create_slot,
    "BatchCreateSlots": _batch_create_slots,
    "UpdateSlot": _update_slot,
    "BlockSlots": _block_slots,
    "ReleaseSlots": _release_slots,
    "DeleteSlot": _delete_slot,
    "BookAppointment": _book,
    "HoldPlace": _hold_place,
    "ReleaseHold": _release_hold,
    "JoinWaitlist": _join_waitlist,
    "LeaveWaitlist": _leave_waitlist,
    "OfferPlace": _offer_place,
    "AcceptOffer": _accept_offer,
    "DeclineOffer": _decline_offer,
    "UpdateAppointment": _update_appointment,
    "RescheduleAppointment": _reschedule,
    "CancelAppointment": _visit("CancelAppointment", later="GetAppointment"),
    "StartAppointment": _visit("StartAppointment", "CheckIn", later="CompleteAppointment"),
    "CompleteAppointment": _visit("CompleteAppointment", "CheckIn", "StartAppointment", later="GetAppointment"),
    "MarkNoShow": _visit("MarkNoShow", later="GetAppointment"),
    "CheckIn": _visit("CheckIn", later="StartAppointment"),
    "CallNext": _call_next,
    "CallAgain": _visit("CallAgain", "CheckIn", "CallNext", later="StartAppointment"),
    "AddWalkIn": _add_walk_in,
    "TransferPatient": _transfer_patient,
    "UndoTransition": _undo_transition,
    "SetPriority": _set_priority,
    "ReturnToLine": _visit("ReturnToLine", "CheckIn", "CallNext", "MarkMissed", later="LeaveQueue"),
    "ParkPatient": _visit("ParkPatient", "CheckIn", "CallNext", later="ReturnToLine"),
    "MarkMissed": _visit("MarkMissed", "CheckIn", "CallNext", later="ReturnToLine"),
    "LeaveQueue": _visit("LeaveQueue", "CheckIn", later="GetAppointment"),
    "CreateApiKey": _create_api_key,
    "RevokeApiKey": _revoke_api_key,
    "CreateUser": _create_user,
    "UpdateUser": _update_user,
    "SetUserRoles": _set_user_roles,
    "LinkPatient": _link_patient,
    "RegisterUser": _register_user,
    "Logout": _logout,
    "UpdateProfile": _update_profile,
    "ResetSecondFactor": _reset_second_factor,
    "RedriveNotifications": _redrive,
    "SetContactPreferences": _set_contact_preferences,
}

ELSEWHERE = {
    "ChangePassword", "EnrollSecondFactor", "ConfirmSecondFactor", "RemoveSecondFactor", "SendConfirmation",
    "VerifyEmail", "RequestPasswordReset", "ResetPassword",
}  # fmt: skip
"""Methods that are good once for a user, or end the session that they are called with: tests/test_auth.py; and those
that need a channel: tests/test_notifications.py, tests/test_email_codes.py."""


def keyed(request: Message, key: str = KEY) -> Message:
    """The request with a key."""
    named = type(request)()
    named.CopyFrom(request)
    named.idempotency_key = key  # type: ignore[attr-defined]
    return named


async def keep(made: Awaitable[Any], answers: list[Any]) -> None:
    """Add the answer to `answers`."""
    answers.append(await made)


def bare(answer: Any) -> Any:
    """The answer without `replayed`."""
    copy = type(answer)()
    copy.CopyFrom(answer)
    copy.ClearField("replayed")
    for secret in ("key", "one_time_password", "session"):
        # A replay leaves these out.
        if hasattr(copy, secret):
            copy.ClearField(secret)
    return copy


TABLES = (
    "clinic",
    "patient",
    "doctor",
    "slot",
    "leave",
    "leave_outcome",
    "appointment",
    "log where type is not null",
    "idempotency",
    "api_key",
    "user_account",
    "session",
    "notification",
    "contact_preferences",
)


def rows(front: Front) -> Counter[str]:
    """The number of rows in each table."""
    counts = ", ".join(f"(select count(*) from {table})" for table in TABLES)
    (found,) = front.sql(f"select {counts}, (select coalesce(sum(revision), 0)::bigint from doctor_day)")
    return Counter(dict(zip((*TABLES, "revisions"), found, strict=True)))


def test_every_mutation_has_a_scenario() -> None:
    """The table of scenarios contains every method that takes a key, and no others."""
    assert SCENARIOS.keys() == set(MUTATIONS) - ELSEWHERE


@pytest.mark.parametrize("name", SCENARIOS)
async def test_replays(front: Front, name: str) -> None:
    """The same key answers the first success again, even after further changes; a different request is refused."""
    scenario = await SCENARIOS[name](front)
    first = await call(front, name, keyed(scenario.request))
    assert not first.replayed
    before = rows(front)
    second = await call(front, name, keyed(scenario.request))
    assert second.replayed
    assert bare(second) == bare(first)
    assert rows(front) == before
    error = await refusal(call(front, name, keyed(scenario.other)))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "IDEMPOTENCY_KEY_REUSED")
    assert not manners(error, KEY)
    assert rows(front) == before
    await scenario.later()
    before = rows(front)
    third = await call(front, name, keyed(scenario.request))
    assert third.replayed
    assert scenario.same(bare(third)) == scenario.same(bare(first))
    assert rows(front) == before


@pytest.mark.parametrize("name", SCENARIOS)
async def test_twins(front: Front, name: str) -> None:
    """Of fifty callers who make the same change at once, one makes it, and all get the same answer.

    A key belongs to its caller and method: for another caller or method, it names another change.
    """
    unrelated = "CreateClinic" if name != "CreateClinic" else "CreateSlot"
    await call(front, unrelated, keyed((await SCENARIOS[unrelated](front)).request))
    alone = await SCENARIOS[name](front)
    before = rows(front)
    await call(front, name, keyed(alone.request, "alone"))
    one = rows(front) - before
    together = (await SCENARIOS[name](front)).other
    before = rows(front)
    answers = await asyncio.gather(*(call(front, name, keyed(together)) for _ in range(50)))
    assert Counter(answer.replayed for answer in answers) == {False: 1, True: 49}
    assert all(bare(answer) == bare(answers[0]) for answer in answers)
    assert rows(front) - before == one
    others: list[Any] = []
    # Where credentials are needed, these name the caller; elsewhere the caller names itself.
    own = bearing((await create_key(front, "ADMIN")).key) if credentials_for(name) else ()
    kiosk = (("frontdesk-caller", "kiosk-7"), *own)
    again = await outcome(keep(call(front, name, keyed(together), metadata=kiosk), others))
    assert again not in ("IDEMPOTENCY_KEY_REUSED", "INTERNAL")
    assert not any(answer.replayed for answer in others)
    assert (await call(front, name, keyed(together))).replayed


async def test_refusals_are_not_stored(front: Front) -> None:
    """A caller who was refused with DAY_FULL may retry with the same key, and gets a place that has become free."""
    doctor = await front.doctor(max_patients_per_day=1)
    first, second = await front.people(2)
    booked = await front.book(first.id, doctor.id)
    for _ in range(2):
        assert await outcome(front.book(second.id, doctor.id, idempotency_key=KEY)) == "DAY_FULL"
    cancel = appointment_pb2.CancelAppointmentRequest(appointment_id=booked.appointment.id)
    await front.appointments.CancelAppointment(cancel)
    answer = await front.book(second.id, doctor.id, idempotency_key=KEY)
    assert (answer.replayed, answer.appointment.number) == (False, 1)
    assert (await front.book(second.id, doctor.id, idempotency_key=KEY)).replayed


async def test_a_trial_takes_no_key(front: Front) -> None:
    """A call with validate_only does not use up the key of the booking."""
    doctor, patient = await front.doctor(), await front.patient()
    trial = await front.book(patient.id, doctor.id, validate_only=True, idempotency_key=KEY)
    assert (trial.revision, trial.appointment.id, trial.appointment.number) == (0, "", 1)
    assert rows(front)["appointment"] == 0
    assert not (await front.book(patient.id, doctor.id, idempotency_key=KEY)).replayed


async def test_twins_whose_day_is_full(front: Front) -> None:
    """Fifty twins that find a full day are all refused, and none leaves a row."""
    doctor = await front.doctor(max_patients_per_day=1)
    first, second = await front.people(2)
    await front.book(first.id, doctor.id)
    before = rows(front)
    outcomes = await asyncio.gather(
        *(outcome(front.book(second.id, doctor.id, idempotency_key=KEY)) for _ in range(50))
    )
    assert Counter(outcomes) == {"DAY_FULL": 50}
    assert rows(front) == before


async def test_killed_between_commit_and_answer(conninfo: str, settings: Settings) -> None:
    """If the server dies before it answers a booking, a retry with this key on the next server finds the booking."""
    async with serving(settings, conninfo) as (worker, front):
        doctor, patient = await front.doctor(), await front.patient()
        async with Line(front.port) as line, line.channel() as channel:
            far = Front(channel, conninfo, line.port)
            assert await outcome(far.clinic()) == "OK"
            line.muted = True
            asked = asyncio.create_task(refusal(far.book(patient.id, doctor.id, idempotency_key=KEY)))
            with psycopg.connect(conninfo, autocommit=True) as look:
                await until(lambda: look.execute("select from appointment").rowcount == 1)
            await worker.stop(drain=False)
            line.cut()
            assert (await asked).code() is grpc.StatusCode.UNAVAILABLE
    async with serving(settings, conninfo) as (_, front):
        answer = await front.book(patient.id, doctor.id, idempotency_key=KEY)
        assert (answer.replayed, answer.revision, answer.appointment.number) == (True, 2, 1)
        assert front.sql("select count(*) from appointment") == [(1,)]
