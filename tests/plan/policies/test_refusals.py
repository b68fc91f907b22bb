"""Refusals of the cluster: a kubelet that does not admit a pod, and a quota that admits a part of the gang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import Create, PodPhase, Refusal
from tests.plan.fake_cluster import FakeCluster, make_job, seconds
from tests.plan.scenarios import elastic_cluster, place, send_heartbeats, shrunk

REJECTED: dict[str, Any] = {
    "phase": PodPhase.FAILED,
    "node": "node-1",
    "reason": "UnexpectedAdmissionError",
    "message": "Pod was rejected: Allocate failed due to no healthy devices present",
}
QUOTA = Refusal('the API server refused to create Pod x: pods "x" is forbidden: exceeded quota: gpus')


def refuse(cluster: FakeCluster) -> None:
    """Let the kubelet of node 1 refuse the pod of the newest attempt."""
    cluster.change(1, **REJECTED)
    cluster.settle()


def test_refused_pod_is_a_preemption_with_the_kubelets_message() -> None:
    cluster = FakeCluster()
    cluster.settle()
    refuse(cluster)
    status, entry = cluster.job.status, cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.node) == (Reason.REFUSED_BY_KUBELET, "Preemption", "node-1")
    assert entry.message == f"UnexpectedAdmissionError: {REJECTED['message']}"
    assert (status.failures, status.preemptions) == (0, 1)


def avoided(cluster: FakeCluster) -> list[str]:
    manifest = cluster.manifests[cluster.pod(0).name]
    terms = manifest["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    return [name for term in terms for field in term["preference"]["matchFields"] for name in field["values"]]


def test_next_attempt_avoids_the_node_and_repeated_refusals_wait_longer() -> None:
    """Without the delay, a node that refuses all pods would see several attempts per second."""
    cluster = FakeCluster()
    cluster.settle()
    delays = []
    for attempt in range(1, 5):
        assert cluster.job.status.attempt == attempt
        cluster.change(0, node="node-0")
        refuse(cluster)
        cluster.tick(2)
        decided = cluster.settle()
        if cluster.job.status.attempt == attempt:
            assert decided.requeue_after is not None
            delays.append(decided.requeue_after.total_seconds() + 2)
            cluster.tick(decided.requeue_after.total_seconds())
            cluster.settle()
        assert avoided(cluster) == ["node-1"]
    assert delays == [pytest.approx(10, rel=0.2), pytest.approx(20, rel=0.2), pytest.approx(40, rel=0.2)]
    assert cluster.job.status.failures == 0


def test_peers_of_a_refused_pod_do_not_save_and_the_rate_of_interruptions_stays() -> None:
    cluster = FakeCluster()
    cluster.settle()
    refuse(cluster)
    cluster.tick(3)
    cluster.settle()
    undisturbed = FakeCluster()
    undisturbed.settle()
    assert cluster.job.status.attempts[-1].mtbf_seconds == undisturbed.job.status.attempts[0].mtbf_seconds


def test_refused_standby_pod_is_replaced_after_a_minute() -> None:
    """A job that trains on fewer nodes would never grow again."""
    cluster = shrunk()
    standby = cluster.pods["circles-a2-n3"]
    cluster.pods[standby.name] = replace(standby, **REJECTED)
    send_heartbeats(cluster, step=10)
    cluster.settle()
    while standby.created_at + seconds(60) > cluster.now:
        assert cluster.pods["circles-a2-n3"].uid == standby.uid
        decided = cluster.decide()
        assert decided.requeue_after is not None
        cluster.tick(decided.requeue_after.total_seconds())
        send_heartbeats(cluster, step=10)
        cluster.settle()
    assert cluster.pods["circles-a2-n3"].uid != standby.uid


# quotas


def limited(num_admitted: int, num_nodes: int = 4, **spec: Any) -> FakeCluster:
    """Return a job of which the quota admits only some pods."""
    cluster = FakeCluster(make_job(topology={"accelerator": "cpu", "nodes": num_nodes}, **spec))
    cluster.refusal, cluster.num_admitted = QUOTA, num_admitted
    cluster.settle_refused()
    return cluster


def test_status_says_how_many_pods_the_quota_admits_and_when_they_are_deleted() -> None:
    cluster = limited(3)
    status = cluster.job.status
    assert (status.phase, status.reason) == (Phase.QUEUED, Reason.FAILED_CREATE)
    assert status.message is not None
    assert status.message.startswith(QUOTA.message)
    assert "the cluster admits 3 of 4 pods, and their quota is released at 12:0" in status.message


def test_quota_of_an_incomplete_gang_is_released_after_a_while_and_requested_again_later() -> None:
    cluster = limited(3)
    wait = cluster.decide().requeue_after
    assert wait is not None
    assert wait.total_seconds() == pytest.approx(300, rel=0.2)
    cluster.tick(wait.total_seconds())
    cluster.settle_refused()
    status = cluster.job.status
    assert cluster.pods == {}
    assert (status.phase, status.reason) == (Phase.QUEUED, Reason.QUOTA_RELEASED)
    assert "the cluster admits 3 of 4 pods" in (status.attempts[0].message or "")
    assert (status.failures, status.preemptions) == (0, 0)
    pause = cluster.decide().requeue_after
    assert pause is not None
    assert pause.total_seconds() == pytest.approx(120, rel=0.2)
    cluster.refusal = None
    cluster.tick(pause.total_seconds())
    cluster.settle()
    assert sorted(cluster.pods) == [f"circles-a2-n{rank}" for rank in range(4)]


@pytest.mark.parametrize(("num_admitted", "num_nodes"), [(0, 4), (1, 1)])
def test_nothing_is_released_if_no_pod_waits_for_refused_ones(num_admitted: int, num_nodes: int) -> None:
    cluster = limited(num_admitted, num_nodes)
    cluster.tick(4000)
    cluster.settle_refused()
    assert cluster.job.status.attempt == 1
    assert cluster.job.status.attempts[0].reason is None


def test_elastic_job_continues_with_the_pods_that_the_quota_admits() -> None:
    cluster = elastic_cluster()
    cluster.refusal, cluster.num_admitted = QUOTA, 3
    cluster.settle_refused()
    place(cluster, 0, 1, 2)
    for _ in range(40):
        cluster.tick(10)
        send_heartbeats(cluster)
        cluster.settle_refused()
    assert cluster.job.status.attempts[0].reason == Reason.SHRUNK
    assert cluster.job.status.attempts[1].nodes == 3


def test_two_gangs_that_block_each_other_release_at_different_times() -> None:
    waits = []
    for uid in ("1f0c3a2b-0000", "2a7d9e11-0000"):
        cluster = limited(3)
        meta = cluster.job.metadata.model_copy(update={"uid": uid})
        cluster.job = cluster.job.model_copy(update={"metadata": meta})
        waits.append(cluster.decide().requeue_after)
    assert waits[0] != waits[1]


# back-off of creations


def test_nothing_is_created_before_the_back_off_of_a_failed_creation_is_over() -> None:
    """Heartbeats of the other pods request reconciles in the meantime."""
    cluster = limited(1, num_nodes=2)
    cluster.create_after = cluster.now + seconds(30)
    cluster.run_all()
    cluster.beat(0)
    decided = cluster.decide()
    assert not any(isinstance(action, Create) for action in decided.actions)
    assert decided.requeue_after == seconds(30)
    cluster.tick(30)
    assert [type(action) for action in cluster.decide().actions] == [Create]
