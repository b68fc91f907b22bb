"""The diffusion loss that all text-to-image methods share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from finetune_trainer.data.batches import Batch
from finetune_trainer.models.noise_schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor], Tensor]


def diffusion_losses(batch: Batch, schedule: NoiseSchedule, predict: Predict, snr_gamma: float | None) -> Tensor:
    """Mean squared error between the model's answer and the target, for each sample, times the sample's weight.

    Simple loss of DDPM (https://arxiv.org/abs/2006.11239, eq. 14), in the noise or in v, by the schedule; with
    Min-SNR weights (https://arxiv.org/abs/2303.09556) where `snr_gamma` is set.

    Args:
        batch: n samples.
        schedule: the base's noise schedule.
        predict: the model, of noisy latents and timesteps.
        snr_gamma: Min-SNR's gamma, or None for equal weights.

    Returns:
        float32 (n,).
    """
    mixed = batch.noise if batch.mixed is None else batch.mixed
    noisy = schedule.add_noise(batch.latents, mixed, batch.timesteps)
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    losses = (predict(noisy, batch.timesteps).float() - target).square().flatten(1).mean(1)
    if snr_gamma is not None:
        losses = losses * schedule.min_snr_weights(batch.timesteps, snr_gamma)
    return losses if batch.weights is None else losses * batch.weights
