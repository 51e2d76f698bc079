"""Cases 1 to 8: hostile traffic, before any value of a request is read."""

import asyncio
import gzip
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc

from clinic.frontdesk.v1 import appointment_pb2, clinic_pb2, queue_pb2
from frontdesk.db.session import STATEMENT_TIMEOUT
from frontdesk.rpc import pipeline, server
from frontdesk.settings import Settings
from tests.clinic import Front, day, details, outcome, reason_of, refusal, tomorrow
from tests.hostile.methods import (
    METHODS,
    VALID,
    call,
    is_text,
    manners,
    named,
    path_of,
    places,
    raw,
    request_class,
    world,
)
from tests.hostile.wire import RawConnection, another_client, frame, framed, serving
from tests.waiting import SOON, until

GET_CLINIC = path_of("GetClinic")
NOBODY = clinic_pb2.GetClinicRequest(clinic_id="0192f5d1-7a5c-7b6e-8f00-0123456789ab")
NOT_FOUND, EXHAUSTED, DEADLINE, UNIMPLEMENTED = "5", "8", "4", "12"

_START_GROUP, _END_GROUP = b"\x0b", b"\x0c"
_UNKNOWN_START, _UNKNOWN_END = b"\xc3\x3e", b"\xc4\x3e"  # of field 1000
GARBAGE = {
    "noise": b"\xff" * 64,
    "a length that is not there": b"\x0a\x05ab",
    "a tag without a value": b"\x0a",
    "field number 0": b"\x02\x00",
    "an endless varint": b"\x08" + b"\xff" * 11,
    "an unknown wire type": b"\x0f\x00",
    "nesting of 101": _UNKNOWN_START * 101 + _UNKNOWN_END * 101,
    "nesting of 100,000": _START_GROUP * 100_000,
    "a group that does not end": _UNKNOWN_START,
    "an end without a group": _END_GROUP,
    "JSON": b'{"clinic_id": "x"}',
}


async def test_garbage(front: Front) -> None:
    """Bytes that are not a valid protobuf of the request's type are refused by every method, in the usual form."""
    for name in METHODS:
        for kind, noise in GARBAGE.items():
            if kind == "field number 0" and not request_class(name).DESCRIPTOR.fields:
                # The protobuf library skips it in a message that has no fields.
                continue
            error = await refusal(raw(front, name)(noise, timeout=SOON))
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD"), (name, kind)
            assert not manners(error), (name, kind)


async def test_truncated_requests(front: Front) -> None:
    """A truncated request is refused by every method, unless it is a shorter valid one."""
    here = await world(front)
    for name in METHODS:
        whole = VALID[name](here).SerializeToString()
        for length in range(max(len(whole) - 20, 0), len(whole)):
            try:
                request_class(name).FromString(whole[:length])
            except DecodeError:
                assert await outcome(raw(front, name)(whole[:length], timeout=SOON)) == "INVALID_FIELD", name


async def test_text_that_is_not_utf8(front: Front) -> None:
    """Bytes that are not UTF-8 are refused in every string of every request."""
    here = await world(front)
    for name in METHODS:
        for place in places(name, is_text):
            whole = place.put(VALID[name](here), "QQQQ").SerializeToString()
            for bad in (b"\xff\xfe\xfd\xfc", b"\xc0\x80\xc0\x80", b"a\xed\xa0\x80", b"abc\xe2"):
                error = await refusal(raw(front, name)(whole.replace(b"QQQQ", bad), timeout=SOON))
                assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
                assert not manners(error)


async def test_messages_over_the_limit(front: Front) -> None:
    """A message over 1 MiB, one that claims 4 GiB, and one that unpacks to 50 MB are RESOURCE_EXHAUSTED."""
    async with RawConnection(front.port) as wire:
        for data, more in (
            (framed(b"\0" * (1024 * 1024 + 1)), ()),
            (framed(b"", length=2**32 - 1), ()),
            (framed(gzip.compress(b"\0" * 50_000_000), compressed=True), (("grpc-encoding", "gzip"),)),
        ):
            stream = await wire.open(GET_CLINIC, *more)
            await wire.send(stream, data)
            assert await wire.status(stream) == EXHAUSTED
        # The connection still works.
        stream = await wire.open(GET_CLINIC)
        await wire.send(stream, framed(NOBODY), end=True)
        assert await wire.status(stream) == NOT_FOUND


async def test_a_message_at_the_limit(front: Front) -> None:
    """A message of one megabyte, less the overhead, is read, and refused because of its content."""
    request = clinic_pb2.GetClinicRequest(clinic_id="x" * (1024 * 1024 - 16))
    error = await refusal(front.clinics.GetClinic(request))
    assert (reason_of(error), list(named(error))) == ("INVALID_FIELD", ["clinic_id"])
    assert not manners(error, "xxxxx")


