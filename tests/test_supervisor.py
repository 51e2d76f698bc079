"""The supervisor, with a stand-in for the gRPC worker: a socket that answers with its process id."""

import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psycopg
import pytest
import structlog

from frontdesk.process.claims import ClaimError, TcpClaim
from frontdesk.process.supervisor import supervise
from frontdesk.settings import Settings, SettingsError
from frontdesk.settings.addresses import Address, parse
from tests.waiting import wait_for

# --- Code of the processes under test ---


def worker(
    settings: Settings, conninfo: str, address: str, reuse_port: bool, ready: Connection, handover: Connection
) -> None:
    """Serve until told to stop, then drain for as long as the file `drain` says."""
    signal.signal(signal.SIGTERM, lambda *_: handover.send(None))
    while (settings.embedded_dir.parent / "hesitate").exists():
        time.sleep(0.01)
    if refusal := (settings.embedded_dir.parent / "refuse").exists():
        ready.send("the worker does not want to")
    if refusal or (settings.embedded_dir.parent / "crash").exists():
        sys.exit(3)
    server = listener(address, reuse_port)
    ready.send(1 if server.family == socket.AF_UNIX else server.getsockname()[1])
    with selectors.DefaultSelector() as selector:
        selector.register(server, selectors.EVENT_READ)
        selector.register(handover, selectors.EVENT_READ)
        while handover not in [key.fileobj for key, _ in selector.select()]:
            client, _ = server.accept()
            client.sendall(f"{os.getpid()} {conninfo}\n".encode())
            client.close()
    drain = settings.embedded_dir.parent / "drain"
    (settings.embedded_dir.parent / f"draining-{os.getpid()}").touch()
    while drain.exists():
        time.sleep(0.01)
    # PostgreSQL is still available during the drain.
    if settings.database_url is None:
        with psycopg.connect(conninfo) as connection:
            connection.execute("INSERT INTO said VALUES ('drained')")


def listener(address: str, reuse_port: bool) -> socket.socket:
    """A socket that listens there."""
    host, _, port = address.rpartition(":")
    if host == "unix":
        server = socket.socket(socket.AF_UNIX)
        server.bind(port)
    else:
        server = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
        server.bind((host.strip("[]"), int(port)))
    server.listen()
    return server


def background(settings: Settings, conninfo: str, ready: Connection, **rest: Any) -> None:
    """Says that it runs, and after the workers that it has ended."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    ready.send(0)
    (settings.embedded_dir.parent / "background").write_text(str(os.getpid()))
    stop.wait()


def migrate(conninfo: str) -> None:
    with psycopg.connect(conninfo) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS said (what text)")
        # The worker has another role than the one that migrates.
        connection.execute("GRANT ALL ON said TO PUBLIC")


def check_schema(conninfo: str) -> None:
    if "old" in conninfo:
        raise SettingsError("the schema is too old")


def announce(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def serve() -> int:
    settings = Settings.load(**json.loads(sys.argv[1]))
    log = (settings.embedded_dir.parent / "log").open("a", buffering=1)
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.PrintLoggerFactory(log)
    )
    return supervise(
        settings,
        worker=worker,
        background=background,
        migrate=migrate,
        check_schema=check_schema,
        announce=announce,
    )


if __name__ == "__main__":
    sys.exit(serve())


# --- Tests ---


class Service:
    """A supervisor in its own process and process group."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        given = {"listen": "127.0.0.1:0", "data_dir": str(directory / "data"), **settings}
        self.directory = directory
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_supervisor", json.dumps(given)],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )

    def serves(self) -> Address:
        """Wait for the line with the address."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("frontdesk (access: open) serves on "), self.said()
        return parse(line.removeprefix("frontdesk (access: open) serves on ").strip())

    def ends(self) -> int:
        return self.process.wait(30)

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def postgres(self) -> int:
        file = self.directory / "data" / "postgres" / "postmaster.pid"
        return int(file.read_text().split()[0])

    def rows(self) -> list[str]:
        with psycopg.connect(conninfo(self.directory)) as connection:
            return [what for (what,) in connection.execute("SELECT what FROM said").fetchall()]

    def members(self) -> set[int]:
        """The supervisor and all processes that it started: those of its data directory, and its descendants."""
        found = {self.process.pid}
        while more := {child for pid in found for child in children(pid)} - found:
            found |= more
        return found


def children(pid: int) -> set[int]:
    try:
        return {int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until_gone(pids: set[int]) -> None:
    wait_for(lambda: not [pid for pid in pids if runs(pid)])


def conninfo(directory: Path) -> str:
    return f"host={directory}/data/postgres port=5432 user=frontdesk dbname=frontdesk"


def connect(at: Address) -> socket.socket:
    if not at.path:
        return socket.create_connection((at.host, at.port), timeout=5)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(5)
    client.connect(at.path)
    return client


def call(at: Address) -> tuple[int, str] | None:
    """A worker's answer: its process id and its conninfo. None if no worker serves."""
    try:
        with connect(at) as client:
            text = client.makefile().readline()
    except OSError:
        return None
    pid, _, rest = text.strip().partition(" ")
    return (int(pid), rest) if pid else None


