"""Continue a Failed job after the user has fixed its cause: the next attempt starts from the newest checkpoint.

On a cluster the user changes spec.recovery.manualRetries. `finetune run` of a job that has Failed calls `continued`.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View


def retry(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Continue a Failed job if the user asks for it. In any other phase, only remember the number."""
    number = view.spec.recovery.manual_retries
    if status.phase is not Phase.FAILED:
        return status if status.manual_retries == number else revise(status, manual_retries=number)
    if status.manual_retries != number:
        return revise(continued(status, view.now), manual_retries=number)
    return continued(status, view.now) if _has_time_again(view, status) else status


def continued(status: FineTuneJobStatus, now: datetime) -> FineTuneJobStatus:
    """Return the status of a Failed job that may have another attempt. Its budget of failures is full again.

    The time since its failure does not count, like that of a suspension.
    """
    idle_seconds = (now - (status.completion_time or now)).total_seconds()
    tally = revise(
        status.tally,
        failures_since_checkpoint=0,
        failed_step=None,
        failures_at_step=0,
        retried_attempt=status.attempt,
        suspended_seconds=round(status.tally.suspended_seconds + max(0.0, idle_seconds), 3),
    )
    message = "the job continues after its failure"
    return revise(status, phase=Phase.RECOVERING, message=message, completion_time=None, tally=tally)


def how_to_continue(status: FineTuneJobStatus) -> str:
    """Return the edit that continues a job, for the message of its failure."""
    number = status.manual_retries + 1
    return (
        f"To continue from the last checkpoint after the cause is fixed, set spec.recovery.manualRetries to {number}."
    )


def _has_time_again(view: View, status: FineTuneJobStatus) -> bool:
    """Return whether the job failed only by its deadline, which the user has raised or removed since."""
    if status.reason != Reason.DEADLINE_EXCEEDED or status.start_time is None or status.completion_time is None:
        return False
    limit = view.spec.active_deadline_seconds
    if limit is None:
        return True
    due = status.start_time + timedelta(seconds=limit + status.tally.suspended_seconds)
    return due > status.completion_time


POLICY = Policy("retry", decide=retry)
