"""With a proxy in the environment, clients call this machine directly, and every other one through the proxy."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress

import pytest

from clinic.frontdesk.v1 import doctor_pb2
from frontdesk.client import FrontdeskClient, FrontdeskError, SyncFrontdeskClient
from frontdesk.client.channel import is_loopback
from frontdesk.tools.conformance import conform
from tests.clinic import Front

LIST = doctor_pb2.ListDoctorsRequest()
AWAY = "frontdesk.test:50051"
"""A name that only the proxy can resolve."""


class Tunnels:
    """An HTTP proxy that connects every CONNECT to the test's server."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append((await reader.readuntil(b"\r\n\r\n")).split()[1].decode())
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forward until either side ends."""
    with suppress(ConnectionError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@pytest.fixture
async def proxy(front: Front, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Tunnels]:
    """Every variable that gRPC reads names this proxy, and none makes exceptions."""
    tunnels = Tunnels(front.port)
    server = await asyncio.start_server(tunnels.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("no_grpc_proxy", "no_proxy", *(name for name in os.environ if name.startswith("FRONTDESK_"))):
        monkeypatch.delenv(name, raising=False)
    yield tunnels
    server.close()


async def frontdesk(*arguments: str) -> tuple[int | None, str]:
    """Run the command to its end; return its exit status and output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "frontdesk.cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["health"], (0, "SERVING")),
        (["demo"], (0, "DR-SILVA")),
        (["watch", "--doctor", "D-NOBODY"], (1, "there is no doctor")),
        (["conformance", "--only", "starts-empty"], (0, "1 PASS")),
    ],
    ids=["health", "demo", "watch", "conformance"],
)
@pytest.mark.parametrize("target", ["127.0.0.1:{}", AWAY], ids=["loopback", "elsewhere"])
async def test_commands(
    proxy: Tunnels, front: Front, command: list[str], expected: tuple[int, str], target: str
) -> None:
    """Each command calls a service on this machine directly, and another one through the proxy."""
    status, said = await frontdesk(*command, "--target", target.format(front.port))
    assert status == expected[0], said
    assert expected[1] in said
    assert set(proxy.asked) == ({AWAY} if target == AWAY else set())


@pytest.mark.parametrize("target", ["127.0.0.1:{}", "localhost:{}", "ipv4:127.0.0.1:{}", "dns:///localhost:{}"])
async def test_clients_past_the_proxy(proxy: Tunnels, front: Front, target: str) -> None:
    """Both clients call loopback directly, in every notation."""
    target = target.format(front.port)
    async with FrontdeskClient(target) as desk:
        await desk.doctors.ListDoctors(LIST)
    with SyncFrontdeskClient(target) as blocking:
        await asyncio.to_thread(blocking.doctors.ListDoctors, LIST)
    assert proxy.asked == []


async def test_clients_through_the_proxy(proxy: Tunnels) -> None:
    """Both clients and the conformance suite call a service elsewhere through the proxy."""
    async with FrontdeskClient(AWAY) as desk:
        await desk.doctors.ListDoctors(LIST)
    with SyncFrontdeskClient(AWAY) as blocking:
        await asyncio.to_thread(blocking.doctors.ListDoctors, LIST)
    async with aclosing(conform(AWAY, only=["starts-empty"])) as results:
        assert [result.verdict async for result in results] == ["PASS"]
    assert set(proxy.asked) == {AWAY}


async def test_a_proxy_that_is_down(monkeypatch: pytest.MonkeyPatch, proxy: Tunnels, unused_tcp_port: int) -> None:
    """No service elsewhere is called directly if the environment demands the proxy."""
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{unused_tcp_port}")
    async with FrontdeskClient(AWAY) as desk:
        with pytest.raises(FrontdeskError) as caught:
            await desk.doctors.ListDoctors(LIST, timeout=5)
    assert caught.value.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:50051",
        "127.0.0.1",
        "127.8.8.8:1",
        "127.1:50051",
        "0.0.0.0:50051",
        "localhost:50051",
        "LocalHost.:50051",
        "desk.localhost:50051",
        "ip6-localhost:50051",
        "[::1]:50051",
        "[::1%lo]:50051",
        "[::]:50051",
        "::1",
        "[::ffff:127.0.0.1]:50051",
        "dns:localhost:50051",
        "dns:///127.0.0.1:50051",
        "dns://8.8.8.8/localhost:50051",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:50051",
        "ipv6:%5B::1%5D:50051",
        "ipv6:///[::1]:50051",
        "unix:/run/frontdesk.sock",
        "unix:frontdesk.sock",
        "unix:///run/frontdesk.sock",
        "unix-abstract:frontdesk",
    ],
)
def test_what_is_loopback(target: str) -> None:
    """Every notation of a loopback address is recognised."""
    assert is_loopback(target)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "10.0.0.1:50051",
        "frontdesk.example:50051",
        "localhost.example:50051",
        "notlocalhost:50051",
        "127.0.0.1.example:50051",
        "[2001:db8::1]:50051",
        "dns:///frontdesk.example:50051",
        "dns://127.0.0.1/frontdesk.example:50051",
        "ipv4:127.0.0.1:1,10.0.0.1:1",
        "xds:///localhost",
        "[::1",
    ],
)
def test_what_is_not_loopback(target: str) -> None:
    """A name that only looks like one, or a list with another address, is not."""
    assert not is_loopback(target)
