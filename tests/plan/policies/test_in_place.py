"""Recovery in place: which pods are kept, which replies they get, and when the complete gang is replaced instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order, RankEnd, RankState, Reply
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import Create, ObservedPod, PodPhase, ReceivedHeartbeat
from finetune_operator.plan.replies import reply_to
from tests.plan.fake_cluster import START, FakeCluster, last_words, make_job, seconds
from tests.plan.scenarios import HOLDING, fixed_cluster, wait_for_peers


def names(cluster: FakeCluster) -> list[str]:
    return sorted(cluster.pods)


def reply(cluster: FakeCluster, pod: ObservedPod) -> Reply:
    return cluster.reply(cluster.beats[pod.uid].beat)


def test_only_the_lost_pod_is_replaced() -> None:
    cluster = fixed_cluster()
    first = cluster.pod(0)
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 2, 1)
    assert names(cluster) == ["circles-a1-n0", "circles-a1-n2", "circles-a2-n1"]
    # Kept pods get the new world only once the new pod runs: its wait for a node and an image has no limit.
    assert reply(cluster, first) == Reply(beat_seconds=1.0)
    cluster.run_all()
    cluster.settle()
    answer = reply(cluster, first).world
    assert answer is not None
    assert (answer.attempt, answer.node_rank, answer.num_nodes) == (2, 0, 3)
    assert answer.master_addr == first.address


def join(cluster: FakeCluster, pod: ObservedPod) -> Reply:
    """Ask where rank 0 of the newest attempt is, as a pod whose ranks have not started."""
    cluster.say(pod, pod.node_rank)
    return cluster.reply(cluster.beats[pod.uid].beat.model_copy(update={"joining": True}))


def test_new_pod_gets_the_address_of_a_kept_rank_0() -> None:
    cluster = fixed_cluster()
    first = cluster.pod(0)
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0, 2)
    cluster.step()
    [created] = [action.manifest for action in cluster.decide().actions if isinstance(action, Create)]
    env = {item["name"]: item.get("value") for item in created["spec"]["containers"][0]["env"]}
    assert (env["FINETUNE_ATTEMPT"], env["FINETUNE_NODE_RANK"]) == ("2", "1")
    assert "MASTER_ADDR" not in env
    cluster.settle()
    world = join(cluster, cluster.pod(1)).world
    assert world is not None
    assert (world.attempt, world.node_rank, world.num_nodes) == (2, 1, 3)
    assert world.master_addr == first.address


def waiting_cluster() -> FakeCluster:
    """Return a job whose three pods exist and have no address."""
    cluster = FakeCluster(make_job(topology={"accelerator": "cpu", "nodes": 3}), settings=HOLDING)
    cluster.settle()
    return cluster


def test_pods_of_the_first_attempt_start_when_rank_0_has_an_address() -> None:
    cluster = waiting_cluster()
    assert join(cluster, cluster.pod(2)) == Reply(beat_seconds=1.0)
    # Before it runs, its address may change.
    cluster.change(0, address="10.0.0.6")
    assert join(cluster, cluster.pod(2)).world is None
    # It need not be ready, and the others need not run: the ranks wait for each other.
    cluster.change(0, address="10.0.0.7", phase=PodPhase.RUNNING)
    world = join(cluster, cluster.pod(2)).world
    assert world is not None
    assert (world.attempt, world.node_rank, world.num_nodes, world.master_addr) == (1, 2, 3, "10.0.0.7")


@pytest.mark.parametrize(
    ("master_addr", "step", "is_told"),
    [("10.0.0.6", None, True), ("10.0.0.7", None, False), ("10.0.0.6", 1, False), (None, None, False)],
)
def test_ranks_that_have_not_met_hear_that_rank_0_has_moved(
    master_addr: str | None, step: int | None, is_told: bool
) -> None:
    """Its pod was lost before the gang was complete, so it was created again in the same attempt."""
    cluster = waiting_cluster()
    cluster.change(0, address="10.0.0.7", phase=PodPhase.RUNNING)
    cluster.beat(1, RankState.STARTING, step=step)
    beat = cluster.beats[cluster.pod(1).uid].beat.model_copy(update={"master_addr": master_addr})
    world = cluster.reply(beat).world
    assert (world is not None) == is_told
    assert world is None or (world.attempt, world.node_rank, world.master_addr) == (1, 1, "10.0.0.7")


def test_a_pod_whose_ranks_have_not_started_is_kept_when_rank_0_is_lost() -> None:
    cluster = waiting_cluster()
    cluster.run_all()
    cluster.settle()
    pod = cluster.pod(2)
    cluster.beat(1, RankState.STARTING)
    cluster.beat(2, RankState.STARTING, joining=True)
    cluster.vanish(cluster.pod(0).name)
    cluster.settle()
    answer = reply(cluster, pod)
    assert answer.peer_lost
    assert answer.world is None
    cluster.say(pod, None)
    cluster.beats[cluster.pods["circles-a1-n1"].uid] = replace(cluster.beats[pod.uid])
    cluster.settle()
    assert "circles-a1-n2" in names(cluster)
    assert cluster.job.status.attempts[-1].pod_attempts == (2, 1, 1)


def test_a_pod_asks_in_vain_after_its_attempt_was_superseded() -> None:
    cluster = fixed_cluster()
    old = cluster.pod(1)
    beat = cluster.beats[old.uid].beat.model_copy(update={"joining": True})
    cluster.vanish(old.name)
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    answer = cluster.reply(beat)
    assert (answer.attempt, answer.world) == (2, None)


def test_the_status_counts_the_kept_pods_from_the_begin_of_the_attempt() -> None:
    cluster = fixed_cluster()
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0, 2)
    cluster.step()
    assert cluster.job.status.attempt == 2
    assert (cluster.job.status.nodes, cluster.job.status.message) == ("2/3", "2/3 pods are running")


def restarted_operator() -> tuple[FakeCluster, dict[str, ReceivedHeartbeat]]:
    """Return a gang that lost a pod when its operator restarted, and the heartbeats that the old operator received."""
    cluster = fixed_cluster()
    lost = cluster.pod(1)
    cluster.vanish(lost.name)
    wait_for_peers(cluster, 0, 2)
    heard = {uid: received for uid, received in cluster.beats.items() if uid != lost.uid}
    cluster.beats, cluster.listening_since = {}, cluster.now
    cluster.settle()
    assert cluster.job.status.attempts[-1].reason is not None
    assert names(cluster) == ["circles-a1-n0", "circles-a1-n2"]
    assert cluster.job.status.attempt == 1
    return cluster, heard


def test_an_operator_that_has_just_started_waits_for_the_survivors() -> None:
    cluster, heard = restarted_operator()
    cluster.now += seconds(10)
    cluster.beats = {uid: replace(received, received_at=cluster.now) for uid, received in heard.items()}
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 2, 1)


def test_an_operator_that_has_just_started_blames_no_pod_before_it_has_heard_all() -> None:
    cluster = fixed_cluster()
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    assert cluster.job.status.attempts[0].ended_at is not None
    cluster.now += seconds(20)
    cluster.beats, cluster.listening_since = {}, cluster.now
    cluster.settle()
    # The first pod that reports its lost peer does not make the next one the lost peer.
    wait_for_peers(cluster, 0)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason is None
    assert cluster.decide().requeue_after == seconds(15)
    cluster.now += seconds(15)
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    ended = cluster.job.status.attempts[0]
    assert (ended.reason, ended.rank) == (Reason.NODE_LOST, 1)
    assert all(cluster.pod(rank).deleted_at is None for rank in (0, 2))


def test_survivors_that_stay_silent_after_a_restart_of_the_operator_are_replaced() -> None:
    cluster, _ = restarted_operator()
    assert cluster.decide().requeue_after == seconds(15)
    cluster.now += seconds(15)
    cluster.settle()
    assert all(pod.deleted_at is not None for pod in cluster.pods.values())


NOT_KEPT: list[dict[str, Any]] = [
    {"deleted_at": START, "grace": seconds(30)},
    {"disruption": "EvictionByEvictionAPI"},
    {"exit_code": 1},
]


@pytest.mark.parametrize("change", NOT_KEPT)
def test_leaving_or_ended_pod_is_not_kept(change: dict[str, Any]) -> None:
    cluster = fixed_cluster()
    cluster.vanish(cluster.pod(1).name)
    cluster.change(2, **change)
    wait_for_peers(cluster, 0)
    cluster.settle()
    if "circles-a1-n2" in cluster.pods:
        cluster.vanish("circles-a1-n2")
    wait_for_peers(cluster, 0)
    # A failure is followed by a back-off; the kept pods continue to send heartbeats.
    cluster.tick(14)
    wait_for_peers(cluster, 0)
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 2, 2)


def test_silent_pod_is_not_kept() -> None:
    cluster = fixed_cluster()
    cluster.vanish(cluster.pod(1).name)
    cluster.tick(1)
    wait_for_peers(cluster, 0)
    cluster.tick(14.5)
    wait_for_peers(cluster, 0)
    decided = cluster.settle()
    assert "circles-a1-n0" in cluster.pods
    assert cluster.job.status.attempt == 1
    assert decided.requeue_after is not None


def test_second_loss_during_recovery_is_replaced() -> None:
    cluster = fixed_cluster()
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    cluster.vanish("circles-a1-n2")
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (1, 3, 3)


def test_whole_gang_is_replaced_after_a_failed_recovery_in_place() -> None:
    cluster = fixed_cluster()
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    cluster.run_all()
    cluster.settle()
    cluster.vanish("circles-a2-n1")
    cluster.settle()
    cluster.tick(3)
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == ()
    assert names(cluster) == ["circles-a3-n0", "circles-a3-n1", "circles-a3-n2"]


def test_kept_pod_that_never_joined_counts_as_preemption() -> None:
    cluster = fixed_cluster()
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0, 2)
    cluster.settle()
    message = last_words(1, ExitCode.FABRIC, "lost a peer", rank=0)
    pod = cluster.pods["circles-a1-n0"]
    cluster.pods[pod.name] = replace(pod, exit_code=int(ExitCode.FABRIC), termination=message)
    cluster.settle()
    entry = cluster.job.status.attempts[1]
    assert (entry.reason, entry.pod) == (Reason.POD_LOST, "circles-a1-n0")
    assert cluster.job.status.failures == 0


def test_all_ranks_save_when_one_has_a_notice() -> None:
    cluster = fixed_cluster()
    assert reply(cluster, cluster.pod(0)).order is Order.CONTINUE
    cluster.change(1, disruption="TerminationByKubelet", deleted_at=cluster.now, grace=seconds(60))
    cluster.settle()
    assert reply(cluster, cluster.pod(0)).order is Order.SAVE_AND_STOP
    assert reply(cluster, cluster.pod(2)).order is Order.SAVE_AND_STOP
    assert cluster.job.status.attempt == 1


def test_survivors_of_a_sudden_loss_receive_peer_lost() -> None:
    cluster = fixed_cluster()
    survivor = cluster.pod(0)
    assert not reply(cluster, survivor).peer_lost
    cluster.vanish(cluster.pod(1).name)
    cluster.step()
    answer = reply(cluster, survivor)
    assert (answer.peer_lost, answer.order, answer.world) == (True, Order.CONTINUE, None)


def test_no_pod_is_kept_without_a_coordinator() -> None:
    cluster = FakeCluster(make_job(), settings=replace(HOLDING, coordinator_url=""))
    cluster.running()
    cluster.beat_all()
    cluster.vanish(cluster.pod(1).name)
    wait_for_peers(cluster, 0)
    cluster.settle()
    cluster.tick(3)
    cluster.settle()
    assert names(cluster) == ["circles-a2-n0", "circles-a2-n1"]


def test_heartbeat_of_another_job_uid_gets_no_orders() -> None:
    cluster = fixed_cluster()
    beat = cluster.beats[cluster.pod(0).uid].beat
    other = cluster.job.model_copy(update={"metadata": cluster.job.metadata.model_copy(update={"uid": "another"})})
    assert cluster.reply(beat, other) == reply_to(None, beat, HOLDING, cluster.address_of) == Reply()


GAVE_UP = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="rank 0 of 3 rendezvous timed out")


def with_a_late_pod() -> FakeCluster:
    """Return a job of three pods: two run, the third still pulls its image."""
    cluster = FakeCluster(make_job(topology={"accelerator": "cpu", "nodes": 3}), settings=HOLDING)
    cluster.settle()
    late = cluster.pod(2).name
    cluster.run_all()
    cluster.pods[late] = replace(cluster.pods[late], phase=PodPhase.PENDING, waiting="ContainerCreating")
    cluster.settle()
    return cluster


def waiting_for_image() -> FakeCluster:
    """Return a job of three pods: the ranks of two timed out, the third still pulls its image."""
    cluster = with_a_late_pod()
    cluster.tick(1800)
    for node_rank in (0, 1):
        cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
    cluster.settle()
    return cluster


def test_attempt_stays_open_while_an_image_is_pulled() -> None:
    cluster = waiting_for_image()
    cluster.tick(20)
    for node_rank in (0, 1):
        cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    assert cluster.job.status.attempts[0].ended_at is None
    assert len(cluster.pods) == 3


def test_late_pod_starts_a_new_attempt_that_counts_as_nothing() -> None:
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
    ("waited", "reason"), [(1740, Reason.PODS_LATE), (60, Reason.FABRIC_ERROR)], ids=["late pod", "network"]
)
def test_timeout_just_as_the_last_pod_starts_is_due_to_its_wait(waited: float, reason: Reason) -> None:
    cluster = with_a_late_pod()
    cluster.tick(waited)
    cluster.run_all()
    cluster.settle()
    cluster.tick(1800 - waited)
    for _ in range(20):
        if cluster.job.status.attempts[0].reason is not None:
            break
        for node_rank in (0, 1):
            cluster.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
        cluster.beat(2, RankState.LOADING)
        cluster.tick(5)
        cluster.settle()
    assert cluster.job.status.attempts[0].reason == reason


def test_peer_that_fails_with_the_same_error_later_is_not_kept() -> None:
    cluster = fixed_cluster()
    cluster.exit(0, ExitCode.STORAGE)
    wait_for_peers(cluster, 1)
    cluster.settle()
    assert cluster.job.status.attempts[0].reason == Reason.STORAGE_ERROR
    # The back-off is over and the failed pod is deleted, but rank 2 has not reported its end yet.
    cluster.pods.pop("circles-a1-n0", None)
    cluster.tick(8)
    cluster.settings = replace(cluster.settings, failure_backoff_seconds=1.0)
    wait_for_peers(cluster, 1)
    cluster.beat(2, step=10, restored_step=0)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    cluster.exit(2, ExitCode.STORAGE)
    wait_for_peers(cluster, 1)
    cluster.settle()
    cluster.settle()
    assert cluster.job.status.attempts[-1].pod_attempts == (2, 1, 2)
    assert cluster.job.status.failures == 1
