"""One episode: some jobs on some nodes, hours of faults, then a quiet time in which every job must end."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from testing.simulated.cluster import SimulatedCluster
from testing.simulated.faults import inject_random_fault
from testing.simulated.model import Workload
from testing.simulated.queue import QUEUE
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
Inject = Callable[[SimulatedCluster], str]
"""Injects a fault and returns its name."""
MEMORIES: tuple[tuple[str, str | None], ...] = (("1Gi", None), ("1Gi", "4Gi"), ("1Gi", "8Gi"))
"""Memory of each pod, and its maximum."""
COVERED = frozenset(
    {
        "attempts after an admission",
        "attempts in place",
        "attempts on fewer nodes",
        "attempts scheduled with gates",
        "attempts scheduled with podGroup",
        "export pods",
        "memory raised",
        "pods resized",
        "quota released",
        *(
            f"ended {reason}"
            for reason in (
                Reason.BACK_TO_SPOT,
                Reason.EVICTED_BY_QUEUE,
                Reason.FABRIC_ERROR,
                Reason.FELL_BACK,
                Reason.GANG_RELEASED,
                Reason.GPU_FAULT,
                Reason.GROWN,
                Reason.HANG,
                Reason.NODE_LOST,
                Reason.OUT_OF_MEMORY,
                Reason.PREEMPTED,
                Reason.PROCESS_FAILED,
                Reason.REFUSED_BY_KUBELET,
                Reason.SHRUNK,
                Reason.STORAGE_ERROR,
                Reason.SUSPENDED,
            )
        ),
    }
)
"""What a long run must contain: without it, it tests less than it seems to."""
QUIET_SECONDS = 12 * 3600.0
IDLE_SECONDS = 3600.0
SCARCE_SHARE = 0.4
"""Share of the episodes in which the jobs together need more nodes than there are."""


@dataclass
class EpisodeResult:
    """The counts of one or several episodes."""

    num_events: int = 0
    num_reconciles: int = 0
    virtual_seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, other: EpisodeResult) -> None:
        """Add the counts of another result."""
        self.num_events += other.num_events
        self.num_reconciles += other.num_reconciles
        self.virtual_seconds += other.virtual_seconds
        self.faults += other.faults
        self.counts += other.counts


def run_episode(
    seed: int | str, max_events: int, inject: Callable[[SimulatedCluster], str] = inject_random_fault
) -> EpisodeResult:
    """Run one episode to its end.

    Raises:
        BrokenInvariantError: an invariant is broken.
    """
    invariants = Invariants()
    rng = random.Random(f"{seed}-shape")
    num_jobs = rng.randint(1, 8)
    num_nodes, num_on_demand = rng.randint(3, 3 * num_jobs), rng.choice([0, 2, 8])
    if rng.random() < SCARCE_SHARE:
        # Gangs take nodes from each other, and stay incomplete.
        num_jobs, num_nodes, num_on_demand = rng.randint(3, 6), rng.randint(4, 6), 0
    cluster = SimulatedCluster(seed, invariants, num_nodes=num_nodes, num_on_demand=num_on_demand)
    invariants.cluster = cluster
    for number in range(num_jobs):
        cluster.engine.after(
            rng.uniform(0, 300), partial(_create_random_job, cluster, f"j{number}", rng.randrange(2**32))
        )
    injector = _FaultInjector(cluster, rng.choice([20.0, 60.0, 300.0, 1800.0]), inject)
    injector.schedule_next()
    cluster.engine.run(
        24 * 3600.0, stop=lambda: cluster.engine.num_events >= max_events or _all_finished(cluster, num_jobs)
    )
    injector.stopped = True
    cluster.stop_faults()
    cluster.engine.run(cluster.engine.time + 60.0)
    cluster.stop_faults()
    cluster.engine.run(cluster.engine.time + QUIET_SECONDS, stop=lambda: _all_finished(cluster, num_jobs))
    # Let pending actions finish; then an idle hour with one reconcile of every job at its start.
    cluster.engine.run(cluster.engine.time + IDLE_SECONDS)
    writes = cluster.server.num_writes
    if cluster.operator is not None:
        cluster.operator.wake_all()
    cluster.engine.run(cluster.engine.time + IDLE_SECONDS)
    invariants.all_ended(writes)
    return _result(cluster, invariants, injector)


def _result(cluster: SimulatedCluster, invariants: Invariants, injector: _FaultInjector) -> EpisodeResult:
    assert cluster.operator is not None
    counts = invariants.counts
    for job in cluster.server.jobs.values():
        counts[f"jobs {job.status.phase}"] += 1
    passes = cluster.num_reconciles + cluster.operator.num_reconciles
    return EpisodeResult(cluster.engine.num_events, passes, cluster.engine.time, injector.counts, counts)


class _FaultInjector:
    """Injects faults at random intervals."""

    def __init__(
        self, cluster: SimulatedCluster, mean_seconds: float, inject: Callable[[SimulatedCluster], str]
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.stopped = False
        self._cluster = cluster
        self._mean_seconds = mean_seconds
        self._inject = inject

    def schedule_next(self) -> None:
        """Schedule the next fault."""
        self._cluster.engine.after(self._cluster.engine.rng.expovariate(1 / self._mean_seconds), self._inject_one)

    def _inject_one(self) -> None:
        if not self.stopped:
            self.counts[self._inject(self._cluster)] += 1
            self.schedule_next()


def _all_finished(cluster: SimulatedCluster, num_jobs: int) -> bool:
    jobs = cluster.server.jobs
    return len(jobs) >= num_jobs and all(job.status.phase in (Phase.SUCCEEDED, Phase.FAILED) for job in jobs.values())


def _create_random_job(cluster: SimulatedCluster, name: str, seed: int) -> None:
    rng = random.Random(seed)
    work = Workload(
        total_steps=rng.choice([20, 200, 2000]),
        step_seconds=rng.choice([0.5, 2.0, 10.0]),
        save_steps=rng.choice([10, 50, 500]),
        save_seconds=rng.choice([0.5, 5.0, 60.0]),
        load_seconds=rng.choice([3.0, 20.0, 120.0]),
        warm_load_seconds=rng.choice([None, 2.0]),
        stall_seconds=rng.choice([None, 0.1]),
        emergency_saves=rng.random() < 0.5,
    )
    spec: dict[str, Any] = {
        "topology": {"accelerator": "cpu", **rng.choice(SIZES)},
        "recovery": {"maxFailures": rng.choice([0, 1, 3]), "noticeSeconds": rng.choice([30, 120]), **rng.choice(SPOT)},
    }
    if "minNodes" in spec["topology"]:
        spec["recovery"]["shrinkAfter"] = rng.choice(["30s", "5m"])
    memory, most = rng.choice(MEMORIES)
    spec["topology"]["resources"] = {"memory": memory}
    if most is not None:
        spec["recovery"]["maxMemory"] = most
    if rng.random() < 0.5:
        spec["recovery"]["hangTimeout"] = "1m"
    if rng.random() < 0.1:
        spec["activeDeadlineSeconds"] = 3600
    if rng.random() < 0.4:
        spec["queueName"] = QUEUE
    else:
        spec["scheduling"] = rng.choice(["podGroup", "gates", "gates", "none"])
    if rng.random() < 0.3:
        spec["outputs"] = [{"format": "openvino", "to": "s3://models/openvino"}]
    cluster.make_job(name, work, **spec)
