"""Metadata in the headers of weight files: ModelSpec 1.0.1, and the keys of kohya's scripts. Programs list files by it.

Nothing here depends on the clock: equal weights give equal bytes.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping

from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.licence import licence_of
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.trained import LowRank

SPEC_VERSION = "1.0.1"
ORIGINAL, DIFFUSERS = "https://github.com/Stability-AI/generative-models", "diffusers"
"""Names of the code whose names the tensors have."""
_THUMBNAIL_SIZE, _THUMBNAIL_QUALITY = 256, 85
_ARCHITECTURES = {"sd_v1": "stable-diffusion-v1", "sdxl_base_v1-0": "stable-diffusion-xl-v1-base"}
_NATIVE = {"sd_v1": 512, "stable-diffusion-v2-512": 512, "stable-diffusion-v2-768-v": 768, "sdxl_base_v1-0": 1024}
"""Sizes of the images that the bases were trained on, in pixels."""


def model_spec(
    family: Family, output: OutputSpec, about: About, *, kind: str = "", is_original: bool
) -> dict[str, str]:
    """Return the ModelSpec of a file.

    Args:
        family: the base.
        output: the output.
        about: the origin of the weights.
        kind: what a file contains that is not a complete model: lora, textual-inversion, controlnet.
        is_original: whether the tensors have the names of the original code.
    """
    architecture, licence = architecture_of(family), licence_of(family)
    fields: dict[str, str | None] = {
        "sai_model_spec": SPEC_VERSION,
        "architecture": f"{architecture}/{kind}" if kind else architecture,
        "implementation": ORIGINAL if is_original else DIFFUSERS,
        "title": about.name,
        "resolution": "x".join([str(resolution_of(family, about))] * 2),
        "prediction_type": "v" if family.pipeline.predicts_v else "epsilon",
        "description": _description(about),
        "license": None if licence is None else licence.name,
        "trigger_phrase": output.trigger_phrase or about.trigger_phrase,
        "thumbnail": _thumbnail(about),
    }
    return {f"modelspec.{name}": value for name, value in fields.items() if value is not None}


def architecture_of(family: Family) -> str:
    """Return ModelSpec's name of the architecture of a base."""
    if family.kohya_base_version == "sd_v2":
        return f"stable-diffusion-v2-{'768-v' if family.pipeline.predicts_v else '512'}"
    return _ARCHITECTURES[family.kohya_base_version]


def kohya_keys(family: Family, layers: Mapping[str, LowRank], about: About) -> dict[str, str]:
    """Return the keys of kohya's scripts by which programs find the base of a LoRA.

    Without them the web UI takes every file for one of SD 1.x, and does not list it for SDXL.
    """
    version = family.kohya_base_version
    ranks, alphas = {layer.rank for layer in layers.values()}, {layer.alpha for layer in layers.values()}
    keys = {
        "ss_base_model_version": version,
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_module": "networks.lora",
        "ss_output_name": about.name,
        "ss_v2": str(version.startswith("sd_v2")),
    }
    if about.run is not None:
        keys |= _training_keys(about)
    return keys


def _training_keys(about: About) -> dict[str, str]:
    assert about.run is not None
    run, training = about.run, about.run.training
    values = {
        "ss_sd_model_name": run.model.base,
        "ss_steps": about.step,
        "ss_max_train_steps": training.steps,
        "ss_epoch": training.epochs,
        "ss_learning_rate": training.learning_rate,
        "ss_optimizer": training.optimizer.value,
        "ss_seed": training.seed,
        "ss_resolution": f"({training.resolution}, {training.resolution})",
        "ss_clip_skip": training.clip_skip or None,
        "ss_total_batch_size": run.global_batch,
        "ss_min_snr_gamma": training.snr_gamma,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def resolution_of(family: Family, about: About) -> int:
    """Return the size of the training images in pixels, or else that of the base's own training."""
    if about.run is not None:
        return about.run.training.resolution
    return _NATIVE.get(family.kohya_base_version) or _NATIVE[architecture_of(family)]


def _description(about: About) -> str | None:
    if about.run is None or about.run.training.method is None:
        return None
    return f"{about.run.training.method.value} on {about.run.model.base}, {about.step} steps"


def base_of_description(text: str) -> str | None:
    """Return the base in a description that `model_spec` has written; None for any other text."""
    match = re.fullmatch(r"\w+ on (.+), \w+ steps", text)
    return None if match is None else match[1]


def _thumbnail(about: About) -> str | None:
    """Return a small JPEG of the first picture as a data URL; None without pictures."""
    if not about.pictures:
        return None
    from PIL import Image  # noqa: PLC0415  only pictures need it

    encoded = io.BytesIO()
    with Image.open(about.pictures[0]) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_THUMBNAIL_SIZE, _THUMBNAIL_SIZE))
        small.save(encoded, "JPEG", quality=_THUMBNAIL_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"
