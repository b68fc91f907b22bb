"""Train from a hub that fails at random, with preemptions, and check that every job ends with the undisturbed weights.

Each job runs through the `finetune` command with an empty cache, two ranks and one preemption notice. Its base and its
data set are repositories of a stand-in for the hub, which answers requests with 429, 503, resets, answers that are cut
off, or not at all. A rank gives up after a few seconds of an outage, so that attempts end, too.

The last line is JSON: {"jobs", "different_weights", "failures", "outages", "faults"}; `failures` are the ends that
count towards recovery.maxFailures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_contract import environment
from testing import hub
from testing.measure.report import finish
from testing.trainer import tiny
from tests.chaos.kill_demo import hash_weights

NAME = "hub-faults"
NUM_STEPS = 6
NUM_RANKS = 2
RUN_SECONDS = 1800
RETRY_SECONDS = 4
"""Longest wait of a rank for the hub; several faults in a row last longer."""
FAULTS = (hub.TOO_MANY_REQUESTS, hub.UNAVAILABLE, hub.RESET, hub.CUT, hub.STALL)


@dataclass(frozen=True)
class HubJob:
    """One job, and what disturbs it.

    Attributes:
        name: name of its folder.
        fault_rate: share of the requests that fail.
        preempt_at: step at which a rank is preempted; None for no preemption.
        preempt_rank: the rank that is preempted.
        seed: seed of the faults.
    """

    name: str
    fault_rate: float = 0.0
    preempt_at: int | None = None
    preempt_rank: int = 0
    seed: int = 0


@dataclass(frozen=True)
class HubJobResult:
    """Result of one job."""

    sha256: str
    status: dict[str, Any]
    num_faults: int
    num_requests: int

    @property
    def num_outages(self) -> int:
        """Number of attempts that an outage ended."""
        return sum(entry.get("countsAs") == "Outage" for entry in self.status["attempts"])


def draw_jobs(number: int, rate: float, seed: int) -> list[HubJob]:
    """Draw the disturbances of all jobs from one seed."""
    draws = random.Random(seed)
    return [
        HubJob(f"job-{i}", rate, draws.randrange(1, NUM_STEPS), draws.randrange(NUM_RANKS), draws.randrange(10**6))
        for i in range(number)
    ]


class HubHarness:
    """Runs jobs, each against its own hub, with the same base and the same data set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base = tiny.write_base(folder / "base")
        self._data = tiny.write_data(folder / "data", num_samples=8)

    def run(self, job: HubJob) -> HubJobResult:
        """Run a job to its end."""
        home = self.folder / job.name
        home.mkdir()
        num_faults = 0
        choose = hub.random_faults(job.seed, job.fault_rate, FAULTS)

        def fail(request: hub.HubRequest) -> hub.Fault | None:
            nonlocal num_faults
            fault = choose(request)
            num_faults += fault is not None
            return fault

        with hub.serve(home / "hub") as server:
            server.publish("models", "tests/base", self._base)
            server.publish("datasets", "tests/data", self._data)
            server.schedule = fail
            self._run_command(job, home, server)
            result = HubJobResult(hash_weights(home / "out"), self._status(home), num_faults, len(server.requests))
        shutil.rmtree(home)
        return result

    def _run_command(self, job: HubJob, home: Path, server: hub.HubServer) -> None:
        command = [_finetune(), "run", str(_write_manifest(home)), "--home", str(home / "state"), "--plain"]
        if job.preempt_at is not None:
            command += ["--preempt", f"rank={job.preempt_rank},at-step={job.preempt_at}"]
        output = home / "output.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, env={**_environment(), **server.environment}, stdout=file, stderr=subprocess.STDOUT
            )
            try:
                code = process.wait(RUN_SECONDS)
            except subprocess.TimeoutExpired:
                process.terminate()
                code = process.wait()
        if code != 0:
            raise SystemExit(f"{job} failed:\n{output.read_text(encoding='utf-8')}")

    def _status(self, home: Path) -> dict[str, Any]:
        command = [_finetune(), "get", NAME, "--home", str(home / "state"), "-o", "json"]
        document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        status: dict[str, Any] = document["status"]
        return status


def _finetune() -> str:
    return str(Path(sys.executable).parent / "finetune")


def _environment() -> dict[str, str]:
    """Return this environment without a cache of the hub, and with short timeouts of its library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}


def _write_manifest(home: Path) -> Path:
    retry = {"name": environment.RETRY_SECONDS, "value": str(RETRY_SECONDS)}
    job = {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"base": "tests/base"},
            "dataset": {"source": "tests/data"},
            "training": {
                "method": "LoRA",
                "lora": {"rank": 2},
                "steps": NUM_STEPS,
                "batchSize": 1,
                "learningRate": 0.01,
                "resolution": tiny.RESOLUTION,
            },
            "topology": {"accelerator": "cpu", "nodes": 1, "processesPerNode": NUM_RANKS},
            "checkpoint": {"interval": {"steps": 2}, "storage": {"hostPath": {"path": str(home / "storage")}}},
            "recovery": {"maxFailures": 0, "noticeSeconds": 60},
            "outputs": [{"format": "diffusers", "to": str(home / "out")}],
            "podTemplate": {"spec": {"containers": [{"name": "trainer", "env": [retry]}]}},
        },
    }
    path = home / "job.yaml"
    path.write_text(yaml.safe_dump(job), encoding="utf-8")
    return path


def main() -> None:
    """Run all jobs and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=50, help="number of jobs (default 50)")
    parser.add_argument("--first", type=int, default=0, help="number of the first job (default 0)")
    parser.add_argument("--parallel", type=int, default=2, help="jobs at the same time (default 2)")
    parser.add_argument("--rate", type=float, default=0.15, help="share of the requests that fail (default 0.15)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults and preemptions (default 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hub-faults-") as folder, ThreadPoolExecutor(args.parallel) as pool:
        harness = HubHarness(Path(folder))
        reference = harness.run(HubJob("undisturbed"))
        print(f"undisturbed: {reference.num_requests} requests, weights {reference.sha256[:12]}", flush=True)
        rows: list[list[object]] = []
        different = failures = outages = faults = 0
        jobs = draw_jobs(args.first + args.jobs, args.rate, args.seed)[args.first :]
        for job, result in zip(jobs, pool.map(harness.run, jobs), strict=True):
            same = result.sha256 == reference.sha256
            different += not same
            failures += int(result.status.get("failures", 0))
            outages += result.num_outages
            faults += result.num_faults
            counts = [result.num_faults, result.num_requests, result.num_outages, result.status["attempt"]]
            rows.append([job.name, *counts, "same" if same else "DIFFERENT"])
            print(f"  {job.name}: {rows[-1][1:]}", flush=True)
    summary = {
        "jobs": args.jobs,
        "different_weights": different,
        "failures": failures,
        "outages": outages,
        "faults": faults,
    }
    finish(["job", "faults", "requests", "outages", "attempts", "weights"], rows, summary)
    if different or failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
