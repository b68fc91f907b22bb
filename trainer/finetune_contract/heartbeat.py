"""The heartbeat: the only channel between a supervisor and the coordinator.

A supervisor posts a Heartbeat every few seconds and at every change; the Reply contains its orders. The ranks report to
their supervisor in lines of the same RankReport. Torch-free; both sides import it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

BEAT_PATH = "/v1/beat"
"""The coordinator's path for heartbeats (POST)."""
MAX_BEAT_BYTES = 64 * 1024
"""Largest heartbeat; the coordinator refuses larger ones."""
MAX_LAST_OUTPUT = 2000
"""Characters kept of a rank's stderr. The termination message holds 4,096 bytes in all."""


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

    step: int = Field(ge=0)
    time: float = Field(description="time of the commit, in seconds since the epoch")
    size_bytes: int = Field(ge=0)
    attempt: int = Field(ge=1)
    stall_seconds: float | None = Field(
        default=None, ge=0, description="time for which the training loop paused for it"
    )
    durable_seconds: float | None = Field(default=None, ge=0, description="from its step until it was durable")
    interval_seconds: float | None = Field(default=None, ge=0, description="time until the next one is due")


class RankReport(Wire):
    """One line from a rank to its supervisor, and one entry of a heartbeat."""

    rank: int = Field(ge=0)
    state: RankState
    step: int | None = Field(default=None, ge=0, description="completed optimizer steps")
    total_steps: int | None = Field(default=None, ge=1)
    restored_step: int | None = Field(default=None, ge=0, description="step at which this attempt began")
    loss: float | None = Field(default=None, description="mean over the last global batches; absent if it is NaN")
    images_per_second: float | None = Field(default=None, ge=0, description="of all ranks together")
    checkpoint: CommittedCheckpoint | None = None
    checkpoint_error: str | None = Field(
        default=None, description="why no newer checkpoint can be written; empty: the error is over"
    )
    corrupt_checkpoints: int | None = Field(
        default=None, ge=0, description="corrupt checkpoints moved to a corrupt- folder since the job began"
    )
    detail: str | None = Field(default=None, max_length=500, description="progress of the state, e.g. '12/64 images'")
    warnings: tuple[str, ...] = Field(default=(), description="newest messages for users; repeated in every heartbeat")
    outputs: tuple[WrittenOutput, ...] = ()


class WrittenOutput(Wire):
    """A completely written output."""

    format: str
    to: str
    size_bytes: int = Field(ge=0)
    sha256: str | None = None


class RankEnd(Wire):
    """End of a rank."""

    rank: int
    exit_code: Annotated[int, Field(description="of the process; 128+n if signal n ended it")]
    last_words: str = Field(default="", max_length=MAX_LAST_OUTPUT, description="last lines of its stderr")


class Termination(Wire):
    """The pod's termination message, written by the supervisor; at most 4,096 bytes.

    The first entry of `ends` is the rank that failed first: it is the cause, the others are consequences.
    """

    attempt: int
    exit_code: int
    step: int | None = None
    notice: bool = Field(default=False, description="whether SIGTERM was received before the ranks ended")
    ends: tuple[RankEnd, ...] = ()


class Heartbeat(Wire):
    """Message of a supervisor to the coordinator."""

    job: str
    namespace: str
    job_uid: str
    pod: str
    pod_uid: str
    attempt: int = Field(ge=1)
    node_rank: int = Field(ge=0)
    sequence: int = Field(ge=0, description="number of the supervisor's heartbeat; older ones are ignored")
    ranks: tuple[RankReport, ...] = ()
    ends: tuple[RankEnd, ...] = ()
    notice: bool = Field(default=False, description="this pod received a preemption notice")
    waiting: bool = Field(
        default=False, description="its ranks ended because they lost a peer; it waits for a new gang"
    )


class Order(StrEnum):
    """Order of the coordinator to a supervisor."""

    CONTINUE = "Continue"
    SAVE_AND_STOP = "SaveAndStop"


class NewWorld(Wire):
    """Position of a kept pod in the next attempt; its ranks are restarted there."""

    attempt: int = Field(ge=1)
    node_rank: int = Field(ge=0)
    num_nodes: int = Field(ge=1)
    master_addr: str = Field(description="host of rank 0")
    master_port: int = Field(ge=1, le=65535)
    mtbf_seconds: float | None = Field(default=None, gt=0, description="observed mean time between interruptions")


class Reply(Wire):
    """The coordinator's answer to a heartbeat."""

    order: Order = Order.CONTINUE
    attempt: int | None = Field(
        default=None, description="the job's newest attempt; a supervisor of an older one stops, unless `world` is set"
    )
    world: NewWorld | None = Field(default=None, description="position of this pod's ranks in the newest attempt")
    beat_seconds: float | None = Field(default=None, gt=0, description="requested interval between heartbeats")
    peer_lost: bool = Field(default=False, description="a peer is lost, so no collective of this attempt can complete")
    stacks: bool = Field(default=False, description="the attempt makes no progress: write the stacks of every rank")


RankReport.model_rebuild()
