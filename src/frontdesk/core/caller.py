"""Who calls. Every method of the core takes this first, reads too."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """The identity behind a call, which the log and the scope of idempotency keys name."""

    identity: str


ANONYMOUS = Caller("anonymous")
