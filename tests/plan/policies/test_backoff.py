"""Delays between attempts: doubled with each failure, limited, and none after a preemption."""

from __future__ import annotations

import pytest

from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.backoff import delay, jitter
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import FakeCluster, seconds


@pytest.mark.parametrize(
    ("num_failures", "wait_seconds"),
    [(0, 10), (1, 10), (2, 20), (3, 40), (4, 80), (5, 160), (6, 300), (7, 300), (1000, 300)],
)
def test_delay_doubles_up_to_the_limit(num_failures: int, wait_seconds: int) -> None:
    assert delay(num_failures, Settings()) == seconds(wait_seconds)


def test_next_attempt_waits_and_message_contains_the_time() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, 1)
    cluster.exit(1, 1)
    cluster.step()
    decided = cluster.settle()
    assert cluster.job.status.attempt == 1
    assert cluster.job.status.reason == Reason.BACK_OFF
    wait = decided.requeue_after
    assert wait is not None
    assert seconds(8) <= wait <= seconds(12)
    assert f"{cluster.now + wait:%H:%M:%S}" in (cluster.job.status.message or "")
    cluster.tick(wait.total_seconds() - 0.1)
    cluster.settle()
    assert cluster.job.status.attempt == 1
    cluster.tick(0.1)
    cluster.settle()
    assert cluster.job.status.attempt == 2


def test_jitter_spreads_jobs_and_is_reproducible() -> None:
    factors = {jitter(f"uid-{number}", 1) for number in range(100)}
    assert len(factors) == 100
    assert 0.8 <= min(factors) < 0.85
    assert 1.15 < max(factors) <= 1.2
    assert jitter("uid-1", 1) == jitter("uid-1", 1) != jitter("uid-1", 2)


def test_no_delay_after_preemption() -> None:
    cluster = FakeCluster().running()
    cluster.pods.clear()
    cluster.step()
    assert cluster.job.status.attempt == 2
