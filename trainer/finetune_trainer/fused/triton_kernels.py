"""GPU kernels in Triton, and the functions that launch them. Called by `operations`, only on GPUs.

Each program computes in fp32 and rounds once, when it stores a result. All tensors but the input of GEGLU's backward
pass are read once.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"
# ruff: noqa: N803  constants of kernels are written in capitals

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_GEGLU_BLOCK = 1024
_CHUNK_ELEMENTS = 8192
"""Elements of a group that one program of the group norm reads."""
_MIN_CHUNKS = 256
"""Smallest number of chunks that a program combines; unused ones cost less than another compiled kernel."""
_ANY_SIZE = ["channels", "groups", "positions", "chunks"]
"""Arguments for whose values no kernel is compiled."""


@triton.jit
def _geglu(x, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + row * 2 * width + column, mask=mask).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, mask=mask).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + row * width + column, (value * gate * share).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _geglu_backward(g, x, g_x, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + row * 2 * width + column, mask=mask).to(tl.float32)
    gate = tl.load(x + row * 2 * width + width + column, mask=mask).to(tl.float32)
    gradient = tl.load(g + row * width + column, mask=mask).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    g_value = gradient * gate * share
    g_gate = gradient * value * (share + gate * density)
    tl.store(g_x + row * 2 * width + column, g_value.to(g_x.dtype.element_ty), mask=mask)
    tl.store(g_x + row * 2 * width + width + column, g_gate.to(g_x.dtype.element_ty), mask=mask)


def geglu(x: Tensor) -> Tensor:
    """Return value * gelu(gate) (..., m) for x = [value, gate] (..., 2 m)."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = x.new_empty(*x.shape[:-1], width)
    _geglu[_geglu_grid(y)](x, y, width, BLOCK=_GEGLU_BLOCK)
    return y


