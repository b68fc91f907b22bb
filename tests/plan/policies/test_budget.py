"""maxFailures counts failures since the last newer checkpoint; preemptions spend nothing; some errors are final."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from tests.plan.harness import START, World, last_words, make_job

COMMITTED = CommittedCheckpoint(step=10, time=START.timestamp(), size_bytes=1000, attempt=1)


def fail(world: World, code: int = 1) -> None:
    """The attempt's rank 1 fails; the wait before the next attempt goes by."""
    attempt = world.job.status.attempt
    world.exit(1, code, termination=last_words(attempt, code, f"died in attempt {attempt}", rank=1))
    world.step()
    world.tick(400)
    world.step()


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_so_many_failures_are_survived(allowed: int) -> None:
    world = World(make_job(recovery={"maxFailures": allowed}))
    for num_failures in range(1, allowed + 2):
        assert world.job.status.phase is not Phase.FAILED
        fail(world.running())
        assert world.job.status.failures == num_failures
    status = world.job.status
    assert (status.phase, status.reason) == (Phase.FAILED, Reason.MAX_FAILURES_EXCEEDED)
    assert status.message is not None
    assert f"died in attempt {allowed + 1}" in status.message
    assert f"{allowed} allowed" in status.message
    assert status.completion_time is not None
    assert world.settle().actions == ()


def test_a_newer_checkpoint_restores_the_budget() -> None:
    world = World(make_job(recovery={"maxFailures": 1}))
    for checkpoint in (10, 20, 30, 40):
        world.running()
        world.train_to(checkpoint + 1, from_step=checkpoint - 10, checkpoint=checkpoint)
        world.step()
        fail(world)
        assert world.job.status.tally.failures_since_checkpoint == 1
    assert world.job.status.phase is not Phase.FAILED
    assert world.job.status.failures == 4


def test_the_same_checkpoint_again_restores_nothing() -> None:
    world = World(make_job(recovery={"maxFailures": 1})).running()
    world.train_to(12, checkpoint=10)
    world.step()
    report = world.beats[world.pod(0).uid].beat.ranks[0]
    fail(world)
    world.running()
    world.beat(0, step=11, restored_step=10, checkpoint=report.checkpoint)
    world.step()
    assert world.job.status.tally.failures_since_checkpoint == 1
    fail(world)
    assert world.job.status.phase is Phase.FAILED
    assert "since the checkpoint of step 10" in (world.job.status.message or "")


def test_a_checkpoint_that_is_heard_of_after_the_failure_still_leaves_that_failure() -> None:
    world = World(make_job(recovery={"maxFailures": 1})).running()
    world.exit(1, 1)
    world.step()
    world.beat(0, step=12, restored_step=0, checkpoint=COMMITTED)
    world.step()
    assert world.job.status.last_checkpoint is not None
    assert world.job.status.tally.failures_since_checkpoint == 1


def test_preemptions_spend_nothing() -> None:
    world = World(make_job(recovery={"maxFailures": 0}))
    for _ in range(30):
        world.running()
        world.vanish(world.pod(1).name)
        world.step()
        world.tick(2)
    assert world.job.status.preemptions == 30
    assert world.job.status.failures == 0
    assert world.job.status.phase is not Phase.FAILED
    assert world.job.status.attempt == 30


@pytest.mark.parametrize(
    ("code", "reason"),
    [(ExitCode.CONFIG, Reason.CONFIGURATION_ERROR), (ExitCode.DATA, Reason.DATA_ERROR)],
)
def test_an_error_that_would_come_again_ends_the_job_at_once(code: ExitCode, reason: Reason) -> None:
    world = World(make_job(recovery={"maxFailures": 100})).running()
    fail(world, code)
    status = world.job.status
    assert (status.phase, status.reason, status.failures) == (Phase.FAILED, reason, 1)
    assert "died in attempt 1" in (status.message or "")
    assert world.events[-1].warning


def test_failing_over_and_over_at_the_same_step_ends_the_job_early() -> None:
    world = World(make_job(recovery={"maxFailures": 100}))
    for num_failures in (1, 2, 3):
        assert world.job.status.phase is not Phase.FAILED
        world.running()
        world.train_to(17)
        world.step()
        fail(world)
        assert world.job.status.tally.failures_at_step == num_failures
    status = world.job.status
    assert (status.phase, status.reason) == (Phase.FAILED, Reason.SAME_STEP_FAILURES)
    assert "3 failures in a row after step 17" in (status.message or "")


def test_failures_at_other_steps_or_before_the_first_one_are_not_at_the_same_step() -> None:
    world = World(make_job(recovery={"maxFailures": 100}))
    for step in (None, None, None, None, 17, 18, 17, 18):
        world.running()
        if step is not None:
            world.train_to(step)
            world.step()
        fail(world)
        assert world.job.status.tally.failures_at_step == 1
    assert world.job.status.phase is not Phase.FAILED
