"""Shared by the measuring commands: parts that run one after another on a stage, their tables, and the JSON file."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psycopg
from rich.console import Console
from rich.table import Table

from benchmarks.stage import Stage

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """One part of a command: its run, its tables, and its failures as sentences. A poor figure is not a failure."""

    run: Callable[[Stage, argparse.Namespace, Progress], dict[str, Any]]
    show: Callable[[Console, dict[str, Any]], None]
    failures: Callable[[dict[str, Any]], Iterator[str]]


def main(parser: argparse.ArgumentParser, parts: dict[str, Part], json_file: str) -> int:
    """Run the chosen parts, print their tables and write the JSON. The exit status is 1 if a call failed."""
    parser.add_argument("--only", default=",".join(parts), help=f"the parts to run, of {','.join(parts)}")
    parser.add_argument("--json", type=Path, default=Path(json_file), help="the file for the numbers")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if unknown := set(wanted) - set(parts):
        parser.error(f"--only: unknown part: {', '.join(sorted(unknown))}")

    console = Console(width=None if sys.stdout.isatty() else 150)
    started = time.perf_counter()
    found: dict[str, Any] = {
        "quick": arguments.quick,
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "psycopg": psycopg.__version__,
    }
    failures: list[str] = []
    with Stage(getattr(arguments, "data", None)) as stage, console.status("start PostgreSQL") as status:
        for name in wanted:
            found[name] = parts[name].run(stage, arguments, status.update)
            parts[name].show(console, found[name])
            failures += parts[name].failures(found[name])
    found["seconds"] = time.perf_counter() - started
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"{found['seconds']:.0f} s; written to {arguments.json}")
    for failure in failures:
        console.print(f"[red]{failure}")
    return 1 if failures else 0


def table(title: str, *columns: str) -> Table:
    """An empty table. Its first column is text, the others are numbers."""
    made = Table(title=title, title_justify="left")
    for n, column in enumerate(columns):
        made.add_column(column, justify="right" if n else "left")
    return made
