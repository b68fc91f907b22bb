"""Reduces the rank of a LoRA: the closest matrices of a smaller rank, by singular value decomposition. Pure."""

from __future__ import annotations

import dataclasses

import torch

from finetune_trainer.models.layouts.trained import LowRank, TrainedAdapter


def with_rank(trained: TrainedAdapter, rank: int | None) -> TrainedAdapter:
    """Return a LoRA of at most this rank; None changes nothing."""
    if rank is None:
        return trained
    layers = {name: reduce_rank(layer, rank) for name, layer in trained.layers.items()}
    return dataclasses.replace(trained, layers=layers)


@torch.no_grad()
def reduce_rank(layer: LowRank, rank: int) -> LowRank:
    """Return the adapter of this rank whose effect is the closest one in the Frobenius norm (Eckart and Young, 1936).

    The product is never computed: with B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of the small
    matrix R_b R_a^T.
    """
    if rank >= layer.rank:
        return layer
    up, down = layer.up.flatten(1).double() * layer.scale, layer.down.flatten(1).double()
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.t())
    left, values, right = torch.linalg.svd(r_up @ r_down.t())
    roots = values[:rank].sqrt()
    new_up = (q_up @ left[:, :rank]) * roots
    new_down = roots[:, None] * (right[:rank] @ q_down.t())
    return LowRank(
        down=new_down.to(layer.down.dtype).reshape(rank, *layer.down.shape[1:]).contiguous(),
        up=new_up.to(layer.up.dtype).reshape(len(layer.up), rank, *layer.up.shape[2:]).contiguous(),
        alpha=float(rank),
        magnitude=layer.magnitude,
    )
