"""The architecture's promises that a program can keep."""

import ast
from pathlib import Path

import psycopg
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from clinic.frontdesk.v1 import error_reason_pb2
from frontdesk.db.schema import metadata
from frontdesk.errors import REFUSALS
from frontdesk.rpc.status import code_of

SOURCE = Path(__file__).parent.parent / "src" / "frontdesk"
WIRE = {"grpc", "grpc_status", "grpc_health", "grpc_reflection", "clinic", "buf", "google"}
MAY_SPEAK_GRPC = {"app.py", "client.py", "demo.py", "board.py", "cli.py", "conformance.py"}


def imports(path: Path) -> set[str]:
    """The modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_the_edge_speaks_grpc() -> None:
    """The core knows nothing of gRPC or generated code: only rpc/, the composition root and the client do."""
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE)
        if place.parts[0] == "rpc" or place.name in MAY_SPEAK_GRPC:
            continue
        spoken = {name.partition(".")[0] for name in imports(path)} & WIRE
        assert not spoken, f"{place} imports {spoken}"


def test_the_core_does_not_look_outwards() -> None:
    """rpc -> domain -> db: nothing imports against the direction, and db knows no noun of the clinic."""
    nouns = {"appointments", "clinics", "doctors", "patients", "queues", "slots", "feed", "rpc", "app"}
    for path in SOURCE.rglob("*.py"):
        place = path.relative_to(SOURCE)
        inner = {name.split(".")[1] for name in imports(path) if name.startswith("frontdesk.")}
        if place.parts[0] == "db":
            assert not inner & nouns, f"{place} imports {inner & nouns}"
        elif place.parts[0] != "rpc" and place.name not in MAY_SPEAK_GRPC:
            assert not inner & {"rpc", "app"}, f"{place} imports {inner}"


def test_only_settings_and_cli_read_the_environment() -> None:
    """Everything else is told what it needs."""
    for path in SOURCE.rglob("*.py"):
        if path.name not in {"cli.py", "settings.py"}:
            text = path.read_text()
            assert "os.environ" not in text, path
            assert "getenv" not in text, path
            assert "sys.argv" not in text, path


def test_migrations_make_the_schema(conninfo: str) -> None:
    """The tables that the core is written with are the tables that the migrations make."""
    engine = sa.create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(conninfo))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_every_constraint_has_a_name(conninfo: str) -> None:
    """Code and logs refer to constraints by name; PostgreSQL's invented names are nobody's choice."""
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
    assert named - {"alembic_version_pkc"} == known


def test_every_reason_has_a_code() -> None:
    """The public list of reasons, the core's refusals and the table of codes are the same list."""
    public = {name.removeprefix("ERROR_REASON_") for name in error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    assert public == set(REFUSALS) | {"UNSPECIFIED", "INTERNAL"}
    for refusal in REFUSALS.values():
        assert code_of(refusal)
        assert refusal.__doc__
