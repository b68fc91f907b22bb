"""FineTuneJob (`finetune-operator.io/v1alpha1`, short name `ftj`): the only source of the CRD, its docs and its checks.

The parts that the trainer reads, too, are defined in `finetune_contract.spec`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_contract.phase import Phase
from finetune_contract.spec import (
    MAX_STEPS,
    CheckpointInterval,
    DatasetSpec,
    ModelSpec,
    OutputSpec,
    SpecModel,
    TrainingSpec,
)
from finetune_operator.api.fields import Duration, ManagerName, ObjectName, Quantity, list_map
from finetune_operator.api.names import MAX_NODES
from finetune_operator.api.storage import ScratchSpec, StorageSpec

GROUP = "finetune-operator.io"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
SINGULAR = "finetunejob"
SHORT_NAME = "ftj"
CONTROLLER = f"{GROUP}/finetunejob-controller"
"""Name of this operator in `spec.managedBy`."""

MAX_SECONDS = 2**31 - 1
"""Longest deadline or TTL: 68 years."""


class Accelerator(StrEnum):
    """Devices of the ranks."""

    GPU = "gpu"
    CPU = "cpu"


class CpuBackend(StrEnum):
    """Communication libraries of CPU ranks."""

    GLOO = "gloo"
    CCL = "ccl"


class CpuSpec(SpecModel):
    """Settings of CPU training."""

    backend: CpuBackend = Field(
        default=CpuBackend.GLOO, description="Communication library: gloo (built into torch) or ccl (oneCCL with IPEX)"
    )


class TopologySpec(SpecModel):
    """Number and kind of the pods."""

    accelerator: Accelerator = Field(default=Accelerator.GPU, description="Devices of the ranks")
    nodes: int | None = Field(
        default=None,
        ge=1,
        le=MAX_NODES,
        description="Number of pods; default: 1. For a range write minNodes and maxNodes instead",
    )
    min_nodes: int | None = Field(
        default=None, ge=1, le=MAX_NODES, description="Smallest number of pods that the job may continue with"
    )
    max_nodes: int | None = Field(
        default=None, ge=1, le=MAX_NODES, description="Number of pods if the cluster has room for all of them"
    )
    processes_per_node: int = Field(
        default=1, ge=1, le=64, description="Number of ranks in each pod; with accelerator gpu also its number of GPUs"
    )
    resources: dict[str, Quantity] | None = Field(
        default=None,
        max_length=8,
        description="Resources of each pod, e.g. {cpu: 8, memory: 32Gi}; nvidia.com/gpu is derived from "
        "processesPerNode",
    )
    cpu: CpuSpec = Field(default=CpuSpec(), description="Settings of CPU training")


class CheckpointSpec(SpecModel):
    """Storage, frequency and number of the checkpoints."""

    storage: StorageSpec | None = Field(default=None, description="Storage that all pods share; required on a cluster")
    scratch: ScratchSpec | None = Field(
        default=None,
        description="Write checkpoints to the node's own disk first and copy them to storage in the background; for "
        "slow storage; {} enables it",
    )
    interval: CheckpointInterval = Field(
        default=CheckpointInterval(), description="Time or steps between checkpoints; default: chosen automatically"
    )
    keep: int = Field(default=3, ge=1, le=1000, description="Number of verified checkpoints to keep")
    keep_every: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="Also keep the first checkpoint at or after each multiple of this number of steps",
    )
    keep_best: bool = Field(
        default=False,
        description="Also keep the checkpoint with the lowest held-out loss; requires training.validation.split",
    )
    max_stale: Duration | None = Field(
        default=None,
        description="Time after which the attempt fails if no checkpoint can be written; default: 30m",
    )


class SpotSpec(SpecModel):
    """Preemptible nodes."""

    fallback_after: Duration | None = Field(
        default=None,
        description="Waiting time for spot nodes after which on-demand nodes are accepted, too, e.g. 30m; default: "
        "never",
    )


class RecoverySpec(SpecModel):
    """Recovery from failures and lost pods."""

    max_failures: int = Field(
        default=3,
        ge=0,
        le=1000,
        description="Number of failures after which the job still continues; preemptions do not count",
    )
    spot: SpotSpec | None = Field(default=None, description="Run on spot nodes; {} enables it")
    shrink_after: Duration | None = Field(
        default=None,
        description="Waiting time for missing pods after which the job continues with fewer, at least minNodes; "
        "default: 5m",
    )
    hang_timeout: Duration | None = Field(
        default=None,
        description="Longest time without a completed step; default: derived from the measured step time",
    )
    notice_seconds: int = Field(
        default=120,
        ge=1,
        le=86400,
        description="Grace period between the preemption notice and the kill, in seconds",
    )


class SecretRef(SpecModel):
    """A Secret in the job's namespace whose keys become environment variables of the trainer."""

    name: ObjectName = Field(description="Name of the Secret")


