"""Training speed of each method at the SD 1.5 and SDXL architectures, compared with its floor and with a plain loop.

`make bench-train`. Random weights, 256 px, batch 1, bf16, on the GPU if the machine has one. "ours" is the product's
loop over its cache. The floor is forward pass, backward pass and a fused optimizer on a prepared batch. The plain loop
does the work of the usual scripts in every step, in a separate process. Their steps alternate; if the memory cannot
hold the plain loop next to the others, it runs after them. On a known GPU the output has the share of its peak
arithmetic. Options::

    python -m bench.train --methods LoRA ControlNet --families sd15 --pairs 3
    python -m bench.train --methods LoRA --families sdxl --resolution 1024 --batch 4
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import torch
from PIL import Image

from bench.train_plain import Floor, PlainLoop
from finetune_contract.methods import encodes_text
from finetune_contract.run_spec import RunSpec
from finetune_trainer import heap
from finetune_trainer.checkpoint.checkpointer import Checkpointer
from finetune_trainer.checkpoint.store.folder import FolderStore
from finetune_trainer.checkpoint.store.retention import Retention
from finetune_trainer.data.prefetch import Prefetcher
from finetune_trainer.data.prepare import DataRequirements, Preparation
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.data.sampling.order import SampleRef
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.registry import method_class, method_traits
from finetune_trainer.optim.optimizer import learning_rate
from finetune_trainer.report import Reporter
from finetune_trainer.train.determinism import make_deterministic
from finetune_trainer.train.loop import Loop
from finetune_trainer.train.micro_batch import MicroBatch
from finetune_trainer.train.passes.eager import PassWork
from finetune_trainer.train.passes.make import make_passes
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.storage import make_complete_gradients, make_complete_state
from testing.measure.architectures import UNETS, RandomFamily
from testing.measure.device import count_flops, measured_device, peak_bytes, peak_flops, reset_peak, time_step
from testing.measure.process import build_in_new_process
from testing.measure.report import finish

Turn = dict[str, float]
"""Seconds of one step of each loop, and figures of our loop that are the same in each turn."""
DEVICE = measured_device()
DTYPE = torch.bfloat16
NUM_IMAGES = 8
METHODS: dict[str, dict[str, Any]] = {
    "Full": {},
    "LoRA": {"lora": {"rank": 4}},
    "DreamBooth": {"dreambooth": {"instancePrompt": "a photo of sks dog"}},
    "DreamBoothLoRA": {"lora": {"rank": 4}, "dreambooth": {"instancePrompt": "a photo of sks dog"}},
    "TextualInversion": {"textualInversion": {"placeholderToken": "<cat>", "initializerToken": "a"}},
    "ControlNet": {},
}
KEYS = {
    "Full": "full",
    "LoRA": "lora",
    "DreamBooth": "dreambooth",
    "DreamBoothLoRA": "dreambooth_lora",
    "TextualInversion": "textual_inversion",
    "ControlNet": "controlnet",
}
SIDE_BY_SIDE = {
    (name, method) for name in ("tiny", "sd15") for method in ("LoRA", "DreamBoothLoRA", "TextualInversion")
}
"""Cases whose plain loop fits in memory next to ours, so that their steps can alternate."""
NEEDED_GIB = {("sdxl", "Full"): 47, ("sdxl", "DreamBooth"): 47, ("sdxl", "ControlNet"): 29}
"""Weights, gradients and AdamW's moments in fp32, in GiB, of cases that some machines cannot hold."""


@dataclasses.dataclass(frozen=True)
class TrainSetting:
    """Settings of a measurement.

    Attributes:
        pairs: measured steps of each loop.
        resolution: side of the square images in pixels.
        batch: images per step, all in one forward pass.
    """

    pairs: int
    resolution: int
    batch: int


