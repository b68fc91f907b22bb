"""Elastic gangs: when a job goes on with fewer nodes, and when it grows back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import Order, RankEnd, RankState
from finetune_contract.phase import Phase
from finetune_operator.api.job import Capacity
from finetune_operator.api.reasons import Reason
from finetune_operator.manifests import global_batch
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.plan.model.view import members_of
from finetune_operator.plan.replies import reply_to
from tests.plan.harness import SETTINGS, World, make_job, seconds

HOLDING = replace(SETTINGS, hold_seconds=120)
ELASTIC = {"accelerator": "cpu", "minNodes": 2, "maxNodes": 4}


def place(world: World, *numbers: int) -> None:
    """Pods of the newest attempt get a node and run."""
    for number in numbers:
        world.change(number, phase=PodPhase.RUNNING, node=f"node-{number}", ready=True)


def hear(world: World, **told: Any) -> None:
    """All that run beat: those of the gang train, the others wait."""
    members = members_of(world.job.status, world.job.spec)
    for pod in world.pods.values():
        if pod.phase is not PodPhase.RUNNING:
            continue
        rank = next((r for r, m in enumerate(members) if m == (pod.attempt, pod.node_rank)), None)
        world.say(pod, rank, **told)


def elastic_world(settings: Any = HOLDING, **spec: Any) -> World:
    return World(make_job(topology=ELASTIC, training={"method": "LoRA", "steps": 100_000}, **spec), settings=settings)


def shrunk(**spec: Any) -> World:
    """Four were asked for, three have room; the job trains on three."""
    world = elastic_world(**spec)
    world.settle()
    place(world, 0, 1, 3)
    hear(world)
    world.settle()
    for _ in range(31):
        world.tick(10)
        hear(world)
        world.settle()
    hear(world, step=5)
    world.settle()
    return world


def test_it_waits_for_room_first() -> None:
    world = elastic_world()
    world.settle()
    place(world, 0, 1, 3)
    hear(world)
    decided = world.settle()
    assert decided.requeue_after is not None
    assert (world.job.status.message or "").endswith("it goes on without them at 12:05:00 UTC")
    world.tick(299)
    hear(world)
    world.settle()
    assert world.job.status.attempt == 1


def test_it_goes_on_with_those_that_have_room() -> None:
    world = shrunk()
    status = world.job.status
    first, second = status.attempts
    assert (first.reason, first.next_nodes, first.counts_as) == (Reason.SHRUNK, 3, None)
    assert (second.nodes, second.pod_attempts, second.pod_ranks) == (3, (1, 1, 1), (0, 1, 3))
    assert status.nodes == "3/4"
    assert (status.preemptions, status.failures) == (0, 0)
    assert global_batch(world.job.spec) == 4
    assert status.phase is Phase.RUNNING


def test_its_supervisors_are_told_of_the_smaller_world() -> None:
    world = elastic_world()
    world.settle()
    place(world, 0, 1, 3)
    world.tick(300)
    hear(world)
    world.settle()
    world.settle()
    last = world.pods["circles-a1-n3"]
    told = reply_to(world.job, world.beats[last.uid].beat, HOLDING).world
    assert told is not None
    assert (told.attempt, told.node_rank, told.num_nodes) == (2, 2, 3)


def test_below_the_minimum_it_waits_and_says_for_what() -> None:
    world = elastic_world()
    world.settle()
    place(world, 0)
    world.change(1, waiting="Unschedulable: 0/3 nodes are available: 3 Insufficient cpu.")
    world.tick(3600)
    hear(world)
    world.settle()
    assert world.job.status.attempt == 1
    assert world.job.status.reason == Reason.UNSCHEDULABLE
    assert "3 Insufficient cpu" in (world.job.status.message or "")


def test_it_shrinks_without_a_coordinator_too() -> None:
    world = elastic_world(replace(SETTINGS, coordinator_url=""), recovery={"shrinkAfter": "30s"})
    world.settle()
    place(world, 0, 1)
    world.tick(30)
    world.settle()
    world.tick(2)
    world.settle()
    assert sorted(world.pods) == ["circles-a2-n0", "circles-a2-n1"]
    env = {item["name"]: item.get("value") for item in world.made["circles-a2-n1"]["spec"]["containers"][0]["env"]}
    assert env["FINETUNE_NUM_NODES"] == "2"


def test_a_pod_stands_by_for_the_missing_one() -> None:
    world = shrunk()
    assert sorted(world.pods) == ["circles-a1-n0", "circles-a1-n1", "circles-a1-n3", "circles-a2-n3"]
    env = {item["name"]: item.get("value") for item in world.made["circles-a2-n3"]["spec"]["containers"][0]["env"]}
    assert env["FINETUNE_STANDBY"] == "1"


def test_it_grows_back_when_there_is_room_and_all_save_first() -> None:
    world = shrunk()
    place(world, 3)
    hear(world, step=6)
    world.settle()
    assert world.job.status.attempt == 2, "it has just begun"
    world.tick(120)
    hear(world, step=100)
    world.settle()
    entry = world.job.status.attempts[-1]
    assert (entry.attempt, entry.reason, entry.next_nodes) == (2, Reason.GROWN, 4)
    first = world.pods["circles-a1-n0"]
    assert reply_to(world.job, world.beats[first.uid].beat, HOLDING).order is Order.SAVE_AND_STOP
    hear(world, step=101, waiting=True)
    world.settle()
    entry = world.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes) == (3, None)
    assert (entry.pod_attempts, entry.pod_ranks) == ((1, 1, 1, 2), (0, 1, 3, 3))
    hear(world, step=101, waiting=True)
    world.settle()
    worlds = [reply_to(world.job, beat.beat, HOLDING).world for beat in world.beats.values()]
    assert sorted(told.node_rank for told in worlds if told is not None) == [0, 1, 2, 3]
    assert {told.num_nodes for told in worlds if told is not None} == {4}
    assert world.job.status.preemptions == 0


def test_a_pod_that_stands_by_goes_with_its_job() -> None:
    world = shrunk()
    place(world, 3)
    hear(world, step=6)
    for pod in list(world.pods.values()):
        if pod.name != "circles-a2-n3":
            world.pods[pod.name] = replace(pod, phase=PodPhase.SUCCEEDED, exit_code=0)
    world.settle()
    assert world.job.status.phase is Phase.SUCCEEDED
    assert world.pods["circles-a2-n3"].deleted_at is not None


def test_a_higher_minimum_holds_from_the_next_attempt_on() -> None:
    world = shrunk()
    topology = world.job.spec.topology.model_copy(update={"min_nodes": 4})
    world.job = world.job.model_copy(update={"spec": world.job.spec.model_copy(update={"topology": topology})})
    world.vanish("circles-a1-n1")
    hear(world, step=6, waiting=True)
    world.settle()
    assert world.job.status.attempts[-1].nodes is None


# -- spot -------------------------------------------------------------------------------------------------------------

FALLBACK = {"recovery": {"spot": {"fallbackAfter": "10m"}}}


def spot_world() -> World:
    job = make_job(training={"method": "LoRA", "steps": 100_000}, **FALLBACK)
    world = World(job, settings=HOLDING)
    world.settle()
    place(world, 0)
    return world


def affinity(world: World, name: str) -> dict[str, Any]:
    found: dict[str, Any] = world.made[name]["spec"]["affinity"]["nodeAffinity"]
    return found


def fallen_back() -> World:
    world = spot_world()
    world.tick(600)
    hear(world)
    world.settle()
    world.settle()
    return world


def test_it_waits_for_spot_nodes_first() -> None:
    world = spot_world()
    world.tick(599)
    hear(world)
    world.settle()
    assert world.job.status.attempt == 1
    assert list(affinity(world, "circles-a1-n1")) == ["requiredDuringSchedulingIgnoredDuringExecution"]


def test_then_it_takes_any_node_for_the_pod_that_has_none() -> None:
    world = fallen_back()
    first, second = world.job.status.attempts
    assert (first.reason, second.capacity) == (Reason.FELL_BACK, Capacity.ANY)
    assert sorted(world.pods) == ["circles-a1-n0", "circles-a2-n1"]
    assert list(affinity(world, "circles-a2-n1")) == ["preferredDuringSchedulingIgnoredDuringExecution"]


def test_it_goes_back_when_a_spot_node_is_there() -> None:
    world = fallen_back()
    place(world, 1)
    hear(world, step=5)
    world.settle()
    standby = world.pods["circles-a2-n2"]
    assert list(affinity(world, standby.name)) == ["requiredDuringSchedulingIgnoredDuringExecution"]
    place(world, 2)
    world.tick(120)
    hear(world, step=100)
    world.settle()
    assert world.job.status.attempts[-1].reason == Reason.BACK_TO_SPOT
    hear(world, step=101, waiting=True)
    world.settle()
    world.tick(2)
    hear(world, step=101, waiting=True)
    world.settle()
    entry = world.job.status.attempts[-1]
    assert (entry.attempt, entry.pod_attempts, entry.pod_ranks) == (3, (1, 2), (0, 2))
    assert sorted(world.pods) == ["circles-a1-n0", "circles-a2-n2"]


def test_a_pod_that_stands_by_may_fall_back_as_well() -> None:
    world = shrunk(**FALLBACK)
    world.tick(600)
    hear(world, step=500)
    world.settle()
    assert list(affinity(world, "circles-a2-n3")) == ["preferredDuringSchedulingIgnoredDuringExecution"]
    assert world.job.status.attempt == 2


@pytest.mark.parametrize("change", [{"deleted_at": World().now, "grace": seconds(30)}, {"disruption": "Preempting"}])
def test_a_pod_that_is_about_to_go_is_nothing_to_grow_with(change: dict[str, Any]) -> None:
    world = shrunk()
    place(world, 3)
    world.change(3, **change)
    world.tick(120)
    hear(world, step=100)
    world.settle()
    assert world.job.status.attempts[-1].reason is None


# -- losses -----------------------------------------------------------------------------------------------------------


def full_world(**recovery: Any) -> World:
    world = elastic_world(HOLDING, recovery={"shrinkAfter": "5s", **recovery})
    world.settle()
    place(world, 0, 1, 2, 3)
    hear(world, step=50)
    world.settle()
    return world


def save_after_notice(world: World, seconds_of_save: float) -> None:
    """Pod 3 gets notice; all save and wait, and its own ranks have ended, too. Its pod is still there."""
    world.change(3, disruption="TerminationByKubelet", deleted_at=world.now, grace=seconds(30))
    world.settle()
    world.tick(seconds_of_save)
    hear(world, step=51, waiting=True)
    saved = RankEnd(rank=3, exit_code=ExitCode.SAVED)
    world.beat(3, RankState.SAVED, step=51, notice=True, ends=(saved,))
    world.settle()


def test_a_save_that_took_as_long_as_the_patience_is_followed_by_the_survivors_at_once() -> None:
    world = full_world()
    save_after_notice(world, 6)
    entry = world.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes, entry.pod_attempts) == (2, 3, (1, 1, 1))
    # Nobody waits for the pod that leaves; the one that is to replace it does.
    assert "circles-a1-n3" in world.pods
    assert "circles-a2-n3" not in world.pods


def test_with_more_patience_the_lost_pod_is_replaced_once_it_has_gone() -> None:
    world = full_world(shrinkAfter="60s")
    save_after_notice(world, 6)
    assert world.job.status.attempt == 1
    world.vanish("circles-a1-n3")
    hear(world, step=51, waiting=True)
    world.settle()
    entry = world.job.status.attempts[-1]
    assert (entry.attempt, entry.nodes, entry.pod_attempts) == (2, None, (1, 1, 1, 2))


def test_patience_counts_from_the_loss() -> None:
    world = full_world(shrinkAfter="60s")
    lost_at = world.now
    save_after_notice(world, 6)
    world.vanish("circles-a1-n3")
    hear(world, step=51, waiting=True)
    world.settle()
    world.now = lost_at + seconds(60)
    hear(world, step=51, waiting=True)
    world.settle()
    assert [entry.reason for entry in world.job.status.attempts[:2]] == [Reason.TERMINATION_BY_KUBELET, Reason.SHRUNK]


def test_a_machine_that_is_lost_while_all_save_to_grow_counts_as_lost() -> None:
    world = shrunk()
    place(world, 3)
    world.tick(120)
    hear(world, step=100)
    world.settle()
    assert world.job.status.attempts[-1].reason == Reason.GROWN
    name = "circles-a1-n1"
    world.pods[name] = replace(world.pods[name], disruption="TerminationByKubelet", deleted_at=world.now)
    world.settle()
    entry = world.job.status.attempts[-1]
    assert (entry.reason, entry.pod, world.job.status.preemptions) == (Reason.TERMINATION_BY_KUBELET, name, 1)
    world.settle()
    assert world.job.status.preemptions == 1
