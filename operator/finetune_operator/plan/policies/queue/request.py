"""The Workload of a job with a queue: created, changed after edits, released after an eviction, finished at the end.

Kueue evicts a Workload and then waits until its owner reports that the pods are gone. So the quota is released only
when no pod is left, and the pods of two jobs never share it.
"""

from __future__ import annotations

from typing import Any

from finetune_contract.phase import Phase
from finetune_operator.api import kueue
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.manifests import num_nodes
from finetune_operator.manifests.workload import build_workload, workload_name
from finetune_operator.plan.model import admission, exporting
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import (
    Action,
    Create,
    DeleteWorkload,
    ObservedWorkload,
    PatchWorkload,
    WorkloadCondition,
)
from finetune_operator.plan.model.view import ENDED, View, is_finished
from finetune_operator.plan.policies.capacity import elastic

REQUEUES_AT_ONCE = frozenset({"Preempted", "NodeFailures"})
"""Reasons of an eviction after which Kueue may admit the Workload again at any time."""
MAX_MESSAGE = 1024
REPLACED = "WorkloadSliceReplaced"


def act(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the changes of the job's Workloads."""
    if not view.settings.kueue or not view.observed.queues_served:
        return ()
    if kueue.queue_of(view.job) is None:
        return tuple(DeleteWorkload(each.name, each.uid) for each in view.observed.workloads if each.request)
    if is_finished(status) or exporting.has_trained(view, status):
        return _finish(view, status)
    if view.spec.suspend:
        return _delete_all(view) if not view.raw.pods else ()
    return _keep(view, status)


def _may_request(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether the job may ask for its admission. The cluster that runs a job of MultiKueue accepts it."""
    if kueue.PREBUILT_LABEL in view.job.metadata.labels:
        return False
    return view.spec.managed_by == kueue.MULTIKUEUE or is_true(status, ConditionType.ACCEPTED)


def _keep(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the changes while the job runs or wants to."""
    workload = admission.active(view)
    if workload is None:
        old = tuple(DeleteWorkload(each.name, each.uid) for each in view.observed.workloads if each.request)
        if old or not _may_request(view, status):
            return old
        return (Create(build_workload(view.job, view.settings)),)
    if not workload.is_owned:
        return (_adopt(view, workload),)
    return _follow(view, status, workload)


def _follow(view: View, status: FineTuneJobStatus, workload: ObservedWorkload) -> tuple[Action, ...]:
    """Return the changes of an existing Workload: after an eviction, an edit, or the admission of fewer pods."""
    if admission.is_true(workload, admission.EVICTED) and workload.num_admitted is not None:
        return () if view.raw.pods else (_release(view, workload),)
    if admission.is_outdated(view, workload):
        return _ask_again(view, workload)
    if not admission.is_admitted(workload) and workload.replaces is not None and workload.num_admitted is None:
        # After its eviction the job may continue with fewer pods again.
        return (DeleteWorkload(workload.name, workload.uid),)
    return (*_replaced(view, workload), *_grow(view, status, workload))


def _ask_again(view: View, workload: ObservedWorkload) -> tuple[Action, ...]:
    """Return the change of a request after an edit. A request with reserved quota cannot change, only be repeated."""
    if workload.num_admitted is not None or workload.replaces is not None:
        return (DeleteWorkload(workload.name, workload.uid),) if not view.raw.pods else ()
    new = build_workload(view.job, view.settings)
    meta = {"uid": workload.uid, "annotations": new["metadata"]["annotations"]}
    spec = {name: value for name, value in new["spec"].items() if name != "active"}
    return (PatchWorkload(workload.name, {"metadata": meta, "spec": spec}),)


def _replaced(view: View, workload: ObservedWorkload) -> tuple[Action, ...]:
    """Finish the Workload that the admitted one has replaced, if Kueue has not done it."""
    if workload.replaces is None or not admission.is_admitted(workload):
        return ()
    name = workload.replaces.partition("/")[2]
    old = next((each for each in admission.unfinished(view) if each.name == name), None)
    message = f"Replaced by the Workload {workload.name}"
    return (_set(view, old, WorkloadCondition(admission.FINISHED, "True", REPLACED, message, "")),) if old else ()


def _grow(view: View, status: FineTuneJobStatus, workload: ObservedWorkload) -> tuple[Action, ...]:
    """Request the missing pods of an elastic job that trains with fewer than it could use."""
    size, limit = num_nodes(view.spec), admission.limit(view)
    if limit is None or limit >= size or not elastic.is_elastic(view.spec) or not admission.is_admitted(workload):
        return ()
    if admission.replacement(view) is not None or workload.request is None or not _trains(status):
        return ()
    if view.spec.managed_by == kueue.MULTIKUEUE or kueue.PREBUILT_LABEL in view.job.metadata.labels:
        # MultiKueue ends the job when the Workload that it has copied is replaced.
        return ()
    if workload_name(view.job, size) == workload.name:
        return ()
    return (Create(build_workload(view.job, view.settings, replaces=workload.name)),)


def _trains(status: FineTuneJobStatus) -> bool:
    return (
        bool(status.attempts) and status.attempts[-1].ended_at is None and status.attempts[-1].training_at is not None
    )


def _finish(view: View, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Return the end of the Workloads of a job that has trained, once no pod of its gang uses a node."""
    if any(pod.phase not in ENDED for pod in view.raw.pods):
        return ()
    reason = "Failed" if status.phase is Phase.FAILED else "Succeeded"
    ended = WorkloadCondition(admission.FINISHED, "True", reason, (status.message or "")[:MAX_MESSAGE], "")
    return tuple(_set(view, each, ended) for each in admission.unfinished(view) if each.is_owned)


def _delete_all(view: View) -> tuple[Action, ...]:
    """Return the deletion of the requests of a suspended job: it requests its pods again when it is resumed."""
    return tuple(DeleteWorkload(each.name, each.uid) for each in view.observed.workloads if each.request)


def _adopt(view: View, workload: ObservedWorkload) -> PatchWorkload:
    """Make the job the owner of a Workload that MultiKueue has created."""
    owners = build_workload(view.job, view.settings)["metadata"]["ownerReferences"]
    return PatchWorkload(workload.name, {"metadata": {"uid": workload.uid, "ownerReferences": owners}})


def _release(view: View, workload: ObservedWorkload) -> PatchWorkload:
    """Return the release of the quota of an evicted Workload, as Kueue's own integrations do it."""
    evicted = admission.condition(workload, admission.EVICTED)
    assert evicted is not None
    again = "True" if evicted.reason in REQUEUES_AT_ONCE else "False"
    message = evicted.message[:MAX_MESSAGE]
    ready = WorkloadCondition(admission.PODS_READY, "False", "WaitForStart", "The job has no pods", "")
    return _set(
        view,
        workload,
        *([ready] if admission.condition(workload, admission.PODS_READY) else []),
        WorkloadCondition(admission.REQUEUED, again, evicted.reason, message, ""),
        WorkloadCondition(admission.QUOTA_RESERVED, "False", "Pending", message, ""),
        WorkloadCondition(admission.ADMITTED, "False", "NoReservation", "The workload has no reservation", ""),
        release=True,
    )


def set_condition(view: View, workload: ObservedWorkload, new: WorkloadCondition) -> PatchWorkload:
    """Return the change of one condition of a Workload."""
    return _set(view, workload, new)


def _set(view: View, workload: ObservedWorkload, *changed: WorkloadCondition, release: bool = False) -> PatchWorkload:
    """Return the change of some conditions; the time of a condition whose status stays is kept."""
    now = view.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    conditions = {each.type: each for each in workload.conditions}
    for new in changed:
        old = conditions.get(new.type)
        since = old.since if old is not None and old.status == new.status else now
        conditions[new.type] = new._replace(since=since)
    written = [
        {
            "type": each.type,
            "status": each.status,
            "reason": each.reason,
            "message": each.message,
            "lastTransitionTime": each.since,
        }
        for each in conditions.values()
    ]
    status: dict[str, Any] = {"conditions": written} | ({"admission": None} if release else {})
    meta = {"uid": workload.uid, "resourceVersion": workload.version}
    return PatchWorkload(workload.name, {"metadata": meta, "status": status}, status=True)


POLICY = Policy("queue-request", act=act)
