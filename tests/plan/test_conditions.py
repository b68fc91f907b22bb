"""Conditions: true in their phases, and with a transition time that changes only with them."""

from __future__ import annotations

from finetune_operator.api.words import ConditionType
from finetune_operator.plan.conditions import find, is_true
from tests.plan.world import World


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
