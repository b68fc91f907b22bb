"""The rules of `spec.training` and of its combinations with the rest of the spec. Part of the table in `spec`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic.alias_generators import to_camel

from finetune_contract.methods import (
    METHODS,
    SHARDABLE_METHODS,
    methods_where,
)
from finetune_contract.spec import (
    Attention,
    DreamBoothSpec,
    LrScheduler,
    Offload,
    Optimizer,
    Precision,
    Sharding,
    TextualInversionSpec,
    TrainingSpec,
    WeightPrecision,
)
from finetune_contract.validation_spec import TimestepBiasSpec, ValidationSpec
from finetune_operator.api.job import Accelerator, FineTuneJobSpec
from finetune_operator.api.rules.forms import MEMORY_PRESET
from finetune_operator.api.rules.rule import FieldErrorReason, Rule, Scope, cel_list, form, join_names

SPEC = Scope("spec", FineTuneJobSpec)
TRAINING = Scope("spec.training", TrainingSpec)
DREAMBOOTH = Scope("spec.training.dreambooth", DreamBoothSpec)
TEXTUAL_INVERSION = Scope("spec.training.textualInversion", TextualInversionSpec)
TIMESTEP_BIAS = Scope("spec.training.timestepBias", TimestepBiasSpec)
VALIDATION = Scope("spec.training.validation", ValidationSpec)

_EXAMPLES = {
    "dreambooth": "{instancePrompt: a photo of sks dog}",
    "textual_inversion": "{placeholderToken: <cat-toy>, initializerToken: toy}",
}
"""An example of each settings block that a method requires."""


def _forbidden_settings(name: str) -> Rule[TrainingSpec]:
    """Return the rule that refuses the settings of a method if another method, or a script, would not read them."""
    field = to_camel(name)
    methods = methods_where(lambda traits: name in traits.settings)
    also = " with dataset.columns.conditioning" if METHODS[methods[0]].needs_conditioning else ""
    return Rule(
        TRAINING,
        field,
        f"!has(self.{field}) || has(self.method) && self.method in {cel_list(methods)}",
        lambda training: getattr(training, name) is None or training.method in methods,
        f"{field} applies to {join_names(methods)} only; leave {field} out, or write method: {methods[0]}{also}",
        FieldErrorReason.FORBIDDEN,
    )


def _required_settings(name: str) -> Rule[TrainingSpec]:
    """Return the rule that requires the settings of a method that have no default."""
    field = to_camel(name)
    methods = methods_where(lambda traits: name in traits.required_settings)
    return Rule(
        TRAINING,
        field,
        f"has(self.{field}) || !has(self.method) || !(self.method in {cel_list(methods)})",
        lambda training: getattr(training, name) is not None or training.method not in methods,
        f"{field} is required for {join_names(methods)}; write e.g. {field}: {_EXAMPLES[name]}",
        FieldErrorReason.REQUIRED,
    )


def _trains_text_encoders(training: TrainingSpec) -> bool:
    return any(
        settings is not None and settings.train_text_encoder for settings in (training.lora, training.dreambooth)
    )


def _settings_rules() -> Iterator[Rule[TrainingSpec]]:
    """Yield the rules of the methods' own settings, from the table of methods."""
    for name in dict.fromkeys(name for traits in METHODS.values() for name in traits.settings):
        yield _forbidden_settings(name)
        if any(name in traits.required_settings for traits in METHODS.values()):
            yield _required_settings(name)


def _scheduler_setting(name: str, scheduler: LrScheduler) -> Rule[TrainingSpec]:
    """Return the rule that refuses the setting of one learning-rate schedule if another one would ignore it."""
    field = to_camel(name)
    return Rule(
        TRAINING,
        field,
        f"!has(self.{field}) || self.lrScheduler == '{scheduler}'",
        lambda training: getattr(training, name) is None or training.lr_scheduler is scheduler,
        f"{field} applies to lrScheduler {scheduler} only; write lrScheduler: {scheduler}, or leave {field} out",
        FieldErrorReason.FORBIDDEN,
    )


