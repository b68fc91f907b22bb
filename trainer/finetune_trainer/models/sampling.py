"""Sampling of latents with a denoiser, for validation pictures and for class images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from finetune_trainer.models.objective import Objective

Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def draw_latents(
    predict: Predict, objective: Objective, noise: Tensor, num_inference_steps: int, guidance_scale: float
) -> Tensor:
    """Sample the latents of one picture with classifier-free guidance (https://arxiv.org/abs/2207.12598).

    Args:
        predict: the denoiser, of noisy latents (2, ...) and timesteps (2,). The first of each pair is for the empty
            prompt, the second for the prompt.
        objective: the base's objective; it defines the sampling step.
        noise: initial noise, (1, ...).
        num_inference_steps: number of steps.
        guidance_scale: weight of the prompt.

    Returns:
        Scaled latents in the shape of the noise.
    """
    timesteps = torch.linspace(objective.num_timesteps - 1, 0, num_inference_steps + 1).round().long().tolist()
    latents = noise
    for timestep, next_timestep in pairwise(timesteps):
        both = torch.full((2,), timestep, dtype=torch.int64, device=noise.device)
        empty, prompted = predict(latents.expand(2, *latents.shape[1:]), both).float().chunk(2)
        prediction = empty + guidance_scale * (prompted - empty)
        latents = objective.denoise(latents, prediction, timestep, next_timestep)
    return latents
