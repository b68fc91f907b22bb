"""Steps, figures, checkpoints, outputs and warnings from heartbeats; and which heartbeats are ignored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint, WrittenOutput
from finetune_contract.identity import InputIdentity
from finetune_operator.api.status import FineTuneJobStatus
from finetune_operator.plan.model.types import PodPhase
from finetune_operator.plan.report.progress import MAX_OUTPUTS, MAX_WARNINGS
from tests.plan.fake_cluster import START, FakeCluster, RankState, last_words, make_job


def settled(cluster: FakeCluster) -> FineTuneJobStatus:
    cluster.settle()
    return cluster.job.status


def test_figures_come_from_the_lowest_rank() -> None:
    cluster = FakeCluster(make_job(training={"method": "LoRA", "steps": 100, "batchSize": 4})).running()
    cluster.beat(1, step=40, loss=9.0)
    cluster.beat(0, step=40, total_steps=100, loss=0.25, images_per_second=16.0)
    status = settled(cluster)
    assert (status.step, status.total_steps, status.progress, status.loss) == (40, 100, "40%", 0.25)
    assert status.images_per_second == 16.0
    # 60 steps of 8 images at 16 images per second.
    assert status.eta == "30s"
    assert status.nodes == "2/2"


@pytest.mark.parametrize(("step", "total", "progress"), [(0, 100, "0%"), (199, 200, "99%"), (1, 3, "33%")])
def test_progress_is_never_rounded_up(step: int, total: int, progress: str) -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(step=step, total_steps=total)
    assert settled(cluster).progress == progress


def test_total_steps_come_from_the_spec_or_the_trainer() -> None:
    assert settled(FakeCluster().running()).total_steps == 100
    epochs = FakeCluster(make_job(training={"method": "LoRA", "epochs": 3})).running()
    assert settled(epochs).total_steps is None
    epochs.beat_all(step=1, total_steps=77)
    assert settled(epochs).total_steps == 77


def test_figures_without_a_new_report_stay() -> None:
    cluster = FakeCluster().running()
    cluster.beat_all(step=40, loss=0.5, images_per_second=3.0)
    before = settled(cluster)
    cluster.beats.clear()
    assert settled(cluster) == before


def test_step_never_decreases_within_an_attempt() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(40)
    cluster.settle()
    cluster.train_to(39)
    assert settled(cluster).step == 40


def test_step_decreases_between_attempts_by_the_lost_steps() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(45, checkpoint=40)
    cluster.settle()
    cluster.pods.clear()
    cluster.running()
    assert cluster.job.status.step == 45
    cluster.beat_all(RankState.RESTORING, restored_step=40, step=40)
    status = settled(cluster)
    assert (status.step, status.lost_steps) == (40, 5)
    assert [entry.lost_steps for entry in status.attempts] == [5, None]


def test_last_step_comes_from_the_termination_message() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(40)
    cluster.settle()
    for rank in (0, 1):
        cluster.exit(rank, ExitCode.SAVED, termination=last_words(1, ExitCode.SAVED, "", step=41))
    cluster.step()
    assert cluster.job.status.attempts[0].to_step == 41


def test_newest_checkpoint_is_chosen_by_attempt_and_not_by_time() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(45, checkpoint=40)
    cluster.settle()
    cluster.pods.clear()
    cluster.running()
    # The checkpoint of step 40 is corrupt: this attempt restored step 20.
    old = CommittedCheckpoint(step=20, time=START.timestamp(), size_bytes=1, attempt=1)
    cluster.beat(0, step=20, restored_step=20, checkpoint=old)
    assert settled(cluster).last_checkpoint == cluster.job.status.last_checkpoint
    status = cluster.job.status
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.step == 40
    new = CommittedCheckpoint(step=30, time=START.timestamp() - 300, size_bytes=1, attempt=2)
    cluster.beat(0, step=30, restored_step=20, checkpoint=new)
    checkpoint = settled(cluster).last_checkpoint
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.attempt) == (30, 2)


def test_heartbeat_of_an_older_attempt_is_ignored() -> None:
    cluster = FakeCluster().running()
    cluster.train_to(45)
    late = dict(cluster.beats)
    cluster.pods.clear()
    cluster.beats.clear()
    cluster.running()
    before = settled(cluster)
    cluster.beats.update(late)
    assert settled(cluster) == before


def test_heartbeat_of_another_pod_with_the_same_name_is_ignored() -> None:
    cluster = FakeCluster().running()
    before = settled(cluster)
    cluster.train_to(45)
    for uid, received in list(cluster.beats.items()):
        other = received.beat.model_copy(update={"pod_uid": "other"})
        cluster.beats = {uid: replace(received, beat=other)}
        assert settled(cluster) == before


def test_outputs_are_kept_and_updated() -> None:
    cluster = FakeCluster().running()
    lora = WrittenOutput(format="diffusers", to="/out", size_bytes=10)
    cluster.beat(0, RankState.EXPORTING, outputs=(lora,))
    cluster.settle()
    cluster.beat(0, RankState.EXPORTING, outputs=(lora.model_copy(update={"size_bytes": 20}),))
    assert [(output.to, output.bytes) for output in settled(cluster).outputs] == [("/out", 20)]
    cluster.beat(0, RankState.EXPORTING)
    assert len(settled(cluster).outputs) == 1


def test_warnings_are_unique_and_limited() -> None:
    cluster = FakeCluster().running()
    for number in range(30):
        cluster.beat(0, warnings=tuple(f"warning {n}" for n in range(number, number + 5)))
        cluster.beat(1, warnings=("of rank 1", *(f"warning {n}" for n in range(number, number + 4))))
        status = settled(cluster)
        assert len(status.warnings) == len(set(status.warnings)) <= MAX_WARNINGS
        assert f"warning {number + 4}" in status.warnings


def test_number_of_running_nodes() -> None:
    cluster = FakeCluster()
    cluster.settle()
    assert cluster.job.status.nodes == "0/2"
    cluster.run_all()
    cluster.change(1, phase=PodPhase.PENDING)
    assert settled(cluster).nodes == "1/2"
    cluster.change(1, phase=PodPhase.RUNNING)
    assert settled(cluster).nodes == "2/2"


def test_figures_that_json_cannot_represent_are_dropped() -> None:
    cluster = FakeCluster().running()
    # The clock of a rank may be wrong: Python's dates end before this time.
    committed = CommittedCheckpoint(step=10, time=1e12, size_bytes=1, attempt=1)
    cluster.beat(0, step=10, loss=float("nan"), images_per_second=float("inf"), checkpoint=committed)
    status = settled(cluster)
    assert status.last_checkpoint is not None
    assert status.last_checkpoint.time == START
    assert status.loss is None
    assert status.images_per_second is None


def test_a_script_with_absurd_figures_gets_no_absurd_status() -> None:
    """The largest numbers that a heartbeat may contain: the status can be stored and printed."""
    cluster = FakeCluster().running()
    cluster.beat(0, step=2**53, total_steps=1, images_per_second=5e-324, loss=1e39)
    cluster.beat(1, step=2**53, total_steps=1, images_per_second=5e-324, loss=1e39)
    status = settled(cluster)
    assert (status.step, status.progress, status.loss) == (2**53, "100%", 1e39)
    cluster = FakeCluster().running()
    cluster.beat(0, step=1, total_steps=2**53, images_per_second=5e-324)
    assert settled(cluster).eta is None


def test_inputs_of_the_job_are_kept_over_attempts() -> None:
    cluster = FakeCluster().running()
    pinned = InputIdentity(field="dataset.source", location="me/data", commit="a" * 40)
    cluster.beat(0, RankState.LOADING, inputs=(pinned,))
    complete = pinned.model_copy(update={"content": "1" * 64, "samples": 8})
    base = InputIdentity(field="model.base", location="/base", content="2" * 64)
    cluster.beat(0, RankState.TRAINING, inputs=(complete, base))
    expected = [("dataset.source", "a" * 40, "1" * 64, 8), ("model.base", None, "2" * 64, None)]
    found = [(each.field, each.commit, each.content, each.samples) for each in settled(cluster).inputs]
    assert found == expected
    # The next attempt has not read its data yet.
    cluster.beat(0, RankState.LOADING, inputs=(pinned,))
    assert [(each.field, each.commit, each.content, each.samples) for each in settled(cluster).inputs] == expected


def test_the_status_keeps_a_limited_number_of_outputs() -> None:
    cluster = FakeCluster().running()
    for first in (0, 60):
        outputs = tuple(
            WrittenOutput(format="diffusers", to=f"/outputs/{number}", size_bytes=1)
            for number in range(first, first + 60)
        )
        cluster.beat(0, step=1 + first, outputs=outputs)
        status = settled(cluster)
    assert len(status.outputs) == MAX_OUTPUTS
    assert status.outputs[-1].to == "/outputs/119"
