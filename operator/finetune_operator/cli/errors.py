"""How the command ends."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `finetune`."""

    SUCCEEDED = 0
    FAILED = 1
    """The job failed."""
    USAGE = 2
    """The command or the manifest cannot be carried out; nothing was started."""
    INTERRUPTED = 130
    """Stopped on request, with the state saved."""


class UsageError(Exception):
    """Something that the user can put right: one sentence, or several, one a line."""
