"""The promises of the architecture that a program can check."""

import ast
import importlib
from pathlib import Path

import psycopg
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from clinic.frontdesk.v1 import appointment_pb2, error_reason_pb2, queue_pb2, schedule_pb2
from frontdesk.db.schema import VISIT_AND_QUEUE, metadata
from frontdesk.db.session import MARKER
from frontdesk.errors import REFUSALS
from frontdesk.rpc.access import Policy
from frontdesk.rpc.status import code_of

SOURCE = Path(__file__).parent.parent / "src" / "frontdesk"
WIRE = {"grpc", "grpc_status", "grpc_health", "grpc_reflection", "clinic", "buf", "google"}

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "tasks": {"errors"},
    "settings": set(),
    "db": {"errors", "tasks"},
    "core": {"errors", "tasks", "db"},
    "live": {"errors", "tasks", "db", "core"},
    "jobs": {"errors", "tasks", "db", "core", "settings"},
    "channels": {"core", "settings"},
    "rpc": {"errors", "tasks", "db", "core", "live", "settings"},
    "process": {"errors", "tasks", "db", "core", "live", "jobs", "channels", "rpc", "settings"},
    "client": set(),
    "tools": {"client"},
    "cli": {"errors", "db", "core", "jobs", "process", "client", "tools", "settings"},
}
"""The packages and modules directly below frontdesk, with those that each may import."""

MAY_SPEAK_GRPC = {"rpc", "client", "tools", "cli"}
PROTOS = Path(__file__).parent.parent / "protos" / "clinic" / "frontdesk" / "v1"


def imports(path: Path) -> set[str]:
    """The modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    """The package or module directly below frontdesk that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_only_the_edge_speaks_grpc() -> None:
    """The core does not know gRPC or generated code: only rpc/, the clients and the commands do."""
    for path in SOURCE.rglob("*.py"):
        if room(path) not in MAY_SPEAK_GRPC:
            spoken = {name.partition(".")[0] for name in imports(path)} & WIRE
            assert not spoken, f"{path} imports {spoken}"


def test_imports_point_inwards() -> None:
    """Each package imports only the packages in its entry, so no two packages import each other."""
    for path in SOURCE.rglob("*.py"):
        if path.parent == SOURCE and path.name == "__init__.py":
            continue
        known = {name.split(".")[1] for name in imports(path) if name.startswith("frontdesk.")}
        extra = known - MAY_IMPORT[room(path)] - {room(path)}
        assert not extra, f"{path} imports {extra}"


def test_one_noun_is_one_name() -> None:
    """A service has one name: `x.proto`, `rpc/services/x.py`, which translates, and `core/x.py`, which decides."""
    services = {path.stem for path in PROTOS.glob("*.proto") if "\nservice " in path.read_text()}
    assert services
    assert services == {path.stem for path in (SOURCE / "rpc" / "services").glob("*.py")} - {"__init__"}
    assert services <= {path.stem for path in (SOURCE / "core").glob("*.py")}


def test_every_method_says_who_may_call_it() -> None:
    """Each RPC has a policy: some role may call it, or it needs no credentials."""
    for path in PROTOS.glob("*.proto"):
        module = importlib.import_module(f"clinic.frontdesk.v1.{path.stem}_pb2")
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                policy = Policy(method)
                assert policy.scopes or policy.without_credentials, method.full_name


def test_only_settings_and_cli_read_the_environment() -> None:
    """All other modules get their settings from their callers."""
    for path in SOURCE.rglob("*.py"):
        if room(path) not in {"cli", "settings"}:
            text = path.read_text()
            assert "os.environ" not in text, path
            assert "getenv" not in text, path
            assert "sys.argv" not in text, path


def test_migrations_make_the_schema(conninfo: str) -> None:
    """The tables of the core's statements equal the tables that the migrations make."""
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection, opts={"version_table": MARKER}), metadata) == []
    engine.dispose()


def test_every_constraint_has_a_name(conninfo: str) -> None:
    """Every constraint has a name that we chose, because code and logs refer to it."""
    with psycopg.connect(conninfo) as connection:
        named = {
            str(name)
            for (name,) in connection.execute(
                "select conname from pg_constraint where connamespace = 'public'::regnamespace and contype <> 'n'"
            )
        }
    known = {
        str(constraint.name)
        for table in metadata.tables.values()
        for constraint in table.constraints
        if constraint.name
    }
    assert named - {f"{MARKER}_pkc"} == known


def test_transitions_lead_to_the_allowed_states(conninfo: str) -> None:
    """The one table of transitions and the constraint on the rows name the same states, and its verbs are RPCs."""
    with psycopg.connect(conninfo) as connection:
        rows = connection.execute("select verb, state, queue_states, new_state, new_queue_state from transitions()")
        table = rows.fetchall()
    assert {"BOOKED/"} | {f"{state}/{queue}" for *_, state, queue in table} == set(VISIT_AND_QUEUE)
    assert {f"{state}/{queue}" for _, state, queues, *_ in table for queue in queues} <= set(VISIT_AND_QUEUE)
    services = (appointment_pb2.DESCRIPTOR, queue_pb2.DESCRIPTOR, schedule_pb2.DESCRIPTOR)
    methods = {m.name for file in services for service in file.services_by_name.values() for m in service.methods}
    assert {verb for verb, *_ in table} <= methods


def test_every_reason_has_a_code() -> None:
    """The public list of reasons, the core's refusals and the table of codes are one list."""
    public = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    assert public == set(REFUSALS) | {"UNSPECIFIED", "INTERNAL"}
    for refusal in REFUSALS.values():
        assert code_of(refusal)
        assert refusal.__doc__
