"""Adapted linear layers with a common input, multiplied together; the mathematics is peft's.

Called by `adapter_bank`, which stores the adapters, and by the attention blocks of `adapted_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune_trainer.fused.mask_draws import draw_mask


class Matrices(NamedTuple):
    """Adapters of the S layers of a group, or their gradients.

    Attributes:
        down: the matrices A that map to the rank (S, rank, in).
        up: the matrices B that map from the rank (S, out, rank), multiplied by alpha / rank where they are weights.
    """

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Magnitudes:
    """What DoRA adds to the S layers of a group (https://arxiv.org/abs/2402.09353).

    Attributes:
        values: trained norms of the rows of the weights, fp32 (S, out).
        gradients: their gradients, fp32 (S, out).
        frozen: squared norms of the rows of the frozen weights, fp32 (S, out).
        norms: norms of the rows of the adapted weights in this pass, fp32 (S, out). They count as constants.
        factors: values / norms, in the format of the activations (S, out).
    """

    values: Tensor
    gradients: Tensor
    frozen: Tensor
    norms: Tensor
    factors: Tensor


@dataclass(frozen=True)
class AdapterGroup:
    """Adapted layers with a common input, and equal shapes, rank and scale. All tensors are views of flat storage.

    Attributes:
        layers: peft's layers.
        weight: frozen weights (S * out, in).
        bias: frozen biases (S * out,).
        adapters: the adapters in the format of the activations.
        gradients: to which a backward pass adds.
        scale: alpha / rank.
        dropout: probability with which an input of an adapter is zero in training.
        magnitudes: those of DoRA, if used.
    """

    layers: tuple[Any, ...]
    weight: Tensor
    bias: Tensor | None
    adapters: Matrices
    gradients: Matrices
    scale: float
    dropout: float
    magnitudes: Magnitudes | None

    @property
    def size(self) -> int:
        """Return the number of layers S."""
        return len(self.layers)

    @property
    def active_dropout(self) -> float:
        """Return the probability for the next pass."""
        return self.dropout if self.layers[0].training else 0.0

    def part(self, first: int, count: int) -> AdapterGroup:
        """Return some neighbouring layers as a group that shares the storage."""
        layers = slice(first, first + count)
        num_out = len(self.weight) // self.size
        rows = slice(first * num_out, (first + count) * num_out)
        magnitudes = self.magnitudes
        if magnitudes is not None:
            magnitudes = Magnitudes(
                values=magnitudes.values[layers],
                gradients=magnitudes.gradients[layers],
                frozen=magnitudes.frozen[layers],
                norms=magnitudes.norms[layers],
                factors=magnitudes.factors[layers],
            )
        return replace(
            self,
            layers=self.layers[layers],
            weight=self.weight[rows],
            bias=None if self.bias is None else self.bias[rows],
            adapters=Matrices(*(matrix[layers] for matrix in self.adapters)),
            gradients=Matrices(*(matrix[layers] for matrix in self.gradients)),
            magnitudes=magnitudes,
        )

    def refresh(self) -> None:
        """Compute what depends on the adapters only: the norms of DoRA, without a copy of the adapted weights.

        With the row w of a weight and b of B, ||w + b A||^2 = ||w||^2 + b (2 A w + A A^T b).
        """
        if self.magnitudes is None:
            return
        down, up = self.adapters
        weight = self.weight.view(self.size, -1, self.weight.shape[1])
        transposed = down.transpose(1, 2)
        mixed = torch.baddbmm(up @ (down @ transposed), weight, transposed, alpha=2)
        squares = torch.add(self.magnitudes.frozen, (up.float() * mixed).sum(dim=-1))
        torch.sqrt(squares, out=self.magnitudes.norms)
        self.magnitudes.factors.copy_(self.magnitudes.values / self.magnitudes.norms)

    def rows(self, x: Tensor, anchor: Tensor) -> tuple[Tensor, ...]:
        """Return the output (..., out) of each layer for a common input (..., in).

        Args:
            x: the input.
            anchor: see `AdapterBank`.
        """
        outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, anchor, self, 0)
        return outputs

    def heads(self, x: Tensor, anchor: Tensor, num_heads: int) -> tuple[Tensor, ...]:
        """Return the output of each layer by attention head (n, heads, tokens, channels) for an input (n, tokens, in).

        Backward reads the gradients in the layout of the attention kernel, so that no copy of each is made.
        """
        outputs: tuple[Tensor, ...] = _AdaptedLinears.apply(x, anchor, self, num_heads)
        return outputs


class _AdaptedLinears(torch.autograd.Function):
    """y_i = x W_i^T + b_i + s d_i(x) A_i^T B_i^T for the layers i of a group (https://arxiv.org/abs/2106.09685, eq. 3).

    d_i is dropout. DoRA multiplies x W_i^T + s x A_i^T B_i^T with factors; with dropout, peft applies it to d_i(x):
    y_i = x W_i^T + b_i + f_i z_i - d_i(x) W_i^T with z_i = d_i(x) W_i^T + s d_i(x) A_i^T B_i^T.

    The gradients of the adapters are added to the group's; the anchor gets none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, group: AdapterGroup, num_heads: int) -> tuple[Tensor, ...]:
        del anchor
        rows, dropout = x.reshape(-1, x.shape[-1]), group.active_dropout
        dropped = mask = None
        if dropout:
            mask = draw_mask((group.size, *rows.shape), 1 - dropout, x.device)
            dropped = rows * mask
        hidden = _to_rank(rows, dropped, group, dropout)
        y, adapted = _outputs(rows, dropped, hidden, group, dropout)
        ctx.save_for_backward(rows, hidden, dropped, mask, adapted)
        ctx.group, ctx.shape, ctx.num_heads, ctx.dropout = group, x.shape, num_heads, dropout
        if not num_heads:
            return y.view(*x.shape[:-1], group.size, -1).unbind(-2)
        by_head = y.view(*x.shape[:-1], group.size, num_heads, -1)
        return tuple(part.transpose(1, 2) for part in by_head.unbind(2))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (rows, hidden, dropped, mask, adapted), group = ctx.saved_tensors, ctx.group
        g = _join(gradients, ctx.num_heads)
        g_adapted = g if group.magnitudes is None else _through_magnitudes(g, adapted, group.magnitudes)
        g_hidden = _add_gradients(g_adapted, rows, hidden, dropped, ctx.dropout, group)
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        if mask is None:
            return _input_gradient(g_adapted, g_hidden, group).view(ctx.shape), None, None, None
        g_dropped = torch.bmm(g_hidden, group.adapters.down)
        if group.magnitudes is not None:
            weight = group.weight.view(group.size, -1, group.weight.shape[1])
            g_base = _by_layer(g_adapted, group.size) - _by_layer(g, group.size)
            g_dropped.baddbmm_(g_base, weight, alpha=1 / (1 - ctx.dropout))
        g_x = (g @ group.weight).add_(g_dropped.mul_(mask).sum(dim=0))
        return g_x.view(ctx.shape), None, None, None


def _to_rank(rows: Tensor, dropped: Tensor | None, group: AdapterGroup, dropout: float) -> Tensor:
    """Return d(x) A^T of each layer (S, n, rank)."""
    if dropped is not None:
        return torch.bmm(dropped, group.adapters.down.transpose(1, 2)).mul_(1 / (1 - dropout))
    return _by_layer(rows @ group.adapters.down.flatten(0, 1).t(), group.size)


def _outputs(
    rows: Tensor, dropped: Tensor | None, hidden: Tensor, group: AdapterGroup, dropout: float
) -> tuple[Tensor, Tensor | None]:
    """Return the outputs (n, S * out), and with DoRA what its factors multiply (n, S * out)."""
    if group.magnitudes is None:
        y = nn.functional.linear(rows, group.weight, group.bias)
        _add_adapters(y, hidden, group)
        return y, None
    factors = group.magnitudes.factors.flatten()
    if dropped is None:
        adapted = rows @ group.weight.t()
        _add_adapters(adapted, hidden, group)
        y = adapted * factors if group.bias is None else torch.addcmul(group.bias, adapted, factors)
        return y, adapted
    weight = group.weight.view(group.size, -1, group.weight.shape[1])
    base = torch.bmm(dropped, weight.transpose(1, 2)).mul_(1 / (1 - dropout))
    adapted = _by_row(torch.baddbmm(base, hidden, group.adapters.up.transpose(1, 2)))
    y = nn.functional.linear(rows, group.weight, group.bias)
    _by_layer(y, group.size).sub_(base)
    return y.addcmul_(adapted, factors), adapted


def _add_adapters(y: Tensor, hidden: Tensor, group: AdapterGroup) -> None:
    """Add s d(x) A^T B^T to rows (n, S * out)."""
    if group.size == 1:
        y.addmm_(hidden[0], group.adapters.up[0].t())
    else:
        _by_layer(y, group.size).baddbmm_(hidden, group.adapters.up.transpose(1, 2))


def _join(gradients: Sequence[Tensor], num_heads: int) -> Tensor:
    """Return the gradients of all outputs as rows (n, S * out)."""
    if num_heads:
        joined = torch.cat([part.transpose(1, 2) for part in gradients], dim=2) if len(gradients) > 1 else None
        return (gradients[0].transpose(1, 2) if joined is None else joined).reshape(-1, _width(gradients))
    parts = [part.reshape(-1, part.shape[-1]) for part in gradients]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _width(gradients: Sequence[Tensor]) -> int:
    return len(gradients) * gradients[0].shape[1] * gradients[0].shape[3]


def _through_magnitudes(g: Tensor, adapted: Tensor, magnitudes: Magnitudes) -> Tensor:
    """Add the gradients of the magnitudes, and return those of what the factors multiply (n, S * out)."""
    sums = (g * adapted).sum(dim=0, dtype=torch.float32)
    magnitudes.gradients.addcdiv_(sums.view_as(magnitudes.norms), magnitudes.norms)
    return g * magnitudes.factors.flatten()


def _add_gradients(  # noqa: PLR0913, PLR0917  the saved tensors of a pass
    g: Tensor, rows: Tensor, hidden: Tensor, dropped: Tensor | None, dropout: float, group: AdapterGroup
) -> Tensor:
    """Add the gradients of the adapters, and return those of d(x) A^T, divided by 1 - dropout (S, n, rank)."""
    down, up = group.gradients
    if group.size == 1:
        g_hidden = (g @ group.adapters.up[0])[None]
        up[0].addmm_(g.t(), hidden[0], alpha=group.scale)
    else:
        by_layer = _by_layer(g, group.size)
        g_hidden = _by_layer(g.new_empty(len(g), group.size * group.adapters.up.shape[2]), group.size)
        torch.bmm(by_layer, group.adapters.up, out=g_hidden)
        up.baddbmm_(by_layer.transpose(1, 2), hidden, alpha=group.scale)
    if dropped is None:
        down.flatten(0, 1).addmm_(_by_row(g_hidden).t(), rows)
    else:
        g_hidden.mul_(1 / (1 - dropout))
        down.baddbmm_(g_hidden.transpose(1, 2), dropped)
    return g_hidden


def _input_gradient(g: Tensor, g_hidden: Tensor, group: AdapterGroup) -> Tensor:
    """Return the gradient of the input without dropout (n, in)."""
    return (g @ group.weight).addmm_(_by_row(g_hidden), group.adapters.down.flatten(0, 1))


def _by_layer(rows: Tensor, size: int) -> Tensor:
    """View rows with the values of all layers (n, S * m) as matrices of each layer (S, n, m)."""
    return rows.view(len(rows), size, -1).transpose(0, 1)


def _by_row(matrices: Tensor) -> Tensor:
    """Return matrices of each layer (S, n, m) as rows (n, S * m): a view of what `_by_layer` made."""
    return matrices.transpose(0, 1).flatten(1)
