"""Convolutions with frozen weights on CPUs: their weights are laid out for oneDNN once, and not at every call.

torch hands oneDNN a convolution's weights as they are, and it lays them out anew in each forward and each backward
pass. At the sizes of a UNet that takes longer than the arithmetic: on one core, 1280 channels on 8 x 8 latents take
13 ms as they are and 8 ms laid out, 2560 channels 53 and 16 ms. The gradient by the input of one with stride 1 is
itself a convolution, with the weights turned around, so it gets a layout of its own. Convolutions of 1 x 1 are left to
torch, which multiplies them as matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN: tuple[str, list[float], str] = ("none", [], "")
"""No function is fused behind the convolution."""


class _Convolution(torch.autograd.Function):
    """y = conv(x); backward goes to x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.backward_of_x = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        return ctx.backward_of_x(gradient), None, None


def pack_convolutions(module: nn.Module) -> int:
    """Lay out the weights of a module's frozen convolutions, where that helps: on CPUs, in bf16.

    The plain weights are given up: whoever wants to copy or write the module does so before.

    Returns:
        How many were laid out.
    """
    count = 0
    if not _is_supported():
        return count
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _can_be_packed(layer):
            _pack(layer)
            count += 1
    return count


@functools.cache
def _is_supported() -> bool:
    """Whether this build of torch, on this CPU, has oneDNN's convolutions in bf16."""
    try:
        weight = torch.ones(16, 16, 1, 1, dtype=torch.bfloat16)
        _convolution(weight, None, [0, 0])(torch.ones(1, 16, 2, 2, dtype=torch.bfloat16))
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return True


def _can_be_packed(layer: nn.Conv2d) -> bool:
    trained = any(parameter.requires_grad for parameter in layer.parameters())
    return (
        not trained
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype is torch.bfloat16
        and layer.groups == 1
        # Laid out for no size in particular, one of 1 x 1 gets a kernel a hundred times slower than torch's.
        and min(layer.kernel_size) > 1
        and layer.stride == (1, 1)
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and isinstance(layer.padding, tuple)
        and all(pad < size for pad, size in zip(layer.padding, layer.kernel_size, strict=True))
    )


@torch.no_grad()
def _pack(layer: nn.Conv2d) -> None:
    assert isinstance(layer.padding, tuple)
    turned = layer.weight.flip(2, 3).transpose(0, 1).contiguous()
    around = [size - 1 - pad for size, pad in zip(layer.kernel_size, layer.padding, strict=True)]
    dtype = layer.weight.dtype
    forward = _convolution(layer.weight.contiguous(), layer.bias, list(layer.padding))
    backward = _convolution(turned, None, around)
    layer.weight.data = layer.weight.new_empty(0)

    def run(x: Tensor) -> Tensor:
        # Within autocast the layer before may have answered in fp32.
        x = x.to(dtype, memory_format=torch.channels_last)
        answer: Tensor = _Convolution.apply(x, forward, backward)
        return answer

    layer.forward = run  # type: ignore[method-assign, assignment]


def _convolution(weight: Tensor, bias: Tensor | None, padding: list[int]) -> Callable[[Tensor], Tensor]:
    """A convolution of stride 1 whose weights are laid out now."""
    unit = [1, 1]
    operations = torch.ops.mkldnn
    packed = operations._reorder_convolution_weight(weight, padding, unit, unit, 1, None)

    def run(x: Tensor) -> Tensor:
        answer: Tensor = operations._convolution_pointwise(x, packed, bias, padding, unit, unit, 1, *_PLAIN)
        return answer

    return run
