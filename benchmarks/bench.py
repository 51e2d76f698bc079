"""Measure the service against the physical floor: `python -m benchmarks.bench [--quick] [--only PARTS] [--json FILE]`.

Everything runs on this machine at once, clients included, so times of day and of neighbours show in the numbers. The
ratios are made of one run, in which what is compared took turns.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks import booking, lists, watching
from benchmarks.stage import Stage

PARTS = ("booking", "watch", "lists")


def main() -> int:
    """Run the parts, print their tables, write the JSON; the exit status is 1 when a call failed."""
    parser = argparse.ArgumentParser(description="Measure the service against the physical floor.")
    parser.add_argument("--quick", action="store_true", help="fewer calls, and 100,000 appointments for a million")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS)}")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where the numbers go")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only: no such part: {', '.join(sorted(unknown))}")

    console = Console(width=None if sys.stdout.isatty() else 150)
    started = time.perf_counter()
    found: dict[str, Any] = {
        "quick": arguments.quick,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "psycopg": psycopg.__version__,
    }
    with Stage() as stage, console.status("start PostgreSQL") as status:
        for part in parts:
            run, show = _RUNS[part]
            found[part] = run(stage, arguments.quick, lambda text: status.update(text))
            show(console, found[part])
    found["seconds"] = time.perf_counter() - started
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{found['seconds']:.0f} s; written to {arguments.json}")
    failures = _failures(found)
    for failure in failures:
        console.print(f"[red]{failure}")
    return 1 if failures else 0


def _booking(stage: Stage, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    return booking.measure(stage, calls=600 if quick else 1_500, rounds=1 if quick else 3, progress=progress)


def _watch(stage: Stage, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    idle = [1_000] if quick else [1_000, 5_000]
    scenes = watching.QUICK_SCENES if quick else watching.SCENES
    return watching.measure(stage, scenes=scenes, seconds=3.0 if quick else 8.0, idle=idle, progress=progress)


def _lists(stage: Stage, quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    return lists.measure(stage, few=10_000, many=100_000 if quick else 1_000_000, progress=progress)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        table.add_column(column, justify="right" if n else "left")
    return table


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.2f}"


def _show_booking(console: Console, found: dict[str, Any]) -> None:
    for in_flight in booking.IN_FLIGHT:
        table = _table(
            f"Calls, {in_flight} in flight",
            "call", "server µs", "PostgreSQL µs", "together µs", "of floor", "calls/s", "p50 ms", "p99 ms",
            "client cores", "failed",
        )  # fmt: skip
        costs = [cost for cost in found["costs"] if cost["in_flight"] == in_flight]
        floor = next(cost["cpu_us"] for cost in costs if cost["name"] == booking.FLOOR)
        for cost in costs:
            table.add_row(
                cost["name"], f"{cost['server_us']:.0f}", f"{cost['postgres_us']:.0f}", f"{cost['cpu_us']:.0f}",
                f"{cost['cpu_us'] / floor:.2f}", f"{cost['calls_per_second']:.0f}", f"{cost['p50_ms']:.1f}",
                f"{cost['p99_ms']:.1f}", f"{cost['client_cores']:.2f}", str(sum(cost["refused"].values())),
            )  # fmt: skip
        console.print(table)
    table = _table("pgbench -M prepared, without gRPC", "function", "PostgreSQL µs", "calls/s", "failed")
    for name, cost in found["pgbench"].items():
        table.add_row(name, f"{cost['postgres_us']:.0f}", f"{cost['calls_per_second']:.0f}", str(cost["failed"]))
    console.print(table)
    table = _table("Ratios of CPU a call, server and PostgreSQL together", "ratio", *map(str, booking.IN_FLIGHT))
    for name, ratios in found["ratios"].items():
        table.add_row(name, *(f"{ratios[n]:.2f}" for n in booking.IN_FLIGHT))
    console.print(table)


def _show_watch(console: Console, found: dict[str, Any]) -> None:
    table = _table(
        "WatchQueue: from a change to its receipt",
        "watchers", "doctor-days", "changes/s", "messages/s", "p50 ms", "p99 ms", "worst ms", "server cores",
        "PostgreSQL cores", "client cores", "missed",
    )  # fmt: skip
    for scene in found["scenes"]:
        table.add_row(
            f"{scene['watchers']:,}", str(scene["days"]), f"{scene['changes_per_second']:.0f}",
            f"{scene['messages_per_second']:.0f}", f"{scene['p50_ms']:.1f}", f"{scene['p99_ms']:.1f}",
            f"{scene['worst_ms']:.1f}", f"{scene['server_cores']:.2f}", f"{scene['postgres_cores']:.2f}",
            " ".join(f"{cores:.2f}" for cores in scene["client_cores"]), str(scene["missed"]),
        )  # fmt: skip
    console.print(table)
    table = _table("Idle streams", "streams", "doctor-days", "KiB a stream", "server MiB", "server cores", "PG cores")
    for one in found["memory"]:
        table.add_row(
            f"{one['streams']:,}", str(one["doctor_days"]), f"{one['kib_a_stream']:.1f}", f"{one['server_mib']:.0f}",
            f"{one['server_cores']:.2f}", f"{one['postgres_cores']:.2f}",
        )  # fmt: skip
    console.print(table)


def _show_lists(console: Console, found: dict[str, Any]) -> None:
    few, many = f"{found['few']:,}", f"{found['many']:,}"
    table = _table(
        f"Lists, pages of {found['page']}: ms a call with {few} and {many} appointments",
        "list", few, many, "ratio", f"SQL {few}", f"SQL {many}", "rows", f"plan at {many}",
    )  # fmt: skip
    table.columns[-1].justify = "left"
    for shape in found["shapes"]:
        one, other = shape["few"], shape["many"]
        table.add_row(
            shape["name"], _number(one["ms"]), _number(other["ms"]), _number(shape["ratio"]),
            _number(one["execution_ms"]), _number(other["execution_ms"]), f"{one['rows']}, {other['rows']}",
            other["plan"],
        )  # fmt: skip
    console.print(table)


_RUNS: dict[
    str,
    tuple[
        Callable[[Stage, bool, Callable[[str], None]], dict[str, Any]],
        Callable[[Console, dict[str, Any]], None],
    ],
] = {"booking": (_booking, _show_booking), "watch": (_watch, _show_watch), "lists": (_lists, _show_lists)}


def _failures(found: dict[str, Any]) -> list[str]:
    """What went wrong, in words; a number that is only bad is not among it."""
    failures = []
    for cost in found.get("booking", {}).get("costs", ()):
        if cost["refused"]:
            failures.append(f"{cost['name']}, {cost['in_flight']} in flight: {cost['refused']}")
    for scene in found.get("watch", {}).get("scenes", ()):
        name = f"{scene['watchers']} watchers on {scene['days']} doctor-days"
        if scene["refused"]:
            failures.append(f"{name}: {scene['refused']}")
        if scene["missed"] or scene["ended"]:
            failures.append(f"{name}: {scene['missed']} changes missed, {scene['ended']} streams ended")
    for shape in found.get("lists", {}).get("shapes", ()):
        for size in ("few", "many"):
            if refused := shape[size]["refused"]:
                failures.append(f"list {shape['name']}, {found['lists'][size]:,} appointments: {refused}")
    return failures


if __name__ == "__main__":
    raise SystemExit(main())
