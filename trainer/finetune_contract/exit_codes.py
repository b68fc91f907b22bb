"""Exit codes of a rank and of its supervisor.

The numbers are those of sysexits.h if one fits, so that they do not collide with the shell's 126-165. The operator's
table of causes reads them.
"""

from __future__ import annotations

import signal
from enum import IntEnum


class ExitCode(IntEnum):
    """The trainer's own exit codes."""

    DONE = 0
    """All steps are trained and all outputs are written."""
    CONFIG = 64
    """The run specification cannot be run; another attempt would fail, too."""
    DATA = 65
    """The data set cannot be used as requested; another attempt would fail, too."""
    NETWORK = 69
    """A server that the run needs (hub, object store) does not answer, or refuses to for now; another attempt may
    succeed."""
    SOFTWARE = 70
    """An unexpected exception."""
    DEVICE = 71
    """The device of the rank computes wrong results or does not respond; another device may work."""
    STORAGE = 74
    """Checkpoints or outputs cannot be written or read."""
    STORAGE_OUTAGE = 79
    """A disk is full, or a file system fails, which usually passes; another attempt may succeed."""
    SAVED = 75
    """Stopped on a preemption notice: the state of the last completed step is committed, and a restart continues."""
    STALE = 78
    """No checkpoint could be written for longer than checkpoint.maxStale."""
    FABRIC = 76
    """A collective failed because a peer or the connection to it was lost."""
    SUPERSEDED = 77
    """A newer attempt owns the checkpoints; this one must not write any longer."""


HOLDABLE = frozenset({ExitCode.FABRIC, ExitCode.SAVED})
"""Exit codes of ranks that their pod can start again in the next attempt."""


OOM_KILL = "out of memory: the kernel killed a process of this pod"
"""Start of the line after the last output of a rank that ended because its pod exceeded its memory."""


def describe(code: int) -> str:
    """Return a short description of an exit code: the meaning of an ExitCode, or the signal of 128+n."""
    try:
        return _DESCRIPTIONS[ExitCode(code)]
    except ValueError:
        pass
    number = -code if code < 0 else code - 128
    try:
        return f"killed by {signal.Signals(number).name}"
    except ValueError:
        return f"exit code {code}"


_DESCRIPTIONS = {
    ExitCode.DONE: "done",
    ExitCode.CONFIG: "configuration error",
    ExitCode.DATA: "data error",
    ExitCode.NETWORK: "network error",
    ExitCode.SOFTWARE: "uncaught exception",
    ExitCode.DEVICE: "faulty device",
    ExitCode.STORAGE: "storage error",
    ExitCode.STORAGE_OUTAGE: "storage not available",
    ExitCode.SAVED: "saved on a preemption notice",
    ExitCode.STALE: "no checkpoint for too long",
    ExitCode.FABRIC: "lost a peer",
    ExitCode.SUPERSEDED: "superseded by a newer attempt",
}
