"""A folder with a job of fake ranks, and the `finetune` command as a user calls it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api.job import FineTuneJob
from finetune_operator.cluster.local import jobs
from finetune_operator.cluster.local.home import Home
from finetune_operator.cluster.local.kubelet.processes import MARKER
from finetune_operator.cluster.protocol import JobKey

FINETUNE = str(Path(sys.executable).parent / "finetune")
FAKE_RANK = Path(__file__).parent / "fake_rank.py"
KEY = JobKey("default", "circles")
PATIENCE_SECONDS = 60.0


class CliHarness:
    """One state folder with one manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / "state")
        self.manifest = folder / "job.yaml"
        self.document = self._document()
        self.runs: list[subprocess.Popen[str]] = []
        _write_model(folder / "model")
        _write_data(folder / "data")
        self.set_rank_arguments()

    def set_rank_arguments(self, *arguments: str) -> None:
        """Write the manifest with arguments for the fake ranks."""
        command = ["finetune-supervisor", "--", "python", str(FAKE_RANK), *arguments]
        container = {"name": "trainer", "command": command}
        self.document["spec"]["podTemplate"] = {"spec": {"containers": [container]}}
        self.write()

    def write(self) -> None:
        """Write the manifest."""
        self.manifest.write_text(yaml.safe_dump(self.document))

    def call(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call `finetune` and wait for its exit."""
        return subprocess.run(
            [FINETUNE, command, *arguments, "--home", str(self.home.path)],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
            cwd=self.folder,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Call `finetune run` and wait for its exit."""
        return self.call("run", str(self.manifest), *arguments)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `finetune run` in the background."""
        process = subprocess.Popen(
            [FINETUNE, "run", str(self.manifest), *arguments, "--home", str(self.home.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.runs.append(process)
        return process

    def job(self) -> FineTuneJob | None:
        """Return the stored job."""
        return jobs.read_job(self.home, KEY)

    def status(self) -> dict[str, Any]:
        """Return the job's status as kubectl shows it."""
        job = self.job()
        assert job is not None
        return job.status.model_dump(mode="json", by_alias=True, exclude_none=True)

    def wait_for_step(self, step: int) -> None:
        """Wait until the status shows at least this step."""
        self.wait_until(lambda: (job := self.job()) is not None and (job.status.step or 0) >= step)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Poll a condition, with a deadline."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "condition not met in time"
            time.sleep(0.01)

    def saved_step(self) -> int:
        """Return the step that the fake ranks saved last."""
        job = self.job()
        assert job is not None
        return int((jobs.storage_folder(self.home, job) / "step").read_text())

    def processes(self) -> list[int]:
        """Return the pids of all processes of this state folder's pods."""
        marker = f"{MARKER}={self.home.path}/".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    environment = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if any(variable.startswith(marker) for variable in environment):
                    found.append(int(folder.name))
        return found

    def kill_pods(self) -> None:
        """SIGKILL every process of every pod, parents first, as after a machine failure."""
        for pid in sorted(self.processes()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the processes that a failed test left."""
        for process in self.runs:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.kill_pods()

    def _document(self) -> dict[str, Any]:
        return {
            "apiVersion": "finetune-operator.io/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": KEY.name},
            "spec": {
                "model": {"base": "model"},
                "dataset": {"source": "data"},
                "training": {"method": "LoRA", "steps": 40, "batchSize": 2},
                "topology": {"accelerator": "cpu", "nodes": 2},
            },
        }


def _write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')


def _write_data(folder: Path) -> None:
    (folder / "train").mkdir(parents=True)
    rows = [{"file_name": f"{number}.png", "text": f"circle {number}"} for number in range(4)]
    for row in rows:
        (folder / "train" / row["file_name"]).write_bytes(b"png")
    (folder / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
