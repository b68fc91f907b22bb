"""Tests of the noise schedule and the loss, against diffusers and the formulas of the papers in numpy."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, schedulers
from torch import Tensor

from finetune_trainer.data.batches import Batch
from finetune_trainer.errors import ConfigError
from finetune_trainer.methods.loss import diffusion_losses
from finetune_trainer.models.noise_schedule import (
    _OTHER_PROCESS,
    SAMPLING_FIELDS,
    SCHEDULERS,
    TRAINING_FIELDS,
    read_objective,
)

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# The error of diffusers' own computation in float32.
TOLERANCE = 1e-4
TIMESTEPS = torch.tensor([0, 1, 250, 998, 999])

# numpy's warnings about the arithmetic of some schedulers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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


def test_class_images_are_not_weighted_by_min_snr() -> None:
    """The prior preservation loss is that of the base, as in the DreamBooth script of diffusers."""
    # The last samples have the least noise, so Min-SNR would lower their weight.
    weights = torch.tensor([1, 1, 1, 0.5, 0.5])
    batch = dataclasses.replace(make_batch(), timesteps=TIMESTEPS.flip(0), num_prior=2, weights=weights)
    losses = diffusion_losses(batch, read_objective(CONFIG), lambda noisy, _: noisy / 2, 5.0)
    plain = plain_losses(batch, "epsilon", None) * [1, 1, 1, 0.5, 0.5]
    weighted = plain_losses(batch, "epsilon", 5.0)
    np.testing.assert_allclose(losses.numpy(), [*weighted[:3], *plain[3:]], rtol=2e-6)
    assert weighted[3] < plain[3]


def test_schedule_uses_trained_betas() -> None:
    schedule = read_objective({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2})
    assert schedule.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72])


ALL = {
    name: value
    for name, value in ((name, getattr(schedulers, name)) for name in dir(schedulers) if name.endswith("Scheduler"))
    if not hasattr(value, "_backends")
}
"""The schedulers of this release of diffusers whose packages are installed."""
KNOWN = [name for name in SCHEDULERS if name in ALL]
KINDS = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


def fields_of(name: str) -> dict[str, Any]:
    """Return the fields of a scheduler with their defaults."""
    fields = inspect.signature(ALL[name].__init__).parameters
    return {field: each.default for field, each in fields.items() if field not in ("self", "kwargs")}


def reference_alphas(name: str, config: dict[str, Any]) -> Tensor | None:
    """Return alphas_cumprod as diffusers computes it; None if the class does not have this schedule."""
    try:
        alphas: Tensor = ALL[name](**config).alphas_cumprod
    except NotImplementedError:
        return None
    return alphas


@pytest.mark.parametrize("name", KNOWN)
def test_schedule_of_each_class_is_that_of_diffusers(name: str) -> None:
    """Without any field, the defaults of the class apply; they differ from class to class."""
    ours = read_objective({"_class_name": name, "num_train_timesteps": 50})
    theirs = ALL[name](num_train_timesteps=50).alphas_cumprod
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs, rtol=TOLERANCE, atol=1e-6)
    assert ours.prediction_type == "epsilon"


def test_every_beta_schedule_of_diffusers_is_read() -> None:
    compared = set()
    for name, kind in itertools.product(("DDPMScheduler", "HeunDiscreteScheduler", "LCMScheduler"), KINDS):
        config = {"beta_schedule": kind, "num_train_timesteps": 50, "beta_start": 0.001, "beta_end": 0.02}
        theirs = reference_alphas(name, config)
        if theirs is None:
            continue
        ours = read_objective({**config, "_class_name": name}).alphas_cumprod
        torch.testing.assert_close(ours.float(), theirs, rtol=TOLERANCE, atol=1e-6)
        compared.add(kind)
    assert compared == set(KINDS)


def test_schedule_without_signal_at_the_last_timestep() -> None:
    config = {**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ours, theirs, batch = read_objective(config), DDPMScheduler(**config), make_batch()
    assert ours.alphas_cumprod[-1] == 0
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    # The last sample is pure noise, and its target is the negative picture.
    noisy = ours.add_noise(batch.latents, batch.noise, TIMESTEPS)
    assert torch.equal(noisy[-1], batch.noise[-1])
    target = ours.target(batch.latents, batch.noise, TIMESTEPS)
    assert torch.equal(target[-1], -batch.latents[-1])
    torch.testing.assert_close(target, theirs.get_velocity(batch.latents, batch.noise, TIMESTEPS), rtol=1e-3, atol=1e-3)
    weights = ours.loss_weights(TIMESTEPS, 5.0)
    assert weights is not None
    assert weights.isfinite().all()
    # The first sampling step starts there.
    drawn = ours.denoise(batch.noise[-1:], target[-1:], 999, 0)
    torch.testing.assert_close(drawn, ours.add_noise(batch.latents, batch.noise, TIMESTEPS * 0)[-1:])


@pytest.mark.parametrize("name", KNOWN)
def test_every_field_of_a_supported_scheduler_is_classified(name: str) -> None:
    unknown = fields_of(name).keys() - TRAINING_FIELDS - SAMPLING_FIELDS - _OTHER_PROCESS.keys()
    assert unknown == set(), "add them to TRAINING_FIELDS (and read them) or to SAMPLING_FIELDS (noise_schedule.py)"


@pytest.mark.parametrize("name", sorted(ALL.keys() - SCHEDULERS.keys()))
def test_schedulers_of_other_processes_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.base: its scheduler {name} \(.*\) is not supported; use a base"):
        read_objective({"_class_name": name, "num_train_timesteps": 1000, "sigma_data": 0.5})


def test_the_class_in_the_index_counts_as_well() -> None:
    """Pipelines use the class of model_index.json; a wrong one in the configuration must not hide it."""
    with pytest.raises(ConfigError, match="EDMEulerScheduler"):
        read_objective({**CONFIG, "_class_name": "DDPMScheduler"}, "EDMEulerScheduler")
    assert read_objective(CONFIG, "EulerDiscreteScheduler").num_timesteps == 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"prediction_type": "sample"},
            "model.base: prediction_type 'sample' of its scheduler is not supported; use a base with epsilon",
        ),
        (
            {"beta_schedule": "cosine"},
            "model.base: beta_schedule 'cosine' of its scheduler is not supported; use a base with one of linear",
        ),
        (
            {"rescale_betas_zero_snr": True},
            "model.base: rescale_betas_zero_snr of its scheduler with prediction_type 'epsilon' is not supported; use",
        ),
        ({"prediction_type": "flow_prediction"}, "model.base: prediction_type 'flow_prediction' of its scheduler"),
        ({"use_flow_sigmas": True}, "model.base: use_flow_sigmas: True of its scheduler .flow matching. is not"),
        ({"timestep_type": "continuous"}, "model.base: timestep_type: continuous of its scheduler .EDM"),
        ({"sigma_data": 1.0}, "model.base: sigma_data: 1.0 of its scheduler .EDM. is not supported"),
        ({"variance_type": "learned_range"}, "model.base: variance_type: learned_range of its scheduler"),
    ],
)
def test_unsupported_schedules_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_objective(config)