def geglu_backward(g: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x (..., 2 m)."""
    g, x = g.contiguous(), x.contiguous()
    g_x = torch.empty_like(x)
    _geglu_backward[_geglu_grid(g)](g, x, g_x, g.shape[-1], BLOCK=_GEGLU_BLOCK)
    return g_x


def _geglu_grid(y: Tensor) -> tuple[int, int]:
    width = y.shape[-1]
    return y.numel() // width, triton.cdiv(width, _GEGLU_BLOCK)


@triton.jit
def _add_layer_norm(  # noqa: PLR0913, PLR0917
    a,
    b,
    weight,
    bias,
    total,
    y,
    mean,
    rstd,
    width,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(a + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(b + row * width + column, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row * width + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    center = tl.sum(value, axis=0) / width
    difference = tl.where(mask, value - center, 0.0)
    scale = 1 / tl.sqrt(tl.sum(difference * difference, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    result = difference * scale * factor + offset
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + row, center)
    tl.store(rstd + row, scale)


@triton.jit
def _add_layer_norm_backward(  # noqa: PLR0913, PLR0917
    g_total,
    g_y,
    x,
    weight,
    mean,
    rstd,
    g_x,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(g_y + row * width + column, mask=mask, other=0.0).to(tl.float32) * factor
    scale = tl.load(rstd + row)
    normed = tl.where(mask, (value - tl.load(mean + row)) * scale, 0.0)
    along = tl.sum(gradient * normed, axis=0) / width
    common = tl.sum(gradient, axis=0) / width
    result = (gradient - normed * along - common) * scale
    result += tl.load(g_total + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_x + row * width + column, result.to(g_x.dtype.element_ty), mask=mask)


def add_layer_norm(
    a: Tensor, b: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a + b (an empty tensor without b), its layer norm over the last dimension, and mean and 1 / deviation."""
    a = a.contiguous()
    width = a.shape[-1]
    rows = a.numel() // width
    total = a.new_empty(0) if b is None else torch.empty_like(a)
    y = torch.empty_like(a)
    mean, rstd = torch.empty(2, rows, dtype=torch.float32, device=a.device).unbind()
    other = a if b is None else b.contiguous()
    _add_layer_norm[rows,](
        a, other, weight, bias, total, y, mean, rstd, width, eps, ADD=b is not None, **_row_shape(width)
    )
    return total, y, mean, rstd


def add_layer_norm_backward(  # noqa: PLR0913, PLR0917  the saved tensors of a pass
    g_total: Tensor, g_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """Return the gradient of the sum x: g_total, plus that through the layer norm."""
    g_x = torch.empty_like(x)
    width = x.shape[-1]
    arguments = (g_total.contiguous(), g_y.contiguous(), x, weight, mean, rstd, g_x, width)
    _add_layer_norm_backward[x.numel() // width,](*arguments, **_row_shape(width))
    return g_x


def _row_shape(width: int) -> dict[str, Any]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


@triton.jit
def _tile(  # noqa: PLR0913, PLR0917
    channels,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_p,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return offsets, mask and channels of the part of a group that belongs to a program."""
    index = tl.program_id(0)
    width = channels // groups
    column = tl.arange(0, BLOCK)
    channel = (index % groups) * width + column
    position = tl.program_id(1) * POSITIONS + tl.arange(0, POSITIONS)
    start = (index // groups).to(tl.int64) * stride_n
    offsets = start + position[:, None].to(tl.int64) * stride_p + channel[None, :].to(tl.int64) * stride_c
    return offsets, (position[:, None] < positions) & (column[None, :] < width), channel


@triton.jit
def _counts(positions, width, index, POSITIONS: tl.constexpr):
    """Return the number of elements in a chunk of a group; none after the last chunk."""
    return tl.maximum(tl.minimum(positions - index * POSITIONS, POSITIONS), 0) * width


@triton.jit(do_not_specialize=_ANY_SIZE)
def _norm_statistics(  # noqa: PLR0913, PLR0917
    x,
    partial,
    channels,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_p,
    chunks,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, mask, _ = _tile(channels, groups, positions, stride_n, stride_c, stride_p, POSITIONS, BLOCK)
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    count = _counts(positions, channels // groups, tl.program_id(1), POSITIONS)
    mean = tl.sum(value) / count
    difference = tl.where(mask, value - mean, 0.0)
    place = partial + (tl.program_id(0) * chunks + tl.program_id(1)) * 2
    tl.store(place, mean)
    tl.store(place + 1, tl.sum(difference * difference))


@triton.jit(do_not_specialize=_ANY_SIZE)
def _norm_apply(  # noqa: PLR0913, PLR0917
    x,
    partial,
    weight,
    bias,
    y,
    means,
    rstds,
    channels,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_p,
    chunks,
    eps,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    # The variance of all chunks by the formula of Chan, Golub and LeVeque.
    index = tl.arange(0, CHUNKS)
    place = partial + (tl.program_id(0) * chunks + index) * 2
    count = _counts(positions, channels // groups, index, POSITIONS).to(tl.float32)
    mean_of = tl.load(place, mask=index < chunks, other=0.0)
    total = tl.sum(count)
    mean = tl.sum(count * mean_of) / total
    apart = (mean_of - mean) * (mean_of - mean) * count
    squares = tl.sum(tl.load(place + 1, mask=index < chunks, other=0.0) + tl.where(index < chunks, apart, 0.0))
    rstd = 1 / tl.sqrt(squares / total + eps)
    offsets, mask, channel = _tile(channels, groups, positions, stride_n, stride_c, stride_p, POSITIONS, BLOCK)
    inside = tl.arange(0, BLOCK) < channels // groups
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    normed = (value - mean) * rstd * factor + offset
    tl.store(y + offsets, (normed * tl.sigmoid(normed)).to(y.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(means + tl.program_id(0), mean)
        tl.store(rstds + tl.program_id(0), rstd)


@triton.jit
def _norm_gradients(  # noqa: PLR0913, PLR0917
    g, x, weight, bias, means, rstds, offsets, mask, channel, inside
):
    """Return the normalized values, and the gradient that reaches them."""
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(g + offsets, mask=mask, other=0.0).to(tl.float32)
    normed = tl.where(mask, (value - tl.load(means + tl.program_id(0))) * tl.load(rstds + tl.program_id(0)), 0.0)
    before = normed * factor + offset
    share = tl.sigmoid(before)
    return normed, gradient * share * (1 + before * (1 - share)) * factor


@triton.jit(do_not_specialize=_ANY_SIZE)
def _norm_backward_sums(  # noqa: PLR0913, PLR0917
    g,
    x,
    partial,
    weight,
    bias,
    means,
    rstds,
    channels,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_p,
    chunks,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets, mask, channel = _tile(channels, groups, positions, stride_n, stride_c, stride_p, POSITIONS, BLOCK)
    inside = tl.arange(0, BLOCK) < channels // groups
    normed, gradient = _norm_gradients(g, x, weight, bias, means, rstds, offsets, mask, channel, inside)
    place = partial + (tl.program_id(0) * chunks + tl.program_id(1)) * 2
    tl.store(place, tl.sum(gradient))
    tl.store(place + 1, tl.sum(gradient * normed))


@triton.jit(do_not_specialize=_ANY_SIZE)
def _norm_backward_apply(  # noqa: PLR0913, PLR0917
    g,
    x,
    partial,
    weight,
    bias,
    means,
    rstds,
    g_x,
    channels,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_p,
    chunks,
    POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    index = tl.arange(0, CHUNKS)
    place = partial + (tl.program_id(0) * chunks + index) * 2
    total = positions * (channels // groups)
    common = tl.sum(tl.load(place, mask=index < chunks, other=0.0)) / total
    along = tl.sum(tl.load(place + 1, mask=index < chunks, other=0.0)) / total
    offsets, mask, channel = _tile(channels, groups, positions, stride_n, stride_c, stride_p, POSITIONS, BLOCK)
    inside = tl.arange(0, BLOCK) < channels // groups
    normed, gradient = _norm_gradients(g, x, weight, bias, means, rstds, offsets, mask, channel, inside)
    result = (gradient - common - normed * along) * tl.load(rstds + tl.program_id(0))
    tl.store(g_x + offsets, result.to(g_x.dtype.element_ty), mask=mask)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return silu(group norm of x (n, C, h, w)) in the layout of x, and mean and 1 / deviation (n, groups)."""
    x = x.contiguous(memory_format=_layout(x))
    y = torch.empty_like(x)
    mean, rstd = torch.empty(2, len(x), groups, dtype=torch.float32, device=x.device).unbind()
    grid, sizes, blocks = _norm_shape(x, groups)
    partial = mean.new_empty(*grid, 2)
    _norm_statistics[grid](x, partial, *sizes, **blocks)
    blocks["CHUNKS"] = max(triton.next_power_of_2(grid[1]), _MIN_CHUNKS)
    _norm_apply[grid](x, partial, weight, bias, y, mean, rstd, *sizes, eps, **blocks)
    return y, mean, rstd


def group_norm_silu_backward(  # noqa: PLR0913, PLR0917  the saved tensors of a pass
    g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> Tensor:
    """Return the gradient of x."""
    x = x.contiguous(memory_format=_layout(x))
    g = g.contiguous(memory_format=_layout(x))
    g_x = torch.empty_like(x)
    grid, sizes, blocks = _norm_shape(x, groups)
    partial = mean.new_empty(*grid, 2)
    _norm_backward_sums[grid](g, x, partial, weight, bias, mean, rstd, *sizes, **blocks)
    blocks["CHUNKS"] = max(triton.next_power_of_2(grid[1]), _MIN_CHUNKS)
    _norm_backward_apply[grid](g, x, partial, weight, bias, mean, rstd, g_x, *sizes, **blocks)
    return g_x


def _layout(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def _norm_shape(x: Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """Return the grid, the sizes and the tile of the kernels of the group norm."""
    count, channels, height, width = x.shape
    block = triton.next_power_of_2(channels // groups)
    positions = max(_CHUNK_ELEMENTS // block, 1)
    chunks = triton.cdiv(height * width, positions)
    stride_p = channels if _layout(x) is torch.channels_last else 1
    stride_c = 1 if _layout(x) is torch.channels_last else height * width
    sizes = (channels, groups, height * width, channels * height * width, stride_c, stride_p, chunks)
    return (count * groups, chunks), sizes, {"POSITIONS": positions, "BLOCK": block, "num_warps": 8}
