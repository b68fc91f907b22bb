"""Fused operations with an implementation for each device, as operations of torch: `torch.ops.finetune`.

On GPUs each is one Triton kernel, or two for a group norm. On CPUs, and on GPUs without a working Triton, they are
torch's own operations. Called by `functions`.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

_LIBRARY: Any = torch.library.Library("finetune", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("geglu(Tensor x) -> Tensor")
_LIBRARY.define("geglu_backward(Tensor g, Tensor x) -> Tensor")
_LIBRARY.define(
    "add_layer_norm(Tensor a, Tensor? b, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "add_layer_norm_backward(Tensor g_total, Tensor g_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> Tensor"
)
_LIBRARY.define(
    "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "group_norm_silu_backward(Tensor g, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups)"
    " -> Tensor"
)


def geglu(x: Tensor) -> Tensor:
    """Return value * gelu(gate) (..., m) for x = [value, gate] (..., 2 m)."""
    value, gate = x.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate).mul_(value)


def geglu_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x (..., 2 m)."""
    value, gate = x.chunk(2, dim=-1)
    g_x = torch.empty_like(x)
    g_value, g_gate = g_x.chunk(2, dim=-1)
    torch.mul(g, torch.nn.functional.gelu(gate), out=g_value)
    torch.ops.aten.gelu_backward.grad_input(g * value, gate, grad_input=g_gate)
    return g_x


