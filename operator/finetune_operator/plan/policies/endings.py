"""Decides when an attempt has ended: at the first sign, with a cause as soon as one is certain.

A sign that is only a consequence, such as a rank that lost its peer, ends the attempt immediately. It becomes the
recorded cause only after `Settings.cause_seconds`, or once all pods have ended: the peer's own end may arrive later.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.names import pod_name
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.causes import BY_THE_CLUSTER, Cause, find_cause, find_silent
from finetune_operator.plan.model.closing import record_cause
from finetune_operator.plan.model.grace import SAVED_FOR
from finetune_operator.plan.model.ledger import current, replace_current
from finetune_operator.plan.model.listening import extend, first_heard_by, is_unheard
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished

MAX_EXTENSION = timedelta(seconds=30)
"""Longest wait for reports that this operator could not receive: the restart of the job must not wait for longer."""


def detect_end(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Mark the attempt as ended at the first sign, and record the cause once it is certain."""
    entry = current(status)
    if entry is not None and entry.reason in SAVED_FOR and entry.attempt == view.attempt:
        return _detect_loss_while_saving(view, status)
    if entry is None or entry.reason is not None or is_finished(status):
        return status
    cause = find_cause(view, entry.gang_complete)
    if cause is None and entry.ended_at is None:
        return status
    if entry.ended_at is None:
        entry = revise(entry, ended_at=view.now)
        status = replace_current(status, entry)
    if (cause is None or cause.consequence) and _awaits_heartbeats(view):
        return status
    if cause is None:
        # The pod that showed the sign is deleted, and the gang was never complete.
        cause = Cause(Reason.POD_LOST, rank=0, pod=pod_name(view.job.metadata.name, view.attempt, 0))
    if cause.consequence and view.now < cause_certain_at(entry, view) and not view.all_ended():
        return status
    if cause.consequence and entry.ended_at is not None and not view.all_ended():
        # Every supervisor reports its rank's end at once; the one that has not is the lost peer.
        cause = find_silent(view, entry.ended_at) or cause
    return record_cause(view, status, cause)


def _detect_loss_while_saving(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Record a preemption of a gang that is saving before it regroups: it counts like any other loss."""
    cause = find_cause(view, gang_complete=False)
    lost = cause is not None and not cause.consequence and cause.reason in BY_THE_CLUSTER and not is_finished(status)
    return record_cause(view, status, cause) if cause is not None and lost else status


def cause_certain_at(entry: AttemptStatus, view: View) -> datetime:
    """Return when a sign that may be a consequence is accepted as the cause."""
    limit = timedelta(seconds=view.settings.cause_seconds)
    return extend(entry.ended_at or view.now, limit, view.observed, at_most=MAX_EXTENSION)


def _awaits_heartbeats(view: View) -> bool:
    """Return whether an operator that has just started lacks the heartbeats that show the cause."""
    due = first_heard_by(view.observed, view.settings)
    return due is not None and view.now < due and is_unheard(view.pods.values(), view.observed)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the cause of an attempt that has ended without one becomes certain."""
    entry = current(status)
    if entry is None or entry.ended_at is None or entry.reason is not None:
        return None
    certain_at = cause_certain_at(entry, view)
    return first_heard_by(view.observed, view.settings) if certain_at <= view.now else certain_at


POLICY = Policy("endings", decide=detect_end, wake=wake)
