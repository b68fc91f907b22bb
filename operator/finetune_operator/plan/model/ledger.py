"""`status.attempts[]`: how each attempt began and why it ended. The operator's memory, and bounded.

An entry is *open* until its end is seen, then *ended*, and *settled* once the cause is known. The pure operations
here are used by the policies; they decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from finetune_operator.api.job import AttemptStatus, FineTuneJobStatus
from finetune_operator.plan.model.revise import revise


def current(status: FineTuneJobStatus) -> AttemptStatus | None:
    """The entry of the newest attempt; None before the first."""
    return status.attempts[-1] if status.attempts else None


def open_entry(status: FineTuneJobStatus) -> AttemptStatus | None:
    """The entry of the newest attempt, where no end of it has been seen."""
    entry = current(status)
    return entry if entry is not None and entry.ended_at is None else None


def replace_current(status: FineTuneJobStatus, entry: AttemptStatus) -> FineTuneJobStatus:
    """Put a changed entry in the place of the newest one."""
    return revise(status, attempts=(*status.attempts[:-1], entry))


def begin(status: FineTuneJobStatus, attempt: int, now: datetime, max_kept: int) -> FineTuneJobStatus:
    """Add an attempt, and drop the oldest entries above the bound."""
    entry = AttemptStatus(attempt=attempt, started_at=now)
    return revise(status, attempt=attempt, attempts=(*status.attempts, entry)[-max_kept:])


def with_members(entry: AttemptStatus, members: Sequence[tuple[int, int]]) -> AttemptStatus:
    """An entry whose pods were made for these attempts, under these numbers, by node rank."""
    numbers = tuple(number for _, number in members)
    return revise(
        entry,
        pod_attempts=tuple(attempt for attempt, _ in members),
        pod_ranks=numbers if numbers != tuple(range(len(numbers))) else None,
    )


def end(status: FineTuneJobStatus, now: datetime) -> FineTuneJobStatus:
    """Mark the open attempt as ended, for a cause that need not be known yet."""
    entry = open_entry(status)
    return status if entry is None else replace_current(status, revise(entry, ended_at=now))


def account_lost_steps(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """Once the newest attempt says where it began, know how many steps the ones before it lost."""
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
