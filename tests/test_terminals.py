"""The commands' output where it is hard to write: few characters, no drawing, a full disk, a reader that has gone."""

import asyncio
import codecs
import os
import pty
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from types import MappingProxyType

import pytest

from tests.clinic import Front
from tests.test_proxies import pipe
from tests.waiting import until

NAME = "Łukasz Müller-Ångström · 山"
COMMANDS = {
    "watch": ["watch", "--doctor", "DR-Ä"],
    "demo": ["demo"],
    "conformance": ["conformance", "--only", "starts-empty"],
}
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("FRONTDESK_", "PYTHONIOENCODING"))}
each_command = pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)


@pytest.fixture
async def busy(front: Front) -> Front:
    """A service with a doctor and a patient whose names are not ASCII."""
    doctor = await front.doctor(code="DR-Ä", display_name="Dr. Ängström")
    await front.arrive(doctor.id, given_name=NAME)
    return front


START = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.argv[1] == "closed":
    os.close(1)
os.execv(sys.executable, [sys.executable, "-m", "frontdesk.cli", *sys.argv[2:]])
"""
"""Starts a command as a terminal does: Ctrl-C is ignored if the tests run in a shell's background.

Not by a function after the fork, since gRPC's threads run in this process.
"""


@asynccontextmanager
async def frontdesk(
    port: int, command: list[str], stdout: int | None, environment: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a command against the service; None for `stdout`: it has no standard output."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        START,
        "closed" if stdout is None else "open",
        *command,
        "--target",
        f"127.0.0.1:{port}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
        env={**CLEAN, **environment},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def outcome(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """The exit status, and the text on standard error."""
    assert process.stderr is not None
    async with asyncio.timeout(60):
        said = await process.stderr.read()
        return await process.wait(), said.decode()


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("ascii", "?ukasz Muller-Angstrom - ?"),
        ("iso-8859-1", "?ukasz Müller-Ångström · ?"),
        ("iso-8859-2", "Łukasz Müller-Angström - ?"),
        ("utf-8", NAME),
    ],
)
async def test_a_watch_in_few_characters(busy: Front, encoding: str, written: str) -> None:
    """A character that the output's encoding lacks is written as a similar one, and the watch goes on."""
    environment = {"PYTHONIOENCODING": encoding}
    async with frontdesk(busy.port, COMMANDS["watch"], asyncio.subprocess.PIPE, environment) as process:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode(encoding)
        assert line.endswith(f"| waiting: 1 {written}\n"), await outcome(process)
        [doctor] = busy.sql("select id::text from doctor where code = 'DR-Ä'")[0]
        await busy.call_next(doctor)
        assert f"called: 1 {written}" in (await process.stdout.readline()).decode(encoding)


@each_command
async def test_commands_in_ascii(busy: Front, command: list[str]) -> None:
    """No command fails for the characters of a terminal."""
    async with frontdesk(busy.port, command, asyncio.subprocess.PIPE, {"PYTHONIOENCODING": "ascii"}) as process:
        assert process.stdout is not None
        assert await process.stdout.readline()
        if "watch" in command:
            process.send_signal(signal.SIGINT)
        assert await outcome(process) == (0, "")


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize(
    ("environment", "drawn"),
    [
        ({"TERM": "xterm", "PYTHONIOENCODING": "ascii"}, r"\* live.*\| +1 \| \?ukasz Muller-Angstrom - \? +\| waiting"),
        ({"TERM": "xterm", "PYTHONIOENCODING": "utf-8"}, r"● live.*│ +1 │ Łukasz Müller-Ångström · 山 +│ waiting"),
        ({"TERM": "dumb", "PYTHONIOENCODING": "utf-8"}, r"^[^│]*revision 3: .* waiting: 1 Łukasz Müller-Ångström · 山"),
    ],
    ids=["ASCII", "UTF-8", "no drawing"],
)
async def test_terminals(busy: Front, environment: dict[str, str], drawn: str) -> None:
    """The board is drawn with the characters that a terminal has; one that cannot draw gets lines. Ctrl-C ends it."""
    with terminal() as (ours, theirs):
        async with frontdesk(busy.port, COMMANDS["watch"], theirs, environment) as process:
            screen = ""
            decoder = codecs.getincrementaldecoder("utf-8")()
            async with asyncio.timeout(60):
                while not re.search(drawn, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen), re.DOTALL):
                    screen += decoder.decode(await asyncio.to_thread(os.read, ours, 65_536))
            process.send_signal(signal.SIGINT)
            assert await outcome(process) == (0, "")


@each_command
async def test_a_reader_that_has_gone(busy: Front, command: list[str]) -> None:
    """A closed pipe ends a command quietly, and well."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        async with frontdesk(busy.port, command, writer) as process:
            assert await outcome(process) == (0, "")
    finally:
        os.close(writer)


@each_command
async def test_a_full_disk(busy: Front, command: list[str]) -> None:
    """Output that cannot be written is one line of error."""
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        async with frontdesk(busy.port, command, full) as process:
            assert await outcome(process) == (1, "frontdesk: No space left on device\n")
    finally:
        os.close(full)


@pytest.mark.parametrize("command", ["demo", "conformance"])
async def test_no_output_at_all(busy: Front, command: str) -> None:
    """Without any standard output a command does its work all the same."""
    async with frontdesk(busy.port, COMMANDS[command], None) as process:
        assert await outcome(process) == (0, "")


async def test_a_watch_without_output(busy: Front) -> None:
    """Ctrl-C ends a watch also if it has no standard output."""
    connected = asyncio.Event()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", busy.port)
        await asyncio.gather(pipe(reader, up_writer), pipe(up_reader, writer))

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    async with frontdesk(server.sockets[0].getsockname()[1], COMMANDS["watch"], None) as process:
        await until(connected.is_set)
        process.send_signal(signal.SIGINT)
        assert await outcome(process) == (0, "")
    server.close()
