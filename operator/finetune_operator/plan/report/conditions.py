"""Kubernetes-style conditions: what holds of the job, since when, and why. Derived from the rest of the status."""

from __future__ import annotations

from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import Condition, FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View
from finetune_operator.plan.report.explain import explain_reason

PHASE_OF = {
    ConditionType.RUNNING: frozenset({Phase.RUNNING, Phase.EXPORTING}),
    ConditionType.RECOVERING: frozenset({Phase.RECOVERING}),
    ConditionType.SUSPENDED: frozenset({Phase.SUSPENDED}),
    ConditionType.COMPLETE: frozenset({Phase.SUCCEEDED}),
    ConditionType.FAILED: frozenset({Phase.FAILED}),
}
"""Phases in which each condition is True."""


def find(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """The condition of a type, where it was ever written."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def is_true(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    """Whether a condition is there and True."""
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def put(status: FineTuneJobStatus, new: Condition) -> FineTuneJobStatus:
    """Write a condition; its transition time changes only where its status does."""
    old = next((condition for condition in status.conditions if condition.type == new.type), None)
    if old is not None and old.status == new.status:
        new = revise(new, last_transition_time=old.last_transition_time)
    if old is None:
        return revise(status, conditions=(*status.conditions, new))
    return revise(status, conditions=tuple(new if c.type == new.type else c for c in status.conditions))


def make(view: View, kind: ConditionType, holds: bool, reason: str, message: str) -> Condition:
    """Make a condition that changed now; `put` knows whether it did."""
    return Condition(
        type=kind.value,
        status="True" if holds else "False",
        reason=reason,
        message=message,
        last_transition_time=view.now,
        observed_generation=view.job.metadata.generation,
    )


def derive(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write the conditions that follow from the phase. One that never held is left out."""
    for kind, phases in PHASE_OF.items():
        holds = status.phase in phases
        if not holds and find(status, kind) is None:
            continue
        # A condition speaks of what changes it; progress in the message would rewrite it with every step.
        reason = status.reason or str(status.phase)
        message = (status.message or "") if holds and status.phase in FINAL else explain_reason(reason)
        old = find(status, kind)
        if old is not None and old.status == ("True" if holds else "False"):
            reason, message = old.reason, old.message
        status = put(status, make(view, kind, holds, reason, message))
    return status


def judge_notice(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Say whether a step and the save after it fit into the notice that the capacity gives, by what they last took."""
    checkpoint, tally = status.last_checkpoint, status.tally
    if checkpoint is None or checkpoint.save_seconds is None:
        return status
    step_seconds = tally.trained_seconds / tally.trained_steps if tally.trained_steps else 0.0
    seconds, notice = checkpoint.save_seconds + step_seconds, view.spec.recovery.notice_seconds
    too_long, old = seconds > notice, find(status, ConditionType.NOTICE_TOO_SHORT)
    if not too_long and old is None:
        return status
    if old is not None and old.status == ("True" if too_long else "False"):
        # The figures differ with every save.
        return status
    reason = Reason.SAVE_TAKES_LONGER if too_long else Reason.SAVE_IN_TIME
    message = f"a step and its save took {seconds:.0f} s; the notice is {notice} s"
    return put(status, make(view, ConditionType.NOTICE_TOO_SHORT, too_long, reason.value, message))


FINAL = PHASE_OF[ConditionType.COMPLETE] | PHASE_OF[ConditionType.FAILED]
