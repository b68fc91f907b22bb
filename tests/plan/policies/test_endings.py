"""An attempt is marked as ended, its cause is recorded, and each end counts once."""

from __future__ import annotations

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_operator.api.reasons import Reason
from finetune_operator.api.status import AttemptStatus
from tests.plan.fake_cluster import FakeCluster, last_words


def entry_of(cluster: FakeCluster) -> AttemptStatus:
    return cluster.job.status.attempts[-1]


def test_certain_cause_is_recorded_at_once() -> None:
    cluster = FakeCluster().running()
    cluster.tick(5)
    cluster.exit(1, 1, termination=last_words(1, 1, "boom", rank=1, step=12))
    cluster.step()
    entry = entry_of(cluster)
    assert entry.ended_at == cluster.now
    assert (entry.reason, entry.counts_as, entry.exit_code) == (Reason.PROCESS_FAILED, "Failure", 1)
    assert (entry.rank, entry.pod, entry.node, entry.message) == (1, "circles-a1-n1", "node-1", "boom")
    assert entry.to_step == 12
    assert cluster.job.status.failures == 1


def test_lost_peer_waits_for_its_cause_and_deletes_nothing() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, ExitCode.FABRIC)
    decided = cluster.step()
    assert entry_of(cluster).ended_at == cluster.now
    assert entry_of(cluster).reason is None
    assert cluster.job.status.failures == 0
    assert decided.actions == ()
    assert decided.requeue_after is not None
    cluster.tick(3)
    cluster.vanish("circles-a1-n1")
    cluster.step()
    assert entry_of(cluster).reason == Reason.POD_LOST
    assert (cluster.job.status.preemptions, cluster.job.status.failures) == (1, 0)
    assert (cluster.now - entry_of(cluster).ended_at).total_seconds() == 3  # type: ignore[operator]


def test_lost_peer_without_another_cause_becomes_a_fabric_error() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, ExitCode.FABRIC)
    decided = cluster.step()
    assert decided.requeue_after is not None
    cluster.tick(decided.requeue_after.total_seconds())
    cluster.beat(1)
    cluster.step()
    assert entry_of(cluster).reason == Reason.FABRIC_ERROR
    assert cluster.job.status.failures == 1


def test_silent_peer_is_lost_with_its_node() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all()
    cluster.tick(1)
    cluster.exit(0, ExitCode.FABRIC)
    cluster.step()
    cluster.tick(cluster.settings.cause_seconds)
    cluster.step()
    entry = entry_of(cluster)
    assert (entry.reason, entry.pod, entry.node) == (Reason.NODE_LOST, "circles-a1-n1", "node-1")
    assert (cluster.job.status.preemptions, cluster.job.status.failures) == (1, 0)


def test_cause_is_recorded_at_once_when_all_pods_have_ended() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.exit(1, ExitCode.FABRIC)
    cluster.step()
    assert entry_of(cluster).reason == Reason.FABRIC_ERROR


def test_attempt_ends_when_the_failed_pod_of_an_incomplete_gang_disappears() -> None:
    cluster = FakeCluster().created()
    cluster.hidden.add(cluster.pod(1).uid)
    cluster.run_all()
    cluster.step()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.step()
    cluster.vanish("circles-a1-n0")
    cluster.step()
    assert cluster.job.status.attempts[0].reason == Reason.POD_LOST


@pytest.mark.parametrize("num_reconciles", [1, 2, 5])
def test_one_end_counts_once(num_reconciles: int) -> None:
    """An eviction is observed as a disruption, as an exit code and as a missing pod, but is one end."""
    cluster = FakeCluster().running()
    cluster.change(1, disruption="EvictionByEvictionAPI", deleted_at=cluster.now)
    for _ in range(num_reconciles):
        cluster.step()
    cluster.exit(1, 143)
    for _ in range(num_reconciles):
        cluster.step()
    cluster.pods.clear()
    cluster.settle()
    assert cluster.job.status.preemptions == 1
    assert cluster.job.status.failures == 0
    assert cluster.job.status.attempt == 2
    assert cluster.reasons().count("EvictionByEvictionAPI") == 1
