"""Check a running service against the contract's WatchQueue, through the API alone.

    async for result in conform("127.0.0.1:50051"):
        print(result.check.name, result.verdict)

For any server of the contract. Each run creates a clinic, doctors and patients of its own, and leaves them there, since
nothing deletes them. Each check is a function in `checks`, and a failed check does not end the run.

The clinic is in a time zone where it is daytime now, because all changes of a check have to fall on one date there. So
the clocks of the two machines may differ by some hours, not more.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

import grpc
from rich.table import Table
from rich.text import Text

from frontdesk.client import FrontdeskError
from frontdesk.client.channel import Options, aio_channel
from frontdesk.tools.conformance.checks import CHECKS, Check
from frontdesk.tools.conformance.expect import Mismatch, Skipped
from frontdesk.tools.conformance.harness import Desk

__all__ = ["CHECKS", "DEFAULT_PATIENCE", "Check", "Result", "Verdict", "conform", "report"]

DEFAULT_PATIENCE = 5.0
"""Seconds that a check waits for a message."""

Verdict = Literal["PASS", "FAIL", "SKIPPED"]


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one check."""

    check: Check
    verdict: Verdict
    detail: str
    """The expected and the seen, or why the check was skipped; empty if it passed."""
    seconds: float


async def conform(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    server_name: str | None = None,
    api_key: str | None = None,
    only: Sequence[str] = (),
    patience: float = DEFAULT_PATIENCE,
) -> AsyncGenerator[Result]:
    """Run all checks, or `only` those with these names, one after another, and yield the result of each.

    `api_key` is one of an administrator of all clinics, if the service requires credentials. `patience` is how many
    seconds a check waits for a message. Raises KeyError for an unknown name, FrontdeskError if the service cannot be
    reached at all.
    """
    chosen = [CHECKS[name] for name in only] or list(CHECKS.values())

    def connect(options: Options) -> grpc.aio.Channel:
        # Without gRPC's pool of connections, so that a second channel has a second connection.
        own = [*options, ("grpc.use_local_subchannel_pool", 1)]
        return aio_channel(target, credentials, own, server_name=server_name)

    desk = Desk(connect, patience, api_key)
    async with desk.channel:
        try:
            await desk.open()
        except grpc.aio.AioRpcError as error:
            raise FrontdeskError.of(error) from error
        for check in chosen:
            yield await _judge(check, desk)


async def _judge(check: Check, desk: Desk) -> Result:
    verdict: Verdict = "FAIL"
    detail = ""
    started = time.perf_counter()
    try:
        await check.run(desk)
        verdict = "PASS"
    except Skipped as why:
        verdict, detail = "SKIPPED", str(why)
    except Mismatch as mismatch:
        detail = str(mismatch)
    except grpc.aio.AioRpcError as error:
        detail = f"expected success, seen {FrontdeskError.of(error)}"
    except Exception as error:
        # An answer of a shape that the check did not foresee is the server's fault too, and the run goes on.
        detail = f"expected an answer of the contract, seen another one: {type(error).__name__}: {error}"
    return Result(check, verdict, detail, time.perf_counter() - started)


def report(results: Sequence[Result]) -> Table:
    """The results as a table, with the number of each verdict below."""
    counts = [f"{sum(one.verdict == verdict for one in results)} {verdict}" for verdict in ("PASS", "FAIL", "SKIPPED")]
    table = Table(header_style="bold", caption=", ".join(counts), caption_justify="left")
    for heading in ("Rule", "Check", "Result"):
        table.add_column(heading, no_wrap=heading != "Rule")
    table.add_column("Fact; expected and seen", ratio=1, overflow="fold")
    table.add_column("Seconds", justify="right")
    styles = {"PASS": "green", "FAIL": "bold red", "SKIPPED": "dim"}
    for one in results:
        # As text, because the words of a server are not markup.
        text = Text(one.check.fact, "dim")
        if one.detail:
            text.append(f"\n{one.detail}", "not dim")
        table.add_row(
            one.check.rule, one.check.name, Text(one.verdict, styles[one.verdict]), text, f"{one.seconds:.2f}"
        )
    return table
