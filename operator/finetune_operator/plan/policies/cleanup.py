"""Delete the pods of an attempt that has ended and that are not kept in place, so that the next one can begin.

Pods that may still save keep running until their notice expires (see `grace`). Deleting the pods of a suspended job
gives them their notice. After a sudden loss the survivors are deleted immediately.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.grace import WITH_OWN_GRACE, all_ended_well, may_save, notice_expires_at
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import DeletePod, ObservedPod
from finetune_operator.plan.model.view import ENDED, View, has_ended, is_finished
from finetune_operator.plan.policies import in_place


def delete_old(view: View, status: FineTuneJobStatus) -> tuple[DeletePod, ...]:
    """Return the pods to delete now: none twice, none of an open attempt, and none that is kept."""
    grace = view.settings.peer_grace_seconds
    deletions = [_delete(pod, grace) for pod in view.older_pods]
    entry = current(status)
    if entry is None or entry.attempt != view.attempt:
        return _present(deletions)
    if is_finished(status):
        # Pods that have ended stay for their logs; Kubernetes deletes them with the job.
        running = [pod for pod in _all_pods(view) if pod.phase not in ENDED]
        deletions += [_delete(pod, _running_grace(entry, view)) for pod in running]
    elif entry.reason is not None:
        kept = in_place.survivors(view, status)
        deletions += [_delete_settled(pod, entry, view) for pod in _all_pods(view) if pod not in kept]
    return _present(deletions)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when survivors that are still saving must be deleted."""
    entry = current(status)
    if entry is None or entry.reason is None or is_finished(status) or not may_save(entry, view):
        return None
    running = any(not has_ended(pod) for pod in view.pods.values())
    return notice_expires_at(entry, view) if running else None


def _all_pods(view: View) -> list[ObservedPod]:
    return [*view.pods.values(), *view.standbys.values()]


def _delete_settled(pod: ObservedPod, entry: AttemptStatus, view: View) -> DeletePod | None:
    grace = view.settings.peer_grace_seconds
    if has_ended(pod):
        return _delete(pod, grace)
    if entry.reason in WITH_OWN_GRACE:
        # If a rank has failed since, the others can no longer finish a step together and save it.
        return _delete(pod, None if all_ended_well(view) else grace)
    received = view.heartbeat_of(pod)
    has_saved = received is not None and received.beat.waiting
    if may_save(entry, view) and view.now < notice_expires_at(entry, view) and not has_saved:
        return None
    return _delete(pod, grace)


def _running_grace(entry: AttemptStatus, view: View) -> int | None:
    return None if entry.reason in WITH_OWN_GRACE else view.settings.peer_grace_seconds


def _delete(pod: ObservedPod, grace_seconds: int | None) -> DeletePod | None:
    """Return the deletion of a pod; None if it is already being deleted within that grace period."""
    if pod.deleted_at is not None:
        if grace_seconds is None or pod.grace <= timedelta(seconds=grace_seconds):
            return None
        if pod.phase in ENDED:
            return None
    return DeletePod(pod.name, pod.uid, grace_seconds)


def _present(deletions: list[DeletePod | None]) -> tuple[DeletePod, ...]:
    return tuple(deletion for deletion in deletions if deletion is not None)


POLICY = Policy("cleanup", wake=wake, act=delete_old)
