"""spec.activeDeadlineSeconds: the longest time that a job may take.

Suspensions, and the time in a queue after an eviction, do not count.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import admission
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.finish import fail


def enforce(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Fail the job once its deadline has passed."""
    due = deadline(view, status)
    if due is None or view.now < due:
        return status
    limit = view.spec.active_deadline_seconds
    status = close(view, status, Reason.DEADLINE_EXCEEDED)
    problem = f"the job exceeded activeDeadlineSeconds ({limit} s)."
    remedy = "Raise spec.activeDeadlineSeconds to continue from the last checkpoint."
    return fail(view, status, Reason.DEADLINE_EXCEEDED, f"{problem} {remedy}")


def deadline(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return the job's deadline; None if it has none, has not started, has finished, is suspended or evicted."""
    limit = view.spec.active_deadline_seconds
    if limit is None or status.start_time is None or is_finished(status) or view.spec.suspend:
        return None
    if admission.is_waiting_again(status):
        return None
    return status.start_time + timedelta(seconds=limit + status.tally.suspended_seconds)


POLICY = Policy("deadline", decide=enforce, wake=deadline)
