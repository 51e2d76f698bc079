"""The `frontdesk` command. Every expected failure is one line on stderr.

Exit status: 0 done, 1 failed, 2 wrong usage or settings, 130 interrupted.

Each command imports what it needs: every worker process imports this module too, and so does the supervisor, which must
not have gRPC.
"""

import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar, cast

import typer

if TYPE_CHECKING:
    import datetime

    from frontdesk.db.database import Database
    from frontdesk.settings import Settings
    from frontdesk.tools.diagnosis import Tls
    from frontdesk.tools.terminal import Terminal

T = TypeVar("T")

app = typer.Typer(
    name="frontdesk",
    help="The backend of a clinic's front desk. Options win over FRONTDESK_* variables, those over the defaults.",
    add_completion=False,
    pretty_exceptions_enable=False,
)


_UNEXPECTED_WITH_URL = {
    *("PGHOSTADDR", "PGSERVICE", "PGAPPNAME"),
    *("PGOPTIONS", "PGTZ", "PGDATESTYLE", "PGCLIENTENCODING", "PGGEQO"),
}
"""Variables of libpq that would override the URL or change the session."""


_FEWEST_FILES = 32


class Failure(Exception):
    """The command failed; the message is one line that says why."""


# As text: `Settings` checks the values and reports an error in one line.
_Listen = Annotated[
    str | None, typer.Option(metavar="HOST:PORT|unix:PATH", help="Address to serve on; port 0 takes a free one.")
]
_DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="Directory of the embedded PostgreSQL.")]
_DatabaseUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="A PostgreSQL to use instead of the embedded one.")
]
_Workers = Annotated[str | None, typer.Option(metavar="N", help="Processes that share the port.")]
_Target = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT|unix:PATH", help="The service; default: FRONTDESK_LISTEN or 127.0.0.1:50051."),
]
_ApiKey = Annotated[
    str | None,
    typer.Option(
        metavar="KEY", help="An API key; default: FRONTDESK_API_KEY, which other users of this machine cannot see."
    ),
]


def main() -> None:
    """The console's entry point."""
    # Before any other file is opened.
    _hold_standard_files()

    from frontdesk.tools.terminal import write_similar_characters

    write_similar_characters()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run the command of these arguments; the exit status."""
    # Typer returns the status of an Exit, or the command's own return value.
    try:
        return app(arguments, prog_name="frontdesk", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return 130
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        said = getattr(error, "format_message", error.__str__)().rstrip(".")
        return _fail(f"{_without_secrets(said, arguments)}; see `frontdesk --help`", 2)
    except Exception as error:
        status = _expected(error)
        return _fail(_surprise(error), 1) if status is None else _fail(str(error), status)
    finally:
        _flush_output()


def _without_secrets(said: str, arguments: list[str]) -> str:
    """The message up to the first argument that it quotes, if one may be an API key or a part of a database's URL."""
    values = [argument.partition("=")[2] if argument.startswith("--") else argument for argument in arguments]
    if not any(re.search("[@=]|://|fdk_", value) for value in values):
        return said
    harmless = re.match(r"""(?:[^('"]|\(s\)|'--[\w-]+')*""", said)
    return harmless[0].rstrip(" :") if harmless else ""


def _expected(error: Exception) -> int | None:
    if isinstance(error, Failure):
        return 1
    from frontdesk.settings import SettingsError

    return 2 if isinstance(error, SettingsError) else None


def _surprise(error: Exception) -> str:
    """One line about an error that no command expects."""
    if isinstance(error, OSError) and error.strerror is not None:
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"a part of the installation cannot be loaded: {error}"
    # Not its text, which may quote a patient.
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {place.filename}:{place.lineno}; this is a bug of frontdesk, please report it"


def _fail(message: str, status: int) -> int:
    try:
        print(f"frontdesk: {' '.join(message.split())}", file=sys.stderr, flush=True)
    except OSError:
        # The status says it too, unless Python's own attempt to write fails at the end, which makes it 120.
        if sys.stderr is not None:
            _discard(sys.stderr)
    return status


def _say(*lines: str) -> None:
    try:
        for text in lines:
            print(text, flush=True)
    except OSError:
        # `frontdesk serve | head` keeps on serving, and so does one whose output is a full disk.
        _discard_output()


