"""What is known of nodes. Pure; fed by the handler of node events, read by the cluster for `Observed.nodes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_operator.plan.model.types import WELL, ObservedNode

LEAVING_TAINTS = frozenset(
    {
        "node.kubernetes.io/out-of-service",
        "aws-node-termination-handler/spot-itn",
        "aws-node-termination-handler/asg-lifecycle-termination",
        "aws-node-termination-handler/scheduled-maintenance",
        "cloud.google.com/impending-node-termination",
        "remediator.kubernetes.azure.com/unschedulable",
        "karpenter.sh/disrupted",
        "karpenter.sh/disruption",
        "ToBeDeletedByClusterAutoscaler",
    }
)
"""Taints of nodes that are about to go: of Kubernetes, the clouds' termination handlers and the autoscalers.

A node that is merely closed to new pods (`kubectl cordon`) is none of them: what runs there may stay.
"""
UNREACHABLE = "node.kubernetes.io/unreachable"
"""The node controller's taint of a node that it does not hear of."""
MAX_GONE = 10_000
"""Nodes that went, of which that is remembered: their pods are cleaned up long before so many more have gone."""


GONE = ObservedNode(lost=True, gone=True)


def read_node(node: Any) -> ObservedNode:
    """Read a node, a mapping as the API shows it.

    Ready=False is its kubelet's own word: it lives, and its pods may, too. Unknown is nobody's.
    """
    conditions = node.get("status", {}).get("conditions") or ()
    unknown = any(item["type"] == "Ready" and item["status"] == "Unknown" for item in conditions)
    taints = [taint["key"] for taint in node.get("spec", {}).get("taints") or ()]
    leaving = next((key for key in taints if key in LEAVING_TAINTS), "")
    return ObservedNode(lost=unknown or UNREACHABLE in taints, leaving=leaving)


class NodeBook:
    """The states of the nodes that are not simply well, and of those that went while we watched."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._states: dict[str, ObservedNode] = {}

    def see(self, name: str, state: ObservedNode) -> None:
        """Take what a node has become; tells of a change by the node's name."""
        if self.of(name) == state:
            return
        if state == WELL:
            del self._states[name]
        else:
            self._states[name] = state
        if state == GONE:
            self._forget()
        self._changed(name)

    def of(self, name: str | None) -> ObservedNode:
        """The state of a node; one that nothing is known of is well."""
        return self._states.get(name, WELL) if name else WELL

    def _forget(self) -> None:
        gone = [name for name, state in self._states.items() if state == GONE]
        for name in gone[: max(0, len(gone) - MAX_GONE)]:
            del self._states[name]
