"""What a trainer is asked to do: the parts of a FineTuneJob that it needs, and the batch that the whole job agreed on.

The operator writes it into the job's ConfigMap; every rank reads the same file.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from finetune_contract.spec import (
    CheckpointInterval,
    DatasetSpec,
    ModelSpec,
    OutputSpec,
    SpecModel,
    TrainingSpec,
)


class RunSpec(SpecModel):
    """One job, as every rank of every attempt sees it. It does not depend on the attempt or on the number of nodes."""

    namespace: str
    job: str
    uid: str
    model: ModelSpec
    dataset: DatasetSpec
    training: TrainingSpec
    global_batch: int = Field(ge=1, description="samples in one optimizer step, whatever the number of ranks")
    checkpoint_interval: CheckpointInterval = CheckpointInterval()
    keep: int = Field(default=3, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)
    keep_best: bool = False
    max_stale_seconds: float = Field(
        default=1800.0, gt=0, description="longest time to train on while no checkpoint can be written"
    )
    outputs: tuple[OutputSpec, ...] = ()

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read the file that the operator wrote.

        Raises:
            OSError: it cannot be read.
            pydantic.ValidationError: it is not a run specification.
        """
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def to_json(self) -> str:
        """Write as JSON, sorted, so that the same run is the same text."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=1)