def workers(at: Address, many: int) -> set[int]:
    """The process ids of `many` workers, once that many answer."""
    seen: set[int] = set()

    def enough() -> bool:
        if answer := call(at):
            seen.add(answer[0])
        return len({pid for pid in seen if runs(pid)}) == many

    wait_for(enough)
    return {pid for pid in seen if runs(pid)}


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


@pytest.fixture
def service(directory: Path) -> Iterator[Callable[..., Service]]:
    """Start services, by default without PostgreSQL, and stop them."""
    started: list[Service] = []

    def start(**settings: Any) -> Service:
        started.append(Service(directory, **settings))
        return started[-1]

    yield start
    members = {pid for one in started for pid in one.members()}
    for one in started:
        one.process.kill()
        one.process.communicate()
        one.errors.close()
    until_gone(members)


NOWHERE = "host=/nowhere dbname=none"
"""A database that nobody connects to, because most of these tests do not need PostgreSQL."""


def test_it_serves_on_a_free_port_migrates_and_ends_properly(service: Callable[..., Service]) -> None:
    one = service()
    at = one.serves()
    answer = call(at)
    assert answer is not None
    assert one.rows() == []
    with psycopg.connect(answer[1]) as connection:
        assert connection.execute("SELECT count(*) FROM said").fetchone() == (0,)
    members = one.members()
    assert len(members) > 5
    postmaster = one.postgres()
    one.process.send_signal(signal.SIGTERM)
    assert one.ends() == 0
    assert not runs(answer[0])
    assert not runs(postmaster)
    assert call(at) is None
    # Only multiprocessing's resource tracker ends after the supervisor.
    until_gone(members)
    assert "received fast shutdown request" in (one.directory / "data" / "postgres.log").read_text()
    # The worker could use PostgreSQL to the end: its row is there after the restart.
    again = service()
    again.serves()
    assert again.rows() == ["drained"]


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_addresses(service: Callable[..., Service], host: str, many: int) -> None:
    if host == "[::1]":
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    one = service(listen=f"{host}:0", database_url=NOWHERE, workers=many)
    at = one.serves()
    assert at.host == host.strip("[]")
    assert len(workers(at, many)) == many


@pytest.mark.parametrize("many", [1, 2])
def test_a_served_port_is_refused(service: Callable[..., Service], many: int) -> None:
    one = service(database_url=NOWHERE, workers=many)
    at = one.serves()
    first = workers(at, many)
    for second_many in (1, 2):
        second = service(listen=str(at), database_url=NOWHERE, workers=second_many)
        assert second.ends() == 1
        assert second.said() == f"frontdesk: --listen {at}: in use by another process\n"
    assert workers(at, many) == first


def test_a_port_that_was_just_served_is_taken_again(service: Callable[..., Service]) -> None:
    # The server closes first, so its connections stay in TIME_WAIT.
    at = None
    for many in (1, 2, 1):
        one = service(listen=str(at or "127.0.0.1:0"), database_url=NOWHERE, workers=many)
        at = one.serves()
        assert call(at)
        one.process.terminate()
        assert one.ends() == 0, one.said()


