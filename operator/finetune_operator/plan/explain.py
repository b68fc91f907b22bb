"""Why an attempt ended, as a sentence: for the status, and for the event that tells of it."""

from __future__ import annotations

from finetune_operator.api.job import AttemptStatus
from finetune_operator.api.words import REASONS, Reason


def explain_end(entry: AttemptStatus) -> str:
    """Why an attempt ended, for a person: how far it came, the rank that ended first, what that means, its words."""
    step = f" at step {entry.to_step}" if entry.to_step is not None else ""
    node = f" on {entry.node}" if entry.node else ""
    who = f", rank {entry.rank} ({entry.pod}{node}) first" if entry.rank is not None else ""
    meaning = REASONS[Reason(entry.reason)].meaning if entry.reason else ""
    last_line = (entry.message or "").strip().splitlines()[-1:]
    words = f" It said: {last_line[0]}" if last_line else ""
    return f"attempt {entry.attempt} ended{step}{who}: {meaning}{words}"
