"""Waits between attempts: doubled with each failure, bounded, and none after a preemption."""

from __future__ import annotations

import pytest

from finetune_operator.api.words import Reason
from finetune_operator.plan.backoff import delay
from finetune_operator.settings import Settings
from tests.plan.world import World, seconds


@pytest.mark.parametrize(
    ("num_failures", "wait_seconds"),
    [(0, 10), (1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (7, 300), (1000, 300)],
)
def test_delay(num_failures: int, wait_seconds: int) -> None:
    assert delay(num_failures, Settings()) == seconds(wait_seconds)


def test_the_next_attempt_waits_and_says_so() -> None:
    world = World().running()
    world.exit(0, 1)
    world.exit(1, 1)
    world.step()
    decided = world.settle()
    assert world.job.status.attempt == 1
    assert world.job.status.reason == Reason.BACK_OFF
    assert "12:00:10" in (world.job.status.message or "")
    assert decided.look_again == seconds(10)
    world.tick(9)
    world.settle()
    assert world.job.status.attempt == 1
    world.tick(1)
    world.settle()
    assert world.job.status.attempt == 2


def test_a_preempted_job_does_not_wait() -> None:
    world = World().running()
    world.pods.clear()
    world.step()
    assert world.job.status.attempt == 2
