"""One reconcile, for every cluster: observe, plan, write the status, act, emit events (docs/architecture.md).

The caller ensures that each job has at most one running reconcile, and that the cluster wakes the job after every
change, including its own status writes: the reconcile that raises the attempt creates nothing; the next one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.protocol import Clock, Cluster, ConflictError, JobKey
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import Action, Create, Observed
from finetune_operator.settings import Settings


@dataclass(frozen=True)
class ReconcileResult:
    """Result of one reconcile, and when the next one is due."""

    job: FineTuneJob | None
    """The job with the status that was written; None if it is deleted."""
    observed: Observed = field(default_factory=Observed)
    requeue_after: timedelta | None = None


async def reconcile(cluster: Cluster, key: JobKey, settings: Settings, now: Clock) -> ReconcileResult:
    """Reconcile one job once."""
    job = await cluster.get_job(key)
    if job is None:
        return ReconcileResult(None)
    observed = await cluster.observe(job)
    decided = plan(job, observed, now(), settings)
    if decided.status != job.status:
        try:
            await cluster.write_status(job, decided.status)
        except ConflictError:
            # The newer object has already requested another reconcile. Actions for the older one could be wrong.
            return ReconcileResult(job, observed)
    error = await apply_actions(cluster, job, decided.actions)
    for event in decided.events:
        await cluster.emit(job, event)
    if error is not None:
        raise error
    return ReconcileResult(job.model_copy(update={"status": decided.status}), observed, decided.requeue_after)


async def apply_actions(cluster: Cluster, job: FineTuneJob, actions: Sequence[Action]) -> Exception | None:
    """Carry out the actions; return the first error.

    If a quota refuses a pod, the following deletions are still carried out: they may free the quota.
    """
    first: Exception | None = None
    for action in actions:
        if first is not None and isinstance(action, Create):
            continue
        try:
            await cluster.apply(job, action)
        except Exception as error:
            first = first or error
    return first


async def reconcile_forever(
    reconcile_once: Callable[[], Awaitable[ReconcileResult]], wake: asyncio.Event
) -> AsyncGenerator[ReconcileResult, None]:
    """Reconcile one job until cancelled, each time when it is woken or when the last reconcile's delay is over."""
    while True:
        # Cleared first: a change during a reconcile requests another one.
        wake.clear()
        result = await reconcile_once()
        yield result
        with suppress(TimeoutError):
            async with asyncio.timeout(result.requeue_after.total_seconds() if result.requeue_after else None):
                await wake.wait()
