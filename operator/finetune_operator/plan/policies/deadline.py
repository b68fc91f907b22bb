"""spec.activeDeadlineSeconds: the longest time that a job may take in all, the time of its suspension aside."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.view import View, is_finished
from finetune_operator.plan.policies.endings import close
from finetune_operator.plan.policies.finish import fail


def judge(view: View, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Fail the job when its time is over."""
    over_at = deadline(view, status)
    if over_at is None or view.now < over_at:
        return status
    limit = view.spec.active_deadline_seconds
    status = close(status, Reason.DEADLINE_EXCEEDED, view.now)
    return fail(view, status, Reason.DEADLINE_EXCEEDED, f"the job took longer than activeDeadlineSeconds, {limit} s")


def deadline(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When the job's time is over; None where it has no bound, has not begun, has ended or is suspended."""
    limit = view.spec.active_deadline_seconds
    if limit is None or status.start_time is None or is_finished(status) or view.spec.suspend:
        return None
    return status.start_time + timedelta(seconds=limit + status.tally.suspended_seconds)
