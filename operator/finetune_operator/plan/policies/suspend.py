"""spec.suspend: the open attempt ends, its pods have their own grace period to save in, and a later attempt goes on.

`restart` deletes the pods.
"""

from __future__ import annotations

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.endings import close
from finetune_operator.plan.report.conditions import find


def stop(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End the open attempt where the job is to be suspended. Its end counts as nothing."""
    if not view.spec.suspend or is_finished(status):
        return status
    return close(status, Reason.SUSPENDED, view.now)


def is_suspended(view: View) -> bool:
    """Whether the job is to be suspended and nothing of it is left."""
    return view.spec.suspend and not view.observed.pods


def resume(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """On resuming, remember for how long the job was suspended. The condition turns False in the same pass."""
    condition = find(status, ConditionType.SUSPENDED)
    if view.spec.suspend or condition is None or condition.status != "True":
        return status
    seconds = max(0.0, (view.now - condition.last_transition_time).total_seconds())
    tally = revise(status.tally, suspended_seconds=round(status.tally.suspended_seconds + seconds, 3))
    return revise(status, tally=tally)
