"""How a rank, and the supervisor above it, says why it ended.

The numbers are those of sysexits.h where one fits, so that they stay clear of the shell's 126-165. The trainer ends
with them; the operator's table of causes reads them.
"""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitCode(IntEnum):
    """The trainer's own exit codes."""

    DONE = 0
    """All steps trained, all outputs written."""
    CONFIG = 64
    """The run specification cannot be run: trying again will not help."""
    DATA = 65
    """The data set cannot be used as asked: trying again will not help."""
    SOFTWARE = 70
    """An exception that nothing expected."""
    STORAGE = 74
    """Checkpoints or outputs can no longer be written or read."""
    SAVED = 75
    """Stopped on notice: the state of the last finished step is committed. Start again to go on."""
    STALE = 78
    """No checkpoint could be written for longer than is allowed."""
    FABRIC = 76
    """A peer or the connection to it was lost in a collective."""
    SUPERSEDED = 77
    """A newer attempt owns the checkpoints: this one has no more say."""


HOLDABLE = frozenset({ExitCode.FABRIC, ExitCode.SAVED})
"""Exit codes of ranks whose pod can keep running and start them again in the next attempt."""


def describe(code: int) -> str:
    """Say what an exit code means, in a few words: ours by the table above, 128+n as the signal it stands for."""
    try:
        return _WORDS[ExitCode(code)]
    except ValueError:
        pass
    number = -code if code < 0 else code - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"


_WORDS = {
    ExitCode.DONE: "done",
    ExitCode.CONFIG: "configuration error",
    ExitCode.DATA: "data error",
    ExitCode.SOFTWARE: "uncaught exception",
    ExitCode.STORAGE: "storage error",
    ExitCode.SAVED: "saved on notice",
    ExitCode.STALE: "no checkpoint for too long",
    ExitCode.FABRIC: "lost a peer",
    ExitCode.SUPERSEDED: "superseded by a newer attempt",
}
