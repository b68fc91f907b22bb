"""FineTuneJob (`finetune-operator.io/v1alpha1`, short name `ftj`): the one source of the CRD, its docs and its checks.

The parts that the trainer reads, too, stand in `finetune_contract.spec`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, JsonValue

from finetune_contract.phase import Phase
from finetune_contract.spec import (
    MAX_STEPS,
    CheckpointInterval,
    DatasetSpec,
    Location,
    ModelSpec,
    OutputSpec,
    SpecModel,
    TrainingSpec,
)
from finetune_operator.api.names import MAX_NODES

GROUP = "finetune-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
CONTROLLER = f"{GROUP}/finetunejob-controller"
"""This operator, as `spec.managedBy` names it."""

Duration = Annotated[str, Field(max_length=32)]
"""A length of time as a person writes it: '90s', '10m', '1h30m'. `rules` looks at its form, `duration` reads it."""
ObjectName = Annotated[str, Field(min_length=1, max_length=253)]
"""Name of a Kubernetes object. `rules` looks at its form."""
ManagerName = Annotated[str, Field(min_length=1, max_length=63)]
"""Name of a controller with its domain before it. `rules` looks at its form."""
Path = Annotated[str, Field(min_length=1, max_length=1024)]
"""Absolute path."""
Quantity = Annotated[str, Field(max_length=32)] | int
"""Amount of a resource: 8, 500m, 32Gi. `rules` looks at its form."""
MAX_SECONDS = 2**31 - 1
"""Longest deadline or time to live, 68 years."""


def list_map(key: str) -> dict[str, JsonValue]:
    """Schema of a list whose items are told apart by `key`, so that writers of different items can share it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


class Accelerator(StrEnum):
    """What the ranks compute on."""

    GPU = "gpu"
    CPU = "cpu"


class CpuBackend(StrEnum):
    """How CPU ranks talk to each other."""

    GLOO = "gloo"
    CCL = "ccl"


class CpuSpec(SpecModel):
    """Settings of CPU training."""

    backend: CpuBackend = Field(default=CpuBackend.GLOO, description="gloo (native torch) or ccl (oneCCL with IPEX)")


class TopologySpec(SpecModel):
    """How many machines, and what each is."""

    accelerator: Accelerator = Field(default=Accelerator.GPU, description="what the ranks compute on")
    nodes: int | None = Field(
        default=None, ge=1, le=MAX_NODES, description="number of pods; default 1, or give minNodes and maxNodes"
    )
    min_nodes: int | None = Field(
        default=None, ge=1, le=MAX_NODES, description="fewest pods that the job may go on with"
    )
    max_nodes: int | None = Field(default=None, ge=1, le=MAX_NODES, description="number of pods when there is room")
    processes_per_node: int = Field(default=1, ge=1, le=64, description="ranks in each pod; on gpu, its GPUs")
    resources: dict[str, Quantity] | None = Field(
        default=None,
        max_length=8,
        description="resources of each pod, e.g. {cpu: 8, memory: 32Gi}; nvidia.com/gpu follows processesPerNode",
    )
    cpu: CpuSpec = Field(default=CpuSpec(), description="settings of CPU training")


class PersistentVolumeClaim(SpecModel):
    """A claim in the job's namespace, ReadWriteMany where there are several nodes."""

    claim_name: ObjectName = Field(description="name of the claim")


class HostPath(SpecModel):
    """A folder of the node; the same on all nodes only where an administrator has seen to it."""

    path: Path = Field(description="absolute path on the node")


class Nfs(SpecModel):
    """An NFS export."""

    server: ObjectName = Field(description="host name or address of the server")
    path: Path = Field(description="exported path")


class BucketSpec(SpecModel):
    """A folder of an object store; credentials come from spec.secrets or from the pods' workload identity."""

    url: Location = Field(
        description="s3://, gs:// or az:// with the bucket and a folder, e.g. s3://models/checkpoints"
    )
    endpoint: Location | None = Field(
        default=None, description="address of an S3 server other than the public one, e.g. https://minio.example.com"
    )


