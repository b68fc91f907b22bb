"""spec.ttlSecondsAfterFinished: delete the job, and everything that it owns, this long after it finished."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model import exporting
from finetune_operator.plan.model.policy import Policy
from finetune_operator.plan.model.types import DeleteJob
from finetune_operator.plan.model.view import View, is_finished


def delete_job(view: View, status: FineTuneJobStatus) -> tuple[DeleteJob, ...]:
    """Return the deletion of the job once its TTL has expired."""
    expires_at = wake(view, status)
    return (DeleteJob(),) if expires_at is not None and expires_at <= view.now else ()


def wake(view: View, status: FineTuneJobStatus) -> datetime | None:
    """Return when the job's TTL expires; None: it has not finished, exports on request, or has no TTL."""
    seconds = view.spec.ttl_seconds_after_finished
    if seconds is None or status.completion_time is None or not is_finished(status):
        return None
    if exporting.active_export(status) is not None:
        return None
    return status.completion_time + timedelta(seconds=seconds)


POLICY = Policy("ttl", wake=wake, act=delete_job)
