"""Reconciles of many jobs: the event loop can do other work between any two of them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.client import ApiError, NotLeaderError
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.client.refusals import CreationError
from finetune_operator.cluster.kube.work import workers
from finetune_operator.cluster.kube.work.queue import WorkQueue
from finetune_operator.cluster.kube.work.workers import WorkerContext, Workers
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings

NUM_JOBS = 50
NUM_WORKERS = 4


class EmptyCluster:
    """A cluster whose jobs are all deleted: a reconcile awaits nothing. It records the loop iteration of each one."""

    def __init__(self) -> None:
        self.iteration = 0
        self.reconciled_in: list[int] = []

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        del key
        self.reconciled_in.append(self.iteration)
        return None


async def reconcile_all() -> list[int]:
    loop, cluster, queue = asyncio.get_running_loop(), EmptyCluster(), cast("WorkQueue[JobKey]", WorkQueue())
    for number in range(NUM_JOBS):
        queue.add(JobKey("team", f"job-{number}"))

    def tick() -> None:
        cluster.iteration += 1
        if len(cluster.reconciled_in) < NUM_JOBS:
            loop.call_soon(tick)
        else:
            queue.close()

    loop.call_soon(tick)
    context = WorkerContext(cast(Any, cluster), queue, Settings(), ServerClock(), Metrics())
    await Workers(context, NUM_WORKERS).run()
    return cluster.reconciled_in


class FailingCluster:
    """A cluster whose reads fail for one job. It requests reconciles as heartbeats do, and then of another job."""

    def __init__(self, queue: WorkQueue[JobKey], error: ApiError) -> None:
        self.num_failed = 0
        self._queue = queue
        self._error = error

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        if key == OTHER:
            self._queue.close()
            return None
        self.num_failed += 1
        # A heartbeat requests a reconcile at once, another job one that is later than that.
        asyncio.get_running_loop().call_soon(self._queue.add_after, FAILING, 0.0)
        self._queue.add_after(OTHER, 0.05)
        raise self._error


FAILING, OTHER = JobKey("team", "failing"), JobKey("team", "other")


@pytest.mark.parametrize(
    "error",
    [
        ApiError(500, "InternalError", "etcd is down", retry_after_seconds=3600),
        ApiError(422, "Invalid", "status.step: Invalid value", retry_after_seconds=3600),
    ],
    ids=str,
)
def test_heartbeat_does_not_end_the_back_off_of_a_failed_reconcile(error: ApiError) -> None:
    async def main() -> int:
        queue: WorkQueue[JobKey] = WorkQueue()
        cluster = FailingCluster(queue, error)
        queue.add(FAILING)
        context = WorkerContext(cast(Any, cluster), queue, Settings(), ServerClock(), Metrics())
        await Workers(context, 1).run()
        return cluster.num_failed

    assert asyncio.run(main()) == 1


def test_other_work_of_a_job_continues_after_a_failed_creation() -> None:
    """The plan creates nothing until the back-off is over, but it reads heartbeats and writes the progress."""

    async def main() -> int:
        queue: WorkQueue[JobKey] = WorkQueue()
        cluster = FailingCluster(queue, CreationError(ApiError(403, "Forbidden", "exceeded quota"), 3600))
        queue.add(FAILING)
        context = WorkerContext(cast(Any, cluster), queue, Settings(), ServerClock(), Metrics())
        await Workers(context, 1).run()
        return cluster.num_failed

    assert asyncio.run(main()) > 1


def test_a_job_is_reconciled_again_if_the_lease_was_renewed_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The term goes on after a gap in which nothing may be written, so nothing else requests the reconcile."""
    monkeypatch.setattr(workers, "LEADER_SECONDS", 0.0)

    class LateLease:
        def __init__(self, queue: WorkQueue[JobKey]) -> None:
            self.queue, self.num_reconciles = queue, 0

        async def get_job(self, key: JobKey) -> FineTuneJob | None:
            del key
            self.num_reconciles += 1
            if self.num_reconciles < 3:
                raise NotLeaderError
            self.queue.close()
            return None

    async def main() -> int:
        queue: WorkQueue[JobKey] = WorkQueue()
        cluster = LateLease(queue)
        queue.add(FAILING)
        context = WorkerContext(cast(Any, cluster), queue, Settings(), ServerClock(), Metrics())
        async with asyncio.timeout(30):
            await Workers(context, 1).run()
        return cluster.num_reconciles

    assert asyncio.run(main()) == 3


def test_one_reconcile_per_iteration_of_the_event_loop() -> None:
    reconciled_in = asyncio.run(reconcile_all())
    assert len(reconciled_in) == NUM_JOBS
    assert len(set(reconciled_in)) == NUM_JOBS
