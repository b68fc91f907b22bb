"""When to save. Pure; called by rank 0 after every step with its own clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_contract.spec import CheckpointInterval

DEFAULT_MTBF_SECONDS = 2 * 3600.0
"""Mean time between interruptions that `auto` assumes: spot capacity that loses a tenth of its nodes a day, some dozens
of them together."""
FIRST_SAVE_SECONDS = 0.5
"""What `auto` takes a save to cost before one has been measured."""
MIN_AUTO_SECONDS = 10.0
MAX_AUTO_SECONDS = 1800.0


@dataclass(frozen=True)
class SaveClock:
    """What the decision to save depends on.

    Attributes:
        steps_since: finished steps since the last checkpoint.
        seconds_since: seconds since the last checkpoint, or since the loop began.
        save_seconds: what the last save cost, or None.
    """

    steps_since: int
    seconds_since: float
    save_seconds: float | None


def save_due(interval: CheckpointInterval, clock: SaveClock) -> bool:
    """Whether a checkpoint is due: by steps, by seconds, by whichever comes first, or by `auto`."""
    if clock.steps_since == 0:
        return False
    if interval.steps is not None and clock.steps_since >= interval.steps:
        return True
    if interval.seconds is not None:
        return clock.seconds_since >= interval.seconds
    if interval.steps is not None:
        return False
    cost = FIRST_SAVE_SECONDS if clock.save_seconds is None else clock.save_seconds
    return clock.seconds_since >= auto_seconds(cost, DEFAULT_MTBF_SECONDS)


def auto_seconds(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of work between checkpoints that lose the least time to saving and to repeated work together.

    Young's first-order optimum sqrt(2 C M) with Daly's correction for the save itself, sqrt(2 C M) - C (J. Daly, "A
    higher order estimate of the optimum checkpoint interval", 2006), within bounds.

    Args:
        save_seconds: what one save costs (C).
        mtbf_seconds: mean time between interruptions (M).
    """
    best = math.sqrt(2 * save_seconds * mtbf_seconds) - save_seconds
    return min(MAX_AUTO_SECONDS, max(MIN_AUTO_SECONDS, best))
