"""A lost peer whose machine turns out to be lost: put right in the ledger, without having waited for it."""

from __future__ import annotations

from dataclasses import replace

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import ObservedNode
from tests.plan.fake_cluster import FakeCluster, make_job


def failed_fabric(max_failures: int = 3) -> FakeCluster:
    """Rank 0 lost its peer; rank 1's pod has just beaten, and nobody says anything."""
    cluster = FakeCluster(make_job(recovery={"maxFailures": max_failures})).running()
    cluster.beat_all()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.step()
    cluster.tick(cluster.settings.cause_seconds)
    cluster.beat(1)
    cluster.step()
    assert cluster.job.status.attempts[0].reason == Reason.FABRIC_ERROR
    return cluster


def hear_of_node(cluster: FakeCluster) -> None:
    """The control plane misses the node of rank 1."""
    observed = replace(cluster.observed(), nodes={"node-1": ObservedNode(lost=True)})
    cluster.job = cluster.job.model_copy(
        update={"status": plan(cluster.job, observed, cluster.now, cluster.settings).status}
    )


def test_the_restart_does_not_wait_and_the_ledger_is_put_right() -> None:
    cluster = failed_fabric()
    assert cluster.job.status.failures == 1
    cluster.tick(20)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    cluster.tick(20)
    hear_of_node(cluster)
    status = cluster.job.status
    assert (status.preemptions, status.failures, status.tally.failures_since_checkpoint) == (1, 0, 0)
    first = status.attempts[0]
    assert (first.reason, first.node, first.rank) == (Reason.NODE_LOST, "node-1", 1)


def test_a_job_whose_budget_is_spent_waits_for_the_word_of_its_nodes() -> None:
    cluster = failed_fabric(max_failures=0)
    assert cluster.job.status.phase is Phase.RECOVERING
    cluster.tick(30)
    cluster.settle()
    assert (cluster.job.status.attempt, cluster.job.status.phase) == (1, Phase.RECOVERING)
    hear_of_node(cluster)
    assert cluster.job.status.preemptions == 1
    cluster.settle()
    assert cluster.job.status.attempt == 2


def test_and_fails_where_none_comes() -> None:
    cluster = failed_fabric(max_failures=0)
    decided = cluster.settle()
    assert decided.requeue_after is not None
    cluster.tick(60)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == (Phase.FAILED, Reason.MAX_FAILURES_EXCEEDED)


def test_a_node_that_is_lost_much_later_is_another_matter() -> None:
    cluster = failed_fabric()
    cluster.tick(3600)
    hear_of_node(cluster)
    assert cluster.job.status.failures == 1


def test_a_pod_that_is_gone_is_named_with_its_node() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    cluster.step()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node) == (Reason.POD_LOST, "node-1")
    assert entry.pod_nodes is None
