"""What the queue should know of a job: whether its pods are ready, and what an eviction would cost now.

Kueue evicts a Workload whose pods are not ready in time, if its administrator sets such a limit, and expects this
report from the owner. A recovery that takes seconds is not reported: each report costs the API server and Kueue more
than the recovery itself.

The cost of an eviction is the training time since the last save: a job that has just saved is the best one to evict.
Kueue adds it to the priority, so it stays small, below the distance of sensible priority classes.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api import kueue
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.ledger import current, open_attempt
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import Action, ObservedWorkload, PatchWorkload, PodPhase, WorkloadCondition
from finetune_operator.plan.model.view import View, earliest, is_finished
from finetune_operator.plan.policies.queue.request import set_condition

RECOVERY = timedelta(seconds=30)
"""Time after which pods that are replaced count as not ready."""
LEVELS = (timedelta(minutes=1), timedelta(minutes=5), timedelta(minutes=15))
"""Ages of the last save from which an eviction costs one more."""


def act(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the reports that are not up to date."""
    workload = admission.active(view) if admission.uses_queue(view) else None
    if workload is None or not admission.is_admitted(workload) or is_finished(status):
        return ()
    # Each write changes the resource version, on which the next one depends.
    return (*_readiness(view, status, workload),) or (*_cost(view, status, workload),)


def _readiness(view: View, status: FineTuneJobStatus, workload: ObservedWorkload) -> tuple[Action, ...]:
    old = admission.condition(workload, admission.PODS_READY)
    if _is_ready(view):
        new = ("True", "Started" if old is None or old.reason in ("WaitForStart", "Started") else "Recovered")
        message = "All pods of the gang run"
    elif (due := _unready_at(view, status, workload)) is not None and view.now >= due:
        new, message = ("False", "WaitForRecovery"), "Pods of the gang are replaced"
    else:
        return ()
    if old is not None and old.status == new[0]:
        return ()
    return (set_condition(view, workload, WorkloadCondition(admission.PODS_READY, *new, message, "")),)


def _is_ready(view: View) -> bool:
    running = all(pod.phase is not PodPhase.PENDING for pod in view.pods.values())
    return bool(view.attempt) and len(view.pods) == view.num_nodes and running


def _unready_at(view: View, status: FineTuneJobStatus, workload: ObservedWorkload) -> datetime | None:
    """Return when to report that pods are being replaced; None: they are ready, or the queue does not expect them."""
    old, entry = admission.condition(workload, admission.PODS_READY), current(status)
    if old is None or old.status != "True" or entry is None or not view.pods or _is_ready(view):
        return None
    previous = status.attempts[-2].ended_at if len(status.attempts) > 1 else None
    return (entry.ended_at or previous or entry.started_at) + RECOVERY


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
    """Return when the cost of an eviction rises, or when a recovery has taken long."""
    workload = admission.active(view) if admission.uses_queue(view) else None
    if workload is None or is_finished(status):
        return None
    since = unsaved_since(view, status) if view.settings.kueue_priority_boost else None
    rises_at = [since + age for age in LEVELS if since + age > view.now] if since is not None else []
    return earliest([*rises_at, _unready_at(view, status, workload)])


POLICY = Policy("queue-report", wake=wake, act=act)