@app.callback(invoke_without_command=True)
def _frontdesk(
    context: typer.Context, version_: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version_:
        _say(f"frontdesk {version('frontdesk')}")
        raise typer.Exit
    _raise_file_limit()
    if context.invoked_subcommand != "serve":
        # A client's one line is enough; gRPC's core would write its own beside it.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if context.invoked_subcommand is None:
        _say(context.get_help())
        raise typer.Exit(2)


@app.command()
def serve(
    listen: _Listen = None,
    data_dir: _DataDir = None,
    database_url: _DatabaseUrl = None,
    workers: _Workers = None,
    demo: Annotated[bool, typer.Option("--demo", help="Create a small clinic once it serves.")] = False,
) -> int:
    """Serve until SIGTERM or Ctrl-C; running calls may finish."""
    settings = _database_settings(listen=listen, data_dir=data_dir, database_url=database_url, workers=workers)
    if demo and settings.tls_cert is not None and settings.client_ca is None:
        raise typer.BadParameter("needs FRONTDESK_CLIENT_CA, since this service has TLS.", param_hint="'--demo'")
    if demo and settings.access_mode == "required" and settings.api_key is None:
        raise typer.BadParameter("needs FRONTDESK_API_KEY, since calls need credentials.", param_hint="'--demo'")

    from frontdesk.process.log import configure_log, forward_stderr
    from frontdesk.process.supervisor import supervise

    configure_log(settings.log_level)
    forward_stderr()
    first_steps = _FirstSteps(settings, demo=demo)

    def prepare(conninfo: str) -> None:
        _migrate(conninfo, settings)
        _warn_of_other_zones(conninfo)

    def check(conninfo: str) -> None:
        _check_database(conninfo, settings)
        _warn_of_other_zones(conninfo)

    try:
        return supervise(
            settings,
            worker=_worker,
            background=_background_work,
            migrate=prepare,
            check_schema=check,
            announce=first_steps.announce,
        )
    finally:
        first_steps.end()


def _worker(**task: Any) -> None:
    if "metrics" in task:
        # prometheus_client reads it from there alone.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(task["metrics"].directory)

    from frontdesk.process.worker import run_worker

    run_worker(**task)


def _background_work(**task: Any) -> None:
    if "metrics" in task:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(task["metrics"].directory)

    from frontdesk.process.background import run_background

    run_background(**task)


class _FirstSteps:
    """Prints the address once the service serves, creates the demo clinic if asked to, and prints commands to try."""

    def __init__(self, settings: "Settings", *, demo: bool) -> None:
        self._settings = settings
        self._demo = demo
        self._doctor = "DR-SILVA" if demo else "CODE"
        self._filling: subprocess.Popen[bytes] | None = None
        self._ended = False
        self._lock = threading.Lock()

    def announce(self, line: str) -> None:
        """Print the line, and the rest; does not wait for the demo."""
        from frontdesk.settings.addresses import parse

        _say(line)
        address = str(parse(line.partition(" serves on ")[2]).local)
        if self._demo:
            # In a thread, because the supervisor must go on.
            threading.Thread(target=self._fill, args=(address,), name="demo", daemon=True).start()
        else:
            self._suggest(address)

    def _fill(self, address: str) -> None:
        # In another process, because the supervisor must not have gRPC.
        with self._lock:
            if self._ended:
                return
            self._filling = subprocess.Popen([*_module(), "demo", "--target", address], stdin=subprocess.DEVNULL)
        # It has reported its own failure; the service runs all the same.
        self._filling.wait()
        if not self._ended:
            self._suggest(address)

    def _suggest(self, address: str) -> None:
        if (
            self._settings.tls_cert is not None
            or self._settings.access_mode == "required"
            or not self._settings.serves_reflection
        ):
            return
        method = "clinic.frontdesk.v1.DoctorService/ListDoctors"
        buf, grpcurl, host = "", "", shlex.quote(address)
        if address.startswith("unix:"):
            path = shlex.quote(address.removeprefix("unix:"))
            buf, grpcurl, host = f"--unix-socket {path} ", "-unix ", path
        url = f"http://{'localhost' if buf else address}/{method}"
        _say(
            "",
            "Try:",
            f"  {_command('buf')} curl --protocol grpc --http2-prior-knowledge {buf}{url} -d '{{}}'",
            f"  {_command('grpcurl')} -plaintext {grpcurl}-d '{{}}' {host} {method}",
            f"  {_this_command()} watch --target {shlex.quote(address)} --doctor {self._doctor}",
        )

    def end(self) -> None:
        """End a demo that still runs."""
        with self._lock:
            self._ended = True
        if self._filling is not None:
            self._filling.terminate()
            self._filling.wait()


@app.command()
def migrate(data_dir: _DataDir = None, database_url: _DatabaseUrl = None) -> None:
    """Bring the database's schema up to date. `serve` does this itself for the embedded PostgreSQL."""
    from frontdesk.process.log import configure_log

    settings = _database_settings(data_dir=data_dir, database_url=database_url)
    configure_log(settings.log_level)
    if settings.database_url is not None:
        line = _migrate(settings.direct_database_url or settings.database_url, settings)
    else:
        from frontdesk.process.postgres import EmbeddedError, EmbeddedPostgres

        try:
            with EmbeddedPostgres(settings.embedded_dir) as postgres:
                line = _migrate(postgres.conninfo, settings)
        except EmbeddedError as error:
            raise Failure(str(error)) from None
    _say(line)


@app.command()
def maintain(data_dir: _DataDir = None, database_url: _DatabaseUrl = None) -> None:
    """Delete old idempotency keys and old events of the audit. A running service does this itself every hour."""
    from frontdesk.jobs.maintenance import clean, retention

    settings = _settings()
    removed = _in_database(data_dir, database_url, lambda db: clean(db, **retention(settings)))
    _say(f"removed {removed.keys} idempotency keys and {removed.audit_events} events of the audit")


audit = typer.Typer(help="Prove that nobody has changed the audit, in the service's database.", no_args_is_help=True)
app.add_typer(audit, name="audit")


@audit.command("head")
def audit_head(data_dir: _DataDir = None, database_url: _DatabaseUrl = None) -> None:
    """Print the head of the audit's chain. Keep it elsewhere: `verify --head` proves later that nothing was changed."""
    from frontdesk.jobs.verification import head

    _say(str(_in_database(data_dir, database_url, head)))


@audit.command("verify")
def audit_verify(
    head: Annotated[
        str | None, typer.Option(metavar="HEAD", help="What `frontdesk audit head` printed before.")
    ] = None,
    data_dir: _DataDir = None,
    database_url: _DatabaseUrl = None,
) -> None:
    """Check that no event of the audit was changed, removed or inserted; status 1 names the first one that was."""
    from frontdesk.jobs.verification import Head, Tampered, verify

    try:
        known = None if head is None else Head.parse(head)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="'--head'") from None
    try:
        found = _in_database(data_dir, database_url, lambda db: verify(db, known))
    except Tampered as error:
        raise Failure(str(error)) from None
    _say(f"nothing was changed up to {found}")


