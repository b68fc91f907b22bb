"""Drawing latents with a model: for validation pictures and for class images."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from finetune_trainer.models.noise_schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def draw_latents(
    predict: Predict, schedule: NoiseSchedule, noise: Tensor, num_inference_steps: int, guidance_scale: float
) -> Tensor:
    """Sample latents by deterministic DDIM (https://arxiv.org/abs/2010.02502) with classifier-free guidance.

    Args:
        predict: the model, of noisy latents (2, C, h, w) and timesteps (2,), the first for the empty prompt and the
            second for the prompt.
        schedule: its noise schedule.
        noise: where to begin, (1, C, h, w).
        num_inference_steps: number of steps.
        guidance_scale: weight of the prompt (https://arxiv.org/abs/2207.12598).

    Returns:
        Scaled latents (1, C, h, w).
    """
    alphas = schedule.alphas_cumprod.tolist()
    timesteps = torch.linspace(schedule.num_timesteps - 1, 0, num_inference_steps + 1).round().long().tolist()
    latents = noise
    for now, then in pairwise(timesteps):
        signal, sigma = math.sqrt(alphas[now]), math.sqrt(1 - alphas[now])
        both = torch.full((2,), now, dtype=torch.int64, device=noise.device)
        plain, guided = predict(latents.expand(2, -1, -1, -1), both).float().chunk(2)
        answer = plain + guidance_scale * (guided - plain)
        if schedule.prediction_type == "epsilon":
            clean, direction = (latents - sigma * answer) / signal, answer
        else:
            clean, direction = signal * latents - sigma * answer, signal * answer + sigma * latents
        latents = math.sqrt(alphas[then]) * clean + math.sqrt(1 - alphas[then]) * direction
    return latents
