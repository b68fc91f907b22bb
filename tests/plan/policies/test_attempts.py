"""Attempts begin one at a time, by raising `status.attempt`, once the previous attempt's pods are deleted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.interval import DEFAULT_MTBF_SECONDS
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.types import Create, DeletePod, PodPhase
from tests.plan.fake_cluster import FakeCluster


def test_reconcile_that_begins_an_attempt_creates_nothing() -> None:
    cluster = FakeCluster()
    decided = cluster.step()
    assert decided.status.attempt == 1
    assert decided.actions == ()
    assert decided.status.start_time == cluster.now
    second = cluster.step()
    created = [action.manifest for action in second.actions if isinstance(action, Create)]
    assert [manifest["kind"] for manifest in created] == ["ConfigMap", "Pod", "Pod"]
    assert [manifest["metadata"]["name"] for manifest in created[1:]] == ["circles-a1-n0", "circles-a1-n1"]


def test_lost_status_write_has_no_effect() -> None:
    """The operator acts on the raised number only after it has read it back."""
    cluster = FakeCluster()
    for _ in range(3):
        decided = cluster.decide()
        assert decided.status.attempt == 1
        assert decided.actions == ()


def test_no_attempt_begins_while_a_pod_exists() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    cluster.step()
    cluster.step()
    assert cluster.job.status.attempt == 1
    cluster.tick(2)
    cluster.step()
    assert cluster.job.status.attempt == 2


def test_attempt_ends_and_next_begins_in_one_reconcile() -> None:
    cluster = FakeCluster().running()
    cluster.pods.clear()
    decided = cluster.step()
    assert decided.status.attempt == 2
    assert decided.actions == ()
    assert [entry.reason for entry in decided.status.attempts] == [Reason.POD_LOST, None]
    assert cluster.reasons()[-2:] == ["PodLost", "AttemptStarted"]


def test_pod_missing_from_a_stale_list_is_created_again_and_not_lost() -> None:
    cluster = FakeCluster().created()
    uids = {pod.uid for pod in cluster.pods.values()}
    cluster.hidden.add(cluster.pod(1).uid)
    for _ in range(3):
        decided = cluster.step()
        assert [a.manifest["metadata"]["name"] for a in decided.actions if isinstance(a, Create)] == ["circles-a1-n1"]
        assert decided.status.attempt == 1
    cluster.hidden.clear()
    cluster.settle()
    assert {pod.uid for pod in cluster.pods.values()} == uids
    assert cluster.job.status.attempts[-1].gang_complete


def test_late_pod_of_an_older_attempt_is_deleted() -> None:
    cluster = FakeCluster().running()
    cluster.pods.clear()
    cluster.step()
    late = replace(FakeCluster().running().pod(0), uid="late", phase=PodPhase.FAILED, exit_code=1)
    cluster.pods[late.name] = late
    decided = cluster.step()
    assert decided.actions == (DeletePod(late.name, "late", cluster.settings.peer_grace_seconds),)
    assert decided.status.failures == 0
    cluster.running()
    assert cluster.job.status.attempt == 2
    assert {pod.attempt for pod in cluster.pods.values()} == {2}


def test_attempts_missing_from_the_status_are_skipped() -> None:
    """The status was restored from a backup. (A write based on a stale status would conflict.)"""
    cluster = FakeCluster().running()
    cluster.pods = {
        f"circles-a7-n{rank}": replace(pod, name=f"circles-a7-n{rank}", attempt=7)
        for rank, pod in enumerate(cluster.pods.values())
    }
    decided = cluster.step()
    assert decided.status.attempt == 8
    assert decided.actions == ()
    assert cluster.job.status.attempts[0].reason == Reason.POD_LOST
    cluster.tick(1)
    cluster.step()
    cluster.tick(2)
    cluster.running()
    assert {pod.attempt for pod in cluster.pods.values()} == {8}
    assert cluster.job.status.attempt == 8


def test_job_that_is_being_deleted_gets_no_actions() -> None:
    cluster = FakeCluster().running()
    metadata = cluster.job.metadata.model_copy(update={"deletion_timestamp": cluster.now})
    cluster.job = cluster.job.model_copy(update={"metadata": metadata})
    cluster.pods.clear()
    decided = cluster.step()
    assert (decided.actions, decided.events, decided.requeue_after) == ((), (), None)
    assert decided.status == cluster.job.status


def test_new_job_has_an_empty_status() -> None:
    assert FakeCluster().job.status == FineTuneJobStatus()


@pytest.mark.parametrize(
    ("change", "num_unsaved"),
    [({"disruption": "TerminationByKubelet"}, 0), ({"exit_code": 1, "phase": PodPhase.FAILED}, 1)],
    ids=["notice", "sudden"],
)
def test_mtbf_counts_only_interruptions_that_lose_unsaved_steps(change: dict[str, Any], num_unsaved: int) -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10, checkpoint=10)
    cluster.settle()
    cluster.change(1, **change)
    cluster.settle()
    cluster.tick(600)
    for pod in list(cluster.pods.values()):
        cluster.vanish(pod.name)
    cluster.settle()
    begun = cluster.job.status.attempts[1]
    elapsed = (begun.started_at - cluster.job.status.attempts[0].started_at).total_seconds()
    assert begun.mtbf_seconds == pytest.approx((DEFAULT_MTBF_SECONDS + elapsed) / (1 + num_unsaved), abs=1)
