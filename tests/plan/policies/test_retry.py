"""A Failed job continues after one edit, from its last checkpoint and with a full budget of failures."""

from __future__ import annotations

import re

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.conditions import ConditionType
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.conditions import is_true
from finetune_operator.plan.model.types import Create
from tests.plan.fake_cluster import FakeCluster, last_words, make_job


def edit(cluster: FakeCluster, **recovery: object) -> None:
    spec = cluster.job.spec
    edited = spec.model_copy(update={"recovery": spec.recovery.model_copy(update=recovery)})
    cluster.job = cluster.job.model_copy(update={"spec": edited})


def failed(code: int, job: FineTuneJob | None = None) -> FakeCluster:
    """Return a job that has trained to step 40, with a checkpoint, and then Failed."""
    cluster = FakeCluster(job or make_job(recovery={"maxFailures": 0})).running()
    cluster.train_to(40, checkpoint=30)
    cluster.step()
    for rank in (0, 1):
        cluster.exit(rank, code, termination=last_words(1, code, "wrong", rank=rank, step=40))
    cluster.step()
    cluster.settle()
    assert cluster.job.status.phase is Phase.FAILED
    return cluster


@pytest.mark.parametrize("code", [1, ExitCode.CONFIG, ExitCode.DATA])
def test_the_edit_that_the_message_names_continues_the_job(code: int) -> None:
    cluster = failed(code)
    cluster.tick(5000)
    found = re.search(r"set spec\.recovery\.manualRetries to (\d+)", cluster.job.status.message or "")
    assert found is not None
    edit(cluster, manual_retries=int(found[1]))
    cluster.settle()
    cluster.running()
    status = cluster.job.status
    assert (status.phase, status.attempt, status.completion_time) == (Phase.RECOVERING, 2, None)
    assert not is_true(status, ConditionType.FAILED)
    cluster.train_to(41, from_step=30)
    cluster.step()
    assert cluster.job.status.phase is Phase.RUNNING
    assert cluster.job.status.last_checkpoint is not None
    assert cluster.job.status.last_checkpoint.step == 30


def test_the_budget_is_full_again_and_the_next_failure_needs_another_edit() -> None:
    cluster = failed(1)
    cluster.tick(400)
    edit(cluster, manual_retries=1)
    cluster.settle()
    cluster.running()
    cluster.exit(0, 1, termination=last_words(2, 1, "wrong again"))
    cluster.exit(1, 1)
    cluster.step()
    cluster.settle()
    status = cluster.job.status
    assert (status.phase, status.reason, status.failures) == (Phase.FAILED, Reason.MAX_FAILURES_EXCEEDED, 2)
    assert "manualRetries to 2" in (status.message or "")
    assert not any(isinstance(action, Create) for action in cluster.settle().actions)


def test_the_same_step_may_fail_again() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 100}))
    for attempt in range(1, 4):
        cluster.running()
        cluster.train_to(40)
        cluster.step()
        cluster.exit(1, 1, termination=last_words(attempt, 1, "wrong", rank=1, step=40))
        cluster.step()
        cluster.tick(400)
        cluster.step()
    assert cluster.job.status.reason == Reason.SAME_STEP_FAILURES
    edit(cluster, manual_retries=1)
    cluster.settle()
    assert cluster.job.status.attempt == 4


def test_a_number_that_is_raised_while_the_job_trains_does_nothing() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 0, "manualRetries": 3})).running()
    edit(cluster, manual_retries=4)
    cluster.step()
    assert cluster.job.status.attempt == 1
    cluster.exit(0, 1)
    cluster.exit(1, 1)
    cluster.step()
    cluster.settle()
    assert cluster.job.status.phase is Phase.FAILED
    assert "manualRetries to 5" in (cluster.job.status.message or "")


@pytest.mark.parametrize(("limit", "continues"), [(60, False), (61, True), (None, True)])
def test_a_higher_deadline_continues_a_job_and_the_time_since_its_failure_does_not_count(
    limit: int | None, continues: bool
) -> None:
    cluster = FakeCluster(make_job(activeDeadlineSeconds=60)).running()
    cluster.tick(60)
    cluster.step()
    assert cluster.job.status.reason == Reason.DEADLINE_EXCEEDED
    assert "Raise spec.activeDeadlineSeconds" in (cluster.job.status.message or "")
    cluster.pods.clear()
    cluster.tick(1000)
    spec = cluster.job.spec.model_copy(update={"active_deadline_seconds": limit})
    cluster.job = cluster.job.model_copy(update={"spec": spec})
    cluster.settle()
    assert (cluster.job.status.phase is not Phase.FAILED) == continues
    assert (cluster.job.status.attempt == 2) == continues


def test_succeeded_job_stays() -> None:
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.step()
    cluster.settle()
    edit(cluster, manual_retries=1)
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
