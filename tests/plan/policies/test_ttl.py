"""ttlSecondsAfterFinished deletes a job that has ended."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.plan.model.types import DeleteJob
from tests.plan.harness import World, make_job, seconds


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.CONFIG])
def test_a_finished_job_goes_when_its_time_is_over(code: int) -> None:
    world = World(make_job(ttlSecondsAfterFinished=30)).running()
    for rank in (0, 1):
        world.exit(rank, code)
    assert world.step().requeue_after == seconds(30)
    world.tick(29)
    world.step()
    assert not world.deleted
    world.tick(1)
    assert DeleteJob() in world.step().actions


def test_at_once() -> None:
    world = World(make_job(ttlSecondsAfterFinished=0)).running()
    for rank in (0, 1):
        world.exit(rank, 0)
    world.step()
    assert world.deleted


def test_a_job_without_one_stays() -> None:
    world = World().running()
    for rank in (0, 1):
        world.exit(rank, 0)
    world.step()
    world.tick(1e6)
    assert world.step().actions == ()


def test_a_running_job_stays() -> None:
    world = World(make_job(ttlSecondsAfterFinished=0)).running()
    assert world.settle().requeue_after is None
