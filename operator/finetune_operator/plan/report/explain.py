"""Why an attempt ended, as a sentence: for the status, and for the event that tells of it."""

from __future__ import annotations

from finetune_operator.api.job import AttemptStatus
from finetune_operator.api.reasons import REASONS, Reason

MAX_WORDS = 300
"""Characters of a rank's last line that a message holds; the ledger has all of its words."""


def explain_end(entry: AttemptStatus) -> str:
    """Why an attempt ended, for a person: how far it came, the rank that ended first, what that means, its words."""
    step = f" at step {entry.to_step}" if entry.to_step is not None else ""
    node = f" on {entry.node}" if entry.node else ""
    who = f" because of rank {entry.rank} ({entry.pod}{node})" if entry.rank is not None else ""
    last_line = (entry.message or "").strip().splitlines()[-1:]
    said = " It said:" if entry.rank is not None else ""
    words = f"{said} {last_line[0][:MAX_WORDS]}" if last_line else ""
    return f"attempt {entry.attempt} ended{step}{who}: {explain_reason(entry.reason)}{words}"


def is_final(reason: str | None) -> bool:
    """Whether trying again cannot help."""
    return reason in REASONS and REASONS[Reason(reason)].final


def explain_reason(reason: str | None) -> str:
    """What a reason means. One that a newer operator wrote stands for itself."""
    return REASONS[Reason(reason)].meaning if reason in REASONS else f"{reason}."
