"""The conformance suite passes on our server, and each of its checks fails on a server that breaks its rule."""

import asyncio
import itertools
import os
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
import pytest

from clinic.frontdesk.v1 import appointment_pb2, queue_pb2
from frontdesk.client import FrontdeskError
from frontdesk.rpc import stream as streams
from frontdesk.tools.conformance import CHECKS, Result, checks, conform
from tests.clinic import Front

Message = queue_pb2.WatchQueueResponse
Entry = queue_pb2.QueueEntry
Kind = queue_pb2.QueueChange

FRONTDESK = [sys.executable, "-m", "frontdesk.cli"]
numbers = itertools.count()
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("FRONTDESK_")}
IMPOSSIBLE = {"lost-token"}
SLOW = {"shortest-heartbeat", "default-heartbeat", "longest-heartbeat", "blocked-reader", "stream-age"}
"""Checks that wait longer than the others."""


async def results(port: int, only: Sequence[str] = (), patience: float = 5) -> dict[str, Result]:
    """The results of the suite on the server at this port, by check."""
    found = {}
    async with aclosing(conform(f"127.0.0.1:{port}", only=only, patience=patience)) as said:
        async for result in said:
            found[result.check.name] = result
    return found


def verdicts(found: dict[str, Result], verdict: str) -> set[str]:
    """The names of the checks with this verdict."""
    return {name for name, result in found.items() if result.verdict == verdict}


async def test_our_server_conforms(front: Front) -> None:
    """Every check passes, except those that are skipped because they are impossible or take too long."""
    found = await results(front.port)
    assert {name: result.detail for name, result in found.items() if result.verdict == "FAIL"} == {}
    assert verdicts(found, "SKIPPED") == IMPOSSIBLE | SLOW
    assert list(found) == list(CHECKS)


