"""Reading of nodes, and the states that are remembered."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.cluster.kube.watch.nodes import GONE, LEAVING_TAINTS, MAX_GONE, NodeStates, observe_node
from finetune_operator.plan.model.types import HEALTHY, ObservedNode


def node(ready: str = "True", *taints: str) -> dict[str, Any]:
    return {
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
        "status": {"conditions": [{"type": "Ready", "status": ready}]},
    }


def leaving(taint: str) -> ObservedNode:
    return ObservedNode(leaving=taint)


AWS = "aws-node-termination-handler/spot-itn"
GKE = "cloud.google.com/impending-node-termination"
AKS = "remediator.kubernetes.azure.com/unschedulable"


@pytest.mark.parametrize(
    ("manifest", "state"),
    [
        (node(), HEALTHY),
        (node("False"), HEALTHY),
        (node("Unknown"), ObservedNode(lost=True)),
        (node("True", "example.com/other", "karpenter.sh/disrupted"), leaving("karpenter.sh/disrupted")),
        (node("True", "node.kubernetes.io/unreachable"), ObservedNode(lost=True)),
        (node("True", "node.kubernetes.io/unschedulable"), HEALTHY),
        (node("True", AWS), leaving(AWS)),
        (node("True", GKE), leaving(GKE)),
        (node("True", AKS), leaving(AKS)),
        ({}, HEALTHY),
    ],
)
def test_state_of_a_node(manifest: dict[str, Any], state: ObservedNode) -> None:
    assert observe_node(manifest) == state


HANDLERS = {
    "AWS Node Termination Handler": {
        "aws-node-termination-handler/spot-itn": True,
        "aws-node-termination-handler/scheduled-maintenance": True,
        "aws-node-termination-handler/asg-lifecycle-termination": True,
        "aws-node-termination-handler/rebalance-recommendation": False,
    },
    "GKE": {"cloud.google.com/impending-node-termination": True, "cloud.google.com/gke-spot": False},
    "AKS": {
        "remediator.kubernetes.azure.com/unschedulable": True,
        "kubernetes.azure.com/scalesetpriority": False,
    },
    "Karpenter": {
        "karpenter.sh/disrupted": True,
        # Before version 1.0.
        "karpenter.sh/disruption": True,
        "karpenter.sh/unregistered": False,
    },
    "Cluster Autoscaler": {
        "ToBeDeletedByClusterAutoscaler": True,
        "DeletionCandidateOfClusterAutoscaler": False,
    },
    "Kubernetes": {
        "node.kubernetes.io/out-of-service": True,
        "node.cloudprovider.kubernetes.io/shutdown": True,
        "node.kubernetes.io/unschedulable": False,
        "node.kubernetes.io/not-ready": False,
        "node.kubernetes.io/memory-pressure": False,
    },
}
"""Taints by what sets them, and whether each announces the end of the node."""


@pytest.mark.parametrize(
    ("taint", "leaves"), [(taint, leaves) for taints in HANDLERS.values() for taint, leaves in taints.items()]
)
def test_taints_of_termination_handlers(taint: str, leaves: bool) -> None:
    assert observe_node(node("True", taint)) == (leaving(taint) if leaves else HEALTHY)
    # Also next to the other taints of a node that is being drained.
    assert observe_node(node("True", "node.kubernetes.io/unschedulable", taint)).leaving == (taint if leaves else "")


def test_every_taint_of_a_leaving_node_is_in_the_table() -> None:
    table = {taint for taints in HANDLERS.values() for taint, leaves in taints.items() if leaves}
    assert table == LEAVING_TAINTS


CORDON: dict[str, Any] = {"unschedulable": True}
XID = "nvidia.com/gpu-xid-error"


def reported(kind: str, status: str = "True", **spec: Any) -> dict[str, Any]:
    """Return a node with a condition of a health tool."""
    conditions = [{"type": "Ready", "status": "True"}, {"type": kind, "status": status}]
    return {"spec": spec, "status": {"conditions": conditions}}


@pytest.mark.parametrize(
    ("manifest", "state"),
    [
        (node("True", XID), ObservedNode(leaving=XID, gpu_fault=f"{XID}, reported by NVSentinel")),
        (
            node("True", "nvlink.health/link-down"),
            ObservedNode(
                leaving="nvlink.health/link-down", gpu_fault="nvlink.health/link-down, reported by NVSentinel"
            ),
        ),
        # Another taint decides how the node ends; the fault still explains failures.
        (node("True", XID, AWS), ObservedNode(leaving=AWS, gpu_fault=f"{XID}, reported by NVSentinel")),
        # The taint of every GPU node.
        (node("True", "nvidia.com/gpu"), HEALTHY),
        ({"spec": {"taints": [{"key": XID, "effect": "PreferNoSchedule"}]}}, HEALTHY),
        (node("True", "node.kubernetes.io/kernel-deadlock"), leaving("node.kubernetes.io/kernel-deadlock")),
        (reported("GpuMemWatch"), ObservedNode(gpu_fault="GpuMemWatch, reported by NVSentinel")),
        (
            reported("GpuMemWatch", **CORDON),
            ObservedNode(leaving="GpuMemWatch", gpu_fault="GpuMemWatch, reported by NVSentinel"),
        ),
        (reported("GpuMemWatch", "False", **CORDON), HEALTHY),
        (reported("GPUMissing"), ObservedNode(gpu_fault="GPUMissing, reported by AKS")),
        (reported("XIDErrors"), ObservedNode(gpu_fault="XIDErrors, reported by AKS")),
        (
            reported("AcceleratedHardwareReady", "False"),
            ObservedNode(gpu_fault="AcceleratedHardwareReady, reported by EKS node monitoring agent"),
        ),
        (reported("AcceleratedHardwareReady"), HEALTHY),
        (reported("KernelDeadlock"), HEALTHY),
        (reported("KernelDeadlock", **CORDON), leaving("KernelDeadlock")),
        (reported("Other", **CORDON), HEALTHY),
    ],
)
def test_faults_that_health_tools_report(manifest: dict[str, Any], state: ObservedNode) -> None:
    assert observe_node(manifest) == state


def test_only_changes_are_reported() -> None:
    changed: list[str] = []
    states = NodeStates(changed.append)
    for state in (HEALTHY, GONE, GONE, HEALTHY, HEALTHY):
        states.update("node-1", state)
    assert changed == ["node-1", "node-1"]
    assert states.get(None) == HEALTHY


def test_number_of_remembered_deleted_nodes_is_limited() -> None:
    states = NodeStates(lambda _: None)
    for number in range(MAX_GONE + 2):
        states.update(f"node-{number}", GONE)
    assert states.get("node-1") == HEALTHY
    assert states.get("node-2") == GONE