events = typer.Typer(help="Events, and the relays that send them to message brokers.", no_args_is_help=True)
app.add_typer(events, name="events")


@events.command("tail")
def tail_events(
    target: _Target = None,
    types: Annotated[
        str, typer.Option(metavar="TYPE,…", help="Only these types, such as appointment.booked. Default: all.")
    ] = "",
    from_start: Annotated[bool, typer.Option("--from-start", help="Begin with the oldest event that is kept.")] = False,
    cursor: Annotated[str, typer.Option(metavar="CURSOR", help="Go on after this cursor of an event.")] = "",
    api_key: _ApiKey = None,
) -> None:
    """Print events as they happen, a line each, until Ctrl-C, which ends with status 130."""
    import asyncio

    wanted = {"types": [one for one in types.split(",") if one], "from_start": from_start, "cursor": cursor}
    target = _target(target)
    try:
        with _refusals(target), _terminal() as terminal:
            asyncio.run(_tail(target, _client_settings(api_key), terminal, wanted))
    except KeyboardInterrupt:
        _discard_output()
        raise typer.Exit(130) from None


async def _tail(target: str, connection: dict[str, Any], terminal: "Terminal", wanted: dict[str, Any]) -> None:
    from frontdesk.client import FrontdeskClient
    from frontdesk.tools.events import tail

    async with FrontdeskClient(target, **connection, caller="frontdesk-events") as client:
        await tail(client, terminal, **wanted)


