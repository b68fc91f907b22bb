"""A job in every phase, as the real plan writes it: short scenarios in a fake cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from finetune_contract import __version__
from finetune_contract.exit_codes import ExitCode
from finetune_contract.heartbeat import CommittedCheckpoint, RankState, WrittenOutput
from finetune_contract.outputs.spec import OutputSpec
from finetune_operator.api.job import FineTuneJob
from finetune_operator.api.reasons import Reason
from finetune_operator.cluster.kube.client.client import ApiError
from finetune_operator.cluster.kube.client.refusals import classify_refusal
from finetune_operator.plan.model.types import Event, Plan, PodPhase
from tests.plan.fake_cluster import FakeCluster, last_words, make_job, seconds

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
class RecordingCluster(FakeCluster):
    """A fake cluster that records when each event was emitted."""

    emitted: list[tuple[datetime, FineTuneJob, Event]] = field(default_factory=list)

    def step(self) -> Plan:
        decided = super().step()
        self.emitted += [(self.now, self.job, event) for event in decided.events]
        return decided

    def work(self, state: RankState, after: float = 0, **report: Any) -> None:
        """Advance the clock, and let all ranks report a state."""
        self.tick(after)
        self.beat_all(state, total_steps=1000, **report)
        self.settle()

    def train(self, *steps: int, from_step: int = 0, checkpoint: int | None = None) -> None:
        """Let all ranks train up to each of the given steps, at 0.61 s per step."""
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


def _begin(**spec: Any) -> RecordingCluster:
    cluster = RecordingCluster(job=make_job(**SPEC | spec))
    cluster.settle()
    return cluster


def _loaded(**spec: Any) -> RecordingCluster:
    """Return a job whose pods have started and whose ranks load the model."""
    cluster = _begin(**spec)
    cluster.tick(31)
    cluster.run_all()
    cluster.settle()
    cluster.work(RankState.LOADING, after=2)
    return cluster


def _trained() -> RecordingCluster:
    cluster = _loaded()
    cluster.train(1, 120, 240, checkpoint=200)
    return cluster


def _preempted() -> RecordingCluster:
    """Return a trained job; the node of rank 2 is shut down with notice, and its ranks save."""
    cluster = _trained()
    cluster.tick(5)
    cluster.change(2, disruption="TerminationByKubelet", deleted_at=cluster.now, grace=seconds(120))
    cluster.beat(2, RankState.SAVING, step=246, total_steps=1000, notice=True)
    cluster.settle()
    return cluster


def _out_of_memory(cluster: RecordingCluster, attempt: int, rank: int, step: int) -> None:
    """Let one rank run out of memory, and the others lose it."""
    for node_rank in range(4):
        code = ExitCode.FABRIC if node_rank != rank else 1
        output = "RuntimeError: NCCL error" if node_rank != rank else NO_MEMORY
        cluster.exit(node_rank, code, termination=last_words(attempt, code, output, rank=node_rank, step=step))
    cluster.settle()


def _resumed() -> RecordingCluster:
    cluster = _preempted()
    cluster.tick(4)
    checkpoint = CommittedCheckpoint(step=246, time=cluster.now.timestamp(), size_bytes=CHECKPOINT_BYTES, attempt=1)
    cluster.beat_all(RankState.SAVED, step=246, total_steps=1000, checkpoint=checkpoint)
    for node_rank in range(4):
        cluster.exit(node_rank, ExitCode.SAVED)
    cluster.step()
    # The node has deleted the pod.
    cluster.vanish("circles-a1-n2")
    cluster.settle()
    cluster.tick(21)
    cluster.run_all()
    cluster.settle()
    cluster.work(RankState.RESTORING, after=4)
    return cluster


def refused() -> RecordingCluster:
    return _begin(training=SPEC["training"] | {"method": "Full"}, queueName="pictures")


def misspelt() -> RecordingCluster:
    """podTemplate contains a field that pods do not have."""
    message = 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field "spec.nodeSelektor"'
    return _refused_pod(ApiError(400, "BadRequest", message), podTemplate={"spec": {"nodeSelektor": {"disk": "fast"}}})


def over_quota() -> RecordingCluster:
    message = (
        'pods "circles-a1-n0" is forbidden: exceeded quota: team, requested: pods=1, used: pods=20, limited: pods=20'
    )
    return _refused_pod(ApiError(403, "Forbidden", message))


def _refused_pod(error: ApiError, **spec: Any) -> RecordingCluster:
    """Return a job whose first pod the API server refuses."""
    cluster = RecordingCluster(job=make_job(**SPEC | spec))
    cluster.step()
    cluster.refusal = classify_refusal(cluster.job, "Pod", "circles-a1-n0", error, cluster.now)
    cluster.tick(1)
    cluster.step()
    return cluster


def unschedulable() -> RecordingCluster:
    cluster = _begin()
    cluster.tick(3)
    for node_rank in (2, 3):
        cluster.change(node_rank, waiting=NO_ROOM)
    for node_rank in (0, 1):
        cluster.change(node_rank, phase=PodPhase.RUNNING, node=f"node-{node_rank}", ready=True)
    cluster.settle()
    return cluster


def gated() -> RecordingCluster:
    cluster = _begin()
    cluster.tick(1)
    for node_rank in range(4):
        cluster.change(node_rank, waiting="SchedulingGated: Scheduling is blocked due to non-empty scheduling gates")
    cluster.settle()
    return cluster


def pulling() -> RecordingCluster:
    cluster = _begin()
    cluster.tick(40)
    message = f'ImagePullBackOff: Back-off pulling image "ghcr.io/finetune-operator/trainer-cuda:{__version__}"'
    for node_rank in range(4):
        cluster.change(node_rank, node=f"node-{node_rank}", waiting=message)
    cluster.settle()
    return cluster


def loading() -> RecordingCluster:
    return _loaded()


def caching() -> RecordingCluster:
    cluster = _loaded()
    cluster.work(RankState.CACHING, after=60, detail="512/1221 images")
    return cluster


def running() -> RecordingCluster:
    cluster = _resumed()
    cluster.train(247, 412, from_step=246, checkpoint=400)
    return cluster


def saving() -> RecordingCluster:
    cluster = _trained()
    cluster.work(RankState.SAVING, after=1, step=250, restored_step=0)
    return cluster


def silent() -> RecordingCluster:
    cluster = _trained()
    pod = cluster.pod(3)
    for _ in range(4):
        cluster.tick(20)
        for node_rank in (0, 1, 2):
            cluster.beat(node_rank, RankState.TRAINING, step=300, restored_step=0, total_steps=1000)
        cluster.settle()
    assert pod.phase is PodPhase.RUNNING
    return cluster


def preempted() -> RecordingCluster:
    return _preempted()


def restoring() -> RecordingCluster:
    return _resumed()


def lost_node() -> RecordingCluster:
    """Return a job that lost a node without notice."""
    cluster = _trained()
    cluster.tick(3)
    cluster.vanish(cluster.pod(1).name)
    cluster.step()
    return cluster


def backing_off() -> RecordingCluster:
    cluster = _trained()
    cluster.tick(3)
    _out_of_memory(cluster, attempt=1, rank=3, step=244)
    return cluster


def exporting() -> RecordingCluster:
    cluster = _resumed()
    cluster.train(247, 600, 1000, from_step=246, checkpoint=1000)
    cluster.work(RankState.EXPORTING, after=3, step=1000)
    return cluster


def exporting_in_pod() -> RecordingCluster:
    """The ranks are done; the export pod writes what they do not write."""
    cluster = exporting()
    output = OutputSpec.model_validate({"format": "openvino", "to": "s3://models/naruto"})
    spec = cluster.job.spec.model_copy(update={"outputs": (*cluster.job.spec.outputs, output)})
    cluster.job = cluster.job.model_copy(update={"spec": spec})
    cluster.work(RankState.DONE, after=4, step=1000)
    for node_rank in range(4):
        cluster.exit(node_rank, ExitCode.DONE)
    cluster.settle()
    name = next(name for name, pod in cluster.pods.items() if pod.export is not None)
    cluster.pods[name] = replace(cluster.pods[name], phase=PodPhase.RUNNING, node="cpu-1")
    cluster.settle()
    return cluster


def succeeded() -> RecordingCluster:
    cluster = exporting()
    output = WrittenOutput(format="diffusers", to="/finetune/storage/naruto", size_bytes=3_227_400, sha256="ab" * 32)
    cluster.work(RankState.DONE, after=4, step=1000, outputs=(output,))
    cluster.tick(1)
    for node_rank in range(4):
        cluster.exit(node_rank, ExitCode.DONE)
    cluster.settle()
    return cluster


def failed_too_often() -> RecordingCluster:
    cluster = backing_off()
    cluster.tick(11)
    cluster.settle()
    cluster.tick(31)
    cluster.run_all()
    cluster.settle()
    cluster.train(201, 243, from_step=200)
    _out_of_memory(cluster, attempt=2, rank=1, step=243)
    return cluster


def failed_data() -> RecordingCluster:
    cluster = _loaded()
    output = "DataError: spec.dataset.columns.caption: there is no column 'text'; write one of image, caption"
    cluster.exit(0, ExitCode.DATA, termination=last_words(1, ExitCode.DATA, output))
    cluster.settle()
    return cluster


def past_deadline() -> RecordingCluster:
    cluster = _loaded(activeDeadlineSeconds=100)
    cluster.train(1, 90)
    cluster.tick(30)
    cluster.settle()
    return cluster


def _suspend(cluster: RecordingCluster) -> None:
    spec = cluster.job.spec.model_copy(update={"suspend": True})
    meta = cluster.job.metadata.model_copy(update={"generation": 2})
    cluster.job = cluster.job.model_copy(update={"spec": spec, "metadata": meta})
    cluster.settle()


def suspending() -> RecordingCluster:
    cluster = _trained()
    _suspend(cluster)
    return cluster


def suspended() -> RecordingCluster:
    cluster = suspending()
    cluster.tick(4)
    checkpoint = CommittedCheckpoint(step=243, time=cluster.now.timestamp(), size_bytes=CHECKPOINT_BYTES, attempt=1)
    cluster.work(RankState.SAVED, step=243, restored_step=0, checkpoint=checkpoint)
    for name in list(cluster.pods):
        cluster.vanish(name)
    cluster.settle()
    return cluster


SCENES: dict[str, Callable[[], RecordingCluster]] = {
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
    "recovering-notice": preempted,
    "recovering-lost-node": lost_node,
    "recovering-back-off": backing_off,
    "recovering-restoring": restoring,
    "exporting": exporting,
    "exporting-in-pod": exporting_in_pod,
    "succeeded": succeeded,
    "failed-max-failures": failed_too_often,
    "failed-data": failed_data,
    "failed-deadline": past_deadline,
    "suspending": suspending,
    "suspended": suspended,
}
"""Every scene, by the name of its golden file, which begins with the phase."""

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
    "exporting-in-pod": Reason.EXPORTING,
    "succeeded": Reason.FINISHED,
    "failed-max-failures": Reason.MAX_FAILURES_EXCEEDED,
    "failed-data": Reason.DATA_ERROR,
    "failed-deadline": Reason.DEADLINE_EXCEEDED,
    "suspending": Reason.SUSPENDING,
    "suspended": Reason.SUSPENDED,
}
