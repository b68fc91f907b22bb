"""The delay before the next attempt: none after a preemption, increasing after failures without a newer checkpoint.

After outages it increases, too, while they last.

If the cluster refuses pods repeatedly, or GPUs fail repeatedly, the delay increases, too: another attempt may end at
once. The same applies if only a part of the gang receives nodes.

The delay has random jitter, so that jobs that failed together do not restart together. The jitter is derived from the
job and the attempt: every reconcile must decide the same.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from itertools import takewhile

from finetune_operator.api.reasons import REGROUPS, CountsAs, Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.settings import Settings

WITHOUT_DELAY = REGROUPS | {Reason.FINISHED, Reason.SUSPENDED}
"""Ends that count neither as preemption nor as failure and cannot recur immediately."""

RELEASES = {
    # Long enough that the waiting jobs of other users request theirs.
    Reason.QUOTA_RELEASED: (120.0, 600.0),
    # Short at first: an autoscaler may have added nodes in the meantime.
    Reason.GANG_RELEASED: (20.0, 300.0),
}
"""First and longest delay after a release of quota or nodes, in seconds."""
JITTER = 0.2
"""Largest relative change of a delay, in both directions."""


def next_attempt_at(
    entry: AttemptStatus, status: FineTuneJobStatus, settings: Settings, job_uid: str
) -> datetime | None:
    """Return when the attempt after an ended one may begin; None: as soon as its pods are deleted."""
    factor = jitter(job_uid, entry.attempt)
    if entry.ended_at is None:
        return None
    if entry.reason in RELEASES:
        return entry.ended_at + _doubled(status, *RELEASES[Reason(entry.reason)]) * factor
    if entry.reason in {Reason.REFUSED_BY_KUBELET, Reason.GPU_FAULT}:
        # The next attempt avoids the node, so the first one need not wait.
        num_refusals = _num_in_a_row(status) - 1
        return entry.ended_at + delay(num_refusals, settings) * factor if num_refusals else None
    if entry.counts_as == CountsAs.OUTAGE:
        return entry.ended_at + delay(_num_in_a_row(status), settings) * factor
    if entry.counts_as == CountsAs.PREEMPTION or entry.reason in WITHOUT_DELAY:
        return None
    return entry.ended_at + delay(status.tally.failures_since_checkpoint, settings) * factor


def _doubled(status: FineTuneJobStatus, first: float, longest: float) -> timedelta:
    """Return the delay after the newest of several equal ends: doubled each time, up to a limit; in seconds."""
    return timedelta(seconds=min(first * 2 ** min(_num_in_a_row(status) - 1, 30), longest))


def _num_in_a_row(status: FineTuneJobStatus) -> int:
    """Return how many of the newest attempts ended for the same reason."""
    reason = status.attempts[-1].reason
    return sum(1 for _ in takewhile(lambda entry: entry.reason == reason, reversed(status.attempts)))


def delay(num_failures: int, settings: Settings) -> timedelta:
    """Return the delay after the nth failure since the last newer checkpoint: doubled each time, up to a limit."""
    # 2**30 first delays exceed any limit, and the bounded exponent avoids huge integers.
    doubled = settings.failure_backoff_seconds * 2 ** min(max(num_failures - 1, 0), 30)
    return timedelta(seconds=min(doubled, settings.failure_backoff_max_seconds))


def jitter(job_uid: str, attempt: int) -> float:
    """Return a factor around 1, the same at every call."""
    digest = hashlib.sha256(f"{job_uid}/{attempt}".encode()).digest()
    return 1 + JITTER * (2 * int.from_bytes(digest[:4]) / 2**32 - 1)
