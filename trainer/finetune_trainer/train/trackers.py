"""Where the curves and pictures of a run are shown, beside the files in the job's folder: rank 0 tells them.

The packages are none of the trainer's own: only what the manifest asks for is imported. A resumed run goes on in the
run that was begun, under the same name.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrackerName
from finetune_trainer.errors import ConfigError
from finetune_trainer.files import write_aside

_PACKAGES = {TrackerName.TENSORBOARD: "tensorboard", TrackerName.WANDB: "wandb", TrackerName.MLFLOW: "mlflow"}
_PROJECT = "finetune-operator"
_MLFLOW_NOTE = "mlflow-run.json"


class Tracker(Protocol):
    """One place where a run is shown."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """Show a picture that was drawn after a step."""
        ...

    def close(self) -> None:
        """Nothing more comes from this attempt."""
        ...


@dataclass(frozen=True)
class Run:
    """What a tracker is made for.

    Attributes:
        spec: the run.
        job_dir: the job's folder.
        step: where this attempt begins; what a killed one has told of later steps is not so.
    """

    spec: RunSpec
    job_dir: Path
    step: int


class TensorBoard:
    """Event files in the job's folder; see `Tracker`."""

    def __init__(self, run: Run) -> None:
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run.job_dir / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """Show a picture that was drawn after a step."""
        with Image.open(path) as image:
            self._writer.add_image("validation", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Nothing more comes from this attempt."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; without a key the run is kept in the job's folder, for `wandb sync`; see `Tracker`."""

    def __init__(self, run: Run) -> None:
        self._wandb = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=run.spec.uid,
            name=f"{run.spec.namespace}/{run.spec.job}",
            dir=str(run.job_dir),
            config=run.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
            mode=mode,
            resume="allow",
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """Show a picture that was drawn after a step."""
        self._run.log({"validation": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """Nothing more comes from this attempt; its helper process has ended behind this."""
        self._run.finish()
        self._wandb.teardown()


class MlFlow:
    """MLflow: the server that MLFLOW_TRACKING_URI names, or a database in the job's folder; see `Tracker`."""

    def __init__(self, run: Run) -> None:
        # It tells its makers of each run unless told otherwise, and where nobody can be reached it waits for them.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._mlflow = importlib.import_module("mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._mlflow.set_tracking_uri(f"sqlite:///{run.job_dir / 'mlflow.db'}")
            if self._mlflow.get_experiment_by_name(_PROJECT) is None:
                self._mlflow.create_experiment(_PROJECT, artifact_location=(run.job_dir / "mlflow").as_uri())
        if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            self._mlflow.set_experiment(_PROJECT)
        note = run.job_dir / _MLFLOW_NOTE
        known = json.loads(note.read_text(encoding="utf-8"))["run"] if note.is_file() else None
        begun = self._mlflow.start_run(run_id=known, run_name=None if known else f"{run.spec.namespace}/{run.spec.job}")
        if known is None:
            write_aside(note, json.dumps({"run": begun.info.run_id}).encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Show numbers of a step."""
        self._mlflow.log_metrics({name.replace(" ", "_"): value for name, value in values.items()}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Show a picture that was drawn after a step."""
        del step
        self._mlflow.log_artifact(str(path), "validation")

    def close(self) -> None:
        """Nothing more comes from this attempt."""
        self._mlflow.end_run()


_TRACKERS: dict[TrackerName, Callable[[Run], Tracker]] = {
    TrackerName.TENSORBOARD: TensorBoard,
    TrackerName.WANDB: WeightsAndBiases,
    TrackerName.MLFLOW: MlFlow,
}


def check_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse what is not installed, before anything is loaded.

    Raises:
        ConfigError: naming the package.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"training.trackers: {name.value} needs the package {_PACKAGES[name]}, which this image lacks; install "
                "it, or leave it out: the losses and pictures are in the job's folder anyway"
            )


def open_trackers(names: Sequence[TrackerName], run: Run) -> list[Tracker]:
    """Begin, or go on, where the manifest asks for.

    Raises:
        ConfigError: one cannot be reached.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_TRACKERS[name](run))
        except Exception as error:
            # Each library raises kinds of its own, and whatever it is, this tracker cannot be used.
            summary = " ".join(str(error).split())[:300]
            raise ConfigError(f"training.trackers: {name.value} cannot be used: {summary}") from error
    return opened
