"""The phases of a job, as `status.phase` shows them."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Where a job is."""

    PENDING = "Pending"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    EXPORTING = "Exporting"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


FINISHED = frozenset({Phase.SUCCEEDED, Phase.FAILED})
"""Final phases: a job in one of them never leaves it."""
