"""Draws all random numbers of a run. Each draw has its own generator, keyed by its purpose and its sample.

Philox is a counter-based generator: its key is (seed, purpose) and its counter starts at (epoch, sample). A draw
therefore does not depend on the rank, the device or earlier draws, and a resumed run makes the same draws.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from finetune_trainer.data.sampling.order import SampleRef

_MASK64 = (1 << 64) - 1


class Purpose(IntEnum):
    """The purpose of a draw. The numbers are part of a run's identity: never change or reuse one."""

    NOISE = 1
    TIMESTEP = 2
    LATENT = 3
    """Sampling the VAE's posterior."""
    CROP = 4
    FLIP = 5
    INIT = 6
    """Initial weights of parts that are trained from scratch."""
    DROPOUT = 7
    """Dropout of modules, keyed by (step, position) instead of (epoch, sample)."""
    PICTURE = 8
    """Initial noise of a validation picture or a class image."""
    OFFSET = 9
    """Noise offset."""
    PERTURBATION = 10
    """Input perturbation: noise that is added to the input only."""
    CAPTION = 11
    """Whether a caption is dropped."""
    SENTENCE = 12
    """Prompt template around a new token."""
    PRIOR = 13
    """Class image that is paired with a sample."""
    CONDITION = 14
    """Whether ControlNet's condition is dropped."""
    CHOICE = 15
    """Caption of a sample that has several."""
    TAGS = 16
    """Order of the tags of a caption."""


class Draws:
    """The draws of one run."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def normal(self, purpose: Purpose, ref: SampleRef, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers, float32, on the CPU."""
        return torch.from_numpy(self._generator(purpose, ref).standard_normal(shape, dtype=np.float32))

    def integer(self, purpose: Purpose, ref: SampleRef, end: int) -> int:
        """Draw an integer from 0 to `end`, exclusive."""
        return int(self._generator(purpose, ref).integers(end))

    def uniform(self, purpose: Purpose, ref: SampleRef, count: int) -> list[float]:
        """Draw numbers from 0 to 1, exclusive."""
        return [float(value) for value in self._generator(purpose, ref).random(count)]

    def order(self, purpose: Purpose, ref: SampleRef, count: int) -> list[int]:
        """Draw an order of `count` items."""
        numbers = self.uniform(purpose, ref, count)
        return sorted(range(count), key=lambda item: (numbers[item], item))

    def torch_seed(self, purpose: Purpose, ref: SampleRef) -> int:
        """Draw a seed for torch's global generator, which some modules use (dropout, initial weights)."""
        return int(self._generator(purpose, ref).integers(1 << 63))

    def _generator(self, purpose: Purpose, ref: SampleRef) -> np.random.Generator:
        key = np.array([self._seed & _MASK64, purpose], dtype=np.uint64)
        counter = np.array([0, 0, ref.epoch, ref.index], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))
