"""Cases 9 to 20: values that no request may carry, in every field of every method."""

import asyncio
import base64
import gc
import json
from collections import Counter
from collections.abc import Awaitable, Iterable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.type.date_pb2 import Date

from buf.validate import validate_pb2
from clinic.frontdesk.v1 import (
    access_pb2,
    appointment_pb2,
    audit_pb2,
    clinic_pb2,
    doctor_pb2,
    notification_pb2,
    patient_pb2,
    rules_pb2,
    schedule_pb2,
    slot_pb2,
    waitlist_pb2,
)
from frontdesk import errors
from frontdesk.rpc.requests import MOST_ELEMENTS
from frontdesk.rpc.status import CODES, code_of
from frontdesk.settings import Settings
from tests.clinic import Front, details, outcome, refusal, today
from tests.hostile.methods import (
    DATE,
    LISTS,
    METHODS,
    MUTATIONS,
    REASONS,
    TIMESTAMP,
    UPDATES,
    VALID,
    Place,
    World,
    call,
    is_a,
    is_enum,
    is_id,
    is_output_only,
    is_taken,
    is_text,
    manners,
    named,
    noon,
    places,
    raw,
    refused_field,
    slot_at,
    world,
)
from tests.hostile.wire import serving
from tests.identities import bearing, create_key

CANARY = "Zzyzx-canary"


async def none_wrong(checks: Iterable[Awaitable[list[str]]]) -> None:
    """Run all checks, some at a time, and show everything that is wrong."""
    turn = asyncio.Semaphore(50)

    async def taken(check: Awaitable[list[str]]) -> list[str]:
        async with turn:
            return await check

    wrong = [problem for found in await asyncio.gather(*map(taken, checks)) for problem in found]
    if wrong:
        pytest.fail("\n".join(sorted(wrong)), pytrace=False)


def test_every_method_has_a_valid_request() -> None:
    """The table of valid requests contains every method of the contract, and no others."""
    assert VALID.keys() == METHODS.keys()


async def test_valid_requests_break_no_rule(front: Front) -> None:
    """No value that the tables of these tests call valid is refused because of its fields."""
    here = await world(front)
    for name in METHODS:
        assert await outcome(call(front, name, VALID[name](here))) != "INVALID_FIELD", name


async def test_nul_in_every_string(front: Front) -> None:
    """A NUL in any string of any request is refused, and the refusal names the field."""
    here = await world(front)
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), f"{CANARY}\0"), place.path, CANARY)
        for name in METHODS
        for place in places(name, is_text)
    )


async def test_text_that_is_too_long(front: Front) -> None:
    """Every string of every request has a maximum length."""
    here = await world(front)
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), f"{CANARY}{'x' * 4100}"), place.path, CANARY)
        for name in METHODS
        for place in places(name, is_text)
    )


def _limit(place: Place) -> int:
    rules = place.field.GetOptions().Extensions[validate_pb2.field]
    return int((rules.repeated.items if place.field.is_repeated else rules).string.max_len)


async def test_one_character_too_many(front: Front) -> None:
    """Every maximum length is exact: one character more is refused."""
    here = await world(front)
    limited = [(name, place) for name in METHODS for place in places(name, is_text) if _limit(place)]
    assert limited
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), "x" * (_limit(place) + 1)), place.path)
        for name, place in limited
    )


def _is_line(place: Place) -> bool:
    rules = place.field.GetOptions().Extensions[validate_pb2.field]
    text = (rules.repeated.items if place.field.is_repeated else rules).string
    return bool(text.Extensions[rules_pb2.line])


def test_names_are_lines() -> None:
    """Every field with the name of a name or a code is text on one line; a phone has a form of its own."""
    for name in METHODS:
        for place in places(name, is_text):
            if place.field.name.endswith(("name", "code", "city", "specialty", "room", "allergies")):
                assert _is_line(place), f"{name}.{place.path}"


MARKS = ("\u202e", "\u2066", "\u200f", "\u061c", "\n", "\r", "\t", "\x1b", "\x7f", "\x85", "\u2028")
CONTROLS = ("\x01", "\x08", "\x1b", "\x7f", "\x85", "\x9f")