class FineTuneJobSpec(SpecModel):
    """Desired state of the job."""

    model: ModelSpec = Field(description="Base model")
    dataset: DatasetSpec = Field(description="Images and captions to train on")
    training: TrainingSpec = Field(description="Method, length and hyperparameters of the training")
    topology: TopologySpec = Field(default=TopologySpec(), description="Number and kind of the pods")
    checkpoint: CheckpointSpec = Field(
        default=CheckpointSpec(), description="Storage, frequency and number of the checkpoints"
    )
    recovery: RecoverySpec = Field(default=RecoverySpec(), description="Recovery from failures and lost pods")
    outputs: tuple[OutputSpec, ...] = Field(
        default=(), max_length=8, description="Outputs to write after the last step"
    )
    suspend: bool = Field(default=False, description="Save, stop and release the nodes until it is set to false")
    queue_name: ObjectName | None = Field(default=None, description="Queue that admits the job; not supported yet")
    priority_class_name: ObjectName | None = Field(default=None, description="PriorityClass of the pods")
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, le=MAX_SECONDS, description="Time in seconds after which the job fails"
    )
    ttl_seconds_after_finished: int | None = Field(
        default=None, ge=0, le=MAX_SECONDS, description="Time in seconds after the job's end when it is deleted"
    )
    secrets: tuple[SecretRef, ...] = Field(
        default=(),
        max_length=16,
        description="Secrets whose keys become environment variables of the trainer",
        json_schema_extra=list_map("name"),
    )
    managed_by: ManagerName = Field(
        default=CONTROLLER,
        description="Controller that manages the job; this operator ignores jobs of other controllers",
    )
    pod_template: dict[str, Any] | None = Field(
        default=None,
        description="PodTemplateSpec that is merged over the pods by Kubernetes' strategic rules: containers, env and "
        "volumes by name; other lists (tolerations, command) are replaced",
    )


class StatusModel(SpecModel):
    """Base of the parts that the operator writes. Fields written by a newer operator are ignored, not refused."""

    model_config = SpecModel.model_config | {"extra": "ignore"}


class Condition(StatusModel):
    """A Kubernetes condition."""

    type: str = Field(description="Type of the condition")
    status: str = Field(description="True, False or Unknown")
    reason: str = Field(description="Reason in one CamelCase word")
    message: str = Field(default="", description="Explanation for users")
    last_transition_time: datetime = Field(description="Time of the last change of status")
    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the condition refers to"
    )


class CheckpointStatus(StatusModel):
    """The newest committed and verified checkpoint."""

    step: int = Field(description="Number of optimizer steps that it contains")
    time: datetime = Field(description="Time of the commit")
    bytes: int = Field(description="Size in bytes")
    attempt: int | None = Field(default=None, description="Attempt that wrote it")
    save_seconds: float | None = Field(default=None, description="Time from its step until it was durable, in seconds")
    stall_seconds: float | None = Field(default=None, description="Time for which training paused for it, in seconds")


class AttemptSeconds(StatusModel):
    """Duration of each phase of a restart, in seconds. A phase that has not ended is absent."""

    teardown: float | None = Field(
        default=None, description="From the end of the previous attempt to the start of this one, back-off included"
    )
    queueing: float | None = Field(default=None, description="From the start until all pods had a node")
    pulling: float | None = Field(default=None, description="From the end of queueing until all containers ran")
    restoring: float | None = Field(default=None, description="From the end of pulling until the ranks began to train")
    first_step: float | None = Field(
        default=None, description="From the end of restoring until the first step was completed"
    )
    detection: float | None = Field(
        default=None,
        description="From the end of the attempt's first container until the operator observed it, if both are known",
    )


class Capacity(StrEnum):
    """Kind of nodes that a pod requests."""

    SPOT = "spot"
    """Spot nodes only."""
    ANY = "any"
    """Spot nodes if available, otherwise any node."""


class AttemptStatus(StatusModel):
    """One entry of the ledger: the start, the progress and the end of an attempt."""

    attempt: int = Field(description="Number of the attempt, from 1")
    started_at: datetime = Field(description="Time of the decision to start it")
    gang_complete: bool = Field(default=False, description="Whether all its pods have been observed")
    pod_attempts: tuple[int, ...] = Field(
        default=(),
        exclude_if=lambda value: not value,
        description="Attempt that created the pod of each node rank, if pods of earlier attempts were kept",
    )
    training_at: datetime | None = Field(default=None, description="Time at which its first step was completed")
    progress_at: datetime | None = Field(default=None, description="Time of the last observed progress")
    from_step: int | None = Field(default=None, description="Step that it restored")
    to_step: int | None = Field(default=None, description="Last step that was observed to be completed")
    nodes: int | None = Field(default=None, description="Number of its pods, if that is not maxNodes")
    pod_ranks: tuple[int, ...] | None = Field(
        default=None, description="Number in the pod's name for each node rank, if it differs from the node rank"
    )
    pod_nodes: tuple[str, ...] | None = Field(
        default=None, description="Kubernetes node of each node rank's pod, while the attempt is running"
    )
    capacity: Capacity | None = Field(
        default=None, description="Nodes that its new pods request; absent: as recovery.spot specifies"
    )
    mtbf_seconds: float | None = Field(
        default=None,
        description="Mean time between the job's interruptions at its start, in seconds, as its ranks received it",
    )
    next_nodes: int | None = Field(
        default=None, description="Number of pods that the next attempt begins with, if the end of this one decided it"
    )
    ended_at: datetime | None = Field(default=None, description="Time at which its end was observed")
    reason: str | None = Field(default=None, description="Reason of its end; see the reference of reasons")
    counts_as: str | None = Field(default=None, description="Preemption or Failure; absent: neither")
    rank: int | None = Field(default=None, description="First rank that was lost or failed")
    pod: str | None = Field(default=None, description="Pod of that rank")
    node: str | None = Field(default=None, description="Node of that pod")
    exit_code: int | None = Field(default=None, description="Exit code of that rank")
    message: str | None = Field(default=None, description="Last output of that rank")
    seconds: AttemptSeconds = Field(default=AttemptSeconds(), description="Duration of each phase before training")
    lost_steps: int | None = Field(default=None, description="Number of steps that the next attempt had to repeat")


