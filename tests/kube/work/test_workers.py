"""Passes of many jobs: the loop's other work comes between any two of them."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.kube.client.clock import ServerClock
from finetune_operator.cluster.kube.work.queue import WorkQueue
from finetune_operator.cluster.kube.work.workers import Passes, Workers
from finetune_operator.cluster.protocol import JobKey
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings

NUM_JOBS = 50
NUM_WORKERS = 4


class Nothing:
    """A cluster whose jobs are all gone: a pass has nothing to wait for. It notes in which turn each was made."""

    def __init__(self) -> None:
        self.turn = 0
        self.made_in: list[int] = []

    async def get_job(self, key: JobKey) -> FineTuneJob | None:
        del key
        self.made_in.append(self.turn)
        return None


async def make_passes() -> list[int]:
    loop, cluster, queue = asyncio.get_running_loop(), Nothing(), cast("WorkQueue[JobKey]", WorkQueue())
    for number in range(NUM_JOBS):
        queue.add(JobKey("team", f"job-{number}"))

    def tick() -> None:
        cluster.turn += 1
        if len(cluster.made_in) < NUM_JOBS:
            loop.call_soon(tick)
        else:
            queue.close()

    loop.call_soon(tick)
    passes = Passes(cast(Any, cluster), queue, Settings(), ServerClock(), Metrics())
    await Workers(passes, NUM_WORKERS).run()
    return cluster.made_in


def test_no_two_passes_in_one_turn_of_the_loop() -> None:
    made_in = asyncio.run(make_passes())
    assert len(made_in) == NUM_JOBS
    assert len(set(made_in)) == NUM_JOBS