async def test_control_and_bidirectional_characters(front: Front) -> None:
    """No control character and no mark that changes the direction of text in a name; no control character in notes."""
    here = await world(front)
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), f"{CANARY}{mark}a"), place.path, CANARY, shown=mark)
        for name in METHODS
        for place in places(name, is_text)
        for mark in (MARKS if _is_line(place) else CONTROLS)
    )


MALFORMED_IDS = (
    "x",
    "{0192F5D1-7A5C-7B6E-8F00-0123456789AB}",
    "urn:uuid:0192f5d1-7a5c-7b6e-8f00-0123456789ab",
    "0192f5d17a5c7b6e8f000123456789ab",
    "0192f5d1-7a5c-7b6e-8f00-0123456789ab\n",
    "0192f5d1-7a5c-7b6e-8f00-0123456789ag",
    "０192f5d1-7a5c-7b6e-8f00-0123456789ab",
    "' or 1=1 --",
)


async def test_malformed_ids(front: Front) -> None:
    """An id that is not a UUID in the server's format is INVALID_FIELD, not NOT_FOUND."""
    here = await world(front)
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), value), place.path, shown=value)
        for name in METHODS
        for place in places(name, is_id)
        for value in MALFORMED_IDS
    )


async def test_enums(front: Front) -> None:
    """An unknown number is refused as a state, gender or order; in a filter, UNSPECIFIED is refused too."""
    here = await world(front)
    unknown = [(name, place, number) for name in METHODS for place in places(name, is_enum) for number in (99, -1)]
    unspecified = [
        (name, place, 0) for name in LISTS for place in places(name, lambda f: is_enum(f) and bool(f.is_repeated))
    ]
    assert unspecified
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), number), place.path)
        for name, place, number in unknown + unspecified
    )


async def test_negative_page_sizes(front: Front) -> None:
    """A negative page size is refused."""
    here = await world(front)
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), size), "page_size", shown=size)
        for name in LISTS
        for place in places(name, lambda field: field.name == "page_size")
        for size in (-1, -(2**31))
    )


def _encoded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


async def _tokens(front: Front) -> dict[str, tuple[Message, str]]:
    """For every List method, a request with a second page, and the genuine token of that page."""
    here = await world(front)
    for n in range(2):
        await front.doctor(clinic_id=here.clinic_id, specialty="Cardiology")
        await front.patient(given_name=f"R{n}", insurances=[patient_pb2.Insurance(country="PE", number="00123")])
        await front.slot(here.doctor_id, noon(5 + n))
        person = await front.patient()
        await front.book(person.id, here.doctor_id, today())
        await call(front, "JoinWaitlist", VALID["JoinWaitlist"](replace(here, patient_id=person.id)))
        said = VALID["SetDoctorAvailability"](here)
        said.date.year += n  # type: ignore[attr-defined]
        said.date.day = 1  # type: ignore[attr-defined]
        await call(front, "SetDoctorAvailability", said)
        leave = VALID["CreateLeave"](here)
        leave.leave.days.from_date.year += 1 + n  # type: ignore[attr-defined]
        leave.leave.days.from_date.day = 1  # type: ignore[attr-defined]
        leave.leave.days.to_date.CopyFrom(leave.leave.days.from_date)  # type: ignore[attr-defined]
        await call(front, "CreateLeave", leave)
        held = VALID["SetWeeklySchedule"](here)
        held.effective_from.year += 1 + n  # type: ignore[attr-defined]
        held.effective_from.day = 1  # type: ignore[attr-defined]
        await call(front, "SetWeeklySchedule", held)
        other = VALID["SetScheduleException"](here)
        other.date.year += 1 + n  # type: ignore[attr-defined]
        other.date.day = 1  # type: ignore[attr-defined]
        await call(front, "SetScheduleException", other)
    found = {}
    for name in LISTS:
        request = VALID[name](here)
        request.page_size = 1  # type: ignore[attr-defined]
        answer = await call(front, name, request)
        assert answer.next_page_token, name
        found[name] = (request, answer.next_page_token)
    return found


