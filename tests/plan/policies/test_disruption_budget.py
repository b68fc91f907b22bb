"""The PodDisruptionBudget of a running gang."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_operator.plan.model.types import ObservedNode
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job

BUDGETS = replace(SETTINGS, disruption_budgets=True)
BUDGET = "PodDisruptionBudget circles-a1"


def running() -> FakeCluster:
    cluster = FakeCluster(make_job(), settings=BUDGETS)
    cluster.optional_apis = frozenset({"policy/v1"})
    return cluster.running()


def test_budget_of_a_running_gang_requires_all_its_pods() -> None:
    cluster = FakeCluster(make_job(), settings=BUDGETS)
    cluster.optional_apis = frozenset({"policy/v1"})
    cluster.settle()
    assert cluster.children == {}, "pods that wait are not protected"
    cluster.run_all()
    cluster.settle()
    assert set(cluster.children) == {BUDGET}
    budget = cluster.manifests[BUDGET]
    assert budget["spec"]["minAvailable"] == 2
    assert budget["metadata"]["ownerReferences"][0]["name"] == "circles"
    labels = cluster.manifests["circles-a1-n0"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("node", [ObservedNode(cordoned=True), ObservedNode(leaving="karpenter.sh/disrupted")])
def test_budget_is_deleted_when_a_node_is_drained(node: ObservedNode) -> None:
    cluster = running()
    cluster.nodes["node-1"] = node
    cluster.step()
    assert cluster.children == {}
    cluster.nodes.clear()


def test_cordon_that_is_taken_back_restores_the_budget_and_does_not_interrupt() -> None:
    cluster = running()
    cluster.nodes["node-1"] = ObservedNode(cordoned=True)
    cluster.settle()
    assert (cluster.children, cluster.job.status.attempts[0].reason) == ({}, None)
    cluster.nodes.clear()
    cluster.settle()
    assert set(cluster.children) == {BUDGET}


def test_each_gang_has_its_own_budget_and_an_ended_one_has_none() -> None:
    cluster = running()
    cluster.train_to(10, checkpoint=5)
    cluster.change(1, deleted_at=cluster.now, disruption="EvictionByEvictionAPI")
    cluster.settle()
    assert cluster.children == {}
    for _ in range(2):
        # The ranks save, then the other pod is deleted.
        cluster.tick(200)
        cluster.settle()
    cluster.running()
    assert set(cluster.children) == {"PodDisruptionBudget circles-a2"}
    cluster.edit(suspend=True)
    cluster.settle()
    assert cluster.children == {}


@pytest.mark.parametrize("enabled", [True, False])
def test_without_permission_or_api_there_is_no_budget(enabled: bool) -> None:
    cluster = FakeCluster(make_job(), settings=replace(BUDGETS, disruption_budgets=enabled))
    cluster.optional_apis = frozenset() if enabled else frozenset({"policy/v1"})
    cluster.running()
    assert cluster.children == {}
