"""Status of a FineTuneJob: what the operator writes. `job` composes it with the spec."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import Field

from finetune_contract.heartbeat import OutputState
from finetune_contract.phase import Phase
from finetune_contract.spec_model import SpecModel
from finetune_operator.api.fields import list_map


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
    scheduling: str | None = Field(
        default=None, description="How its new pods receive nodes together; absent: each by itself"
    )
    mtbf_seconds: float | None = Field(
        default=None,
        description="Mean time between the job's interruptions at its start, in seconds, as its ranks received it",
    )
    target: str | None = Field(
        default=None, description="Hash of the steps, epochs and outputs that its ranks received"
    )
    next_nodes: int | None = Field(
        default=None, description="Number of pods that the next attempt begins with, if the end of this one decided it"
    )
    ended_at: datetime | None = Field(default=None, description="Time at which its end was observed")
    reason: str | None = Field(default=None, description="Reason of its end; see the reference of reasons")
    counts_as: str | None = Field(default=None, description="Preemption, Failure or Outage; absent: none of them")
    rank: int | None = Field(default=None, description="First rank that was lost or failed")
    pod: str | None = Field(default=None, description="Pod of that rank")
    node: str | None = Field(default=None, description="Node of that pod")
    exit_code: int | None = Field(default=None, description="Exit code of that rank")
    gpu: str | None = Field(default=None, description="UUID of the GPU that failed, if its driver reported it")
    xid: int | None = Field(default=None, description="Number of the error (XID) that its driver reported")
    message: str | None = Field(default=None, description="Last output of that rank")
    seconds: AttemptSeconds = Field(default=AttemptSeconds(), description="Duration of each phase before training")
    memory: str | None = Field(
        default=None, description="Memory of each pod, if one exceeded it and the next attempt has more"
    )
    lost_steps: int | None = Field(default=None, description="Number of steps that the next attempt had to repeat")


class Bottleneck(StrEnum):
    """What limits the speed of a job."""

    COMPUTE = "Compute"
    """The devices: nothing else takes a notable part of a step."""
    HOST = "Host"
    """GPUs wait for operations that their hosts launch."""
    DATA = "Data"
    EXCHANGE = "Exchange"
    CHECKPOINT = "Checkpoint"


class TimeShares(StatusModel):
    """What the time of the last steps was spent on, as shares of it; they add up to 1."""

    compute: float = Field(default=0.0, description="The devices compute")
    host: float = Field(default=0.0, description="GPUs wait for operations that their hosts launch")
    data: float = Field(default=0.0, description="Ranks wait for samples")
    exchange: float = Field(default=0.0, description="Ranks wait for the sum of the gradients, or for slower ranks")
    checkpoint: float = Field(default=0.0, description="Training pauses for a checkpoint")


class PerformanceStatus(StatusModel):
    """Speed, memory and bottleneck of the last steps."""

    share_of_peak: float | None = Field(
        default=None,
        description="Operations of the model per second, as a share of the peak of the devices (MFU); absent for "
        "devices whose peak is unknown",
    )
    teraflops: float | None = Field(default=None, description="Operations of the model, in TFLOP/s of one device")
    utilization: float | None = Field(default=None, description="Share of the time in which the devices are busy")
    memory_allocated_bytes: int | None = Field(
        default=None,
        description="Most memory of tensors on a GPU, of the rank with the most; on CPUs the memory of its process",
    )
    memory_reserved_bytes: int | None = Field(default=None, description="Most GPU memory that torch reserved for it")
    memory_total_bytes: int | None = Field(default=None, description="Memory of that GPU")
    time_shares: TimeShares = Field(default=TimeShares(), description="What the time of the steps was spent on")
    bound_by: Bottleneck | None = Field(default=None, description="What limits the speed")
    advice: tuple[str, ...] = Field(
        default=(), exclude_if=lambda value: not value, description="What would make the job faster"
    )


class SlowRank(StatusModel):
    """A rank that needs longer than its peers for the same work."""

    rank: int = Field(description="Its number")
    node: str | None = Field(default=None, description="Node of its pod")
    factor: float = Field(description="How many times as long as its peers it needed at first")
    since: datetime = Field(description="Time from which it was slow")


class InputStatus(StatusModel):
    """What the job trains on, as its first attempt found it; an attempt that finds something else fails."""

    field: str = Field(description="Field of the spec, e.g. model.base or dataset.source")
    location: str = Field(description="Its location, as in the spec")
    commit: str | None = Field(default=None, description="Commit on the hub; all attempts read this one")
    content: str | None = Field(default=None, description="SHA-256 that depends on the contents only")
    samples: int | None = Field(default=None, description="Number of samples of a data set")


class OutputStatus(StatusModel):
    """An output: complete at its target, on its way, or failed."""

    format: str = Field(description="File format")
    to: str = Field(description="Location")
    state: OutputState = Field(
        default=OutputState.WRITTEN, description="Writing, Uploading, Written (complete at its location) or Failed"
    )
    bytes: int = Field(description="Size in bytes; 0 before its files are written")
    delivered_bytes: int | None = Field(default=None, description="Bytes at the target, while it is Uploading")
    sha256: str | None = Field(
        default=None,
        description="SHA-256 of the file; of several files, that of the lines that sha256sum prints for them, in the "
        "order of their names",
    )
    message: str | None = Field(default=None, description="Why it Failed")
    step: int | None = Field(
        default=None,
        description="Step of the checkpoint it was requested from by finetune export; absent: the last one",
    )


class ExportState(StrEnum):
    """What an export pod does."""

    WAITING = "Waiting"
    """It has not started, or the next one waits for the end of a back-off."""
    RUNNING = "Running"
    DONE = "Done"
    """All outputs are complete at their locations."""
    FAILED = "Failed"
    """No further pod is started."""


class ExportStatus(StatusModel):
    """An export by a separate pod: of the job's outputs that need other packages, or requested by finetune export."""

    request: str = Field(default="", description="Id of the request; empty: the job's own outputs")
    content: str = Field(description="Hash of the step and the outputs")
    step: int | None = Field(default=None, description="Step of the checkpoint; absent: the newest one")
    state: ExportState = Field(description="Waiting, Running, Done or Failed")
    failures: int = Field(default=0, description="Failed pods; recovery.maxFailures limits them")
    retries: int = Field(default=0, description="Pods that ended before the outputs were complete, for any reason")
    ended_pod: str | None = Field(default=None, description="UID of the last one of them")
    ended_at: datetime | None = Field(default=None, description="Time at which its end was observed")
    message: str | None = Field(default=None, description="What the export waits for, or why it failed")


