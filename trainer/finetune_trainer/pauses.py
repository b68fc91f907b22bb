"""Pauses before another try of what failed: of a save, of the outputs, and of a read (`patience`).

`PreemptionNotice.pause` is the pause of a rank: the notice ends it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

Pause = Callable[[float], bool]
"""Waits for a number of seconds, or until the preemption notice arrives. Returns whether it has arrived."""
AFTER_NOTICE_SECONDS = 1.0
"""Longest pause of a rank that has received the notice: the next try may be the last one before the machine ends."""

PART_SECONDS = 1.0
"""Time after which the ranks exchange in a pause whether one of them has received the notice."""


def sleep(seconds: float) -> bool:
    """Wait where no notice can arrive."""
    time.sleep(seconds)
    return False


def pause_together(seconds: float, pause: Pause, gather: Callable[[int], Sequence[int]]) -> bool:
    """Wait on all ranks. Return on all of them whether the notice of one has ended the wait.

    Args:
        seconds: the same on all ranks.
        pause: waits on this rank.
        gather: returns the numbers of all ranks.
    """
    while seconds > 0:
        part = min(seconds, PART_SECONDS)
        if any(gather(int(pause(part)))):
            return True
        seconds -= part
    return False
