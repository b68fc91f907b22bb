"""Pods that are not heard any more while their peers are done."""

from __future__ import annotations

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import CountsAs, Reason
from tests.plan.harness import RankState, World, seconds


def done_but_one() -> World:
    """All is trained; pod 0 has ended, and pod 1 fell silent a little before."""
    world = World().running()
    world.train_to(100)
    world.settle()
    world.tick(2)
    world.beat(0, RankState.DONE, step=100)
    world.exit(0, 0)
    world.settle()
    return world


def test_a_silent_pod_whose_peers_are_done_is_lost() -> None:
    world = done_but_one()
    plan = world.decide()
    assert plan.requeue_after is not None
    world.now += seconds(59)
    world.settle()
    assert world.job.status.attempts[0].reason is None
    world.now += seconds(1)
    world.step()
    entry = world.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank, entry.node) == (
        Reason.NODE_LOST,
        CountsAs.PREEMPTION,
        1,
        "node-1",
    )
    world.settle()
    world.tick(5)
    world.settle()
    assert world.job.status.attempt == 2


def test_a_pod_that_is_heard_has_its_time() -> None:
    world = done_but_one()
    for _ in range(30):
        world.now += seconds(10)
        world.beat(1, RankState.EXPORTING, step=100)
        world.settle()
    assert world.job.status.attempts[0].reason is None
    world.exit(1, 0)
    world.settle()
    assert world.job.status.phase is Phase.SUCCEEDED


def test_silence_alone_ends_nothing() -> None:
    world = World().running()
    world.train_to(50)
    world.settle()
    world.now += seconds(3600)
    world.settle()
    assert world.job.status.attempts[0].reason is None
