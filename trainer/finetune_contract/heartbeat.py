"""The heartbeat: the only channel between a supervisor and the coordinator.

A supervisor posts a Heartbeat every few seconds and at every change; the Reply contains its orders. The ranks report to
their supervisor in lines of the same RankReport. Torch-free; both sides import it.

Everything has a bound, because a pod writes it and the operator stores it: a number out of its range is refused, and a
text for users that is too long is cut.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from finetune_contract.identity import MAX_INPUTS, InputIdentity

BEAT_PATH = "/v1/beat"
"""The coordinator's path for heartbeats (POST)."""
PREFER = "Prefer"
"""Header in which a supervisor without ranks asks to wait for news, as RFC 7240 defines it: `wait=20`."""
WAIT_SECONDS = 20.0
"""Time for which such a supervisor asks."""
MAX_BEAT_BYTES = 64 * 1024
"""Largest heartbeat; the coordinator refuses larger ones."""
MAX_LAST_OUTPUT = 2000
"""Characters kept of a rank's stderr. The termination message holds 4,096 bytes in all."""
MAX_DETAIL = 500
MAX_TEXT = 1000
"""Characters kept of a warning or an error for users."""
NOT_FORKED = "ranks are not forked"
"""Start of the warning that names why a rank was started by its command."""
MAX_WARNINGS = 20
"""Warnings kept of a rank: the newest."""
MAX_TARGET = 32 * 1024
"""Characters of a RunTarget: the longest list of outputs fits."""
MAX_COUNT = 2**53
"""Largest count: all JSON parsers represent it exactly."""
MAX_INT32 = 2**31 - 1
MAX_SECONDS = 1e10
"""Longest time that is accepted: 317 years."""
MAX_LOSS = 1e39
"""Above the largest number in float32."""
MAX_IMAGES_PER_SECOND = 1e9
MAX_FLOPS = 1e21
"""Floating-point operations per second of a device; above every known one."""
MAX_GPU_FAULTS = 8
"""Faults of GPUs that a supervisor reports: the first ones. The later ones are mostly consequences."""
MAX_RANKS = 256
"""Reports, ends and outputs in one heartbeat; a pod has at most 64 ranks."""

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Rank = Annotated[int, Field(ge=0, le=MAX_INT32)]
Attempt = Annotated[int, Field(ge=1, le=MAX_INT32)]
ExitStatus = Annotated[int, Field(ge=-MAX_INT32, le=MAX_INT32)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS)]
Name = Annotated[str, Field(max_length=253)]
"""A name of Kubernetes, or a UID."""
Text = Annotated[str, AfterValidator(lambda text: text[:MAX_TEXT])]
LastOutput = Annotated[str, AfterValidator(lambda text: text[-MAX_LAST_OUTPUT:])]


