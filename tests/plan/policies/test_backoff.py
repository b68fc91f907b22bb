"""Delays between attempts: doubled with each failure, limited, and none after a preemption."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.backoff import delay, jitter
from finetune_operator.settings import Settings
from tests.plan.fake_cluster import FakeCluster, last_words, make_job, seconds


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


def test_outages_delay_the_next_attempt_and_spend_no_failures() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 0}))
    waits = []
    for attempt in range(1, 8):
        cluster.running()
        for rank in (0, 1):
            cluster.exit(rank, ExitCode.NETWORK, termination=last_words(attempt, ExitCode.NETWORK, "429", rank=rank))
        cluster.step()
        decided = cluster.settle()
        status = cluster.job.status
        assert (status.failures, status.preemptions, status.phase) == (0, 0, Phase.RECOVERING)
        assert "429" in (status.message or "")
        assert decided.requeue_after is not None
        waits.append(decided.requeue_after.total_seconds())
        # The nodes are free while the job waits.
        assert not cluster.pods
        cluster.tick(waits[-1])
        cluster.settle()
        assert cluster.job.status.attempt == attempt + 1
    expected = [10, 20, 40, 80, 160, 300, 300]
    assert all(0.8 * limit <= wait <= 1.2 * limit for wait, limit in zip(waits, expected, strict=True))
