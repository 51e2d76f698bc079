"""The things that the harness breaks: its own PostgreSQL, a proxy in front of it, and the service behind the proxy.

`python -m tests.history.world DIR` is the keeper of the PostgreSQL: it restarts it for each line of standard input, and
stops it at the end of input. It is a separate process, because the server ends with the thread that started it.
"""

import asyncio
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import cast

import psycopg
from psycopg.conninfo import make_conninfo

from frontdesk.db.migrate import SQL_FILES, migrate
from frontdesk.process.postgres import EmbeddedPostgres
from tests.servers import Service

_ROOT = Path(__file__).parents[2]
_TEMPLATE = "frontdesk_template"
_SOCKET = ".s.PGSQL.5432"
_names = itertools.count(1)

HORIZON_DAYS = 3
"""Dates for which slots are generated, from today on."""

_SHORTER = {
    "hold_place": ("v_now + r.ttl,", "v_now + r.ttl / 100,"),
    "undo": ("interval '15 minutes'", "interval '3 seconds'"),
}
"""Holds last a hundredth of the time that they are asked for, and verbs can be undone for three seconds only, so that
both run out within a run.
"""


def function(name: str) -> str:
    """The text of an SQL function in src/, with the times that the harness shortens."""
    text = "\n".join(files("frontdesk.db").joinpath("sql", file).read_text() for file in SQL_FILES)
    found = re.search(rf"^create or replace function {name}\(.*?^\$\$;", text, re.DOTALL | re.MULTILINE)
    assert found is not None, name
    old, new = _SHORTER.get(name, ("", ""))
    assert old in found.group()
    return found.group().replace(old, new) if old else found.group()


