"""The capacity policies: fewer nodes, spot or other nodes, standby pods, and the return to better capacity."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order, RankEnd, RankState
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import Capacity
from finetune_operator.manifests import global_batch
from finetune_operator.plan.model.types import PodPhase
from tests.plan.fake_cluster import SETTINGS, START, FakeCluster, seconds
from tests.plan.scenarios import FALLBACK, HOLDING, elastic_cluster, place, send_heartbeats, shrunk, spot_cluster


def test_job_waits_for_nodes_before_it_shrinks() -> None:
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0, 1, 3)
    send_heartbeats(cluster)
    decided = cluster.settle()
    assert decided.requeue_after is not None
    assert (cluster.job.status.message or "").endswith("continues on fewer nodes at 12:05:00 UTC")
    cluster.tick(299)
    send_heartbeats(cluster)
    cluster.settle()
    assert cluster.job.status.attempt == 1


def test_job_continues_on_the_placed_pods() -> None:
    cluster = shrunk()
    status = cluster.job.status
    first, second = status.attempts
    assert (first.reason, first.next_nodes, first.counts_as) == (Reason.SHRUNK, 3, None)
    assert (second.nodes, second.pod_attempts, second.pod_ranks) == (3, (1, 1, 1), (0, 1, 3))
    assert status.nodes == "3/4"
    assert (status.preemptions, status.failures) == (0, 0)
    assert global_batch(cluster.job.spec) == 4
    assert status.phase is Phase.RUNNING


def test_supervisors_receive_the_smaller_world() -> None:
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0, 1, 3)
    cluster.tick(300)
    send_heartbeats(cluster)
    cluster.settle()
    cluster.settle()
    last = cluster.pods["circles-a1-n3"]
    new_world = cluster.reply(cluster.beats[last.uid].beat).world
    assert new_world is not None
    assert (new_world.attempt, new_world.node_rank, new_world.num_nodes) == (2, 2, 3)


def test_job_below_min_nodes_waits_and_message_explains_why() -> None:
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0)
    cluster.change(1, waiting="Unschedulable: 0/3 nodes are available: 3 Insufficient cpu.")
    cluster.tick(3600)
    send_heartbeats(cluster)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert cluster.job.status.reason == Reason.UNSCHEDULABLE
    assert "3 Insufficient cpu" in (cluster.job.status.message or "")


def test_job_shrinks_without_a_coordinator() -> None:
    cluster = elastic_cluster(replace(SETTINGS, coordinator_url=""), recovery={"shrinkAfter": "30s"})
    cluster.settle()
    place(cluster, 0, 1)
    cluster.tick(30)
    cluster.settle()
    cluster.tick(2)
    cluster.settle()
    assert sorted(cluster.pods) == ["circles-a2-n0", "circles-a2-n1"]
    env = environment(cluster, "circles-a2-n1")
    assert env["FINETUNE_NUM_NODES"] == "2"


def test_standby_pod_is_created_for_the_missing_pod() -> None:
    cluster = shrunk()
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a1-n1", "circles-a1-n3", "circles-a2-n3"]
    env = environment(cluster, "circles-a2-n3")
    assert env["FINETUNE_STANDBY"] == "1"


def test_all_ranks_save_before_the_job_grows() -> None:
    cluster = shrunk()
    place(cluster, 3)
    send_heartbeats(cluster, step=6)
    cluster.settle()
    assert cluster.job.status.attempt == 2, "the attempt has only just begun"
    cluster.tick(120)
    send_heartbeats(cluster, step=100)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.reason, entry.next_nodes) == (2, Reason.GROWN, 4)
    first = cluster.pods["circles-a1-n0"]
    assert cluster.reply(cluster.beats[first.uid].beat).order is Order.SAVE_AND_STOP
    send_heartbeats(cluster, step=101, waiting=True)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes) == (3, None)
    assert (entry.pod_attempts, entry.pod_ranks) == ((1, 1, 1, 2), (0, 1, 3, 3))
    send_heartbeats(cluster, step=101, waiting=True)
    cluster.settle()
    worlds = [cluster.reply(beat.beat).world for beat in cluster.beats.values()]
    assert sorted(new_world.node_rank for new_world in worlds if new_world is not None) == [0, 1, 2, 3]
    assert {new_world.num_nodes for new_world in worlds if new_world is not None} == {4}
    assert cluster.job.status.preemptions == 0


def test_standby_pod_is_deleted_when_the_job_finishes() -> None:
    cluster = shrunk()
    place(cluster, 3)
    send_heartbeats(cluster, step=6)
    for pod in list(cluster.pods.values()):
        if pod.name != "circles-a2-n3":
            cluster.pods[pod.name] = replace(pod, phase=PodPhase.SUCCEEDED, exit_code=0)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert cluster.pods["circles-a2-n3"].deleted_at is not None


def test_higher_min_nodes_applies_to_the_next_attempt() -> None:
    cluster = shrunk()
    topology = cluster.job.spec.topology.model_copy(update={"min_nodes": 4})
    cluster.job = cluster.job.model_copy(update={"spec": cluster.job.spec.model_copy(update={"topology": topology})})
    cluster.vanish("circles-a1-n1")
    send_heartbeats(cluster, step=6, waiting=True)
    cluster.settle()
    assert cluster.job.status.attempts[-1].nodes is None


# -- spot -------------------------------------------------------------------------------------------------------------


def environment(cluster: FakeCluster, name: str) -> dict[str, Any]:
    container = cluster.manifests[name]["spec"]["containers"][0]
    return {item["name"]: item.get("value") for item in container["env"]}


def affinity(cluster: FakeCluster, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster.manifests[name]["spec"]["affinity"]["nodeAffinity"]
    return found


def fallen_back() -> FakeCluster:
    cluster = spot_cluster()
    cluster.tick(600)
    send_heartbeats(cluster)
    cluster.settle()
    cluster.settle()
    return cluster


def test_job_waits_for_spot_nodes() -> None:
    cluster = spot_cluster()
    cluster.tick(599)
    send_heartbeats(cluster)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert list(affinity(cluster, "circles-a1-n1")) == ["requiredDuringSchedulingIgnoredDuringExecution"]


def test_pod_without_a_spot_node_falls_back_to_any_node() -> None:
    cluster = fallen_back()
    first, second = cluster.job.status.attempts
    assert (first.reason, second.capacity) == (Reason.FELL_BACK, Capacity.ANY)
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a2-n1"]
    assert list(affinity(cluster, "circles-a2-n1")) == ["preferredDuringSchedulingIgnoredDuringExecution"]


def test_job_returns_to_spot_nodes() -> None:
    cluster = fallen_back()
    place(cluster, 1)
    send_heartbeats(cluster, step=5)
    cluster.settle()
    standby = cluster.pods["circles-a2-n2"]
    assert list(affinity(cluster, standby.name)) == ["requiredDuringSchedulingIgnoredDuringExecution"]
    place(cluster, 2)
    cluster.tick(120)
    send_heartbeats(cluster, step=100)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason == Reason.BACK_TO_SPOT
    send_heartbeats(cluster, step=101, waiting=True)
    cluster.settle()
    cluster.tick(2)
    send_heartbeats(cluster, step=101, waiting=True)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.pod_attempts, entry.pod_ranks) == (3, (1, 2), (0, 2))
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a2-n2"]


def test_standby_pod_falls_back_to_any_node() -> None:
    cluster = shrunk(**FALLBACK)
    cluster.tick(600)
    send_heartbeats(cluster, step=500)
    cluster.settle()
    assert list(affinity(cluster, "circles-a2-n3")) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    assert cluster.job.status.attempt == 2


@pytest.mark.parametrize("change", [{"deleted_at": START, "grace": seconds(30)}, {"disruption": "Preempting"}])
def test_job_does_not_grow_with_a_leaving_pod(change: dict[str, Any]) -> None:
    cluster = shrunk()
    place(cluster, 3)
    cluster.change(3, **change)
    cluster.tick(120)
    send_heartbeats(cluster, step=100)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason is None


# -- losses -----------------------------------------------------------------------------------------------------------


def full_cluster(**recovery: Any) -> FakeCluster:
    cluster = elastic_cluster(HOLDING, recovery={"shrinkAfter": "5s", **recovery})
    cluster.settle()
    place(cluster, 0, 1, 2, 3)
    send_heartbeats(cluster, step=50)
    cluster.settle()
    return cluster


def save_after_notice(cluster: FakeCluster, seconds_of_save: float) -> None:
    """Preempt pod 3 with notice: all ranks save, and the others wait. Pod 3 has ended its rank and still exists."""
    cluster.change(3, disruption="TerminationByKubelet", deleted_at=cluster.now, grace=seconds(30))
    cluster.settle()
    cluster.tick(seconds_of_save)
    send_heartbeats(cluster, step=51, waiting=True)
    saved = RankEnd(rank=3, exit_code=ExitCode.SAVED)
    cluster.beat(3, RankState.SAVED, step=51, notice=True, ends=(saved,))
    cluster.settle()


def test_survivors_continue_at_once_if_the_save_took_longer_than_shrink_after() -> None:
    cluster = full_cluster()
    save_after_notice(cluster, 6)
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes, entry.pod_attempts) == (2, 3, (1, 1, 1))
    # The next attempt does not wait for the leaving pod; its replacement is created once that pod is gone.
    assert "circles-a1-n3" in cluster.pods
    assert "circles-a2-n3" not in cluster.pods


def test_lost_pod_is_replaced_if_shrink_after_is_longer_than_the_save() -> None:
    cluster = full_cluster(shrinkAfter="60s")
    save_after_notice(cluster, 6)
    assert cluster.job.status.attempt == 1
    cluster.vanish("circles-a1-n3")
    send_heartbeats(cluster, step=51, waiting=True)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes, entry.pod_attempts) == (2, None, (1, 1, 1, 2))


def test_shrink_after_counts_from_the_loss() -> None:
    cluster = full_cluster(shrinkAfter="60s")
    lost_at = cluster.now
    save_after_notice(cluster, 6)
    cluster.vanish("circles-a1-n3")
    send_heartbeats(cluster, step=51, waiting=True)
    cluster.settle()
    cluster.now = lost_at + seconds(60)
    send_heartbeats(cluster, step=51, waiting=True)
    cluster.settle()
    assert [entry.reason for entry in cluster.job.status.attempts[:2]] == [Reason.TERMINATION_BY_KUBELET, Reason.SHRUNK]


def test_node_lost_while_saving_to_grow_counts_as_preemption() -> None:
    cluster = shrunk()
    place(cluster, 3)
    cluster.tick(120)
    send_heartbeats(cluster, step=100)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason == Reason.GROWN
    name = "circles-a1-n1"
    cluster.pods[name] = replace(cluster.pods[name], disruption="TerminationByKubelet", deleted_at=cluster.now)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.reason, entry.pod, cluster.job.status.preemptions) == (Reason.TERMINATION_BY_KUBELET, name, 1)
    cluster.settle()
    assert cluster.job.status.preemptions == 1
