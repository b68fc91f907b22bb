"""Condition types of a job, and what each one means."""

from __future__ import annotations

from enum import StrEnum

DISRUPTION_TARGET = "DisruptionTarget"
"""Kubernetes' condition on a pod that is being taken away for no fault of its own."""


class ConditionType(StrEnum):
    """Types of the job's conditions; CONDITIONS says what each means."""

    ACCEPTED = "Accepted"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    COMPLETE = "Complete"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    NOTICE_TOO_SHORT = "NoticeTooShort"
    CHECKPOINT_STALE = "CheckpointStale"


CONDITIONS: dict[ConditionType, str] = {
    ConditionType.ACCEPTED: "The spec can be run. False: it is refused, and the message says what to write instead.",
    ConditionType.RUNNING: "All pods of the newest attempt are up and its ranks are at work.",
    ConditionType.RECOVERING: "Capacity or a failure ended an attempt, and its successor is not training yet.",
    ConditionType.COMPLETE: "All steps are trained and all outputs written. Final.",
    ConditionType.FAILED: "The job ended without its model. Final.",
    ConditionType.SUSPENDED: "spec.suspend is true and no pod is left.",
    ConditionType.NOTICE_TOO_SHORT: "A save takes longer than recovery.noticeSeconds: a preemption may cost the steps "
    "since the last checkpoint. Give more notice where the capacity has it, or faster storage.",
    ConditionType.CHECKPOINT_STALE: "Training goes on, but no newer checkpoint can be written; the message says why.",
}
"""What each condition means where it is True."""
