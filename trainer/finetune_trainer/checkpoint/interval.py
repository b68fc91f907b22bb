"""Decides when to save. Pure; rank 0 calls it after every step with its own clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_contract.interval import DEFAULT_MTBF_SECONDS, auto_seconds
from finetune_contract.spec import CheckpointInterval

FIRST_SAVE_SECONDS = 0.5
"""Cost of a save that `auto` assumes before one has been measured."""


@dataclass(frozen=True)
class SaveClock:
    """Inputs of the decision to save.

    Attributes:
        steps_since: finished steps since the last checkpoint.
        seconds_since: seconds since the last checkpoint, or since the loop began.
        save_seconds: cost of the last save in seconds; None before the first.
        mtbf_seconds: mean time between interruptions, as observed by the operator.
    """

    steps_since: int
    seconds_since: float
    save_seconds: float | None
    mtbf_seconds: float = DEFAULT_MTBF_SECONDS


def save_due(interval: CheckpointInterval, clock: SaveClock) -> bool:
    """Return whether a checkpoint is due: by steps, by seconds, by the first of both, or by `auto`."""
    if clock.steps_since == 0:
        return False
    if interval.steps is not None and clock.steps_since >= interval.steps:
        return True
    return clock.seconds_since >= due_seconds(interval, clock)


def due_seconds(interval: CheckpointInterval, clock: SaveClock) -> float:
    """Return the current number of seconds between two checkpoints; infinite if only steps count."""
    if interval.seconds is not None:
        return float(interval.seconds)
    if interval.steps is not None:
        return math.inf
    cost = FIRST_SAVE_SECONDS if clock.save_seconds is None else clock.save_seconds
    return auto_seconds(cost, clock.mtbf_seconds)
