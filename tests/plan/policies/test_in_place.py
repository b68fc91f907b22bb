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
from tests.plan.harness import SETTINGS, World, last_words, make_job, seconds

HOLDING = replace(SETTINGS, hold_seconds=120)
LOST_PEER = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="lost a peer")


def world_of(num_nodes: int = 3) -> World:
    world = World(make_job(topology={"accelerator": "cpu", "nodes": num_nodes}), settings=HOLDING)
    world.running()
    world.train_to(10, checkpoint=5)
    world.settle()
    return world


def wait_for_world(world: World, *node_ranks: int) -> None:
    for node_rank in node_ranks:
        world.beat(node_rank, RankState.FAILED, step=10, restored_step=0, ends=(LOST_PEER,), waiting=True)


def names(world: World) -> list[str]:
    return sorted(world.pods)


def reply(world: World, pod: ObservedPod) -> Reply:
    return reply_to(world.job, world.beats[pod.uid].beat, world.settings)


def test_only_the_lost_pod_is_replaced() -> None:
    world = world_of()
    first = world.pod(0)
    world.vanish(world.pod(1).name)
    wait_for_world(world, 0, 2)
    world.settle()
    assert world.job.status.attempt == 2
    assert world.job.status.attempts[-1].pod_attempts == (1, 2, 1)
    assert names(world) == ["circles-a1-n0", "circles-a1-n2", "circles-a2-n1"]
    # Not before the new pod runs: nobody knows how long it waits for a node and its image.
    assert reply(world, first) == Reply(beat_seconds=1.0)
    world.run_all()
    world.settle()
    told = reply(world, first).world
    assert told is not None
    assert (told.attempt, told.node_rank, told.num_nodes) == (2, 0, 3)
    assert told.master_addr == "circles-a1-n0.circles.default.svc"


def test_the_new_pod_meets_the_kept_ones_where_rank_0_is() -> None:
    world = world_of()
    world.vanish(world.pod(1).name)
    wait_for_world(world, 0, 2)
    world.step()
    [created] = [action.manifest for action in world.decide().actions if isinstance(action, Create)]
    env = {item["name"]: item.get("value") for item in created["spec"]["containers"][0]["env"]}
    assert env["MASTER_ADDR"] == "circles-a1-n0.circles.default.svc"
    assert (env["FINETUNE_ATTEMPT"], env["FINETUNE_NODE_RANK"]) == ("2", "1")


NOT_KEPT: list[dict[str, Any]] = [
    {"deleted_at": World().now, "grace": seconds(30)},
    {"disruption": "EvictionByEvictionAPI"},
    {"exit_code": 1},
]


@pytest.mark.parametrize("change", NOT_KEPT)
def test_a_pod_that_goes_or_has_ended_is_not_kept(change: dict[str, Any]) -> None:
    world = world_of()
    world.vanish(world.pod(1).name)
    world.change(2, **change)
    wait_for_world(world, 0)
    world.settle()
    if "circles-a1-n2" in world.pods:
        world.vanish("circles-a1-n2")
    wait_for_world(world, 0)
    # A failure waits before the next attempt; whoever waits with it goes on beating.
    world.tick(14)
    wait_for_world(world, 0)
    world.settle()
    assert world.job.status.attempts[-1].pod_attempts == (1, 2, 2)


def test_a_pod_that_fell_silent_is_not_kept() -> None:
    world = world_of()
    world.vanish(world.pod(1).name)
    world.tick(1)
    wait_for_world(world, 0)
    world.tick(14.5)
    wait_for_world(world, 0)
    decided = world.settle()
    assert "circles-a1-n0" in world.pods
    assert world.job.status.attempt == 1
    assert decided.requeue_after is not None


def test_a_loss_while_the_lost_pod_waits_for_room_is_replaced_as_well() -> None:
    world = world_of()
    world.vanish(world.pod(1).name)
    wait_for_world(world, 0, 2)
    world.settle()
    world.vanish("circles-a1-n2")
    world.settle()
    assert world.job.status.attempts[-1].pod_attempts == (1, 3, 3)


def test_where_it_failed_in_place_the_whole_gang_goes() -> None:
    world = world_of()
    world.vanish(world.pod(1).name)
    wait_for_world(world, 0, 2)
    world.settle()
    world.run_all()
    world.settle()
    world.vanish("circles-a2-n1")
    world.settle()
    world.tick(3)
    world.settle()
    assert world.job.status.attempts[-1].pod_attempts == ()
    assert names(world) == ["circles-a3-n0", "circles-a3-n1", "circles-a3-n2"]


def test_a_kept_pod_that_never_came_is_capacity_and_no_failure() -> None:
    world = world_of()
    world.vanish(world.pod(1).name)
    wait_for_world(world, 0, 2)
    world.settle()
    words = last_words(1, ExitCode.FABRIC, "lost a peer", rank=0)
    pod = world.pods["circles-a1-n0"]
    world.pods[pod.name] = replace(pod, exit_code=int(ExitCode.FABRIC), termination=words)
    world.settle()
    entry = world.job.status.attempts[1]
    assert (entry.reason, entry.pod) == (Reason.POD_LOST, "circles-a1-n0")
    assert world.job.status.failures == 0


