"""Cost of the hook of scripts: the same script with the hook and without it, in turn, on 1 and 2 ranks.

The steps are as small as possible, so that the difference of their times is the cost of the hook. It is given as a
share of a step of 50 ms: of the time on the clock, and of the time of the thread on a CPU, which a busy machine changes
less. Other work on the machine only adds time, so the fastest steps count: the tenth percentile of each run, and the
median over the rounds. Each round runs both, in alternating order. The last line is JSON: {"wall_1_rank",
"cpu_1_rank", "wall_2_ranks", "cpu_2_ranks"}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from testing.measure.report import finish
from testing.trainer import step_times
from testing.trainer.script_ranks import ScriptRanks
from testing.trainer.scripts import script_spec

STEP_SECONDS = 0.05
SCRIPT = Path(step_times.__file__ or "")


def fast_seconds(folder: Path, world_size: int, steps: int, *, hooked: bool) -> dict[str, float]:
    """Run the script once, and return the tenth percentiles of the seconds of its steps, without the first tenth."""
    job = folder / "job"
    args = {"output_dir": str(job), "max_train_steps": steps * world_size}
    spec = script_spec(SCRIPT, args, checkpointInterval={"seconds": 100_000})
    argv = tuple(text for name, value in args.items() for text in (f"--{name}", str(value)))
    ranks = ScriptRanks(spec, folder, world_size=world_size, hooked=hooked, script=SCRIPT, argv=argv)
    if ranks.run() != [0] * world_size:
        raise SystemExit(f"the script failed:\n{ranks.stderr()}")
    seconds: dict[str, list[float]] = json.loads((job / "seconds-0.json").read_text(encoding="utf-8"))
    return {kind: statistics.quantiles(each[len(each) // 10 :], n=10)[0] for kind, each in seconds.items()}


def measure(folder: Path, world_size: int, rounds: int, steps: int) -> list[dict[bool, dict[str, float]]]:
    """Return the times of each round, with the hook and without it."""
    pairs = []
    for number in range(rounds):
        order = (False, True) if number % 2 else (True, False)
        pair = {
            hooked: fast_seconds(folder / f"{world_size}-{number}-{hooked}", world_size, steps, hooked=hooked)
            for hooked in order
        }
        pairs.append(pair)
        print(f"{world_size} ranks, round {number + 1}: {pair[False]}, with the hook {pair[True]}", flush=True)
    return pairs


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    rows, result = [], {}
    with tempfile.TemporaryDirectory(prefix="script-hook-") as folder:
        for world_size in (1, 2):
            pairs = measure(Path(folder), world_size, options.rounds, options.steps)
            for kind in ("wall", "cpu"):
                cost = statistics.median(pair[True][kind] - pair[False][kind] for pair in pairs)
                plain = statistics.median(pair[False][kind] for pair in pairs)
                name = f"{kind}_{world_size}_rank{'s' if world_size > 1 else ''}"
                result[name] = round(cost / STEP_SECONDS, 4)
                rows.append((world_size, kind, f"{plain * 1e6:.0f}", f"{cost * 1e6:.0f}", f"{result[name]:.2%}"))
    finish(("ranks", "time", "step, us", "hook, us", "share of 50 ms"), rows, result)


if __name__ == "__main__":
    main()
