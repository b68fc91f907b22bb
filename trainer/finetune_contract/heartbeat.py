"""The heartbeat: the one channel between a supervisor and the coordinator.

A supervisor posts a Beat every few seconds and at every change; the Reply says what to do. The ranks tell their
supervisor by lines of the same RankReport. Torch-free; both sides import it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

BEAT_PATH = "/v1/beat"
"""The coordinator's path for beats (POST)."""
MAX_BEAT_BYTES = 64 * 1024
"""A beat is never larger; the coordinator refuses one that is."""
MAX_LAST_WORDS = 2000
"""Characters kept of a rank's stderr. The termination message holds 4,096 bytes in all."""


class Wire(BaseModel):
    """What travels as JSON: camelCase outside, and fields that a newer side added are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="ignore")

    def to_json(self) -> str:
        """Write as compact JSON, without what is not set."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class RankState(StrEnum):
    """What a rank is doing."""

    STARTING = "Starting"
    """Process started; imports, rendezvous."""
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
    """Stopped on notice with its state committed."""
    FAILED = "Failed"


class CommittedCheckpoint(Wire):
    """The newest checkpoint that was committed and verified."""

    step: int = Field(ge=0)
    time: float = Field(description="when it was committed, seconds since the epoch")
    size_bytes: int = Field(ge=0)
    attempt: int = Field(ge=1)
    stall_seconds: float | None = Field(default=None, ge=0, description="for how long the loop stood still for it")
    durable_seconds: float | None = Field(default=None, ge=0, description="from its step until it was durable")
    interval_seconds: float | None = Field(default=None, ge=0, description="time until the next one is due")


class RankReport(Wire):
    """One line from a rank to its supervisor, and one entry of a beat."""

    rank: int = Field(ge=0)
    state: RankState
    step: int | None = Field(default=None, ge=0, description="finished optimizer steps")
    total_steps: int | None = Field(default=None, ge=1)
    restored_step: int | None = Field(default=None, ge=0, description="step that this attempt began at")
    loss: float | None = Field(default=None, description="mean over the last global batches; NaN is sent as absent")
    images_per_second: float | None = Field(default=None, ge=0, description="of the whole world")
    checkpoint: CommittedCheckpoint | None = None
    checkpoint_error: str | None = Field(
        default=None, description="why no newer checkpoint can be written; empty: it can again"
    )
    corrupt_checkpoints: int | None = Field(
        default=None, ge=0, description="damaged checkpoints that were set aside in the life of the job"
    )
    detail: str | None = Field(
        default=None, max_length=500, description="what the state is busy with, e.g. '12/64 images'"
    )
    warnings: tuple[str, ...] = Field(default=(), description="newest sentences for a person; repeated in every beat")
    outputs: tuple[WrittenOutput, ...] = ()


class WrittenOutput(Wire):
    """An output that was written whole."""

    format: str
    to: str
    size_bytes: int = Field(ge=0)
    sha256: str | None = None


class RankEnd(Wire):
    """How a rank ended."""

    rank: int
    exit_code: Annotated[int, Field(description="of the process; 128+n where signal n ended it")]
    last_words: str = Field(default="", max_length=MAX_LAST_WORDS, description="last lines of its stderr")


class Termination(Wire):
    """The supervisor's last words: written as the pod's termination message, at most 4,096 bytes.

    `ends` holds the first rank that ended badly first, for that one is the cause and the others the consequence.
    """

    attempt: int
    exit_code: int
    step: int | None = None
    notice: bool = Field(default=False, description="whether SIGTERM had come before the ranks ended")
    ends: tuple[RankEnd, ...] = ()


class Heartbeat(Wire):
    """What a supervisor posts."""

    job: str
    namespace: str
    job_uid: str
    pod: str
    pod_uid: str
    attempt: int = Field(ge=1)
    node_rank: int = Field(ge=0)
    sequence: int = Field(ge=0, description="rises by one with every beat of this supervisor; an older one is ignored")
    ranks: tuple[RankReport, ...] = ()
    ends: tuple[RankEnd, ...] = ()
    notice: bool = Field(default=False, description="this pod has been told to stop")
    waiting: bool = Field(
        default=False, description="its ranks have ended for want of a peer; it waits for a new world"
    )


class Order(StrEnum):
    """What a supervisor is asked to do."""

    CONTINUE = "Continue"
    SAVE_AND_STOP = "SaveAndStop"


class NewWorld(Wire):
    """The place of a pod that is kept in the attempt after its own: its ranks are started anew there."""

    attempt: int = Field(ge=1)
    node_rank: int = Field(ge=0)
    num_nodes: int = Field(ge=1)
    master_addr: str = Field(description="host of rank 0")
    master_port: int = Field(ge=1, le=65535)
    mtbf_seconds: float | None = Field(default=None, gt=0, description="mean time between interruptions so far")


class Reply(Wire):
    """The coordinator's answer to a beat."""

    order: Order = Order.CONTINUE
    attempt: int | None = Field(
        default=None, description="the job's newest attempt; a supervisor of an older one stops, unless it has a world"
    )
    world: NewWorld | None = Field(default=None, description="where this pod's ranks belong in the newest attempt")
    beat_seconds: float | None = Field(default=None, gt=0, description="asks for another interval between beats")
    peer_lost: bool = Field(
        default=False, description="the attempt is over for want of a peer: no collective of it will end any more"
    )
    stacks: bool = Field(default=False, description="nothing goes on: what every rank is doing is to be kept")


RankReport.model_rebuild()
