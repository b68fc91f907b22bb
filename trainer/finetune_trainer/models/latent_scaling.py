"""The map between the latents of a VAE and those that the denoiser was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.errors import ConfigError


@dataclass(frozen=True)
class LatentScaling:
    """The denoiser's latents are (latents - mean) * factor / std.

    Attributes:
        factor: scaling_factor of the VAE.
        mean: mean of each channel, float32 (C, 1, 1); None for 0.
        std: standard deviation of each channel, float32 (C, 1, 1); None for 1.
    """

    factor: float
    mean: Tensor | None = None
    std: Tensor | None = None

    def scale(self, latents: Tensor) -> Tensor:
        """Return the denoiser's latents for latents (..., C, h, w) of the VAE."""
        if self.mean is None or self.std is None:
            return latents * self.factor
        return (latents - self.mean.to(latents)) * self.factor / self.std.to(latents)

    def unscale(self, latents: Tensor) -> Tensor:
        """Return the latents of the VAE for the denoiser's latents (..., C, h, w)."""
        if self.mean is None or self.std is None:
            return latents / self.factor
        return latents * self.std.to(latents) / self.factor + self.mean.to(latents)


def read_scaling(config: Mapping[str, Any], field: str, normalizes: bool) -> LatentScaling:
    """Return the scaling of a VAE.

    Args:
        config: the VAE's config.json.
        field: field of the manifest that names the VAE, for messages.
        normalizes: whether the pipelines of the family apply latents_mean and latents_std.

    Raises:
        ConfigError: pipelines of the family would not invert the scaling.
    """
    factor = float(config.get("scaling_factor") or 0.18215)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if config.get("shift_factor"):
        raise ConfigError(
            f"{field}: shift_factor {config['shift_factor']} of the VAE is not supported, since pipelines of this "
            "family do not apply it; use a VAE without shift_factor"
        )
    if mean is None and std is None:
        return LatentScaling(factor)
    if not normalizes:
        raise ConfigError(
            f"{field}: latents_mean and latents_std of the VAE are not supported, since pipelines of this family do "
            "not apply them; use a VAE without them, or an SDXL base"
        )
    if mean is None or std is None or len(mean) != len(std):
        raise ConfigError(
            f"{field}: latents_mean and latents_std of the VAE do not belong together; use a VAE with a value of both "
            "for each channel"
        )
    return LatentScaling(factor, *(torch.tensor(each, dtype=torch.float32).view(-1, 1, 1) for each in (mean, std)))
