"""Gangs with the real scheduler: PodGroups of Kubernetes, scheduling gates, and objects of other schedulers."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.controlplane.api import ControlPlaneApiError
from testing.controlplane.definitions import CRDS, await_established
from testing.controlplane.process import wait_for
from testing.controlplane.server import ControlPlane
from testing.operator.harness import ACCOUNT, HOME, Jobs, OperatorProcess, build_job, granted, install, running
from tests.operator.conftest import NewOperator

V1ALPHA2 = "scheduling.k8s.io/v1alpha2"
GATES = ("GenericWorkload", "GangScheduling", "TopologyAwareWorkloadScheduling")
VOLCANO, COSCHEDULING = "scheduling.volcano.sh/v1beta1", "scheduling.x-k8s.io/v1alpha1"


@pytest.fixture(scope="module")
def gang_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that serves PodGroups, with a scheduler that respects them."""
    folder = tmp_path_factory.mktemp("gang-plane")
    with ControlPlane(folder=folder, features=GATES, apis=(V1ALPHA2,)) as plane:
        for version in (VOLCANO, COSCHEDULING):
            install_stand_in(plane, version)
        install(plane, features=("gangs",))
        yield plane


@pytest.fixture
def gang_jobs(gang_plane: ControlPlane) -> Jobs:
    return Jobs(gang_plane, gang_plane.create_namespace(f"test-{uuid.uuid4().hex[:8]}"))


@pytest.fixture
def gang_operator(gang_jobs: Jobs, tmp_path: Path) -> Iterator[OperatorProcess]:
    plane, namespace = gang_jobs.control_plane, gang_jobs.namespace
    flags = (f"--namespaces={namespace}", f"--lease-name={namespace}", "--gangs=true")
    with running(OperatorProcess(plane.kubeconfig_for(ACCOUNT, HOME), tmp_path / "operator.log", flags)) as operator:
        yield operator


def install_stand_in(plane: ControlPlane, version: str) -> None:
    """Install a stand-in for the PodGroup of another scheduler: only the fields that the operator writes."""
    group, _, number = version.partition("/")
    fields = {"minMember": {"type": "integer"}, "queue": {"type": "string"}, "priorityClassName": {"type": "string"}}
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": fields}}}
    spec = {
        "group": group,
        "names": {"kind": "PodGroup", "plural": "podgroups", "singular": "podgroup", "listKind": "PodGroupList"},
        "scope": "Namespaced",
        "versions": [{"name": number, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
    }
    name, approval = f"podgroups.{group}", {"api-approved.kubernetes.io": "unapproved, a stand-in for tests"}
    plane.api.create(
        CRDS,
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": name, "annotations": approval},
            "spec": spec,
        },
    )
    await_established(plane, name)


def small_nodes(jobs: Jobs, count: int, label: str) -> None:
    """Add nodes with room for one pod each."""
    jobs.control_plane.add_nodes(count, prefix=label, cpu="1500m", labels={"test": label})


def gang_of(number: int, label: str, **spec: Any) -> dict[str, Any]:
    template = {"spec": {"nodeSelector": {"test": label}}}
    return build_job("circles", nodes=number, podTemplate=template, recovery={"noticeSeconds": 1}, **spec)


def groups(jobs: Jobs, version: str) -> dict[str, dict[str, Any]]:
    items = jobs.control_plane.api.get(f"/apis/{version}/namespaces/{jobs.namespace}/podgroups")["items"]
    return {item["metadata"]["name"]: item for item in items}


def waits_for_node(jobs: Jobs) -> Callable[[], bool]:
    return lambda: jobs.status("circles").get("reason") == "Unschedulable"


def placed(jobs: Jobs) -> list[str]:
    return sorted(name for name, pod in jobs.pods().items() if pod["spec"].get("nodeName"))


def test_pod_group_holds_no_node_until_all_pods_fit(gang_jobs: Jobs, gang_operator: OperatorProcess) -> None:
    """With exactly the role of the chart. Without the group, two of the three pods would hold the two nodes."""
    small_nodes(gang_jobs, 2, "grouped")
    gang_jobs.create(gang_of(3, "grouped"))
    wait_for("a pod waits for a node", waits_for_node(gang_jobs))
    assert placed(gang_jobs) == []
    assert len(gang_jobs.pods()) == 3
    assert groups(gang_jobs, V1ALPHA2)["circles-a1"]["spec"]["schedulingPolicy"] == {"gang": {"minCount": 3}}
    small_nodes(gang_jobs, 1, "grouped")
    status = gang_jobs.wait_phase("circles", "Running")
    assert status["attempts"][0]["scheduling"] == "podGroup"
    for name in placed(gang_jobs):
        gang_jobs.delete_pod(name)
    gang_jobs.wait_attempt("circles", 2)
    wait_for("the old group is deleted", lambda: set(groups(gang_jobs, V1ALPHA2)) == {"circles-a2"})


def test_packed_pod_group_runs_in_the_zone_that_has_room_for_all_pods(
    gang_jobs: Jobs, gang_operator: OperatorProcess
) -> None:
    """The pods prefer the small zone, so with their affinity alone the gang would wait there."""
    add, zone = gang_jobs.control_plane.add_nodes, "topology.kubernetes.io/zone"
    add(1, prefix="small", cpu="1500m", labels={"test": "packed", zone: "small"})
    large = add(3, prefix="large", cpu="1500m", labels={"test": "packed", zone: "large"})
    job = gang_of(3, "packed")
    job["spec"]["topology"]["pack"] = "zone"
    term = {"matchExpressions": [{"key": zone, "operator": "In", "values": ["small"]}]}
    affinity = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term}]}
    job["spec"]["podTemplate"]["spec"]["affinity"] = {"nodeAffinity": affinity}
    gang_jobs.create(job)
    wait_for("all pods have a node", lambda: len(placed(gang_jobs)) == 3)
    pods = gang_jobs.pods()
    assert {pod["spec"]["nodeName"] for pod in pods.values()} == set(large)
    assert set(pods) == {f"circles-a1-n{rank}" for rank in range(3)}
    preferred = pods["circles-a1-n0"]["spec"]["affinity"]["nodeAffinity"]
    assert preferred["preferredDuringSchedulingIgnoredDuringExecution"][0]["preference"] == term


