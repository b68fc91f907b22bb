"""Reduces the rank of a LoRA: the closest matrices of a smaller rank, by singular value decomposition. Pure."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from finetune_trainer.models.layouts.trained import LowRank, TrainedAdapter
from finetune_trainer.weights.lazy import LazyTensor


def with_rank(trained: TrainedAdapter, rank: int | None) -> TrainedAdapter:
    """Return a LoRA of at most this rank; None changes nothing."""
    if rank is None:
        return trained
    # Writers read the matrices of a layer one after the other.
    closest = functools.lru_cache(maxsize=1)(closest_matrices)
    layers = {name: reduce_rank(layer, rank, closest) for name, layer in trained.layers.items()}
    return dataclasses.replace(trained, layers=layers)


def reduce_rank(layer: LowRank, rank: int, closest: Callable[[LowRank, int], tuple[Tensor, Tensor]]) -> LowRank:
    """Return the adapter of this rank that `closest` computes. The matrices are computed when they are read."""
    if rank >= layer.rank:
        return layer

    def lazy(source: LazyTensor, index: int, shape: tuple[int, ...]) -> LazyTensor:
        return LazyTensor(source.dtype, shape, lambda start, stop: closest(layer, rank)[index][start:stop])

    return LowRank(
        down=lazy(layer.down, 0, (rank, *layer.down.shape[1:])),
        up=lazy(layer.up, 1, (layer.up.num_rows, rank, *layer.up.shape[2:])),
        alpha=float(rank),
        magnitude=layer.magnitude,
    )


@torch.no_grad()
def closest_matrices(layer: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and B of this rank whose effect is the closest one in the Frobenius norm (Eckart and Young, 1936).

    The product is never computed: with B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of the small
    matrix R_b R_a^T.
    """
    up, down = layer.up.read().flatten(1).double() * layer.scale, layer.down.read().flatten(1).double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.t())
    left, values, right = torch.linalg.svd(r_up @ r_down.t())
    roots = values[:rank].sqrt()
    new_up = (q_up @ left[:, :rank]) * roots
    new_down = roots[:, None] * (right[:rank] @ q_down.t())
    return (
        new_down.to(layer.down.dtype).reshape(rank, *layer.down.shape[1:]).contiguous(),
        new_up.to(layer.up.dtype).reshape(layer.up.num_rows, rank, *layer.up.shape[2:]).contiguous(),
    )
