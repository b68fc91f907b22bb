"""Writes a pipeline's weights by the names of Stable Diffusion's original code, as single-file bases have them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.models.original_names import original_name

_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers.": "transformer.resblocks.",
    ".layer_norm1": ".ln_1",
    ".layer_norm2": ".ln_2",
    ".mlp.fc1": ".mlp.c_fc",
    ".mlp.fc2": ".mlp.c_proj",
    ".self_attn.": ".attn.",
}
"""Names in the original code of SDXL's second text encoder."""
_VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def to_original(pipeline: Any) -> dict[str, Tensor]:
    """Return the weights by the names of Stable Diffusion's original code."""
    state: dict[str, Tensor] = {}
    for name, value in pipeline.unet.state_dict().items():
        module, _, last = name.rpartition(".")
        module = original_name(module, pipeline.unet.config.layers_per_block)
        state[f"model.diffusion_model.{module}.{last}"] = value
    for name, value in pipeline.vae.state_dict().items():
        renamed = _vae_name(name, len(pipeline.vae.config.block_out_channels))
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", renamed)
        state[f"first_stage_model.{renamed}"] = value[..., None, None] if is_projection else value
    is_xl = hasattr(pipeline, "text_encoder_2")
    clip = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    for name, value in pipeline.text_encoder.state_dict().items():
        state[f"{clip}.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    if is_xl:
        open_clip = to_open_clip(pipeline.text_encoder_2.state_dict())
        state |= {f"conditioner.embedders.1.model.{name}": value for name, value in open_clip.items()}
    return {name: value.clone().contiguous() for name, value in state.items()}


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights by open_clip's names: query, key and value in one tensor, the projection transposed."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name
        for ours, original in _OPEN_CLIP.items():
            new = new.replace(ours, original)
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif match := re.fullmatch(r"(.*\.attn)\.q_proj\.(weight|bias)", new):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            renamed[f"{match[1]}.in_proj_{match[2]}"] = torch.cat(parts)
        elif "k_proj" not in new and "v_proj" not in new:
            renamed[new] = value
    return renamed


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    middle = re.sub(r"mid_block\.(\w+\.\d+)\.", lambda match: f"mid.{_VAE_MIDDLE[match[1]]}.", name)
    for ours, original in _VAE_ATTENTION.items():
        middle = middle.replace(f"attn_1.{ours}.", f"attn_1.{original}.")
    down = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", middle)
    down = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", down)
    up = re.sub(
        r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}.block.{match[2]}", down
    )
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{levels - 1 - int(match[1])}.upsample", up)
