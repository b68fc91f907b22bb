"""The delay before the next attempt: none after a preemption, increasing after failures without a newer checkpoint.

The delay has random jitter, so that jobs that failed together do not restart together. The jitter is derived from the
job and the attempt: every reconcile must decide the same.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta

from finetune_operator.api.reasons import REGROUPS, CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.settings import Settings

WITHOUT_DELAY = REGROUPS | {Reason.SUSPENDED}
"""Ends that count neither as preemption nor as failure and cannot recur immediately."""


JITTER = 0.2
"""Largest relative change of a delay, in both directions."""


def next_attempt_at(
    entry: AttemptStatus, status: FineTuneJobStatus, settings: Settings, job_uid: str
) -> datetime | None:
    """Return when the attempt after an ended one may begin; None: as soon as its pods are deleted."""
    if entry.ended_at is None or entry.counts_as == CountsAs.PREEMPTION or entry.reason in WITHOUT_DELAY:
        return None
    return entry.ended_at + delay(status.tally.failures_since_checkpoint, settings) * jitter(job_uid, entry.attempt)


def delay(num_failures: int, settings: Settings) -> timedelta:
    """Return the delay after the nth failure since the last newer checkpoint: doubled each time, up to a limit."""
    # 2**30 first delays exceed any limit, and the bounded exponent avoids huge integers.
    doubled = settings.failure_backoff_seconds * 2 ** min(max(num_failures - 1, 0), 30)
    return timedelta(seconds=min(doubled, settings.failure_backoff_max_seconds))


def jitter(job_uid: str, attempt: int) -> float:
    """Return a factor around 1, the same at every call."""
    digest = hashlib.sha256(f"{job_uid}/{attempt}".encode()).digest()
    return 1 + JITTER * (2 * int.from_bytes(digest[:4]) / 2**32 - 1)
