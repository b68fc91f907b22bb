"""Which timestep and which noise a drawing of a sample gets, by the manifest's options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from finetune_contract.spec import BiasStrategy, TimestepBiasSpec, TrainingSpec
from finetune_trainer.data.sampling.draws import Draws, Purpose
from finetune_trainer.data.sampling.order import SampleRef


@dataclass(frozen=True)
class Noising:
    """How noise and timesteps are drawn; as it stands, the plain way.

    Attributes:
        offset: standard deviation of noise that is the same all over a channel.
        perturbation: standard deviation of noise that is added to the input, and not to the target.
        bias: timesteps that are drawn more often.
    """

    offset: float = 0.0
    perturbation: float = 0.0
    bias: TimestepBiasSpec | None = None

    @classmethod
    def of(cls, training: TrainingSpec) -> Noising:
        """What the manifest asks for."""
        return cls(training.noise_offset or 0.0, training.input_perturbation or 0.0, training.timestep_bias)

    def timestep(self, draws: Draws, ref: SampleRef, num_timesteps: int) -> int:
        """Timestep of a drawing."""
        if self.bias is None:
            return draws.integer(Purpose.TIMESTEP, ref, num_timesteps)
        sums = np.cumsum(timestep_weights(self.bias, num_timesteps))
        place = draws.uniform(Purpose.TIMESTEP, ref, 1)[0] * sums[-1]
        return min(int(np.searchsorted(sums, place, side="right")), num_timesteps - 1)

    def noise(self, draws: Draws, ref: SampleRef, shape: tuple[int, ...]) -> Tensor:
        """The noise that is learnt, float32 of shape (C, h, w)."""
        noise = draws.normal(Purpose.NOISE, ref, shape)
        if self.offset > 0:
            noise = noise + self.offset * draws.normal(Purpose.OFFSET, ref, (shape[0], 1, 1))
        return noise

    def mixed(self, draws: Draws, ref: SampleRef, noise: Tensor) -> Tensor:
        """The noise that is mixed into the input, where the learnt noise is given."""
        if self.perturbation == 0:
            return noise
        return noise + self.perturbation * draws.normal(Purpose.PERTURBATION, ref, tuple(noise.shape))


def timestep_weights(bias: TimestepBiasSpec, num_timesteps: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """How often each timestep is drawn, up to a factor, (num_timesteps,)."""
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
