"""SIGKILL at random times, half of them during a save: every resumed run must end with the undisturbed weights.

Runs real ranks of a tiny model. Every attempt of a run is killed once, until the run is done:

- during a save, by a hook at each of its stages: one rank or all of them at once;
- at a random time: one rank (its peers make an emergency save, so no step may be lost) or all of them;
- while latents are being cached, with an empty cache.

Some attempts get a preemption notice instead. Sometimes the newest checkpoint is damaged, and must not be chosen. Runs
on 2, 3 and 4 ranks must end with the weights of the undisturbed run, bit for bit. Runs that change between 2 ranks and
1 must use the same batches in the same order, and their losses must agree within LOSS_TOLERANCE.

The last line is JSON: {"kills", "different_weights", "corrupt_chosen"}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from finetune_contract import environment, paths
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_trainer.checkpoint.store.stages import IN_PARTS, SaveStage
from testing.measure.report import finish
from testing.trainer import tiny
from testing.trainer.ranks import Ranks

LOSS_TOLERANCE = 1e-4
"""Maximum relative difference of the losses of a resized run: the same sums in another order."""
STEPS = 40
ELASTIC_STEPS = 20
"""The number of losses in a checkpoint."""
SAVE_EVERY = 3
NUM_SAMPLES = 24
SPLIT = {environment.MIN_PART_BYTES: "1"}


@dataclass
class SaveKillCounts:
    """Counts over all runs so far."""

    kills: int = 0
    during_saves: int = 0
    notices: int = 0
    runs: int = 0
    different: int = 0
    choices: int = 0
    """Attempts whose restored checkpoint was checked."""
    corrupt_chosen: int = 0
    lost: int = 0
    """Steps that were lost although a survivor, or a preemption notice, could save them."""
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass
class SaveHarness:
    """Folder, model and data of all runs."""

    folder: Path
    base: Path
    data: Path
    rng: random.Random
    counts: SaveKillCounts

    def spec(self, steps: int) -> RunSpec:
        """Return the job. Weight average, dropout and flips make every part of the restored state matter."""
        settings = {"steps": steps, "ema": True, "randomFlip": True, "lora": {"rank": 2, "dropout": 0.1}}
        spec = tiny.make_spec(self.base, self.data, **settings)
        interval = spec.checkpoint_interval.model_copy(update={"steps": SAVE_EVERY})
        return spec.model_copy(update={"checkpoint_interval": interval, "keep": 2})

    def undisturbed(self, world_size: int, steps: int) -> Ranks:
        """Run the job without a disturbance."""
        ranks = Ranks(
            self.spec(steps), self.folder / f"undisturbed-{world_size}-{steps}", world_size=world_size, extra=LOGGED
        )
        if ranks.run() != [ExitCode.DONE] * world_size:
            raise SystemExit(f"the undisturbed run failed:\n{ranks.stderr()}")
        return ranks


LOGGED = {**SPLIT, "TEST_LOG_BATCHES": "1"}


def newest_intact(job_dir: Path, damaged: set[str]) -> int:
    """Return the step of the newest intact checkpoint, by its hashes and by the damage that this program has done."""
    folders = [folder for folder in paths.checkpoints(job_dir).glob("step-*") if folder.name not in damaged]
    return max((int(folder.name.split("-")[1]) for folder in folders if _is_intact(folder)), default=0)


def _is_intact(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / paths.MANIFEST).read_text())
        return all(
            hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
            for entry in manifest["files"]
        )
    except (OSError, ValueError):
        return False


class KilledRun:
    """One job whose attempts are killed repeatedly."""

    def __init__(self, harness: SaveHarness, name: str, sizes: Callable[[int], int], steps: int, kills: int) -> None:
        self._harness = harness
        self._name = name
        self._sizes = sizes
        self._spec = harness.spec(steps)
        self._left = kills
        self._folder = harness.folder / name / "job"
        self._attempt = 0
        self._expected = 0
        """Minimum step that the next attempt must restore."""
        self._damaged: set[str] = set()

    def run(self) -> Ranks:
        """Kill one attempt after the other, and let the last one finish."""
        while True:
            self._attempt += 1
            ranks = Ranks(self._spec, self._folder, self._attempt, world_size=self._sizes(self._attempt), extra=LOGGED)
            intact = newest_intact(ranks.job_dir, self._damaged)
            expected, self._expected = self._expected, 0
            done = self._disturb(ranks) if self._left > 0 else self._finish(ranks)
            self._check_choice(ranks, intact, expected)
            if done:
                self._harness.counts.runs += 1
                return ranks
            self._maybe_damage(ranks)

    def _finish(self, ranks: Ranks) -> bool:
        codes = ranks.run()
        if codes != [ExitCode.DONE] * ranks.world_size:
            raise SystemExit(f"{self._name}, attempt {ranks.attempt} ended with {codes}:\n{ranks.stderr()}")
        return True

    def _disturb(self, ranks: Ranks) -> bool:
        """Start an attempt and kill it; return True if it was done first."""
        counts = self._harness.counts
        kind = self._draw_kind()
        if kind == "during a save":
            self._plan_kill(ranks)
        ranks.start()
        if kind != "during a save" and not self._kill(ranks, kind):
            return self._check_done(ranks)
        codes = ranks.wait()
        if all(code == ExitCode.DONE for code in codes):
            return True
        counts.kinds[kind] += 1
        if kind == "notice":
            counts.notices += 1
        else:
            self._left -= 1
            counts.kills += 1
            counts.during_saves += kind == "during a save"
            if not any(code == -signal.SIGKILL for code in codes):
                raise SystemExit(f"{self._name}: no rank was killed; exit codes {codes}:\n{ranks.stderr()}")
        self._set_expected(ranks, codes, kind)
        return False

    def _draw_kind(self) -> str:
        rng = self._harness.rng
        if rng.random() < 0.08:
            return "notice"
        if rng.random() < 0.5 + 0.5 * (self._harness.counts.during_saves * 2 < self._harness.counts.kills):
            return "during a save"
        return rng.choice(["one rank", "one rank", "all ranks"])

    def _plan_kill(self, ranks: Ranks) -> None:
        rng = self._harness.rng
        stage = rng.choice(tuple(SaveStage))
        ranks.kill_at = (stage, rng.randrange(1, 4))
        if stage in IN_PARTS and rng.random() < 0.5:
            ranks.kill_rank = rng.randrange(ranks.world_size)
        if stage in ("write ema", "write model", "write optimizer"):
            # One of these may exist in one part only: kill the rank that reaches the stage.
            ranks.kill_rank = None

    def _kill(self, ranks: Ranks, kind: str) -> bool:
        """Wait for the time and send the signal; return False if the run ended first."""
        rng = self._harness.rng
        if not _wait(ranks, lambda report: report["state"] in TRAINING):
            return False
        time.sleep(rng.uniform(0.0, 0.6))
        victims = range(ranks.world_size) if kind == "all ranks" else [rng.randrange(ranks.world_size)]
        try:
            ranks.send(signal.SIGTERM if kind == "notice" else signal.SIGKILL, *victims)
        except ProcessLookupError:
            return False
        return True

    def _check_done(self, ranks: Ranks) -> bool:
        codes = ranks.wait()
        if all(code == ExitCode.DONE for code in codes):
            return True
        raise SystemExit(f"{self._name}: ended without a kill, with exit codes {codes}:\n{ranks.stderr()}")

    def _set_expected(self, ranks: Ranks, codes: list[int], kind: str) -> None:
        """Require that no finished step is lost if a rank survived or had a preemption notice."""
        survived = any(code in (ExitCode.FABRIC, ExitCode.SAVED) for code in codes)
        steps = [report.get("step", 0) for rank in range(ranks.world_size) for report in ranks.reports(rank)]
        self._expected = max(steps, default=0) if survived and kind != "during a save" else 0

    def _check_choice(self, ranks: Ranks, intact: int, expected: int) -> None:
        """Check that the attempt restored the newest intact checkpoint, and lost no step that could be saved."""
        counts = self._harness.counts
        restored = next((report["restoredStep"] for report in ranks.reports() if "restoredStep" in report), None)
        if restored is None:
            # Killed before it restored a checkpoint.
            return
        counts.choices += 1
        if restored != intact:
            counts.corrupt_chosen += 1
            print(f"  {self._name}, attempt {ranks.attempt}: restored step {restored}, not {intact}", flush=True)
        if restored < expected:
            counts.lost += expected - restored
            print(f"  {self._name}, attempt {ranks.attempt}: lost {expected - restored} steps", flush=True)
            for log in sorted(ranks.folder.glob(f"a{ranks.attempt - 1}-r*.log")):
                print(f"{log.name}:\n{log.read_text()}", flush=True)

    def _maybe_damage(self, ranks: Ranks) -> None:
        rng = self._harness.rng
        found = sorted(paths.checkpoints(ranks.job_dir).glob("step-*")) if ranks.job_dir.exists() else []
        if len(found) < 2 or rng.random() > 0.1:
            return
        file = rng.choice(sorted(found[-1].iterdir()))
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        self._damaged.add(found[-1].name)
        self._harness.counts.kinds["damaged checkpoint"] += 1
        self._expected = 0


TRAINING = ("Training", "Saving", "Exporting", "Done")


def _wait(ranks: Ranks, condition: Callable[[dict[str, Any]], bool]) -> bool:
    """Wait for a report of rank 0; return False if it ended first."""
    while ranks.processes[0].is_alive():
        if any(condition(report) for report in ranks.reports()):
            return True
        time.sleep(0.005)
    return False


def kill_while_caching(harness: SaveHarness, number: int, reference: bytes) -> None:
    """Kill two attempts while they fill an empty cache, then run to the end."""
    folder = harness.folder / f"caching-{number}" / "job"
    spec = harness.spec(STEPS)
    for attempt in (1, 2):
        ranks = Ranks(spec, folder, attempt, world_size=2).start()
        if not _wait(ranks, lambda report: report["state"] == "Caching"):
            raise SystemExit(ranks.stderr())
        time.sleep(harness.rng.uniform(0.0, 0.3))
        ranks.send(signal.SIGKILL, harness.rng.randrange(2))
        ranks.wait()
        harness.counts.kills += 1
        harness.counts.kinds["while caching"] += 1
    ranks = Ranks(spec, folder, 3, world_size=2)
    ranks.run()
    harness.counts.runs += 1
    harness.counts.different += ranks.weights() != reference


def batches(ranks: Ranks) -> dict[int, set[tuple[tuple[int, int], ...]]]:
    """Return all global batches of all attempts of a job by step, each sorted by sample."""
    parts: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for path in sorted(ranks.folder.glob("a*-r*.batches")):
        attempt = path.name.split("-")[0]
        for line in path.read_text().split("\n")[:-1]:
            entry = json.loads(line)
            parts.setdefault((attempt, entry["step"]), []).extend((epoch, index) for epoch, index in entry["refs"])
    found: dict[int, set[tuple[tuple[int, int], ...]]] = {}
    for (_, step), refs in parts.items():
        found.setdefault(step, set()).add(tuple(sorted(refs)))
    return found


def losses(ranks: Ranks) -> list[float]:
    """Return the losses of the last steps from the newest checkpoint."""
    newest = max(paths.checkpoints(ranks.job_dir).glob("step-*"))
    values: list[float] = json.loads((newest / "state.json").read_text())["losses"]
    return values


def is_same_curve(harness: SaveHarness, run: Ranks, reference: Ranks) -> bool:
    """Return whether a resized run used the same batches as the undisturbed one, and had the same losses."""
    expected = {step: next(iter(each)) for step, each in batches(reference).items()}
    used = batches(run)
    if not expected or used.keys() != expected.keys():
        print(f"  batches of {len(used)} steps were logged, not of {len(expected)}", flush=True)
        return False
    for step, parts in used.items():
        # A rank that was killed during a step has logged a part of its batch.
        complete = {each for each in parts if len(each) == len(expected[step])}
        if not complete <= {expected[step]} or any(not set(each) <= set(expected[step]) for each in parts):
            print(f"  step {step} used other samples", flush=True)
            return False
    pairs = list(zip(losses(run), losses(reference), strict=True))
    worst = max(abs(one - other) / other for one, other in pairs)
    print(f"  maximum relative difference of the losses of {len(pairs)} steps: {worst:.1e}", flush=True)
    return worst <= LOSS_TOLERANCE


def run_all(harness: SaveHarness, num_kills: int) -> list[list[object]]:
    """Run and kill until the number of kills is reached; return the rows of the table."""
    references = {size: harness.undisturbed(size, STEPS) for size in (2, 3, 4)}
    resized = harness.undisturbed(2, ELASTIC_STEPS)
    counts, rows = harness.counts, []
    kinds = ["2 ranks", "3 ranks", "2 -> 1 -> 2 ranks", "4 ranks", "2 ranks", "while caching"]
    number = 0
    while counts.kills < num_kills:
        kind, name = kinds[number % len(kinds)], f"run-{number}"
        began, before, wrong = time.monotonic(), counts.kills, counts.different
        left = min(12, num_kills - counts.kills)
        if kind == "while caching":
            kill_while_caching(harness, number, references[2].weights())
        elif "->" in kind:
            run = KilledRun(harness, name, lambda attempt: 1 + attempt % 2, ELASTIC_STEPS, left).run()
            counts.different += not is_same_curve(harness, run, resized)
        else:
            size = int(kind[0])
            run = KilledRun(harness, name, lambda _, size=size: size, STEPS, left).run()  # type: ignore[misc]
            counts.different += run.weights() != references[size].weights()
        number += 1
        verdict = "same" if counts.different == wrong else "DIFFERENT"
        seconds = time.monotonic() - began
        rows.append([name, kind, counts.kills - before, f"{seconds:.0f}", verdict])
        print(f"  {counts.kills}/{num_kills} kills; {kind}: {verdict}, {seconds:.0f} s", flush=True)
        shutil.rmtree(harness.folder / name, ignore_errors=True)
    return rows


def main() -> None:
    """Run all kills and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="total number of SIGKILLs (default 200)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the random times; default: a new one, printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"{args.kills} kills; random times from --seed {seed}", flush=True)
    counts = SaveKillCounts()
    with tempfile.TemporaryDirectory(prefix="kill-saves-") as name:
        folder = Path(name)
        base, data = tiny.write_base(folder / "base"), tiny.write_data(folder / "data", NUM_SAMPLES)
        rows = run_all(SaveHarness(folder, base, data, random.Random(seed), counts), args.kills)
    print(
        f"\nkills during a save: {counts.during_saves}; preemption notices: {counts.notices}; "
        + ", ".join(f"{kind}: {number}" for kind, number in sorted(counts.kinds.items()))
    )
    print(f"restored checkpoints checked: {counts.choices}")
    print(f"steps lost although a survivor or a preemption notice could save them: {counts.lost}")
    result = {
        "kills": counts.kills,
        "different_weights": counts.different,
        "corrupt_chosen": counts.corrupt_chosen,
    }
    finish(["run", "ranks", "kills", "seconds", "weights"], rows, result)
    if counts.different or counts.corrupt_chosen or counts.lost or not counts.choices:
        sys.exit(1)


if __name__ == "__main__":
    main()
