"""The interface between `reconcile` and a cluster. The local, Kubernetes and simulated clusters implement it."""

from __future__ import annotations

from datetime import datetime
from typing import Protocol

from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.cluster.key import JobKey
from finetune_operator.coordinator.beats import PodIdentity
from finetune_operator.plan.model.types import Action, Event, Observed

__all__ = ["Clock", "Cluster", "ConflictError", "JobKey"]


class ConflictError(Exception):
    """The object has changed since it was read: read it again and reconcile again."""


class Clock(Protocol):
    """Returns the current time. It is a parameter, so that tests and the simulation can use their own."""

    def __call__(self) -> datetime:
        """Return the current time, with a time zone."""
        ...


class Cluster(Protocol):
    """Objects that can be read and written."""

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        """Return the job as stored; None if it is deleted or being deleted."""
        ...

    async def observe(self, job: FineTuneJob) -> Observed:
        """Return the last observed pods, heartbeats, services and ConfigMaps of a job. May lag behind the cluster."""
        ...

    async def write_status(self, job: FineTuneJob, status: FineTuneJobStatus) -> None:
        """Write the status if the job still has the resource version of `job`.

        Raises:
            ConflictError: the job has another resource version.
        """
        ...

    async def apply(self, job: FineTuneJob, action: Action) -> None:
        """Carry out one action; an action whose effect already exists succeeds."""
        ...

    async def emit(self, job: FineTuneJob, event: Event) -> None:
        """Report an event to the user. A failure to report is not an error."""
        ...

    async def authenticate_token(self, token: str) -> PodIdentity | None:
        """Return the running pod that a bearer token was issued to; None if the token is not valid."""
        ...
