"""Preemption notices and SIGKILLs at random moments of a script: the weights must be those of an undisturbed run.

A script in the style of diffusers' examples runs on 2 ranks of gloo. Every attempt is disturbed once, until the run is
done, then the next run begins:

- a preemption notice to one rank, or to both: no step may be lost;
- SIGKILL of one rank, or of both: between steps, in a step, or in the middle of a save.

The last line is JSON: {"kills", "notices", "different_weights", "lost_after_notice"}.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from testing.measure.report import finish
from testing.trainer.script_ranks import At, ScriptRanks
from testing.trainer.scripts import script_spec

RANKS = 2
STEPS = 30
ARGS = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 7,
    "checkpoints_total_limit": 2,
    "gradient_accumulation_steps": 2,
    "num_samples": 34,
    "use_ema": True,
    "seed": 3,
}
DISTURBANCES_PER_RUN = 4
MOMENTS = ("step", "backward", "save", "saved")


@dataclass
class ScriptKillCounts:
    """Counts over all runs so far."""

    kills: int = 0
    notices: int = 0
    different_weights: int = 0
    lost_after_notice: int = 0


def choose(rng: random.Random, number: signal.Signals) -> tuple[At, ...]:
    """Return the signals of one attempt: to one rank or to both, at a random moment."""
    moment = rng.choice(MOMENTS[:2] if number is signal.SIGTERM else MOMENTS)
    count = rng.randint(1, 2) if moment.startswith("save") else rng.randint(1, STEPS // DISTURBANCES_PER_RUN)
    both = rng.random() < 0.3 and not moment.startswith("save")
    ranks = range(RANKS) if both else [0 if moment.startswith("save") else rng.randrange(RANKS)]
    return tuple(At(moment, count, rank, number) for rank in ranks)


class ScriptKillHarness:
    """Runs the script, disturbs it, and compares its weights."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self._folder = folder
        self._rng = rng
        self.counts = ScriptKillCounts()
        self._spec: RunSpec = script_spec("train_style.py", dict(ARGS), checkpointInterval={"steps": 3}, keep=2)
        undisturbed = ScriptRanks(self._spec, folder / "undisturbed", world_size=RANKS)
        if undisturbed.run() != [0] * RANKS:
            raise SystemExit(f"the undisturbed run failed:\n{undisturbed.stderr()}")
        self._weights = undisturbed.output()

    def run(self, name: str, plan: list[signal.Signals]) -> None:
        """Run one job. Each of its first attempts gets one signal of the plan."""
        attempt, expected = 0, 0
        while True:
            attempt += 1
            number = plan.pop(0) if plan else None
            at = choose(self._rng, number) if number is not None else ()
            ranks = ScriptRanks(self._spec, self._folder / name, attempt, world_size=RANKS, at=at)
            codes = ranks.run()
            self._check_restored(ranks, expected)
            if codes == [ExitCode.DONE] * RANKS:
                if number is not None:
                    # The attempt ended before the moment was reached.
                    plan.insert(0, number)
                break
            self._count(codes, ranks, number)
            expected = self._last_step(ranks) if number is signal.SIGTERM else 0
        if ranks.output() != self._weights:
            self.counts.different_weights += 1
            print(f"{name}: the weights differ from those of the undisturbed run", flush=True)
        print(f"{name}: {attempt} attempts; {asdict(self.counts)}", flush=True)

    def _check_restored(self, ranks: ScriptRanks, expected: int) -> None:
        restored = max((report.get("restoredStep") or 0 for report in ranks.reports()), default=0)
        if restored < expected and any("step" in report for report in ranks.reports()):
            self.counts.lost_after_notice += expected - restored
            print(f"step {expected} was reported before a notice, and {restored} is restored", flush=True)

    def _count(self, codes: list[int], ranks: ScriptRanks, number: signal.Signals | None) -> None:
        # Before the first step there is nothing to save, and the rank leaves without the other.
        left = {ExitCode.SAVED, ExitCode.FABRIC} if self._last_step(ranks) == 0 else {ExitCode.SAVED}
        if number is signal.SIGTERM and ExitCode.SAVED in codes and left.issuperset(codes):
            self.counts.notices += 1
        elif number is signal.SIGKILL and -signal.SIGKILL in codes:
            self.counts.kills += 1
        else:
            raise SystemExit(f"attempt {ranks.attempt} ended with {codes}:\n{ranks.stderr()}\n{ranks.stderr(1)}")

    @staticmethod
    def _last_step(ranks: ScriptRanks) -> int:
        return max((report.get("step") or 0 for rank in range(RANKS) for report in ranks.reports(rank)), default=0)


def main() -> int:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notices", type=int, default=25)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    plan = [signal.SIGTERM] * options.notices + [signal.SIGKILL] * options.kills
    rng.shuffle(plan)
    with tempfile.TemporaryDirectory(prefix="kill-scripts-") as folder:
        harness = ScriptKillHarness(Path(folder), rng)
        number = 0
        while plan:
            number += 1
            part, plan = plan[:DISTURBANCES_PER_RUN], plan[DISTURBANCES_PER_RUN:]
            harness.run(f"run-{number}", part)
            plan = part + plan
    counts = asdict(harness.counts)
    finish(("count", "value"), list(counts.items()), counts)
    return int(bool(counts["different_weights"] or counts["lost_after_notice"]))


if __name__ == "__main__":
    sys.exit(main())
