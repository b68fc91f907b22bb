"""Ending the newest attempt in the ledger: with the cause that a pod shows, or with a reason of the operator's own.

Each end is counted exactly once, when its reason is written.
"""

from __future__ import annotations

from typing import Any

from finetune_operator.api.reasons import REASONS, CountsAs, Reason
from finetune_operator.api.status import FineTuneJobStatus, TallyStatus
from finetune_operator.plan.model.causes import Cause
from finetune_operator.plan.model.ledger import current, replace_current
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View


def record_cause(view: View, status: FineTuneJobStatus, cause: Cause) -> FineTuneJobStatus:
    """Write why the newest attempt ended, and count the end."""
    entry = current(status)
    assert entry is not None
    settled = revise(
        entry,
        ended_at=entry.ended_at or view.now,
        reason=cause.reason.value,
        counts_as=cause.counts_as.value if cause.counts_as else None,
        rank=cause.rank,
        pod=cause.pod,
        node=cause.node,
        exit_code=cause.exit_code,
        gpu=(cause.gpu_fault.uuid or None) if cause.gpu_fault is not None else None,
        xid=cause.gpu_fault.xid if cause.gpu_fault is not None else None,
        message=cause.message or None,
        # `reclassify` may still find that one of these nodes was lost.
        pod_nodes=entry.pod_nodes if cause.reason is Reason.FABRIC_ERROR else None,
    )
    return _count(replace_current(status, settled), cause.counts_as)


def close(view: View, status: FineTuneJobStatus, reason: Reason, **changes: Any) -> FineTuneJobStatus:
    """End the newest attempt for a reason that no pod caused; an attempt that has a reason already stays as it is.

    Args:
        view: the view of this reconcile.
        status: the status so far.
        reason: why the attempt ends.
        changes: further fields of the attempt's entry.
    """
    entry = current(status)
    if entry is None or entry.reason is not None:
        return status
    counts_as = REASONS[reason].counts_as
    closed = revise(
        entry,
        ended_at=entry.ended_at or view.now,
        reason=reason.value,
        counts_as=counts_as.value if counts_as else None,
        pod_nodes=None,
        **changes,
    )
    return _count(replace_current(status, closed), counts_as)


def _count(status: FineTuneJobStatus, counts_as: CountsAs | None) -> FineTuneJobStatus:
    if counts_as is CountsAs.PREEMPTION:
        return revise(status, preemptions=status.preemptions + 1)
    if counts_as is CountsAs.FAILURE:
        return revise(status, failures=status.failures + 1, tally=_tally_failure(status))
    return status


def _tally_failure(status: FineTuneJobStatus) -> TallyStatus:
    """Count one more failure since the last checkpoint and at its step. A failure before training has no step."""
    entry, tally = current(status), status.tally
    assert entry is not None
    same = entry.to_step is not None and entry.to_step == tally.failed_step
    return revise(
        tally,
        failures_since_checkpoint=tally.failures_since_checkpoint + 1,
        failed_step=entry.to_step,
        failures_at_step=tally.failures_at_step + 1 if same else 1,
    )
