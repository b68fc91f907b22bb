"""Clearing an attempt that has ended, so that the next one can begin: what is not kept in place goes.

With notice, the ranks agree on a step, save and leave by themselves; they have until the notice is over. Suspended
ones are given that notice here. After a sudden loss no step can be finished any more, so the survivors go at once.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.types import DeletePod, ObservedPod
from finetune_operator.plan.model.view import ENDED, View, has_ended, is_finished

WITH_OWN_GRACE = frozenset({Reason.SUSPENDED, Reason.DEADLINE_EXCEEDED})
"""Ends that are decided here: the deletion itself is the pods' notice."""
SUDDEN = frozenset({Reason.POD_LOST, Reason.NODE_LOST, Reason.DELETION_BY_POD_GC})
"""Ends by capacity that came without notice."""
SAVED_FOR = frozenset({Reason.GROWN, Reason.BACK_TO_SPOT})
"""Ends that are decided here, of gangs that train: all save, and keep their pods."""
REGROUP_SECONDS = 600.0
"""How long that save may take; nobody takes the machines away meanwhile."""
GOOD_ENDS = frozenset({None, ExitCode.DONE, ExitCode.SAVED})


def delete_old(view: View, status: FineTuneJobStatus, kept: tuple[ObservedPod, ...] = ()) -> tuple[DeletePod, ...]:
    """The pods to delete now. Nothing is deleted twice, no pod of an attempt that is open, and none that is kept."""
    grace = view.settings.peer_grace_seconds
    doomed = [_delete(pod, grace) for pod in view.older_pods]
    entry = current(status)
    if entry is None or entry.attempt != view.attempt:
        return _some(doomed)
    if is_finished(status):
        # Finished pods stay for their logs; the job's own end takes them.
        running = [pod for pod in _all_pods(view) if pod.phase not in ENDED]
        doomed += [_delete(pod, _running_grace(entry, view)) for pod in running]
    elif entry.reason is not None:
        doomed += [_delete_settled(pod, entry, view) for pod in _all_pods(view) if pod not in kept]
    return _some(doomed)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When survivors that are still saving must be looked at again."""
    entry = current(status)
    if entry is None or entry.reason is None or is_finished(status) or not may_save(entry, view):
        return None
    running = any(not has_ended(pod) for pod in view.pods.values())
    return notice_over_at(entry, view) if running else None


def _all_pods(view: View) -> list[ObservedPod]:
    return [*view.pods.values(), *view.standbys.values()]


def _delete_settled(pod: ObservedPod, entry: AttemptStatus, view: View) -> DeletePod | None:
    grace = view.settings.peer_grace_seconds
    if has_ended(pod):
        return _delete(pod, grace)
    if entry.reason in WITH_OWN_GRACE:
        # Where a rank has ended badly meanwhile, the others can save no step that they share any more.
        return _delete(pod, None if _all_ended_well(view) else grace)
    received = view.heard(pod)
    has_saved = received is not None and received.beat.waiting
    if may_save(entry, view) and view.now < notice_over_at(entry, view) and not has_saved:
        return None
    return _delete(pod, grace)


def _running_grace(entry: AttemptStatus, view: View) -> int | None:
    return None if entry.reason in WITH_OWN_GRACE else view.settings.peer_grace_seconds


def was_sudden(entry: AttemptStatus) -> bool:
    """Whether an interruption came without notice."""
    return entry.counts_as != CountsAs.PREEMPTION or entry.reason in SUDDEN


def may_save(entry: AttemptStatus, view: View) -> bool:
    """Whether the ranks that still run can finish a step together: they had notice, and none has ended badly."""
    if entry.reason not in SAVED_FOR and was_sudden(entry):
        return False
    if entry.gang_complete and len(view.pods) < view.num_nodes and not _is_any_saving(view):
        # The one with the notice is gone already: no step can be finished without it.
        return False
    return _all_ended_well(view)


def _all_ended_well(view: View) -> bool:
    return all(pod.exit_code in GOOD_ENDS for pod in view.pods.values() if has_ended(pod))


def _is_any_saving(view: View) -> bool:
    return any(report.state is RankState.SAVING for report in view.reports)


def notice_over_at(entry: AttemptStatus, view: View) -> datetime:
    """When the notice of the pods that are taken away is over; where they are gone, as long as it is for any."""
    if entry.reason in SAVED_FOR:
        return (entry.ended_at or view.now) + timedelta(seconds=REGROUP_SECONDS)
    noticed = [pod.deleted_at + pod.grace for pod in view.pods.values() if pod.deleted_at is not None]
    seconds = view.spec.recovery.notice_seconds
    return max(noticed, default=(entry.ended_at or view.now) + timedelta(seconds=seconds))


def _delete(pod: ObservedPod, grace_seconds: int | None) -> DeletePod | None:
    """Delete a pod, unless that is under way and no slower."""
    if pod.deleted_at is not None:
        if grace_seconds is None or pod.grace <= timedelta(seconds=grace_seconds):
            return None
        if pod.phase in ENDED:
            return None
    return DeletePod(pod.name, pod.uid, grace_seconds)


def _some(doomed: list[DeletePod | None]) -> tuple[DeletePod, ...]:
    return tuple(pod for pod in doomed if pod is not None)