def test_a_claimed_port_is_open_to_so_reuseport_only() -> None:
    claim = TcpClaim(Address("127.0.0.1", 0))
    port = claim.address.port
    with pytest.raises(ClaimError, match="in use"):
        TcpClaim(Address("127.0.0.1", port))
    with socket.socket() as one, socket.socket() as two:
        for server in (one, two):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.bind(("127.0.0.1", port))
            server.listen()
        # The supervisor binds the port without listening, so no connection is lost there.
        for _ in range(20):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    claim.close()


def test_a_served_directory_is_refused(service: Callable[..., Service]) -> None:
    one = service()
    one.serves()
    second = service()
    assert second.ends() == 1
    assert second.said() == f"frontdesk: {one.directory}/data is in use by frontdesk process {one.process.pid}\n"
    assert one.rows() == []


def test_unusable_address_and_schema(service: Callable[..., Service]) -> None:
    one = service(listen="127.0.0.1:0", database_url="dbname=old")
    assert one.ends() == 1
    assert one.said() == "frontdesk: the schema is too old\n"


@pytest.mark.parametrize("many", [1, 2])
def test_a_worker_that_cannot_start_ends_everything(
    service: Callable[..., Service], directory: Path, many: int
) -> None:
    (directory / "refuse").touch()
    one = service(workers=many)
    assert one.ends() == 1
    assert one.said() == "frontdesk: the worker does not want to\n"
    assert not (directory / "data" / "postgres" / "postmaster.pid").exists()
    (directory / "refuse").unlink()
    (directory / "crash").touch()
    two = service(workers=many, database_url=NOWHERE)
    assert two.ends() == 1
    assert "ended with status 3 before it served\n" in two.said()


@pytest.mark.parametrize("many", [1, 2])
def test_a_killed_worker_is_replaced_on_the_same_port(service: Callable[..., Service], many: int) -> None:
    one = service(workers=many, database_url=NOWHERE)
    at = one.serves()
    before = workers(at, many)
    for _ in range(2):
        victim = next(iter(before))
        os.kill(victim, signal.SIGKILL)
        until_gone({victim})
        after = workers(at, many)
        assert len(after - before) == 1
        before = after
    one.process.send_signal(signal.SIGINT)
    assert one.ends() == 0
    assert (one.directory / "log").read_text().count("worker_died") == 2


def events(service: Service) -> list[str]:
    """The names of the lines in the supervisor's log."""
    # The last line may still be in the making.
    text = (service.directory / "log").read_text().rpartition("\n")[0]
    return [str(json.loads(line)["event"]) for line in text.splitlines()]


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("where", ["TCP", "unix"])
def test_a_worker_leaves_once_its_successor_listens(
    service: Callable[..., Service], directory: Path, many: int, where: str
) -> None:
    """A worker that somebody stops serves on until another listens in its place."""
    if where == "unix" and many == 2:
        pytest.skip("a Unix socket has one worker")
    one = service(listen="127.0.0.1:0" if where == "TCP" else f"unix:{directory}/s", workers=many, database_url=NOWHERE)
    at = one.serves()
    before = workers(at, many)
    (directory / "hesitate").touch()
    leaving = min(before)
    os.kill(leaving, signal.SIGTERM)
    # The successor is there, and does not listen yet.
    wait_for(lambda: len(processes(one) - before) == 1)
    assert workers(at, many) == before
    (directory / "hesitate").unlink()
    until_gone({leaving})
    after = workers(at, many)
    assert len(after - before) == 1
    wait_for(lambda: "worker_replaced" in events(one))
    assert "worker_died" not in events(one)
    one.process.terminate()
    assert one.ends() == 0
    assert not list(directory.glob("s*"))


def processes(one: Service) -> set[int]:
    """The worker processes, listening or not."""
    return {
        pid
        for pid in children(one.process.pid)
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes() and runs(pid)
    }


