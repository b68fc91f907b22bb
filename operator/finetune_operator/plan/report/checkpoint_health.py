"""Whether checkpoints can be written, and how many were found damaged, as the ranks say."""

from __future__ import annotations

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View
from finetune_operator.plan.report.conditions import is_true, make, put

KIND = ConditionType.CHECKPOINT_STALE


def note(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the condition CheckpointStale, and the number of damaged checkpoints. One that never held is left out."""
    corrupt = max((report.corrupt_checkpoints or 0 for report in view.reports), default=0)
    if corrupt > (status.corrupt_checkpoints or 0):
        status = revise(status, corrupt_checkpoints=corrupt)
    said = [report.checkpoint_error for report in view.reports if report.checkpoint_error is not None]
    text = next((error for error in said if error), "")
    if text:
        return put(status, make(view, KIND, True, Reason.CHECKPOINT_STALE, text))
    if said and is_true(status, KIND):
        return put(status, make(view, KIND, False, Reason.CHECKPOINT_WRITTEN, "Checkpoints can be written again."))
    return status
