"""The rules of `spec.training`, and of what it asks of the rest of the spec. Part of the table in `rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune_contract.spec import (
    SHARDED_METHODS,
    DreamBoothSpec,
    LrScheduler,
    Method,
    Offload,
    Optimizer,
    Precision,
    Sharding,
    TextualInversionSpec,
    TimestepBiasSpec,
    TrainingSpec,
    ValidationSpec,
)
from finetune_operator.api.job import Accelerator, FineTuneJobSpec
from finetune_operator.api.rules.forms import MEMORY_PRESET
from finetune_operator.api.rules.rule import Cause, Rule, Scope, cel_words, form

SPEC = Scope("spec", FineTuneJobSpec)
TRAINING = Scope("spec.training", TrainingSpec)
DREAMBOOTH = Scope("spec.training.dreambooth", DreamBoothSpec)
TEXTUAL_INVERSION = Scope("spec.training.textualInversion", TextualInversionSpec)
TIMESTEP_BIAS = Scope("spec.training.timestepBias", TimestepBiasSpec)
VALIDATION = Scope("spec.training.validation", ValidationSpec)

LORA_METHODS = (Method.LORA, Method.DREAMBOOTH_LORA)
DREAMBOOTH_METHODS = (Method.DREAMBOOTH, Method.DREAMBOOTH_LORA)


def _only_for(field: str, methods: tuple[Method, ...], block: Callable[[TrainingSpec], object]) -> Rule[TrainingSpec]:
    """The settings of a method are refused where another one, or a script, would not read them."""
    return Rule(
        TRAINING,
        field,
        f"!has(self.{field}) || has(self.method) && self.method in {cel_words(methods)}",
        lambda training: block(training) is None or training.method in methods,
        f"{field} is read by {' and '.join(methods)} only; leave {field} out, or write method: {methods[0]}",
        Cause.FORBIDDEN,
    )


def _needed_for(
    field: str, methods: tuple[Method, ...], block: Callable[[TrainingSpec], object], example: str
) -> Rule[TrainingSpec]:
    return Rule(
        TRAINING,
        field,
        f"has(self.{field}) || !has(self.method) || !(self.method in {cel_words(methods)})",
        lambda training: block(training) is not None or training.method not in methods,
        f"{field} is needed by {' and '.join(methods)}; write e.g. {field}: {example}",
        Cause.REQUIRED,
    )


TRAINING_RULES: tuple[Rule[Any], ...] = (
    Rule(
        TRAINING,
        "method",
        "has(self.method) || has(self.script)",
        lambda training: training.method is not None or training.script is not None,
        "method is missing; write e.g. method: LoRA, or a script with its path",
        Cause.REQUIRED,
    ),
    Rule(
        TRAINING,
        "script",
        "!has(self.method) || !has(self.script)",
        lambda training: training.method is None or training.script is None,
        "method and script contradict each other; leave one of them out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "steps",
        "has(self.steps) || has(self.epochs) || !has(self.method)",
        lambda training: (training.steps, training.epochs) != (None, None) or training.method is None,
        "steps is missing; write e.g. steps: 1000, or epochs: 10",
        Cause.REQUIRED,
    ),
    Rule(
        TRAINING,
        "epochs",
        "!has(self.steps) || !has(self.epochs)",
        lambda training: training.steps is None or training.epochs is None,
        "steps and epochs contradict each other; leave one of them out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "lrWarmupSteps",
        "!has(self.steps) || self.lrWarmupSteps == 0 || self.lrWarmupSteps < self.steps",
        lambda training: (
            not training.steps or not training.lr_warmup_steps or training.lr_warmup_steps < training.steps
        ),
        "lrWarmupSteps leaves no step at the full learning rate; write fewer than steps",
    ),
    Rule(
        TRAINING,
        "lrWarmupSteps",
        "self.lrWarmupSteps == 0 || self.lrScheduler != 'constant'",
        lambda training: training.lr_warmup_steps == 0 or training.lr_scheduler is not LrScheduler.CONSTANT,
        "lrWarmupSteps is not read by lrScheduler constant; write lrScheduler: constant_with_warmup",
    ),
    Rule(
        TRAINING,
        "sharding",
        f"self.sharding == 'none' || has(self.method) && self.method in {cel_words(SHARDED_METHODS)}",
        lambda training: training.sharding is Sharding.NONE or training.method in SHARDED_METHODS,
        f"sharding is for {', '.join(SHARDED_METHODS)}, which train whole models; leave sharding out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "sharding",
        "self.sharding == 'none' || self.optimizer == 'adamw'",
        lambda training: training.sharding is Sharding.NONE or training.optimizer is Optimizer.ADAMW,
        "sharding cuts the optimizer's state into slices, which only AdamW's allows; write optimizer: adamw, or leave "
        "sharding out",
        Cause.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "offload",
        "self.offload == 'none' || self.sharding == 'full'",
        lambda training: training.offload is Offload.NONE or training.sharding is Sharding.FULL,
        "offload keeps slices in the host's memory; write sharding: full, on one GPU, too, or leave offload out",
        Cause.FORBIDDEN,
    ),
    form(
        "spec.training.memoryPreset",
        MEMORY_PRESET,
        "memoryPreset is unknown; write auto, cpu or the GPU's memory, e.g. 16GB",
    ),
    _only_for("lora", LORA_METHODS, lambda training: training.lora),
    _only_for("dreambooth", DREAMBOOTH_METHODS, lambda training: training.dreambooth),
    _needed_for(
        "dreambooth",
        DREAMBOOTH_METHODS,
        lambda training: training.dreambooth,
        "{instancePrompt: a photo of sks dog}",
    ),
    _only_for("textualInversion", (Method.TEXTUAL_INVERSION,), lambda training: training.textual_inversion),
    _needed_for(
        "textualInversion",
        (Method.TEXTUAL_INVERSION,),
        lambda training: training.textual_inversion,
        "{placeholderToken: <cat-toy>, initializerToken: toy}",
    ),
    _only_for("controlnet", (Method.CONTROLNET,), lambda training: training.controlnet),
    Rule(
        TRAINING,
        "validation",
        "!has(self.validation) || has(self.method)",
        lambda training: training.validation is None or training.method is not None,
        "validation is not read by a script; leave it out, or tell the script by its args",
        Cause.FORBIDDEN,
    ),
    Rule(
        VALIDATION,
        "prompts",
        "self.prompts.size() > 0 || has(self.split)",
        lambda validation: len(validation.prompts) > 0 or validation.split is not None,
        "validation has nothing to look at; write prompts to draw, a held-out split, or both",
        Cause.REQUIRED,
    ),
    Rule(
        DREAMBOOTH,
        "classPrompt",
        "has(self.classPrompt) || self.numClassImages == 100 && self.priorLossWeight == 1.0",
        lambda dreambooth: (
            dreambooth.class_prompt is not None
            or (dreambooth.num_class_images == 100 and dreambooth.prior_loss_weight == 1.0)
        ),
        "numClassImages and priorLossWeight need classPrompt; write e.g. classPrompt: a photo of a dog",
        Cause.REQUIRED,
    ),
    form(
        "spec.training.textualInversion.placeholderToken",
        r"^[^ \t\n\r]+$",
        "placeholderToken has a space in it; write one token, e.g. <cat-toy>",
    ),
    Rule(
        TEXTUAL_INVERSION,
        "initializerToken",
        "self.initializerToken != self.placeholderToken",
        lambda inversion: inversion.initializer_token != inversion.placeholder_token,
        "initializerToken is the new token itself; write a word that the text encoder knows, e.g. toy",
    ),
    Rule(
        TIMESTEP_BIAS,
        "end",
        "self.begin < self.end",
        lambda bias: bias.begin < bias.end,
        "end is not after begin, so the range holds no timestep; write e.g. begin: 200 and end: 600",
    ),
    Rule(
        SPEC,
        "training.precision",
        "self.topology.accelerator != 'cpu' || self.training.precision != 'fp16'",
        lambda spec: spec.topology.accelerator is not Accelerator.CPU or spec.training.precision is not Precision.FP16,
        "precision fp16 is for GPUs; write bf16 or fp32 with accelerator cpu",
    ),
    Rule(
        SPEC,
        "training.optimizer",
        "self.topology.accelerator != 'cpu' || self.training.optimizer != 'adamw8bit'",
        lambda spec: (
            spec.topology.accelerator is not Accelerator.CPU or spec.training.optimizer is not Optimizer.ADAMW_8BIT
        ),
        "optimizer adamw8bit is for GPUs; write adamw or adafactor with accelerator cpu",
    ),
    Rule(
        SPEC,
        "training.offload",
        "self.topology.accelerator != 'cpu' || self.training.offload == 'none'",
        lambda spec: spec.topology.accelerator is not Accelerator.CPU or spec.training.offload is Offload.NONE,
        "offload is for GPUs, and with accelerator cpu all is in the host's memory already; leave offload out",
        Cause.FORBIDDEN,
    ),
    Rule(
        SPEC,
        "training.memoryPreset",
        "!has(self.training.memoryPreset) || self.training.memoryPreset == 'auto'"
        " || (self.training.memoryPreset == 'cpu') == (self.topology.accelerator == 'cpu')",
        lambda spec: (
            spec.training.memory_preset in (None, "auto")
            or (spec.training.memory_preset == "cpu") == (spec.topology.accelerator is Accelerator.CPU)
        ),
        "memoryPreset is not for this accelerator; write auto, cpu with accelerator cpu, or the GPU's memory",
    ),
)
