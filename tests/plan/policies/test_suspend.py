"""Suspending saves and releases the nodes; resuming begins a new attempt; neither counts as preemption or failure."""

from __future__ import annotations

from dataclasses import replace

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.types import DeletePod
from tests.plan.fake_cluster import FakeCluster, make_job, seconds


def suspend(cluster: FakeCluster, value: bool) -> None:
    spec = cluster.job.spec.model_copy(update={"suspend": value})
    cluster.job = cluster.job.model_copy(update={"spec": spec})


def suspended() -> FakeCluster:
    """Return a job that trained for 10 s and was then suspended at step 40."""
    cluster = FakeCluster(make_job(activeDeadlineSeconds=100)).running()
    cluster.tick(10)
    cluster.train_to(40)
    cluster.settle()
    suspend(cluster, True)
    cluster.step()
    for rank in (0, 1):
        cluster.exit(rank, ExitCode.SAVED)
        cluster.vanish(cluster.pod(rank).name)
    cluster.settle()
    return cluster


def test_job_created_suspended_has_no_pods() -> None:
    cluster = FakeCluster(make_job(suspend=True))
    decided = cluster.settle()
    assert (decided.actions, cluster.job.status.attempt) == ((), 0)
    assert cluster.job.status.phase is Phase.SUSPENDED


def test_suspended_pods_save_within_their_own_grace_period() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(40)
    cluster.settle()
    suspend(cluster, True)
    decided = cluster.step()
    assert [(a.name, a.grace_seconds) for a in decided.actions if isinstance(a, DeletePod)] == [
        ("circles-a1-n0", None),
        ("circles-a1-n1", None),
    ]
    assert (cluster.job.status.phase, cluster.job.status.reason) == (Phase.RUNNING, Reason.SUSPENDING)
    assert cluster.step().actions == ()


def test_job_is_suspended_once_its_pods_are_gone() -> None:
    status = suspended().job.status
    assert (status.phase, status.reason) == (Phase.SUSPENDED, Reason.SUSPENDED)
    assert (status.preemptions, status.failures, status.attempt) == (0, 0, 1)
    assert status.attempts[-1].reason == Reason.SUSPENDED
    assert is_true(status, ConditionType.SUSPENDED)
    assert not is_true(status, ConditionType.RUNNING)


def test_resuming_begins_a_new_attempt_and_excludes_the_suspended_time() -> None:
    cluster = suspended()
    cluster.tick(1000)
    assert cluster.settle().requeue_after is None
    suspend(cluster, False)
    cluster.running()
    status = cluster.job.status
    assert status.attempt == 2
    assert status.tally.suspended_seconds == 1000
    assert not is_true(status, ConditionType.SUSPENDED)
    assert status.phase is not Phase.FAILED
    cluster.settings = replace(cluster.settings, coordinator_url="")
    assert cluster.decide().requeue_after == seconds(90)


def test_job_that_finishes_while_suspending_succeeds() -> None:
    cluster = FakeCluster().running()
    suspend(cluster, True)
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED


def test_resume_before_the_pods_are_gone() -> None:
    cluster = FakeCluster().running()
    suspend(cluster, True)
    cluster.step()
    suspend(cluster, False)
    cluster.step()
    assert cluster.job.status.attempt == 1
    cluster.tick(120)
    cluster.running()
    assert cluster.job.status.attempt == 2
    assert len(cluster.pods) == 2
