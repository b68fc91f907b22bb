"""The loss that all text-to-image methods share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finetune_trainer.data.batches import Batch
from finetune_trainer.models.objective import Objective

Predict = Callable[[Tensor, Tensor], Tensor]


def diffusion_losses(batch: Batch, objective: Objective, predict: Predict, snr_gamma: float | None) -> Tensor:
    """Return the weighted mean squared error between prediction and target of each sample.

    With a discrete noise schedule this is the simple loss of DDPM (https://arxiv.org/abs/2006.11239, eq. 14), in the
    noise or in v, optionally with Min-SNR weights (https://arxiv.org/abs/2303.09556).

    Args:
        batch: n samples.
        objective: the base's objective: noising, target and loss weights.
        predict: the denoiser, of noisy latents and timesteps.
        snr_gamma: gamma of the Min-SNR weights, or None for equal weights. They apply to the images of the data set:
            the loss of class images, which keeps what the base has learned, stays that of the base.

    Returns:
        float32 (n,).
    """
    mixed = batch.noise if batch.mixed is None else batch.mixed
    noisy = objective.add_noise(batch.latents, mixed, batch.timesteps)
    target = objective.target(batch.latents, batch.noise, batch.timesteps)
    losses = (predict(noisy, batch.timesteps).float() - target).square().flatten(1).mean(1)
    weights = objective.loss_weights(batch.timesteps, snr_gamma)
    if weights is not None:
        num_weighted = len(losses) - batch.num_prior
        losses = torch.cat([losses[:num_weighted] * weights[:num_weighted], losses[num_weighted:]])
    return losses if batch.weights is None else losses * batch.weights
