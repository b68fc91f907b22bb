"""Phases of a job: the values of `status.phase`."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Phase of a job."""

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
"""Final phases: a job never leaves them."""
