"""Success: every node has done all that was asked, by its pod's word or by its last beat."""

from __future__ import annotations

from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from tests.plan.fake_cluster import FakeCluster, RankState


def test_all_pods_succeeded() -> None:
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


def test_a_pod_that_vanished_after_its_ranks_were_done_is_not_lost() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(100)
    cluster.beat_all(RankState.DONE, step=100)
    beats = dict(cluster.beats)
    cluster.exit(0, 0)
    cluster.vanish("circles-a1-n1")
    cluster.beats = beats
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED


def test_a_done_beat_does_not_outweigh_a_failed_pod() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(RankState.DONE, step=100)
    cluster.exit(0, 0)
    cluster.exit(1, 74)
    cluster.step()
    assert cluster.job.status.phase is not Phase.SUCCEEDED
    assert cluster.job.status.failures == 1


def test_what_the_last_beats_bring_is_kept() -> None:
    cluster = FakeCluster().running()
    output = WrittenOutput(format="diffusers", to="/out", size_bytes=10)
    cluster.beat_all(RankState.DONE, step=100, outputs=(output,))
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert len(cluster.job.status.outputs) == 1
    assert cluster.job.status.step == 100


def test_nothing_of_a_finished_job_changes_any_more() -> None:
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


def test_the_message_says_what_it_cost() -> None:
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


def test_a_last_beat_that_comes_late_still_tells_of_the_outputs() -> None:
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    cluster.beat(0, RankState.DONE, outputs=(WrittenOutput(format="diffusers", to="/out", size_bytes=10),))
    cluster.settle()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert len(cluster.job.status.outputs) == 1


def test_a_sidecar_does_not_keep_the_job_running() -> None:
    """The trainer's container has ended; the pod still runs, for its sidecar does. The pods go with the job's end."""
    cluster = FakeCluster().running()
    for rank in (0, 1):
        cluster.change(rank, exit_code=0)
    cluster.step()
    assert cluster.job.status.phase is Phase.SUCCEEDED
    assert all(pod.deleted_at is not None for pod in cluster.pods.values())
