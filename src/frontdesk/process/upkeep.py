"""What the supervisor counts of its children, for the page of metrics."""

from dataclasses import dataclass


@dataclass
class Upkeep:
    """What the page of metrics tells of the supervisor's children."""

    workers: int
    """Configured workers."""
    workers_serving: int = 0
    worker_restarts: int = 0
    postgresql_restarts: int = 0