@events.command("relay")
def set_relay(
    name: Annotated[str, typer.Argument(metavar="NAME", help="nats, or kafka/TOPIC.")],
    begin: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="start|now|CURSOR",
            help="What it sends next: the oldest event,"
            " only what happens from now on, or what follows a cursor of EventService.",
        ),
    ],
    data_dir: _DataDir = None,
    database_url: _DatabaseUrl = None,
) -> None:
    """Set where a relay goes on, whether it is at work or not. What it sends again has the same ids."""
    from frontdesk.core.event import EVERYTHING, Cursor, Events
    from frontdesk.db.database import Database
    from frontdesk.errors import InvalidField
    from frontdesk.jobs.relaying import set_position

    if not re.fullmatch("nats|kafka/[a-zA-Z0-9._-]{1,249}", name):
        raise typer.BadParameter("is neither nats nor kafka/TOPIC.", param_hint="'NAME'")
    try:
        cursor = None if begin in ("start", "now") else Cursor.decode(begin)
    except InvalidField:
        raise typer.BadParameter("is neither start, nor now, nor a cursor.", param_hint="'--from'") from None
    keep_seconds = _settings().keep_log_days * 86400

    async def move(db: Database) -> None:
        log = Events(db, keep_seconds=keep_seconds)
        place = cursor or await (log.now() if begin == "now" else log.start())
        if cursor is not None:
            # Refuses one that is too old, or of another log.
            await log.read(place, EVERYTHING, 1, rows=1, resumes=True)
        await set_position(db, name, place.position)

    _in_database(data_dir, database_url, move)
    _say(f"{name} goes on from there")


@events.command("dead")
def dead_events(data_dir: _DataDir = None, database_url: _DatabaseUrl = None) -> None:
    """List the events that a broker has refused for good: relay, id, type, resource and the broker's reason."""
    from frontdesk.jobs.relaying import refused_events

    _say(*(" ".join(columns) for columns in _in_database(data_dir, database_url, refused_events)))


@events.command("redrive")
def redrive_events(data_dir: _DataDir = None, database_url: _DatabaseUrl = None) -> None:
    """Send once more, late, what brokers have refused; each relay does so within seconds while it is at work."""
    from frontdesk.jobs.relaying import redrive

    _say(f"{_in_database(data_dir, database_url, redrive)} events are sent again")


@contextmanager
def _terminal() -> Iterator["Terminal"]:
    """Standard output, for what a command shows. A reader that has gone, like `head`, ends the command quietly."""
    from frontdesk.tools.terminal import Terminal

    try:
        yield Terminal()
    except BrokenPipeError:
        _discard_output()
    except OSError as error:
        _discard_output()
        raise Failure(error.strerror or str(error)) from None


@app.command()
def demo(target: _Target = None, api_key: _ApiKey = None) -> None:
    """Fill a running service with a small clinic and its day; a second run adds nothing."""
    import datetime

    from rich.table import Table

    from frontdesk.client import SyncFrontdeskClient
    from frontdesk.tools.demo import CALLER, fill

    target = _target(target)
    with _refusals(target), SyncFrontdeskClient(target, **_client_settings(api_key), caller=CALLER) as client:
        days = fill(client, datetime.datetime.now(datetime.UTC))
    table = Table("Doctor", "Id", "Name", "Here", "Expected", box=None)
    for day in days:
        here, expected = str(len(day.queue.entries)), str(day.queue.expected_count)
        table.add_row(day.doctor.code, day.doctor.id, day.doctor.display_name, here, expected)
    with _terminal() as terminal:
        # Not narrower than this, so that the ids can be copied.
        terminal.width = max(terminal.width, 90)
        terminal.print(table)
        for day in days:
            if day.slots_on is not None:
                terminal.print(f" {day.doctor.code} takes patients by slot, on {day.slots_on}", highlight=False)


