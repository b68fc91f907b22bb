"""The automatic checkpoint interval: the trainer uses the formula, the operator explains it."""

from __future__ import annotations

import math

DEFAULT_MTBF_SECONDS = 2 * 3600.0
"""Assumed mean time between interruptions of a job without any: spot capacity that loses a tenth of its nodes a day,
some dozens of them at once."""
MIN_AUTO_SECONDS = 10.0
MAX_AUTO_SECONDS = 1800.0


def auto_seconds(save_seconds: float, mtbf_seconds: float) -> float:
    """Return the seconds of work between checkpoints that minimize the sum of saving and repeated work.

    Young's first-order optimum sqrt(2 C M) with Daly's correction for the save itself, sqrt(2 C M) - C (J. Daly, "A
    higher order estimate of the optimum checkpoint interval", 2006), clamped to the bounds above.

    Args:
        save_seconds: cost of one save (C).
        mtbf_seconds: mean time between interruptions (M).
    """
    best = math.sqrt(2 * save_seconds * mtbf_seconds) - save_seconds
    return min(MAX_AUTO_SECONDS, max(MIN_AUTO_SECONDS, best))


def estimate_mtbf_seconds(elapsed_seconds: float, num_interruptions: float) -> float:
    """Return the estimated mean time between interruptions of a job, from its history.

    The assumed rate counts as one interruption before the job began: so the first real one changes the estimate little,
    and ten determine it.
    """
    return (DEFAULT_MTBF_SECONDS + max(0.0, elapsed_seconds)) / (1 + num_interruptions)
