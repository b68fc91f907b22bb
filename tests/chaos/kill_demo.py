"""Preempt and kill ranks at random times, and check that every run ends with the weights of an undisturbed run.

Runs the demo's job (with fewer steps and frequent checkpoints) through the `finetune` command, as a user does:

- notices: `--preempt` of a random rank at a random step;
- kills: SIGKILL of a random rank, of a random pod, or of all processes including the command itself (which is then run
  again), at a random time or during a save.

The last line is JSON: {"notices", "kills", "different_weights", "lost_after_notice"}.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from testing.measure.report import finish

ROOT = Path(__file__).resolve().parents[2]
NUM_RANKS = 2
RUN_SECONDS = 300
SAVE_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Disturbance:
    """One run and its disturbance."""

    name: str
    kind: str
    """undisturbed, notice or kill"""
    target: str = ""
    """rank 0, rank 1, pod 0, pod 1 or tree"""
    step: int | None = None
    """Step at which the preemption notice arrives."""
    fraction: float | None = None
    """Time of the kill, from the start of the command, as a fraction of the undisturbed run."""
    save: int | None = None
    """Number of the save, from 1, during which the kill happens."""

    @property
    def time(self) -> str:
        """Description of the time of the disturbance."""
        if self.step is not None:
            return f"step {self.step}"
        if self.save is not None:
            return f"during save {self.save}"
        return f"{self.fraction:.0%} of the run" if self.fraction is not None else ""


@dataclass(frozen=True)
class DemoResult:
    """Result of one run."""

    sha256: str
    seconds: float
    status: dict[str, Any]
    was_disturbed: bool
    """Whether the disturbance happened before the end of the run."""


def draw_disturbances(num_notices: int, num_kills: int, num_steps: int, num_saves: int, seed: int) -> list[Disturbance]:
    """Draw all disturbances from one seed."""
    rng = random.Random(seed)
    disturbances = [
        Disturbance(f"notice-{i}", "notice", f"rank {rng.randrange(NUM_RANKS)}", step=rng.randrange(1, num_steps - 1))
        for i in range(num_notices)
    ]
    targets = ["rank 0", "tree", "rank 1", "pod 0", "tree", "pod 1"]
    for i in range(num_kills):
        target = targets[i % len(targets)]
        if i % 2:
            disturbances.append(Disturbance(f"kill-{i}", "kill", target, save=rng.randrange(1, num_saves + 1)))
        else:
            disturbances.append(Disturbance(f"kill-{i}", "kill", target, fraction=rng.uniform(0.0, 0.95)))
    return disturbances


def earlier(disturbance: Disturbance) -> Disturbance:
    """Return the same disturbance at an earlier time."""
    if disturbance.save is not None:
        return replace(disturbance, save=max(1, disturbance.save - 1))
    return replace(disturbance, fraction=0.8 * (disturbance.fraction or 0.0))


class DemoHarness:
    """Runs the demo's job in one folder per run."""

    def __init__(self, folder: Path, num_steps: int, save_every: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.save_every = save_every
        self.span_seconds = 0.0
        self._job = yaml.safe_load((ROOT / "examples/local/lora-circles.yaml").read_text())
        self._data = folder / "data"
        command = [sys.executable, "-m", "finetune_trainer.demo.circles", str(self._data)]
        subprocess.run([*command, "--style", "stripes", "--num-train", "64", "--num-validation", "8"], check=True)

    def run(self, disturbance: Disturbance) -> DemoResult:
        """Run the job once to its end, with this disturbance."""
        home = self.folder / disturbance.name
        manifest = self._write_manifest(home)
        started = time.monotonic()
        was_disturbed = True
        extra = []
        if disturbance.kind == "kill":
            was_disturbed = self._run_and_kill(disturbance, home, manifest)
        elif disturbance.kind == "notice":
            extra = ["--preempt", f"rank={disturbance.target[-1]},at-step={disturbance.step}"]
        ended = subprocess.run(
            self._command(home, manifest, *extra), check=False, capture_output=True, text=True, timeout=RUN_SECONDS
        )
        if ended.returncode != 0:
            what = f"{disturbance.name} ({disturbance.target}, {disturbance.time})"
            raise SystemExit(f"{what} failed:\n{ended.stdout}\n{ended.stderr}")
        seconds = time.monotonic() - started
        status = self._status(home)
        result = DemoResult(hash_weights(home / "out"), seconds, status, was_disturbed)
        if disturbance.kind == "undisturbed":
            self.span_seconds = seconds
        shutil.rmtree(home)
        return result

    def _run_and_kill(self, disturbance: Disturbance, home: Path, manifest: Path) -> bool:
        """Start the command and kill the target at its time; return whether any process was killed."""
        process = subprocess.Popen(
            self._command(home, manifest), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            if not self._wait_for_time(disturbance, home, process):
                return False
            victims = _wait_for_victims(disturbance.target, process)
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGKILL)
            process.wait(RUN_SECONDS)
            return bool(victims)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _wait_for_time(self, disturbance: Disturbance, home: Path, process: subprocess.Popen[bytes]) -> bool:
        begun = time.monotonic()
        if disturbance.fraction is not None:
            until = begun + disturbance.fraction * self.span_seconds
            return _poll(lambda: time.monotonic() >= until, process)
        assert disturbance.save is not None
        saves: set[str] = set()

        def is_during_save() -> bool:
            saves.update(path.name for path in home.glob("storage/*/*/checkpoints/.writing-*"))
            return len(saves) >= (disturbance.save or 0)

        return _poll(is_during_save, process)

    def _write_manifest(self, home: Path) -> Path:
        home.mkdir(parents=True)
        job = json.loads(json.dumps(self._job))
        job["metadata"]["name"] = "kill-demo"
        spec = job["spec"]
        spec["model"]["base"] = str(ROOT / "examples/base-circles")
        spec["dataset"]["source"] = str(self._data)
        spec["training"].pop("validation", None)
        spec["training"].pop("epochs", None)
        spec["training"]["steps"] = self.num_steps
        spec["topology"] = {"accelerator": "cpu", "nodes": NUM_RANKS}
        spec["checkpoint"] = {
            "interval": {"steps": self.save_every},
            "keep": 2,
            "storage": {"hostPath": {"path": str(home / "storage")}},
        }
        spec["recovery"] = {"maxFailures": 5, "noticeSeconds": 60}
        spec["outputs"] = [{"format": "diffusers", "to": str(home / "out")}]
        path = home / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    def _command(self, home: Path, manifest: Path, *extra: str) -> list[str]:
        finetune = str(Path(sys.executable).parent / "finetune")
        return [finetune, "run", str(manifest), "--home", str(home / "state"), "--plain", *extra]

    def _status(self, home: Path) -> dict[str, Any]:
        finetune = str(Path(sys.executable).parent / "finetune")
        command = [finetune, "get", "kill-demo", "--home", str(home / "state"), "-o", "json"]
        document = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        status: dict[str, Any] = document["status"]
        return status


def _poll(reached: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Poll until `reached` returns True; return False if the run ended first."""
    while process.poll() is None:
        if reached():
            return True
        time.sleep(SAVE_POLL_SECONDS)
    return False


def _wait_for_victims(target: str, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes to kill. Wait for them if they have not started yet."""
    victims: list[psutil.Process] = []
    while not victims and process.poll() is None:
        victims = list(_victims(target, process.pid))
        time.sleep(SAVE_POLL_SECONDS)
    return victims


def _victims(target: str, runner: int) -> Iterator[psutil.Process]:
    """Yield the processes to kill, parents first: no parent can then report the exit of its child."""
    try:
        tree = [psutil.Process(runner), *psutil.Process(runner).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    if target == "tree":
        yield from tree
        return
    kind, number = target.split()
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            env = process.environ()
            # A forked rank shows the environment of its fork server, but has its own process name.
            if kind == "rank" and process.name() == f"rank {number}":
                yield process
            if kind == "pod" and env.get("FINETUNE_NODE_RANK") == number:
                yield process


def hash_weights(folder: Path) -> str:
    """Return the hash of all weights in a folder."""
    digest = hashlib.sha256()
    paths = sorted(folder.rglob("*.safetensors"))
    if not paths:
        raise SystemExit(f"no weights in {folder}")
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Run all disturbances and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--notices", type=int, default=10, help="runs with a preemption notice (default 10)")
    parser.add_argument("--kills", type=int, default=20, help="runs with a SIGKILL (default 20)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default 40)")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints (default 5)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random times; default: a new one, printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    disturbances = draw_disturbances(args.notices, args.kills, args.steps, args.steps // args.save_every, seed)
    print(f"{len(disturbances)} runs of {args.steps} steps on {NUM_RANKS} ranks; random times from --seed {seed}")
    with tempfile.TemporaryDirectory(prefix="kill-demo-") as folder:
        harness = DemoHarness(Path(folder), args.steps, args.save_every)
        reference = harness.run(Disturbance("undisturbed", "undisturbed"))
        print(f"  undisturbed: {reference.seconds:.1f} s, weights {reference.sha256[:12]}", flush=True)
        rows: list[list[object]] = []
        different = lost_after_notice = 0
        for number, drawn in enumerate(disturbances, 1):
            disturbance = drawn
            result = harness.run(disturbance)
            while not result.was_disturbed:
                disturbance = earlier(disturbance)
                print(f"  {disturbance.name}: the run ended first; retrying: {disturbance.time}", flush=True)
                result = harness.run(disturbance)
            same = result.sha256 == reference.sha256
            lost = int(result.status.get("lostSteps", 0))
            different += not same
            lost_after_notice += lost if disturbance.kind == "notice" else 0
            restarts = int(result.status["attempt"]) - 1
            verdict = "same" if same else "DIFFERENT"
            rows.append([disturbance.name, disturbance.target, disturbance.time, restarts, lost, verdict])
            what = f"{disturbance.kind} {disturbance.target}, {disturbance.time}"
            print(
                f"  {number}/{len(disturbances)} {what}: {result.seconds:.1f} s, {lost} steps lost, weights {verdict}",
                flush=True,
            )
    summary = {
        "notices": args.notices,
        "kills": args.kills,
        "different_weights": different,
        "lost_after_notice": lost_after_notice,
    }
    finish(["run", "target", "time", "restarts", "lost steps", "weights"], rows, summary)
    if different or lost_after_notice:
        sys.exit(1)


if __name__ == "__main__":
    main()
