"""The seconds of each stage of a restart."""

from __future__ import annotations

from finetune_contract.beat import RankState
from finetune_operator.api.job import AttemptSeconds
from tests.plan.world import World


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