@app.command()
def watch(
    doctor: Annotated[str, typer.Option(metavar="ID|CODE", help="The doctor of the queue.")],
    target: _Target = None,
    date: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="Default: the clinic's today.")] = None,
    board: Annotated[bool, typer.Option("--board", help="Show tickets without names, for a waiting room.")] = False,
    api_key: _ApiKey = None,
) -> int:
    """Show a doctor's queue live; a line of text for each update if the output is not a terminal."""
    import asyncio
    import datetime

    day = None
    if date is not None:
        try:
            day = datetime.date.fromisoformat(date)
        except ValueError:
            raise typer.BadParameter(f"{date!r} is not a date like 2026-01-31.", param_hint="'--date'") from None
    target = _target(target)
    try:
        with _refusals(target), _terminal() as terminal:
            asyncio.run(_watch(target, _client_settings(api_key), doctor, day, terminal, names=not board))
    except KeyboardInterrupt:
        # The usual end of a watch.
        _discard_output()
    return 0


async def _watch(
    target: str,
    connection: dict[str, Any],
    doctor: str,
    day: "datetime.date | None",
    terminal: "Terminal",
    *,
    names: bool,
) -> None:
    from frontdesk.client import FrontdeskClient
    from frontdesk.tools.board import UnknownDoctor, follow

    async with FrontdeskClient(target, **connection, caller="frontdesk-watch") as client:
        try:
            await follow(client, doctor, day, terminal, names=names)
        except UnknownDoctor as error:
            raise Failure(str(error)) from None


@app.command()
def conformance(
    target: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="The service; the clinic and the people that this creates stay there."),
    ],
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this check; may be repeated.")] = None,
    patience: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for a message.")] = 5.0,
    api_key: _ApiKey = None,
) -> int:
    """Check a service against the contract of WatchQueue, through its API alone; status 0 if no check fails."""
    import asyncio

    from frontdesk.tools.conformance import CHECKS

    for name in only or ():
        if name not in CHECKS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(CHECKS)}.", param_hint="'--only'")
    if not 0 < patience <= 86_400:
        raise typer.BadParameter(f"{patience} is not between 0 and 86,400.", param_hint="'--patience'")
    with _refusals(target):
        return asyncio.run(_conform(target, _client_settings(api_key), only or [], patience))


async def _conform(target: str, connection: dict[str, Any], only: list[str], patience: float) -> int:
    from frontdesk.tools.conformance import conform, report

    results = []
    with _terminal() as terminal:
        # rich shows the status on a terminal only; this spinner is one in ASCII.
        with terminal.status("checking", spinner="line") as status:
            async for result in conform(target, **connection, only=only, patience=patience):
                results.append(result)
                status.update(f"{result.check.name}: {result.verdict}")
        # Not narrower than this, so that the names can be copied.
        terminal.width = max(terminal.width, 120)
        terminal.print(report(results))
    return 1 if any(result.verdict == "FAIL" for result in results) else 0


