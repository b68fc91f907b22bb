"""Explain in a message why an attempt ended: for the status, and for the event of that end."""

from __future__ import annotations

from finetune_operator.api.reasons import REASONS, Reason
from finetune_operator.api.status import AttemptStatus

MAX_OUTPUT_CHARACTERS = 300
"""Maximum length of the details in a message; the ledger contains the complete output of the rank."""


def explain_end(entry: AttemptStatus) -> str:
    """Return why an attempt ended: its last step, the rank that ended first, the reason, and its last line."""
    step = f" at step {entry.to_step}" if entry.to_step is not None else ""
    place = " on ".join(name for name in (entry.pod, entry.node) if name)
    rank = f" because of rank {entry.rank} ({place})" if entry.rank is not None else ""
    last_line = (entry.message or "").strip().splitlines()[-1:]
    details = f" Details: {last_line[0][:MAX_OUTPUT_CHARACTERS].rstrip('.')}." if last_line else ""
    return f"attempt {entry.attempt} ended{step}{rank}: {explain_reason(entry.reason)}{details}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def is_final(reason: str | None) -> bool:
    """Return whether another attempt cannot help."""
    return reason in REASONS and REASONS[Reason(reason)].final


def explain_reason(reason: str | None) -> str:
    """Return the meaning of a reason. A reason that a newer operator wrote is returned unchanged."""
    return REASONS[Reason(reason)].meaning if reason in REASONS else f"{reason}."
