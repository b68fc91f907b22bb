"""`status.attempts[]`, the ledger: how each attempt began and why it ended. Bounded; it survives operator restarts.

An entry is *open* until the end of its attempt is observed, then *ended*, and *settled* once the cause is known.
These operations are pure; the policies decide when to use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.revise import revise
from finetune_operator.plan.model.view import View, is_finished

RELEASED = frozenset({Reason.QUOTA_RELEASED, Reason.GANG_RELEASED})
"""Ends of an attempt that never had all its pods, and gave back what it had."""


def current(status: FineTuneJobStatus) -> AttemptStatus | None:
    """Return the entry of the newest attempt; None before the first."""
    return status.attempts[-1] if status.attempts else None


def follows_gpu_fault(status: FineTuneJobStatus) -> bool:
    """Return whether the attempt before the newest one ended because of a faulty GPU."""
    return len(status.attempts) > 1 and status.attempts[-2].reason == Reason.GPU_FAULT


def open_entry(status: FineTuneJobStatus) -> AttemptStatus | None:
    """Return the entry of the newest attempt; None if that attempt has ended."""
    entry = current(status)
    return entry if entry is not None and entry.ended_at is None else None


def open_attempt(view: View, status: FineTuneJobStatus) -> AttemptStatus | None:
    """Return the entry of the view's attempt; None if that has ended, is not the newest, or the job has finished.

    Most policies apply only to such an attempt: the pods of the view are its pods.
    """
    entry = open_entry(status)
    return None if entry is None or entry.attempt != view.attempt or is_finished(status) else entry


def waiting_since(status: FineTuneJobStatus, entry: AttemptStatus) -> datetime:
    """Return since when the job waits for capacity: attempts before this one may have released theirs."""
    since = entry.started_at
    for old in reversed([old for old in status.attempts if old.attempt < entry.attempt]):
        if old.reason not in RELEASED or old.capacity is not entry.capacity:
            break
        since = old.started_at
    return since


def replace_current(status: FineTuneJobStatus, entry: AttemptStatus) -> FineTuneJobStatus:
    """Return the status with another entry for the newest attempt."""
    return revise(status, attempts=(*status.attempts[:-1], entry))


def begin(status: FineTuneJobStatus, attempt: int, now: datetime, max_kept: int) -> FineTuneJobStatus:
    """Add an entry for a new attempt and raise `status.attempt`; drop the oldest entries above the limit."""
    entry = AttemptStatus(attempt=attempt, started_at=now)
    return revise(status, attempt=attempt, attempts=(*status.attempts, entry)[-max_kept:])


def with_members(entry: AttemptStatus, members: Sequence[tuple[int, int]]) -> AttemptStatus:
    """Return the entry with the pods of its gang by node rank: the attempt each was created for, and its number."""
    numbers = tuple(number for _, number in members)
    return revise(
        entry,
        pod_attempts=tuple(attempt for attempt, _ in members),
        pod_ranks=numbers if numbers != tuple(range(len(numbers))) else None,
    )


def account_lost_steps(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Write how many steps the earlier attempts lost, as soon as the newest one reports the step it restored."""
    entry = current(status)
    if entry is None or entry.from_step is None:
        return status
    lost_steps = 0
    earlier = []
    for old in status.attempts[:-1]:
        known = old
        if old.lost_steps is None:
            known = revise(old, lost_steps=max(0, (old.to_step or 0) - entry.from_step))
            lost_steps += known.lost_steps or 0
        earlier.append(known)
    return revise(status, attempts=(*earlier, entry), lost_steps=status.lost_steps + lost_steps)
