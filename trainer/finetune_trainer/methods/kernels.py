"""Kernels of the models: the attention kernel that the manifest names, and compiled blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from finetune_contract.spec import Attention
from finetune_trainer.errors import ConfigError
from finetune_trainer.fused.mask_draws import MaskDraws

ATTENTION_BACKENDS = {
    Attention.FLASH: SDPBackend.FLASH_ATTENTION,
    Attention.CUDNN: SDPBackend.CUDNN_ATTENTION,
    Attention.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    Attention.MATH: SDPBackend.MATH,
}
"""torch's names of the attention kernels."""
AttentionContext = Callable[[], AbstractContextManager[None]]
"""Returns the context of a forward pass, in which torch uses certain attention kernels."""
_HEAD_SIZE = 64
"""Size of an attention head in the probe of a kernel."""


def attention_kernel(attention: Attention, device: torch.device, dtype: torch.dtype) -> AttentionContext:
    """Return a factory of contexts in which torch uses the named attention kernel; with `auto` torch chooses.

    Raises:
        ConfigError: the device does not support the kernel.
    """
    if attention is Attention.AUTO:
        return contextlib.nullcontext
    backend = ATTENTION_BACKENDS[attention]
    probe = torch.zeros(1, 1, 16, _HEAD_SIZE, device=device, dtype=dtype)
    try:
        with sdpa_kernel(backend):
            nn.functional.scaled_dot_product_attention(probe, probe, probe)
    except RuntimeError as error:
        raise ConfigError(
            f"training.attention: {attention.value} is not available on {device.type} with "
            f"{str(dtype).partition('.')[2]}; write auto"
        ) from error
    return lambda: sdpa_kernel(backend)


def attention_order(backends: Sequence[SDPBackend]) -> AttentionContext:
    """Return a factory of contexts in which torch tries these kernels in this order, and no others."""
    return lambda: sdpa_kernel(list(backends), set_priority=True)


def checkpoint_activations(
    module: Any,
    draws: bool,
    attention: AttentionContext = contextlib.nullcontext,
    masks: MaskDraws | None = None,
) -> None:
    """Recompute the activations of a model of diffusers or transformers in the backward pass.

    Args:
        module: the model.
        draws: whether its forward pass draws random numbers, which the recomputation must repeat. Saving the state of
            the generator is not possible in a CUDA graph.
        attention: the context of its forward pass. The recomputation must use the same kernels.
        masks: what draws the masks of its dropout instead.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        if masks is None:
            return contextlib.nullcontext(), attention()
        forward, recomputation = masks.block()
        return forward, _both(attention(), recomputation)

    settings: dict[str, Any] = {
        "use_reentrant": False,
        "preserve_rng_state": draws,
        "context_fn": contexts,
    }
    if hasattr(module, "gradient_checkpointing_enable"):
        module.gradient_checkpointing_enable(settings)
        return

    def recomputed(part: nn.Module, *args: Any) -> Any:
        return checkpoint(part.__call__, *args, **settings)

    module.enable_gradient_checkpointing(recomputed)


@contextlib.contextmanager
def _both(one: AbstractContextManager[None], other: AbstractContextManager[None]) -> Iterator[None]:
    with one, other:
        yield


def compile_blocks(module: nn.Module, names: Collection[str]) -> None:
    """Compile each repeated block separately.

    This has most of the speedup of compiling the complete module and takes a fraction of the time, because torch
    compiles equal blocks once.

    Args:
        module: module that contains the blocks.
        names: class names of the blocks; see `Family`. A compiler must be installed (`finetune_contract.requirements`).
    """
    for block in module.modules():
        if type(block).__name__ in names:
            block.compile()
