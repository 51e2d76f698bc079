"""`python -m tests.history --seed N --minutes M`: play with the service and break it, then judge the history.

Prints what was asked, what became of it, what was broken, and each violation by the shortest history that shows it.
The exit status is 1 where there is one. Two cores do about 500 operations a second: 35 minutes make a million.
"""

import argparse
import sys

from tests.history.harness import FAULTS, ODD_FAULTS, Plan, play


def main() -> int:
    """Play as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.history", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=Plan.clients)
    parser.add_argument("--faults", default=",".join(FAULTS), help=f"separated by commas; also {', '.join(ODD_FAULTS)}")
    given = parser.parse_args()
    faults = [kind for kind in given.faults.split(",") if kind]
    if unknown := set(faults) - {*FAULTS, *ODD_FAULTS}:
        parser.error(f"no such faults: {', '.join(sorted(unknown))}")
    report = play(Plan(seed=given.seed, seconds=given.minutes * 60, clients=given.clients, faults=faults))
    print(report)
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
