"""The plan against the simulated cluster: a million random events, and short episodes with few faults."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from testing.simulated.cluster import SimulatedCluster
from testing.simulated.faults import FAULTS, SimulatedFault
from testing.simulated.model import BrokenInvariantError, Workload
from tests.simulation.__main__ import EPISODE_EVENTS, missing, run
from tests.simulation.episode import run_episode
from tests.simulation.invariants import Invariants

NUM_SEEDS = 4
EVENTS_PER_SEED = 250_000
MORE_EPISODES = 40


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_million_random_events_break_no_invariant(seed: int) -> None:
    total = run(EVENTS_PER_SEED, seed)
    assert total.num_events >= EVENTS_PER_SEED
    assert total.counts["jobs Succeeded"] > total.counts["jobs Failed"] > 0
    # A change of the plan changes all later draws: an event that is rare may need some more episodes.
    number = 0
    while (lacking := missing(total)) and number < MORE_EPISODES:
        total.add(run_episode(f"{seed}-more-{number}", EPISODE_EVENTS))
        number += 1
    assert lacking == []


BY_NAME = {fault.inject.__name__: fault for fault in FAULTS}


def named(names: str) -> list[SimulatedFault]:
    return [BY_NAME[name] for name in names.split()]


@pytest.mark.timeout(600)
# A failing example is a seed and a list of names: readable without shrinking, which would take minutes.
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(seed=st.integers(0, 2**16), faults=st.lists(st.sampled_from(FAULTS), max_size=12))
# Heartbeats arrive before the watch shows that their pod runs, after hours of waiting: not a hang.
@example(
    314,
    named(
        "set_quota suspend change_capacity suspend stop_node set_quota preempt set_quota remove_node suspend "
        "delay_watch set_quota",
    ),
)
# The last pod starts just when the other ranks give up waiting: not a network failure.
@example(
    1853946440,
    named(
        "preempt stall_pulls preempt restart_operator reclaim_nodes stop_node change_capacity delay_watch partition "
        "break_watch suspend stall_pulls partition",
    ),
)
def test_few_faults_break_no_invariant(seed: int, faults: list[SimulatedFault]) -> None:
    run_episode(seed, max_events=4_000, inject=_inject_in_order(faults))


def test_same_seed_gives_same_result() -> None:
    first, second = (run_episode("again", max_events=5_000) for _ in range(2))
    assert first == second


def test_second_writer_is_detected() -> None:
    watchdog = Invariants()
    watchdog.cluster = SimulatedCluster("seed", watchdog, num_nodes=1)
    watchdog.cluster.make_job("j", Workload())
    watchdog.committed("j", 0, 10)
    with pytest.raises(BrokenInvariantError, match="step 10 was committed after step 10"):
        watchdog.committed("j", 0, 10)


def _inject_in_order(faults: list[SimulatedFault]) -> Callable[[SimulatedCluster], str]:
    """Return a function that injects the given faults in order, and then none."""
    remaining = list(faults)

    def inject(cluster: SimulatedCluster) -> str:
        if not remaining:
            return "none"
        fault = remaining.pop(0)
        fault.inject(cluster)
        return fault.inject.__name__

    return inject
