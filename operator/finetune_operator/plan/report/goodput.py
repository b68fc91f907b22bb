"""Goodput: the share of the time since the start that was spent on steps that were kept."""

from __future__ import annotations

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished


def measure(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Update the goodput if a step was finished or the job ended; otherwise it does not change."""
    old = view.job.status
    if status.tally == old.tally and status.lost_steps == old.lost_steps and status.phase == old.phase:
        return status
    tally = status.tally
    until = status.completion_time if is_finished(status) else tally.step_time
    if until is None or status.start_time is None or tally.trained_steps == 0:
        return status
    elapsed_seconds = (until - status.start_time).total_seconds() - tally.suspended_seconds
    if elapsed_seconds <= 0:
        return status
    kept = max(0, tally.trained_steps - status.lost_steps) / tally.trained_steps
    return revise(status, goodput=round(min(1.0, tally.trained_seconds * kept / elapsed_seconds), 3))


POLICY = Policy("goodput", decide=measure)
