"""Events: each change is emitted once."""

from __future__ import annotations

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import WrittenOutput
from finetune_operator.api.reasons import Reason
from finetune_operator.plan.model.types import Event
from tests.plan.fake_cluster import FakeCluster, RankState, make_job


def emitted(cluster: FakeCluster) -> list[str]:
    return [f"{event.reason}: {event.message}" for event in cluster.events]


def test_events_of_a_preempted_job() -> None:
    cluster = FakeCluster().running()
    cluster.tick(1)
    cluster.train_to(0)
    cluster.settle()
    cluster.tick(1)
    cluster.train_to(40, checkpoint=40)
    cluster.settle()
    cluster.change(1, disruption="TerminationByKubelet", deleted_at=cluster.now)
    cluster.settle()
    cluster.pods.clear()
    cluster.beats.clear()
    cluster.tick(1.2)
    cluster.running()
    cluster.tick(2)
    cluster.train_to(41, from_step=40)
    cluster.settle()
    cluster.train_to(100, from_step=40)
    cluster.beat_all(RankState.EXPORTING, outputs=(WrittenOutput(format="diffusers", to="/out", size_bytes=1),))
    cluster.settle()
    for rank in (0, 1):
        cluster.exit(rank, 0)
    cluster.settle()
    assert emitted(cluster) == [
        "Accepted: the spec is valid and supported",
        "AttemptStarted: attempt 1 started",
        "CheckpointCommitted: first checkpoint committed at step 40",
        "TerminationByKubelet: attempt 1 ended at step 40 because of rank 1 (circles-a1-n1 on node-1): "
        "The kubelet terminated a pod because its node shuts down or is short of a resource.",
        "AttemptStarted: attempt 2 started",
        "Recovered: attempt 2 resumed at step 40; 0 steps lost; 3.2 s to recover",
        "OutputWritten: diffusers output written to /out",
        "Finished: 100 steps trained in 2 attempts; 0 steps repeated",
    ]
    assert not any(event.warning for event in cluster.events)


def test_failures_and_trainer_warnings_are_warning_events() -> None:
    cluster = FakeCluster(make_job(recovery={"maxFailures": 0})).running()
    cluster.beat(0, warnings=("checkpoint step-40-a1 is corrupt",))
    cluster.settle()
    cluster.settle()
    cluster.exit(1, 1)
    cluster.settle()
    warnings = [event.reason for event in cluster.events if event.warning]
    assert warnings == ["TrainerWarning", "ProcessFailed", "MaxFailuresExceeded"]


def test_end_of_an_attempt_is_emitted_before_its_cause() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(10)
    cluster.settle()
    cluster.exit(0, ExitCode.FABRIC)
    cluster.settle()
    assert cluster.events[-1] == Event(Reason.ATTEMPT_ENDED, "attempt 1 ended at step 10; its cause is not certain yet")
    cluster.vanish("circles-a1-n1")
    cluster.settle()
    assert cluster.reasons().count("AttemptEnded") == 1
    assert cluster.reasons().index("AttemptEnded") < cluster.reasons().index("PodLost")


def test_certain_cause_needs_no_separate_event_of_the_end() -> None:
    cluster = FakeCluster().running()
    cluster.exit(0, 1)
    cluster.settle()
    assert "AttemptEnded" not in cluster.reasons()
    assert cluster.reasons().count("ProcessFailed") == 1


def test_refusal_and_acceptance_are_emitted_once() -> None:
    cluster = FakeCluster(make_job(queueName="gpus"))
    cluster.settle()
    cluster.settle()
    assert [event.reason for event in cluster.events] == ["NotSupported"]
    cluster.job = make_job().model_copy(update={"status": cluster.job.status})
    cluster.settle()
    assert [event.reason for event in cluster.events][1:] == ["Accepted", "AttemptStarted"]
