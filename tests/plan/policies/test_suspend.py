"""Suspending saves and gives the machines back; resuming begins a new attempt; neither counts as anything."""

from __future__ import annotations

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.types import DeletePod
from tests.plan.harness import World, make_job, seconds


def suspend(world: World, value: bool) -> None:
    spec = world.job.spec.model_copy(update={"suspend": value})
    world.job = world.job.model_copy(update={"spec": spec})


def suspended() -> World:
    """A job that trained for 10 s and was then suspended at step 40."""
    world = World(make_job(activeDeadlineSeconds=100)).running()
    world.tick(10)
    world.train_to(40)
    world.settle()
    suspend(world, True)
    world.step()
    for rank in (0, 1):
        world.exit(rank, ExitCode.SAVED)
        world.vanish(world.pod(rank).name)
    world.settle()
    return world


def test_a_job_that_begins_suspended_makes_nothing() -> None:
    world = World(make_job(suspend=True))
    decided = world.settle()
    assert (decided.actions, world.job.status.attempt) == ((), 0)
    assert world.job.status.phase is Phase.SUSPENDED


def test_pods_have_their_own_grace_to_save_in() -> None:
    world = World().running()
    world.train_to(40)
    world.settle()
    suspend(world, True)
    decided = world.step()
    assert [(a.name, a.grace_seconds) for a in decided.actions if isinstance(a, DeletePod)] == [
        ("circles-a1-n0", None),
        ("circles-a1-n1", None),
    ]
    assert (world.job.status.phase, world.job.status.reason) == (Phase.RUNNING, Reason.SUSPENDING)
    assert world.step().actions == ()


def test_suspended_once_the_pods_are_gone_and_counted_as_nothing() -> None:
    status = suspended().job.status
    assert (status.phase, status.reason) == (Phase.SUSPENDED, Reason.SUSPENDED)
    assert (status.preemptions, status.failures, status.attempt) == (0, 0, 1)
    assert status.attempts[-1].reason == Reason.SUSPENDED
    assert is_true(status, ConditionType.SUSPENDED)
    assert not is_true(status, ConditionType.RUNNING)


def test_resuming_begins_a_new_attempt_and_forgets_the_time() -> None:
    world = suspended()
    world.tick(1000)
    assert world.settle().requeue_after is None
    suspend(world, False)
    world.running()
    status = world.job.status
    assert status.attempt == 2
    assert status.tally.suspended_seconds == 1000
    assert not is_true(status, ConditionType.SUSPENDED)
    assert status.phase is not Phase.FAILED
    assert world.decide().requeue_after == seconds(90)


def test_a_job_that_finishes_while_it_is_being_suspended_has_succeeded() -> None:
    world = World().running()
    suspend(world, True)
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    assert world.job.status.phase is Phase.SUCCEEDED


def test_suspended_and_resumed_before_the_pods_are_gone() -> None:
    world = World().running()
    suspend(world, True)
    world.step()
    suspend(world, False)
    world.step()
    assert world.job.status.attempt == 1
    world.tick(120)
    world.running()
    assert world.job.status.attempt == 2
    assert len(world.pods) == 2
