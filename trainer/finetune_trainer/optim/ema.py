"""An exponential moving average of what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

MAX_DECAY = 0.9999


def decay_at(step: int) -> float:
    """Share of the average that is kept at a finished step (from 1); it rises, so the first steps are forgotten."""
    return min(MAX_DECAY, (1 + step) / (10 + step))


class Ema:
    """The average, beside the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        """The averaged weights, by the parameters' names."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after a step."""
        for name, average in self.tensors.items():
            average.lerp_(self._parameters[name], 1 - decay_at(step))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block the parameters hold the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By value: a parameter may share its memory with others."""
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
