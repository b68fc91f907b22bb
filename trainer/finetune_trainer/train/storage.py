"""Chooses how complete weights, gradients and the optimizer's state are stored. Called by `build`; see also `sharding`.

- On GPUs, weights, averages, gradients and moments are few flat tensors, so that updating them takes few launches.
- On CPUs, launches cost little. Gradients stay where backward puts them, and take no memory between two steps.
- bf16 weights without fp32 weights are updated by an optimizer that rounds stochastically.
"""

from __future__ import annotations

import torch

from finetune_contract.spec import Precision, TrainingSpec, WeightPrecision
from finetune_trainer.checkpoint.state import TrainState
from finetune_trainer.distributed.buckets import GradientBuckets
from finetune_trainer.distributed.local import LocalGradients
from finetune_trainer.distributed.world import World
from finetune_trainer.methods.method import Method
from finetune_trainer.optim.ema import Ema
from finetune_trainer.optim.flat import storage_order
from finetune_trainer.optim.flat_optimizer import FlatOptimizer
from finetune_trainer.optim.loss_scale import LossScale
from finetune_trainer.optim.optimizer import make_flat_optimizer, make_optimizer, make_rounded_optimizer
from finetune_trainer.optim.rounded_optimizer import RoundedOptimizer


def make_complete_state(training: TrainingSpec, method: Method, device: torch.device) -> TrainState:
    """Return the state of a rank that holds all weights, before the first step.

    Args:
        training: the training settings.
        method: its parameters may be moved into flat tensors.
        device: device of the parameters.
    """
    parameters = method.parameters()
    optimizer: FlatOptimizer | RoundedOptimizer | torch.optim.Optimizer | None = None
    if training.weight_precision is WeightPrecision.BF16:
        optimizer = make_rounded_optimizer(training, parameters)
    elif uses_flat_tensors(device):
        optimizer = make_flat_optimizer(training, parameters)
    optimizer = optimizer or make_optimizer(training, parameters)
    flats = optimizer.flats if isinstance(optimizer, FlatOptimizer) else ()
    return TrainState(
        parameters,
        optimizer,
        Ema(parameters, flats) if training.ema else None,
        loss_scale=LossScale() if training.precision is Precision.FP16 else None,
        refresh=method.refresh,
    )


def make_complete_gradients(
    training: TrainingSpec, method: Method, state: TrainState, world: World
) -> LocalGradients | GradientBuckets:
    """Return the gradients of a rank that holds all weights, for the state of `make_complete_state`."""
    parameters, leaves = list(method.parameters().values()), list(method.leaves())
    is_flat = uses_flat_tensors(world.device)
    if is_flat:
        order = storage_order(parameters)
        parameters, leaves = [parameters[index] for index in order], [leaves[index] for index in order]
    gradients = (
        LocalGradients(parameters, world.device, leaves)
        if world.size == 1
        else GradientBuckets(parameters, world, training.exchange_precision, leaves=leaves)
    )
    needs_views = isinstance(state.optimizer, FlatOptimizer | RoundedOptimizer)
    if is_flat or needs_views:
        gradients.hold()
    if isinstance(state.optimizer, FlatOptimizer | RoundedOptimizer):
        state.optimizer.attach(dict(zip(parameters, gradients.views(), strict=True)))
    return gradients


def uses_flat_tensors(device: torch.device) -> bool:
    """Return whether launches on a device are expensive."""
    return device.type != "cpu"
