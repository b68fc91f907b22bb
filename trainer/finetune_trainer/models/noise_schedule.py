"""Reads the noise schedule of a base from its scheduler's configuration. Refuses what the trainer does not implement.

A base is trained with one noise process, and its scheduler describes it: the class, the betas and the prediction type.
Most fields only choose how pictures are sampled from the trained model, and training ignores them. `TRAINING_FIELDS`,
`SAMPLING_FIELDS` and `_OTHER_PROCESS` together name every field of the supported classes; a test compares them with
diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from finetune_trainer.errors import ConfigError
from finetune_trainer.models.diffusion_objective import DiffusionObjective

_Betas = tuple[float, float, str]
_OWN: _Betas = (0.0001, 0.02, "linear")
_KARRAS: _Betas = (0.00085, 0.012, "linear")
_LATENT: _Betas = (0.00085, 0.012, "scaled_linear")

SCHEDULERS: dict[str, _Betas] = {
    "DDPMScheduler": _OWN,
    "DDPMParallelScheduler": _OWN,
    "DDIMScheduler": _OWN,
    "DDIMInverseScheduler": _OWN,
    "DDIMParallelScheduler": _OWN,
    "PNDMScheduler": _OWN,
    "LMSDiscreteScheduler": _OWN,
    "EulerDiscreteScheduler": _OWN,
    "EulerAncestralDiscreteScheduler": _OWN,
    "DEISMultistepScheduler": _OWN,
    "DPMSolverMultistepScheduler": _OWN,
    "DPMSolverMultistepInverseScheduler": _OWN,
    "DPMSolverSinglestepScheduler": _OWN,
    "SASolverScheduler": _OWN,
    "UniPCMultistepScheduler": _OWN,
    "HeunDiscreteScheduler": _KARRAS,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "DPMSolverSDEScheduler": _KARRAS,
    "LCMScheduler": _LATENT,
    "TCDScheduler": _LATENT,
}
"""Schedulers of discrete diffusion (DDPM) with their defaults of beta_start, beta_end and beta_schedule."""

TRAINING_FIELDS = frozenset(
    {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
    }
)
"""Fields that describe the noise process."""
SAMPLING_FIELDS = frozenset(
    {
        "algorithm_type",
        "clip_sample",
        "clip_sample_range",
        "corrector_order",
        "disable_corrector",
        "dynamic_thresholding_ratio",
        "euler_at_final",
        "final_sigmas_type",
        "flow_shift",
        "interpolation_type",
        "lambda_min_clipped",
        "lower_order_final",
        "noise_sampler_seed",
        "original_inference_steps",
        "predict_x0",
        "predictor_order",
        "sample_max_value",
        "set_alpha_to_one",
        "shift_terminal",
        "sigma_max",
        "sigma_min",
        "skip_prk_steps",
        "solver_order",
        "solver_p",
        "solver_type",
        "steps_offset",
        "tau_func",
        "thresholding",
        "time_shift_type",
        "timestep_scaling",
        "timestep_spacing",
        "use_beta_sigmas",
        "use_dynamic_shifting",
        "use_exponential_sigmas",
        "use_karras_sigmas",
        "use_lu_lambdas",
    }
)
"""Fields that only choose the steps from noise to a picture. `flow_shift` and its like need `use_flow_sigmas`."""
LEARNED_VARIANCES = ("learned", "learned_range")
_PREDICTIONS = ("epsilon", "v_prediction")
_MAX_BETA = 0.999


@dataclass(frozen=True)
class _OtherProcess:
    """A field that turns a discrete schedule into another noise process."""

    applies: Callable[[Any], bool]
    process: str


_OTHER_PROCESS: dict[str, _OtherProcess] = {
    "use_flow_sigmas": _OtherProcess(bool, "flow matching"),
    "timestep_type": _OtherProcess(lambda value: value == "continuous", "EDM, with continuous noise levels"),
    "sigma_data": _OtherProcess(lambda value: value is not None, "EDM"),
    "snr_shift_scale": _OtherProcess(lambda value: value not in (None, 1, 1.0), "a shifted signal-to-noise ratio"),
    "variance_type": _OtherProcess(lambda value: value in LEARNED_VARIANCES, "a learned variance"),
}


def read_objective(config: Mapping[str, Any], scheduler: str | None = None) -> DiffusionObjective:
    """Return the objective that a base's scheduler describes.

    Args:
        config: its scheduler_config.json.
        scheduler: its class in the base's model_index.json, which pipelines use; None for the one of `config`.

    Raises:
        ConfigError: the noise process is not supported.
    """
    name = str(scheduler or config.get("_class_name") or "DDPMScheduler")
    _check_process({name, str(config.get("_class_name", name))}, config)
    prediction_type = config.get("prediction_type") or "epsilon"
    if prediction_type not in _PREDICTIONS:
        raise _unsupported(
            f"prediction_type {prediction_type!r} of its scheduler", f"a base with {' or '.join(_PREDICTIONS)}"
        )
    alphas = torch.cumprod(1.0 - _betas(name, config), dim=0)
    if config.get("rescale_betas_zero_snr"):
        if prediction_type == "epsilon":
            # The last timestep is pure noise: its noise is known and says nothing about the picture.
            raise _unsupported(
                "rescale_betas_zero_snr of its scheduler with prediction_type 'epsilon'",
                "a base with prediction_type v_prediction, or without rescale_betas_zero_snr",
            )
        alphas = _rescale_to_zero_snr(alphas)
    return DiffusionObjective(alphas, prediction_type)


def _check_process(names: set[str], config: Mapping[str, Any]) -> None:
    for name in sorted(names):
        if name not in SCHEDULERS:
            raise _unsupported(
                f"its scheduler {name} ({_process_of(name)})",
                "a base that was trained by discrete diffusion, e.g. with DDPMScheduler or EulerDiscreteScheduler",
            )
    for field, other in _OTHER_PROCESS.items():
        if field in config and other.applies(config[field]):
            raise _unsupported(
                f"{field}: {config[field]} of its scheduler ({other.process})",
                "a base that was trained by discrete diffusion with epsilon or v_prediction",
            )


def _process_of(name: str) -> str:
    """Return the noise process of an unsupported scheduler for a message."""
    if name.startswith("EDM") or name in ("KarrasVeScheduler", "CosineDPMSolverMultistepScheduler"):
        return "EDM: continuous noise levels with preconditioning"
    if name.startswith("Flow"):
        return "flow matching"
    return "another noise process"


def _unsupported(what: str, remedy: str) -> ConfigError:
    return ConfigError(f"model.base: {what} is not supported; use {remedy}")


def _betas(scheduler: str, config: Mapping[str, Any]) -> Tensor:
    """Return the noise variance that each timestep adds, float64 (num_train_timesteps,).

    Raises:
        ConfigError: the schedule is unknown.
    """
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.tensor(trained, dtype=torch.float64)
    default_start, default_end, default_kind = SCHEDULERS[scheduler]
    start, end = float(config.get("beta_start", default_start)), float(config.get("beta_end", default_end))
    kind, count = str(config.get("beta_schedule", default_kind)), int(config.get("num_train_timesteps", 1000))
    if kind == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float64)) * (end - start) + start
    if kind in _SIGNALS:
        return _betas_of_signal(_SIGNALS[kind], count)
    known = ", ".join(["linear", "scaled_linear", "sigmoid", *_SIGNALS])
    raise _unsupported(f"beta_schedule {kind!r} of its scheduler", f"a base with one of {known}")


def _cosine(time: float) -> float:
    """Return the remaining signal of the cosine schedule (https://arxiv.org/abs/2102.09672, eq. 17)."""
    return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(time: float) -> float:
    """Return the remaining signal if the log-SNR is Laplace distributed (https://arxiv.org/abs/2407.03297)."""
    offset = 0.5 - time
    log_snr = -0.5 * math.copysign(1, offset) * math.log(1 - 2 * abs(offset) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


_SIGNALS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": _cosine,
    "laplace": _laplace,
    "exp": lambda time: math.exp(-12.0 * time),
}
"""Schedules that are defined by the remaining signal at a time from 0 to 1."""


def _betas_of_signal(signal: Callable[[float], float], count: int) -> Tensor:
    times = [number / count for number in range(count + 1)]
    betas = [min(1 - signal(after) / signal(before), _MAX_BETA) for before, after in pairwise(times)]
    return torch.tensor(betas, dtype=torch.float64)


def _rescale_to_zero_snr(alphas_cumprod: Tensor) -> Tensor:
    """Return a schedule without signal at the last timestep (https://arxiv.org/abs/2305.08891, algorithm 1)."""
    signal = alphas_cumprod.sqrt()
    first, last = signal[0].clone(), signal[-1].clone()
    return ((signal - last) * first / (first - last)) ** 2
