"""Eviction requests: all ranks save, then the pod is released.

An active Eviction of a pod is a preemption with notice, like the taint of a node that is about to leave: `mark` shows
it as a disruption, so the attempt ends, all ranks save, and the pod is deleted when it has saved. `act` reports the
progress and the end. Kubernetes passes the eviction on if nobody reports for 20 minutes.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import Observed, ObservedEviction, ObservedPod, ReportEviction
from finetune_operator.plan.model.view import ENDED, View, earliest

DISRUPTION = "EvictionRequest"
REPORT_EVERY = timedelta(minutes=1)


def mark(observed: Observed) -> Observed:
    """Return the observed state with each pod that must leave marked as disrupted."""
    leaving = {eviction.pod_uid for eviction in observed.evictions if eviction.active}
    if not leaving:
        return observed
    pods = tuple(_mark(pod) if pod.uid in leaving else pod for pod in observed.pods)
    return replace(observed, pods=pods)


def _mark(pod: ObservedPod) -> ObservedPod:
    if pod.phase in ENDED or pod.disruption is not None:
        return pod
    return replace(pod, disruption=DISRUPTION, message="an EvictionRequest asks for its eviction")


def act(view: View, status: FineTuneJobStatus) -> tuple[ReportEviction, ...]:
    """Return the reports that are due: the end, or the progress once per minute."""
    return tuple(report for eviction in _pending(view) if (report := _report(view, status, eviction)) is not None)


def wake(view: View, _: FineTuneJobStatus) -> datetime | None:
    """Return when the next report of progress is due."""
    return earliest(_due(eviction) for eviction in _pending(view) if _is_present(view, eviction))


def _pending(view: View) -> list[ObservedEviction]:
    return [eviction for eviction in view.observed.evictions if eviction.active and not eviction.completed]


def _report(view: View, status: FineTuneJobStatus, eviction: ObservedEviction) -> ReportEviction | None:
    step = status.last_checkpoint.step if status.last_checkpoint is not None else 0
    if not _is_present(view, eviction):
        return ReportEviction(eviction.name, f"the pod is released; the newest checkpoint has step {step}", done=True)
    due = _due(eviction)
    if due is not None and view.now < due:
        return None
    return ReportEviction(eviction.name, f"the ranks save; the newest checkpoint has step {step}")


def _due(eviction: ObservedEviction) -> datetime | None:
    return eviction.reported_at + REPORT_EVERY if eviction.reported_at is not None else None


def _is_present(view: View, eviction: ObservedEviction) -> bool:
    return any(pod.uid == eviction.pod_uid and pod.phase not in ENDED for pod in view.raw.pods)


POLICY = Policy("evictions", wake=wake, act=act)
