"""Lists of appointments: every filter, both orders, pages that neither repeat nor skip."""

import asyncio
import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from clinic.frontdesk.v1 import appointment_pb2 as pb
from tests.clinic import Front, day, outcome, soon, today, tomorrow

State = pb.Appointment


async def every(front: Front, **fields: Any) -> list[pb.Appointment]:
    """All pages of a list."""
    request = pb.ListAppointmentsRequest(**fields)
    found: list[pb.Appointment] = []
    while True:
        page = await front.appointments.ListAppointments(request)
        found += page.appointments
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def key(appointment: pb.Appointment) -> tuple[int, int, int, str]:
    return appointment.date.year, appointment.date.month, appointment.date.day, appointment.id


async def a_month(front: Front) -> Sequence[pb.Appointment]:
    """Appointments with three doctors of two clinics, for several patients on several days; some are cancelled."""
    clinic = await front.clinic()
    doctors = [await front.doctor(clinic_id=clinic.id), await front.doctor(clinic_id=clinic.id), await front.doctor()]
    people = await front.people(4)
    booked = []
    for offset, doctor, person in itertools.product((5, 0, 2), doctors, people):
        booked.append((await front.book(person.id, doctor.id, today() + timedelta(days=offset))).appointment)
    for appointment in booked[::3]:
        await front.cancel(appointment.id)
    return [await front.appointment(appointment.id) for appointment in booked]


async def test_every_filter_and_order(front: Front) -> None:
    """Each combination of filters answers exactly the matching appointments, in order, with any page size."""
    known = await a_month(front)
    one = known[0]
    ways: dict[str, tuple[dict[str, Any], Any]] = {
        "patient": ({"patient_id": one.patient_id}, lambda a: a.patient_id == one.patient_id),
        "doctor": ({"doctor_id": one.doctor_id}, lambda a: a.doctor_id == one.doctor_id),
        "clinic": ({"clinic_id": one.clinic_id.upper()}, lambda a: a.clinic_id == one.clinic_id),
        "booked": ({"states": [State.STATE_BOOKED]}, lambda a: a.state == State.STATE_BOOKED),
        "two": ({"states": [2, 5, 5]}, lambda a: a.state in (2, 5)),
        "from": ({"from_date": day(today() + timedelta(days=2))}, lambda a: key(a)[:3] >= _ymd(2)),
        "to": ({"to_date": day(today() + timedelta(days=2))}, lambda a: key(a)[:3] <= _ymd(2)),
    }
    tried = 0
    for size in (1, 2, 3, 4):
        for names in itertools.combinations(ways, size):
            fields: dict[str, Any] = {}
            for name in names:
                fields |= ways[name][0]
            if {"booked", "two"} <= set(names):
                continue
            if not {"patient", "doctor", "clinic"} & set(names) and not {"from", "to"} <= set(names):
                assert await outcome(every(front, **fields)) == "INVALID_FIELD"
                continue
            expected = sorted((a for a in known if all(ways[name][1](a) for name in names)), key=key)
            assert await every(front, page_size=7, **fields) == expected, names
            descending = await every(front, page_size=5, order=pb.ListAppointmentsRequest.ORDER_DATE_DESC, **fields)
            assert descending == expected[::-1], names
            tried += 1
    assert tried > 40


def _ymd(offset: int) -> tuple[int, int, int]:
    value = today() + timedelta(days=offset)
    return value.year, value.month, value.day


async def test_rows_come_and_go_between_pages(front: Front) -> None:
    """While others book, cancel and move, a reader of pages sees each unchanged appointment exactly once."""
    known = await a_month(front)
    stays = {a.id for a in known if a.state == State.STATE_BOOKED}
    clinic_id = known[0].clinic_id
    mine = {a.id for a in known if a.clinic_id == clinic_id} & stays
    doctor = await front.doctor(clinic_id=clinic_id, max_patients_per_day=1000)
    ended = asyncio.Event()

    async def others() -> None:
        while not ended.is_set():
            (person,) = await front.people(1)
            booked = await front.book(person.id, doctor.id, today() + timedelta(days=1))
            await front.cancel(booked.appointment.id)

    crowd = [asyncio.create_task(others()) for _ in range(3)]
    try:
        for _ in range(5):
            seen = [a.id for a in await every(front, clinic_id=clinic_id, page_size=2)]
            assert len(seen) == len(set(seen))
            assert mine <= set(seen)
    finally:
        ended.set()
        await asyncio.gather(*crowd)


async def test_a_list_needs_a_bound(front: Front) -> None:
    """Without a patient, a doctor or a clinic, both dates are required, in order and at most 31 days."""
    start = today()

    async def asked(days: int, **fields: Any) -> str:
        return await outcome(
            front.appointments.ListAppointments(
                pb.ListAppointmentsRequest(from_date=day(start), to_date=day(start + timedelta(days=days)), **fields)
            )
        )

    assert [await asked(days) for days in (0, 30, 31, -1)] == ["OK", "OK", "INVALID_FIELD", "INVALID_FIELD"]
    assert await asked(300, doctor_id=(await front.doctor()).id) == "OK"


async def test_a_day_goes_by_start_time(front: Front) -> None:
    """Within a date, day bookings come first, then slots by their start, whenever they were booked; on every page."""
    clinic = await front.clinic()
    doctors = [await front.doctor(clinic_id=clinic.id) for _ in range(3)]
    expected = []
    for doctor in doctors:
        for hours in (7, 1, 4):
            person = await front.patient()
            slot = await front.slot(doctor.id, soon(hours))
            expected.append((await front.book_slot(person.id, slot.id)).appointment)
        expected.append((await front.book((await front.patient()).id, doctor.id, tomorrow())).appointment)
    expected.sort(key=lambda a: (a.start_time.ToNanoseconds() if a.HasField("start_time") else -1, a.id))
    both = {"from_date": day(tomorrow()), "to_date": day(tomorrow())}
    for fields in ({"clinic_id": clinic.id}, both, {"clinic_id": clinic.id, "states": [State.STATE_BOOKED]}):
        for size in (1, 5, 100):
            assert await every(front, page_size=size, **fields) == expected
            descending = await every(front, page_size=size, order=pb.ListAppointmentsRequest.ORDER_DATE_DESC, **fields)
            assert descending == expected[::-1]
    mine = [a for a in expected if a.doctor_id == doctors[1].id]
    assert await every(front, page_size=2, doctor_id=doctors[1].id) == mine
    assert await every(front, page_size=1, patient_id=mine[0].patient_id) == mine[:1]


async def test_a_slots_appointments(front: Front) -> None:
    """The list of a slot has its appointments in every state, and needs no other filter."""
    doctor = await front.doctor()
    slot, other = await front.slot(doctor.id, soon(1), capacity=3), await front.slot(doctor.id, soon(2))
    booked = [(await front.book_slot(person.id, slot.id)).appointment.id for person in await front.people(3)]
    await front.book_slot((await front.patient()).id, other.id)
    await front.cancel(booked[1])
    assert sorted(a.id for a in await every(front, slot_id=slot.id.upper(), page_size=2)) == sorted(booked)
    live = await every(front, slot_id=slot.id, states=[State.STATE_BOOKED])
    assert {a.id for a in live} == {booked[0], booked[2]}
