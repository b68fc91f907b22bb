"""SIGKILL at random moments, half of them inside a save: does every resumed run end with the undisturbed weights?

Real ranks of a tiny model. Every attempt of a run is killed once, until the run is done:

- inside a save, by a hook at each of its stages, one rank or all of them at once;
- at a random moment, one rank (its peers save what they hold: no step may be lost) or all of them;
- while latents are being cached, with an empty cache.

In between, notices; and now and then the newest checkpoint is damaged, which must not be chosen. Runs on 2, 3 and 4
ranks must end with the weights of the undisturbed run, bit for bit; runs that change between 2 ranks and 1 with the
same batches in the same order, and with losses that agree to LOSS_TOLERANCE.

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
"""Losses of a resized run may differ by so much of themselves: the same sums, in another order."""
STEPS = 40
ELASTIC_STEPS = 20
"""As many as a checkpoint holds losses of."""
SAVE_EVERY = 3
NUM_SAMPLES = 24
SPLIT = {environment.MIN_PART_BYTES: "1"}


@dataclass
class Tally:
    """What has been seen so far."""

    kills: int = 0
    inside_saves: int = 0
    notices: int = 0
    runs: int = 0
    different: int = 0
    corrupt_chosen: int = 0
    lost: int = 0
    """Steps that were lost although a survivor, or a notice, could save them."""
    kinds: Counter[str] = field(default_factory=Counter)


@dataclass
class Bed:
    """Where all runs are, and what they are of."""

    folder: Path
    base: Path
    data: Path
    rng: random.Random
    tally: Tally

    def spec(self, steps: int) -> RunSpec:
        """The job: average, dropout and flips, so that everything there is to restore matters."""
        settings = {"steps": steps, "ema": True, "randomFlip": True, "lora": {"rank": 2, "dropout": 0.1}}
        made = tiny.make_spec(self.base, self.data, **settings)
        interval = made.checkpoint_interval.model_copy(update={"steps": SAVE_EVERY})
        return made.model_copy(update={"checkpoint_interval": interval, "keep": 2})

    def undisturbed(self, world_size: int, steps: int) -> Ranks:
        """A run that nobody disturbs."""
        ranks = Ranks(
            self.spec(steps), self.folder / f"undisturbed-{world_size}-{steps}", world_size=world_size, extra=LOGGED
        )
        if ranks.run() != [ExitCode.DONE] * world_size:
            raise SystemExit(f"the undisturbed run failed:\n{ranks.stderr()}")
        return ranks


LOGGED = {**SPLIT, "TEST_LOG_BATCHES": "1"}


def newest_whole(job_dir: Path, damaged: set[str]) -> int:
    """Step of the newest checkpoint that is whole; judged here by hashes, and by what was damaged on purpose."""
    folders = [folder for folder in paths.checkpoints(job_dir).glob("step-*") if folder.name not in damaged]
    return max((int(folder.name.split("-")[1]) for folder in folders if _is_whole(folder)), default=0)


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / paths.MANIFEST).read_text())
        return all(
            hashlib.sha256((folder / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
            for entry in manifest["files"]
        )
    except (OSError, ValueError):
        return False


class Run:
    """One job, killed over and over."""

    def __init__(self, bed: Bed, name: str, sizes: Callable[[int], int], steps: int, kills: int) -> None:
        self._bed = bed
        self._name = name
        self._sizes = sizes
        self._spec = bed.spec(steps)
        self._left = kills
        self._folder = bed.folder / name / "job"
        self._attempt = 0
        self._expected = 0
        """Step that the next attempt has to begin at, at least."""
        self._damaged: set[str] = set()

    def to_its_end(self) -> Ranks:
        """Kill attempt after attempt; let the last one finish."""
        while True:
            self._attempt += 1
            ranks = Ranks(self._spec, self._folder, self._attempt, world_size=self._sizes(self._attempt), extra=LOGGED)
            whole = newest_whole(ranks.job_dir, self._damaged)
            expected, self._expected = self._expected, 0
            done = self._disturb(ranks) if self._left > 0 else self._finish(ranks)
            self._check_choice(ranks, whole, expected)
            if done:
                self._bed.tally.runs += 1
                return ranks
            self._maybe_damage(ranks)

    def _finish(self, ranks: Ranks) -> bool:
        codes = ranks.run()
        if codes != [ExitCode.DONE] * ranks.world_size:
            raise SystemExit(f"{self._name}, attempt {ranks.attempt} ended with {codes}:\n{ranks.stderr()}")
        return True

    def _disturb(self, ranks: Ranks) -> bool:
        """Start an attempt, and kill it; True where it was done first."""
        tally = self._bed.tally
        kind = self._draw_kind()
        if kind == "inside a save":
            self._aim(ranks)
        ranks.start()
        if kind != "inside a save" and not self._strike(ranks, kind):
            return self._ended_first(ranks)
        codes = ranks.wait()
        if all(code == ExitCode.DONE for code in codes):
            return True
        tally.kinds[kind] += 1
        if kind == "notice":
            tally.notices += 1
        else:
            self._left -= 1
            tally.kills += 1
            tally.inside_saves += kind == "inside a save"
            if not any(code == -signal.SIGKILL for code in codes):
                raise SystemExit(f"{self._name}: nobody was killed, but {codes}:\n{ranks.stderr()}")
        self._expect(ranks, codes, kind)
        return False

    def _draw_kind(self) -> str:
        rng = self._bed.rng
        if rng.random() < 0.08:
            return "notice"
        if rng.random() < 0.5 + 0.5 * (self._bed.tally.inside_saves * 2 < self._bed.tally.kills):
            return "inside a save"
        return rng.choice(["one rank", "one rank", "all ranks"])

    def _aim(self, ranks: Ranks) -> None:
        rng = self._bed.rng
        stage = rng.choice(tuple(SaveStage))
        ranks.kill_at = (stage, rng.randrange(1, 4))
        if stage in IN_PARTS and rng.random() < 0.5:
            ranks.kill_rank = rng.randrange(ranks.world_size)
        if stage in ("write ema", "write model", "write optimizer"):
            # Each of them is in one part only, perhaps: whoever comes there.
            ranks.kill_rank = None

    def _strike(self, ranks: Ranks, kind: str) -> bool:
        """Wait for the moment, and kill; False where the run was over first."""
        rng = self._bed.rng
        if not _wait(ranks, lambda report: report["state"] in TRAINING):
            return False
        time.sleep(rng.uniform(0.0, 0.6))
        victims = range(ranks.world_size) if kind == "all ranks" else [rng.randrange(ranks.world_size)]
        try:
            ranks.send(signal.SIGTERM if kind == "notice" else signal.SIGKILL, *victims)
        except ProcessLookupError:
            return False
        return True

    def _ended_first(self, ranks: Ranks) -> bool:
        codes = ranks.wait()
        if all(code == ExitCode.DONE for code in codes):
            return True
        raise SystemExit(f"{self._name}: ended by itself with {codes}:\n{ranks.stderr()}")

    def _expect(self, ranks: Ranks, codes: list[int], kind: str) -> None:
        """Where somebody was left, or had notice, no finished step may be lost."""
        survived = any(code in (ExitCode.FABRIC, ExitCode.SAVED) for code in codes)
        told = [report.get("step", 0) for rank in range(ranks.world_size) for report in ranks.reports(rank)]
        self._expected = max(told, default=0) if survived and kind != "inside a save" else 0

    def _check_choice(self, ranks: Ranks, whole: int, expected: int) -> None:
        """The attempt began at the newest checkpoint that was whole, and lost nothing that could be saved."""
        tally = self._bed.tally
        begun = [report["restoredStep"] for report in ranks.reports() if "restoredStep" in report]
        if not begun:
            return
        if begun[0] != whole:
            tally.corrupt_chosen += 1
            print(f"  {self._name}, attempt {ranks.attempt}: began at {begun[0]}, not at {whole}", flush=True)
        if begun[0] < expected:
            tally.lost += expected - begun[0]
            print(f"  {self._name}, attempt {ranks.attempt}: lost {expected - begun[0]} steps", flush=True)
            for log in sorted(ranks.folder.glob(f"a{ranks.attempt - 1}-r*.log")):
                print(f"{log.name}:\n{log.read_text()}", flush=True)

    def _maybe_damage(self, ranks: Ranks) -> None:
        rng = self._bed.rng
        found = sorted(paths.checkpoints(ranks.job_dir).glob("step-*")) if ranks.job_dir.exists() else []
        if len(found) < 2 or rng.random() > 0.1:
            return
        file = rng.choice(sorted(found[-1].iterdir()))
        data = bytearray(file.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        self._damaged.add(found[-1].name)
        self._bed.tally.kinds["damaged checkpoint"] += 1
        self._expected = 0


TRAINING = ("Training", "Saving", "Exporting", "Done")


def _wait(ranks: Ranks, condition: Callable[[dict[str, Any]], bool]) -> bool:
    """Wait until rank 0 says something; False where it ended first."""
    while ranks.processes[0].is_alive():
        if any(condition(report) for report in ranks.reports()):
            return True
        time.sleep(0.005)
    return False


def kill_while_caching(bed: Bed, number: int, truth: bytes) -> None:
    """Two kills with an empty cache, then to the end."""
    folder = bed.folder / f"caching-{number}" / "job"
    spec = bed.spec(STEPS)
    for attempt in (1, 2):
        ranks = Ranks(spec, folder, attempt, world_size=2).start()
        if not _wait(ranks, lambda report: report["state"] == "Caching"):
            raise SystemExit(ranks.stderr())
        time.sleep(bed.rng.uniform(0.0, 0.3))
        ranks.send(signal.SIGKILL, bed.rng.randrange(2))
        ranks.wait()
        bed.tally.kills += 1
        bed.tally.kinds["while caching"] += 1
    ranks = Ranks(spec, folder, 3, world_size=2)
    ranks.run()
    bed.tally.runs += 1
    bed.tally.different += ranks.weights() != truth


def batches(ranks: Ranks) -> dict[int, set[tuple[tuple[int, int], ...]]]:
    """Every global batch that was ever made, by step, sorted by sample; over all attempts of a job."""
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
    """The losses of the last steps, as the last checkpoint holds them."""
    newest = max(paths.checkpoints(ranks.job_dir).glob("step-*"))
    noted: list[float] = json.loads((newest / "state.json").read_text())["losses"]
    return noted


def is_same_curve(bed: Bed, run: Ranks, truth: Ranks) -> bool:
    """Whether a resized run saw the same batches, and lost as the undisturbed one did."""
    expected = {step: next(iter(each)) for step, each in batches(truth).items()}
    for step, made in batches(run).items():
        # A step in which somebody died may be there in part.
        whole = {each for each in made if len(each) == len(expected[step])}
        if not whole <= {expected[step]} or any(not set(each) <= set(expected[step]) for each in made):
            print(f"  step {step} was made of other samples", flush=True)
            return False
    pairs = list(zip(losses(run), losses(truth), strict=True))
    worst = max(abs(one - other) / other for one, other in pairs)
    print(f"  losses differ by at most {worst:.1e} of themselves over {len(pairs)} steps", flush=True)
    return worst <= LOSS_TOLERANCE


def run_all(bed: Bed, num_kills: int) -> list[list[object]]:
    """All runs, until enough was killed."""
    truths = {size: bed.undisturbed(size, STEPS) for size in (2, 3, 4)}
    resized = bed.undisturbed(2, ELASTIC_STEPS)
    tally, rows = bed.tally, []
    kinds = ["2 ranks", "3 ranks", "2 -> 1 -> 2 ranks", "4 ranks", "2 ranks", "while caching"]
    number = 0
    while tally.kills < num_kills:
        kind, name = kinds[number % len(kinds)], f"run-{number}"
        began, before, wrong = time.monotonic(), tally.kills, tally.different
        left = min(12, num_kills - tally.kills)
        if kind == "while caching":
            kill_while_caching(bed, number, truths[2].weights())
        elif "->" in kind:
            run = Run(bed, name, lambda attempt: 1 + attempt % 2, ELASTIC_STEPS, left).to_its_end()
            tally.different += not is_same_curve(bed, run, resized)
        else:
            size = int(kind[0])
            run = Run(bed, name, lambda _, size=size: size, STEPS, left).to_its_end()  # type: ignore[misc]
            tally.different += run.weights() != truths[size].weights()
        number += 1
        verdict = "same" if tally.different == wrong else "DIFFERENT"
        seconds = time.monotonic() - began
        rows.append([name, kind, tally.kills - before, f"{seconds:.0f}", verdict])
        print(f"  {tally.kills}/{num_kills} kills; {kind}: {verdict}, {seconds:.0f} s", flush=True)
        shutil.rmtree(bed.folder / name, ignore_errors=True)
    return rows


def main() -> None:
    """Kill, and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs in all (default 200)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the moments; default: a new one, printed")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"{args.kills} kills; moments drawn from --seed {seed}", flush=True)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="kill-saves-") as name:
        folder = Path(name)
        base, data = tiny.write_base(folder / "base"), tiny.write_data(folder / "data", NUM_SAMPLES)
        rows = run_all(Bed(folder, base, data, random.Random(seed), tally), args.kills)
    print(
        f"\n{tally.inside_saves} of the kills inside a save; {tally.notices} notices; "
        + ", ".join(f"{kind}: {number}" for kind, number in sorted(tally.kinds.items()))
    )
    print(f"steps lost although a survivor or a notice could save them: {tally.lost}")
    result = {
        "kills": tally.kills,
        "different_weights": tally.different,
        "corrupt_chosen": tally.corrupt_chosen,
    }
    finish(["run", "ranks", "kills", "seconds", "weights"], rows, result)
    if tally.different or tally.corrupt_chosen or tally.lost:
        sys.exit(1)


if __name__ == "__main__":
    main()