async def test_forged_page_tokens(front: Front) -> None:
    """A token that this service did not make for this filter, or that was changed in any place, is refused."""

    def checks() -> Iterable[Awaitable[list[str]]]:
        for name, (request, token) in tokens.items():
            sealed = base64.urlsafe_b64decode(token)
            forged = ["x", "=", token[:-4], token + "AAAA", "-" * 1024, "W" * 1000, _encoded(["0" * 24, CANARY])]
            for n in range(0, len(sealed), 5):
                forged.append(base64.urlsafe_b64encode(sealed[:n]).decode())
                changed = sealed[:n] + bytes([sealed[n] ^ 1]) + sealed[n + 1 :]
                forged.append(base64.urlsafe_b64encode(changed).decode())
            for value in filter(None, forged):
                spoiled = type(request)()
                spoiled.CopyFrom(request)
                spoiled.page_token = value  # type: ignore[attr-defined]
                yield refused_field(front, name, spoiled, "page_token", CANARY)

    tokens = await _tokens(front)
    await none_wrong(checks())


async def test_page_tokens_cannot_be_read(front: Front) -> None:
    """A token holds nothing that anybody but the service can read: neither a name nor an id nor a date."""
    name = "Zacharias"
    for n in range(2):
        await front.patient(given_name=name, phone=f"+551198765432{n}")
    request = patient_pb2.ListPatientsRequest(name_prefix=name, page_size=1)
    answer = await front.patients.ListPatients(request)
    tokens = {name: token for name, (_, token) in (await _tokens(front)).items()}
    for token in (answer.next_page_token, *tokens.values()):
        sealed = base64.urlsafe_b64decode(token)
        for part in (name.lower(), answer.patients[0].id, str(today().year)):
            assert part.encode() not in sealed
    request.page_token = answer.next_page_token
    again = await front.patients.ListPatients(request)
    assert {patient.given_name for patient in (*answer.patients, *again.patients)} == {name}


async def test_page_tokens_of_another_identity(front: Front, conninfo: str, settings: Settings) -> None:
    """A token is good for the caller to whom it was given, on any replica, and for nobody else."""
    first, second = [bearing((await create_key(front, "ADMIN")).key) for _ in range(2)]

    def checks() -> Iterable[Awaitable[list[str]]]:
        for name, token in given.items():
            spoiled = type(tokens[name])()
            spoiled.CopyFrom(tokens[name])
            spoiled.page_token = token  # type: ignore[attr-defined]
            yield refused_field(front, name, spoiled, "page_token", metadata=second)

    tokens = {name: request for name, (request, _) in (await _tokens(front)).items()}
    given: dict[str, str] = {}
    async with serving(settings, conninfo) as (_, elsewhere):
        for name, request in tokens.items():
            given[name] = (await call(elsewhere, name, request, metadata=first)).next_page_token
            following = type(request)()
            following.CopyFrom(request)
            following.page_token = given[name]  # type: ignore[attr-defined]
            await call(front, name, following, metadata=first)
    await none_wrong(checks())


async def test_page_tokens_of_another_filter(front: Front) -> None:
    """A token is bound to its method and filter: in any other list it is refused."""
    tokens = await _tokens(front)
    here = await world(front)
    others: dict[str, Message] = {
        "ListClinics": clinic_pb2.ListClinicsRequest(city="Lima"),
        "ListPatients": patient_pb2.ListPatientsRequest(name_prefix="P"),
        "ListDoctors": doctor_pb2.ListDoctorsRequest(specialty="x"),
        "ListDoctorAvailability": doctor_pb2.ListDoctorAvailabilityRequest(doctor_id=here.doctor_id),
        "ListScheduleExceptions": schedule_pb2.ListScheduleExceptionsRequest(doctor_id=here.doctor_id),
        "ListWeeklySchedules": schedule_pb2.ListWeeklySchedulesRequest(doctor_id=here.doctor_id),
        "ListLeaves": schedule_pb2.ListLeavesRequest(doctor_id=here.doctor_id),
        "ListSlots": slot_pb2.ListSlotsRequest(available_only=True),
        "ListAppointments": appointment_pb2.ListAppointmentsRequest(doctor_id=here.doctor_id),
        "ListApiKeys": access_pb2.ListApiKeysRequest(active_only=True),
        "ListUsers": access_pb2.ListUsersRequest(email="tests@example.com"),
        "ListAuditEvents": audit_pb2.ListAuditEventsRequest(method="GetPatient"),
        "ListNotifications": notification_pb2.ListNotificationsRequest(appointment_id=here.appointment_id),
        "ListWaitlist": waitlist_pb2.ListWaitlistRequest(doctor_id=here.doctor_id),
    }
    assert others.keys() == tokens.keys()

    def checks() -> Iterable[Awaitable[list[str]]]:
        for name, other in others.items():
            for giver, (_, token) in tokens.items():
                spoiled = type(other)()
                spoiled.CopyFrom(other if giver == name else tokens[name][0])
                spoiled.page_token = token  # type: ignore[attr-defined]
                yield refused_field(front, name, spoiled, "page_token")

    await none_wrong(checks())


