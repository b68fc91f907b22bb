"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from finetune_contract.spec import Optimizer as OptimizerName
from finetune_contract.spec import TrainingSpec
from finetune_trainer.errors import ConfigError
from finetune_trainer.optim.prodigy import Prodigy

LearningRate = Callable[[int], float]


def make_optimizer(training: TrainingSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that the manifest names.

    Raises:
        ConfigError: it is not available on this device or in this image.
    """
    trained = list(parameters)
    common: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.adam_weight_decay}
    if training.optimizer is OptimizerName.ADAFACTOR:
        # https://arxiv.org/abs/1804.04235; it stores second moments per row and column instead of per element.
        return torch.optim.Adafactor(trained, **common)
    of_adam: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    if training.optimizer is OptimizerName.PRODIGY:
        return Prodigy(trained, **common, **of_adam)
    if training.optimizer is OptimizerName.ADAMW_8BIT:
        optimizer: torch.optim.Optimizer = _adamw_8bit(trained)(trained, **common, **of_adam)
        return optimizer
    return torch.optim.AdamW(trained, **common, **of_adam, fused=True)


def _adamw_8bit(parameters: Sequence[nn.Parameter]) -> Any:
    """Return the class of the optimizer with 8-bit moments (https://arxiv.org/abs/2110.02861).

    Raises:
        ConfigError: it does not support this device, or is not installed.
    """
    if any(parameter.device.type != "cuda" for parameter in parameters):
        raise ConfigError("training.optimizer: adamw8bit needs a GPU; write adamw or adafactor on CPUs")
    try:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit
    except ImportError as error:
        raise ConfigError(
            "training.optimizer: adamw8bit needs the package bitsandbytes, which is not installed in this image; "
            "install it, or write adafactor"
        ) from error


def learning_rate(training: TrainingSpec, total_steps: int) -> LearningRate:
    """Return the learning rate as a function of the step (from 0), by diffusers' schedules; same for all ranks."""
    from diffusers.optimization import get_scheduler  # noqa: PLC0415  slow to import

    # Only the scheduler's formula is used: its own step counter would have to be saved and restored.
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    schedule = get_scheduler(
        training.lr_scheduler.value,
        carrier,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: float(training.learning_rate * factor(step))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value
