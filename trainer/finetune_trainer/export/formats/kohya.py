"""LoRA files with the names of kohya's scripts, which the web UIs and ComfyUI read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.export.formats.about import About
from finetune_trainer.export.formats.files import convert, write_model_file
from finetune_trainer.export.formats.metadata import kohya_keys, model_spec
from finetune_trainer.methods.kohya import DORA_SCALE
from finetune_trainer.models.layouts.trained import LowRank, TrainedAdapter
from finetune_trainer.weights.files import VALUES_HASH
from finetune_trainer.weights.lazy import LazyTensor, in_memory


def write_kohya(trained: TrainedAdapter, output: OutputSpec, folder: Path, about: About) -> list[Path]:
    """Write a LoRA file with its metadata."""
    family = trained.family
    named = to_kohya(trained.layers, family.kohya_name)
    tensors = convert(named, output)
    metadata = kohya_keys(family, trained.layers, about)
    # As in kohya's scripts, whose LoRA of SDXL has the names of the original code, and others those of diffusers.
    is_original = family.kohya_base_version.startswith("sdxl")
    metadata |= model_spec(family, output, about, kind="lora", is_original=is_original)
    metadata["modelspec.hash_sha256"] = VALUES_HASH
    return [write_model_file(folder, about.name, tensors, output, metadata)]


def to_kohya(layers: Mapping[str, LowRank], name_of: Callable[[str, str], str]) -> dict[str, LazyTensor]:
    """Return adapters under kohya's names, with the alpha of each.

    Args:
        layers: layers by diffusers' names, prefixed by the denoiser's or a text encoder's name.
        name_of: returns kohya's name of a module from the part's name and the module's name; see `Family.kohya_name`.
    """
    named: dict[str, LazyTensor] = {}
    for name, layer in layers.items():
        part, _, module = name.partition(".")
        key = name_of(part, module)
        named[f"{key}.lora_down.weight"] = layer.down
        named[f"{key}.lora_up.weight"] = layer.up
        named[f"{key}.alpha"] = in_memory(torch.tensor(float(layer.alpha)))
        if layer.magnitude is not None:
            # Readers divide by norms of shape (out, 1) or (out, 1, 1, 1). A shape of (out,) would be broadcast along
            # the wrong axis.
            named[key + DORA_SCALE] = in_memory(layer.magnitude.reshape(-1, *[1] * (len(layer.up.shape) - 1)))
    return named
