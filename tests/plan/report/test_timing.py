"""The seconds of each stage of a restart."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.api.job import AttemptSeconds
from tests.plan.harness import World, make_job, seconds


def tick(world: World, number: float) -> None:
    world.tick(number)
    world.settle()


def test_each_stage_has_its_seconds() -> None:
    world = World().running()
    world.train_to(10, checkpoint=10)
    world.settle()
    finished_at = world.now
    world.tick(2)
    world.exit(1, 1)
    world.change(1, finished_at=finished_at)
    world.settle()
    assert world.job.status.attempts[0].seconds.detection == 2
    world.tick(30)
    world.settle()
    assert world.job.status.attempt == 2
    for rank in (0, 1):
        world.change(rank, node=f"node-{rank}")
        tick(world, 3)
    world.run_all()
    tick(world, 5)
    world.beat_all(RankState.LOADING)
    tick(world, 4)
    world.beat_all(step=10, restored_step=10)
    tick(world, 0)
    world.tick(6)
    world.beat_all(step=11, restored_step=10)
    world.settle()
    assert world.job.status.attempts[1].seconds == AttemptSeconds(
        teardown=30, queueing=6, pulling=5, restoring=4, first_step=6
    )


@pytest.mark.parametrize("how", ["ended", "announced", "gone"])
def test_detection_counts_from_what_was_first_known_of_it(how: str) -> None:
    world = World().running()
    world.train_to(10)
    world.settle()
    began = world.now
    world.tick(3)
    if how == "ended":
        world.exit(1, 1)
        world.change(1, finished_at=began)
    elif how == "announced":
        world.change(1, deleted_at=began, grace=seconds(30), disruption="EvictionByEvictionAPI")
    else:
        # Its last beat outlives it.
        del world.pods[world.pod(1).name]
    world.settle()
    assert world.job.status.attempts[0].seconds.detection == 3


def test_detection_of_a_hang_is_the_time_of_standing_still() -> None:
    world = World(make_job(recovery={"hangTimeout": "60s"})).running()
    for _ in range(15):
        world.beat_all(step=10, restored_step=0)
        world.settle()
        world.now += seconds(5)
    assert world.job.status.attempts[0].seconds.detection == 60
