"""What a job with a queue requests besides its pods (a rack or zone, memory that has grown), and what it reports."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.heartbeat import RankState
from finetune_contract.phase import Phase
from finetune_operator.api import kueue, labels
from finetune_operator.manifests import PodOptions, build_pod
from finetune_operator.plan.model.types import Refusal
from testing.simulated.workloads import is_true
from tests.plan.fake_cluster import FakeCluster, make_job, seconds
from tests.plan.policies.test_queue import NAME, QUEUED, admitted, queued
from tests.plan.scenarios import LOST_PEER


def pod_set_of(cluster: FakeCluster) -> dict[str, Any]:
    (pod_set,) = cluster.queue.stored[NAME]["spec"]["podSets"]
    return dict(pod_set)


def test_packed_job_requests_its_domain_where_flavors_have_topologies() -> None:
    zone, rack = "topology.kubernetes.io/zone", "example.com/rack"
    packed = {"topology": {"accelerator": "cpu", "nodes": 2, "pack": "zone"}}
    assert "topologyRequest" not in pod_set_of(queued(**packed))
    with_topology = replace(QUEUED, kueue_topology=True, rack_label=rack)
    assert "topologyRequest" not in pod_set_of(queued(with_topology))
    expected = {"required": zone, "podIndexLabel": labels.NODE_RANK}
    assert pod_set_of(queued(with_topology, **packed))["topologyRequest"] == expected
    packed["topology"]["pack"] = "rack"
    # Kueue's own annotations in podTemplate replace the request.
    own = {"metadata": {"annotations": {"kueue.x-k8s.io/podset-preferred-topology": zone}}}
    assert pod_set_of(queued(with_topology, **packed))["topologyRequest"] == expected | {"required": rack}
    request = pod_set_of(queued(with_topology, podTemplate=own, **packed))["topologyRequest"]
    assert request == {"preferred": zone, "podIndexLabel": labels.NODE_RANK}


def test_edit_of_pack_requests_the_admission_again() -> None:
    cluster = queued()
    old = cluster.queue.stored[NAME]["metadata"]["annotations"][labels.REQUEST]
    cluster.edit(queueName="gpus", topology={"accelerator": "cpu", "nodes": 2, "pack": "zone"})
    cluster.settle()
    assert cluster.queue.stored[NAME]["metadata"]["annotations"][labels.REQUEST] != old


def test_edit_before_the_first_pod_gives_the_admission_back() -> None:
    """No pod is created in the moment in which its quota is released."""
    cluster = queued()
    cluster.refusal, cluster.num_admitted = Refusal("exceeded quota"), 0
    cluster.queue.admit(NAME, cluster.now)
    cluster.settle_refused()
    uid = cluster.queue.stored[NAME]["metadata"]["uid"]
    assert (cluster.job.status.attempt, cluster.pods) == (1, {})
    cluster.edit(queueName="gpus", topology={"accelerator": "cpu", "nodes": 3})
    cluster.refusal = None
    cluster.settle()
    assert cluster.queue.stored[NAME]["metadata"]["uid"] != uid
    assert cluster.job.status.phase is Phase.QUEUED
    assert not [name for name in cluster.manifests if name.startswith("circles-a")], "it would exist without quota"
    cluster.queue.admit(NAME, cluster.now)
    cluster.running()
    assert len(cluster.pods) == 3


def test_raised_memory_is_requested_from_the_queue() -> None:
    topology = {"accelerator": "cpu", "nodes": 2, "resources": {"memory": "8Gi"}}
    cluster = admitted(replace(QUEUED, hold_seconds=120), topology=topology, recovery={"maxMemory": "32Gi"})
    old = cluster.queue.stored[NAME]["metadata"]["uid"]
    cluster.exit(1, 137, reason="OOMKilled")
    cluster.beat(0, RankState.FAILED, step=10, ends=(LOST_PEER,), waiting=True)
    for _ in range(3):
        cluster.settle()
        cluster.tick(10)
    # No pod is kept: it would hold quota of a request that is withdrawn.
    assert cluster.pods == {}
    workload = cluster.queue.stored[NAME]
    assert workload["metadata"]["uid"] != old
    (container,) = workload["spec"]["podSets"][0]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["memory"] == "12288Mi"
    cluster.queue.admit(NAME, cluster.now)
    cluster.settle()
    assert {pod.memory for pod in cluster.pods.values()} == {"12288Mi"}


@pytest.mark.parametrize("kind", ["required", "preferred"])
def test_pods_repeat_the_request_for_their_place(kind: str) -> None:
    name, zone = f"{kueue.GROUP}/podset-{kind}-topology", "topology.kubernetes.io/zone"
    cluster = queued(podTemplate={"metadata": {"annotations": {name: zone}}})
    workload = cluster.queue.admit(NAME, cluster.now)
    workload["status"]["admission"]["podSetAssignments"][0]["topologyAssignment"] = {"levels": ["rack"]}
    # Another controller of MultiKueue may have created the pods' request without the template.
    cluster.job = cluster.job.model_copy(update={"spec": make_job(queueName="gpus").spec})
    pod = build_pod(cluster.job, 1, 0, QUEUED, PodOptions(admission=cluster.observed().workloads[0].update))
    assert pod["metadata"]["annotations"] == {kueue.POD_WORKLOAD: NAME, name: zone}


def test_readiness_and_the_cost_of_an_eviction_are_reported() -> None:
    cluster = admitted()
    assert is_true(cluster.queue.stored[NAME], "PodsReady")

    def cost() -> str | None:
        annotations = cluster.queue.stored[NAME]["metadata"]["annotations"]
        value: str | None = annotations.get(kueue.PRIORITY_BOOST)
        return value

    assert cost() is None, "it has just saved"
    costs = []
    for step in range(11, 15):
        cluster.tick(240)
        cluster.train_to(step, checkpoint=5)
        cluster.settle()
        costs.append(cost())
    assert costs == ["1", "2", "2", "3"]
    cluster.train_to(15, checkpoint=15)
    cluster.settle()
    assert cost() == "0"


def test_only_a_long_recovery_is_reported_to_the_queue() -> None:
    cluster = admitted()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    version = cluster.queue.stored[NAME]["metadata"]["resourceVersion"]
    cluster.vanish("circles-a1-n0")
    cluster.settle()
    cluster.tick(29)
    cluster.settle()
    assert cluster.queue.stored[NAME]["metadata"]["resourceVersion"] == version
    assert cluster.decide().requeue_after == seconds(1)
    cluster.tick(1)
    cluster.settle()
    assert not is_true(cluster.queue.stored[NAME], "PodsReady")
    cluster.running()
    cluster.settle()
    assert is_true(cluster.queue.stored[NAME], "PodsReady")
