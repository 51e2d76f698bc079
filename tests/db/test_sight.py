"""The rows that a restricted caller may reach, decided where the rows are: in `decide`."""

import json
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import psycopg
import pytest

from frontdesk.core.caller import Sight


@dataclass
class World:
    """Two clinics with a doctor and a patient each; each patient is booked at both."""

    connection: psycopg.Connection
    clinics: list[str]
    doctors: list[str]
    patients: list[str]
    booked: list[str]
    """At the first doctor: the first patient, the second one; at the second doctor: likewise."""
    slots: list[str]
    day: date

    def ask(self, sight: Sight | None, verb: str, **attributes: Any) -> tuple[str, dict[str, Any] | None]:
        """The outcome and the details of one request; nothing of it stays."""
        request = {
            "verb": verb,
            "caller": "test",
            "actor": "test",
            "key": "",
            "reason": "",
            "notes": "",
            "room": "",
            **attributes,
        }
        if sight is not None:
            request |= {"restricted": True, "sight": sight.as_json()}
        with self.connection.transaction(force_rollback=True):
            rows = self.connection.execute("select outcome, details from decide(%s)", (json.dumps([request]),))
            found = rows.fetchone()
        assert found is not None
        return str(found[0]), found[1]


@pytest.fixture
def world(conninfo: str) -> Any:
    """A world in a database of its own."""
    with psycopg.connect(conninfo, autocommit=True) as connection:

        def made(statement: str, *values: Any) -> str:
            row = connection.execute(statement.encode(), values).fetchone()
            assert row is not None
            return str(row[0])

        clinics = [made("insert into clinic (name, time_zone) values (%s, 'UTC') returning id", n) for n in "AB"]
        doctors = [
            made("insert into doctor (code, display_name, clinic_id) values (%s, 'D', %s) returning id", clinic, clinic)
            for clinic in clinics
        ]
        patients = [
            made("insert into patient (given_name, name_key, phone) values (%s, %s, '') returning id", n, n)
            for n in "PQ"
        ]
        row = connection.execute("select (moment() at time zone 'UTC')::date + 1").fetchone()
        assert row is not None
        world = World(connection, clinics, doctors, patients, [], [], row[0])
        for doctor, clinic in zip(doctors, clinics, strict=True):
            for number, patient in enumerate(patients, 1):
                world.booked.append(
                    made(
                        "insert into appointment (patient_id, doctor_id, clinic_id, date, number, state)"
                        " values (%s, %s, %s, %s, %s, 'BOOKED') returning id",
                        patient, doctor, clinic, world.day, number,
                    )
                )  # fmt: skip
            world.slots.append(
                made(
                    "insert into slot (doctor_id, clinic_id, date, start_time, end_time) values (%s, %s, %s,"
                    " %s::date + time '10:00' at time zone 'UTC', %s::date + time '11:00' at time zone 'UTC')"
                    " returning id",
                    doctor, clinic, world.day, world.day, world.day,
                )
            )  # fmt: skip
        yield world


def test_staff_of_one_clinic(world: World) -> None:
    """Staff reach everything of their clinics, and are told of another one's that it is not theirs."""
    staff = Sight((world.clinics[0],), None, None)
    later = str(world.day + timedelta(days=1))
    for n, expected in enumerate(("OK", "CLINIC_NOT_YOURS")):
        here = {"doctor": world.doctors[n], "date": later}
        appointment = {"appointment": world.booked[2 * n]}
        for verb, attributes in (
            ("CancelAppointment", appointment),
            ("UpdateAppointment", appointment),
            ("BookAppointment", {"patient": world.patients[0], **here}),
            ("SetDoctorAvailability", {**here, "is_present": True}),
            ("BlockSlots", {"slots": [world.slots[n]]}),
            ("DeleteSlot", {"slots": [world.slots[n]]}),
        ):
            assert world.ask(staff, verb, **attributes)[0] == expected, verb
            assert world.ask(None, verb, **attributes)[0] == "OK", verb
    away = {"appointment": world.booked[0], "doctor": world.doctors[1], "date": later}
    assert world.ask(staff, "RescheduleAppointment", **away)[0] == "CLINIC_NOT_YOURS"
    assert world.ask(staff, "BlockSlots", slots=world.slots)[0] == "CLINIC_NOT_YOURS"


def test_a_patient_reaches_his_own(world: World) -> None:
    """A patient reaches his own appointments at every clinic; another's answers exactly as an unknown id."""
    me = Sight(None, world.patients[0], None)
    unknown = "01890000-0000-7000-8000-000000000000"
    assert world.ask(me, "CancelAppointment", appointment=world.booked[0])[0] == "OK"
    assert world.ask(me, "CancelAppointment", appointment=world.booked[2])[0] == "OK"
    others = world.ask(me, "CancelAppointment", appointment=world.booked[1])
    assert others == world.ask(me, "CancelAppointment", appointment=unknown) == ("APPOINTMENT_NOT_FOUND", None)
    place = {"doctor": world.doctors[0], "date": str(world.day + timedelta(days=1))}
    assert world.ask(me, "BookAppointment", patient=world.patients[0], **place)[0] == "OK"
    for doctor in (world.doctors[0], unknown):
        for patient in (world.patients[1], unknown):
            outcome = world.ask(me, "BookAppointment", **{**place, "doctor": doctor}, patient=patient)[0]
            assert outcome == "PATIENT_NOT_FOUND"
    move = {"appointment": world.booked[0], "doctor": world.doctors[1], "date": place["date"]}
    assert world.ask(me, "RescheduleAppointment", **move)[0] == "OK"


def test_a_doctor_reaches_his_own_days(world: World) -> None:
    """A doctor reaches his own days; another's day takes another role, and another's appointment is not found."""
    me = Sight(None, None, world.doctors[0])
    later = str(world.day + timedelta(days=1))
    for n in (0, 1):
        appointment = {"appointment": world.booked[2 * n]}
        here = {"doctor": world.doctors[n], "date": later}
        role = ("OK", "ROLE_REQUIRED")[n]
        assert world.ask(me, "CancelAppointment", **appointment)[0] == ("OK", "APPOINTMENT_NOT_FOUND")[n]
        assert world.ask(me, "MarkNoShow", **appointment)[0] == ("TOO_EARLY", "ROLE_REQUIRED")[n]
        assert world.ask(me, "BookAppointment", patient=world.patients[1], **here)[0] == role
        assert world.ask(me, "SetDoctorAvailability", **here, is_present=True)[0] == role
        assert world.ask(me, "CallNext", **here)[0] == ("QUEUE_EMPTY", "ROLE_REQUIRED")[n]
        assert world.ask(me, "BlockSlots", slots=[world.slots[n]])[0] == role


def test_nobody_without_sight(world: World) -> None:
    """Somebody whose roles give nothing reaches nothing."""
    nobody = Sight(None, None, None)
    assert world.ask(nobody, "CancelAppointment", appointment=world.booked[0])[0] == "APPOINTMENT_NOT_FOUND"
    place = {"doctor": world.doctors[0], "date": str(world.day + timedelta(days=1))}
    assert world.ask(nobody, "BookAppointment", patient=world.patients[0], **place)[0] == "PATIENT_NOT_FOUND"
