"""The end of the job. Only `retry` changes a failure afterwards."""

from __future__ import annotations

from finetune_contract.outputs.request import written_by_export
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.closing import close
from finetune_operator.plan.model.explain import count
from finetune_operator.plan.model.ledger import current
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished


def detect_success(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Mark the job as succeeded once all ranks of every node of the attempt are done.

    If a pod has been deleted since, its last heartbeat counts, if that reports all its ranks as done.
    """
    entry = current(status)
    if view.attempt == 0 or is_finished(status) or (entry is not None and entry.reason == Reason.FINISHED):
        return status
    if not all(view.is_done(node_rank) for node_rank in range(view.num_nodes)):
        return status
    if entry is not None and entry.reason == Reason.TARGET_EDITED:
        # The ranks have finished what the spec requested before it was edited.
        return status
    status = close(view, status, Reason.FINISHED)
    # An export pod may still have to write outputs; `exports` ends the job then.
    return status if written_by_export(view.spec.outputs) else succeed(view, status)


def succeed(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Mark the job as succeeded."""
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
    """Mark the job as failed."""
    return revise(
        status,
        phase=Phase.FAILED,
        reason=str(reason),
        message=message,
        eta=None,
        completion_time=view.now,
    )


def _success_message(status: FineTuneJobStatus) -> str:
    trained = f"{count(status.total_steps, 'step')} trained" if status.total_steps else "all steps trained"
    if status.attempt == 1:
        return trained
    return f"{trained} in {status.attempt} attempts; {count(status.lost_steps, 'step')} repeated"


POLICY = Policy("finish", decide=detect_success)
