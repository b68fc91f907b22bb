"""How often a checkpoint should be written: the formula that the trainer saves by and the operator explains."""

from __future__ import annotations

import math

DEFAULT_MTBF_SECONDS = 2 * 3600.0
"""Mean time between interruptions that `auto` assumes of a job that has seen none: spot capacity that loses a tenth of
its nodes a day, some dozens of them together."""
MIN_AUTO_SECONDS = 10.0
MAX_AUTO_SECONDS = 1800.0


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


def estimate_mtbf_seconds(elapsed_seconds: float, num_interruptions: float) -> float:
    """Mean time between interruptions of a job, from its own life so far.

    The assumed rate counts as one interruption seen before the job began, so that a first one does not change
    everything, and ten are believed.
    """
    return (DEFAULT_MTBF_SECONDS + max(0.0, elapsed_seconds)) / (1 + num_interruptions)
