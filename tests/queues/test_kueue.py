"""Jobs with queues on a real API server, with Kueue's real controller and exactly the operator's role."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api import kueue
from testing.controlplane.process import wait_for
from testing.controlplane.queues import Kueue
from testing.controlplane.server import ControlPlane
from testing.operator.harness import Jobs, OperatorProcess, build_job, jobs_path

pytestmark = pytest.mark.usefixtures("operator")
SAVING = {"metadata": {"annotations": {"testbed/exit-code": str(int(ExitCode.SAVED))}}}


def build(team: Jobs, name: str, *, priority: str = "", **spec: Any) -> dict[str, Any]:
    job = build_job(name, queueName=team.namespace, podTemplate=SAVING, **spec)
    if priority:
        job["metadata"]["labels"] = {kueue.PRIORITY_CLASS_LABEL: priority}
    return job


def pods_of(team: Jobs, name: str) -> list[dict[str, Any]]:
    return [pod for pod in team.pods().values() if pod["metadata"]["name"].startswith(f"{name}-a")]


def wait_message(team: Jobs, name: str, text: str) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        status = team.status(name)
        return status if status.get("phase") == "Queued" and text in status.get("message", "") else None

    return wait_for(f"{name} waits with {text!r}", found) or {}


def test_a_job_waits_for_quota_and_runs_on_the_nodes_of_its_flavor(team: Jobs) -> None:
    team.create(build(team, "first"))
    team.wait_phase("first", "Running")
    spec = pods_of(team, "first")[0]["spec"]
    assert spec["nodeSelector"] == {"pool": "pictures"}
    assert {"key": "pictures", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    team.create(build(team, "second"))
    wait_message(team, "second", "insufficient unused quota")
    assert pods_of(team, "second") == []
    for pod in list(team.pods()):
        team.set_pod_status(pod, {"phase": "Succeeded"})
    team.wait_phase("first", "Succeeded")
    team.wait_phase("second", "Running")


def test_a_preempted_job_releases_its_quota_and_returns(
    team: Jobs, queue_plane: tuple[ControlPlane, Kueue], operator: OperatorProcess
) -> None:
    _, controller = queue_plane
    team.create(build(team, "low"))
    team.wait_phase("low", "Running")
    team.create(build(team, "urgent", priority="high"))
    team.wait_phase("urgent", "Running")
    status = team.status("low")
    assert (status["attempts"][0]["reason"], status["preemptions"]) == ("EvictedByQueue", 1)
    assert pods_of(team, "low") == []
    # Another process of the operator continues from what is stored.
    operator.kill()
    operator.start().wait_ready()
    team.delete("urgent")
    team.wait_attempt("low", 2)

    def is_ready() -> bool:
        workloads = controller.workloads(team.namespace).items()
        workload = next(each for name, each in workloads if name.startswith("low"))
        states = {each["type"]: each["status"] for each in workload["status"]["conditions"]}
        return (states["Admitted"], states["Evicted"], states["PodsReady"]) == ("True", "False", "True")

    wait_for("the pods are reported as ready", is_ready)


def test_an_elastic_job_starts_small_and_its_request_is_replaced_by_a_bigger_one(
    team: Jobs, queue_plane: tuple[ControlPlane, Kueue]
) -> None:
    _, controller = queue_plane
    elastic = {"accelerator": "cpu", "minNodes": 1, "maxNodes": 4, "resources": {"cpu": "1", "memory": "1Gi"}}
    team.create(build(team, "elastic", topology=elastic))
    wait_for("two pods run", lambda: len(pods_of(team, "elastic")) == 2)
    team.wait_phase("elastic", "Running")
    (workload,) = controller.workloads(team.namespace).values()
    (assigned,) = workload["status"]["admission"]["podSetAssignments"]
    assert (workload["spec"]["podSets"][0]["minCount"], assigned["count"]) == (1, 2)
    # kwok's pods send no heartbeat, so the test reports that they train.
    (entry,) = team.status("elastic")["attempts"]
    status = {"attempts": [{**entry, "trainingAt": entry["startedAt"]}]}
    team.control_plane.api.patch(f"{jobs_path(team.namespace, 'elastic')}/status", {"status": status})
    wait_for("the other pods are requested", lambda: len(controller.workloads(team.namespace)) == 2)
    small = workload["metadata"]["name"]
    controller.add_queue(team.namespace, team.namespace, [{"name": "pool", "cpu": 4, "memory": "64Gi"}])

    def reasons(name: str) -> dict[str, str]:
        conditions = controller.workloads(team.namespace)[name]["status"].get("conditions") or ()
        return {each["type"]: each["reason"] for each in conditions if each["status"] == "True"}

    wait_for("all pods are admitted", lambda: "Admitted" in reasons(f"{small}-4"))
    wait_for("Kueue finishes the smaller request", lambda: "Finished" in reasons(small))
    assert reasons(small)["Finished"] == "WorkloadSliceReplaced"
    assert not any("Evicted" in reasons(name) for name in (small, f"{small}-4"))


def test_a_suspended_job_frees_its_queue(team: Jobs, queue_plane: tuple[ControlPlane, Kueue]) -> None:
    _, controller = queue_plane
    team.create(build(team, "paused"))
    team.wait_phase("paused", "Running")
    team.patch("paused", {"spec": {"suspend": True}})
    team.wait_phase("paused", "Suspended")
    wait_for("the request is withdrawn", lambda: controller.workloads(team.namespace) == {})
    team.patch("paused", {"spec": {"suspend": False}})
    team.wait_attempt("paused", 2)


def test_a_deleted_job_leaves_nothing_in_its_queue(team: Jobs, queue_plane: tuple[ControlPlane, Kueue]) -> None:
    _, controller = queue_plane
    team.create(build(team, "gone"))
    team.wait_phase("gone", "Running")
    team.delete("gone")
    wait_for("its Workload is deleted", lambda: controller.workloads(team.namespace) == {})
    wait_for("its pods are deleted", lambda: team.pods() == {})


def test_a_packed_job_gets_nodes_of_one_zone(
    team: Jobs, queue_plane: tuple[ControlPlane, Kueue], operator: OperatorProcess
) -> None:
    """Kueue knows that only the second zone has room for both pods; the scheduler alone would not."""
    plane, controller = queue_plane
    zone = "topology.kubernetes.io/zone"
    nodes = [
        plane.add_nodes(1, prefix=f"zone-{domain}", cpu="1", labels={"pool": team.namespace, zone: domain})[0]
        for domain in ("a", "b", "b", "c")
    ]
    controller.apply("topologies", "zones", {"levels": [{"nodeLabel": zone}, {"nodeLabel": "kubernetes.io/hostname"}]})
    flavor = {"nodeLabels": {"pool": team.namespace}, "topologyName": "zones"}
    controller.apply("resourceflavors", "packed", flavor)
    controller.add_queue(team.namespace, team.namespace, [{"name": "packed", "cpu": 4, "memory": "64Gi"}])
    operator.kill()
    operator.flags = (*operator.flags, "--kueue-topology=true")
    operator.start().wait_ready()
    try:
        topology = {"accelerator": "cpu", "nodes": 2, "resources": {"cpu": "1", "memory": "1Gi"}, "pack": "zone"}
        team.create(build(team, "packed", topology=topology))
        team.wait_phase("packed", "Running", 120)
        assert sorted(pod["spec"]["nodeName"] for pod in pods_of(team, "packed")) == sorted(nodes[1:3])
    finally:
        team.delete("packed")
        wait_for("the pods are gone", lambda: not pods_of(team, "packed"))
        plane.delete_nodes(nodes)
