"""What the harness breaks: a PostgreSQL of its own, a proxy before it, and the service behind that.

`python -m tests.history.world DIR` is the keeper of the PostgreSQL: it starts it again at each line of standard input,
and ends it with that. A process of its own, because the server ends with the thread that started it.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from frontdesk.db.embedded import EmbeddedPostgres
from frontdesk.db.migrate import migrate
from tests.test_server import Service

_ROOT = Path(__file__).parents[2]
_TEMPLATE = "frontdesk_template"
_SOCKET = ".s.PGSQL.5432"
_names = itertools.count(1)


class Cluster:
    """An embedded PostgreSQL whose postmaster may be killed."""

    def __init__(self, directory: Path) -> None:
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

    def _heard(self) -> tuple[int, str]:
        assert self._keeper.stdout is not None
        pid, _, conninfo = self._keeper.stdout.readline().strip().partition(" ")
        return int(pid), conninfo

    def database(self, mutate: Callable[[psycopg.Connection], None] = lambda admin: None) -> str:
        """The conninfo of a fresh database of this release, changed by `mutate`."""
        name = f"history_{next(_names)}"
        with psycopg.connect(self.conninfo, autocommit=True) as admin:
            admin.execute(f"create database {name} template {_TEMPLATE}".encode())
        conninfo = make_conninfo(self.conninfo, dbname=name)
        with psycopg.connect(conninfo, autocommit=True) as admin:
            mutate(admin)
        return conninfo

    def kill(self) -> None:
        """End the postmaster with SIGKILL, and start PostgreSQL again; returns when it accepts connections. Blocks."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._keeper.stdin is not None
        self._keeper.stdin.write("again\n")
        self._keeper.stdin.flush()
        self.pid, _ = self._heard()

    def close(self) -> None:
        """End the server and its keeper."""
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
        """Seconds that each piece takes, either way."""
        self.refusing = False
        """Whether new connections are closed at once."""
        self.deaf = False
        """Whether notifications are dropped."""
        self.asks = asyncio.Event()
        """Set: what the service says goes through; else it waits."""
        self.answers = asyncio.Event()
        """Set: what PostgreSQL says goes through; else it waits."""
        self.dropped = 0
        self._links: set[asyncio.StreamWriter] = set()
        self.heal()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def close(self) -> None:
        self._server.close()
        self.reset()

    def heal(self) -> None:
        """Let everything through."""
        self.delay, self.refusing, self.deaf = 0.0, False, False
        self.asks.set()
        self.answers.set()

    def reset(self) -> None:
        """Cut every connection; what waits in it is lost."""
        for writer in self._links:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = [writer]
        self._links.add(writer)
        tasks: list[asyncio.Task[None]] = []
        try:
            if self.refusing:
                return
            # The first packet says who connects: only a connection that listens is taken apart.
            hello = await reader.read(65536)
            back, forth = await asyncio.open_unix_connection(self._upstream)
            pair.append(forth)
            self._links.add(forth)
            forth.write(hello)
            answer = self._messages if b"frontdesk listen" in hello else self._bytes
            tasks = [
                asyncio.create_task(self._bytes(reader, forth, self.asks)),
                asyncio.create_task(answer(back, writer, self.answers)),
            ]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in pair:
                self._links.discard(one)
                one.close()

    async def _bytes(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                await self._pass(piece, writer, gate)

    async def _messages(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
                if self.deaf and head[:1] == b"A":
                    self.dropped += 1
                else:
                    await self._pass(head + body, writer, gate)

    async def _pass(self, piece: bytes, writer: asyncio.StreamWriter, gate: asyncio.Event) -> None:
        if self.delay:
            await asyncio.sleep(self.delay)
        if not gate.is_set():
            await gate.wait()
        writer.write(piece)
        await writer.drain()


class Served(Service):
    """`frontdesk serve` with two workers; with `changed`, workers that lack a safety (see `launcher`)."""

    def __init__(self, conninfo: str, directory: Path, changed: str = "") -> None:
        self.log = directory / "log"
        module = "tests.history.launcher" if changed else "frontdesk.cli"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "serve", "--listen", "127.0.0.1:0", "--workers", "2"],
                cwd=_ROOT,
                env={
                    **os.environ,
                    "FRONTDESK_DATABASE_URL": conninfo,
                    "FRONTDESK_LOG_LEVEL": "warning",
                    "HISTORY_CHANGED": changed,
                },
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if not said.startswith("frontdesk serves on "):
            self.end()
            raise RuntimeError(f"the service did not start: {said}{self.log.read_text()[-2000:]}")
        self.port = int(said.rpartition(":")[2])

    def end(self) -> None:
        """Kill whatever still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _keep(directory: Path) -> None:
    """The keeper's life."""
    with EmbeddedPostgres(directory) as postgres:
        print(postgres.pid, postgres.conninfo, flush=True)
        for _ in sys.stdin:
            # It was killed; wait until the kernel has said so.
            while postgres.alive:
                time.sleep(0.01)
            postgres.start()
            print(postgres.pid, postgres.conninfo, flush=True)


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
