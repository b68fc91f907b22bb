"""The core against the simulated cluster: a million random events, and short lives that hypothesis can shrink."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from testing.simulated.faults import FAULTS, Fault
from testing.simulated.model import BrokenInvariantError, Workload
from testing.simulated.world import World
from tests.simulation.__main__ import run
from tests.simulation.episode import run_episode
from tests.simulation.invariants import Invariants

NUM_SEEDS = 4
EVENTS_PER_SEED = 250_000


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_million_events_break_nothing(seed: int) -> None:
    total = run(EVENTS_PER_SEED, seed)
    assert total.num_events >= EVENTS_PER_SEED
    # It has seen what it is for: jobs that ended either way, after every kind of mishap.
    assert total.counts["jobs Succeeded"] > total.counts["jobs Failed"] > 0
    assert set(total.faults) == {fault.cause.__name__ for fault in FAULTS}


BY_NAME = {fault.cause.__name__: fault for fault in FAULTS}


def named(names: str) -> list[Fault]:
    return [BY_NAME[name] for name in names.split()]


# A failing life is a seed and a list of names: short enough to be read without shrinking, which would take minutes.
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(seed=st.integers(0, 2**16), faults=st.lists(st.sampled_from(FAULTS), max_size=12))
# Beats that come before the news of their pod, which waited for hours: no hang.
@example(
    314,
    named(
        "set_quota suspend change_capacity suspend die set_quota preempt set_quota vanish suspend lag set_quota",
    ),
)
# The last pod came just when the others' ranks gave up waiting: no failure of the fabric.
@example(
    1853946440,
    named(
        "preempt stall_pulls preempt restart_operator take_quota die change_capacity lag partition break_watch suspend "
        "stall_pulls partition",
    ),
)
def test_a_few_mishaps_break_nothing(seed: int, faults: list[Fault]) -> None:
    run_episode(seed, max_events=4_000, cause=_in_turn(faults))


def test_the_same_seed_is_the_same_life() -> None:
    first, second = (run_episode("again", max_events=5_000) for _ in range(2))
    assert first == second


def test_a_second_writer_is_noticed() -> None:
    watchdog = Invariants()
    watchdog.world = World("seed", watchdog, num_nodes=1)
    watchdog.world.make_job("j", Workload())
    watchdog.committed("j", 0, 10)
    with pytest.raises(BrokenInvariantError, match="step 10 was committed after step 10"):
        watchdog.committed("j", 0, 10)


def _in_turn(faults: list[Fault]) -> Callable[[World], str]:
    """The drawn mishaps, then none."""
    left = list(faults)

    def cause(world: World) -> str:
        if not left:
            return "none"
        fault = left.pop(0)
        fault.cause(world)
        return fault.cause.__name__

    return cause
