"""Measure what one caller's flood, and a thousand logins at once, do to the calls of others."""

import asyncio
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import grpc
import psycopg
import uvloop
from google.protobuf.message import Message

from benchmarks import people
from benchmarks.access import get_appointment, key_of, tokens_of
from benchmarks.calls import Kind, Spent, percentiles, spend
from benchmarks.load import channel, reason_of, unary_client
from benchmarks.people import TO_MOVE
from benchmarks.stage import Child, ServerProcess, Stage
from clinic.frontdesk.v1 import auth_pb2, auth_pb2_grpc

RATE = 100.0
"""Calls a second of the others, each at its own time."""
LOGINS = 1_000
ADDRESSES = 50
MOST_RATIO = 2.0
"""Beside a neighbour, of the p99 in quiet."""
_FLOOD = 64
"""Calls that the flood has in flight."""
_APPOINTMENTS = 1_000
_NICE = 10
"""Neighbours would have machines of their own, so their processes come after all others."""


def measure(stage: Stage, *, seconds: float, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Run everything of this part: in turns the others alone, beside the flood, alone, and beside the logins."""
    zone = people.noon_zone()
    day = people.today(zone)
    progress("prepare a database")
    conninfo = stage.database("neighbours")
    with psycopg.connect(conninfo) as connection:
        people.found(connection, zone, 100, _APPOINTMENTS)
        people.booked(connection, TO_MOVE, _APPOINTMENTS, 100, day + timedelta(days=10))
        tokens, key = tokens_of(connection), key_of(connection, requests_per_minute=100)
    people.settle(conninfo)
    quiet, beside = Spent(), {"flood": Spent(), "logins": Spent()}
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in beside}
    with (
        stage.serve(conninfo, log_level="info", access="required", trusted_proxies="127.0.0.1") as server,
        Child(unary_client) as others,
        Child(_flood) as flood,
        Child(_logins) as logins,
    ):
        kind = _kind(server, tokens)
        spend(stage, [others], kind, int(RATE), 16)  # to warm up

        def load() -> Spent:
            return spend(stage, [others], kind, int(RATE * seconds), 0, connections=4, rate=RATE)

        for turn in range(rounds):
            for name, child, command in (
                ("flood", flood, (server.port, key, seconds)),
                ("logins", logins, (server.port, turn, seconds)),
            ):
                progress(f"beside the {name}, round {turn + 1} of {rounds}")
                quiet.add(load())
                child.ask(*command)
                beside[name].add(load())
                outcomes[name] += child.receive()
    rows = []
    quiet_ms = [1000 * latency for latency in percentiles(quiet.latencies, 50, 99)]
    for name, spent in beside.items():
        p50, p99 = (1000 * latency for latency in percentiles(spent.latencies, 50, 99))
        rows.append({
            "name": name, "quiet_ms": quiet_ms, "beside_ms": [p50, p99], "ratio": p99 / quiet_ms[1],
            "outcomes": outcomes[name], "refused": quiet.refused + spent.refused,
        })  # fmt: skip
    return {"neighbours": rows}


def _kind(server: ServerProcess, tokens: tuple[str, ...]) -> Kind:
    def request(n: int) -> Message:
        return get_appointment(n % _APPOINTMENTS)

    return Kind("GetAppointment", server, server.port, "/clinic.frontdesk.v1.AppointmentService/GetAppointment",
                request, credentials=tokens)  # fmt: skip


def _flood(pipe: Connection) -> None:
    """Serve commands `(port, API key, seconds)`: say "ready" and call for so long; then the outcomes, counted."""
    os.nice(_NICE)
    uvloop.run(_serve(pipe, _call_without_end))


def _logins(pipe: Connection) -> None:
    """Serve commands `(port, turn, seconds)`: say "ready" and log in; then the outcomes, counted."""
    os.nice(_NICE)
    uvloop.run(_serve(pipe, _log_in_at_once))


async def _serve(pipe: Connection, work: Callable[..., Any]) -> None:
    while True:
        port, *command = await asyncio.to_thread(pipe.recv)
        async with channel(port) as way:
            await way.channel_ready()
            pipe.send("ready")
            pipe.send(await work(way, *command))


async def _call_without_end(way: grpc.aio.Channel, key: str, seconds: float) -> Counter[str]:
    method: Any = way.unary_unary("/clinic.frontdesk.v1.AppointmentService/GetAppointment")
    request = get_appointment(0).SerializeToString()
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + seconds

    async def one() -> None:
        while time.monotonic() < end:
            outcomes[await _outcome(method(request, metadata=(("x-api-key", key),)))] += 1

    await asyncio.gather(*(one() for _ in range(_FLOOD)))
    return outcomes


async def _log_in_at_once(way: grpc.aio.Channel, turn: int, seconds: float) -> Counter[str]:
    stub: Any = auth_pb2_grpc.AuthServiceStub(way)

    def one(n: int) -> Any:
        request = auth_pb2.LoginRequest(email=f"nobody-{turn}-{n}@example.com", password=secrets.token_hex(8))
        address = (("x-forwarded-for", f"10.0.{turn}.{n % ADDRESSES}"),)
        return _outcome(stub.Login(request, metadata=address, timeout=seconds))

    return Counter(await asyncio.gather(*map(one, range(LOGINS))))


async def _outcome(call: Any) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return reason_of(error)
    return "OK"
