"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from finetune_contract.methods import peak_learning_rate
from finetune_contract.spec import LrScheduler, TrainingSpec
from finetune_contract.spec import Optimizer as OptimizerName
from finetune_trainer.optim.adafactor import Adafactor
from finetune_trainer.optim.flat import flatten, storage_order
from finetune_trainer.optim.flat_optimizer import FlatOptimizer, StepOptimizer
from finetune_trainer.optim.prodigy import Prodigy
from finetune_trainer.optim.rounded_optimizer import RoundedOptimizer
from finetune_trainer.optim.rounding import StochasticRounding

LearningRate = Callable[[int], float]
_LAST_RATE = 1e-7
"""Final learning rate of the polynomial schedule, as in diffusers; lower peaks fall to zero."""


_FACTOR = "factor"
"""Key in a parameter group: its learning rate as a multiple of the schedule's."""
_TEXT_PREFIX = "text_encoder"
"""Start of the names of text encoders' parameters."""
_ELEMENTWISE = (OptimizerName.ADAMW, OptimizerName.PRODIGY)
"""Optimizers that treat all elements alike. Others look at matrices or at blocks of a parameter."""


def make_optimizer(training: TrainingSpec, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that the manifest names.

    Args:
        training: the training settings.
        parameters: the trained parameters by name; those of text encoders start with "text_encoder".
    """
    groups: list[list[nn.Parameter]] = [[] for _ in range(_num_groups(training))]
    for name, parameter in parameters.items():
        groups[_group_of(training, name)].append(parameter)
    return _build(training, groups)


def make_flat_optimizer(training: TrainingSpec, parameters: Mapping[str, nn.Parameter]) -> FlatOptimizer | None:
    """Return the optimizer that the manifest names, over flat tensors; None if it is not elementwise.

    The parameters become views of flat tensors, in the order of `storage_order`, which is that of their gradients.
    """
    if training.optimizer not in _ELEMENTWISE:
        return None
    names, ordered = list(parameters), list(parameters.values())
    order = storage_order(ordered)
    flats = flatten([ordered[index] for index in order], [_group_of(training, names[index]) for index in order])
    return FlatOptimizer(ordered, flats, partial(_build, training), _num_groups(training))


def make_rounded_optimizer(training: TrainingSpec, parameters: Mapping[str, nn.Parameter]) -> RoundedOptimizer:
    """Return the optimizer that the manifest names, for weights that are stored in bf16."""
    groups = [_group_of(training, name) for name in parameters]
    weights = list(parameters.values())
    rounding = StochasticRounding(training.seed, weights[0].device)
    return RoundedOptimizer(weights, groups, partial(_build, training), rounding)


def _build(training: TrainingSpec, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """Return the optimizer of groups of tensors; see `_group_of`."""
    trained: list[dict[str, Any]] = [{"params": groups[0]}]
    if training.text_encoder_learning_rate is not None:
        factor = training.text_encoder_learning_rate / peak_learning_rate(training)
        trained.append({"params": groups[1], _FACTOR: factor})
    common: dict[str, Any] = {"lr": peak_learning_rate(training), "weight_decay": training.adam_weight_decay}
    if training.optimizer is OptimizerName.ADAFACTOR:
        return Adafactor(trained, **common)
    of_adam: dict[str, Any] = {"betas": (training.adam_beta1, training.adam_beta2), "eps": training.adam_epsilon}
    if training.optimizer is OptimizerName.PRODIGY:
        return Prodigy([parameter for group in groups for parameter in group], **common, **of_adam)
    if training.optimizer is OptimizerName.ADAMW_8BIT:
        # 8-bit moments (https://arxiv.org/abs/2110.02861). `train.checks` has refused devices without it.
        optimizer: torch.optim.Optimizer = importlib.import_module("bitsandbytes").optim.AdamW8bit(
            trained, **common, **of_adam
        )
        return optimizer
    return torch.optim.AdamW(trained, **common, **of_adam, fused=True)


def _num_groups(training: TrainingSpec) -> int:
    return 1 if training.text_encoder_learning_rate is None else 2


def _group_of(training: TrainingSpec, name: str) -> int:
    """Return the group of a parameter: there is a second one if the text encoders have their own learning rate."""
    return int(training.text_encoder_learning_rate is not None and name.startswith(_TEXT_PREFIX))


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


def set_learning_rate(optimizer: StepOptimizer, value: float) -> None:
    """Set the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get(_FACTOR, 1.0)
