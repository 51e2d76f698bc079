"""The commands in broken surroundings: each ends with one line that says what is wrong, and never with a traceback."""

import contextlib
import json
import os
import pwd
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from psycopg.conninfo import conninfo_to_dict

from tests.servers import Service, free_port
from tests.waiting import wait_for

FRONTDESK = [sys.executable, "-m", "frontdesk.cli"]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("FRONTDESK_", "PG"))}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def run(arguments: list[str], *, shell: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; `shell` is put before it, or after it if it redirects."""
    before, after = ("", shell) if shell[:1] in ("<", ">", "2") else (shell, "")
    script = f'{before}\nexec "$@" {after}'
    return subprocess.run(
        ["bash", "-c", script, "bash", *FRONTDESK, *arguments],
        env={**CLEAN, **environment},
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=120,
    )


def line(done: "subprocess.CompletedProcess[str]", status: int = 1) -> str:
    """The one line of a command that failed; beside it there may be lines of the log."""
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    lines = [text for text in done.stderr.splitlines() if not text.startswith("{")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("frontdesk: ")
    return lines[0]


FORKS = """
import atexit, json, os, sys, tempfile
import rich.traceback
import frontdesk.process.supervisor, frontdesk.db.migrate, frontdesk.client, frontdesk.tools.demo
from frontdesk.cli import run
answers = []
for arguments, environment in json.load(sys.stdin):
    files = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(2)]
    pid = os.fork()
    if pid == 0:
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        os.environ.update(environment)
        try:
            status = run(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # The last lines of the log are written at the end of an interpreter, which this is.
            atexit._run_exitfuncs()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    for file in files:
        file.seek(0)
    answers.append([os.waitstatus_to_exitcode(status), *(file.read() for file in files)])
json.dump(answers, sys.stdout)
"""
Case = tuple[list[str], dict[str, str]]


def run_all(cases: list[Case]) -> list["subprocess.CompletedProcess[str]"]:
    """Run many commands, each with its environment, in forks of one interpreter: they start faster."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(cases),
        env=CLEAN,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return [
        subprocess.CompletedProcess(*answer)
        for answer in (([*case], *found) for case, found in zip(cases, json.loads(done.stdout), strict=True))
    ]


def serve(*arguments: str) -> list[str]:
    return ["serve", "--listen", "127.0.0.1:0", *arguments]


# --- Variables of libpq ---

LIBPQ = {
    "PGHOSTADDR": "192.0.2.1",
    "PGHOST": "nowhere.invalid",
    "PGPORT": "1",
    "PGUSER": "nobody-here",
    "PGDATABASE": "nothing",
    "PGPASSWORD": "wrong",
    "PGPASSFILE": "/nonexistent",
    "PGSERVICE": "nothing",
    "PGSERVICEFILE": "/nonexistent",
    "PGSYSCONFDIR": "/nonexistent",
    "PGOPTIONS": "-c search_path=nowhere -c default_transaction_read_only=on",
    "PGAPPNAME": "psql",
    "PGTZ": "Nowhere/Land",
    "PGDATESTYLE": "none",
    "PGCLIENTENCODING": "none",
    "PGGEQO": "maybe",
    "PGSSLMODE": "verify-full",
    "PGSSLROOTCERT": "/nonexistent",
    "PGSSLNEGOTIATION": "direct",
    "PGREQUIRESSL": "1",
    "PGREQUIREPEER": "nobody-here",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGCHANNELBINDING": "require",
    "PGGSSENCMODE": "require",
    "PGTARGETSESSIONATTRS": "standby",
    "PGLOADBALANCEHOSTS": "never",
    "PGMINPROTOCOLVERSION": "9.9",
    "PGCONNECT_TIMEOUT": "never",
    "PGDATA": "/nonexistent",
}


def test_libpq_and_the_embedded_server(tmp_path: Path) -> None:
    """None of libpq's variables reaches the embedded PostgreSQL, nor any connection to it."""
    done = run(["migrate", "--data-dir", str(tmp_path / "data")], **LIBPQ)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the schema is up to date\n", "")
    process = subprocess.Popen(
        [*FRONTDESK, *serve("--data-dir", str(tmp_path / "data"), "--demo")],
        env={**CLEAN, **LIBPQ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        # The demo's table comes from the database.
        assert any("DR-SILVA" in text for text in iter(process.stdout.readline, ""))
    finally:
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert '"level": "warning"' not in errors


@pytest.mark.parametrize("name", ["PGHOSTADDR", "PGSERVICE", "PGAPPNAME", "PGOPTIONS", "PGTZ", "PGDATESTYLE",
                                  "PGCLIENTENCODING", "PGGEQO"])  # fmt: skip
def test_libpq_and_a_url(conninfo: str, name: str) -> None:
    """With a URL, no variable leads to another server or changes a session."""
    done = run(["migrate"], FRONTDESK_DATABASE_URL=conninfo, **{name: LIBPQ[name]})
    assert (done.returncode, done.stdout, done.stderr) == (0, "the schema is up to date\n", "")


def test_libpq_fills_in_what_a_url_leaves_out(conninfo: str) -> None:
    """The address and the user may come from libpq's variables, as with psql."""
    parts = conninfo_to_dict(conninfo)
    environment = {"PGHOST": str(parts["host"]), "PGPORT": str(parts["port"]), "PGUSER": str(parts["user"])}
    done = run(["migrate", "--database-url", f"dbname={parts['dbname']}"], **environment)
    assert (done.returncode, done.stdout) == (0, "the schema is up to date\n"), done.stderr


# --- Users, directories and disks ---

NAMELESS = """
import encodings.idna, importlib, os, pkgutil, sys
import rich.box, rich.panel, rich.table
import frontdesk
# This installation may be out of that user's reach.
for module in pkgutil.walk_packages(frontdesk.__path__, "frontdesk."):
    if ".migrations" not in module.name:
        importlib.import_module(module.name)
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)
os.environ.clear()
os.environ.update(pair.partition("=")[::2] for pair in sys.argv[1].split())
from frontdesk.cli import run
sys.exit(run(sys.argv[2:]))
"""


def nameless(environment: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a user id that has no name, with this environment alone."""
    return subprocess.run(
        [sys.executable, "-c", NAMELESS, environment, *arguments], capture_output=True, text=True, timeout=60, cwd="/"
    )


@needs_root
def test_a_user_without_name_and_home() -> None:
    """Only a command that needs the data directory says that there is none, in one line."""
    with pytest.raises(KeyError):
        pwd.getpwuid(54321)
    target = f"127.0.0.1:{free_port()}"
    assert nameless("", "--version").returncode == 0
    assert nameless("", "serve", "--help").returncode == 0
    for command in (["health"], ["demo"], ["watch", "--doctor", "D"]):
        assert "no frontdesk answers" in line(nameless("", *command, "--target", target))
    for command in (["migrate"], serve()):
        assert "FRONTDESK_DATA_DIR is needed" in line(nameless("", *command), 2)
        assert "the database refuses" in line(nameless("", *command, "--database-url", "host=/nowhere"))
    assert "the database refuses" in line(nameless("", "maintain", "--database-url", "host=/nowhere"))
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o777)
        for home in (f"HOME={open_to_all}", f"XDG_DATA_HOME={open_to_all}", f"FRONTDESK_DATA_DIR={open_to_all}/d"):
            assert "user id 54321 has no name" in line(nameless(home, "migrate"))
    assert "Permission denied" in line(nameless("HOME=/nonexistent", "migrate"))


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str], str]:
    """Paths at which nothing can be made."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    for name in ("lock", "log", "cluster", "version"):
        (tmp_path / name).mkdir()
    (tmp_path / "lock" / "lock").mkdir()
    (tmp_path / "cluster" / "postgres").mkdir()
    (tmp_path / "cluster" / "postgres" / "stray").touch()
    (tmp_path / "version" / "postgres").mkdir()
    (tmp_path / "version" / "postgres" / "PG_VERSION").write_bytes(b"\xff\xfe\x00")
    if os.geteuid() == 0:
        for name in ("cluster", "version"):
            os.chown(tmp_path / name / "postgres", 65534, 65534)
    return lambda place: place if place.startswith("/") else str(tmp_path / place)


@pytest.mark.parametrize(
    "place",
    [
        "file",
        "file/below",
        "loop",
        "dangling",
        "lock",
        "cluster",
        "version",
        "/proc/frontdesk",
        "/dev/null/x",
        "x" * 300,
    ],
)
def test_an_unusable_data_directory(broken: Callable[[str], str], place: str) -> None:
    """A data directory that cannot be one is named."""
    for command in (["migrate"], serve()):
        assert "/" in line(run([*command, "--data-dir", broken(place)]))


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    """In a directory that was deleted, no command ends in a traceback."""
    target = f"127.0.0.1:{free_port()}"
    leave = f"cd {shlex.quote(str(tmp_path))}; mkdir gone; cd gone; rmdir ../gone"
    assert "no frontdesk answers" in line(run(["health", "--target", target], shell=leave))
    assert "No such file" in line(run(["migrate", "--data-dir", "d"], shell=leave))
    assert "working directory" in line(run(["serve", "--listen", "unix:s"], shell=leave), 2)


@needs_root
@pytest.mark.parametrize(
    "kibibytes", [*(pytest.param(size, marks=pytest.mark.soak) for size in (16, 4_000, 39_000)), 200, 20_000]
)
def test_a_small_disk(tmp_path: Path, kibibytes: int) -> None:
    """A disk on which the cluster finds no room is told as such, whatever part of it still fits."""
    mount = f"mount -t tmpfs -o size={kibibytes}k tmpfs {shlex.quote(str(tmp_path))} || exit 77"
    for command in (["migrate"], serve()):
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", f'{mount}\nexec "$@"', "bash", *FRONTDESK, *command, "--data-dir",
             str(tmp_path / "data")], capture_output=True, text=True, timeout=120, env=CLEAN,
        )  # fmt: skip
        if done.returncode == 77 or "Operation not permitted" in done.stderr:
            pytest.skip("no right to mount")
        assert re.search("No space left on device|wrote only", line(done))


@needs_root
def test_a_read_only_disk(tmp_path: Path) -> None:
    """A disk that cannot be written is told as such."""
    place = shlex.quote(str(tmp_path))
    mount = f"mount -t tmpfs tmpfs {place} && mkdir {place}/data && mount -o remount,ro {place} || exit 77"
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", f'{mount}\nexec "$@"', "bash", *FRONTDESK, "migrate", "--data-dir",
         str(tmp_path / "data")], capture_output=True, text=True, timeout=120, env=CLEAN,
    )  # fmt: skip
    if done.returncode == 77 or "Operation not permitted" in done.stderr:
        pytest.skip("no right to mount")
    assert "Read-only file system" in line(done)


