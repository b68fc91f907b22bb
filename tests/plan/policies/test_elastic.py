"""Elastic gangs: when a job goes on with fewer nodes, and when it grows back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order, RankEnd, RankState
from finetune_contract.phase import Phase
from finetune_operator.api.job import Capacity
from finetune_operator.api.reasons import Reason
from finetune_operator.manifests import global_batch
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.plan.model.view import members_of
from finetune_operator.plan.replies import reply_to
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job, seconds

HOLDING = replace(SETTINGS, hold_seconds=120)
ELASTIC = {"accelerator": "cpu", "minNodes": 2, "maxNodes": 4}


def place(cluster: FakeCluster, *numbers: int) -> None:
    """Pods of the newest attempt get a node and run."""
    for number in numbers:
        cluster.change(number, phase=PodPhase.RUNNING, node=f"node-{number}", ready=True)


def hear(cluster: FakeCluster, **told: Any) -> None:
    """All that run beat: those of the gang train, the others wait."""
    members = members_of(cluster.job.status, cluster.job.spec)
    for pod in cluster.pods.values():
        if pod.phase is not PodPhase.RUNNING:
            continue
        rank = next((r for r, m in enumerate(members) if m == (pod.attempt, pod.node_rank)), None)
        cluster.say(pod, rank, **told)


def elastic_cluster(settings: Any = HOLDING, **spec: Any) -> FakeCluster:
    return FakeCluster(
        make_job(topology=ELASTIC, training={"method": "LoRA", "steps": 100_000}, **spec), settings=settings
    )


def shrunk(**spec: Any) -> FakeCluster:
    """Four were asked for, three have room; the job trains on three."""
    cluster = elastic_cluster(**spec)
    cluster.settle()
    place(cluster, 0, 1, 3)
    hear(cluster)
    cluster.settle()
    for _ in range(31):
        cluster.tick(10)
        hear(cluster)
        cluster.settle()
    hear(cluster, step=5)
    cluster.settle()
    return cluster


def test_it_waits_for_room_first() -> None:
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0, 1, 3)
    hear(cluster)
    decided = cluster.settle()
    assert decided.requeue_after is not None
    assert (cluster.job.status.message or "").endswith("continues on fewer nodes at 12:05:00 UTC")
    cluster.tick(299)
    hear(cluster)
    cluster.settle()
    assert cluster.job.status.attempt == 1


def test_it_goes_on_with_those_that_have_room() -> None:
    cluster = shrunk()
    status = cluster.job.status
    first, second = status.attempts
    assert (first.reason, first.next_nodes, first.counts_as) == (Reason.SHRUNK, 3, None)
    assert (second.nodes, second.pod_attempts, second.pod_ranks) == (3, (1, 1, 1), (0, 1, 3))
    assert status.nodes == "3/4"
    assert (status.preemptions, status.failures) == (0, 0)
    assert global_batch(cluster.job.spec) == 4
    assert status.phase is Phase.RUNNING


def test_its_supervisors_are_told_of_the_smaller_cluster() -> None:
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0, 1, 3)
    cluster.tick(300)
    hear(cluster)
    cluster.settle()
    cluster.settle()
    last = cluster.pods["circles-a1-n3"]
    told = reply_to(cluster.job, cluster.beats[last.uid].beat, HOLDING).world
    assert told is not None
    assert (told.attempt, told.node_rank, told.num_nodes) == (2, 2, 3)


def test_below_the_minimum_it_waits_and_says_for_what() -> None:
    cluster = elastic_cluster()
    cluster.settle()
    place(cluster, 0)
    cluster.change(1, waiting="Unschedulable: 0/3 nodes are available: 3 Insufficient cpu.")
    cluster.tick(3600)
    hear(cluster)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert cluster.job.status.reason == Reason.UNSCHEDULABLE
    assert "3 Insufficient cpu" in (cluster.job.status.message or "")


def test_it_shrinks_without_a_coordinator_too() -> None:
    cluster = elastic_cluster(replace(SETTINGS, coordinator_url=""), recovery={"shrinkAfter": "30s"})
    cluster.settle()
    place(cluster, 0, 1)
    cluster.tick(30)
    cluster.settle()
    cluster.tick(2)
    cluster.settle()
    assert sorted(cluster.pods) == ["circles-a2-n0", "circles-a2-n1"]
    env = {item["name"]: item.get("value") for item in cluster.made["circles-a2-n1"]["spec"]["containers"][0]["env"]}
    assert env["FINETUNE_NUM_NODES"] == "2"


def test_a_pod_stands_by_for_the_missing_one() -> None:
    cluster = shrunk()
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a1-n1", "circles-a1-n3", "circles-a2-n3"]
    env = {item["name"]: item.get("value") for item in cluster.made["circles-a2-n3"]["spec"]["containers"][0]["env"]}
    assert env["FINETUNE_STANDBY"] == "1"


def test_it_grows_back_when_there_is_room_and_all_save_first() -> None:
    cluster = shrunk()
    place(cluster, 3)
    hear(cluster, step=6)
    cluster.settle()
    assert cluster.job.status.attempt == 2, "it has just begun"
    cluster.tick(120)
    hear(cluster, step=100)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.reason, entry.next_nodes) == (2, Reason.GROWN, 4)
    first = cluster.pods["circles-a1-n0"]
    assert reply_to(cluster.job, cluster.beats[first.uid].beat, HOLDING).order is Order.SAVE_AND_STOP
    hear(cluster, step=101, waiting=True)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes) == (3, None)
    assert (entry.pod_attempts, entry.pod_ranks) == ((1, 1, 1, 2), (0, 1, 3, 3))
    hear(cluster, step=101, waiting=True)
    cluster.settle()
    worlds = [reply_to(cluster.job, beat.beat, HOLDING).world for beat in cluster.beats.values()]
    assert sorted(told.node_rank for told in worlds if told is not None) == [0, 1, 2, 3]
    assert {told.num_nodes for told in worlds if told is not None} == {4}
    assert cluster.job.status.preemptions == 0


def test_a_pod_that_stands_by_goes_with_its_job() -> None:
    cluster = shrunk()
    place(cluster, 3)
    hear(cluster, step=6)
    for pod in list(cluster.pods.values()):
        if pod.name != "circles-a2-n3":
            cluster.pods[pod.name] = replace(pod, phase=PodPhase.SUCCEEDED, exit_code=0)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert cluster.pods["circles-a2-n3"].deleted_at is not None


def test_a_higher_minimum_holds_from_the_next_attempt_on() -> None:
    cluster = shrunk()
    topology = cluster.job.spec.topology.model_copy(update={"min_nodes": 4})
    cluster.job = cluster.job.model_copy(update={"spec": cluster.job.spec.model_copy(update={"topology": topology})})
    cluster.vanish("circles-a1-n1")
    hear(cluster, step=6, waiting=True)
    cluster.settle()
    assert cluster.job.status.attempts[-1].nodes is None


# -- spot -------------------------------------------------------------------------------------------------------------

FALLBACK = {"recovery": {"spot": {"fallbackAfter": "10m"}}}


def spot_cluster() -> FakeCluster:
    job = make_job(training={"method": "LoRA", "steps": 100_000}, **FALLBACK)
    cluster = FakeCluster(job, settings=HOLDING)
    cluster.settle()
    place(cluster, 0)
    return cluster


def affinity(cluster: FakeCluster, name: str) -> dict[str, Any]:
    found: dict[str, Any] = cluster.made[name]["spec"]["affinity"]["nodeAffinity"]
    return found


def fallen_back() -> FakeCluster:
    cluster = spot_cluster()
    cluster.tick(600)
    hear(cluster)
    cluster.settle()
    cluster.settle()
    return cluster


def test_it_waits_for_spot_nodes_first() -> None:
    cluster = spot_cluster()
    cluster.tick(599)
    hear(cluster)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert list(affinity(cluster, "circles-a1-n1")) == ["requiredDuringSchedulingIgnoredDuringExecution"]


def test_then_it_takes_any_node_for_the_pod_that_has_none() -> None:
    cluster = fallen_back()
    first, second = cluster.job.status.attempts
    assert (first.reason, second.capacity) == (Reason.FELL_BACK, Capacity.ANY)
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a2-n1"]
    assert list(affinity(cluster, "circles-a2-n1")) == ["preferredDuringSchedulingIgnoredDuringExecution"]


def test_it_goes_back_when_a_spot_node_is_there() -> None:
    cluster = fallen_back()
    place(cluster, 1)
    hear(cluster, step=5)
    cluster.settle()
    standby = cluster.pods["circles-a2-n2"]
    assert list(affinity(cluster, standby.name)) == ["requiredDuringSchedulingIgnoredDuringExecution"]
    place(cluster, 2)
    cluster.tick(120)
    hear(cluster, step=100)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason == Reason.BACK_TO_SPOT
    hear(cluster, step=101, waiting=True)
    cluster.settle()
    cluster.tick(2)
    hear(cluster, step=101, waiting=True)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.pod_attempts, entry.pod_ranks) == (3, (1, 2), (0, 2))
    assert sorted(cluster.pods) == ["circles-a1-n0", "circles-a2-n2"]


def test_a_pod_that_stands_by_may_fall_back_as_well() -> None:
    cluster = shrunk(**FALLBACK)
    cluster.tick(600)
    hear(cluster, step=500)
    cluster.settle()
    assert list(affinity(cluster, "circles-a2-n3")) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    assert cluster.job.status.attempt == 2


@pytest.mark.parametrize(
    "change", [{"deleted_at": FakeCluster().now, "grace": seconds(30)}, {"disruption": "Preempting"}]
)
def test_a_pod_that_is_about_to_go_is_nothing_to_grow_with(change: dict[str, Any]) -> None:
    cluster = shrunk()
    place(cluster, 3)
    cluster.change(3, **change)
    cluster.tick(120)
    hear(cluster, step=100)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason is None


# -- losses -----------------------------------------------------------------------------------------------------------


def full_cluster(**recovery: Any) -> FakeCluster:
    cluster = elastic_cluster(HOLDING, recovery={"shrinkAfter": "5s", **recovery})
    cluster.settle()
    place(cluster, 0, 1, 2, 3)
    hear(cluster, step=50)
    cluster.settle()
    return cluster


def save_after_notice(cluster: FakeCluster, seconds_of_save: float) -> None:
    """Pod 3 gets notice; all save and wait, and its own ranks have ended, too. Its pod is still there."""
    cluster.change(3, disruption="TerminationByKubelet", deleted_at=cluster.now, grace=seconds(30))
    cluster.settle()
    cluster.tick(seconds_of_save)
    hear(cluster, step=51, waiting=True)
    saved = RankEnd(rank=3, exit_code=ExitCode.SAVED)
    cluster.beat(3, RankState.SAVED, step=51, notice=True, ends=(saved,))
    cluster.settle()


def test_a_save_that_took_as_long_as_the_patience_is_followed_by_the_survivors_at_once() -> None:
    cluster = full_cluster()
    save_after_notice(cluster, 6)
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes, entry.pod_attempts) == (2, 3, (1, 1, 1))
    # Nobody waits for the pod that leaves; the one that is to replace it does.
    assert "circles-a1-n3" in cluster.pods
    assert "circles-a2-n3" not in cluster.pods


def test_with_more_patience_the_lost_pod_is_replaced_once_it_has_gone() -> None:
    cluster = full_cluster(shrinkAfter="60s")
    save_after_notice(cluster, 6)
    assert cluster.job.status.attempt == 1
    cluster.vanish("circles-a1-n3")
    hear(cluster, step=51, waiting=True)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes, entry.pod_attempts) == (2, None, (1, 1, 1, 2))


def test_patience_counts_from_the_loss() -> None:
    cluster = full_cluster(shrinkAfter="60s")
    lost_at = cluster.now
    save_after_notice(cluster, 6)
    cluster.vanish("circles-a1-n3")
    hear(cluster, step=51, waiting=True)
    cluster.settle()
    cluster.now = lost_at + seconds(60)
    hear(cluster, step=51, waiting=True)
    cluster.settle()
    assert [entry.reason for entry in cluster.job.status.attempts[:2]] == [Reason.TERMINATION_BY_KUBELET, Reason.SHRUNK]


def test_a_machine_that_is_lost_while_all_save_to_grow_counts_as_lost() -> None:
    cluster = shrunk()
    place(cluster, 3)
    cluster.tick(120)
    hear(cluster, step=100)
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason == Reason.GROWN
    name = "circles-a1-n1"
    cluster.pods[name] = replace(cluster.pods[name], disruption="TerminationByKubelet", deleted_at=cluster.now)
    cluster.settle()
    entry = cluster.job.status.attempts[-1]
    assert (entry.reason, entry.pod, cluster.job.status.preemptions) == (Reason.TERMINATION_BY_KUBELET, name, 1)
    cluster.settle()
    assert cluster.job.status.preemptions == 1