@app.command()
def health(target: _Target = None) -> int:
    """Ask the service's gRPC health: exit status 0 if it serves, else 1. For a container's health check."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from frontdesk.client.channel import sync_channel

    settings = _settings()
    connection: dict[str, Any] = {}
    if target is None and settings.health_address is not None and settings.health_address.port:
        # It speaks no TLS.
        target, tls = str(settings.health_address.local), None
    else:
        target, tls, connection = _target(target), _tls(settings), _connection(settings)
    with sync_channel(target, options=(), **connection) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check
            answer, call = check.with_call(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError as error:
            code = cast(Any, error).code()
            if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Failure(f"{target} answers {code.name}, and not with its health") from None
            raise Failure(_nobody_answers(target, tls)) from None
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    access = dict(call.trailing_metadata()).get("frontdesk-access", "")
    _say(f"{status} (access: {access})" if access else status)
    return 0 if status == "SERVING" else 1


admin = typer.Typer(help="Manage the users who manage the others.", no_args_is_help=True)
app.add_typer(admin, name="admin")


@admin.command("create")
def create_admin(
    email: Annotated[str, typer.Option(metavar="E-MAIL", help="With which the administrator logs in.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="The administrator's name.")] = "",
    data_dir: _DataDir = None,
    database_url: _DatabaseUrl = None,
) -> None:
    """Create an administrator of all clinics, and print a one-time password, which is good for 24 h."""
    import re

    from frontdesk.core.access import Users
    from frontdesk.core.caller import OPERATOR
    from frontdesk.core.password import Passwords
    from frontdesk.db.change import Key

    if len(email) > 254 or not re.fullmatch(r"[^@\s]+@[^@\s]+", email) or not email.isprintable():
        raise typer.BadParameter("is not an e-mail address.", param_hint="'--email'")
    if len(name) > 200 or not name.isprintable():
        raise typer.BadParameter("is longer than 200 characters, or not on one line.", param_hint="'--name'")
    values = {"email": email, "name": name, "roles": ["ADMIN"], "doctor_id": None, "clinic_ids": []}
    key = Key(OPERATOR.identity, "CreateUser")
    made = _in_database(data_dir, database_url, lambda db: Users(db, Passwords()).create(OPERATOR, values, key=key))
    _say(made.result.one_time_password)


keys = typer.Typer(help="Manage API keys, in the database of a service that runs or does not.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Option(metavar="NAME", help="Tells people which program has the key.")],
    role: Annotated[list[str], typer.Option(metavar="ROLE", help="SERVICE, STAFF, BOARD or ADMIN; may be repeated.")],
    clinic: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A clinic where the roles hold; default: all clinics.")
    ] = None,
    days: Annotated[float | None, typer.Option(metavar="DAYS", help="How long it is valid; default: for ever.")] = None,
    requests_per_minute: Annotated[int, typer.Option(metavar="N", help="Its limit of calls, 1 to 100,000.")] = 100,
    data_dir: _DataDir = None,
    database_url: _DatabaseUrl = None,
) -> None:
    """Create an API key and print it. This is the only time: the service keeps a hash of it."""
    import datetime
    import uuid

    from frontdesk.core.access import KEY_ROLES, ApiKeys
    from frontdesk.core.caller import OPERATOR
    from frontdesk.db.change import Key

    for given in role:
        if given not in KEY_ROLES:
            raise typer.BadParameter(f"{given!r} is none of {', '.join(KEY_ROLES)}.", param_hint="'--role'")
    for given in clinic or ():
        try:
            uuid.UUID(given)
        except ValueError:
            raise typer.BadParameter(f"{given!r} is not an id.", param_hint="'--clinic'") from None
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise typer.BadParameter("is not a name of 1 to 200 characters.", param_hint="'--name'")
    if not 1 <= requests_per_minute <= 100_000:
        raise typer.BadParameter("is not between 1 and 100,000.", param_hint="'--requests-per-minute'")
    if days is not None and not 0 < days <= 36_600:
        raise typer.BadParameter("is not between 0 and 36,600.", param_hint="'--days'")
    values = {
        "name": name,
        "roles": sorted(set(role)),
        "clinic_ids": sorted({given.lower() for given in clinic or ()}),
        "expire_time": days and datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days),
        "requests_per_minute": requests_per_minute,
    }
    key = Key(OPERATOR.identity, "CreateApiKey")
    made = _in_database(data_dir, database_url, lambda db: ApiKeys(db).create(OPERATOR, values, key=key))
    _say(made.result.credentials)


@keys.command("list")
def list_keys(data_dir: _DataDir = None, database_url: _DatabaseUrl = None) -> None:
    """List the API keys, without their secrets."""
    from rich.table import Table

    from frontdesk.core.access import ApiKey, ApiKeys
    from frontdesk.core.caller import OPERATOR
    from frontdesk.db.database import Database
    from frontdesk.db.paging import Page

    async def every(db: Database) -> list[ApiKey]:
        found: list[ApiKey] = []
        page = Page(100)
        while True:
            listing = await ApiKeys(db).list(OPERATOR, page, active_only=False)
            found += listing.items
            if listing.next is None:
                return found
            page = Page(100, listing.next)

    table = Table("Id", "Name", "Roles", "Clinics", "Expires", "Revoked", box=None)
    for one in _in_database(data_dir, database_url, every):
        expires, revoked = (
            time.isoformat(" ", "minutes") if time else "" for time in (one.expire_time, one.revoke_time)
        )
        table.add_row(one.id, one.name, " ".join(one.roles), " ".join(one.clinic_ids) or "all", expires, revoked)
    with _terminal() as terminal:
        # Not narrower than this, so that the ids can be copied.
        terminal.width = max(terminal.width, 120)
        terminal.print(table)


@keys.command("revoke")
def revoke_key(
    api_key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, from `frontdesk keys list`.")],
    data_dir: _DataDir = None,
    database_url: _DatabaseUrl = None,
) -> None:
    """Revoke an API key for good; a running service refuses it within 5 s."""
    import uuid

    from frontdesk.core.access import ApiKeys
    from frontdesk.core.caller import OPERATOR
    from frontdesk.db.change import Key

    try:
        known = str(uuid.UUID(api_key_id))
    except ValueError:
        raise typer.BadParameter(f"{api_key_id!r} is not an id.", param_hint="'ID'") from None
    key = Key(OPERATOR.identity, "RevokeApiKey")
    _in_database(data_dir, database_url, lambda db: ApiKeys(db).revoke(OPERATOR, known, key=key))
    _say(f"revoked {known}")


def _in_database(data_dir: str | None, database_url: str | None, work: Callable[["Database"], Awaitable[T]]) -> T:
    """Do the work in the service's database, whether the service runs or not."""
    import asyncio

    from frontdesk.db.database import Database
    from frontdesk.errors import Refused
    from frontdesk.process.log import configure_log

    settings = _database_settings(data_dir=data_dir, database_url=database_url)
    configure_log(settings.log_level)

    async def once(conninfo: str) -> T:
        db = Database(conninfo, pool_size=1, pooled=settings.pooler == "transaction")
        await db.open()
        try:
            return await work(db)
        finally:
            await db.close()

    try:
        if settings.database_url is not None:
            _check_database(settings.database_url, settings)
            return asyncio.run(once(settings.database_url))
        from frontdesk.process.postgres import EmbeddedError, joined

        try:
            with joined(settings.embedded_dir) as (conninfo, started):
                if started:
                    _migrate(conninfo, settings)
                return asyncio.run(once(conninfo))
        except EmbeddedError as error:
            raise Failure(str(error)) from None
    except Refused as error:
        raise Failure(str(error)) from None


