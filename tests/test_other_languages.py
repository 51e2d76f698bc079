"""A client that shares no code with us needs only reflection or the protos.

`buf curl` stands for such a client: a program in another language that learns the contract from the server and speaks
JSON.
"""

import asyncio
import json
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.clinic import Front, soon, today, tomorrow

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or "buf"


async def curl(front: Front, method: str, request: dict[str, Any]) -> dict[str, Any]:
    """Call a method with JSON, using reflection alone; return the answer, or the error under `code`."""
    process = await asyncio.create_subprocess_exec(
        BUF,
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        f"http://127.0.0.1:{front.port}/clinic.frontdesk.v1.{method}",
        "-d",
        json.dumps(request),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    answer: dict[str, Any] = json.loads(out or err)
    return answer


def wire(day: Any) -> dict[str, int]:
    return {"year": day.year, "month": day.month, "day": day.day}


async def test_a_day_in_json(front: Front) -> None:
    """Reflection is enough for everything: create, register, book, move, check in, call, complete."""
    clinic = (
        await curl(front, "ClinicService/CreateClinic", {"clinic": {"name": "Norte", "timeZone": "America/Sao_Paulo"}})
    )["clinic"]
    doctor = (
        await curl(
            front,
            "DoctorService/CreateDoctor",
            {"doctor": {"code": "N1", "displayName": "Dr. N", "clinicId": clinic["id"]}},
        )
    )["doctor"]
    patient = (
        await curl(
            front,
            "PatientService/RegisterPatient",
            {"patient": {"givenName": "Lia", "phone": "(11) 98765-4321"}, "defaultCountry": "BR"},
        )
    )["patient"]
    start = soon()
    slots = (
        await curl(
            front,
            "SlotService/BatchCreateSlots",
            {
                "slots": [
                    {
                        "doctorId": doctor["id"],
                        "startTime": (start + timedelta(minutes=30 * n)).isoformat(),
                        "endTime": (start + timedelta(minutes=30 * n + 30)).isoformat(),
                    }
                    for n in range(2)
                ]
            },
        )
    )["slots"]
    free = await curl(front, "SlotService/ListSlots", {"doctorId": doctor["id"], "availableOnly": True})
    assert [slot["id"] for slot in free["slots"]] == [slot["id"] for slot in slots]

    booked = await curl(
        front, "AppointmentService/BookAppointment", {"patientId": patient["id"], "slotId": slots[0]["id"]}
    )
    assert booked["appointment"]["date"] == wire(tomorrow())
    moved = await curl(
        front,
        "AppointmentService/RescheduleAppointment",
        {
            "appointmentId": booked["appointment"]["id"],
            "doctorDay": {"doctorId": doctor["id"], "date": wire(today())},
            "etag": booked["appointment"]["etag"],
        },
    )
    assert (moved["vacatedRevision"], moved["revision"]) == ("3", "2")
    appointment = {"appointmentId": booked["appointment"]["id"]}
    changed = await curl(
        front,
        "AppointmentService/UpdateAppointment",
        {"appointment": {"id": appointment["appointmentId"], "notes": "wheelchair"}, "updateMask": "notes"},
    )
    assert changed["appointment"]["notes"] == "wheelchair"
    assert (await curl(front, "QueueService/CheckIn", appointment))["entry"]["ticket"] == 1
    assert (await curl(front, "QueueService/CheckIn", appointment))["code"] == "already_exists"
    called = await curl(front, "QueueService/CallNext", {"doctorId": doctor["id"], "room": "2"})
    assert called["entry"]["state"] == "STATE_CALLED"
    await curl(front, "AppointmentService/StartAppointment", appointment)
    ended = await curl(front, "AppointmentService/CompleteAppointment", appointment)
    assert ended["appointment"]["state"] == "STATE_COMPLETED"
    listed = await curl(
        front, "AppointmentService/ListAppointments", {"patientId": patient["id"], "states": ["STATE_COMPLETED"]}
    )
    assert [one["id"] for one in listed["appointments"]] == [appointment["appointmentId"]]
    queue = await curl(front, "QueueService/GetQueue", {"doctorId": doctor["id"]})
    assert queue["queue"]["revision"] == ended["revision"] == "7"