@pytest.mark.parametrize("kind", ["unknown", "output-only", "not a path"])
async def test_masks(front: Front, kind: str) -> None:
    """An update mask may name only fields that a caller may write."""
    here = await world(front)

    def checks() -> Iterable[Awaitable[list[str]]]:
        for name in UPDATES:
            request = VALID[name](here)
            resource = METHODS[name].input_type.fields[0].message_type
            assert resource is not None
            paths = {
                "unknown": [CANARY, "_id", "version", "name_key", resource.name.lower()],
                "output-only": [field.name for field in resource.fields if is_output_only(field)],
                "not a path": ["", ".", "*.*", "Name", " name", "\0", "reason;drop", "x" * 5000, CANARY + "\u202e"],
            }[kind]
            assert paths
            for path in paths:
                for also in ((), (resource.fields[1].name,), ("*",)):
                    spoiled = type(request)()
                    spoiled.CopyFrom(request)
                    spoiled.update_mask.paths.extend([*also, path])  # type: ignore[attr-defined]
                    yield refused_field(front, name, spoiled, "update_mask.paths", CANARY)

    await none_wrong(checks())


IMPOSSIBLE_DATES = (
    (2026, 2, 30), (2027, 2, 29), (0, 1, 1), (2026, 0, 1), (2026, 1, 0), (2026, 13, 1), (2026, 1, 32), (10000, 1, 1),
    (-1, 1, 1), (0, 0, 0), (2**31 - 1, 1, 1),
)  # fmt: skip


async def test_impossible_dates(front: Front) -> None:
    """30 February is not a valid date in any request; nor is a year or a month alone, except as a birth date."""
    here = await world(front)
    dated = [(name, place) for name in METHODS for place in places(name, is_a(DATE)) if is_taken(place)]
    assert dated
    await none_wrong(
        refused_field(
            front, name, place.put(VALID[name](here), Date(year=y, month=m, day=d)), place.path, shown=(y, m, d)
        )
        for name, place in dated
        for y, m, d in IMPOSSIBLE_DATES
        if d or place.field.name != "birth_date" or (y, m) == (0, 0)
    )


IMPOSSIBLE_TIMESTAMPS = (
    (-62135596801, 0), (253402300800, 0), (-(2**63), 0), (2**63 - 1, 0), (-1, 0), (1800000000, -1),
    (1800000000, 10**9), (1800000000, -(2**31)),
)  # fmt: skip


async def test_impossible_timestamps(front: Front) -> None:
    """The years 0 and 10000 are refused, and so are impossible nanoseconds."""
    here = await world(front)
    timed = [(name, place) for name in METHODS for place in places(name, is_a(TIMESTAMP)) if is_taken(place)]
    assert timed
    await none_wrong(
        refused_field(
            front, name, place.put(VALID[name](here), Timestamp(seconds=s, nanos=n)), place.path, shown=(s, n)
        )
        for name, place in timed
        for s, n in IMPOSSIBLE_TIMESTAMPS
    )


INSURED = (
    ("PE", "00123\n"), ("PE", "００１２３"), ("CL", "1234"), ("PE", "123456"), ("CL", ""), ("PE", "0012a"),
    ("PE", " 00123"), ("PE", "٠٠١٢٣"), ("BR", "12\n"), ("BR", "１２３"), ("BR", "x" * 51), ("BR", " 1"),
)  # fmt: skip


