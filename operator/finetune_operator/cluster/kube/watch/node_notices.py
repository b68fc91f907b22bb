"""Signs by which clouds, termination handlers and autoscalers announce the end of a node: tables, and one lookup. Pure.

Not included are signs of nodes on which pods may stay: a cordon (`kubectl cordon`), a node that an autoscaler may
remove if it stays empty, a spot node with a higher risk (a recommendation to rebalance), a virtual machine that pauses
for seconds, and a window in which maintenance may begin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

TAINTS: Mapping[str, str | None] = {
    # Kubernetes.
    "node.kubernetes.io/out-of-service": None,
    "node.cloudprovider.kubernetes.io/shutdown": None,
    # AWS Node Termination Handler.
    "aws-node-termination-handler/spot-itn": None,
    "aws-node-termination-handler/asg-lifecycle-termination": None,
    "aws-node-termination-handler/scheduled-maintenance": None,
    # GKE.
    "cloud.google.com/impending-node-termination": None,
    # AKS, and the name that it used before; Azure's cloud provider.
    "remediator.kubernetes.azure.com/unschedulable": None,
    "remediator.aks.microsoft.com/unschedulable": None,
    "cloudprovider.azure.microsoft.com/draining": None,
    # Karpenter; before version 1.0, the same taint marked candidates, too.
    "karpenter.sh/disrupted": None,
    "karpenter.sh/disruption": "disrupting",
    # Cluster Autoscaler.
    "ToBeDeletedByClusterAutoscaler": None,
}
"""Taints by key, each with the value that it must have; None: any."""
CONDITIONS = frozenset({"PreemptScheduled", "TerminateScheduled", "RedeployScheduled", "RebootScheduled"})
"""Conditions that AKS sets to True before the event. It drains the node before all of them but a reboot."""


class LabelSign(NamedTuple):
    """A label that announces the end of a node."""

    value: str | None
    """None: any."""
    needs_cordon: bool = False
    """Whether it counts only on a cordoned node: it stays on a node whose event is over."""


LABELS: Mapping[str, LabelSign] = {
    # AWS Node Termination Handler sets no taints by default. It labels the node before it drains it.
    "aws-node-termination-handler/event-id": LabelSign(None, needs_cordon=True),
    # GKE, while it stops the pods of a node whose host is being maintained.
    "cloud.google.com/active-node-maintenance": LabelSign("ONGOING"),
}
"""Labels by key."""


def find_notice(node: Mapping[str, Any]) -> str:
    """Return the taint, condition or label that announces the end of a node in its API form; empty: none."""
    spec, labels = node.get("spec") or {}, (node.get("metadata") or {}).get("labels") or {}
    for taint in spec.get("taints") or ():
        wanted = TAINTS.get(taint["key"], "")
        if wanted is None or (wanted and taint.get("value") == wanted):
            return str(taint["key"])
    for condition in (node.get("status") or {}).get("conditions") or ():
        if condition["type"] in CONDITIONS and condition["status"] == "True":
            return str(condition["type"])
    cordoned = bool(spec.get("unschedulable"))
    for key, sign in LABELS.items():
        if key in labels and sign.value in (None, labels[key]) and (cordoned or not sign.needs_cordon):
            return key
    return ""
