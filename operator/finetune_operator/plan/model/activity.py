"""Describes what the running gang does: reason and message. `report.phase` shows it, `policies.hangs` compares it."""

from __future__ import annotations

from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.silence import describe_silence
from finetune_operator.plan.model.view import View

STATES = {
    RankState.STARTING: Reason.LOADING,
    RankState.LOADING: Reason.LOADING,
    RankState.CACHING: Reason.CACHING,
    RankState.RESTORING: Reason.RESTORING,
    RankState.TRAINING: Reason.TRAINING,
    RankState.VALIDATING: Reason.VALIDATING,
    RankState.SAVING: Reason.SAVING,
    RankState.SAVED: Reason.SAVING,
    RankState.EXPORTING: Reason.EXPORTING,
    RankState.DONE: Reason.EXPORTING,
    RankState.FAILED: Reason.TRAINING,
}
"""Reason for each state of a rank."""
STAGES = (
    Reason.LOADING,
    Reason.CACHING,
    Reason.RESTORING,
    Reason.TRAINING,
    Reason.VALIDATING,
    Reason.SAVING,
    Reason.EXPORTING,
)
"""Stages of an attempt, in the order in which a rank first enters them."""
DESCRIPTIONS = {
    Reason.LOADING: "loading the model and the data set",
    Reason.CACHING: "caching latents and text embeddings",
    Reason.RESTORING: "restoring the newest checkpoint",
    Reason.TRAINING: "training",
    Reason.VALIDATING: "validating",
    Reason.SAVING: "saving a checkpoint",
    Reason.EXPORTING: "writing the outputs",
}
"""Message for each stage; `kubectl get` shows the message, not the reason."""
BEFORE_TRAINING = frozenset({Reason.LOADING, Reason.CACHING, Reason.RESTORING})
BETWEEN_STEPS = frozenset({Reason.VALIDATING, Reason.SAVING})


def describe_activity(view: View, status: FineTuneJobStatus) -> tuple[Reason, str]:
    """Return reason and message for a gang of which at least one rank reports; a silent pod comes first."""
    if silence := describe_silence(view, status):
        return Reason.SILENT, silence
    reason = stage(view)
    return reason, _describe_stage(view, status, reason)


def stage(view: View) -> Reason:
    """Return the stage of the gang: its slowest rank's until all train, then the activity of any rank between steps."""
    by_order = sorted((STATES[report.state] for report in view.reports), key=STAGES.index)
    return by_order[0] if by_order[0] in BEFORE_TRAINING else by_order[-1]


def _describe_stage(view: View, status: FineTuneJobStatus, reason: Reason) -> str:
    """Return the description of a stage, with its progress."""
    details = (report.detail for report in view.reports if report.detail and STATES[report.state] is reason)
    detail = next(details, None)
    if status.step is not None and (reason is Reason.TRAINING or (detail is None and reason in BETWEEN_STEPS)):
        detail = f"step {status.step}" + (f" of {status.total_steps}" if status.total_steps else "")
    return f"{DESCRIPTIONS[reason]}: {detail}" if detail else DESCRIPTIONS[reason]
