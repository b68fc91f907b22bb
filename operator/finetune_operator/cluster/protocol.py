"""What the core needs of a cluster. `reconcile` drives it; local, kube and simulated clusters fulfil it."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from finetune_operator.api.job import FineTuneJob, FineTuneJobStatus
from finetune_operator.cluster.key import JobKey
from finetune_operator.coordinator.beats import PodIdentity
from finetune_operator.plan.model.types import Action, Event, Observed

__all__ = ["Clock", "Cluster", "ConflictError", "JobKey"]


class ConflictError(Exception):
    """The object is newer than the one that the write was based on: read it again and decide anew."""


class Clock(Protocol):
    """Tells the time; handed in, so that tests and the simulation have their own."""

    def __call__(self) -> datetime:
        """Now, with a time zone."""
        ...


class Cluster(Protocol):
    """Objects that can be read, written and watched."""

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        """The job as stored; None where it is gone or being deleted."""
        ...

    async def observe(self, job: FineTuneJob) -> Observed:
        """Pods, beats, services and ConfigMaps of a job, as last seen. May lag behind; never ahead."""
        ...

    async def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Write the status, if the job still has the resource version of `job`.

        Raises:
            ConflictError: it has another.
        """
        ...

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Carry out one action; one whose effect is there already is a success."""
        ...

    async def emit(self, job: FineTuneJob, event: Event) -> None:
        """Tell a person. An event that cannot be told is no reason to fail."""
        ...

    async def whose_token(self, token: str) -> PodIdentity | None:
        """The living pod that a bearer token was issued to; None: nobody's."""
        ...
