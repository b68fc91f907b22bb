"""Cleanup of an attempt: which pods are deleted, when, and with which grace period."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.plan.model.types import DeletePod
from tests.plan.fake_cluster import FakeCluster, RankState, make_job


def deletions(cluster: FakeCluster) -> list[tuple[str, int | None]]:
    return [(a.name[-2:], a.grace_seconds) for a in cluster.step().actions if isinstance(a, DeletePod)]


def with_notice(**spec: object) -> FakeCluster:
    """Return a job of which the pod of rank 1 is preempted with a notice of 30 s."""
    cluster = FakeCluster(make_job(**({"recovery": {"noticeSeconds": 30}} | spec))).running()
    cluster.tick(1)
    cluster.change(1, disruption="TerminationByKubelet")
    cluster.delete("circles-a1-n1", cluster.pod(1).uid, None)
    return cluster


def test_survivors_of_a_sudden_loss_are_deleted_at_once() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == [("n0", 2)]
    assert deletions(cluster) == []


def test_all_pods_are_deleted_after_a_failure() -> None:
    cluster = FakeCluster().running()
    cluster.exit(1, 1)
    assert deletions(cluster) == [("n0", 2), ("n1", 2)]


def test_survivors_may_save_during_a_notice() -> None:
    cluster = with_notice()
    assert deletions(cluster) == []
    cluster.tick(2)
    cluster.exit(0, ExitCode.SAVED)
    assert deletions(cluster) == [("n0", 2)]
    cluster.exit(1, ExitCode.SAVED)
    cluster.vanish("circles-a1-n1")
    cluster.settle()
    assert cluster.job.status.attempt == 2
    assert cluster.job.status.preemptions == 1


def test_survivors_are_deleted_when_the_notice_expires() -> None:
    cluster = with_notice()
    decided = cluster.step()
    assert decided.requeue_after is not None
    assert decided.requeue_after.total_seconds() == 30
    cluster.tick(29)
    assert deletions(cluster) == []
    cluster.tick(1)
    assert deletions(cluster) == [("n0", 2)]
    cluster.tick(2)
    cluster.settle()
    assert cluster.job.status.attempt == 2


def test_notice_without_deletion_lasts_notice_seconds() -> None:
    cluster = FakeCluster(make_job(recovery={"noticeSeconds": 30})).running()
    cluster.change(1, disruption="DeletionByTaintManager")
    cluster.step()
    cluster.tick(29)
    assert deletions(cluster) == []
    cluster.tick(1)
    assert deletions(cluster) == [("n0", 2), ("n1", 2)]


@pytest.mark.parametrize("code", [1, ExitCode.FABRIC, ExitCode.STORAGE, 137])
def test_all_pods_are_deleted_when_a_rank_fails_during_a_notice(code: int) -> None:
    cluster = with_notice()
    cluster.step()
    cluster.exit(0, code)
    cluster.change(1, deleted_at=None, disruption="TerminationByKubelet")
    assert deletions(cluster) == [("n0", 2), ("n1", 2)]


def test_longer_grace_period_is_shortened_only_once() -> None:
    cluster = FakeCluster(make_job(recovery={"noticeSeconds": 60})).running()
    cluster.delete("circles-a1-n0", cluster.pod(0).uid, None)
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == [("n0", 2)]
    assert deletions(cluster) == []


def test_failed_job_keeps_ended_pods_for_their_logs() -> None:
    cluster = FakeCluster().running()
    cluster.exit(1, ExitCode.CONFIG)
    assert deletions(cluster) == [("n0", 2)]
    cluster.tick(2)
    cluster.settle()
    assert list(cluster.pods) == ["circles-a1-n1"]


def test_survivors_are_deleted_when_the_pod_with_the_notice_is_gone() -> None:
    cluster = with_notice()
    cluster.step()
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == [("n0", 2)]


def test_running_save_is_not_interrupted() -> None:
    cluster = with_notice()
    cluster.beat(0, RankState.SAVING, step=10, restored_step=0)
    cluster.step()
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == []


def test_rank_failure_during_suspension_shortens_the_grace_period() -> None:
    cluster = FakeCluster().running()
    spec = cluster.job.spec.model_copy(update={"suspend": True})
    cluster.job = cluster.job.model_copy(update={"spec": spec})
    assert deletions(cluster) == [("n0", None), ("n1", None)]
    cluster.exit(1, 1)
    assert deletions(cluster) == [("n0", 2)]
