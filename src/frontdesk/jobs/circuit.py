"""When to try something outside again: a mail server, a broker, a store."""

import random
import time
from collections.abc import Callable

_FIRST_SECONDS, _LONGEST_SECONDS = 1.0, 30.0


class Circuit:
    """Stops trying what is away, and probes it: after 1 s, then after doubled pauses up to 30 s.

    One thing that is refused says nothing about the next one. Call `failed` when the other side cannot be reached or
    answers nothing, and `worked` when it has answered, be it with a refusal.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pause = 0.0
        self._due = 0.0

    @property
    def open(self) -> bool:
        """Whether the last try failed: then the next one is a probe, and everything else waits for it."""
        return self._pause > 0

    @property
    def wait_seconds(self) -> float:
        """Seconds until the next try; 0 if it may be made now."""
        return max(0.0, self._due - self._clock()) if self.open else 0.0

    def failed(self) -> None:
        """A try failed."""
        self._pause = min(2 * self._pause, _LONGEST_SECONDS) or _FIRST_SECONDS
        self._due = self._clock() + self._pause * random.uniform(0.7, 1.0)

    def worked(self) -> None:
        """The other side has answered."""
        self._pause = 0.0


def retry_seconds(attempts: int) -> float:
    """The pause before the next attempt at one thing, after so many: within 5 s at first, at most 10 minutes."""
    return min(4.0 * 2.0 ** (attempts - 1), 600.0) * random.uniform(0.7, 1.0)
