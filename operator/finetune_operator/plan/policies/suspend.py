"""spec.suspend: the open attempt ends, its pods save within their own grace period, and a later attempt continues.

`cleanup` deletes the pods.
"""

from __future__ import annotations

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.conditions import find
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished


def stop(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """End the open attempt of a job that the user suspends. This end counts neither as preemption nor as failure."""
    if not view.spec.suspend or is_finished(status):
        return status
    return close(view, status, Reason.SUSPENDED)


def is_suspended(view: View) -> bool:
    """Return whether the user suspends the job and none of its pods is left."""
    return view.spec.suspend and not view.observed.pods


def resume(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Add up the time of a suspension that has ended. `conditions` turns the condition False in the same reconcile."""
    condition = find(status, ConditionType.SUSPENDED)
    if view.spec.suspend or condition is None or condition.status != "True":
        return status
    if admission.is_waiting_again(status):
        # The suspension is a part of that wait.
        return status
    seconds = max(0.0, (view.now - condition.last_transition_time).total_seconds())
    tally = revise(status.tally, suspended_seconds=round(status.tally.suspended_seconds + seconds, 3))
    return revise(status, tally=tally)


RESUME = Policy("resume", decide=resume)
STOP = Policy("suspend", decide=stop)
