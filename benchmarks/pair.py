"""`python -m benchmarks.pair DIRECTORY`: compare this checkout with another one, call by call, in turns.

Each checkout runs in its own process, with its own PostgreSQL, server and load client. They take turns with every kind
of call, so that a noisy moment affects both. The table shows the CPU per call (server and PostgreSQL) and the ratio of
the medians, this checkout to the other.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

HERE = Path(__file__).parent.parent


class Checkout:
    """One checkout's side of the comparison: `serve` in a process that imports everything from this checkout."""

    def __init__(self, directory: Path, calls: int) -> None:
        paths = [str(directory / part) for part in ("src", "generated", ".")]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(calls), str(directory)],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: str) -> Any:
        """Send one line, and return one line of JSON."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(question + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process and all processes that it started."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def serve(calls: int) -> None:
    """Prepare; then answer `kinds`, and answer `KIND IN_FLIGHT CALLS` with the cost of these calls."""
    # From the compared checkout, not from that of this file.
    sys.path.pop(0)
    from benchmarks import booking, floor, people
    from benchmarks.load import unary_client
    from benchmarks.stage import Child, ServerProcess, Stage

    zone = people.noon_zone()
    day = people.today(zone)
    with Stage() as stage, ExitStack() as stack:
        doctors = max(10, calls // 10)
        bare = booking._prepared(stage, "floor", zone, day, calls, doctors)
        real = booking._prepared(stage, "real", zone, day, calls, doctors)
        floor_server = stack.enter_context(ServerProcess(floor.serve, bare, booking.CONNECTIONS))
        server = stack.enter_context(stage.serve(real, log_level="info", pool_size=booking.CONNECTIONS))
        client = stack.enter_context(Child(unary_client))
        kinds = list(booking._kinds(floor_server, server, day, doctors))
        for line in sys.stdin:
            if line.strip() == "kinds":
                answer: Any = [kind.name for kind in kinds]
            else:
                number, in_flight, count = map(int, line.split())
                cost = booking._run(stage, client, kinds[number], count, in_flight)
                answer = {"server": cost.server_us, "postgres": cost.postgres_us, "refused": dict(cost.refused)}
            print(json.dumps(answer), flush=True)


def main() -> int:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pair", description=__doc__)
    parser.add_argument("directory", type=Path, help="the other checkout")
    parser.add_argument("--calls", type=int, default=400, help="calls of one turn")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each checkout with each kind of call")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve)
        return 0
    in_flights = (16, 64)
    total = len(in_flights) * (asked.rounds + 1) * asked.calls
    with ExitStack() as stack:
        sides = [Checkout(HERE, total), Checkout(asked.directory.resolve(), total)]
        for side in sides:
            stack.callback(side.close)
        kinds, others = (side.ask("kinds") for side in sides)
        table = Table("call", "in flight", "this, µs", "other, µs", "ratio", "quartiles of the ratio", "refused")
        with Progress(console=Console(stderr=True)) as progress:
            shared = [kind for kind in kinds if kind in others]
            bar = progress.add_task("compare", total=len(shared) * len(in_flights) * (asked.rounds + 1))
            for in_flight in in_flights:
                for name in shared:
                    costs: list[list[float]] = [[], []]
                    refused = 0
                    for turn in range(asked.rounds + 1):
                        for side, known, found in zip(sides, (kinds, others), costs, strict=True):
                            cost = side.ask(f"{known.index(name)} {in_flight} {asked.calls}")
                            refused += sum(cost["refused"].values())
                            if turn:  # the first one warms up
                                found.append(cost["server"] + cost["postgres"])
                        progress.advance(bar)
                    low, _, high = statistics.quantiles([a / b for a, b in zip(*costs, strict=True)], n=4)
                    mine, theirs = map(statistics.median, costs)
                    cells = (f"{mine:.0f}", f"{theirs:.0f}", f"{mine / theirs:.3f}", f"{low:.2f} to {high:.2f}")
                    table.add_row(name, str(in_flight), *cells, str(refused))
        Console(width=140).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
