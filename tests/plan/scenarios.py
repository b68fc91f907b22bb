"""Scenarios of elastic and spot jobs, and of recovery in place, for the tests of the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import RankEnd, RankState
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.plan.model.view import members_of
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job

HOLDING = replace(SETTINGS, hold_seconds=120)
"""Settings with which pods are kept for the next attempt."""
ELASTIC = {"accelerator": "cpu", "minNodes": 2, "maxNodes": 4}
FALLBACK = {"recovery": {"spot": {"fallbackAfter": "10m"}}}
LOST_PEER = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="lost a peer")


def place(cluster: FakeCluster, *numbers: int) -> None:
    """Give pods of the newest attempt a node, and start them."""
    for number in numbers:
        address = f"10.0.{cluster.job.status.attempt}.{number + 1}"
        cluster.change(number, phase=PodPhase.RUNNING, node=f"node-{number}", ready=True, address=address)


def send_heartbeats(cluster: FakeCluster, **report: Any) -> None:
    """Let all running pods send a heartbeat: members of the gang train, the others stand by."""
    members = members_of(cluster.job.status, cluster.job.spec)
    for pod in cluster.pods.values():
        if pod.phase is not PodPhase.RUNNING:
            continue
        rank = next((r for r, m in enumerate(members) if m == (pod.attempt, pod.node_rank)), None)
        cluster.say(pod, rank, **report)


def elastic_cluster(settings: Any = HOLDING, **spec: Any) -> FakeCluster:
    """Return a cluster with a job of 2 to 4 nodes."""
    job = make_job(topology=ELASTIC, training={"method": "LoRA", "steps": 100_000}, **spec)
    return FakeCluster(job, settings=settings)


def shrunk(**spec: Any) -> FakeCluster:
    """Return a job that requested four nodes, got three, and trains on three."""
    cluster = elastic_cluster(**spec)
    cluster.settle()
    place(cluster, 0, 1, 3)
    send_heartbeats(cluster)
    cluster.settle()
    for _ in range(31):
        cluster.tick(10)
        send_heartbeats(cluster)
        cluster.settle()
    send_heartbeats(cluster, step=5)
    cluster.settle()
    return cluster


def spot_cluster() -> FakeCluster:
    """Return a job on two spot nodes of which only the first is available."""
    job = make_job(training={"method": "LoRA", "steps": 100_000}, **FALLBACK)
    cluster = FakeCluster(job, settings=HOLDING)
    cluster.settle()
    place(cluster, 0)
    return cluster


def fixed_cluster(num_nodes: int = 3) -> FakeCluster:
    """Return a job of a fixed number of nodes that trains at step 10."""
    job = make_job(topology={"accelerator": "cpu", "nodes": num_nodes})
    cluster = FakeCluster(job, settings=HOLDING).running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    return cluster


def wait_for_peers(cluster: FakeCluster, *node_ranks: int) -> None:
    """Let the supervisors report that their ranks lost a peer, and that they wait for a new world."""
    for node_rank in node_ranks:
        cluster.beat(node_rank, RankState.FAILED, step=10, restored_step=0, ends=(LOST_PEER,), waiting=True)
