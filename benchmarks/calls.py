"""Measure unary calls: their CPU and time, and the bytes that PostgreSQL reads and writes for them."""

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message

from benchmarks.load import Loaded
from benchmarks.stage import Child, Meter, Metered, Stage


@dataclass
class Kind:
    """One kind of call: its server, its method and its n-th request."""

    name: str
    server: Metered
    port: int
    method: str
    request: Callable[[int], Message]
    made: int = 0
    credentials: Sequence[str] = ()
    """API keys or access tokens, which the calls use in turns; without any, the calls have no credentials."""

    def next(self, count: int) -> list[bytes]:
        """The next requests. No request is made twice."""
        self.made += count
        return [self.request(n).SerializeToString() for n in range(self.made - count, self.made)]


@dataclass
class Spent:
    """The cost of a number of calls: elapsed seconds, CPU seconds of each party, and bytes that PostgreSQL read and
    wrote.
    """

    calls: int = 0
    seconds: float = 0.0
    server: float = 0.0
    postgres: float = 0.0
    """CPU of all its processes."""
    background: float = 0.0
    """CPU of those of its processes that serve no connection: checkpointer, writers, vacuum."""
    clients: float = 0.0
    """CPU of all clients. If it nears `seconds` per client, the clients are the bottleneck."""
    read: int = 0
    """Bytes read from files: pages that were not in the shared buffers."""
    written: int = 0
    """Bytes written to files: the write-ahead log, and pages evicted from the shared buffers."""
    latencies: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, more: "Spent") -> None:
        """Add the calls of another run."""
        for name in ("calls", "seconds", "server", "postgres", "background", "clients", "read", "written"):
            setattr(self, name, getattr(self, name) + getattr(more, name))
        self.latencies += more.latencies
        self.refused += more.refused


def spend(
    stage: Stage, clients: Sequence[Child], kind: Kind, calls: int, in_flight: int, *, connections: int = 1,
    rate: float = 0.0,
) -> Spent:  # fmt: skip
    """Make the next calls of a kind, shared out among the clients. `in_flight` and `connections` count over all
    clients.

    With a `rate`, the clients send that many calls a second, each at its time, however many are in flight.
    """
    requests = kind.next(calls)
    share = len(clients)
    for n, client in enumerate(clients):
        client.ask(
            kind.port,
            kind.method,
            requests[n::share],
            in_flight // share,
            max(1, connections // share),
            rate / share,
            kind.credentials,
        )
    meter = Meter(stage, kind.server, clients)
    background, (read, written) = stage.background, stage.traffic
    for client in clients:
        client.pipe.send(("go",))
    loads: list[Loaded] = [client.receive() for client in clients]
    server, postgres, own = meter.read()
    background, now = stage.background - background, stage.traffic
    return Spent(
        calls, max(load.seconds for load in loads), server, postgres, background, sum(own), now[0] - read,
        now[1] - written, [latency for load in loads for latency in load.latencies],
        sum((Counter(load.refused) for load in loads), Counter()),
    )  # fmt: skip


def percentiles(values: Sequence[float], *ranks: int) -> list[float]:
    """The percentiles of these ranks; NaN if there are no values."""
    if len(values) < 2:
        return [values[0] if values else float("nan")] * len(ranks)
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return [cuts[rank - 1] for rank in ranks]
