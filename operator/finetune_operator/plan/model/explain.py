"""Explain in a message why an attempt ended: for the status, and for the event of that end."""

from __future__ import annotations

from finetune_operator.api.job import AttemptStatus
from finetune_operator.api.reasons import REASONS, Reason

MAX_OUTPUT_CHARACTERS = 300
"""Maximum length of a rank's last line in a message; the ledger contains the complete output."""


def explain_end(entry: AttemptStatus) -> str:
    """Return why an attempt ended: its last step, the rank that ended first, the reason, and that rank's last line."""
    step = f" at step {entry.to_step}" if entry.to_step is not None else ""
    node = f" on {entry.node}" if entry.node else ""
    who = f" because of rank {entry.rank} ({entry.pod}{node})" if entry.rank is not None else ""
    last_line = (entry.message or "").strip().splitlines()[-1:]
    said = " It said:" if entry.rank is not None else ""
    output = f"{said} {last_line[0][:MAX_OUTPUT_CHARACTERS]}" if last_line else ""
    return f"attempt {entry.attempt} ended{step}{who}: {explain_reason(entry.reason)}{output}"


def is_final(reason: str | None) -> bool:
    """Return whether another attempt cannot help."""
    return reason in REASONS and REASONS[Reason(reason)].final


def explain_reason(reason: str | None) -> str:
    """Return the meaning of a reason. A reason that a newer operator wrote is returned unchanged."""
    return REASONS[Reason(reason)].meaning if reason in REASONS else f"{reason}."
