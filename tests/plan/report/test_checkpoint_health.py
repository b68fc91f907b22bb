"""The condition CheckpointStale: what the ranks say of checkpoints that cannot be written."""

from __future__ import annotations

from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.conditions import find, is_true
from tests.plan.harness import World

STALE = ConditionType.CHECKPOINT_STALE
FULL = "checkpoint storage: No space left on device"


def test_it_holds_while_nothing_can_be_written() -> None:
    world = World().running()
    world.beat_all(step=10)
    world.settle()
    assert find(world.job.status, STALE) is None
    world.beat(0, step=12, checkpoint_error=FULL)
    world.settle()
    condition = find(world.job.status, STALE)
    assert condition is not None
    assert (condition.status, condition.reason, condition.message) == ("True", Reason.CHECKPOINT_STALE, FULL)
    # Nobody speaks of it: it stays as it was.
    world.beats.clear()
    world.settle()
    assert is_true(world.job.status, STALE)
    world.beat(0, step=14, checkpoint_error="")
    world.settle()
    condition = find(world.job.status, STALE)
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", Reason.CHECKPOINT_WRITTEN)


def test_damaged_checkpoints_are_counted_once() -> None:
    world = World().running()
    world.beat(0, step=1, corrupt_checkpoints=2)
    world.settle()
    assert world.job.status.corrupt_checkpoints == 2
    world.beat(0, step=2)
    world.settle()
    assert world.job.status.corrupt_checkpoints == 2


def test_the_cost_of_a_save_is_shown() -> None:
    world = World().running()
    committed = CommittedCheckpoint(
        step=5, time=world.now.timestamp(), size_bytes=10, attempt=1, stall_seconds=0.00123456, durable_seconds=1.5
    )
    world.beat(0, step=6, checkpoint=committed)
    world.settle()
    checkpoint = world.job.status.last_checkpoint
    assert checkpoint is not None
    assert (checkpoint.stall_seconds, checkpoint.save_seconds) == (0.001235, 1.5)
