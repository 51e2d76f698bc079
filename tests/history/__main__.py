"""`python -m tests.history --seed N --minutes M`: play with the service and break it, then judge the history."""

import argparse
import sys

from tests.history.harness import FAULTS, ODD_FAULTS, Plan, play

parser = argparse.ArgumentParser(prog="python -m tests.history", description=__doc__)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--minutes", type=float, default=1.0)
parser.add_argument("--clients", type=int, default=24)
parser.add_argument("--faults", default=",".join(FAULTS), help=f"separated by commas; also {ODD_FAULTS}")
given = parser.parse_args()
faults = [kind for kind in given.faults.split(",") if kind]
report = play(Plan(seed=given.seed, seconds=given.minutes * 60, clients=given.clients, faults=faults))
print(report)
sys.exit(1 if report.violations else 0)
