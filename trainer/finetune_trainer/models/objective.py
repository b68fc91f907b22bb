"""Interface of a training objective: how latents are noised, what the denoiser predicts, and how the loss is weighted.

Each family returns the objective that its base was trained with. The loss, the samplers of timesteps and the drawing
of pictures use only this interface.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """A training objective over a fixed number of timesteps; the noise grows with the timestep."""

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps; valid ones are 0 to num_timesteps - 1."""
        ...

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents; latents and noise are (n, ...), timesteps (n,)."""
        ...

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the value that the denoiser should predict; shapes as for `add_noise`."""
        ...

    def loss_weights(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | None:
        """Return the loss weight of each timestep, float32 (n,), or None if all weights are 1.

        Args:
            timesteps: int64 (n,).
            snr_gamma: gamma of the Min-SNR weights, or None for unweighted losses.
        """
        ...

    def denoise(self, latents: Tensor, prediction: Tensor, timestep: int, next_timestep: int) -> Tensor:
        """Return the latents of the sampling step from `timestep` to the smaller `next_timestep`.

        Args:
            latents: latents at `timestep`, (n, ...).
            prediction: output of the denoiser for them, the same shape.
            timestep: current timestep.
            next_timestep: timestep after this step.
        """
        ...

    def to(self, device: torch.device) -> Objective:
        """Return a copy whose tensors are on `device`."""
        ...
