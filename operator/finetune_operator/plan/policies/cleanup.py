"""Delete the pods of an attempt that has ended and that are not kept in place, so that the next one can begin.

Pods that may still save keep running until their notice expires (see `grace`). Deleting the pods of a suspended job
gives them their notice. After a sudden loss the survivors are deleted immediately. After a hang each pod runs until its
peers have stored the stacks of their ranks: if a hung rank ends first, the collectives of the others fail.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model import exporting
from finetune_operator.plan.model.grace import WITH_OWN_GRACE, all_ended_well, may_save, notice_expires_at
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import DeletePod, ObservedPod
from finetune_operator.plan.model.view import ENDED, View, has_ended, is_finished
from finetune_operator.plan.policies import in_place

STACKS = timedelta(seconds=20)
"""Longest wait for the stacks of a hung gang. Supervisors wait for those of their peers for at most 10 s themselves."""


def delete_old(view: View, status: FineTuneJobStatus) -> tuple[DeletePod, ...]:
    """Return the pods to delete now: none twice, none of an open attempt, and none that is kept."""
    grace = view.settings.peer_grace_seconds
    deletions = [_delete(pod, grace) for pod in view.older_pods]
    entry = current(status)
    if entry is None or entry.attempt != view.attempt:
        return _present(deletions)
    if is_finished(status) or (exporting.has_trained(view, status) and not view.spec.suspend):
        # Pods that have ended stay for their logs; Kubernetes deletes them with the job.
        running = [pod for pod in _all_pods(view) if pod.phase not in ENDED]
        deletions += [_delete(pod, _running_grace(entry, view)) for pod in running]
    elif entry.reason is not None:
        kept = in_place.survivors(view, status)
        deletions += [_delete_settled(pod, entry, view) for pod in _all_pods(view) if pod not in kept]
    return _present(deletions)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when survivors that are still saving, or storing their stacks, must be deleted."""
    entry = current(status)
    if entry is None or entry.reason is None or is_finished(status) or all(map(has_ended, view.pods.values())):
        return None
    if may_save(entry, view):
        return notice_expires_at(entry, view)
    return _stacks_due_at(entry)


def _all_pods(view: View) -> list[ObservedPod]:
    return [*view.pods.values(), *view.standbys.values()]


def _delete_settled(pod: ObservedPod, entry: AttemptStatus, view: View) -> DeletePod | None:
    grace = view.settings.peer_grace_seconds
    if has_ended(pod):
        return _delete(pod, grace)
    if entry.reason in WITH_OWN_GRACE:
        # If a rank has failed since, the others can no longer finish a step together and save it.
        return _delete(pod, None if all_ended_well(view) else grace)
    if may_save(entry, view) and view.now < notice_expires_at(entry, view) and not _is_waiting(pod, view):
        return None
    if _peers_store_stacks(pod, entry, view):
        return None
    return _delete(pod, grace)


def _is_waiting(pod: ObservedPod, view: View) -> bool:
    """Return whether all ranks of a pod have ended and its supervisor waits for the next attempt."""
    received = view.heartbeat_of(pod)
    return received is not None and received.beat.waiting


def _peers_store_stacks(pod: ObservedPod, entry: AttemptStatus, view: View) -> bool:
    due = _stacks_due_at(entry)
    peers = (peer for peer in view.pods.values() if peer is not pod)
    return due is not None and view.now < due and not all(has_ended(peer) or _is_waiting(peer, view) for peer in peers)


def _stacks_due_at(entry: AttemptStatus) -> datetime | None:
    return entry.ended_at + STACKS if entry.reason == Reason.HANG and entry.ended_at is not None else None


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
