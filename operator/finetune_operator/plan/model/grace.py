"""The grace period of an attempt that has ended: may its ranks still save, and until when?

With a preemption notice the ranks agree on a step, save and exit by themselves before the notice expires. After a
sudden loss no rank can finish another step, so there is nothing to wait for.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import AttemptStatus
from finetune_operator.plan.model.view import View, has_ended

WITH_OWN_GRACE = frozenset({Reason.SUSPENDED, Reason.DEADLINE_EXCEEDED, Reason.EVICTED_BY_QUEUE})
"""Ends that the operator decides or carries out: deleting the pods is itself the notice."""
SUDDEN = frozenset({Reason.POD_LOST, Reason.NODE_LOST, Reason.DELETION_BY_POD_GC, Reason.REFUSED_BY_KUBELET})
"""Preemptions without notice."""
SAVED_FOR = frozenset({Reason.GROWN, Reason.BACK_TO_SPOT, Reason.TARGET_EDITED})
"""Ends that the operator decides while the gang trains: all ranks save, and their pods are kept."""
REGROUP_SECONDS = 600.0
"""Time limit of that save. It is generous, because no node is about to be removed."""
GOOD_ENDS = frozenset({None, ExitCode.DONE, ExitCode.SAVED})


def was_sudden(entry: AttemptStatus) -> bool:
    """Return whether an attempt ended without a preemption notice."""
    return entry.counts_as != CountsAs.PREEMPTION or is_sudden(entry)


def is_sudden(entry: AttemptStatus) -> bool:
    """Return whether a preemption left no time to save. A health tool that drains a node leaves it."""
    failed = entry.reason == Reason.GPU_FAULT and entry.exit_code not in GOOD_ENDS
    return failed or entry.reason in SUDDEN


def may_save(entry: AttemptStatus, view: View) -> bool:
    """Return whether the running ranks can finish a step together: they had notice, and none has failed."""
    if entry.reason not in SAVED_FOR and was_sudden(entry):
        return False
    if entry.gang_complete and len(view.pods) < view.num_nodes and not _is_any_saving(view):
        # The pod with the notice is already deleted: the others cannot finish a step without it.
        return False
    return all_ended_well(view)


def all_ended_well(view: View) -> bool:
    """Return whether no pod that has ended reports a failure."""
    return all(pod.exit_code in GOOD_ENDS for pod in view.pods.values() if has_ended(pod))


def _is_any_saving(view: View) -> bool:
    return any(report.state is RankState.SAVING for report in view.reports)


def notice_expires_at(entry: AttemptStatus, view: View) -> datetime:
    """Return when the preemption notice of the attempt's pods expires.

    Pods that are already deleted no longer show theirs; `recovery.noticeSeconds` from the attempt's end counts then.
    """
    if entry.reason in SAVED_FOR:
        return (entry.ended_at or view.now) + timedelta(seconds=REGROUP_SECONDS)
    noticed = [pod.deleted_at + pod.grace for pod in view.pods.values() if pod.deleted_at is not None]
    seconds = view.spec.recovery.notice_seconds
    return max(noticed, default=(entry.ended_at or view.now) + timedelta(seconds=seconds))
