"""The run specification: the parts of a FineTuneJob that the trainer needs, and the global batch of the job.

The operator writes it into the job's ConfigMap; every rank reads the same file.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from finetune_contract.cpu.spec import CpuSpec
from finetune_contract.input_spec import DatasetSpec, ModelSpec
from finetune_contract.outputs.spec import OutputSpec
from finetune_contract.spec import CheckpointInterval, CheckpointSource, Switch, SwitchMode, TrainingSpec
from finetune_contract.spec_model import SpecModel


class RunTarget(SpecModel):
    """Length of the training, and the outputs: the part of a run that may change between its attempts."""

    steps: int | None = Field(default=None, ge=1)
    epochs: int | None = Field(default=None, ge=1)
    outputs: tuple[OutputSpec, ...] = ()

    def to_json(self) -> str:
        """Return compact JSON in a fixed order: the same target gives the same text."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class SpeedSettings(SpecModel):
    """Settings that change the speed of a run and not what its checkpoints contain: they may change at any time."""

    cuda_graphs: Switch = SwitchMode.AUTO
    compile: Switch = SwitchMode.AUTO

    @staticmethod
    def of(training: TrainingSpec) -> SpeedSettings:
        """Return those of a run."""
        return SpeedSettings(**{name: getattr(training, name) for name in SpeedSettings.model_fields})

    def to_json(self) -> str:
        """Return compact JSON in a fixed order."""
        return self.model_dump_json(by_alias=True)


class RunSpec(SpecModel):
    """One job, the same for every rank of every attempt: independent of the attempt and of the number of pods."""

    namespace: str
    job: str
    uid: str
    model: ModelSpec
    dataset: DatasetSpec
    training: TrainingSpec
    global_batch: int = Field(ge=1, description="samples in one optimizer step, for any number of ranks")
    checkpoint_interval: CheckpointInterval = CheckpointInterval()
    keep: int = Field(default=3, ge=1)
    keep_every_steps: int | None = Field(default=None, ge=1)
    keep_best: bool = False
    max_stale_seconds: float = Field(
        default=1800.0, gt=0, description="time after which the attempt fails if no checkpoint can be written"
    )
    start_from: CheckpointSource | None = None
    """Checkpoint of another job that the first step continues from."""
    cpu: CpuSpec = CpuSpec()
    """Settings of CPU training."""
    outputs: tuple[OutputSpec, ...] = ()

    @property
    def target(self) -> RunTarget:
        """Length and outputs of the run."""
        return RunTarget(steps=self.training.steps, epochs=self.training.epochs, outputs=self.outputs)

    def with_target(self, target: RunTarget) -> RunSpec:
        """Return the run with another length and other outputs."""
        length = {"steps": target.steps, "epochs": target.epochs}
        return self.model_copy(update={"training": self.training.model_copy(update=length), "outputs": target.outputs})

    def with_speed(self, speed: SpeedSettings) -> RunSpec:
        """Return the run with other settings of its speed."""
        changes = {name: getattr(speed, name) for name in SpeedSettings.model_fields}
        return self.model_copy(update={"training": self.training.model_copy(update=changes)})

    @classmethod
    def read(cls, path: Path) -> RunSpec:
        """Read the file that the operator wrote.

        Raises:
            OSError: the file cannot be read.
            pydantic.ValidationError: it is not a run specification.
        """
        return cls.model_validate_json(path.read_text(encoding="utf-8"))

    def to_json(self) -> str:
        """Return JSON in a fixed order: the same run gives the same text."""
        return self.model_dump_json(by_alias=True, exclude_none=True, indent=1)
