"""Ranks that need longer than their peers for the same work: found by what they wait for each other."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import Performance, RankReport, RankState, StepShares
from finetune_operator.api.conditions import ConditionType
from finetune_operator.plan.model.conditions import find, is_true
from finetune_operator.plan.report.slow_ranks import find_slow
from tests.plan.fake_cluster import FakeCluster, make_job


def performance(exchange: float) -> Performance:
    """Return the figures of a rank that waits for its peers in this share of a step."""
    return Performance(shares=StepShares(compute=1 - exchange, exchange=exchange))


def reports(*exchange: float, state: RankState = RankState.TRAINING) -> list[RankReport]:
    return [RankReport(rank=rank, state=state, performance=performance(each)) for rank, each in enumerate(exchange)]


@pytest.mark.parametrize(
    ("exchange", "slow"),
    [
        ((0.1, 0.1, 0.1), []),
        # The others wait for rank 1 in half of each step.
        ((0.5, 0.0, 0.5), [(1, 2.0)]),
        ((0.4, 0.1), [(1, 1.5)]),
        ((0.4, 0.12), []),
        ((0.6, 0.0, 0.6, 0.2), [(1, 2.5), (3, 2.0)]),
        # All of them wait for the network most of the time.
        ((0.9, 0.75, 0.9), []),
        ((0.0,), []),
    ],
)
def test_rank_that_waits_least_is_the_slow_one(exchange: tuple[float, ...], slow: list[tuple[int, float]]) -> None:
    found = find_slow(reports(*exchange))
    assert [rank for rank, _ in found] == [rank for rank, _ in slow]
    assert [factor for _, factor in found] == pytest.approx([factor for _, factor in slow])


def test_ranks_that_do_not_train_are_not_compared() -> None:
    assert find_slow(reports(0.5, 0.0, state=RankState.VALIDATING)) == []
    assert find_slow([RankReport(rank=0, state=RankState.TRAINING)]) == []


def beat(cluster: FakeCluster, step: int, first: float, second: float) -> None:
    cluster.beat(0, step=step, performance=performance(first))
    cluster.beat(1, step=step, performance=performance(second))
    cluster.settle()


def test_rank_that_stays_slow_is_reported_with_its_node() -> None:
    cluster = FakeCluster(make_job()).running()
    cluster.change(1, node="node-1")
    beat(cluster, 1, 0.5, 0.0)
    (slow,) = cluster.job.status.slow_ranks
    assert (slow.rank, slow.node, slow.factor) == (1, "node-1", 2.0)
    assert find(cluster.job.status, ConditionType.SLOW_RANKS) is None
    for step in range(2, 8):
        cluster.tick(10)
        beat(cluster, step, 0.51, 0.0)
    condition = find(cluster.job.status, ConditionType.SLOW_RANKS)
    assert condition is not None
    assert (condition.status, condition.reason) == ("True", "SlowerThanPeers")
    assert condition.message == "rank 1 on node-1 needs 2 times as long as its peers since 12:00:00 UTC"
    assert cluster.job.status.slow_ranks == (slow,), "the first figures remain, so that the status is not rewritten"
    cluster.tick(10)
    beat(cluster, 9, 0.1, 0.1)
    assert not is_true(cluster.job.status, ConditionType.SLOW_RANKS)
    assert not cluster.job.status.slow_ranks


def test_slow_ranks_of_an_attempt_end_with_it() -> None:
    cluster = FakeCluster(make_job()).running()
    beat(cluster, 1, 0.5, 0.0)
    cluster.exit(1, 1)
    cluster.settle()
    assert cluster.job.status.slow_ranks == ()
