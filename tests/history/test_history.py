"""A short play of the harness, with every kind of fault; `python -m tests.history` plays longer ones."""

from tests.history.harness import Plan, play


def test_what_breaks_breaks_no_promise() -> None:
    """Whatever is killed, cut, slowed or lost, the history stays one that the rules allow."""
    report = play(Plan(seed=20301106, seconds=25, clients=16))
    assert not report.violations, str(report)
    assert report.outcomes["OK"] > 200
    assert len(report.faults) >= 8
