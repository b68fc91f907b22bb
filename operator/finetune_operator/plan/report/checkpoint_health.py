"""Checkpoint health, as the ranks report it: whether checkpoints can be written, and how many were damaged."""

from __future__ import annotations

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.conditions import build, is_true, put
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View

KIND = ConditionType.CHECKPOINT_STALE


def update(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the condition CheckpointStale, unless it never was True, and the number of damaged checkpoints."""
    corrupt = max((report.corrupt_checkpoints or 0 for report in view.reports), default=0)
    if corrupt > (status.corrupt_checkpoints or 0):
        status = revise(status, corrupt_checkpoints=corrupt)
    reported = [report.checkpoint_error for report in view.reports if report.checkpoint_error is not None]
    message = next((error for error in reported if error), "")
    if message:
        return put(status, build(view, KIND, True, Reason.CHECKPOINT_STALE, message))
    if reported and is_true(status, KIND):
        return put(status, build(view, KIND, False, Reason.CHECKPOINT_WRITTEN, "Checkpoints can be written again."))
    return status
