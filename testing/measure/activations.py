"""Activations that the forward pass of one step keeps for its backward pass, counted without data (meta tensors).

Called by tests. Temporary tensors of the backward pass are not counted: on an H100 the peaks of LoRA were 15 % (SDXL)
and 21 % (SD 1.5) higher.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from testing.measure.launches import LaunchCase, make_batch, make_method


class _FusedAttention(torch.autograd.Function):
    """Keeps what the attention kernels of a GPU keep; without data torch would keep the matrix of all weights."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    return _FusedAttention.apply(query, key, value)


def kept_bytes(case: LaunchCase) -> int:
    """Return the size of the activations that a forward pass keeps. Weights and their copies do not count."""
    method, batch = make_method(case), make_batch(case)
    weights = [value for module in method.modules() for value in [*module.parameters(), *module.buffers()]]
    excluded = {value.untyped_storage()._cdata for value in [*weights, *method.parameters().values()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            # The storage stays in memory, so that no other one gets its address.
            kept[storage._cdata] = storage
        return tensor

    with (
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        method.losses(method.prepare(batch)).sum()
    return sum(storage.nbytes() for storage in kept.values())
