"""Conditions: True in their phases; the transition time changes only with the status."""

from __future__ import annotations

from finetune_contract.heartbeat import CommittedCheckpoint
from finetune_operator.api.conditions import ConditionType
from finetune_operator.plan.model.conditions import find, is_true
from tests.plan.fake_cluster import FakeCluster, make_job


def true_conditions(cluster: FakeCluster) -> set[str]:
    cluster.settle()
    return {condition.type for condition in cluster.job.status.conditions if condition.status == "True"}


def test_conditions_of_a_job_with_one_preemption() -> None:
    cluster = FakeCluster()
    assert true_conditions(cluster) == {"Accepted"}
    cluster.running().train_to(10)
    assert true_conditions(cluster) == {"Accepted", "Running"}
    cluster.tick(1)
    cluster.pods.clear()
    assert true_conditions(cluster) == {"Accepted", "Recovering"}
    cluster.running().train_to(11, from_step=10)
    assert true_conditions(cluster) == {"Accepted", "Running"}
    for rank in (0, 1):
        cluster.exit(rank, 0)
    assert true_conditions(cluster) == {"Accepted", "Complete", "Succeeded"}


def test_conditions_that_never_were_true_are_omitted() -> None:
    cluster = FakeCluster()
    cluster.settle()
    assert [condition.type for condition in cluster.job.status.conditions] == ["Accepted"]


def test_transition_time_is_the_time_of_the_change() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(1)
    cluster.settle()
    began = cluster.now
    for step in range(2, 5):
        cluster.tick(5)
        cluster.train_to(step)
        cluster.settle()
    running = find(cluster.job.status, ConditionType.RUNNING)
    assert running is not None
    assert running.last_transition_time == began
    cluster.tick(5)
    cluster.pods.clear()
    cluster.settle()
    ended = find(cluster.job.status, ConditionType.RUNNING)
    assert ended is not None
    assert (ended.status, ended.last_transition_time) == ("False", cluster.now)
    assert not is_true(cluster.job.status, ConditionType.RUNNING)


def test_condition_has_reason_message_and_generation() -> None:
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    complete = find(cluster.job.status, ConditionType.COMPLETE)
    assert complete is not None
    assert (complete.reason, complete.observed_generation) == ("Finished", 1)
    assert complete.message


def saved(cluster: FakeCluster, save_seconds: float, step: int) -> None:
    checkpoint = CommittedCheckpoint(
        step=step, time=0, size_bytes=1, attempt=1, durable_seconds=save_seconds, interval_seconds=90.0
    )
    cluster.beat(0, step=step, restored_step=0, checkpoint=checkpoint)
    cluster.settle()


def test_too_short_notice_is_reported_once() -> None:
    cluster = FakeCluster(make_job(recovery={"noticeSeconds": 30})).running()
    saved(cluster, 3, 10)
    assert find(cluster.job.status, ConditionType.NOTICE_TOO_SHORT) is None
    for step in (20, 30):
        saved(cluster, 45 + step / 10, step)
    condition = find(cluster.job.status, ConditionType.NOTICE_TOO_SHORT)
    assert condition is not None
    assert condition.status == "True"
    assert condition.message == "a step and a save took 47 s; recovery.noticeSeconds is 30 s"
    assert cluster.reasons().count("SaveTakesLonger") == 1
    saved(cluster, 3, 40)
    condition = find(cluster.job.status, ConditionType.NOTICE_TOO_SHORT)
    assert condition is not None
    assert condition.status == "False"


def test_checkpoint_interval_is_recorded() -> None:
    cluster = FakeCluster().running()
    saved(cluster, 3, 10)
    assert cluster.job.status.checkpoint_interval_seconds == 90
    assert cluster.job.status.last_checkpoint is not None
    assert cluster.job.status.last_checkpoint.save_seconds == 3
