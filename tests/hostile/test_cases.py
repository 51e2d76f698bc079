"""The table of cases in this package's docstring is correct."""

import re
from pathlib import Path

import tests.hostile


def test_every_case_has_its_tests() -> None:
    """Each of the fifty cases names tests, and each named test exists."""
    folder = Path(__file__).parent
    existing = {
        name
        for file in folder.glob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)\(", file.read_text(), re.MULTILINE)
    }
    table = (tests.hostile.__doc__ or "").partition("\n\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^ ?(\d+) [^:]+:((?:\s+test_\w+)+)$", table, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 51))
    named = [name for _, names in rows for name in names.split()]
    assert not set(named) - existing