class StorageSpec(SpecModel):
    """Where checkpoints are kept: exactly one of the volumes, or a bucket."""

    persistent_volume_claim: PersistentVolumeClaim | None = Field(default=None, description="a claim")
    host_path: HostPath | None = Field(default=None, description="a folder of the node")
    nfs: Nfs | None = Field(default=None, description="an NFS export")
    bucket: BucketSpec | None = Field(
        default=None,
        description="a folder of an object store; pods then share no disk, and each fills a cache of its own",
    )


class ScratchSpec(SpecModel):
    """The nodes' own disks (emptyDir), as the first place of a checkpoint."""

    size_limit: Annotated[str, Field(max_length=32)] | None = Field(
        default=None, description="most that it may take, e.g. 50Gi; three checkpoints have to fit"
    )


class CheckpointSpec(SpecModel):
    """Checkpoints: where, how often, how many."""

    storage: StorageSpec | None = Field(default=None, description="volume shared by all pods; required on a cluster")
    scratch: ScratchSpec | None = Field(
        default=None,
        description="write to the node's own disk first and copy to storage behind that, where storage is slow; {} is "
        "enough",
    )
    interval: CheckpointInterval = Field(default=CheckpointInterval(), description="how often to save; default: auto")
    keep: int = Field(default=3, ge=1, le=1000, description="number of verified checkpoints to keep")
    keep_every: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="besides, keep the first checkpoint at or behind each multiple of so many steps",
    )
    keep_best: bool = Field(
        default=False, description="besides, keep the checkpoint of the lowest held-out loss; needs validation.split"
    )
    max_stale: Duration | None = Field(
        default=None,
        description="longest time to train on while no checkpoint can be written; then the attempt fails; default 30m",
    )


class SpotSpec(SpecModel):
    """Capacity that may be taken away."""

    fallback_after: Duration | None = Field(
        default=None,
        description="ask for on-demand nodes after waiting so long for spot, e.g. 30m",
    )


class RecoverySpec(SpecModel):
    """What to do when pods are lost."""

    max_failures: int = Field(default=3, ge=0, le=1000, description="failures to survive; preemptions do not count")
    spot: SpotSpec | None = Field(default=None, description="run on spot nodes; {} is enough")
    shrink_after: Duration | None = Field(
        default=None,
        description="go on with fewer nodes, but minNodes at least, after waiting so long for room; default: 5m",
    )
    hang_timeout: Duration | None = Field(
        default=None,
        description="longest time without a step; default: from the job's own steps",
    )
    notice_seconds: int = Field(
        default=120,
        ge=1,
        le=86400,
        description="time between notice and end that the capacity gives: the pods' grace period",
    )


class SecretRef(SpecModel):
    """A Secret in the job's namespace whose keys become environment variables of the trainer."""

    name: ObjectName = Field(description="name of the Secret")


class FineTuneJobSpec(SpecModel):
    """What a user asks for."""

    model: ModelSpec = Field(description="the model to begin with")
    dataset: DatasetSpec = Field(description="images and captions to learn from")
    training: TrainingSpec = Field(description="what is trained, for how long and how")
    topology: TopologySpec = Field(default=TopologySpec(), description="how many machines, and what each is")
    checkpoint: CheckpointSpec = Field(default=CheckpointSpec(), description="checkpoints: where, how often, how many")
    recovery: RecoverySpec = Field(default=RecoverySpec(), description="what to do when pods are lost")
    outputs: tuple[OutputSpec, ...] = Field(
        default=(), max_length=8, description="files to write when all steps are trained"
    )
    suspend: bool = Field(default=False, description="save, stop and give the machines back until set to false")
    queue_name: ObjectName | None = Field(default=None, description="queue that admits the job")
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pods")
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, le=MAX_SECONDS, description="fail the job when it takes longer in all"
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None, ge=0, le=MAX_SECONDS, description="delete the job so long after its end"
    )
    secrets: tuple[SecretRef, ...] = Field(
        default=(),
        max_length=16,
        description="Secrets for the trainer's environment",
        json_schema_extra=list_map("name"),
    )
    managed_by: ManagerName = Field(
        default=CONTROLLER,
        description="controller that takes care of the job; the operator leaves the job of another one alone",
    )
    pod_template: dict[str, Any] | None = Field(
        default=None,
        description="PodTemplateSpec merged over the rendered pods by Kubernetes' strategic rules: containers, env and "
        "volumes by name, other lists (tolerations, command) whole",
    )


