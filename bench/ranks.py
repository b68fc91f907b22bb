"""Compare two ranks on two cores with one rank of two threads: images per second with the same global batch.

Run the demo's job alternately in both configurations (A B A B ...) through the `finetune` command, and take the speed
that each run reports while it trains. The last line is JSON: {"two_ranks", "one_rank", "ratio"}. The ratio is the
median of the pairs' ratios; above 1, two ranks are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from testing.measure.report import finish

ROOT = Path(__file__).resolve().parent.parent
GLOBAL_BATCH = 16


def write_manifest(folder: Path, data: Path, num_ranks: int, num_steps: int) -> Path:
    """Write the demo's job for a number of ranks with the same global batch, and return its path."""
    job: dict[str, Any] = yaml.safe_load((ROOT / "examples/lora-circles.yaml").read_text())
    spec = job["spec"]
    spec["model"]["base"] = str(ROOT / "examples/base-circles")
    spec["dataset"]["source"] = str(data)
    spec["training"].pop("validation", None)
    spec["training"] |= {"steps": num_steps, "batchSize": GLOBAL_BATCH // num_ranks}
    spec["topology"] = {"accelerator": "cpu", "nodes": num_ranks}
    spec["checkpoint"] = {"interval": {"steps": num_steps}}
    spec["outputs"] = []
    path = folder / f"ranks-{num_ranks}.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def measure_images_per_second(folder: Path, data: Path, num_ranks: int, num_steps: int, number: int) -> float:
    """Train once and return the speed in the final status of the job."""
    finetune = str(Path(sys.executable).parent / "finetune")
    home = str(folder / f"state-{number}-{num_ranks}")
    path = write_manifest(folder, data, num_ranks, num_steps)
    subprocess.run([finetune, "run", str(path), "--home", home, "--plain"], check=True, stdout=subprocess.DEVNULL)
    command = [finetune, "get", "lora-circles", "--home", home, "-o", "json"]
    status = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["status"]
    return float(status["imagesPerSecond"])


def main() -> None:
    """Measure the pairs and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each configuration (default 5)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps per run (default 60)")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        sys.exit(f"this process may use only {cores} core; the benchmark needs two")
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))
    pairs: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as name:
        folder = Path(name)
        data = folder / "data"
        make = [sys.executable, "-m", "finetune_trainer.demo.circles", str(data), "--style", "stripes"]
        subprocess.run([*make, "--num-train", "64", "--num-validation", "8"], check=True)
        for number in range(args.pairs):
            two = measure_images_per_second(folder, data, 2, args.steps, number)
            one = measure_images_per_second(folder, data, 1, args.steps, number)
            pairs.append((two, one))
            print(f"  pair {number + 1}/{args.pairs}: two ranks {two:.1f}, one rank {one:.1f} images/s", flush=True)
    ratio = statistics.median(two / one for two, one in pairs)
    rows = [[number + 1, f"{two:.1f}", f"{one:.1f}", f"{two / one:.2f}"] for number, (two, one) in enumerate(pairs)]
    result = {
        "two_ranks": round(statistics.median(two for two, _ in pairs), 2),
        "one_rank": round(statistics.median(one for _, one in pairs), 2),
        "ratio": round(ratio, 3),
    }
    finish(["pair", "two ranks, images/s", "one rank of two threads, images/s", "ratio"], rows, result)


if __name__ == "__main__":
    main()
