"""What a supervisor is told in answer to its beat. Pure; every cluster's coordinator answers by it.

It follows from the status alone, so an operator that was just restarted says the same as the one before it.
"""

from __future__ import annotations

from finetune_contract.beat import Beat, Reply
from finetune_operator.api.job import FineTuneJob
from finetune_operator.settings import Settings


def reply_to(job: FineTuneJob | None, beat: Beat, settings: Settings) -> Reply:
    """Answer a beat; a job that is not known (not yet seen, or gone) has no orders."""
    if job is None or beat.job_uid != job.metadata.uid:
        return Reply()
    return Reply(attempt=job.status.attempt, beat_seconds=settings.beat_seconds)