def _client_settings(api_key: str | None) -> dict[str, Any]:
    """The arguments of a client for a connection as the environment asks for, with credentials."""
    settings = _settings(api_key=api_key)
    return {**_connection(settings), "api_key": settings.api_key}


def _connection(settings: "Settings") -> dict[str, Any]:
    """The arguments of a client for a connection as the settings ask for: with TLS, or in plain text."""
    if settings.client_ca is None:
        return {}
    import grpc

    own = [path.read_bytes() if path else None for path in (settings.client_key, settings.client_cert)]
    credentials = grpc.ssl_channel_credentials(settings.client_ca.read_bytes(), *own)
    return {"credentials": credentials, "server_name": settings.client_server_name}


def _tls(settings: "Settings") -> "Tls | None":
    from frontdesk.tools.diagnosis import Tls

    if settings.client_ca is None:
        return None
    return Tls(settings.client_ca, settings.client_cert, settings.client_key, settings.client_server_name)


def _nobody_answers(target: str, tls: "Tls | None") -> str:
    """One line, with the cause if it can be found out."""
    from frontdesk.settings.addresses import parse
    from frontdesk.tools.diagnosis import why

    cause = ""
    # Other forms of targets are gRPC's own business.
    with suppress(ValueError):
        address = parse(target)
        cause = why(address.host, address.port, address.path, tls)
    return f"no frontdesk answers at {target}" + (f": {cause}" if cause else "")


@contextmanager
def _refusals(target: str) -> Iterator[None]:
    from frontdesk.client import FrontdeskError

    try:
        yield
    except FrontdeskError as error:
        if error.code.name == "UNAVAILABLE" and not error.reason:
            raise Failure(_nobody_answers(target, _tls(_settings()))) from error
        raise Failure(f"{target} answers {error}") from error


def _settings(**given: str | None) -> "Settings":
    from frontdesk.settings import Settings

    return Settings.load(**given)


