"""`python -m tests.history --seed N --minutes M`: run clients while faults break the service, then check the history.

Prints the operations and their outcomes, the faults, and each violation with the shortest history that shows it. The
exit status is 1 if there is a violation. Two cores do about 500 operations a second, so a million take 35 minutes.
"""

import argparse
import sys

from tests.history.harness import FAULTS, ODD_FAULTS, Plan, play


def main() -> int:
    """Run the harness with the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.history", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=Plan.clients)
    parser.add_argument("--access", choices=("required", "open"), default="required")
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"separated by commas; also {', '.join(ODD_FAULTS)}")
    given = parser.parse_args()
    faults = [kind for kind in given.faults.split(",") if kind]
    if unknown := set(faults) - {*FAULTS, *ODD_FAULTS}:
        parser.error(f"unknown faults: {', '.join(sorted(unknown))}")
    plan = Plan(
        seed=given.seed, seconds=given.minutes * 60, clients=given.clients, faults=faults, access=given.access
    )  # fmt: skip
    report = play(plan)
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
