"""Masks of dropout that recomputed activations repeat without saved random state, so that passes can be captured.

torch's gradient checkpointing saves the state of the generator before a block, and restores it for the recomputation. A
CUDA graph cannot contain this. Here each block of a pass has two generators, one for its forward pass and one for its
recomputation. Both get the same seed before each pass, and draw in the same order, so that the masks are equal. A graph
knows its generators: a replay reads their seeds of that moment.

`DenoiserMethod` uses it on GPUs for adapters with dropout and gradient checkpointing; CPUs keep the draws that they
have always had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

_STEP = 0x9E3779B97F4A7C15
"""Distance of the seeds of two blocks (https://doi.org/10.1145/2714064.2660195)."""


class MaskDraws:
    """The generators of the recomputed blocks of a pass.

    Args:
        device: device of the masks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: list[tuple[torch.Generator, torch.Generator]] = []
        self._seed = self._next = 0

    def seed(self, seed: int) -> None:
        """Set the seed of the next pass."""
        self._seed = seed
        for index in range(len(self._pairs)):
            self._seed_pair(index)
        self.restart()

    def restart(self) -> None:
        """Count the blocks of a pass from the first one again."""
        self._next = 0

    def block(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of the next block of a pass: of its forward pass and of its recomputation."""
        index = self._next
        self._next += 1
        if index == len(self._pairs):
            self._pairs.append((torch.Generator(self._device), torch.Generator(self._device)))
            self._seed_pair(index)
        first, again = self._pairs[index]
        return _drawing_from(first), _drawing_from(again)

    @property
    def generators(self) -> Sequence[torch.Generator]:
        """All generators that passes have used."""
        return [generator for pair in self._pairs for generator in pair]

    def _seed_pair(self, index: int) -> None:
        for generator in self._pairs[index]:
            generator.manual_seed((self._seed + _STEP * (index + 1)) % 2**63)


class _Current:
    """The generator of the block that computes now. The backward pass of a GPU runs in a thread of its own."""

    generator: torch.Generator | None = None


@contextlib.contextmanager
def _drawing_from(generator: torch.Generator) -> Iterator[None]:
    before, _Current.generator = _Current.generator, generator
    try:
        yield
    finally:
        _Current.generator = before


def draw_mask(shape: Sequence[int], keep: float, device: torch.device) -> Tensor:
    """Return independent draws that are true with the probability `keep`."""
    return torch.empty(tuple(shape), dtype=torch.bool, device=device).bernoulli_(keep, generator=_Current.generator)


class DrawnDropout(nn.Module):
    """Dropout with the masks of `draw_mask`.

    Args:
        p: probability of zero.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with some elements set to zero, and the others scaled."""
        if not self.training:
            return x
        return x * draw_mask(x.shape, 1 - self.p, x.device) / (1 - self.p)
