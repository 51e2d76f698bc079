"""Connections: keepalive pings, and the channel arguments that configure them in gRPC."""

import ast
import asyncio
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from frontdesk.client import CHANNEL_OPTIONS
from frontdesk.rpc import server
from frontdesk.settings import Settings
from tests.hostile.methods import path_of
from tests.hostile.test_watch import watching
from tests.hostile.wire import RawConnection, framed, serving
from tests.waiting import until

ROOT = Path(__file__).parent.parent
PROMISED_SECONDS = 10.0
"""Clients may ping this often, with calls and without."""


async def ping(wire: RawConnection) -> None:
    """Ping, and wait until the server answers or sends GOAWAY."""
    answered = wire.pongs
    await wire.ping()
    await until(lambda: wire.pongs > answered or wire.gone is not None)


@pytest.mark.parametrize("streams", [True, False], ids=["with a stream", "without calls"])
async def test_promised_pings(
    conninfo: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """A client that pings as often as allowed may stay; one that pings twice as often may not.

    In this test everything is twenty times as fast.
    """
    assert PROMISED_SECONDS / 2 < server.LEAST_PING_SECONDS < PROMISED_SECONDS
    scale = 20
    monkeypatch.setattr(server, "LEAST_PING_SECONDS", server.LEAST_PING_SECONDS / scale)
    async with serving(settings, conninfo) as (_, front):
        doctor = await front.doctor()
        async with RawConnection(front.port) as wire:
            if streams:
                await wire.send(await wire.open(path_of("WatchQueue")), framed(watching(doctor.id)), end=True)
            for _ in range(10):
                await ping(wire)
                await asyncio.sleep(PROMISED_SECONDS / scale)
            assert wire.gone is None
            while wire.gone is None:
                await ping(wire)
                await asyncio.sleep(PROMISED_SECONDS / 2 / scale)
            assert wire.gone == 11  # ENHANCE_YOUR_CALM


def known_arguments() -> set[str]:
    """The strings in gRPC's core that look like channel arguments: all of them begin with grpc."""
    core = find_spec("grpc._cython.cygrpc")
    assert core is not None
    assert core.origin is not None
    names = re.findall(rb"grpc\.[a-z0-9_.]+(?=\0)", Path(core.origin).read_bytes())
    return {name.decode() for name in names}


def our_arguments() -> dict[str, str]:
    """Each string in our code that names a channel argument, with a file that contains it."""
    found = {}
    for folder in ("src", "tests", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                # Arguments are pairs.
                first = node.elts[0] if isinstance(node, ast.Tuple) and len(node.elts) == 2 else None
                if isinstance(first, ast.Constant) and re.fullmatch(r"grpc\.[a-z0-9_.]+", str(first.value)):
                    found[str(first.value)] = str(file.relative_to(ROOT))
    return found


def test_channel_arguments_exist() -> None:
    """gRPC knows every channel argument that we pass; it would ignore an unknown one silently."""
    known, ours = known_arguments(), our_arguments()
    assert "grpc.keepalive_time_ms" in known
    assert "grpc.http2.min_recv_ping_interval_without_data_ms" not in known
    assert {name for name, _ in server.options(Settings(), reuse_port=True)} <= ours.keys()
    assert {name for name, _ in CHANNEL_OPTIONS} <= ours.keys()
    assert {name: file for name, file in ours.items() if name not in known} == {}


def test_our_own_options_keep_to_the_promise() -> None:
    """The client's options ping no more often than the server allows, and for as long as the connection exists."""
    options = dict(CHANNEL_OPTIONS)
    assert int(options["grpc.keepalive_time_ms"]) >= PROMISED_SECONDS * 1000
    assert options["grpc.keepalive_permit_without_calls"] == 1
    assert options["grpc.http2.max_pings_without_data"] == 0
