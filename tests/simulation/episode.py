"""One episode: some jobs on some nodes, hours of mishaps, then calm, in which all must come to its end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from finetune_contract.phase import Phase
from testing.simulated.faults import cause_one
from testing.simulated.model import Workload
from testing.simulated.world import World
from tests.simulation.invariants import Invariants

SIZES: tuple[dict[str, int], ...] = (
    {"nodes": 1},
    {"nodes": 2},
    {"nodes": 3},
    {"minNodes": 1, "maxNodes": 3},
    {"minNodes": 2, "maxNodes": 4},
)
SPOT: tuple[dict[str, Any], ...] = (
    {},
    {"spot": {}},
    {"spot": {"fallbackAfter": "1m"}},
    {"spot": {"fallbackAfter": "30m"}},
)
CALM_SECONDS = 12 * 3600.0
IDLE_SECONDS = 3600.0


@dataclass
class Result:
    """What an episode came to."""

    num_events: int = 0
    num_passes: int = 0
    virtual_seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: Result) -> None:
        """Sum up."""
        self.num_events += other.num_events
        self.num_passes += other.num_passes
        self.virtual_seconds += other.virtual_seconds
        self.faults += other.faults
        self.counts += other.counts


def run_episode(seed: int | str, max_events: int, cause: Callable[[World], str] = cause_one) -> Result:
    """Run one episode to its end.

    Raises:
        BrokenInvariantError: something happened that must not.
    """
    invariants = Invariants()
    rng = random.Random(f"{seed}-shape")
    num_jobs = rng.randint(1, 8)
    num_nodes, num_on_demand = rng.randint(3, 3 * num_jobs), rng.choice([0, 2, 8])
    world = World(seed, invariants, num_nodes=num_nodes, num_on_demand=num_on_demand)
    invariants.world = world
    for number in range(num_jobs):
        world.engine.after(rng.uniform(0, 300), partial(_make_random_job, world, f"j{number}", rng.randrange(2**32)))
    mishaps = _Mishaps(world, rng.choice([20.0, 60.0, 300.0, 1800.0]), cause)
    mishaps.next()
    world.engine.run(24 * 3600.0, stop=lambda: world.engine.num_events >= max_events or _over(world, num_jobs))
    mishaps.stopped = True
    world.calm_down()
    world.engine.run(world.engine.time + 60.0)
    world.calm_down()
    world.engine.run(world.engine.time + CALM_SECONDS, stop=lambda: _over(world, num_jobs))
    # What is under way comes to its end; then an idle hour, with one list in the middle.
    world.engine.run(world.engine.time + IDLE_SECONDS)
    writes = world.server.num_writes
    if world.operator is not None:
        world.operator.wake_all()
    world.engine.run(world.engine.time + IDLE_SECONDS)
    invariants.all_ended(writes)
    return _result(world, invariants, mishaps)


def _result(world: World, invariants: Invariants, mishaps: _Mishaps) -> Result:
    assert world.operator is not None
    counts = invariants.counts
    for job in world.server.jobs.values():
        counts[f"jobs {job.status.phase}"] += 1
        for entry in job.status.attempts:
            counts[f"ended {entry.reason}"] += 1
    passes = world.num_passes + world.operator.num_passes
    return Result(world.engine.num_events, passes, world.engine.time, mishaps.caused, counts)


class _Mishaps:
    """Faults, one after the other, at random distances."""

    def __init__(self, world: World, mean_seconds: float, cause: Callable[[World], str]) -> None:
        self.caused: Counter[str] = Counter()
        self.stopped = False
        self._world = world
        self._mean_seconds = mean_seconds
        self._cause = cause

    def next(self) -> None:
        """Wait, then let one happen."""
        self._world.engine.after(self._world.engine.rng.expovariate(1 / self._mean_seconds), self._happen)

    def _happen(self) -> None:
        if not self.stopped:
            self.caused[self._cause(self._world)] += 1
            self.next()


def _over(world: World, num_jobs: int) -> bool:
    jobs = world.server.jobs
    return len(jobs) >= num_jobs and all(job.status.phase in (Phase.SUCCEEDED, Phase.FAILED) for job in jobs.values())


def _make_random_job(world: World, name: str, seed: int) -> None:
    rng = random.Random(seed)
    work = Workload(
        total_steps=rng.choice([20, 200, 2000]),
        step_seconds=rng.choice([0.5, 2.0, 10.0]),
        save_steps=rng.choice([10, 50, 500]),
        save_seconds=rng.choice([0.5, 5.0, 60.0]),
        load_seconds=rng.choice([3.0, 20.0, 120.0]),
        warm_load_seconds=rng.choice([None, 2.0]),
        stall_seconds=rng.choice([None, 0.1]),
        rescues=rng.random() < 0.5,
    )
    spec: dict[str, Any] = {
        "topology": {"accelerator": "cpu", **rng.choice(SIZES)},
        "recovery": {"maxFailures": rng.choice([0, 1, 3]), "noticeSeconds": rng.choice([30, 120]), **rng.choice(SPOT)},
    }
    if "minNodes" in spec["topology"]:
        spec["recovery"]["shrinkAfter"] = rng.choice(["30s", "5m"])
    if rng.random() < 0.1:
        spec["activeDeadlineSeconds"] = 3600
    world.make_job(name, work, **spec)
