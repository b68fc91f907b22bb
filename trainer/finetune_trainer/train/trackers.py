"""Trackers: services that show a run's curves and pictures, in addition to the files in the job's folder.

Only rank 0 uses them. Their packages are optional: only those that the manifest names are imported. A resumed run
continues in the same tracker run, with the same name.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrackerName
from finetune_trainer.errors import ConfigError
from finetune_trainer.files import write_atomically

_PROJECT = "finetune-operator"
_MLFLOW_RUN_FILE = "mlflow-run.json"
_WANDB_ONLINE, _WANDB_LOCAL = frozenset({"online", "run", "shared"}), frozenset({"offline", "dryrun", "disabled"})
_WANDB_KEY = re.compile(r"(?:[^-]*-)?[\w-]{40,}|[\w-]+\.[\w-]+\.[\w-]+")
"""A key, which may follow the prefix of a server of one's own, or a JSON web token."""
_MLFLOW_SCHEMES = frozenset(
    {"", "file", "databricks", "databricks-uc", "uc", "sqlite", "mysql", "postgresql", "mssql", "http", "https"}
)
_HOST_AND_PORT = re.compile(r"[\w.-]+:\d+(?:/.*)?")
_REMEDY = "in the Secret that spec.secrets names, or in the environment of the pods"


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
        mode = _wandb_mode(os.environ)
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


def check_trackers(names: Sequence[TrackerName], env: Mapping[str, str]) -> None:
    """Refuse trackers whose environment variables can never work. Imports no tracker, and sends no request.

    Raises:
        ConfigError: the message names the field and the variable.
    """
    for name in names:
        problem = _ENVIRONMENT_CHECKS[name](env) if name in _ENVIRONMENT_CHECKS else None
        if problem is not None:
            raise ConfigError(f"training.trackers: {name.value} cannot be used: {problem}")


def _wandb_mode(env: Mapping[str, str]) -> str:
    return env.get("WANDB_MODE") or ("online" if env.get("WANDB_API_KEY") else "offline")


def _wandb_problem(env: Mapping[str, str]) -> str | None:
    mode, key = _wandb_mode(env), env.get("WANDB_API_KEY")
    if mode not in _WANDB_ONLINE | _WANDB_LOCAL:
        return f"WANDB_MODE is {mode}; write online or offline, {_REMEDY}"
    if mode in _WANDB_LOCAL:
        return None
    if not key and not _has_other_login(env):
        return f"WANDB_MODE is {mode}, and WANDB_API_KEY is missing; write the key, or WANDB_MODE=offline, {_REMEDY}"
    if key and not _WANDB_KEY.fullmatch(key):
        return (
            "WANDB_API_KEY is not an API key: a key has at least 40 letters and digits, and no space or line break; "
            f"write the key {_REMEDY}"
        )
    if (url := env.get("WANDB_BASE_URL")) and not _is_web_address(url):
        return f"WANDB_BASE_URL is not an address; write one such as https://wandb.example.com, {_REMEDY}"
    return None


def _has_other_login(env: Mapping[str, str]) -> bool:
    """Return whether wandb may find credentials elsewhere."""
    return bool(env.get("WANDB_IDENTITY_TOKEN_FILE")) or Path(env.get("NETRC") or "~/.netrc").expanduser().is_file()


def _mlflow_problem(env: Mapping[str, str]) -> str | None:
    # The URI may contain a password, so that no message quotes it.
    uri = env.get("MLFLOW_TRACKING_URI", "")
    example = f"write one such as https://mlflow.example.com, {_REMEDY}"
    if uri != uri.strip():
        return f"MLFLOW_TRACKING_URI begins or ends with a space or a line break; remove it {_REMEDY}"
    if _HOST_AND_PORT.fullmatch(uri):
        return f"MLFLOW_TRACKING_URI does not begin with http:// or https://; {example}"
    if uri.startswith(("http:", "https:")):
        return None if _is_web_address(uri) else f"MLFLOW_TRACKING_URI is not an address; {example}"
    scheme = uri.partition(":")[0].partition("+")[0].lower() if ":" in uri.partition("/")[0] else ""
    plugins = {point.name for point in entry_points(group="mlflow.tracking_store")}
    if scheme not in _MLFLOW_SCHEMES | plugins:
        return f"MLFLOW_TRACKING_URI begins with {scheme}:, which no installed package supports; {example}"
    return None


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # The property raises an error for a port that is not a number.
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not re.search(r"\s", url)


_ENVIRONMENT_CHECKS: dict[TrackerName, Callable[[Mapping[str, str]], str | None]] = {
    TrackerName.WANDB: _wandb_problem,
    TrackerName.MLFLOW: _mlflow_problem,
}
