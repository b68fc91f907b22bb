"""Reconciles of many jobs: the event loop can do other work between any two of them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.clock import ServerClock
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


def test_one_reconcile_per_iteration_of_the_event_loop() -> None:
    reconciled_in = asyncio.run(reconcile_all())
    assert len(reconciled_in) == NUM_JOBS
    assert len(set(reconciled_in)) == NUM_JOBS
