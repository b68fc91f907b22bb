"""Clearing an attempt: who is deleted, when, and with how much grace."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.plan.model.types import DeletePod
from tests.plan.fake_cluster import FakeCluster, RankState, make_job


def deletions(cluster: FakeCluster) -> list[tuple[str, int | None]]:
    return [(a.name[-2:], a.grace_seconds) for a in cluster.step().actions if isinstance(a, DeletePod)]


def noticed(**spec: object) -> FakeCluster:
    """Rank 1's pod is taken away with 30 s of notice."""
    cluster = FakeCluster(make_job(**({"recovery": {"noticeSeconds": 30}} | spec))).running()
    cluster.tick(1)
    cluster.change(1, disruption="TerminationByKubelet")
    cluster.delete("circles-a1-n1", cluster.pod(1).uid, None)
    return cluster


def test_after_a_sudden_loss_the_survivors_go_at_once() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == [("n0", 2)]
    assert deletions(cluster) == []


def test_after_a_failure_the_survivors_and_the_failed_one_go() -> None:
    cluster = FakeCluster().running()
    cluster.exit(1, 1)
    assert deletions(cluster) == [("n0", 2), ("n1", 2)]


def test_on_notice_the_survivors_are_left_to_save() -> None:
    cluster = noticed()
    assert deletions(cluster) == []
    cluster.tick(2)
    cluster.exit(0, ExitCode.SAVED)
    assert deletions(cluster) == [("n0", 2)]
    cluster.exit(1, ExitCode.SAVED)
    cluster.vanish("circles-a1-n1")
    cluster.settle()
    assert cluster.job.status.attempt == 2
    assert cluster.job.status.preemptions == 1


def test_when_the_notice_is_over_the_survivors_go() -> None:
    cluster = noticed()
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


def test_a_notice_without_a_deletion_lasts_as_long_as_any_does() -> None:
    cluster = FakeCluster(make_job(recovery={"noticeSeconds": 30})).running()
    cluster.change(1, disruption="DeletionByTaintManager")
    cluster.step()
    cluster.tick(29)
    assert deletions(cluster) == []
    cluster.tick(1)
    assert deletions(cluster) == [("n0", 2), ("n1", 2)]


@pytest.mark.parametrize("code", [1, ExitCode.FABRIC, ExitCode.STORAGE, 137])
def test_when_a_rank_ends_badly_on_notice_nobody_can_save_any_more(code: int) -> None:
    cluster = noticed()
    cluster.step()
    cluster.exit(0, code)
    cluster.change(1, deleted_at=None, disruption="TerminationByKubelet")
    assert deletions(cluster) == [("n0", 2), ("n1", 2)]


def test_a_longer_deletion_is_shortened_and_a_shorter_one_left_alone() -> None:
    cluster = FakeCluster(make_job(recovery={"noticeSeconds": 60})).running()
    cluster.delete("circles-a1-n0", cluster.pod(0).uid, None)
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == [("n0", 2)]
    assert deletions(cluster) == []


def test_running_pods_of_a_job_that_failed_go_and_finished_ones_stay_for_their_logs() -> None:
    cluster = FakeCluster().running()
    cluster.exit(1, ExitCode.CONFIG)
    assert deletions(cluster) == [("n0", 2)]
    cluster.tick(2)
    cluster.settle()
    assert list(cluster.pods) == ["circles-a1-n1"]


def test_where_the_pod_with_the_notice_is_gone_nobody_waits_for_the_rest_of_it() -> None:
    cluster = noticed()
    cluster.step()
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == [("n0", 2)]


def test_but_a_save_that_is_under_way_is_waited_for() -> None:
    cluster = noticed()
    cluster.beat(0, RankState.SAVING, step=10, restored_step=0)
    cluster.step()
    cluster.vanish("circles-a1-n1")
    assert deletions(cluster) == []


def test_where_a_rank_fails_while_the_job_is_suspended_the_others_have_nothing_left_to_save() -> None:
    cluster = FakeCluster().running()
    spec = cluster.job.spec.model_copy(update={"suspend": True})
    cluster.job = cluster.job.model_copy(update={"spec": spec})
    assert deletions(cluster) == [("n0", None), ("n1", None)]
    cluster.exit(1, 1)
    assert deletions(cluster) == [("n0", 2)]
