"""Exit codes and errors of the command."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of `finetune`."""

    SUCCEEDED = 0
    FAILED = 1
    """The job failed."""
    USAGE = 2
    """The command line or the manifest is invalid; nothing was started."""
    INTERRUPTED = 130
    """Stopped on request; the state is saved."""


class UsageError(Exception):
    """An error that the user can fix. The text is one message or several, one per line."""