# --- Limits ---

MORE_LIMITS = ("-n 7", "-n 31", "-n 40", "-f 0", "-f 1000", "-v 1000000")


@pytest.mark.parametrize(
    "limit",
    [
        *("-n 33", "-n 64", "-f 64", "-v 600000", "-s 128"),
        *(pytest.param(limit, marks=pytest.mark.soak) for limit in MORE_LIMITS),
    ],
)
def test_limits(tmp_path: Path, limit: str) -> None:
    """Few open files, small files, little memory, a small stack: PostgreSQL's line or ours, and no traceback."""
    target = f"127.0.0.1:{free_port()}"
    for command in (
        ["--version"],
        ["health", "--target", target],
        ["demo", "--target", target],
        ["migrate", "--data-dir", str(tmp_path / "migrate")],
        serve("--database-url", "host=/nowhere", "--workers", "2"),
    ):
        done = run(command, shell=f"ulimit {limit}")
        assert "Traceback" not in done.stderr
        # No word in a file, if files have no room for one.
        if done.returncode != 0 and limit != "-f 0":
            line(done)
    command = serve("--data-dir", str(tmp_path / "serve"))
    with subprocess.Popen(
        ["bash", "-c", f'ulimit {limit}\nexec "$@"', "bash", *FRONTDESK, *command],
        env=CLEAN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        # Some of the limits are enough to serve.
        if process.stdout.readline():
            process.terminate()
        errors = process.communicate(timeout=120)[1]
        assert "Traceback" not in errors
        if process.returncode > 0:
            assert len([text for text in errors.splitlines() if not text.startswith("{")]) == 1, errors


def test_a_low_limit_of_files_that_may_be_raised(tmp_path: Path) -> None:
    """A soft limit below the hard one is no limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1024:
        pytest.skip("a low hard limit")
    done = run(["migrate", "--data-dir", str(tmp_path / "data")], shell="ulimit -Sn 20")
    assert (done.returncode, done.stdout) == (0, "the schema is up to date\n"), done.stderr


# --- Standard files ---


@pytest.mark.parametrize(
    "shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1"]
)
def test_standard_files(conninfo: str, tmp_path: Path, shell: str) -> None:
    """Closed or full standard files change neither the status of a command nor what it does."""
    target = f"127.0.0.1:{free_port()}"
    commands = [
        (["--version"], 0),
        (["migrate", "--database-url", conninfo], 0),
        (["health", "--target", target], 1),
        (serve("--database-url", "host=/nowhere"), 1),
        (["nonsense"], 2),
    ]
    if "&" in shell.replace("&-", "", 1):
        # Every command with the worst of them.
        commands += [
            (["maintain", "--database-url", conninfo], 0),
            (["demo", "--target", target], 1),
            (["watch", "--doctor", "D", "--target", target], 1),
            (["conformance", "--target", target, "--only", "starts-empty"], 1),
            (["serve", "--listen", "nowhere"], 2),
        ]
    for command, status in commands:
        done = run(command, shell=shell)
        assert "Traceback" not in done.stderr + done.stdout
        assert "Exception ignored" not in done.stderr
        assert done.returncode == status, (command, done.stderr)
    for command in ([], ["serve", "--help"]):
        assert "Traceback" not in run(command, shell=shell).stderr


# --- Databases ---


@contextlib.contextmanager
def stranger(answer: bytes | None) -> Iterator[int]:
    """A server that is not PostgreSQL: it answers this and closes, or is silent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        held: list[socket.socket] = []

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    held.append(connection)
                    if answer is not None:
                        connection.recv(1024)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


def test_databases_that_are_none(tmp_path: Path) -> None:
    """A database that cannot be reached, or is none, is told in one line by every command that needs it."""
    with stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n") as http, stranger(b"") as closing, stranger(None) as silent:
        urls = (
            "postgresql://127.0.0.1:1/none",
            "postgresql://no-such-host.invalid/none",
            f"postgresql://127.0.0.1:{http}/none",
            f"postgresql://127.0.0.1:{http}/none?sslmode=require",
            f"postgresql://127.0.0.1:{closing}/none",
            f"postgresql://127.0.0.1:{silent}/none?connect_timeout=2",
            f"host={tmp_path}",
            "service=nothing",
            "postgresql://127.0.0.1/none?sslmode=verify-full&sslrootcert=/nonexistent",
        )
        commands = (["migrate"], ["maintain"], serve())
        for done in run_all([([*command, "--database-url", url], {}) for url in urls for command in commands]):
            assert "the database refuses" in line(done)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://front:geheim@wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim/wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim@wort/geheim@127.0.0.1:1/clinic",
        "postgresql://front:geheim?wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim?host=1@wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim#wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim%wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim:wort@127.0.0.1:1/clinic",
        "postgresql://front:geheim wort@127.0.0.1:1/clinic",
        "postgresql://front:[geheim]@127.0.0.1:1/clinic",
        "postgresql://front:geheim/clinic",
        "postgresql+psycopg://front:geheim@127.0.0.1:1/clinic?sslmode=disable",
        "postgres:/front:geheim@127.0.0.1:1/clinic",
        "host=127.0.0.1 port=1 user=front password=geheim wort",
        "host=127.0.0.1 port=1 user=front password='geheim' wort'",
        "host=127.0.0.1 port=1 user=front geheim=wort",
        "host=127.0.0.1 port=geheim",
        "host=geheim@wort",
    ],
)
def test_no_part_of_a_password_is_printed(url: str) -> None:
    """However a URL is mistyped, wherever it is put: nothing that may be its password is printed."""
    cases: list[Case] = []
    for command in (["migrate"], ["maintain"], serve()):
        cases += [
            ([*command, "--database-url", url], {}),
            (command, {"FRONTDESK_DATABASE_URL": url}),
            ([*command, f"--databse-url={url}"], {}),
            ([*command, "--database-url", *url.split()], {}),
        ]
    cases += [
        (["serve"], {"FRONTDESK_LISTEN": url}),
        (["serve"], {"FRONTDESK_METRICS_LISTEN": url}),
        (["serve"], {"FRONTDESK_POOLER": url}),
        (["serve"], {"FRONTDESK_WORKERS": url}),
        (["serve", "--listen", url], {}),
        (["serve", url], {}),
        ([url], {}),
        (["health", "--target", url], {}),
    ]
    for done in run_all(cases):
        assert done.returncode in (1, 2), done
        said = line(done, done.returncode)
        assert "geheim" not in said
        assert "wort" not in said.replace("password", "")


