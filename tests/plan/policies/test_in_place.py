"""Recovery in place: which pods are kept, what their supervisors are told, and when the whole gang goes instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order, RankEnd, RankState, Reply
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import Create, ObservedPod, PodPhase
from finetune_operator.plan.replies import reply_to
from tests.plan.fake_cluster import SETTINGS, FakeCluster, last_words, make_job, seconds

HOLDING = replace(SETTINGS, hold_seconds=120)
LOST_PEER = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="lost a peer")


def cluster_of(num_nodes: int = 3) -> FakeCluster:
    cluster = FakeCluster(make_job(topology={"accelerator": "cpu", "nodes": num_nodes}), settings=HOLDING)
    cluster.running()
    cluster.train_to(10, checkpoint=5)
    cluster.settle()
    return cluster


def wait_for_cluster(cluster: FakeCluster, *node_ranks: int) -> None:
    for node_rank in node_ranks:
        cluster.beat(node_rank, RankState.FAILED, step=10, restored_step=0, ends=(LOST_PEER,), waiting=True)


def names(cluster: FakeCluster) -> list[str]:
    return sorted(cluster.pods)


def reply(cluster: FakeCluster, pod: ObservedPod) -> Reply:
    return reply_to(cluster.job, cluster.beats[pod.uid].beat, cluster.settings)


def test_only_the_lost_pod_is_replaced() -> None:
    cluster = cluster_of()
    first = cluster.pod(0)
    cluster.vanish(cluster.pod(1).name)
    wait_for_cluster(cluster, 0, 2)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 2, 1)
    assert names(cluster) == ["circles-a1-n0", "circles-a1-n2", "circles-a2-n1"]
    # Not before the new pod runs: nobody knows how long it waits for a node and its image.
    assert reply(cluster, first) == Reply(beat_seconds=1.0)
    cluster.run_all()
    cluster.settle()
    told = reply(cluster, first).world
    assert told is not None
    assert (told.attempt, told.node_rank, told.num_nodes) == (2, 0, 3)
    assert told.master_addr == "circles-a1-n0.circles.default.svc"


def test_the_new_pod_meets_the_kept_ones_where_rank_0_is() -> None:
    cluster = cluster_of()
    cluster.vanish(cluster.pod(1).name)
    wait_for_cluster(cluster, 0, 2)
    cluster.step()
    [created] = [action.manifest for action in cluster.decide().actions if isinstance(action, Create)]
    env = {item["name"]: item.get("value") for item in created["spec"]["containers"][0]["env"]}
    assert env["MASTER_ADDR"] == "circles-a1-n0.circles.default.svc"
    assert (env["FINETUNE_ATTEMPT"], env["FINETUNE_NODE_RANK"]) == ("2", "1")


NOT_KEPT: list[dict[str, Any]] = [
    {"deleted_at": FakeCluster().now, "grace": seconds(30)},
    {"disruption": "EvictionByEvictionAPI"},
    {"exit_code": 1},
]


@pytest.mark.parametrize("change", NOT_KEPT)
def test_a_pod_that_goes_or_has_ended_is_not_kept(change: dict[str, Any]) -> None:
    cluster = cluster_of()
    cluster.vanish(cluster.pod(1).name)
    cluster.change(2, **change)
    wait_for_cluster(cluster, 0)
    cluster.settle()
    if "circles-a1-n2" in cluster.pods:
        cluster.vanish("circles-a1-n2")
    wait_for_cluster(cluster, 0)
    # A failure waits before the next attempt; whoever waits with it goes on beating.
    cluster.tick(14)
    wait_for_cluster(cluster, 0)
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 2, 2)


def test_a_pod_that_fell_silent_is_not_kept() -> None:
    cluster = cluster_of()
    cluster.vanish(cluster.pod(1).name)
    cluster.tick(1)
    wait_for_cluster(cluster, 0)
    cluster.tick(14.5)
    wait_for_cluster(cluster, 0)
    decided = cluster.settle()
    assert "circles-a1-n0" in cluster.pods
    assert cluster.job.status.attempt == 1
    assert decided.requeue_after is not None


def test_a_loss_while_the_lost_pod_waits_for_room_is_replaced_as_well() -> None:
    cluster = cluster_of()
    cluster.vanish(cluster.pod(1).name)
    wait_for_cluster(cluster, 0, 2)
    cluster.settle()
    cluster.vanish("circles-a1-n2")
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 3, 3)


def test_where_it_failed_in_place_the_whole_gang_goes() -> None:
    cluster = cluster_of()
    cluster.vanish(cluster.pod(1).name)
    wait_for_cluster(cluster, 0, 2)
    cluster.settle()
    cluster.run_all()
    cluster.settle()
    cluster.vanish("circles-a2-n1")
    cluster.settle()
    cluster.tick(3)
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == ()
    assert names(cluster) == ["circles-a3-n0", "circles-a3-n1", "circles-a3-n2"]


def test_a_kept_pod_that_never_came_is_capacity_and_no_failure() -> None:
    cluster = cluster_of()
    cluster.vanish(cluster.pod(1).name)
    wait_for_cluster(cluster, 0, 2)
    cluster.settle()
    words = last_words(1, ExitCode.FABRIC, "lost a peer", rank=0)
    pod = cluster.pods["circles-a1-n0"]
    cluster.pods[pod.name] = replace(pod, exit_code=int(ExitCode.FABRIC), termination=words)
    cluster.settle()
    entry = cluster.job.status.attempts[1]
    assert (entry.reason, entry.pod) == (Reason.POD_LOST, "circles-a1-n0")
    assert cluster.job.status.failures == 0


def test_all_are_asked_to_save_when_one_has_notice() -> None:
    cluster = cluster_of()
    assert reply(cluster, cluster.pod(0)).order is Order.CONTINUE
    cluster.change(1, disruption="TerminationByKubelet", deleted_at=cluster.now, grace=seconds(60))
    cluster.settle()
    assert reply(cluster, cluster.pod(0)).order is Order.SAVE_AND_STOP
    assert reply(cluster, cluster.pod(2)).order is Order.SAVE_AND_STOP
    assert cluster.job.status.attempt == 1


def test_survivors_of_a_sudden_loss_are_told_that_their_peer_is_gone() -> None:
    cluster = cluster_of()
    survivor = cluster.pod(0)
    assert not reply(cluster, survivor).peer_lost
    cluster.vanish(cluster.pod(1).name)
    cluster.step()
    told = reply(cluster, survivor)
    assert (told.peer_lost, told.order, told.world) == (True, Order.CONTINUE, None)


def test_without_a_coordinator_nobody_is_kept() -> None:
    cluster = FakeCluster(make_job(), settings=replace(HOLDING, coordinator_url=""))
    cluster.running()
    cluster.beat_all()
    cluster.vanish(cluster.pod(1).name)
    wait_for_cluster(cluster, 0)
    cluster.settle()
    cluster.tick(3)
    cluster.settle()
    assert names(cluster) == ["circles-a2-n0", "circles-a2-n1"]


def test_a_stranger_of_the_same_name_gets_no_orders() -> None:
    cluster = cluster_of()
    beat = cluster.beats[cluster.pod(0).uid].beat
    other = cluster.job.model_copy(update={"metadata": cluster.job.metadata.model_copy(update={"uid": "another"})})
    assert reply_to(other, beat, HOLDING) == reply_to(None, beat, HOLDING) == Reply()


GAVE_UP = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="rank 0 of 3 could not meet the others")


def with_a_late_pod() -> FakeCluster:
    """Two of three pods run; the third pulls its image still."""
    cluster = FakeCluster(make_job(topology={"accelerator": "cpu", "nodes": 3}), settings=HOLDING)
    cluster.settle()
    late = cluster.pod(2).name
    cluster.run_all()
    cluster.pods[late] = replace(cluster.pods[late], phase=PodPhase.PENDING, waiting="ContainerCreating")
    cluster.settle()
    return cluster


def waiting_for_image() -> FakeCluster:
    """Two of three pods run and their ranks gave up; the third pulls its image still."""
    cluster = with_a_late_pod()
    cluster.tick(1800)
    for node_rank in (0, 1):
        cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
    cluster.settle()
    return cluster


def test_nothing_restarts_while_images_still_pull() -> None:
    cluster = waiting_for_image()
    cluster.tick(20)
    for node_rank in (0, 1):
        cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert cluster.job.status.attempts[0].ended_at is None
    assert len(cluster.pods) == 3


def test_once_the_image_is_there_all_begin_anew_in_their_pods_and_nothing_is_counted() -> None:
    cluster = waiting_for_image()
    cluster.run_all()
    for _ in range(3):
        for node_rank in (0, 1):
            cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
        cluster.beat(2, RankState.LOADING)
        cluster.settle()
        cluster.tick(5)
    first, second = cluster.job.status.attempts
    assert (first.reason, first.counts_as) == (Reason.PODS_LATE, None)
    assert second.pod_attempts == (1, 1, 1)
    assert (cluster.job.status.preemptions, cluster.job.status.failures) == (0, 0)
    assert len(cluster.pods) == 3


@pytest.mark.parametrize(
    ("waited", "reason"), [(1740, Reason.PODS_LATE), (60, Reason.FABRIC_ERROR)], ids=["late pod", "fabric"]
)
def test_ranks_that_give_up_as_the_last_pod_comes_blame_its_wait(waited: float, reason: Reason) -> None:
    cluster = with_a_late_pod()
    cluster.tick(waited)
    cluster.run_all()
    cluster.settle()
    cluster.tick(1800 - waited)
    while cluster.job.status.attempts[0].reason is None:
        for node_rank in (0, 1):
            cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
        cluster.beat(2, RankState.LOADING)
        cluster.tick(5)
        cluster.settle()
    assert cluster.job.status.attempts[0].reason == reason


def test_a_peer_that_fails_of_the_same_thing_a_moment_later_is_not_kept() -> None:
    cluster = cluster_of()
    cluster.exit(0, ExitCode.STORAGE)
    wait_for_cluster(cluster, 1)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == Reason.STORAGE_ERROR
    # Its back-off is over, and its pod gone; rank 2 has not said yet how it fares.
    cluster.pods.pop("circles-a1-n0", None)
    cluster.tick(8)
    cluster.settings = replace(cluster.settings, failure_backoff_seconds=1.0)
    wait_for_cluster(cluster, 1)
    cluster.beat(2, step=10, restored_step=0)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    cluster.exit(2, ExitCode.STORAGE)
    wait_for_cluster(cluster, 1)
    cluster.settle()
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (2, 1, 2)
    assert cluster.job.status.failures == 1
