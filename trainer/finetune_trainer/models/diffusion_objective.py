"""The objective of discrete diffusion models (DDPM): the denoiser predicts the noise (epsilon) or v."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DiffusionObjective:
    """A discrete noise schedule with its prediction type (https://arxiv.org/abs/2006.11239); see `Objective`.

    Attributes:
        alphas_cumprod: fraction of the signal's variance that remains at each timestep, float64 (num_timesteps,). At
            the first timesteps 1 - alphas_cumprod is so small that float32 would lose three digits of it.
        prediction_type: "epsilon" (the noise) or "v_prediction" (https://arxiv.org/abs/2202.00512).
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps."""
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; latents and noise are (n, ...), timesteps (n,)."""
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * noise - sigma * latents

    def loss_weights(self, timesteps: Tensor, snr_gamma: float | None) -> Tensor | None:
        """Return the Min-SNR-gamma weights (https://arxiv.org/abs/2303.09556), float32 (n,); None without a gamma.

        min(SNR, gamma) is the weight of the loss in x_0. For the loss in the noise it is divided by SNR, for the loss
        in v by SNR + 1.
        """
        if snr_gamma is None:
            return None
        alphas = self.alphas_cumprod[timesteps]
        snr = alphas / (1 - alphas)
        divisor = snr if self.prediction_type == "epsilon" else snr + 1
        return (snr.clamp(max=snr_gamma) / divisor).float()

    def denoise(self, latents: Tensor, prediction: Tensor, timestep: int, next_timestep: int) -> Tensor:
        """Return the latents of one step of deterministic DDIM (https://arxiv.org/abs/2010.02502, eq. 12)."""
        alpha, next_alpha = self.alphas_cumprod[timestep].item(), self.alphas_cumprod[next_timestep].item()
        signal, sigma = math.sqrt(alpha), math.sqrt(1 - alpha)
        if self.prediction_type == "epsilon":
            clean, noise = (latents - sigma * prediction) / signal, prediction
        else:
            clean, noise = signal * latents - sigma * prediction, signal * prediction + sigma * latents
        return math.sqrt(next_alpha) * clean + math.sqrt(1 - next_alpha) * noise

    def to(self, device: torch.device) -> DiffusionObjective:
        """Return a copy on `device`."""
        return DiffusionObjective(self.alphas_cumprod.to(device), self.prediction_type)

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[timesteps].view(-1, *([1] * (like.dim() - 1)))
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)