def _drop_non_finite(value: object) -> object:
    """Return None for NaN and the infinities: a diverged loss, or a rate over no time."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Figure = BeforeValidator(_drop_non_finite)
"""Marks a measured number that has no value if it is not finite."""
Share = Annotated[float, Field(ge=0, le=1)]


class Wire(BaseModel):
    """Base of the messages, sent as JSON: camelCase names; fields added by a newer version are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def to_json(self) -> str:
        """Return compact JSON without the fields that are not set."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class RankState(StrEnum):
    """Activity of a rank."""

    STARTING = "Starting"
    """The process has started: imports, rendezvous."""
    LOADING = "Loading"
    """Model and data are being read."""
    CACHING = "Caching"
    """Latents and embeddings are being computed."""
    RESTORING = "Restoring"
    """A checkpoint is being chosen, verified and read."""
    TRAINING = "Training"
    SAVING = "Saving"
    VALIDATING = "Validating"
    EXPORTING = "Exporting"
    DONE = "Done"
    SAVED = "Saved"
    """Stopped on a preemption notice; its state is committed."""
    FAILED = "Failed"


class CommittedCheckpoint(Wire):
    """The newest checkpoint that was committed and verified."""

    step: Count
    time: float = Field(ge=0, le=1e12, description="time of the commit, in seconds since the epoch")
    size_bytes: Count
    attempt: Attempt
    stall_seconds: Seconds | None = Field(default=None, description="time for which the training loop paused for it")
    durable_seconds: Seconds | None = Field(default=None, description="from its step until it was durable")
    interval_seconds: Seconds | None = Field(default=None, description="time until the next one is due")


class StepShares(Wire):
    """What the time of the last steps was spent on, as shares of it; they add up to 1."""

    compute: Share = Field(description="the device computes")
    host: Share = Field(default=0.0, description="a GPU waits for operations that the host prepares")
    data: Share = Field(default=0.0, description="the loop waits for the next samples")
    exchange: Share = Field(default=0.0, description="the sum of the gradients over the ranks; slower ranks included")
    checkpoint: Share = Field(default=0.0, description="the loop is paused for a checkpoint")


class StepSettings(Wire):
    """Settings in use that decide the speed of a step. Some are chosen by the trainer, not by the manifest."""

    device: str = Field(max_length=128, description="name of the GPU, or cpu")
    precision: str = Field(max_length=8, description="number format of the forward pass, e.g. bf16")
    batch_size: int = Field(ge=1, le=MAX_INT32, description="samples in one forward pass")
    has_bf16: bool = Field(default=False, description="whether the device has bf16 instructions")
    gradient_checkpointing: bool = False
    is_compiled: bool = False
    has_cuda_graphs: bool = False
    cuda_graphs_off: Text | None = Field(default=None, description="why not all passes use CUDA graphs")
    exchange_precision: str | None = Field(default=None, max_length=8, description="number format of the exchange")
    is_sharded: bool = False


class Performance(Wire):
    """Speed and memory of one rank, measured over its last steps."""

    share_of_peak: Annotated[float | None, Figure] = Field(
        default=None, ge=0, le=10, description="operations of the model per second, as a share of the device's peak"
    )
    flops_per_second: Annotated[float | None, Figure] = Field(
        default=None, ge=0, le=MAX_FLOPS, description="floating-point operations of the model per second"
    )
    utilization: Annotated[float | None, Figure] = Field(
        default=None, ge=0, le=1, description="share of the time in which the device is busy"
    )
    memory_allocated_bytes: Count | None = Field(
        default=None, description="most memory of tensors on the GPU; on CPUs the most memory of the process"
    )
    memory_reserved_bytes: Count | None = Field(default=None, description="most GPU memory that torch has reserved")
    memory_total_bytes: Count | None = Field(default=None, description="memory of the GPU")
    shares: StepShares | None = None
    settings: StepSettings | None = None


class RankReport(Wire):
    """One line from a rank to its supervisor, and one entry of a heartbeat."""

    rank: Rank
    state: RankState
    step: Count | None = Field(default=None, description="completed optimizer steps")
    total_steps: int | None = Field(default=None, ge=1, le=MAX_COUNT)
    restored_step: Count | None = Field(default=None, description="step at which this attempt began")
    loss: Annotated[float | None, Figure] = Field(
        default=None, ge=-MAX_LOSS, le=MAX_LOSS, description="mean over the last global batches; absent if it is NaN"
    )
    images_per_second: Annotated[float | None, Figure] = Field(
        default=None, ge=0, le=MAX_IMAGES_PER_SECOND, description="of all ranks together"
    )
    checkpoint: CommittedCheckpoint | None = None
    checkpoint_error: Text | None = Field(
        default=None, description="why no newer checkpoint can be written; empty: the error is over"
    )
    corrupt_checkpoints: Count | None = Field(
        default=None, description="corrupt checkpoints moved to a corrupt- folder since the job began"
    )
    performance: Performance | None = Field(default=None, description="absent before the second step")
    start_seconds: dict[Annotated[str, Field(max_length=32)], Seconds] = Field(
        default_factory=dict, max_length=16, description="durations of the phases up to the end of the first step"
    )
    detail: Annotated[str, AfterValidator(lambda text: text[:MAX_DETAIL])] | None = Field(
        default=None, description="progress of the state, e.g. '12/64 images'"
    )
    warnings: Annotated[tuple[Text, ...], AfterValidator(lambda texts: texts[-MAX_WARNINGS:])] = Field(
        default=(), description="newest messages for users; repeated in every heartbeat"
    )
    outputs: tuple[WrittenOutput, ...] = Field(default=(), max_length=MAX_RANKS)
    unfinished_outputs: tuple[UnfinishedOutput, ...] = Field(
        default=(), max_length=MAX_RANKS, description="outputs that are being written or delivered, or have failed"
    )
    inputs: tuple[InputIdentity, ...] = Field(
        default=(), max_length=MAX_INPUTS, description="what the attempt has found of the base and the data"
    )


class WrittenOutput(Wire):
    """A completely written output."""

    format: str = Field(max_length=64)
    to: str = Field(max_length=4096)
    size_bytes: Count
    sha256: str | None = Field(default=None, max_length=64)


class OutputState(StrEnum):
    """What has happened to an output."""

    WRITING = "Writing"
    """Its files are being written."""
    UPLOADING = "Uploading"
    """They are being delivered; readers of the target do not see it yet."""
    WRITTEN = "Written"
    """It is complete at its target."""
    FAILED = "Failed"


class UnfinishedOutput(Wire):
    """An output that is not complete at its target."""

    format: str = Field(max_length=64)
    to: str = Field(max_length=4096)
    state: OutputState
    done_bytes: Count = Field(default=0, description="bytes that are at the target")
    size_bytes: Count = Field(default=0, description="0: not known yet")
    message: Text | None = Field(default=None, description="why it failed")


class RankEnd(Wire):
    """End of a rank."""

    rank: Rank
    exit_code: ExitStatus = Field(description="of the process; 128+n if signal n ended it")
    last_words: LastOutput = Field(default="", description="last lines of its stderr")


class GpuFault(Wire):
    """An error of a GPU that its driver has reported to the supervisor (NVML)."""

    uuid: str = Field(max_length=96, description="UUID of the GPU")
    xid: int | None = Field(default=None, ge=0, le=MAX_INT32, description="number of the driver's error, if it has one")
    message: Text = Field(default="", description="what the driver reports, for users")


class Termination(Wire):
    """The pod's termination message, written by the supervisor; at most 4,096 bytes.

    The first entry of `ends` is the rank that failed first: it is the cause, the others are consequences.
    """

    attempt: Attempt
    exit_code: ExitStatus
    step: Count | None = None
    notice: bool = Field(default=False, description="whether SIGTERM was received before the ranks ended")
    ends: tuple[RankEnd, ...] = Field(default=(), max_length=MAX_RANKS)
    gpu_faults: tuple[GpuFault, ...] = Field(default=(), max_length=MAX_GPU_FAULTS, description="as in Heartbeat")


class Heartbeat(Wire):
    """Message of a supervisor to the coordinator."""

    job: Name
    namespace: Name
    job_uid: Name
    pod: Name
    pod_uid: Name
    attempt: Attempt
    node_rank: Rank
    sequence: Count = Field(description="number of the supervisor's heartbeat; older ones are ignored")
    ranks: tuple[RankReport, ...] = Field(default=(), max_length=MAX_RANKS)
    ends: tuple[RankEnd, ...] = Field(default=(), max_length=MAX_RANKS)
    notice: bool = Field(default=False, description="this pod received a preemption notice")
    waiting: bool = Field(
        default=False, description="its ranks ended because they lost a peer; it waits for a new gang"
    )
    joining: bool = Field(
        default=False, description="its ranks have not started: it asks where rank 0 of its attempt is"
    )
    master_addr: Name | None = Field(default=None, description="address of rank 0 that the coordinator has named")
    gpu_faults: tuple[GpuFault, ...] = Field(
        default=(), max_length=MAX_GPU_FAULTS, description="faults of the pod's GPUs, the first one first"
    )


class Order(StrEnum):
    """Order of the coordinator to a supervisor."""

    CONTINUE = "Continue"
    SAVE_AND_STOP = "SaveAndStop"


class NewWorld(Wire):
    """Position of a pod in an attempt: of a kept pod in the next one, or of a pod that asks where rank 0 is."""

    attempt: Attempt
    node_rank: Rank
    num_nodes: int = Field(ge=1, le=MAX_INT32)
    master_addr: Name = Field(description="address of rank 0's pod")
    master_port: int = Field(ge=1, le=65535)
    mtbf_seconds: float | None = Field(
        default=None, gt=0, le=MAX_SECONDS, description="observed mean time between interruptions"
    )
    target: str | None = Field(
        default=None, max_length=MAX_TARGET, description="RunTarget of the attempt as JSON, for its ranks"
    )
    check_devices: bool = Field(default=False, description="whether the ranks check their devices before they train")


class Reply(Wire):
    """The coordinator's answer to a heartbeat."""

    order: Order = Order.CONTINUE
    attempt: int | None = Field(
        default=None,
        ge=0,
        le=MAX_INT32,
        description="the job's newest attempt; a supervisor of an older one stops, unless `world` is set",
    )
    world: NewWorld | None = Field(default=None, description="position of this pod's ranks in the newest attempt")
    beat_seconds: float | None = Field(
        default=None, gt=0, le=MAX_SECONDS, description="requested interval between heartbeats"
    )
    peer_lost: bool = Field(default=False, description="a peer is lost, so no collective of this attempt can complete")
    stacks: bool = Field(default=False, description="the attempt makes no progress: write the stacks of every rank")


def read_wait_seconds(prefer: str) -> float:
    """Return the time for which a sender wants to wait, by its `Prefer` header; 0 if it does not name one."""
    for preference in prefer.split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait" and value.strip().isdecimal():
            return min(float(value), MAX_SECONDS)
    return 0.0


def first_error(error: ValidationError) -> str:
    """Return the first error of an invalid message, with the path of its field."""
    first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"]) or "body"
    return f"{path}: {first['msg']}"


RankReport.model_rebuild()
