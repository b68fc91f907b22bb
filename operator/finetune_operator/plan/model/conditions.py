"""Read and write single conditions of a status, with Kubernetes' rules for their transition time."""

from __future__ import annotations

from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.status import Condition, FineTuneJobStatus
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View


def find(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    """Return the condition of a type; None if it was never written."""
    return next((condition for condition in status.conditions if condition.type == kind), None)


def is_true(status: FineTuneJobStatus, kind: ConditionType) -> bool:
    """Return whether a condition exists and is True."""
    condition = find(status, kind)
    return condition is not None and condition.status == "True"


def put(status: FineTuneJobStatus, new: Condition) -> FineTuneJobStatus:
    """Write a condition; its transition time changes only if its status does."""
    old = next((condition for condition in status.conditions if condition.type == new.type), None)
    if old is not None and old.status == new.status:
        new = revise(new, last_transition_time=old.last_transition_time)
    if old is None:
        return revise(status, conditions=(*status.conditions, new))
    return revise(status, conditions=tuple(new if c.type == new.type else c for c in status.conditions))


def build(view: View, kind: ConditionType, holds: bool, reason: str, message: str) -> Condition:
    """Build a condition with the current time as its transition time; `put` keeps the old time if nothing changed."""
    return Condition(
        type=kind.value,
        status="True" if holds else "False",
        reason=reason,
        message=message,
        last_transition_time=view.now,
        observed_generation=view.job.metadata.generation,
    )
