"""Draws the timestep and the noise for each use of a sample, with the options of the manifest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from finetune_contract.spec import TrainingSpec
from finetune_contract.validation_spec import BiasStrategy, TimestepBiasSpec
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef


@dataclass(frozen=True)
class Noising:
    """Options for drawing noise and timesteps. The defaults give standard normal noise and uniform timesteps.

    Attributes:
        offset: standard deviation of additional noise that is constant over each channel.
        perturbation: standard deviation of additional noise that is added to the input only, not to the target.
        bias: timesteps that are drawn more often.
    """

    offset: float = 0.0
    perturbation: float = 0.0
    bias: TimestepBiasSpec | None = None

    @classmethod
    def of(cls, training: TrainingSpec) -> Noising:
        """Return the options of a manifest."""
        return cls(training.noise_offset or 0.0, training.input_perturbation or 0.0, training.timestep_bias)

    def timestep(self, draws: Draws, ref: SampleRef, num_timesteps: int) -> int:
        """Draw a timestep."""
        if self.bias is None:
            return draws.integer(Purpose.TIMESTEP, ref, num_timesteps)
        sums = np.cumsum(timestep_weights(self.bias, num_timesteps))
        point = draws.uniform(Purpose.TIMESTEP, ref, 1)[0] * sums[-1]
        return min(int(np.searchsorted(sums, point, side="right")), num_timesteps - 1)

    def noise(self, draws: Draws, ref: SampleRef, shape: tuple[int, ...]) -> Tensor:
        """Draw the noise of the training target, float32 of the latents' shape (C, ...)."""
        noise = draws.normal(Purpose.NOISE, ref, shape)
        if self.offset > 0:
            noise = noise + self.offset * draws.normal(Purpose.OFFSET, ref, (shape[0], *[1] * (len(shape) - 1)))
        return noise

    def mixed(self, draws: Draws, ref: SampleRef, noise: Tensor) -> Tensor:
        """Return the noise that is added to the input, given the noise of the training target."""
        if self.perturbation == 0:
            return noise
        return noise + self.perturbation * draws.normal(Purpose.PERTURBATION, ref, tuple(noise.shape))


def find_bias_fault(bias: TimestepBiasSpec, num_timesteps: int) -> str | None:
    """Return why a bias has no effect on a schedule, with the field and the remedy; None if it has one."""
    if bias.multiplier == 1:
        return None
    if bias.strategy is BiasStrategy.RANGE and bias.begin >= num_timesteps:
        return (
            f"training.timestepBias.begin: the base has the timesteps 0 to {num_timesteps - 1}, so the range from "
            f"{bias.begin} contains none; write a number below {num_timesteps}"
        )
    if len(set(timestep_weights(bias, num_timesteps))) > 1:
        return None
    remedy = "write a portion below 1"
    if bias.strategy is BiasStrategy.RANGE:
        remedy = f"write begin and end of a part of the timesteps 0 to {num_timesteps - 1}"
    return (
        "training.timestepBias: it selects every timestep of the base, so none is drawn more often than another; "
        f"{remedy}, or leave timestepBias out"
    )


def timestep_weights(bias: TimestepBiasSpec, num_timesteps: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the unnormalised probability of each timestep, (num_timesteps,)."""
    weights = np.ones(num_timesteps)
    count = max(1, round(bias.portion * num_timesteps))
    if bias.strategy is BiasStrategy.EARLIER:
        chosen = slice(0, count)
    elif bias.strategy is BiasStrategy.LATER:
        chosen = slice(num_timesteps - count, num_timesteps)
    else:
        chosen = slice(bias.begin, bias.end)
    weights[chosen] *= bias.multiplier
    return weights
