"""Events: what a person is told, each thing once."""

from __future__ import annotations

from finetune_contract.heartbeat import WrittenOutput
from tests.plan.harness import RankState, World, make_job


def told(world: World) -> list[str]:
    return [f"{event.reason}: {event.message}" for event in world.events]


def test_the_story_of_a_preempted_job() -> None:
    world = World().running()
    world.tick(1)
    world.train_to(0)
    world.settle()
    world.tick(1)
    world.train_to(40, checkpoint=40)
    world.settle()
    world.change(1, disruption="TerminationByKubelet", deleted_at=world.now)
    world.settle()
    world.pods.clear()
    world.beats.clear()
    world.tick(1.2)
    world.running()
    world.tick(2)
    world.train_to(41, from_step=40)
    world.settle()
    world.train_to(100, from_step=40)
    world.beat_all(RankState.EXPORTING, outputs=(WrittenOutput(format="diffusers", to="/out", size_bytes=1),))
    world.settle()
    for rank in (0, 1):
        world.exit(rank, 0)
    world.settle()
    assert told(world) == [
        "Accepted: the spec can be run",
        "AttemptStarted: attempt 1 begins",
        "CheckpointCommitted: first checkpoint, of step 40",
        "TerminationByKubelet: attempt 1 ended at step 40 because of rank 1 (circles-a1-n1 on node-1): "
        "A node ended the pod, because it shuts down or runs short of a resource.",
        "AttemptStarted: attempt 2 begins",
        "Recovered: attempt 2 went on at step 40; 0 steps lost; 3.2 s",
        "OutputWritten: diffusers written to /out",
        "Finished: 100 steps trained in 2 attempts; no steps done twice",
    ]
    assert not any(event.warning for event in world.events)


def test_failures_and_the_trainers_warnings_are_warnings() -> None:
    world = World(make_job(recovery={"maxFailures": 0})).running()
    world.beat(0, warnings=("checkpoint step-40-a1 is corrupt",))
    world.settle()
    world.settle()
    world.exit(1, 1)
    world.settle()
    warnings = [event.reason for event in world.events if event.warning]
    assert warnings == ["TrainerWarning", "ProcessFailed", "MaxFailuresExceeded"]


def test_a_refusal_is_told_once_and_so_is_its_end() -> None:
    world = World(make_job(queueName="gpus"))
    world.settle()
    world.settle()
    assert [event.reason for event in world.events] == ["NotSupported"]
    world.job = make_job().model_copy(update={"status": world.job.status})
    world.settle()
    assert [event.reason for event in world.events][1:] == ["Accepted", "AttemptStarted"]
