"""The operations of a UNet by its layers: an independent count, by hooks on the modules of a real forward pass."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

SIDE = 8


def full_training_flops(folder: Path, num_tokens: int) -> float:
    """Return the operations of one sample when all weights of a UNet are trained.

    A product of matrices takes two operations per pair of numbers. Backward repeats it twice: for the gradient of the
    input and for that of the weight. The input of the first convolution and the text need no gradient. Attention has
    two products, each with two gradients.
    """
    unet = UNet2DConditionModel.from_pretrained(folder, use_safetensors=True)
    total = 0.0

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal total
        total += _of_layer(module, args, kwargs, output)

    for module in unet.modules():
        module.register_forward_hook(add, with_kwargs=True)
    # Only layers whose input depends on a trained weight compute the gradient of the input.
    text = torch.randn(1, num_tokens, unet.config.cross_attention_dim)
    unet(torch.randn(1, 4, SIDE, SIDE), torch.zeros(1, dtype=torch.int64), text)
    return total


def _of_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> float:
    if isinstance(module, nn.Linear):
        x: Tensor = args[0]
        return float((2 + x.requires_grad) * 2 * x.numel() * module.out_features)
    if isinstance(module, nn.Conv2d):
        weights = math.prod(module.weight.shape[1:])
        return float((2 + args[0].requires_grad) * 2 * output.numel() * weights)
    if isinstance(module, Attention):
        x = args[0]
        text = kwargs.get("encoder_hidden_states")
        keys = x.shape[1] if text is None else text.shape[1]
        return float(3 * 2 * 2 * x.shape[0] * x.shape[1] * keys * module.inner_dim)
    return 0.0
