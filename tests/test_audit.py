"""The log: every change is in it once, with who made it, and nothing of a patient but ids."""

from datetime import timedelta
from typing import Any

import pytest
from google.type.date_pb2 import Date

from clinic.frontdesk.v1 import appointment_pb2
from tests.clinic import Front, day, refusal, today
from tests.hostile.methods import MUTATIONS, call
from tests.hostile.test_idempotency import SCENARIOS, keyed
from tests.identities import bearing, create_key

CHANGES: dict[str, list[str]] = {
    "CreateClinic": ["clinic.created"],
    "UpdateClinic": ["clinic.updated"],
    "RegisterPatient": ["patient.registered"],
    "UpdatePatient": ["patient.updated"],
    "MergePatients": ["patient.merged"],
    "CreateDoctor": ["doctor.created"],
    "UpdateDoctor": ["doctor.updated"],
    "SetDoctorAvailability": ["doctor_day.availability_set"],
    "CreateSlot": ["slot.created"],
    "BatchCreateSlots": ["slot.created"],
    "UpdateSlot": ["slot.updated"],
    "BlockSlots": ["slot.blocked"],
    "ReleaseSlots": ["slot.released"],
    "DeleteSlot": ["slot.deleted"],
    "BookAppointment": ["appointment.booked"],
    "UpdateAppointment": ["appointment.updated"],
    "RescheduleAppointment": ["appointment.moved_in", "appointment.moved_out"],
    "CancelAppointment": ["appointment.cancelled"],
    "MarkNoShow": ["appointment.no_show"],
    "StartAppointment": ["queue.started"],
    "CompleteAppointment": ["queue.completed"],
    "CheckIn": ["queue.checked_in"],
    "CallNext": ["queue.called"],
    "CallAgain": ["queue.called_again"],
    "ReturnToLine": ["queue.returned"],
    "ParkPatient": ["queue.parked"],
    "MarkMissed": ["queue.missed"],
    "LeaveQueue": ["queue.left"],
    "CreateApiKey": ["api_key.created"],
    "RevokeApiKey": ["api_key.revoked"],
    "CreateUser": ["user.created"],
    "UpdateUser": ["user.updated"],
    "SetUserRoles": ["user.roles_set"],
    "LinkPatient": ["user.patient_linked"],
    "RegisterUser": ["patient.registered", "user.registered"],
    "Logout": ["user.logged_out"],
    "UpdateProfile": ["user.updated"],
    "ChangePassword": ["user.password_changed"],
}
"""The types of event that each method writes for the request of its scenario."""

# A change of one thing of its own.
RESOURCES = {
    "appointment": "appointments/", "queue": "appointments/", "doctor_day": "doctorDays/", "clinic": "clinics/",
    "patient": "patients/", "doctor": "doctors/", "slot": "slots/", "api_key": "apiKeys/", "user": "users/",
}  # fmt: skip


def changes(front: Front) -> list[dict[str, Any]]:
    """The changes in the log, in the order of their types."""
    return [row for (row,) in front.sql("select to_jsonb(l) from log l where type is not null order by type, id")]


def test_every_change_has_a_type() -> None:
    """The table of types contains every method that takes a key, and no others."""
    assert CHANGES.keys() == set(MUTATIONS)


# ChangePassword ends the session that it is called with: tests/test_auth.py.
@pytest.mark.parametrize("name", sorted(CHANGES.keys() - {"ChangePassword"}))
async def test_a_change_is_logged_once(front: Front, name: str) -> None:
    """A change writes its rows, in its own transaction, with its actor and resource; a replay and a refusal none."""
    scenario = await SCENARIOS[name](front)
    before = {row["id"] for row in changes(front)}
    await call(front, name, keyed(scenario.request))
    after = [row for row in changes(front) if row["id"] not in before]
    assert sorted({row["type"] for row in after}) == CHANGES[name]
    assert len({row["transaction"] for row in after}) == 1
    for row in after:
        kind = row["type"].partition(".")[0]
        assert row["resource"].startswith(RESOURCES[kind])
        assert row["method"] == name or (row["method"], name) == ("RegisterPatient", "RegisterUser")
        assert row["address"] in ("ipv4:127.0.0.1", "ipv6:[::1]")
        assert row["outcome"] == "OK"
        ids = {
            "appointment": ("appointment_id", "patient_id", "doctor_id", "clinic_id"),
            "slot": ("slot_id", "doctor_id"),
        }
        for column in ids.get(kind, ()):
            assert row[column]
        assert (row["revision"] > 0) == (kind in ("appointment", "queue", "doctor_day"))
    assert (await call(front, name, keyed(scenario.request))).replayed
    assert len(changes(front)) == len(before) + len(after)


async def test_actors(front: Front) -> None:
    """A change is logged under the identity of its credentials; a label that anybody may send is no identity."""
    key = await create_key(front, "STAFF")
    doctor, people = await front.doctor(), await front.people(2)
    for person, metadata in zip(people, (bearing(key.key), (("frontdesk-caller", "users/somebody"),)), strict=True):
        target = appointment_pb2.DoctorDay(doctor_id=doctor.id, date=day(today()))
        request = appointment_pb2.BookAppointmentRequest(patient_id=person.id, doctor_day=target)
        await front.appointments.BookAppointment(request, metadata=metadata)
    assert [row["actor"] for row in changes(front) if row["type"] == "appointment.booked"] == [
        f"keys/{key.api_key.id}",
        "anonymous",
    ]


async def test_refusals_and_dry_runs_are_no_changes(front: Front) -> None:
    """Neither a refusal, nor a dry run, nor a person who is found again, is a change."""
    doctor, patient = await front.doctor(), await front.patient(given_name="Ana")
    before = changes(front)
    assert (await front.patient(given_name="Ana")).id == patient.id
    await front.book(patient.id, doctor.id, validate_only=True)
    await refusal(front.book(patient.id, doctor.id, today() - timedelta(days=1)))
    assert changes(front) == before
    # A date of birth that says more changes the record.
    assert (await front.patient(given_name="Ana", birth_date=Date(year=1980))).id == patient.id
    assert [row["data"] for row in changes(front) if row not in before] == [{"fields": "birth_date"}]
