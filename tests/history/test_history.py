"""A short run of the harness with every kind of fault. `python -m tests.history` makes longer ones."""

import pytest

from tests.history.harness import Plan, play

SEEDS = (20301106,)
"""One run per seed, of a minute and a half."""


@pytest.mark.parametrize("seed", SEEDS)
def test_what_breaks_breaks_no_promise(seed: int) -> None:
    """Processes are killed, connections cut, locks held, answers lost, rights taken away: every rule is still kept."""
    report = play(Plan(seed=seed, seconds=95, pause=(0.3, 2.0), access="required"))
    assert not report.violations, str(report)
    assert report.total["made"] > 1000, str(report)
    assert report.total["replayed"] > 20
    assert report.verdict.tally["bursts"] > 5
    assert report.verdict.changes > 500
    for method in ("AddWalkIn", "SetPriority", "TransferPatient", "UndoTransition"):
        assert report.verdict.methods[method]["made"] > 20, str(report)
    assert report.verdict.tally["leaves"] > 5, str(report)
    assert report.verdict.tally["GenerateSlots"] > 5, str(report)
    assert len(report.faults) >= 10
    assert report.outcomes["CREDENTIALS_INVALID"] > 20
    assert report.outcomes["CREDENTIALS_EXPIRED"] > 20
    assert report.verdict.probes > 500
    assert report.sealed > 1000
    assert report.metered["OK"] > 60
