"""The duration of each stage of a restart."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.api.status import AttemptSeconds
from tests.plan.fake_cluster import FakeCluster, make_job, seconds


def tick(cluster: FakeCluster, number: float) -> None:
    cluster.tick(number)
    cluster.settle()


def test_duration_of_each_stage() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10, checkpoint=10)
    cluster.settle()
    finished_at = cluster.now
    cluster.tick(2)
    cluster.exit(1, 1)
    cluster.change(1, finished_at=finished_at)
    cluster.settle()
    assert cluster.job.status.attempts[0].seconds.detection == 2
    cluster.tick(30)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    for rank in (0, 1):
        cluster.change(rank, node=f"node-{rank}")
        tick(cluster, 3)
    cluster.run_all()
    tick(cluster, 5)
    cluster.beat_all(RankState.LOADING)
    tick(cluster, 4)
    cluster.beat_all(step=10, restored_step=10)
    tick(cluster, 0)
    cluster.tick(6)
    cluster.beat_all(step=11, restored_step=10)
    cluster.settle()
    assert cluster.job.status.attempts[1].seconds == AttemptSeconds(
        teardown=30, queueing=6, pulling=5, restoring=4, first_step=6
    )


def test_queueing_ends_when_the_last_pod_received_its_node_even_if_all_pods_run_by_then() -> None:
    """While a gang starts, its job is reconciled every few seconds only."""
    cluster = FakeCluster()
    cluster.settle()
    for rank in (0, 1):
        cluster.tick(3)
        cluster.change(rank, node=f"node-{rank}", scheduled_at=cluster.now)
    cluster.tick(20)
    cluster.run_all()
    cluster.settle()
    assert cluster.job.status.attempts[0].seconds == AttemptSeconds(queueing=6, pulling=20)


@pytest.mark.parametrize("sign", ["ended", "announced", "missing"])
def test_detection_starts_at_the_first_sign_of_the_fault(sign: str) -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    began = cluster.now
    cluster.tick(3)
    if sign == "ended":
        cluster.exit(1, 1)
        cluster.change(1, finished_at=began)
    elif sign == "announced":
        cluster.change(1, deleted_at=began, grace=seconds(30), disruption="EvictionByEvictionAPI")
    else:
        # Its last heartbeat is still known.
        del cluster.pods[cluster.pod(1).name]
    cluster.settle()
    assert cluster.job.status.attempts[0].seconds.detection == 3


def test_detection_of_a_hang_starts_at_the_last_progress() -> None:
    cluster = FakeCluster(make_job(recovery={"hangTimeout": "60s"})).running()
    for _ in range(15):
        cluster.beat_all(step=10, restored_step=0)
        cluster.settle()
        cluster.now += seconds(5)
    assert cluster.job.status.attempts[0].seconds.detection == 60
