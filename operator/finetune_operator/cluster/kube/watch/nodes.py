"""States of nodes. Pure; updated by the handler of node events, read by the cluster for `Observed.nodes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_operator.cluster.kube.watch.node_faults import find_fault
from finetune_operator.cluster.kube.watch.node_notices import find_notice
from finetune_operator.plan.model.types import HEALTHY, ObservedNode

UNREACHABLE = "node.kubernetes.io/unreachable"
"""Taint that the node controller sets on a node whose kubelet does not report."""
MAX_GONE = 10_000
"""Maximum number of deleted nodes that are remembered; the pods of a node are removed long before it is dropped."""


GONE = ObservedNode(lost=True, gone=True)


def observe_node(node: Any) -> ObservedNode:
    """Read a node in its API form.

    Ready=False is reported by the kubelet itself: the node works, and its pods may too. Only Unknown means lost.
    """
    conditions, spec = node.get("status", {}).get("conditions") or (), node.get("spec", {})
    unknown = any(item["type"] == "Ready" and item["status"] == "Unknown" for item in conditions)
    taints = [taint["key"] for taint in spec.get("taints") or ()]
    leaving = find_notice(node)
    fault = find_fault(spec.get("taints") or (), conditions, bool(spec.get("unschedulable")))
    if fault.leaves and not leaving:
        leaving = fault.name
    cordoned = bool(spec.get("unschedulable")) and not leaving
    return ObservedNode(unknown or UNREACHABLE in taints, leaving=leaving, gpu_fault=fault.gpu, cordoned=cordoned)


class NodeStates:
    """The nodes whose state is not healthy, including deleted ones."""

    def __init__(self, changed: Callable[[str], None]) -> None:
        self._changed = changed
        self._states: dict[str, ObservedNode] = {}

    def update(self, name: str, state: ObservedNode) -> None:
        """Store the state of a node; if it has changed, call the listener with the node's name."""
        if self.get(name) == state:
            return
        if state == HEALTHY:
            del self._states[name]
        else:
            self._states[name] = state
        if state == GONE:
            self._drop_oldest()
        self._changed(name)

    def get(self, name: str | None) -> ObservedNode:
        """Return the state of a node; an unknown node is healthy."""
        return self._states.get(name, HEALTHY) if name else HEALTHY

    def _drop_oldest(self) -> None:
        gone = [name for name, state in self._states.items() if state == GONE]
        for name in gone[: max(0, len(gone) - MAX_GONE)]:
            del self._states[name]
