"""Pods in the light of their nodes, and peers that fall silent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankEnd
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import DeletePod, Observed, ObservedNode
from finetune_operator.plan.policies import nodes
from tests.plan.fake_cluster import FakeCluster, seconds

HEALTHY = ObservedNode()
LOST = ObservedNode(lost=True)
GONE = ObservedNode(lost=True, gone=True)
LEAVING = ObservedNode(leaving="aws-node-termination-handler/spot-itn")


def judged(cluster: FakeCluster, node: ObservedNode) -> Observed:
    observed = replace(cluster.observed(), nodes={"node-1": node})
    return nodes.apply_node_state(observed, cluster.now, cluster.settings)


TABLE = [
    # (state of the node, seconds since the pod's last beat, seconds since its overdue deletion, what it looks like)
    (ObservedNode(), 1000, None, "well"),
    (LEAVING, 0, None, "disrupted"),
    (LOST, 0, None, "well"),
    (LOST, 20, None, "lost"),
    (GONE, 20, None, "lost"),
    (LOST, 20, 0, "gone"),
    (LOST, 0, 0, "well"),
    (ObservedNode(), 20, 5, "well"),
    (ObservedNode(), 20, 11, "gone"),
    (ObservedNode(), 0, 11, "well"),
]


@pytest.mark.parametrize(("node", "silent_seconds", "overdue_seconds", "looks"), TABLE)
def test_a_pod_in_the_light_of_its_node(
    node: ObservedNode, silent_seconds: int, overdue_seconds: int | None, looks: str
) -> None:
    cluster = FakeCluster().running()
    cluster.beat_all()
    cluster.now += seconds(silent_seconds)
    if overdue_seconds is not None:
        cluster.change(1, deleted_at=cluster.now - seconds(overdue_seconds + 30), grace=seconds(30))
    pods = {pod.node_rank: pod for pod in judged(cluster, node).pods}
    assert pods[0] == cluster.pod(0)
    pod = pods.get(1)
    if pod is None:
        assert looks == "gone"
    elif pod == cluster.pod(1):
        assert looks == "well"
    else:
        assert looks == ("lost" if pod.reason == nodes.NODE_LOST else "disrupted")


def test_a_pod_that_nobody_is_left_to_end_is_deleted_by_force() -> None:
    cluster = FakeCluster().running()
    pod = cluster.pod(1)
    cluster.change(1, deleted_at=cluster.now, grace=seconds(30))
    force = DeletePod(pod.name, pod.uid, grace_seconds=0)
    for node, later, forced in ((LOST, 0, False), (LOST, 330, True), (GONE, 0, True), (HEALTHY, 3600, False)):
        now = cluster.now + seconds(later)
        decided = plan(cluster.job, replace(cluster.observed(), nodes={"node-1": node}), now, cluster.settings)
        assert (force in decided.actions) is forced


def test_a_peer_that_fell_silent_is_lost_capacity_and_no_failure() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all()
    cluster.tick(1)
    end = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="lost a peer")
    cluster.beat(0, ends=(end,))
    cluster.settle()
    cluster.tick(cluster.settings.cause_seconds + 1)
    cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank) == (Reason.NODE_LOST, CountsAs.PREEMPTION, 1)
