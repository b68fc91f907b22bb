"""Success: every node has done all that was asked, by its pod's word or by its last beat."""

from __future__ import annotations

from finetune_contract.heartbeat import WrittenOutput
from finetune_contract.phase import Phase
from finetune_operator.api.reasons import Reason
from tests.plan.harness import RankState, World


def test_all_pods_succeeded() -> None:
    world = World().running()
    world.train_to(100)
    world.settle()
    world.tick(1)
    world.exit(0, 0)
    world.settle()
    assert world.job.status.phase is not Phase.SUCCEEDED
    world.exit(1, 0)
    world.settle()
    status = world.job.status
    assert (status.phase, status.reason, status.progress, status.eta) == (
        Phase.SUCCEEDED,
        Reason.FINISHED,
        "100%",
        None,
    )
    assert status.completion_time == world.now
    assert status.attempts[-1].reason == Reason.FINISHED
    assert (status.preemptions, status.failures) == (0, 0)
    assert world.reasons()[-1] == "Finished"


def test_a_pod_that_vanished_after_its_ranks_were_done_is_not_lost() -> None:
    world = World().running()
    world.train_to(100)
    world.beat_all(RankState.DONE, step=100)
    beats = dict(world.beats)
    world.exit(0, 0)
    world.vanish("circles-a1-n1")
    world.beats = beats
    world.settle()
    assert world.job.status.phase is Phase.SUCCEEDED


def test_a_done_beat_does_not_outweigh_a_failed_pod() -> None:
    world = World().running()
    world.beat_all(RankState.DONE, step=100)
    world.exit(0, 0)
    world.exit(1, 74)
    world.step()
    assert world.job.status.phase is not Phase.SUCCEEDED
    assert world.job.status.failures == 1


def test_what_the_last_beats_bring_is_kept() -> None:
    world = World().running()
    output = WrittenOutput(format="diffusers", to="/out", size_bytes=10)
    world.beat_all(RankState.DONE, step=100, outputs=(output,))
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    assert len(world.job.status.outputs) == 1
    assert world.job.status.step == 100


def test_nothing_of_a_finished_job_changes_any_more() -> None:
    world = World().running()
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    before = world.job.status
    world.pods.clear()
    world.tick(1e6)
    decided = world.settle()
    assert decided.status == before
    assert (decided.actions, decided.events, decided.requeue_after) == ((), (), None)


def test_the_message_says_what_it_cost() -> None:
    world = World().running()
    world.train_to(45, checkpoint=40)
    world.settle()
    world.pods.clear()
    world.running()
    world.train_to(100, from_step=40)
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    assert world.job.status.message == "100 steps trained in 2 attempts; 5 steps done twice"


def test_a_last_beat_that_comes_late_still_tells_of_the_outputs() -> None:
    world = World().running()
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    world.beat(0, RankState.DONE, outputs=(WrittenOutput(format="diffusers", to="/out", size_bytes=10),))
    world.settle()
    assert world.job.status.phase is Phase.SUCCEEDED
    assert len(world.job.status.outputs) == 1


def test_a_sidecar_does_not_keep_the_job_running() -> None:
    """The trainer's container has ended; the pod still runs, for its sidecar does. The pods go with the job's end."""
    world = World().running()
    for rank in (0, 1):
        world.change(rank, exit_code=0)
    world.step()
    assert world.job.status.phase is Phase.SUCCEEDED
    assert all(pod.deleted_at is not None for pod in world.pods.values())