class StatusModel(SpecModel):
    """Base of what the operator writes; fields that a newer operator wrote are kept out, not refused."""

    model_config = SpecModel.model_config | {"extra": "ignore"}


class Condition(StatusModel):
    """A Kubernetes condition."""

    type: str = Field(description="what the condition is about")
    status: str = Field(description="True, False or Unknown")
    reason: str = Field(description="why, in one CamelCase word")
    message: str = Field(default="", description="why, in a sentence")
    last_transition_time: datetime = Field(description="when status last changed")
    observed_generation: int | None = Field(default=None, description="generation of the spec that it speaks of")


class CheckpointStatus(StatusModel):
    """The newest checkpoint that was committed and verified."""

    step: int = Field(description="optimizer steps that it holds")
    time: datetime = Field(description="when it was committed")
    bytes: int = Field(description="its size")
    attempt: int | None = Field(default=None, description="attempt that wrote it")
    save_seconds: float | None = Field(default=None, description="from its step until it was durable")
    stall_seconds: float | None = Field(default=None, description="time for which training stood still for it")


class AttemptSeconds(StatusModel):
    """Where the time of a restart goes, in seconds. What is not there has not come about."""

    teardown: float | None = Field(
        default=None, description="from the end of the attempt before to this one's start, its back-off included"
    )
    queueing: float | None = Field(default=None, description="until all pods had a node")
    pulling: float | None = Field(default=None, description="from there until all containers ran")
    restoring: float | None = Field(default=None, description="from there until the ranks began to train")
    first_step: float | None = Field(default=None, description="from there until the first step was finished")
    detection: float | None = Field(
        default=None, description="from the end of its first container until that was seen, where both are known"
    )


class Capacity(StrEnum):
    """What kind of nodes a pod asks for."""

    SPOT = "spot"
    """Spot nodes and no others."""
    ANY = "any"
    """Spot nodes where there are some, others where there are none."""


class AttemptStatus(StatusModel):
    """One line of the ledger: how an attempt began and why it ended."""

    attempt: int = Field(description="number, from 1")
    started_at: datetime = Field(description="when it was decided")
    gang_complete: bool = Field(default=False, description="whether all its pods had been seen")
    pod_attempts: tuple[int, ...] = Field(
        default=(),
        exclude_if=lambda value: not value,
        description="for each node rank the attempt that its pod was made for, where pods of earlier ones were kept",
    )
    training_at: datetime | None = Field(default=None, description="when the first step of it was finished")
    progress_at: datetime | None = Field(default=None, description="when anything was last seen to go on")
    from_step: int | None = Field(default=None, description="step that it restored")
    to_step: int | None = Field(default=None, description="last step that it was seen to finish")
    nodes: int | None = Field(default=None, description="number of its pods, where that is not maxNodes")
    pod_ranks: tuple[int, ...] | None = Field(
        default=None, description="for each node rank the number in its pod's name, where these are not the same"
    )
    pod_nodes: tuple[str, ...] | None = Field(
        default=None, description="for each node rank the node of its pod, while the attempt is at work"
    )
    capacity: Capacity | None = Field(
        default=None, description="what its new pods ask for; not there: what recovery.spot says"
    )
    mtbf_seconds: float | None = Field(
        default=None, description="mean time between the job's interruptions when it began, as told to its ranks"
    )
    next_nodes: int | None = Field(
        default=None, description="number of pods that the next attempt begins with, where its end decided that"
    )
    ended_at: datetime | None = Field(default=None, description="when its end was seen")
    reason: str | None = Field(default=None, description="why it ended, one of the documented reasons")
    counts_as: str | None = Field(default=None, description="Preemption, Failure or nothing")
    rank: int | None = Field(default=None, description="first rank that was lost or failed")
    pod: str | None = Field(default=None, description="its pod")
    node: str | None = Field(default=None, description="its node")
    exit_code: int | None = Field(default=None, description="its exit code")
    message: str | None = Field(default=None, description="its last words")
    seconds: AttemptSeconds = Field(default=AttemptSeconds(), description="where its time went beside training")
    lost_steps: int | None = Field(default=None, description="steps that the next attempt had to do again")


