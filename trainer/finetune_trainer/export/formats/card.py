"""Model cards: README.md of a folder in diffusers' layout, with the job's manifest and a grid of pictures.

The hub shows the card; the front matter has the fields that it reads.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Sequence
from pathlib import Path

from finetune_contract.methods import ADAPTER_METHODS, TrainedPart
from finetune_contract.outputs.spec import OutputFormat, OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import Method
from finetune_trainer.delivery.claims import MANIFEST
from finetune_trainer.export.formats import compiled
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.licence import Licence, licence_of
from finetune_trainer.export.formats.openvino import describe, read_comparison
from finetune_trainer.models.family import Family

CARD, GRID = "README.md", "samples.png"
_MAX_SIDE = 512
"""Largest side of one picture of the grid, in pixels."""
_PACKAGES = ("finetune-operator", "diffusers", "torch", "transformers", "peft", "openvino", "optimum-intel")
_TAGS = {
    TrainedPart.BASE: ["text-to-image"],
    TrainedPart.ADAPTER: ["text-to-image", "lora"],
    TrainedPart.TOKENS: ["text-to-image", "textual_inversion"],
    TrainedPart.CONTROLNET: ["text-to-image", "controlnet"],
}
_KINDS = {
    TrainedPart.BASE: "A complete model",
    TrainedPart.ADAPTER: "A LoRA",
    TrainedPart.TOKENS: "An embedding",
    TrainedPart.CONTROLNET: "A ControlNet",
}
_FORMS = {
    OutputFormat.OPENVINO: ", as IR of OpenVINO",
    OutputFormat.COMPILED: ", with a compiled denoiser",
}
_LOADS = {
    TrainedPart.BASE: "pipeline = DiffusionPipeline.from_pretrained(FOLDER)",
    TrainedPart.ADAPTER: 'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights(FOLDER)',
    TrainedPart.TOKENS: 'pipeline = DiffusionPipeline.from_pretrained("{base}")\n'
    "pipeline.load_textual_inversion(FOLDER)",
    TrainedPart.CONTROLNET: "controlnet = ControlNetModel.from_pretrained(FOLDER)\n"
    'pipeline = DiffusionPipeline.from_pretrained("{base}", controlnet=controlnet)',
}


def write_card(family: Family, output: OutputSpec, folder: Path, about: About, trains: TrainedPart) -> list[Path]:
    """Write the card, the manifest and the pictures into the folder of an output; nothing if its job is unknown.

    Returns:
        The files written.
    """
    if about.run is None:
        return []
    written = [folder / CARD, folder / MANIFEST]
    (folder / MANIFEST).write_text(manifest(about.run), encoding="utf-8")
    if about.pictures:
        write_grid(about.pictures, folder / GRID)
        written.append(folder / GRID)
    (folder / CARD).write_text(card(family, output, folder, about, trains), encoding="utf-8")
    return written


def manifest(run: RunSpec) -> str:
    """Return the settings of a run, without its outputs, whose targets can be private."""
    fields = run.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"outputs"})
    return json.dumps(fields, indent=2) + "\n"


def card(family: Family, output: OutputSpec, folder: Path, about: About, trains: TrainedPart) -> str:
    """Return the text of the card of a job's output, whose files are in a folder."""
    run = about.run
    assert run is not None
    is_openvino, is_compiled = (output.format is each for each in (OutputFormat.OPENVINO, OutputFormat.COMPILED))
    base, licence = run.model.base, licence_of(family)
    is_hub_id = not base.startswith(("/", ".")) and "://" not in base
    shown = base if is_hub_id else Path(base).name
    trigger = output.trigger_phrase or about.trigger_phrase
    front = {
        "library_name": "diffusers",
        **({"base_model": base} if is_hub_id else {}),
        **({} if licence is None else licence.front_matter()),
        "tags": [*_TAGS[trains], *(["openvino"] if is_openvino else [])],
        **({"instance_prompt": trigger} if trigger else {}),
    }
    has_merged = run.training.method in ADAPTER_METHODS and trains is TrainedPart.BASE
    kind = "A complete model with a merged LoRA" if has_merged else _KINDS[trains]
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in front.items()),
        "---",
        "",
        f"# {about.name}",
        "",
        f"{kind} for `{shown}`, trained by {_method(run)}{_FORMS.get(output.format, '')}.",
        "",
        *([f"![pictures of the validation prompts]({GRID})", ""] if about.pictures else []),
        *([f"Prompts contain `{trigger}`.", ""] if trigger else []),
        "| | |",
        "|-|-|",
        *(f"| {name} | {value} |" for name, value in rows(about, run, shown, licence)),
        *([f"| comparison with torch | {describe(read_comparison(folder))} |"] if is_openvino else []),
        *([f"| speed | {compiled.describe(compiled.read_facts(folder))} |"] if is_compiled else []),
        "",
        f"All settings are in `{MANIFEST}`.",
        "",
        "```python",
        *_loader(output, trains, shown),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _loader(output: OutputSpec, trains: TrainedPart, base: str) -> list[str]:
    """Return the lines of Python that load the output."""
    if output.format is OutputFormat.OPENVINO:
        names = "from optimum.intel import OVDiffusionPipeline"
        return [names, "", "pipeline = OVDiffusionPipeline.from_pretrained(FOLDER)"]
    if output.format is OutputFormat.COMPILED:
        return [f"from {Path(compiled.LOADER).stem} import load", "", "pipeline = load(FOLDER)"]
    control = "ControlNetModel, " if trains is TrainedPart.CONTROLNET else ""
    return [f"from diffusers import {control}DiffusionPipeline", "", _LOADS[trains].format(base=base)]


def rows(about: About, run: RunSpec, base: str, licence: Licence | None) -> list[tuple[str, str]]:
    """Return the rows of the card's table."""
    training = run.training
    source = run.dataset.source
    values: list[tuple[str, object]] = [
        ("base", base + (f" at {run.model.revision}" if run.model.revision else "")),
        ("licence of the base", "unknown: see the base" if licence is None else licence.name),
        ("data", source if "/" not in source or not source.startswith(("/", ".")) else Path(source).name),
        ("method", _method(run)),
        ("steps", about.step),
        ("global batch", run.global_batch),
        ("learning rate", training.learning_rate),
        ("optimizer", training.optimizer.value),
        ("resolution", training.resolution),
        ("LoRA rank", training.lora.rank if training.lora is not None else None),
        ("moving average", "yes" if training.ema else None),
        ("seed", training.seed),
        ("versions", ", ".join(_versions())),
    ]
    return [(name, str(value)) for name, value in values if value is not None]


def write_grid(pictures: Sequence[Path], path: Path) -> None:
    """Write pictures next to each other, in rows, as one image.

    Args:
        pictures: paths of the pictures.
        path: the image to write.
    """
    from PIL import Image  # noqa: PLC0415  only pictures need it

    found = []
    for each in pictures:
        with Image.open(each) as opened:
            picture = opened.convert("RGB")
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
        found.append(picture)
    columns = math.ceil(math.sqrt(len(found)))
    width, height = max(each.width for each in found), max(each.height for each in found)
    grid = Image.new("RGB", (columns * width, math.ceil(len(found) / columns) * height), "white")
    for number, small in enumerate(found):
        grid.paste(small, (number % columns * width, number // columns * height))
    grid.save(path)


def _method(run: RunSpec) -> str:
    return "a script" if run.training.method is None else Method(run.training.method).value


def _versions() -> list[str]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
