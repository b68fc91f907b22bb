"""Hangs: a gang that sends heartbeats and makes no progress."""

from __future__ import annotations

import pytest

from finetune_contract.heartbeat import RankState
from finetune_operator.api.reasons import CountsAs, Reason
from finetune_operator.plan.model.types import Create, DeletePod
from tests.plan.fake_cluster import FakeCluster, make_job, seconds


def send_without_progress(cluster: FakeCluster, number: float, state: RankState = RankState.TRAINING) -> None:
    """Let the supervisors send heartbeats for some time without progress."""
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
def test_no_step_within_the_timeout_is_a_hang(hang_timeout: str | None, limit: int) -> None:
    cluster = training(hang_timeout)
    send_without_progress(cluster, limit - 5)
    assert cluster.job.status.attempts[0].reason is None
    send_without_progress(cluster, 5)
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.counts_as, entry.rank, entry.node) == (Reason.HANG, CountsAs.FAILURE, 0, "node-0")
    assert entry.message is not None
    assert "at step 10 since" in entry.message


def test_slowest_rank_is_named_and_its_node_avoided() -> None:
    cluster = training("60s")
    for _ in range(12):
        cluster.now += seconds(5)
        cluster.beat(0, step=10, restored_step=0)
        cluster.beat(1, step=9, restored_step=0)
        cluster.settle()
    assert cluster.job.status.attempts[0].node == "node-1"
    cluster.tick(20)
    cluster.settle()
    cluster.tick(20)
    cluster.step()
    pods = [a.manifest for a in cluster.decide().actions if isinstance(a, Create) and a.manifest["kind"] == "Pod"]
    assert pods
    for pod in pods:
        [weighted] = pod["spec"]["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert weighted["preference"]["matchFields"][0]["values"] == ["node-1"]


def deleted(cluster: FakeCluster) -> list[str]:
    return [action.name for action in cluster.step().actions if isinstance(action, DeletePod)]


def hung() -> FakeCluster:
    """Return a gang whose rank 0 hangs; nothing has ended yet."""
    cluster = training("60s")
    cluster.now += seconds(60)
    cluster.beat(0, step=9, restored_step=0)
    cluster.beat(1, step=10, restored_step=0)
    return cluster


def test_a_hung_pod_runs_until_its_peer_has_stored_the_stacks() -> None:
    cluster = hung()
    assert deleted(cluster) == []
    assert cluster.job.status.attempts[0].reason == Reason.HANG
    cluster.tick(19)
    cluster.beat(1, RankState.FAILED, waiting=True)
    assert "circles-a1-n0" in deleted(cluster)


def test_a_hung_pod_is_deleted_after_20_s_if_its_peer_does_not_answer() -> None:
    cluster = hung()
    assert deleted(cluster) == []
    cluster.tick(19)
    decided = cluster.step()
    assert not decided.actions
    assert decided.requeue_after == seconds(1)
    cluster.tick(1)
    assert deleted(cluster) == ["circles-a1-n0", "circles-a1-n1"]


def test_silence_is_not_a_hang() -> None:
    cluster = training("60s")
    cluster.now += seconds(600)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None


def test_loading_is_not_limited_by_hang_timeout() -> None:
    cluster = FakeCluster(make_job(recovery={"hangTimeout": "60s"})).running()
    send_without_progress(cluster, 600, RankState.LOADING)
    assert cluster.job.status.attempts[0].reason is None


def test_saving_is_not_limited_by_hang_timeout() -> None:
    cluster = training("60s")
    send_without_progress(cluster, 600, RankState.SAVING)
    assert cluster.job.status.attempts[0].reason is None


def test_restarted_operator_reads_new_steps_before_it_detects_a_hang() -> None:
    cluster = training("60s")
    cluster.now += seconds(600)
    cluster.beats.clear()
    cluster.settle()
    cluster.train_to(90)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None


def test_time_of_a_step_starts_after_a_long_save() -> None:
    cluster = training("60s")
    send_without_progress(cluster, 600, RankState.SAVING)
    send_without_progress(cluster, 55)
    assert cluster.job.status.attempts[0].reason is None
    send_without_progress(cluster, 10)
    assert cluster.job.status.attempts[0].reason == Reason.HANG


@pytest.mark.parametrize("state", [RankState.LOADING, RankState.TRAINING])
def test_waiting_time_of_pods_does_not_count(state: RankState) -> None:
    """After hours of waiting for a node, the heartbeat of a pod may arrive before the list shows it as running."""
    cluster = FakeCluster(make_job(recovery={"hangTimeout": "60s"}))
    cluster.settle()
    cluster.now += seconds(4 * 3600)
    cluster.settle()
    for _ in range(2):
        cluster.beat_all(state, step=10 if state is RankState.TRAINING else None, restored_step=10)
        cluster.settle()
        assert cluster.job.status.attempts[0].reason is None
        cluster.run_all()