async def test_insured_numbers(front: Front) -> None:
    """An insured number in Peru or Chile is exactly five ASCII digits."""
    here = await world(front)

    async def check(name: str, place: Place, country: str, number: str) -> list[str]:
        request: Any = VALID[name](here)
        if hasattr(request, "patient"):
            del request.patient.insurances[:]
        request = place.put(request, patient_pb2.Insurance(country=country, number=number))
        error = await refusal(call(front, name, request))
        wrong = manners(error, *([number.strip()] if len(number) > 4 else []))
        if not all(found.startswith(place.path) for found in named(error)):
            wrong.append(f"names {named(error)}")
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            wrong.append(error.code().name)
        return [f"{name} {country} {number!r}: {problem}" for problem in wrong]

    await none_wrong(
        check(name, place, country, number)
        for name in METHODS
        for place in places(name, is_a("clinic.frontdesk.v1.Insurance"))
        for country, number in INSURED
    )


async def test_countries(front: Front) -> None:
    """A country is an existing ISO 3166-1 code in upper case."""
    here = await world(front)
    found = [
        (name, place)
        for name in METHODS
        for place in places(name, lambda field: field.name in ("country", "default_country"))
    ]
    assert len(found) >= 6
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), country), place.path, shown=country)
        for name, place in found
        for country in ("pe", "XX", "PER", "P", "P\n", "ÄÖ", "ZZ", "EU", "00")
    )


NO_PHONES = (
    "x",
    "+551198765432a1",
    "12345",
    "+1",
    "+999999999999",
    "+55119876543210000",
    "call me",
    "+",
    f"tel:+5511987654321;x={CANARY}",
)


async def test_phones(front: Front) -> None:
    """A phone that is not a number in any country, or is national without its country, is refused."""
    here = await world(front)
    await front.clinics.UpdateClinic(
        clinic_pb2.UpdateClinicRequest(
            clinic=clinic_pb2.Clinic(id=here.clinic_id), update_mask=FieldMask(paths=["country"])
        )
    )
    found = [(name, place) for name in METHODS for place in places(name, lambda field: field.name == "phone")]
    assert len(found) >= 6

    def spoiled(name: str, place: Place, phone: str) -> Message:
        request: Any = place.put(VALID[name](here), phone)
        if hasattr(request, "clinic"):
            request.clinic.country = ""
        return cast(Message, request)

    await none_wrong(
        refused_field(front, name, spoiled(name, place, phone), place.path, CANARY, shown=phone)
        for name, place in found
        for phone in NO_PHONES
    )


async def test_phone_of_another_country(front: Front) -> None:
    """A number that exists in Brazil but not in Peru is refused if it is read as Peruvian."""
    for country, code in (("BR", "OK"), ("PE", "INVALID_FIELD")):
        request = patient_pb2.RegisterPatientRequest(
            patient=patient_pb2.Patient(given_name="Rosa", phone="(11) 98765-4321"), default_country=country
        )
        assert await outcome(front.patients.RegisterPatient(request)) == code


NO_ZONES = ("Mars/Olympus", "america/sao_paulo", "UTC+3", "../../etc/passwd", "/etc/localtime", "", ".",
            "posixrules\n", "America", "-03:00", CANARY)  # fmt: skip


async def test_zones(front: Front) -> None:
    """A time zone is a name in the IANA database."""
    here = await world(front)
    found = [(name, p) for name in METHODS for p in places(name, lambda field: field.name == "time_zone")]
    assert len(found) == 2
    for name, place in found:
        for zone in NO_ZONES:
            request: Any = place.put(VALID[name](here), zone)
            if name == "UpdateClinic":
                request.update_mask.paths.append("time_zone")
            error = await refusal(call(front, name, request))
            assert details(error)["ErrorInfo"].reason == "INVALID_FIELD", zone
            assert not manners(error, CANARY), zone


async def test_idempotency_keys(front: Front) -> None:
    """A key is at most 255 printable ASCII characters."""
    here = await world(front)
    await none_wrong(
        refused_field(front, name, place.put(VALID[name](here), key), "idempotency_key", shown=key)
        for name in MUTATIONS
        for place in places(name, lambda field: field.name == "idempotency_key")
        for key in ("k" * 256, "a\nb", "\x1f", "\x7f", "ключ", "a\0", "a\n", "\u202e", "k" * 100_000)
    )


