"""Gangs that receive their nodes together: PodGroups, scheduling gates, and the release of incomplete gangs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.gangs import GATE
from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model import gangs
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.types import OpenGate, PodPhase, Refusal
from finetune_operator.plan.model.view import View
from finetune_operator.plan.policies.capacity import incomplete
from tests.plan.fake_cluster import FakeCluster, make_job, seconds
from tests.plan.scenarios import ELASTIC, HOLDING, place, send_heartbeats, wait_for_peers

GANGS = replace(HOLDING, gangs=True)
V1ALPHA2 = {SchedulingMode.POD_GROUP: "scheduling.k8s.io/v1alpha2"}
NO_ROOM = "Unschedulable: 0/4 nodes are available: 4 Insufficient cpu."
FOUR = {"accelerator": "cpu", "nodes": 4}


def gang(topology: dict[str, Any] = FOUR, apis: dict[SchedulingMode, str] | None = None, **spec: Any) -> FakeCluster:
    """Return a job whose pods exist and wait for nodes."""
    cluster = FakeCluster(make_job(topology=topology, **spec), settings=GANGS)
    cluster.gang_apis = apis or {}
    cluster.settle()
    return cluster


def bind(cluster: FakeCluster, numbers: Sequence[int], others: Sequence[int] = ()) -> None:
    """Let the scheduler give pods a node, and refuse one to others."""
    for number in numbers:
        cluster.change(number, node=f"node-{number}", scheduled_at=cluster.now, waiting="ContainerCreating")
    for number in others:
        cluster.change(number, waiting=NO_ROOM)
    cluster.settle()


def spec_of(cluster: FakeCluster, pod: str) -> dict[str, Any]:
    spec: dict[str, Any] = cluster.manifests[pod]["spec"]
    return spec


# modes


def test_pods_of_a_gang_belong_to_a_pod_group_that_exists_before_them() -> None:
    cluster = FakeCluster(make_job(topology=FOUR), settings=GANGS)
    cluster.gang_apis = dict(V1ALPHA2)
    cluster.step()
    kinds = [action.manifest["kind"] for action in cluster.decide().actions if hasattr(action, "manifest")]
    assert kinds.index("PodGroup") < kinds.index("Pod")
    cluster.settle()
    group = cluster.manifests["PodGroup circles-a1"]
    assert group["apiVersion"] == "scheduling.k8s.io/v1alpha2"
    assert group["spec"] == {"schedulingPolicy": {"gang": {"minCount": 4}}}
    assert group["metadata"]["ownerReferences"][0]["name"] == "circles"
    for rank in range(4):
        spec = spec_of(cluster, f"circles-a1-n{rank}")
        assert spec["schedulingGroup"] == {"podGroupName": "circles-a1"}
        assert "schedulingGates" not in spec
    assert cluster.job.status.attempts[0].scheduling == "podGroup"


@pytest.mark.parametrize(
    ("mode", "api", "group_spec", "scheduler"),
    [
        ("volcano", "scheduling.volcano.sh/v1beta1", {"minMember": 4}, "volcano"),
        ("coscheduling", "scheduling.x-k8s.io/v1alpha1", {"minMember": 4}, "scheduler-plugins-scheduler"),
    ],
)
def test_schedulers_with_their_own_pod_groups(mode: str, api: str, group_spec: dict[str, Any], scheduler: str) -> None:
    cluster = gang(apis={SchedulingMode(mode): api, **V1ALPHA2}, scheduling=mode)
    group = cluster.manifests["PodGroup circles-a1"]
    assert (group["apiVersion"], group["spec"]) == (api, group_spec)
    pod = cluster.manifests["circles-a1-n0"]
    assert pod["spec"]["schedulerName"] == scheduler
    assert "schedulingGroup" not in pod["spec"]
    if mode == "volcano":
        assert pod["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == "circles-a1"
    else:
        assert pod["metadata"]["labels"]["scheduling.x-k8s.io/pod-group"] == "circles-a1"


def test_template_of_the_job_chooses_another_scheduler_and_the_queue_of_volcano() -> None:
    template: dict[str, Any] = {"metadata": {"annotations": {"scheduling.volcano.sh/queue-name": "pictures"}}}
    apis = {SchedulingMode.VOLCANO: "scheduling.volcano.sh/v1beta1"}
    template |= {"spec": {"schedulerName": "vc"}}
    cluster = gang(apis=apis, scheduling="volcano", podTemplate=template, priorityClassName="high")
    assert cluster.manifests["PodGroup circles-a1"]["spec"] == {
        "minMember": 4,
        "queue": "pictures",
        "priorityClassName": "high",
    }
    assert spec_of(cluster, "circles-a1-n0")["schedulerName"] == "vc"


def test_without_pod_groups_the_gates_of_all_pods_are_removed_together() -> None:
    cluster = FakeCluster(make_job(topology=FOUR), settings=GANGS)
    cluster.step()
    cluster.refusal, cluster.num_admitted = Refusal("exceeded quota: gpus"), 3
    cluster.settle_refused()
    assert all(pod.gated for pod in cluster.pods.values())
    assert spec_of(cluster, "circles-a1-n0")["schedulingGates"] == [{"name": GATE}]
    cluster.refusal = None
    cluster.step()
    opened = [action.name for action in cluster.decide().actions if isinstance(action, OpenGate)]
    assert sorted(opened) == [f"circles-a1-n{rank}" for rank in range(4)]
    cluster.settle()
    assert not any(pod.gated for pod in cluster.pods.values())


def test_elastic_job_does_not_wait_for_pods_that_a_quota_refuses() -> None:
    cluster = FakeCluster(make_job(topology=ELASTIC), settings=GANGS)
    cluster.step()
    cluster.refusal, cluster.num_admitted = Refusal("exceeded quota: gpus"), 2
    cluster.settle_refused()
    assert len(cluster.pods) == 2
    assert not any(pod.gated for pod in cluster.pods.values())


def test_gates_of_the_template_stay() -> None:
    cluster = gang(podTemplate={"spec": {"schedulingGates": [{"name": "example.com/licence"}]}})
    gates = spec_of(cluster, "circles-a1-n0")["schedulingGates"]
    assert gates == [{"name": "example.com/licence"}, {"name": GATE}]


@pytest.mark.parametrize(
    ("settings", "spec"),
    [
        (HOLDING, {}),
        (GANGS, {"scheduling": "none"}),
        (GANGS, {"topology": {"accelerator": "cpu", "nodes": 1}}),
    ],
)
def test_pods_that_need_no_gang_are_scheduled_by_themselves(settings: Any, spec: dict[str, Any]) -> None:
    cluster = FakeCluster(make_job(**{"topology": FOUR} | spec), settings=settings)
    cluster.gang_apis = dict(V1ALPHA2)
    cluster.settle()
    assert cluster.pods
    assert cluster.children == {}
    assert not {"schedulingGroup", "schedulingGates"} & set(spec_of(cluster, "circles-a1-n0"))
    assert cluster.job.status.attempts[0].scheduling is None


def test_queue_admits_the_gang_so_auto_adds_nothing() -> None:
    cluster = FakeCluster(make_job(topology=FOUR, queueName="gpus"), settings=replace(GANGS, kueue=True))
    cluster.gang_apis = dict(V1ALPHA2)
    cluster.settle()
    cluster.queue.admit("circles-1f0c3a2b", cluster.now)
    cluster.settle()
    assert len(cluster.pods) == 4
    assert cluster.children == {}
    assert not {"schedulingGroup", "schedulingGates"} & set(spec_of(cluster, "circles-a1-n0"))


def test_requested_mode_counts_with_a_queue_too() -> None:
    job = make_job(topology=FOUR, queueName="gpus", scheduling="gates")
    cluster = FakeCluster(job, settings=replace(GANGS, kueue=True))
    cluster.settle()
    cluster.queue.admit("circles-1f0c3a2b", cluster.now)
    cluster.settle()
    assert spec_of(cluster, "circles-a1-n0")["schedulingGates"] == [{"name": GATE}]
    assert cluster.job.status.attempts[0].scheduling == "gates"


def test_mode_of_an_attempt_stays_if_the_cluster_begins_to_serve_pod_groups() -> None:
    cluster = FakeCluster(make_job(topology=FOUR), settings=GANGS)
    cluster.step()
    cluster.gang_apis = dict(V1ALPHA2)
    cluster.settle()
    assert cluster.children == {}
    assert "schedulingGates" in spec_of(cluster, "circles-a1-n3")


@pytest.mark.parametrize(
    ("settings", "mode", "remedy"),
    [
        (HOLDING, "gates", "write auto or none"),
        (GANGS, "podGroup", "GenericWorkload and GangScheduling, or write auto"),
        (GANGS, "volcano", "install Volcano, or write auto"),
    ],
)
def test_mode_that_is_not_available_is_refused_before_pods_exist(settings: Any, mode: str, remedy: str) -> None:
    cluster = FakeCluster(make_job(topology=FOUR, scheduling=mode), settings=settings)
    cluster.settle()
    accepted = find(cluster.job.status, ConditionType.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", Reason.NOT_SUPPORTED)
    assert accepted.message.startswith("spec.scheduling: ")
    assert remedy in accepted.message
    assert cluster.pods == {}


# elastic jobs and recovery


def test_elastic_gang_needs_min_nodes_and_shrinks_within_a_minute() -> None:
    cluster = gang(ELASTIC, apis=V1ALPHA2)
    assert cluster.manifests["PodGroup circles-a1"]["spec"] == {"schedulingPolicy": {"gang": {"minCount": 2}}}
    bind(cluster, (0, 1, 2), (3,))
    place(cluster, 0, 1, 2)
    send_heartbeats(cluster)
    cluster.settle()
    wait = cluster.decide().requeue_after
    assert wait is not None
    assert wait <= seconds(60)
    cluster.tick(60)
    send_heartbeats(cluster)
    cluster.settle()
    assert (cluster.job.status.attempts[0].reason, cluster.job.status.attempts[1].nodes) == (Reason.SHRUNK, 3)


def test_elastic_gang_with_exactly_min_nodes_keeps_them_for_shrink_after() -> None:
    """It may train with these pods, so they are not held in vain."""
    cluster = gang(ELASTIC, recovery={"shrinkAfter": "30m"})
    bind(cluster, (0, 1), (2, 3))
    place(cluster, 0, 1)
    minutes = 0
    while cluster.job.status.attempt == 1:
        minutes += 1
        cluster.tick(60)
        send_heartbeats(cluster)
        cluster.settle()
    assert 29 <= minutes <= 31
    assert (cluster.job.status.attempts[0].reason, cluster.job.status.attempts[1].nodes) == (Reason.SHRUNK, 2)


def recovering(num_lost: int) -> FakeCluster:
    """Return a gang of four that trained in a PodGroup and lost some pods; the others are kept."""
    cluster = gang(apis=V1ALPHA2).running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    for rank in range(num_lost):
        cluster.vanish(f"circles-a1-n{rank}")
    wait_for_peers(cluster, *range(num_lost, 4))
    cluster.settle()
    cluster.settle()
    assert cluster.job.status.attempt == 2
    return cluster


def test_pod_that_is_replaced_alone_needs_no_group() -> None:
    cluster = recovering(1)
    assert "PodGroup circles-a2" not in cluster.children
    assert "schedulingGroup" not in spec_of(cluster, "circles-a2-n0")


def test_replaced_pods_form_a_group_and_the_old_one_stays_while_pods_belong_to_it() -> None:
    cluster = recovering(2)
    assert cluster.manifests["PodGroup circles-a2"]["spec"] == {"schedulingPolicy": {"gang": {"minCount": 2}}}
    assert set(cluster.children) == {"PodGroup circles-a1", "PodGroup circles-a2"}
    for rank in (2, 3):
        cluster.vanish(f"circles-a1-n{rank}")
    cluster.settle()
    assert "PodGroup circles-a1" not in cluster.children


def test_survivors_of_a_gang_do_not_hold_their_nodes_for_more_than_a_minute() -> None:
    """The nodes that they wait for do not come: other jobs can use theirs. The survivors have saved."""
    cluster = recovering(1)
    cluster.change(0, waiting=NO_ROOM)
    began = cluster.now
    while cluster.job.status.attempts[-1].reason is None:
        wait_for_peers_again(cluster)
        wait = cluster.settle().requeue_after
        assert wait is not None
        cluster.tick(min(wait.total_seconds(), 5))
        cluster.settle()
    assert cluster.now - began <= seconds(61)
    cluster.tick(3)
    cluster.settle()
    assert cluster.pods == {}
    status = cluster.job.status
    assert [entry.reason for entry in status.attempts] == [Reason.POD_LOST, Reason.GANG_RELEASED]
    assert (status.failures, status.preemptions, status.phase) == (0, 1, Phase.RECOVERING)


def wait_for_peers_again(cluster: FakeCluster) -> None:
    for uid, received in list(cluster.beats.items()):
        cluster.beats[uid] = replace(received, received_at=cluster.now)


# release


def test_incomplete_gang_is_released_within_a_minute_and_requested_again() -> None:
    cluster = gang()
    cluster.tick(100)
    cluster.settle()
    bind(cluster, (0, 1, 2), (3,))
    wait = cluster.decide().requeue_after
    assert wait is not None
    assert seconds(30) <= wait <= seconds(60)
    assert "3 of 4 pods have a node, and they are released at" in (cluster.job.status.message or "")
    cluster.tick(wait.total_seconds())
    cluster.settle()
    status, entry = cluster.job.status, cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as) == (Reason.GANG_RELEASED, None)
    assert entry.message == f"3 of 4 pods have a node; circles-a1-n3: {NO_ROOM}"
    assert (status.phase, status.reason) == (Phase.QUEUED, Reason.GANG_RELEASED)
    assert (status.failures, status.preemptions) == (0, 0)
    assert NO_ROOM.rstrip(".") in (status.message or "")
    cluster.tick(3)
    cluster.settle()
    assert cluster.pods == {}
    pause = cluster.decide().requeue_after
    assert pause is not None
    assert pause.total_seconds() == pytest.approx(17, abs=4)
    cluster.tick(pause.total_seconds())
    cluster.settle()
    assert sorted(cluster.pods) == [f"circles-a2-n{rank}" for rank in range(4)]


@pytest.mark.parametrize(
    "change",
    [
        {"node": None},
        {"deleted_at": "now"},
        {"disruption": "PreemptionByScheduler"},
        {"phase": PodPhase.FAILED, "exit_code": 1},
    ],
)
def test_pod_that_leaves_its_node_does_not_complete_the_gang(change: dict[str, Any]) -> None:
    cluster = gang()
    bind(cluster, (0, 1, 2, 3))
    if "deleted_at" in change:
        change = {"deleted_at": cluster.now}
    cluster.change(0, **change)
    view = View(cluster.job, cluster.observed(), cluster.now, cluster.settings)
    assert [pod.node_rank for pod in gangs.placed(view)] == [1, 2, 3]


def test_message_names_a_pod_only_with_the_reason_of_the_scheduler() -> None:
    cluster = gang()
    bind(cluster, (0, 1, 2))
    cluster.tick(60)
    cluster.settle()
    assert cluster.job.status.attempts[0].message == "3 of 4 pods have a node"


def test_delays_of_repeated_releases_increase() -> None:
    cluster = gang()
    delays = []
    for attempt in range(1, 7):
        assert cluster.job.status.attempt == attempt
        bind(cluster, (0,), (1, 2, 3))
        cluster.tick(60)
        cluster.settle()
        cluster.tick(2)
        cluster.settle()
        ended_at = cluster.job.status.attempts[-1].ended_at
        pause = cluster.decide().requeue_after
        assert pause is not None
        assert ended_at is not None
        delays.append((cluster.now + pause - ended_at).total_seconds())
        cluster.tick(pause.total_seconds())
        cluster.settle()
    assert delays == [pytest.approx(delay, rel=0.2) for delay in (20, 40, 80, 160, 300, 300)]


@pytest.mark.parametrize(("numbers", "others"), [((), (0, 1, 2, 3)), ((0, 1, 2, 3), ())])
def test_gang_that_holds_no_node_in_vain_is_not_released(numbers: Sequence[int], others: Sequence[int]) -> None:
    cluster = gang()
    bind(cluster, numbers, others)
    cluster.tick(4000)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None


def test_gangs_that_block_each_other_release_at_different_times_below_the_limit() -> None:
    shares = set()
    for uid in map(str, range(50)):
        cluster = gang()
        meta = cluster.job.metadata.model_copy(update={"uid": uid})
        cluster.job = cluster.job.model_copy(update={"metadata": meta})
        cluster.change(0, node="node-0", scheduled_at=cluster.now)
        view = View(cluster.job, cluster.observed(), cluster.now, cluster.settings)
        due = incomplete.release_at(view, cluster.job.status.attempts[-1])
        assert due is not None
        shares.add((due - cluster.now).total_seconds())
    assert len(shares) == 50
    assert 30 <= min(shares) <= max(shares) <= 60


def test_fall_back_from_spot_counts_the_wait_of_released_attempts() -> None:
    """Otherwise a gang that is released each minute never waits long enough for other nodes."""
    cluster = gang(recovery={"spot": {"fallbackAfter": "3m"}})
    reasons: list[str | None] = []
    for _ in range(200):
        if len(cluster.pods) == 4 and cluster.pod(0).node is None:
            bind(cluster, (0,), (1, 2, 3))
        cluster.tick(3)
        cluster.settle()
        reasons = [entry.reason for entry in cluster.job.status.attempts]
        if Reason.FELL_BACK in reasons:
            break
    assert reasons.count(Reason.GANG_RELEASED) >= 2
    assert cluster.now - cluster.job.status.attempts[0].started_at >= seconds(180)
    cluster.tick(3)
    cluster.settle()
    assert all(pod.fell_back for pod in cluster.pods.values() if pod.phase is PodPhase.PENDING and pod.node is None)
