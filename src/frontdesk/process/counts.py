"""Counts of the supervisor's child processes, for the page of metrics."""

from dataclasses import dataclass


@dataclass
class ProcessCounts:
    """How many child processes there are, and how often the supervisor restarted one."""

    workers: int
    """Configured workers."""
    workers_serving: int = 0
    worker_restarts: int = 0
    background_restarts: int = 0
    postgresql_restarts: int = 0