@dataclasses.dataclass(frozen=True)
class ProductLoop:
    """The product's loop after its first step."""

    loop: Loop
    first_step_seconds: float
    peak_bytes: int

    def step(self) -> None:
        """Run one step of the product's loop, as in a rank."""
        make_deterministic(DEVICE)
        self.loop.train_step()
        torch.use_deterministic_algorithms(False)


def write_data(folder: Path, resolution: int) -> Path:
    """Write a few pictures with captions and conditioning images, and return the folder."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for index in range(NUM_IMAGES):
        for name in (f"{index}.png", f"edges-{index}.png"):
            Image.fromarray(random.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"file_name": f"{index}.png", "text": f"picture {index}", "edges": f"edges-{index}.png"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def make_spec(method: str, data: Path, setting: TrainSetting) -> RunSpec:
    """Return the run specification of one method."""
    columns = {"conditioning": "edges"} if method == "ControlNet" else {}
    training = {
        "method": method,
        "steps": 1000,
        "batchSize": setting.batch,
        "resolution": setting.resolution,
        "precision": "bf16",
        "learningRate": 1e-6,
    }
    return RunSpec.model_validate(
        {
            "namespace": "bench",
            "job": "bench",
            "uid": "bench",
            "model": {"base": "random"},
            "dataset": {"source": str(data), "columns": columns},
            "training": {**training, **METHODS[method]},
            "globalBatch": setting.batch,
            "checkpointInterval": {"seconds": 604_800},
        }
    )


def make_product_loop(family: RandomFamily, spec: RunSpec, cache: Path) -> ProductLoop:
    """Prepare the data and the loop as a rank does, and run the first step."""
    started = time.monotonic()
    loop = make_loop(family, spec, cache)
    loop.train_step()
    return ProductLoop(loop, time.monotonic() - started, peak_bytes())


def make_loop(family: RandomFamily, spec: RunSpec, cache: Path) -> Loop:
    """Prepare the data and the loop as a rank does. The measurement of memory starts after the data preparation."""
    world, training, reporter = World(0, 1, 0, DEVICE), spec.training, Reporter(0, None)
    kind, traits = method_class(training.method), method_traits(training.method)
    demand = DataRequirements(
        kind.captions(training), traits.needs_captions, not encodes_text(training), traits.needs_conditioning
    )
    data = Preparation(spec, demand, family, world, DTYPE, cache, lambda _: None, lambda _: None).run()
    gc.collect()
    heap.release_free_memory()
    reset_peak()
    method = kind(MethodContext(family, training, Draws(0), DEVICE, DTYPE))
    state = make_complete_state(training, method, DEVICE)
    checkpointer = Checkpointer(spec, world, FolderStore(cache.parent / "job", spec.uid, 1, Retention()), reporter)
    checkpointer.restore(state)
    gradients = make_complete_gradients(training, method, state, world)
    work = PassWork(method, gradients, spec.global_batch, family.objective.num_timesteps)
    return Loop(
        spec=spec,
        world=world,
        method=method,
        batches=Prefetcher(data.batches),
        draws=Draws(0),
        state=state,
        gradients=gradients,
        learning_rate=learning_rate(training, 1000),
        checkpointer=checkpointer,
        notice=PreemptionNotice(),
        reporter=reporter,
        validator=None,
        total_steps=1000,
        micro_batch=MicroBatch(spec.global_batch, reporter.warn),
        passes=make_passes(training, work, world, reporter.note),
    )


def make_turn(family_name: str, method: str, data: Path, cache: Path, setting: TrainSetting) -> Callable[[], Turn]:
    """Return a function that runs one step of our loop and one of its floor. Called in a separate process."""
    diffusers.utils.logging.set_verbosity_error()
    if DEVICE.type == "cpu":
        heap.keep_freed_memory(os.environ)
    ours = make_product_loop(RandomFamily(family_name), make_spec(method, data, setting), cache)
    loop, refs = ours.loop, [SampleRef(0, index) for index in range(setting.batch)]
    floor = Floor(loop.method, loop.batches.take(refs, []), loop.state, loop.gradients)
    facts = {"first_step": ours.first_step_seconds, "peak_bytes": ours.peak_bytes, "flops": count_flops(floor.step)}

    def turn() -> Turn:
        gc.collect()
        return {**facts, "ours": time_step(ours.step), "floor": time_step(floor.step)}

    return turn


def make_plain_turn(family_name: str, method: str, data: Path, setting: TrainSetting) -> Callable[[], Turn]:
    """Return a function that runs one step of the plain loop. Runs in a separate process with the default heap."""
    diffusers.utils.logging.set_verbosity_error()
    images = sorted(data.glob("[0-9]*.png"))
    plain = PlainLoop(RandomFamily(family_name), method, images, setting.resolution, setting.batch)

    def turn() -> Turn:
        gc.collect()
        return {"plain": time_step(plain.step)}

    return turn


def run_case(family_name: str, method: str, setting: TrainSetting) -> dict[str, float]:
    """Return the figures of one method on one family: medians over the pairs without the first one."""
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder) / "data", setting.resolution)
        ours = build_in_new_process(make_turn, family_name, method, data, Path(folder) / "cache" / family_name, setting)
        plain = build_in_new_process(make_plain_turn, family_name, method, data, setting)
        rounds = range(setting.pairs + 1)
        if (family_name, method) in SIDE_BY_SIDE:
            with ours as one, plain as other:
                turns = [one() | other() for _ in rounds]
        else:
            with ours as one:
                turns = [one() for _ in rounds]
            with plain as other:
                turns = [turn | other() for turn in turns]
    return summarize(turns[1:], setting.batch)


def summarize(turns: Sequence[Turn], batch: int) -> dict[str, float]:
    """Return the figures of a method."""
    medians = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
    limit = peak_flops()
    return {
        "images_per_second": batch / medians["ours"],
        "over_floor": medians["ours"] / medians["floor"],
        "speedup": medians["plain"] / medians["ours"],
        "first_step_seconds": medians["first_step"],
        "peak_gib": medians["peak_bytes"] / 2**30,
        **{f"{name}_seconds": medians[name] for name in ("ours", "floor", "plain")},
        # The peak is known, and all arithmetic is counted, only on a GPU.
        **({} if limit is None else {"flop_share": medians["flops"] / medians["ours"] / limit}),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure each method, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.train", description=main.__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods (default: all)")
    parser.add_argument(
        "--families", nargs="+", choices=UNETS, default=["sd15", "sdxl"], help="architectures (default: sd15 sdxl)"
    )
    parser.add_argument("--pairs", type=int, default=5, help="measured steps of each loop (default: 5)")
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in pixels (default: 256)")
    parser.add_argument("--batch", type=int, default=1, help="images per step (default: 1)")
    options = parser.parse_args(arguments)
    setting = TrainSetting(options.pairs, options.resolution, options.batch)
    rows: list[list[object]] = []
    result: dict[str, float] = {}
    for family in options.families:
        for method in options.methods:
            needed = NEEDED_GIB.get((family, method))
            if needed is not None and psutil.virtual_memory().total < needed * 2**30:
                rows.append([family, method, f"does not fit: AdamW in fp32 needs {needed} GiB"])
                continue
            figures = run_case(family, method, setting)
            key = KEYS[method] if family == "sd15" else f"{family}_{KEYS[method]}"
            result |= {f"{key}_{name}": round(value, 3) for name, value in figures.items()}
            rows.append([family, method, *(f"{value:.2f}" for value in figures.values())])
            print(family, method, json.dumps({name: round(value, 3) for name, value in figures.items()}), flush=True)
    header = ["family", "method", "images/s", "ours/floor", "plain/ours", "first step s", "peak GiB"]
    header += ["ours s", "floor s", "plain s", "share of peak"]
    finish(header, [row + [""] * (len(header) - len(row)) for row in rows], result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