def add_layer_norm(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a + b (an empty tensor without b), its layer norm over the last dimension, and mean and 1 / deviation."""
    total = a if b is None else a + b
    y, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return a.new_empty(0) if b is None else total, y, mean, rstd


def add_layer_norm_backward(  # noqa: PLR0913, PLR0917  the saved tensors of a pass
    g_total: Tensor, g_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Return the gradient of the sum x: g_total, plus that through the layer norm."""
    wanted = [True, False, False]
    arguments = (g_y, x, weight.shape, mean, rstd, weight, None, wanted)
    through_norm: Tensor = torch.ops.aten.native_layer_norm_backward(*arguments)[0]
    return through_norm.add_(g_total)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return silu(group norm of x (n, C, h, w)), and mean and 1 / deviation (n, groups)."""
    y, mean, rstd = _group_norm(x, weight, bias, groups, eps)
    return torch.nn.functional.silu(y, inplace=True), mean, rstd


def group_norm_silu_backward(  # noqa: PLR0913, PLR0917  the saved tensors of a pass
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> Tensor:
    """Return the gradient of x; the output of the norm is computed again from its mean and deviation."""
    by_group = x.reshape(len(x), groups, -1)
    normed = ((by_group - mean[:, :, None]) * rstd[:, :, None]).to(x.dtype).view_as(x)
    before = torch.addcmul(bias[None, :, None, None], normed, weight[None, :, None, None])
    gradient = torch.ops.aten.silu_backward(g, before)
    layout = torch.contiguous_format
    sizes = (*x.shape[:2], x.shape[2] * x.shape[3], groups)
    arguments = (gradient.contiguous(memory_format=layout), x.contiguous(memory_format=layout), mean, rstd, weight)
    g_x: Tensor = torch.ops.aten.native_group_norm_backward(*arguments, *sizes, [True, False, False])[0]
    return g_x


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    y, mean, rstd = torch.native_group_norm(x, weight, bias, len(x), x.shape[1], x.shape[2] * x.shape[3], groups, eps)
    return y, mean, rstd


@functools.cache
def triton_works(dtype: torch.dtype) -> bool:
    """Return whether Triton's kernels run on this machine's GPU and compute what torch computes.

    The first call compiles small ones. A machine without a compiler for Triton uses torch's operations.

    Args:
        dtype: number format of the model.
    """
    if not torch.cuda.is_available():
        return False
    try:
        worst = check_kernels(torch.device("cuda"), dtype)
    except Exception as error:
        summary = " ".join(str(error).split())[:300]
        _LOG.warning("fused kernels are off, because Triton failed on this GPU: %s: %s", type(error).__name__, summary)
        return False
    if not worst <= _TOLERANCES.get(dtype, 0.0):
        _LOG.warning("fused kernels are off, because Triton's results differ from torch's by %.2g", worst)
        return False
    return True


_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""Largest difference of Triton's results from torch's in fp32, divided by 1 + the value."""


def check_kernels(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference between Triton's kernels and torch's operations in fp32 on a device.

    A difference from a value x counts as its share of 1 + |x|. The result is NaN if one of them is.
    """
    from finetune_trainer.fused import triton_kernels  # noqa: PLC0415  only GPU machines need Triton

    differences = []
    for name, arguments in _examples(device, dtype):
        exact = [value.float() if isinstance(value, Tensor) else value for value in arguments]
        found, expected = getattr(triton_kernels, name)(*arguments), _TORCH[name](*exact)
        for one, reference in zip(_tensors(found), _tensors(expected), strict=True):
            wanted = reference.flatten()
            if len(wanted):
                differences.append(((one.flatten().float() - wanted).abs() / (1 + wanted.abs())).max())
    return float(torch.stack(differences).max())


def _examples(device: torch.device, dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """Return arguments of each operation. Some sizes are no powers of two."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    wide, rows, other, weight, bias = draw(6, 160), draw(6, 80), draw(6, 80), draw(80), draw(80)
    image, gradient = draw(2, 80, 9, 7), draw(2, 80, 9, 7)
    last = image.to(memory_format=torch.channels_last)
    sums = (other, rows, wide[:, :80].contiguous(), weight, *_statistics(wide[:, :80], 1))
    return [
        ("geglu", (wide,)),
        ("geglu_backward", (rows, wide)),
        ("add_layer_norm", (rows, other, weight, bias, 1e-5)),
        ("add_layer_norm", (rows, None, weight, bias, 1e-5)),
        ("add_layer_norm_backward", sums),
        ("group_norm_silu", (image, weight, bias, 8, 1e-5)),
        ("group_norm_silu", (last, weight, bias, 8, 1e-5)),
        ("group_norm_silu_backward", (gradient, image, weight, bias, *_statistics(image, 8), 8)),
        ("group_norm_silu_backward", (gradient, last, weight, bias, *_statistics(image, 8), 8)),
    ]


def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / deviation of the rows, or of the groups of channels."""
    by_group = x.float().reshape(len(x), groups, -1)
    mean, variance = by_group.mean(dim=-1), by_group.var(dim=-1, unbiased=False)
    return mean, (variance + 1e-5).rsqrt()


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


_TORCH: dict[str, Any] = {
    "geglu": geglu,
    "geglu_backward": geglu_backward,
    "add_layer_norm": add_layer_norm,
    "add_layer_norm_backward": add_layer_norm_backward,
    "group_norm_silu": group_norm_silu,
    "group_norm_silu_backward": group_norm_silu_backward,
}


def _on_gpu(name: str) -> Any:
    def run(*arguments: Any) -> Any:
        if not triton_works(arguments[0].dtype):
            return _TORCH[name](*arguments)
        from finetune_trainer.fused import triton_kernels  # noqa: PLC0415  only GPU machines need Triton

        return getattr(triton_kernels, name)(*arguments)

    return run


def _meta_add_layer_norm(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del weight, bias, eps
    mean, rstd = a.new_empty(2, *a.shape[:-1], dtype=torch.float32).unbind()
    return a.new_empty(0) if b is None else a.new_empty(a.shape), a.new_empty(a.shape), mean, rstd


def _meta_group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    del weight, bias, eps
    mean, rstd = x.new_empty(2, len(x), groups, dtype=torch.float32).unbind()
    return torch.empty_like(x), mean, rstd


_META: dict[str, Any] = {
    "geglu": lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2),
    "geglu_backward": lambda _, x: torch.empty_like(x),
    "add_layer_norm": _meta_add_layer_norm,
    "add_layer_norm_backward": lambda _, __, x, *___: torch.empty_like(x),
    "group_norm_silu": _meta_group_norm_silu,
    "group_norm_silu_backward": lambda _, x, *__: torch.empty_like(x),
}

for _name, _function in _TORCH.items():
    _LIBRARY.impl(_name, _function, "CPU")
    _LIBRARY.impl(_name, _on_gpu(_name), "CUDA")
    _LIBRARY.impl(_name, _META[_name], "Meta")
