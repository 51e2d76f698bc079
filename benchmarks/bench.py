"""Measure the service against the physical floor: `python -m benchmarks.bench [--quick] [--only PARTS] [--json FILE]`.

Service, PostgreSQL and clients share this machine, so other load on it shows in the numbers. Every ratio compares
figures of one run, in which the compared calls took turns.
"""

import argparse
from argparse import Namespace
from collections.abc import Iterator
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks import access, booking, events, lists, neighbours, report, watching
from benchmarks.report import Part, Progress, table
from benchmarks.stage import Stage


def main() -> int:
    """Measure. The exit status is 1 if a call failed."""
    parser = argparse.ArgumentParser(description="Measure the service against the physical floor.")
    parser.add_argument(
        "--quick", action="store_true", help="make fewer calls, and load 100,000 appointments in place of a million"
    )
    return report.main(parser, _PARTS, "bench.json")


def _booking(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    quick = arguments.quick
    return booking.measure(stage, calls=600 if quick else 1_500, rounds=1 if quick else 3, progress=progress)


def _access(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    quick = arguments.quick
    return access.measure(stage, calls=400, rounds=3 if quick else 15, progress=progress)


def _neighbours(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    return neighbours.measure(stage, seconds=8.0, rounds=2 if arguments.quick else 5, progress=progress)


def _watch(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    quick = arguments.quick
    idle = [1_000] if quick else [1_000, 5_000]
    scenes = watching.QUICK_SCENES if quick else watching.SCENES
    return watching.measure(stage, scenes=scenes, seconds=3.0 if quick else 8.0, idle=idle, progress=progress)


def _lists(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    return lists.measure(stage, few=10_000, many=100_000 if arguments.quick else 1_000_000, progress=progress)


def _events(stage: Stage, arguments: Namespace, progress: Progress) -> dict[str, Any]:
    quick = arguments.quick
    return events.measure(
        stage, events=100_000 if quick else 1_000_000, seconds=4.0 if quick else 15.0, readers=100 if quick else 500,
        rounds=1 if quick else 3, progress=progress,
    )  # fmt: skip


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:.2f}"


def _show_booking(console: Console, found: dict[str, Any]) -> None:
    for in_flight in booking.IN_FLIGHT:
        shown = table(
            f"Calls, {in_flight} in flight",
            "call", "server µs", "PostgreSQL µs", "together µs", "of floor", "calls/s", "p50 ms", "p99 ms",
            "client cores", "failed",
        )  # fmt: skip
        costs = [cost for cost in found["costs"] if cost["in_flight"] == in_flight]
        floor = next(cost["cpu_us"] for cost in costs if cost["name"] == booking.FLOOR)
        for cost in costs:
            shown.add_row(
                cost["name"], f"{cost['server_us']:.0f}", f"{cost['postgres_us']:.0f}", f"{cost['cpu_us']:.0f}",
                f"{cost['cpu_us'] / floor:.2f}", f"{cost['calls_per_second']:.0f}", f"{cost['p50_ms']:.1f}",
                f"{cost['p99_ms']:.1f}", f"{cost['client_cores']:.2f}", str(sum(cost["refused"].values())),
            )  # fmt: skip
        console.print(shown)
    shown = table("pgbench -M prepared, without gRPC", "function", "PostgreSQL µs", "calls/s", "failed")
    for name, cost in found["pgbench"].items():
        shown.add_row(name, f"{cost['postgres_us']:.0f}", f"{cost['calls_per_second']:.0f}", str(cost["failed"]))
    console.print(shown)
    half = found["half_rate"]
    shown = table(
        f"At half of the highest rate, {half['calls_per_second']:.0f} calls a second at even intervals: ms per round,"
        f" {sum(half['refused'].values())} failed",
        "call", "p50", "p99", "median p99",
    )  # fmt: skip
    for name, rounds in half["p50_and_p99_ms"].items():
        p50, p99 = ([ranks[n] for ranks in rounds] for n in (0, 1))
        shown.add_row(name, *(" ".join(f"{ms:.1f}" for ms in each) for each in (p50, p99)), f"{median(p99):.1f}")
    console.print(shown)
    shown = table("CPU per call (server and PostgreSQL together), as a ratio", "ratio", *map(str, booking.IN_FLIGHT))
    for name, ratios in found["ratios"].items():
        shown.add_row(name, *(f"{ratios[n]:.2f}" for n in booking.IN_FLIGHT))
    console.print(shown)


def _show_access(console: Console, found: dict[str, Any]) -> None:
    shown = table(
        "Calls with credentials, of the same calls in the mode open: CPU of server and PostgreSQL",
        "call", "in flight", "open µs", "token µs", "of open", "API key µs", "of open", "failed",
    )  # fmt: skip
    for row in found["calls"]:
        us = row["cpu_us"]
        shown.add_row(
            row["name"], str(row["in_flight"]), f"{us['open']:.0f}", f"{us['token']:.0f}",
            f"{us['token'] / us['open']:.2f}", f"{us['key']:.0f}", f"{us['key'] / us['open']:.2f}",
            str(sum(row["refused"].values())),
        )  # fmt: skip
    console.print(shown)


def _show_neighbours(console: Console, found: dict[str, Any]) -> None:
    shown = table(
        f"GetAppointment, {neighbours.RATE:.0f} a second, alone and beside a neighbour: ms",
        "neighbour", "alone p50", "p99", "beside p50", "p99", "p99 of alone", "failed", "the neighbour's calls",
    )  # fmt: skip
    shown.columns[-1].justify = "left"
    for row in found["neighbours"]:
        times = (f"{ms:.1f}" for ms in (*row["quiet_ms"], *row["beside_ms"]))
        outcomes = ", ".join(f"{name} {count:,}" for name, count in row["outcomes"].items())
        shown.add_row(row["name"], *times, f"{row['ratio']:.2f}", str(sum(row["refused"].values())), outcomes)
    console.print(shown)


def _show_watch(console: Console, found: dict[str, Any]) -> None:
    shown = table(
        "WatchQueue: from a change to its receipt",
        "watchers", "doctor-days", "changes/s", "messages/s", "p50 ms", "p99 ms", "worst ms", "server cores",
        "PostgreSQL cores", "client cores", "missed",
    )  # fmt: skip
    for scene in found["scenes"]:
        shown.add_row(
            f"{scene['watchers']:,}", str(scene["days"]), f"{scene['changes_per_second']:.0f}",
            f"{scene['messages_per_second']:.0f}", f"{scene['p50_ms']:.1f}", f"{scene['p99_ms']:.1f}",
            f"{scene['worst_ms']:.1f}", f"{scene['server_cores']:.2f}", f"{scene['postgres_cores']:.2f}",
            " ".join(f"{cores:.2f}" for cores in scene["client_cores"]), str(scene["missed"]),
        )  # fmt: skip
    console.print(shown)
    shown = table("Idle streams", "streams", "doctor-days", "KiB per stream", "server MiB", "server cores", "PG cores")
    for one in found["memory"]:
        shown.add_row(
            f"{one['streams']:,}", str(one["doctor_days"]), f"{one['kib_a_stream']:.1f}", f"{one['server_mib']:.0f}",
            f"{one['server_cores']:.2f}", f"{one['postgres_cores']:.2f}",
        )  # fmt: skip
    console.print(shown)


def _show_lists(console: Console, found: dict[str, Any]) -> None:
    few, many = f"{found['few']:,}", f"{found['many']:,}"
    shown = table(
        f"Lists, pages of {found['page']}: ms per call with {few} and {many} appointments",
        "list", few, many, "ratio", f"SQL {few}", f"SQL {many}", "rows", f"plan at {many}",
    )  # fmt: skip
    shown.columns[-1].justify = "left"
    for shape in found["shapes"]:
        one, other = shape["few"], shape["many"]
        shown.add_row(
            shape["name"], _number(one["ms"]), _number(other["ms"]), _number(shape["ratio"]),
            _number(one["execution_ms"]), _number(other["execution_ms"]), f"{one['rows']}, {other['rows']}",
            other["plan"],
        )  # fmt: skip
    console.print(shown)


def _show_events(console: Console, found: dict[str, Any]) -> None:
    shown = table(
        "WatchEvents: from a change to its receipt",
        "readers", "changes/s", "messages", "p50 ms", "p99 ms", "worst ms", "server cores", "PostgreSQL cores",
        "client cores", "wrong",
    )  # fmt: skip
    for row in found["followed"]:
        shown.add_row(
            str(row["readers"]), f"{row['changes_per_second']:.0f}", f"{row['messages']:,}", f"{row['p50_ms']:.0f}",
            f"{row['p99_ms']:.0f}", f"{row['worst_ms']:.0f}", f"{row['server_cores']:.2f}",
            f"{row['postgres_cores']:.2f}", f"{row['client_cores']:.2f}", str(row["wrong"]),
        )  # fmt: skip
    console.print(shown)
    shown = table(
        f"{found['events']:,} events from the oldest on", "how", "events/s", "server µs", "PostgreSQL µs", "client µs"
    )
    for row in found["read"]:
        shown.add_row(
            row["name"], f"{row['per_second']:,.0f}", f"{row['server_us']:.1f}", f"{row['postgres_us']:.1f}",
            f"{row['client_us']:.1f}",
        )  # fmt: skip
    console.print(shown)
    shown = table("100 bookings a second, alone and beside such a reader", "", "p50 ms", "p99 ms", "events/s")
    for name, (p50, p99) in found["beside"]["p50_and_p99_ms"].items():
        rates = " ".join(f"{rate:,.0f}" for rate in found["beside"]["per_second"].get(name, ()))
        shown.add_row(name, f"{p50:.2f}", f"{p99:.2f}", rates)
    console.print(shown)
    shown = table("CPU of a booking by FRONTDESK_BACKGROUND: service and PostgreSQL, µs", "", "each round", "median")
    for name, rounds in found["background"]["cpu_us"].items():
        shown.add_row(name, " ".join(f"{us:.0f}" for us in rounds), f"{median(rounds):.0f}")
    console.print(shown)


def _event_failures(found: dict[str, Any]) -> Iterator[str]:
    for row in found["followed"]:
        if row["wrong"]:
            yield f"{row['wrong']} of {row['readers']} readers were told something else than the others"
    for part in ("beside", "background"):
        if found[part]["refused"]:
            yield f"bookings ({part}): {found[part]['refused']} failed"


def _booking_failures(found: dict[str, Any]) -> Iterator[str]:
    for cost in found["costs"]:
        if cost["refused"]:
            yield f"{cost['name']}, {cost['in_flight']} in flight: {cost['refused']}"


def _access_failures(found: dict[str, Any]) -> Iterator[str]:
    for row in found["calls"]:
        if row["refused"]:
            yield f"{row['name']}, {row['in_flight']} in flight: {row['refused']}"


def _neighbour_failures(found: dict[str, Any]) -> Iterator[str]:
    for row in found["neighbours"]:
        if row["refused"]:
            yield f"beside the {row['name']}: {row['refused']}"
        if row["ratio"] > neighbours.MOST_RATIO:
            yield f"beside the {row['name']} the p99 is {row['ratio']:.2f} times that of alone"


def _watch_failures(found: dict[str, Any]) -> Iterator[str]:
    for scene in found["scenes"]:
        name = f"{scene['watchers']} watchers on {scene['days']} doctor-days"
        if scene["refused"]:
            yield f"{name}: {scene['refused']}"
        if scene["missed"] or scene["ended"]:
            yield f"{name}: {scene['missed']} changes missed, {scene['ended']} streams ended"


def _list_failures(found: dict[str, Any]) -> Iterator[str]:
    for shape in found["shapes"]:
        for size in ("few", "many"):
            if refused := shape[size]["refused"]:
                yield f"list {shape['name']}, {found[size]:,} appointments: {refused}"


_PARTS = {
    "booking": Part(_booking, _show_booking, _booking_failures),
    "access": Part(_access, _show_access, _access_failures),
    "neighbours": Part(_neighbours, _show_neighbours, _neighbour_failures),
    "watch": Part(_watch, _show_watch, _watch_failures),
    "events": Part(_events, _show_events, _event_failures),
    "lists": Part(_lists, _show_lists, _list_failures),
}


if __name__ == "__main__":
    raise SystemExit(main())
