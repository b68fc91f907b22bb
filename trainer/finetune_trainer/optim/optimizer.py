"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from finetune_contract.methods import peak_learning_rate
from finetune_contract.spec import LrScheduler, TrainingSpec
from finetune_contract.spec import Optimizer as OptimizerName
from finetune_trainer.optim.adafactor import Adafactor
from finetune_trainer.optim.prodigy import Prodigy

LearningRate = Callable[[int], float]
_LAST_RATE = 1e-7
"""Final learning rate of the polynomial schedule, as in diffusers; lower peaks fall to zero."""


_FACTOR = "factor"
"""Key in a parameter group: its learning rate as a multiple of the schedule's."""
_TEXT_PREFIX = "text_encoder"
"""Start of the names of text encoders' parameters."""


def make_optimizer(training: TrainingSpec, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that the manifest names.

    Args:
        training: the training settings.
        parameters: the trained parameters by name; those of text encoders start with "text_encoder".
    """
    trained = _parameter_groups(training, parameters)
    common: dict[str, Any] = {"lr": peak_learning_rate(training), "weight_decay": training.adam_weight_decay}
    if training.optimizer is OptimizerName.ADAFACTOR:
        return Adafactor(trained, **common)
    of_adam: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    if training.optimizer is OptimizerName.PRODIGY:
        return Prodigy(parameters.values(), **common, **of_adam)
    if training.optimizer is OptimizerName.ADAMW_8BIT:
        # 8-bit moments (https://arxiv.org/abs/2110.02861). `train.checks` has refused devices without it.
        optimizer: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
            trained, **common, **of_adam
        )
        return optimizer
    return torch.optim.AdamW(trained, **common, **of_adam, fused=True)


def _parameter_groups(training: TrainingSpec, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return one group, or two if the text encoders have their own learning rate."""
    rate = training.text_encoder_learning_rate
    if rate is None:
        return [{"params": list(parameters.values())}]
    is_text = {name: name.startswith(_TEXT_PREFIX) for name in parameters}
    own = [parameter for name, parameter in parameters.items() if not is_text[name]]
    text = [parameter for name, parameter in parameters.items() if is_text[name]]
    return [{"params": own}, {"params": text, _FACTOR: rate / peak_learning_rate(training)}]


def learning_rate(training: TrainingSpec, total_steps: int) -> LearningRate:
    """Return the learning rate as a function of the step (from 0), by diffusers' schedules; same for all ranks."""
    from diffusers.optimization import (  # noqa: PLC0415  slow to import
        get_polynomial_decay_schedule_with_warmup,
        get_scheduler,
    )

    peak, length = peak_learning_rate(training), (training.lr_warmup_steps, total_steps)
    # Only the scheduler's formula is used: its own step counter would have to be saved and restored.
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    if training.lr_scheduler is LrScheduler.POLYNOMIAL:
        last = _LAST_RATE if peak > _LAST_RATE else 0.0
        schedule = get_polynomial_decay_schedule_with_warmup(
            carrier, *length, lr_end=last, power=training.lr_power or 1.0
        )
    else:
        cycles = training.lr_num_cycles or 1
        schedule = get_scheduler(training.lr_scheduler.value, carrier, None, *length, num_cycles=cycles)
    factor = schedule.lr_lambdas[0]
    return lambda step: float(peak * factor(step))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(_FACTOR, 1.0)