async def test_compression_that_is_none(front: Front) -> None:
    """A message that falsely claims to be compressed, or is compressed in an unknown way, ends only its own call."""
    async with RawConnection(front.port) as wire:
        for more in ((("grpc-encoding", "gzip"),), (("grpc-encoding", "br"),), ()):
            stream = await wire.open(GET_CLINIC, *more)
            await wire.send(stream, framed(b"not packed", compressed=True), end=True)
            assert await wire.status(stream) not in (None, "0")
        stream = await wire.open(GET_CLINIC)
        await wire.send(stream, framed(NOBODY), end=True)
        assert await wire.status(stream) == NOT_FOUND


async def test_metadata_over_the_limit(front: Front) -> None:
    """More than 16 KiB of metadata is RESOURCE_EXHAUSTED, in one header or in many."""
    for headers in ([("x", "a" * 17 * 1024)], [(f"x-{n}", "a" * 100) for n in range(200)]):
        async with RawConnection(front.port) as wire:
            stream = await wire.open(GET_CLINIC, *headers)
            await wire.send(stream, framed(NOBODY), end=True)
            assert await wire.status(stream) == EXHAUSTED
        async with another_client(front) as client:
            error = await refusal(client.clinics.GetClinic(NOBODY, metadata=headers))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_that_unpacks(front: Front) -> None:
    """30 KB of metadata that stand for 20 MB by reference are RESOURCE_EXHAUSTED; endless metadata takes no memory.

    gRPC ends a connection that sends empty pieces of metadata, and reads other pieces without keeping them.
    """
    async with RawConnection(front.port) as wire:
        stream = await wire.open(GET_CLINIC, *[("x", "a" * 4000)] * 5000)
        await wire.send(stream, framed(NOBODY), end=True)
        assert await wire.status(stream) == EXHAUSTED
    for more in (b"\0\1x\x64" + b"a" * 100, b""):
        async with RawConnection(front.port) as wire:
            before = resident()
            await wire.write(frame(1, 1, b"\x83\x86"))
            for _ in range(10_000):
                if wire.closed:
                    break
                await wire.write(frame(9, 1, more) * 100)
            assert await outcome(front.clinics.GetClinic(NOBODY)) == "CLINIC_NOT_FOUND"
            assert resident() - before < 50 << 20
            assert more or wire.closed


def resident() -> int:
    """Bytes of memory of this process, server and client together."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["headers only", "half-closed", "a part of the prefix", "a part of the message"])
async def test_calls_without_a_message(conninfo: str, settings: Settings, kind: str) -> None:
    """Calls that never send their message, however many, block no other calls, and end at their deadline."""
    async with serving(settings, conninfo, max_in_flight=3) as (_, front), asyncio.TaskGroup() as group:
        wires = [RawConnection(front.port) for _ in range(3)]
        for wire in wires:
            await wire.__aenter__()
        try:
            for wire in wires:
                for n in range(90):
                    stream = await wire.open(GET_CLINIC, *([("grpc-timeout", "1S")] if n == 0 else []))
                    if kind == "half-closed":
                        await wire.send(stream, b"", end=True)
                    elif kind == "a part of the prefix":
                        await wire.send(stream, b"\0\0")
                    elif kind == "a part of the message":
                        await wire.send(stream, framed(b"abc", length=1000))
            for _ in range(20):
                task = group.create_task(outcome(front.clinics.GetClinic(NOBODY)))
                assert await task == "CLINIC_NOT_FOUND"
            for wire in wires:
                assert await wire.status(1) == DEADLINE
                assert not wire.closed
        finally:
            for wire in wires:
                await wire.__aexit__(None, None, None)


@pytest.mark.parametrize("kind", ["headers only", "a part of the message", "nothing at all"])
async def test_age_ends_calls_without_a_message(
    conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Calls without a message and without a deadline end with their connection, at its maximum age."""
    lasting = {"grpc.max_connection_age_ms": 300, "grpc.max_connection_age_grace_ms": 300}
    options = server.options

    def younger(*args: Any, **kwargs: Any) -> list[tuple[str, int]]:
        return [(name, lasting.get(name, value)) for name, value in options(*args, **kwargs)]

    monkeypatch.setattr(server, "options", younger)
    async with serving(settings, conninfo) as (_, front), RawConnection(front.port) as wire:
        if kind != "nothing at all":
            for _ in range(50):
                stream = await wire.open(GET_CLINIC)
                if kind == "a part of the message":
                    await wire.send(stream, framed(b"abc", length=1000))
        await until(lambda: wire.closed)
        assert wire.gone == 0
        assert not any(ended.get("grpc-status") == "0" for ended in wire.ended.values())
        assert await outcome(front.clinics.GetClinic(NOBODY)) == "CLINIC_NOT_FOUND"


