"""Conditions: true in their phases, and with a transition time that changes only with them."""

from __future__ import annotations

from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_operator.api.conditions import ConditionType
from finetune_operator.plan.model.conditions import find, is_true
from tests.plan.harness import World, make_job


def holding(world: World) -> set[str]:
    world.settle()
    return {condition.type for condition in world.job.status.conditions if condition.status == "True"}


def test_a_jobs_life() -> None:
    world = World()
    assert holding(world) == {"Accepted"}
    world.running().train_to(10)
    assert holding(world) == {"Accepted", "Running"}
    world.tick(1)
    world.pods.clear()
    assert holding(world) == {"Accepted", "Recovering"}
    world.running().train_to(11, from_step=10)
    assert holding(world) == {"Accepted", "Running"}
    for rank in (0, 1):
        world.exit(rank, 0)
    assert holding(world) == {"Accepted", "Complete"}


def test_conditions_that_never_held_are_left_out() -> None:
    world = World()
    world.settle()
    assert [condition.type for condition in world.job.status.conditions] == ["Accepted"]


def test_the_transition_time_is_that_of_the_change() -> None:
    world = World().running()
    world.train_to(1)
    world.settle()
    began = world.now
    for step in range(2, 5):
        world.tick(5)
        world.train_to(step)
        world.settle()
    running = find(world.job.status, ConditionType.RUNNING)
    assert running is not None
    assert running.last_transition_time == began
    world.tick(5)
    world.pods.clear()
    world.settle()
    ended = find(world.job.status, ConditionType.RUNNING)
    assert ended is not None
    assert (ended.status, ended.last_transition_time) == ("False", world.now)
    assert not is_true(world.job.status, ConditionType.RUNNING)


def test_a_condition_says_why_and_of_which_generation() -> None:
    world = World().running()
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    complete = find(world.job.status, ConditionType.COMPLETE)
    assert complete is not None
    assert (complete.reason, complete.observed_generation) == ("Finished", 1)
    assert complete.message


def saved(world: World, save_seconds: float, step: int) -> None:
    checkpoint = CommittedCheckpoint(
        step=step, time=0, size_bytes=1, attempt=1, durable_seconds=save_seconds, interval_seconds=90.0
    )
    world.beat(0, step=step, restored_step=0, checkpoint=checkpoint)
    world.settle()


def test_a_notice_too_short_to_save_in_is_said_once() -> None:
    world = World(make_job(recovery={"noticeSeconds": 30})).running()
    saved(world, 3, 10)
    assert find(world.job.status, ConditionType.NOTICE_TOO_SHORT) is None
    for step in (20, 30):
        saved(world, 45 + step / 10, step)
    condition = find(world.job.status, ConditionType.NOTICE_TOO_SHORT)
    assert condition is not None
    assert (condition.status, condition.message) == ("True", "a step and its save took 47 s; the notice is 30 s")
    assert world.reasons().count("SaveTakesLonger") == 1
    saved(world, 3, 40)
    condition = find(world.job.status, ConditionType.NOTICE_TOO_SHORT)
    assert condition is not None
    assert condition.status == "False"


def test_the_interval_between_checkpoints_is_shown() -> None:
    world = World().running()
    saved(world, 3, 10)
    assert world.job.status.checkpoint_interval_seconds == 90
    assert world.job.status.last_checkpoint is not None
    assert world.job.status.last_checkpoint.save_seconds == 3
