"""LoRA files as kohya's scripts name them, which the web UIs and ComfyUI read. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SUFFIXES = {
    ".lora_A.weight": ".lora_down.weight",
    ".lora_B.weight": ".lora_up.weight",
    ".lora_magnitude_vector": ".dora_scale",
    ".lora_magnitude_vector.weight": ".dora_scale",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def to_kohya(state: Mapping[str, Tensor], alpha: float, unet_config: Any) -> dict[str, Tensor]:
    """Rename adapters, and write each one's alpha beside it.

    Args:
        state: tensors by diffusers' names, `unet.` or a text encoder's name before them.
        alpha: LoRA's alpha.
        unet_config: the UNet's configuration; SDXL's blocks are named as in its original code.
    """
    is_xl = unet_config.addition_embed_type == "text_time"
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        suffix = next(suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if name.endswith(suffix))
        part, _, module = name.removesuffix(suffix).partition(".")
        if part == "unet" and is_xl:
            module = original_name(module, int(unet_config.layers_per_block))
        key = f"{_prefix(part, is_xl)}_{module.replace('.', '_')}"
        renamed[key + _SUFFIXES[suffix]] = value
        renamed[f"{key}.alpha"] = torch.tensor(float(alpha))
    return renamed


def original_name(module: str, layers_per_block: int) -> str:
    """The name, in SDXL's original code, of a module of diffusers' UNet."""
    stage = layers_per_block + 1
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)", module)
    if match is None:
        middle = re.match(r"mid_block\.(\w+\.\d+)\.?(.*)", module)
        if middle is None:
            return module
        return _join(f"middle_block.{_MIDDLE[middle[1]]}", _inner(middle[1], middle[2]))
    way, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{stage * (block + 1)}.0.op"
    if kind == "upsamplers":
        # Behind the attention where the stage has one; SDXL's first two have.
        return f"output_blocks.{stage * block + layers_per_block}.2.conv"
    side, first = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
    place = f"{side}.{first + stage * block + number}.{0 if kind == 'resnets' else 1}"
    return _join(place, _inner(kind, rest))


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind.startswith("resnets") else rest


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _prefix(part: str, is_xl: bool) -> str:
    if part == "unet":
        return "lora_unet"
    if not is_xl:
        return "lora_te"
    return "lora_te2" if part.endswith("_2") else "lora_te1"
