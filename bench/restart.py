"""Measures the time from the kill of a rank to its next new step, and its phases.

`make bench-restart`. A rank of a small job is killed with SIGKILL and started again by the supervisor's own code:
forked and with the indexes of the cache (A), or by its command and without indexes, as a first start on a new node (B),
in turns (A B A B ...). The last line is JSON: {"forked_seconds", "command_seconds", "ratio", "phases"}; `ratio` is the
median of the pairs' ratios, `phases` the medians of A's phases. Options::

    python -m bench.restart --images 500 --pairs 5
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.map_phase import BASE, RESOLUTION, write_images
from finetune_contract import environment
from finetune_contract.cpu.placement import RankPlace
from finetune_contract.heartbeat import RankReport
from finetune_contract.run_spec import RunSpec
from finetune_trainer.supervisor.forks import ForkClient
from finetune_trainer.supervisor.ranks import RankStarter
from testing.measure.report import finish
from testing.trainer.supervisor_config import make_config

COMMAND = (sys.executable, "-m", "finetune_trainer.rank")
CONFIG = make_config()
STEPS_PER_START = 2
DEADLINE_SECONDS = 600.0


@dataclass(frozen=True)
class Restart:
    """One restart.

    Attributes:
        seconds: time from the order of the rank to its first new step, as the supervisor sees it.
        phases: durations of the rank's phases in seconds.
    """

    seconds: float
    phases: dict[str, float]


def write_job(folder: Path, images: int, steps: int) -> None:
    """Write the data and the run specification, and set the environment of the ranks."""
    write_images(folder / "data", images)
    spec = RunSpec.model_validate(
        {
            "namespace": "bench",
            "job": "restart",
            "uid": "restart",
            "model": {"base": str(BASE)},
            "dataset": {"source": str(folder / "data")},
            "training": {"method": "LoRA", "steps": steps, "resolution": RESOLUTION},
            "checkpointInterval": {"steps": 1},
            "globalBatch": 1,
        }
    )
    (folder / "run.json").write_text(spec.to_json(), encoding="utf-8")
    os.environ |= {
        environment.RUN_SPEC: str(folder / "run.json"),
        environment.CHECKPOINT_DIR: str(folder / "job"),
        environment.CACHE_DIR: str(folder / "cache"),
        environment.BACKEND: "gloo",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
    }


async def run_until_steps(attempt: int, server: ForkClient | None) -> Restart:
    """Start the rank, and kill it when it has made a few new steps and committed one of them."""
    os.environ[environment.ATTEMPT] = str(attempt)
    changed = asyncio.Event()
    began = time.monotonic()
    rank = await RankStarter(COMMAND, changed.set, server).start(CONFIG, 0, RankPlace(1, ()))
    following = asyncio.create_task(rank.follow())
    first_step: float | None = None
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not _has_saved(rank.report):
            if first_step is None and rank.report.start_seconds:
                first_step = time.monotonic()
            if following.done():
                raise RuntimeError(f"the rank ended:\n{following.result().last_words}")
            await asyncio.sleep(0.002)
    rank.signal(signal.SIGKILL)
    await following
    assert first_step is not None
    return Restart(first_step - began, dict(rank.report.start_seconds))


def _has_saved(report: RankReport) -> bool:
    first, newest = report.restored_step, report.checkpoint
    return first is not None and newest is not None and newest.step >= first + STEPS_PER_START


def drop_indexes(cache: Path) -> None:
    """Remove the indexes of a cache, so that it is opened like one of an older release."""
    for path in cache.rglob("*.index"):
        path.unlink()


async def measure(folder: Path, pairs: int) -> list[tuple[Restart, Restart]]:
    """Fill the cache in a first attempt, and measure pairs of restarts."""
    server = await ForkClient.connect(os.environ, lambda: None)
    print("first attempt: the map phase", flush=True)
    await run_until_steps(1, server)
    found = []
    for number in range(pairs):
        forked = await run_until_steps(2 + 2 * number, server)
        drop_indexes(folder / "cache")
        command = await run_until_steps(3 + 2 * number, None)
        found.append((forked, command))
        print(f"  pair {number + 1}/{pairs}: {forked.seconds:.2f} s, {command.seconds:.2f} s", flush=True)
    return found


def main() -> None:
    """Measure the pairs and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=500, help="images of the data set (default 500)")
    parser.add_argument("--pairs", type=int, default=5, help="restarts of each kind (default 5)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-restart-") as name:
        folder = Path(name)
        write_job(folder, args.images, (2 * args.pairs + 2) * 10**6)
        # The rank's own lines would hide the table.
        os.environ["PYTHONWARNINGS"] = "ignore"
        pairs = asyncio.run(measure(folder, args.pairs))
    rows = []
    for phase in pairs[0][0].phases:
        medians = [statistics.median(pair[kind].phases[phase] for pair in pairs) for kind in (0, 1)]
        rows.append([phase, *(f"{seconds:.2f}" for seconds in medians)])
    totals = [statistics.median(pair[kind].seconds for pair in pairs) for kind in (0, 1)]
    rows.append(["first step seen", *(f"{seconds:.2f}" for seconds in totals)])
    result = {
        "forked_seconds": round(totals[0], 3),
        "command_seconds": round(totals[1], 3),
        "ratio": round(statistics.median(command.seconds / forked.seconds for forked, command in pairs), 3),
        "phases": {str(row[0]): float(row[1]) for row in rows[:-1]},
    }
    finish(["phase, median s", "forked, with indexes", "by its command, without"], rows, result)


if __name__ == "__main__":
    main()
