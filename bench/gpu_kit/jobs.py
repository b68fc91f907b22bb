"""Real jobs through `finetune run`: killed ones that continue, and undisturbed ones to compare their weights with."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from bench.gpu_kit.items import Context
from finetune_contract import paths
from testing.gpu_kit.restarts import phases
from testing.measure.device import measured_device
from testing.trainer import tiny

FINETUNE = (sys.executable, "-c", "import sys; from finetune_operator.cli.main import main; sys.exit(main())")
"""The command `finetune`; the kit installs no programs."""
POLL_SECONDS = 0.003
TOLERANCE = 1e-3
"""Largest difference of weights, relative to the largest weight of its tensor, that counts as equal."""
_LEAST_SCALE = 1e-12
_LAST_OUTPUT = 600
_STATE = re.compile(r"\[rank 0\] ([a-z]+)")
"""A line of the log with which a rank reports its state."""
_SUPERVISORS = ("finetune_trainer.supervisor", "finetune-supervisor")
"""Ends of the word in a command that starts a supervisor."""


@dataclass(frozen=True)
class JobSize:
    """Length of a job. It is disturbed as soon as a new checkpoint is committed."""

    steps: int
    interval: int
    resolution: int


SMALL = JobSize(24, 6, tiny.RESOLUTION)
LARGE = JobSize(400, 50, 64)


@dataclass
class Job:
    """One run of `finetune run`.

    Attributes:
        name: name of the job and of its folder.
        folder: its folder: state, outputs, output of the command.
        precision: number format.
        victims: what is killed without notice, one after the other: "rank" or "pod".
        kills: times of the kills, in seconds since the epoch.
        states: the states that rank 0 has reported, and when they were seen, since the epoch.
    """

    name: str
    folder: Path
    precision: str
    victims: tuple[str, ...] = ()
    kills: list[float] = field(default_factory=list)
    states: list[tuple[float, str]] = field(default_factory=list)

    def start(self, context: Context) -> Job:
        """Start the command."""
        size = SMALL if context.tiny else LARGE
        base, data = make_inputs(context, size)
        self.folder.mkdir(parents=True)
        manifest = self.folder / "job.yaml"
        manifest.write_text(yaml.safe_dump(self._manifest(size, base, data)), encoding="utf-8")
        self._read = dict[Path, int]()
        self._killed_step = 0
        with (self.folder / "output.log").open("wb") as output:
            self.process = subprocess.Popen(
                [*FINETUNE, "run", str(manifest), "--home", str(self.home), "--plain"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self

    @property
    def home(self) -> Path:
        """Folder of the command's state."""
        return self.folder / "home"

    def poll(self) -> bool:
        """Watch the job, and kill the next victim when it is time. Return whether the command still runs."""
        now = time.time()
        for line in self._new_lines():
            if match := _STATE.fullmatch(line):
                self.states.append((now, match[1]))
        if len(self.kills) < len(self.victims) and (step := self._checkpoint()) > self._killed_step:
            processes = list(self._processes(self.victims[len(self.kills)]))
            if processes:
                self._killed_step = step
                self.kills.append(time.time())
                for process in processes:
                    with suppress(psutil.NoSuchProcess):
                        process.send_signal(signal.SIGKILL)
        return self.process.poll() is None

    def status(self) -> dict[str, Any]:
        """Return the status of the job as the command has stored it.

        Raises:
            RuntimeError: the job has not succeeded.
        """
        path = self.home / "jobs" / "default" / self.name / "job.json"
        status: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["status"] if path.exists() else {}
        if self.process.returncode != 0:
            output = (self.folder / "output.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"finetune run exited with {self.process.returncode}: {output[-_LAST_OUTPUT:]}")
        return status

    def weights(self) -> list[Path]:
        """Return the exported files of weights."""
        return sorted((self.folder / "out").rglob("*.safetensors"))

    def _manifest(self, size: JobSize, base: Path, data: Path) -> dict[str, Any]:
        accelerator = "gpu" if measured_device().type == "cuda" else "cpu"
        return {
            "apiVersion": "finetune-operator.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": self.name},
            "spec": {
                "model": {"base": str(base)},
                "dataset": {"source": str(data)},
                "training": {
                    "method": "LoRA",
                    "steps": size.steps,
                    "batchSize": 2,
                    "learningRate": 1e-3,
                    "resolution": size.resolution,
                    "precision": self.precision,
                    "lora": {"rank": 4},
                },
                "topology": {"accelerator": accelerator},
                "checkpoint": {"interval": {"steps": size.interval}},
                "outputs": [{"format": "diffusers", "to": str(self.folder / "out")}],
            },
        }

    def _new_lines(self) -> Iterator[str]:
        """Yield the new complete lines of the pods' logs."""
        for path in sorted((self.home / "jobs" / "default" / self.name / "logs").glob("*.log")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                text = file.read()
            complete = text[: text.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(complete)
            yield from complete.decode(errors="replace").splitlines()

    def _checkpoint(self) -> int:
        """Return the step of the newest committed checkpoint; 0 without one."""
        jobs = self.home.glob("storage/default/*")
        names = [path.name for job in jobs for path in paths.checkpoints(job).glob("step-*")]
        return max((int(name.split("-")[1]) for name in names), default=0)

    def _processes(self, victim: str) -> Iterator[psutil.Process]:
        """Yield the processes to kill: the rank; for a pod its supervisor first, which cannot report the rank's end."""
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    command = process.cmdline()
                    # A forked rank shows the command of its fork server, but has its own process name.
                    is_rank = process.name() == "rank 0" or "finetune_trainer.rank" in command
                    is_supervisor = any(word.endswith(_SUPERVISORS) for word in command[:3])
                    if is_rank or (victim == "pod" and is_supervisor):
                        yield process


def make_inputs(context: Context, size: JobSize) -> tuple[Path, Path]:
    """Write a base with random weights and a few pictures, once. Return both folders."""
    base, data = context.folder / "job-base", context.folder / "job-data"
    if not base.exists():
        tiny.write_base(base)
        if not context.tiny:
            # The UNet is the largest part of a base: 80 million weights are loaded like billions, but in a second.
            UNet2DConditionModel(
                sample_size=size.resolution // 2,
                block_out_channels=(128, 256, 512),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=tiny.WIDTH,
                attention_head_dim=8,
            ).save_pretrained(base / "unet")
        tiny.write_data(data, size=(size.resolution, size.resolution))
    return base, data


def job_killed(context: Context, precision: str) -> None:
    """Run a job alone on the machine, kill its rank and later its pod, and record how long the restarts took."""
    job = Job(f"{precision}-killed", context.folder / f"job-{precision}-killed", precision, ("rank", "pod"))
    job.start(context)
    recorded = 0
    while job.poll():
        if len(job.kills) > recorded:
            recorded = len(job.kills)
            context.record.add(kills=recorded)
        time.sleep(POLL_SECONDS)
    context.record.add(precision=precision, restarts=restarts(job), performance=job.status().get("performance"))


def jobs_compared(context: Context, killed: str, precision: str | None) -> None:
    """Run undisturbed jobs, and compare their weights with those of jobs that were killed.

    Args:
        context: the measurement.
        killed: precision of the job that `job_killed` has run.
        precision: another one, of a job that is killed while the undisturbed ones run; None: no such job.
    """
    pairs = [(Job(f"{killed}-killed", context.folder / f"job-{killed}-killed", killed), _calm(context, killed))]
    running = [pairs[0][1].start(context)]
    if precision is not None:
        job = Job(f"{precision}-killed", context.folder / f"job-{precision}-killed", precision, ("rank",))
        pairs.append((job, _calm(context, precision)))
        running += [each.start(context) for each in pairs[1]]
    while running:
        still = [job for job in running if job.poll()]
        for job in running:
            if job not in still:
                with _recorded_fault(context, job):
                    context.record.add(**{job.name: {"restarts": restarts(job)}})
        if len(still) < len(running):
            _compare_ended(context, pairs, still)
        running = still
        time.sleep(POLL_SECONDS)


def _calm(context: Context, precision: str) -> Job:
    """Return an undisturbed job."""
    return Job(f"{precision}-calm", context.folder / f"job-{precision}-calm", precision)


def _compare_ended(context: Context, pairs: list[tuple[Job, Job]], running: list[Job]) -> None:
    """Compare the weights of each pair of jobs that have both ended."""
    for one, other in pairs:
        if one not in running and other not in running and one.weights() and other.weights():
            with _recorded_fault(context, one):
                context.record.add(**{f"{one.name}_weights": compare(one.weights(), other.weights())})


@contextmanager
def _recorded_fault(context: Context, job: Job) -> Iterator[None]:
    """Record a fault of one job, so that it does not affect the others."""
    try:
        yield
    except Exception as error:
        context.record.error(f"{job.name}: {error}")


def restarts(job: Job) -> list[dict[str, Any]]:
    """Return how long each restart of a job took, in seconds: in all, and in each state of the rank.

    Raises:
        RuntimeError: the job has not succeeded, was not killed as planned, or did not continue from a checkpoint.
    """
    status = job.status()
    if len(job.kills) < len(job.victims):
        raise RuntimeError(f"the job ended after {len(job.kills)} of {len(job.victims)} kills")
    found = []
    for victim, killed_at in zip(job.victims, job.kills, strict=True):
        began = {
            datetime.fromisoformat(attempt["trainingAt"]).timestamp(): attempt
            for attempt in status["attempts"]
            if attempt.get("fromStep") and "trainingAt" in attempt
        }
        next_step = min((when for when in began if when > killed_at), default=None)
        if next_step is None:
            raise RuntimeError(f"no attempt continued from a checkpoint: {status['attempts']}")
        found.append(
            {
                "victim": victim,
                "failure_to_first_step_seconds": next_step - killed_at,
                "phases": phases(job.states, killed_at, next_step),
                "status_seconds": began[next_step].get("seconds", {}),
                "from_step": began[next_step]["fromStep"],
            }
        )
    return found


def compare(ours: list[Path], theirs: list[Path]) -> dict[str, Any]:
    """Return whether two sets of files are equal, and the largest relative difference of their weights."""
    if [path.name for path in ours] != [path.name for path in theirs]:
        raise RuntimeError(f"other files: {[path.name for path in ours]} and {[path.name for path in theirs]}")
    largest = 0.0
    for one, other in zip(ours, theirs, strict=True):
        left, right = load_file(one), load_file(other)
        for name, weight in left.items():
            scale = max(float(right[name].abs().max()), _LEAST_SCALE)
            largest = max(largest, float((weight.double() - right[name].double()).abs().max()) / scale)
    same = all(one.read_bytes() == other.read_bytes() for one, other in zip(ours, theirs, strict=True))
    return {"bit_identical": same, "largest_difference": largest, "within_tolerance": largest <= TOLERANCE}
