"""What an output says about its base: the manifest next to it, its model card, or the metadata of its file."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finetune_contract.input_spec import ModelSpec
from finetune_contract.run_spec import RunSpec
from finetune_trainer.delivery.claims import MANIFEST
from finetune_trainer.export.formats.card import CARD
from finetune_trainer.export.formats.metadata import base_of_description
from finetune_trainer.weights.lazy import read_header

_KOHYA_BASE, _CLIP_SKIP = "ss_sd_model_name", "ss_clip_skip"
_SPEC = "modelspec."
_BASE_MODEL = re.compile(r'^base_model:\s*["\']?([^"\'\n#]+)', re.MULTILINE)


@dataclass(frozen=True)
class Origin:
    """What is known about the training of an output.

    Attributes:
        base: the base; None if unknown.
        resolution: size of the training images in pixels; None if unknown.
        clip_skip: layers of the text encoders that the training skipped.
        trigger_phrase: words that prompts need; None if unknown.
    """

    base: ModelSpec | None = None
    resolution: int | None = None
    clip_skip: int = 0
    trigger_phrase: str | None = None


def read_origin(path: Path) -> Origin:
    """Return what an output says about itself.

    Args:
        path: a file, or a folder.
    """
    folders = [path] if path.is_dir() else [path.parent]
    if path.name == "controlnet":
        # Next to its base, the manifest is that of the pipeline.
        folders.append(path.parent)
    of_file = _of_metadata(_metadata(path)) if path.is_file() else Origin()
    for folder in folders:
        if (found := _of_manifest(folder / MANIFEST)) is not None:
            return found
        card = folder / CARD
        if of_file.base is None and card.is_file() and (named := _BASE_MODEL.search(card.read_text(errors="replace"))):
            return dataclasses.replace(of_file, base=ModelSpec(base=named[1].strip()))
    return of_file


def _of_manifest(path: Path) -> Origin | None:
    """Return what the manifest of a job says; None if there is none, or one of a newer release."""
    try:
        run = RunSpec.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    training = run.training
    trigger = None
    if training.dreambooth is not None:
        trigger = training.dreambooth.instance_prompt
    elif training.textual_inversion is not None:
        trigger = training.textual_inversion.placeholder_token
    return Origin(run.model, training.resolution, training.clip_skip, trigger)


def _metadata(path: Path) -> Mapping[str, str]:
    if path.suffix != ".safetensors":
        return {}
    try:
        return read_header(path)[1]
    except (OSError, ValueError):
        return {}


def _of_metadata(metadata: Mapping[str, str]) -> Origin:
    base = metadata.get(_KOHYA_BASE) or base_of_description(metadata.get(f"{_SPEC}description", ""))
    sizes = metadata.get(f"{_SPEC}resolution", "").split("x")
    skipped = metadata.get(_CLIP_SKIP, "")
    return Origin(
        None if not base else ModelSpec(base=base),
        int(sizes[0]) if sizes[0].isdecimal() else None,
        int(skipped) if skipped.isdecimal() else 0,
        metadata.get(f"{_SPEC}trigger_phrase"),
    )
