"""activeDeadlineSeconds limits the time since the first attempt began."""

from __future__ import annotations

import pytest

from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import DeletePod
from tests.plan.fake_cluster import FakeCluster, make_job, seconds


@pytest.mark.parametrize(("at_seconds", "is_over"), [(0, False), (59, False), (60, True), (61, True)])
def test_job_fails_at_the_deadline(at_seconds: int, is_over: bool) -> None:
    cluster = FakeCluster(make_job(activeDeadlineSeconds=60)).running()
    cluster.tick(at_seconds)
    cluster.step()
    assert (cluster.job.status.phase is Phase.FAILED) == is_over


def test_failed_job_deletes_its_pods_with_their_own_grace_period() -> None:
    cluster = FakeCluster(make_job(activeDeadlineSeconds=60)).running()
    assert cluster.decide().requeue_after == seconds(60)
    cluster.tick(60)
    decided = cluster.step()
    status = cluster.job.status
    assert status.reason == Reason.DEADLINE_EXCEEDED
    assert "60 s" in (status.message or "")
    assert [a.grace_seconds for a in decided.actions if isinstance(a, DeletePod)] == [None, None]
    assert (status.failures, status.preemptions) == (0, 0)
    assert cluster.reasons()[-1] == Reason.DEADLINE_EXCEEDED
    assert cluster.step().actions == ()


def test_deadline_includes_all_attempts() -> None:
    cluster = FakeCluster(make_job(activeDeadlineSeconds=60)).running()
    cluster.tick(40)
    cluster.pods.clear()
    cluster.running()
    assert cluster.job.status.attempt == 2
    cluster.tick(20)
    cluster.step()
    assert cluster.job.status.phase is Phase.FAILED