async def timed(judge: Callable[[str], Awaitable[Result]], monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """Run the checks of a server's timing, with shorter times for both the server and the suite."""
    for place in (streams, checks):
        monkeypatch.setattr(place, "WRITE_SECONDS", 1.0)
    found = await asyncio.gather(judge("shortest-heartbeat"), judge("blocked-reader"))
    monkeypatch.setattr(streams, "MAX_AGE_SECONDS", (1.0, 2.0))
    monkeypatch.setattr(checks, "STREAM_AGE_SECONDS", (1.0, 2.0))
    return [*found, await judge("stream-age")]


async def test_what_is_timed(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough patience, the checks of timing pass too."""

    async def judge(name: str) -> Result:
        return (await results(front.port, [name], patience=11))[name]

    found = await timed(judge, monkeypatch)
    assert [(result.verdict, result.detail) for result in found] == [("PASS", "")] * 3


async def test_nobody_there(unused_tcp_port: int) -> None:
    """A server that cannot be reached raises an error; it does not fail a check."""
    with pytest.raises(FrontdeskError) as caught:
        await results(unused_tcp_port)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE


# Faulty servers


Stream = AsyncIterator[Message]
Tamper = Callable[[Stream, queue_pb2.WatchQueueRequest], Stream]


def each(change: Callable[[Message], object]) -> Tamper:
    """Change every update in place."""

    async def tamper(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
        async for message in messages:
            if message.HasField("update"):
                change(message)
            yield message

    return tamper


def each_change(change: Callable[[queue_pb2.QueueChange], object]) -> Tamper:
    """Change every QueueChange in place."""
    return each(lambda message: [change(one) for one in message.update.changes])


def heartbeat(message: Message) -> Message:
    """A heartbeat that can follow this message."""
    return Message(
        revision=message.revision,
        previous_revision=message.revision,
        resume_token=message.resume_token,
        server_time=message.server_time,
        heartbeat=queue_pb2.Heartbeat(),
    )


async def faithful(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """No fault."""
    async for message in messages:
        yield message


async def drop_one(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """The third message of a stream is lost."""
    number = 0
    async for message in messages:
        number += 1
        if number != 3:
            yield message


async def repeat_one(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """The third message of a stream comes twice."""
    number = 0
    async for message in messages:
        number += 1
        yield message
        if number == 3:
            yield message


async def stutter(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """Every message comes twice."""
    async for message in messages:
        yield message
        yield message


async def know_everybody(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """An unknown doctor has an empty queue."""
    try:
        async for message in messages:
            yield message
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        yield Message(revision=1, update=queue_pb2.QueueUpdate(queue=queue_pb2.Queue(revision=1)))


async def beat_fast(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """A heartbeat follows each message."""
    async for message in messages:
        yield message
        yield heartbeat(message)


async def end_in_peace(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """An error ends a stream with status OK."""
    with suppress(grpc.aio.AioRpcError):
        async for message in messages:
            yield message


async def end_silently(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """A planned end is not announced."""
    async for message in messages:
        if not message.HasField("closing"):
            yield message


async def late_start(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """The first message comes with the first change."""
    await anext(messages)
    async for message in messages:
        yield message


async def beat_first(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """A stream begins with a heartbeat, even without a token."""
    first = await anext(messages)
    yield heartbeat(first)
    async for message in messages:
        yield message


async def hoard(messages: Stream, request: queue_pb2.WatchQueueRequest) -> AsyncGenerator[Message]:
    """Everything is kept for a slow reader."""
    kept: asyncio.Queue[Message] = asyncio.Queue()

    async def read() -> None:
        async for message in messages:
            kept.put_nowait(message)

    reading = asyncio.create_task(read())
    try:
        while True:
            yield await kept.get()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def stale(messages: Stream, request: queue_pb2.WatchQueueRequest) -> Stream:
    """Every update shows the queue of the previous update."""
    before: list[queue_pb2.Queue] = []

    def swap(message: Message) -> None:
        now = queue_pb2.Queue()
        now.CopyFrom(message.update.queue)
        if before:
            message.update.queue.CopyFrom(before[-1])
            message.update.queue.revision = message.revision
        before.append(now)

    return each(swap)(messages, request)


def forgetful(message: Message) -> None:
    """The first change of an update is missing."""
    if message.update.changes:
        del message.update.changes[0]


def backwards(message: Message) -> None:
    """The queue is reversed."""
    entries = list(message.update.queue.entries)
    del message.update.queue.entries[:]
    message.update.queue.entries.extend(reversed(entries))


def keep_the_done(messages: Stream, request: queue_pb2.WatchQueueRequest) -> Stream:
    """Finished entries stay in the queue."""
    done: list[Entry] = []

    def add(message: Message) -> None:
        done.extend(one.entry for one in message.update.changes if one.entry.state == Entry.STATE_DONE)
        message.update.queue.entries.extend(done)

    return each(add)(messages, request)


def shuffled_tickets(change: queue_pb2.QueueChange) -> None:
    """Tickets begin at 11."""
    if change.HasField("entry"):
        change.entry.ticket += 10


def own_history(messages: Stream, request: queue_pb2.WatchQueueRequest) -> Stream:
    """Every other watcher sees different kinds of change."""
    other = next(numbers) % 2 == 0

    def change(one: queue_pb2.QueueChange) -> None:
        if other and one.kind == Kind.KIND_PARKED:
            one.kind = Kind.KIND_MISSED

    return each_change(change)(messages, request)


def no_entry_of_started(change: queue_pb2.QueueChange) -> None:
    """A change of the queue has no entry."""
    if change.kind == Kind.KIND_STARTED:
        change.ClearField("entry")


def wrong_kind(change: queue_pb2.QueueChange) -> None:
    """One kind of change is reported as another."""
    if change.kind == Kind.KIND_NO_SHOW:
        change.kind = Kind.KIND_CANCELLED


def other_room(change: queue_pb2.QueueChange) -> None:
    """An entry differs from the one that the call answered."""
    if change.HasField("entry"):
        change.entry.room = "elsewhere"


def count_all(message: Message) -> None:
    """All entries are counted as waiting."""
    message.update.queue.waiting_count = len(message.update.queue.entries)


def position_all(message: Message) -> None:
    """All entries have a position."""
    for place, entry in enumerate(message.update.queue.entries, start=1):
        entry.position = place


def no_token(message: Message) -> None:
    """Updates have no token."""
    message.resume_token = ""


def without(field: str) -> Callable[[Any], None]:
    """Clear a field of the request."""
    return lambda request: request.ClearField(field)


def next_revision(answer: Any) -> None:
    """The answered revision is not the one that the change made."""
    answer.revision += 1


WATCH = "WatchQueue"
Fault = tuple[dict[str, Callable[[Any], object]], dict[str, Callable[[Any], object]], Tamper, set[str]]
# Faults in requests and in answers, by method, and in streams; and the checks that must fail.
FAULTS: dict[str, Fault] = {
    "drops a message": ({}, {}, drop_one, {"chain", "concurrent-changes", "slow-reader"}),
    "repeats a message": ({}, {}, repeat_one, {"chain", "concurrent-changes", "slow-reader"}),
    "stutters": ({}, {}, stutter, {"one-doctor-day", "chain"}),
    "knows every doctor": ({}, {}, know_everybody, {"unknown-doctor"}),
    "starts late": ({}, {}, late_start, {"starts-empty", "default-date"}),
    "begins with a heartbeat": ({}, {}, beat_first, {"starts-empty", "starts-whole", "older-token"}),
    "leaves a change out": ({}, {}, each(forgetful), {"changes-cover", "older-token", "cut-streams", "folding"}),
    "reverses the queue": ({}, {}, each(backwards), {"queue-order", "calling-order", "get-queue", "folding"}),
    "positions every entry": ({}, {}, each(position_all), {"queue-positions", "get-queue", "folding"}),
    "counts every entry": ({}, {}, each(count_all), {"queue-counts", "get-queue"}),
    "keeps finished entries": ({}, {}, keep_the_done, {"departed-entries", "queue-order", "get-queue"}),
    "shows the previous queue": ({}, {}, stale, {"queue-order", "get-queue"}),
    "has odd tickets": ({}, {}, each_change(shuffled_tickets), {"ticket-numbers", "answered-entries"}),
    "has odd rooms": ({}, {}, each_change(other_room), {"answered-entries", "folding"}),
    "has a wrong kind": ({}, {}, each_change(wrong_kind), {"kinds-of-change"}),
    "forgets an entry": ({}, {}, each_change(no_entry_of_started), {"entries-of-changes", "folding"}),
    "shows two histories": ({}, {}, own_history, {"watchers-agree"}),
    "hoards": ({}, {}, hoard, {"slow-reader"}),
    "gives no token": ({}, {}, each(no_token), {"tokens-and-times", "present-token", "older-token", "cut-streams"}),
    "ignores tokens": (
        {WATCH: without("resume_token")},
        {},
        faithful,
        {"present-token", "older-token", "malformed-token", "foreign-token", "cut-streams", "tokens-and-times"},
    ),
    "names no queue": (
        {},
        {},
        each(lambda message: message.update.queue.ClearField("doctor_id")),
        {"queue-identity", "starts-empty"},
    ),
    "ignores keys": (
        dict.fromkeys(("BookAppointment", "CheckIn", "CallNext", "CallAgain"), without("idempotency_key")),
        {},
        faithful,
        {"replays"},
    ),
    "ignores validate_only": ({"BookAppointment": without("validate_only")}, {}, faithful, {"refusals"}),
    "answers odd revisions": (
        {},
        dict.fromkeys(("CheckIn", "RescheduleAppointment"), next_revision),
        faithful,
        {"one-revision-a-change", "kinds-of-change", "move-across-days", "move-within-a-day", "concurrent-changes"},
    ),
}


TIMED_FAULTS: dict[str, Tamper] = {
    "shortest-heartbeat": beat_fast,
    "blocked-reader": end_in_peace,
    "stream-age": end_silently,
}

REQUESTS: dict[str, Any] = {
    "WatchQueue": queue_pb2.WatchQueueRequest,
    "BookAppointment": appointment_pb2.BookAppointmentRequest,
    "CheckIn": queue_pb2.CheckInRequest,
    "CallNext": queue_pb2.CallNextRequest,
    "CallAgain": queue_pb2.CallAgainRequest,
}
ANSWERS: dict[str, Any] = {
    "CheckIn": queue_pb2.CheckInResponse,
    "RescheduleAppointment": appointment_pb2.RescheduleAppointmentResponse,
}


class Proxy(grpc.GenericRpcHandler):
    """A proxy that adds a fault to the traffic of a server."""

    def __init__(self, channel: grpc.aio.Channel, fault: Fault) -> None:
        self._channel = channel
        self._requests, self._answers, self._stream, _ = fault

    def service(self, call: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[bytes, bytes]":
        path = call.method
        name = path.rpartition("/")[2]
        unary: Any = self._channel.unary_unary(path)
        stream: Any = self._channel.unary_stream(path, response_deserializer=Message.FromString)

        def asked(raw: bytes) -> bytes:
            return spoilt(raw, REQUESTS, self._requests, name)

        async def one(raw: bytes, context: Any) -> bytes:
            try:
                answer: bytes = await unary(asked(raw))
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))
                raise
            return spoilt(answer, ANSWERS, self._answers, name)

        async def many(raw: bytes, context: Any) -> AsyncGenerator[bytes]:
            upstream = stream(asked(raw))
            request = queue_pb2.WatchQueueRequest.FromString(raw)
            try:
                async for message in self._stream(aiter(upstream), request):
                    yield message.SerializeToString()
            except grpc.aio.AioRpcError as error:
                await context.abort(error.code(), error.details(), tuple(error.trailing_metadata()))
            finally:
                upstream.cancel()

        if name == WATCH:
            return grpc.unary_stream_rpc_method_handler(many)
        return grpc.unary_unary_rpc_method_handler(one)


def spoilt(raw: bytes, kinds: dict[str, Any], faults: dict[str, Callable[[Any], object]], name: str) -> bytes:
    """The message, with its fault."""
    if name not in faults:
        return raw
    message = kinds[name].FromString(raw)
    faults[name](message)
    changed: bytes = message.SerializeToString()
    return changed


@asynccontextmanager
async def spoiling(front: Front, fault: Fault) -> AsyncGenerator[int]:
    """The port of a proxy with this fault to the test's server."""
    # Buffer as little of a stream as possible, even if the reader is slow.
    options = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{front.port}", options) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Proxy(channel, fault),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(None)


async def test_the_proxy_alone_spoils_nothing(front: Front) -> None:
    """A proxy without a fault conforms, so the failures below come from the faults."""
    async with spoiling(front, ({}, {}, faithful, set())) as port:
        found = await results(port)
    assert {name: result.detail for name, result in found.items() if result.verdict == "FAIL"} == {}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
async def test_a_fault_is_seen(front: Front, fault: Fault) -> None:
    """Each fault fails the checks of the rules that it breaks."""
    async with spoiling(front, fault) as port:
        found = await results(port, sorted(fault[3]), patience=1)
    assert verdicts(found, "FAIL") == fault[3], {name: result.detail for name, result in found.items()}


async def test_a_fault_of_what_is_timed_is_seen(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of timing fail their checks too."""

    async def judge(name: str) -> Result:
        async with spoiling(front, ({}, {}, TIMED_FAULTS[name], set())) as port:
            return (await results(port, [name], patience=11))[name]

    found = await timed(judge, monkeypatch)
    assert [result.verdict for result in found] == ["FAIL"] * 3


def test_every_check_can_fail() -> None:
    """There is a fault for each check, except for two that differ from others only by a longer wait."""
    seen = set(TIMED_FAULTS).union(*(fault[3] for fault in FAULTS.values()))
    assert set(CHECKS) - seen == IMPOSSIBLE | {"default-heartbeat", "longest-heartbeat"}


# The command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `frontdesk conformance`."""
    asked = [*FRONTDESK, "conformance", *arguments]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60, env=CLEAN)


async def test_the_command(front: Front) -> None:
    """The command reports each requested check, and its exit status says whether all of them passed."""
    target = ["--target", f"127.0.0.1:{front.port}"]
    only = ["--only", "chain", "--only", "lost-token"]
    done = await asyncio.to_thread(command, *target, *only)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"│ 2 +│ chain +│ PASS +│", done.stdout)
    assert re.search(r"│ 1 +│ lost-token +│ SKIPPED +│", done.stdout)
    assert "1 PASS, 0 FAIL, 1 SKIPPED" in done.stdout
    async with spoiling(front, FAULTS["counts every entry"]) as port:
        failed = await asyncio.to_thread(command, "--target", f"127.0.0.1:{port}", "--only", "queue-counts")
    assert (failed.returncode, failed.stderr) == (1, "")
    assert re.search(r"│ queue-counts +│ FAIL +│", failed.stdout)
    assert "waiting_count after CallNext: expected 4, seen 5" in " ".join(failed.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--target"),
        (["--target", "127.0.0.1:1", "--only", "nothing"], "--only"),
        (["--target", "127.0.0.1:1", "--patience", "0"], "--patience"),
        (["--target", "127.0.0.1:1", "--patience", "nan"], "--patience"),
    ],
    ids=["no target", "unknown check", "no patience", "no number"],
)
def test_wrong_usage(arguments: list[str], said: str) -> None:
    """A wrong option ends with status 2 and one line that names it."""
    done = command(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr


def test_the_command_finds_nobody(unused_tcp_port: int) -> None:
    """If the service cannot be reached, the command prints one line."""
    done = command("--target", f"127.0.0.1:{unused_tcp_port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"frontdesk: no frontdesk answers at 127.0.0.1:{unused_tcp_port}: connection refused\n"