# --- Files of certificates ---


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of certificates and keys, right ones and wrong ones."""
    directory = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    (directory / "ca").write_bytes(authority.cert_pem.bytes())
    for name in ("one", "two"):
        leaf = authority.issue_cert("127.0.0.1")
        (directory / f"{name}.cert").write_bytes(leaf.cert_chain_pems[0].bytes())
        (directory / f"{name}.key").write_bytes(leaf.private_key_pem.bytes())
    (directory / "empty").touch()
    (directory / "garbage").write_bytes(b"\x00\xff certificate")
    (directory / "cut").write_bytes((directory / "one.cert").read_bytes()[:200])
    (directory / "directory").mkdir()
    locked = serialization.load_pem_private_key((directory / "one.key").read_bytes(), None).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x")
    )
    (directory / "locked.key").write_bytes(locked)
    return directory


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"tls_cert": "empty"}, "FRONTDESK_TLS_CERT"),
        ({"tls_cert": "garbage"}, "FRONTDESK_TLS_CERT"),
        ({"tls_cert": "cut"}, "FRONTDESK_TLS_CERT"),
        ({"tls_cert": "directory"}, "FRONTDESK_TLS_CERT"),
        ({"tls_cert": "one.key"}, "FRONTDESK_TLS_CERT"),
        ({"tls_key": "nothing"}, "FRONTDESK_TLS_KEY"),
        ({"tls_key": "empty"}, "FRONTDESK_TLS_KEY"),
        ({"tls_key": "garbage"}, "FRONTDESK_TLS_KEY"),
        ({"tls_key": "one.cert"}, "FRONTDESK_TLS_KEY"),
        ({"tls_key": "two.key"}, "is not the key of"),
        ({"tls_key": "locked.key"}, "has a password"),
        ({"tls_client_ca": "empty"}, "FRONTDESK_TLS_CLIENT_CA"),
        ({"tls_client_ca": "garbage"}, "FRONTDESK_TLS_CLIENT_CA"),
        ({"client_ca": "garbage"}, "FRONTDESK_CLIENT_CA"),
        ({"client_ca": "ca", "client_cert": "two.cert", "client_key": "one.key"}, "FRONTDESK_CLIENT_KEY"),
        ({"client_ca": "ca", "client_cert": "two.cert"}, "FRONTDESK_CLIENT_KEY"),
        ({"client_server_name": "desk"}, "FRONTDESK_CLIENT_CA"),
    ],
)
def test_wrong_files_of_tls(pem: Path, wrong: dict[str, str], said: str) -> None:
    """A wrong file of certificates is named by its setting, with what is wrong, and nobody is asked for a password."""
    files = {"tls_cert": "one.cert", "tls_key": "one.key", "tls_client_ca": "ca"} if "tls" in "".join(wrong) else {}
    environment = {
        f"FRONTDESK_{name.upper()}": value if name == "client_server_name" else str(pem / value)
        for name, value in (files | wrong).items()
    }
    commands = [["health"], ["demo"]] if "client" in next(iter(wrong)) else [["serve"], ["health"]]
    for done in run_all([(command, environment) for command in commands]):
        assert said in line(done, 2)


def test_files_that_break_later(pem: Path, tmp_path: Path, conninfo: str) -> None:
    """After SIGHUP a worker that finds wrong files says so in the log, and the old one serves until they are right."""
    cert, key = tmp_path / "cert", tmp_path / "key"
    shutil.copy(pem / "one.cert", cert)
    shutil.copy(pem / "one.key", key)
    with Service(tmp_path / "log", conninfo, source=None, tls_cert=str(cert), tls_key=str(key)) as service:
        (before,) = service.workers()
        key.write_text("broken")
        os.kill(service.process.pid, signal.SIGHUP)
        wait_for(lambda: "FRONTDESK_TLS_KEY" in service.log.read_text())
        assert before in service.workers()
        health = ["health", "--target", f"127.0.0.1:{service.port}"]
        assert run(health, FRONTDESK_CLIENT_CA=str(pem / "ca")).stdout.startswith("SERVING")
        shutil.copy(pem / "two.cert", cert)
        shutil.copy(pem / "two.key", key)
        wait_for(lambda: "worker_replaced" in service.log.read_text())
        assert before not in service.workers()
        assert run(health, FRONTDESK_CLIENT_CA=str(pem / "ca")).stdout.startswith("SERVING")
        service.stop()


# --- Words that nobody expects ---


def test_odd_bytes(conninfo: str) -> None:
    """Arguments and variables that are no UTF-8 are told in one line."""
    odd = "\udcff\udcfe"
    for arguments, status in (
        (["serve", "--listen", odd], 2),
        (["migrate", "--database-url", odd], 2),
        (["migrate", "--database-url", f"postgresql://{odd}@127.0.0.1:1/x"], 1),
        (["migrate", "--data-dir", f"/proc/{odd}"], 1),
        (["health", "--target", odd], 2),
        ([odd], 2),
        ([f"--{odd}"], 2),
    ):
        done = run(arguments)
        assert "Traceback" not in done.stderr
        assert done.returncode in (1, 2), (arguments, status, done.stderr)
    with psycopg.connect(conninfo) as connection:
        assert connection.execute("select count(*) from clinic").fetchone() == (1,)


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "nowhere", "LANG": "nowhere"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
        {"TMPDIR": "/nonexistent"},
        {"TZ": "Nowhere/Land"},
        {"PATH": "/nonexistent"},
        {"HOME": "/nonexistent", "XDG_DATA_HOME": "relative"},
        {"TERM": "nowhere", "COLUMNS": "many", "LINES": "-1"},
        {"NO_COLOR": "1", "FORCE_COLOR": "1"},
    ],
    ids=lambda environment: " ".join(environment),
)
def test_odd_environments(conninfo: str, environment: dict[str, str]) -> None:
    """A locale, a terminal or a directory that does not exist hinders no command."""
    environment.setdefault("PATH", CLEAN["PATH"])
    for command in (["migrate"], ["maintain"]):
        done = subprocess.run(
            [*FRONTDESK, *command], env={**CLEAN, **environment, "FRONTDESK_DATABASE_URL": conninfo},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
