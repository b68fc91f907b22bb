"""Names of a UNet's modules in the original code of Stable Diffusion and SDXL. Pure."""

from __future__ import annotations

import re

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
"""Names of the modules outside the blocks."""
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def original_name(module: str, layers_per_block: int, has_attention: bool = True) -> str:
    """Return the name in the original code of a module of diffusers' UNet.

    Args:
        module: dotted name in diffusers.
        layers_per_block: number of ResNet layers in each down block.
        has_attention: whether the block of an upsampler has attention, which counts in its name.
    """
    stage = layers_per_block + 1
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.?(.*)", module)
    if match is None:
        middle = re.match(r"mid_block\.(\w+\.\d+)\.?(.*)", module)
        if middle is None:
            return _OUTSIDE.get(module, module)
        return _join(f"middle_block.{_MIDDLE[middle[1]]}", _inner(middle[1], middle[2]))
    direction, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{stage * (block + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{stage * block + layers_per_block}.{2 if has_attention else 1}.conv"
    side, first = ("input_blocks", 1) if direction == "down" else ("output_blocks", 0)
    position = f"{side}.{first + stage * block + number}.{0 if kind == 'resnets' else 1}"
    return _join(position, _inner(kind, rest))


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind.startswith("resnets") else rest


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