def _database_settings(**given: str | None) -> "Settings":
    """The settings of a command that uses the database.

    libpq reads variables of its own. For the embedded PostgreSQL none of them is meant. With a URL, those for the
    address, for authentication, TLS and timeouts fill in what it does not say, and all others are dropped: they would
    lead to another server than the URL says, or change the session.
    """
    settings = _settings(**given)
    if settings.database_url is None:
        # Not later: without it, nothing can be done.
        _ = settings.embedded_dir
    for name in [name for name in os.environ if name.startswith("PG")]:
        if settings.database_url is None or name in _UNEXPECTED_WITH_URL:
            del os.environ[name]
    return settings


def _target(given: str | None) -> str:
    """The address of the service; by default that of a service on this machine with the same settings."""
    from frontdesk.settings import SettingsError
    from frontdesk.settings.addresses import parse

    if given:
        # gRPC has other forms of targets, each with a scheme.
        if re.match("(dns|ipv4|ipv6|unix-abstract|xds):", given):
            return given
        try:
            return str(parse(given))
        except ValueError as error:
            raise typer.BadParameter(f"{error}.", param_hint="'--target'") from None
    address = _settings().address.local
    if not address.path and address.port == 0:
        raise SettingsError("--target is needed: FRONTDESK_LISTEN has port 0, which is any free port")
    return str(address)


def _migrate(conninfo: str, settings: "Settings") -> str:
    """Migrate; one line that compares the schema with this release."""
    from frontdesk.db.migrate import SchemaError, migrate, newest
    from frontdesk.process.postgres import SERVICE

    try:
        number = migrate(
            conninfo,
            default_time_zone=settings.default_time_zone,
            service_role=SERVICE if settings.database_url is None else None,
        )
    except SchemaError as error:
        raise Failure(str(error)) from None
    if number > newest():
        return f"the schema, {number}, is that of a later release than this one, {newest()}, and stays as it is"
    return "the schema is up to date"


def _check_database(conninfo: str, settings: "Settings") -> None:
    from frontdesk.db.migrate import SchemaError, check_schema

    try:
        check_schema(conninfo, pooled=settings.pooler != "none")
    except SchemaError as error:
        raise Failure(str(error)) from None


def _warn_of_other_zones(conninfo: str) -> None:
    import psycopg

    from frontdesk.db.zones import warn_of_other_rules

    # The service starts without the comparison too.
    with suppress(psycopg.Error):
        warn_of_other_rules(conninfo)


def _module() -> list[str]:
    return [sys.executable, "-m", "frontdesk.cli"]


def _this_command() -> str:
    """The command line that calls this command again in the same way."""
    called = sys.argv[0]
    if not os.access(called, os.X_OK):
        return shlex.join(_module())
    return _command(Path(called).name)


def _command(name: str) -> str:
    """The shortest command line for a program that is installed beside this one, or else its bare name."""
    beside = Path(sys.argv[0]).absolute().parent / name
    on_path = shutil.which(name)
    if not beside.exists() or (on_path is not None and Path(on_path).exists() and beside.samefile(on_path)):
        return name
    relative = os.path.relpath(beside)
    if os.sep not in relative:
        relative = os.path.join(os.curdir, relative)
    return shlex.quote(min(str(beside), relative, key=len))


def _raise_file_limit() -> None:
    """Allow as many open files as this user may have. Raises Failure if that is fewer than gRPC needs, which aborts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < _FEWEST_FILES:
        raise Failure(f"the limit of {hard} open files is too low: see `ulimit -n`")


def _hold_standard_files() -> None:
    """Open /dev/null in place of each standard file that is closed.

    The next file or connection would get its number otherwise, and be written to by whoever writes to a standard file.
    """
    closed = []
    # Writing to standard error still fails, so that the log can count the lines that are lost.
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            # It gets the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, flags), True)
            closed.append(number)
    for number in closed:
        name, mode = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))[number]
        setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def _flush_output() -> None:
    """Write what is left now, because Python's own attempt at the end would print a traceback."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """Discard all further output, so that writing it cannot fail after the reader has gone."""
    if sys.stdout is not None:
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    main()
