"""When a patient who waits will be called: the queue is played forward, at the doctor's own pace.

Pure: what is under way, who waits and the pace go in, and instants come out. `benchmarks/wait_estimate.py` measures how
good they are.
"""

import heapq
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property

RECENT_VISITS = 30
"""The pace of a doctor is that of so many of the latest completed consultations."""

_PLANNED_WEIGHT = 2.0
"""The planned length counts as much as so many consultations."""
_USUAL_SPREAD = 0.5
"""The standard deviation of a consultation's length, as a share of it, as long as too few are known."""
_ENOUGH_VISITS = 8
_LEAST_REST = 0.25
"""A consultation that lasts longer than any of late goes on for this share of the expected length."""
_EARLIER, _LATER = 1.4, 2.4
"""Standard deviations from the likely instant to the earliest and to the latest: a few visits last very long."""


@dataclass(frozen=True)
class Pace:
    """How long a doctor's consultations last."""

    recent: tuple[float, ...]
    """Seconds of the latest completed ones, RECENT_VISITS at most, in any order."""
    planned: float
    """Seconds of a consultation without a slot, if nothing else is known: `visit_length` of the clinic."""

    @cached_property
    def _median(self) -> float:
        """The median of the averages of each two (Hodges and Lehmann, 1963).

        Like the plain median it does not heed the odd very long consultation. But it is nearer to how long several last
        one after the other, which is more than their medians: lengths are skewed.
        """
        two = ((one + other) / 2 for n, one in enumerate(self.recent) for other in self.recent[n:])
        return statistics.median(two) if self.recent else 0.0

    @cached_property
    def spread(self) -> float:
        """The standard deviation of a consultation's length, as a share of it."""
        if len(self.recent) < _ENOUGH_VISITS or not self._median:
            return _USUAL_SPREAD
        lower, _, upper = statistics.quantiles(self.recent, n=4)
        # Of a normal distribution the quartiles are 1.35 standard deviations apart.
        return min(max((upper - lower) / 1.35 / self._median, 0.1), 1.0)

    @property
    def doubt(self) -> float:
        """How far off all the lengths may be together, as a share of them: few consultations tell little."""
        return self.spread / math.sqrt(len(self.recent) + _PLANNED_WEIGHT)

    def seconds(self, planned: float | None) -> float:
        """How long a consultation lasts for which `planned` seconds are planned, if any are."""
        return self._drawn(self._median, self.planned if planned is None else planned)

    def rest(self, planned: float | None, taken: float) -> float:
        """How long a consultation goes on that has taken so many seconds."""
        longer = [length for length in self.recent if length > taken]
        recent = statistics.median(longer) - taken if longer else _LEAST_REST * self._median
        towards = self.planned if planned is None else planned
        return self._drawn(recent, max(towards - taken, _LEAST_REST * towards))

    def _drawn(self, recent: float, planned: float) -> float:
        count = len(self.recent)
        return (count * recent + _PLANNED_WEIGHT * planned) / (count + _PLANNED_WEIGHT)


@dataclass(frozen=True, slots=True)
class Estimate:
    """When a patient will probably be called."""

    earliest: datetime
    likely: datetime
    latest: datetime


@dataclass(frozen=True, slots=True)
class Visit:
    """A consultation under way, or one to come."""

    planned: float | None = None
    """The length of its slot in seconds, if it has one."""
    began: datetime | None = None
    """Of one under way; None if the patient is called and has not come yet."""
    not_before: datetime | None = None
    """Of one to come: the start of its slot."""


def estimates(now: datetime, under_way: Sequence[Visit], waiting: Sequence[Visit], pace: Pace) -> list[Estimate]:
    """The estimate of each who waits, in calling order, and at the end that of who would be called after all of them.

    As many consultations go on at a time as are under way now, and at least one.
    """
    # When each consultation in use is free: seconds from now, and the variance of that.
    free = [_rest(now, visit, pace) for visit in under_way] or [(0.0, 0.0)]
    heapq.heapify(free)
    found = []
    for visit in [*waiting, Visit()]:
        seconds, variance = heapq.heappop(free)
        found.append(_estimate(now, seconds, variance + (seconds * pace.doubt) ** 2, visit.not_before))
        length = pace.seconds(visit.planned)
        heapq.heappush(free, (seconds + length, variance + (length * pace.spread) ** 2))
    return found


def _rest(now: datetime, visit: Visit, pace: Pace) -> tuple[float, float]:
    taken = 0.0 if visit.began is None else max(0.0, (now - visit.began).total_seconds())
    rest = pace.rest(visit.planned, taken)
    return rest, (pace.seconds(visit.planned) * pace.spread) ** 2


def _estimate(now: datetime, seconds: float, variance: float, not_before: datetime | None) -> Estimate:
    deviation = math.sqrt(variance)
    instants = [
        now + timedelta(seconds=max(0.0, value))
        for value in (seconds - _EARLIER * deviation, seconds, seconds + _LATER * deviation)
    ]
    if not_before is not None:
        instants = [max(instant, not_before) for instant in instants]
    return Estimate(*instants)
