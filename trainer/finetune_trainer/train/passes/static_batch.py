"""A micro-batch at fixed addresses, which a captured pass reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.data.batches import Batch

_TENSORS = ("latents", "noise", "timesteps", "mixed", "weights", "conditioning")
_TEXT = "text."


@dataclass(frozen=True)
class BatchShape:
    """All that a captured pass assumes of a batch: equal shapes can share a graph.

    Attributes:
        tensors: name, dimensions and type of each tensor.
        num_prior: number of class images.
    """

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    num_prior: int

    @staticmethod
    def of(batch: Batch) -> BatchShape:
        """Return the shape of a batch."""
        named = _named_tensors(batch)
        return BatchShape(tuple((name, tuple(value.shape), value.dtype) for name, value in named), batch.num_prior)

    def __str__(self) -> str:
        """Return the dimensions of the latents, for messages."""
        return "x".join(map(str, self.tensors[0][1]))


class StaticBatch:
    """Copies of the tensors of a batch. Later batches of the same shape are copied into them."""

    def __init__(self, batch: Batch) -> None:
        copies = {name: value.clone() for name, value in _named_tensors(batch)}
        text = {name.removeprefix(_TEXT): value for name, value in copies.items() if name.startswith(_TEXT)}
        fields: dict[str, Any] = {name: copies[name] for name in _TENSORS if name in copies}
        self.batch: Batch = dataclasses.replace(batch, captions=(), text=text, **fields)
        """The batch at its fixed addresses. It has no captions: their tokens or embeddings are in `text`."""

    def fill(self, batch: Batch) -> None:
        """Copy a batch of the same shape."""
        for (_, target), (_, source) in zip(_named_tensors(self.batch), _named_tensors(batch), strict=True):
            target.copy_(source, non_blocking=True)


def _named_tensors(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    for name in _TENSORS:
        value = getattr(batch, name)
        if value is not None:
            yield name, value
    for name in sorted(batch.text):
        yield _TEXT + name, batch.text[name]
