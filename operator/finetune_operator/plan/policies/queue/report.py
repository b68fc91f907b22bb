"""What the queue should know of a job: whether its pods are ready, and what an eviction would cost now.

Kueue evicts a Workload whose pods are not ready in time, if its administrator sets such a limit, and expects this
report from the owner. The cost is the training time since the last save: a job that has just saved is the best one to
evict. Kueue adds it to the priority, so it stays small, below the distance of sensible priority classes.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api import kueue
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.ledger import open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import Action, ObservedWorkload, PatchWorkload, PodPhase, WorkloadCondition
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.queue.request import set_condition

LEVELS = (timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=15))
"""Ages of the last save from which an eviction costs one more."""


def act(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the reports that are not up to date."""
    workload = admission.active(view) if admission.uses_queue(view) else None
    if workload is None or not admission.is_admitted(workload) or is_finished(status):
        return ()
    # Each write changes the resource version, on which the next one depends.
    return (*_readiness(view, workload),) or (*_cost(view, status, workload),)


def _readiness(view: View, workload: ObservedWorkload) -> tuple[Action, ...]:
    old = admission.condition(workload, admission.PODS_READY)
    ready = len(view.pods) == view.num_nodes and all(pod.phase is not PodPhase.PENDING for pod in view.pods.values())
    if ready and view.attempt:
        new = ("True", "Started" if old is None or old.reason in ("WaitForStart", "Started") else "Recovered")
        message = "All pods of the gang run"
    elif old is not None and old.status == "True" and view.pods:
        new, message = ("False", "WaitForRecovery"), "Pods of the gang are replaced"
    else:
        return ()
    if old is not None and old.status == new[0]:
        return ()
    return (set_condition(view, workload, WorkloadCondition(admission.PODS_READY, *new, message, "")),)


def _cost(view: View, status: FineTuneJobStatus, workload: ObservedWorkload) -> tuple[Action, ...]:
    if not view.settings.kueue_priority_boost:
        return ()
    since = unsaved_since(view, status)
    level = sum(view.now >= since + age for age in LEVELS) if since is not None else 0
    if (workload.boost or "0") == str(level):
        return ()
    meta = {"uid": workload.uid, "annotations": {kueue.PRIORITY_BOOST: str(level)}}
    return (PatchWorkload(workload.name, {"metadata": meta}),)


def unsaved_since(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return since when the training is not saved; None: nothing is unsaved."""
    entry = open_attempt(view, status)
    if entry is None or entry.training_at is None:
        return None
    saved = status.last_checkpoint
    return max(entry.training_at, saved.time) if saved is not None else entry.training_at


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the cost of an eviction rises."""
    if not view.settings.kueue_priority_boost or not admission.uses_queue(view) or is_finished(status):
        return None
    since = unsaved_since(view, status)
    return next((since + age for age in LEVELS if since + age > view.now), None) if since is not None else None


POLICY = Policy("queue-report", wake=wake, act=act)
