"""Counts the arithmetic of one image in a training step of each case, by torch's FlopCounter on meta tensors in fp32.

It counts matrix products, convolutions and attention of forward and backward pass as plain operations. What fused
attention recomputes in the backward pass, 2-4 % of a step, is left out, so the share of the peak is not flattered. What
gradient checkpointing recomputes counts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu_kit.bases import case_of, has_setting, make_training
from bench.gpu_kit.items import Context
from finetune_contract.spec import Precision
from finetune_trainer.data.sampling.draws import Draws
from finetune_trainer.methods.method import MethodContext
from finetune_trainer.methods.registry import method_class
from testing.gpu_kit.schedule import CASES, TrainingCase
from testing.measure.launches import META, LaunchCase, MetaFamily, make_batch


def flops(context: Context) -> None:
    """Record the floating-point operations of one image, by case. A case that fails does not affect the others."""
    computed: dict[str, int] = {}
    of_model: dict[str, int] = {}
    for name in CASES:
        case = case_of(context, name)
        try:
            computed[name] = of_model[name] = count(case)
            if case.training.get("gradientCheckpointing"):
                of_model[name] = count(dataclasses.replace(case, training={}))
        except Exception as error:
            context.record.error(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
        context.record.add(flops_per_image=computed, model_flops_per_image=of_model)


def count(case: TrainingCase) -> int:
    """Return the floating-point operations of one image in a step without graphs and compiler."""
    training = make_training(case, 1, {name: False for name in ("compile", "cudaGraphs") if has_setting(name)})
    training = training.model_copy(update={"precision": Precision.FP32})
    family = MetaFamily(case.family)
    # A ControlNet is made from the UNet, which has no data to copy.
    with META:
        method = method_class(training.method)(MethodContext(family, training, Draws(0), META, torch.float32))
    batch = make_batch(LaunchCase(case.family, case.method, case.resolution, 1))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(method.losses(batch).sum())
    return int(counter.get_total_flops())
