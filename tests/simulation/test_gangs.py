"""Two gangs that block each other, in virtual time: each of them holds nodes that the other one needs."""

from __future__ import annotations

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from testing.simulated.cluster import SimulatedCluster
from testing.simulated.model import Workload
from tests.simulation.invariants import Invariants

JOBS = ("j1", "j2")
DELETION_SECONDS = 10.0
"""Longest time from the decision to delete a pod to its end."""


@pytest.mark.parametrize("mode", ["gates", "podGroup"])
def test_no_incomplete_gang_holds_nodes_for_more_than_a_minute_and_both_finish(mode: str) -> None:
    """Six nodes, two jobs of four pods that begin at the same time."""
    watchdog = Invariants()
    cluster = watchdog.cluster = SimulatedCluster(f"gangs-{mode}", watchdog, num_nodes=6)
    for name in JOBS:
        topology = {"accelerator": "cpu", "nodes": 4}
        cluster.make_job(name, Workload(total_steps=300), topology=topology, scheduling=mode)
    longest = 0.0
    held_since: dict[str, float] = {}
    while cluster.engine.time < 4 * 3600 and not all(is_done(cluster, name) for name in JOBS):
        cluster.engine.run(cluster.engine.time + 1)
        for name in JOBS:
            num_bound = sum(pod.job == name and pod.node is not None for pod in cluster.server.pods.values())
            if 0 < num_bound < 4 and not is_done(cluster, name):
                longest = max(longest, cluster.engine.time - held_since.setdefault(name, cluster.engine.time))
            else:
                held_since.pop(name, None)
    assert [cluster.server.jobs[name].status.phase for name in JOBS] == [Phase.SUCCEEDED] * 2
    assert longest <= 60 + DELETION_SECONDS
    statuses = [cluster.server.jobs[name].status for name in JOBS]
    released = [entry for status in statuses for entry in status.attempts if entry.reason == Reason.GANG_RELEASED]
    assert bool(released) is (mode == "gates")
    assert all(status.failures == status.preemptions == 0 for status in statuses)


def is_done(cluster: SimulatedCluster, name: str) -> bool:
    return cluster.server.jobs[name].status.phase is Phase.SUCCEEDED
