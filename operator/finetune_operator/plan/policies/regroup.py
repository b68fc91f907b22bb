"""Putting a gang that trains together anew, because there is better capacity: more nodes, or spot ones again.

All ranks are asked to save, as before a loss with notice, so not a step is lost; then the next attempt begins with the
pods that stood by.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract.heartbeat import RankState
from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.manifests import num_nodes
from finetune_operator.plan.model.ledger import current, open_entry, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies import standby
from finetune_operator.plan.policies.endings import close

BUSY = frozenset({RankState.TRAINING, RankState.SAVING, RankState.VALIDATING})


def judge(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End the attempt where pods that stand by make a better gang."""
    entry = open_entry(status)
    if entry is None or entry.attempt != view.attempt or is_finished(status) or view.spec.suspend:
        return status
    num_ready = len(standby.ready(view))
    if not num_ready or not _is_settled(view, status, entry):
        return status
    size = min(num_nodes(view.spec), view.num_nodes + num_ready)
    if size > view.num_nodes:
        reason, words = Reason.GROWN, f"from {view.num_nodes} to {size} nodes"
    elif standby.fallen_back(view):
        reason, words = Reason.BACK_TO_SPOT, f"{num_ready} spot nodes are there again"
    else:
        return status
    status = close(status, reason, view.now)
    entry = current(status)
    assert entry is not None
    return replace_current(status, revise(entry, next_nodes=size, message=words))


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When an attempt with better capacity at hand has trained for long enough."""
    entry = open_entry(status)
    if entry is None or entry.training_at is None or not standby.ready(view):
        return None
    return entry.training_at + timedelta(seconds=view.settings.regroup_seconds)


def _is_settled(view: View, status: FineTuneJobStatus, entry: AttemptStatus) -> bool:
    if entry.training_at is None or view.now < entry.training_at + timedelta(seconds=view.settings.regroup_seconds):
        return False
    if not view.reports or not all(report.state in BUSY for report in view.reports):
        return False
    tally, total = status.tally, status.total_steps
    if total is None or not tally.trained_steps:
        return True
    left_seconds = (total - (status.step or 0)) * tally.trained_seconds / tally.trained_steps
    return left_seconds > view.settings.regroup_seconds