def test_all_are_asked_to_save_when_one_has_notice() -> None:
    world = world_of()
    assert reply(world, world.pod(0)).order is Order.CONTINUE
    world.change(1, disruption="TerminationByKubelet", deleted_at=world.now, grace=seconds(60))
    world.settle()
    assert reply(world, world.pod(0)).order is Order.SAVE_AND_STOP
    assert reply(world, world.pod(2)).order is Order.SAVE_AND_STOP
    assert world.job.status.attempt == 1


def test_survivors_of_a_sudden_loss_are_told_that_their_peer_is_gone() -> None:
    world = world_of()
    survivor = world.pod(0)
    assert not reply(world, survivor).peer_lost
    world.vanish(world.pod(1).name)
    world.step()
    told = reply(world, survivor)
    assert (told.peer_lost, told.order, told.world) == (True, Order.CONTINUE, None)


def test_without_a_coordinator_nobody_is_kept() -> None:
    world = World(make_job(), settings=replace(HOLDING, coordinator_url=""))
    world.running()
    world.beat_all()
    world.vanish(world.pod(1).name)
    wait_for_world(world, 0)
    world.settle()
    world.tick(3)
    world.settle()
    assert names(world) == ["circles-a2-n0", "circles-a2-n1"]


def test_a_stranger_of_the_same_name_gets_no_orders() -> None:
    world = world_of()
    beat = world.beats[world.pod(0).uid].beat
    other = world.job.model_copy(update={"metadata": world.job.metadata.model_copy(update={"uid": "another"})})
    assert reply_to(other, beat, HOLDING) == reply_to(None, beat, HOLDING) == Reply()


GAVE_UP = RankEnd(rank=0, exit_code=ExitCode.FABRIC, last_words="rank 0 of 3 could not meet the others")


def with_a_late_pod() -> World:
    """Two of three pods run; the third pulls its image still."""
    world = World(make_job(topology={"accelerator": "cpu", "nodes": 3}), settings=HOLDING)
    world.settle()
    late = world.pod(2).name
    world.run_all()
    world.pods[late] = replace(world.pods[late], phase=PodPhase.PENDING, waiting="ContainerCreating")
    world.settle()
    return world


def waiting_for_image() -> World:
    """Two of three pods run and their ranks gave up; the third pulls its image still."""
    world = with_a_late_pod()
    world.tick(1800)
    for node_rank in (0, 1):
        world.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
    world.settle()
    return world


def test_nothing_restarts_while_images_still_pull() -> None:
    world = waiting_for_image()
    world.tick(20)
    for node_rank in (0, 1):
        world.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
    world.settle()
    assert world.job.status.attempt == 1
    assert world.job.status.attempts[0].ended_at is None
    assert len(world.pods) == 3


def test_once_the_image_is_there_all_begin_anew_in_their_pods_and_nothing_is_counted() -> None:
    world = waiting_for_image()
    world.run_all()
    for _ in range(3):
        for node_rank in (0, 1):
            world.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
        world.beat(2, RankState.LOADING)
        world.settle()
        world.tick(5)
    first, second = world.job.status.attempts
    assert (first.reason, first.counts_as) == (Reason.PODS_LATE, None)
    assert second.pod_attempts == (1, 1, 1)
    assert (world.job.status.preemptions, world.job.status.failures) == (0, 0)
    assert len(world.pods) == 3


@pytest.mark.parametrize(
    ("waited", "reason"), [(1740, Reason.PODS_LATE), (60, Reason.FABRIC_ERROR)], ids=["late pod", "fabric"]
)
def test_ranks_that_give_up_as_the_last_pod_comes_blame_its_wait(waited: float, reason: Reason) -> None:
    world = with_a_late_pod()
    world.tick(waited)
    world.run_all()
    world.settle()
    world.tick(1800 - waited)
    while world.job.status.attempts[0].reason is None:
        for node_rank in (0, 1):
            world.beat(node_rank, RankState.FAILED, ends=(GAVE_UP,), waiting=True)
        world.beat(2, RankState.LOADING)
        world.tick(5)
        world.settle()
    assert world.job.status.attempts[0].reason == reason


def test_a_peer_that_fails_of_the_same_thing_a_moment_later_is_not_kept() -> None:
    world = world_of()
    world.exit(0, ExitCode.STORAGE)
    wait_for_world(world, 1)
    world.settle()
    assert world.job.status.attempts[0].reason == Reason.STORAGE_ERROR
    # Its back-off is over, and its pod gone; rank 2 has not said yet how it fares.
    world.pods.pop("circles-a1-n0", None)
    world.tick(8)
    world.settings = replace(world.settings, failure_backoff_seconds=1.0)
    wait_for_world(world, 1)
    world.beat(2, step=10, restored_step=0)
    world.settle()
    assert world.job.status.attempt == 1
    world.exit(2, ExitCode.STORAGE)
    wait_for_world(world, 1)
    world.settle()
    world.settle()
    assert world.job.status.attempts[-1].pod_attempts == (2, 1, 2)
    assert world.job.status.failures == 1