class OutputStatus(StatusModel):
    """An output that was written whole."""

    format: str = Field(description="file format")
    to: str = Field(description="where it is")
    bytes: int = Field(description="its size")
    sha256: str | None = Field(default=None, description="hash of the file, where it is one file")


class TallyStatus(StatusModel):
    """Sums over all attempts, for the ledger keeps only the newest."""

    failures_since_checkpoint: int = Field(
        default=0, description="failures since the last newer checkpoint; maxFailures bounds them"
    )
    failed_step: int | None = Field(default=None, description="step that the last attempt failed after")
    failures_at_step: int = Field(default=0, description="failures in a row after that step")
    trained_steps: int = Field(default=0, description="optimizer steps seen to be finished, those done again included")
    trained_seconds: float = Field(default=0, description="time in which they were trained")
    step_time: datetime | None = Field(default=None, description="when the newest step was seen")
    suspended_seconds: float = Field(default=0, description="time for which the job was suspended")


class FineTuneJobStatus(StatusModel):
    """How far the job is, what it lost, and when it will end."""

    observed_generation: int | None = Field(
        default=None, description="generation of the spec that this status speaks of"
    )
    phase: Phase | None = Field(default=None, description="where the job is")
    reason: str | None = Field(default=None, description="why, in one CamelCase word")
    message: str | None = Field(default=None, description="why, in a sentence")
    conditions: tuple[Condition, ...] = Field(
        default=(),
        description="Accepted, Running, Recovering, Complete, Failed, Suspended, NoticeTooShort, CheckpointStale",
        json_schema_extra=list_map("type"),
    )
    attempt: int = Field(default=0, description="newest attempt; an older one may no longer commit")
    step: int | None = Field(default=None, description="finished optimizer steps")
    total_steps: int | None = Field(default=None, description="optimizer steps in all")
    progress: str | None = Field(default=None, description="share of the steps, e.g. 40%")
    eta: str | None = Field(default=None, description="time left at the present speed, e.g. 4m10s")
    loss: float | None = Field(default=None, description="training loss, smoothed")
    images_per_second: float | None = Field(default=None, description="images trained in a second, by all ranks")
    last_checkpoint: CheckpointStatus | None = Field(default=None, description="newest verified checkpoint")
    checkpoint_interval_seconds: float | None = Field(
        default=None,
        description="time between checkpoints; with auto it follows from their cost and the rate of interruptions",
    )
    corrupt_checkpoints: int | None = Field(default=None, description="damaged checkpoints that were set aside")
    nodes: str | None = Field(default=None, description="pods that are up / pods asked for, e.g. 3/4")
    preemptions: int = Field(default=0, description="attempts that capacity ended")
    failures: int = Field(default=0, description="attempts that the program ended")
    lost_steps: int = Field(default=0, description="steps that had to be done again")
    goodput: float | None = Field(
        default=None, description="share of the time since the start that went into kept steps"
    )
    start_time: datetime | None = Field(default=None, description="when the first attempt began")
    completion_time: datetime | None = Field(default=None, description="when the job ended")
    attempts: tuple[AttemptStatus, ...] = Field(
        default=(), description="the ledger: the newest attempts", json_schema_extra=list_map("attempt")
    )
    tally: TallyStatus = Field(default=TallyStatus(), description="sums over all attempts")
    warnings: tuple[str, ...] = Field(default=(), description="what the trainer warned of, the newest last")
    outputs: tuple[OutputStatus, ...] = Field(default=(), description="outputs that were written")


class ObjectMeta(StatusModel):
    """The part of Kubernetes' metadata that the operator reads."""

    name: str
    namespace: Annotated[str, Field(max_length=63, pattern="^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")] = "default"
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class FineTuneJob(SpecModel):
    """Fine-tunes a diffusion model on machines that may be taken away, and goes on from where it was."""

    api_version: str = Field(default=API_VERSION, description="version of this schema, finetune-operator.io/v1alpha1")
    kind: str = Field(default=KIND, description="FineTuneJob")
    metadata: ObjectMeta = Field(description="name, namespace, labels and annotations")
    spec: FineTuneJobSpec = Field(description="what a user asks for")
    status: FineTuneJobStatus = Field(
        default=FineTuneJobStatus(), description="how far the job is, what it lost, and when it will end"
    )
