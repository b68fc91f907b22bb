"""When the next attempt begins. Beginning one only raises `status.attempt`: that number is the fence.

Nothing of an attempt is created in the pass that begins it. The next pass, which reads the raised number back from
the cluster, creates (see `gang`), so no pod is ever of an attempt that the status does not know.
"""

from __future__ import annotations

from datetime import datetime

from finetune_contract.interval import estimate_mtbf_seconds
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model import ledger
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.types import ObservedPod
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import backoff, budget, capacity, cleanup, elastic, in_place
from finetune_operator.plan.policies.endings import close
from finetune_operator.plan.report.conditions import is_true


def begin(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Begin an attempt where the job may have one, the last one is settled and its wait is over.

    Of the pods of the last one only those may be left that are kept, and such as are in nobody's way.
    """
    if not may_begin(view, status) or budget.is_waiting(view, status):
        return status
    kept = in_place.survivors(view, status)
    if in_place.is_saving(view, status, kept):
        return status
    due = _due(view, status)
    if due is not None and view.now < due:
        return status
    size = elastic.next_size(view, status, len(kept))
    if not _has_room(view, kept, size):
        return status
    members = in_place.members_of_next(view, kept, size) if kept else None
    kind = capacity.of_next(status) if view.spec.recovery.spot is not None else None
    status = _begin(view, status, status.attempt + 1)
    entry = ledger.current(status)
    assert entry is not None
    entry = revise(
        entry,
        nodes=size if size != num_nodes(view.spec) else None,
        capacity=kind,
        mtbf_seconds=_mtbf_seconds(view, status),
    )
    return ledger.replace_current(status, entry if members is None else ledger.with_members(entry, members))


def _has_room(view: View, kept: tuple[ObservedPod, ...], size: int) -> bool:
    """Whether no other pod is in the way: none is left, or those that are have done with it all and none is to come."""
    names = {pod.name for pod in kept}
    others = [pod for pod in view.observed.pods if pod.name not in names]
    return not others or (len(kept) == size and all(_has_left(view, pod) for pod in others))


def _has_left(view: View, pod: ObservedPod) -> bool:
    """Whether a pod that is being deleted has told of the end of all its ranks."""
    received = view.heard(pod)
    num_ended = len(received.beat.ends) if received is not None else 0
    return pod.deleted_at is not None and num_ended >= view.spec.topology.processes_per_node


def catch_up(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Step over attempts that the status does not know of, as after it was restored from a backup.

    Where the job was merely read too early, the status write conflicts and nothing comes of it.
    """
    if view.newest_attempt <= status.attempt or is_finished(status):
        return status
    return _begin(view, close(status, Reason.SUPERSEDED, view.now), view.newest_attempt + 1)


def may_begin(view: View, status: FineTuneJobStatus) -> bool:
    """Whether the job waits for nothing but its next attempt."""
    entry = ledger.current(status)
    settled = entry is None or entry.reason is not None
    return settled and not is_finished(status) and not view.spec.suspend and is_true(status, ConditionType.ACCEPTED)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When an attempt may begin that has to wait."""
    return _due(view, status) if may_begin(view, status) else None


def _due(view: View, status: FineTuneJobStatus) -> datetime | None:
    entry = ledger.current(status)
    if entry is None:
        return None
    return backoff.next_attempt_at(entry, status, view.settings, view.job.metadata.uid)


def _mtbf_seconds(view: View, status: FineTuneJobStatus) -> float:
    """Mean time between interruptions that find unsaved steps, the time of suspensions aside.

    Before one with notice all save: how often that is asked for does not depend on them. Their share is that of the
    attempts that the ledger still holds.
    """
    elapsed_seconds = (view.now - (status.start_time or view.now)).total_seconds() - status.tally.suspended_seconds
    interruptions = [entry for entry in status.attempts if entry.counts_as is not None]
    num_unsaved = sum(cleanup.was_sudden(entry) or bool(entry.lost_steps) for entry in interruptions)
    num_in_all = (status.preemptions + status.failures) * num_unsaved / max(1, len(interruptions))
    return round(estimate_mtbf_seconds(elapsed_seconds, num_in_all))


def _begin(view: View, status: FineTuneJobStatus, attempt: int) -> FineTuneJobStatus:
    status = ledger.begin(status, attempt, view.now, view.settings.max_attempts_kept)
    # What was measured of the last attempt is not true of this one.
    return revise(status, start_time=status.start_time or view.now, images_per_second=None, eta=None)
