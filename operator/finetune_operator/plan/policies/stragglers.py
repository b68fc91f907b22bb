"""Pods that never end: their peers have done all that was asked, and nobody hears of them any more.

Ranks end together, so a supervisor that is well ends soon after its peers'. Until then a silent pod is left alone: it
may be the operator that cannot be reached, and training goes on without it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.causes import Cause
from finetune_operator.plan.model.ledger import open_entry, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, has_ended, is_finished
from finetune_operator.plan.policies.endings import settle


def judge(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End an attempt that waits for nothing but pods that are not heard any more."""
    entry = open_entry(status)
    lost_at = _lost_at(view, status)
    if entry is None or lost_at is None or view.now < lost_at:
        return status
    rank = min(_undone(view))
    pod = view.pods[rank]
    cause = Cause(
        Reason.NODE_LOST,
        rank=rank * view.spec.topology.processes_per_node,
        pod=pod.name,
        node=pod.node,
        last_words="it has not been heard since its peers were done",
    )
    return settle(replace_current(status, revise(entry, ended_at=view.now)), cause)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When a pod that is behind counts as lost."""
    return _lost_at(view, status)


def _undone(view: View) -> list[int]:
    return [rank for rank in range(view.num_nodes) if not view.is_done(rank)]


def _lost_at(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When all that is left counts as lost; None while somebody is still at work, or nobody is done."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status):
        return None
    undone = _undone(view)
    if not undone or len(undone) == view.num_nodes:
        return None
    if any(rank not in view.pods or has_ended(view.pods[rank]) for rank in undone):
        return None
    last = max(_heard_at(view, rank) for rank in range(view.num_nodes))
    return last + timedelta(seconds=view.settings.beat_timeout_seconds)


def _heard_at(view: View, rank: int) -> datetime:
    """When anything was last known of a pod: its beat, its end, or at least that it was made."""
    pod, received = view.pods.get(rank), view.beats.get(rank)
    moments = [received.received_at] if received is not None else []
    if pod is not None:
        moments.append(pod.finished_at or pod.created_at)
    return max(moments, default=view.now)
