"""The metrics logger and the trackers: logged steps, losses by timestep, and resumed tracker runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
from PIL import Image

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrackerName
from finetune_trainer.distributed.gradients import NUM_TIMESTEP_BUCKETS
from finetune_trainer.errors import ConfigError
from finetune_trainer.train.metrics_logger import EVERY_STEPS, MetricsLogger
from finetune_trainer.train.trackers import TrackedRun, check_trackers, open_trackers
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

pytestmark = pytest.mark.trainer


class RecordingTracker:
    """A tracker that records what is logged."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, Path]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def picture(self, step: int, path: Path) -> None:
        self.pictures.append((step, path))

    def close(self) -> None:
        self.logged.append((-1, {}))


class FailingTracker(RecordingTracker):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise OSError("the disk is full")


def tenths(**values: float) -> list[float]:
    listed = [0.0] * NUM_TIMESTEP_BUCKETS
    for name, value in values.items():
        listed[int(name[1:])] = value
    return listed


def test_losses_by_timestep_are_averaged_between_logged_steps() -> None:
    recorded = RecordingTracker()
    logger = MetricsLogger([recorded], 1000, pytest.fail)
    logger.log_step(1, {"loss": 1.0}, tenths(t0=3.0), tenths(t0=2))
    for step in range(2, EVERY_STEPS + 1):
        logger.log_step(step, {"loss": step}, tenths(t0=1.0, t9=4.0), tenths(t0=1, t9=2))
    assert recorded.logged == [
        (1, {"loss": 1.0, "loss/timesteps 0000-0099": 1.5}),
        (EVERY_STEPS, {"loss": EVERY_STEPS, "loss/timesteps 0000-0099": 1.0, "loss/timesteps 0900-0999": 2.0}),
    ]


def test_failing_tracker_is_disabled_and_the_others_continue() -> None:
    recorded, warnings = RecordingTracker(), list[str]()
    logger = MetricsLogger([FailingTracker(), recorded], 1000, warnings.append)
    for step in (1, EVERY_STEPS):
        logger.log_step(step, {"loss": 1.0}, tenths(), tenths())
    assert warnings == ["training.trackers: FailingTracker failed and is disabled: the disk is full"]
    assert [step for step, _ in recorded.logged] == [1, EVERY_STEPS]


def run_of(job_dir: Path, step: int) -> TrackedRun:
    spec = {"namespace": "default", "job": "dog", "uid": "abc", "model": {"base": "x"}, "dataset": {"source": "y"}}
    return TrackedRun(RunSpec.model_validate({**spec, "training": {"method": "LoRA"}, "globalBatch": 1}), job_dir, step)


@pytest.mark.parametrize("name", list(TrackerName))
def test_resumed_run_continues_in_the_same_tracker_run(
    name: TrackerName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses the real packages."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    picture = tmp_path / "grid.png"
    Image.new("RGB", (4, 4)).save(picture)
    on_notice = signal.getsignal(signal.SIGTERM)
    for first in (0, 5):
        (tracker,) = open_trackers([name], run_of(tmp_path, first))
        for step in range(first + 1, first + 6):
            tracker.log(step, {"loss": 1 / step})
        tracker.picture(first + 5, picture)
        tracker.close()
    assert signal.getsignal(signal.SIGTERM) is on_notice
    check = {"tensorboard": _check_tensorboard, "wandb": _check_wandb, "mlflow": _check_mlflow}
    check[name.value](tmp_path)


def _check_tensorboard(folder: Path) -> None:
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(folder / "tensorboard")
    )
    events.Reload()
    assert [entry.step for entry in events.Scalars("loss")] == list(range(1, 11))
    assert [entry.step for entry in events.Images("validation")] == [5, 10]


def _check_wandb(folder: Path) -> None:
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(run.name.endswith("-abc") for run in runs)


def _check_mlflow(folder: Path) -> None:
    run_id = json.loads((folder / "mlflow-run.json").read_text(encoding="utf-8"))["run"]
    assert (folder / "mlflow").is_dir()
    history = importlib.import_module("mlflow").MlflowClient().get_metric_history(run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 11))


def test_rank_logs_to_its_trackers_without_network_access(base: Path, data: Path, tmp_path: Path) -> None:
    """By default nothing is sent to the network, and no helper process is left running."""
    spec = tiny.make_spec(base, data, steps=2, trackers=[name.value for name in TrackerName])
    (tmp_path / "run.json").write_text(spec.to_json(), encoding="utf-8")
    job_dir = tmp_path / "job"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        # Not this process's variables: some of them show a package that a test runs, which changes its behaviour.
        env = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ},
            **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), url),
            "OMP_NUM_THREADS": "1",
            environment.RUN_SPEC: str(tmp_path / "run.json"),
            environment.ATTEMPT: "1",
            environment.CHECKPOINT_DIR: str(job_dir),
            environment.CACHE_DIR: str(tmp_path / "cache"),
        }
        rank = subprocess.run(
            [sys.executable, "-m", "finetune_trainer.rank"], env=env, capture_output=True, check=False
        )
        assert rank.returncode == ExitCode.DONE, rank.stderr.decode()
        assert _requests(proxy) == []
    assert (job_dir / "tensorboard").is_dir()
    assert len(list((job_dir / "wandb").glob("offline-run-*"))) == 1
    assert (job_dir / "mlflow.db").is_file()
    assert [process.info for process in psutil.process_iter(["environ"]) if _belongs_to(process, job_dir)] == []


