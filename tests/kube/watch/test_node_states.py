"""Reading of nodes, and the states that are remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from finetune_operator.cluster.kube.watch.node_notices import CONDITIONS, LABELS, TAINTS
from finetune_operator.cluster.kube.watch.nodes import GONE, MAX_GONE, NodeStates, observe_node
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


@dataclass(frozen=True)
class Sign:
    """One sign of a handler on a node: a taint, a condition or a label."""

    handler: str
    name: str
    leaves: bool
    kind: str = "taint"
    value: str = ""
    effect: str = "NoSchedule"
    cordoned: bool = False

    def node(self) -> dict[str, Any]:
        """Return a node with this sign, and another handler's taint and label that mean nothing."""
        taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
        conditions = [{"type": "Ready", "status": "True"}]
        labels = {"node.kubernetes.io/instance-type": "large"}
        if self.kind == "taint":
            taints.append({"key": self.name, "value": self.value, "effect": self.effect})
        elif self.kind == "condition":
            conditions.append({"type": self.name, "status": self.value})
        else:
            labels[self.name] = self.value
        return {
            "metadata": {"labels": labels},
            "spec": {"taints": taints} | ({"unschedulable": True} if self.cordoned else {}),
            "status": {"conditions": conditions},
        }


NTH, GOOGLE, AZURE = "AWS Node Termination Handler", "GKE", "AKS"
KARPENTER, AUTOSCALER, CORE = "Karpenter", "Cluster Autoscaler", "Kubernetes"
SIGNS = (
    # pkg/node/node.go: the value of a taint is the ID of its event.
    Sign(NTH, "aws-node-termination-handler/spot-itn", True, value="spot-itn-1"),
    Sign(NTH, "aws-node-termination-handler/scheduled-maintenance", True, value="instance-event-1"),
    Sign(NTH, "aws-node-termination-handler/asg-lifecycle-termination", True, value="asg-lifecycle-term-1"),
    Sign(NTH, "aws-node-termination-handler/rebalance-recommendation", False, value="rebalance-1"),
    Sign(NTH, "aws-node-termination-handler/event-id", True, "label", "spot-itn-1", cordoned=True),
    # The event is over, and its label was not removed.
    Sign(NTH, "aws-node-termination-handler/event-id", False, "label", "spot-itn-1"),
    Sign(NTH, "aws-node-termination-handler/action", False, "label", "UncordonAfterReboot"),
    Sign(NTH, "aws-node-termination-handler/action-time", False, "label", "1700000000"),
    # The taint is set by GKE and by Google's open-source termination handler; the labels by GKE only.
    Sign(GOOGLE, "cloud.google.com/impending-node-termination", True),
    Sign(GOOGLE, "cloud.google.com/active-node-maintenance", True, "label", "ONGOING"),
    Sign(GOOGLE, "cloud.google.com/active-node-maintenance", False, "label", "PENDING"),
    Sign(GOOGLE, "cloud.google.com/scheduled-maintenance-time", False, "label", "1700000000"),
    Sign(GOOGLE, "cloud.google.com/perform-maintenance", False, "label", "true"),
    Sign(GOOGLE, "cloud.google.com/maintenance-window-started", False),
    Sign(GOOGLE, "cloud.google.com/gke-spot", False, value="true"),
    # Taints of the auto-drain; conditions of AKS' node-problem-detector.
    Sign(AZURE, "remediator.kubernetes.azure.com/unschedulable", True),
    Sign(AZURE, "remediator.aks.microsoft.com/unschedulable", True),
    Sign(AZURE, "cloudprovider.azure.microsoft.com/draining", True, value="spot-eviction"),
    Sign(AZURE, "kubernetes.azure.com/scalesetpriority", False, value="spot"),
    Sign(AZURE, "PreemptScheduled", True, "condition", "True"),
    Sign(AZURE, "PreemptScheduled", False, "condition", "False"),
    Sign(AZURE, "TerminateScheduled", True, "condition", "True"),
    Sign(AZURE, "RedeployScheduled", True, "condition", "True"),
    Sign(AZURE, "RebootScheduled", True, "condition", "True"),
    Sign(AZURE, "FreezeScheduled", False, "condition", "True"),
    # Set with each of the others, also before a freeze.
    Sign(AZURE, "VMEventScheduled", False, "condition", "True"),
    Sign(KARPENTER, "karpenter.sh/disrupted", True),
    # Before version 1.0.
    Sign(KARPENTER, "karpenter.sh/disruption", True, value="disrupting"),
    Sign(KARPENTER, "karpenter.sh/disruption", False, value="candidate"),
    Sign(KARPENTER, "karpenter.sh/unregistered", False, effect="NoExecute"),
    Sign(KARPENTER, "karpenter.sh/capacity-type", False, "label", "spot"),
    Sign(AUTOSCALER, "ToBeDeletedByClusterAutoscaler", True, value="1700000000"),
    Sign(AUTOSCALER, "DeletionCandidateOfClusterAutoscaler", False, value="1700000000", effect="PreferNoSchedule"),
    Sign(CORE, "node.kubernetes.io/out-of-service", True, value="nodeshutdown", effect="NoExecute"),
    Sign(CORE, "node.cloudprovider.kubernetes.io/shutdown", True),
    Sign(CORE, "node.kubernetes.io/unschedulable", False, cordoned=True),
    Sign(CORE, "node.kubernetes.io/not-ready", False, effect="NoExecute"),
    Sign(CORE, "node.kubernetes.io/memory-pressure", False),
)
"""Signs by what sets them, and whether each announces the end of the node.

The handlers set no annotation that announces an end: Karpenter's termination timestamp is on a NodeClaim, not on its
node.
"""


@pytest.mark.parametrize("sign", SIGNS, ids=lambda sign: f"{sign.name}={sign.value}")
def test_signs_of_termination_handlers(sign: Sign) -> None:
    assert observe_node(sign.node()).leaving == (sign.name if sign.leaves else "")


def test_every_sign_of_a_leaving_node_is_in_the_table() -> None:
    known = {kind: {sign.name for sign in SIGNS if sign.kind == kind and sign.leaves} for kind in KINDS}
    assert known == {"taint": set(TAINTS), "condition": set(CONDITIONS), "label": set(LABELS)}
    assert {sign.handler for sign in SIGNS} == {NTH, GOOGLE, AZURE, KARPENTER, AUTOSCALER, CORE}


KINDS = ("taint", "condition", "label")
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
        (reported("GpuMemWatch", "False", **CORDON), ObservedNode(cordoned=True)),
        (reported("GPUMissing"), ObservedNode(gpu_fault="GPUMissing, reported by AKS")),
        (reported("XIDErrors"), ObservedNode(gpu_fault="XIDErrors, reported by AKS")),
        (
            reported("AcceleratedHardwareReady", "False"),
            ObservedNode(gpu_fault="AcceleratedHardwareReady, reported by EKS node monitoring agent"),
        ),
        (reported("AcceleratedHardwareReady"), HEALTHY),
        (reported("KernelDeadlock"), HEALTHY),
        (reported("KernelDeadlock", **CORDON), leaving("KernelDeadlock")),
        (reported("Other", **CORDON), ObservedNode(cordoned=True)),
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
