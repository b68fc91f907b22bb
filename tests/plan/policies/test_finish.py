"""Success: every node is done, according to its pod or to its last heartbeat."""

from __future__ import annotations

from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from tests.plan.fake_cluster import FakeCluster, RankState


def test_job_succeeds_when_all_pods_succeed() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(100)
    cluster.settle()
    cluster.tick(1)
    cluster.exit(0, 0)
    cluster.settle()
    assert cluster.job.status.phase is not Phase.SUCCEEDED
    cluster.exit(1, 0)
    cluster.settle()
    status = cluster.job.status
    assert (status.phase, status.reason, status.progress, status.eta) == (
        Phase.SUCCEEDED,
        Reason.FINISHED,
        "100%",
        None,
    )
    assert status.completion_time == cluster.now
    assert status.attempts[-1].reason == Reason.FINISHED
    assert (status.preemptions, status.failures) == (0, 0)
    assert cluster.reasons()[-1] == "Finished"


def test_pod_deleted_after_its_ranks_were_done_is_not_lost() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(100)
    cluster.beat_all(RankState.DONE, step=100)
    beats = dict(cluster.beats)
    cluster.exit(0, 0)
    cluster.vanish("circles-a1-n1")
    cluster.beats = beats
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED


def test_failed_pod_takes_precedence_over_a_done_heartbeat() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(RankState.DONE, step=100)
    cluster.exit(0, 0)
    cluster.exit(1, 74)
    cluster.step()
    assert cluster.job.status.phase is not Phase.SUCCEEDED
    assert cluster.job.status.failures == 1


def test_last_heartbeats_are_recorded() -> None:
    cluster = FakeCluster().running()
    output = WrittenOutput(format="diffusers", to="/out", size_bytes=10)
    cluster.beat_all(RankState.DONE, step=100, outputs=(output,))
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert len(cluster.job.status.outputs) == 1
    assert cluster.job.status.step == 100


def test_finished_job_does_not_change() -> None:
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    before = cluster.job.status
    cluster.pods.clear()
    cluster.tick(1e6)
    decided = cluster.settle()
    assert decided.status == before
    assert (decided.actions, decided.events, decided.requeue_after) == ((), (), None)


def test_message_contains_attempts_and_repeated_steps() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(45, checkpoint=40)
    cluster.settle()
    cluster.pods.clear()
    cluster.running()
    cluster.train_to(100, from_step=40)
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert cluster.job.status.message == "100 steps trained in 2 attempts; 5 steps repeated"


def test_late_heartbeat_adds_outputs() -> None:
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    cluster.beat(0, RankState.DONE, outputs=(WrittenOutput(format="diffusers", to="/out", size_bytes=10),))
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert len(cluster.job.status.outputs) == 1


def test_running_sidecar_does_not_prevent_success() -> None:
    """The trainer's container has ended, and a sidecar keeps the pod running. The pods are deleted at the end."""
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.change(rank, exit_code=0)
    cluster.step()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert all(pod.deleted_at is not None for pod in cluster.pods.values())
