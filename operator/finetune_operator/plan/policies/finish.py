"""The job's end: written once, and kept whatever comes after."""

from __future__ import annotations

from finetune_contract.phase import Phase
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.endings import close


def judge_success(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The job has succeeded once every node of the attempt has done all that was asked.

    A pod may have vanished since: its last beat, with all ranks done, counts as much.
    """
    if view.attempt == 0 or is_finished(status):
        return status
    if not all(view.is_done(node_rank) for node_rank in range(view.num_nodes)):
        return status
    status = close(status, Reason.FINISHED, view.now)
    return revise(
        status,
        phase=Phase.SUCCEEDED,
        reason=Reason.FINISHED.value,
        message=_success_message(status),
        step=status.total_steps or status.step,
        progress="100%",
        eta=None,
        completion_time=view.now,
    )


def fail(view: View, status: FineTuneJobStatus, reason: str, message: str) -> FineTuneJobStatus:
    """End the job without its model."""
    return revise(
        status,
        phase=Phase.FAILED,
        reason=str(reason),
        message=message,
        eta=None,
        completion_time=view.now,
    )


def _success_message(status: FineTuneJobStatus) -> str:
    steps = f"{status.total_steps} steps trained" if status.total_steps else "all steps trained"
    return (
        f"{steps} in {status.attempt} attempts; {status.lost_steps or 'no'} steps done twice"
        if status.attempt > 1
        else steps
    )
