"""A job in every phase, as the real plan leaves it: short stories in a small world with a clock of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_contract import __version__
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint, RankState, WrittenOutput
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.reasons import Reason
from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.client.refusals import classify_refusal
from finetune_operator.plan.model.types import Event, Plan, PodPhase
from tests.plan.harness import World, last_words, make_job, seconds

SPEC: dict[str, Any] = {
    "model": {"base": "stabilityai/stable-diffusion-xl-base-1.0"},
    "dataset": {"source": "lambdalabs/naruto-blip-captions"},
    "training": {"method": "LoRA", "steps": 1000, "batchSize": 4, "resolution": 1024, "precision": "bf16"},
    "topology": {"accelerator": "gpu", "nodes": 4},
    "checkpoint": {"storage": {"persistentVolumeClaim": {"claimName": "checkpoints"}}},
    "recovery": {"maxFailures": 1},
    "outputs": [{"format": "diffusers", "to": "/finetune/storage/naruto"}],
}
CHECKPOINT_BYTES = 187_342_848
NO_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 79.10 GiB of memory."
NO_ROOM = (
    "Unschedulable: 0/12 nodes are available: 12 Insufficient nvidia.com/gpu. preemption: 0/12 nodes are available: "
    "12 No preemption victims found for incoming pod."
)


@dataclass
class Story(World):
    """A world that remembers when each event was told."""

    told: list[tuple[datetime, FineTuneJob, Event]] = field(default_factory=list)

    def step(self) -> Plan:
        decided = super().step()
        self.told += [(self.now, self.job, event) for event in decided.events]
        return decided

    def work(self, state: RankState, after: float = 0, **report: Any) -> None:
        """All ranks are in a state, and some time goes by before they say so."""
        self.tick(after)
        self.beat_all(state, total_steps=1000, **report)
        self.settle()

    def train(self, *steps: int, from_step: int = 0, checkpoint: int | None = None) -> None:
        """All ranks train up to each of some steps, at a step in 0.61 s."""
        committed = None
        if checkpoint is not None:
            time = self.now.timestamp()
            committed = CommittedCheckpoint(
                step=checkpoint, time=time, size_bytes=CHECKPOINT_BYTES, attempt=self.job.status.attempt
            )
        before = from_step
        for step in steps:
            self.work(
                RankState.TRAINING,
                after=0.61 * (step - before),
                step=step,
                restored_step=from_step,
                loss=0.0731 + 12.3456789 / (step + 100),
                images_per_second=16 / 0.61,
                checkpoint=committed,
            )
            before = step


def _begin(**spec: Any) -> Story:
    story = Story(job=make_job(**SPEC | spec))
    story.settle()
    return story


def _loaded(**spec: Any) -> Story:
    """The pods came up within half a minute and the ranks begin."""
    story = _begin(**spec)
    story.tick(31)
    story.run_all()
    story.settle()
    story.work(RankState.LOADING, after=2)
    return story


def _trained() -> Story:
    story = _loaded()
    story.train(1, 120, 240, checkpoint=200)
    return story


def _preempted() -> Story:
    """The node of rank 2 is shut down with notice; all ranks save and leave."""
    story = _trained()
    story.tick(5)
    story.change(2, disruption="TerminationByKubelet", deleted_at=story.now, grace=seconds(120))
    story.beat(2, RankState.SAVING, step=246, total_steps=1000, notice=True)
    story.settle()
    return story


def _out_of_memory(story: Story, attempt: int, rank: int, step: int) -> None:
    """One rank fails, and the others lose it."""
    for node_rank in range(4):
        code = ExitCode.FABRIC if node_rank != rank else 1
        words = "RuntimeError: NCCL error" if node_rank != rank else NO_MEMORY
        story.exit(node_rank, code, termination=last_words(attempt, code, words, rank=node_rank, step=step))
    story.settle()


def _resumed() -> Story:
    story = _preempted()
    story.tick(4)
    checkpoint = CommittedCheckpoint(step=246, time=story.now.timestamp(), size_bytes=CHECKPOINT_BYTES, attempt=1)
    story.beat_all(RankState.SAVED, step=246, total_steps=1000, checkpoint=checkpoint)
    for node_rank in range(4):
        story.exit(node_rank, ExitCode.SAVED)
    story.step()
    # Its node is done with it.
    story.vanish("circles-a1-n2")
    story.settle()
    story.tick(21)
    story.run_all()
    story.settle()
    story.work(RankState.RESTORING, after=4)
    return story


def refused() -> Story:
    return _begin(training=SPEC["training"] | {"method": "Full"}, queueName="pictures")


def misspelt() -> Story:
    """A field of podTemplate that pods do not have."""
    words = 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field "spec.nodeSelektor"'
    return _not_taken(ApiError(400, "BadRequest", words), podTemplate={"spec": {"nodeSelektor": {"disk": "fast"}}})


def over_quota() -> Story:
    words = (
        'pods "circles-a1-n0" is forbidden: exceeded quota: team, requested: pods=1, used: pods=20, limited: pods=20'
    )
    return _not_taken(ApiError(403, "Forbidden", words))


def _not_taken(error: ApiError, **spec: Any) -> Story:
    """The API server refuses the first pod."""
    story = Story(job=make_job(**SPEC | spec))
    story.step()
    story.refusal = classify_refusal(story.job, "Pod", "circles-a1-n0", error, story.now)
    story.tick(1)
    story.step()
    return story


def unschedulable() -> Story:
    story = _begin()
    story.tick(3)
    for node_rank in (2, 3):
        story.change(node_rank, waiting=NO_ROOM)
    for node_rank in (0, 1):
        story.change(node_rank, phase=PodPhase.RUNNING, node=f"node-{node_rank}", ready=True)
    story.settle()
    return story


def gated() -> Story:
    story = _begin()
    story.tick(1)
    for node_rank in range(4):
        story.change(node_rank, waiting="SchedulingGated: Scheduling is blocked due to non-empty scheduling gates")
    story.settle()
    return story


def pulling() -> Story:
    story = _begin()
    story.tick(40)
    words = f'ImagePullBackOff: Back-off pulling image "ghcr.io/finetune-operator/trainer-cuda:{__version__}\"'
    for node_rank in range(4):
        story.change(node_rank, node=f"node-{node_rank}", waiting=words)
    story.settle()
    return story


def loading() -> Story:
    return _loaded()


def caching() -> Story:
    story = _loaded()
    story.work(RankState.CACHING, after=60, detail="512/1221 images")
    return story


def running() -> Story:
    story = _resumed()
    story.train(247, 412, from_step=246, checkpoint=400)
    return story


def saving() -> Story:
    story = _trained()
    story.work(RankState.SAVING, after=1, step=250, restored_step=0)
    return story


def silent() -> Story:
    story = _trained()
    pod = story.pod(3)
    for _ in range(4):
        story.tick(20)
        for node_rank in (0, 1, 2):
            story.beat(node_rank, RankState.TRAINING, step=300, restored_step=0, total_steps=1000)
        story.settle()
    assert pod.phase is PodPhase.RUNNING
    return story


def making_room() -> Story:
    return _preempted()


def restoring() -> Story:
    return _resumed()


def lost_node() -> Story:
    """A node vanishes without notice."""
    story = _trained()
    story.tick(3)
    story.vanish(story.pod(1).name)
    story.step()
    return story


def backing_off() -> Story:
    story = _trained()
    story.tick(3)
    _out_of_memory(story, attempt=1, rank=3, step=244)
    return story


def exporting() -> Story:
    story = _resumed()
    story.train(247, 600, 1000, from_step=246, checkpoint=1000)
    story.work(RankState.EXPORTING, after=3, step=1000)
    return story


def succeeded() -> Story:
    story = exporting()
    output = WrittenOutput(format="diffusers", to="/finetune/storage/naruto", size_bytes=3_227_400, sha256="ab" * 32)
    story.work(RankState.DONE, after=4, step=1000, outputs=(output,))
    story.tick(1)
    for node_rank in range(4):
        story.exit(node_rank, ExitCode.DONE)
    story.settle()
    return story


def failed_too_often() -> Story:
    story = backing_off()
    story.tick(11)
    story.settle()
    story.tick(31)
    story.run_all()
    story.settle()
    story.train(201, 243, from_step=200)
    _out_of_memory(story, attempt=2, rank=1, step=243)
    return story


def failed_by_its_data() -> Story:
    story = _loaded()
    words = "DataError: spec.dataset.columns.caption: there is no column 'text'; write one of image, caption"
    story.exit(0, ExitCode.DATA, termination=last_words(1, ExitCode.DATA, words))
    story.settle()
    return story


def out_of_time() -> Story:
    story = _loaded(activeDeadlineSeconds=100)
    story.train(1, 90)
    story.tick(30)
    story.settle()
    return story


def _suspend(story: Story) -> None:
    spec = story.job.spec.model_copy(update={"suspend": True})
    meta = story.job.metadata.model_copy(update={"generation": 2})
    story.job = story.job.model_copy(update={"spec": spec, "metadata": meta})
    story.settle()


def suspending() -> Story:
    story = _trained()
    _suspend(story)
    return story


def suspended() -> Story:
    story = suspending()
    story.tick(4)
    checkpoint = CommittedCheckpoint(step=243, time=story.now.timestamp(), size_bytes=CHECKPOINT_BYTES, attempt=1)
    story.work(RankState.SAVED, step=243, restored_step=0, checkpoint=checkpoint)
    for name in list(story.pods):
        story.vanish(name)
    story.settle()
    return story


SCENES: dict[str, Callable[[], Story]] = {
    "pending-refused": refused,
    "pending-misspelt": misspelt,
    "queued-unschedulable": unschedulable,
    "queued-over-quota": over_quota,
    "queued-gated": gated,
    "starting-image-pull": pulling,
    "starting-loading": loading,
    "starting-caching": caching,
    "running": running,
    "running-saving": saving,
    "running-silent": silent,
    "recovering-notice": making_room,
    "recovering-lost-node": lost_node,
    "recovering-back-off": backing_off,
    "recovering-restoring": restoring,
    "exporting": exporting,
    "succeeded": succeeded,
    "failed-max-failures": failed_too_often,
    "failed-data": failed_by_its_data,
    "failed-deadline": out_of_time,
    "suspending": suspending,
    "suspended": suspended,
}
"""Every scene, by the name of its golden file: its phase first."""

EXPECTED_REASONS = {
    "pending-refused": Reason.NOT_SUPPORTED,
    "pending-misspelt": Reason.FAILED_CREATE,
    "queued-unschedulable": Reason.UNSCHEDULABLE,
    "queued-over-quota": Reason.FAILED_CREATE,
    "queued-gated": Reason.QUEUED,
    "starting-image-pull": Reason.IMAGE_PULL,
    "starting-loading": Reason.LOADING,
    "starting-caching": Reason.CACHING,
    "running": Reason.TRAINING,
    "running-saving": Reason.SAVING,
    "running-silent": Reason.SILENT,
    "recovering-notice": Reason.TERMINATION_BY_KUBELET,
    "recovering-lost-node": Reason.POD_LOST,
    "recovering-back-off": Reason.BACK_OFF,
    "recovering-restoring": Reason.RESTORING,
    "exporting": Reason.EXPORTING,
    "succeeded": Reason.FINISHED,
    "failed-max-failures": Reason.MAX_FAILURES_EXCEEDED,
    "failed-data": Reason.DATA_ERROR,
    "failed-deadline": Reason.DEADLINE_EXCEEDED,
    "suspending": Reason.SUSPENDING,
    "suspended": Reason.SUSPENDED,
}
