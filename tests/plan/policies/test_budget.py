"""maxFailures limits the failures since the last newer checkpoint; preemptions do not count; some errors are final."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from tests.plan.fake_cluster import START, FakeCluster, last_words, make_job

COMMITTED = CommittedCheckpoint(step=10, time=START.timestamp(), size_bytes=1000, attempt=1)


def fail(cluster: FakeCluster, code: int = 1) -> None:
    """Let rank 1 of the attempt fail, and wait for the end of the back-off."""
    attempt = cluster.job.status.attempt
    cluster.exit(1, code, termination=last_words(attempt, code, f"failed in attempt {attempt}", rank=1))
    cluster.step()
    cluster.tick(400)
    cluster.step()


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_job_fails_after_more_than_max_failures(allowed: int) -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": allowed}))
    for num_failures in range(1, allowed + 2):
        assert cluster.job.status.phase is not Phase.FAILED
        fail(cluster.running())
        assert cluster.job.status.failures == num_failures
    status = cluster.job.status
    assert (status.phase, status.reason) == (Phase.FAILED, Reason.MAX_FAILURES_EXCEEDED)
    assert status.message is not None
    assert f"failed in attempt {allowed + 1}" in status.message
    assert f"{allowed} allowed" in status.message
    assert status.completion_time is not None
    assert cluster.settle().actions == ()


def test_newer_checkpoint_restores_the_budget() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 1}))
    for checkpoint in (10, 20, 30, 40):
        cluster.running()
        cluster.train_to(checkpoint + 1, from_step=checkpoint - 10, checkpoint=checkpoint)
        cluster.step()
        fail(cluster)
        assert cluster.job.status.tally.failures_since_checkpoint == 1
    assert cluster.job.status.phase is not Phase.FAILED
    assert cluster.job.status.failures == 4


def test_same_checkpoint_does_not_restore_the_budget() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 1})).running()
    cluster.train_to(12, checkpoint=10)
    cluster.step()
    report = cluster.beats[cluster.pod(0).uid].beat.ranks[0]
    fail(cluster)
    cluster.running()
    cluster.beat(0, step=11, restored_step=10, checkpoint=report.checkpoint)
    cluster.step()
    assert cluster.job.status.tally.failures_since_checkpoint == 1
    fail(cluster)
    assert cluster.job.status.phase is Phase.FAILED
    assert "since the checkpoint of step 10" in (cluster.job.status.message or "")


def test_checkpoint_reported_after_the_failure_keeps_that_failure() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 1})).running()
    cluster.exit(1, 1)
    cluster.step()
    cluster.beat(0, step=12, restored_step=0, checkpoint=COMMITTED)
    cluster.step()
    assert cluster.job.status.last_checkpoint is not None
    assert cluster.job.status.tally.failures_since_checkpoint == 1


def test_preemptions_do_not_count() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 0}))
    for _ in range(30):
        cluster.running()
        cluster.vanish(cluster.pod(1).name)
        cluster.step()
        cluster.tick(2)
    assert cluster.job.status.preemptions == 30
    assert cluster.job.status.failures == 0
    assert cluster.job.status.phase is not Phase.FAILED
    assert cluster.job.status.attempt == 30


@pytest.mark.parametrize(
    ("code", "reason"),
    [(ExitCode.CONFIG, Reason.CONFIGURATION_ERROR), (ExitCode.DATA, Reason.DATA_ERROR)],
)
def test_permanent_error_ends_the_job_at_once(code: ExitCode, reason: Reason) -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 100})).running()
    fail(cluster, code)
    status = cluster.job.status
    assert (status.phase, status.reason, status.failures) == (Phase.FAILED, reason, 1)
    assert "failed in attempt 1" in (status.message or "")
    assert cluster.events[-1].warning


def test_repeated_failure_at_the_same_step_ends_the_job_early() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 100}))
    for num_failures in (1, 2, 3):
        assert cluster.job.status.phase is not Phase.FAILED
        cluster.running()
        cluster.train_to(17)
        cluster.step()
        fail(cluster)
        assert cluster.job.status.tally.failures_at_step == num_failures
    status = cluster.job.status
    assert (status.phase, status.reason) == (Phase.FAILED, Reason.SAME_STEP_FAILURES)
    assert "3 failures in a row after step 17" in (status.message or "")


def test_failures_at_different_steps_or_before_the_first_step_do_not_end_the_job_early() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 100}))
    for step in (None, None, None, None, 17, 18, 17, 18):
        cluster.running()
        if step is not None:
            cluster.train_to(step)
            cluster.step()
        fail(cluster)
        assert cluster.job.status.tally.failures_at_step == 1
    assert cluster.job.status.phase is not Phase.FAILED
