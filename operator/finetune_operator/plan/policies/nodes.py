"""What the state of a node says of the pods on it. Called first in a pass: all policies see the pods in this light.

On a node that the control plane does not hear of, nobody can say how a pod ends. One that still beats lives; one that
has been silent as well is lost with its node. On any node, one whose deletion is overdue and that has fallen silent
counts as gone, for it may hang in Terminating for ever: its attempt is fenced, and the next one has other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_operator.plan.model.types import WELL, DeletePod, Observed, ObservedNode, ObservedPod
from finetune_operator.plan.model.view import ENDED, earliest
from finetune_operator.settings import Settings

SILENT_BEATS = 3
"""Beats that a pod on a lost node may miss before it is taken for lost, too."""
NODE_LOST = "NodeLost"
"""Kubernetes' own word for the status of a pod whose node does not answer."""
OVERDUE = timedelta(seconds=10)
"""How much longer than its grace period the deletion of a pod may take on a node that seems well."""
UNREACHABLE = timedelta(minutes=5)
"""How long a deletion may be overdue on a node that is out of reach, which may come back."""


def judge(observed: Observed, now: datetime, settings: Settings) -> Observed:
    """The pods as their nodes let them appear."""
    if not observed.nodes and all(pod.deleted_at is None for pod in observed.pods):
        return observed
    judged = (_judge(pod, observed, now, settings) for pod in observed.pods)
    return replace(observed, pods=tuple(pod for pod in judged if pod is not None))


def force_delete(observed: Observed, now: datetime) -> tuple[DeletePod, ...]:
    """Pods whose deletion nobody is left to carry out: their node is gone, or out of reach for too long.

    A process that may live on there is of an attempt that is fenced, and its name is not used again.
    """
    moments = ((pod, _force_at(pod, _node(pod, observed.nodes))) for pod in observed.pods)
    return tuple(DeletePod(pod.name, pod.uid, grace_seconds=0) for pod, at in moments if at is not None and at <= now)


def wake(observed: Observed, now: datetime, settings: Settings) -> datetime | None:
    """When a pod on a lost node must be looked at again."""
    moments: list[datetime | None] = []
    for pod in observed.pods:
        if pod.phase not in ENDED and (pod.deleted_at is not None or _is_lost(_node(pod, observed.nodes))):
            node = _node(pod, observed.nodes)
            moments += [_silent_at(pod, observed, settings), _gone_at(pod, node), _force_at(pod, node)]
    return earliest(moment for moment in moments if moment is not None and moment > now)


def _judge(pod: ObservedPod, observed: Observed, now: datetime, settings: Settings) -> ObservedPod | None:
    node = _node(pod, observed.nodes)
    if pod.phase in ENDED:
        return pod
    silent_at = _silent_at(pod, observed, settings)
    silent = node.gone or silent_at is None or silent_at <= now
    gone_at = _gone_at(pod, node)
    if silent and gone_at is not None and gone_at <= now:
        return None
    if silent and _is_lost(node):
        return replace(pod, reason=pod.reason or NODE_LOST)
    return replace(pod, disruption=pod.disruption or node.leaving) if node.leaving else pod


def _node(pod: ObservedPod, nodes: Mapping[str, ObservedNode]) -> ObservedNode:
    return nodes.get(pod.node, WELL) if pod.node is not None else WELL


def _is_lost(node: ObservedNode) -> bool:
    return node.lost or node.gone


def _silent_at(pod: ObservedPod, observed: Observed, settings: Settings) -> datetime | None:
    """When the pod has been silent for too long; None: it was never heard."""
    received = observed.beats.get(pod.uid)
    if received is None:
        return None
    return received.received_at + silence(observed, settings)


def silence(observed: Observed, settings: Settings) -> timedelta:
    """How long a pod that lives is silent at most."""
    return timedelta(seconds=SILENT_BEATS * max(settings.beat_seconds, observed.beat_seconds))


def _force_at(pod: ObservedPod, node: ObservedNode) -> datetime | None:
    """When a deletion must be forced; None: its kubelet will see to it."""
    if pod.deleted_at is None or not _is_lost(node):
        return None
    return pod.deleted_at if node.gone else pod.deleted_at + pod.grace + UNREACHABLE


def _gone_at(pod: ObservedPod, node: ObservedNode) -> datetime | None:
    """When its deletion is overdue."""
    if pod.deleted_at is None:
        return None
    return pod.deleted_at + pod.grace + (timedelta(0) if _is_lost(node) else OVERDUE)
