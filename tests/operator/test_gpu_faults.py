"""Faulty GPUs on a real API server, with nodes of kwok that have GPUs by name only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from testing.controlplane.process import wait_for
from testing.operator.harness import Jobs, build_job, jobs_path, may_taint_nodes, running
from tests.operator.conftest import NewOperator

GPU = "nvidia.com/gpu"
TAINT = "finetune-operator.io/gpu-fault"


@contextmanager
def gpu_nodes(jobs: Jobs, number: int, label: str) -> Iterator[list[str]]:
    """Add nodes with GPUs; delete them at the end: other tests expect that no node has one."""
    nodes = list(jobs.control_plane.add_nodes(number, prefix=label, labels={"test": label}))
    for node in nodes:
        resources = {GPU: "8"}
        change = {"status": {"capacity": resources, "allocatable": resources}}
        jobs.control_plane.api.patch(f"/api/v1/nodes/{node}/status", change, "strategic")
    try:
        yield nodes
    finally:
        jobs.control_plane.delete_nodes(nodes)


def taints(jobs: Jobs, node: str) -> dict[str, str]:
    spec = jobs.control_plane.api.get(f"/api/v1/nodes/{node}")["spec"]
    return {taint["key"]: taint["effect"] for taint in spec.get("taints", ())}


def gpu_job(name: str, label: str, **spec: Any) -> dict[str, Any]:
    topology = {"accelerator": "gpu", "nodes": 1, "resources": {"cpu": "1", "memory": "1Gi"}}
    template = {"spec": {"nodeSelector": {"test": label}}}
    return build_job(name, topology=topology, podTemplate=template, recovery={"noticeSeconds": 1}, **spec)


def test_taint_of_a_health_tool_moves_the_job_and_spends_no_budget(jobs: Jobs, new_operator: NewOperator) -> None:
    with gpu_nodes(jobs, 2, "faulty"), running(new_operator()):
        jobs.create(gpu_job("circles", "faulty"))
        jobs.wait_phase("circles", "Running")
        node = jobs.pods()["circles-a1-n0"]["spec"]["nodeName"]
        taint = {"key": "nvidia.com/gpu-xid-error", "value": "true", "effect": "NoSchedule"}
        jobs.control_plane.api.patch(f"/api/v1/nodes/{node}", {"spec": {"taints": [taint]}})
        status = jobs.wait_attempt("circles", 2)
        entry = status["attempts"][0]
        assert (entry["reason"], entry["countsAs"], entry["node"]) == ("GpuFault", "Preemption", node)
        assert entry["message"].startswith("nvidia.com/gpu-xid-error, reported by NVSentinel")
        assert (status["preemptions"], status["failures"]) == (1, 0)
        pod = jobs.pods()["circles-a2-n0"]
        assert pod["spec"]["nodeName"] != node
        assert {"name": "FINETUNE_CHECK_DEVICES", "value": "1"} in pod["spec"]["containers"][0]["env"]


def test_node_is_tainted_after_evidence_from_several_jobs(jobs: Jobs, new_operator: NewOperator) -> None:
    """With exactly the role of the chart, the taints of others are kept, and the evidence of one job is not enough."""
    with gpu_nodes(jobs, 2, "tainted") as (one, both):
        other = {"key": "example.com/other", "effect": "NoSchedule"}
        jobs.control_plane.api.patch(f"/api/v1/nodes/{both}", {"spec": {"taints": [other]}})
        for name, nodes in (("first", (one, both)), ("second", (both,))):
            created = jobs.create(gpu_job(name, "tainted", suspend=True))
            now = created["metadata"]["creationTimestamp"]
            end = {
                "reason": "GpuFault",
                "countsAs": "Preemption",
                "gpu": "GPU-1",
                "xid": 79,
                "startedAt": now,
                "endedAt": now,
            }
            attempts = [{"attempt": number, "node": node, **end} for number, node in enumerate(nodes, 1)]
            status = {"attempt": len(attempts), "attempts": attempts, "preemptions": len(attempts)}
            jobs.control_plane.api.patch(f"{jobs_path(jobs.namespace, name)}/status", {"status": status})
        with may_taint_nodes(jobs.control_plane), running(new_operator("--taint-after-jobs=2")):
            wait_for("the node is tainted", lambda: TAINT in taints(jobs, both))
            assert taints(jobs, both) == {"example.com/other": "NoSchedule", TAINT: "NoSchedule"}
            assert TAINT not in taints(jobs, one)
