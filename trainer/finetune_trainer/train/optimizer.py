"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from finetune_contract.spec import Optimizer as OptimizerName
from finetune_contract.spec import TrainingSpec
from finetune_trainer.errors import ConfigError

LearningRate = Callable[[int], float]


def make_optimizer(training: TrainingSpec, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that the manifest names.

    Raises:
        ConfigError: it is not there.
    """
    if training.optimizer is OptimizerName.ADAFACTOR:
        # https://arxiv.org/abs/1804.04235; its second moments take rows and columns in place of whole matrices.
        return torch.optim.Adafactor(
            list(parameters), lr=training.learning_rate, weight_decay=training.adam_weight_decay
        )
    if training.optimizer is not OptimizerName.ADAMW:
        raise ConfigError(f"training.optimizer: {training.optimizer.value} is not available; use adamw or adafactor")
    return torch.optim.AdamW(
        list(parameters),
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        weight_decay=training.adam_weight_decay,
        eps=training.adam_epsilon,
        fused=True,
    )


def learning_rate(training: TrainingSpec, total_steps: int) -> LearningRate:
    """The learning rate of each step, from 0, by diffusers' schedules; the same whatever the number of ranks."""
    from diffusers.optimization import get_scheduler  # noqa: PLC0415  slow to import

    # The scheduler is built for its formula alone: its own counter would have to be saved and restored.
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
    """Use a learning rate for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value
