"""Bases of the real sizes of SD 1.x, SD 2.x and SDXL on the meta device: names and shapes without values."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune_trainer.models.text_names import portable_text_name
from finetune_trainer.weights.lazy import LazyTensor

_BLOCKS = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_BLOCKS, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        **_BLOCKS,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def make_parts(family: str) -> dict[str, Any]:
    """Return the modules of a base by the names of their folders."""
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**UNETS[family]),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**(_CLIP_H if family == "sd2" else _CLIP_L))),
        }
        if family == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G, projection_dim=1280))
    return parts


def make_controlnet(family: str) -> Any:
    """Return a ControlNet for a base."""
    with torch.device("meta"):
        return ControlNetModel.from_unet(UNet2DConditionModel(**UNETS[family]), load_weights_from_unet=False)


def lazy(module: Any, *, is_text: bool = False) -> dict[str, LazyTensor]:
    """Return the tensors of a module on the meta device by portable names; their values cannot be read."""
    return {
        (portable_text_name(name) if is_text else name): LazyTensor(value.dtype, tuple(value.shape), _no_values)
        for name, value in module.state_dict().items()
    }


def _no_values(start: int, stop: int) -> Tensor:
    raise AssertionError(f"rows {start} to {stop} of a tensor without values were read")
