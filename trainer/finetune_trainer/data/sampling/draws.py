"""Every random number of a run, each from a generator of its own keyed by what it is for.

Philox is a counter-based generator: its key is (seed, purpose) and its counter begins at (epoch, sample). So a draw
depends on neither the rank nor the device nor the draws before it, and a resumed run makes the same ones.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from finetune_trainer.data.sampling.order import SampleRef

_MASK64 = (1 << 64) - 1


class Purpose(IntEnum):
    """What a draw is for. The numbers are part of a run's identity: never change or reuse one."""

    NOISE = 1
    TIMESTEP = 2
    LATENT = 3
    """Sampling the VAE's posterior."""
    CROP = 4
    FLIP = 5
    INIT = 6
    """Weights that are trained from scratch."""
    DROPOUT = 7
    """Keyed by (step, position) in place of (epoch, sample)."""
    PICTURE = 8
    """Noise that a validation picture or a class image starts from."""
    OFFSET = 9
    """Noise offset."""
    PERTURBATION = 10
    """Noise added to the input only."""
    CAPTION = 11
    """Whether a caption is dropped."""
    SENTENCE = 12
    """Sentence around a new token."""
    PRIOR = 13
    """Class image that a sample is paired with."""
    CONDITION = 14
    """Whether ControlNet's condition is dropped."""


class Draws:
    """The draws of one run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def normal(self, purpose: Purpose, ref: SampleRef, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers, float32, on the CPU."""
        return torch.from_numpy(self._generator(purpose, ref).standard_normal(shape, dtype=np.float32))

    def integer(self, purpose: Purpose, ref: SampleRef, end: int) -> int:
        """An integer from 0 up to, and without, `end`."""
        return int(self._generator(purpose, ref).integers(end))

    def uniform(self, purpose: Purpose, ref: SampleRef, count: int) -> list[float]:
        """Numbers from 0 up to, and without, 1."""
        return [float(value) for value in self._generator(purpose, ref).random(count)]

    def torch_seed(self, purpose: Purpose, ref: SampleRef) -> int:
        """A seed for torch's global generator, where a module draws by itself (dropout, initial weights)."""
        return int(self._generator(purpose, ref).integers(1 << 63))

    def _generator(self, purpose: Purpose, ref: SampleRef) -> np.random.Generator:
        key = np.array([self._seed & _MASK64, purpose], dtype=np.uint64)
        counter = np.array([0, 0, ref.epoch, ref.index], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))
