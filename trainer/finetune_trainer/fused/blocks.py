"""Blocks of diffusers' models with fused operations in place of their own. Called by `denoiser_method`.

Where transformer blocks are compiled, the compiler fuses the same operations of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.fused.functions import add_layer_norm, geglu, group_norm_silu
from finetune_trainer.fused.operations import triton_works


def use_fused_operations(module: nn.Module, has_compiled_blocks: bool) -> None:
    """Fuse operations of a model where this is faster: on GPUs. The module has its final device.

    GEGLU is fused always; normalizations only with frozen weights, and where Triton works.

    Args:
        module: the model.
        has_compiled_blocks: whether its transformer blocks are compiled. Their operations are left to the compiler.
    """
    weight = next(module.parameters())
    device = weight.device.type
    if device not in {"cuda", "meta"}:
        return
    has_kernels = device == "meta" or triton_works(weight.dtype)
    if not has_compiled_blocks:
        fuse_feed_forward(module)
    if has_kernels and not has_compiled_blocks:
        fuse_transformer_blocks(module)
    if has_kernels:
        fuse_residual_blocks(module)


def fuse_feed_forward(module: nn.Module) -> None:
    """Compute GEGLU, gelu included, as one operation that saves only its input."""
    from diffusers.models.activations import GEGLU  # noqa: PLC0415  slow to import

    for part in module.modules():
        if type(part) is GEGLU:
            part.forward = _feed_forward_of(part)


def fuse_transformer_blocks(module: nn.Module) -> None:
    """Fuse the frozen layer norms of transformer blocks with the additions before them."""
    from diffusers.models.attention import BasicTransformerBlock  # noqa: PLC0415  slow to import

    for part in module.modules():
        if type(part) is BasicTransformerBlock and _is_plain_transformer_block(part):
            part.forward = _transformer_block_of(part)


def fuse_residual_blocks(module: nn.Module) -> None:
    """Fuse the frozen group norms of residual blocks with SiLU; all blocks project the time together."""
    from diffusers.models.resnet import ResnetBlock2D  # noqa: PLC0415  slow to import

    blocks: list[Any] = [
        part for part in module.modules() if type(part) is ResnetBlock2D and _is_plain_residual_block(part)
    ]
    if not blocks:
        return
    times = _TimeProjections([block.time_emb_proj for block in blocks])
    for index, block in enumerate(blocks):
        block.forward = _residual_block_of(block, times, index)


def _feed_forward_of(part: Any) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return geglu(part.proj(hidden_states))

    return forward


def _is_plain_transformer_block(block: Any) -> bool:
    """Return whether a block is self-attention, cross-attention and feed-forward with frozen layer norms."""
    norms = [block.norm1, block.norm2, block.norm3]
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not block.only_cross_attention
        and block.attn2 is not None
        and not hasattr(block, "fuser")
        and all(map(_is_frozen_layer_norm, norms))
    )


def _is_frozen_layer_norm(norm: Any) -> bool:
    return (
        type(norm) is nn.LayerNorm
        and norm.elementwise_affine
        and norm.bias is not None
        and len(norm.normalized_shape) == 1
        and _is_frozen(norm)
    )


def _is_frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def _transformer_block_of(block: Any) -> Callable[..., Tensor]:
    plain = block.forward

    def forward(  # noqa: PLR0913, PLR0917  the signature of the block
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if block._chunk_size is not None or cross_attention_kwargs:
            result: Tensor = plain(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return result
        x, normed = add_layer_norm(hidden_states, None, block.norm1)
        x, normed = add_layer_norm(x, block.attn1(normed, attention_mask=attention_mask), block.norm2)
        attended = block.attn2(
            normed, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        x, normed = add_layer_norm(x, attended, block.norm3)
        output: Tensor = block.ff(normed)
        return output + x

    return forward


def _is_plain_residual_block(block: Any) -> bool:
    """Return whether a block is two groups of norm, SiLU and convolution, with the time added between them."""
    return (
        block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and isinstance(block.nonlinearity, nn.SiLU)
        and block.dropout.p == 0
        and all(type(norm) is nn.GroupNorm and norm.affine and _is_frozen(norm) for norm in (block.norm1, block.norm2))
        and _is_frozen(block.time_emb_proj)
    )


def _residual_block_of(block: Any, times: _TimeProjections, index: int) -> Callable[..., Tensor]:
    plain = block.forward

    def forward(input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if temb is None or temb.requires_grad:
            result: Tensor = plain(input_tensor, temb, *args, **kwargs)
            return result
        x = block.conv1(group_norm_silu(input_tensor, block.norm1))
        x = block.conv2(group_norm_silu(x + times.get(index, temb)[:, :, None, None], block.norm2))
        shortcut = input_tensor if block.conv_shortcut is None else block.conv_shortcut(input_tensor)
        total: Tensor = shortcut + x
        return total if block.output_scale_factor == 1 else total / block.output_scale_factor

    return forward


class _TimeProjections:
    """Projections of the time of all residual blocks, computed once for each pass. Their weights become one tensor.

    Args:
        layers: the frozen linear layers.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._sizes = [layer.out_features for layer in layers]
        self._weight = _join([layer.weight for layer in layers])
        biases = [layer.bias for layer in layers]
        self._bias = None if biases[0] is None else _join(biases)
        self._time: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def get(self, index: int, time: Tensor) -> Tensor:
        """Return the projection (n, C) of a layer for the time embedding of a pass."""
        if time is not self._time:
            joined = nn.functional.linear(nn.functional.silu(time), self._weight, self._bias)
            self._time, self._outputs = time, torch.split(joined, self._sizes, dim=1)
        return self._outputs[index]


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Move frozen tensors into one, along the first dimension, and make them views of it."""
    joined = torch.cat([part.data for part in parts])
    for part, view in zip(parts, torch.split(joined, [len(part) for part in parts]), strict=True):
        part.data = view
    return joined
