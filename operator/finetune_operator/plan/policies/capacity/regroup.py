"""Form a new gang while the job trains, because better capacity is ready: more nodes, or spot nodes again.

All ranks first receive the order to save, as before a preemption with notice, so no step is lost. The next attempt
then includes the standby pods.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.explain import count
from finetune_operator.plan.model.ledger import open_attempt, open_entry
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View
from finetune_operator.plan.policies.capacity import elastic, standby

BUSY = frozenset({RankState.TRAINING, RankState.SAVING, RankState.VALIDATING})


def regroup(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End the attempt if its gang becomes larger, or uses more spot nodes, with the standby pods."""
    entry = open_attempt(view, status)
    if entry is None or view.spec.suspend:
        return status
    num_ready = len(standby.ready(view))
    if not num_ready or not _is_worth_it(view, status, entry):
        return status
    size = min(elastic.largest(view), view.num_nodes + num_ready)
    if size > view.num_nodes:
        reason, message = Reason.GROWN, f"the gang grows from {view.num_nodes} to {size} nodes"
    elif standby.fallen_back(view):
        reason, message = Reason.BACK_TO_SPOT, f"{count(num_ready, 'standby pod')} on spot nodes"
    else:
        return status
    return close(view, status, reason, next_nodes=size, message=message)


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when an attempt for which better capacity is ready has trained for long enough."""
    entry = open_entry(status)
    if entry is None or entry.training_at is None or not standby.ready(view):
        return None
    return entry.training_at + timedelta(seconds=view.settings.regroup_seconds)


def _is_worth_it(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    """Return whether the gang trains undisturbed, and still has enough to train to repay a restart."""
    if entry.training_at is None or view.now < entry.training_at + timedelta(seconds=view.settings.regroup_seconds):
        return False
    if not view.reports or not all(report.state in BUSY for report in view.reports):
        return False
    tally, total = status.tally, status.total_steps
    if total is None or not tally.trained_steps:
        return True
    left_seconds = (total - (status.step or 0)) * tally.trained_seconds / tally.trained_steps
    return left_seconds > view.settings.regroup_seconds


POLICY = Policy("regroup", decide=regroup, wake=wake)
