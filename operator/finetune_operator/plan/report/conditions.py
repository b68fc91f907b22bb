"""Kubernetes-style conditions: what is true of the job, since when, and why. Derived from the rest of the status."""

from __future__ import annotations

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.conditions import build, find, put
from finetune_operator.plan.model.explain import explain_reason
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.view import View

PHASES_OF = {
    ConditionType.RUNNING: frozenset({Phase.RUNNING, Phase.EXPORTING}),
    ConditionType.RECOVERING: frozenset({Phase.RECOVERING}),
    ConditionType.SUSPENDED: frozenset({Phase.SUSPENDED}),
    ConditionType.COMPLETE: frozenset({Phase.SUCCEEDED}),
    # People wait for the phase that they see: kubectl wait --for=condition=Succeeded.
    ConditionType.SUCCEEDED: frozenset({Phase.SUCCEEDED}),
    ConditionType.FAILED: frozenset({Phase.FAILED}),
}
"""Phases in which each condition is True."""
FINAL = PHASES_OF[ConditionType.COMPLETE] | PHASES_OF[ConditionType.FAILED]


def derive(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the conditions that follow from the phase, except those that never were True."""
    for kind, phases in PHASES_OF.items():
        holds = status.phase in phases
        if not holds and find(status, kind) is None:
            continue
        # The message explains the last change of the condition. With progress in it, every step would rewrite it.
        reason = status.reason or str(status.phase)
        message = (status.message or "") if holds and status.phase in FINAL else explain_reason(reason)
        old = find(status, kind)
        if old is not None and old.status == ("True" if holds else "False"):
            reason, message = old.reason, old.message
        status = put(status, build(view, kind, holds, reason, message))
    return status


def evaluate_notice(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write whether a step and a save, by their last durations, fit into the preemption notice of the nodes."""
    checkpoint, tally = status.last_checkpoint, status.tally
    if checkpoint is None or checkpoint.save_seconds is None:
        return status
    step_seconds = tally.trained_seconds / tally.trained_steps if tally.trained_steps else 0.0
    seconds, notice = checkpoint.save_seconds + step_seconds, view.spec.recovery.notice_seconds
    too_long, old = seconds > notice, find(status, ConditionType.NOTICE_TOO_SHORT)
    if not too_long and old is None:
        return status
    if old is not None and old.status == ("True" if too_long else "False"):
        # The durations differ with every save; do not rewrite the message for that.
        return status
    reason = Reason.SAVE_TAKES_LONGER if too_long else Reason.SAVE_IN_TIME
    message = f"a step and a save took {seconds:.0f} s; recovery.noticeSeconds is {notice} s"
    return put(status, build(view, ConditionType.NOTICE_TOO_SHORT, too_long, reason.value, message))


POLICY = Policy("conditions", decide=derive)
NOTICE = Policy("notice", decide=evaluate_notice)