def test_a_leaving_worker_waits_for_a_successor_that_does_not_die(
    service: Callable[..., Service], directory: Path
) -> None:
    """As long as no successor can serve, a worker that somebody stops goes on; a second signal ends it."""
    one = service(database_url=NOWHERE)
    at = one.serves()
    (leaving,) = workers(at, 1)
    (directory / "refuse").touch()
    os.kill(leaving, signal.SIGTERM)
    wait_for(lambda: events(one).count("worker_died") >= 2)
    assert workers(at, 1) == {leaving}
    (directory / "refuse").unlink()
    until_gone({leaving})
    workers(at, 1)
    assert one.process.poll() is None


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:"])
def test_sighup_replaces_all_workers(service: Callable[..., Service], directory: Path, listen: str) -> None:
    """SIGHUP replaces the workers one after another, and every connection meanwhile finds one that listens."""
    unix = listen == "unix:"
    one = service(listen=f"unix:{directory}/s" if unix else listen, workers=1 if unix else 3, database_url=NOWHERE)
    at = one.serves()
    before = workers(at, 1 if unix else 3)
    one.process.send_signal(signal.SIGHUP)
    answered = 0
    while any(runs(pid) for pid in before):
        # A connection in the queue of a socket that closes is reset, and tried again by every gRPC client.
        try:
            with connect(at) as client:
                client.makefile().readline()
        except ConnectionResetError:
            continue
        answered += 1
    assert answered > 10
    after = workers(at, len(before))
    assert not after & before
    wait_for(lambda: events(one).count("worker_replaced") == len(before))
    workers_events = [event for event in events(one) if event.startswith("worker_")]
    assert workers_events[len(before) :] == ["worker_leaves", "worker_serves", "worker_replaced"] * len(before)
    one.process.terminate()
    assert one.ends() == 0


def background_pid(one: Service) -> int:
    """The process id of the background process, once it works."""
    file = one.directory / "background"
    return int(wait_for(lambda: file.read_text() if file.exists() else ""))


def test_the_background_process(service: Callable[..., Service], directory: Path) -> None:
    """One process works in the background: restarted when it dies, replaced at SIGHUP, ended with the service."""
    one = service(database_url=NOWHERE, workers=2)
    at = one.serves()
    serving = workers(at, 2)
    first = background_pid(one)
    assert Path(f"/proc/{first}/comm").read_text() == "fd-background\n"
    for victim, number in ((first, signal.SIGKILL), (one.process.pid, signal.SIGHUP)):
        before = background_pid(one)
        (directory / "background").unlink()
        os.kill(victim, number)
        until_gone({before})
        assert background_pid(one) != before
    assert "background_died" in events(one)
    assert "background_replaced" in events(one)
    assert serving & workers(at, 2) or events(one).count("worker_leaves")
    last = background_pid(one)
    one.process.terminate()
    assert one.ends() == 0
    until_gone({last})


def test_no_background_process(service: Callable[..., Service], directory: Path) -> None:
    """With FRONTDESK_BACKGROUND=off there is none."""
    one = service(database_url=NOWHERE, background="off")
    one.serves()
    one.process.terminate()
    assert one.ends() == 0
    assert not (directory / "background").exists()


def test_a_stale_socket_is_replaced_and_a_served_one_refused(service: Callable[..., Service], directory: Path) -> None:
    """A socket that a killed service left is taken over; one that is served, by whatever program, is refused."""
    listen = f"unix:{directory}/s"
    for _ in range(2):
        one = service(listen=listen, database_url=NOWHERE)
        at = one.serves()
        (pid,) = workers(at, 1)
        second = service(listen=listen, database_url=NOWHERE)
        assert second.ends() == 1
        assert second.said() == f"frontdesk: --listen {listen}: in use by another process\n"
        assert workers(at, 1) == {pid}
        one.process.kill()
        until_gone({pid})
        assert Path(at.path).is_socket()
    Path(at.path).unlink()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(at.path)
        stranger.listen()
        other = service(listen=listen, database_url=NOWHERE)
        assert other.ends() == 1
        assert "in use by another process" in other.said()
    Path(at.path).unlink()
    Path(at.path).write_text("kept")
    other = service(listen=listen, database_url=NOWHERE)
    assert other.ends() == 1
    assert other.said() == f"frontdesk: --listen {listen}: exists and is not a socket\n"
    assert Path(at.path).read_text() == "kept"


