"""Estimated sizes of checkpoints and outputs, and the number of checkpoints. Pure."""

from __future__ import annotations

import math

from finetune_contract.methods import METHODS, TrainedPart
from finetune_contract.outputs.spec import OutputFormat, OutputPrecision, OutputSpec
from finetune_contract.run_spec import RunSpec
from finetune_contract.spec import TrainingSpec, WeightPrecision
from finetune_trainer.train.preset import BYTES_OF_MOMENTS, Weights

_COMPLETE = (OutputFormat.MERGED, OutputFormat.OPENVINO)
"""Formats that contain the base."""


def checkpoint_bytes(training: TrainingSpec, weights: Weights) -> int:
    """Return the size of one checkpoint: the trained weights, their average and the state of the optimizer."""
    stored = 2 if training.weight_precision is WeightPrecision.BF16 else 4
    average = 4 if training.ema else 0
    return int(weights.trained * (stored + BYTES_OF_MOMENTS[training.optimizer] + average))


def num_checkpoints(spec: RunSpec) -> int:
    """Return the most checkpoints that exist at a time: the kept ones, and the one that is being written."""
    steps, every = spec.training.steps, spec.keep_every_steps
    most = spec.keep + 1 + (1 if spec.keep_best else 0) + (steps // every if steps and every else 0)
    interval = spec.checkpoint_interval.steps
    return min(most, math.ceil(steps / interval)) if steps and interval else most


def output_bytes(output: OutputSpec, training: TrainingSpec, weights: Weights, base_bytes: int) -> int:
    """Return the size of an output: what was trained, or a complete model."""
    of_number = 4 if output.precision in (None, OutputPrecision.FP32) else 2
    trains = METHODS[training.method].trains if training.method is not None else TrainedPart.ADAPTER
    if trains is TrainedPart.BASE:
        return weights.trained * of_number
    if output.full or output.format in _COMPLETE:
        return base_bytes + (weights.trained * of_number if output.full else 0)
    return weights.trained * of_number