async def test_deadlines_that_are_none(front: Front) -> None:
    """A deadline of zero has passed; an invalid one ends its call; one of 11,000 years does not limit the call."""
    async with RawConnection(front.port) as wire:
        for text, expected in (("0n", {DEADLINE}), ("99999999H", {NOT_FOUND}), ("1H", {NOT_FOUND})):
            stream = await wire.open(GET_CLINIC, ("grpc-timeout", text))
            await wire.send(stream, framed(NOBODY), end=True)
            assert await wire.status(stream) in expected, text
        for text in ("-1S", "1x", "", "1 S", "9" * 20 + "n", "S"):
            stream = await wire.open(GET_CLINIC, ("grpc-timeout", text))
            await wire.send(stream, framed(NOBODY), end=True)
            assert await wire.status(stream) not in (None, "0"), text


@pytest.fixture
async def held(front: Front) -> AsyncIterator[tuple[Front, str, str]]:
    """A doctor-day that another session has locked, and a patient who wants a place on it."""
    doctor, patient = await front.doctor(), await front.patient()
    async with await psycopg.AsyncConnection.connect(front.conninfo) as other:
        await other.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, tomorrow()))
        yield front, doctor.id, patient.id
        await other.rollback()


def waiting(front: Front) -> int:
    """The number of bookings that run in the database."""
    (found,) = front.sql(
        "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'frontdesk'"
        " and state = 'active' and query like '%%decide(%%'"
    )
    return int(found[0])


async def until_none_waits(front: Front) -> None:
    """Wait until the statements are cancelled, before PostgreSQL's own limit would end them."""
    await until(lambda: waiting(front) == 0, STATEMENT_TIMEOUT - 2)


@pytest.mark.parametrize("timeout", [None, 10.0**9])
async def test_the_servers_own_limit(
    held: tuple[Front, str, str], monkeypatch: pytest.MonkeyPatch, timeout: float | None
) -> None:
    """Without a deadline, or with an absurd one, the server's limit ends call and statement; the pool stays healthy."""
    front, doctor, patient = held
    monkeypatch.setattr(pipeline, "DEADLINE_SECONDS", 0.4)
    target = appointment_pb2.DoctorDay(doctor_id=doctor, date=day(tomorrow()))
    request = appointment_pb2.BookAppointmentRequest(patient_id=patient, doctor_day=target)
    errors = await asyncio.gather(
        *(refusal(front.appointments.BookAppointment(request, timeout=timeout)) for _ in range(8))
    )
    for error in errors:
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert not manners(error)
    await until_none_waits(front)
    monkeypatch.undo()
    assert Counter(await asyncio.gather(*(outcome(front.clinic()) for _ in range(30)))) == {"OK": 30}
    assert front.sql("select count(*) from appointment") == [(0,)]


