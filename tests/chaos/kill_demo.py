"""Take ranks away at random moments, over and over: does every run end with the weights of the undisturbed one?

Runs the demo's job (fewer steps, a checkpoint every few) through the `finetune` command, as a person would:

- notices: `--preempt` of a random rank at a random step;
- kills: SIGKILL of a random rank, of a random rank's whole pod or of the whole tree (the command itself included, which
  is then run again), at a random moment or inside a save.

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
class Case:
    """One run and what is done to it."""

    name: str
    kind: str
    """undisturbed, notice or kill"""
    target: str = ""
    """rank 0, rank 1, pod 0, pod 1 or tree"""
    step: int | None = None
    """Step at which the notice comes."""
    fraction: float | None = None
    """Share of the undisturbed run's time, from the first report of its ranks, after which the kill comes."""
    save: int | None = None
    """The kill comes inside the save of this number, counted from 1."""

    @property
    def moment(self) -> str:
        """The moment in words."""
        if self.step is not None:
            return f"step {self.step}"
        if self.save is not None:
            return f"inside save {self.save}"
        return f"{self.fraction:.0%} of the run" if self.fraction is not None else ""


@dataclass(frozen=True)
class Outcome:
    """What a run ended with."""

    sha256: str
    seconds: float
    status: dict[str, Any]
    hit: bool
    """Whether the disturbance came before the run was over."""


def draw_cases(num_notices: int, num_kills: int, num_steps: int, num_saves: int, seed: int) -> list[Case]:
    """Draw all moments from one seed."""
    rng = random.Random(seed)
    cases = [
        Case(f"notice-{i}", "notice", f"rank {rng.randrange(NUM_RANKS)}", step=rng.randrange(1, num_steps - 1))
        for i in range(num_notices)
    ]
    targets = ["rank 0", "tree", "rank 1", "pod 0", "tree", "pod 1"]
    for i in range(num_kills):
        target = targets[i % len(targets)]
        if i % 2:
            cases.append(Case(f"kill-{i}", "kill", target, save=rng.randrange(1, num_saves + 1)))
        else:
            cases.append(Case(f"kill-{i}", "kill", target, fraction=rng.uniform(0.0, 0.95)))
    return cases


def earlier(case: Case) -> Case:
    """The same case, its moment sooner."""
    if case.save is not None:
        return replace(case, save=max(1, case.save - 1))
    return replace(case, fraction=0.8 * (case.fraction or 0.0))


class Bed:
    """A folder for all runs, and the job that they run."""

    def __init__(self, folder: Path, num_steps: int, save_every: int) -> None:
        self.folder = folder
        self.num_steps = num_steps
        self.save_every = save_every
        self.span_seconds = 0.0
        self._job = yaml.safe_load((ROOT / "examples/lora-circles.yaml").read_text())
        self._data = folder / "data"
        command = [sys.executable, "-m", "finetune_trainer.demo.circles", str(self._data)]
        subprocess.run([*command, "--style", "stripes", "--num-train", "64", "--num-validation", "8"], check=True)

    def run(self, case: Case) -> Outcome:
        """Run the job once, disturbed as the case says, to its end."""
        home = self.folder / case.name
        manifest = self._write_manifest(home)
        started = time.monotonic()
        hit = True
        if case.kind == "kill":
            hit = self._run_and_kill(case, home, manifest)
        extra = ["--preempt", f"rank={case.target[-1]},at-step={case.step}"] if case.kind == "notice" else []
        result = subprocess.run(
            self._command(home, manifest, *extra), check=False, capture_output=True, text=True, timeout=RUN_SECONDS
        )
        if result.returncode != 0:
            raise SystemExit(f"{case.name} ({case.target}, {case.moment}) failed:\n{result.stdout}\n{result.stderr}")
        seconds = time.monotonic() - started
        status = self._status(home)
        outcome = Outcome(_hash(home / "out"), seconds, status, hit)
        if case.kind == "undisturbed":
            self.span_seconds = seconds
        shutil.rmtree(home)
        return outcome

    def _run_and_kill(self, case: Case, home: Path, manifest: Path) -> bool:
        """Run until the moment, kill the target, and see the command off; say whether there was anything to kill."""
        process = subprocess.Popen(
            self._command(home, manifest), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            if not self._wait_for_moment(case, home, process):
                return False
            victims = _wait_for_victims(case.target, process)
            for victim in victims:
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGKILL)
            process.wait(RUN_SECONDS)
            return bool(victims)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _wait_for_moment(self, case: Case, home: Path, process: subprocess.Popen[bytes]) -> bool:
        begun = time.monotonic()
        if case.fraction is not None:
            until = begun + case.fraction * self.span_seconds
            return _poll(lambda: time.monotonic() >= until, process)
        assert case.save is not None
        seen: set[str] = set()

        def inside_save() -> bool:
            seen.update(path.name for path in home.glob("storage/*/*/checkpoints/.writing-*"))
            return len(seen) >= (case.save or 0)

        return _poll(inside_save, process)

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
    """Wait for a moment, closely; False where the run was over first."""
    while process.poll() is None:
        if reached():
            return True
        time.sleep(SAVE_POLL_SECONDS)
    return False


