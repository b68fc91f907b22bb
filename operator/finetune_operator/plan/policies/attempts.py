"""Decides when the next attempt begins. Beginning one only raises `status.attempt`: that number is the fence.

The reconcile that begins an attempt creates nothing. The next one, which reads the raised number from the cluster,
creates the pods (see `gang`), so no pod ever belongs to an attempt that the status does not contain.
"""

from __future__ import annotations

from datetime import datetime

from finetune_contract.interval import estimate_mtbf_seconds
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import SchedulingMode
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.manifests import hash_target, num_nodes
from finetune_operator.plan.model import admission, backoff, exporting, gangs, grace, ledger
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.listening import is_unheard
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import ObservedPod
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import budget, in_place
from finetune_operator.plan.policies.capacity import elastic, spot
from finetune_operator.plan.policies.queue import eviction


def begin(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Begin an attempt if the job may have one, the previous one is settled and its back-off is over.

    Pods of the previous attempt must be deleted, except those that are kept and those that no longer matter.
    """
    if not may_begin(view, status) or budget.is_undecided(view, status):
        return status
    if not admission.may_create(view) or admission.must_ask_again(view):
        return status
    kept = in_place.survivors(view, status)
    # A kept pod that this operator has not heard yet may be lost, too.
    if in_place.is_saving(view, status, kept) or is_unheard(kept, view.observed):
        return status
    due = _due(view, status)
    if due is not None and view.now < due:
        return status
    size = elastic.next_size(view, status, len(kept))
    if not _is_clear(view, kept, size):
        return status
    members = in_place.members_of_next(view, kept, size) if kept else None
    capacity = spot.capacity_of_next(status) if view.spec.recovery.spot is not None else None
    status = eviction.count_wait(view, status, _begin(view, status, status.attempt + 1))
    entry = ledger.current(status)
    assert entry is not None
    mode = gangs.choose(view) if size > 1 else SchedulingMode.NONE
    entry = revise(
        entry,
        nodes=size if size != num_nodes(view.spec) else None,
        capacity=capacity,
        scheduling=mode.value if mode is not SchedulingMode.NONE else None,
        mtbf_seconds=_mtbf_seconds(view, status),
        target=hash_target(view.spec),
    )
    return ledger.replace_current(status, entry if members is None else ledger.with_members(entry, members))


def _is_clear(view: View, kept: tuple[ObservedPod, ...], size: int) -> bool:
    """Return whether no other pod prevents the attempt.

    Either no other pod is left, or the kept pods are the complete gang and the ranks of all others have ended.
    """
    names = {pod.name for pod in kept}
    others = [pod for pod in view.observed.pods if pod.name not in names]
    return not others or (len(kept) == size and all(_has_left(view, pod) for pod in others))


def _has_left(view: View, pod: ObservedPod) -> bool:
    """Return whether a pod is being deleted and has reported the end of all its ranks."""
    received = view.heartbeat_of(pod)
    num_ended = len(received.beat.ends) if received is not None else 0
    return pod.deleted_at is not None and num_ended >= view.spec.topology.processes_per_node


def catch_up(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Skip attempts that the status does not contain, for example after it was restored from a backup.

    If the job was only stale in the cache, the status write conflicts and this decision is discarded.
    """
    if view.newest_attempt <= status.attempt or is_finished(status):
        return status
    return _begin(view, close(view, status, Reason.SUPERSEDED), view.newest_attempt + 1)


def may_begin(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether the job waits only for its next attempt."""
    entry = ledger.current(status)
    settled = (entry is None or entry.reason is not None) and not exporting.has_trained(view, status)
    return settled and not is_finished(status) and not view.spec.suspend and is_true(status, ConditionType.ACCEPTED)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the back-off before the next attempt ends."""
    return _due(view, status) if may_begin(view, status) else None


def _due(view: View, status: FineTuneJobStatus) -> datetime | None:
    entry = ledger.current(status)
    if entry is None:
        return None
    return backoff.next_attempt_at(entry, status, view.settings, view.job.metadata.uid)


def _mtbf_seconds(view: View, status: FineTuneJobStatus) -> float:
    """Return the mean time between interruptions that lose unsaved steps, without the time of suspensions.

    Interruptions with notice do not count: all ranks save before them, so the checkpoint interval does not depend on
    them. The ledger keeps only the newest attempts; their share of sudden interruptions is applied to all.
    """
    elapsed_seconds = (view.now - (status.start_time or view.now)).total_seconds() - status.tally.suspended_seconds
    # An outage ends an attempt before it trains.
    interruptions = [entry for entry in status.attempts if entry.counts_as not in (None, CountsAs.OUTAGE)]
    num_unsaved = sum(_loses_steps(entry) for entry in interruptions)
    num_in_all = (status.preemptions + status.failures) * num_unsaved / max(1, len(interruptions))
    return round(estimate_mtbf_seconds(elapsed_seconds, num_in_all))


def _loses_steps(entry: AttemptStatus) -> bool:
    """Return whether an end may lose unsaved steps. A pod that its kubelet refused has not trained."""
    return bool(entry.lost_steps) or (grace.was_sudden(entry) and entry.reason != Reason.REFUSED_BY_KUBELET)


def _begin(view: View, status: FineTuneJobStatus, attempt: int) -> FineTuneJobStatus:
    status = ledger.begin(status, attempt, view.now, view.settings.max_attempts_kept)
    # The figures of the previous attempt do not apply to this one.
    return revise(status, start_time=status.start_time or view.now, images_per_second=None, eta=None)


BEGIN = Policy("attempts", decide=begin, wake=wake)
CATCH_UP = Policy("catch-up", decide=catch_up)
