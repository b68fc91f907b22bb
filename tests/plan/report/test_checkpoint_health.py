"""Checkpoint health: the condition CheckpointStale, damaged checkpoints and the cost of a save."""

from __future__ import annotations

from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.conditions import find, is_true
from tests.plan.fake_cluster import FakeCluster

STALE = ConditionType.CHECKPOINT_STALE
FULL = "checkpoint storage: No space left on device"


def test_condition_is_true_while_checkpoints_cannot_be_written() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(step=10)
    cluster.settle()
    assert find(cluster.job.status, STALE) is None
    cluster.beat(0, step=12, checkpoint_error=FULL)
    cluster.settle()
    condition = find(cluster.job.status, STALE)
    assert condition is not None
    assert (condition.status, condition.reason, condition.message) == ("True", Reason.CHECKPOINT_STALE, FULL)
    # Without a report the condition does not change.
    cluster.beats.clear()
    cluster.settle()
    assert is_true(cluster.job.status, STALE)
    cluster.beat(0, step=14, checkpoint_error="")
    cluster.settle()
    condition = find(cluster.job.status, STALE)
    assert condition is not None
    assert (condition.status, condition.reason) == ("False", Reason.CHECKPOINT_WRITTEN)


def test_damaged_checkpoints_are_counted_once() -> None:
    cluster = FakeCluster().running()
    cluster.beat(0, step=1, corrupt_checkpoints=2)
    cluster.settle()
    assert cluster.job.status.corrupt_checkpoints == 2
    cluster.beat(0, step=2)
    cluster.settle()
    assert cluster.job.status.corrupt_checkpoints == 2


def test_cost_of_a_save_is_recorded() -> None:
    cluster = FakeCluster().running()
    committed = CommittedCheckpoint(
        step=5, time=cluster.now.timestamp(), size_bytes=10, attempt=1, stall_seconds=0.00123456, durable_seconds=1.5
    )
    cluster.beat(0, step=6, checkpoint=committed)
    cluster.settle()
    checkpoint = cluster.job.status.last_checkpoint
    assert checkpoint is not None
    assert (checkpoint.stall_seconds, checkpoint.save_seconds) == (0.001235, 1.5)
