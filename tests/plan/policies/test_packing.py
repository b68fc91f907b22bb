"""A packed gang that finds no room in the rack or zone of its first pod tries another one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import PodPhase
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job


def avoided(pod: dict[str, Any]) -> list[str]:
    preferred = (pod["spec"].get("affinity") or {}).get("nodeAffinity") or {}
    terms = preferred.get("preferredDuringSchedulingIgnoredDuringExecution") or []
    return [name for term in terms for field in term["preference"]["matchFields"] for name in field["values"]]


@pytest.mark.parametrize(("pack", "expected"), [("zone", ["full-zone"]), (None, [])])
def test_next_attempt_avoids_the_node_of_the_first_pod(pack: str | None, expected: list[str]) -> None:
    topology = {"accelerator": "cpu", "nodes": 3} | ({"pack": pack} if pack else {})
    cluster = FakeCluster(make_job(topology=topology), settings=replace(SETTINGS, gangs=True))
    cluster.settle()
    cluster.change(0, node="full-zone", phase=PodPhase.RUNNING, ready=True)
    cluster.settle()
    while cluster.job.status.attempt == 1:
        cluster.tick(10)
        cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node) == (Reason.GANG_RELEASED, expected[0] if expected else None)
    assert avoided(cluster.manifests["circles-a2-n0"]) == expected


def test_pod_that_received_its_node_first_has_chosen_the_zone() -> None:
    topology = {"accelerator": "cpu", "nodes": 3, "pack": "zone"}
    cluster = FakeCluster(make_job(topology=topology), settings=replace(SETTINGS, gangs=True))
    cluster.settle()
    for rank in (1, 0):
        cluster.tick(5)
        cluster.change(rank, node=f"node-{rank}", scheduled_at=cluster.now)
    cluster.settle()
    cluster.tick(60)
    cluster.settle()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node) == (Reason.GANG_RELEASED, "node-1")


V1ALPHA2, V1BETA1 = "scheduling.k8s.io/v1alpha2", "scheduling.k8s.io/v1beta1"
BY_ZONE = {"topology": [{"key": "topology.kubernetes.io/zone"}]}


@pytest.mark.parametrize(
    ("mode", "api", "pack", "expected"),
    [
        ("podGroup", V1ALPHA2, "zone", BY_ZONE),
        ("podGroup", V1BETA1, "zone", BY_ZONE),
        ("podGroup", V1ALPHA2, "rack", {"topology": [{"key": "example.com/rack"}]}),
        ("podGroup", V1ALPHA2, None, None),
        ("volcano", "scheduling.volcano.sh/v1beta1", "zone", None),
        ("coscheduling", "scheduling.x-k8s.io/v1alpha1", "zone", None),
    ],
)
def test_pod_group_of_kubernetes_requires_one_rack_or_zone(
    mode: str, api: str, pack: str | None, expected: dict[str, Any] | None
) -> None:
    topology = {"accelerator": "cpu", "nodes": 3} | ({"pack": pack} if pack else {})
    settings = replace(SETTINGS, gangs=True, rack_label="example.com/rack")
    cluster = FakeCluster(make_job(topology=topology, scheduling=mode), settings=settings)
    cluster.gang_apis = {SchedulingMode(mode): api}
    cluster.settle()
    assert cluster.manifests["PodGroup circles-a1"]["spec"].get("schedulingConstraints") == expected
    # Pods of a later attempt must follow the pods that it keeps, which are in no PodGroup of it.
    affinity = cluster.manifests["circles-a1-n1"]["spec"].get("affinity") or {}
    assert ("podAffinity" in affinity) is (pack is not None)
