"""activeDeadlineSeconds bounds the time from the first attempt on."""

from __future__ import annotations

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import DeletePod
from tests.plan.harness import World, make_job, seconds


@pytest.mark.parametrize(("at_seconds", "over"), [(0, False), (59, False), (60, True), (61, True)])
def test_the_deadline(at_seconds: int, over: bool) -> None:
    world = World(make_job(activeDeadlineSeconds=60)).running()
    world.tick(at_seconds)
    world.step()
    assert (world.job.status.phase is Phase.FAILED) == over


def test_what_happens_then() -> None:
    world = World(make_job(activeDeadlineSeconds=60)).running()
    assert world.decide().requeue_after == seconds(60)
    world.tick(60)
    decided = world.step()
    status = world.job.status
    assert status.reason == Reason.DEADLINE_EXCEEDED
    assert "60 s" in (status.message or "")
    assert [a.grace_seconds for a in decided.actions if isinstance(a, DeletePod)] == [None, None]
    assert (status.failures, status.preemptions) == (0, 0)
    assert world.reasons()[-1] == Reason.DEADLINE_EXCEEDED
    assert world.step().actions == ()


def test_it_bounds_all_attempts_together() -> None:
    world = World(make_job(activeDeadlineSeconds=60)).running()
    world.tick(40)
    world.pods.clear()
    world.running()
    assert world.job.status.attempt == 2
    world.tick(20)
    world.step()
    assert world.job.status.phase is Phase.FAILED
