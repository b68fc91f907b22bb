"""The phases of a restart, from the times at which the states of a rank were seen. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

BEFORE = "until_the_rank_starts"
"""The first phase: from the kill until the new rank's program runs."""


def phases(states: Sequence[tuple[float, str]], killed_at: float, next_step: float) -> dict[str, float]:
    """Return the seconds from a kill to the next step, by the state of the rank; the sum is the complete restart.

    Args:
        states: times and states, also those before the kill.
        killed_at: time of the kill.
        next_step: time at which the first new step was completed.
    """
    later = [(when, state) for when, state in states if killed_at <= when < next_step]
    # The last states of the killed rank may be read after the kill.
    starts = [number for number, (_, state) in enumerate(later) if state == "starting"]
    marks = [(killed_at, BEFORE), *(later[starts[0] :] if starts else ()), (next_step, "")]
    found: dict[str, float] = {}
    for (when, state), (until, _) in itertools.pairwise(marks):
        found[state] = found.get(state, 0.0) + until - when
    return found
