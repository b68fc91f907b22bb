"""Adds LoRAs to the weights of their base. The weights are read, changed and written in blocks of rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.adapter_file import layer_names, read_adapters
from finetune_trainer.models.family import Family
from finetune_trainer.models.layouts.trained import LowRank, ModelPart, TrainedAdapter, TrainedPipeline
from finetune_trainer.models.parts import remove_source_path
from finetune_trainer.weights.lazy import LazyTensor

_WEIGHT = ".weight"
_TILE_BYTES = 1 << 19
"""Of the fp32 sums that are computed at a time: they stay in the cache of a processor."""


@dataclass(frozen=True)
class Weighted:
    """A LoRA with the factor of what it adds to the base."""

    adapter: TrainedAdapter
    factor: float


def merge(loras: Sequence[Weighted]) -> TrainedPipeline:
    """Return the base of LoRAs with all of them added to its weights. Values are computed when they are written.

    Raises:
        ConfigError: a LoRA has layers that the base lacks, or of another shape.
    """
    family = loras[0].adapter.family
    by_part: dict[str, dict[str, list[tuple[LowRank, float]]]] = {}
    for lora in loras:
        for name, layer in lora.adapter.layers.items():
            part, _, module = name.partition(".")
            by_part.setdefault(part, {}).setdefault(module + _WEIGHT, []).append((layer, lora.factor))
    return TrainedPipeline(family, {part: _merged_part(family, part, changes) for part, changes in by_part.items()})


def _merged_part(family: Family, part: str, changes: Mapping[str, list[tuple[LowRank, float]]]) -> ModelPart:
    tensors = family.pipeline.tensors(part)
    for name, layers in changes.items():
        for layer, factor in layers:
            if name not in tensors:
                raise ConfigError(
                    f"outputs: the LoRA adapts {part}.{name}, which the base lacks; use a LoRA for this base"
                )
            tensors[name] = merged_weight(tensors[name], layer, factor, f"{part}.{name}")
    return ModelPart(tensors, lambda folder: _copy_config(family, part, folder))


def _copy_config(family: Family, part: str, folder: Path) -> None:
    target = folder / "config.json"
    target.write_bytes((family.pipeline.source(part) / "config.json").read_bytes())
    remove_source_path(target)


def merged_weight(weight: LazyTensor, layer: LowRank, factor: float, name: str = "the layer") -> LazyTensor:
    """Return a weight with an adapter: W + factor * alpha / rank * B A, computed in fp32.

    DoRA replaces the norm of each output channel (https://arxiv.org/abs/2402.09353, eq. 5); a factor other than 1
    interpolates between the weight and the result.

    Raises:
        ConfigError: the adapter has another shape.
    """
    inner = math.prod(weight.shape[1:])
    height, width = layer.up.num_rows, math.prod(layer.down.shape[1:])
    if height != weight.num_rows or width != inner:
        raise ConfigError(
            f"outputs: the LoRA changes {name} by a matrix of {height} x {width}, and the base needs "
            f"{weight.num_rows} x {inner}; use a LoRA for this kind of base"
        )
    magnitude = None if layer.magnitude is None else layer.magnitude.detach().cpu().float().flatten()
    scale = layer.scale if magnitude is not None else layer.scale * factor

    def rows(start: int, stop: int) -> Tensor:
        up, down = layer.up.rows(start, stop).float().flatten(1), layer.down.read().float().flatten(1)
        original = weight.rows(start, stop).reshape(stop - start, inner)
        merged = torch.empty(stop - start, inner, dtype=weight.dtype)
        step = max(1, _TILE_BYTES // (inner * torch.float32.itemsize))
        tile = torch.empty(min(step, stop - start), inner)
        for first in range(0, stop - start, step):
            some = slice(first, first + step)
            sums = tile[: len(up[some])].copy_(original[some]).addmm_(up[some], down, alpha=scale)
            if magnitude is not None:
                sums *= (magnitude[start:stop][some] / sums.norm(dim=1))[:, None]
                sums = original[some] + factor * (sums - original[some])
            merged[some] = sums
        return merged.reshape(stop - start, *weight.shape[1:])

    return dataclasses.replace(weight, rows=rows, region=None)


def read_adapter(path: Path, family: Family, field: str) -> TrainedAdapter:
    """Return a LoRA file for a base.

    Args:
        path: the file, with the names of diffusers, peft or kohya's scripts.
        family: the base.
        field: the field of the manifest that names it, for messages.

    Raises:
        ConfigError: it is not a LoRA, or not one for this base.
    """
    found = read_adapters(path, field)
    known: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for part in (family.denoiser_name, *_text_parts(family)):
        for name, tensor in family.pipeline.tensors(part).items():
            if name.endswith(_WEIGHT) and len(tensor.shape) > 1:
                module = name.removesuffix(_WEIGHT)
                known |= dict.fromkeys(layer_names(part, module, family), f"{part}.{module}")
                shapes[f"{part}.{module}"] = tensor.shape
    if unknown := [name for name in found if name not in known]:
        raise ConfigError(
            f"{field}: {path} has adapters for layers that the base lacks ({', '.join(unknown[:3])}); write a LoRA of "
            "the same kind of base"
        )
    layers = {known[name]: adapter.low_rank() for name, adapter in found.items()}
    for name, layer in layers.items():
        shape, given = shapes[name], (layer.up.num_rows, math.prod(layer.down.shape[1:]))
        if given != (shape[0], math.prod(shape[1:])):
            raise ConfigError(
                f"{field}: {path} changes {name} by a matrix of {given[0]} x {given[1]}, and the base has "
                f"{shape[0]} x {math.prod(shape[1:])}; write a LoRA of the same kind of base"
            )
    return TrainedAdapter(family, layers)


def _text_parts(family: Family) -> list[str]:
    return [part for part, _ in family.pipeline.part_folders() if family.pipeline.is_text(part)]