async def test_the_limit_holds_for_those_who_wait_for_a_connection(
    held: tuple[Front, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a call gets its connection only as its time runs out, it is answered on time, and its statement ends too."""
    front, doctor, patient = held
    monkeypatch.setattr(pipeline, "DEADLINE_SECONDS", 0.4)
    for _ in range(4):
        async with asyncio.timeout(3):
            booked = await asyncio.gather(*(outcome(front.book(patient, doctor, tomorrow())) for _ in range(13)))
            assert Counter(booked) == {"DEADLINE_EXCEEDED": 13}
        await until_none_waits(front)


async def test_the_callers_deadline(held: tuple[Front, str, str]) -> None:
    """A caller's deadline reaches the statement: it ends in the database too, and nothing is booked."""
    front, doctor, patient = held
    booking = asyncio.create_task(refusal(front.book(patient, doctor, tomorrow(), idempotency_key="k")))
    await until(lambda: waiting(front) == 1)
    booking.cancel()
    await until_none_waits(front)
    target = appointment_pb2.DoctorDay(doctor_id=doctor, date=day(tomorrow()))
    request = appointment_pb2.BookAppointmentRequest(patient_id=patient, doctor_day=target)
    error = await refusal(front.appointments.BookAppointment(request, timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_none_waits(front)
    assert await outcome(front.clinic()) == "OK"
    assert front.sql("select count(*) from appointment") == [(0,)]


async def test_unknown_methods(front: Front) -> None:
    """A method, service or path that does not exist is UNIMPLEMENTED."""
    service = METHODS["GetClinic"].containing_service.full_name
    for path in (f"/{service}/Nope", "/nope.Service/GetClinic", f"/{service}/", "/", f"/{service}/getclinic", "//"):
        unknown: Any = front.channel.unary_unary(path)
        error = await refusal(unknown(b"", timeout=SOON))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED, path


async def test_streams_called_as_unary_calls(front: Front) -> None:
    """Calling WatchQueue as a unary method, or GetQueue as a stream, harms nobody."""
    here = await world(front)
    watch: Any = front.channel.unary_unary(path_of("WatchQueue"))
    with pytest.raises(grpc.aio.AioRpcError):
        await watch(queue_pb2.WatchQueueRequest(doctor_id="x").SerializeToString(), timeout=SOON)
    get: Any = front.channel.unary_stream(
        path_of("GetQueue"), response_deserializer=queue_pb2.GetQueueResponse.FromString
    )
    answers = [m async for m in get(VALID["GetQueue"](here).SerializeToString(), timeout=SOON)]
    assert len(answers) == 1
    assert await outcome(front.clinic()) == "OK"


async def test_ping_flood(front: Front) -> None:
    """A client that floods the server with pings gets GOAWAY, and the others are served."""
    async with RawConnection(front.port) as wire:
        for n in range(1, 100):
            await wire.ping()
            # One at a time: otherwise bytes that the server has not read turn its GOAWAY into a reset.
            await until(lambda n=n: wire.pongs == n or wire.gone is not None)  # type: ignore[misc]
            if wire.gone is not None:
                break
        await until(lambda: wire.gone is not None)
        assert wire.gone == 11  # ENHANCE_YOUR_CALM
    assert await outcome(front.clinic()) == "OK"


async def test_rapid_resets(front: Front) -> None:
    """After 1,500 calls that are reset at once, and meanwhile, the server serves other clients."""
    here = await world(front)
    request = framed(VALID["GetDoctor"](here))
    async with RawConnection(front.port) as wire:
        for n in range(1500):
            if wire.closed or wire.gone is not None:
                break
            stream = await wire.open(path_of("GetDoctor"))
            if n % 2:
                await wire.send(stream, request, end=True)
            if stream not in wire.ended:
                await wire.abandon(stream)
            if n % 300 == 0:
                assert await outcome(call(front, "GetDoctor", VALID["GetDoctor"](here))) == "OK"
    assert await outcome(call(front, "GetDoctor", VALID["GetDoctor"](here))) == "OK"


async def test_garbage_instead_of_http2(front: Front) -> None:
    """Bytes that are not HTTP/2 end their own connection."""
    for noise in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0" * 100,
                  b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100):  # fmt: skip
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        writer.write(noise)
        async with asyncio.timeout(SOON):
            try:
                while await reader.read(65536):
                    pass
            except OSError:
                pass
        writer.close()
    assert await outcome(front.clinic()) == "OK"


async def test_admission(conninfo: str, settings: Settings) -> None:
    """At the limit of calls in progress, the next call is OVERLOADED; health and watchers are not affected."""
    async with serving(settings, conninfo, max_in_flight=4) as (_, front):
        doctor, patient = await front.doctor(), await front.patient()
        async with await psycopg.AsyncConnection.connect(conninfo) as other:
            await other.execute("select lock_all(array[doctor_day_name(%s, %s)])", (doctor.id, tomorrow()))
            stuck = [asyncio.create_task(outcome(front.book(patient.id, doctor.id, tomorrow()))) for _ in range(4)]
            await until(lambda: waiting(front) == 4)
            error = await refusal(front.clinics.GetClinic(NOBODY))
            assert (error.code(), reason_of(error)) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
            assert not manners(error)
            assert "RetryInfo" in details(error)
            pushback = dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]
            assert int(pushback) > 0
            health = health_pb2_grpc.HealthStub(front.channel)
            assert (
                await health.Check(health_pb2.HealthCheckRequest())
            ).status == health_pb2.HealthCheckResponse.SERVING
            watch: Any = front.queues.WatchQueue(queue_pb2.WatchQueueRequest(doctor_id=doctor.id))
            assert (await watch.read()).revision == 1
            watch.cancel()
            await other.rollback()
        assert Counter(await asyncio.gather(*stuck)) == {"OK": 1, "DUPLICATE_BOOKING": 3}
        assert await outcome(front.clinics.GetClinic(NOBODY)) == "CLINIC_NOT_FOUND"


async def test_too_many_watchers(conninfo: str, settings: Settings) -> None:
    """Watchers have their own limit, and when one leaves, another gets its place."""
    async with serving(settings, conninfo, max_watchers=3) as (_, front):
        doctor = await front.doctor()
        request = queue_pb2.WatchQueueRequest(doctor_id=doctor.id)
        watches = [front.queues.WatchQueue(request) for _ in range(3)]
        for watch in watches:
            await watch.read()
        error = await refusal(front.queues.WatchQueue(request).read())
        assert (error.code(), reason_of(error)) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MANY_WATCHERS")
        assert {"RetryInfo", "QuotaFailure"} <= details(error).keys()
        assert await outcome(front.clinic()) == "OK"
        watches[0].cancel()
        async with asyncio.timeout(SOON):
            while await outcome(front.queues.WatchQueue(request).read()) != "OK":
                pass