def _weight_precision_rules() -> Iterator[Rule[TrainingSpec]]:
    """Yield the rules of weights that are stored in bf16."""
    field, is_fp32 = "weightPrecision", "self.weightPrecision == 'fp32'"

    def allowed(condition: Callable[[TrainingSpec], bool]) -> Callable[[TrainingSpec], bool]:
        return lambda training: training.weight_precision is WeightPrecision.FP32 or condition(training)

    # The methods that train complete models are those that can be sharded.
    yield Rule(
        TRAINING,
        field,
        f"{is_fp32} || has(self.method) && self.method in {cel_list(SHARDABLE_METHODS)}",
        allowed(lambda training: training.method in SHARDABLE_METHODS),
        f"weightPrecision bf16 applies to {join_names(SHARDABLE_METHODS)} only, since they train complete models; "
        "leave weightPrecision out",
        FieldErrorReason.FORBIDDEN,
    )
    yield Rule(
        TRAINING,
        field,
        f"{is_fp32} || has(self.precision) && self.precision == 'bf16'",
        allowed(lambda training: training.precision is Precision.BF16),
        "weightPrecision bf16 needs a forward pass in bf16; write precision: bf16, or leave weightPrecision out",
        FieldErrorReason.FORBIDDEN,
    )
    yield Rule(
        TRAINING,
        field,
        f"{is_fp32} || self.sharding == 'none'",
        allowed(lambda training: training.sharding is Sharding.NONE),
        "sharding keeps its slices of the weights in fp32; leave weightPrecision out, or leave sharding out",
        FieldErrorReason.FORBIDDEN,
    )
    yield Rule(
        TRAINING,
        field,
        f"{is_fp32} || self.optimizer != 'prodigy'",
        allowed(lambda training: training.optimizer is not Optimizer.PRODIGY),
        "optimizer prodigy compares all weights with those of the start, which needs fp32; leave weightPrecision out, "
        "or write optimizer: adamw",
        FieldErrorReason.FORBIDDEN,
    )


