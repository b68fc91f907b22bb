"""Writes what a method trained in diffusers' layout: a pipeline, a LoRA, a ControlNet or an embedding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune_contract.outputs.spec import OutputSpec
from finetune_trainer.export.formats.files import convert
from finetune_trainer.models.layouts.trained import (
    ModelPart,
    TrainedAdapter,
    TrainedControlNet,
    TrainedEmbedding,
    TrainedPipeline,
)
from finetune_trainer.models.parts import copy_part, is_copied, remove_source_path
from finetune_trainer.weights.files import write_safetensors
from finetune_trainer.weights.lazy import LazyTensor, in_memory

LORA_NAME = "pytorch_lora_weights.safetensors"
EMBEDDING_NAME = "learned_embeds{}.safetensors"
"""diffusers' name of an embedding file; the number of the text encoder follows from the second one on."""
INDEX = "model_index.json"
_METADATA = {"format": "pt"}


def write_pipeline(trained: TrainedPipeline, output: OutputSpec, folder: Path) -> list[Path]:
    """Write a pipeline: the trained parts, and copies of the base's other parts."""
    base = trained.family.pipeline
    for part, weights in trained.parts.items():
        _write_part(weights, output, folder / part, is_text=base.is_text(part))
    for part, source in base.part_folders():
        if part in trained.parts:
            continue
        is_text = base.is_text(part)
        variant = base.variant_of(part, source)
        if output.precision is None or not any(source.glob("*.safetensors")):
            copy_part(source, folder / part, variant, is_text)
        else:
            (folder / part).mkdir(parents=True)
            for path in sorted(source.iterdir()):
                if is_copied(path) and ".safetensors" not in path.name:
                    shutil.copyfile(path, folder / part / path.name)
            _write_weights(base.tensors(part), output, folder / part, is_text=is_text)
    if base.index:
        shutil.copyfile(base.folder / INDEX, folder / INDEX)
    for path in [*folder.glob(INDEX), *folder.glob("*/config.json")]:
        remove_source_path(path)
    return _files(folder)


def write_controlnet(trained: TrainedControlNet, output: OutputSpec, folder: Path) -> list[Path]:
    """Write a ControlNet as from_pretrained reads it; with the base, a pipeline that contains it."""
    if not output.full:
        _write_part(trained.part, output, folder, is_text=False)
        return _files(folder)
    write_pipeline(TrainedPipeline(trained.family, {}), output, folder)
    _write_part(trained.part, output, folder / "controlnet", is_text=False)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    index["_class_name"] = index["_class_name"].replace("Pipeline", "ControlNetPipeline")
    index["controlnet"] = ["diffusers", "ControlNetModel"]
    _write_json(folder / INDEX, index)
    return _files(folder)


def write_adapter(trained: TrainedAdapter, output: OutputSpec, folder: Path) -> list[Path]:
    """Write a LoRA for load_lora_weights; with the base, next to a copy of it."""
    if output.full:
        write_pipeline(TrainedPipeline(trained.family, {}), output, folder)
    write_safetensors(folder / LORA_NAME, convert(adapter_tensors(trained), output), _METADATA)
    return _files(folder)


def adapter_tensors(trained: TrainedAdapter) -> dict[str, LazyTensor]:
    """Return the tensors of a LoRA by diffusers' names, with an alpha equal to the rank.

    Files with diffusers' names have no place for alpha that every release reads: those without metadata take the rank.
    Metadata would also store peft's complete configuration, which older releases of peft refuse.
    """
    tensors: dict[str, LazyTensor] = {}
    for name, layer in trained.layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.down
        tensors[f"{name}.lora_B.weight"] = layer.up.times(layer.scale)
        if layer.magnitude is not None:
            # diffusers' loader of text encoders expects the suffix that peft omits.
            suffix = "" if name.startswith(f"{trained.family.denoiser_name}.") else ".weight"
            tensors[f"{name}.lora_magnitude_vector{suffix}"] = in_memory(layer.magnitude)
    return tensors


def write_embedding(trained: TrainedEmbedding, output: OutputSpec, folder: Path) -> list[Path]:
    """Write one file per text encoder for load_textual_inversion; with the base, next to a copy of it."""
    if output.full:
        write_pipeline(TrainedPipeline(trained.family, {}), output, folder)
    for name, value in trained.vectors.items():
        path = folder / EMBEDDING_NAME.format(name.removeprefix("text_encoder"))
        write_safetensors(path, convert({trained.token: in_memory(value)}, output), _METADATA)
    return _files(folder)


def _write_part(part: ModelPart, output: OutputSpec, folder: Path, *, is_text: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    part.write_config(folder)
    _write_weights(part.tensors, output, folder, is_text=is_text)


def _write_weights(tensors: Mapping[str, LazyTensor], output: OutputSpec, folder: Path, *, is_text: bool) -> None:
    stem = "model" if is_text else "diffusion_pytorch_model"
    write_safetensors(folder / f"{stem}.safetensors", convert(tensors, output), _METADATA)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