class TallyStatus(StatusModel):
    """Sums over all attempts; the ledger keeps only the newest ones."""

    failures_since_checkpoint: int = Field(
        default=0, description="Failures since the last new checkpoint; recovery.maxFailures limits them"
    )
    failed_step: int | None = Field(default=None, description="Last completed step of the last failed attempt")
    failures_at_step: int = Field(default=0, description="Consecutive failures after that step")
    retried_attempt: int | None = Field(
        default=None, description="Newest attempt when the user last continued the job after its failure"
    )
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
        description="Conditions: Accepted, Running, Recovering, Complete, Succeeded, Failed, Suspended, "
        "NoticeTooShort, CheckpointStale, PodsOutdated",
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
    performance: PerformanceStatus | None = Field(
        default=None, description="Speed, memory and bottleneck, and what would make the job faster"
    )
    slow_ranks: tuple[SlowRank, ...] = Field(
        default=(),
        exclude_if=lambda value: not value,
        description="Ranks that need longer than their peers for the same work",
    )
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
    memory: str | None = Field(
        default=None, description="Memory of each pod after it was raised; absent: topology.resources.memory"
    )
    preemptions: int = Field(default=0, description="Attempts ended by a loss of capacity")
    failures: int = Field(default=0, description="Attempts ended by an error of the program")
    manual_retries: int = Field(
        default=0,
        exclude_if=lambda value: not value,
        description="Value of recovery.manualRetries that the job has acted on",
    )
    lost_steps: int = Field(default=0, description="Number of repeated steps")
    goodput: float | None = Field(
        default=None, description="Share of the time since the start that was spent on steps that were kept"
    )
    start_time: datetime | None = Field(default=None, description="Start of the first attempt")
    completion_time: datetime | None = Field(default=None, description="End of the job")
    attempts: tuple[AttemptStatus, ...] = Field(default=(), description="The ledger: the newest attempts")
    tally: TallyStatus = Field(default=TallyStatus(), description="Sums over all attempts")
    writes: int = Field(
        default=0,
        exclude_if=lambda value: not value,
        description="Number of times the operator has written this status",
    )
    warnings: tuple[str, ...] = Field(default=(), description="Warnings of the trainer, the newest last")
    inputs: tuple[InputStatus, ...] = Field(
        default=(),
        description="What the job trains on: the commits or the hashes of its base and its data set",
    )
    outputs: tuple[OutputStatus, ...] = Field(
        default=(), max_length=100, description="Outputs: those that are complete, and those of the running attempt"
    )
    exports: tuple[ExportStatus, ...] = Field(
        default=(),
        max_length=2,
        exclude_if=lambda value: not value,
        description="Exports by a separate pod: that of the job's own outputs, and the newest one by finetune export",
    )
