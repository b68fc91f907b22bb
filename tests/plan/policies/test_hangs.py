"""Hangs: a gang that is heard and does nothing."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.types import Create
from tests.plan.harness import World, make_job, seconds


def standing_still(world: World, number: float, state: RankState = RankState.TRAINING) -> None:
    """Time goes by, and the supervisors go on beating."""
    for _ in range(int(number // 5)):
        world.now += seconds(5)
        world.beat_all(state, step=10, restored_step=0)
        world.settle()


def training(hang_timeout: str | None = None) -> World:
    recovery = {"hangTimeout": hang_timeout} if hang_timeout else {}
    world = World(make_job(recovery=recovery)).running()
    world.train_to(1)
    world.settle()
    world.now += seconds(5)
    world.train_to(10)
    world.settle()
    return world


@pytest.mark.parametrize(("hang_timeout", "limit"), [(None, 300), ("60s", 60), ("20m", 1200)])
def test_no_step_for_so_long_is_a_hang(hang_timeout: str | None, limit: int) -> None:
    world = training(hang_timeout)
    standing_still(world, limit - 5)
    assert world.job.status.attempts[0].reason is None
    standing_still(world, 5)
    entry = world.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank, entry.node) == (Reason.HANG, CountsAs.FAILURE, 0, "node-0")
    assert entry.message is not None
    assert "at step 10 since" in entry.message


def test_the_rank_that_is_behind_is_blamed_and_its_node_avoided() -> None:
    world = training("60s")
    for _ in range(12):
        world.now += seconds(5)
        world.beat(0, step=10, restored_step=0)
        world.beat(1, step=9, restored_step=0)
        world.settle()
    assert world.job.status.attempts[0].node == "node-1"
    world.tick(3)
    world.settle()
    world.tick(20)
    world.step()
    pods = [a.manifest for a in world.decide().actions if isinstance(a, Create) and a.manifest["kind"] == "Pod"]
    assert pods
    for pod in pods:
        [weighted] = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert weighted["preference"]["matchFields"][0]["values"] == ["node-1"]


def test_silence_is_no_hang() -> None:
    world = training("60s")
    world.now += seconds(600)
    world.settle()
    assert world.job.status.attempts[0].reason is None


def test_loading_may_take_its_time() -> None:
    world = World(make_job(recovery={"hangTimeout": "60s"})).running()
    standing_still(world, 600, RankState.LOADING)
    assert world.job.status.attempts[0].reason is None


def test_other_work_than_steps_may_take_its_time_too() -> None:
    world = training("60s")
    standing_still(world, 600, RankState.SAVING)
    assert world.job.status.attempts[0].reason is None


def test_an_operator_that_was_away_hears_of_the_steps_first() -> None:
    world = training("60s")
    world.now += seconds(600)
    world.beats.clear()
    world.settle()
    world.train_to(90)
    world.settle()
    assert world.job.status.attempts[0].reason is None


def test_after_a_long_save_the_time_of_a_step_begins_anew() -> None:
    world = training("60s")
    standing_still(world, 600, RankState.SAVING)
    standing_still(world, 55)
    assert world.job.status.attempts[0].reason is None
    standing_still(world, 10)
    assert world.job.status.attempts[0].reason == Reason.HANG


@pytest.mark.parametrize("state", [RankState.LOADING, RankState.TRAINING])
def test_a_gang_is_not_blamed_for_the_hours_in_which_its_pods_waited(state: RankState) -> None:
    """A beat may come before the news that its pod runs, which waited for a node all the time."""
    world = World(make_job(recovery={"hangTimeout": "60s"}))
    world.settle()
    world.now += seconds(4 * 3600)
    world.settle()
    for _ in range(2):
        world.beat_all(state, step=10 if state is RankState.TRAINING else None, restored_step=10)
        world.settle()
        assert world.job.status.attempts[0].reason is None
        world.run_all()
