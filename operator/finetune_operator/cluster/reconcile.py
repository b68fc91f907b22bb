"""One pass, for every cluster: observe, plan, write the status, act, tell (docs/architecture.md, "One pass").

The caller makes sure that a job has one pass at a time and that the cluster wakes it after every change, its own
status writes included: the pass that raises the attempt creates nothing, the one that reads it back does.
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
class Pass:
    """What one pass saw and when it wants the next one."""

    job: FineTuneJob | None
    """With the status that was just written; None where the job is gone."""
    observed: Observed = field(default_factory=Observed)
    look_again: timedelta | None = None


async def reconcile(cluster: Cluster, key: JobKey, settings: Settings, now: Clock) -> Pass:
    """Carry out one pass for one job."""
    job = await cluster.get_job(key)
    if job is None:
        return Pass(None)
    observed = await cluster.observe(job)
    decided = plan(job, observed, now(), settings)
    if decided.status != job.status:
        try:
            await cluster.write_status(job, decided.status)
        except ConflictError:
            # The newer object has already asked for another pass. Acting on the older one could undo what it says.
            return Pass(job, observed)
    error = await act(cluster, job, decided.actions)
    for event in decided.events:
        await cluster.emit(job, event)
    if error is not None:
        raise error
    return Pass(job.model_copy(update={"status": decided.status}), observed, decided.look_again)


async def act(cluster: Cluster, job: FineTuneJob, actions: Sequence[Action]) -> Exception | None:
    """Carry out the actions; return the first error.

    A pod that a quota refuses must not keep others from being deleted, which may be what makes room.
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


async def drive(reconcile_once: Callable[[], Awaitable[Pass]], wake: asyncio.Event) -> AsyncGenerator[Pass, None]:
    """Make passes for one job for ever, each when something woke it or when the last one asked for it."""
    while True:
        # Cleared before the look: what happens during a pass asks for another one.
        wake.clear()
        seen = await reconcile_once()
        yield seen
        with suppress(TimeoutError):
            async with asyncio.timeout(seen.look_again.total_seconds() if seen.look_again else None):
                await wake.wait()