@pytest.mark.parametrize(
    ("mode", "version", "scheduler"),
    [("volcano", VOLCANO, "volcano"), ("coscheduling", COSCHEDULING, "scheduler-plugins-scheduler")],
)
def test_pod_groups_of_other_schedulers_are_created_on_request(
    gang_jobs: Jobs, gang_operator: OperatorProcess, mode: str, version: str, scheduler: str
) -> None:
    """The objects are accepted by the API server; no such scheduler runs here."""
    gang_jobs.create(gang_of(3, "nowhere", scheduling=mode))
    wait_for("the pods exist", lambda: len(gang_jobs.pods()) == 3)
    assert groups(gang_jobs, version)["circles-a1"]["spec"] == {"minMember": 3}
    assert {pod["spec"]["schedulerName"] for pod in gang_jobs.pods().values()} == {scheduler}


def test_incomplete_gang_with_gates_is_released(jobs: Jobs, new_operator: NewOperator) -> None:
    """With exactly the role of the chart, on a cluster without PodGroups."""
    small_nodes(jobs, 2, "gated")
    flags = ("--gangs=true", "--gang-hold-seconds=3")
    with granted(jobs.control_plane, "gangs"), running(new_operator(*flags)):
        jobs.create(gang_of(3, "gated"))
        wait_for("the gang is released", lambda: (first_attempt(jobs) or {}).get("reason") == "GangReleased")
        entry, status = first_attempt(jobs) or {}, jobs.status("circles")
        assert entry["scheduling"] == "gates"
        assert entry["message"].startswith("2 of 3 pods have a node; circles-a1-n")
        assert "Unschedulable: " in entry["message"]
        assert status.get("failures", 0) == status.get("preemptions", 0) == 0
        wait_for("the nodes are free", lambda: placed(jobs) == [])
        small_nodes(jobs, 1, "gated")
        assert jobs.wait_attempt("circles", 2, seconds=60)["attempts"][1].get("reason") is None
        assert not any(pod["spec"].get("schedulingGates") for pod in jobs.pods().values())


def first_attempt(jobs: Jobs) -> dict[str, Any] | None:
    attempts = jobs.status("circles").get("attempts")
    return attempts[0] if attempts else None


# disruption budgets


def evict(jobs: Jobs, pod: str) -> int:
    """Evict a pod as `kubectl drain` does; return the status of the response."""
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod}/eviction"
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    try:
        jobs.control_plane.api.create(path, body)
    except ControlPlaneApiError as error:
        return error.code
    return 201


def budgets(jobs: Jobs) -> dict[str, dict[str, Any]]:
    items = jobs.control_plane.api.get(f"/apis/policy/v1/namespaces/{jobs.namespace}/poddisruptionbudgets")["items"]
    return {item["metadata"]["name"]: item for item in items}


def test_budget_refuses_evictions_until_the_node_is_cordoned(jobs: Jobs, new_operator: NewOperator) -> None:
    """With exactly the role of the chart: autoscalers evict without a cordon, `kubectl drain` after one."""
    small_nodes(jobs, 3, "protected")
    granting = granted(jobs.control_plane, "disruptionBudgets")
    with granting, running(new_operator("--disruption-budgets=true")):
        jobs.create(gang_of(2, "protected"))
        jobs.wait_phase("circles", "Running")
        wait_for("the budget counts the pods", lambda: counted(jobs) == 2)
        assert evict(jobs, "circles-a1-n1") == 429
        node = jobs.pods()["circles-a1-n1"]["spec"]["nodeName"]
        jobs.control_plane.api.patch(f"/api/v1/nodes/{node}", {"spec": {"unschedulable": True}})
        wait_for("the node can be drained", lambda: evict(jobs, "circles-a1-n1") in (201, 404))
        status = jobs.wait_attempt("circles", 2)
        assert status["attempts"][0]["countsAs"] == "Preemption"
        wait_for("the next gang has a budget", lambda: set(budgets(jobs)) == {"circles-a2"})


def counted(jobs: Jobs) -> int:
    budget = budgets(jobs).get("circles-a1", {})
    return int((budget.get("status") or {}).get("currentHealthy", 0))
