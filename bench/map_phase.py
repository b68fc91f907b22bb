"""Measures the map phase from a thousand to a hundred thousand images: memory, speed, and the wait of a step.

`make bench-map`. The pictures and the VAE (examples/base-circles) are small. A separate process for each number of
images caches all latents and captions, opens the cache again as a later attempt does, and takes micro-batches while a
device would be busy for the duration of a step. Options::

    python -m bench.map_phase --images 1000 100000 --step-seconds 0.05
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from finetune_contract.run_spec import RunSpec
from finetune_trainer.data.captions import OwnCaptions
from finetune_trainer.data.prefetch import Prefetcher
from finetune_trainer.data.prepare import DataRequirements, Preparation, PreparedData
from finetune_trainer.data.sampling.order import SampleRef, sample_at
from finetune_trainer.distributed.world import World
from finetune_trainer.models.base import open_base
from testing.measure.memory import peak_bytes, reset_peak
from testing.measure.process import call_in_new_process
from testing.measure.report import finish

BASE = Path(__file__).parent.parent / "examples" / "base-circles"
RESOLUTION = 16
STEPS = 100
BATCH = 4
MIB = 2**20


def write_images(folder: Path, count: int) -> None:
    """Write pictures and captions, each of them different."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as rows:
        for number in range(count):
            pixels = random.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png", compress_level=0)
            rows.write(json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) + "\n")


def prepare(data: Path, cache: Path, report: Any, streaming: bool) -> PreparedData:
    """Run the map phase as a rank does."""
    spec = RunSpec.model_validate(
        {
            "namespace": "bench",
            "job": "map",
            "uid": "map",
            "model": {"base": str(BASE)},
            "dataset": {"source": str(data), "streaming": streaming},
            "training": {"method": "LoRA", "steps": 1, "resolution": RESOLUTION, "centerCrop": streaming},
            "globalBatch": 1,
        }
    )
    world = World(0, 1, 0, torch.device("cpu"))
    requirements = DataRequirements(OwnCaptions())
    family = open_base(spec.model)
    return Preparation(spec, requirements, family, world, torch.float32, cache, report, print).run()


def print_progress(began: float, last: list[float], text: str) -> None:
    """Print a line at most every ten seconds."""
    if time.monotonic() - last[0] > 10:
        last[0] = time.monotonic()
        print(f"{time.monotonic() - began:5.0f} s: {text}", flush=True)


def run_case(count: int, folder: Path, step_seconds: float, streaming: bool) -> dict[str, float]:
    """Cache `count` images, and take micro-batches of them."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    data = folder / f"data-{count}"
    write_images(data, count)
    began = time.monotonic()
    progress = functools.partial(print_progress, began, [began])
    prepare(data, folder / f"cache-{count}", progress, streaming)
    map_seconds = time.monotonic() - began
    gc.collect()
    map_peak = peak_bytes()
    reset_peak()
    began = time.monotonic()
    prepared = prepare(data, folder / f"cache-{count}", progress, streaming)
    reopen_seconds = time.monotonic() - began
    batches = Prefetcher(prepared.batches)

    def refs(step: int) -> list[SampleRef]:
        return [sample_at(0, count, step * BATCH + number) for number in range(BATCH)]

    batches.take(refs(0), refs(1))
    time.sleep(step_seconds)
    batches.waited_seconds = 0.0
    for step in range(1, STEPS + 1):
        batches.take(refs(step), refs(step + 1))
        time.sleep(step_seconds)
    return {
        "images_per_second": count / map_seconds,
        "reopen_seconds": reopen_seconds,
        "map_peak_mib": map_peak / MIB,
        "train_peak_mib": peak_bytes() / MIB,
        "wait_ms": batches.waited_seconds / STEPS * 1000,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure each number of images; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.map_phase", description=main.__doc__)
    parser.add_argument(
        "--images", nargs="+", type=int, default=[1000, 100_000], help="image counts (default: 1000 100000)"
    )
    parser.add_argument("--step-seconds", type=float, default=0.05, help="seconds per step (default: 0.05)")
    parser.add_argument("--streaming", action="store_true", help="read the images as a stream")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    rows: list[list[object]] = []
    result: dict[str, float] = {}
    for count in options.images:
        with tempfile.TemporaryDirectory() as folder:
            figures = call_in_new_process(run_case, count, Path(folder), options.step_seconds, options.streaming)
        result |= {f"{name}_{count}": round(value, 3) for name, value in figures.items()}
        rows.append([count, *(f"{value:.2f}" for value in figures.values())])
        print(*rows[-1], flush=True)
    first, last = (result[f"train_peak_mib_{count}"] for count in (options.images[0], options.images[-1]))
    result["growth"] = round(last / first, 3)
    header = ["images", "images/s", "reopen s", "map phase peak MiB", "training peak MiB", "wait per step ms"]
    finish(header, rows, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