@pytest.mark.parametrize("place", ["nowhere/s", "file/s"])
def test_a_socket_nowhere(service: Callable[..., Service], directory: Path, place: str) -> None:
    """A directory that does not exist is named in one line."""
    (directory / "file").touch()
    one = service(listen=f"unix:{directory}/{place}", database_url=NOWHERE)
    assert one.ends() == 1
    assert one.said().startswith(f"frontdesk: --listen unix:{directory}/{place}: ")
    assert one.said().count("\n") == 1


@pytest.mark.parametrize("reloads", [False, True])
def test_a_terminal_that_closes_ends_the_service(
    service: Callable[..., Service], directory: Path, reloads: bool
) -> None:
    """SIGHUP from a terminal that has gone stops the service, as every program in it, after a reload too."""
    main, terminal = os.openpty()
    given = json.dumps({"listen": "127.0.0.1:0", "data_dir": str(directory / "data"), "database_url": NOWHERE})
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.test_supervisor", given],
        cwd=Path(__file__).parents[1],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(terminal)
    try:
        assert process.stdout is not None
        assert b"serves on" in process.stdout.readline()
        if reloads:
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: "worker_replaced" in (directory / "log").read_text())
        os.close(main)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def take_terminal() -> None:
    # Whoever runs the tests may have it ignored, like nohup; then a terminal that closes stops nothing.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_worker_that_fails_later_is_tried_again(service: Callable[..., Service], directory: Path) -> None:
    one = service(database_url=NOWHERE)
    at = one.serves()
    (directory / "refuse").touch()
    (before,) = workers(at, 1)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: call(at) is None)
    (directory / "refuse").unlink()
    workers(at, 1)
    assert one.process.poll() is None


def test_a_killed_postgresql_is_started_again_while_the_workers_stay(service: Callable[..., Service]) -> None:
    one = service()
    at = one.serves()
    answer = call(at)
    assert answer is not None
    with psycopg.connect(answer[1]) as connection:
        connection.execute("INSERT INTO said VALUES ('kept')")
    before = one.postgres()
    os.kill(before, signal.SIGKILL)

    def back() -> bool:
        assert call(at) == answer
        try:
            return one.rows() == ["kept"] and one.postgres() != before
        except (psycopg.OperationalError, FileNotFoundError):
            return False

    wait_for(back)
    one.process.terminate()
    assert one.ends() == 0


def test_ctrl_c_drains(service: Callable[..., Service], directory: Path) -> None:
    (directory / "drain").touch()
    one = service()
    (pid,) = workers(one.serves(), 1)
    # A terminal signals the whole process group.
    os.killpg(one.process.pid, signal.SIGINT)
    wait_for((directory / f"draining-{pid}").exists)
    assert one.rows() == []
    assert one.process.poll() is None
    (directory / "drain").unlink()
    assert one.ends() == 0
    assert "Traceback" not in one.said()


@pytest.mark.parametrize("how", ["second signal", "deadline"])
def test_a_drain_does_not_last_forever(service: Callable[..., Service], directory: Path, how: str) -> None:
    (directory / "drain").touch()
    one = service(drain_seconds=600 if how == "second signal" else 0)
    (pid,) = workers(one.serves(), 1)
    members = one.members()
    one.process.terminate()
    wait_for((directory / f"draining-{pid}").exists)
    if how == "second signal":
        one.process.terminate()
    assert one.ends() == 0
    assert not runs(pid)
    until_gone(members)
    assert "received fast shutdown request" in (directory / "data" / "postgres.log").read_text()


def test_a_signal_while_it_starts(service: Callable[..., Service], directory: Path) -> None:
    one = service()
    wait_for((directory / "data" / "lock").exists)
    one.process.terminate()
    assert one.ends() == 0
    assert one.said() == ""
    assert not (directory / "data" / "postgres" / "postmaster.pid").exists()


def test_a_killed_supervisor_leaves_no_orphans(service: Callable[..., Service]) -> None:
    one = service(workers=2)
    at = one.serves()
    members = one.members()
    assert workers(at, 2) < members
    assert one.postgres() in members
    one.process.kill()
    one.ends()
    until_gone(members)
    # The next one serves at once.
    two = service(workers=2)
    two.serves()
    two.rows()
