"""Servers that tests run as processes: PostgreSQL with a port and a password, PgBouncer, `frontdesk serve`.

`python -m tests.servers DIR SIGNAL COMMAND …` is the keeper of one program: it runs the program in DIR, as the owner of
DIR, until its own standard input ends. It is a separate process, because a test's process has gRPC's threads, and
forking such a process may crash.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from frontdesk.process.postgres import NAME
from frontdesk.process.postgres_programs import account_for, installation, start_program
from tests.waiting import wait_for

HERE = "/proc/self/cwd"
"""The working directory of a started server, which it can use whatever the directories above allow."""
_PASSWORD = "not a secret"


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(conninfo: str) -> bool:
    """Whether a database answers there."""
    try:
        with psycopg.connect(conninfo, connect_timeout=5, prepare_threshold=None) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


@contextlib.contextmanager
def directories() -> Iterator[Callable[[str], Path]]:
    """Creates directories for the account that runs PostgreSQL and PgBouncer, because neither runs as root."""
    top = Path(tempfile.mkdtemp(prefix="frontdesk-"))
    account = account_for(top / "postgres")

    def own(directory: Path) -> Path:
        if account is not None:
            os.chown(directory, account.uid, account.gid)
        return directory

    def make(name: str) -> Path:
        made = top / name
        made.mkdir(0o700)
        return own(made)

    own(top)
    try:
        yield make
    finally:
        shutil.rmtree(top)


class _Program:
    """Programs in one directory, run as its owner. They end with this process."""

    END = signal.SIGINT
    """The signal that ends the program at once, but cleanly."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._account = account_for(directory.parent / "postgres")
        self._keeper: subprocess.Popen[str] | None = None
        self.pid = 0

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o600)
        if self._account is not None:
            os.chown(path, self._account.uid, self._account.gid)

    def _start(self, *command: str | Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tests.servers", self._directory, str(int(self.END)), *command],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _run(self, program: str, *arguments: str) -> None:
        with self._start(installation() / "bin" / program, *arguments) as keeper:
            assert keeper.stdout is not None
            keeper.stdout.read()
            status = keeper.wait(60)
        assert status == 0, (program, status, self._directory.with_suffix(".log").read_text())

    def _serve(self, conninfo: str, *command: str | Path) -> None:
        self._keeper = self._start(*command)
        assert self._keeper.stdout is not None
        self.pid = int(self._keeper.stdout.readline())
        wait_for(lambda: answers(conninfo), 30)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """Stop it as an operator would. Harmless if it has ended."""
        if self._keeper is not None:
            self._keeper.communicate(timeout=60)
            self._keeper = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


def _keep(directory: Path, end: signal.Signals, command: list[str | Path]) -> int:
    account = account_for(directory.parent / "postgres")
    log = os.open(directory.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    process = start_program(command, directory, account, installation(), end, log)
    print(process.pid, flush=True)

    def end_with_input() -> None:
        sys.stdin.read()
        process.send_signal(end)

    threading.Thread(target=end_with_input, daemon=True).start()
    return process.wait()


class Cluster(_Program):
    """A PostgreSQL cluster with the embedded one's binaries, on a port of this machine."""

    def __init__(self, directory: Path, *, copy_of: "Cluster | None" = None) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.conninfo = make_conninfo(
            host="127.0.0.1", port=self.port, user=NAME, password=_PASSWORD, dbname="postgres", sslmode="disable"
        )
        if copy_of is None:
            password = self._directory.with_suffix(".password")
            self._write(password, _PASSWORD)
            self._run(
                *("initdb", "-D", HERE, f"--username={NAME}", f"--pwfile=../{password.name}", "--encoding=UTF8"),
                *("--locale=C", "--auth-local=reject", "--auth-host=scram-sha-256", "--no-sync"),
            )
        else:
            # A standby that follows this primary, under its own name.
            source = make_conninfo(copy_of.conninfo, application_name=directory.name)
            self._run("pg_basebackup", "-D", HERE, "-R", "-X", "stream", "-c", "fast", "--no-sync", "-d", source)

    def start(self, **options: str) -> None:
        """Start it with these settings, and wait until it answers."""
        settings = {"listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": "", **options}
        # Tests kill processes, never the machine, so written data survives without fsync.
        settings.setdefault("fsync", "off")
        command: list[str | Path] = [installation() / "bin" / "postgres", "-D", HERE]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._serve(self.conninfo, *command)

    def sql(self, query: str, dbname: str = "postgres") -> list[tuple[object, ...]]:
        """The rows of a query."""
        with psycopg.connect(self.conninfo, dbname=dbname, autocommit=True) as connection:
            cursor = connection.execute(query.encode())
            return cursor.fetchall() if cursor.description else []


class PgBouncer(_Program):
    """PgBouncer in transaction mode in front of a cluster, with few sessions for many clients."""

    END = signal.SIGTERM
    PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")

    def __init__(self, directory: Path, cluster: Cluster, *, sessions: int) -> None:
        super().__init__(directory)
        self.port = free_port()
        self.conninfo = make_conninfo(cluster.conninfo, port=self.port)
        parts = conninfo_to_dict(cluster.conninfo)
        self._write(directory / "users.txt", f'"{parts["user"]}" "{_PASSWORD}"\n')
        self._write(
            directory / "pgbouncer.ini",
            f"""[databases]
* = host=127.0.0.1 port={cluster.port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {self.port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {HERE}/users.txt
admin_users = {parts["user"]}
pool_mode = transaction
default_pool_size = {sessions}
max_client_conn = 200
server_login_retry = 1
query_wait_timeout = 3
""",
        )

    def start(self) -> None:
        """Start it, and wait until databases answer through it."""
        assert self.PROGRAM is not None
        self._serve(self.conninfo, self.PROGRAM, f"{HERE}/pgbouncer.ini")


class Service:
    """`frontdesk serve` from this checkout or another one."""

    def __init__(
        self, log: Path, database_url: str, *, workers: int = 1, source: Path | None = None, **settings: str
    ) -> None:
        """`source` has the package `frontdesk` to run; `settings` are FRONTDESK_* in lower case."""
        settings.setdefault("listen", "127.0.0.1:0")
        environment = {f"FRONTDESK_{name.upper()}": value for name, value in settings.items()}
        if source is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
        self.environment: Mapping[str, str] = {**os.environ, **environment, "FRONTDESK_DATABASE_URL": database_url}
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "frontdesk.cli", "serve", "--workers", str(workers)],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert "serves on" in said, log.read_text()
        self.port = 0 if "unix:" in said else int(said.rpartition(":")[2])

    def workers(self, noun: str = "worker") -> list[int]:
        """The process ids of the workers, or of `background`."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    if int(stat[1]) == self.process.pid and (entry / "comm").read_text() == f"fd-{noun}\n":
                        found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """Drain and stop it. Its exit status must be 0."""
        self.process.terminate()
        assert self.process.wait(30) == 0, self.log.read_text()[-2000:]
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


if __name__ == "__main__":
    sys.exit(_keep(Path(sys.argv[1]), signal.Signals(int(sys.argv[2])), list(sys.argv[3:])))
