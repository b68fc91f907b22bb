"""What is known of nodes, and what it says of the pods there. Pure; fed by the handler of node events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from finetune_operator.plan.types import ObservedPod
from finetune_operator.plan.view import ENDED

LEAVING_TAINTS = frozenset(
    {
        "node.kubernetes.io/out-of-service",
        "aws-node-termination-handler/spot-itn",
        "aws-node-termination-handler/asg-lifecycle-termination",
        "aws-node-termination-handler/scheduled-maintenance",
        "cloud.google.com/impending-node-termination",
        "remediator.kubernetes.azure.com/unschedulable",
        "karpenter.sh/disrupted",
        "ToBeDeletedByClusterAutoscaler",
    }
)
"""Taints of nodes that are about to go: of Kubernetes, the clouds' termination handlers and the autoscalers."""
NODE_LOST = "NodeLost"
"""Kubernetes' own word for the status of a pod whose node does not answer."""


@dataclass(frozen=True)
class NodeState:
    """What matters of a node."""

    lost: bool = False
    """Gone, or not heard of by the control plane."""
    leaving: str = ""
    """The taint that announces its end; empty where none does."""


HEALTHY = NodeState()
GONE = NodeState(lost=True)


def read_node(node: Any) -> NodeState:
    """Read a node, a mapping as the API shows it.

    Ready=False is its kubelet's own word: it lives, and its pods may, too. Unknown is nobody's.
    """
    conditions = node.get("status", {}).get("conditions") or ()
    unknown = any(item["type"] == "Ready" and item["status"] == "Unknown" for item in conditions)
    taints = (taint["key"] for taint in node.get("spec", {}).get("taints") or ())
    return NodeState(unknown, next((key for key in taints if key in LEAVING_TAINTS), ""))


class NodeBook:
    """The states of the nodes that are not simply well, and of those that went while we watched."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._states: dict[str, NodeState] = {}

    def see(self, name: str, state: NodeState) -> None:
        """Take what a node has become; tells of a change by the node's name."""
        if self.of(name) == state:
            return
        if state == HEALTHY:
            del self._states[name]
        else:
            self._states[name] = state
        self._changed(name)

    def of(self, name: str | None) -> NodeState:
        """The state of a node; one that nothing is known of is well."""
        return self._states.get(name, HEALTHY) if name else HEALTHY


def judge_pod(
    pod: ObservedPod, node: NodeState, *, heard_at: datetime | None, now: datetime, silence: timedelta
) -> tuple[ObservedPod | None, datetime | None]:
    """A pod in the light of its node, and when to look again.

    On a lost node nobody can say how a pod ends. One that still beats lives; one that has been silent for longer than
    `silence` is lost with its node; and one whose deletion is overdue counts as gone (None), for it may hang so for
    ever: its attempt is fenced.
    """
    if pod.phase in ENDED or node == HEALTHY:
        return pod, None
    if node.lost and heard_at is not None and now < heard_at + silence:
        return pod, heard_at + silence
    if node.lost:
        gone_at = pod.deleted_at + pod.grace if pod.deleted_at is not None else None
        if gone_at is not None and gone_at <= now:
            return None, None
        return replace(pod, reason=pod.reason or NODE_LOST), gone_at
    return replace(pod, disruption=pod.disruption or node.leaving), None
