"""What each method learns on the circles set: numbers before and after, and the pictures that they are of.

`make bench-learning`. Each case trains through the product's own rank, and looks at the pictures that its validation
draws. Options::

    python -m bench.learning --cases token condition --steps 300 --out FOLDER
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bench.learning_cases import CASES, SCENES, Case
from bench.report import finish
from finetune_contract.exit_codes import ExitCode
from finetune_contract.run_spec import RunSpec
from finetune_trainer.demo.circles import paint_edges
from finetune_trainer.demo.looks import picture_grid
from finetune_trainer.train.notice import Notice
from finetune_trainer.train.report import Reporter
from finetune_trainer.train.run import RankContext, run_rank

BASE = Path(__file__).parent.parent / "examples" / "base-circles"
_EVERY = 50
_COLOURS = 96
"""Of the pictures that are written: flat ones need no more, and a third of the bytes."""


class Progress(Reporter):
    """Prints a line now and then."""

    def __init__(self, name: str) -> None:
        super().__init__(0, None)
        self._name = name

    def progress(self, step: int, loss: float, images_per_second: float | None) -> None:
        """A line every so many steps."""
        super().progress(step, loss, images_per_second)
        if step % _EVERY == 0:
            print(f"{self._name}: step {step}, loss {loss:.4f}, {images_per_second or 0:.1f} images/s", flush=True)


def make_spec(case: Case, steps: int, data: Path) -> RunSpec:
    """The run of a case."""
    validation = {"prompts": list(case.prompts), "numInferenceSteps": 20, "guidanceScale": 3}
    if case.conditioning is not None:
        # The pictures take their conditions from it.
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
            "model": {"base": str(BASE)},
            "dataset": {"source": str(data), "columns": {"conditioning": case.conditioning}},
            "training": {**common, **case.training, "validation": validation},
            "globalBatch": 8,
            "checkpointInterval": {"steps": steps},
        }
    )


def learn(name: str, steps: int, folder: Path) -> dict[str, list[Image.Image]]:
    """Train a case; the pictures before and after."""
    case = CASES[name]
    spec = make_spec(case, steps, case.data(folder / "data"))
    context = RankContext(spec, 1, folder / "job", folder / "cache", Notice(), Progress(name))
    code = run_rank(context, os.environ)
    if code is not ExitCode.DONE:
        raise RuntimeError(f"{name} has ended with {code.name}")
    drawn = folder / "job" / "validation" / "pictures"
    return {
        when: [
            Image.open(drawn / f"step-{step:08d}-{number:02d}.png").convert("RGB")
            for number in range(len(case.prompts))
        ]
        for when, step in (("before", 0), ("after", steps))
    }


def write_grid(case: Case, pictures: dict[str, list[Image.Image]], path: Path) -> None:
    """Before above after, and above both the edges where they are the condition."""
    rows = [pictures["before"], pictures["after"]]
    if case.conditioning is not None:
        rows.insert(0, [paint_edges(scene) for scene in SCENES])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture_grid(rows).quantize(_COLOURS).save(path, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    """Train each case; print a table and one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=main.__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="which (default: all)")
    parser.add_argument("--steps", type=int, help="steps of each (default: as many as each needs)")
    parser.add_argument("--out", type=Path, help="folder for a picture of each case, before above after")
    options = parser.parse_args(arguments)
    rows: list[list[object]] = []
    result: dict[str, float] = {}
    for name in options.cases:
        case = CASES[name]
        steps = options.steps or case.steps
        with tempfile.TemporaryDirectory() as folder:
            pictures = learn(name, steps, Path(folder))
        if options.out is not None:
            write_grid(case, pictures, options.out / f"{name}.png")
        for measure in case.measures:
            numbers = {
                when: float(np.mean([measure.number(drawn[index], index) for index in measure.pictures]))
                for when, drawn in pictures.items()
            }
            key = f"{name}_{measure.key}"
            result |= {f"{key}_{when}": round(number, 3) for when, number in numbers.items()}
            shown = [f"{number:.2f}" for number in numbers.values()]
            rows.append([name, case.training["method"], steps, measure.what, *shown])
            print(*rows[-1], flush=True)
    finish(["case", "method", "steps", "number", "before", "after"], rows, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
