"""A Node service, as most are written: @grpc/proto-loader reads the protos, @grpc/grpc-js calls."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clinic.frontdesk.v1 import error_reason_pb2
from tests.clinic import Front

HERE = Path(__file__).parent / "node"
ROOT = Path(__file__).parents[1]
PROTOS = ROOT / "protos"
SERVICE_CONFIG = ROOT / "src" / "frontdesk" / "client" / "service_config.json"


def run(program: str, *arguments: str | Path) -> str:
    """What the program prints."""
    done = subprocess.run([program, *arguments], cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def node() -> str:
    """Node, with the locked packages beside the program."""
    program, npm = shutil.which("node"), shutil.which("npm")
    if program is None or npm is None:
        pytest.skip("npm is not installed")
    # npm writes it at the end of an installation.
    done, lock = HERE / "node_modules" / ".package-lock.json", HERE / "package-lock.json"
    if not done.exists() or done.stat().st_mtime < lock.stat().st_mtime:
        run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund")
    return program


@pytest.fixture
async def day(node: str, front: Front) -> dict[str, Any]:
    """What the Node client saw of its day."""
    printed = await asyncio.to_thread(run, node, "day.mjs", f"127.0.0.1:{front.port}", PROTOS, SERVICE_CONFIG)
    seen: dict[str, Any] = json.loads(printed)
    return seen


async def test_a_day_from_node(day: dict[str, Any], front: Front) -> None:
    """A Node client registers, books, checks in, calls, starts and completes, with the answers that others get."""
    assert day["patient"]["phone"] == "+5511987654321"
    assert day["patient"]["familyName"] == "Łukasz"
    assert (day["booked"]["appointment"]["number"], day["booked"]["replayed"]) == (1, False)
    assert (day["again"]["appointment"]["id"], day["again"]["replayed"]) == (day["booked"]["appointment"]["id"], True)
    assert (day["arrived"]["entry"]["ticket"], day["arrived"]["entry"]["patientName"]) == (1, "Lia Łukasz")
    assert (day["called"]["entry"]["state"], day["called"]["entry"]["room"]) == ("STATE_CALLED", "2")
    assert day["started"]["appointment"]["state"] == "STATE_IN_CONSULTATION"
    assert day["completed"]["appointment"]["state"] == "STATE_COMPLETED"
    queue = await front.queue(day["doctor"]["id"])
    assert str(queue.revision) == day["completed"]["revision"] == "6"


async def test_refusals_in_node(day: dict[str, Any]) -> None:
    """A refusal reaches Node with its status, its reason, the domain and the ids."""
    duplicate = day["duplicate"]
    assert (duplicate["code"], duplicate["reason"]) == ("ALREADY_EXISTS", "DUPLICATE_BOOKING")
    assert duplicate["domain"] == "frontdesk.clinic"
    assert duplicate["metadata"]["appointment_id"] == day["booked"]["appointment"]["id"]
    assert (day["empty"]["code"], day["empty"]["reason"]) == ("FAILED_PRECONDITION", "QUEUE_EMPTY")
    assert (day["invalid"]["code"], day["invalid"]["reason"]) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert day["reasons"] == [*error_reason_pb2.ErrorReason.keys()]


async def test_a_watch_from_node(day: dict[str, Any]) -> None:
    """A Node client's WatchQueue begins with the whole queue, and tells every change once, in order."""
    first, *later = day["watched"]
    assert (first["event"], first["revision"], first["previousRevision"]) == ("update", "1", "0")
    assert first["resumeToken"]
    changes = [change for message in later if message["update"] for change in message["update"]["changes"]]
    assert [(change["revision"], change["kind"]) for change in changes] == [
        ("2", "KIND_BOOKED"),
        ("3", "KIND_CHECKED_IN"),
        ("4", "KIND_CALLED"),
        ("5", "KIND_STARTED"),
        ("6", "KIND_COMPLETED"),
    ]
    assert all(int(message["previousRevision"]) <= int(message["revision"]) for message in later)
