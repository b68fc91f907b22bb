"""Results of each method on each family: numbers before and after training, and the pictures behind them.

`make bench-learning`. Each case trains on the circles data set with the product's rank code, and evaluates the pictures
of its validation. The bases of SD 2.x and SDXL are trained once, before the first case. Options::

    python -m bench.learning --families sd1 sdxl --cases token condition --steps 300 --out FOLDER
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_trainer.demo.circles import paint_edges
from finetune_trainer.demo.picture_metrics import picture_grid
from finetune_trainer.report import Reporter
from finetune_trainer.train.context import RankContext
from finetune_trainer.train.preemption_notice import PreemptionNotice
from finetune_trainer.train.run import run_rank
from testing.learning.bases import FAMILIES, ensure_base
from testing.learning.cases import CASES, SCENES, LearningCase, Measure
from testing.measure.process import new_process_pool
from testing.measure.report import finish

_EVERY = 50
_COLOURS = 96
"""Number of colours of the written pictures. It is enough for flat pictures and takes a third of the bytes."""
_NUM_SHOWN = 4
"""Number of pictures of each case in the overview of a family."""


class Progress(Reporter):
    """Prints the progress every `_EVERY` steps."""

    def __init__(self, name: str) -> None:
        super().__init__(0, None)
        self._name = name

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        """Print a line every `_EVERY` steps."""
        super().progress(step, loss, images_per_second)
        if step % _EVERY == 0:
            print(f"{self._name}: step {step}, loss {loss:.4f}, {images_per_second or 0:.1f} images/s", flush=True)


def make_spec(case: LearningCase, steps: int, base: Path, data: Path) -> RunSpec:
    """Return the run specification of a case."""
    validation = {"prompts": list(case.prompts), "numInferenceSteps": 20, "guidanceScale": 3}
    if case.conditioning is not None:
        # The conditioning images of the pictures come from this split.
        validation["split"] = "validation"
    common = {
        "steps": steps,
        "batchSize": 8,
        "resolution": 64,
        "lrScheduler": "constant_with_warmup",
        "lrWarmupSteps": min(10, steps - 1),
    }
    return RunSpec.model_validate(
        {
            "namespace": "bench",
            "job": "learning",
            "uid": "learning",
            "model": {"base": str(base)},
            "dataset": {"source": str(data), "columns": {"conditioning": case.conditioning}},
            "training": {**common, **case.training, "validation": validation},
            "globalBatch": 8,
            "checkpointInterval": {"steps": steps},
        }
    )


def learn(name: str, title: str, steps: int, base: Path, folder: Path) -> dict[str, list[Image.Image]]:
    """Train a case on a base, and return the pictures before and after."""
    case = CASES[name]
    spec = make_spec(case, steps, base, case.data(folder / "data"))
    context = RankContext(spec, 1, folder / "job", folder / "cache", PreemptionNotice(), Progress(title))
    code = run_rank(context, os.environ)
    if code is not ExitCode.DONE:
        raise RuntimeError(f"{title} ended with {code.name}")
    drawn = folder / "job" / "validation" / "pictures"
    return {
        when: [
            Image.open(drawn / f"step-{step:08d}-{number:02d}.png").convert("RGB")
            for number in range(len(case.prompts))
        ]
        for when, step in (("before", 0), ("after", steps))
    }


def write_grid(case: LearningCase, pictures: dict[str, list[Image.Image]], path: Path) -> None:
    """Write the pictures before training above those after it, with the edges on top if they are the condition."""
    rows = [pictures["before"], pictures["after"]]
    if case.conditioning is not None:
        rows.insert(0, [paint_edges(scene) for scene in SCENES])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows).quantize(_COLOURS).save(path, optimize=True)


def write_overview(cases: Mapping[str, dict[str, list[Image.Image]]], path: Path) -> None:
    """Write a row per case of one family: some pictures before training, a gap, the same after; edges above them."""
    rows = []
    for name in [name for name in CASES if name in cases]:
        pictures = cases[name]
        shown = range(0, len(pictures["before"]), len(pictures["before"]) // _NUM_SHOWN)[:_NUM_SHOWN]
        before, after = ([pictures[when][i] for i in shown] for when in ("before", "after"))
        gap = [Image.new("RGB", before[0].size, "grey")]
        if CASES[name].conditioning is not None:
            edges = [paint_edges(SCENES[i]) for i in shown]
            rows.append(edges + gap + edges)
        rows.append(before + gap + after)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows).quantize(_COLOURS).save(path, optimize=True)


def title_of(family: str, name: str) -> str:
    """Return the name of a case on a family, which its figures and its picture file have."""
    return name if family == "sd1" else f"{family}_{name}"


def measure(case: LearningCase, pictures: dict[str, list[Image.Image]]) -> list[tuple[Measure, dict[str, float]]]:
    """Return each number of a case, before and after training."""
    return [
        (
            each,
            {
                when: float(np.mean([each.number(drawn[i], i) for i in each.pictures]))
                for when, drawn in pictures.items()
            },
        )
        for each in case.measures
    ]


def main(arguments: list[str] | None = None) -> int:
    """Train each case on each family; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=main.__doc__)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="families (default: all)")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="cases (default: all)")
    parser.add_argument("--steps", type=int, help="training steps of each case (default: depends on the case)")
    parser.add_argument("--base-steps", type=int, help="training steps of each base (default: depends on the base)")
    parser.add_argument(
        "--out", type=Path, help="output folder for the pictures of each case and the overview of each family"
    )
    options = parser.parse_args(arguments)
    show, families = partial(print, flush=True), options.families
    rows: list[list[object]] = []
    result: dict[str, float] = {}
    drawn: dict[str, dict[str, dict[str, list[Image.Image]]]] = {family: {} for family in families}
    # In a separate process: messages of torch's compiler at its exit must not follow the figures on stdout.
    with new_process_pool() as trainer:
        bases = {family: trainer.submit(ensure_base, family, show, options.base_steps).result() for family in families}
        for family, name in itertools.product(families, options.cases):
            case, title, started = CASES[name], title_of(family, name), time.monotonic()
            steps = options.steps or case.steps_on.get(family, case.steps)
            with tempfile.TemporaryDirectory() as folder:
                pictures = trainer.submit(learn, name, title, steps, bases[family], Path(folder)).result()
            drawn[family][name] = pictures
            if options.out is not None:
                write_grid(case, pictures, options.out / f"{title}.png")
                write_overview(drawn[family], options.out / f"{family}.png")
            for each, numbers in measure(case, pictures):
                result |= {f"{title}_{each.key}_{when}": round(number, 3) for when, number in numbers.items()}
                shown = [f"{number:.2f}" for number in numbers.values()]
                rows.append([family, name, case.training["method"], steps, each.what, *shown])
                show(*rows[-1])
            show(f"{title}: {time.monotonic() - started:.0f} s")
    finish(["family", "case", "method", "steps", "number", "before", "after"], rows, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
