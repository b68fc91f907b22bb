"""Pods that never end: all their peers are done, and their supervisors have stopped sending heartbeats.

Ranks end together, so a healthy supervisor ends soon after its peers. Until then a silent pod is left alone: perhaps
only the operator is unreachable, and training continues without it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.causes import Cause
from finetune_operator.plan.model.closing import record_cause
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.listening import extend
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View, has_ended


def detect_stragglers(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that waits only for silent pods."""
    lost_at = wake(view, status)
    if lost_at is None or view.now < lost_at:
        return status
    rank = min(_undone(view))
    pod = view.pods[rank]
    cause = Cause(
        Reason.NODE_LOST,
        rank=rank * view.spec.topology.processes_per_node,
        pod=pod.name,
        node=pod.node,
        message="the pod has sent no heartbeat since its peers finished",
    )
    return record_cause(view, status, cause)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the remaining pods count as lost; None while one may still be working, or none is done."""
    if open_attempt(view, status) is None:
        return None
    undone = _undone(view)
    if not undone or len(undone) == view.num_nodes:
        return None
    if any(rank not in view.pods or has_ended(view.pods[rank]) for rank in undone):
        return None
    last = max(_last_sign_at(view, rank) for rank in range(view.num_nodes))
    return extend(last, timedelta(seconds=view.settings.beat_timeout_seconds), view.observed)


def _undone(view: View) -> list[int]:
    return [rank for rank in range(view.num_nodes) if not view.is_done(rank)]


def _last_sign_at(view: View, rank: int) -> datetime:
    """Return the time of the newest sign of a pod: its heartbeat, its end, or else its creation."""
    pod, received = view.pods.get(rank), view.beats.get(rank)
    moments = [received.received_at] if received is not None else []
    if pod is not None:
        moments.append(pod.finished_at or pod.created_at)
    return max(moments, default=view.now)


POLICY = Policy("stragglers", decide=detect_stragglers, wake=wake)
