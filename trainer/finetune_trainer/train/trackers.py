"""Trackers: services that show a run's curves and pictures, in addition to the files in the job's folder.

Only rank 0 uses them. Their packages are optional: only those that the manifest names are imported. A resumed run
continues in the same tracker run, with the same name.
"""

from __future__ import annotations

import importlib
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
from finetune_trainer.files import write_atomically

_PROJECT = "finetune-operator"
_MLFLOW_RUN_FILE = "mlflow-run.json"


class Tracker(Protocol):
    """A service that shows a run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        ...

    def picture(self, step: int, path: Path) -> None:
        """Log a picture that was generated after a step."""
        ...

    def close(self) -> None:
        """End the tracker run of this attempt."""
        ...


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Attributes:
        spec: the run.
        job_dir: the job's folder.
        step: step at which this attempt begins; metrics of later steps are from a killed attempt and are invalid.
    """

    spec: RunSpec
    job_dir: Path
    step: int


class TensorBoard:
    """TensorBoard: event files in the job's folder; see `Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run.job_dir / "tensorboard"), purge_step=run.step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        """Log a picture that was generated after a step."""
        with Image.open(path) as image:
            self._writer.add_image("validation", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """End the tracker run of this attempt."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; without an API key the run is stored in the job's folder, for `wandb sync`; see `Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
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
        """Log the metrics of a step."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """Log a picture that was generated after a step."""
        self._run.log({"validation": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        """End the tracker run of this attempt, and its helper process."""
        self._run.finish()
        self._wandb.teardown()


class MlFlow:
    """MLflow: the server in MLFLOW_TRACKING_URI, or a database in the job's folder; see `Tracker`."""

    def __init__(self, run: TrackedRun) -> None:
        # By default MLflow sends usage data for each run, and waits for the server if it is unreachable.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self._mlflow = importlib.import_module("mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._mlflow.set_tracking_uri(f"sqlite:///{run.job_dir / 'mlflow.db'}")
            if self._mlflow.get_experiment_by_name(_PROJECT) is None:
                self._mlflow.create_experiment(_PROJECT, artifact_location=(run.job_dir / "mlflow").as_uri())
        if not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            self._mlflow.set_experiment(_PROJECT)
        file = run.job_dir / _MLFLOW_RUN_FILE
        run_id = json.loads(file.read_text(encoding="utf-8"))["run"] if file.is_file() else None
        started = self._mlflow.start_run(
            run_id=run_id, run_name=None if run_id else f"{run.spec.namespace}/{run.spec.job}"
        )
        if run_id is None:
            write_atomically(file, json.dumps({"run": started.info.run_id}).encode())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        self._mlflow.log_metrics({name.replace(" ", "_"): value for name, value in values.items()}, step=step)

    def picture(self, step: int, path: Path) -> None:
        """Log a picture that was generated after a step."""
        del step
        self._mlflow.log_artifact(str(path), "validation")

    def close(self) -> None:
        """End the tracker run of this attempt."""
        self._mlflow.end_run()


_TRACKERS: dict[TrackerName, Callable[[TrackedRun], Tracker]] = {
    TrackerName.TENSORBOARD: TensorBoard,
    TrackerName.WANDB: WeightsAndBiases,
    TrackerName.MLFLOW: MlFlow,
}


def open_trackers(names: Sequence[TrackerName], run: TrackedRun) -> list[Tracker]:
    """Open the trackers that the manifest names, and resume their runs if they exist.

    Raises:
        ConfigError: a tracker cannot be used.
    """
    opened: list[Tracker] = []
    for name in names:
        try:
            opened.append(_TRACKERS[name](run))
        except Exception as error:
            # Each library raises its own exception types. Any of them means that the tracker cannot be used.
            summary = " ".join(str(error).split())[:300]
            raise ConfigError(f"training.trackers: {name.value} cannot be used: {summary}") from error
    return opened
