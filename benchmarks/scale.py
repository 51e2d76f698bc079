"""Measure the service with much data and many clients: `python -m benchmarks.scale [--data DIR] [--sizes 1e4,1e6,1e7]
[--only PARTS]`.

Ten million appointments take 11 GB and minutes to load. `--data` keeps them for the next run, which first migrates
their schema. Clients, service and PostgreSQL share this machine: calls per second show the capacity of the machine, and
CPU per call shows the cost of a call.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import crowd, report, sizes
from benchmarks.crowd import Crowd
from benchmarks.report import Part, Progress, table
from benchmarks.stage import Stage

POINT_BAR, LIST_BAR = 1.2, 3.0
"""The limits of a call's CPU as a multiple of that in the smallest database. Lists have their limit only up to a
million appointments.
"""


def main() -> int:
    """Measure. The exit status is 1 if a call failed, a watcher missed a change, or a day was oversold."""
    parser = argparse.ArgumentParser(description="Measure the service with much data and many clients.")
    parser.add_argument(
        "--quick", action="store_true", help="10,000 and 100,000 appointments, 1,000 watchers, fewer calls"
    )
    parser.add_argument("--data", type=Path, help="keep PostgreSQL with its data in this directory for the next run")
    parser.add_argument("--sizes", type=_sizes, help="numbers of appointments (default 1e4,1e6,1e7)")
    parser.add_argument("--rounds", type=int, help="how many turns the databases of different sizes take")
    return report.main(parser, _PARTS, "scale.json")


def _sizes(text: str) -> list[int]:
    found = sorted(int(float(size)) for size in text.split(","))
    if found[0] < 10_000 or any(size % 10_000 for size in found):
        raise argparse.ArgumentTypeError("give multiples of ten thousand")
    return found


def _chosen(arguments: Namespace) -> list[int]:
    return arguments.sizes or ([10_000, 100_000] if arguments.quick else [10_000, 1_000_000, 10_000_000])


def _run_sizes(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    rounds = arguments.rounds or (2 if arguments.quick else 9)
    return sizes.measure(
        stage, sizes=_chosen(arguments), calls=150 if arguments.quick else 400, rounds=rounds, progress=progress
    )


def _run_workers(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    # A million appointments, or the largest size below.
    rows = max([size for size in _chosen(arguments) if size <= 1_000_000], default=_chosen(arguments)[0])
    quick = arguments.quick
    return crowd.workers(stage, rows=rows, calls=300 if quick else 2_000, rounds=1 if quick else 3, progress=progress)


def _run_watchers(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    crowds = [Crowd(1_000, 100)] if arguments.quick else [Crowd(10_000, 100), Crowd(10_000, 1)]
    return crowd.watchers(stage, crowds=crowds, seconds=3.0 if arguments.quick else 15.0, progress=progress)


def _run_hot(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    return crowd.hot(stage, rounds=1 if arguments.quick else 5, progress=progress)


def _show_sizes(console: Console, found: dict[str, Any]) -> None:
    few = found["sizes"][0]
    costs: dict[str, list[dict[str, Any]]] = {}
    for cost in found["costs"]:
        costs.setdefault(cost["name"], []).append(cost)
    said = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    space = ", ".join(f"{found['bytes'][rows] / 2**30:.1f}" for rows in found["sizes"])
    console.print(f"PostgreSQL: {said}; databases of {space} GiB")
    shown = table(
        f"CPU per call, {sizes.IN_FLIGHT} in flight: service + PostgreSQL in µs, and as a multiple of that with {few:,}"
        f" appointments (limit: {POINT_BAR}; for a list {LIST_BAR}, up to a million)",
        "call", *(f"{rows:,}" for rows in found["sizes"]), *(f"ratio {rows:,}" for rows in found["sizes"][1:]),
        "failed",
    )  # fmt: skip
    for name, of in costs.items():
        shown.add_row(
            name, *(f"{cost['server_us']:.0f} + {cost['postgres_us']:.0f}" for cost in of), *map(_ratio, of[1:]),
            str(sum(sum(cost["refused"].values()) for cost in of)),
        )  # fmt: skip
    console.print(shown)
    shown = table(
        "Per call: time, pages read that PostgreSQL's buffers lacked, KiB written, CPU of its background processes",
        "call", "p50 ms", "p99 ms", "pages read", "KiB written", "background µs",
    )  # fmt: skip
    for name, of in costs.items():
        shown.add_row(
            name,
            *(
                " ".join(f"{cost[figure]:{form}}" for cost in of)
                for figure, form in (
                    ("p50_ms", ".1f"), ("p99_ms", ".1f"), ("pages_read", ".1f"), ("written_kib", ".1f"),
                    ("background_us", ".0f"),
                )
            ),
        )  # fmt: skip
    console.print(shown)


def _ratio(cost: dict[str, Any]) -> str:
    bar = (LIST_BAR if cost["rows"] <= 1_000_000 else None) if cost["is_list"] else POINT_BAR
    text = f"{cost['ratio']:.2f}"
    return f"[red]{text}[/]" if bar is not None and cost["ratio"] >= bar else text


def _show_workers(console: Console, found: dict[str, Any]) -> None:
    shown = table(
        f"BookAppointment on many doctor-days with {found['rows']:,} appointments, {found['in_flight']} in flight,"
        " clients on the same cores",
        "workers", "calls/s", "server µs", "PostgreSQL µs", "p50 ms", "p99 ms", "client cores", "CPU by worker",
        "failed",
    )  # fmt: skip
    for cost in found["costs"]:
        total = sum(cost["worker_seconds"])
        shown.add_row(
            str(cost["workers"]), *_figures(cost),
            " ".join(f"{seconds / total:.0%}" for seconds in cost["worker_seconds"]),
            str(sum(cost["refused"].values())),
        )  # fmt: skip
    console.print(shown)


def _show_watchers(console: Console, found: dict[str, Any]) -> None:
    shown = table("Idle watchers", "", *(f"{one['watchers']:,}" for one in found["crowds"]))
    figures: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
        ("connections", lambda one: f"{one['connections']:,}"),
        ("doctor-days, workers", lambda one: f"{one['doctor_days']:,}, {one['workers']}"),
        ("s until all are connected", lambda one: f"{one['open_seconds']:.1f}"),
        ("KiB per stream in the workers, RSS", lambda one: f"{one['rss_kib']:.1f}"),
        ("KiB per stream in the workers, PSS", lambda one: f"{one['pss_kib']:.1f}"),
        ("MiB of each worker", lambda one: " ".join(f"{mib:.0f}" for mib in one["worker_mib"])),
        ("open files of each worker, limit", lambda one: f"{' '.join(map(str, one['files']))}, {one['file_limit']}"),
        ("idle: cores of the workers", lambda one: f"{one['server_cores']:.3f}"),
        ("idle: cores of PostgreSQL", lambda one: f"{one['postgres_cores']:.3f}"),
        ("idle: cores of the clients", lambda one: f"{one['client_cores']:.3f}"),
        ("streams that ended", lambda one: str(one["ended"])),
    )
    for label, say in figures:
        shown.add_row(label, *(say(one) for one in found["crowds"]))
    console.print(shown)
    shown = table(
        f"Bursts: changes at once, {crowd.IN_FLIGHT} in flight, each on its own watched doctor-day",
        "watchers, connections", "changes", "s to book", "s to all watchers", "CPU s server", "CPU s PostgreSQL",
        "receipts", "p50 ms", "p99 ms", "worst ms", "missed",
    )  # fmt: skip
    for one in found["crowds"]:
        for burst in one["bursts"]:
            shown.add_row(
                f"{one['watchers']:,}, {one['connections']:,}", f"{burst['changes']:,}",
                f"{burst['booking_seconds']:.2f}", f"{burst['seconds']:.1f}", f"{burst['server_seconds']:.2f}",
                f"{burst['postgres_seconds']:.2f}", f"{burst['receipts']:,}", f"{burst['p50_ms']:.0f}",
                f"{burst['p99_ms']:.0f}", f"{burst['worst_ms']:.0f}", str(burst["missed"]),
            )  # fmt: skip
    console.print(shown)


def _show_hot(console: Console, found: dict[str, Any]) -> None:
    shown = table(
        f"{found['places'] + found['too_many']:,} bookings, {found['in_flight']} in flight, on one doctor-day of"
        f" {found['places']:,} places and on many",
        "on", "calls/s", "server µs", "PostgreSQL µs", "p50 ms", "p99 ms", "client cores", "refused",
    )  # fmt: skip
    for cost in found["costs"]:
        shown.add_row(cost["name"], *_figures(cost), str(sum(cost["refused"].values())))
    console.print(shown)
    console.print(
        f"{found['rounds'] + 1} doctor-days sold {found['sold']:,} places; doctor-days without exactly"
        f" {found['places']:,} bookings, numbered 1 to {found['places']:,}: {len(found['wrong'])}"
    )


def _figures(cost: dict[str, Any]) -> list[str]:
    return [
        f"{cost['calls_per_second']:.0f}", f"{cost['server_us']:.0f}", f"{cost['postgres_us']:.0f}",
        f"{cost['p50_ms']:.1f}", f"{cost['p99_ms']:.1f}", f"{cost['client_cores']:.2f}",
    ]  # fmt: skip


def _size_failures(found: dict[str, Any]) -> Iterator[str]:
    for cost in found["costs"]:
        if cost["refused"]:
            yield f"{cost['name']}, {cost['rows']:,} appointments: {cost['refused']}"


def _worker_failures(found: dict[str, Any]) -> Iterator[str]:
    for cost in found["costs"]:
        if cost["refused"]:
            yield f"{cost['workers']} workers: {cost['refused']}"


def _watcher_failures(found: dict[str, Any]) -> Iterator[str]:
    for one in found["crowds"]:
        name = f"{one['watchers']:,} watchers on {one['connections']:,} connections"
        if one["ended"]:
            yield f"{name}: {one['ended']} streams ended"
        for burst in one["bursts"]:
            if burst["missed"] or burst["refused"]:
                yield f"{name}: {burst['missed']} changes missed, refused {burst['refused']}"


def _hot_failures(found: dict[str, Any]) -> Iterator[str]:
    one, many = found["costs"]
    if one["refused"] != {"DAY_FULL": found["rounds"] * found["too_many"]} or many["refused"]:
        yield f"one doctor-day: {one['refused']}; many: {many['refused']}"
    if found["wrong"] or found["sold"] != (found["rounds"] + 1) * found["places"]:
        yield f"the crowded doctor-days sold {found['sold']} places: {found['wrong']}"


_PARTS = {
    "sizes": Part(_run_sizes, _show_sizes, _size_failures),
    "workers": Part(_run_workers, _show_workers, _worker_failures),
    "watchers": Part(_run_watchers, _show_watchers, _watcher_failures),
    "hot": Part(_run_hot, _show_hot, _hot_failures),
}


if __name__ == "__main__":
    raise SystemExit(main())
