"""When to save. Pure; called by rank 0 after every step with its own clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_contract.interval import DEFAULT_MTBF_SECONDS, auto_seconds
from finetune_contract.spec import CheckpointInterval

FIRST_SAVE_SECONDS = 0.5
"""What `auto` takes a save to cost before one has been measured."""


@dataclass(frozen=True)
class SaveClock:
    """What the decision to save depends on.

    Attributes:
        steps_since: finished steps since the last checkpoint.
        seconds_since: seconds since the last checkpoint, or since the loop began.
        save_seconds: what the last save cost, or None.
        mtbf_seconds: mean time between interruptions, as far as the operator has seen.
    """

    steps_since: int
    seconds_since: float
    save_seconds: float | None
    mtbf_seconds: float = DEFAULT_MTBF_SECONDS


def save_due(interval: CheckpointInterval, clock: SaveClock) -> bool:
    """Whether a checkpoint is due: by steps, by seconds, by whichever comes first, or by `auto`."""
    if clock.steps_since == 0:
        return False
    if interval.steps is not None and clock.steps_since >= interval.steps:
        return True
    return clock.seconds_since >= due_seconds(interval, clock)


def due_seconds(interval: CheckpointInterval, clock: SaveClock) -> float:
    """Seconds between two checkpoints, as it stands; infinite where only steps count."""
    if interval.seconds is not None:
        return float(interval.seconds)
    if interval.steps is not None:
        return math.inf
    cost = FIRST_SAVE_SECONDS if clock.save_seconds is None else clock.save_seconds
    return auto_seconds(cost, clock.mtbf_seconds)
