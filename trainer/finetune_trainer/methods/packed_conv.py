"""Convolutions with frozen weights on CPUs: the weights are packed into oneDNN's layout once instead of at every call.

torch passes plain weights to oneDNN, which packs them again in each forward and each backward pass. At the sizes of a
UNet this takes longer than the arithmetic: on one core, 1280 channels on 8 x 8 latents take 13 ms with plain and 8 ms
with packed weights, 2560 channels 53 and 16 ms. The gradient by the input of a convolution of stride 1 is a convolution
with flipped weights, so these are packed as well. 1 x 1 convolutions keep torch's implementation, a matrix product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN: tuple[str, list[float], str] = ("none", [], "")
"""No function is fused with the convolution."""


class _Convolution(torch.autograd.Function):
    """y = conv(x); only x gets a gradient."""

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
    """Pack the weights of a module's frozen convolutions where this is faster: on CPUs, in bf16.

    The plain weights are freed, so the module can no longer be copied or saved.

    Returns:
        The number of packed convolutions.
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
    """Return whether this build of torch supports oneDNN's convolutions in bf16 on this CPU."""
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
        # Packed for an unknown input size, a 1 x 1 convolution gets a kernel 100 times slower than torch's.
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
    flipped = layer.weight.flip(2, 3).transpose(0, 1).contiguous()
    around = [size - 1 - pad for size, pad in zip(layer.kernel_size, layer.padding, strict=True)]
    dtype = layer.weight.dtype
    forward = _convolution(layer.weight.contiguous(), layer.bias, list(layer.padding))
    backward = _convolution(flipped, None, around)
    layer.weight.data = layer.weight.new_empty(0)

    def run(x: Tensor) -> Tensor:
        # With autocast the output of the previous layer can be fp32.
        x = x.to(dtype, memory_format=torch.channels_last)
        output: Tensor = _Convolution.apply(x, forward, backward)
        return output

    layer.forward = run  # type: ignore[method-assign, assignment]


def _convolution(weight: Tensor, bias: Tensor | None, padding: list[int]) -> Callable[[Tensor], Tensor]:
    """Return a convolution of stride 1 with packed weights."""
    unit = [1, 1]
    operations = torch.ops.mkldnn
    packed = operations._reorder_convolution_weight(weight, padding, unit, unit, 1, None)

    def run(x: Tensor) -> Tensor:
        output: Tensor = operations._convolution_pointwise(x, packed, bias, padding, unit, unit, 1, *_PLAIN)
        return output

    return run
