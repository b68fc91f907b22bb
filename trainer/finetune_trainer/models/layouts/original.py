"""Weights by the names of Stable Diffusion's original code, as single files have them. Pure.

SD 1.x, SD 2.x and SDXL differ in their text encoders: CLIP's own names, those of OpenCLIP, or both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch

from finetune_trainer.models.original_names import original_name
from finetune_trainer.weights.lazy import LazyTensor, in_memory, join

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CONTROL = "control_model."
_CLIP = {"sd": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
_OPEN_CLIP = {"sd": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
_NUM_KEPT_LAYERS = 23
"""Layers of SD 2.x's text encoder in diffusers' layout. The original code loads one more, and ignores its output."""
_LOGIT_SCALE = math.log(100)
"""Largest value that CLIP allows in its training; generation does not read it."""
_OPEN_CLIP_NAMES = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_INNER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_VAE_INNER = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_shortcut": "nin_shortcut",
}

Tensors = Mapping[str, LazyTensor]


def to_original(
    unet: Tensors, vae: Tensors, encoders: Mapping[str, Tensors], *, is_second: bool
) -> dict[str, LazyTensor]:
    """Return the tensors of a complete model by their original names.

    Args:
        unet: tensors of the UNet by diffusers' names, and so on.
        vae: those of the VAE.
        encoders: those of the text encoders, by the names of their folders.
        is_second: whether it is SD 2.x, whose only text encoder is one of OpenCLIP.
    """
    family = "sdxl" if "text_encoder_2" in encoders else "sd"
    result = {UNET + name: value for name, value in unet_to_original(unet).items()}
    result |= {VAE + name: value for name, value in vae_to_original(vae).items()}
    for part, tensors in encoders.items():
        if part == "text_encoder_2" or is_second:
            converted, prefix = open_clip_to_original(tensors, with_last_layer=is_second), _OPEN_CLIP[family]
        else:
            converted, prefix = clip_to_original(tensors), _CLIP[family]
        result |= {prefix + name: value for name, value in converted.items()}
    return result


def unet_to_original(tensors: Tensors) -> dict[str, LazyTensor]:
    """Return the tensors of a UNet, or of the blocks of a ControlNet, by their original names."""
    layers_per_block = _count(tensors, r"down_blocks\.0\.resnets\.(\d+)\.")
    with_attention = {match[1] for name in tensors if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    renamed = {}
    for name, value in tensors.items():
        module, _, last = name.rpartition(".")
        block = re.match(r"up_blocks\.(\d+)\.upsamplers\.", name)
        has_attention = block is None or block[1] in with_attention
        renamed[f"{original_name(module, layers_per_block, has_attention)}.{last}"] = value
    return renamed


def controlnet_to_original(tensors: Tensors) -> dict[str, LazyTensor]:
    """Return the tensors of a ControlNet by their original names."""
    last = 2 * (_count(tensors, r"controlnet_cond_embedding\.blocks\.(\d+)\.") + 1)
    own: dict[str, LazyTensor] = {}
    blocks: dict[str, LazyTensor] = {}
    for name, value in tensors.items():
        new = re.sub(r"^controlnet_down_blocks\.(\d+)\.", r"zero_convs.\1.0.", name)
        new = re.sub(r"^controlnet_mid_block\.", "middle_block_out.0.", new)
        new = re.sub(
            r"^controlnet_cond_embedding\.blocks\.(\d+)\.",
            lambda match: f"input_hint_block.{2 * (int(match[1]) + 1)}.",
            new,
        )
        new = new.replace("controlnet_cond_embedding.conv_in.", "input_hint_block.0.")
        new = new.replace("controlnet_cond_embedding.conv_out.", f"input_hint_block.{last}.")
        (blocks if new == name else own)[new] = value
    return unet_to_original(blocks) | own


def vae_to_original(tensors: Tensors) -> dict[str, LazyTensor]:
    """Return the tensors of a VAE by their original names."""
    levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("conv_norm_out", "norm_out")
        new = re.sub(r"mid_block\.(\w+\.\d+)\.", lambda match: f"mid.{_VAE_MIDDLE[match[1]]}.", new)
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(
            r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}.block.{match[2]}", new
        )
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", new)
        inner = re.fullmatch(r"(.*(?:attn_1|block\.\d+|block_\d))\.(.+)\.(weight|bias)", new)
        if inner is not None:
            new = f"{inner[1]}.{_VAE_INNER.get(inner[2], inner[2])}.{inner[3]}"
            if ".attn_1." in new and len(value.shape) == 2:
                # The original attention has convolutions.
                value = value.reshape(*value.shape, 1, 1)  # noqa: PLW2901
        renamed[new] = value
    return renamed


def clip_to_original(tensors: Tensors) -> dict[str, LazyTensor]:
    """Return the tensors of a CLIP text encoder by their original names, with the positions that these files have."""
    length = tensors["text_model.embeddings.position_embedding.weight"].num_rows
    positions = in_memory(torch.arange(length).unsqueeze(0))
    kept = {name: value for name, value in tensors.items() if name.startswith("text_model.")}
    return {**kept, "text_model.embeddings.position_ids": positions}


def open_clip_to_original(tensors: Tensors, *, with_last_layer: bool) -> dict[str, LazyTensor]:
    """Return the tensors of a text encoder by OpenCLIP's names: query, key and value are one tensor.

    Args:
        tensors: the tensors by transformers' names.
        with_last_layer: whether the original has one layer more than diffusers' layout, and a projection. Both get
            values that programs load and do not use: those of the layer before, and the identity.
    """
    renamed: dict[str, LazyTensor] = {}
    attention: dict[str, dict[str, LazyTensor]] = {}
    for name, value in tensors.items():
        match = _LAYER.fullmatch(name)
        if name == "text_projection.weight":
            renamed["text_projection"] = value.transpose()
        elif match is None:
            renamed[_OPEN_CLIP_NAMES[name]] = value
        elif projection := re.fullmatch(r"self_attn\.([qkv])_proj", match[2]):
            key = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            attention.setdefault(key, {})[projection[1]] = value
        else:
            renamed[f"transformer.resblocks.{match[1]}.{_OPEN_CLIP_INNER[match[2]]}.{match[3]}"] = value
    renamed |= {key: join([parts[each] for each in "qkv"]) for key, parts in attention.items()}
    some = next(iter(tensors.values()))
    renamed["logit_scale"] = in_memory(torch.tensor(_LOGIT_SCALE, dtype=some.dtype))
    if with_last_layer:
        last = _count(renamed, r"transformer\.resblocks\.(\d+)\.") - 1
        if last + 1 == _NUM_KEPT_LAYERS:
            before, after = f"transformer.resblocks.{last}.", f"transformer.resblocks.{last + 1}."
            renamed |= {
                name.replace(before, after): value for name, value in renamed.items() if name.startswith(before)
            }
        width = renamed["token_embedding.weight"].shape[1]
        renamed["text_projection"] = in_memory(torch.eye(width, dtype=some.dtype))
    return renamed


def markers(*, zero_snr: bool) -> dict[str, LazyTensor]:
    """Return empty tensors by which programs recognize a base that predicts v, and one whose end has no signal."""
    names = ["v_pred", "ztsnr"] if zero_snr else ["v_pred"]
    return {name: in_memory(torch.empty(0)) for name in names}


def _count(names: Iterable[str], pattern: str) -> int:
    """Return one more than the largest number that a pattern finds; 0 if it finds none."""
    return max((int(match[1]) + 1 for name in names if (match := re.match(pattern, name))), default=0)
