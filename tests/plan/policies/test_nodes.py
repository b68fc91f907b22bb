"""The state of nodes applied to their pods, and silent peers."""

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


def adjusted(cluster: FakeCluster, node: ObservedNode) -> Observed:
    observed = replace(cluster.observed(), nodes={"node-1": node})
    return nodes.apply_node_state(observed, cluster.now, cluster.settings)


TABLE = [
    # (state of the node, seconds since the pod's last heartbeat, seconds since the deletion was due, expected state)
    (ObservedNode(), 1000, None, "unchanged"),
    (LEAVING, 0, None, "disrupted"),
    (LOST, 0, None, "unchanged"),
    (LOST, 20, None, "lost"),
    (GONE, 20, None, "lost"),
    (LOST, 20, 0, "deleted"),
    (LOST, 0, 0, "unchanged"),
    (ObservedNode(), 20, 5, "unchanged"),
    (ObservedNode(), 20, 11, "deleted"),
    (ObservedNode(), 0, 11, "unchanged"),
]


@pytest.mark.parametrize(("node", "silent_seconds", "overdue_seconds", "expected"), TABLE)
def test_pod_is_adjusted_by_the_state_of_its_node(
    node: ObservedNode, silent_seconds: int, overdue_seconds: int | None, expected: str
) -> None:
    cluster = FakeCluster().running()
    cluster.beat_all()
    cluster.now += seconds(silent_seconds)
    if overdue_seconds is not None:
        cluster.change(1, deleted_at=cluster.now - seconds(overdue_seconds + 30), grace=seconds(30))
    pods = {pod.node_rank: pod for pod in adjusted(cluster, node).pods}
    assert pods[0] == cluster.pod(0)
    pod = pods.get(1)
    if pod is None:
        assert expected == "deleted"
    elif pod == cluster.pod(1):
        assert expected == "unchanged"
    else:
        assert expected == ("lost" if pod.reason == nodes.NODE_LOST else "disrupted")


def test_pod_on_a_lost_node_is_force_deleted() -> None:
    cluster = FakeCluster().running()
    pod = cluster.pod(1)
    cluster.change(1, deleted_at=cluster.now, grace=seconds(30))
    force = DeletePod(pod.name, pod.uid, grace_seconds=0)
    for node, later, forced in ((LOST, 0, False), (LOST, 330, True), (GONE, 0, True), (HEALTHY, 3600, False)):
        now = cluster.now + seconds(later)
        decided = plan(cluster.job, replace(cluster.observed(), nodes={"node-1": node}), now, cluster.settings)
        assert (force in decided.actions) is forced


def test_silent_peer_counts_as_preemption() -> None:
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
