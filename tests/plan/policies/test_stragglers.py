"""Silent pods whose peers are done."""

from __future__ import annotations

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import CountsAs, Reason
from tests.plan.fake_cluster import FakeCluster, RankState, seconds


def done_but_one() -> FakeCluster:
    """Return a trained job: pod 0 has succeeded, and pod 1 became silent shortly before."""
    cluster = FakeCluster().running()
    cluster.train_to(100)
    cluster.settle()
    cluster.tick(2)
    cluster.beat(0, RankState.DONE, step=100)
    cluster.exit(0, 0)
    cluster.settle()
    return cluster


def test_silent_pod_whose_peers_are_done_is_lost() -> None:
    cluster = done_but_one()
    plan = cluster.decide()
    assert plan.requeue_after is not None
    cluster.now += seconds(59)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None
    cluster.now += seconds(1)
    cluster.step()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank, entry.node) == (
        Reason.NODE_LOST,
        CountsAs.PREEMPTION,
        1,
        "node-1",
    )
    cluster.settle()
    cluster.tick(5)
    cluster.settle()
    assert cluster.job.status.attempt == 2


def test_pod_with_heartbeats_may_take_longer() -> None:
    cluster = done_but_one()
    for _ in range(30):
        cluster.now += seconds(10)
        cluster.beat(1, RankState.EXPORTING, step=100)
        cluster.settle()
    assert cluster.job.status.attempts[0].reason is None
    cluster.exit(1, 0)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED


def test_silence_of_all_pods_does_not_end_the_attempt() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(50)
    cluster.settle()
    cluster.now += seconds(3600)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None
