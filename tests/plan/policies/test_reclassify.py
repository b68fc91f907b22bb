"""A network failure becomes a preemption when a node proves to be lost; the restart does not wait for that."""

from __future__ import annotations

from dataclasses import replace

from finetune_contract.exit_codes import ExitCode
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from finetune_operator.plan import plan
from finetune_operator.plan.model.types import ObservedNode
from tests.plan.fake_cluster import FakeCluster, make_job


def failed_fabric(max_failures: int = 3) -> FakeCluster:
    """Return a job whose rank 0 lost its peer, while the pod of rank 1 still sends heartbeats."""
    cluster = FakeCluster(make_job(recovery={"maxFailures": max_failures})).running()
    cluster.beat_all()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.step()
    cluster.tick(cluster.settings.cause_seconds)
    cluster.beat(1)
    cluster.step()
    assert cluster.job.status.attempts[0].reason == Reason.FABRIC_ERROR
    return cluster


def lose_node(cluster: FakeCluster) -> None:
    """Let the control plane mark the node of rank 1 as lost."""
    observed = replace(cluster.observed(), nodes={"node-1": ObservedNode(lost=True)})
    cluster.job = cluster.job.model_copy(
        update={"status": plan(cluster.job, observed, cluster.now, cluster.settings).status}
    )


def test_restart_does_not_wait_and_ledger_is_corrected() -> None:
    cluster = failed_fabric()
    assert cluster.job.status.failures == 1
    cluster.tick(20)
    cluster.settle()
    assert cluster.job.status.attempt == 2
    cluster.tick(20)
    lose_node(cluster)
    status = cluster.job.status
    assert (status.preemptions, status.failures, status.tally.failures_since_checkpoint) == (1, 0, 0)
    first = status.attempts[0]
    assert (first.reason, first.node, first.rank) == (Reason.NODE_LOST, "node-1", 1)


def test_job_without_failures_left_waits_for_the_state_of_its_nodes() -> None:
    cluster = failed_fabric(max_failures=0)
    assert cluster.job.status.phase is Phase.RECOVERING
    cluster.tick(30)
    cluster.settle()
    assert (cluster.job.status.attempt, cluster.job.status.phase) == (1, Phase.RECOVERING)
    lose_node(cluster)
    assert cluster.job.status.preemptions == 1
    cluster.settle()
    assert cluster.job.status.attempt == 2


def test_job_without_failures_left_fails_if_no_node_is_lost() -> None:
    cluster = failed_fabric(max_failures=0)
    decided = cluster.settle()
    assert decided.requeue_after is not None
    cluster.tick(60)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == (Phase.FAILED, Reason.MAX_FAILURES_EXCEEDED)


def test_node_lost_much_later_does_not_reclassify() -> None:
    cluster = failed_fabric()
    cluster.tick(3600)
    lose_node(cluster)
    assert cluster.job.status.failures == 1


def test_missing_pod_is_recorded_with_its_node() -> None:
    cluster = FakeCluster().running()
    cluster.vanish("circles-a1-n1")
    cluster.step()
    entry = cluster.job.status.attempts[0]
    assert (entry.reason, entry.node) == (Reason.POD_LOST, "node-1")
    assert entry.pod_nodes is None
