"""The roles that the chart gives the operator: what an enabled feature needs, and no more."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from testing.helm import CHART, NAME, Helm, Object, one


def rules(objects: list[Object], kind: str, suffix: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = one(objects, kind, NAME + suffix)["rules"]
    return found


def resources(objects: list[Object], kind: str, suffix: str = "") -> set[str]:
    return {name for rule in rules(objects, kind, suffix) for name in rule["resources"]}


def test_roles_contain_the_rules_of_the_file(helm: Helm) -> None:
    file = yaml.safe_load((CHART / "files/rules.yaml").read_text())
    objects = helm.render()
    assert rules(objects, "ClusterRole", "-jobs") == file["jobs"]
    assert rules(objects, "ClusterRole", "-cluster") == file["cluster"]
    secrets = [rule for rule in rules(objects, "Role") if rule["resources"] == ["secrets"]]
    assert secrets == [
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": [f"{NAME}-tls"], "verbs": ["get", "update"]}
    ]


def test_queues_add_permissions_only_if_they_are_enabled(helm: Helm) -> None:
    file = yaml.safe_load((CHART / "files/rules.yaml").read_text())
    objects = helm.render({"kueue": {"enabled": True}})
    assert rules(objects, "ClusterRole", "-jobs") == file["jobs"] + file["queues"]
    assert rules(objects, "ClusterRole", "-cluster") == file["cluster"] + file["queueClasses"]


@pytest.mark.parametrize("feature", ["gangs", "disruptionBudgets", "evictionRequests"])
def test_features_add_permissions_only_if_they_are_enabled(helm: Helm, feature: str) -> None:
    file = yaml.safe_load((CHART / "files/rules.yaml").read_text())
    assert rules(helm.render(), "ClusterRole", "-jobs") == file["jobs"]
    objects = helm.render({feature: {"enabled": True}})
    assert rules(objects, "ClusterRole", "-jobs") == file["jobs"] + file[feature]
    assert rules(objects, "ClusterRole", "-cluster") == file["cluster"]


def test_pods_can_be_resized_only_if_it_is_enabled(helm: Helm) -> None:
    file = yaml.safe_load((CHART / "files/rules.yaml").read_text())
    assert file["resizes"] == [{"apiGroups": [""], "resources": ["pods/resize"], "verbs": ["patch"]}]
    objects = helm.render({"recovery": {"resizePods": True}})
    assert rules(objects, "ClusterRole", "-jobs") == file["jobs"] + file["resizes"]
    assert "pods/resize" not in resources(helm.render(), "ClusterRole", "-jobs")


def test_nodes_can_be_changed_only_if_faulty_ones_are_tainted(helm: Helm) -> None:
    file = yaml.safe_load((CHART / "files/rules.yaml").read_text())
    assert file["taints"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "patch"]}]
    objects = helm.render({"gpuFaults": {"taintAfterJobs": 2}})
    assert rules(objects, "ClusterRole", "-cluster") == file["cluster"] + file["taints"]
    unwatched = helm.render({"gpuFaults": {"taintAfterJobs": 2}, "watchNodes": False})
    (of_nodes,) = (rule for rule in rules(unwatched, "ClusterRole", "-cluster") if "nodes" in rule["resources"])
    assert set(of_nodes["verbs"]) == {"get", "patch"}


@pytest.mark.parametrize("rule", ["finetunejobs", "nodes", "evictions"])
def test_objects_that_the_operator_only_watches_are_not_read_one_by_one(helm: Helm, rule: str) -> None:
    objects = helm.render({"evictionRequests": {"enabled": True}})
    suffix = "-cluster" if rule == "nodes" else "-jobs"
    verbs = [set(each["verbs"]) for each in rules(objects, "ClusterRole", suffix) if rule in each["resources"]]
    assert len(verbs) == 1
    assert {"list", "watch"} <= verbs[0]
    assert "get" not in verbs[0]


def test_with_namespaces_only_nodes_and_token_reviews_are_cluster_wide(helm: Helm) -> None:
    objects = helm.render({"namespaces": ["team-a", "team-b"], "rbac": {"aggregate": False}})
    roles = [thing for thing in objects if thing["kind"] == "Role" and thing["metadata"]["name"] == f"{NAME}-jobs"]
    assert [thing["metadata"]["namespace"] for thing in roles] == ["team-a", "team-b"]
    assert [thing["metadata"]["name"] for thing in objects if thing["kind"] == "ClusterRole"] == [f"{NAME}-cluster"]
    assert resources(objects, "ClusterRole", "-cluster") == {"nodes", "tokenreviews"}
    few = helm.render({"namespaces": ["team-a"], "watchNodes": False, "rbac": {"aggregate": False}})
    assert resources(few, "ClusterRole", "-cluster") == {"tokenreviews"}
    none = helm.render({"watchNodes": False, "coordinator": {"enabled": False}})
    assert f"{NAME}-cluster" not in {thing["metadata"]["name"] for thing in none}