class OutputStatus(StatusModel):
    """A completely written output."""

    format: str = Field(description="File format")
    to: str = Field(description="Location")
    bytes: int = Field(description="Size in bytes")
    sha256: str | None = Field(default=None, description="SHA-256 of the file, if it is a single file")


class TallyStatus(StatusModel):
    """Sums over all attempts; the ledger keeps only the newest ones."""

    failures_since_checkpoint: int = Field(
        default=0, description="Failures since the last new checkpoint; recovery.maxFailures limits them"
    )
    failed_step: int | None = Field(default=None, description="Last completed step of the last failed attempt")
    failures_at_step: int = Field(default=0, description="Consecutive failures after that step")
    trained_steps: int = Field(default=0, description="Observed optimizer steps, repeated ones included")
    trained_seconds: float = Field(default=0, description="Time in which they were trained, in seconds")
    step_time: datetime | None = Field(default=None, description="Time at which the newest step was observed")
    suspended_seconds: float = Field(default=0, description="Time for which the job was suspended, in seconds")


class FineTuneJobStatus(StatusModel):
    """Observed state of the job."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that this status refers to"
    )
    phase: Phase | None = Field(default=None, description="Phase of the job")
    reason: str | None = Field(default=None, description="Reason in one CamelCase word")
    message: str | None = Field(default=None, description="Explanation for users")
    conditions: tuple[Condition, ...] = Field(
        default=(),
        description="Conditions: Accepted, Running, Recovering, Complete, Failed, Suspended, NoticeTooShort, "
        "CheckpointStale",
        json_schema_extra=list_map("type"),
    )
    attempt: int = Field(
        default=0, description="Number of the newest attempt; older attempts can no longer commit checkpoints"
    )
    step: int | None = Field(default=None, description="Completed optimizer steps")
    total_steps: int | None = Field(default=None, description="Total number of optimizer steps")
    progress: str | None = Field(default=None, description="Completed share of the steps, e.g. 40%")
    eta: str | None = Field(default=None, description="Estimated time left, e.g. 4m10s")
    loss: float | None = Field(default=None, description="Smoothed training loss")
    images_per_second: float | None = Field(default=None, description="Images per second, of all ranks together")
    last_checkpoint: CheckpointStatus | None = Field(default=None, description="Newest verified checkpoint")
    checkpoint_interval_seconds: float | None = Field(
        default=None,
        description="Time between checkpoints in seconds; without an interval in the spec, derived from the cost of "
        "a save "
        "and the rate of interruptions",
    )
    corrupt_checkpoints: int | None = Field(
        default=None, description="Number of corrupt checkpoints that were moved to a corrupt- folder"
    )
    nodes: str | None = Field(default=None, description="Running pods / requested pods, e.g. 3/4")
    preemptions: int = Field(default=0, description="Attempts ended by a loss of capacity")
    failures: int = Field(default=0, description="Attempts ended by an error of the program")
    lost_steps: int = Field(default=0, description="Number of repeated steps")
    goodput: float | None = Field(
        default=None, description="Share of the time since the start that was spent on steps that were kept"
    )
    start_time: datetime | None = Field(default=None, description="Start of the first attempt")
    completion_time: datetime | None = Field(default=None, description="End of the job")
    attempts: tuple[AttemptStatus, ...] = Field(
        default=(), description="The ledger: the newest attempts", json_schema_extra=list_map("attempt")
    )
    tally: TallyStatus = Field(default=TallyStatus(), description="Sums over all attempts")
    warnings: tuple[str, ...] = Field(default=(), description="Warnings of the trainer, the newest last")
    outputs: tuple[OutputStatus, ...] = Field(default=(), description="Written outputs")


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
    """Fine-tunes a diffusion model on preemptible nodes and resumes from its last checkpoint."""

    api_version: str = Field(default=API_VERSION, description="Version of this schema: finetune-operator.io/v1alpha1")
    kind: str = Field(default=KIND, description="FineTuneJob")
    metadata: ObjectMeta = Field(description="Name, namespace, labels and annotations")
    spec: FineTuneJobSpec = Field(description="Desired state of the job")
    status: FineTuneJobStatus = Field(default=FineTuneJobStatus(), description="Observed state of the job")
