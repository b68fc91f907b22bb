"""Which kernels a model runs on: the attention that the manifest names, and blocks that are compiled."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune_contract.spec import Attention
from finetune_trainer.errors import ConfigError

_BACKENDS = {
    Attention.FLASH: SDPBackend.FLASH_ATTENTION,
    Attention.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    Attention.MATH: SDPBackend.MATH,
}
_COMPILERS = ("c++", "g++", "clang++", "gcc", "cc")
_REPEATED = "BasicTransformerBlock"
"""Class of the block that a UNet is mostly made of: compiled once, it serves in all its places."""
_HEAD = 64


def attention_kernel(
    attention: Attention, device: torch.device, dtype: torch.dtype
) -> Callable[[], AbstractContextManager[None]]:
    """Makes blocks within which attention is computed as asked for; `auto` leaves it to torch.

    Raises:
        ConfigError: this device cannot do that.
    """
    if attention is Attention.AUTO:
        return contextlib.nullcontext
    backend = _BACKENDS[attention]
    probe = torch.zeros(1, 1, 16, _HEAD, device=device, dtype=dtype)
    try:
        with sdpa_kernel(backend):
            nn.functional.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError as error:
        raise ConfigError(
            f"training.attention: {attention.value} is not there on {device.type} in {str(dtype).partition('.')[2]}; "
            "write auto"
        ) from error
    return lambda: sdpa_kernel(backend)


def compile_blocks(module: nn.Module) -> None:
    """Compile each transformer block by itself: most of the gain, at a fraction of the time that the whole takes.

    Raises:
        ConfigError: there is no compiler.
    """
    if not any(shutil.which(name) for name in _COMPILERS):
        raise ConfigError("training.compile: needs a C++ compiler, which this image lacks; write compile: false")
    for block in module.modules():
        if type(block).__name__ == _REPEATED:
            block.compile()
