"""Fused operations with their backward passes. They save only their inputs. Called by `blocks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from finetune_trainer.fused import operations as _operations  # noqa: F401  defines torch.ops.finetune

_FUSED: Any = torch.ops.finetune


def geglu(x: Tensor) -> Tensor:
    """Return value * gelu(gate) (..., m) for x = [value, gate] (..., 2 m) (https://arxiv.org/abs/2002.05202)."""
    y: Tensor = _Geglu.apply(x)
    return y


def add_layer_norm(x: Tensor, added: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return x + added, or x, and its layer norm.

    Args:
        x: the residual stream (..., m).
        added: a term of the same shape.
        norm: the layer norm over m; its weights are frozen.
    """
    if added is not None and added.dtype is not x.dtype:
        x, added = x + added, None
    outputs: tuple[Tensor, Tensor] = _AddLayerNorm.apply(x, added, norm.weight, norm.bias, norm.eps)
    return outputs


def group_norm_silu(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Return silu(norm(x)) for an image (n, C, h, w); the weights of the norm are frozen."""
    y: Tensor = _GroupNormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
    return y


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y: Tensor = _FUSED.geglu(x)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        g_x: Tensor = _FUSED.geglu_backward(gradients[0], x)
        return g_x


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  autograd needs each tensor as a separate argument
        ctx: Any, x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        total, y, mean, rstd = _FUSED.add_layer_norm(x, added, weight, bias, eps)
        if added is None:
            total = x
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.set_materialize_grads(False)
        return total, y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, mean, rstd = ctx.saved_tensors
        g_total, g_y = gradients
        if g_y is None:
            g = g_total
        else:
            g_total = torch.zeros_like(total) if g_total is None else g_total
            g = _FUSED.add_layer_norm_backward(g_total, g_y, total, weight, mean, rstd)
        return g, g if ctx.needs_input_grad[1] else None, None, None, None


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  autograd needs each tensor as a separate argument
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        y, mean, rstd = _FUSED.group_norm_silu(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups = groups
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        g_x = _FUSED.group_norm_silu_backward(gradients[0], x, weight, bias, mean, rstd, ctx.groups)
        return g_x, None, None, None, None
