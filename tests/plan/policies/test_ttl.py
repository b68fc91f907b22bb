"""ttlSecondsAfterFinished deletes a finished job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.plan.model.types import DeleteJob
from tests.plan.fake_cluster import SETTINGS, FakeCluster, make_job, seconds


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.CONFIG])
def test_finished_job_is_deleted_when_its_ttl_expires(code: int) -> None:
    cluster = FakeCluster(make_job(ttlSecondsAfterFinished=30)).running()
    for rank in (0, 1):
        cluster.exit(rank, code)
    assert cluster.step().requeue_after == seconds(30)
    cluster.tick(29)
    cluster.step()
    assert not cluster.deleted
    cluster.tick(1)
    assert DeleteJob() in cluster.step().actions


def test_ttl_of_zero_deletes_at_once() -> None:
    cluster = FakeCluster(make_job(ttlSecondsAfterFinished=0)).running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.step()
    assert cluster.deleted


def test_job_without_ttl_stays() -> None:
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.step()
    cluster.tick(1e6)
    assert cluster.step().actions == ()


def test_running_job_stays() -> None:
    settings = replace(SETTINGS, coordinator_url="")
    cluster = FakeCluster(make_job(ttlSecondsAfterFinished=0), settings=settings).running()
    assert cluster.settle().requeue_after is None