async def test_slots_end_on_their_day(front: Front) -> None:
    """A slot ends after it starts, and on the same civil day of the clinic or at its midnight."""
    doctor = await front.doctor("America/Lima")
    # Lima has been five hours behind UTC, without summer time, since 1994.
    midnight = noon(3).replace(hour=5)
    good = slot_at(doctor.id, noon(9))

    def bad() -> Iterable[Awaitable[list[str]]]:
        for hour, minutes in ((12, 0), (12, -30), (23, 61), (12, 24 * 60), (0, 24 * 60 + 1)):
            slot = slot_at(doctor.id, midnight + timedelta(hours=hour), minutes)
            one = slot_pb2.CreateSlotRequest(slot=slot)
            yield refused_field(front, "CreateSlot", one, "slot.end_time", shown=(hour, minutes))
            two = slot_pb2.BatchCreateSlotsRequest(slots=[good, slot])
            yield refused_field(front, "BatchCreateSlots", two, "slots.end_time", shown=(hour, minutes))

    await none_wrong(bad())
    assert front.sql("select count(*) from slot") == [(0,)]
    for days, hour, minutes in ((0, 23, 60), (1, 0, 24 * 60)):
        assert await outcome(front.slot(doctor.id, midnight + timedelta(days=days, hours=hour), minutes)) == "OK"


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "UTC", "Pacific/Pago_Pago"])
async def test_the_last_hours_of_the_year_9999(front: Front, zone: str) -> None:
    """A slot at the end of the last year of a timestamp is created or refused, without a fault of the server."""
    doctor = await front.doctor(zone)
    last = datetime(9999, 12, 31, 22, 0, tzinfo=UTC)
    assert await outcome(front.slot(doctor.id, last)) in ("OK", "INVALID_FIELD")
    assert await outcome(front.slots.ListSlots(slot_pb2.ListSlotsRequest(doctor_id=doctor.id))) == "OK"


async def test_dates_at_the_ends_of_the_calendar(front: Front) -> None:
    """The first and the last possible date are treated like all others."""
    here = await world(front)
    for name in METHODS:
        for place in places(name, is_a(DATE)):
            for edge in (Date(year=1, month=1, day=1), Date(year=9999, month=12, day=31)):
                answer = await outcome(call(front, name, place.put(VALID[name](here), edge)))
                assert answer not in ("INTERNAL", "DATABASE_UNAVAILABLE"), (name, place.path, edge)


async def test_at_most_twenty_violations(front: Front) -> None:
    """However many rules a request breaks, the refusal lists at most twenty violations and stays below 8 KB."""
    bad = [slot_pb2.Slot(id=CANARY, doctor_id=CANARY, block_reason="\x01" * 2001) for _ in range(400)]
    error = await refusal(front.slots.BatchCreateSlots(slot_pb2.BatchCreateSlotsRequest(slots=bad)))
    assert len(details(error)["BadRequest"].field_violations) == 20
    assert not manners(error, CANARY)
    # The first violation is found wherever it is; violations after the twentieth are not looked for.
    late = [slot_at("0192f5d1-7a5c-7b6e-8f00-0123456789ab", noon(2))] * 460 + bad[:40]
    error = await refusal(front.slots.BatchCreateSlots(slot_pb2.BatchCreateSlotsRequest(slots=late)))
    found = details(error)["BadRequest"].field_violations
    assert (len(found), found[0].field.split(".")[0]) == (20, "slots[460]")
    sick = patient_pb2.Patient(given_name="R", phone="+5511987654321", allergies=[f"{CANARY}\0" for _ in range(100)])
    error = await refusal(front.patients.RegisterPatient(patient_pb2.RegisterPatientRequest(patient=sick)))
    assert len(details(error)["BadRequest"].field_violations) == 20
    assert not manners(error, CANARY)


def _lists() -> list[tuple[str, Place]]:
    lists = [(name, place) for name in METHODS for place in places(name, lambda field: bool(field.is_repeated))]
    assert {"slots", "slot_ids", "allergies", "insurances", "states", "paths"} <= {p.field.name for _, p in lists}
    return lists


def _only(name: str, place: Place, count: int) -> Any:
    """A request with `count` elements in this list, and nothing else."""
    request = message_factory.GetMessageClass(METHODS[name].input_type)()
    holder: Any = request
    for step in place.steps[:-1]:
        holder = getattr(holder, step.name)
    values = getattr(holder, place.field.name)
    if is_text(place.field) or is_enum(place.field):
        values.extend(["" if is_text(place.field) else 99] * count)
    else:
        values.MergeFrom([type(values.add())()] * (count - 1))
    return request


