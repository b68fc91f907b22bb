"""FineTuneJob (`finetune-operator.io/v1alpha1`, short name `ftj`): the only source of the CRD, its docs and its checks.

The parts that the trainer reads, too, are defined in `finetune_contract.spec`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from finetune_contract.cpu.spec import CpuSpec
from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import CheckpointInterval, CheckpointSource, TrainingSpec
from finetune_contract.spec_model import Location, SpecModel
from finetune_contract.validation_spec import MAX_STEPS
from finetune_operator.api.fields import Duration, ManagerName, ObjectName, Quantity, list_map
from finetune_operator.api.names import MAX_NODES
from finetune_operator.api.status import FineTuneJobStatus, StatusModel
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


class Pack(StrEnum):
    """Part of the cluster that all pods of a job share."""

    RACK = "rack"
    ZONE = "zone"


class SchedulingMode(StrEnum):
    """How the pods of a gang receive their nodes: all of them or none."""

    AUTO = "auto"
    POD_GROUP = "podGroup"
    GATES = "gates"
    VOLCANO = "volcano"
    COSCHEDULING = "coscheduling"
    NONE = "none"


class PullPolicy(StrEnum):
    """When a node pulls an image; Kubernetes' values."""

    ALWAYS = "Always"
    IF_NOT_PRESENT = "IfNotPresent"
    NEVER = "Never"


class ModelImage(SpecModel):
    """An OCI image or artifact with weights, which is mounted in the pods."""

    reference: Location = Field(description="Image or artifact, e.g. registry.example.com/models/sdxl:1.0")
    pull_policy: PullPolicy | None = Field(
        default=None,
        description="When a node pulls it: Always, IfNotPresent or Never; default: Always for the tag latest, "
        "otherwise IfNotPresent",
    )


class JobModelSpec(ModelSpec):
    """The base model."""

    image: ModelImage | None = Field(
        default=None,
        description="Image with the base model, mounted at /finetune/model; base is then this folder or one below it",
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
    pack: Pack | None = Field(
        default=None,
        description="Run all pods in one rack or one zone, and wait if none has room; default: near each other if "
        "possible",
    )
    gpu_claim_template_name: ObjectName | None = Field(
        default=None,
        description="ResourceClaimTemplate (DRA) that gives each pod its GPUs, processesPerNode of them; default: the "
        "resource nvidia.com/gpu",
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
    from_: CheckpointSource | None = Field(
        default=None,
        alias="from",
        description="Checkpoint of another job to start from, with its weights, optimizer state and step; "
        "training.steps includes its steps",
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
    manual_retries: int = Field(
        default=0,
        ge=0,
        le=1000,
        description="Raise it by 1 to continue a Failed job from its last checkpoint, after the cause is fixed",
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
    max_memory: Annotated[str, Field(max_length=32)] | None = Field(
        default=None,
        description="Memory of a pod, e.g. 128Gi, up to which topology.resources.memory grows by half after each time "
        "that the kernel has ended a pod because it exceeded its memory; default: it does not grow",
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

    model: JobModelSpec = Field(description="Base model")
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
    queue_name: ObjectName | None = Field(
        default=None, description="LocalQueue of Kueue that admits the job: no pod exists before its admission"
    )
    scheduling: SchedulingMode = Field(
        default=SchedulingMode.AUTO,
        description="How the pods receive nodes together: by Kubernetes' PodGroup, scheduling gates, or a PodGroup of "
        "Volcano or Coscheduling; none: each pod by itself; auto: podGroup if the cluster serves it, otherwise gates",
    )
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
