"""An exponential moving average (EMA) of the trained parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

MAX_DECAY = 0.9999


def decay_at(step: int) -> float:
    """Return the decay at a finished step (from 1). It rises, so that the first steps lose their weight."""
    return min(MAX_DECAY, (1 + step) / (10 + step))


class Ema:
    """The average, kept in addition to the parameters."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self.tensors: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
        """The averaged weights, by the parameters' names."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the parameters after a step."""
        for name, average in self.tensors.items():
            average.lerp_(self._parameters[name], 1 - decay_at(step))

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this block the parameters hold the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """Swap values, not tensors: a parameter may share its memory with others."""
        for name, parameter in self._parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)