TRAINING_RULES: tuple[Rule[Any], ...] = (
    Rule(
        TRAINING,
        "method",
        "has(self.method) || has(self.script)",
        lambda training: training.method is not None or training.script is not None,
        "method is missing; write e.g. method: LoRA",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        TRAINING,
        "script",
        "!has(self.method) || !has(self.script)",
        lambda training: training.method is None or training.script is None,
        "method and script exclude each other; leave script out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "steps",
        "has(self.steps) || has(self.epochs) || !has(self.method)",
        lambda training: (training.steps, training.epochs) != (None, None) or training.method is None,
        "steps or epochs is required; write e.g. steps: 1000 or epochs: 10",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        TRAINING,
        "epochs",
        "!has(self.steps) || !has(self.epochs)",
        lambda training: training.steps is None or training.epochs is None,
        "steps and epochs exclude each other; leave steps out, or leave epochs out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "lrWarmupSteps",
        "!has(self.steps) || self.lrWarmupSteps == 0 || self.lrWarmupSteps < self.steps",
        lambda training: (
            not training.steps or not training.lr_warmup_steps or training.lr_warmup_steps < training.steps
        ),
        "lrWarmupSteps leaves no step at the full learning rate; write a number below steps",
    ),
    Rule(
        TRAINING,
        "lrWarmupSteps",
        "self.lrWarmupSteps == 0 || self.lrScheduler != 'constant'",
        lambda training: training.lr_warmup_steps == 0 or training.lr_scheduler is not LrScheduler.CONSTANT,
        "lrScheduler constant ignores lrWarmupSteps; write lrScheduler: constant_with_warmup, or leave lrWarmupSteps "
        "out",
    ),
    Rule(
        TRAINING,
        "textEncoderLearningRate",
        "!has(self.textEncoderLearningRate) || has(self.lora) && self.lora.trainTextEncoder || "
        "has(self.dreambooth) && self.dreambooth.trainTextEncoder",
        lambda training: training.text_encoder_learning_rate is None or _trains_text_encoders(training),
        "textEncoderLearningRate needs a trained text encoder; write lora.trainTextEncoder: true, or leave "
        "textEncoderLearningRate out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "textEncoderLearningRate",
        "!has(self.textEncoderLearningRate) || self.optimizer != 'prodigy'",
        lambda training: training.text_encoder_learning_rate is None or training.optimizer is not Optimizer.PRODIGY,
        "optimizer prodigy finds one step size for all weights; leave textEncoderLearningRate out, or write optimizer: "
        "adamw",
        FieldErrorReason.FORBIDDEN,
    ),
    _scheduler_setting("lr_num_cycles", LrScheduler.COSINE_WITH_RESTARTS),
    _scheduler_setting("lr_power", LrScheduler.POLYNOMIAL),
    Rule(
        TRAINING,
        "sharding",
        f"self.sharding == 'none' || has(self.method) && self.method in {cel_list(SHARDABLE_METHODS)}",
        lambda training: training.sharding is Sharding.NONE or training.method in SHARDABLE_METHODS,
        f"only {join_names(SHARDABLE_METHODS)} support sharding, since they train complete models; leave sharding out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        TRAINING,
        "sharding",
        "self.sharding == 'none' || self.optimizer == 'adamw'",
        lambda training: training.sharding is Sharding.NONE or training.optimizer is Optimizer.ADAMW,
        "sharding splits the optimizer's state, which only adamw supports; write optimizer: adamw, or leave sharding "
        "out",
        FieldErrorReason.FORBIDDEN,
    ),
    *_weight_precision_rules(),
    Rule(
        TRAINING,
        "offload",
        "self.offload == 'none' || self.sharding == 'full'",
        lambda training: training.offload is Offload.NONE or training.sharding is Sharding.FULL,
        "offload applies to sharded training only; leave offload out, or write sharding: full with method "
        f"{join_names(SHARDABLE_METHODS, 'or')}",
        FieldErrorReason.FORBIDDEN,
    ),
    form(
        "spec.training.memoryPreset",
        MEMORY_PRESET,
        "memoryPreset is not valid; write auto, cpu or the GPU's memory, e.g. 16GB",
    ),
    *_settings_rules(),
    Rule(
        TRAINING,
        "validation",
        "!has(self.validation) || has(self.method)",
        lambda training: training.validation is None or training.method is not None,
        "validation is not supported with a script; leave validation out",
        FieldErrorReason.FORBIDDEN,
    ),
    Rule(
        VALIDATION,
        "prompts",
        "self.prompts.size() > 0 || has(self.split)",
        lambda validation: len(validation.prompts) > 0 or validation.split is not None,
        "validation needs prompts or split; write prompts to draw, the name of a held-out split, or both",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        DREAMBOOTH,
        "classPrompt",
        "has(self.classPrompt) || self.numClassImages == 100 && self.priorLossWeight == 1.0 && !has(self.classImages)",
        lambda dreambooth: (
            dreambooth.class_prompt is not None
            or (
                (dreambooth.num_class_images, dreambooth.prior_loss_weight) == (100, 1.0)
                and dreambooth.class_images is None
            )
        ),
        "classImages, numClassImages and priorLossWeight need classPrompt; write e.g. classPrompt: a photo of a dog, "
        "or leave classImages, numClassImages and priorLossWeight out",
        FieldErrorReason.REQUIRED,
    ),
    form(
        "spec.training.textualInversion.placeholderToken",
        r"^[^ \t\n\r]+$",
        "placeholderToken contains white space; write one token, e.g. <cat-toy>",
    ),
    Rule(
        TEXTUAL_INVERSION,
        "initializerToken",
        "!has(self.initializerToken) || self.initializerToken != self.placeholderToken",
        lambda inversion: inversion.initializer_token != inversion.placeholder_token,
        "initializerToken is the same as placeholderToken; write a word that the text encoder knows, e.g. toy",
    ),
    Rule(
        TEXTUAL_INVERSION,
        "initializerToken",
        "has(self.initializerToken) || has(self.base)",
        lambda inversion: inversion.initializer_token is not None or inversion.base is not None,
        "initializerToken is required without base; write a word that is close to the subject, e.g. initializerToken: "
        "toy, or an embedding to start from, e.g. base: learned_embeds.safetensors",
        FieldErrorReason.REQUIRED,
    ),
    Rule(
        TIMESTEP_BIAS,
        "end",
        "self.begin < self.end",
        lambda bias: bias.begin < bias.end,
        "end is not greater than begin, so the range contains no timestep; write e.g. begin: 200 and end: 600",
    ),
    Rule(
        SPEC,
        "training.precision",
        "self.topology.accelerator != 'cpu' || !has(self.training.precision) || self.training.precision != 'fp16'",
        lambda spec: spec.topology.accelerator is not Accelerator.CPU or spec.training.precision is not Precision.FP16,
        "precision fp16 is not supported with accelerator cpu; write bf16 or fp32",
    ),
    Rule(
        SPEC,
        "training.optimizer",
        "self.topology.accelerator != 'cpu' || self.training.optimizer != 'adamw8bit'",
        lambda spec: (
            spec.topology.accelerator is not Accelerator.CPU or spec.training.optimizer is not Optimizer.ADAMW_8BIT
        ),
        "optimizer adamw8bit is not supported with accelerator cpu; write adamw, adafactor or prodigy",
    ),
    Rule(
        SPEC,
        "training.attention",
        "self.topology.accelerator != 'cpu' || !(self.training.attention in ['efficient', 'cudnn'])",
        lambda spec: (
            spec.topology.accelerator is not Accelerator.CPU
            or spec.training.attention not in (Attention.EFFICIENT, Attention.CUDNN)
        ),
        "attention efficient and cudnn are not supported with accelerator cpu; write auto, flash or math",
    ),
    Rule(
        SPEC,
        "training.attention",
        "self.topology.accelerator != 'gpu' || !(self.training.attention in ['flash', 'cudnn'])"
        " || !has(self.training.precision) || self.training.precision != 'fp32'",
        lambda spec: (
            spec.topology.accelerator is not Accelerator.GPU
            or spec.training.attention not in (Attention.FLASH, Attention.CUDNN)
            or spec.training.precision is not Precision.FP32
        ),
        "attention flash and cudnn compute in 16 bits on GPUs, and precision is fp32; write attention: auto, or "
        "precision: bf16",
    ),
    Rule(
        SPEC,
        "training.offload",
        "self.topology.accelerator != 'cpu' || self.training.offload == 'none'",
        lambda spec: spec.topology.accelerator is not Accelerator.CPU or spec.training.offload is Offload.NONE,
        "offload is for GPUs: with accelerator cpu all data is in the host's memory already; leave offload out",
        FieldErrorReason.FORBIDDEN,
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
        "memoryPreset does not fit topology.accelerator; write auto, cpu with accelerator: cpu, or the GPU's memory, "
        "e.g. 16GB, with accelerator: gpu",
    ),
)
