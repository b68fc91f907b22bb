"""Tests of the noise schedule and the loss, against diffusers and the formulas of the papers in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from finetune_trainer.data.batches import Batch
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.loss import diffusion_losses
from finetune_trainer.models.diffusion_objective import read_objective

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# The error of diffusers' own computation in float32.
TOLERANCE = 1e-4
TIMESTEPS = torch.tensor([0, 1, 250, 998, 999])


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn((2, 5, 4, 6, 6), generator=generator)
    return Batch(latents, noise, TIMESTEPS, ("",) * 5, {"hidden": torch.zeros(5, 1, 1)})


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_schedule_agrees_with_diffusers(kind: str, prediction_type: str) -> None:
    config: dict[str, Any] = {**CONFIG, "beta_schedule": kind, "prediction_type": prediction_type}
    schedule, reference, batch = read_objective(config), DDPMScheduler(**config), make_batch()
    torch.testing.assert_close(
        schedule.add_noise(batch.latents, batch.noise, TIMESTEPS),
        reference.add_noise(batch.latents, batch.noise, TIMESTEPS),
        rtol=TOLERANCE,
        atol=TOLERANCE,
    )
    target = schedule.target(batch.latents, batch.noise, TIMESTEPS)
    if prediction_type == "epsilon":
        assert target is batch.noise
    else:
        torch.testing.assert_close(
            target, reference.get_velocity(batch.latents, batch.noise, TIMESTEPS), rtol=TOLERANCE, atol=TOLERANCE
        )


def plain_losses(batch: Batch, prediction_type: str, gamma: float | None) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the losses of a model that predicts half of its input, by the formulas of the papers, in float64."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)[batch.timesteps.numpy()][:, None, None, None]
    clean, noise = batch.latents.double().numpy(), batch.noise.double().numpy()
    prediction = (alphas**0.5 * clean + (1 - alphas) ** 0.5 * noise) / 2
    snr = (alphas / (1 - alphas)).reshape(-1)
    if prediction_type == "epsilon":
        target, weight_of_noise = noise, snr
    else:
        target, weight_of_noise = alphas**0.5 * noise - (1 - alphas) ** 0.5 * clean, snr + 1
    weights = 1.0 if gamma is None else np.minimum(snr, gamma) / weight_of_noise
    return np.asarray(weights * ((prediction - target) ** 2).mean(axis=(1, 2, 3)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_losses_agree_with_the_formulas(prediction_type: str, gamma: float | None) -> None:
    batch = make_batch()
    schedule = read_objective({**CONFIG, "prediction_type": prediction_type})

    def half(noisy: Tensor, timesteps: Tensor) -> Tensor:
        return noisy / 2

    losses = diffusion_losses(batch, schedule, half, gamma)
    assert losses.dtype is torch.float32
    np.testing.assert_allclose(losses.numpy(), plain_losses(batch, prediction_type, gamma), rtol=2e-6)


def test_schedule_uses_trained_betas() -> None:
    schedule = read_objective({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2})
    assert schedule.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"prediction_type": "sample"},
            "model.base: prediction_type 'sample' of its scheduler is not supported; use a base with epsilon",
        ),
        (
            {"beta_schedule": "cosine"},
            "model.base: beta_schedule 'cosine' of its scheduler is not supported; use a base with linear",
        ),
        ({"rescale_betas_zero_snr": True}, "model.base: rescale_betas_zero_snr of its scheduler is not supported"),
    ],
)
def test_unsupported_schedules_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_objective(config)
