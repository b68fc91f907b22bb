"""Condition types of a job and their meanings."""

from __future__ import annotations

from enum import StrEnum

DISRUPTION_TARGET = "DisruptionTarget"
"""Kubernetes' condition on a pod that is terminated because of a disruption."""


class ConditionType(StrEnum):
    """Types of the job's conditions; CONDITIONS documents them."""

    ACCEPTED = "Accepted"
    RUNNING = "Running"
    RECOVERING = "Recovering"
    COMPLETE = "Complete"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"
    NOTICE_TOO_SHORT = "NoticeTooShort"
    CHECKPOINT_STALE = "CheckpointStale"
    PODS_OUTDATED = "PodsOutdated"
    SLOW_RANKS = "SlowRanks"


CONDITIONS: dict[ConditionType, str] = {
    ConditionType.ACCEPTED: "The spec can be run. If False, it is refused, and the message contains the remedy.",
    ConditionType.RUNNING: "All pods of the newest attempt are running and its ranks are working.",
    ConditionType.RECOVERING: "A loss of capacity or a failure ended an attempt, and the next one is not training yet.",
    ConditionType.COMPLETE: "All steps are trained and all outputs are written. Final.",
    ConditionType.SUCCEEDED: "The same as Complete, under the name of the phase. Final.",
    ConditionType.FAILED: "The job ended before its outputs were written. Final.",
    ConditionType.SUSPENDED: "spec.suspend is true and the job has no pods.",
    ConditionType.NOTICE_TOO_SHORT: "A save takes longer than recovery.noticeSeconds: a preemption may lose the steps "
    "since the last checkpoint. Raise recovery.noticeSeconds if the capacity allows it, or use faster storage.",
    ConditionType.CHECKPOINT_STALE: "Training continues, but no newer checkpoint can be written; see the message.",
    ConditionType.PODS_OUTDATED: "Pods were created before the last edit of the spec and do not contain it; the "
    "message says when it takes effect.",
    ConditionType.SLOW_RANKS: "Ranks need at least 1.5 times as long as their peers for the same work, for a minute or "
    "longer. The message names them and their nodes.",
}
"""Meaning of each condition if it is True."""
