"""Derives the state of pods from the state of their node. `core` applies it first, so all policies use the result.

The control plane cannot observe how a pod ends on a node that it has lost. A pod there that still sends heartbeats is
running; a silent one is lost with its node. On any node, a pod whose deletion is overdue and that is silent counts as
deleted, because it may stay in Terminating forever: its attempt is fenced, and later pods have other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.listening import silent_at
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import HEALTHY, DeletePod, Observed, ObservedNode, ObservedPod
from finetune_operator.plan.model.view import ENDED, View, earliest
from finetune_operator.settings import Settings

NODE_LOST = "NodeLost"
"""Kubernetes' status reason of a pod whose node does not respond."""
OVERDUE = timedelta(seconds=10)
"""Time after the grace period at which a deletion on a healthy node is overdue."""
UNREACHABLE = timedelta(minutes=5)
"""Time after the grace period at which a deletion on an unreachable node is forced. Such a node may come back."""


def apply_node_state(observed: Observed, now: datetime, settings: Settings) -> Observed:
    """Return the observed state with each pod's fields corrected by the state of its node."""
    if not observed.nodes and all(pod.deleted_at is None for pod in observed.pods):
        return observed
    corrected = (_correct(pod, observed, now, settings) for pod in observed.pods)
    exports = (_correct_export(pod, observed) for pod in observed.exports)
    return replace(observed, pods=tuple(pod for pod in corrected if pod is not None), exports=tuple(exports))


def _correct_export(pod: ObservedPod, observed: Observed) -> ObservedPod:
    """Return an export pod, which sends no heartbeats. It exists until it is really deleted: its name is used again."""
    is_lost = _is_lost(_node(pod, observed.nodes)) and pod.phase not in ENDED
    return replace(pod, reason=pod.reason or NODE_LOST) if is_lost else pod


def force_delete(view: View, _: FineTuneJobStatus) -> tuple[DeletePod, ...]:
    """Return forced deletions of pods whose node is deleted, or unreachable for too long: no kubelet will delete them.

    A process that still runs there belongs to a fenced attempt, and the pod's name is never used again.
    """
    pods = (*view.raw.pods, *view.raw.exports)
    moments = ((pod, _force_at(pod, _node(pod, view.raw.nodes))) for pod in pods)
    due = (pod for pod, at in moments if at is not None and at <= view.now)
    return tuple(DeletePod(pod.name, pod.uid, grace_seconds=0) for pod in due)


def wake(view: View, _: FineTuneJobStatus) -> datetime | None:
    """Return when the state of a node changes the meaning of one of its pods."""
    observed = view.raw
    moments: list[datetime | None] = []
    for pod in (*observed.pods, *observed.exports):
        node = _node(pod, observed.nodes)
        if pod.phase not in ENDED and (pod.deleted_at is not None or _is_lost(node)):
            moments += [_silent_at(pod, observed, view.settings), _overdue_at(pod, node), _force_at(pod, node)]
    return earliest(moment for moment in moments if moment is not None and moment > view.now)


def _correct(pod: ObservedPod, observed: Observed, now: datetime, settings: Settings) -> ObservedPod | None:
    """Return the pod as the policies must see it; None: it counts as deleted."""
    node = _node(pod, observed.nodes)
    if pod.phase in ENDED:
        return pod
    due = _silent_at(pod, observed, settings)
    silent = node.gone or due is None or due <= now
    overdue_at = _overdue_at(pod, node)
    if silent and overdue_at is not None and overdue_at <= now:
        return None
    if silent and _is_lost(node):
        return replace(pod, reason=pod.reason or NODE_LOST)
    return replace(pod, disruption=pod.disruption or node.leaving) if node.leaving else pod


def _node(pod: ObservedPod, nodes: Mapping[str, ObservedNode]) -> ObservedNode:
    return nodes.get(pod.node, HEALTHY) if pod.node is not None else HEALTHY


def _is_lost(node: ObservedNode) -> bool:
    return node.lost or node.gone


def _silent_at(pod: ObservedPod, observed: Observed, settings: Settings) -> datetime | None:
    """Return when the pod counts as silent; None: it has never sent a heartbeat."""
    received = observed.beats.get(pod.uid)
    if received is None:
        return None
    return silent_at(received, observed, settings)


def _force_at(pod: ObservedPod, node: ObservedNode) -> datetime | None:
    """Return when to force a deletion; None: the kubelet of its node will carry it out."""
    if pod.deleted_at is None or not _is_lost(node):
        return None
    return pod.deleted_at if node.gone else pod.deleted_at + pod.grace + UNREACHABLE


def _overdue_at(pod: ObservedPod, node: ObservedNode) -> datetime | None:
    """Return when the deletion of a pod is overdue; None: it is not being deleted."""
    if pod.deleted_at is None:
        return None
    return pod.deleted_at + pod.grace + (timedelta(0) if _is_lost(node) else OVERDUE)


POLICY = Policy("nodes", wake=wake, act=force_delete)