class Cluster:
    """An embedded PostgreSQL whose postmaster may be killed."""

    def __init__(self, directory: Path) -> None:
        self._deadlocks = 0
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.history.world", str(directory)],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid, self.conninfo = self._heard()
        with psycopg.connect(self.conninfo, autocommit=True) as admin:
            admin.execute(f"create database {_TEMPLATE}")
        migrate(make_conninfo(self.conninfo, dbname=_TEMPLATE))
        with psycopg.connect(make_conninfo(self.conninfo, dbname=_TEMPLATE)) as admin:
            for name in _SHORTER:
                admin.execute(function(name).encode())

    def _heard(self) -> tuple[int, str]:
        assert self._keeper.stdout is not None
        pid, _, conninfo = self._keeper.stdout.readline().strip().partition(" ")
        return int(pid), conninfo

    def database(self, mutate: Callable[[psycopg.Connection], None] = lambda admin: None) -> str:
        """The conninfo of a new database of this release, changed by `mutate`."""
        name = f"history_{next(_names)}"
        with psycopg.connect(self.conninfo, autocommit=True) as admin:
            admin.execute(f"create database {name} template {_TEMPLATE}".encode())
        conninfo = make_conninfo(self.conninfo, dbname=name)
        with psycopg.connect(conninfo, autocommit=True) as admin:
            mutate(admin)
        return conninfo

    def kill(self) -> None:
        """Kill the postmaster with SIGKILL, and restart PostgreSQL. Blocks until it accepts connections."""
        with suppress(psycopg.OperationalError):
            self._deadlocks = self.deadlocks()
        os.kill(self.pid, signal.SIGKILL)
        assert self._keeper.stdin is not None
        self._keeper.stdin.write("again\n")
        self._keeper.stdin.flush()
        self.pid, _ = self._heard()

    def deadlocks(self) -> int:
        """The deadlocks broken since PostgreSQL first started, without those of the last moments before a kill."""
        with psycopg.connect(self.conninfo) as admin:
            row = admin.execute("select sum(deadlocks)::int from pg_stat_database").fetchone()
        # A crash resets the statistics.
        return self._deadlocks + (row[0] if row else 0)

    def close(self) -> None:
        """Stop the server and its keeper."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(60)
        assert self._keeper.stdout is not None
        self._keeper.stdout.close()


class Proxy:
    """The network between the service and PostgreSQL: a Unix socket whose connections can be disturbed."""

    def __init__(self, conninfo: str, directory: Path) -> None:
        parts = psycopg.conninfo.conninfo_to_dict(conninfo)
        self._upstream = f"{parts['host']}/{_SOCKET}"
        self._path = str(directory / _SOCKET)
        self.conninfo = make_conninfo(conninfo, host=str(directory), sslmode="disable", gssencmode="disable")
        self.delay = 0.0
        """Seconds of delay of each piece of data, in both directions."""
        self.refusing = False
        """Whether new connections are closed at once."""
        self.deaf = False
        """Whether notifications are dropped."""
        self.asks = asyncio.Event()
        """While set, data from the service passes; otherwise it waits."""
        self.answers = asyncio.Event()
        """While set, data from PostgreSQL passes; otherwise it waits."""
        self.dropped = 0
        self.ends: set[_End] = set()
        self.connecting: set[asyncio.Task[None]] = set()
        self.heal()

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _End(self, self.asks), self._path)

    async def close(self) -> None:
        self._server.close()
        self.reset()
        # uvloop closes a transport in a later iteration of the loop.
        while self.ends:  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def heal(self) -> None:
        """Let everything through."""
        self.delay, self.refusing, self.deaf = 0.0, False, False
        self.asks.set()
        self.answers.set()

    def reset(self) -> None:
        """Cut every connection; data that waits in it is lost."""
        for end in self.ends:
            end.transport.abort()

    async def upstream(self, gate: asyncio.Event) -> "_End":
        """A connection to PostgreSQL. Raises OSError."""
        loop = asyncio.get_running_loop()
        return (await loop.create_unix_connection(lambda: _End(self, gate), self._upstream))[1]


class _End(asyncio.Protocol):
    """One end of a connection through the proxy. It forwards what it receives, at once if nothing is disturbed."""

    transport: asyncio.Transport

    def __init__(self, proxy: Proxy, gate: asyncio.Event) -> None:
        self._proxy = proxy
        self._gate = gate
        self._other: _End | None = None
        self._late: deque[bytes | None] = deque()
        """Data that waits to be forwarded; None is its end."""
        self._passing: asyncio.Task[None] | None = None
        self._framed = False
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have their own classes.
        self.transport = cast(asyncio.Transport, transport)
        self._proxy.ends.add(self)
        if self._proxy.refusing and self._gate is self._proxy.asks:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            # The first packet names the client: only a connection that listens is parsed.
            self._late.append(data)
            if self._passing is None:
                self._passing = asyncio.create_task(self._connect(b"frontdesk listen" in data))
                self._proxy.connecting.add(self._passing)
                self._passing.add_done_callback(self._proxy.connecting.discard)
            return
        if self._framed:
            data = self._heard(data)
        if self._late or self._proxy.delay or not self._gate.is_set():
            self._pass_later(data)
        elif data:
            self._other.transport.write(data)

    async def _connect(self, listens: bool) -> None:
        try:
            other = await self._proxy.upstream(self._proxy.answers)
        except OSError:
            self.transport.abort()
            return
        other._other, other._framed = self, listens
        if self.transport.is_closing():
            other.transport.abort()
            return
        self._other = other
        await self._pass()

    def _heard(self, data: bytes) -> bytes:
        """Complete messages of PostgreSQL, without notifications while the proxy is deaf."""
        data, through, at = self._rest + data, [], 0
        while len(data) >= at + 5 and len(data) >= (after := at + 1 + int.from_bytes(data[at + 1 : at + 5])):
            if self._proxy.deaf and data[at : at + 1] == b"A":
                self._proxy.dropped += 1
            else:
                through.append(data[at:after])
            at = after
        self._rest = data[at:]
        return b"".join(through)

    def _pass_later(self, data: bytes | None) -> None:
        self._late.append(data)
        if self._passing is None or self._passing.done():
            self._passing = asyncio.create_task(self._pass())

    async def _pass(self) -> None:
        while self._late:
            if self._proxy.delay:
                await asyncio.sleep(self._proxy.delay)
            await self._gate.wait()
            data = self._late.popleft()
            if self._other is None or self._other.transport.is_closing():
                return
            if data is None:
                self._other.transport.close()
            else:
                self._other.transport.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._proxy.ends.discard(self)
        if self._other is None:
            return
        if error is None and self._late:
            self._pass_later(None)
        else:
            self._other.transport.close()

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None and not self._other.transport.is_closing():
            self._other.transport.resume_reading()


class Served(Service):
    """`frontdesk serve` with two workers; with `changed`, workers that lack a safeguard (see `launcher`)."""

    def __init__(self, conninfo: str, directory: Path, changed: str = "", access: str = "open") -> None:
        self.log = directory / "log"
        self.log.write_text("")
        self.port = _free_port()
        self._conninfo = conninfo
        self._changed = changed
        self._access = access
        self._launch()

    def start_again(self) -> None:
        """Start it again at the same address; returns when both workers serve."""
        self.end()
        self._launch()

    def _launch(self) -> None:
        module = "tests.history.launcher" if self._changed else "frontdesk.cli"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "serve", "--workers", "2"],
                cwd=_ROOT,
                env={
                    **os.environ,
                    "FRONTDESK_DATABASE_URL": self._conninfo,
                    "FRONTDESK_LISTEN": f"127.0.0.1:{self.port}",
                    "FRONTDESK_LOG_LEVEL": "warning",
                    "FRONTDESK_ACCESS": self._access,
                    "FRONTDESK_SLOT_HORIZON_DAYS": str(HORIZON_DAYS),
                    # So that a run has refreshes.
                    "FRONTDESK_ACCESS_TOKEN_SECONDS": "60",
                    # All clients are at one address, and most watchers have one key.
                    "FRONTDESK_MAX_WATCHERS_PER_CALLER": "20000",
                    "FRONTDESK_ADDRESS_REQUESTS_PER_MINUTE": "100000",
                    "FRONTDESK_USER_REQUESTS_PER_MINUTE": "100000",
                    "HISTORY_CHANGED": self._changed,
                },
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if " serves on " not in said:
            self.end()
            raise RuntimeError(f"the service did not start: {said}{self.log.read_text()[-2000:]}")
        self.port = int(said.rpartition(":")[2])

    def end(self) -> None:
        """Stop it, if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._hang_up()

    def _hang_up(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()


def _free_port() -> int:
    """A port that no outgoing connection takes while the service restarts."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(max(lowest - 12_000, 1024), lowest)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _keep(directory: Path) -> None:
    """Run the keeper."""
    with EmbeddedPostgres(directory) as postgres:
        print(postgres.pid, postgres.conninfo, flush=True)
        for _ in sys.stdin:
            # It was killed; wait until the kernel has ended it.
            while postgres.alive:
                time.sleep(0.01)
            postgres.start()
            print(postgres.pid, postgres.conninfo, flush=True)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