async def test_lists_of_a_megabyte(front: Front) -> None:
    """A list that is too long is refused because of its length alone, before any rule checks its elements."""
    for name, place in _lists():
        error = await refusal(call(front, name, _only(name, place, 300_000)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, (name, error.details())
        assert list(named(error)) == [place.path]
        assert not manners(error)


def _within(place: Place, field: bytes) -> bytes:
    """The bytes of a field, in those of the messages around it."""
    for step in reversed(place.steps[:-1]):
        field = bytes([step.number << 3 | 2, len(field)]) + field
    return field


async def test_one_element_too_many(front: Front) -> None:
    """Each maximum of a list is exact, even if the list comes in pieces, or its numbers in any form of protobuf."""
    for name, place in _lists():
        rules = place.field.GetOptions().Extensions[validate_pb2.field].repeated
        most = rules.max_items if rules.HasField("max_items") else MOST_ELEMENTS

        async def too_long(*pieces: bytes, name: str = name, place: Place = place) -> bool:
            error = await refusal(raw(front, name)(b"".join(pieces)))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert not manners(error)
            return (error.details() or "").startswith(f"{place.path}: must contain no more than")

        whole, some, one = (_only(name, place, count).SerializeToString() for count in (most, most - 1, 1))
        assert not await too_long(whole), name
        assert not await too_long(some, one), name
        assert await too_long(whole, one), name
        if is_enum(place.field):
            one = _within(place, bytes([place.field.number << 3, 99]))
            assert not await too_long(one, some), name
            assert await too_long(one, whole), name
            wide = _within(place, bytes([place.field.number << 3, *[0xE3] + [0x80] * 8, 0]))
            assert not await too_long(wide * most), name
            assert await too_long(wide * (most + 1)), name


async def test_fields_without_end(front: Front) -> None:
    """A request with lists and a megabyte of allowed or unknown fields is refused because of their number."""
    unknown, group = bytes([0xF8, 0x07, 0]), bytes([0xFB, 0x07, 0xFC, 0x07])
    for name in {name for name, _ in _lists()}:
        for piece in (unknown, group, bytes([0x0A, 0])):
            error = await refusal(raw(front, name)(piece * 250_000))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, name
            assert len(named(error)) == 1
            assert not manners(error)


async def test_nothing_at_all(front: Front) -> None:
    """An empty request to any method is answered, or refused by a rule of the contract."""
    for name in METHODS:
        answer = await outcome(call(front, name, type(VALID[name](await world(front)))()))
        assert answer in ("OK", "INVALID_FIELD"), name


def test_every_reason_has_a_code() -> None:
    """Every public reason except INTERNAL is a refusal of the core and has a status in the one table."""
    assert errors.REFUSALS.keys() == REASONS - {"INTERNAL"}
    for refused in errors.REFUSALS.values():
        assert code_of(refused) in CODES.values()
        assert refused.__doc__


def _ours(garbage: object) -> bool:
    """Whether the object has a type of the service, or runs its code."""
    codes = [getattr(garbage, name) for name in ("cr_code", "gi_code", "f_code", "__code__") if hasattr(garbage, name)]
    return any("src/frontdesk/" in code.co_filename for code in codes) or type(garbage).__module__.startswith(
        "frontdesk."
    )


async def test_calls_leave_no_circles(front: Front) -> None:
    """No call, whatever its answer, leaves objects for the garbage collector, which would stop all calls."""
    here, nowhere = await world(front), World(*["0190a0b0-1111-7222-8333-444455556666"] * len(fields(World)))
    answers = Counter[str]()
    gc.collect()
    # What is there already is looked at no more: a collection takes a millisecond then, and not a hundred.
    gc.freeze()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for name in METHODS:
            for request in (VALID[name](here), VALID[name](nowhere), type(VALID[name](here))()):
                answers[await outcome(call(front, name, request))] += 1
                gc.collect()
                assert not [repr(left)[:200] for left in gc.garbage if _ours(left)], name
                gc.garbage.clear()
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
    assert len(answers) > 8
    assert min(answers["OK"], answers["INVALID_FIELD"]) > 10