def _wait_for_victims(target: str, process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes to kill. The moment may come before they are there: then they are hit as soon as they are."""
    victims: list[psutil.Process] = []
    while not victims and process.poll() is None:
        victims = list(_victims(target, process.pid))
        time.sleep(SAVE_POLL_SECONDS)
    return victims


def _victims(target: str, runner: int) -> Iterator[psutil.Process]:
    """Processes to kill, parents first, so that none can tell of its child's death."""
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
            # A forked rank has the environment of its fork server, and a name of its own.
            if kind == "rank" and process.name() == f"rank {number}":
                yield process
            if kind == "pod" and env.get("FINETUNE_NODE_RANK") == number:
                yield process


def _hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    """Run all cases and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--notices", type=int, default=10, help="runs with a notice (default 10)")
    parser.add_argument("--kills", type=int, default=20, help="runs with a SIGKILL (default 20)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each run (default 40)")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints (default 5)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments; default: a new one, printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    cases = draw_cases(args.notices, args.kills, args.steps, args.steps // args.save_every, seed)
    print(f"{len(cases)} disturbed runs of {args.steps} steps on {NUM_RANKS} ranks; moments drawn from --seed {seed}")
    with tempfile.TemporaryDirectory(prefix="kill-demo-") as folder:
        bed = Bed(Path(folder), args.steps, args.save_every)
        truth = bed.run(Case("undisturbed", "undisturbed"))
        print(f"  undisturbed: {truth.seconds:.1f} s, weights {truth.sha256[:12]}", flush=True)
        rows: list[list[object]] = []
        different = lost_after_notice = 0
        for number, drawn in enumerate(cases, 1):
            case = drawn
            outcome = bed.run(case)
            while not outcome.hit:
                case = earlier(case)
                print(f"  {case.name}: the run was over before the moment came; again, {case.moment}", flush=True)
                outcome = bed.run(case)
            same = outcome.sha256 == truth.sha256
            lost = int(outcome.status.get("lostSteps", 0))
            different += not same
            lost_after_notice += lost if case.kind == "notice" else 0
            restarts = int(outcome.status["attempt"]) - 1
            verdict = "same" if same else "DIFFERENT"
            rows.append([case.name, case.target, case.moment, restarts, lost, verdict])
            what = f"{case.kind} {case.target}, {case.moment}"
            print(
                f"  {number}/{len(cases)} {what}: {outcome.seconds:.1f} s, {lost} steps lost, weights {verdict}",
                flush=True,
            )
    result = {
        "notices": args.notices,
        "kills": args.kills,
        "different_weights": different,
        "lost_after_notice": lost_after_notice,
    }
    finish(["run", "target", "moment", "restarts", "lost steps", "weights"], rows, result)
    if different or lost_after_notice:
        sys.exit(1)


if __name__ == "__main__":
    main()
