"""spec.ttlSecondsAfterFinished: the job, and with it all that it owns, goes so long after its end."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.job import FineTuneJobStatus
from finetune_operator.plan.model.types import DeleteJob
from finetune_operator.plan.model.view import View, is_finished


def delete_job(view: View, status: FineTuneJobStatus) -> tuple[DeleteJob, ...]:
    """Delete the job where its time to live is over."""
    expires_at = wake(view, status)
    return (DeleteJob(),) if expires_at is not None and expires_at <= view.now else ()


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """When the job's time to live is over; None: it has not ended, or it stays."""
    seconds = view.spec.ttl_seconds_after_finished
    if seconds is None or status.completion_time is None or not is_finished(status):
        return None
    return status.completion_time + timedelta(seconds=seconds)
