"""How long the next attempt waits: not at all after a preemption, ever longer after failures without progress.

The wait is spread by chance, so that jobs that failed together do not come back together. The chance is drawn from the
job and the attempt, for a pass that is repeated must decide the same.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta

from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.api.reasons import REGROUPS, CountsAs, Reason
from finetune_operator.settings import Settings

WITHOUT_DELAY = REGROUPS | {Reason.SUSPENDED}
"""Ends that count as nothing, and that no next attempt can run into at once."""


JITTER = 0.2
"""A wait is shorter or longer by up to this share of it."""


def next_attempt_at(
    entry: AttemptStatus, status: FineTuneJobStatus, settings: Settings, job_uid: str
) -> datetime | None:
    """When the attempt after an ended one may begin; None: as soon as its pods are gone."""
    if entry.ended_at is None or entry.counts_as == CountsAs.PREEMPTION or entry.reason in WITHOUT_DELAY:
        return None
    return entry.ended_at + delay(status.tally.failures_since_checkpoint, settings) * jitter(job_uid, entry.attempt)


def delay(num_failures: int, settings: Settings) -> timedelta:
    """Wait after the so-manieth failure since the last newer checkpoint: doubled each time, up to a bound."""
    # 2**30 first delays are beyond any bound, and the power stays a small number.
    doubled = settings.failure_backoff_seconds * 2 ** min(max(num_failures - 1, 0), 30)
    return timedelta(seconds=min(doubled, settings.failure_backoff_max_seconds))


def jitter(job_uid: str, attempt: int) -> float:
    """A factor around 1, the same whenever it is asked for."""
    digest = hashlib.sha256(f"{job_uid}/{attempt}".encode()).digest()
    return 1 + JITTER * (2 * int.from_bytes(digest[:4]) / 2**32 - 1)