KEY = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({}, None),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "short"}, None),
        ({"WANDB_API_KEY": KEY}, None),
        ({"WANDB_API_KEY": f"local-{KEY}", "WANDB_BASE_URL": "http://wandb:8080"}, None),
        ({"WANDB_MODE": "online", "WANDB_IDENTITY_TOKEN_FILE": "/token"}, None),
        ({"WANDB_MODE": "online"}, "wandb .* WANDB_API_KEY is missing; write the key, or WANDB_MODE=offline, in the"),
        ({"WANDB_MODE": "on"}, "wandb .* WANDB_MODE is on; write online or offline"),
        ({"WANDB_API_KEY": "short"}, "wandb .* WANDB_API_KEY is not an API key"),
        ({"WANDB_API_KEY": f"{KEY}\n"}, "wandb .* WANDB_API_KEY is not an API key"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "wandb.example.com"}, "wandb .* WANDB_BASE_URL is not an address"),
        *(
            ({"MLFLOW_TRACKING_URI": uri}, None)
            for uri in (
                *("", "http://mlflow:5000", "https://me:secret@mlflow.example.com/path", "databricks"),
                *("databricks://profile", "sqlite:////data/mlflow.db", "postgresql+psycopg2://db/x", "/data/runs"),
                *("file:///data/runs", "runs"),
            )
        ),
        *(
            ({"MLFLOW_TRACKING_URI": uri}, f"mlflow .* MLFLOW_TRACKING_URI {problem}")
            for uri, problem in (
                ("mlflow:5000", "does not begin with http:// or https://; write"),
                ("mlflow.example.com:5000/path", "does not begin with http:// or https://; write"),
                ("http://", "is not an address"),
                ("http://mlflow:port", "is not an address"),
                ("https:/mlflow", "is not an address"),
                ("http://mlflow:5000\n", "begins or ends with a space or a line break"),
                ("htps://mlflow:5000", "begins with htps:, which no installed package supports"),
            )
        ),
    ],
)
def test_environment_of_trackers_is_checked(
    env: dict[str, str], problem: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if problem is None:
        check_trackers(list(TrackerName), env)
        return
    with pytest.raises(ConfigError, match=rf"^training\.trackers: {problem}") as refused:
        check_trackers(list(TrackerName), env)
    assert "in the Secret that spec.secrets names" in str(refused.value)
    assert "secret@" not in str(refused.value)


def test_tracker_without_credentials_is_refused_before_anything_is_loaded(
    base: Path, data: Path, tmp_path: Path
) -> None:
    spec = tiny.make_spec(base, data, trackers=["wandb"])
    extra = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    ranks = Ranks(spec, tmp_path / "job", extra=extra)
    assert ranks.run() == [ExitCode.CONFIG], ranks.stderr()
    assert "training.trackers: wandb cannot be used: WANDB_MODE is online, and WANDB_API_KEY" in ranks.stderr()
    assert {report["state"] for report in ranks.reports()} == {"Starting", "Failed"}


def _requests(proxy: socket.socket) -> list[bytes]:
    """Return the first lines of the requests that wait at a proxy."""
    proxy.setblocking(False)
    lines: list[bytes] = []
    while True:
        try:
            connection, _ = proxy.accept()
        except BlockingIOError:
            return lines
        with connection:
            connection.setblocking(True)
            lines.append(connection.recv(4096).partition(b"\r\n")[0])


def _belongs_to(process: psutil.Process, job_dir: Path) -> bool:
    environ: dict[str, str] = process.info["environ"] or {}
    return environ.get(environment.CHECKPOINT_DIR) == str(job_dir)


def test_held_out_losses_are_recorded_by_timestep(base: Path, data: Path, tmp_path: Path) -> None:
    """The held-out loss is the mean of the losses of the four parts of the schedule."""
    spec = tiny.make_spec(base, data, steps=2, validation={"split": "test"})
    ranks = Ranks(spec, tmp_path / "job", world_size=2)
    assert ranks.run() == [ExitCode.DONE] * 2, ranks.stderr()
    entries = json.loads((ranks.job_dir / "validation" / "losses.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in entries] == [0, 2]
    for entry in entries:
        assert len(entry["byTimestep"]) == 4
        assert entry["loss"] == pytest.approx(sum(entry["byTimestep"]) / 4)
