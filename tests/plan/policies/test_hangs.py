"""Hangs: a gang that is heard and does nothing."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.types import Create
from tests.plan.fake_cluster import FakeCluster, make_job, seconds


def standing_still(cluster: FakeCluster, number: float, state: RankState = RankState.TRAINING) -> None:
    """Time goes by, and the supervisors go on beating."""
    for _ in range(int(number // 5)):
        cluster.now += seconds(5)
        cluster.beat_all(state, step=10, restored_step=0)
        cluster.settle()


def training(hang_timeout: str | None = None) -> FakeCluster:
    recovery = {"hangTimeout": hang_timeout} if hang_timeout else {}
    cluster = FakeCluster(make_job(recovery=recovery)).running()
    cluster.train_to(1)
    cluster.settle()
    cluster.now += seconds(5)
    cluster.train_to(10)
    cluster.settle()
    return cluster


@pytest.mark.parametrize(("hang_timeout", "limit"), [(None, 300), ("60s", 60), ("20m", 1200)])
def test_no_step_for_so_long_is_a_hang(hang_timeout: str | None, limit: int) -> None:
    cluster = training(hang_timeout)
    standing_still(cluster, limit - 5)
    assert cluster.job.status.attempts[0].reason is None
    standing_still(cluster, 5)
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank, entry.node) == (Reason.HANG, CountsAs.FAILURE, 0, "node-0")
    assert entry.message is not None
    assert "at step 10 since" in entry.message


def test_the_rank_that_is_behind_is_blamed_and_its_node_avoided() -> None:
    cluster = training("60s")
    for _ in range(12):
        cluster.now += seconds(5)
        cluster.beat(0, step=10, restored_step=0)
        cluster.beat(1, step=9, restored_step=0)
        cluster.settle()
    assert cluster.job.status.attempts[0].node == "node-1"
    cluster.tick(3)
    cluster.settle()
    cluster.tick(20)
    cluster.step()
    pods = [a.manifest for a in cluster.decide().actions if isinstance(a, Create) and a.manifest["kind"] == "Pod"]
    assert pods
    for pod in pods:
        [weighted] = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert weighted["preference"]["matchFields"][0]["values"] == ["node-1"]


def test_silence_is_no_hang() -> None:
    cluster = training("60s")
    cluster.now += seconds(600)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None


def test_loading_may_take_its_time() -> None:
    cluster = FakeCluster(make_job(recovery={"hangTimeout": "60s"})).running()
    standing_still(cluster, 600, RankState.LOADING)
    assert cluster.job.status.attempts[0].reason is None


def test_other_work_than_steps_may_take_its_time_too() -> None:
    cluster = training("60s")
    standing_still(cluster, 600, RankState.SAVING)
    assert cluster.job.status.attempts[0].reason is None


def test_an_operator_that_was_away_hears_of_the_steps_first() -> None:
    cluster = training("60s")
    cluster.now += seconds(600)
    cluster.beats.clear()
    cluster.settle()
    cluster.train_to(90)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None


def test_after_a_long_save_the_time_of_a_step_begins_anew() -> None:
    cluster = training("60s")
    standing_still(cluster, 600, RankState.SAVING)
    standing_still(cluster, 55)
    assert cluster.job.status.attempts[0].reason is None
    standing_still(cluster, 10)
    assert cluster.job.status.attempts[0].reason == Reason.HANG


@pytest.mark.parametrize("state", [RankState.LOADING, RankState.TRAINING])
def test_a_gang_is_not_blamed_for_the_hours_in_which_its_pods_waited(state: RankState) -> None:
    """A beat may come before the news that its pod runs, which waited for a node all the time."""
    cluster = FakeCluster(make_job(recovery={"hangTimeout": "60s"}))
    cluster.settle()
    cluster.now += seconds(4 * 3600)
    cluster.settle()
    for _ in range(2):
        cluster.beat_all(state, step=10 if state is RankState.TRAINING else None, restored_step=10)
        cluster.settle()
        assert cluster.job.status.attempts[0].reason is None
        cluster.run_all()
