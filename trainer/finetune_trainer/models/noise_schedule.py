"""The forward diffusion process: how noise is added, what the model is asked for, and how losses are weighted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.errors import ConfigError


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete noise schedule (DDPM, https://arxiv.org/abs/2006.11239).

    Attributes:
        alphas_cumprod: share of the signal's variance that is left at each timestep, float64 (num_timesteps,): at the
            first timesteps 1 - alphas_cumprod is so small that float32 would lose three digits of it.
        prediction_type: "epsilon" (the noise) or "v_prediction" (https://arxiv.org/abs/2202.00512).
    """

    alphas_cumprod: Tensor
    prediction_type: str

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps."""
        return len(self.alphas_cumprod)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise; latents and noise (n, ...), timesteps (n,)."""
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should say: the noise, or v = sqrt(a_t) noise - sqrt(1 - a_t) x_0."""
        if self.prediction_type == "epsilon":
            return noise
        signal, sigma = self._coefficients(timesteps, latents)
        return signal * noise - sigma * latents

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Min-SNR-gamma weights (https://arxiv.org/abs/2303.09556), float32 (n,).

        min(SNR, gamma) is the weight of the loss in x_0; in the noise it is divided by SNR, in v by SNR + 1.
        """
        alphas = self.alphas_cumprod[timesteps]
        snr = alphas / (1 - alphas)
        divisor = snr if self.prediction_type == "epsilon" else snr + 1
        return (snr.clamp(max=gamma) / divisor).float()

    def to(self, device: torch.device) -> NoiseSchedule:
        """The same on a device."""
        return NoiseSchedule(self.alphas_cumprod.to(device), self.prediction_type)

    def _coefficients(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alphas = self.alphas_cumprod[timesteps].view(-1, *([1] * (like.dim() - 1)))
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)


def read_schedule(config: Mapping[str, Any]) -> NoiseSchedule:
    """Build the schedule that a base model's scheduler_config.json describes.

    Raises:
        ConfigError: it asks for something unknown.
    """
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"model.base: its scheduler predicts {prediction_type!r}; use a base with epsilon or v_prediction"
        )
    count = int(config.get("num_train_timesteps", 1000))
    betas = _betas(str(config.get("beta_schedule", "linear")), config, count)
    if config.get("rescale_betas_zero_snr"):
        raise ConfigError("model.base: its scheduler has rescale_betas_zero_snr; use a base without")
    return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0), prediction_type)


def _betas(kind: str, config: Mapping[str, Any], count: int) -> Tensor:
    """Variances of the steps, float64 (count,)."""
    start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2
    raise ConfigError(f"model.base: its scheduler has beta_schedule {kind!r}; use a base with linear or scaled_linear")
