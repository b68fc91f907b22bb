"""When an attempt is marked as ended, when its cause is believed, and that each end counts once."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api.job import AttemptStatus
from finetune_operator.api.reasons import Reason
from tests.plan.harness import World, last_words


def entry_of(world: World) -> AttemptStatus:
    return world.job.status.attempts[-1]


def test_a_cause_is_written_when_first_seen() -> None:
    world = World().running()
    world.tick(5)
    world.exit(1, 1, termination=last_words(1, 1, "boom", rank=1, step=12))
    world.step()
    entry = entry_of(world)
    assert entry.ended_at == world.now
    assert (entry.reason, entry.counts_as, entry.exit_code) == (Reason.PROCESS_FAILED, "Failure", 1)
    assert (entry.rank, entry.pod, entry.node, entry.message) == (1, "circles-a1-n1", "node-1", "boom")
    assert entry.to_step == 12
    assert world.job.status.failures == 1


def test_a_lost_peer_waits_for_its_cause_and_deletes_nothing() -> None:
    world = World().running()
    world.exit(0, ExitCode.FABRIC)
    decided = world.step()
    assert entry_of(world).ended_at == world.now
    assert entry_of(world).reason is None
    assert world.job.status.failures == 0
    assert decided.actions == ()
    assert decided.requeue_after is not None
    world.tick(3)
    world.vanish("circles-a1-n1")
    world.step()
    assert entry_of(world).reason == Reason.POD_LOST
    assert (world.job.status.preemptions, world.job.status.failures) == (1, 0)
    assert (world.now - entry_of(world).ended_at).total_seconds() == 3  # type: ignore[operator]


def test_a_lost_peer_without_a_cause_is_the_fabrics_fault_in_the_end() -> None:
    world = World().running()
    world.exit(0, ExitCode.FABRIC)
    decided = world.step()
    assert decided.requeue_after is not None
    world.tick(decided.requeue_after.total_seconds())
    world.beat(1)
    world.step()
    assert entry_of(world).reason == Reason.FABRIC_ERROR
    assert world.job.status.failures == 1


def test_a_peer_that_fell_silent_is_lost_with_its_node() -> None:
    world = World().running()
    world.beat_all()
    world.tick(1)
    world.exit(0, ExitCode.FABRIC)
    world.step()
    world.tick(world.settings.cause_seconds)
    world.step()
    entry = entry_of(world)
    assert (entry.reason, entry.pod, entry.node) == (Reason.NODE_LOST, "circles-a1-n1", "node-1")
    assert (world.job.status.preemptions, world.job.status.failures) == (1, 0)


def test_nobody_is_waited_for_once_all_pods_have_ended() -> None:
    world = World().running()
    world.exit(0, ExitCode.FABRIC)
    world.exit(1, ExitCode.FABRIC)
    world.step()
    assert entry_of(world).reason == Reason.FABRIC_ERROR


def test_a_sign_whose_pod_vanished_from_an_incomplete_gang_still_ends_the_attempt() -> None:
    world = World().created()
    world.hidden.add(world.pod(1).uid)
    world.run_all()
    world.step()
    world.exit(0, ExitCode.FABRIC)
    world.step()
    world.vanish("circles-a1-n0")
    world.step()
    assert world.job.status.attempts[0].reason == Reason.POD_LOST


@pytest.mark.parametrize("num_passes", [1, 2, 5])
def test_an_end_counts_once(num_passes: int) -> None:
    """An eviction is seen as a disruption, as an exit code and as a pod that is gone: one end."""
    world = World().running()
    world.change(1, disruption="EvictionByEvictionAPI", deleted_at=world.now)
    for _ in range(num_passes):
        world.step()
    world.exit(1, 143)
    for _ in range(num_passes):
        world.step()
    world.pods.clear()
    world.settle()
    assert world.job.status.preemptions == 1
    assert world.job.status.failures == 0
    assert world.job.status.attempt == 2
    assert world.reasons().count("EvictionByEvictionAPI") == 1
